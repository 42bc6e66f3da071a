"""The gate of alignment as a classifier: which of a piece's numbers tell whether moving it helps.

    python -m bench.edges_gate [--data DIR] [--frames N]

CamVid frames by day and at dusk, labels pushed by a smooth random shift of at most 8 pixels, seven detectors:
true edges blurred by 1.2, 2.5 and 6 pixels, the same at three tenths of the strength, true edges with two
thirds of the 16-pixel tiles missing, image gradients, and uniform noise.  Every piece of every class (a
component cut by 32-pixel tiles) is aligned without a gate.  Its benefit is how much nearer its pixels come
to the exact edges, in pixels on average.  AUC: how well a number orders the pieces of 20 pixels and more that
are helped (benefit over .05) before the others.  Then F of the labels before, ungated, and behind the gate,
per detector.  All of it twice: with SEAL's smoothness .02, and with a tenth of it, where noise moves labels.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_gradient_magnitude
from scipy.stats import rankdata

from adapt.data.open import open_dataset
from adapt.evaluate.matching import match_pairs
from adapt.labels.edges import category_edges
from adapt.labels.seal import Gate, align_details
from bench import machine
from bench.edges_alignment import PARAMETERS, detector
from bench.edges_damage import pushed
from networks.labels import SPACES

__all__ = ["auc", "benefits", "main"]

DETECTORS = ("true 1.2", "true 2.5", "true 6", "weak", "broken", "gradient", "noise")
TOLERANCES = (0.0035, 0.0075)
CRITERIA = ("move/spread", "spread", "move", "gain", "strength", "contrast")


def auc(score: NDArray[np.floating], good: NDArray[np.bool_]) -> float:
    """The chance that a good case scores over a bad one, ties counted half; NaN without both kinds."""
    n = int(good.sum())
    if not n or n == good.size:
        return float("nan")
    return float((rankdata(score)[good].sum() - n * (n + 1) / 2) / (n * (good.size - n)))


def benefits(alignment: Any, truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Per piece, pixels that its labels came nearer to the truth on average: float64 [pieces]."""
    away = distance_transform_edt(~truth)
    source, target = (away[tuple(p.T)] for p in (alignment.source, alignment.target))
    return np.asarray(np.bincount(alignment.piece, source - target) / alignment.pieces.size)


