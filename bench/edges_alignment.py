"""When alignment pays: how good the detector is, and the tolerance it is scored at.

    python -m bench.edges_alignment [--data DIR] [--images N]

CamVid's dusk labels are pushed by a smooth random shift of at most 4 pixels; a detector made of the true
edges (blurred by σ pixels, times .9, with half-normal noise) stands for the network.  F of the pushed labels
against the true ones, before, aligned (`adapt.labels.seal`, preset cityscapes, auction), and aligned behind
the gate.  The last stdout line is one JSON object.
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
from scipy.ndimage import gaussian_filter

from adapt.align import TOLERANCES
from adapt.data.open import open_dataset
from adapt.evaluate.matching import match_pairs
from adapt.labels.edges import category_edges
from adapt.labels.seal import Gate, align
from bench import machine
from bench.edges_damage import pushed
from networks.labels import SPACES

DETECTORS = ((1.2, 0.05), (2.5, 0.15), (6.0, 0.3))  # (σ of the blur in pixels, deviation of the noise)
PARAMETERS: dict[str, float] = {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}


def detector(truth: NDArray[np.bool_], sigma: float, noise: float, rng: np.random.Generator) -> Any:
    """float32 [H,W] in 0..1: the true edges blurred to a ridge of .9, and noise."""
    ridge = gaussian_filter(truth.astype(np.float32), sigma)
    top = float(ridge.max())
    ridge = 0.9 * ridge / top if top else ridge
    return np.clip(ridge + np.abs(rng.normal(0, noise, truth.shape)), 0, 1).astype(np.float32)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.edges_alignment", description=__doc__.split("\n\n")[0])
    here = Path(__file__).resolve().parent.parent
    p.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data")),
        metavar="DIR",
        help="the folder that holds camvid/",
    )
    p.add_argument("--images", type=int, default=4, metavar="N", help="frames of the dusk drive (4)")
    a = p.parse_args(argv)
    about, start = machine.describe(), time.process_time()
    dataset = open_dataset(f"camvid:{a.data}/camvid:dusk_eval")
    names = ["before"] + [f"σ {s:g}, noise {n:g}{g}" for s, n in DETECTORS for g in ("", ", gated")]
    found = np.zeros((len(names), len(TOLERANCES), 3), np.int64)  # matched, labelled, true
    k = len(SPACES["camvid11"])
    for i in np.linspace(0, len(dataset) - 1, a.images).round().astype(int).tolist():
        label = dataset[i][1]
        if label is None:
            continue
        rng = np.random.default_rng([7, i])
        truth, given = category_edges(label, k), category_edges(pushed(label, rng), k)
        thin = category_edges(label, k, 1)
        for c in np.flatnonzero(given.any((1, 2)) & truth.any((1, 2))).tolist():
            made = [given[c]]
            for sigma, noise in DETECTORS:
                ridge = detector(thin[c], sigma, noise, rng)
                made += [
                    align(given[c], ridge, solver="auction", gate=g, **PARAMETERS) for g in (None, Gate())
                ]
            for j, mask in enumerate(made):
                for t, tolerance in enumerate(TOLERANCES):
                    matched = match_pairs(mask, truth[c], tolerance)[0].size
                    found[j, t] += (matched, mask.sum(), truth[c].sum())
        print(f"frame {i}", file=sys.stderr, flush=True)
    f = 2 * found[..., 0] / (found[..., 1] + found[..., 2])
    rows = [
        {"tolerance": t, **{n: round(float(f[j, i]), 3) for j, n in enumerate(names)}}
        for i, t in enumerate(TOLERANCES)
    ]
    about["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(about))
    print(machine.table(rows, [(key, key) for key in rows[0]]))
    spent = round(time.process_time() - start)
    print(json.dumps({"bench": "edges_alignment", "machine": about, "cpu_seconds": spent, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
