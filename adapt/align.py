"""``python -m adapt.align``: move the edge labels of a data set onto the ridges a network sees (SEAL,
gated)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapt.data.base import DataError, read_frame
from adapt.data.pairs import listed
from adapt.data.reading import Problem, Reading, add_options, reading_of
from adapt.evaluate.edge_sets import around
from adapt.evaluate.matching import match_pairs
from adapt.labels import edge_codec
from adapt.labels.edges import category_edges
from adapt.labels.errors import EdgeError
from adapt.labels.seal import Alignment, Gate, Pieces, align_details
from common.cli import run_command
from common.progress import ProgressBars

__all__ = ["PRESETS", "Report", "align_classes", "main"]

#: Published parameters of the two data sets.
PRESETS: dict[str, dict[str, float]] = {
    "cityscapes": {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02},
    "sbd": {"sigma_x": 1.0, "sigma_y": 4.0, "max_cost": 4.5, "smoothness": 0.02},
}
TOLERANCES = (0.0016, 0.0032, 0.0048, 0.0075)
SUFFIXES = (".npz", ".mat", ".bin", ".png")

EPILOG = """\
labels, one file an image (NAME.SUFFIX beside an image NAME.jpg or NAME.png):
  edge labels              .npz, .bin, .mat or .png as adapt.labels.edge_codec has them
  with --segmentation      8-bit PNG of class indices, 255 = unknown; its category edges are aligned

ridges, one of:
  --model PACK             a model pack: an edge network's probabilities, or where a segmentation
                           network's softmax changes
  --probabilities DIR      NAME.npz with 'probability' [K,H,W], uint8 or float

