"""Engine to service: repository, engines, slots, guarded swap, gRPC.

May import ``protos`` and ``common`` and nothing else of this project.  Never imports torch or onnx: a
vehicle that only serves installs numpy, grpcio, protobuf, an engine library and
prometheus-client.
"""

from common.launch import watch

watch()
