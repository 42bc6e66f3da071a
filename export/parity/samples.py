"""Inputs to run a graph on that is not ours: somebody's own samples, or made-up ones.

Knows ONNX graphs and arrays; nothing of repositories, nor of what the answers mean.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.errors import ExportError
from export.graph.onnx_file import read_file
from runtime.checks import golden
from runtime.errors import Refused

#: Values of one made-up input: 256 Mi, an open batch of one frame is far below.
MOST_VALUES = 1 << 28
#: Bytes of the inputs that somebody gives, and that a version brings: what a server's guard allows
#: (`guard.golden_bytes`).
MOST_BYTES = 512 << 20
#: What made-up whole numbers are, in the order of trying: many graphs take only small ones, or want a mask
#: that masks nothing.
FILLS = ("random", "binary", "one", "zero")
#: Open sides that are neither rows nor those of an image, in the order of trying.
OTHER_SIDES = (1, 64)

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Input:
    """An input that a request must bring.  `sides`: a number, or the name ("" for none) of an open side."""

    name: str
    dtype: np.dtype
    sides: tuple[int | str, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.sides) and all(
            isinstance(side, str) or side == got for side, got in zip(self.sides, shape, strict=True)
        )


def inputs_of(model: onnx.ModelProto) -> list[Input]:
    """The inputs of a graph without those that have a value in it.

    A side is open where the file names it, says nothing, or says -1, as mxnet and paddle2onnx write it.
    Raises: ExportError for an input of a type that numpy lacks, and for a side below -1.
    """
    known = {i.name for i in model.graph.initializer} | {
        i.values.name for i in model.graph.sparse_initializer
    }
    return [_input(value) for value in model.graph.input if value.name not in known]


def _input(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    sides = tuple(
        d.dim_param if not d.HasField("dim_value") or d.dim_value == -1 else d.dim_value
        for d in kind.shape.dim
    )
    if any(isinstance(side, int) and side < 0 for side in sides):
        raise ExportError(
            f"input {value.name!r} has the shape {list(sides)}, of which no values can be made up: "
            "name its open sides, or write -1 for them"
        )
    if kind.elem_type == TensorProto.STRING:
        return Input(value.name, np.dtype(np.object_), sides)
    try:
        return Input(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type), sides)
    except KeyError:
        raise ExportError(f"input {value.name!r} has a type that onnx does not know") from None


# -- made up ------------------------------------------------------------------------------------------


def sample_inputs(model: onnx.ModelProto, size: tuple[int, int] = (256, 256)) -> Feed:
    """Seeded random inputs; open dimensions become 1, open image sides `size`.

    Raises: ExportError for inputs that cannot be made up.
    """
    return made_up(inputs_of(model), size)


def attempts(inputs: list[Input], size: tuple[int, int]) -> Iterator[Feed]:
    """Made-up inputs of one row, the likeliest to be taken first; then of more rows, for graphs with a fixed
    number of them.  Raises: ExportError for inputs that cannot be made up.
    """
    floats = all(np.issubdtype(i.dtype, np.floating) for i in inputs)
    fills = FILLS[:1] if floats else FILLS
    lengths = OTHER_SIDES if _shapes(inputs, size, 1, 1) != _shapes(inputs, size, 1, 64) else (1,)
    for other in lengths:
        for fill in fills:
            yield made_up(inputs, size, fill=fill, other=other)
    if any(i.sides[:1] and isinstance(i.sides[0], str) for i in inputs):
        for rows in (2, 3, 4, 8, 16):
            yield made_up(inputs, size, rows=rows, fill=fills[-1])


def made_up(
    inputs: list[Input], size: tuple[int, int], *, rows: int = 1, fill: str = "random", other: int = 1
) -> Feed:
    """Seeded inputs.

    Args:
        size: of the open sides of an image, which is an input of four dimensions.
        rows: of every open first dimension.
        fill: what whole numbers, truth values and texts are, of `FILLS`; numbers with a fraction are always
            random in 0..1.
        other: every other open side.
    Raises:
        ExportError: a type that cannot be made up, or more than `MOST_VALUES` values.
    """
    shapes = _shapes(inputs, size, rows, other)
    rng = np.random.default_rng(0)
    return {one.name: _values(one, shapes[one.name], fill, rng) for one in inputs}


def _shapes(inputs: list[Input], size: tuple[int, int], rows: int, other: int) -> dict[str, tuple[int, ...]]:
    """Equal names of open sides are equal sides; images decide first."""
    lengths: dict[str, int] = {}
    shapes = {}
    for one in sorted(inputs, key=lambda i: len(i.sides) != 4):
        inside = [axis for axis, side in enumerate(one.sides) if axis and isinstance(side, str)]
        shape = []
        for axis, side in enumerate(one.sides):
            if isinstance(side, int):
                shape.append(side)
                continue
            length = rows if axis == 0 else other
            if axis and len(one.sides) == 4:
                length = size[min(inside.index(axis), 1)]
            shape.append(lengths.setdefault(side, length) if side else length)
        shapes[one.name] = tuple(shape)
        if 0 in one.sides:
            raise ExportError(
                f"input {one.name!r} has a side of 0, which takes no values: write -1 for an open side"
            )
        if math.prod(shape) > MOST_VALUES:
            raise ExportError(
                f"input {one.name!r} has the shape {shape}: 0 to {MOST_VALUES:,} values can be made up; "
                "export the graph for another size, or give --inputs FILE.npz"
            )
    return shapes


def _values(one: Input, shape: tuple[int, ...], fill: str, rng: np.random.Generator) -> np.ndarray:
    constant = {"one": 1, "zero": 0}.get(fill)
    if np.issubdtype(one.dtype, np.floating):
        return np.asarray(rng.random(shape), one.dtype)
    if one.dtype == np.bool_:
        random = np.asarray(rng.random(shape)) > 0.5
        return np.asarray(random if constant is None else np.full(shape, constant), np.bool_)
    if np.issubdtype(one.dtype, np.integer):
        top = 2 if fill == "binary" else 127
        return np.asarray(
            rng.integers(0, top, shape) if constant is None else np.full(shape, constant)
        ).astype(one.dtype)
    if one.dtype == np.object_:
        return np.full(shape, "" if fill == "zero" else "1", np.object_)
    raise ExportError(
        f"input {one.name!r} has the type {one.dtype}, which cannot be made up: give --inputs FILE.npz"
    )


# -- given --------------------------------------------------------------------------------------------


def read_inputs(path: Path | str, inputs: list[Input]) -> Feed:
    """One array for each input from an .npz that numpy.savez wrote: `--inputs FILE.npz`.

    Numbers of another width are converted where every value stays what it is.  Nothing is unpickled.
    Raises: ExportError for a file that cannot be read, and for an array that is absent, superfluous, or not
    what its input takes.
    """
    file = Path(path)
    try:
        content = read_file(file, "sample inputs", 2 * MOST_BYTES)
        over = f"{MOST_BYTES >> 20} MiB are read at most"
        arrays = golden.named(content, limit=MOST_BYTES, file=repr(str(file)), over=over)
    except Refused as error:
        raise ExportError(f"{error.reason}; write it with numpy.savez(FILE, name=array, ...)") from error
    names = [one.name for one in inputs]
    if set(arrays) != set(names):
        raise ExportError(
            f"{str(file)!r} holds {_listed(arrays)}, the graph takes {_listed(names)}: give one for each"
        )
    return {one.name: _converted(one, arrays[one.name], file) for one in inputs}


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(map(repr, list(names)[:8])) or "nothing"


def _converted(one: Input, array: np.ndarray, file: Path) -> np.ndarray:
    shown = [side if isinstance(side, int) else side or -1 for side in one.sides]
    wanted = f"{'str' if one.dtype == np.object_ else one.dtype} {shown}"
    if not one.fits(array.shape):
        raise ExportError(f"{str(file)!r}: {one.name!r} has the shape {list(array.shape)}, it takes {wanted}")
    if one.dtype == np.object_:
        if array.dtype.kind not in "US":
            raise ExportError(f"{str(file)!r}: {one.name!r} is {array.dtype}, the graph takes {wanted}")
        try:
            text = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
        except UnicodeDecodeError as error:
            raise ExportError(f"{str(file)!r}: {one.name!r} is no UTF-8 text: {error}") from error
        return np.asarray(text, np.object_)
    if array.dtype == one.dtype:
        return array
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
    if array.dtype.kind in kinds.get(one.dtype.kind, one.dtype.kind):
        with np.errstate(over="ignore", invalid="ignore"):
            other = array.astype(one.dtype)
            # Fractions are rounded; whole numbers must be the same.
            same = np.isfinite(other) == np.isfinite(array) if one.dtype.kind == "f" else other == array
        if bool(np.all(same)):
            return other
    raise ExportError(
        f"{str(file)!r}: {one.name!r} is {array.dtype}, the graph takes {wanted}; convert it with astype"
    )


def archive(feed: Feed) -> bytes:
    """inputs.npz of a version, which `runtime.checks.golden.inputs` reads."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name, array in feed.items():
            plain = array.astype(np.str_) if array.dtype == np.object_ else array
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(plain), allow_pickle=False)
            # One date for all, so that equal inputs are equal bytes.
            target.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
