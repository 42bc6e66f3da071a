"""TensorRT-RTX, NVIDIA's sibling of TensorRT that parses and builds on a machine without a GPU.

It is another product: a plan it builds runs with TensorRT-RTX on an RTX card, and shows nothing about how
TensorRT would run the network.  Here it is the real parser and type checker that an exported graph must pass.
Optional, and proprietary (NVIDIA's TensorRT-RTX licence): nothing of it is part of this project.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from pathlib import Path

from runtime.engines.tensorrt.library import Library, TensorRTError, library_of

INSTALL = "pip install 'roadworthy[rtx]' (315 MB; Linux x86-64)"
# Packages that may bring the shared libraries.
_CARRIERS = ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_libs")
_LIBRARIES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


def tensorrt_rtx() -> Library:
    """The installed TensorRT-RTX, ready to parse and build.

    Raises TensorRTError where the wheels are absent.
    """
    folders = [
        Path(location)
        for carrier in _CARRIERS
        if (spec := importlib.util.find_spec(carrier)) is not None
        for location in spec.submodule_search_locations or ()
    ]
    for pattern in _LIBRARIES:
        found = next((path for folder in folders for path in sorted(folder.glob(pattern))), None)
        if found is None:
            raise TensorRTError(f"TensorRT-RTX is not installed ({pattern} was not found): {INSTALL}")
        # The bindings name these libraries without a path; what is loaded already is taken by its SONAME.
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    try:
        return library_of(importlib.import_module("tensorrt_rtx_bindings"))
    except ImportError as error:
        raise TensorRTError(f"TensorRT-RTX's bindings cannot be imported ({error}): {INSTALL}") from None
