"""Turn a released checkpoint into a model pack, without ever executing what is in it.

    python -m networks.import_checkpoint espnetv2 espnetv2_s_1.0_city_1024x512.pth \\
                                         --classes cityscapes19 --out packs/e

Knows checkpoints and packs; what is special about one architecture's files is in that architecture's
module (`read_checkpoint`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import networks
from networks.command import finish
from networks.images import ImageError, read_image
from networks.labels import SPACES
from networks.pack.pack import Pack, PackError, PackSpec, write_pack

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The state_dict in a `.pth`/`.pt` (tensors only) or `.safetensors` file, on the CPU.

    Wrappers that trainers put around it are taken off: {"state_dict": ...}, {"model": ...}, and the prefix
    "module." of data-parallel training.

    Raises:
        CheckpointError: unreadable, not a state_dict, or a pickle that would execute code.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # torch's guesses about an odd file; our refusal says enough
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make torch raise anything
        raise CheckpointError(f"checkpoint {str(path)!r} {_why(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(map(_is_array, state.values())):
        raise CheckpointError(
            f"checkpoint {str(path)!r} is not a state_dict (names to dense tensors); save one with "
            "torch.save(network.state_dict(), file)"
        )
    state = {str(name): value for name, value in state.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    # Some releases are in half precision; a pack is float32.
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def _is_array(value: Any) -> bool:
    """A tensor with its values in memory: no sparse, quantised or meta one."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return dense and value.device.type == "cpu"


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    culprit = re.search(r"(?:GLOBAL|allowlist|global) ([\w.]+\.[\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and culprit:
        return (
            f"would execute code when loaded (it names {culprit[1]}): refused; "
            "ask its author for a plain state_dict or a .safetensors file"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "is not a checkpoint of tensors only: refused; ask its author for a plain state_dict"
    return f"cannot be read (truncated or damaged): {text[:160]}"


def import_checkpoint(
    network: str,
    file: Path,
    *,
    classes: str,
    out: Path,
    size: tuple[int, int],
    arguments: dict[str, Any] | None = None,
    name: str | None = None,
    version: str = "1.0.0",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    channel_order: str = "rgb",
    training: str = "",
    licence: str = "",
    golden: np.ndarray | None = None,
) -> Pack:
    """Write the pack of a checkpoint.  Raises: CheckpointError, PackError; nothing is left behind then."""
    if network not in networks.names():
        raise CheckpointError(f"network {network!r} is unknown; choose one of: {', '.join(networks.names())}")
    if classes not in SPACES:
        raise CheckpointError(
            f"label space {classes!r} is unknown; choose one of: {', '.join(sorted(SPACES))}"
        )
    space = SPACES[classes]
    state = read_state(file)
    found: dict[str, Any] = {}
    reader = getattr(importlib.import_module(networks.architecture(network).__module__), "read_checkpoint", None)
    if reader is not None:
        try:
            state, found = reader(state, len(space))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {str(file)!r} does not fit {network}: {error}") from error
    spec = PackSpec(
        name=name or network,
        version=version,
        network=network,
        task=networks.architecture(network).TASK,
        arguments={**found, **(arguments or {})},
        classes=space.classes,
        colours=space.colours,
        size=size,
        mean=mean,
        std=std,
        channel_order=channel_order,
        training=training or f"imported from {file.name}",
        licence=licence,
    )
    return write_pack(out, spec, _with_counters(state, spec), golden=golden)


def _with_counters(state: dict[str, Tensor], spec: PackSpec) -> dict[str, Tensor]:
    """Add the batch counters that files from before torch 0.4.1 lack; nothing reads them when inferring."""
    with torch.device("meta"):
        wanted = spec.create().state_dict()
    missing = {name for name in wanted if name.endswith(".num_batches_tracked")} - set(state)
    return {**state, **{name: torch.zeros((), dtype=torch.int64) for name in missing}}


def read_frames(files: list[Path], size: tuple[int, int]) -> np.ndarray | None:
    """uint8 [n,H,W,3] RGB, resized to `size`; None for an empty list.  Raises: CheckpointError."""
    try:
        frames = [read_image(file, size) for file in files]
    except ImageError as error:
        raise CheckpointError(f"golden frame {error}") from error
    return np.stack(frames) if frames else None


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 512x1024")
    return int(match[1]), int(match[2])


def _three(text: str) -> tuple[float, float, float]:
    try:
        a, b, c = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, for example 0.5,0.5,0.5") from error
    return a, b, c


def _argument(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m networks.import_checkpoint",
        description="Turn a checkpoint that somebody released into a model pack.  The file is read as "
        "tensors only: one that would execute code is refused.  All weights must fit the network by name.",
        epilog="""examples:
  python -m networks.import_checkpoint espnetv2 espnetv2_s_1.0_city_1024x512.pth \\
      --classes cityscapes19 --out packs/espnetv2
  python -m networks.import_checkpoint roadnet tiny.pth --classes street --set width=16 --size 128x256 --out p

exit codes: 0 the pack was written, 1 refused (one line on stderr says why), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("network", metavar="NETWORK", help=f"architecture: {', '.join(networks.names())}")
    add("file", metavar="FILE", type=Path, help="a .pth, .pt or .safetensors with a state_dict")
    add(
        "--classes",
        required=True,
        metavar="SPACE",
        help=f"label space of its outputs: {', '.join(sorted(SPACES))}",
    )
    add("--out", required=True, type=Path, metavar="PACK", help="directory of the new pack; must not exist")
    add(
        "--size",
        type=_size,
        default=(512, 1024),
        metavar="HxW",
        help="frame size it was trained for (512x1024)",
    )
    add("--name", metavar="NAME", help="name of the model (the network's)")
    add("--version", default="1.0.0", metavar="X.Y.Z", help="version of the pack (1.0.0)")
    add(
        "--mean", type=_three, default=IMAGENET_MEAN, metavar="A,B,C", help="channel means, 0..1 (ImageNet's)"
    )
    add("--std", type=_three, default=IMAGENET_STD, metavar="A,B,C", help="channel deviations (ImageNet's)")
    add("--channel-order", choices=("rgb", "bgr"), default="rgb", help="order the network wants (rgb)")
    add(
        "--set",
        type=_argument,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the network",
    )
    add("--golden", type=Path, nargs="+", default=[], metavar="IMAGE", help="frames for the parity report")
    add("--training", default="", metavar="TEXT", help="what it was trained on, for the record")
    add("--licence", default="", metavar="TEXT", help="licence of the weights, for the record")
    add("--json", action="store_true", help="print one JSON object about the pack")
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return finish(lambda: _run(args), (CheckpointError, PackError))


def _run(args: argparse.Namespace) -> int:
    pack = import_checkpoint(
        args.network,
        args.file,
        classes=args.classes,
        out=args.out,
        size=args.size,
        arguments=dict(args.set),
        name=args.name,
        version=args.version,
        mean=args.mean,
        std=args.std,
        channel_order=args.channel_order,
        training=args.training,
        licence=args.licence,
        golden=read_frames(args.golden, args.size),
    )
    facts = {
        "pack": str(pack.path),
        "sha256": pack.sha256,
        "name": pack.spec.name,
        "version": pack.spec.version,
        "network": pack.spec.network,
        "arguments": pack.spec.arguments,
        "classes": len(pack.spec.classes),
        "weights": len(pack.state()),
    }
    if args.json:
        print(json.dumps(facts))
    else:
        print(
            f"{pack.path}: {pack.spec.network} {pack.spec.arguments}, {facts['weights']} weights, "
            f"{facts['classes']} classes, sha256 {pack.sha256[:12]}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
