"""Which convolutions of a quantised graph must stay float: measured one at a time, not guessed.

A network quantised throughout may miss parity because of a few layers (a first convolution that sees raw
pixels, a depth-wise one with wide ranges, the last one before the labels).  Here each convolution is
quantised alone in the float graph and what that costs is measured; then the costliest stay float, as few as
parity needs on frames that were not calibrated on.  Ranges are those of the float graph either way, so
nothing is calibrated again.

Knows ONNX and ONNX Runtime; nothing of packs or engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from common.progress import StepCallback
from export.errors import ExportError
from export.graph.contract import Contract
from export.parity import parity
from export.parity.onnxruntime import Runner
from export.parity.parity import Thresholds

#: Frames held out at most, and frames that a choice is made on at most.
FRAMES = 4
MOST = 12
#: Seconds that a search may take, and the part of them for measuring one convolution after another.
BUDGET = 300.0
MEASURING = 0.6
#: Part of what the thresholds allow: torch decides in the end, here it is the float graph.
MARGIN = 0.85


@dataclass(frozen=True)
class Choice:
    """`keep` has the names of the convolutions that stay float, `report` the measurements as JSON values."""

    keep: tuple[str, ...]
    report: dict[str, Any]


def hold_out(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frames to calibrate on, frames to choose on): ranges fit what they were taken from, so others decide.

    A quarter is held out, `FRAMES` at most, evenly spaced; of fewer than four frames both are all.
    """
    count = min(FRAMES, len(frames) // 4)
    if not count:
        return frames, frames
    aside = np.linspace(0, len(frames) - 1, 2 * count + 1).astype(int)[1::2]
    return np.delete(frames, aside, axis=0), frames[aside]


def choose(
    original: onnx.ModelProto,
    quantised: onnx.ModelProto,
    frames: np.ndarray,
    contract: Contract,
    thresholds: Thresholds,
    *,
    threads: int = 1,
    budget: float = BUDGET,
    progress: StepCallback,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """The fewest convolutions, costliest first, that must stay float for parity with the float graph.

    Args:
        original: float32, under the graph contract.
        quantised: the same with Q/DQ nodes, as `export.quantize.int8` makes it.
        frames: uint8 [n,H,W,3], not those that were calibrated on; at most `MOST` of them are used.
        thresholds: what the engine must reach; `MARGIN` of what they allow is asked for here.
        budget: seconds of `clock` after which no further graph is tried, one that is being tried is finished.
            Convolutions that were not measured by then count as the cheapest, and of the choices that reach
            parity the best so far is answered; the report says that it is not `complete`.
    Returns:
        nothing to keep where all may be quantised.
    Raises:
        ExportError: not even half of the convolutions can be quantised.
    """
    started = clock()
    mixer = Mixer(original, quantised)
    frames = frames[:MOST]
    ends = [0, len(frames) - 1]  # one of those held out and one of those compared
    truth = Runner(original, threads).run(frames, contract.outputs)
    strict = stricter(thresholds)

    def misses(keep: Sequence[str]) -> list[str]:
        mixed = mixer.mix(set(mixer.names) - set(keep))
        answers = Runner(mixed, threads).run(frames, contract.compared)
        missed: list[str] = parity.judge(parity.compare(answers, truth, contract), strict)["missed"]
        return missed

    first = misses(())
    if not first:
        return Choice((), {"automatic": 0, "missed": [], "complete": True})
    costs: dict[str, float] = {}
    measured = "probabilities" if "probabilities" in contract.outputs else "edges"
    for name in spread(mixer.names):
        if clock() - started > MEASURING * budget:
            break
        progress("sensitivity", len(costs), len(mixer.names))
        alone = Runner(mixer.mix({name}), threads, optimise=False)
        answer = alone.run(frames[ends], (measured,))[measured]
        costs[name] = float(np.abs(answer.astype(np.float32) - truth[measured][ends]).mean())
    progress("sensitivity", len(costs), len(mixer.names))
    count = len(mixer.names)
    order = sorted(costs, key=lambda name: -costs[name])
    order += [name for name in spread(mixer.names) if name not in costs]
    low, high = 0, count // 2  # `low` misses; `high` is hoped to reach
    if missed := misses(order[:high]):
        short = len(costs) < count
        more = f"search longer than {budget:g} s (--int8-budget), " if short else ""
        seen = f", {len(costs)} of them measured" if short else ""
        raise ExportError(
            f"int8 misses parity with half of the {count} convolutions in float{seen}: {missed[0]}; "
            f"{more}use fp32, or calibrate on frames of the road (--calibration)"
        )
    while high - low > 1 and clock() - started <= budget:
        progress("fewest", count - (high - low), count)
        middle = (low + high) // 2
        if misses(order[:middle]):
            low = middle
        else:
            high = middle
    progress("fewest", count, count)
    report = {
        "automatic": high,
        "missed": first,
        "costs": {name: round(costs[name], 8) for name in order[: high + 5] if name in costs},
        "frames": len(frames),
        "measured": len(costs),
        "seconds": round(clock() - started, 1),
        "complete": len(costs) == count and high - low <= 1,
    }
    return Choice(tuple(order[:high]), report)


def spread(names: Sequence[str]) -> list[str]:
    """All of them, in the order to measure them in where time may run out: an eighth at either end, where raw
    pixels come in and classes are told apart, then always the middle of what is left.
    """
    part = len(names) // 8
    middle = names[part : len(names) - part]
    places = sorted(range(len(middle)), key=lambda i: (_halvings(i, len(middle)), i))
    return [*names[:part], *names[len(names) - part :], *(middle[i] for i in places)]


def _halvings(index: int, count: int) -> int:
    """How often [0, count - 1] is halved until `index` is an end."""
    low, high, depth = 0, count - 1, 0
    while index not in (low, high):
        middle, depth = (low + high) // 2, depth + 1
        low, high = (low, middle) if index <= middle else (middle, high)
    return depth


def stricter(thresholds: Thresholds) -> Thresholds:
    """`MARGIN` of every difference that is allowed."""
    t = thresholds
    return Thresholds(
        agreement=1 - MARGIN * (1 - t.agreement),
        boundary=1 - MARGIN * (1 - t.boundary),
        confidence_mean=MARGIN * t.confidence_mean,
        edges_max=t.edges_max,
        edges_mean=MARGIN * t.edges_mean,
        bits=1 - MARGIN * (1 - t.bits),
        mf=MARGIN * t.mf,
    )


class Mixer:
    """The float graph with any of its convolutions quantised, ranges as calibrated for all of them."""

    def __init__(self, original: onnx.ModelProto, quantised: onnx.ModelProto) -> None:
        self._original = original
        convolutions = {n.name: n for n in quantised.graph.node if n.op_type == "Conv"}
        makers = {output: n for n in quantised.graph.node for output in n.output}
        self._held = {i.name: i for i in quantised.graph.initializer}
        #: float tensor -> (QuantizeLinear, DequantizeLinear) that carry it in 8 bits
        self._pairs: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
        #: float weight -> DequantizeLinear of its 8-bit form
        self._weights: dict[str, onnx.NodeProto] = {}
        for node in quantised.graph.node:
            if node.op_type == "DequantizeLinear" and (maker := makers.get(node.input[0])) is not None:
                self._pairs[maker.input[0]] = (maker, node)
        self.names: list[str] = []
        for node in original.graph.node:
            if node.op_type != "Conv":
                continue
            weight = makers.get(convolutions[node.name].input[1])
            if weight is not None:
                self._weights[node.input[1]] = weight
                self.names.append(node.name)

    def mix(self, chosen: set[str]) -> onnx.ModelProto:
        """The float graph with the `chosen` convolutions in 8 bits: their weights, inputs and answers.

        Whoever else reads such a tensor reads it in 8 bits too, as in a graph that was quantised so.
        """
        result = onnx.ModelProto()
        result.CopyFrom(self._original)
        nodes: list[onnx.NodeProto] = []
        written: set[str] = set()
        held = {i.name for i in result.graph.initializer}
        convolutions = [n for n in result.graph.node if n.name in chosen]
        in_8_bits = {name for n in convolutions for name in (n.input[0], n.output[0]) if name in self._pairs}

        def add(node: onnx.NodeProto) -> None:
            if node.output[0] in written:
                return
            written.add(node.output[0])
            nodes.append(node)
            for name in node.input:
                if name in self._held and name not in held:
                    held.add(name)
                    result.graph.initializer.append(self._held[name])

        for node in list(result.graph.node):
            node = onnx.NodeProto.FromString(node.SerializeToString())
            for index, name in enumerate(node.input):
                if name in in_8_bits:
                    for one in self._pairs[name]:
                        add(one)
                    node.input[index] = self._pairs[name][1].output[0]
            if node.name in chosen:
                weight = self._weights[node.input[1]]
                add(weight)
                node.input[1] = weight.output[0]
            nodes.append(node)
        del result.graph.node[:]
        result.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        kept = [i for i in result.graph.initializer if i.name in read]
        del result.graph.initializer[:]
        result.graph.initializer.extend(kept)
        return result
