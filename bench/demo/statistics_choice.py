"""Which label-free measure would choose the right batch statistics?  The table in ``docs/results/demo.md``.

    python -m bench.demo.statistics_choice --domains day,dusk,night,fog,camera

A measurement beside the demo, not a part of it: it scores with labels what a round must choose without.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from adapt import batchnorm, inference
from adapt.data.base import read_label
from adapt.evaluate.segmentation import Confusion
from adapt.gate.measures import measure, share_distance
from bench.demo import streets
from bench.demo.run import PACK
from networks.pack import load_pack, normalise

BATCH, ASIDE = 6, 10


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo.statistics_choice",
        description="mIoU beside label-free measures, with released batch statistics kept to 1, 0.5 and 0.",
        epilog="Exit codes: 0 done, 2 wrong usage.",
    )
    parser.add_argument("--domains", default="day,dusk,night,fog,camera", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's streets (%(default)s)")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    pack = load_pack(PACK)
    classes = len(pack.spec.classes)
    counts = np.zeros(classes)
    for _, label in pack.replay("train"):
        counts += np.bincount(read_label(label).reshape(-1), minlength=256)[:classes]
    source = counts / counts.sum()
    print("domain  kept  mIoU  mirror  variety  information  KL of shares")
    for domain in a.domains.split(","):
        frames = streets.stream(a.seed, domain, frames=4)
        order = np.random.default_rng(0).permutation(len(frames))
        aside, seen = order[:ASIDE], order[ASIDE:]
        labels = streets.truth(a.seed, domain, frames=4)[aside]
        network = pack.network()
        released = batchnorm.statistics(network)
        chunks = [seen[i : i + BATCH] for i in range(0, len(seen) - BATCH + 1, BATCH)]
        batchnorm.reestimate(network, (normalise(inference.as_tensor(frames[c]), pack.spec) for c in chunks))
        target = batchnorm.statistics(network)
        for keep in (1.0, 0.5, 0.0):
            batchnorm.load(network, batchnorm.mix(target, released, keep))
            found = measure(network, pack.spec, list(frames[aside]))
            confusion = Confusion(classes)
            for truth, ours in zip(labels, found.labels, strict=True):
                confusion.add(truth, ours)
            far = share_distance(found.share, source)
            print(
                f"{domain:<7} {keep:4.1f}  {100 * confusion.miou():4.1f}  {found.flip:6.3f}  "
                f"{found.variety:7.2f}  {found.information:11.3f}  {far:12.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
