"""Comparison of an engine with the network that it was built from."""
