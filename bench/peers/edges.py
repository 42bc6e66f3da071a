"""The boundary benchmark beside pyEdgeEval (which compiles the BSDS code): same maps, same thresholds.

    python -m bench.peers --install edges
    python -m bench.peers.edges [--images N] [--size HxW] [--mode thin|raw] [--max-distance F]

Rendered streets, every class; the maps are the exact edges, moved, blurred and with false alarms
(``bench.edges.soft``).  Both count 99 thresholds; processor seconds are of counting alone.  ODS is taken from
the counts of both by the same code.  Non-maximum suppression of the same maps is compared pixel by pixel.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt.data.street import scenes as street_scenes
from adapt.evaluate.edges import EdgeCounts
from adapt.evaluate.nms import nms
from adapt.labels.edges import category_edges
from bench import edges as scenes
from bench import machine
from bench.peers import environments

__all__ = ["main", "maps", "ours", "theirs"]

Pair = tuple[NDArray[np.uint8], NDArray[np.bool_]]


def maps(images: int, size: tuple[int, int], radius: int) -> list[Pair]:
    """(probability uint8 [H,W], truth bool [H,W]) of every class present in rendered streets."""
    out = []
    for i in range(images):
        label = street_scenes.render(i, "day", size)[1]
        for k, truth in enumerate(category_edges(label, len(street_scenes.CLASSES), radius)):
            if truth.any():
                out.append((scenes.soft(truth, 100 * i + k), truth))
    return out


def ours(pairs: list[Pair], distance: float, thin: bool) -> tuple[NDArray[np.int64], list[float]]:
    """(counts int64 [maps, 4, 99], processor seconds per map)."""
    table = EdgeCounts(distance, thin=thin)
    table.count(*pairs[0])  # compiled before the clock starts
    counts, seconds = [], []
    for p, truth in pairs:
        begin = time.process_time()
        counts.append(table.count(p, truth))
        seconds.append(time.process_time() - begin)
    return np.array(counts), seconds


def theirs(pairs: list[Pair], distance: float, thin: bool, environment: Path) -> dict[str, NDArray[Any]]:
    """What ``edges_model`` wrote.  Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        given, answer = Path(folder, "in.npz"), Path(folder, "out.npz")
        arrays: dict[str, Any] = {
            f"{name}{i}": a for i, pair in enumerate(pairs) for name, a in zip("pt", pair, strict=True)
        }
        arrays |= {"distance": np.float64(distance), "thin": np.bool_(thin)}
        np.savez(given, **arrays)
        script = Path(__file__).with_name("edges_model.py")
        command = [str(environment / "bin" / "python"), str(script), str(given), str(answer)]
        ran = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            raise RuntimeError(f"pyEdgeEval: {(ran.stderr.strip().splitlines() or ['no word'])[-1]}")
        with np.load(answer) as file:
            return dict(file)


def _ods(counts: NDArray[Any]) -> float:
    table = EdgeCounts()
    for one in counts:
        table.add_counts(np.rint(one).astype(np.int64))
    return table.ods()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.peers.edges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--images", type=int, default=1, metavar="N", help="rendered streets (1)")
    p.add_argument("--size", default="160x320", metavar="HxW", help="of the frames (160x320)")
    p.add_argument("--mode", choices=("thin", "raw"), default="thin")
    p.add_argument("--max-distance", type=float, default=0.0075, metavar="F", help="of the diagonal (.0075)")
    a = p.parse_args(argv)
    about = machine.describe()
    height, _, width = a.size.partition("x")
    if not (height.isdigit() and width.isdigit()):
        p.error(f"--size {a.size}: write HxW, such as 160x320")
    thin = a.mode == "thin"
    pairs = maps(a.images, (int(height), int(width)), 1 if thin else 2)
    try:
        peer = theirs(pairs, a.max_distance, thin, environments.find("edges"))
    except (environments.Absent, RuntimeError, OSError) as error:
        print(f"bench.peers.edges: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    counts, seconds = ours(pairs, a.max_distance, thin)
    total, wanted = counts.sum(0), np.rint(peer["counts"]).astype(np.int64).sum(0)
    matched = (total[2].sum() / max(wanted[2].sum(), 1) - 1) * 100
    kept = [nms(m) > 0 for m, _ in pairs]
    same = [(mine == (peer[f"nms{i}"] > 0)).mean() for i, mine in enumerate(kept)]
    rows = [
        {
            "tool": name,
            "ODS": round(100 * _ods(c), 3),
            "matched": int(t[2].sum()),
            "predicted": int(t[3].sum()),
            "cpu s": round(float(np.sum(s)), 2),
        }
        for name, c, t, s in (
            ("pyEdgeEval", peer["counts"], wanted, peer["seconds"]),
            ("this project", counts, total, seconds),
        )
    ]
    about["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(about))
    print(machine.table(rows, [(key, key) for key in rows[0]]))
    facts = {
        "maps": len(pairs),
        "matched_over_peer_percent": round(float(matched), 4),
        "times_as_fast": round(float(np.sum(peer["seconds"]) / max(np.sum(seconds), 1e-9)), 1),
        "nms_pixels_alike_percent": round(100 * float(np.mean(same)), 3),
    }
    print(
        json.dumps(
            {
                "bench": "peers.edges",
                "machine": about,
                "mode": a.mode,
                "size": a.size,
                "max_distance": a.max_distance,
                **facts,
                "rows": rows,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
