"""What may be asked of a TensorRT build, as a value and as command line options: one surface for
`python -m export.build` and `python -m export.tensorrt`.

Nothing of TensorRT is imported with this module.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

HARDWARE = ("none", "ampere+", "same-capability")
LEVELS = range(6)


@dataclass(frozen=True)
class PlanOptions:
    """How TensorRT builds, whatever the graph.

    workspace           bytes of scratch memory for the builder; None = the device's
    optimisation_level  0 (fast build) to 5 (fast engine); TensorRT's own default is 3
    timing_cache        file of measured kernel times
    replay              build from that file alone: a kernel that is not in it fails the build
    version_compatible  the plan runs with later releases of the same major version (and carries host code)
    hardware            "none" = this GPU model only, "ampere+", or "same-capability"
    dla                 DLA core; layers it cannot take fall back to the GPU if `gpu_fallback`
    tf32                allow TF32 in float32 convolutions (faster; 10 bits of mantissa)

    Raises ValueError for values outside these.
    """

    workspace: int | None = None
    optimisation_level: int = 3
    timing_cache: Path | None = None
    replay: bool = False
    version_compatible: bool = False
    hardware: str = "none"
    dla: int | None = None
    gpu_fallback: bool = True
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.hardware not in HARDWARE:
            raise ValueError(f"hardware is {self.hardware!r}: use one of {', '.join(HARDWARE)}")
        if self.optimisation_level not in LEVELS:
            raise ValueError(f"optimisation_level is {self.optimisation_level!r}: use 0 to {LEVELS[-1]}")
        if self.workspace is not None and self.workspace < 1:
            raise ValueError(f"workspace is {self.workspace} bytes: give some, or leave it out")
        if self.dla is not None and self.dla < 0:
            raise ValueError(f"dla is {self.dla}: cores are counted from 0")
        if self.dla is None and not self.gpu_fallback:
            raise ValueError("no GPU fallback, but no DLA either: choose a DLA core")
        if self.replay and self.timing_cache is None:
            raise ValueError("replay needs a timing_cache: record one first by building without replay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `PlanOptions` as a group of their own."""
    group = parser.add_argument_group("TensorRT (docs/tensorrt.md; most need a device)")
    add = group.add_argument
    add("--workspace", type=int, metavar="MiB", help="builder's scratch memory (the device's)")
    levels = "0 builds fast, 5 runs fast (3)"
    add("--optimisation-level", type=int, choices=LEVELS, default=3, metavar="0-5", help=levels)
    add("--timing-cache", type=Path, metavar="FILE", help="use measured kernel times, and add what is new")
    add("--replay", action="store_true", help="use the timing cache alone; fail on a kernel it lacks")
    compatible = "runs with later releases of the major version; carries host code (docs/tensorrt.md)"
    add("--version-compatible", action="store_true", help=compatible)
    hardware = "GPUs besides this model (none): ampere+ or same-capability"
    add("--hardware", choices=HARDWARE, default="none", help=hardware)
    add("--dla", type=int, metavar="CORE", help="build for a DLA core; fp16 and int8 only")
    add("--no-gpu-fallback", action="store_true", help="with --dla: fail on layers that it cannot take")
    add("--tf32", action="store_true", help="TF32 in float32 convolutions")


def from_arguments(args: argparse.Namespace) -> PlanOptions:
    """Raises ValueError, see `PlanOptions`."""
    return PlanOptions(
        workspace=args.workspace << 20 if args.workspace is not None else None,
        optimisation_level=args.optimisation_level,
        timing_cache=args.timing_cache,
        replay=args.replay,
        version_compatible=args.version_compatible,
        hardware=args.hardware,
        dla=args.dla,
        gpu_fallback=not args.no_gpu_fallback,
        tf32=args.tf32,
    )
