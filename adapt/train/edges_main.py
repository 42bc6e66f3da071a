"""``python -m adapt.train edges``: train an edge network as CASENet, CASENet-S, -C or SEAL do."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError, read_frame
from adapt.data.open import open_dataset
from adapt.data.pairs import CACHE_MB, Cached, Pairs, examine, listed
from adapt.data.reading import Problem, add_options, reading_of
from adapt.labels import edge_codec
from adapt.labels.errors import EdgeError
from adapt.labels.seal import Gate
from common.cli import run_command
from common.progress import ProgressBars

__all__ = ["main"]

EPILOG = """\
data, one of:
  --data SET                 labelled frames (camvid:ROOT:LIST, folder:PATH, street:DOMAIN:COUNT:SEED); edges
                             of radius 2 are made from the class maps on the fly, also after scaling
  --labels DIR --images DIR  edge labels (.npz, .bin, .mat, .png: adapt.labels.edge_codec), their images

presets, NAME-cityscapes and NAME-sbd: the published recipes.  They freeze batch normalisation, so they need
--init.  --data is magnified as published: not at all, or by .5 .75 1 1.25 1.5.  --labels are taken as they
are; give the magnified copies, too.
  casenet      reweighted loss
  casenet-s    unweighted loss, half the rate
  casenet-c    as -s, on labels refined by a dense CRF (--data only; extra crf)
  seal         as -s, labels are aligned every round, not gated
presets, NAME-scratch: the same four for random weights (AdamW, mean loss, live statistics; seal is gated).
without a preset: AdamW, mean loss, live statistics unless --init is given; --seal aligns, gated.

--init takes a pack, or a state dict (.pth, .pt, .safetensors).  For casenet that is a ResNet under
torchvision's names or Caffe's, or CASENet's own checkpoint; for the other networks, weights by their names.
-s, -c and seal start from a short warm-up: train one with --preset casenet-s-… and a ResNet, then give its
pack to --init.

A training that was killed continues from PACK.checkpoint.pt when the same command is given again.

examples:
  python -m adapt.train edges --network casenet_light --classes camvid11 --crop 256x320 --steps 2000 \\
      --data camvid:data/camvid:day_train --seal --out packs/edges
  python -m adapt.train edges --network casenet --preset casenet-s-sbd --steps 2000 --classes 20 \\
      --crop 472x472 --labels sbd/edges --images sbd/img --init resnet101.pth --out packs/warm
  python -m adapt.train edges --network casenet --preset seal-sbd --classes 20 --crop 472x472 \\
      --labels sbd/edges --images sbd/img --init packs/warm --out packs/seal

