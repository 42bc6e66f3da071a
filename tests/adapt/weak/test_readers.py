"""Files of marks: a fixture per tool in its documented form, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adapt.weak import Box, Marks, Point, Polygon, Scribble, WeakError, WeakLabels, geometry, read, simulate
from adapt.weak.readers import write_coco
from adapt.weak.readers.masks import coco_mask

CLASSES = ("sky", "road", "car", "pole")


def put(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def own(**frame: Any) -> dict[str, Any]:
    return {"schema": 1, "classes": list(CLASSES), "frames": {"a": {"width": 20, "height": 10, **frame}}}


# -------------------------------------------------------------------------------------------- our own
def full() -> WeakLabels:
    marks = Marks(
        CLASSES,
        (20, 10),
        ("car",),
        ("pole",),
        (Point(1, 2, "car"), Point(4, 4, "!sky", "lidar", 0.75)),
        (Scribble("road", ((0, 9), (5, 9)), 2),),
        (Box(1, 1, 4.5, 6, "car", "detector:x", 0.5),),
        (Polygon("road|sky", ((10, 0), (20, 0), (20, 5))),),
        all_boxes=("car",),
        source="human:ab",
        tag_sources=(("pole", "map"),),
        seconds=12.5,
    )
    return WeakLabels(CLASSES, {"a": marks, "id:12": Marks(CLASSES, (5, 5))}, "by hand")


def test_round_trip_of_our_own_file(tmp_path: Path) -> None:
    labels = full()
    labels.write(tmp_path / "weak.json")
    back = read(tmp_path / "weak.json", CLASSES)
    assert back == labels
    assert back.digest() == labels.digest()
    assert labels.counts() == {
        "frames": 1,
        "kinds": {"boxes": 1, "coarse": 1, "points": 2, "scribbles": 1, "tags": 2},
        "sources": {"detector": 1, "human": 4, "lidar": 1, "map": 1},
        "seconds": 12.5,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["weak.json"]


def test_names_are_mapped(tmp_path: Path) -> None:
    path = put(
        tmp_path / "w.json", {**own(points=[[1, 1, "!auto|car"]], absent=["auto"]), "classes": ["auto"]}
    )
    found = read(path, CLASSES, rename={"auto": "car"}).frames["a"]
    assert found.absent == ("car",)
    assert found.points == (Point(1, 1, "!car|car"),)
    with pytest.raises(WeakError, match="map to one of them"):
        read(path, CLASSES, rename={"auto": "lorry"})


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"points": [[1, 1, "lorry"]]}, "frame a, point: class 'lorry' is not one of .*--map"),
        ({"points": [[20, 1, "car"]]}, r"frame a: point \(20, 1, 'car'\) reaches .*outside 20x10"),
        ({"points": [[float("nan"), 1, "car"]]}, "frame a: .*no number"),
        ({"points": [[1.5, 1, "car"]]}, "between pixels"),
        ({"points": [[1, 1, "car"], [1, 1, "road"]]}, r"lies on point \(1, 1, 'car'\) \(human\)"),
        ({"points": [[1, 1, "car"]], "absent": ["car"]}, "shows a class that is absent"),
        ({"points": [[1, 1, "car"]], "present": ["road"], "complete": True}, "class that is absent"),
        ({"points": [[1, 1, []]]}, "no class name"),
        ({"points": [[[], 1, "car"]]}, "no number"),
        ({"points": {"x": 1}}, "no list"),
        ({"points": [[9, 9, "car"]], "all_boxes": ["car"]}, "outside every box of car"),
        ({"boxes": [[5, 5, 3, 2, "car"]]}, "look like x, y, width, height"),
        ({"boxes": [[5, 5, 21, 9, "car"]]}, "outside 20x10"),
        ({"boxes": [[1, 1, 3, 3, "car|road"]]}, "not of one class"),
        ({"coarse": [{"label": "car", "polygon": [[1, 1], [2, 2]]}]}, "has 2 corners"),
        (
            {"coarse": [{"label": c, "polygon": [[1, 1], [9, 1], [9, 9]]} for c in ("car", "road")]},
            "polygon of 'road' .* covers polygon of 'car'",
        ),
        (
            {"coarse": [{"label": "car", "polygon": [[1, 1], [9, 1], [9, 9]]}], "points": [[7, 3, "road"]]},
            "lies in polygon of 'car'",
        ),
        ({"absent": list(CLASSES)}, "every class is absent"),
        ({"complete": True}, "complete without a present class"),
        ({"present": ["car"], "absent": ["car"]}, "both present and absent"),
        ({"present": ["car", "car"]}, "twice"),
        ({"score": 1.5}, "not in 0..1"),
        ({"width": None}, "no picture size"),
        ({"width": 1e9}, "no picture's"),
        ({"width": 16384, "height": 16384}, "scale frame and marks down"),
        ({"clicks": []}, "no kind of marks"),
        ({"source": 3}, "no short text"),
        ({"points": [[1, 1, "!car|sky|road|pole"]]}, "leaves no class"),
    ],
)
def test_wrong_marks_are_named(tmp_path: Path, frame: dict[str, Any], words: str) -> None:
    with pytest.raises(WeakError, match=words) as caught:
        read(put(tmp_path / "w.json", own(**frame)), CLASSES)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("frame a", "marks "))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 200_000, "nested too deep|no JSON"),
        ('{"schema": 1, "frames": {"a": {}, "a": {}}}', "'a' is there twice"),
        ("PK\x03\x04", "zip"),
        ("", "no JSON"),
        ({"schema": 2, "frames": {}}, "reads 1"),
        ({**own(), "classes": ["car", "car"]}, "listed twice"),
        ({"frames": 1}, "form is not known"),
        ({**own(), "classes": ["lorry"]}, "'lorry' is not one of"),
        ('{"schema": 1, "x": "\\ud800", "frames": {}}', "UTF-8"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(WeakError, match=words):
        read(put(tmp_path / "w.json", content), CLASSES)


def test_large_files_pipes_and_dtds_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(WeakError, match="export fewer frames"):
        read(tmp_path / "large.json", CLASSES)
    bomb = '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'
    with pytest.raises(WeakError, match="DTD"):
        read(put(tmp_path / "bomb.xml", bomb), CLASSES)
    with pytest.raises(WeakError, match="nested over"):
        read(put(tmp_path / "deep.xml", "<a>" * 100), CLASSES)
    import os

    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(WeakError, match="no plain file"):
        read(tmp_path / "pipe.json", CLASSES)
    with pytest.raises(WeakError, match="no such file"):
        read(tmp_path / "absent.json", CLASSES)


# ----------------------------------------------------------------------------------------- the tools
CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta/>
<image id="0" name="town/a.png" width="20" height="10">
 <tag label="car" source="manual"><attribute name="x">1</attribute></tag>
 <points label="car" occluded="0" points="3.4,2.9;20.0,9.0" z_order="0"/>
 <polyline label="road" points="0.0,9.0;8.0,9.0"/>
 <box label="car" xtl="1.0" ytl="1.5" xbr="5.0" ybr="6.0"/>
 <polygon label="sky" points="10.0,0.0;20.0,0.0;20.0,5.0"/>
 <mask label="pole" rle="1, 2, 1" left="5" top="5" width="2" height="2"/>
</image></annotations>"""


