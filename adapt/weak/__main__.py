"""``python -m adapt.weak``: convert, show, check and simulate files of weak labels."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError
from adapt.weak.marks import WeakError, WeakLabels
from adapt.weak.readers import FORMS, read, write_coco
from adapt.weak.readers.bounded import read_document
from adapt.weak.simulate import KINDS, simulate
from common.cli import run_command

EPILOG = """\
examples:
  python -m adapt.weak convert annotations.xml weak.json --pack packs/city --map pavement=sidewalk
  python -m adapt.weak convert weak.json instances.json --to coco
  python -m adapt.weak check weak.json --pack packs/city --frames pictures/
  python -m adapt.weak show weak.json --frames pictures/ --out drawn/
  python -m adapt.weak simulate camvid:data/camvid:dusk_eval --space camvid11 --out weak.json

exit codes: 0 done, 1 refused (one line on stderr says why), 2 wrong usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.weak",
        description="Files of weak labels: tags, points, lines, boxes and coarse polygons of frames.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="read one or several files of any form and write one")
    convert.add_argument("files", nargs="+", metavar="IN", help="files of marks; several are merged")
    convert.add_argument("out", metavar="OUT", help="file to write")
    convert.add_argument("--to", choices=("weak", "coco"), default="weak", help="form to write (weak)")
    convert.add_argument(
        "--prefer", choices=("human",), help="if two files contradict, a person's marks stay"
    )
    show = commands.add_parser("show", help="count marks by kind and source, and draw them")
    show.add_argument("files", nargs=1, metavar="IN", help="file of marks")
    show.add_argument("--out", metavar="DIR", help="draw the marks on the frames, into this folder")
    check = commands.add_parser("check", help="check marks against a pack's classes and the pictures")
    check.add_argument("files", nargs=1, metavar="IN", help="file of marks")
    for command in (show, check):
        command.add_argument("--frames", metavar="DIR", help="folder of the pictures, by stem")
    made = commands.add_parser("simulate", help="marks as a person might make them, from dense labels")
    made.add_argument("data", metavar="SET", help="labelled set, KIND:WHERE as adapt.evaluate takes it")
    made.add_argument("--kinds", default="tags,points", help=f"some of {', '.join(KINDS[:-1])} (tags,points)")
    made.add_argument("--boxes-of", default="", metavar="CLASSES", help="classes that get boxes, by commas")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the places (0)")
    made.add_argument("--out", required=True, metavar="FILE", help="file to write")
    for command in (convert, show, check, made):
        command.add_argument("--pack", metavar="DIR", help="pack whose classes the marks use")
        command.add_argument("--classes", metavar="A,B", help="class names, in place of a pack")
        command.add_argument("--space", metavar="NAME", help="a known label space, in place of a pack")
    for command in (convert, show, check):
        command.add_argument("--form", choices=FORMS, default="auto", help="form of the file (auto)")
        command.add_argument(
            "--map", action="append", default=[], metavar="OLD=NEW", help="class of the file = the pack's"
        )
    return p


