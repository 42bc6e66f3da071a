"""Reading golden.npz: the frames that a version is compared on, and what the exporter's network said of them;
and inputs.npz: what the build ran a foreign graph on.

The files come from outside: sizes, dtypes and shapes are read from their headers before anything is unpacked,
no more frames are unpacked than are used, and nothing is ever unpickled.  Knows numpy and zip files only.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from runtime.errors import Refused
from runtime.tensors import DTYPES, Array, TensorSpec

#: The file of a version that holds the inputs which its build ran, one array for each input of the graph.
INPUTS = "inputs.npz"


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


def inputs(content: bytes, specs: Sequence[TensorSpec], *, limit: int) -> dict[str, Array]:
    """The arrays of inputs.npz by the names of `specs`; texts become objects, as engines take them.

    Raises Refused("golden", …) where one is absent, is not what its tensor takes, or where all would take
    more than `limit` bytes of memory.
    """
    arrays = named(content, limit=limit, file=INPUTS, over="guard.golden_bytes allows less")
    found: dict[str, Array] = {}
    for spec in specs:
        array = arrays.get(spec.name)
        if array is None:
            raise Refused("golden", f"{INPUTS} has no '{spec.name}'; build the version again")
        if spec.datatype == "BYTES" and array.dtype.kind in "US":
            array = array.astype(np.object_)
        if array.dtype != DTYPES[spec.datatype] or not spec.fits(array.shape):
            raise Refused(
                "golden",
                f"{INPUTS}: '{spec.name}' is {array.dtype} {list(array.shape)}, "
                f"the engine takes {spec.datatype} {list(spec.shape)}; build the version again",
            )
        found[spec.name] = array
    return found


def named(content: bytes, *, limit: int, file: str, over: str) -> dict[str, Array]:
    """Every array of an .npz by name: numbers, booleans and texts of fixed width; checksums are compared.

    Raises Refused("golden", …) for what is no such file, for arrays of Python objects, and where all arrays
    together would take more than `limit` bytes: `over` ends that sentence.
    """
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                if not member.endswith(".npy"):
                    raise Refused("golden", f"{file} holds {member!r}, which is no array")
                array = _whole(archive, member, file, limit, over)
                limit -= array.nbytes
                arrays[member.removesuffix(".npy")] = array
    except Refused:
        raise
    except Exception as error:  # zlib, zipfile and numpy each raise their own
        why = " ".join(str(error).split())[:200]
        raise Refused("golden", f"{file} cannot be read: {why or type(error).__name__}") from error
    return arrays


def _whole(archive: zipfile.ZipFile, member: str, file: str, left: int, over: str) -> Array:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise Refused("golden", f"{file}: {member!r} has the .npy version {version}")
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.kind not in "biufUS":
            raise Refused(
                "golden", f"{file}: {member!r} is of type {dtype}; numbers, booleans and texts (str) are read"
            )
        size = math.prod(shape) * dtype.itemsize
        if size > left:
            raise Refused("golden", f"{file}: {member!r} would take {size >> 20} MiB; {over}")
        data = stream.read(size + 1)  # one more, so that the end is met and the checksum compared
        if len(data) != size:
            raise Refused("golden", f"{file}: {member!r} has {len(data)} bytes, its header says {size}")
        # Copied, because an engine may want memory of its own, and in the order that engines take.
        array = np.frombuffer(data, dtype) if dtype.itemsize else np.zeros(math.prod(shape), dtype)
        array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
        return np.array(array, dtype=dtype.newbyteorder("="), order="C")


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