def test_cvat(tmp_path: Path) -> None:
    marks = read(put(tmp_path / "a.xml", CVAT), CLASSES).frames["a"]
    assert marks.present == ("car",)
    assert marks.points == (Point(3, 2, "car"), Point(19, 9, "car"))
    assert marks.scribbles == (Scribble("road", ((0, 9), (8, 9))),)
    assert marks.boxes == (Box(1, 1.5, 5, 6, "car"),)
    assert marks.coarse[0] == Polygon("sky", ((10, 0), (20, 0), (20, 5)))
    rows, columns, covered = geometry.polygon(marks.coarse[1].polygon, (10, 20))
    mask = np.zeros((10, 20), bool)
    mask[rows, columns] = covered
    assert np.argwhere(mask).tolist() == [[5, 6], [6, 5]]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<meta/>", '<track id="0" label="car"/>', "CVAT for images 1.1"),
        ("<box ", '<box rotation="30" ', "rotated by 30"),
        ('rle="1, 2, 1"', 'rle="1, 2"', "run lengths"),
        ('name="town/a.png"', "", "no file name"),
        ('width="20" height="10"', "", "no picture size"),
        ("20.0,9.0", "20.0", "no pair"),
        ("xbr=", "other=", "no number"),
        ("<polyline", "<ellipse", "no shape that a mark can be"),
        ("</image>", '</image><image name="b/a.jpg" width="2" height="2"/>', "there twice"),
    ],
)
def test_cvat_refusals(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in CVAT
    with pytest.raises(WeakError, match=words):
        read(put(tmp_path / "a.xml", CVAT.replace(old, new, 1)), CLASSES)


def coco() -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "x/a.png", "width": 20, "height": 10}],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "pole"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]},
            {"id": 3, "image_id": 7, "category_id": 3, "keypoints": [0, 0, 0, 9, 8, 2]},
        ],
    }