def _classes(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.pack:
        from networks.pack import load_pack

        return tuple(load_pack(arguments.pack).spec.classes)
    if arguments.classes:
        return tuple(arguments.classes.split(","))
    if arguments.space:
        from networks.labels import SPACES

        if arguments.space not in SPACES:
            raise WeakError(f"--space {arguments.space} is unknown; choose from {', '.join(sorted(SPACES))}")
        return tuple(SPACES[arguments.space].classes)
    first = Path(arguments.files[0]) if arguments.command != "simulate" else None
    if first is not None and first.suffix.lower() == ".json" and first.is_file():
        found = read_document(first)
        listed = found.get("classes") if isinstance(found, dict) else None
        if isinstance(listed, list) and all(isinstance(c, str) for c in listed) and not arguments.map:
            return tuple(listed)
    raise WeakError("the network's classes are not known; give --pack, --classes or --space")


def _rename(pairs: list[str]) -> dict[str, str]:
    out = {}
    for pair in pairs:
        old, equal, new = pair.partition("=")
        if not (old and equal and new):
            raise WeakError(f"--map {pair}: it is no pair; write --map OLD=NEW")
        out[old] = new
    return out


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.weak")


def _command(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    from networks.pack import PackError

    try:
        classes = _classes(arguments)
        if arguments.command == "simulate":
            return _simulate(arguments, classes)
        rename = _rename(arguments.map)
        labels = WeakLabels(classes)
        for file in arguments.files:
            found = read(file, classes, form=arguments.form, rename=rename)
            prefer = getattr(arguments, "prefer", None)
            labels = found if not labels.frames else labels.merge(found, prefer)
        if arguments.command == "convert":
            _convert(labels, arguments)
        elif arguments.command == "show":
            _show(labels, arguments)
        else:
            _check(labels, arguments)
    except (WeakError, DataError, PackError, ValueError, OSError) as error:
        print(f"adapt.weak: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _convert(labels: WeakLabels, arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if arguments.to == "weak":
        labels.write(out)
        return
    left = write_coco(labels, out)
    if left:
        words = ", ".join(f"{n} {kind}" for kind, n in left.items())
        print(f"adapt.weak: COCO holds no such marks: {words} left out", file=sys.stderr)


def _pictures(labels: WeakLabels, folder: str) -> dict[str, np.ndarray]:
    """The frames that have marks, by key; every key must be a picture of the marks' size."""
    from adapt.data.folder import Folder

    found = Folder(folder, labels=False)
    names = [found.name(i) for i in range(len(found))]
    marked = labels.of(names, every=True)
    frames = {n: found[i][0] for i, n in enumerate(names) if marked[i] is not None}
    labels.check_sizes({n: (f.shape[1], f.shape[0]) for n, f in frames.items()})
    return frames


def _check(labels: WeakLabels, arguments: argparse.Namespace) -> None:
    if arguments.frames:
        _pictures(labels, arguments.frames)
    print(json.dumps({**labels.counts(), "sha256": labels.digest()}))


def _show(labels: WeakLabels, arguments: argparse.Namespace) -> None:
    if bool(arguments.frames) != bool(arguments.out):
        raise WeakError("drawing needs the pictures and a folder; give both --frames and --out")
    counts = labels.counts()
    for word in ("kinds", "sources"):
        print(f"{word}: " + (", ".join(f"{k} {n}" for k, n in counts[word].items()) or "none"))
    print(f"frames: {counts['frames']}" + (f", {counts['seconds']:g} s" if counts["seconds"] else ""))
    if not arguments.out:
        return
    from PIL import Image

    frames = _pictures(labels, arguments.frames)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for key, frame in frames.items():
        _drawn(Image.fromarray(frame), labels, key).save(folder / f"{key}.png")


def _drawn(image: Any, labels: WeakLabels, key: str) -> Any:
    """The picture with its marks drawn on it."""
    import colorsys

    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    marks, n = labels.frames[key], len(labels.classes)

    def colour(label: str) -> tuple[int, int, int]:
        name = label.removeprefix("!").split("|")[0]
        if name not in labels.classes:
            return (255, 255, 255)
        r, g, b = colorsys.hsv_to_rgb(labels.classes.index(name) / n, 0.8, 1)
        return (round(255 * r), round(255 * g), round(255 * b))

    for c in marks.coarse:
        draw.polygon([(float(x), float(y)) for x, y in c.polygon], outline=colour(c.label))
    for b in marks.boxes:
        draw.rectangle((b.x0, b.y0, b.x1 - 1, b.y1 - 1), outline=colour(b.label))
    for s in marks.scribbles:
        draw.line([(float(x), float(y)) for x, y in s.line], fill=colour(s.label), width=round(s.width))
    for p in marks.points:
        draw.ellipse((p.x - 3, p.y - 3, p.x + 3, p.y + 3), fill=colour(p.label), outline=(255, 255, 255))
    return image


def _simulate(arguments: argparse.Namespace, classes: tuple[str, ...]) -> int:
    from adapt.data.open import open_dataset

    kinds = [k for k in arguments.kinds.split(",") if k]
    if "corrections" in kinds:
        raise WeakError("corrections need a network's answer; call adapt.weak.simulate with answer=")
    dataset = open_dataset(arguments.data)
    boxes_of = [c for c in arguments.boxes_of.split(",") if c]
    frames = {}
    for i in range(len(dataset)):
        label, key = dataset[i][1], Path(dataset.name(i)).stem
        if label is None:
            continue
        if key in frames:
            raise WeakError(f"frame {key} is there twice in {arguments.data}; rename one of the pictures")
        frames[key] = simulate(
            label, kinds, seed=arguments.seed * 100_003 + i, boxes_of=boxes_of, classes=classes, frame=key
        )
    made = f"by a program from the labels of {arguments.data.split(':')[0]}, seed {arguments.seed}"
    WeakLabels(classes, frames, made).write(Path(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
