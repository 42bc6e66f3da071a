"""Edge truth of SBD, Cityscapes, BSDS500 and CamVid, each as its benchmark scores it, and predictions on
disk.

``open_truth("cityscapes:ROOT:val")`` finds a set from the text a command line gives.  A set knows its
names, its classes, its protocol, and the truth of an image in a mode ("thin" or "raw"); thinning itself is
the count table's business.  Nothing is downloaded, nothing is written.

Layouts:
  sbd:ROOT:LIST          ROOT/cls/*.mat, ROOT/inst/*.mat, ROOT/LIST.txt (benchmark_RELEASE/dataset)
  cityscapes:ROOT:SPLIT  ROOT/gtFine/SPLIT/CITY/*_gtFine_labelIds.png and *_instanceIds.png
  bsds:ROOT[:PREFIX]     ROOT/groundTruth/**/*.mat (BSDS500), or ROOT/edges/PREFIX*.png, bit i = annotator i
  camvid:ROOT:LIST       ROOT/labels/*.png (11 classes), ROOT/LIST.txt
  labels:ROOT:CLASSES    ROOT/*.npz, *.mat or *.png edge labels (adapt.labels.edge_codec), CLASSES of them;
                         of one class also black and white PNGs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapt.data.base import BROKEN
from adapt.evaluate import edges
from adapt.evaluate.resize import resize_bicubic, resize_nearest
from adapt.labels import edge_codec
from adapt.labels.edges import category_edges, cityscapes_edges, half_disc, instance_edges
from adapt.labels.errors import EdgeError

__all__ = ["CLASSES", "EdgeSet", "Predictions", "fit", "inverted", "open_truth", "unknown"]

CLASSES: dict[str, tuple[str, ...]] = {
    "sbd": (
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    "cityscapes": (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    "camvid": (
        "sky",
        "building",
        "pole",
        "road",
        "sidewalk",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    "bsds": ("boundary",),
}

#: Cityscapes' labelIds of the 19 trained classes, in their order.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class EdgeSet(Protocol):
    """Edge truth of a data set."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def protocol(self) -> edges.Protocol: ...

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [K,H,W] of image i in mode "thin" or "raw" (several annotators: bool [A,H,W], K = 1)."""
        ...


def unknown(truth: EdgeSet, i: int, mode: str) -> NDArray[np.bool_] | None:
    """Where the truth of image i does not know whether there is an edge: bool [H,W], or None.

    A set says so by a method ``unknown(i, mode)``.  The published protocols of SBD, Cityscapes and BSDS500
    count every pixel, so those sets have none.
    """
    says = getattr(truth, "unknown", None)
    return None if says is None else says(i, mode)


def around(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """A mask and the pixels within ``radius`` of it: bool [H,W]."""
    from scipy.ndimage import binary_dilation

    disc = np.zeros((2 * radius + 1, 2 * radius + 1), bool)
    disc[radius, radius] = True
    for dy, dx in half_disc(radius).tolist():
        disc[radius + dy, radius + dx] = disc[radius - dy, radius - dx] = True
    return np.asarray(binary_dilation(mask, disc)) if mask.any() else mask


def _image(path: Path) -> NDArray[Any]:
    """The numbers of an image.

    A palette of greys is applied, because tools that shrink PNGs put one there.  A palette of
    colours stays an index map [H,W]: class maps have one.
    """
    try:
        with Image.open(path) as image:
            palette = _palette(image)
            if palette is not None and (palette == palette[:, :1]).all():
                indices = np.asarray(image)
                if int(indices.max(initial=0)) < len(palette):
                    return np.asarray(palette[indices, 0])
            return np.asarray(image)
    except FileNotFoundError:
        raise EdgeError(f"{path} is missing: is the set unpacked completely?") from None
    except BROKEN as error:
        raise EdgeError(f"{path} is no readable image ({error}): unpack the set again") from None


def _palette(image: Image.Image) -> NDArray[np.uint8] | None:
    """uint8 [n,3] of a palette image, None of any other."""
    if image.mode != "P":
        return None
    return np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)


def _map(path: Path) -> NDArray[Any]:
    """A probability map: as ``_image``, but a palette that loses the map's order or its levels is refused.

    A palette of colours has no order.  One of few greys was made by a tool that merges levels: the map it
    came from scores otherwise.
    """
    values = _image(path)
    with Image.open(path) as image:
        palette = _palette(image)
    if palette is not None and not (palette == palette[:, :1]).all():
        raise EdgeError(
            f"{path} has a palette of colours: its numbers are no probabilities; save it as one grey channel"
        )
    levels = np.unique(values).size if palette is not None else 0
    if 2 < levels == len(palette if palette is not None else ()) < 100:
        raise EdgeError(
            f"{path} has a palette of {levels} greys: levels were merged and the scores would not be the "
            "map's; save it as one grey channel of 8 bits"
        )
    return values


def _labels(path: Path) -> NDArray[Any]:
    labels = _image(path)
    if labels.ndim != 2:
        raise EdgeError(f"{path} has {labels.ndim} dimensions: a label map is one channel of whole numbers")
    return labels


def _matlab(path: Path, name: str) -> Any:
    from scipy.io import loadmat

    try:
        content = loadmat(str(path), squeeze_me=True, struct_as_record=False)
    except FileNotFoundError:
        raise EdgeError(f"{path} is missing: is the set unpacked completely?") from None
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise EdgeError(f"{path} is no readable MATLAB file ({str(error).splitlines()[0]})") from None
    if name not in content:
        raise EdgeError(f"{path} holds no {name}: is it this data set's?")
    return content[name]


def _field(struct: Any, name: str, path: Path) -> Any:
    if not hasattr(struct, name):
        raise EdgeError(f"{path} has no {name} in its struct: is it this data set's?")
    return getattr(struct, name)


def _listed(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}; the list of images is needed") from None
    if not names:
        raise EdgeError(f"{path} lists no image")
    return names


def _dense(m: Any) -> NDArray[np.bool_]:
    return np.asarray(m.toarray() if hasattr(m, "toarray") else m).astype(np.bool_)


class SBD:
    """Semantic Boundaries Dataset: thin = the annotated boundaries, raw = seg2edge, radius 2.

    Of instances (inst/), or of classes (cls/) under a protocol without instances.
    """

    classes = CLASSES["sbd"]

    def __init__(self, root: Path, listing: str = "val", protocol: str = "sbd") -> None:
        self.root, self.names, self.protocol = (
            root,
            _listed(root / f"{listing}.txt"),
            edges.PROTOCOLS[protocol],
        )

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [20,H,W]."""
        if not self.protocol.instances:
            return self._of_classes(self.root / "cls" / f"{self.names[i]}.mat", mode)
        path = self.root / "inst" / f"{self.names[i]}.mat"
        instances = _matlab(path, "GTinst")
        segmentation = _field(instances, "Segmentation", path)
        if mode == "raw":
            other = self.root / "cls" / f"{self.names[i]}.mat"
            categories = _field(_matlab(other, "GTcls"), "Segmentation", other)
            return instance_edges(categories, segmentation, len(self.classes))
        out = np.zeros((len(self.classes), *np.shape(segmentation)), np.bool_)
        held = _field(instances, "Boundaries", path)
        alone = (
            hasattr(held, "toarray") or np.asarray(held).dtype != np.object_
        )  # SciPy takes it out of its cell
        boundaries = [held] if alone else list(np.atleast_1d(held))
        listed = np.atleast_1d(_field(instances, "Categories", path))
        if len(listed) != len(boundaries):
            raise EdgeError(
                f"{path} has {len(boundaries)} boundaries of {len(listed)} categories: unpack again"
            )
        for category, boundary in zip(listed, boundaries, strict=True):
            edge = _dense(boundary)
            if not 1 <= int(category) <= len(self.classes) or edge.shape != out.shape[1:]:
                raise EdgeError(
                    f"{path}: a boundary {list(edge.shape)} of category {int(category)}; "
                    f"{list(out.shape[1:])} of 1 to {len(self.classes)} are needed"
                )
            out[int(category) - 1] |= edge
        return out

    def _of_classes(self, path: Path, mode: str) -> NDArray[np.bool_]:
        categories = _matlab(path, "GTcls")
        segmentation = np.asarray(_field(categories, "Segmentation", path))
        k = len(self.classes)
        if mode == "raw":  # classes count from 1; every border of a class is an edge, that to 0 as well
            return category_edges(segmentation.astype(np.int64) - 1, k, ignore=())
        boundaries = np.atleast_1d(_field(categories, "Boundaries", path))
        if len(boundaries) != k:
            raise EdgeError(
                f"{path} has boundaries of {len(boundaries)} classes, {k} are needed: unpack again"
            )
        out = np.zeros((k, *segmentation.shape), np.bool_)
        for c, boundary in enumerate(boundaries):
            edge = _dense(boundary)
            if edge.shape == segmentation.shape:
                out[c] = edge
            elif edge.any():
                raise EdgeError(
                    f"{path}: a boundary is {list(edge.shape)}, {list(segmentation.shape)} is needed"
                )
        return out


