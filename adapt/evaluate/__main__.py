"""``python -m adapt.evaluate``: score packs on a labelled set; before/after where several are given."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError
from adapt.data.open import kinds, open_dataset
from adapt.data.pairs import examine
from adapt.data.reading import add_options, reading_of
from adapt.evaluate.boundary_iou import BoundaryIoU
from adapt.evaluate.plot import svg
from adapt.evaluate.protocols import PROTOCOLS
from adapt.evaluate.tables import markdown
from adapt.evaluate.truth import Plan, Truth, mean_iou, plan
from common.cli import run_command
from common.progress import ProgressBars
from networks.labels import SPACES

EPILOG = """\
data sets:
  camvid:ROOT:LIST             CamVid in its 11-class form, the frames LIST.txt names
  folder:PATH                  PATH/frames/*.png and PATH/labels/*.png
  street:DOMAIN:COUNT:SEED     COUNT rendered scenes of a domain (day, dusk, fog, night, camera)
  cityscapes:ROOT:SPLIT  acdc:ROOT:CONDITION/SPLIT  darkzurich:ROOT:SPLIT
  gta5:ROOT  synthia:ROOT  bdd100k:ROOT:SPLIT    as their authors unpack them

protocols (--protocol):
  19   Cityscapes' classes
  16   SYNTHIA to Cityscapes: no terrain, truck, train; their pixels are not scored
  13   the same pixels, the mean without wall, fence, pole (mIoU*)
  11   CamVid's classes; answers and labels of 19 classes are mapped

examples:
  python -m adapt.evaluate packs/camvid-day --data camvid:data/camvid:dusk_eval
  # before and after an adaptation, as a Markdown table
  python -m adapt.evaluate packs/camvid-day out/round/pack --data camvid:data/camvid:dusk_eval \\
      --markdown table.md --plot table.svg --json > table.json
  # a Cityscapes network on CamVid: its answers are mapped to the data set's classes
  python -m adapt.evaluate packs/espnetv2 --data camvid:data/camvid:day_val
  # SYNTHIA's table of 16
  python -m adapt.evaluate packs/synthia --data cityscapes:data/cityscapes:val --protocol 16

  # accuracy at clicked pixels of frames without labels
  python -m adapt.evaluate packs/camvid-day --data folder:road --marks weak.json

``python -m adapt.evaluate edges --help``: the boundary benchmark (MF, OIS, AP) for edge maps.

Numbers are percentages: IoU of each class, their mean over the classes the truth holds, share of
pixels that are right, and the expected calibration error (15 bins). Pixels with label 255 are not scored.

exit codes: 0 scored, 1 refused (one line on stderr says why), 2 wrong usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.evaluate",
        description="Score one or several packs on a labelled data set: mIoU, IoU of each class, "
        "calibration. Given several, the first is what the others are compared with.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("packs", nargs="+", metavar="PACK", help="model packs, the one to compare with first")
    p.add_argument(
        "--data", required=True, metavar="SET", help=f"labelled set, KIND:WHERE ({', '.join(kinds())})"
    )
    p.add_argument("--truth", metavar="SPACE", help="label space of a folder if not the pack's: maps answers")
    add_options(p)
    p.add_argument("--protocol", choices=sorted(PROTOCOLS), help="classes to score and to average (all)")
    p.add_argument(
        "--boundary",
        type=float,
        metavar="RATIO",
        help="also score boundary IoU in bands of RATIO of the diagonal (as published: .02)",
    )
    p.add_argument(
        "--marks",
        metavar="FILE",
        help="score at the clicked pixels of this file of weak labels: accuracy with a 95%% interval "
        "(no dense label is read)",
    )
    p.add_argument("--batch", type=int, default=4, metavar="N", help="frames at a time (4)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    p.add_argument("--markdown", metavar="FILE", help="also write the table to FILE")
    p.add_argument("--plot", metavar="FILE.svg", help="also draw it: bars a class, reliability of confidence")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def evaluate(path: str, arguments: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Scores of one pack as plain numbers (0..1)."""
    from adapt.evaluate.scoring import score
    from networks.pack import load_pack

    pack = load_pack(path)
    how = plan(
        pack.spec.classes, arguments.data, truth=arguments.truth, protocol=arguments.protocol, who=path
    )
    names = SPACES[how.truth].classes if how.truth in SPACES else pack.spec.classes
    dataset = examine(
        Truth(open_dataset(arguments.data, reading=reading_of(arguments, names)), how),
        what=arguments.data,
        skip_bad=arguments.skip_bad,
        classes=how.classes,
        progress=progress,
    )
    bands = None if arguments.boundary is None else BoundaryIoU(len(how.classes), arguments.boundary)
    confusion, calibration = score(
        pack.network(),
        pack.spec,
        dataset,
        batch=arguments.batch,
        progress=progress,
        table=how.answers,
        classes=len(how.classes),
        boundary=bands,
    )
    iou = confusion.iou()
    more = {} if bands is None else _boundary(bands, how)
    return {
        "pack": str(path),
        "name": pack.spec.name,
        "version": pack.spec.version,
        "sha256": pack.sha256,
        "data": arguments.data,
        "protocol": arguments.protocol,
        "frames": len(dataset),
        "unlabelled": len(dataset.unlabelled),
        "miou": mean_iou(confusion, how),
        "accuracy": confusion.accuracy(),
        "ece": calibration.ece(),
        "iou": {
            c: (float(v) if np.isfinite(v) else None)
            for c, v in zip(how.classes, iou, strict=True)
            if c in how.scored
        },
        "calibration": calibration.curve(),
        **more,
        **({"left_out": dataset.plain()} if arguments.skip_bad else {}),
        "notes": [note for note in dataset.notes if "have no label" not in note],
    }


def _boundary(bands: BoundaryIoU, how: Plan) -> dict[str, Any]:
    """Boundary IoU of the scored classes as plain numbers, and its mean over those averaged that have one."""
    values = {c: float(v) for c, v in zip(how.classes, bands.iou(), strict=True) if c in how.scored}
    known = [v for c, v in values.items() if c in how.averaged and np.isfinite(v)]
    return {
        "boundary_ratio": bands.ratio,
        "boundary_iou": {c: v if np.isfinite(v) else None for c, v in values.items()},
        "boundary_miou": float(np.mean(known)) if known else None,
    }


def _at_clicks(arguments: argparse.Namespace) -> int:
    """`--marks`: accuracy at clicked pixels."""
    from adapt.evaluate import clicked
    from adapt.weak.readers import read
    from networks.pack import load_pack

    dataset = open_dataset(arguments.data, labels=False)
    scores: list[dict[str, Any]] = []
    for path in arguments.packs:
        pack = load_pack(path)
        marks = read(arguments.marks, pack.spec.classes)
        clicks = clicked.answered(pack.network(), pack.spec, dataset, marks)
        about = {"pack": str(path), "name": pack.spec.name, "version": pack.spec.version}
        scores.append({**about, "sha256": pack.sha256, **clicked.accuracy(clicks, pack.spec.classes)})
    text = clicked.table(list(zip(_headings(scores), scores, strict=True)))
    if arguments.markdown:
        Path(arguments.markdown).write_text(text, encoding="utf-8")
    if arguments.json:
        print(json.dumps({"data": arguments.data, "marks": arguments.marks, "scores": scores}))
    else:
        print(text, end="")
    return 0


def _headings(scores: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the packs apart: the name of one, the versions of several, or name and place."""
    if len(scores) == 1:
        return [scores[0]["name"]]
    versions = [s["version"] for s in scores]
    if len(set(versions)) == len(versions):
        return versions
    names = [f"{s['name']} {s['version']}" for s in scores]
    if len(set(names)) == len(names):
        return names
    return [f"{i + 1}: {name}" for i, name in enumerate(names)]


def _writable(file: str | None) -> None:
    """Say before the work, not after it, that a file cannot be written."""
    if file and not Path(file).parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.evaluate")


def _command(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["edges"]:
        from adapt.evaluate import edges_main

        return edges_main.main(argv[1:])
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.threads < 0 or arguments.batch < 1:
        command.error("--threads must not be negative, --batch must be 1 or more")
    if arguments.marks and (arguments.plot or arguments.protocol or arguments.truth):
        command.error("--marks scores clicked pixels: leave --plot, --protocol and --truth out")
    if arguments.plot and Path(arguments.plot).suffix.lower() != ".svg":
        command.error(f"--plot {arguments.plot}: the picture is an SVG, call it NAME.svg")
    import torch

    from networks.pack import PackError

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _writable(arguments.markdown)
        _writable(arguments.plot)
        if arguments.marks:
            return _at_clicks(arguments)
        with ProgressBars(quiet=arguments.quiet) as bars:
            scores: list[dict[str, Any]] = []
            for path in arguments.packs:
                name = Path(path).name

                def show(stage: str, done: int, total: int, _name: str = name, **numbers: float) -> None:
                    bars(f"{stage} {_name}", done, total, **numbers)

                scores.append(evaluate(path, arguments, show))
        columns = list(zip(_headings(scores), scores, strict=True))
        table = markdown(columns)
        if arguments.markdown:
            Path(arguments.markdown).write_text(table, encoding="utf-8")
        if arguments.plot:
            Path(arguments.plot).write_text(svg(columns, f"Scored on {arguments.data}"), encoding="utf-8")
    except (DataError, PackError, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path and its permissions"
        print(f"adapt.evaluate: {' '.join(text.split())}", file=sys.stderr)
        return 1
    for note in dict.fromkeys(note for score in scores for note in score.pop("notes")):
        print(f"adapt.evaluate: {' '.join(note.split())}", file=sys.stderr)
    if scores[0]["unlabelled"]:
        total = scores[0]["unlabelled"] + scores[0]["frames"]
        words = f"{scores[0]['unlabelled']} of {total} frames have no label and were not scored"
        print(f"adapt.evaluate: {words}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"data": arguments.data, "scores": scores}))
    else:
        print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
