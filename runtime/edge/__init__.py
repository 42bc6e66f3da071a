"""The gRPC edge: the only part of the runtime that knows protobuf and gRPC.  It converts and does nothing
else.
"""
