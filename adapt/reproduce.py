"""``python -m adapt.reproduce``: fill one row of a published table, where someone has the data and the time.

A row is a source pack (``python -m adapt.train``) adapted with the published settings of that row, scored on
the target's validation set.  The gate is measured and reported but does not stop a row: the table asks what
the algorithm gives.  Evaluation frames among the adaptation frames are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError, Dataset, Resized, Subset, refuse_overlap
from adapt.data.open import open_dataset
from adapt.data.pairs import Pairs, examine
from adapt.data.reading import add_options, reading_of
from adapt.evaluate.truth import Truth, mean_iou, plan
from adapt.labels.cbst import self_paced
from adapt.round import RoundConfig, RoundError, adapt
from common.cli import run_command
from common.files import write_json
from common.progress import ProgressBars
from networks.labels import SPACES

__all__ = ["TABLES", "Table", "row_config", "run"]


@dataclass(frozen=True)
class Table:
    """words; default data sets; published: {row: {network: mIoU in percent}}.

    What the published numbers were measured on: kind of set, label space, (H, W) of the scored frames, how
    many there are, the cities in their names, target frames and the number of them, and the networks' names
    here.
    """

    words: str
    target: str
    val: str
    published: dict[str, dict[str, float]]
    kind: str
    space: str
    size: tuple[int, int]
    scored: int
    cities: tuple[str, ...]
    adapted: int
    used: int
    networks: dict[str, str]

    def differences(
        self,
        row: str,
        network: str,
        classes: Sequence[str],
        described: tuple[str, str | None],
        val: Sequence[str],
        size: tuple[int, int] | None,
        target: Sequence[str] | None,
        used: int,
        changed: Sequence[str],
    ) -> list[str]:
        """In what a measurement is not the published one, a few words each; empty if its data is the row's.

        Args:
            described: the scored set and the target set (None for row source) as the command line has them.
            val, target: names of the frames.  size: (H, W) of the first scored label.
            used: how many target frames were adapted to.  changed: settings of the round given with --set.
        """
        found = []
        theirs = self.networks.get(network)
        if theirs not in self.published[row]:
            names = ", ".join(sorted(self.published[row]))
            found.append(f"the network is {network}, the row has {names}")
        if tuple(classes) != SPACES[self.space].classes:
            found.append(f"the pack has {len(classes)} classes, the row those of {self.space}")
        for what, text in zip(("scored", "target"), described, strict=True):
            if text is not None and text.partition(":")[0] != self.kind:
                found.append(f"the {what} set is {text}, the row's is {self.kind}")
        if len(val) != self.scored:
            found.append(f"{len(val)} frames are scored, the row has {self.scored}")
        if size != self.size:
            words = "none" if size is None else f"{size[0]}x{size[1]}"
            found.append(f"labels are {words}, the row's {self.size[0]}x{self.size[1]}")
        strange = [name for name in val if name.partition("_")[0] not in self.cities]
        if strange:
            found.append(
                f"{len(strange)} scored frames are not of {', '.join(self.cities)} (such as {strange[0]})"
            )
        if target is not None:
            if len(target) != self.adapted:
                found.append(f"the target set has {len(target)} frames, the row's {self.adapted}")
            if used != self.used:
                found.append(f"{used} target frames are used, the row has {self.used}")
            held = [name for name in target if name.partition("_")[0] in self.cities]
            if held:
                found.append(f"{len(held)} target frames are of scored cities (such as {held[0]})")
        if changed:
            found.append(f"settings were changed: {', '.join(changed)}")
        return found


# Zou, Yu et al., ECCV 2018, GTA5 -> Cityscapes, 19 classes.
TABLES: dict[str, Table] = {
    "gta5-cityscapes": Table(
        "GTA5 → Cityscapes, 19 classes, mIoU on the 500 validation frames",
        "cityscapes:{root}/cityscapes:train",
        "cityscapes:{root}/cityscapes:val",
        {
            "source": {"fcn8s-vgg16": 24.3, "resnet38": 35.4},
            "st": {"fcn8s-vgg16": 28.1, "resnet38": 41.5},
            "cbst": {"fcn8s-vgg16": 30.9, "resnet38": 45.2},
            "cbst-sp": {"fcn8s-vgg16": 36.1, "resnet38": 46.2},
            "cbst-sp-mst": {"resnet38": 47.0},
        },
        kind="cityscapes",
        space="cityscapes19",
        size=(1024, 2048),
        scored=500,
        cities=("frankfurt", "lindau", "munster"),
        adapted=2975,
        used=505,
        networks={"fcn8s": "fcn8s-vgg16", "resnet38": "resnet38"},
    )
}

EPILOG = """\
rows: source, st, cbst, cbst-sp, cbst-sp-mst

