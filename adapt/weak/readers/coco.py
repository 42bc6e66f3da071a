"""COCO instances: boxes, polygons, masks and the first visible keypoint of each annotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt.weak.marks import HUMAN, WeakError, WeakLabels
from adapt.weak.readers.bounded import number, read_document
from adapt.weak.readers.collect import Frame, Sheet
from adapt.weak.readers.masks import coco_mask
from common.files import write_json

__all__ = ["looks_like", "read_coco", "write_coco"]


def looks_like(found: Any) -> bool:
    return isinstance(found, dict) and {"images", "annotations", "categories"} <= set(found)


def read_coco(path: Path, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    """Raises WeakError: ids that are texts or repeat, categories without a name, masks of another size."""
    found = read_document(path)
    if not looks_like(found) or not all(
        isinstance(found[k], list) for k in ("images", "annotations", "categories")
    ):
        raise WeakError(f"marks {path}: it is no COCO file; export COCO instances with images and categories")
    sheet = Sheet(path, classes, rename)
    names = {i: entry.get("name") for i, entry in _by_id(found["categories"], "category", path).items()}
    for i, name in names.items():
        if not isinstance(name, str) or not name:
            raise WeakError(f"marks {path}: category {i} has no name; give it one")
    frames = {
        i: sheet.frame(entry.get("file_name"), entry.get("width"), entry.get("height"))
        for i, entry in _by_id(found["images"], "image", path).items()
    }
    _by_id(found["annotations"], "annotation", path)
    for entry in found["annotations"]:
        i, c = entry.get("image_id"), entry.get("category_id")
        who = f"marks {path}, annotation {entry['id']}"
        if isinstance(i, bool) or not isinstance(i, int) or i not in frames:
            raise WeakError(f"{who}: image_id {str(i)[:40]!r} is no image of the file; export it again")
        if isinstance(c, bool) or not isinstance(c, int) or c not in names:
            raise WeakError(f"{who}: category_id {str(c)[:40]!r} is no category of the file; export it again")
        _annotation(frames[i], entry, str(names[c]), f"{frames[i].who}, annotation {entry['id']}")
    return sheet.labels()


def _by_id(entries: list[Any], what: str, path: Any) -> dict[int, dict[str, Any]]:
    out: dict[int, dict[str, Any]] = {}
    for entry in entries:
        i = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(i, bool) or not isinstance(i, int):
            raise WeakError(f"marks {path}: {what} id {str(i)[:40]!r} is no whole number; number them")
        if i in out:
            raise WeakError(f"marks {path}: {what} id {i} is there twice; give each its own")
        out[i] = entry
    return out


def _annotation(frame: Frame, entry: dict[str, Any], label: str, who: str) -> None:
    score = entry.get("score")
    score = None if score is None else number(score, who)
    shape = entry.get("segmentation")
    keypoints = entry.get("keypoints")
    if isinstance(keypoints, list) and len(keypoints) % 3 == 0:
        seen = next((keypoints[k : k + 3] for k in range(0, len(keypoints), 3) if keypoints[k + 2]), None)
        if seen:
            frame.point(label, seen[0], seen[1], score=score)
    if isinstance(shape, dict) and shape:
        frame.mask(label, coco_mask(shape, frame.size, who))
    elif isinstance(shape, list):
        for way in shape:
            if not isinstance(way, list) or len(way) < 6 or len(way) % 2:
                raise WeakError(f"{who}: a polygon has not three corners; delete it or draw it again")
            frame.polygon(label, [way[k : k + 2] for k in range(0, len(way), 2)])
    box = entry.get("bbox")
    if box and not shape:  # the box of a polygon repeats it
        if not isinstance(box, list) or len(box) != 4:
            raise WeakError(f"{who}: bbox is not x, y, width, height; export it again")
        x, y, w, h = (number(v, who) for v in box)
        frame.box(label, x, y, x + w, y + h, score=score)


def write_coco(labels: WeakLabels, path: Path) -> dict[str, int]:
    """Write what COCO can hold: boxes and polygons of one class, and points as one keypoint.

    Returns:
        How many marks of each kind were left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    left = {"tags": 0, "points": 0, "scribbles": 0, "coarse": 0}
    for i, (key, marks) in enumerate(labels.frames.items(), 1):
        images.append({"id": i, "file_name": f"{key}.png", "width": marks.size[0], "height": marks.size[1]})
        left["tags"] += len(marks.present) + len(marks.absent)
        left["scribbles"] += len(marks.scribbles)

        def entry(label: str, score: float | None, image: int = i, **more: Any) -> None:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": labels.classes.index(label) + 1,
                    "iscrowd": 0,
                    **more,
                    **({} if score is None else {"score": score}),
                }
            )

        for b in marks.boxes:
            w, h = b.x1 - b.x0, b.y1 - b.y0
            entry(b.label, b.score, bbox=[b.x0, b.y0, w, h], area=w * h, segmentation=[])
        for c in marks.coarse:
            if c.label not in labels.classes:
                left["coarse"] += 1
                continue
            xs, ys = zip(*c.polygon, strict=True)
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            flat = [v for p in c.polygon for v in p]
            entry(c.label, c.score, segmentation=[flat], bbox=box, area=box[2] * box[3])
        for p in marks.points:
            if p.label not in labels.classes:
                left["points"] += 1
                continue
            entry(p.label, p.score, keypoints=[p.x, p.y, 2], num_keypoints=1, segmentation=[])
    categories = [
        {"id": k, "name": name, "keypoints": ["point"], "skeleton": []}
        for k, name in enumerate(labels.classes, 1)
    ]
    info = {"description": labels.made or f"weak labels, source {HUMAN}"}
    write_json(
        path,
        {"info": info, "images": images, "annotations": annotations, "categories": categories},
        allow_nan=False,
    )
    return {k: v for k, v in left.items() if v}