exit codes: 0 the pack was written, 1 refused or failed (one line on stderr says why), 2 wrong usage
"""


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write HxW, such as 472x472")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    from adapt.train.edge_recipes import PRESETS

    p = argparse.ArgumentParser(
        prog="python -m adapt.train edges",
        description="Train an edge network (casenet, casenet_light) or a joint "
        "one (espnetv2_edges) and write its pack.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--network", default="casenet_light", metavar="NAME", help="casenet, casenet_light or espnetv2_edges")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the network")
    add("--classes", required=True, metavar="SPACE", help="label space, or a number of classes")
    add("--data", metavar="SET", help="labelled frames")
    add_options(p)
    add(
        "--cache-mb",
        type=float,
        default=CACHE_MB,
        metavar="N",
        help=f"MiB of frames that stay in memory; the others are read again ({CACHE_MB})",
    )
    add("--labels", type=Path, metavar="DIR", help="edge labels")
    add("--images", type=Path, metavar="DIR", help="their images")
    add(
        "--init",
        type=Path,
        metavar="FROM",
        help="start from a pack's weights, all or its encoder's, by name, or from a ResNet's state dict",
    )
    add("--preset", choices=sorted(PRESETS), help="a published recipe, or ours for random weights")
    add("--crop", type=_size, default=(256, 320), metavar="HxW", help="training crops (256x320)")
    add("--steps", type=int, metavar="N", help="optimiser steps (the preset's, or 1000)")
    add("--batch", type=int, metavar="N", help="crops a step (10)")
    add("--round", type=int, metavar="N", help="crops between alignments (the preset's, or 400)")
    add("--rate", type=float, metavar="R", help="learning rate (the preset's, or 0.001)")
    add("--seal", action="store_true", help="align labels every round but the first, gated")
    add(
        "--gate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="move only pieces of label whose pixels move together (the preset's; with --seal: --gate)",
    )
    add("--jobs", type=int, default=1, metavar="N", help="processes that align labels (1; 0: all cores)")
    add("--out", type=Path, required=True, metavar="PACK", help="directory of the new pack; must not exist")
    add("--name", help="name of the model (the network's)")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")
    return p


def _space(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    from networks.labels import SPACES

    if text.isdigit() and int(text):
        names = tuple(f"class{k}" for k in range(int(text)))
        return names, tuple(
            ((37 * k) % 256, (91 * k + 60) % 256, (151 * k + 120) % 256) for k in range(len(names))
        )
    if text not in SPACES:
        raise ValueError(f"label space {text!r} is unknown; a number, or one of: {', '.join(sorted(SPACES))}")
    return SPACES[text].classes, SPACES[text].colours


def _draw(a: argparse.Namespace, names: tuple[str, ...], progress: Any) -> tuple[Any, list[Problem]]:
    """(what draws crops, what was left out of the data)."""
    from adapt.evaluate.truth import Truth, training_plan
    from adapt.train.augment import Augmentation
    from adapt.train.edge_recipes import SCALES
    from adapt.train.edges import crops_of_edges, crops_of_segmentation
    from networks.labels import SPACES

    classes = len(names)
    if a.data:
        space = a.classes if a.classes in SPACES else None
        pairs = examine(
            Truth(
                open_dataset(a.data, reading=reading_of(a, names)),
                training_plan(a.data, names, space),
            ),
            what=a.data,
            skip_bad=a.skip_bad,
            classes=names,
            progress=progress,
            cache_mb=a.cache_mb,
        )
        for note in pairs.notes:
            print(f"adapt.train edges: {' '.join(note.split())}", file=sys.stderr)
        known: Any = pairs
        if (a.preset or "").startswith("casenet-c-"):
            known = _refined(pairs, classes, progress, a.cache_mb)
        scales = SCALES.get((a.preset or "").rpartition("-")[2], ())
        return crops_of_segmentation(known, classes, Augmentation(a.crop), scales=scales), pairs.left_out
    if (a.preset or "").startswith("casenet-c-"):
        raise ValueError("casenet-c refines class maps: give --data, edge labels have no regions")
    files = sorted(f for f in a.labels.glob("*") if f.suffix in (".npz", ".bin", ".mat", ".png"))

    def read(i: int) -> tuple[Any, Any]:
        file = files[i]
        image = next((q for s in (".jpg", ".png") if (q := a.images / f"{file.stem}{s}").is_file()), None)
        if image is None:
            raise DataError(f"{a.images} has no image {file.stem}.jpg or .png")
        frame = read_frame(image)
        return frame, edge_codec.read(file, classes, (frame.shape[0], frame.shape[1]))

    edges = Cached(read, (), a.cache_mb)
    bad: list[Problem] = []
    for i, file in enumerate(files):
        try:
            edges.fetch(i)
            edges.indices.append(i)
        except (DataError, EdgeError) as error:
            bad.append((file.stem, str(error)))
        progress("read", i + 1, len(files))
    if bad and not a.skip_bad:
        raise DataError(
            f"{a.labels} has {len(bad)} bad {'pair' if len(bad) == 1 else 'pairs'}: {listed(bad)}",
            "mend them, or leave them out (--skip-bad)",
        )
    if bad:
        print(f"adapt.train edges: {len(bad)} bad pairs left out: {listed(bad)}", file=sys.stderr)
    return crops_of_edges(edges, a.crop), bad


def _refined(pairs: Pairs, classes: int, progress: Any, cache_mb: float) -> Cached:
    """The pairs with labels that a dense CRF refined once: packed, because that takes seconds each."""
    from adapt.labels import crf

    packed: list[bytes] = []
    for i, (frame, label) in enumerate(pairs):
        packed.append(zlib.compress(crf.refine(frame, label, classes).tobytes(), 1))
        progress("refine", i + 1, len(pairs))

    def read(i: int) -> tuple[Any, Any]:
        frame = pairs[i][0]
        label = np.frombuffer(zlib.decompress(packed[i]), np.uint8).reshape(frame.shape[:2])
        return frame, label

    return Cached(read, range(len(pairs)), 0.0)


def _recipe(a: argparse.Namespace) -> Any:
    from adapt.train.edge_recipes import PRESETS, EdgeRecipe

    recipe = PRESETS[a.preset] if a.preset else EdgeRecipe(1000, frozen_bn=bool(a.init))
    given = {k: v for k in ("steps", "batch", "round", "rate") if (v := getattr(a, k)) is not None}
    if "batch" in given and "round" not in given:
        given["round"] = max(recipe.round, given["batch"])
    if a.seal:
        given |= {"aligned": True, "gate": Gate()}
    if a.gate is not None:
        given["gate"] = Gate() if a.gate else None
    return replace(recipe, **given)


def _start(a: argparse.Namespace, network: Any) -> tuple[int, tuple[Any, Any, str] | None]:
    """Load --init into the network, in place: (how many tensors, (mean, std, channel order) if it says)."""
    from networks.architectures.casenet import CASENet
    from networks.import_checkpoint import read_state
    from networks.pack import load_pack
    from networks.resnet_start import start

    if a.init.is_dir():
        parent = load_pack(a.init)
        state, norm = parent.state(), (parent.spec.mean, parent.spec.std, parent.spec.channel_order)
    else:
        state, norm = read_state(a.init), None
        if isinstance(network, CASENet):
            try:
                begun = start(network, state)
            except ValueError as error:
                raise ValueError(f"--init {a.init} does not start {a.network}: {error}") from None
            return len(begun.names), (begun.mean, begun.std, begun.channel_order)
    own = network.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise ValueError(f"{a.init}: none of its weights fits {a.network} by name and shape")
    network.load_state_dict(fits, strict=False)
    return len(fits), norm


def _run(a: argparse.Namespace, progress: Any) -> dict[str, Any]:
    import torch

    import networks
    from adapt.train.edges import has_statistics, train
    from networks.architectures.casenet import MEAN, STD
    from networks.pack import PackSpec, write_pack

    if a.out.exists():
        raise ValueError(f"{a.out} exists: packs are not overwritten, choose another --out")
    names, colours = _space(a.classes)
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    arguments = {}
    for item in a.set:
        key, _, value = item.partition("=")
        arguments[key] = json.loads(value) if value.replace(".", "", 1).isdigit() else value
    network = networks.create(a.network, classes=len(names), **arguments)
    multiple = network.size_multiple
    if any(side % multiple for side in a.crop):
        raise ValueError(f"crop {a.crop}: sides must be multiples of {multiple} for {a.network}")
    caffe = a.network == "casenet"
    mean, std, order = (MEAN, STD, "bgr") if caffe else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "rgb")
    loaded = 0
    recipe = _recipe(a)
    if recipe.frozen_bn and not a.init:
        scratch = a.preset.rpartition("-")[0] + "-scratch"
        raise ValueError(
            f"--preset {a.preset} freezes batch normalisation and needs a trained network: give --init a "
            f"ResNet or a pack, or choose --preset {scratch} for random weights"
        )
    if a.init:
        loaded, norm = _start(a, network)
        mean, std, order = norm or (mean, std, order)
        if recipe.frozen_bn and not has_statistics(network):
            raise ValueError(
                f"--init {a.init} holds no batch statistics for {a.network}, and the recipe freezes them: "
                "give a trained network"
            )
    draw, left_out = _draw(a, names, progress)
    start = time.monotonic()
    spec = PackSpec(
        name=a.name or a.network,
        version="1.0.0",
        network=a.network,
        arguments=arguments,
        classes=names,
        colours=colours,
        size=a.crop,
        mean=mean,
        std=std,
        channel_order=order,
        task=network.TASK,
        training=f"{a.preset or 'edges'}{', SEAL' if recipe.aligned else ''}: "
        f"{recipe.steps} steps of {recipe.batch}, "
        f"rate {recipe.rate:g}, crops {a.crop[0]}x{a.crop[1]}, seed {a.seed}",
    )
    checkpoint = a.out.with_name(f"{a.out.name}.checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    new = ("cache_mb", "void", "palette", "skip_bad")  # a checkpoint of earlier days knows none of them
    apart = ("out", "name", "json", "quiet", "jobs", "cache_mb", *(key for key in new if not getattr(a, key)))
    told = {k: str(v) for k, v in vars(a).items() if k not in apart}
    history = train(
        network,
        spec,
        draw,
        recipe,
        seed=a.seed,
        checkpoint=checkpoint,
        identity=repr((recipe, sorted(told.items()))),
        progress=progress,
        jobs=a.jobs,
    )
    pack = write_pack(a.out, spec, network.state_dict())
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(checkpoint.with_name(f"{checkpoint.name}.labels"), ignore_errors=True)
    return {
        "pack": str(pack.path),
        "sha256": pack.sha256,
        "training": spec.training,
        "loaded": loaded,
        "loss_first": float(np.mean(history[:5])),
        "loss_last": float(np.mean(history[-5:])),
        "seconds": round(time.monotonic() - start, 1),
        **({"left_out": [{"name": n, "reason": why} for n, why in left_out]} if a.skip_bad else {}),
    }


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.train edges")


def _command(argv: list[str] | None) -> int:
    p = parser()
    a = p.parse_args(argv)
    if bool(a.data) == bool(a.labels) or bool(a.labels) != bool(a.images):
        p.error("give --data, or --labels and --images")
    if not 0 <= a.cache_mb < 1e9:
        p.error("--cache-mb must not be negative")
    if a.jobs < 0:
        p.error("--jobs is 0 or more")
    from networks.import_checkpoint import CheckpointError
    from networks.pack import PackError

    try:
        with ProgressBars(quiet=a.quiet) as bars:
            summary = _run(a, bars)
    except (
        CheckpointError,
        DataError,
        EdgeError,
        PackError,
        ValueError,
        FloatingPointError,
        OSError,
    ) as error:
        print(f"adapt.train edges: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(summary) if a.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
