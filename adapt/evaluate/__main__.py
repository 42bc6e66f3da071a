"""``python -m adapt.evaluate``: score packs on a labelled set; before/after where several are given."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError, kinds, open_dataset
from adapt.evaluate.tables import markdown
from adapt.progress import Bars

EPILOG = """\
data sets:
  camvid:ROOT:LIST             CamVid in its 11-class form, the frames LIST.txt names
  folder:PATH                  PATH/frames/*.png and PATH/labels/*.png
  street:DOMAIN:COUNT:SEED     COUNT rendered scenes of a domain (day, dusk, fog, night, camera)

examples:
  python -m adapt.evaluate packs/camvid-day --data camvid:data/camvid:dusk_eval
  # before and after an adaptation, as a Markdown table
  python -m adapt.evaluate packs/camvid-day out/round/pack --data camvid:data/camvid:dusk_eval \\
      --markdown table.md
  # a Cityscapes network on CamVid: its answers are mapped to the data set's classes
  python -m adapt.evaluate packs/espnetv2 --data camvid:data/camvid:day_val --truth camvid11

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
    p.add_argument("--truth", metavar="SPACE", help="label space of the set if not the pack's: maps answers")
    p.add_argument("--batch", type=int, default=4, metavar="N", help="frames at a time (4)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    p.add_argument("--markdown", metavar="FILE", help="also write the table to FILE")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def evaluate(path: str, arguments: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Scores of one pack as plain numbers (0..1)."""
    from adapt.train.supervised import score
    from networks.labels import SPACES, mapping
    from networks.pack import load_pack

    pack = load_pack(path)
    dataset = open_dataset(arguments.data)
    classes = pack.spec.classes
    table = None
    if arguments.truth:
        if arguments.truth not in SPACES:
            raise ValueError(
                f"label space {arguments.truth!r} is unknown; known: {', '.join(sorted(SPACES))}"
            )
        own = next((name for name, space in SPACES.items() if space.classes == classes), None)
        if own is None:
            raise ValueError(f"{path} has classes of no known label space: --truth cannot map them")
        table = mapping(own, arguments.truth)
        classes = SPACES[arguments.truth].classes
    confusion, calibration = score(
        pack.network(), pack.spec, dataset, batch=arguments.batch, progress=progress, table=table,
        classes=len(classes),
    )  # fmt: skip
    if not confusion.matrix.any():
        raise ValueError(f"{arguments.data} holds no labelled frame: there is nothing to score on")
    iou = confusion.iou()
    return {
        "pack": str(path), "name": pack.spec.name, "version": pack.spec.version, "sha256": pack.sha256,
        "data": arguments.data, "frames": len(dataset), "miou": confusion.miou(),
        "accuracy": confusion.accuracy(), "ece": calibration.ece(),
        "iou": {c: (float(v) if np.isfinite(v) else None) for c, v in zip(classes, iou, strict=True)},
        "calibration": calibration.curve(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["edges"]:
        from adapt.evaluate import edges_cli

        return edges_cli.main(argv[1:])
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.threads < 0 or arguments.batch < 1:
        command.error("--threads must not be negative, --batch must be 1 or more")
    import torch

    from networks.pack import PackError

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        with Bars(quiet=arguments.quiet) as bars:
            scores = []
            for path in arguments.packs:
                name = Path(path).name

                def show(stage: str, done: int, total: int, _name: str = name, **numbers: float) -> None:
                    bars(f"{stage} {_name}", done, total, **numbers)

                scores.append(evaluate(path, arguments, show))
        table = markdown([(s["version"] if len(scores) > 1 else s["name"], s) for s in scores])
        if arguments.markdown:
            Path(arguments.markdown).write_text(table, encoding="utf-8")
    except (DataError, PackError, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path and its permissions"
        print(f"adapt.evaluate: {' '.join(text.split())}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"data": arguments.data, "scores": scores}))
    else:
        print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
