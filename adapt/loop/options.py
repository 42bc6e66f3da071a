"""The options of ``python -m adapt.run``, and the settings of loop and round that they describe."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from adapt.frames.selection import Rules
from adapt.loop.budget import Budget
from adapt.loop.config import RESPONSES, TRIGGERS, LoopConfig
from adapt.loop.errors import LoopError
from adapt.loop.vehicle import Conditions
from adapt.round import RoundConfig
from adapt.round.presets import PRESETS, preset

__all__ = ["loop_config", "parse_arguments", "parser", "round_config"]

EPILOG = """\
examples:
  # one round: collect 60 frames from the live service, adapt, build, submit; then end
  python -m adapt.run --server 127.0.0.1:8001 --model road --pack packs/street --repository repo \\
      --workdir adapt-road --frames 60 --once
  # left running in a vehicle: on drift or command, only when parked and charging, an hour of work a day
  python -m adapt.run ... --on drift,command --vehicle /run/vehicle.json --parked --charging \\
      --max-seconds 3600 --period 86400 --patience 60
  # frames that are there already: a video, a recording, a folder
  python -m adapt.run ... --from front=drive.mp4 --from bag.mcap#/camera/front --frames 200 --once
  # the same without the pack's labelled source frames
  python -m adapt.run ... --source-free --once

What is in WORKDIR: frames/ (the frame store: python -m adapt.frames WORKDIR/frames list), round-0001/ (state,
pseudo-labels, report.json, pack/), loop.json (where the loop is), budget.json (what was spent). Give the same
WORKDIR after a crash and the loop goes on from there. docs/loop.md says what happens when.

