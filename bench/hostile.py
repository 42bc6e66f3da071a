"""How often `adapt.gate.input_quality` refuses an attack, and how often it refuses an honest drive.

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

from adapt.data.base import read_frame, resize_frame
from adapt.data.street import scenes
from adapt.gate.input_quality import check_frames
from adapt.gate.limits import Limits
from bench.attacks import ATTACKS

WINDOW = 48


def rendered(seeds: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    for domain in scenes.DOMAINS:
        for seed in range(seeds):
            for drives, along in ((8, 6), (2, 24)):
                yield (
                    f"rendered {domain}",
                    [
                        frame
                        for k in range(drives)
                        for frame, _ in scenes.drive(
                            810_000 + 1000 * seed + 17 * drives + k, domain, along, step=2.5
                        )
                    ],
                )


def real(data: Path, width: int = 480, shift: int = 0) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Windows of the real sequences, at most `width` across."""
    for name in ("0001TP", "0006R0", "0016E5", "Seq05VD"):
        files = sorted((data / "camvid" / "images").glob(f"{name}_*"))
        for start in range(shift, len(files) - WINDOW + 1, WINDOW // 2):
            yield f"CamVid {name}", [read_frame(p) for p in files[start : start + WINDOW]]
    files = sorted(p for p in (data / "driveai" / "images").iterdir() if p.suffix in (".jpg", ".png"))
    for every in (1, 2):
        chosen = files[::every]
        for start in range(shift, len(chosen) - WINDOW + 1, WINDOW // 2):
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
    parser.add_argument("--every", type=int, default=3, metavar="N", help="attack every Nth drive (3)")
    parser.add_argument("--only", choices=("rendered", "real"), help="these drives alone")
    parser.add_argument("--shift", type=int, default=0, metavar="N", help="first frame of real windows (0)")
    parser.add_argument("--out", type=Path, default=Path("out/hostile"), metavar="DIR", help="records")
    a = parser.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "looks.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known = {(r["drive"], r["attack"]) for r in records}
    drives: list[tuple[str, Iterator[tuple[str, list[np.ndarray]]]]] = []
    if a.only != "real":
        drives.append(("rendered", rendered(a.seeds)))
    if a.only != "rendered" and a.data:
        drives.append((f"real+{a.shift}", real(a.data, shift=a.shift)))
    limits = Limits()
    with file.open("a") as out:
        for kind, found in drives:
            for number, (name, frames) in enumerate(found):
                attacks = ["", *(ATTACKS if number % a.every == 0 else ())]
                for attack in attacks:
                    if (f"{kind} {number}", attack) in known:
                        continue
                    rng = np.random.default_rng([number, 5])
                    spoilt = ATTACKS[attack][0](frames, rng) if attack else frames
                    begun = time.monotonic()
                    checks = check_frames(spoilt, limits)
                    record = {
                        "drive": f"{kind} {number}",
                        "name": name,
                        "attack": attack,
                        "values": {c.name: c.value for c in checks},
                        "refused": {c.name: c.reason for c in checks if not c.passed},
                        "seconds": round(time.monotonic() - begun, 2),
                    }
                    records.append(record)
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                print(f"{kind} {number} {name}", file=sys.stderr, flush=True)
    print(json.dumps(table(records)))
    return 0


def table(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Print honest drives and attacks; the numbers."""
    honest: dict[str, list[int]] = {}
    largest: dict[str, float] = {}
    found: dict[str, list[int]] = {name: [0, 0, 0] for name in ATTACKS}
    wrong, missed = [], []
    for r in records:
        if not r["attack"]:
            count = honest.setdefault(r["name"], [0, 0])
            count[0] += 1
            count[1] += bool(r["refused"])
            wrong += [f"{r['name']}: {words}" for words in r["refused"].values()]
            for name, value in r["values"].items():
                largest[name] = max(largest.get(name, 0.0), value)
            continue
        cell = found[r["attack"]]
        cell[0] += 1
        cell[1] += bool(r["refused"])
        cell[2] += bool(set(r["refused"]) & set(ATTACKS[r["attack"]][1]))
        if not r["refused"]:
            missed.append(f"{r['attack']} on {r['name']}: {r['values']}")
    print(f"{'honest drives':<24} {'n':>4} {'declined':>9}")
    for name, (n, declined) in honest.items():
        print(f"{name:<24} {n:>4} {declined:>9}")
    print(*wrong, sep="\n")
    print(f"{'attack':<24} {'n':>4} {'declined':>9} {'for the right reason':>21}")
    for name, (n, declined, right) in found.items():
        print(f"{name:<24} {n:>4} {declined:>9} {right:>21}")
    print(*missed, sep="\n")
    own = [r["seconds"] for r in records if not r["attack"]]
    return {
        "honest": honest,
        "attacks": found,
        "largest_on_honest": largest,
        "wrong": wrong,
        "window": WINDOW,
        "seconds_a_look": round(sum(own) / max(len(own), 1), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
