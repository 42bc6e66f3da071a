"""One codec for multi-label edge maps: bit fields in memory, and SEAL's, DFF's and our own files.

In memory a label is uint32 [channels,H,W], channels = ceil((K+1)/32): class k is bit k % 32 of channel k //
32, and bit 31 of the last channel says "ignore".  On disk:

  .npz   ours: bits, classes; any number of classes, ignore kept
  .bin   SEAL: the bare uint32, row-major, channel by channel; the size is not in the file
  .mat   SEAL: the cell array ``labelEdge`` of K sparse logical maps; no ignore
  .png   DFF: 24 bits in three channels, blue holds classes 0-7, green 8-15, red 16-23; no ignore

Every path is bit-exact there and back; what a format cannot hold is refused, never cut off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt.labels.errors import EdgeError

__all__ = [
    "IGNORE_BIT",
    "channels_of",
    "pack",
    "read",
    "read_bin",
    "read_mat",
    "read_npz",
    "read_png",
    "unpack",
    "write",
    "write_bin",
    "write_mat",
    "write_npz",
    "write_png",
]

IGNORE_BIT = 31
PNG_CLASSES = 24


def channels_of(classes: int) -> int:
    """How many uint32 a pixel takes: every class a bit, and one for ignore."""
    if not isinstance(classes, int | np.integer) or classes < 1:
        raise EdgeError(f"edge labels: {classes!r} classes; a whole number of at least 1 is needed")
    return (classes + 1 + 31) // 32


def pack(edges: NDArray[np.bool_], ignore: NDArray[np.bool_] | None = None) -> NDArray[np.uint32]:
    """bool [K,H,W] (and bool [H,W]) -> bit field uint32 [channels,H,W].

    Bits of ignored pixels are kept too.  Raises EdgeError for other shapes and dtypes.
    """
    edges = np.asarray(edges)
    if edges.ndim != 3 or edges.dtype != np.bool_ or not edges.size:
        raise EdgeError(
            f"edge labels: the maps are {edges.dtype} {list(edges.shape)}, bool [K,H,W] with a class and a "
            "pixel at least is needed"
        )
    k, height, width = edges.shape
    bits = np.zeros((channels_of(k), height, width), np.uint32)
    for c in range(k):
        bits[c // 32] |= edges[c].astype(np.uint32) << np.uint32(c % 32)
    if ignore is not None:
        ignore = np.asarray(ignore)
        if ignore.shape != (height, width) or ignore.dtype != np.bool_:
            raise EdgeError(
                f"edge labels: ignore is {ignore.dtype} {list(ignore.shape)}, bool {[height, width]} is "
                "needed"
            )
        bits[-1] |= ignore.astype(np.uint32) << np.uint32(IGNORE_BIT)
    return bits


def unpack(bits: NDArray[np.uint32], classes: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Bit field uint32 [channels,H,W] -> (bool [classes,H,W], ignore bool [H,W]).

    Raises EdgeError where the channels are not those of ``classes``, or a bit beyond the classes is set (the
    field was written with more classes, or in another bit order).
    """
    bits = np.asarray(bits)
    channels = channels_of(classes)
    if bits.ndim != 3 or bits.dtype != np.uint32 or bits.shape[0] != channels or not bits.size:
        raise EdgeError(
            f"edge labels: the bit field is {bits.dtype} {list(bits.shape)}; {classes} classes take "
            f"uint32 [{channels},H,W] with a pixel at least"
        )
    edges = np.empty((classes, *bits.shape[1:]), np.bool_)
    for k in range(classes):
        edges[k] = (bits[k // 32] >> np.uint32(k % 32)) & np.uint32(1)
    spare = _spare(classes)
    if (bits[-1] & spare).any():
        raise EdgeError(
            f"edge labels: bits beyond class {classes - 1} are set; the file holds more classes or "
            "another bit order"
        )
    ignore = (bits[-1] >> np.uint32(IGNORE_BIT)).astype(np.bool_)
    return edges, ignore


def _spare(classes: int) -> np.uint32:
    """The last channel's bits that are neither a class nor ignore."""
    used = classes - 32 * (channels_of(classes) - 1)
    return np.uint32(((1 << IGNORE_BIT) - 1) & ~((1 << used) - 1))


# ------------------------------------------------------------------------------------------------- files
def write_bin(path: str | Path, bits: NDArray[np.uint32]) -> None:
    """SEAL's bare bit field, little-endian.  Raises EdgeError for what is none."""
    bits = np.asarray(bits)
    if bits.ndim != 3 or bits.dtype != np.uint32:
        raise EdgeError(f"{path}: the bit field is {bits.dtype} {list(bits.shape)}, uint32 [C,H,W] is needed")
    Path(path).write_bytes(np.ascontiguousarray(bits, "<u4").tobytes())


def read_bin(path: str | Path, classes: int, size: tuple[int, int]) -> NDArray[np.uint32]:
    """uint32 [channels,H,W] of a bare file; the size (H, W) must come from the image.

    Raises EdgeError for a file of another length (truncated, or another image's).
    """
    if len(size) != 2 or not all(isinstance(v, int | np.integer) and v > 0 for v in size):
        raise EdgeError(f"{path}: the size is {tuple(size)}, (H, W) of the image is needed")
    channels, (height, width) = channels_of(classes), size
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}; check the path") from None
    need = 4 * channels * height * width
    if len(data) != need:
        raise EdgeError(
            f"{path}: {len(data)} bytes, {classes} classes at {height}x{width} take {need}; "
            "truncated, or the label of another image"
        )
    bits = np.frombuffer(data, "<u4").reshape(channels, height, width).astype(np.uint32)
    unpack(bits, classes)
    return bits


def write_mat(path: str | Path, bits: NDArray[np.uint32], classes: int) -> None:
    """SEAL's ``labelEdge``.  Raises EdgeError where a pixel is ignored: the format has no place for it."""
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    edges, ignore = unpack(bits, classes)
    if ignore.any():
        raise EdgeError(f"{path}: .mat cells cannot say which pixels are ignored; write .npz or .bin")
    cells = np.empty((classes, 1), object)
    for k in range(classes):
        cells[k, 0] = csc_matrix(edges[k])
    savemat(str(path), {"labelEdge": cells}, do_compression=True)


def read_mat(path: str | Path) -> tuple[NDArray[np.uint32], int]:
    """(bit field, number of classes) of a ``labelEdge`` file.  Raises EdgeError for any other file."""
    from scipy.io import loadmat
    from scipy.sparse import issparse

    try:
        content = loadmat(str(path))
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise EdgeError(
            f"{path}: no readable MATLAB file ({str(error).splitlines()[0]}); unpack it again"
        ) from None
    if "labelEdge" not in content:
        names = ", ".join(sorted(n for n in content if not n.startswith("__"))) or "nothing"
        raise EdgeError(f"{path}: holds {names}, no 'labelEdge'; is it an edge label?")
    cells = np.atleast_1d(content["labelEdge"]).ravel()
    if cells.dtype != object or not cells.size:
        raise EdgeError(f"{path}: labelEdge is no cell array of maps; is it an edge label?")
    maps = [np.asarray(c.toarray() if issparse(c) else c) for c in cells]
    if any(m.ndim != 2 or m.shape != maps[0].shape for m in maps):
        raise EdgeError(f"{path}: the maps of labelEdge differ in size; write the file again")
    if not all(m.dtype.kind in "bfiu" and np.isin(m, (0, 1)).all() for m in maps):
        raise EdgeError(f"{path}: the maps of labelEdge hold more than 0 and 1; is it an edge label?")
    return pack(np.stack(maps).astype(np.bool_)), len(maps)


def write_png(path: str | Path, bits: NDArray[np.uint32], classes: int) -> None:
    """DFF's 24-bit PNG.  Raises EdgeError for more than 24 classes and for ignored pixels."""
    from PIL import Image

    if classes > PNG_CLASSES:
        raise EdgeError(
            f"{path}: a 24-bit PNG holds {PNG_CLASSES} classes, not {classes}; write .npz or .bin"
        )
    edges, ignore = unpack(bits, classes)
    if ignore.any():
        raise EdgeError(f"{path}: a 24-bit PNG cannot say which pixels are ignored; write .npz or .bin")
    field = pack(edges)[0]
    rgb = np.stack([(field >> np.uint32(s)) & np.uint32(255) for s in (16, 8, 0)], -1).astype(np.uint8)
    Image.fromarray(rgb).save(path)


def read_png(path: str | Path, classes: int) -> NDArray[np.uint32]:
    """uint32 [1,H,W] of a DFF label; of one class also of a drawing in 0 and 1 or 0 and 255, in any mode.

    Raises EdgeError for other images and for bits beyond the classes.
    """
    from PIL import Image

    from adapt.data.base import BROKEN

    if classes > PNG_CLASSES:
        raise EdgeError(f"{path}: a 24-bit PNG holds {PNG_CLASSES} classes, not {classes}; read .npz or .bin")
    try:
        with Image.open(path) as image:
            drawn = _drawing(image) if classes == 1 else None
            if drawn is not None:
                return drawn.astype(np.uint32)[None]
            if image.mode != "RGB":
                also = ", or black and white" if classes == 1 else ""
                raise EdgeError(
                    f"{path}: mode {image.mode}, a 24-bit label is RGB{also}; is it an edge label?"
                )
            rgb = np.asarray(image).astype(np.uint32)
    except EdgeError:
        raise
    except BROKEN as error:
        raise EdgeError(f"{path}: no readable PNG ({error}); unpack it again") from None
    bits = (rgb[..., 2] | rgb[..., 1] << np.uint32(8) | rgb[..., 0] << np.uint32(16))[None]
    unpack(bits, classes)
    return np.asarray(bits)


def _drawing(image: Any) -> NDArray[np.bool_] | None:
    """Where a black and white picture is white: bool [H,W]; None for a picture of other values.

    White is 255, or 1 in a single channel.  RGB must be grey: (0, 0, 1) is DFF's bit of class 0.
    """
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "I", "I;16"):
        return None
    if image.mode in ("P", "RGB", "RGBA", "LA"):
        rgb = np.asarray(image.convert("RGB"))
        grey, top = rgb[..., 0], {255}
        if (rgb != rgb[..., :1]).any():
            return None
    else:
        grey, top = np.asarray(image), {1, 255, 65535}
    values = set(np.unique(grey).tolist()) - {0}
    return np.asarray(grey != 0) if not values or (len(values) == 1 and values <= top) else None