exit codes: 0 the refreshed version is live (with --once; otherwise ended by SIGTERM), 1 refused by the
gate or by the server, or failed (one line on stderr says why), 2 wrong usage, 3 paused: the budget is spent
before the round was done (with --once; the same command goes on with it), 130 interrupted (Ctrl-C)
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.run",
        description="Adapt a served model to the road it is on: collect frames from the live service, run a "
        "round of class-balanced self-training at low priority, build the refreshed engine version and "
        "submit it to the server's guarded swap. The server never waits for any of this.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--server", required=True, metavar="HOST:PORT", help="the live service")
    p.add_argument("--model", required=True, help="the served model to adapt")
    p.add_argument("--pack", required=True, metavar="DIR", help="the released pack the model was built from")
    p.add_argument("--repository", required=True, metavar="DIR", help="the engine repository of the server")
    p.add_argument(
        "--workdir", required=True, metavar="DIR", help="state of the loop; the same again continues"
    )
    p.add_argument("--frames", type=int, default=60, metavar="N", help="new frames that make a round (60)")
    p.add_argument(
        "--max-fps", type=float, default=5.0, metavar="F", help="sampling rate asked from the tap (5)"
    )
    p.add_argument("--source", default="", metavar="NAME", help="adapt to frames of this camera alone")
    p.add_argument("--near", type=int, default=4, metavar="BITS", help="hash distance of near-duplicates (4)")
    p.add_argument(
        "--max-bytes", type=int, default=2_000_000_000, metavar="N", help="bound of the frame store (2e9)"
    )
    p.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="give up after S seconds without frames (0: never)",
    )
    p.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="start with fewer frames after S seconds without a new view",
    )
    p.add_argument(
        "--preset", default="default", choices=sorted(PRESETS), help="settings to start from (default)"
    )
    p.add_argument("--portions", default="", metavar="P,P,..", help="portions of pseudo-labels (.2,.35,.5)")
    p.add_argument("--steps", type=int, metavar="N", help="training steps for each portion")
    p.add_argument("--batch", metavar="S+T", help="source and target frames in a batch, such as 3+3")
    p.add_argument("--crop", metavar="HxW", help="training crops (the whole frame)")
    p.add_argument("--rate", type=float, metavar="R", help="peak learning rate")
    p.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any other setting of a round"
    )
    p.add_argument(
        "--source-free",
        action="store_true",
        help="leave the pack's labelled source frames unused; preset source-free if none is named",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")

    g = p.add_argument_group("frames")
    g.add_argument(
        "--from",
        dest="imports",
        metavar="[CAMERA=]PATH",
        action="append",
        default=[],
        help="frames of a folder, a video or a recording (MCAP[#TOPIC]), not of the live service; repeat",
    )
    g.add_argument("--mix-sources", action="store_true", help="a round may take frames of several cameras")
    g.add_argument(
        "--min-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds between two kept frames of a camera",
    )
    g.add_argument(
        "--min-metres", type=float, default=0.0, metavar="M", help="metres travelled between two kept frames"
    )
    g.add_argument(
        "--scores",
        default="0,1",
        metavar="LOW,HIGH",
        help="range of the class-balanced score of frames that are kept (0,1)",
    )
    g.add_argument(
        "--rare-quota",
        type=float,
        default=0.25,
        metavar="Q",
        help="share of the store for frames of rare classes (.25)",
    )
    g.add_argument(
        "--evict",
        choices=("oldest", "reservoir"),
        default="oldest",
        help="which frames are deleted when the store is full",
    )
    g.add_argument("--max-age", type=float, metavar="S", help="seconds after which a frame is dropped")
    g.add_argument("--opt-in", action="store_true", help="keep only frames whose request said collect = true")
    g.add_argument(
        "--key", type=Path, metavar="FILE", help="encrypt the pictures with this key (adapt.frames keygen)"
    )

    g = p.add_argument_group("when")
    g.add_argument(
        "--on", default="frames,command", metavar="LIST", help=f"what begins a round, of {','.join(TRIGGERS)}"
    )
    g.add_argument(
        "--every",
        type=float,
        default=86_400.0,
        metavar="S",
        help="seconds between two rounds on schedule (86400)",
    )
    g.add_argument("--rest", type=float, default=0.0, metavar="S", help="least seconds between two rounds")
    g.add_argument(
        "--vehicle", metavar="FILE", help="state file of the vehicle, or module:name (docs/loop.md)"
    )
    g.add_argument(
        "--vehicle-fresh",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds after which a state is too old and permits nothing (60)",
    )
    g.add_argument("--parked", action="store_true", help="only while parked")
    g.add_argument("--charging", action="store_true", help="only while charging")
    g.add_argument("--min-battery", type=float, metavar="X", help="only at this charge or above, 0 to 1")
    g.add_argument("--max-temperature", type=float, metavar="C", help="only up to this temperature, in °C")

    g = p.add_argument_group("when the road changes (fog, dusk, another camera setting)")
    g.add_argument(
        "--respond",
        choices=RESPONSES,
        help="refresh: batch statistics at once, from a dozen frames, the round follows; or back to the "
        "version that knows the road. back: only the latter. (refresh; off with --once and --from)",
    )
    g.add_argument(
        "--refresh-driving",
        action="store_true",
        help="that refresh (seconds of work) may run whatever the vehicle says; the budget still holds",
    )

    p.add_argument(
        "--keep-versions",
        type=int,
        default=16,
        metavar="N",
        help="engine versions made by rounds that stay in the repository; 0: all (16)",
    )

    g = p.add_argument_group("budget")
    g.add_argument("--max-seconds", type=float, metavar="S", help="seconds of work")
    g.add_argument("--max-steps", type=int, metavar="N", help="steps of training")
    g.add_argument("--max-joules", type=float, metavar="J", help="joules, if they can be read (RAPL, NVML)")
    g.add_argument(
        "--period", type=float, metavar="S", help="seconds after which these three are full again (never)"
    )
    g.add_argument("--max-memory", type=int, metavar="BYTES", help="memory of this process")
    g.add_argument("--gpu-fraction", type=float, metavar="X", help="share of the GPU's memory, above 0 to 1")

    g = p.add_argument_group("serving first")
    g.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (1)")
    g.add_argument(
        "--priority",
        choices=("idle", "nice"),
        help="nice: --nice; idle: run only if nothing else wants a core, for busy machines (nice)",
    )
    g.add_argument("--nice", type=int, metavar="N", help="0 to 19 (10)")
    g.add_argument("--idle", action="store_true", help="--priority idle")
    g.add_argument("--cores", metavar="N,N,..", help="the only cores to use")
    g.add_argument(
        "--slow",
        type=float,
        default=0.0,
        metavar="R",
        help="pause if the server's latency during work is over R times that in pauses (0: never)",
    )

    g = p.add_argument_group("edges with the segmentation")
    g.add_argument("--edge-pack", metavar="DIR", help="a pack with an edge head that follows the rounds")
    g.add_argument("--edge-model", metavar="NAME", help="its model in the repository")
    g.add_argument("--group", metavar="NAME", help="the frame group that both are members of")

    p.add_argument(
        "--name", default=platform.node() or "adapter", help="name of this adapter, for the server"
    )
    p.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="token for the server (role adapt); without it: the environment's ROADWORTHY_TOKEN",
    )
    p.add_argument("--ca", type=Path, metavar="PEM", help="certificate authority of the server: TLS")
    p.add_argument("--once", action="store_true", help="end after one round")
    p.add_argument("--json", action="store_true", help="print the report of each round as JSON on stdout")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def round_config(arguments: argparse.Namespace) -> RoundConfig:
    """Return the round that the command line describes.  Raises LoopError for an unknown setting."""
    settings: dict[str, Any] = {"seed": arguments.seed, "threads": arguments.threads}
    try:
        if arguments.portions:
            settings["portions"] = tuple(float(part) for part in arguments.portions.split(","))
        if arguments.batch:
            source, target = arguments.batch.split("+")
            settings["source"], settings["target"] = int(source), int(target)
        if arguments.crop:
            height, width = arguments.crop.lower().split("x")
            settings["crop"] = (int(height), int(width))
    except ValueError as error:
        raise LoopError(f"--portions, --batch or --crop is malformed ({error}): see --help") from error
    if arguments.steps is not None:
        settings["steps"] = arguments.steps
    if arguments.rate is not None:
        settings["rate"] = arguments.rate
    if arguments.source_free:
        settings["source_free"] = True
    if arguments.key:  # a pack does not hold pictures in the clear that the store encrypts
        settings["golden"] = 0
    known = RoundConfig.__dataclass_fields__
    for item in arguments.set:
        key, equals, text = item.partition("=")
        if not equals or key not in known or key == "limits":
            settable = ", ".join(sorted(set(known) - {"limits"}))
            raise LoopError(f"--set {item}: no such setting; there are {settable}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        settings[key] = tuple(value) if isinstance(value, list) else value
    name = "source-free" if arguments.source_free and arguments.preset == "default" else arguments.preset
    return preset(name, **settings)


def loop_config(arguments: argparse.Namespace) -> LoopConfig:
    """Return the loop that the command line describes.

    Raises LoopError, BudgetError or ValueError, one line each.
    """
    try:
        low, high = (float(part) for part in arguments.scores.split(","))
    except ValueError as error:
        raise LoopError(f"--scores {arguments.scores}: give two numbers, such as 0.3,0.95") from error
    return LoopConfig(
        model=arguments.model,
        frames=arguments.frames,
        max_fps=arguments.max_fps,
        source=arguments.source,
        mix=arguments.mix_sources,
        wait=arguments.wait,
        patience=arguments.patience,
        max_bytes=arguments.max_bytes,
        key=arguments.key,
        rules=Rules(
            seconds=arguments.min_seconds,
            metres=arguments.min_metres,
            near=arguments.near,
            low=low,
            high=high,
            quota=arguments.rare_quota,
            opt_in=arguments.opt_in,
            evict=arguments.evict,
            age=arguments.max_age,
        ),
        on=tuple(part for part in arguments.on.split(",") if part),
        every=arguments.every,
        rest=arguments.rest,
        conditions=Conditions(
            arguments.parked, arguments.charging, arguments.min_battery, arguments.max_temperature
        ),
        budget=Budget(
            arguments.max_seconds,
            arguments.max_steps,
            arguments.max_joules,
            arguments.max_memory,
            period=arguments.period,
        ),
        gpu_fraction=arguments.gpu_fraction,
        round=round_config(arguments),
        respond=arguments.respond or ("off" if arguments.once or arguments.imports else "refresh"),
        refresh_driving=arguments.refresh_driving,
        keep_versions=arguments.keep_versions,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed options; exits with code 2 if they do not fit together."""
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.threads < 1 or arguments.frames < 1:
        command.error("--threads and --frames must be 1 or more")
    if arguments.slow and arguments.slow <= 1:
        command.error("--slow must be above 1, such as 1.15")
    if arguments.idle and arguments.priority == "nice":
        command.error("--idle belongs to --priority idle")
    if arguments.idle:
        arguments.priority = "idle"
    if arguments.priority == "idle" and arguments.nice is not None:
        command.error("--nice belongs to --priority nice")
    if arguments.priority is None:
        arguments.priority = "nice"
    edges = (arguments.edge_pack, arguments.edge_model, arguments.group)
    if any(edges) and not all(edges):
        command.error("--edge-pack, --edge-model and --group belong together")
    return arguments
