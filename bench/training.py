"""What a training step costs: presets and options beside plain cross-entropy training, and bytes by cut.

    OMP_NUM_THREADS=1 python -m bench.training

Every row is this project's own step (draw the crops, forward, loss, backward, AdamW, the mean of the
weights) of one network; the first row is the yardstick: a plain PyTorch loop with cross-entropy on batches
of the same shape made in advance, nothing else.  Rows take turns, step by step, so that a change of the
machine's load falls on all of them; a ratio is the median over the rounds of (row / yardstick of the same
round).  Then the bytes that training takes by where it begins, predicted as `--set memory_mb=…` predicts
them, beside the bytes that autograd was seen to keep.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import networks
from adapt import inference
from adapt.data.street.scenes import render
from adapt.labels import lrent
from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.round import RoundConfig
from adapt.round.presets import PRESETS
from adapt.train import truncated_backprop
from adapt.train.batches import sampler
from adapt.train.segmentation import SegmentationTrainer, Tensors, TrainConfig, loss_of
from bench import machine
from networks.labels import STREET
from networks.pack import PackSpec, normalise

#: One option at a time on top of `default`; the published or preset value of each.
OPTIONS: dict[str, dict[str, Any]] = {
    "frozen batch statistics": {"bn": "frozen"},
    "split batch statistics": {"bn": "split"},
    "no mean for the gate": {"judge": 0.0},
    "EMA teacher": {"ema": 0.99},
    "rare classes": {"rare": 0.1, "rare_target": 0.1},
    "ClassMix": {"classmix": 1.0},
    "MRKLD": {"mrkld": 0.01},
    "LRENT": {"lrent": 0.25},
    "strong augmentation": {"brightness": 1.5, "colour": 0.1, "blur": 0.5},
    "MIC (with EMA)": {"ema": 0.99, "mic": 1.0},
    "bf16": {"amp": "bf16"},
    "half the memory": {"memory_mb": -0.5},  # of what the whole takes
}
GOAL, LABEL_GOAL = 1.25, 1.10


def _spec(name: str, size: tuple[int, int]) -> PackSpec:
    return PackSpec(
        name=name,
        version="0",
        network=name,
        arguments={},
        classes=STREET.classes,
        colours=STREET.colours,
        size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


class Bench:
    """One network on one device, frames that exist, and a step of every row."""

    def __init__(self, name: str, size: tuple[int, int], source: int, target: int, device: str) -> None:
        self.spec, self.size, self.device = _spec(name, size), size, device
        self.name, self.counts = name, (source, target)
        pairs = [render(i, "day", size) for i in range(8)]
        self.replay, self.target = pairs[:4], [(x, y) for x, y in pairs[4:]]
        classes = len(self.spec.classes)
        self.soft = []
        for _, y in self.target:  # as sure of the true class as pseudo-labels are
            p = np.full((classes, *size), 0.2 / (classes - 1), np.float32)
            np.put_along_axis(p, np.where(y == 255, 0, y)[None].astype(int), np.float32(0.8), 0)
            self.soft.append(lrent.compact_labels(p, np.full(classes, 0.7)))

    def network(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return networks.create(self.name, classes=len(self.spec.classes)).to(self.device)

    def config(self, told: dict[str, Any]) -> RoundConfig:
        source, target = self.counts
        return RoundConfig(portions=(0.2,), steps=1_000_000, source=source, target=target, **told)

    def trainer(self, told: dict[str, Any]) -> SegmentationTrainer:
        config = self.config(told)
        draw = sampler(
            self.replay,
            self.target,
            config.mixture(False, self.size),
            len(self.spec.classes),
            0,
            0,
            soft=self.soft if config.lrent else None,
        )
        return SegmentationTrainer(self.network(), self.spec, config.optimisation(0), draw, seed=0)

    def synchronised(self, step: Callable[[], object]) -> Callable[[], float]:
        """Seconds of a step, the device's work included."""

        def timed() -> float:
            start = time.perf_counter()
            step()
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return timed

    def plain(self) -> Callable[[], float]:
        """The yardstick: nothing but PyTorch, on crops made in advance."""
        network = self.network().train()
        optimiser = torch.optim.AdamW(network.parameters(), lr=5e-4)
        draw = self.trainer({}).draw
        made = [Tensors.of(draw(i), self.device) for i in range(4)]
        turn = iter(range(10**9))

        def step() -> None:
            batch = made[next(turn) % len(made)]
            raw = network(normalise(batch.frames, self.spec))
            full = F.interpolate(raw, size=self.size, mode="bilinear", align_corners=False)
            loss = F.cross_entropy(full, batch.labels, ignore_index=255)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()

        return self.synchronised(step)

    def row(self, told: dict[str, Any]) -> Callable[[], float]:
        trainer = self.trainer(told)
        for p in trainer.frozen:
            p.requires_grad_(False)

        return self.synchronised(trainer.one_step)

    def label_step(self, rounds: int) -> dict[str, float]:
        """Milliseconds of a frame's two label passes, and of their two forward passes alone, in turns."""
        network, frames = self.network().eval(), [x for x, _ in self.target]
        histograms, lam = ClassHistograms(len(self.spec.classes)), np.full(len(self.spec.classes), 0.5)
        batch = inference.as_tensor(frames)

        def forward() -> Any:
            return inference.probabilities(network, self.spec, batch)

        def maps() -> Any:  # on a CPU as the round does: arrays, for the Numba kernels
            found = forward()
            return found if found.is_cuda else found.numpy()

        def label() -> None:
            for p in maps():
                histograms.add(p)
            for p in maps():
                pseudo_labels(p, lam)

        alone, whole = self.synchronised(lambda: (forward(), forward())), self.synchronised(label)
        alone(), whole()
        pairs = [(alone(), whole()) for _ in range(rounds)]
        per = 1000 / len(frames)
        return {
            "forward_ms": round(per * statistics.median(a for a, _ in pairs), 2),
            "label_ms": round(per * statistics.median(b for _, b in pairs), 2),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }

    def dry(
        self, network: torch.nn.Module, device: str
    ) -> tuple[truncated_backprop.Loss, list[torch.Tensor]]:
        batch = Tensors.of(self.trainer({}).draw(0), device)
        how = TrainConfig(steps=1)
        return (lambda net: loss_of(net, self.spec, how, batch)), batch.all()

    def cuts(self, points: int, measured: bool) -> list[dict[str, Any]]:
        """The curve of bytes by cut; `measured`: also what autograd keeps in a real step."""
        network = self.network().train()
        loss, known = self.dry(network, "meta")
        found = truncated_backprop.cuts(network, loss, known=known, points=points)
        rows = []
        for cut in found:
            row = {**cut.words(), "of_whole": round(cut.bytes / found[0].bytes, 3)}
            if measured:
                for name, p in network.named_parameters():
                    p.requires_grad_(name in cut.moving)
                real, tensors = self.dry(network, self.device)
                row["saved_measured"] = truncated_backprop.usage(network, real, tensors).saved
                if self.device.startswith("cuda"):
                    row["peak_measured"] = self._peak(network, real)
            rows.append(row)
        norms = {
            f"{n}.{k}"
            for n, m in network.named_modules()
            if isinstance(m, torch.nn.BatchNorm2d)
            for k, _ in m.named_parameters()
        }
        for name, p in network.named_parameters():
            p.requires_grad_(name in norms)
        real, tensors = self.dry(network, self.device)
        saved = truncated_backprop.usage(network, real, tensors).saved
        rows.append(
            {
                "first": "batch normalisation alone",
                "share": None,
                "bytes": None,
                "saved": None,
                "saved_measured": saved,
                "of_whole": None,
            }
        )
        return rows

    def _peak(self, network: torch.nn.Module, loss: truncated_backprop.Loss) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.backward(loss(network))
        network.zero_grad(set_to_none=True)
        return int(torch.cuda.max_memory_allocated() - before)


