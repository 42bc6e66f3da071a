"""Boxes: Pascal VOC's XML (counted from 1, both ends inside) and YOLO's text (shares of the picture)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapt.weak.marks import WeakError, WeakLabels
from adapt.weak.readers.bounded import number, parse_xml, read_bytes
from adapt.weak.readers.collect import Sheet

__all__ = ["read_voc", "read_yolo"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def read_voc(paths: Sequence[Path], classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    sheet = Sheet(paths[0].parent if len(paths) > 1 else paths[0], classes, rename)
    for path in paths:
        root = parse_xml(path)
        if root.name != "annotation":
            raise WeakError(f"marks {path}: its root is <{root.name}>; Pascal VOC's is <annotation>")
        frame = sheet.frame(
            root.word("filename") or path.name, root.word("size", "width"), root.word("size", "height")
        )
        for thing in root.all("object"):
            label = thing.word("name")
            who = f"{frame.who}, box of {label}"
            at = [number(thing.word("bndbox", k), who) for k in ("xmin", "ymin", "xmax", "ymax")]
            if at[0] == 0 or at[1] == 0:
                raise WeakError(f"{who}: it begins at 0, and Pascal VOC counts from 1; add 1 to all corners")
            frame.box(label, at[0] - 1, at[1] - 1, at[2], at[3])
    return sheet.labels()


def read_yolo(folder: Path, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    """FOLDER/*.txt or FOLDER/labels/*.txt, names in classes.txt, obj.names or data.yaml, and the pictures
    beside them or in FOLDER/images, whose size is needed.
    """
    from PIL import Image

    labels = folder / "labels" if (folder / "labels").is_dir() else folder
    names = _names(folder, labels)
    sheet = Sheet(folder, classes, rename)
    texts = sorted(p for p in labels.glob("*.txt") if p.name not in ("classes.txt", "train.txt", "val.txt"))
    if not texts:
        raise WeakError(f"marks {folder}: there is no label .txt; give the folder of labels")
    for text in texts:
        places = [d for d in (labels, folder / "images", folder) if d.is_dir()]
        pictures = [d / (text.stem + s) for d in places for s in _PICTURES if (d / (text.stem + s)).is_file()]
        if not pictures:
            raise WeakError(f"frame {text.stem}: there is no picture for its size; put it in {folder}/images")
        try:
            with Image.open(pictures[0]) as picture:
                size = picture.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise WeakError(
                f"frame {text.stem}: {pictures[0]} cannot be read ({error}); replace it"
            ) from None
        frame = sheet.frame(pictures[0].name, *size)
        for n, row in enumerate(_text(text).splitlines(), 1):
            if not row.strip():
                continue
            who = f"{frame.who}, line {n}"
            words = row.split()
            if len(words) not in (5, 6):
                raise WeakError(f"{who}: it has {len(words)} values; a box is class, x, y, width, height")
            index, x, y, w, h = (number(v, who) for v in words[:5])
            if index != int(index) or not 0 <= index < len(names):
                raise WeakError(f"{who}: class {words[0]} has no name; list it in classes.txt")
            if not all(0 <= v <= 1 for v in (x, y, w, h)):
                raise WeakError(f"{who}: values over 1 are pixels, and YOLO's are shares; divide by the size")
            at = (
                (x - w / 2) * size[0],
                (y - h / 2) * size[1],
                (x + w / 2) * size[0],
                (y + h / 2) * size[1],
            )
            tidy = [min(max(round(v, 3), 0), side) for v, side in zip(at, (*size, *size), strict=True)]
            if max(abs(a - b) for a, b in zip(at, tidy, strict=True)) > 1:
                raise WeakError(f"{who}: the box reaches outside the picture; clip it")
            score = number(words[5], who) if len(words) == 6 else None
            frame.box(names[int(index)], *tidy, score=score)
    return sheet.labels()


def _text(path: Path) -> str:
    try:
        return read_bytes(path, 1 << 22).decode("utf-8-sig")
    except UnicodeError:
        raise WeakError(f"marks {path}: it is no UTF-8 text; save it as UTF-8") from None


def _names(*folders: Path) -> list[str]:
    for folder in folders:
        for name in ("classes.txt", "obj.names"):
            if (folder / name).is_file():
                return [line.strip() for line in _text(folder / name).splitlines() if line.strip()]
        for name in ("data.yaml", "dataset.yaml"):
            if (folder / name).is_file():
                return _yaml_names(_text(folder / name), folder / name)
    raise WeakError(f"marks {folders[0]}: there are no class names; add classes.txt with one name per line")


def _yaml_names(text: str, path: Path) -> list[str]:
    """The names of a YOLO data.yaml: a list in brackets, a list of dashes, or a mapping of numbers."""
    found = re.search(r"^names:[ \t]*(.*?)(?=^[^\s-]|\Z)", text + "\n", re.M | re.S)
    body = found.group(1) if found else ""
    if body.strip().startswith("["):
        names = body.strip().strip("[]").split(",")
    else:
        rows = [r.strip() for r in body.splitlines() if r.strip() and not r.strip().startswith("#")]
        names = [r[1:] if r.startswith("-") else r.partition(":")[2] for r in rows]
        keys = [r.partition(":")[0] for r in rows if not r.startswith("-")]
        if keys and keys != [str(k) for k in range(len(rows))]:
            raise WeakError(f"marks {path}: names are not numbered from 0; write them in classes.txt")
    names = [n.strip().strip("'\"") for n in names]
    if not all(names) or not names:
        raise WeakError(f"marks {path}: names cannot be read; write them in classes.txt, one per line")
    return names