def write_npz(path: str | Path, bits: NDArray[np.uint32], classes: int) -> None:
    """Our own: everything, any number of classes."""
    unpack(bits, classes)
    with open(path, "wb") as file:
        np.savez_compressed(file, bits=bits, classes=np.int64(classes))


def read_npz(path: str | Path) -> tuple[NDArray[np.uint32], int]:
    """(bit field, number of classes) of our own file.  Raises EdgeError for any other."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            bits, classes = file["bits"], int(file["classes"])
    except Exception as error:  # zip, zlib, numpy: damaged files raise many kinds
        raise EdgeError(
            f"{path}: no edge label of ours ({str(error).splitlines()[0]}); write it again"
        ) from None
    unpack(bits, classes)
    return bits, classes


def write(path: str | Path, bits: NDArray[np.uint32], classes: int) -> None:
    """Write in the format of the suffix: .npz, .bin, .mat or .png."""
    suffix = Path(path).suffix
    if suffix == ".bin":
        unpack(bits, classes)
        write_bin(path, bits)
    elif suffix in _WRITERS:
        _WRITERS[suffix](path, bits, classes)
    else:
        raise EdgeError(f"{path}: no edge label format {suffix!r}; use .npz, .bin, .mat or .png")


def read(path: str | Path, classes: int, size: tuple[int, int] | None = None) -> NDArray[np.uint32]:
    """Read by suffix.  ``size`` (H, W) is needed for .bin and checked for the others.

    Raises EdgeError where classes or size are not those asked for.
    """
    suffix = Path(path).suffix
    if suffix == ".bin":
        if size is None:
            raise EdgeError(f"{path}: a .bin file does not say its size; give size=(H, W) of the image")
        return read_bin(path, classes, size)
    held = classes
    if suffix == ".npz":
        bits, held = read_npz(path)
    elif suffix == ".mat":
        bits, held = read_mat(path)
    elif suffix == ".png":
        bits = read_png(path, classes)
    else:
        raise EdgeError(f"{path}: no edge label format {suffix!r}; use .npz, .bin, .mat or .png")
    if held != classes:
        raise EdgeError(f"{path}: holds {held} classes, {classes} were asked for; check the label space")
    if size is not None and bits.shape[1:] != tuple(size):
        raise EdgeError(
            f"{path}: is {list(bits.shape[1:])}, its image {list(size)}; the label of another image?"
        )
    return bits


_WRITERS: dict[str, Any] = {".npz": write_npz, ".mat": write_mat, ".png": write_png}