The gate keeps a piece of label whose pixels would not move together: their spread (root mean square distance
from the piece's mean move, in pixels) is over --spread, or over --base + --slope times their mean move. Noise
moves neighbours apart, an annotator's error moves them alike. --no-gate moves everything, as published.

written to --out: NAME.npz (bit fields), report.json, and pictures/ with --pictures: red only before, green
only after, yellow both.

examples:
  python -m adapt.align --labels sbd/edges --images sbd/img --model packs/casenet --preset sbd --out out/a
  # edges of a drive's pseudo-labels, aligned to the same network's ridges
  python -m adapt.align --segmentation --labels pseudo --images frames --model packs/dusk --out out/edges
  # how far off is a data set? F against a better annotation at several tolerances
  python -m adapt.align --labels old --images img --probabilities maps --classes 20 --out out \\
      --reference better

exit codes: 0 aligned, 1 refused or failed (one line on stderr says why), 2 wrong usage
"""


def align_classes(
    labels: NDArray[np.bool_],
    probability: NDArray[np.floating],
    *,
    gate: Gate | None = None,
    solver: str = "auction",
    jobs: int = 1,
    **parameters: float,
) -> list[Alignment]:
    """Align every class of one image: bool [K,H,W], float [K,H,W] -> one ``Alignment`` a class.

    Raises EdgeError as ``align`` does, naming the class.
    """
    if labels.shape != probability.shape:
        raise EdgeError(
            f"align: labels are {list(labels.shape)} and probabilities {list(probability.shape)}; "
            "the same classes at one size are needed"
        )

    def one(k: int) -> Alignment:
        try:
            return align_details(labels[k], probability[k], gate=gate, solver=solver, **parameters)  # type: ignore[arg-type]
        except EdgeError as error:
            raise EdgeError(f"class {k}: {error}") from None

    if jobs == 1:
        return [one(k) for k in range(len(labels))]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(len(labels))))


@dataclass
class Report:
    """What an alignment did to a data set, class by class; mergeable by adding images in any order."""

    classes: tuple[str, ...]
    shifts: list[list[NDArray[np.float64]]] = field(init=False)
    kept: NDArray[np.int64] = field(init=False)
    pieces: list[list[Pieces]] = field(init=False)
    saved: NDArray[np.float64] = field(init=False)
    # [class, tolerance, before/after, (matched, labelled, reference)]
    matches: NDArray[np.int64] = field(init=False)
    gate: Gate | None = None
    images: int = 0
    referenced: int = 0

    def __post_init__(self) -> None:
        k = len(self.classes)
        self.shifts = [[] for _ in range(k)]
        self.pieces = [[] for _ in range(k)]
        self.kept, self.saved = np.zeros(k, np.int64), np.zeros(k)
        self.matches = np.zeros((k, len(TOLERANCES), 2, 3), np.int64)

    def add(
        self,
        before: NDArray[np.bool_],
        alignments: Sequence[Alignment],
        reference: NDArray[np.bool_] | None = None,
        unknown: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one image: bool [K,H,W] before, what ``align_classes`` gave, and a better annotation if any.

        unknown: bool [H,W], where the better annotation does not know; nothing is counted there.
        """
        self.images += 1
        self.referenced += reference is not None
        for k, alignment in enumerate(alignments):
            if len(alignment.source):
                self.shifts[k].append(alignment.shift)
                self.pieces[k].append(alignment.pieces)
                self.kept[k] += int((~alignment.moved).sum())
                self.saved[k] += (alignment.cost_before - alignment.cost_after) * len(alignment.source)
            if reference is not None and (before[k].any() or reference[k].any()):
                known = np.ones(before[k].shape, bool) if unknown is None else ~unknown
                truth = reference[k] & known
                for t, tolerance in enumerate(TOLERANCES):
                    for stage, mask in enumerate((before[k] & known, alignment.aligned & known)):
                        n = match_pairs(mask, truth, tolerance)[0].size
                        self.matches[k, t, stage] += (n, mask.sum(), truth.sum())

    def summary(self) -> dict[str, Any]:
        """Plain numbers: |m(q)| statistics a class, F before and after at each tolerance."""

        def f(row: NDArray[np.int64]) -> float | None:
            matched, labelled, truth = (int(v) for v in row)
            return 2 * matched / (labelled + truth) if labelled + truth else None

        rows: dict[str, Any] = {}
        for k, name in enumerate(self.classes):
            if not self.shifts[k]:
                continue
            shift = np.concatenate(self.shifts[k])
            rows[name] = {
                "pixels": int(shift.size),
                "shift_mean": float(shift.mean()),
                "shift_median": float(np.median(shift)),
                "shift_p90": float(np.quantile(shift, 0.9)),
                "shift_max": float(shift.max()),
                "moved": float((shift > 0).mean()),
                "kept_by_gate": float(self.kept[k] / shift.size),
                "cost_saved": float(self.saved[k] / shift.size),
                "pieces": self._why(k),
            }
        out: dict[str, Any] = {"images": self.images, "classes": rows}
        if self.referenced:
            total = self.matches.sum(0)
            out["reference"] = {
                "images": self.referenced,
                "f": {
                    str(t): {"before": f(total[i, 0]), "after": f(total[i, 1])}
                    for i, t in enumerate(TOLERANCES)
                },
            }
        return out

    def _why(self, k: int) -> dict[str, Any]:
        """How many pieces of a class moved or stayed, and why.

        moved: they moved, whole or in part; at_rest: no move would have paid; spread: their moves' spread is
        over the gate's largest; apart: it is over what their mean move allows.
        """
        move, spread, stopped = (
            np.concatenate([getattr(p, name) for p in self.pieces[k]])
            for name in ("move", "spread", "stopped")
        )
        rest = ~stopped & (move == 0)
        wide = stopped & (spread > self.gate.spread) if self.gate else np.zeros(move.size, bool)
        moved = ~stopped & ~rest
        return {
            "all": int(move.size),
            "moved": int(moved.sum()),
            "at_rest": int(rest.sum()),
            "kept": {"spread": int(wide.sum()), "apart": int((stopped & ~wide).sum())},
            "mean_move": {
                name: float(move[chosen].mean()) if chosen.any() else None
                for name, chosen in (("moved", moved), ("kept", stopped))
            },
            "mean_spread": {
                name: float(spread[chosen].mean()) if chosen.any() else None
                for name, chosen in (("moved", moved), ("kept", stopped))
            },
        }


def markdown(summary: dict[str, Any]) -> str:
    """A summary as Markdown."""
    lines = [
        "| class | pixels | mean shift | median | 90 % | moved | kept by gate "
        "| pieces moved, at rest, kept: spread, apart |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in summary["classes"].items():
        lines.append(
            f"| {name} | {r['pixels']} | {r['shift_mean']:.2f} | {r['shift_median']:.2f} | "
            f"{r['shift_p90']:.2f} "
            f"| {100 * r['moved']:.0f} % | {100 * r['kept_by_gate']:.0f} % "
            f"| {r['pieces']['moved']}, {r['pieces']['at_rest']}, {r['pieces']['kept']['spread']}, "
            f"{r['pieces']['kept']['apart']} |"
        )
    if "reference" in summary:
        lines += ["", "| tolerance | F before | F after |", "|---:|---:|---:|"]
        for t, row in summary["reference"]["f"].items():
            before, after = ("–" if row[s] is None else f"{row[s]:.3f}" for s in ("before", "after"))
            lines.append(f"| {t} | {before} | {after} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ files
def _frame(folder: Path, name: str) -> NDArray[np.uint8]:
    for suffix in (".jpg", ".png", ".jpeg"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            try:
                return read_frame(path)
            except DataError as error:
                raise EdgeError(str(error)) from None
    raise EdgeError(f"{folder} has no image {name}.jpg or {name}.png")


def _label(path: Path, classes: int, size: tuple[int, int], reading: Reading | None) -> tuple[Any, Any]:
    if reading is None:
        return edge_codec.unpack(edge_codec.read(path, classes, size), classes)
    try:
        labels = reading.label(path)
    except DataError as error:
        raise EdgeError(f"no readable label: {error}") from None
    if labels.shape != size:
        raise EdgeError(
            f"{path} is {list(labels.shape)}, its image {list(size)}: one channel of one size is needed"
        )
    known = labels[labels != 255]
    if known.size and int(known.max()) >= classes:
        raise EdgeError(
            f"the label of {path.stem} holds class {int(known.max())}, there are {classes} and 255 for none: "
            "name the void value (--void N; --void 0 if classes count from 1), or map the labels"
        )
    return category_edges(labels, classes), labels == 255


def _maps(folder: Path, name: str, classes: int, size: tuple[int, int]) -> NDArray[np.floating]:
    path = folder / f"{name}.npz"
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            maps = file["probability"]
    except Exception as error:  # damaged archives raise many kinds
        raise EdgeError(f"{path} holds no 'probability' [K,H,W] ({str(error).splitlines()[0]})") from None
    if maps.shape != (classes, *size):
        raise EdgeError(f"{path} is {list(maps.shape)}, {[classes, *size]} is needed")
    return np.asarray(maps / np.float32(255) if maps.dtype == np.uint8 else maps)


def _files(folder: Path, segmentation: bool) -> list[Path]:
    wanted = (".png",) if segmentation else SUFFIXES
    files = sorted(f for f in folder.glob("*") if f.suffix in wanted) if folder.is_dir() else []
    if not files:
        raise EdgeError(f"{folder} holds no label ({', '.join(wanted)})")
    return files


def picture(
    frame: NDArray[np.uint8], before: NDArray[np.bool_], after: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """The dimmed frame with labels of all classes: red only before, green only after, yellow both."""
    out = (frame * 0.45).astype(np.uint8)
    first, second = before.any(0), after.any(0)
    out[first & ~second] = (230, 60, 50)
    out[second & ~first] = (60, 220, 80)
    out[first & second] = (240, 220, 60)
    return out


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.align",
        description="Refine the edge labels of a data set by SEAL's alignment: "
        "each label pixel moves to a pixel of "
        "its own on a ridge of the network's edge probability, mostly across the edge, together "
        "with its neighbours.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--labels", type=Path, required=True, metavar="DIR", help="labels to refine")
    add("--images", type=Path, required=True, metavar="DIR", help="their images")
    add("--out", type=Path, required=True, metavar="DIR", help="where aligned labels and the report go")
    add("--model", type=Path, metavar="PACK", help="the pack whose ridges are climbed")
    add("--probabilities", type=Path, metavar="DIR", help="edge probability maps instead of a pack")
    add("--classes", type=int, metavar="K", help="number of classes (the pack's)")
    add("--segmentation", action="store_true", help="labels are class maps; align their category edges")
    add_options(p)
    add("--reference", type=Path, metavar="DIR", help="a better annotation: F before and after")
    add("--preset", choices=sorted(PRESETS), default="cityscapes", help="σ, reach and λ (cityscapes)")
    for name, text in (
        ("sigma-x", "spread along the edge"),
        ("sigma-y", "spread across the edge"),
        ("max-cost", "largest spatial cost"),
        ("smoothness", "λ of the pairwise term"),
    ):
        add(f"--{name}", type=float, metavar="X", help=f"{text} (the preset's)")
    add("--solver", choices=("exact", "auction"), default="auction", help="auction: within 1e-4 of exact")
    add(
        "--gate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move only pieces whose pixels move together (--gate); --no-gate: every label, as published",
    )
    for name, text in (
        ("spread", "largest spread of a piece's moves in pixels"),
        ("base", "largest spread of a piece that hardly moves"),
        ("slope", "spread allowed more per pixel of mean move"),
    ):
        add(
            f"--{name}",
            type=float,
            default=getattr(Gate, name),
            metavar="X",
            help=f"gate: {text} ({getattr(Gate, name)})",
        )
    add("--tile", type=int, default=0, metavar="N", help="run the network on N×N tiles (whole frames)")
    add("--pictures", type=int, default=0, metavar="N", help="draw the first N images")
    add("--jobs", type=int, default=0, metavar="N", help="threads (all cores)")
    add("--json", action="store_true", help="print the report as one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")
    return p


def _ridges(
    a: argparse.Namespace,
) -> tuple[tuple[str, ...], Callable[[str, NDArray[np.uint8]], NDArray[Any]]]:
    """The classes, and (name, frame) -> probabilities [K,H,W]."""
    if a.probabilities:
        if not a.classes:
            raise EdgeError("--probabilities needs --classes K")
        k: int = a.classes
        return tuple(f"class{i}" for i in range(k)), lambda name, frame: _maps(
            a.probabilities, name, k, (frame.shape[0], frame.shape[1])
        )
    from adapt.labels.edge_probability import edge_probability
    from networks.pack import load_pack

    pack = load_pack(a.model)
    network = pack.network()
    if a.classes and a.classes != len(pack.spec.classes):
        raise EdgeError(f"{a.model} has {len(pack.spec.classes)} classes, --classes says {a.classes}")
    return tuple(pack.spec.classes), lambda _, frame: edge_probability(network, pack.spec, frame, tile=a.tile)


def _reference(a: argparse.Namespace, path: Path) -> Path:
    places: list[Path] = [a.reference / f"{path.stem}{suffix}" for suffix in SUFFIXES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise EdgeError(f"{a.reference} has no label of {path.stem}")
    return found


def _checked(a: argparse.Namespace, files: list[Path], classes: int, reading: Reading | None) -> list[Path]:
    """The files that can be aligned; alignment takes seconds each, so all of them are read before."""
    bad: list[Problem] = []
    good: list[Path] = []
    any_edge = False
    for path in files:
        try:
            frame = _frame(a.images, path.stem)
            size = (frame.shape[0], frame.shape[1])
            before, _ = _label(path, classes, size, reading)
            if a.reference:
                _label(_reference(a, path), classes, size, reading)
        except EdgeError as error:
            bad.append((path.stem, str(error)))
        else:
            good.append(path)
            any_edge = any_edge or bool(before.any())
    if bad and not a.skip_bad:
        count = f"{len(bad)} bad {'pair' if len(bad) == 1 else 'pairs'}"
        raise EdgeError(f"{a.labels} has {count}: {listed(bad)}; mend them, or leave them out (--skip-bad)")
    if bad:
        print(f"adapt.align: {len(bad)} bad pairs left out: {listed(bad)}", file=sys.stderr)
    if good and not any_edge:
        raise EdgeError(f"{a.labels}: no label holds an edge: there is nothing to align")
    if not good:
        raise EdgeError(f"{a.labels} has no good pair left")
    return good


def _work(a: argparse.Namespace, files: list[Path], out: Path) -> Iterator[Report]:
    classes, ridges = _ridges(a)
    gate = Gate(a.spread, a.base, a.slope) if a.gate else None
    parameters = dict(PRESETS[a.preset])
    parameters |= {n: v for n in parameters if (v := getattr(a, n)) is not None}
    report = Report(classes, gate)
    reading = reading_of(a, classes) if a.segmentation else None
    files = _checked(a, files, len(classes), reading)
    jobs = a.jobs or os.cpu_count() or 1
    for i, path in enumerate(files):
        frame = _frame(a.images, path.stem)
        size = (frame.shape[0], frame.shape[1])
        before, ignore = _label(path, len(classes), size, reading)
        reference = unknown = None
        if a.reference:
            reference, unknown = _label(_reference(a, path), len(classes), size, reading)
            if a.segmentation:  # a border to void may be an edge, and the map does not show which
                unknown = around(unknown, 2)
        try:
            alignments = align_classes(
                before, ridges(path.stem, frame), gate=gate, solver=a.solver, jobs=jobs, **parameters
            )
        except EdgeError as error:
            raise EdgeError(f"{path.stem}: {error}") from None
        after = np.stack([x.aligned for x in alignments])
        edge_codec.write_npz(out / f"{path.stem}.npz", edge_codec.pack(after, ignore), len(classes))
        if i < a.pictures:
            (out / "pictures").mkdir(exist_ok=True)
            Image.fromarray(picture(frame, before, after)).save(out / "pictures" / f"{path.stem}.png")
        report.add(before, alignments, reference, unknown)
        yield report


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.align")


def _command(argv: list[str] | None) -> int:
    p = parser()
    a = p.parse_args(argv)
    if bool(a.model) == bool(a.probabilities):
        p.error("give --model or --probabilities")
    if min(a.jobs, a.tile, a.pictures) < 0:
        p.error("--jobs, --tile and --pictures are 0 or more")
    from networks.pack import PackError

    try:
        files = _files(a.labels, a.segmentation)
        if a.out.resolve() == a.labels.resolve():
            raise EdgeError(f"--out is the labels' own folder {a.out}: the labels would be overwritten")
        a.out.mkdir(parents=True, exist_ok=True)
        summary: dict[str, Any] = {}
        with ProgressBars(quiet=a.quiet) as bars:
            reports = _work(a, files, a.out)
            for done, report in enumerate(reports, 1):
                bars("align", done, len(files))
                summary = {"": report}
            summary = summary[""].summary()
        (a.out / "report.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    except (EdgeError, DataError, PackError, OSError) as error:
        print(f"adapt.align: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(summary) if a.json else markdown(summary), end="\n" if a.json else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