def test_coco_and_back(tmp_path: Path) -> None:
    labels = read(put(tmp_path / "c.json", coco()), CLASSES)
    marks = labels.frames["a"]
    assert marks.boxes == (Box(1, 2, 4, 6, "car"),)
    assert marks.coarse == (Polygon("pole", ((0, 0), (4, 0), (4, 4))),)
    assert marks.points == (Point(9, 8, "car"),)
    assert write_coco(labels, tmp_path / "out.json") == {}
    assert read(tmp_path / "out.json", CLASSES).frames == labels.frames
    assert write_coco(full(), tmp_path / "out.json") == {"tags": 2, "points": 1, "scribbles": 1, "coarse": 1}


def test_coco_compressed_masks() -> None:
    # Made by pycocotools 2.0.11: encode(np.asfortranarray([[0,1,1],[0,1,0]]))
    mask = coco_mask({"size": [2, 3], "counts": "231"}, (3, 2), "x")
    assert mask.tolist() == [[False, True, True], [False, True, False]]
    plain = coco_mask({"size": [2, 3], "counts": [2, 3, 1]}, (3, 2), "x")
    assert np.array_equal(mask, plain)
    blocks = np.kron(np.random.default_rng(5).integers(0, 2, (4, 5)), np.ones((9, 7))) > 0
    text = "0b0b00000000000000000000000000b0GG00000000000^O9900000000000k0G^O00000000000"
    assert np.array_equal(coco_mask({"size": [36, 35], "counts": text}, (35, 36), "x"), blocks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][0].update(id="7"), "no whole number"),
        (lambda c: c["images"].append(dict(c["images"][0])), "id 7 is there twice"),
        (lambda c: c["categories"][0].pop("name"), "has no name"),
        (lambda c: c["annotations"][0].update(image_id=8), "no image of the file"),
        (lambda c: c["annotations"][0].update(category_id=9), "no category"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 30, 4]), "outside 20x10"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [9, 9], "counts": "1"}),
            r"size \[9, 9\]",
        ),
        (lambda c: c["annotations"][0].update(segmentation={"size": [10, 20], "counts": "P"}), "cut off"),
        (lambda c: c["annotations"][1].update(id=1), "annotation id 1"),
        (lambda c: c["images"][0].update(width=None), "no picture size"),
    ],
)
def test_coco_refusals(tmp_path: Path, change: Any, words: str) -> None:
    content = coco()
    change(content)
    with pytest.raises(WeakError, match=words):
        read(put(tmp_path / "c.json", content), CLASSES)


def shape(kind: str, *points: list[float], label: str = "car") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def labelme(*shapes: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {"pole": True, "sky": False},
        "shapes": list(shapes),
        "imagePath": "..\\a.png",
        "imageData": None,
        "imageHeight": 10,
        "imageWidth": 20,
    }


def test_labelme(tmp_path: Path) -> None:
    content = labelme(
        shape("point", [1.5, 2]),
        shape("linestrip", [0, 9], [4, 9], label="road"),
        shape("rectangle", [6, 7], [2, 3]),
        shape("polygon", [10, 0], [20, 0], [20, 5], label="sky"),
    )
    marks = read(put(tmp_path / "a.json", content), CLASSES).frames["a"]
    assert marks.present == ("pole",)
    assert marks.absent == ()
    assert marks.points == (Point(1, 2, "car"),)
    assert marks.boxes == (Box(2, 3, 6, 7, "car"),)
    assert marks.scribbles[0].line == ((0, 9), (4, 9))
    assert marks.coarse[0].label == "sky"
    with pytest.raises(WeakError, match="a circle is no mark"):
        read(put(tmp_path / "a.json", labelme(shape("circle", [1, 1], [2, 2]))), CLASSES)
    with pytest.raises(WeakError, match="no pairs"):
        read(put(tmp_path / "a.json", labelme(shape("point", [1, 1, 1]))), CLASSES)


