"""From a network to an ONNX graph: contract, writer, heads, batch normalisation folding, lint."""