class Cityscapes:
    """Cityscapes, instance-sensitive, at half resolution: thin = radius 1 on the halved maps, raw = radius 2
    at full resolution, then halved; both by MATLAB's nearest.
    """

    classes = CLASSES["cityscapes"]

    def __init__(self, root: Path, split: str = "val") -> None:
        folder = root / "gtFine" / split
        self.files = sorted(folder.glob("*/*_gtFine_labelIds.png"))
        if not self.files:
            raise EdgeError(f"{folder} has no CITY/*_gtFine_labelIds.png: is gtFine unpacked there?")
        self.names = [f.name.removesuffix("_gtFine_labelIds.png") for f in self.files]
        self.protocol = edges.PROTOCOLS["cityscapes"]

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [19,H/2,W/2]."""
        path = self.files[i]
        ids = _labels(path)
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 255:
            raise EdgeError(f"{path} holds ids of {ids.min()} to {ids.max()}: labelIds are 0 to 255")
        other = path.with_name(path.name.replace("_labelIds", "_instanceIds"))
        instances = _labels(other)
        _check_ids(ids, instances, path, other)
        table = np.full(256, 255, np.uint8)
        table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
        train = table[ids.astype(np.uint8)]
        height, width = train.shape
        half = (height // 2, width // 2)
        if not self.protocol.instances:
            return _class_edges(train, ids, half, mode)
        if mode == "thin":
            return cityscapes_edges(resize_nearest(train, half), resize_nearest(instances, half), radius=1)
        full = cityscapes_edges(train, instances)
        return np.stack([resize_nearest(e, half) for e in full]).astype(np.bool_)


def _check_ids(ids: NDArray[Any], instances: NDArray[Any], path: Path, other: Path) -> None:
    """Raise EdgeError unless the two maps are Cityscapes' labelIds and instanceIds of one image.

    An instance id is 1000 times the labelId plus a number, or the labelId itself.
    """
    if instances.shape != ids.shape:
        raise EdgeError(f"{other} is {list(instances.shape)}, {path.name} {list(ids.shape)}: another image?")
    if instances.dtype == np.uint8:
        raise EdgeError(f"{other} has 8 bits: instanceIds go to 33999 and were cut off; take the 16-bit file")
    own = np.where(instances >= 1000, instances // 1000, instances)
    wrong = float((own != ids)[(instances >= 0) & (instances <= 33999)].mean()) if ids.size else 0.0
    if wrong > 0.01:
        train = set(np.unique(ids).tolist()) <= {*range(19), 255}
        what = "it holds trainIds" if train else "another image's?"
        raise EdgeError(
            f"{path}: {100 * wrong:.0f} % of its ids are not those of {other.name} ({what}); give labelIds"
        )


def _class_edges(
    train: NDArray[np.uint8], ids: NDArray[Any], half: tuple[int, int], mode: str
) -> NDArray[np.bool_]:
    """Class borders alone, at half resolution; nothing along the rectification border and outside the region
    of interest."""
    outside = 254
    labels = np.where(np.isin(ids, (2, 3)), outside, train)
    if mode == "thin":
        return category_edges(resize_nearest(labels, half), len(LABEL_IDS), 1, ignore=(outside,))
    full = category_edges(labels, len(LABEL_IDS), 2, ignore=(outside,))
    return np.stack([resize_nearest(e, half) for e in full]).astype(np.bool_)


class BSDS:
    """BSDS500: several annotators an image, one class."""

    classes = CLASSES["bsds"]

    def __init__(self, root: Path, prefix: str = "") -> None:
        self.files = sorted((root / "groundTruth").rglob(f"{prefix}*.mat")) or sorted(
            (root / "edges").glob(f"{prefix}*.png")
        )
        if not self.files:
            raise EdgeError(f"{root} has neither groundTruth/**/{prefix}*.mat nor edges/{prefix}*.png")
        self.names = [f.stem for f in self.files]
        self.protocol = edges.PROTOCOLS["bsds"]

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [annotators,H,W]."""
        path = self.files[i]
        if path.suffix == ".mat":
            cells = np.atleast_1d(_matlab(path, "groundTruth"))
            drawn = [_dense(_field(c, "Boundaries", path)) for c in cells]
            if len({m.shape for m in drawn}) > 1:
                raise EdgeError(f"{path}: its annotators' maps differ in size: unpack the set again")
            return np.stack(drawn)
        bits = _labels(path)
        if bits.dtype not in (np.uint8, np.bool_):
            raise EdgeError(f"{path} is {bits.dtype}: an annotator is a bit of 8; save one 8-bit channel")
        bits = bits.astype(np.uint8)
        if np.isin(bits, (0, 255)).all():  # one drawing, black and white, not eight that agree everywhere
            bits = np.minimum(bits, 1)
        maps = np.stack([(bits >> b) & 1 for b in range(8)]).astype(np.bool_)
        marked = np.flatnonzero(maps.any((1, 2)))
        if not marked.size:
            raise EdgeError(f"{path} marks no boundary of any annotator")
        return np.asarray(maps[: marked[-1] + 1])


