"""``python -m adapt.run``: the on-device loop (`adapt.loop`), beside a live server and behind it in priority.

Here are only the options, the priorities of the process and the exit codes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from adapt.command import interruptible
from adapt.frames.selection import Rules
from adapt.frames.store import StoreError
from adapt.loop.budget import Budget, BudgetError
from adapt.loop.domain_response import RESPONSES
from adapt.loop.loop import TRIGGERS, EdgeMember, Loop, LoopConfig, LoopError, Paused
from adapt.loop.process_priority import be_polite
from adapt.loop.vehicle import Conditions, VehicleError, open_vehicle
from adapt.progress import Bars
from adapt.round import RoundConfig, RoundError
from adapt.round.presets import PRESETS, preset
from adapt.sources import SourceError

__all__ = ["Loop", "LoopConfig", "LoopError", "main", "parser", "round_config"]

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

FIRST_CONTACT = 10.0  # seconds in which the server must answer once


def _versions_in(repository: Path, model: str) -> list[int]:
    """Without making the directory of a mistyped path."""
    from runtime.repository.repository import Repository

    return Repository(repository).versions(model) if repository.is_dir() else []


def _greet(client: Any, server: str, patience: float) -> None:
    """Later the loop waits for a server that went away; one that was never there is a mistake."""
    import grpc

    try:
        client.wait_ready(patience)
    except grpc.FutureTimeoutError:
        raise LoopError(
            f"server {server!r} did not answer for {patience:.0f} s: start runtime.serve or correct --server"
        ) from None


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
        help="begin with fewer after S seconds without a new view",
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
    p.add_argument("--seed", type=int, default=0, help="of everything random (0)")

    g = p.add_argument_group("frames")
    g.add_argument(
        "--from", dest="imports", metavar="[CAMERA=]PATH", action="append", default=[],
        help="frames of a folder, a video or a recording (MCAP[#TOPIC]), not of the live service; repeat",
    )  # fmt: skip
    g.add_argument("--mix-sources", action="store_true", help="a round may take frames of several cameras")
    g.add_argument(
        "--min-seconds", type=float, default=0.0, metavar="S", help="between two kept frames of a camera"
    )
    g.add_argument(
        "--min-metres", type=float, default=0.0, metavar="M", help="travelled between two kept frames"
    )
    g.add_argument(
        "--scores",
        default="0,1",
        metavar="LOW,HIGH",
        help="class-balanced score of a frame worth keeping (0,1)",
    )
    g.add_argument(
        "--rare-quota", type=float, default=0.25, metavar="Q", help="of the store, for rare classes (.25)"
    )
    g.add_argument(
        "--evict", choices=("oldest", "reservoir"), default="oldest", help="who goes when it is full"
    )
    g.add_argument("--max-age", type=float, metavar="S", help="seconds after which a frame is dropped")
    g.add_argument("--opt-in", action="store_true", help="keep only frames whose request said collect = true")
    g.add_argument(
        "--key", type=Path, metavar="FILE", help="seal the pictures with this key (adapt.frames keygen)"
    )

    g = p.add_argument_group("when")
    g.add_argument(
        "--on", default="frames,command", metavar="LIST", help=f"what begins a round, of {','.join(TRIGGERS)}"
    )
    g.add_argument("--every", type=float, default=86_400.0, metavar="S", help="seconds of a schedule (86400)")
    g.add_argument("--rest", type=float, default=0.0, metavar="S", help="seconds at least between two rounds")
    g.add_argument(
        "--vehicle", metavar="FILE", help="state file of the vehicle, or module:name (docs/loop.md)"
    )
    g.add_argument(
        "--vehicle-fresh", type=float, default=60.0, metavar="S", help="older states allow nothing (60)"
    )
    g.add_argument("--parked", action="store_true", help="only while parked")
    g.add_argument("--charging", action="store_true", help="only while charging")
    g.add_argument("--min-battery", type=float, metavar="X", help="only from this charge on, 0 to 1")
    g.add_argument("--max-temperature", type=float, metavar="C", help="only up to so many degrees")

    g = p.add_argument_group("when the road changes (fog, dusk, another camera setting)")
    g.add_argument(
        "--respond", choices=RESPONSES,
        help="refresh: batch statistics at once, from a dozen frames, the round follows; or back to the "
        "version that knows the road. back: only the latter. (refresh; off with --once and --from)",
    )  # fmt: skip
    g.add_argument(
        "--refresh-driving", action="store_true",
        help="that refresh (seconds of work) may run whatever the vehicle says; the budget still holds",
    )  # fmt: skip

    p.add_argument(
        "--keep-versions", type=int, default=16, metavar="N",
        help="engine versions made by rounds that stay in the repository; 0: all (16)",
    )  # fmt: skip

    g = p.add_argument_group("budget")
    g.add_argument("--max-seconds", type=float, metavar="S", help="of work")
    g.add_argument("--max-steps", type=int, metavar="N", help="of training")
    g.add_argument("--max-joules", type=float, metavar="J", help="where they can be read (RAPL, NVML)")
    g.add_argument("--period", type=float, metavar="S", help="after which these three are full again (never)")
    g.add_argument("--max-memory", type=int, metavar="BYTES", help="of this process")
    g.add_argument("--gpu-fraction", type=float, metavar="X", help="of the GPU's memory, above 0 to 1")

    g = p.add_argument_group("serving first")
    g.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (1)")
    g.add_argument(
        "--priority", choices=("idle", "nice"),
        help="nice: --nice; idle: runs only where nothing else wants a core, for busy machines (nice)",
    )  # fmt: skip
    g.add_argument("--nice", type=int, metavar="N", help="0 to 19 (10)")
    g.add_argument("--idle", action="store_true", help="--priority idle")
    g.add_argument("--cores", metavar="N,N,..", help="the only cores to use")
    g.add_argument(
        "--slow", type=float, default=0.0, metavar="R",
        help="pause where the server's latency beside work is over R times that without (0: do not look)",
    )  # fmt: skip

    g = p.add_argument_group("edges with the segmentation")
    g.add_argument("--edge-pack", metavar="DIR", help="a pack with an edge head that follows the rounds")
    g.add_argument("--edge-model", metavar="NAME", help="its model in the repository")
    g.add_argument("--group", metavar="NAME", help="the frame group that both are members of")

    p.add_argument("--name", default=platform.node() or "adapter", help="of this adapter, for the server")
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
    """The round the command line describes.  Raises LoopError for a setting that does not exist."""
    told: dict[str, Any] = {"seed": arguments.seed, "threads": arguments.threads}
    try:
        if arguments.portions:
            told["portions"] = tuple(float(part) for part in arguments.portions.split(","))
        if arguments.batch:
            source, target = arguments.batch.split("+")
            told["source"], told["target"] = int(source), int(target)
        if arguments.crop:
            height, width = arguments.crop.lower().split("x")
            told["crop"] = (int(height), int(width))
    except ValueError as error:
        raise LoopError(f"--portions, --batch or --crop is malformed ({error}): see --help") from error
    if arguments.steps is not None:
        told["steps"] = arguments.steps
    if arguments.rate is not None:
        told["rate"] = arguments.rate
    if arguments.source_free:
        told["source_free"] = True
    if arguments.key:  # pictures that are sealed in the store do not lie open in a pack
        told["golden"] = 0
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
        told[key] = tuple(value) if isinstance(value, list) else value
    name = "source-free" if arguments.source_free and arguments.preset == "default" else arguments.preset
    return preset(name, **told)


def loop_config(arguments: argparse.Namespace) -> LoopConfig:
    """What the command line says of the loop.  Raises LoopError, BudgetError or ValueError, one line each."""
    try:
        low, high = (float(part) for part in arguments.scores.split(","))
    except ValueError as error:
        raise LoopError(f"--scores {arguments.scores}: give two numbers, such as 0.3,0.95") from error
    return LoopConfig(
        model=arguments.model, frames=arguments.frames, max_fps=arguments.max_fps, source=arguments.source,
        mix=arguments.mix_sources, wait=arguments.wait, patience=arguments.patience,
        max_bytes=arguments.max_bytes, key=arguments.key,
        rules=Rules(
            seconds=arguments.min_seconds, metres=arguments.min_metres, near=arguments.near,
            low=low, high=high,
            quota=arguments.rare_quota, opt_in=arguments.opt_in, evict=arguments.evict,
            age=arguments.max_age,
        ),
        on=tuple(part for part in arguments.on.split(",") if part), every=arguments.every,
        rest=arguments.rest,
        conditions=Conditions(
            arguments.parked, arguments.charging, arguments.min_battery, arguments.max_temperature
        ),
        budget=Budget(
            arguments.max_seconds, arguments.max_steps, arguments.max_joules, arguments.max_memory,
            period=arguments.period,
        ),
        gpu_fraction=arguments.gpu_fraction, round=round_config(arguments),
        respond=arguments.respond or ("off" if arguments.once or arguments.imports else "refresh"),
        refresh_driving=arguments.refresh_driving, keep_versions=arguments.keep_versions,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return interruptible("adapt.run", lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
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
    try:
        return _main(arguments)
    except _Stopped:
        return 0 if not arguments.once else 1
    except Paused as pause:
        print(f"adapt.run: paused, {pause}; the same command goes on with it", file=sys.stderr)
        return 3
    except (
        LoopError, RoundError, StoreError, SourceError, BudgetError, VehicleError, ValueError,
        FloatingPointError, OSError,
    ) as error:  # fmt: skip
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path and its permissions"
        print(f"adapt.run: {' '.join(text.split())}", file=sys.stderr)
        return 1


def connect(arguments: argparse.Namespace) -> Any:
    """A client of the server, with the token and the certificate authority that were given."""
    import grpc

    from runtime import files
    from runtime.client import Client, token

    credentials = None
    if arguments.ca is not None:
        credentials = grpc.ssl_channel_credentials(files.read(arguments.ca))
    return Client(arguments.server, token=token.given(file=arguments.token_file), credentials=credentials)


def _edge_member(arguments: argparse.Namespace) -> EdgeMember:
    """The pack whose edges follow.  Raises LoopError for what every round would decline later."""
    from adapt.round.edges import EdgeRoundError, check_pack
    from networks.pack.pack import load_pack

    pack = load_pack(arguments.edge_pack)
    try:
        multiple = check_pack(pack)
    except EdgeRoundError as error:
        raise LoopError(f"--edge-pack: {error}") from error
    if any(side % multiple for side in pack.spec.size):
        raise LoopError(f"--edge-pack: size {pack.spec.size} is no multiple of {multiple}: train it at one")
    if not _versions_in(Path(arguments.repository), arguments.edge_model):
        raise LoopError(
            f"repository {arguments.repository!r} holds no version of {arguments.edge_model!r}: publish the "
            "edge pack with export.build first"
        )
    return EdgeMember(pack, arguments.edge_model, arguments.group)


def _main(arguments: argparse.Namespace) -> int:
    cores = [int(part) for part in arguments.cores.split(",")] if arguments.cores else None
    nice = 10 if arguments.nice is None else arguments.nice
    be_polite(nice=nice, idle=arguments.priority == "idle", cores=cores)
    import signal

    import torch

    from adapt.loop.server_channel import Remote
    from adapt.loop.server_latency import counters_of
    from adapt.loop.throttle import Throttle, ThrottleConfig
    from adapt.sources import FileSource, open_source
    from networks.pack.pack import load_pack

    def stop(*_: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(arguments.threads)
    loop_config(arguments)  # settings that cannot be are said before a pack is read
    pack = load_pack(arguments.pack)
    arguments.source_free = arguments.source_free or not pack.replay("train")
    config = loop_config(arguments)
    if not _versions_in(Path(arguments.repository), arguments.model):
        raise LoopError(
            f"repository {arguments.repository!r} holds no version of {arguments.model!r}: give the one that "
            "the server serves, or publish the pack with export.build first"
        )
    vehicle = open_vehicle(arguments.vehicle, fresh=arguments.vehicle_fresh) if arguments.vehicle else None
    if config.conditions and vehicle is None:
        raise LoopError("--parked, --charging, --min-battery and --max-temperature need --vehicle")
    edges = _edge_member(arguments) if arguments.edge_pack else None
    client = connect(arguments)

    def imports(done: dict[str, int]) -> list[tuple[str, FileSource]]:
        return [
            (text, open_source(text, max_fps=arguments.max_fps, skip=done.get(text, 0)))
            for text in arguments.imports
        ]

    throttle = None
    if arguments.slow:
        throttle = Throttle(counters_of(client, arguments.model), ThrottleConfig(slow=arguments.slow))
    with Bars(quiet=arguments.quiet) as bars:
        loop = Loop(
            client, pack, Path(arguments.repository), Path(arguments.workdir), config, progress=bars,
            imports=imports if arguments.imports else None, source=_Nothing() if arguments.imports else None,
            vehicle=vehicle, throttle=throttle, edges=edges, once=arguments.once,
            quiet=arguments.quiet,
        )  # fmt: skip
        try:
            if loop.state["phase"] == "collect":  # a round that was begun needs no server until it submits
                _greet(client, arguments.server, max(FIRST_CONTACT, arguments.wait))
            loop.remote = Remote(client, arguments.model, arguments.name)
            return _rounds(loop, arguments)
        finally:
            loop.remote.close()
            loop.close()


class _Stopped(BaseException):
    """SIGTERM: the usual end of a loop that is left running."""


class _Nothing:
    """Beside --from: everything has been read."""

    finished = True

    def get(self, timeout: float) -> None:
        return None

    def close(self) -> None: ...


def _rounds(loop: Loop, arguments: argparse.Namespace) -> int:
    while True:
        report = loop.once()
        if arguments.json:
            print(json.dumps(report), flush=True)
        else:
            print(
                f"round {report['round']}: {report['state']} {report.get('reason', '')}".rstrip(), flush=True
            )
        if arguments.once:
            return 0 if report["state"] == "LIVE" else 1


if __name__ == "__main__":
    sys.exit(main())
