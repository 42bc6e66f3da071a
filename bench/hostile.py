"""How often the look at the frames (``adapt.hostile``) declines an attack, how often an honest drive.

    python -m bench.hostile [--data DIR]

Honest drives: rendered streets of every domain, and, where ``--data`` (or ROADWORTHY_DATA) holds them,
windows of the CamVid sequences and of the driveai clip.  Each attack of ``bench.attacks`` is done to honest
drives of every kind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.data import street
from adapt.data.base import read_frame, resize_frame
from adapt.hostile import look
from adapt.limits import Limits
from bench.attacks import ATTACKS

WINDOW = 48


def rendered(seeds: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    for domain in street.DOMAINS:
        for seed in range(seeds):
            for drives, along in ((8, 6), (2, 24)):
                yield f"rendered {domain}", [
                    frame
                    for k in range(drives)
                    for frame, _ in street.drive(
                        810_000 + 1000 * seed + 17 * drives + k, domain, along, step=2.5
                    )
                ]


def real(data: Path, width: int = 480) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Windows of the real sequences, at most `width` across."""
    for name in ("0001TP", "0006R0", "0016E5", "Seq05VD"):
        files = sorted((data / "camvid" / "images").glob(f"{name}_*"))
        for start in range(0, len(files) - WINDOW + 1, WINDOW // 2):
            yield f"CamVid {name}", [read_frame(p) for p in files[start : start + WINDOW]]
    files = sorted(p for p in (data / "driveai" / "images").iterdir() if p.suffix in (".jpg", ".png"))
    for every in (1, 2):
        chosen = files[::every]
        for start in range(0, len(chosen) - WINDOW + 1, WINDOW // 2):
            frames = []
            for path in chosen[start : start + WINDOW]:
                with Image.open(path) as image:
                    size = (round(image.height * width / image.width), width)
                frames.append(resize_frame(read_frame(path), size))
            yield "driveai", frames


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__.splitlines()[0])
    told = os.environ.get("ROADWORTHY_DATA", "")
    parser.add_argument("--data", type=Path, default=Path(told) if told else None, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="rendered drives of each kind (2)")
    parser.add_argument("--every", type=int, default=3, metavar="N", help="attack every Nth real window (3)")
    a = parser.parse_args(argv)
    limits = Limits()
    honest: dict[str, list[int]] = {}
    wrong: list[str] = []
    largest: dict[str, float] = {}
    found: dict[str, list[int]] = {name: [0, 0, 0] for name in ATTACKS}
    missed: list[str] = []
    seconds, looks = 0.0, 0
    drives = [*((d, True) for d in rendered(a.seeds))]
    if a.data:
        drives += [(d, i % a.every == 0) for i, d in enumerate(real(a.data))]
    for number, ((name, frames), attacked) in enumerate(drives):
        begun = time.monotonic()
        checks = look(frames, limits)
        seconds, looks = seconds + time.monotonic() - begun, looks + 1
        refused = [c for c in checks if not c.passed]
        count = honest.setdefault(name, [0, 0])
        count[0] += 1
        count[1] += bool(refused)
        wrong += [f"{name}: {c.name} {c.value:.3f} ({c.reason})" for c in refused]
        for c in checks:
            largest[c.name] = max(largest.get(c.name, 0.0), c.value)
        for attack, (spoil, expected) in ATTACKS.items() if attacked else ():
            checks = look(spoil(frames, np.random.default_rng([number, 5])), limits)
            names = {c.name for c in checks if not c.passed}
            found[attack][0] += 1
            found[attack][1] += bool(names)
            found[attack][2] += bool(names & set(expected))
            if not names:
                values = ", ".join(f"{c.name[7:]} {c.value:.2f}" for c in checks)
                missed.append(f"{attack} on {name}: {values}")
        print(f"{number + 1}/{len(drives)} {name}", file=sys.stderr, flush=True)
    print(f"{'honest drives':<24} {'n':>4} {'declined':>9}")
    for name, (n, declined) in honest.items():
        print(f"{name:<24} {n:>4} {declined:>9}")
    print(*wrong, sep="\n")
    print(f"{'attack':<24} {'n':>4} {'declined':>9} {'for the right reason':>21}")
    for name, (n, declined, right) in found.items():
        print(f"{name:<24} {n:>4} {declined:>9} {right:>21}")
    print(*missed, sep="\n")
    summary: dict[str, Any] = {
        "honest": honest, "attacks": found, "largest_on_honest": largest, "wrong": wrong,
        "seconds_a_look": round(seconds / max(looks, 1), 2), "window": WINDOW,
    }  # fmt: skip
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
