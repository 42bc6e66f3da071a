"""What a checkpoint of somebody else may hold beside its weights, and how large it may become.

torch reads such a file as tensors only.  Three things it leaves to us: it refuses a file whole for a NumPy
number beside the weights, it compares no checksums, and a tensor of a few bytes may claim any size.
Knows zip files, pickles' names and tensors; nothing of networks.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.text import shorten

#: How torch recognises a zip file.
_ZIP = b"PK\x03\x04"
#: Bytes that records may unpack to, for each byte of the file and beside that: torch compresses none, and
#: weights hardly become smaller.
_RATIO, _SLACK = 16, 64 << 20
#: Bytes of all tensors for each byte of their storages: names that share their weights.
_SHARED = 4


class Ignored:
    """Stands for an object beside the weights.  It takes whatever a pickle gives it and does nothing."""

    def __new__(cls, *args: object, **named: object) -> Ignored:
        return object.__new__(cls)

    def __init__(self, *args: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _mapping(*args: object) -> dict[Any, Any]:
    """Stands for a mapping beside the weights, which a pickle fills."""
    return {}


#: Types of records that trainers keep beside the weights, none of which is ever called here.
_RECORDS = (
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator", "bit_generator")),
    "numpy.random._pcg64.PCG64",
    "numpy.random._mt19937.MT19937",
    "numpy.random._philox.Philox",
    "numpy.random.bit_generator.SeedSequence",
    "numpy.random._generator.Generator",
    "numpy.random.mtrand.RandomState",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    *sorted({f"numpy.{kind.__name__}" for kind in np.sctypeDict.values()}),
    "argparse.Namespace",
    "types.SimpleNamespace",
    "copyreg._reconstructor",
    "builtins.object",
    "datetime.datetime",
    "datetime.date",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.bytearray",
    "builtins.slice",
    "builtins.range",
    "builtins.list",
    "builtins.dict",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.tuple",
)


def records() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Names that a checkpoint may call beside tensors, for torch.serialization.safe_globals.

    Each stands for `Ignored` or an empty mapping: nothing of NumPy or of the named module is executed.
    """
    return [*((Ignored, name) for name in _RECORDS), (_mapping, "collections.defaultdict")]


def check_archive(path: Path) -> None:
    """Refuse a zip file that is damaged or unpacks to far more than it holds.

    Files in torch's older format are no zip files and pass.
    Raises: ValueError, whose message is what the file does.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                raise ValueError("is damaged: two records have one name")
            unpacked, room = sum(m.file_size for m in members), _RATIO * path.stat().st_size + _SLACK
            if unpacked > room:
                raise ValueError(
                    f"unpacks to {unpacked >> 20} MiB, more than weights of this file can be: refused; "
                    "ask its author for a file as torch.save writes it"
                )
            wrong = archive.testzip()
    except ValueError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"cannot be read (truncated or damaged): {shorten(error, 160)}") from error
    except Exception as error:  # zlib's own
        raise ValueError(f"is damaged: {shorten(error, 160)}") from error
    if wrong is not None:
        raise ValueError(
            f"is damaged: record {wrong!r} does not have its checksum; fetch it again, or save it with "
            "checksums (torch.serialization.set_crc32_options(True))"
        )


def check_sizes(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that repeat few values to a size that no file holds.

    Raises: ValueError, whose message is what the file does.
    """
    storages: dict[int, int] = {}
    largest, most, total = "", 0, 0
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        size = tensor.numel() * max(tensor.itemsize, 4)  # a pack holds float32
        total += size
        if size > most:
            largest, most = name, size
    if total > 2 * _SHARED * sum(storages.values()) + _SLACK:
        raise ValueError(
            f"repeats few values to {total >> 20} MiB (most of it {largest!r}): refused; "
            "save its tensors with contiguous()"
        )
