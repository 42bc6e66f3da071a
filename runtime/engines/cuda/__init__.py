"""CUDA device memory, streams and contexts through pycuda."""