def measure(bench: Bench, wanted: list[str], rounds: int) -> list[dict[str, Any]]:
    """Interleaved: one step of every row, `rounds` times; the first two rounds do not count."""
    whole = bench.cuts(2, False)[0]["bytes"] / 2**20
    told: dict[str, dict[str, Any]] = {
        f"preset {name}": dict(PRESETS[name]) for name in ("default", "modern")
    }
    told |= {name: dict(option) for name, option in OPTIONS.items()}
    if wanted:
        told = {k: v for k, v in told.items() if k == "preset default" or any(w in k for w in wanted)}
    steps = {"plain PyTorch, cross-entropy": bench.plain()}
    for name, changes in told.items():
        if changes.get("memory_mb", 0) < 0:
            changes = {**changes, "memory_mb": -changes["memory_mb"] * whole}
        steps[name] = bench.row(changes)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            spent = step()
            if number >= 2:
                seconds[name].append(spent)
    yardstick, default = list(seconds)[:2]
    rows = []
    for name, spent in seconds.items():
        rows.append(
            {
                "row": name,
                "ms": round(1000 * statistics.median(spent), 1),
                "of_plain": round(_ratio(spent, seconds[yardstick]), 3),
                "of_default": round(_ratio(spent, seconds[default]), 3),
            }
        )
    return rows


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def compiling(bench: Bench, rounds: int) -> dict[str, float]:
    """torch.compile: seconds until the first step is done, then steps taken in turns with eager ones."""
    eager, compiled = bench.row({}), bench.row({"compile": True})
    eager()
    first = compiled() + compiled()
    pairs = [(eager(), compiled()) for _ in range(rounds)]
    return {
        "first_seconds": round(first, 1),
        "eager_ms": round(1000 * statistics.median(a for a, _ in pairs), 1),
        "compiled_ms": round(1000 * statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


def labelling(size: tuple[int, int], classes: int, frames: int) -> dict[str, float]:
    """Milliseconds a frame of the hard and the soft (LRENT) label, softmax given."""
    from bench.labels import make_map

    p, lam = make_map(0, classes, size), np.full(classes, 0.5)
    found = {}
    for name, work in (
        ("hard", lambda: pseudo_labels(p, lam)),
        ("soft", lambda: lrent.compact_labels(p, lam)),
    ):
        work()
        start = time.perf_counter()
        for _ in range(frames):
            work()
        found[f"{name}_ms"] = round(1000 * (time.perf_counter() - start) / frames, 1)
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="Time training steps of presets and options against plain PyTorch cross-entropy training "
        "of the same network, in turns; bytes by where training begins. Human table, then one JSON object as "
        "last line.",
        epilog="example:\n  OMP_NUM_THREADS=1 python -m bench.training --network pidnet --size 128x256\n\n"
        "exit codes: 0 done, 1 failed, 2 wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--network", default="roadnet", metavar="NAME", help="architecture (roadnet)")
    p.add_argument("--size", default="128x256", metavar="HxW", help="crops (128x256)")
    p.add_argument("--batch", default="3+3", metavar="S+T", help="source and target crops of a step (3+3)")
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="steps of each row that count (9)")
    p.add_argument("--rows", default="", metavar="A,B", help="only rows whose name holds one of these words")
    p.add_argument("--points", type=int, default=8, metavar="N", help="cuts of the memory curve (8)")
    p.add_argument("--compile", action="store_true", help="torch.compile as well (minutes)")
    p.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda (cpu)")
    a = p.parse_args(argv)
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"bench.training: device {a.device}: torch sees no CUDA device here; use cpu", file=sys.stderr)
        return 1
    height, width = (int(v) for v in a.size.split("x"))
    source, target = (int(v) for v in a.batch.split("+"))
    described = machine.describe()
    bench = Bench(a.network, (height, width), source, target, a.device)
    rows = measure(bench, [w for w in a.rows.split(",") if w], a.rounds)
    cuts = bench.cuts(a.points, True) if a.points else []
    labels = labelling((512, 1024), 19, 3)
    step = bench.label_step(a.rounds)
    compiled = compiling(bench, a.rounds) if a.compile else None
    print(
        f"{a.network}, batch {source}+{target} of {height}x{width}, {torch.get_num_threads()} thread(s), "
        f"{a.device}; {a.rounds} steps of each in turns"
    )
    print(
        machine.table(
            rows, [("row", "step"), ("ms", "ms"), ("of_plain", "of plain"), ("of_default", "of default")]
        )
    )
    if cuts:
        shown = [
            {
                **row,
                **{k: f"{row[k] / 2**20:.1f}" for k in ("bytes", "saved", "saved_measured") if row.get(k)},
            }
            for row in cuts
        ]
        print("\nbytes of training beyond the weights, by the first module that learns (MiB)")
        print(
            machine.table(
                shown,
                [
                    ("first", "begins at"),
                    ("share", "tensors that move"),
                    ("bytes", "peak, predicted"),
                    ("of_whole", "of whole"),
                    ("saved", "kept for backward, predicted"),
                    ("saved_measured", "measured"),
                ],
            )
        )
    print(f"\nlabel of a 19x512x1024 map: hard {labels['hard_ms']} ms, soft (LRENT) {labels['soft_ms']} ms")
    print(
        f"label step, two passes a frame: {step['label_ms']} ms, {step['ratio']} of its forward passes alone "
        f"({step['forward_ms']} ms); goal on a CUDA device <= {LABEL_GOAL}"
    )
    if compiled:
        print(
            f"torch.compile: {compiled['first_seconds']} s until it runs, then {compiled['ratio']} of eager"
        )
    default = next(row for row in rows if row["row"] == "preset default")
    print(f"preset default: {default['of_plain']} x plain training (goal <= {GOAL})")
    print(
        json.dumps(
            {
                "machine": described,
                "network": a.network,
                "size": [height, width],
                "batch": [source, target],
                "threads": torch.get_num_threads(),
                "device": a.device,
                "rows": rows,
                "cuts": cuts,
                "labels": labels,
                "label_step": step,
                "compile": compiled,
                "goal": GOAL,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
