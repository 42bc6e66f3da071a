"""Train the pack that ships in ``packs/street-day``: RoadNet on rendered daylight streets.

The recipe is ordinary on purpose: flips, scales and crops, and the mild change of exposure that any camera
shows.  No other light, weather or camera is imitated: what is lost in another domain is what the demo is
about. Streets for training, replay and hold-out have seeds of their own, apart from those of the demo
(``bench.demo.streets``).  It is ``python -m adapt.train`` with one difference: replay is drawn from streets
the training did not see, and kept as JPEG."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import networks
from adapt import inference
from adapt.data.rendered import Rendered
from adapt.data.street import scenes
from adapt.evaluate.scoring import score
from adapt.train import priors, supervised
from adapt.train.augment import Augmentation
from common.progress import ProgressBars
from networks.labels import STREET
from networks.pack import Pack, PackError, PackSpec, load_pack, write_pack

TRAIN_SEED, HOLDOUT_SEED, REPLAY_SEED = 100_000, 200_000, 300_000
GOLDEN, REPLAY, HOLDOUT = 4, 48, 24


def replay_set(frames: int, holdout: int) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Labelled daylight frames that travel with the pack: for replay, and for the gate's hold-out."""
    for i in range(frames):
        yield *scenes.render(REPLAY_SEED + i), "train"
    for i in range(holdout):
        yield *scenes.render(REPLAY_SEED + 50_000 + i), "holdout"


def reference(network: torch.nn.Module, spec: PackSpec, share: np.ndarray) -> dict[str, np.ndarray]:
    """What the drift monitor compares a road with: class shares of the labels, confidence of the answers.

    The frames are those that the pack carries, as rendered: the training did not see their streets.
    """
    frames = [scenes.render(REPLAY_SEED + i)[0] for i in range(REPLAY)]
    frames += [scenes.render(REPLAY_SEED + 50_000 + i)[0] for i in range(HOLDOUT)]
    return {"share": share, "confidence": inference.confidence_histogram(network.eval(), spec, frames)}


def renew_reference(path: Path) -> str:
    """Compute `reference.npz` of a pack again from its weights; returns the pack's new SHA-256.

    Nothing else in the pack changes.  Raises PackError.
    """
    pack = load_pack(path)
    arrays = reference(pack.network(), pack.spec, pack.reference()["share"])
    part = path.with_name(f".{path.name}.reference.npz")
    np.savez_compressed(part, **{key: arrays[key] for key in sorted(arrays, reverse=True)})
    os.replace(part, path / "reference.npz")
    return load_pack(path).sha256


def compact(pack: Pack, path: Path) -> Pack:
    """The pack with its replay frames as JPEG: the sensor's noise makes PNG five times larger."""
    folder = pack.path / "replay"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for entry in index:
        old = folder / entry["frame"]
        entry["frame"] = str(Path(entry["frame"]).with_suffix(".jpg"))
        Image.open(old).save(folder / entry["frame"], quality=93, subsampling=0)
        old.unlink()
    text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in index) + "\n]\n"
    (folder / "index.json").write_text(text, encoding="utf-8")
    load_pack(pack.path)
    shutil.move(pack.path, path)
    return load_pack(path)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m bench.demo.train_pack",
        description="Train the demo's source pack on rendered daylight streets and write it.",
        epilog="Example:  python -m bench.demo.train_pack --out packs/street-day\n"
        "Exit codes: 0 written, 1 failed, 2 wrong usage.  Interrupted, it continues from --checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = out.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the pack to write; must not exist")
    what.add_argument(
        "--reference", type=Path, metavar="PACK", help="compute this pack's reference.npz again, nothing else"
    )
    out.add_argument("--frames", type=int, default=2400, help="streets to train on (default %(default)s)")
    out.add_argument("--epochs", type=float, default=12.0, help="passes over them (default %(default)s)")
    out.add_argument("--seed", type=int, default=1, help="of weights and batches (default %(default)s)")
    out.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")
    out.add_argument(
        "--replay", type=int, default=REPLAY, help="labelled frames to carry (default %(default)s)"
    )
    out.add_argument(
        "--holdout", type=int, default=HOLDOUT, help="labelled frames for the gate (default %(default)s)"
    )
    out.add_argument("--checkpoint", type=Path, help="file to continue from and to write as training goes")
    return out


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    torch.set_num_threads(a.threads)
    if a.reference is not None:
        try:
            print(f"{a.reference}  {renew_reference(a.reference)[:12]}  reference.npz renewed")
        except PackError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if a.out.exists():
        print(f"{a.out} exists: a pack is never overwritten, choose another path", file=sys.stderr)
        return 1
    torch.manual_seed(a.seed)
    recipe = supervised.Recipe(
        epochs=a.epochs,
        batch=8,
        rate=2e-3,
        augmentation=Augmentation(scenes.SIZE, scale=(0.9, 1.5), brightness=1.15, colour=0.04),
    )
    spec = PackSpec(
        name="street-day",
        version="1.0.0",
        network="roadnet",
        classes=STREET.classes,
        colours=STREET.colours,
        size=scenes.SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        licence="Apache-2.0",
    )
    with ProgressBars() as bars:
        frames = supervised.load(Rendered("day", a.frames, TRAIN_SEED), bars)
        network = networks.create(spec.network, classes=len(spec.classes))
        supervised.train(
            network, spec, frames, recipe, seed=a.seed, checkpoint=a.checkpoint, every=200, progress=bars
        )
        confusion, _ = score(network, spec, Rendered("day", 100, HOLDOUT_SEED), progress=bars)
    words = (
        f"{a.frames} rendered daylight streets; {recipe.words()}; day hold-out mIoU {confusion.miou():.1%}"
    )
    labels = [y for _, y in frames.pairs]
    golden = np.stack([scenes.render(HOLDOUT_SEED + 500 + i)[0] for i in range(GOLDEN)])
    try:
        with tempfile.TemporaryDirectory() as work:
            pack = write_pack(
                Path(work) / "pack",
                replace(spec, training=words),
                network.state_dict(),
                golden=golden,
                replay=replay_set(a.replay, a.holdout),
                prior=priors.spatial_prior(labels, len(STREET)),
                reference=reference(network, spec, priors.class_shares(labels, len(STREET))),
            )
            a.out.parent.mkdir(parents=True, exist_ok=True)
            pack = compact(pack, a.out)
    except PackError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{pack.path}  {pack.sha256[:12]}  {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