examples:
  python -m adapt.train --network fcn8s --classes cityscapes19 --data gta5:data/gta5 --size 512x1024 \\
      --replay 600 --out packs/gta5-fcn8s
  python -m adapt.reproduce gta5-cityscapes --row cbst --pack packs/gta5-fcn8s --root data --out out/gta5/cbst
  # the same path on other sets
  python -m adapt.reproduce gta5-cityscapes --row cbst --pack packs/street --target street:dusk:24:500000 \\
      --val street:dusk:16:700000 --out out/tiny --set steps=10

A row that was measured on other data than the published one (other frames, sizes, classes, network or
settings) says so, and in what: row.json has "comparable" and "differs".

exit codes: 0 the row was measured, 1 refused or failed (one line on stderr says why), 2 wrong usage
"""


def row_config(row: str, **changes: Any) -> RoundConfig:
    """The published settings of a row: three rounds, p from .2 by .05, whole batch mean, fixed statistics.

    Not published in this form: AdamW in place of SGD, and one source frame to one target frame in every
    batch in place of one list of both.
    """
    if row not in ("st", "cbst", "cbst-sp", "cbst-sp-mst"):
        raise RoundError(f"row {row!r}: choose source, st, cbst, cbst-sp or cbst-sp-mst")
    base = RoundConfig(
        portions=self_paced(0.2, 0.05, 0.5, 3),
        steps=1000,
        source=1,
        target=1,
        rate=5e-5,
        schedule="constant",
        bn="frozen",
        scale=(0.7, 1.3),
        adabn=False,
        from_parent=False,
        policy="st" if row == "st" else "cbst",
        prior="sp" in row.split("-"),
        label_flip=row.endswith("mst"),
        force=True,
        label_scales=(0.75, 1.0, 1.25) if row.endswith("mst") else (1.0,),
    )
    try:
        return replace(base, **changes)
    except TypeError as error:  # a number where a list belongs, and the like
        words = ", ".join(f"{k}={v!r}" for k, v in changes.items())
        raise RoundError(
            f"row {row!r} with {words}: {error}; see --help and adapt.round.RoundConfig"
        ) from error


def settings(told: Sequence[str]) -> dict[str, Any]:
    """RoundConfig fields of KEY=VALUE texts (VALUE in JSON; a bare word is text).  Raises RoundError."""
    changes: dict[str, Any] = {}
    for item in told:
        key, equals, text = item.partition("=")
        known = RoundConfig.__dataclass_fields__
        if not equals or key not in known or key == "limits":
            settable = ", ".join(sorted(set(known) - {"limits"}))
            raise RoundError(f"--set {item}: no such setting of a round; there are {settable}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        value = tuple(value) if isinstance(value, list) else value
        usual = known[key].default
        fits = isinstance(value, (int, float) if isinstance(usual, int | float) else type(usual))
        if usual is not None and not fits and not (key == "steps" and isinstance(value, tuple)):
            raise RoundError(f"--set {item}: give a value like {json.dumps(usual)}")
        changes[key] = value
    return changes


class _Frames(Sequence[np.ndarray]):
    """The frames of a data set, labels left unread."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.dataset[j][0] for j in range(*i.indices(len(self)))]
        if i >= len(self):
            raise IndexError(i)
        return self.dataset[i][0]


