"""Reading golden.npz: the frames that a version is compared on, and what the exporter's network said of them.

The file comes from outside: sizes, dtypes and shapes are read from its headers before anything is unpacked,
no more frames are unpacked than are used, and nothing is ever unpickled.  Knows numpy and zip files only.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping

import numpy as np

from runtime.errors import Refused
from runtime.tensors import Array


def read(content: bytes, dtypes: Mapping[str, str], *, frames: int, limit: int) -> dict[str, Array]:
    """The arrays named in `dtypes` ({"frames": "uint8", …}), at most the first `frames` of each.

    Raises Refused("golden", …) for a file that is not what it should be, or that would take more than `limit`
    bytes of memory.
    """
    left = limit
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = set(archive.namelist())
            for name, dtype in dtypes.items():
                if f"{name}.npy" not in members:
                    raise Refused("golden", f"golden.npz has no '{name}'; build it with export.build")
                arrays[name] = _array(archive, name, np.dtype(dtype), frames, left)
                left -= arrays[name].nbytes
    except Refused:
        raise
    except Exception as error:  # zlib, zipfile and numpy each raise their own
        why = " ".join(str(error).split())[:200]
        raise Refused("golden", f"golden.npz cannot be read: {why or type(error).__name__}") from error
    return arrays


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[np.generic], frames: int, left: int) -> Array:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise Refused("golden", f"golden.npz: '{name}' has the .npy version {version}")
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, kind = header(file)
        if kind != dtype or fortran or not shape or min(shape) < 1:
            order = ", in Fortran order" if fortran else ""
            raise Refused("golden", f"golden.npz: '{name}' is {kind} {shape}{order}; it must be {dtype}")
        shape = (min(frames, shape[0]), *shape[1:])
        size = math.prod(shape) * dtype.itemsize
        if size > left:
            raise Refused(
                "golden", f"golden.npz: '{name}' would take {size >> 20} MiB; guard.golden_bytes allows less"
            )
        data = file.read(size)
        if len(data) != size:
            raise Refused("golden", f"golden.npz: '{name}' ends after {len(data)} of {size} bytes")
        return np.frombuffer(data, dtype).reshape(shape)
