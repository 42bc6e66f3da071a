"""``python -m adapt.train``: supervised training of a pack, from scratch or from another pack's weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError, Resized, refuse_overlap
from adapt.data.open import kinds, open_dataset
from adapt.data.pairs import CACHE_MB, Pairs, examine
from adapt.data.reading import add_options, reading_of
from common.cli import run_command
from common.progress import ProgressBars

EPILOG = """\
data sets:
  camvid:ROOT:LIST             CamVid in its 11-class form, the frames LIST.txt names
  folder:PATH                  PATH/frames/*.png and PATH/labels/*.png
  street:DOMAIN:COUNT:SEED     COUNT rendered scenes of a domain (day, dusk, fog, night, camera)
every pair is read once before training; all bad pairs are listed in one refusal (--skip-bad leaves them out)

examples:
  # the small source model of the demonstration
  python -m adapt.train --network roadnet --classes street --data street:day:400 --val street:day:64:900000 \\
      --size 128x256 --crop 128x256 --epochs 12 --out packs/street
  # a released Cityscapes network on CamVid by day
  python -m adapt.train --init packs/espnetv2 --classes camvid11 --data camvid:data/camvid:day_train \\
      --val camvid:data/camvid:day_val --size 352x480 --crop 256x320 --epochs 8 --out packs/camvid-day

``python -m adapt.train edges --help``: edge networks (CASENet, SEAL).

A training that was killed continues from its checkpoint when the same command is given again.

exit codes: 0 the pack was written, 1 refused or failed (one line on stderr says why), 2 wrong usage, 130
interrupted (Ctrl-C)
"""


def pair(text: str) -> tuple[int, int]:
    """(H, W) of "HxW"."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write HxW, such as 352x480")
    return int(height), int(width)


def span(text: str) -> tuple[float, float]:
    """(low, high) of "low,high"."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range: write LOW,HIGH, such as .75,1.6") from None
    return low, high


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.train",
        description="Train a model pack on a labelled data set: AdamW with one cycle of the learning rate, "
        "random scale, crop and flip. The pack holds a part of the set for replay in later adaptation, and "
        "the class shares and spatial prior of the source labels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    begin = p.add_mutually_exclusive_group(required=True)
    begin.add_argument("--network", metavar="NAME", help="architecture, trained from scratch")
    begin.add_argument("--init", metavar="PACK", help="start from this pack's weights; class rows are mapped")
    p.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="an argument of the network"
    )
    p.add_argument("--classes", metavar="SPACE", required=True, help="label space of the data set")
    p.add_argument(
        "--data", metavar="SET", required=True, help=f"training set, KIND:WHERE ({', '.join(kinds())})"
    )
    p.add_argument(
        "--val", metavar="SET", help="scored after training; also gives the hold-out of the replay"
    )
    add_options(p)
    p.add_argument(
        "--cache-mb",
        type=float,
        default=CACHE_MB,
        metavar="N",
        help=f"MiB of frames that stay in memory; the others are read again in each epoch ({CACHE_MB})",
    )
    p.add_argument("--out", metavar="PACK", required=True, help="directory of the new pack; must not exist")
    p.add_argument("--size", metavar="HxW", type=pair, help="frame size (the parent's, or 128x256)")
    p.add_argument("--crop", metavar="HxW", type=pair, help="training crops (the frame size)")
    p.add_argument("--epochs", type=float, default=8.0, metavar="N", help="passes over the set (8)")
    p.add_argument("--batch", type=int, default=6, metavar="N", help="frames a step (6)")
    p.add_argument("--rate", type=float, default=1.5e-3, metavar="R", help="peak learning rate (0.0015)")
    p.add_argument(
        "--weight-decay", type=float, default=1e-2, metavar="W", help="of weights, not of biases (0.01)"
    )
    p.add_argument(
        "--scale", type=span, default=(0.75, 1.6), metavar="LO,HI", help="random magnification (.75,1.6)"
    )
    p.add_argument("--no-flip", action="store_true", help="do not mirror frames")
    p.add_argument(
        "--brightness", type=float, default=1.0, metavar="F", help="random gain up to F and 1/F (1: none)"
    )
    p.add_argument(
        "--colour", type=float, default=0.0, metavar="S", help="random gamma and colour cast (0: none)"
    )
    p.add_argument("--blur", type=float, default=0.0, metavar="P", help="chance of a Gaussian blur (0)")
    p.add_argument(
        "--noise", type=float, default=0.0, metavar="S", help="sensor noise up to S levels (0: none)"
    )
    p.add_argument(
        "--bn",
        choices=("batch", "frozen"),
        default="batch",
        help="batch statistics in training: the batch's, or those of --init kept (batch)",
    )
    p.add_argument(
        "--ema", type=float, default=0.0, metavar="A", help="ship the mean of the weights, decay A (0: none)"
    )
    p.add_argument("--amp", choices=("bf16",), default="", help="run the network in bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile the network (minutes, once)")
    p.add_argument(
        "--memory-mb",
        type=float,
        default=0.0,
        metavar="N",
        help="MiB that training may take beyond the weights; the first layers are frozen until it fits",
    )
    p.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1 (cpu)")
    p.add_argument(
        "--replay", type=int, default=64, metavar="N", help="training frames kept in the pack (64)"
    )
    p.add_argument(
        "--replay-holdout", type=int, default=24, metavar="N", help="hold-out frames kept in the pack (24)"
    )
    p.add_argument("--golden", type=int, default=4, metavar="N", help="frames for the parity report (4)")
    p.add_argument("--name", help="name of the model (the network's)")
    p.add_argument("--version", default="1.0.0", metavar="X.Y.Z", help="version of the pack (1.0.0)")
    p.add_argument(
        "--licence", default="", metavar="TEXT", help="licence of weights and replay, for the record"
    )
    p.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    p.add_argument("--checkpoint", metavar="FILE", help="checkpoint file (OUT.checkpoint.pt beside the pack)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.train")


def _command(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["edges"]:
        from adapt.train import edges_main

        return edges_main.main(argv[1:])
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.threads < 0 or arguments.batch < 1 or not 0 <= arguments.cache_mb < 1e9:
        command.error("--threads and --cache-mb must not be negative, --batch must be 1 or more")
    from networks.pack import PackError

    try:
        summary = run(arguments)
    except (DataError, PackError, ValueError, FloatingPointError, OSError) as error:
        print(f"adapt.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(summary))
    else:
        words = f"{summary['training']}, {summary['seconds']:.0f} s, sha256 {summary['sha256'][:12]}"
        print(f"{summary['pack']}: {words}")
        if "miou" in summary:
            print(f"mIoU on {arguments.val}: {100 * summary['miou']:.1f}")
    return 0


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _begin(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(network, spec) to train."""
    import torch

    import networks
    from adapt.train import supervised
    from networks.labels import SPACES, mapping
    from networks.pack import PackSpec, load_pack

    if arguments.classes not in SPACES:
        raise ValueError(f"label space {arguments.classes!r} is unknown; known: {', '.join(sorted(SPACES))}")
    space = SPACES[arguments.classes]
    extra = dict(item.partition("=")[::2] for item in arguments.set)
    extra = {key: _value(value) for key, value in extra.items()}
    torch.manual_seed(arguments.seed)
    common: dict[str, Any] = {
        "version": arguments.version,
        "classes": space.classes,
        "colours": space.colours,
        "licence": arguments.licence,
        "parent": "",
        "adaptation": {},
        "training": "",
    }
    if arguments.network:
        network = networks.create(arguments.network, classes=len(space.classes), **extra)
        return network, PackSpec(
            name=arguments.name or arguments.network,
            network=arguments.network,
            arguments=extra,
            size=arguments.size or (128, 256),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            **common,
        )
    parent = load_pack(arguments.init)
    old = next((name for name, s in SPACES.items() if s.classes == parent.spec.classes), None)
    if old is None:
        raise ValueError(
            f"{arguments.init} has classes of no known label space: its class rows cannot be mapped"
        )
    network = networks.create(
        parent.spec.network, classes=len(space.classes), **{**parent.spec.arguments, **extra}
    )
    supervised.transfer(parent.state(), network, mapping(old, space.name), len(parent.spec.classes))
    return network, replace(
        parent.spec,
        name=arguments.name or parent.spec.name,
        arguments={**parent.spec.arguments, **extra},
        size=arguments.size or parent.spec.size,
        **{**common, "licence": arguments.licence or parent.spec.licence},
    )


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over 0..count-1."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()}) if wanted else []


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train as told; returns what --json prints."""
    import torch

    from adapt import inference
    from adapt.evaluate.scoring import score
    from adapt.evaluate.truth import Truth, training_plan
    from adapt.train import priors, supervised
    from adapt.train.augment import Augmentation
    from networks.pack import write_pack

    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"{out} exists already: packs are never overwritten, give another --out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {arguments.device}: torch sees no CUDA device here; use cpu")
    start = time.monotonic()
    network, spec = _begin(arguments)
    network = network.to(arguments.device)
    reading = reading_of(arguments, spec.classes)

    def opened(described: str) -> Truth:
        return Truth(
            open_dataset(described, reading=reading),
            training_plan(described, spec.classes, arguments.classes),
        )

    data = Resized(opened(arguments.data), spec.size)
    held = opened(arguments.val) if arguments.val else None
    crop = arguments.crop or spec.size
    multiple = int(getattr(network, "size_multiple", 1))
    for what, (height, width) in (("crop", crop), ("size", spec.size)):
        if height % multiple or width % multiple:
            raise ValueError(
                f"{what} {height}x{width}: both must be multiples of {multiple} for {spec.network}"
            )
    recipe = supervised.Recipe(
        epochs=arguments.epochs,
        batch=arguments.batch,
        rate=arguments.rate,
        weight_decay=arguments.weight_decay,
        augmentation=Augmentation(
            crop,
            arguments.scale,
            not arguments.no_flip,
            brightness=arguments.brightness,
            colour=arguments.colour,
            blur=arguments.blur,
            noise=arguments.noise,
        ),
        bn=arguments.bn,
        ema=arguments.ema,
        amp=arguments.amp,
        compile=arguments.compile,
        memory_mb=arguments.memory_mb,
    )
    checkpoint = Path(arguments.checkpoint or f"{out}.checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"pack": str(out)}
    with ProgressBars(quiet=arguments.quiet) as bars:
        told = {
            "skip_bad": arguments.skip_bad,
            "classes": spec.classes,
            "digests": held is not None,
            "progress": bars,
        }
        counted = priors.SpatialPrior(len(spec.classes))
        pairs = examine(data, what=arguments.data, each=counted.add, cache_mb=arguments.cache_mb, **told)
        frames = supervised.LabelledFrames(pairs)
        val: Pairs | None = None
        if held is not None:
            val = examine(
                held,
                what=arguments.val,
                labelled=False,
                cache_mb=arguments.cache_mb / 4,
                stage="read val",
                **{**told, "digests": False},
            )
            if not val.counts[:255].any():
                raise DataError(f"{arguments.val} holds no labelled pixel: there is nothing to score on")
            refuse_overlap(pairs, Resized(val, spec.size))
        for note in [*pairs.notes, *(val.notes if val is not None else ())]:
            print(f"adapt.train: {' '.join(note.split())}", file=sys.stderr)
        network = supervised.train(
            network, spec, frames, recipe, seed=arguments.seed, checkpoint=checkpoint, progress=bars
        )
        if val is not None:
            confusion, calibration = score(network, spec, val, progress=bars)
            iou = confusion.iou()
            summary |= {
                "miou": confusion.miou(),
                "ece": calibration.ece(),
                "iou": {c: float(v) for c, v in zip(spec.classes, iou, strict=True) if np.isfinite(v)},
            }
        words = f"{recipe.words()}; {arguments.data.rpartition(os.sep)[2]}; seed {arguments.seed}"
        if pairs.left_out:
            words += f"; {len(pairs.left_out)} bad pairs left out"
        spec = replace(spec, training=words)
        holdout = [] if val is None else _spread(len(val), arguments.replay_holdout)
        kept = Resized(val, spec.size) if val is not None else None
        replay = [(*frames[i], "train") for i in _spread(len(frames), arguments.replay)]
        for i in holdout:
            assert kept is not None
            frame, label = kept[i]
            if label is not None:
                replay.append((frame, label, "holdout"))
        # Its answers on frames it has not learnt from, if there are any: drift is measured from there.
        seen = [x for x, _, split in replay if split == "holdout"] or [x for x, _, _ in replay]
        seen = seen or [frames[i][0] for i in _spread(len(frames), arguments.golden or 4)]
        confidence = inference.confidence_histogram(network.eval(), spec, seen)
        golden = [frames[i][0] for i in _spread(len(frames), arguments.golden)]
        counts = pairs.counts[: len(spec.classes)]
        shares = counts / max(int(counts.sum()), 1)
        pack = write_pack(
            out,
            spec,
            network.cpu().state_dict(),
            replay=replay,
            golden=np.stack(golden) if golden else None,
            reference={"share": shares, "confidence": confidence},
            prior=counted.prior(),
        )
    checkpoint.unlink(missing_ok=True)
    return summary | {
        "sha256": pack.sha256,
        "training": words,
        "seed": arguments.seed,
        "frames": len(frames),
        "steps": recipe.steps(len(frames)),
        "seconds": round(time.monotonic() - start, 1),
        "threads": torch.get_num_threads(),
        **({"left_out": pairs.plain()} if arguments.skip_bad else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
