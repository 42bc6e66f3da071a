"""Type stubs of TensorRT's Python bindings, made from the bindings themselves on a machine without TensorRT.

`shim.c` is compiled into three small libraries that let NVIDIA's bindings wheel import without libnvinfer;
`signatures` reads the signature line that pybind11 leaves in each docstring; `generate` writes them down as a
stub package; `__main__` fetches the wheels and does all of it.  Only names, types and defaults are taken: no
docstring text is kept, and nothing generated is committed.
"""
