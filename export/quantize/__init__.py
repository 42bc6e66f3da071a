"""INT8 quantisation of an ONNX graph and the search for the layers that tolerate it."""
