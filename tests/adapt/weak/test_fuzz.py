"""Whatever a file holds, reading it ends in marks or in one line of WeakError."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.weak import Marks, WeakError, read

CLASSES = ("sky", "road", "car", "pole")
OWN = {
    "schema": 1,
    "classes": ["sky", "car"],
    "frames": {
        "a": {
            "width": 20,
            "height": 10,
            "present": ["sky"],
            "absent": ["car"],
            "complete": False,
            "points": [[1, 1, "sky", {"source": "lidar", "score": 0.5}]],
            "all_boxes": ["road"],
            "scribbles": [{"label": "sky", "line": [[0, 0], [3, 3]], "width": 2}],
            "boxes": [[1, 1, 4, 4, "sky"]],
            "coarse": [{"label": "?", "polygon": [[9, 9], [4, 9], [9, 4]]}],
            "source": "human",
            "score": 1,
            "seconds": 2,
            "tag_sources": {"sky": "map"},
        }
    },
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
    "categories": [{"id": 1, "name": "car"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]},
        {
            "id": 3,
            "image_id": 1,
            "category_id": 1,
            "segmentation": {"size": [10, 20], "counts": [100, 9, 91]},
        },
        {"id": 4, "image_id": 1, "category_id": 1, "keypoints": [5, 5, 2]},
    ],
}
LABELME = {
    "imagePath": "a.png",
    "imageWidth": 20,
    "imageHeight": 10,
    "flags": {"sky": True},
    "shapes": [
        {"label": "car", "points": [[1, 1], [5, 5]], "shape_type": kind} for kind in ("line", "rectangle")
    ]
    + [{"label": "car", "points": [[1, 1], [5, 5], [1, 5]], "shape_type": "polygon"}],
}
STUDIO = [
    {
        "data": {"image": "a.png"},
        "annotations": [
            {
                "result": [
                    {
                        "id": "r",
                        "type": "keypointlabels",
                        "original_width": 20,
                        "original_height": 10,
                        "image_rotation": 0,
                        "value": {"x": 5, "y": 5, "keypointlabels": ["car"]},
                    },
                    {
                        "id": "s",
                        "type": "rectanglelabels",
                        "original_width": 20,
                        "original_height": 10,
                        "value": {
                            "x": 5,
                            "y": 5,
                            "width": 5,
                            "height": 5,
                            "rotation": 0,
                            "rectanglelabels": ["car"],
                        },
                    },
                    {"id": "t", "type": "choices", "value": {"choices": ["sky"]}},
                ]
            }
        ],
    },
]
BAD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 40),
    st.just(10**30),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just([[]]),
    st.just("!sky|road|car|pole"),
    st.just("car"),
    st.just(0.5),
    st.just([1, 2]),
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(p for k, v in inner for p in places(v, (*way, k)))]


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    out = copy.deepcopy(value)
    here = out
    for step in way[:-1]:
        here = here[step]
    here[way[-1]] = new
    return out


@given(
    st.sampled_from([("weak", OWN), ("coco", COCO), ("labelme", LABELME), ("label-studio", STUDIO)]),
    st.data(),
)
@settings(max_examples=600, deadline=None)
def test_a_changed_file_is_read_or_refused_in_one_line(what: tuple[str, Any], data: st.DataObject) -> None:
    form, content = what
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from(places(content)))
        content = changed(content, way, data.draw(BAD))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marks.json"
        path.write_text(json.dumps(content))
        words: list[str] = []
        for asked in (form, "auto"):
            try:
                found = read(path, CLASSES, form=asked)
            except WeakError as error:
                words.append(str(error))
                continue
            assert all(isinstance(m, Marks) for m in found.frames.values())
            found.scaled((7, 33)).trusted()
            found.write(Path(folder) / "again.json")
            assert read(Path(folder) / "again.json", CLASSES) == found
        assert all(line.isprintable() for line in words)
