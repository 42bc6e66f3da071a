"""Runs in pyEdgeEval's environment: counts of every map at 99 thresholds, and its suppression.

    python edges_model.py IN.npz OUT.npz

IN: p0, t0, p1, t1 … (uint8 and bool [H,W]), distance, thin.  OUT: counts float64 [maps, 4, 99] (matched
truth, truth, matched predicted, predicted), seconds float64 [maps] of processor time,
nms0, nms1 … (float64 [H,W]).
"""

from __future__ import annotations

import sys
import time

import numpy as np


def main() -> int:
    from pyEdgeEval.common.binary_label.evaluate_boundaries import evaluate_boundaries_threshold
    from pyEdgeEval.preprocess import binary_thin, fast_nms

    given = np.load(sys.argv[1])
    thin, thresholds = bool(given["thin"]), np.arange(1, 100) / 100.0
    counts, seconds, suppressed = [], [], {}
    for i in range(sum(name.startswith("p") for name in given.files)):
        p, truth = given[f"p{i}"], given[f"t{i}"]
        begin = time.process_time()
        counts.append(
            evaluate_boundaries_threshold(
                thresholds,
                p / 255.0,
                binary_thin(truth) if thin else truth,
                max_dist=float(given["distance"]),
                apply_thinning=thin,
            )
        )
        seconds.append(time.process_time() - begin)
        suppressed[f"nms{i}"] = fast_nms(p / 255.0)
        print(f"pyEdgeEval: map {i}", file=sys.stderr, flush=True)
    np.savez(sys.argv[2], counts=np.array(counts), seconds=np.array(seconds), **suppressed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
