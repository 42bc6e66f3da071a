"""gRPC: servicers, authentication, and the conversion between messages and arrays."""