def ridges(name: str, thin: NDArray[np.bool_], frame: NDArray[np.uint8], rng: np.random.Generator) -> Any:
    """A detector's map float32 [H,W] of one class whose exact edges (radius 1) are ``thin``."""
    if name == "noise":
        return rng.uniform(0.001, 0.999, thin.shape).astype(np.float32)
    if name == "gradient":
        gradient = gaussian_gradient_magnitude(frame.mean(2), 1.0)
        return np.clip(gradient / np.quantile(gradient, 0.99), 0.005, 0.995).astype(np.float32)
    sigma, noise = {"true 2.5": (2.5, 0.1), "true 6": (6.0, 0.2)}.get(name, (1.2, 0.03))
    p = detector(thin, sigma, noise, rng)
    if name == "weak":
        return 0.3 * p
    if name == "broken":
        tiles = rng.random((thin.shape[0] // 16 + 1, thin.shape[1] // 16 + 1)) < 1 / 3
        seen = np.kron(tiles, np.ones((16, 16)))[: thin.shape[0], : thin.shape[1]]
        return np.clip(p * seen + np.abs(rng.normal(0, 0.1, thin.shape)), 0, 1).astype(np.float32)
    return p


def numbers(alignment: Any, p: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
    """Each criterion of each piece: float64 [pieces].  Strength and contrast are what a gate sees without
    aligning: the probability where the label is, and that minus the mean around it."""
    from scipy.ndimage import uniform_filter

    piece, size = alignment.piece, alignment.pieces.size
    at, to = tuple(alignment.source.T), tuple(alignment.target.T)
    logit = np.log(np.clip(p, 1e-6, 1 - 1e-6) / np.clip(1 - p, 1e-6, 1))

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(piece, values) / size)

    around = uniform_filter(p.astype(np.float64), 13)
    return {
        "move/spread": alignment.pieces.move / (alignment.pieces.spread + 0.3),
        "spread": -alignment.pieces.spread,
        "move": alignment.pieces.move,
        "gain": mean(logit[to] - logit[at]),
        "strength": mean(p[to]),
        "contrast": mean(p[to] - around[at]),
    }


def _pieces(scenes: list[Any], push: float, smoothness: float, k: int) -> tuple[dict[str, Any], Any]:
    """(columns of all pieces, int64 [detector, stage, tolerance, 3]); stages: before, ungated, gated."""
    table: dict[str, list[Any]] = {"detector": [], "light": [], "size": [], "benefit": [], "stopped": []}
    table |= {c: [] for c in CRITERIA}
    count = np.zeros((len(DETECTORS), 3, len(TOLERANCES), 3), np.int64)
    how: dict[str, Any] = {**PARAMETERS, "smoothness": smoothness, "solver": "auction"}
    for light, i, frame, label in scenes:
        rng = np.random.default_rng([11, i])
        given, truth = category_edges(pushed(label, rng, push), k), category_edges(label, k)
        thin = category_edges(label, k, 1)
        for c in np.flatnonzero(given.any((1, 2)) & truth.any((1, 2))).tolist():
            for d, name in enumerate(DETECTORS):
                ridge = ridges(name, thin[c], frame, rng)
                free, gated = (align_details(given[c], ridge, gate=g, **how) for g in (None, Gate()))
                n = len(free.pieces.size)
                table["detector"] += [name] * n
                table["light"] += [light] * n
                table["size"] += free.pieces.size.tolist()
                table["benefit"] += benefits(free, truth[c]).tolist()
                table["stopped"] += gated.pieces.stopped.tolist()
                for key, values in numbers(free, ridge).items():
                    table[key] += values.tolist()
                for s, mask in enumerate((given[c], free.aligned, gated.aligned)):
                    for t, tolerance in enumerate(TOLERANCES):
                        matched = match_pairs(mask, truth[c], tolerance)[0].size
                        count[d, s, t] += (matched, mask.sum(), truth[c].sum())
        print(f"smoothness {smoothness:g}, {light} frame {i}", file=sys.stderr, flush=True)
    return {key: np.array(values) for key, values in table.items()}, count


def _rows(found: dict[str, Any], count: Any, smoothness: float) -> list[dict[str, Any]]:
    """A row per detector: F at each tolerance and stage, and the share of pixels whose pieces were kept."""
    f = 2 * count[..., 0] / np.maximum(count[..., 1] + count[..., 2], 1)
    out = []
    for d, name in enumerate(DETECTORS):
        here = found["detector"] == name
        weight = found["size"][here] / found["size"][here].sum()
        row: dict[str, Any] = {"smoothness": smoothness, "detector": name}
        for j, t in enumerate(TOLERANCES):
            for s, what in enumerate(("before", "ungated", "gated")):
                row[f"{what} {t}"] = round(float(f[d, s, j]), 3)
        out.append({**row, "kept": round(float((weight * found["stopped"][here]).sum()), 3)})
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.edges_gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).resolve().parent.parent
    p.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data")),
        metavar="DIR",
        help="the folder that holds camvid/",
    )
    p.add_argument("--frames", type=int, default=3, metavar="N", help="frames of each of day and dusk (3)")
    p.add_argument("--push", type=float, default=8.0, metavar="PX", help="largest push in pixels (8)")
    a = p.parse_args(argv)
    about, start = machine.describe(), time.process_time()
    k = len(SPACES["camvid11"])
    scenes = []
    for light, listing in (("day", "day_val_clean"), ("dusk", "dusk_eval")):
        dataset = open_dataset(f"camvid:{a.data}/camvid:{listing}")
        for i in np.linspace(0, len(dataset) - 1, a.frames).round().astype(int).tolist():
            frame, label = dataset[i]
            if label is not None:
                scenes.append((light, i, frame, label))
    ranks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for smoothness in (0.02, 0.002):
        found, count = _pieces(scenes, a.push, smoothness, k)
        for light in ("day", "dusk"):
            chosen = (found["size"] >= 20) & (found["light"] == light)
            good = found["benefit"][chosen] > 0.05
            ranks.append(
                {
                    "smoothness": smoothness,
                    "light": light,
                    "pieces": int(chosen.sum()),
                    **{c: round(auc(found[c][chosen], good), 3) for c in CRITERIA},
                }
            )
        rows += _rows(found, count, smoothness)
    about["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(about))
    print(machine.table(rows, [(key, key) for key in rows[0]]))
    print(machine.table(ranks, [(key, key) for key in ranks[0]]))
    spent = round(time.process_time() - start)
    result = {"bench": "edges_gate", "machine": about, "cpu_seconds": spent, "auc": ranks, "rows": rows}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
