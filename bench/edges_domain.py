"""Edges in a new domain, measured: CamVid by day to dusk, the joint network, edges scored from the dusk
labels.

    python -m bench.edges_domain --out out/edges-domain [--data DIR] [--source-steps N] [--steps N]

Source: ESPNetv2 s = 0.5's Cityscapes encoder under both heads, trained on CamVid's day frames.  Target: the
first half of the dusk drive, no labels; scored on the second half.  Then the round's gate as a judge: rounds
of other seeds, and candidates that were made bad on purpose.  The last stdout line is one JSON object.
Sizes and steps are what a small machine does in minutes, not the best the method gives.  A run that was
killed goes on where it was when the same command is given again."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import networks
from adapt import batchnorm, inference
from adapt.data.base import read_frame, read_label, resize_frame, resize_label
from adapt.data.open import open_dataset
from adapt.gate.edges import EdgeMeasures, decide, edge_score, measure
from adapt.gate.limits import EdgeLimits
from adapt.round.edges import EdgeRoundConfig, adapt_edges
from adapt.train.augment import Augmentation
from adapt.train.edge_recipes import EdgeRecipe
from adapt.train.edges import crops_of_segmentation, train
from bench import machine
from common.progress import ProgressBars
from networks.import_checkpoint import IMAGENET_MEAN, IMAGENET_STD, read_state
from networks.labels import SPACES
from networks.pack import PackSpec, load_pack, normalise, write_pack

SIZE = (192, 256)


def frames_of(data: Path, listing: str, limit: int = 0) -> list[tuple[Any, Any]]:
    """(frame, label) at ``SIZE``; every n-th where there are more than ``limit``."""
    dataset = open_dataset(f"camvid:{data}/camvid:{listing}")
    step = max(1, len(dataset) // limit) if limit else 1
    out = []
    for i in range(0, len(dataset), step):
        frame, label = dataset[i]
        out.append((resize_frame(frame, SIZE), None if label is None else resize_label(label, SIZE)))
    return out


def source_pack(a: argparse.Namespace, bars: Any) -> Any:
    """The joint network trained on the day frames; made once."""
    path = a.out / "source"
    if path.is_dir():
        return load_pack(path)
    space = SPACES["camvid11"]
    torch.manual_seed(0)
    network: Any = networks.create("espnetv2_edges", classes=len(space), scale=0.5)
    weights = next((a.data / "weights").glob("*0.5*.pth"))
    encoder = {k: v for k, v in read_state(weights).items() if k.startswith("base_net.")}
    network.load_state_dict(encoder, strict=False)
    spec = PackSpec(
        name="camvid-joint",
        version="1.0.0",
        network="espnetv2_edges",
        arguments={"scale": 0.5},
        classes=space.classes,
        colours=space.colours,
        size=SIZE,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        training=f"CamVid day at {SIZE}, {a.source_steps} steps, Cityscapes encoder",
        licence="research only",
    )
    day = frames_of(a.data, "day_train", 250)
    draw = crops_of_segmentation(day, len(space), Augmentation((160, 192), scale=(0.8, 1.4)))
    recipe = EdgeRecipe(
        a.source_steps,
        batch=6,
        round=60,
        rate=1.5e-3,
        gamma=0.3,
        every=max(1, a.source_steps * 2 // 3),
        frozen_bn=False,
        segmentation=1.0,
    )
    train(
        network,
        spec,
        draw,
        recipe,
        seed=0,
        checkpoint=a.out / "source.checkpoint.pt",
        every=20,
        progress=lambda s, d, t, **n: bars(f"source {s}", d, t, **n),
    )
    holdout = frames_of(a.data, "day_val", 12)
    replay = [(f, y, "train") for f, y in day[::4]] + [(f, y, "holdout") for f, y in holdout]
    return write_pack(path, spec, network.state_dict(), replay=replay)


class Planted(torch.nn.Module):
    """A joint network whose edge logits are changed, at the frame's resolution."""

    def __init__(self, network: Any, change: Any) -> None:
        super().__init__()
        self.network, self.change, self.size_multiple = network, change, network.size_multiple

    def sides(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a5, fused = self.network.sides(x)
        return a5, self.change(F.interpolate(fused, x.shape[2:], mode="bilinear", align_corners=False))


PLANTED = {
    "classes changed places": lambda f: f.roll(1, 1),
    "edges and no edges flipped": lambda f: -f,
    "no edge anywhere": lambda f: torch.full_like(f, -30.0),
    "an edge everywhere": lambda f: torch.full_like(f, 30.0),
    "3 pixels to the right": lambda f: f.roll(3, 3),
    "3 pixels down": lambda f: f.roll(3, 2),
}


def judged(a: argparse.Namespace, parent: Any, target: list[Any], bars: Any) -> list[dict[str, Any]]:
    """What the gate of a round says of rounds of three seeds, and of the first one's result made bad."""
    rows, limits = [], EdgeLimits()

    def row(what: str, checks: list[dict[str, Any]]) -> None:
        told = {c["name"]: c["value"] for c in checks}
        keys = {
            "edges-source": "source",
            "edges-source-tight": "source, 2 px",
            "edges-pseudo": "pseudo",
            "edges-pseudo-tight": "pseudo, 2 px",
        }
        failed = ", ".join(c["name"].removeprefix("edges-") for c in checks if not c["passed"])
        rows.append(
            {
                "candidate": what,
                **{w: round(-100 * told[k], 1) for k, w in keys.items()},
                "refused by": failed,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)

    for seed in range(a.seeds):
        config = EdgeRoundConfig(steps=a.steps, crop=(160, 192), force=True, seed=seed)
        folder = a.out / f"seed-{seed}"
        result = adapt_edges(parent, target, config=config, out=folder, progress=bars)
        row(f"round, seed {seed}", result.report["gate"]["checks"])
    result = adapt_edges(
        parent,
        target,
        config=EdgeRoundConfig(steps=a.steps, crop=(160, 192), force=True),
        out=a.out / "seed-0",
    )
    assert result.pack is not None
    before = EdgeMeasures.of(result.report["parent_measures"])
    source = [(read_frame(f), read_label(y)) for f, y in parent.replay("holdout")]
    aside = range(0, len(target), len(target) // result.report["frames"]["target_holdout"])
    held = [(target[i], read_label(a.out / "seed-0" / "labels-1" / f"{i:05d}.png")) for i in aside]
    held = held[: result.report["frames"]["target_holdout"]]
    for name, change in PLANTED.items():
        after = measure(
            Planted(result.pack.network(), change),
            parent.spec,
            source=source,
            target=held,
            max_distance=0.0075,
            limits=limits,
            progress=bars,
            stage=name,
        )
        row(name, [asdict(c) for c in decide(after, before, limits, parent.spec.classes)])
    return rows


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.edges_domain", description=__doc__.split("\n\n")[0])
    here = Path(__file__).resolve().parent.parent
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="packs and reports; never to be published"
    )
    p.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data")),
        metavar="DIR",
        help="the folder that holds camvid/ and weights/",
    )
    p.add_argument(
        "--source-steps", type=int, default=240, metavar="N", help="steps of the source training (240)"
    )
    p.add_argument("--steps", type=int, default=45, metavar="N", help="steps of a round (45)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="rounds the gate judges (3)")
    a = p.parse_args(argv)
    about = machine.describe()
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    rows: list[dict[str, Any]] = []
    with ProgressBars() as bars:
        pack = source_pack(a, bars)
        k = len(pack.spec.classes)
        day, dusk = frames_of(a.data, "day_val", 20), frames_of(a.data, "dusk_eval")
        target = [f for f, _ in frames_of(a.data, "dusk_adapt")]

        def score(what: str, network: Any, accepted: Any = None) -> None:
            by_day, by_dusk = (edge_score(network, pack.spec, pairs, k) for pairs in (day, dusk))
            rows.append(
                {
                    "what": what,
                    "dusk MF": round(100 * by_dusk.ods(), 1),
                    "dusk AP": round(100 * by_dusk.ap(), 1),
                    "day MF": round(100 * by_day.ods(), 1),
                    "gate": accepted,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)

        score("source", pack.network())
        shifted = pack.network()
        batches = (normalise(t, pack.spec) for t in inference.batches(target, 6))
        with torch.no_grad():
            batchnorm.reestimate(shifted, batches)
        score("batch statistics of dusk (AdaBN)", shifted)
        replay = [(f, y, "train") for f, y in frames_of(a.data, "day_train", 60)]
        replay += [(f, y, "holdout") for f, y in frames_of(a.data, "day_val", 12)]
        parent_path = a.out / "adabn"
        if not parent_path.is_dir():
            spec = replace(pack.spec, version="1.0.1", parent=pack.sha256)
            write_pack(parent_path, spec, shifted.state_dict(), replay=replay)
        parent = load_pack(parent_path)
        for what, more in (
            ("edge round, aligned and gated", {}),
            ("edge round, aligned, no gate", {"gate": None}),
            ("edge round, not aligned", {"alignment": False}),
        ):
            config = EdgeRoundConfig(steps=a.steps, crop=(160, 192), force=True, **more)  # type: ignore[arg-type]
            folder = a.out / what.replace(" ", "-").replace(",", "")
            if not (folder / "pack").is_dir():
                adapt_edges(parent, target, config=config, out=folder, progress=bars)
            accepted = json.loads((folder / "report.json").read_text())["accepted"]
            score(what, load_pack(folder / "pack").network(), "passed" if accepted else "refused")
        verdicts = judged(a, parent, target, bars)
    about["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(about))
    keys = ("what", "dusk MF", "dusk AP", "day MF", "gate")
    print(machine.table(rows, [(key, key) for key in keys]))
    print(machine.table(verdicts, [(key, key) for key in verdicts[0]]))
    result = {
        "bench": "edges_domain",
        "machine": about,
        "cpu_seconds": round(time.process_time() - start),
        "rows": rows,
        "gate": verdicts,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