def run(arguments: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Measure a row; what --json prints and out/row.json keeps."""
    from adapt.evaluate.scoring import score
    from adapt.evaluate.segmentation import Confusion
    from networks.pack import load_pack

    table = TABLES[arguments.table]
    pack = load_pack(arguments.pack)
    described = arguments.val or table.val.format(root=arguments.root)
    names = SPACES[arguments.truth].classes if arguments.truth in SPACES else pack.spec.classes
    held = open_dataset(described, reading=reading_of(arguments, names))
    how = plan(pack.spec.classes, described, truth=arguments.truth, who=str(arguments.pack))
    val = examine(
        Truth(held, how),
        what=described,
        skip_bad=arguments.skip_bad,
        classes=how.classes,
        digests=True,
        progress=progress,
        stage="read val",
    )
    wanted = ""
    target: Pairs | None = None
    whole: Dataset | None = None
    network = pack.network()
    report: dict[str, Any] = {}
    if arguments.row != "source":
        changes: dict[str, Any] = {"seed": arguments.seed, "threads": arguments.threads}
        changes |= settings(arguments.set)
        wanted = arguments.target or table.target.format(root=arguments.root)
        whole = chosen = open_dataset(wanted, labels=False)
        if arguments.limit and arguments.limit < len(whole):
            chosen = Subset(
                whole, np.linspace(0, len(whole) - 1, arguments.limit).round().astype(int).tolist()
            )
        target = examine(
            chosen,
            what=wanted,
            skip_bad=arguments.skip_bad,
            labelled=False,
            digests=True,
            progress=progress,
            stage="read target",
        )
        refuse_overlap(target, val)
        frames = _Frames(Resized(target, pack.spec.size, labels=False))
        result = adapt(
            pack, frames, config=row_config(arguments.row, **changes), out=arguments.out, progress=progress
        )
        report = result.report
        assert result.pack is not None
        network = result.pack.network()
    for note in [*(target.notes if target is not None else ()), *val.notes]:
        print(f"adapt.reproduce: {' '.join(note.split())}", file=sys.stderr)
    differs = table.differences(
        arguments.row,
        pack.spec.network,
        pack.spec.classes,
        (described, None if target is None else wanted),
        [val.name(i) for i in range(len(val))],
        val[0][1].shape,
        None if whole is None else [whole.name(i) for i in range(len(whole))],
        0 if target is None else len(target),
        arguments.set,
    )
    confusion: Confusion
    confusion, calibration = score(
        network, pack.spec, val, progress=progress, table=how.answers, classes=len(how.classes)
    )
    iou = confusion.iou()
    found = {
        "table": arguments.table,
        "row": arguments.row,
        "pack": pack.sha256,
        "network": pack.spec.network,
        "miou": mean_iou(confusion, how),
        "ece": calibration.ece(),
        "frames": len(val),
        "seed": arguments.seed,
        "iou": {c: float(v) for c, v in zip(how.classes, iou, strict=True) if np.isfinite(v)},
        "published": table.published[arguments.row],
        "comparable": not differs,
        "differs": differs,
        "gate": report.get("gate"),
        "seconds": report.get("seconds"),
    }
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(arguments.out) / "row.json", found)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.reproduce",
        description="Measure one row of a published table with a source pack of your own. Needs the data "
        "sets as their authors publish them and, at the published sizes, a GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("table", choices=sorted(TABLES), help="which table")
    p.add_argument(
        "--row", required=True, choices=sorted(TABLES["gta5-cityscapes"].published), help="which row"
    )
    p.add_argument("--pack", required=True, metavar="DIR", help="source pack")
    p.add_argument("--out", required=True, metavar="DIR", help="state and row.json; the same again continues")
    p.add_argument("--root", default="data", metavar="DIR", help="folder with the sets by name (data)")
    p.add_argument("--target", metavar="SET", help="unlabelled frames (the table's)")
    p.add_argument("--val", metavar="SET", help="scored frames (the table's)")
    add_options(p)
    p.add_argument("--truth", metavar="SPACE", help="label space of a --val folder if not the pack's")
    p.add_argument(
        "--limit", type=int, default=505, metavar="N", help="target frames, 0 = all (505, as published)"
    )
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of the round")
    p.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.reproduce")


def _command(argv: list[str] | None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.limit < 0 or arguments.threads < 0 or arguments.seed < 0:
        command.error("--limit, --threads and --seed must not be negative")
    from networks.pack import PackError

    try:
        with ProgressBars(quiet=arguments.quiet) as bars:
            found = run(arguments, bars)
    except (DataError, PackError, RoundError, ValueError, FloatingPointError, OSError) as error:
        print(f"adapt.reproduce: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if found["differs"]:
        words = f"this is not the published row: {'; '.join(found['differs'])}"
        print(f"adapt.reproduce: {' '.join(words.split())}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found))
    else:
        against = "published" if found["comparable"] else "not comparable with the published"
        print(f"{arguments.row}: {100 * found['miou']:.1f} ({against}: {found['published']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
