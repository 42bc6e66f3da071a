"""Turn a released checkpoint into a model pack without executing any code in it.

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
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import networks
from common.cli import run_command
from common.text import one_line, printable
from networks.checkpoints import archive
from networks.images import ImageError, read_image
from networks.labels import SPACES
from networks.pack import Pack, PackError, PackSpec, write_pack

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The state_dict in a `.pth`/`.pt` (tensors only) or `.safetensors` file, on the CPU.

    Wrappers that trainers put around it are taken off: {"state_dict": ...}, {"model": ...}, and the prefix
    "module." of data-parallel training.  What they keep beside it (NumPy's numbers and arrays, arguments,
    dates, paths) is passed over.

    Raises:
        CheckpointError: unreadable or damaged, not a state_dict, a pickle that would execute code, or tensors
            far larger than the file.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            archive.check_archive(path)
            # torch's guesses about an odd file; our refusal says enough
            with warnings.catch_warnings(), torch.serialization.safe_globals(archive.records()):
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
    try:
        archive.check_sizes(state.items())
    except ValueError as error:
        raise CheckpointError(f"checkpoint {str(path)!r} {error}") from error
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
    text = one_line(error)
    if type(error) is ValueError and text.startswith(("is damaged", "cannot be read", "unpacks")):
        return text
    # A function of Python's own is named without its module.
    culprit = re.search(r"GLOBAL ([\w.]+)|(?:allowlist|global) ([\w.]+\.[\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and culprit:
        return (
            f"would execute code when loaded (it names {culprit[1] or culprit[2]}): refused; "
            "ask its author for a plain state_dict or a .safetensors file, or save one where it is trusted: "
            "torch.save(network.state_dict(), FILE)"
        )
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" in text:
        return (
            "is pickled in a way that cannot be read without executing it (protocol 4, or objects beside the "
            "weights): refused; ask its author for a .safetensors file, or for torch.save with protocol 2"
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
    notes: list[str] | None = None,
) -> Pack:
    """Write the pack of a checkpoint.

    Args:
        mean: of channel values scaled to 0..1.
        std: the same.
        notes: what of the file's outputs is left out is appended here, one line each.
    Raises:
        CheckpointError, PackError: nothing is left behind then.
    """
    if network not in networks.names():
        raise CheckpointError(f"network {network!r} is unknown; choose one of: {', '.join(networks.names())}")
    if classes not in SPACES:
        raise CheckpointError(
            f"label space {classes!r} is unknown; choose one of: {', '.join(sorted(SPACES))}"
        )
    space = SPACES[classes]
    state = read_state(file)
    found: dict[str, Any] = {}
    reader = getattr(
        importlib.import_module(networks.architecture(network).__module__), "read_checkpoint", None
    )
    left_out: list[str] = []
    if reader is not None:
        published = state
        try:
            state, found = reader(state, len(space))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {str(file)!r} does not fit {network}: {error}") from error
        left_out = _left_out(published, state, classes)
        if notes is not None:
            notes += left_out
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
        training="; ".join([training or f"imported from {printable(file.name)}", *left_out]),
        licence=licence,
    )
    return write_pack(out, spec, _with_counters(state, spec), golden=golden)


def _left_out(published: dict[str, Tensor], state: dict[str, Tensor], classes: str) -> list[str]:
    """One line for each weight of the head that a reader shortened, biases apart."""
    return [
        f"{name!r} has {len(published[name])} outputs for {len(value)} classes of {classes}: the last "
        f"{len(published[name]) - len(value)} left out"
        for name, value in state.items()
        if value.ndim > 1 and name in published and len(value) < len(published[name])
    ]


def _with_counters(state: dict[str, Tensor], spec: PackSpec) -> dict[str, Tensor]:
    """Add the batch counters that files from before torch 0.4.1 lack; nothing reads them when inferring."""
    with torch.device("meta"):
        wanted = spec.create().state_dict()
    missing = {name for name in wanted if name.endswith(".num_batches_tracked")} - set(state)
    return {**state, **{name: torch.zeros((), dtype=torch.int64) for name in missing}}


def read_frames(files: list[Path], size: tuple[int, int]) -> np.ndarray | None:
    """Read uint8 [n,H,W,3] RGB frames, resized to `size`; None for an empty list.  Raises CheckpointError."""
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
    deviations = "channel deviations, above 0 to 1 (ImageNet's)"
    add("--std", type=_three, default=IMAGENET_STD, metavar="A,B,C", help=deviations)
    of_bytes = "--mean and --std are of channel values 0..255, as in 123.7,116.3,103.5; divided by 255 here"
    add("--of-255", action="store_true", help=of_bytes)
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
    command = parser()
    args = command.parse_args(argv)
    try:
        args.mean, args.std = normalisation(args.mean, args.std, of_255=args.of_255)
    except ValueError as error:
        command.error(str(error))
    return run_command(lambda: _run(args), (CheckpointError, PackError))


def normalisation(
    mean: tuple[float, float, float], std: tuple[float, float, float], *, of_255: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Means and deviations of channels scaled to 0..1.

    Args:
        of_255: whether they are given of channels of 0..255.
    Raises:
        ValueError: values that cannot be of that range.
    """
    shown = f"mean {','.join(map('{:g}'.format, mean))} and std {','.join(map('{:g}'.format, std))}"
    if not of_255:
        # Written so that NaN is refused too.
        if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
            raise ValueError(
                f"{shown}: channels are scaled to 0..1; where these are of 0..255, say so with --of-255"
            )
        return mean, std
    low = 0 < max(mean) <= 1
    if low or not all(0 <= m <= 255 for m in mean) or not all(1 <= s <= 255 for s in std):
        raise ValueError(f"{shown} are not of channels of 0..255, which --of-255 says: leave it out")
    first, second, third = (m / 255 for m in mean)
    one, two, three = (s / 255 for s in std)
    return (first, second, third), (one, two, three)


def _run(args: argparse.Namespace) -> int:
    notes: list[str] = []
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
        notes=notes,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    facts = {
        "pack": str(pack.path),
        "sha256": pack.sha256,
        "name": pack.spec.name,
        "version": pack.spec.version,
        "network": pack.spec.network,
        "arguments": pack.spec.arguments,
        "classes": len(pack.spec.classes),
        "weights": len(pack.state()),
        "left_out": notes,
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
