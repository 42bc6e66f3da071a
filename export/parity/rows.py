"""Is a row's answer its own?  Requests of several clients may share a run only if it is.

A graph whose tensors all have an open first side need not compute row by row: it may normalise over the
batch, keep the boxes of all frames together, or look a row up by its place.  Here a few rows are run alone
and among others, in several places, with different neighbours and in batches of different sizes.  Rows that
agree show no independence for every input there is; rows that differ show that there is none.

Knows arrays, and of ONNX the shapes that it infers; nothing of repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from common.text import shorten
from export.graph.functions import nodes_of
from export.parity.samples import Feed, Input

#: Runs a feed and returns the answers by name; raises whatever the library raises.
Run = Callable[[Feed], Feed]

#: Share of the largest value of a row by which an answer may differ: kernels add in another order for
#: another number of rows.
TOLERANCE = {2: 2e-2, 4: 1e-3, 8: 1e-6}
#: Share of the whole numbers of a large answer that may differ: labels where two classes are nearly equal.
FLIPPED, LARGE = 1e-3, 1000
#: Bytes of the inputs of one run; fewer rows are run where a row is large.
MOST_BYTES = 256 << 20
#: Rows of one run at most, whatever batch somebody asks for.
MOST_ROWS = 64
#: Operators whose answer has as many rows as the data says.
DATA_DEPENDENT = frozenset({"Compress", "NonZero", "NonMaxSuppression", "Unique"})
#: How far from the samples the rows are, in the order of trying: the wild ones show a dependence best, but
#: a graph need not take them.
KINDS = ("wild", "mild", "same")


@dataclass(frozen=True)
class _Rows:
    """Distinct rows and the answer to each alone."""

    feeds: list[Feed]
    alone: list[Feed]


def dependence(run: Run, model: onnx.ModelProto, inputs: Sequence[Input], feed: Feed, most: int) -> str:
    """Why rows may not share a run, or "" where nothing speaks against it.

    Args:
        run: the graph, all outputs.
        model: its file, for the shapes that follow from it.
        inputs: what a request brings; each has an open first side.
        feed: inputs that `run` takes.
        most: rows that may share a run.
    """
    counts = sorted({array.shape[0] for array in feed.values()})
    if len(counts) > 1 or counts[0] < 1:
        return f"its inputs bring {' and '.join(map(str, counts))} rows, so they are not rows of one batch"
    if reason := _by_shape(model, inputs):
        return reason
    room = MOST_BYTES // max(1, sum(array[:1].nbytes for array in feed.values()))
    most = max(2, min(most, MOST_ROWS, room))
    why = ""
    for kind in KINDS:
        feeds = list(_variants(feed, kind))
        try:
            alone = [run(row) for row in feeds]
            again = run(feeds[0])
        except Exception as error:  # the library raises its own, undocumented classes
            why = f"a row alone does not run: {shorten(error, 160)}"
            continue
        if reason := next(filter(None, (_miscounted(answers, 1) for answers in alone)), ""):
            return reason
        if reason := _difference(alone[0], again, 0, {}):
            return f"its answers differ from run to run ({reason})"
        return _among_others(run, _Rows(feeds, alone), most)
    return why


def _by_shape(model: onnx.ModelProto, inputs: Sequence[Input]) -> str:
    """Why the answers' rows need not be the inputs' rows, by inferred shapes.

    Asked only of graphs with operators whose answers are as long as the data says: on made-up inputs such a
    graph may keep every row by chance.
    """
    found = {n.op_type for n in nodes_of(model.graph.node)} & DATA_DEPENDENT
    found |= {n.op_type for f in model.functions for n in nodes_of(f.node)} & DATA_DEPENDENT
    if not found:
        return ""
    row = "roadworthy_row"
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.value_info[:]
    for value in plain.graph.input:
        if any(one.name == value.name for one in inputs):
            value.type.tensor_type.shape.dim[0].dim_param = row
    for value in plain.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(plain, data_prop=True).graph
    except Exception:  # onnx raises several types; what cannot be inferred is unknown
        inferred = plain.graph
    for value in inferred.output:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_param != row:
            return (
                f"output {value.name!r} may have as many rows as the data says "
                f"({', '.join(sorted(found))} in the graph)"
            )
    return ""


# -- rows ---------------------------------------------------------------------------------------------


def _variants(feed: Feed, kind: str) -> Iterator[Feed]:
    """Six rows: two of the samples' own kind, then what a neighbour may be at worst."""
    rng = np.random.default_rng(0)
    count = next(iter(feed.values())).shape[0]
    for index in range(6):
        row = {}
        for name, array in feed.items():
            own = array[index % count : index % count + 1]
            row[name] = own if index == 0 else _variant(own, array, kind, index, rng)
        yield row


