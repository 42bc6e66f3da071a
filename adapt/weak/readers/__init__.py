"""Files of marks: this project's own, and those of annotation tools in their documented form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt.weak.marks import MOST_FRAMES, WeakError, WeakLabels
from adapt.weak.readers import boxes, coco, cvat, label_studio, labelme, own
from adapt.weak.readers.bounded import parse_xml, read_document
from adapt.weak.readers.coco import write_coco

__all__ = ["FORMS", "read", "write_coco"]

FORMS = ("auto", "weak", "cvat", "coco", "labelme", "label-studio", "voc", "yolo")


def read(
    path: str | Path,
    classes: Sequence[str],
    *,
    form: str = "auto",
    rename: Mapping[str, str] | None = None,
) -> WeakLabels:
    """The marks of a file, or of a folder of LabelMe, Pascal VOC or YOLO files.

    Args:
        classes: the network's classes, in its order.
        form: one of `FORMS`; "auto" finds it out from the content.
        rename: class of the file → class of the network.

    Raises:
        WeakError: no such file, another form, or marks that are wrong; names frame, mark and remedy.
    """
    path = Path(path)
    if form not in FORMS:
        raise WeakError(f"form {form!r} of marks is unknown; choose from {', '.join(FORMS)}")
    if not path.exists():
        raise WeakError(f"marks {path}: there is no such file or folder; check the path")
    form = _form(path) if form == "auto" else form
    if form in ("labelme", "voc"):
        files = _files(path, ".json" if form == "labelme" else ".xml")
        several: Any = labelme.read_labelme if form == "labelme" else boxes.read_voc
        return several(files, classes, rename)  # type: ignore[no-any-return]
    if form == "yolo":
        if not path.is_dir():
            raise WeakError(f"marks {path}: YOLO's are a folder of .txt files; name the folder")
        return boxes.read_yolo(path, classes, rename)
    one: Any = {
        "weak": own.read_own,
        "cvat": cvat.read_cvat,
        "coco": coco.read_coco,
        "label-studio": label_studio.read_label_studio,
    }[form]
    return one(path, classes, rename)  # type: ignore[no-any-return]


def _files(path: Path, suffix: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == suffix)
    if not found or len(found) > MOST_FRAMES:
        raise WeakError(f"marks {path}: it holds {len(found)} {suffix} files; give 1 to {MOST_FRAMES}")
    return found


def _form(path: Path) -> str:
    if path.is_dir():
        if any(path.glob("*.xml")):
            return "voc"
        return "labelme" if any(path.glob("*.json")) else "yolo"
    if path.suffix.lower() == ".xml":
        return "voc" if parse_xml(path).name == "annotation" else "cvat"
    if path.suffix.lower() == ".txt":
        raise WeakError(f"marks {path}: a YOLO text has no size; name the folder that holds it")
    found = read_document(path)
    for form, fits in (
        ("weak", own.looks_like),
        ("coco", coco.looks_like),
        ("labelme", labelme.looks_like),
        ("label-studio", label_studio.looks_like),
    ):
        if fits(found):
            return form
    raise WeakError(
        f"marks {path}: its form is not known; choose it with --form, one of {', '.join(FORMS[1:])}"
    )