class CamVid:
    """CamVid's 11 classes, category edges.  No published protocol: .0075 of the diagonal, no margin; thin =
    radius 1, raw = radius 2; nothing is marked along void."""

    classes = CLASSES["camvid"]

    def __init__(self, root: Path, listing: str) -> None:
        self.root, self.names = root, _listed(root / f"{listing}.txt")
        self.protocol = edges.Protocol("camvid", 0.0075)

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [11,H,W]."""
        return category_edges(self._labels(i), len(self.classes), self._radius(mode))

    def unknown(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [H,W]: void and 2 pixels around it, where detectors of radius 2 mark a border to void."""
        return around(self._labels(i) == 255, self._radius("raw"))

    def _labels(self, i: int) -> NDArray[Any]:
        return _labels(self.root / "labels" / f"{self.names[i]}.png")

    @staticmethod
    def _radius(mode: str) -> int:
        return 1 if mode == "thin" else 2


class Labels:
    """Edge label files of any codec but .bin; both modes score the same maps."""

    def __init__(self, root: Path, classes: str) -> None:
        if not classes.isdigit():
            raise EdgeError(f"labels:{root}: say how many classes, labels:ROOT:CLASSES, not {classes!r}")
        self.files = sorted(f for s in (".npz", ".mat", ".png") for f in root.glob(f"*{s}"))
        if not self.files:
            raise EdgeError(f"{root} has no .npz, .mat or .png edge label")
        self.names = [f.stem for f in self.files]
        self.classes = tuple(f"class{k}" for k in range(int(classes)))
        self.protocol = edges.PROTOCOLS["sbd-reanno"]

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [K,H,W]."""
        return self._read(i)[0]

    def unknown(self, i: int, mode: str) -> NDArray[np.bool_]:
        """bool [H,W]: the file's ignore bit."""
        return self._read(i)[1]

    def _read(self, i: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        k = len(self.classes)
        return edge_codec.unpack(edge_codec.read(self.files[i], k), k)


_KINDS: dict[str, Callable[..., EdgeSet]] = {
    "sbd": SBD,
    "cityscapes": Cityscapes,
    "bsds": BSDS,
    "camvid": CamVid,
    "labels": Labels,
}


def open_truth(text: str) -> EdgeSet:
    """The set that "KIND:ROOT[:PART]" describes.  Raises EdgeError for unknown kinds and missing folders."""
    kind, _, rest = text.partition(":")
    if kind not in _KINDS or not rest:
        raise EdgeError(
            f"{text!r} is no edge truth: write KIND:ROOT:PART with KIND one of {', '.join(_KINDS)}"
        )
    root, _, part = rest.partition(":")
    if not Path(root).is_dir():
        raise EdgeError(f"{root} is no folder: give the data set's root")
    arguments = [part] if part else []
    try:
        return _KINDS[kind](Path(root), *arguments)
    except TypeError:
        raise EdgeError(f"{text!r} lacks its last part: write {kind}:ROOT:PART") from None


class Predictions:
    """Probability maps on disk, in whichever of these layouts there is for a name:

    ROOT/NAME.npz                 ``probability`` [K,H,W], uint8 or float in 0..1
    ROOT/NAME.png                 one class, 8 bits (v/255) or 16 (v/65536, as DFF's benchmark reads them)
    ROOT/CLASS/NAME.png           one map a class; CLASS its name, its number from 1, or class_NUMBER (SEAL's)
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        if not root.is_dir():
            raise EdgeError(f"{root} is no folder of predictions")
        self.root, self.classes = root, tuple(classes)
        self.folders: list[Path | None] = []
        for k, name in enumerate(self.classes):
            spellings = (
                name,
                name.replace(" ", "_"),
                str(k + 1),
                f"{k + 1:03d}",
                f"class_{k + 1}",
                f"class_{k + 1:03d}",
            )
            self.folders.append(next((root / s for s in spellings if (root / s).is_dir()), None))
        if len(self.classes) > 1 and any(self.folders) and not all(self.folders):
            missing = [n for n, f in zip(self.classes, self.folders, strict=True) if f is None]
            raise EdgeError(f"{root} has folders for some classes, none for {', '.join(missing)}")

    def read(self, name: str, size: tuple[int, int]) -> list[NDArray[Any]]:
        """One map a class, at ``size`` (resized bicubically as the benchmark does where it differs)."""
        packed = self.root / f"{name}.npz"
        if packed.is_file():
            try:
                with open(packed, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                    maps = list(file["probability"])
            except Exception as error:  # damaged archives raise many kinds
                raise EdgeError(
                    f"{packed} holds no 'probability' [K,H,W] ({str(error).splitlines()[0]})"
                ) from None
        elif len(self.classes) == 1 and (self.root / f"{name}.png").is_file():
            maps = [_map(self.root / f"{name}.png")]
        elif all(self.folders):
            maps = [_map(folder / f"{name}.png") for folder in self.folders if folder]
        else:
            raise EdgeError(
                f"{self.root} has no prediction of {name}: NAME.npz, or NAME.png in a folder a class"
            )
        if len(maps) != len(self.classes):
            raise EdgeError(f"{packed} holds {len(maps)} maps, the truth has {len(self.classes)} classes")
        return [fit(m, size, f"{self.root}/{name}") for m in maps]


def inverted(probability: NDArray[Any]) -> bool:
    """Whether a map looks as if edges were dark on white: the mean probability is over a half."""
    p = np.asarray(probability)
    if not p.size:
        return False
    return float(p.mean(dtype=np.float64)) > (127.5 if p.dtype == np.uint8 else 0.5)


def fit(probability: NDArray[Any], size: tuple[int, int], where: str) -> NDArray[Any]:
    """A map at ``size`` by MATLAB's bicubic, clipped to 0..1; 16 bits become v/65536.  Raises EdgeError."""
    p = np.asarray(probability)
    if p.ndim != 2:
        raise EdgeError(f"{where}: a map is {list(p.shape)}, one channel [H,W] is needed")
    if p.dtype in (np.uint16, np.int32):  # Pillow's two readings of a 16-bit PNG
        p = p / 65536.0
    if p.shape == tuple(size):
        return p
    if abs(p.shape[0] * size[1] - p.shape[1] * size[0]) > max(size[0], size[1], *p.shape):
        raise EdgeError(
            f"{where}: the prediction is {list(p.shape)}, its truth {list(size)}: another image, "
            "or transposed?"
        )
    real = p / 255.0 if p.dtype == np.uint8 else p
    return np.clip(resize_bicubic(real, size), 0.0, 1.0)