def studio(kind: str, **value: Any) -> list[dict[str, Any]]:
    result = {
        "id": "r1",
        "type": kind,
        "from_name": "l",
        "to_name": "i",
        "value": value,
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
    }
    return [{"id": 1, "data": {"image": "/data/upload/1/a.png"}, "annotations": [{"result": [result]}]}]


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("keypointlabels", {"x": 50, "y": 10, "width": 1, "keypointlabels": ["car"]}, Point(100, 10, "car")),
        (
            "rectanglelabels",
            {"x": 10, "y": 20, "width": 5, "height": 10, "rotation": 0, "rectanglelabels": ["car"]},
            Box(20, 20, 30, 30, "car"),
        ),
        (
            "polygonlabels",
            {"points": [[0, 0], [10, 0], [10, 10]], "polygonlabels": ["sky"]},
            Polygon("sky", ((0, 0), (20, 0), (20, 10))),
        ),
    ],
)
def test_label_studio(tmp_path: Path, kind: str, value: dict[str, Any], wanted: Any) -> None:
    marks = read(put(tmp_path / "s.json", studio(kind, **value)), CLASSES).frames["a"]
    assert marks.size == (200, 100)
    assert marks.marks() == (wanted,)


def test_label_studio_tags_and_refusals(tmp_path: Path) -> None:
    found = read(put(tmp_path / "s.json", studio("choices", choices=["car", "sky"])), CLASSES)
    assert found.frames["a"].present == ("car", "sky")
    for kind, value, words in (
        ("brushlabels", {"format": "rle", "rle": [1], "brushlabels": ["car"]}, "cannot be read"),
        ("rectanglelabels", {"rotation": 9, "rectanglelabels": ["car"]}, "rotated"),
        ("keypointlabels", {"x": 120, "y": 1, "keypointlabels": ["car"]}, "outside 200x100"),
        ("keypointlabels", {"x": 1, "y": 1, "keypointlabels": []}, "not one label"),
    ):
        with pytest.raises(WeakError, match=words):
            read(put(tmp_path / "s.json", studio(kind, **value)), CLASSES)


VOC = """<annotation><filename>a.jpg</filename><size><width>20</width><height>10</height></size>
<object><name>car</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20</xmax><ymax>10</ymax></bndbox></object>
</annotation>"""


