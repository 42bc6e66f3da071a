"""``python -m adapt.evaluate edges``: the boundary benchmark over a data set, or over saved count tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt.evaluate import edges
from adapt.evaluate.edge_sets import EdgeSet, Predictions, fit, inverted, open_truth, unknown
from adapt.evaluate.edges import EdgeCounts
from adapt.evaluate.nms import nms
from adapt.labels.errors import EdgeError
from common.cli import run_command
from common.progress import ProgressBars

__all__ = ["evaluate", "main", "table"]

EPILOG = """\
truth:
  sbd:ROOT:LIST            ROOT/cls, ROOT/inst, ROOT/LIST.txt        sbd (or --protocol sbd-reanno)
  cityscapes:ROOT:SPLIT    ROOT/gtFine/SPLIT                         cityscapes, half resolution
  bsds:ROOT[:PREFIX]       ROOT/groundTruth or ROOT/edges            bsds, several annotators
  camvid:ROOT:LIST         ROOT/labels, ROOT/LIST.txt                .0075 of the diagonal
  labels:ROOT:CLASSES      edge labels as .npz, .mat or .png         sbd-reanno
Pixels that a truth does not know (CamVid's void, the ignore bit of edge labels) are not counted.

predictions, whichever is there for an image NAME:
  DIR/NAME.npz             'probability' [K,H,W], uint8 or float
  DIR/NAME.png             one class, 8 or 16 bits
  DIR/CLASS/NAME.png       a folder a class, by name or number from 1

protocols (distance as a fraction of the diagonal, margin):
  sbd .02, 5    sbd-reanno .0075, 5    cityscapes .0035, 0    bsds .0075, 0
  sbd-cls .02, 5    cityscapes-cls .02, 0: borders of classes, not of instances (CASENet, DFF, STEAL)

--nms thins to ridges first, as HED's, PiDiNet's and TEED's figures are made: radius 1, border 5, factor 1.01.

examples:
  python -m adapt.evaluate edges --truth cityscapes:data/cityscapes:val --predictions out/edges
  python -m adapt.evaluate edges --truth camvid:data/camvid:dusk_eval --model packs/edges \\
      --images data/camvid/images
  python -m adapt.evaluate edges --truth bsds:data/bsds500:test_ --predictions out/hed --nms --json
  # two machines, one table
  python -m adapt.evaluate edges --truth sbd:data/sbd:val --predictions out --shard 1/2 --save a.npz
  python -m adapt.evaluate edges --truth sbd:data/sbd:val --predictions out --shard 2/2 --save b.npz
  python -m adapt.evaluate edges --merge a.npz b.npz

ODS, OIS and AP are percentages; a class that no image holds has none and is left out of the mean.

exit codes: 0 scored, 1 refused (one line on stderr says why), 2 wrong usage
"""


class FromModel:
    """Probability maps made on the fly: a pack's network on the images of a folder."""

    def __init__(self, pack: Path, images: Path, classes: int, tile: int) -> None:
        from networks.pack import load_pack

        self.pack = load_pack(pack)
        self.network, self.tile = self.pack.network(), tile
        if len(self.pack.spec.classes) != classes:
            raise EdgeError(f"{pack} has {len(self.pack.spec.classes)} classes, the truth {classes}")
        found = [f for s in ("jpg", "png") for f in images.rglob(f"*.{s}")]
        if not found:
            raise EdgeError(f"{images} holds no .jpg or .png: give the folder of the images")
        self.files = {f.stem.removesuffix("_leftImg8bit"): f for f in found}

    def read(self, name: str, size: tuple[int, int]) -> list[NDArray[Any]]:
        """float32 maps of an image at ``size``."""
        from adapt.data.base import read_frame
        from adapt.labels.edge_probability import edge_probability

        if name not in self.files:
            raise EdgeError(f"no image {name}.jpg or .png for the network")
        frame = read_frame(self.files[name])
        maps = edge_probability(self.network, self.pack.spec, frame, tile=self.tile)
        return [fit(m, size, name) for m in maps]


Read = Callable[[str, tuple[int, int]], Sequence[NDArray[Any]]]


def evaluate(
    truth: EdgeSet,
    read: Read,
    *,
    modes: Sequence[str] = ("thin", "raw"),
    protocol: edges.Protocol | None = None,
    jobs: int = 0,
    images: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, EdgeCounts]:
    """Count a data set, an image a task, on ``jobs`` threads (0: all cores; the kernels hold no lock).

    read: (name, (H, W)) -> one probability map a class at that size.  images: indices, None for all.  The
    counts do not depend on the number of threads.  Raises EdgeError as the readers and ``EdgeCounts`` do.
    """
    protocol = protocol or truth.protocol
    tables = {m: EdgeCounts.of(protocol, thin=m == "thin", classes=len(truth.classes)) for m in modes}
    chosen = list(range(len(truth.names)) if images is None else images)

    def one(i: int) -> dict[str, list[NDArray[np.int64]]]:
        out: dict[str, list[NDArray[np.int64]]] = {}
        maps: Sequence[NDArray[Any]] = ()
        for mode in modes:
            masks, ignore = truth.truth(i, mode), unknown(truth, i, mode)
            if not maps:
                maps = read(truth.names[i], (int(masks.shape[-2]), int(masks.shape[-1])))
            try:
                if protocol.annotators:
                    out[mode] = [tables[mode].count(maps[0], masks, ignore)]
                else:
                    out[mode] = [tables[mode].count(p, t, ignore) for p, t in zip(maps, masks, strict=True)]
            except EdgeError as error:
                raise EdgeError(f"{truth.names[i]}: {error}") from None
        return out

    jobs = jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        waiting: list[Future[dict[str, list[NDArray[np.int64]]]]] = []
        done, following = 0, iter(chosen)
        try:
            while True:
                while len(waiting) < 2 * jobs and (i := next(following, None)) is not None:
                    waiting.append(pool.submit(one, i))
                if not waiting:
                    break
                for mode, rows in waiting.pop(0).result().items():
                    for k, counts in enumerate(rows):
                        tables[mode].add_counts(counts, k)
                done += 1
                progress(done, len(chosen))
        finally:
            for future in waiting:
                future.cancel()
    return tables


def report(tables: dict[str, EdgeCounts], classes: Sequence[str]) -> dict[str, Any]:
    """Plain numbers (0..1, None where a class has no truth) of finished tables."""

    def plain(v: float) -> float | None:
        return None if math.isnan(v) else v

    out: dict[str, Any] = {}
    for mode, counts in tables.items():
        scores = counts.scores()
        out[mode] = {
            "mf_ods": counts.ods(),
            "ois": counts.ois(),
            "ap": counts.ap(),
            "max_distance": counts.max_distance,
            "margin": counts.margin,
            "images": int(counts.images.max()),
            "classes": {
                name: {
                    "ods": plain(s.ods),
                    "threshold": plain(s.threshold),
                    "precision": plain(s.precision),
                    "recall": plain(s.recall),
                    "ois": plain(s.ois),
                    "ap": plain(s.ap),
                    "truth_pixels": s.truth_pixels,
                }
                for name, s in zip(classes, scores, strict=True)
            },
        }
    return out


def table(result: dict[str, Any]) -> str:
    """A report as a Markdown table, percentages."""

    def cell(v: float | None) -> str:
        return "–" if v is None else f"{100 * v:.1f}"

    modes = list(result)
    head = ["class"] + [f"{what} {m}" for m in modes for what in ("ODS", "OIS", "AP")]
    rows = [
        [name] + [cell(result[m]["classes"][name][w]) for m in modes for w in ("ods", "ois", "ap")]
        for name in result[modes[0]]["classes"]
    ]
    rows.append(["**mean**"] + [cell(result[m][w]) for m in modes for w in ("mf_ods", "ois", "ap")])
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    return "".join(f"| {line} |\n" for line in [*lines, *(" | ".join(r) for r in rows)])


def _shard(text: str) -> tuple[int, int]:
    part, _, whole = text.partition("/")
    if not (part.isdigit() and whole.isdigit() and 1 <= int(part) <= int(whole)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard: write 1/4 … 4/4")
    return int(part), int(whole)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.evaluate edges",
        description="Score edge probability maps: MF (ODS), OIS and AP per "
        "class, thin and raw, at 99 thresholds, "
        "with exact deterministic matching. No MATLAB.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--truth", metavar="SET", help="KIND:ROOT[:PART], see below")
    add("--predictions", type=Path, metavar="DIR", help="folder of probability maps")
    add("--model", type=Path, metavar="PACK", help="score a pack's network instead, on --images")
    add("--images", type=Path, metavar="DIR", help="the truth's images, searched through all folders")
    add("--tile", type=int, default=0, metavar="N", help="run the network on N×N tiles (whole images)")
    add(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="score saved count tables instead, added together",
    )
    add("--protocol", choices=sorted(edges.PROTOCOLS), help="distance and margin (the truth's own)")
    add("--nms", action="store_true", help="non-maximum suppression before thinning")
    add(
        "--mode",
        choices=("thin", "raw", "both"),
        default=None,
        help="what to score (what the protocol reports)",
    )
    add("--max-distance", type=float, metavar="F", help="another matching distance, fraction of the diagonal")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only every N-th image from the I-th")
    add("--save", type=Path, metavar="FILE", help="also save the count table (one mode only)")
    add("--jobs", type=int, default=0, metavar="N", help="threads (all cores)")
    add("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    add("--quiet", action="store_true", help="no progress on stderr")
    return p


def _run(a: argparse.Namespace) -> dict[str, Any]:
    if a.merge:
        first = EdgeCounts.load(a.merge[0])
        for path in a.merge[1:]:
            first.merge(EdgeCounts.load(path))
        names = [f"class{k}" for k in range(first.classes)]
        return report({"thin" if first.thin else "raw": first}, names)
    truth = open_truth(a.truth)
    protocol = edges.PROTOCOLS[a.protocol] if a.protocol else truth.protocol
    if not protocol.instances and a.truth.partition(":")[0] != a.protocol.removesuffix("-cls"):
        raise EdgeError(f"--protocol {a.protocol} is for --truth {a.protocol.removesuffix('-cls')}:…")
    truth.protocol = protocol  # type: ignore[misc]
    if a.max_distance is not None:
        from dataclasses import replace

        protocol = replace(protocol, max_distance=a.max_distance)
    modes = protocol.modes if a.mode is None else ("thin", "raw") if a.mode == "both" else (a.mode,)
    if a.save and len(modes) > 1:
        raise EdgeError("--save keeps one table: choose --mode thin or --mode raw")
    part, whole = a.shard
    source: Predictions | FromModel = (
        FromModel(a.model, a.images, len(truth.classes), a.tile)
        if a.model
        else Predictions(a.predictions, truth.classes)
    )
    suspicious: list[str] = []

    def read(name: str, size: tuple[int, int]) -> Sequence[NDArray[Any]]:
        maps: Sequence[NDArray[Any]] = source.read(name, size)
        if any(inverted(m) for m in maps):
            suspicious.append(name)
        return [nms(m) for m in maps] if a.nms else maps

    with ProgressBars(quiet=a.quiet) as bars:
        tables = evaluate(
            truth,
            read,
            modes=modes,
            protocol=protocol,
            jobs=a.jobs,
            images=range(part - 1, len(truth.names), whole),
            progress=lambda done, total: bars("edges", done, total),
        )
    if suspicious:
        of = len(range(part - 1, len(truth.names), whole))
        print(
            f"adapt.evaluate edges: warning: {len(suspicious)} of {of} predictions ({min(suspicious)} is "
            "one) have a mean probability over .5: are they inverted (dark edges on white)? Save 1 - p then",
            file=sys.stderr,
        )
    if a.save:
        tables[modes[0]].save(a.save)
    return report(tables, truth.classes)


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.evaluate edges")


def _command(argv: list[str] | None) -> int:
    p = parser()
    a = p.parse_args(argv)
    if bool(a.merge) == bool(a.truth) or bool(a.truth) != bool(a.predictions or (a.model and a.images)):
        p.error("give --truth and --predictions, --truth with --model and --images, or --merge")
    if min(a.jobs, a.tile) < 0:
        p.error("--jobs and --tile are 0 or more")
    from adapt.data.base import DataError
    from networks.pack import PackError

    try:
        result = _run(a)
        if a.markdown:
            a.markdown.write_text(table(result), encoding="utf-8")
    except (EdgeError, DataError, PackError, OSError) as error:
        print(f"adapt.evaluate edges: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(result) if a.json else table(result), end="\n" if a.json else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
