"""The label step of class-balanced self-training: ours beside a plain restatement of the published procedure.

Published: softmax of every frame to disk as float32, one value in four of every class into a list, sort;
then every map read back, divided by λ, labels written.  Ours: histograms while the maps pass, λ, labels; a
map is made a second time by a second forward pass (here: by generating it again) and never written.  Both
write the same PNG files.  Maps are generated outside the clock: what a network costs is not measured here.

Ratios are of one run on one machine, one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.labels.published import PublishedThresholds, published_labels
from bench import machine


def make_map(seed: int, classes: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth, peaked softmax float32 [C,H,W], as a segmentation network gives: coarse logits, enlarged."""
    rng = np.random.default_rng(seed)
    h, w = size[0] // 16, size[1] // 16
    bias = np.linspace(2.0, -2.0, classes)[:, None, None]
    coarse = rng.normal(size=(classes, h, w)).astype(np.float32) * 2.5 + bias
    logits = np.stack(
        [
            np.asarray(
                Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
            )
            for plane in coarse
        ]
    )
    logits -= logits.max(0)
    np.exp(logits, out=logits)
    logits /= logits.sum(0)
    return logits


class Clock:
    """Seconds by name, without what happens between `with` blocks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return found


def write(labels: np.ndarray, path: Path) -> None:
    Image.fromarray(labels).save(path, compress_level=1)


def ours(
    maps: Callable[[int], np.ndarray], frames: int, classes: int, portion: float, folder: Path
) -> dict[str, Any]:
    """Histograms, λ, labels.  Every map is made twice, outside the clock, as a second forward pass would."""
    clock, histograms = Clock(), ClassHistograms(classes)
    for i in range(frames):
        p = maps(i)
        clock("collect", lambda p=p: histograms.add(p))
    lam = clock("thresholds", lambda: histograms.thresholds(portion))
    accepted = 0
    for i in range(frames):
        p = maps(i)
        y = clock("labels", lambda p=p: pseudo_labels(p, lam))
        clock("png", lambda y=y, i=i: write(y, folder / f"{i:03d}.png"))
        accepted += int((y != 255).sum())
    return {
        "seconds": clock.seconds,
        "lambda": lam,
        "state_bytes": histograms.counts.nbytes,
        "disk": 0,
        "accepted": accepted,
    }


def published(
    maps: Callable[[int], np.ndarray], frames: int, classes: int, portion: float, folder: Path
) -> dict[str, Any]:
    """The published procedure: maps to disk and back."""
    clock, thresholds, disk = Clock(), PublishedThresholds(classes, "crst"), 0
    for i in range(frames):
        p = maps(i)
        clock("collect", lambda p=p: thresholds.add(p))
        clock("write maps", lambda p=p, i=i: np.save(folder / f"{i:03d}.npy", p))
        disk += p.nbytes
    lam = clock("thresholds", lambda: thresholds.thresholds(portion))
    accepted = 0
    for i in range(frames):
        p = clock("read maps", lambda i=i: np.load(folder / f"{i:03d}.npy"))
        y = clock("labels", lambda p=p: published_labels(p, lam, "crst"))
        clock("png", lambda y=y, i=i: write(y, folder / f"{i:03d}.png"))
        accepted += int((y != 255).sum())
    return {"seconds": clock.seconds, "lambda": lam, "disk": disk, "accepted": accepted}


def threshold_step(
    maps: Callable[[int], np.ndarray], frames: int, classes: int, portion: float
) -> dict[str, float]:
    """λ_c of labels and confidences that are given (an engine's epilogue): histogram against NumPy's sort.

    The same values for all: ours takes 16-bit ones, NumPy sorts them as float32 (as the published code keeps
    them) and as 16-bit integers.
    """
    from adapt.labels import _kernels

    pairs = []
    for i in range(frames):
        p = maps(i)
        pairs.append((p.argmax(0).astype(np.uint8), (p.max(0) * 65535).astype(np.uint16)))
    _kernels.count(*pairs[0], np.zeros((classes, 1 << 16), np.int64))  # compiled outside the clock
    start = time.perf_counter()
    histograms = ClassHistograms(classes)
    for labels, confidence in pairs:
        _kernels.count(labels, confidence, histograms.counts)
    lam = histograms.thresholds(portion)
    ours_seconds = time.perf_counter() - start
    sorting = {}
    exact = np.ones(classes)
    for kind in ("uint16", "float32"):
        given = [(y, c if kind == "uint16" else c.astype(np.float32) / np.float32(65536)) for y, c in pairs]
        start = time.perf_counter()
        for c in range(classes):
            values = np.sort(np.concatenate([confidence[labels == c] for labels, confidence in given]))
            rank = int(np.floor(len(values) * portion))
            if rank:
                exact[c] = values[-rank] / (65536 if kind == "uint16" else 1)
        sorting[kind] = time.perf_counter() - start
    return {
        "ours_seconds": ours_seconds,
        "sort_seconds": sorting["float32"],
        "sort16_seconds": sorting["uint16"],
        "ratio": sorting["float32"] / ours_seconds,
        "ratio16": sorting["uint16"] / ours_seconds,
        "largest_error": float(np.abs(lam - exact).max()),
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.labels",
        description="Time the label step (collect, thresholds, labels, PNG written) against a plain "
        "restatement of the published procedure, in one run. Human table, then one JSON object as last line.",
        epilog="example:\n  OMP_NUM_THREADS=1 python -m bench.labels --frames 50\n\n"
        "exit codes: 0 done, 1 failed, 2 wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--frames", type=int, default=50, metavar="N", help="maps (50)")
    p.add_argument("--classes", type=int, default=19, metavar="C", help="classes (19)")
    p.add_argument("--size", default="512x1024", metavar="HxW", help="of a map (512x1024)")
    p.add_argument("--portion", type=float, default=0.2, metavar="P", help="p (0.2)")
    p.add_argument(
        "--folder", type=Path, metavar="DIR", help="where maps and labels are written (a temporary folder)"
    )
    p.add_argument("--distinct", type=int, default=8, metavar="N", help="different maps, used in turn (8)")
    arguments = p.parse_args(argv)
    height, width = (int(v) for v in arguments.size.split("x"))
    described = machine.describe()
    made = [
        make_map(i, arguments.classes, (height, width))
        for i in range(min(arguments.distinct, arguments.frames))
    ]

    def maps(i: int) -> np.ndarray:
        return made[i % len(made)]

    folder = Path(tempfile.mkdtemp(prefix="labels-", dir=arguments.folder))
    told = (maps, arguments.frames, arguments.classes, arguments.portion)
    try:
        ours(maps, 1, arguments.classes, arguments.portion, folder)  # compiles
        a = ours(*told, folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        b = published(*told, folder)
        step = threshold_step(*told)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    exact = exact_thresholds(*told)
    total = {name: sum(found["seconds"].values()) for name, found in (("ours", a), ("published", b))}
    names = ("collect", "write maps", "thresholds", "read maps", "labels", "png")
    rows = [(n, a["seconds"].get(n, 0.0), b["seconds"].get(n, 0.0)) for n in names]
    print(
        f"{arguments.frames} maps {arguments.classes}x{height}x{width}, p = {arguments.portion}, one thread"
    )
    print(f"{'':<12}{'ours':>10}{'published':>12}   seconds")
    for name, x, y in [*rows, ("total", total["ours"], total["published"])]:
        print(f"{name:<12}{x:>10.3f}{y:>12.3f}")
    ratio = total["published"] / total["ours"]
    errors = {
        name: float(np.abs(found["lambda"] - exact).max()) for name, found in (("ours", a), ("published", b))
    }
    print(f"whole step {ratio:.1f} x faster; maps on disk 0 against {b['disk'] / 1e9:.2f} GB")
    print(
        f"largest |λ − exact order statistic|: ours {errors['ours']:.1e}, published {errors['published']:.1e}"
    )
    print(
        f"threshold step alone (labels and 16-bit confidences given): {step['ours_seconds']:.3f} s against "
        f"{step['sort_seconds']:.3f} s by sorting float32, {step['ratio']:.1f} x "
        f"({step['sort16_seconds']:.3f} s sorting uint16, {step['ratio16']:.1f} x); "
        f"state {a['state_bytes'] / 1e6:.1f} MB"
    )
    summary = {
        "machine": described,
        "frames": arguments.frames,
        "classes": arguments.classes,
        "size": [height, width],
        "portion": arguments.portion,
        "ours": a["seconds"],
        "published": b["seconds"],
        "ratio": ratio,
        "threshold_step": step,
        "lambda_error": errors,
        "disk_bytes": {"ours": 0, "published": b["disk"]},
        "state_bytes": a["state_bytes"],
        "peak_bytes_ours": peak,
    }
    print(json.dumps(summary))
    return 0


def exact_thresholds(
    maps: Callable[[int], np.ndarray], frames: int, classes: int, portion: float
) -> np.ndarray:
    """λ_c by sorting every value."""
    lam = np.ones(classes)
    tops = [(p.argmax(0), p.max(0)) for p in (maps(i) for i in range(frames))]
    for c in range(classes):
        values = np.sort(np.concatenate([top[index == c] for index, top in tops]))
        rank = int(np.floor(len(values) * portion))
        if rank:
            lam[c] = values[-rank]
    return lam


if __name__ == "__main__":
    sys.exit(main())
