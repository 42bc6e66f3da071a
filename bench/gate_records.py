"""Today's gate over rounds that were run long ago: what would it say of each, and was it right?

    python -m bench.gate_records [out/ordering/SHIFT ...]

Reads what ``bench.ordering`` leaves (its rounds run with ``force``, so every stage was measured whatever the
gate said): the label-free measures of each trained stage from rounds/*/report.json, and from results/*.json
its mIoU on the labelled target frames that nobody adapted to.  Nothing is trained: a change of a limit is
judged on real frames within seconds.

A stage is *bad* where it ended more than a point below doing nothing, *needless* where it is more than a
point below batch statistics alone; the rest is *good*.  The agreement with the stage before training is not
in the records; what was said of it then is taken over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import read_label, resize_label
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Limits
from adapt.gate.segmentation import decide
from bench.gate import NEEDLESS, ROOT, WORSE, measures_of
from networks.pack import Pack, load_pack


def source_of(pack: Pack) -> tuple[Layout | None, np.ndarray | None]:
    """Layout and class shares of the source, as `adapt.round` takes them from the pack."""
    read = {
        split: [resize_label(read_label(label), pack.spec.size) for _, label in pack.replay(split)]
        for split in ("train", "holdout")
    }
    labels = [*read["train"], *read["holdout"]]
    if not labels:
        return None, None
    classes = len(pack.spec.classes)
    counts = sum(np.bincount(y.reshape(-1), minlength=256)[:classes] for y in read["train"] or labels)
    return Layout.of_labels(labels, classes), np.asarray(counts / max(int(np.sum(counts)), 1))


def judged(folder: Path, shift: str) -> Iterator[dict[str, Any]]:
    """Every trained stage of the rounds of one seed."""
    results = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "results").glob("*.json"))}
    if "source" not in results:
        return
    before = results["source"]["miou"]
    statistics = results.get("adabn", {}).get("miou", before)
    own = folder / "source"
    pack = load_pack(own if own.is_dir() else ROOT / "packs" / "street-day")
    layout, share = source_of(pack)
    for path in sorted((folder / "rounds").glob("*/report.json")):
        report, result = json.loads(path.read_text()), results.get(path.parent.name)
        if result is None or not report.get("stages") or report.get("parent") != pack.sha256:
            continue
        for name, stage in sorted(report["stages"].items()):
            if not name.startswith("train-") or name not in result.get("stages", {}):
                continue
            checks = decide(
                measures_of(stage["measures"]),
                measures_of(report["reference_measures"]),
                measures_of(report["parent_measures"]),
                float(report.get("distance", 0.0)),
                pack.spec,
                Limits(),
                source_share=share,
                layout=layout,
            )
            then = list(stage.get("failed") or [])
            failed = [c.name for c in checks if not c.passed and c.name != "agreement"]
            failed += ["agreement"] if "agreement" in then else []
            after = result["stages"][name]
            truth = (
                "bad" if after < before - WORSE else "needless" if after < statistics - NEEDLESS else "good"
            )
            yield {
                "shift": shift,
                "seed": folder.name,
                "round": path.parent.name,
                "stage": name,
                "before": before,
                "statistics": statistics,
                "after": after,
                "truth": truth,
                "failed": failed,
                "failed_then": then,
                "chosen": report.get("chosen") == name,
            }


def sorted_counts(count: Counter[str]) -> dict[str, int]:
    return {f"{t}_{w}": count[f"{t}_{w}"] for t in ("good", "needless", "bad") for w in ("passed", "refused")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate_records", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of bench.ordering (all below out/ordering)")
    a = parser.parse_args(argv)
    folders = a.folders or sorted(p for p in Path("out/ordering").glob("*") if p.is_dir())
    rows = [
        row
        for folder in folders
        for seed in sorted(folder.glob("seed*"))
        for row in judged(seed, folder.name)
    ]
    if not rows:
        print("bench.gate_records: no finished round there: run bench.ordering", file=sys.stderr)
        return 1
    print(f"{'shift':<12} {'seed':<6} {'round':<44} {'stage':<8} before stats after truth     gate")
    for r in rows:
        scores = " ".join(f"{100 * r[k]:6.1f}" for k in ("before", "statistics", "after"))
        words = ",".join(r["failed"]) or "passes"
        names = f"{r['shift']:<12} {r['seed']:<6} {r['round'][:44]:<44} {r['stage']:<8}"
        print(f"{names} {scores} {r['truth']:<9} {words}")
    found: dict[str, Any] = {}
    for shift in dict.fromkeys(r["shift"] for r in rows):
        own = [r for r in rows if r["shift"] == shift]
        count = Counter(f"{r['truth']}_{'refused' if r['failed'] else 'passed'}" for r in own)
        found[shift] = {
            "stages": len(own),
            "rounds": len({(r["seed"], r["round"]) for r in own}),
            **sorted_counts(count),
        }
        print(shift, json.dumps(found[shift]))
    print(json.dumps({"shifts": found, "stages": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