def test_voc(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.xml", VOC), CLASSES).frames["a"].boxes == (Box(0, 1, 20, 10, "car"),)
    with pytest.raises(WeakError, match="counts from 1"):
        read(put(tmp_path / "a.xml", VOC.replace("<xmin>1<", "<xmin>0<")), CLASSES)
    with pytest.raises(WeakError, match="no picture size"):
        read(put(tmp_path / "a.xml", VOC.replace("size>", "other>")), CLASSES)


@pytest.mark.parametrize(
    "names",
    [
        ("classes.txt", "road\ncar\n"),
        ("data.yaml", "path: x\nnames: ['road', car]\nnc: 2\n"),
        ("data.yaml", "names:\n  0: road\n  1: car\ntrain: x\n"),
        ("data.yaml", "names:\n- road\n- car\n"),
    ],
)
def test_yolo(tmp_path: Path, names: tuple[str, str]) -> None:
    for folder in ("labels", "images"):
        (tmp_path / folder).mkdir()
    put(tmp_path / names[0], names[1])
    put(tmp_path / "labels" / "a.txt", "1 0.5 0.5 0.5 0.4 0.8\n\n")
    with pytest.raises(WeakError, match="no picture for its size"):
        read(tmp_path, CLASSES)
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    assert read(tmp_path, CLASSES).frames["a"].boxes == (Box(5, 3, 15, 7, "car", score=0.8),)
    for row, words in (
        ("1 10 5 10 4", "are pixels"),
        ("2 .5 .5 .1 .1", "has no name"),
        ("1 .5 .5", "3 values"),
        ("1 .9 .5 .8 .1", "outside the picture"),
    ):
        put(tmp_path / "labels" / "a.txt", row)
        with pytest.raises(WeakError, match=words):
            read(tmp_path, CLASSES)


# ------------------------------------------------------------------------------------ merging, keys
def test_merge_adds_and_refuses_contradictions() -> None:
    def one(**more: Any) -> WeakLabels:
        return WeakLabels(CLASSES, {"a": Marks(CLASSES, (20, 10), frame="a", **more)})

    person = one(points=(Point(1, 1, "car"),), seconds=2.0, source="human:ab")
    program = one(points=(Point(1, 1, "road"), Point(2, 2, "sky")), source="detector:x", score=0.9)
    with pytest.raises(WeakError, match=r"frame a: .*\(detector:x\).*\(human:ab\).*--prefer human"):
        person.merge(program)
    both = person.merge(program, "human").frames["a"]
    assert {(q.label, q.source) for q in both.points} == {("car", "human:ab"), ("sky", "detector:x")}
    assert both.seconds == 2.0
    assert {q.label for q in program.merge(person, "human").frames["a"].points} == {"car", "sky"}
    with pytest.raises(WeakError, match="present by one source"):
        one(present=("car",)).merge(one(absent=("car",), source="map"))
    kept = one(present=("car",)).merge(one(absent=("car", "sky"), source="map"), "human").frames["a"]
    assert (kept.present, kept.absent, kept.tag_sources) == (("car",), ("sky",), (("sky", "map"),))
    assert person.merge(WeakLabels(CLASSES, {"b": Marks(CLASSES, (4, 4))})).frames.keys() == {"a", "b"}


def test_trust() -> None:
    marks = Marks(
        CLASSES,
        (20, 10),
        ("car",),
        ("pole",),
        (Point(1, 1, "car", "lidar", 0.4), Point(2, 2, "sky")),
        source="map",
    )
    kept = marks.trusted(0.5)
    assert (kept.present, kept.absent, kept.points) == ((), ("pole",), ())
    assert len(marks.trusted(0.3).points) == 1


def test_keys_that_name_no_frame_or_two() -> None:
    labels = WeakLabels(CLASSES, {k: Marks(CLASSES, (4, 4), absent=("car",)) for k in ("a", "id:3")})
    assert [m is not None for m in labels.of(["a", ["b", "id:3"], "c"], every=True)] == [True, True, False]
    with pytest.raises(WeakError, match="is two frames"):
        labels.of(["a", "a"])
    with pytest.raises(WeakError, match="under id:3, too"):
        labels.of([["a", "id:3"]])
    with pytest.raises(WeakError, match="none of the frames"):
        labels.of(["a"], every=True)
    with pytest.raises(WeakError, match="'a' without the ending"):
        WeakLabels(CLASSES, {"a.png": labels.frames["a"]}).of(["a"], every=True)
    with pytest.raises(WeakError, match="EXIF"):
        WeakLabels(CLASSES, {"a": Marks(CLASSES, (4, 5))}).check_sizes({"a": (5, 4)})


# ------------------------------------------------------------------------------------------ geometry
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_mask_as_a_polygon_covers_the_same_pixels(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.6
    way = geometry.rectangles(mask)
    again = np.zeros_like(mask)
    if way:
        rows, columns, covered = geometry.polygon(way, mask.shape)
        again[rows, columns] = covered
    assert np.array_equal(again, mask)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_simulated_marks_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 4, (4, 5)), np.ones((8, 8), int)).astype(np.uint8)
    label[:3] = 255
    kinds = ("tags", "points", "scribbles", "boxes", "coarse", "corrections")
    answer = np.zeros_like(label)
    made = simulate(label, kinds, seed=seed, boxes_of=["car"], classes=CLASSES, answer=answer, erode=1)
    assert made == simulate(
        label, kinds, seed=seed, boxes_of=["car"], classes=CLASSES, answer=answer, erode=1
    )
    assert all(CLASSES[label[q.y, q.x]] == q.label for q in made.points)
    assert set(made.present) == {CLASSES[c] for c in np.unique(label) if c != 255}
    for mark in made.coarse:
        rows, columns, covered = geometry.polygon(mark.polygon, label.shape)
        assert (label[rows, columns][covered] == CLASSES.index(mark.label)).all()
    with pytest.raises(WeakError, match="unknown"):
        simulate(label, ["guesses"], seed=0)


@pytest.mark.real
def test_the_staged_clicks_can_be_read() -> None:
    import os

    root = Path(os.environ.get("ROADWORTHY_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = root / "camvid" / "weak" / "dusk_adapt.json"
    if not path.is_file():
        pytest.skip("the staged marks are not there")
    classes = json.loads(path.read_text())["classes"]
    labels = read(path, classes)
    assert labels.counts()["kinds"] | {"tags": 0} == {"boxes": 756, "points": 604, "tags": 0}
    assert len(labels.frames) == 62
    assert len(labels.scaled((256, 192)).frames) == 62