def _variant(
    own: np.ndarray, array: np.ndarray, kind: str, index: int, rng: np.random.Generator
) -> np.ndarray:
    values = array.reshape(-1)
    if not values.size:
        return own
    if array.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            return own
        spread = max(abs(low), abs(high)) or 1.0
        far = min(1000 * spread, float(np.finfo(array.dtype).max) / 100)
        if kind == "wild" and index in (2, 3):
            made = np.full(own.shape, 0.0 if index == 2 else -spread)
        elif kind == "wild" and index in (4, 5):
            made = (far if index == 4 else -far) * (0.5 + 0.5 * rng.random(own.shape))
        else:
            made = low + (high - low or spread) * rng.random(own.shape)
        return np.asarray(made).astype(array.dtype)
    if kind == "same":
        return own
    if array.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if kind == "wild":
            limits = np.iinfo(array.dtype)
            low, high = min(low, 0), max(high, 1)
            if limits.bits == 8:  # a picture, most often
                low, high = limits.min, limits.max
            if index in (2, 3):
                return np.full(own.shape, low if index == 2 else high, array.dtype)
            return rng.integers(low, high, own.shape, array.dtype, endpoint=True)
    if array.dtype == np.bool_ and kind == "wild":
        return np.full(own.shape, index == 2) if index in (2, 3) else np.asarray(rng.random(own.shape) > 0.5)
    return np.asarray(rng.choice(values, own.shape)).astype(array.dtype)


# -- comparison ---------------------------------------------------------------------------------------


def _among_others(run: Run, rows: _Rows, most: int) -> str:
    """Return why rows in a batch have other answers than alone, or ""."""
    scale = _largest(rows.alone)
    for order in _orders(len(rows.feeds), most):
        together = {name: np.concatenate([rows.feeds[k][name] for k in order]) for name in rows.feeds[0]}
        try:
            answers = run(together)
        except Exception as error:
            return f"it does not run on {len(order)} rows: {shorten(error, 160)}"
        if reason := _miscounted(answers, len(order)):
            return reason
        for place, k in enumerate(order):
            if other := _difference(rows.alone[k], answers, place, scale):
                return f"a row alone and as row {place + 1} of {len(order)} gives different answers ({other})"
    return _beside_the_worst(run, rows, scale)


def _beside_the_worst(run: Run, rows: _Rows, scale: Feed) -> str:
    """Why two rows are not what they are alone when the one between or before them is not finite, or "".

    Zero times a mean over the batch is zero until somebody sends NaN or infinity.  The answer to that row
    itself is not compared: kernels treat NaN by its place in a register.
    """
    first, second = rows.feeds[0], rows.feeds[1]
    for value in (np.nan, np.inf):
        worst = {
            name: np.full_like(array, value) if array.dtype.kind == "f" else array
            for name, array in first.items()
        }
        if all(worst[name] is first[name] for name in first):
            return ""  # whole numbers and text are finite
        for order, places in (((first, worst, second), (0, 2)), ((worst, first, second), (1, 2))):
            try:
                answers = run({name: np.concatenate([feed[name] for feed in order]) for name in first})
            except Exception:  # a run that fails is repeated by the server with each request alone
                continue
            if reason := _miscounted(answers, len(order)):
                return reason
            for k, place in enumerate(places):
                if other := _difference(rows.alone[k], answers, place, scale):
                    return f"a row alone and beside one of {value} gives different answers ({other})"
    return ""


def _orders(count: int, most: int) -> Iterator[list[int]]:
    """Which rows are together: every size up to 8, then doublings; of the largest, two orders, so that every
    place has two rows with changing neighbours."""
    sizes = [size for size in (2, 3, 4, 5, 6, 7, 8, 16, 32) if size < most]
    for turn, size in enumerate([*sizes, most, most]):
        step = 1 if turn % 2 else -1
        yield [(turn + step * k) % count for k in range(size)]


def _miscounted(answers: Feed, rows: int) -> str:
    for name, answer in answers.items():
        if not answer.shape or answer.shape[0] != rows:
            return f"output {name!r} has the shape {list(answer.shape)} for {rows} row{'s' * (rows > 1)}"
    return ""


def _largest(answers: Sequence[Feed]) -> Feed:
    """Of each output with a fraction, the largest finite size of a value in any row."""
    found: Feed = {}
    for name, first in answers[0].items():
        if first.dtype.kind == "f":
            values = [np.abs(a[name][np.isfinite(a[name])]).max(initial=0.0) for a in answers]
            found[name] = np.asarray(max(values))
    return found


def _difference(alone: Feed, together: Feed, place: int, scale: Feed) -> str:
    """What of a row is another answer than alone, or ""."""
    for name, answer in alone.items():
        one, other = answer[0], together[name][place]
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"output {name!r} is {list(one.shape)} and {list(other.shape)}"
        if one.dtype.kind != "f":
            differing = int(np.count_nonzero(one != other))
            if differing > (FLIPPED * one.size if one.size >= LARGE else 0):
                return f"{differing} of {one.size} values of {name!r}"
            continue
        finite = np.isfinite(one)
        if not np.array_equal(finite, np.isfinite(other)):
            return f"{name!r} is finite in one of the two only"
        first, second = one[finite].astype(np.float64), other[finite].astype(np.float64)
        largest = max(float(np.abs(first).max(initial=0.0)), 1e-3 * float(np.max(scale.get(name, 0.0))))
        apart = float(np.abs(first - second).max(initial=0.0))
        if apart > TOLERANCE.get(one.dtype.itemsize, 1e-3) * largest:
            return f"{name!r} by {apart:.3g}"
    return ""
