"""``python -m adapt.frames``: what a frame store holds, in words and pictures, and out of it at a word."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from adapt.frames.encryption import SealError, new_key
from adapt.frames.selection import metres
from adapt.frames.store import FrameStore, StoredFrame, StoreError
from common.cli import run_command
from common.files import write_json

__all__ = ["main", "moment"]

EPILOG = """\
examples:
  python -m adapt.frames adapt-road/frames list --source front
  python -m adapt.frames adapt-road/frames show 12 --out 12.png
  python -m adapt.frames adapt-road/frames export pictures --after 2h
  python -m adapt.frames adapt-road/frames delete 12 13
  python -m adapt.frames adapt-road/frames purge --before 2026-11-20
  python -m adapt.frames adapt-road/frames purge --around 48.137,11.575 --within 500
  python -m adapt.frames - keygen frames.key        # for adapt.run --key frames.key

Times: 2026-11-22, 2026-11-22T18:00 (UTC), seconds since the epoch, or an age: 90s, 15m, 2h, 7d.
A purge takes the pictures and their rows; what a round has made of them (WORKDIR/round-*) is a folder of its
own.

exit codes: 0 done, 1 it could not be done, 2 wrong usage
"""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def moment(text: str, now: float | None = None) -> float:
    """Seconds since the epoch of a time or an age.  Raises ValueError."""
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if age:
        return (time.time() if now is None else now) - float(age[1]) * UNITS[age[2]]
    try:
        value = float(text)
    except ValueError:
        at = datetime.fromisoformat(text)
        value = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no time")
    return value


def _place(text: str) -> tuple[float, float]:
    latitude, longitude = (float(part) for part in text.split(","))
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(f"{text!r} is no place")
    return latitude, longitude


def _metres(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError(f"{text!r} is no distance")
    return float(text)


def _printable(name: str) -> str:
    """A camera's name comes from whoever sends frames: it moves no cursor and begins no line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:40]) or "-"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.frames",
        description="Look into a frame store, and take frames out of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("store", type=Path, metavar="STORE", help="the folder, such as WORKDIR/frames")
    p.add_argument("--key", type=Path, metavar="FILE", help="key of a sealed store")
    p.add_argument("--json", action="store_true", help="print JSON on stdout")
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--source", metavar="NAME", help="of this camera")
    which.add_argument("--before", type=moment, metavar="TIME")
    which.add_argument("--after", type=moment, metavar="TIME")
    which.add_argument("--around", type=_place, metavar="LAT,LON", help="near this place ...")
    which.add_argument(
        "--within", type=_metres, default=100.0, metavar="M", help="... within so many metres (100)"
    )
    verbs = p.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", parents=[which], help="one line a frame")
    show = verbs.add_parser("show", help="everything known of one frame")
    show.add_argument("id", type=int)
    show.add_argument("--out", type=Path, metavar="PNG", help="and its picture")
    export = verbs.add_parser("export", parents=[which], help="pictures and an index.json into a new folder")
    export.add_argument("folder", type=Path)
    delete = verbs.add_parser("delete", help="frames by their number")
    delete.add_argument("id", type=int, nargs="+")
    purge = verbs.add_parser("purge", parents=[which], help="frames by camera, time or place")
    purge.add_argument("--all", action="store_true", help="everything")
    verbs.add_parser("keygen", help="write a new key to STORE or to KEYFILE").add_argument(
        "file", type=Path, nargs="?", metavar="KEYFILE"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.frames")


def _command(argv: Sequence[str] | None) -> int:
    command = parser()
    a = command.parse_args(argv)
    asked = (vars(a).get(key) for key in ("source", "before", "after", "around"))
    if a.verb == "purge" and not a.all and all(value is None for value in asked):
        command.error("purge: give --source, --before, --after, --around, or --all")
    try:
        return _do(a)
    except (StoreError, SealError, ValueError, OSError) as error:
        print(f"adapt.frames: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _do(a: argparse.Namespace) -> int:
    if a.verb == "keygen":
        new_key(a.file or a.store)
        print(f"{a.file or a.store}: keep it where the vehicle's disk is not, it cannot be made again")
        return 0
    if not (a.store / "index.sqlite").is_file():
        raise StoreError(f"{a.store} is no frame store: give WORKDIR/frames of an adapter")
    # Bounds are the adapter's: here nothing is evicted, however much there is.
    with FrameStore(a.store, max_bytes=1 << 62, key=a.key, sweep=False) as store:
        return int(globals()[f"_{a.verb}"](store, a))


def _chosen(store: FrameStore, a: argparse.Namespace) -> list[StoredFrame]:
    return [
        row
        for row in store.rows(source=a.source)
        if (a.before is None or row.time < a.before)
        and (a.after is None or row.time >= a.after)
        and (a.around is None or (row.place is not None and metres(row.place, a.around) <= a.within))
    ]


def _known(row: StoredFrame) -> dict[str, Any]:
    return {**vars(row), "time": row.time, "utc": _utc(row.time)}


def _utc(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{at:g}"


def _list(store: FrameStore, a: argparse.Namespace) -> int:
    rows = _chosen(store, a)
    if a.json:
        print(json.dumps([_known(row) for row in rows]))
        return 0
    for row in rows:
        score = row.summary.get("score")
        words = [
            f"{row.id:>6}",
            _utc(row.time),
            f"{_printable(row.source):<12}",
            f"v{row.version}",
            f"{row.width}x{row.height}",
            f"{row.bytes / 1e3:.0f} kB",
            "score -" if score is None else f"score {score:.2f}",
            "" if row.place is None else f"{row.place[0]:.5f},{row.place[1]:.5f}",
            row.why,
        ]
        print(" ".join(word for word in words if word))
    count = Counter(_printable(row.source) for row in rows)
    cameras = ", ".join(f"{name} {n}" for name, n in count.items())
    print(f"{len(rows)} frames, {sum(row.bytes for row in rows) / 1e6:.1f} MB; {cameras}", file=sys.stderr)
    return 0


def _one(store: FrameStore, number: int) -> StoredFrame:
    found = [row for row in store.rows() if row.id == number]
    if not found:
        raise StoreError(f"{store.path} holds no frame {number}: list shows what it holds")
    return found[0]


def _show(store: FrameStore, a: argparse.Namespace) -> int:
    row = _one(store, a.id)
    if a.out is not None:
        Image.fromarray(store.read(row)).save(a.out, "PNG")
    if a.json:
        print(json.dumps(_known(row)))
    else:
        for key, value in _known(row).items():
            print(f"{key:>10}  {_printable(value) if key == 'source' else value}")
    return 0


def _export(store: FrameStore, a: argparse.Namespace) -> int:
    rows, lost = [], 0
    a.folder.mkdir(parents=True)
    for row in _chosen(store, a):
        try:
            picture = Image.fromarray(store.read(row))
        except StoreError as error:  # one that is damaged keeps none of the others back
            print(f"adapt.frames: {error}", file=sys.stderr)
            lost += 1
            continue
        picture.save(a.folder / f"{row.id:06d}.png", "PNG", compress_level=1)
        rows.append(row)
    write_json(a.folder / "index.json", [{**_known(row), "file": f"{row.id:06d}.png"} for row in rows])
    print(f"{len(rows)} frames in {a.folder}" + (f", {lost} left out" if lost else ""), file=sys.stderr)
    return 1 if lost else 0


def _delete(store: FrameStore, a: argparse.Namespace) -> int:
    for number in a.id:
        _one(store, number)
    return _said(store.delete(ids=a.id), a)


def _purge(store: FrameStore, a: argparse.Namespace) -> int:
    around = None if a.around is None else (a.around, a.within)
    before = math.inf if a.all and a.before is None else a.before
    return _said(store.delete(source=a.source, before=before, after=a.after, around=around), a)


def _said(count: int, a: argparse.Namespace) -> int:
    print(json.dumps({"deleted": count}) if a.json else f"{count} frames deleted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
