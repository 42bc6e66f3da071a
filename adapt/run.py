"""``python -m adapt.run``: the on-device loop, beside a live server and behind it in priority.

    collect (the server's tap → frame store) → round (``adapt.round``) → build (``export.build``)
      → submit (control API) → LIVE or REJECTED → report.json

Killed at any moment it continues where it was when it is started again: every step writes down what it is
about to do, each step can be repeated, and the server keeps answering with what it has in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapt.files import write_json
from adapt.frames import FrameStore, StoredFrame, StoreError, confidence_summary
from adapt.presets import PRESETS, preset
from adapt.progress import Bars
from adapt.round import RoundConfig, RoundError, RoundResult, adapt

__all__ = ["Loop", "LoopConfig", "LoopError", "main"]

EPILOG = """\
examples:
  # one round: collect 60 frames from the live service, adapt, build, submit; then end
  python -m adapt.run --server 127.0.0.1:8001 --model road --pack packs/street --repository repo \\
      --workdir adapt-road --frames 60 --once
  # the same without the pack's labelled source frames
  python -m adapt.run ... --source-free --once

What is in WORKDIR: frames/ (the frame store), round-0001/ (state, pseudo-labels, report.json, pack/),
loop.json (where the loop is). Give the same WORKDIR after a crash and the loop goes on from there.

exit codes: 0 the refreshed version is live (with --once; otherwise ended by SIGINT or SIGTERM), 1 refused by
the gate or by the server, or failed (one line on stderr says why), 2 wrong usage
"""

FIRST_CONTACT = 10.0  # seconds in which the server must answer once


class LoopError(Exception):
    """The loop cannot go on.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class LoopConfig:
    """What the loop is told.

    frames: how many new frames make a round.  max_fps: sampling rate asked from the tap.  source: only
    frames of this camera ("" = all).  wait: seconds without a frame after which the loop gives up, 0 = never.
    max_bytes: bound of the frame store.  near: hash distance of near-duplicates.  patience: seconds without a
    new view after which a round begins with what there is, if that is `enough` frames, 0 = never.
    swap_timeout: seconds a submitted version may take to be decided.
    """

    model: str
    frames: int = 60
    max_fps: float = 5.0
    source: str = ""
    wait: float = 0.0
    max_bytes: int = 2_000_000_000
    near: int = 4
    patience: float = 0.0
    enough: int = 8
    swap_timeout: float = 600.0
    round: RoundConfig = field(default_factory=RoundConfig)


class Loop:
    """The loop's steps; `client` is a `runtime.client.Client` or anything with its `frames` and `submit`.

    Args:
        build: (pack, repository, model, adaptation, gate) -> version; by default `export.build.build`.
    """

    def __init__(
        self,
        client: Any,
        pack: Any,
        repository: Path,
        workdir: Path,
        config: LoopConfig,
        *,
        progress: Callable[..., None],
        build: Callable[..., int] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.client, self.pack, self.repository, self.workdir = client, pack, repository, workdir
        self.config, self.progress = config, progress
        self.build = build or build_version
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        workdir.mkdir(parents=True, exist_ok=True)
        self.store = FrameStore(workdir / "frames", max_bytes=config.max_bytes, near=config.near)
        self.state = self._read()

    # -------------------------------------------------------------------------------------------- state
    def _read(self) -> dict[str, Any]:
        file = self.workdir / "loop.json"
        fresh = {"schema": 1, "pack": self.pack.sha256, "round": 1, "phase": "collect", "used_up_to": 0}
        if not file.is_file():
            return fresh
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoopError(f"{file} is damaged ({error}): move it away to start afresh") from error
        if state.get("pack") != self.pack.sha256:
            raise LoopError(
                f"{self.workdir} belongs to pack {state.get('pack', '')[:12]}, not {self.pack.sha256[:12]}: "
                "give another --workdir"
            )
        return dict(state)

    def _go(self, phase: str, **more: Any) -> None:
        self.state = {
            **self.state,
            "phase": phase,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        write_json(self.workdir / "loop.json", self.state)

    @property
    def folder(self) -> Path:
        return self.workdir / f"round-{self.state['round']:04d}"

    # -------------------------------------------------------------------------------------------- steps
    def once(self) -> dict[str, Any]:
        """One round from wherever the state is; gives the report (also written to round-NNNN/loop.json)."""
        if self.state["phase"] == "collect":
            self._collect()
        result = self._round()
        if not result.accepted or result.pack is None:
            return self._end("REFUSED", result, reason=self._why(result))
        if self.state["phase"] == "round":
            started = time.monotonic()
            version = self._build(result)
            self._go("submit", version=version, build_seconds=round(time.monotonic() - started, 2))
        return self._submit(result)

    def _collect(self) -> None:
        rows = self._unused()
        wanted = self.config.frames
        self.progress("collect", min(len(rows), wanted), wanted)
        if len(rows) < wanted:
            classes = len(self.pack.spec.classes)
            dropped = 0
            fresh = time.monotonic()
            for tapped in self._tapped():
                kept = self.store.add(
                    tapped.frame,
                    source=tapped.source,
                    model=tapped.model,
                    version=int(tapped.version),
                    summary=_summary(tapped, classes),
                    at=float(tapped.time),
                )
                dropped = int(getattr(tapped, "dropped", 0))
                if kept.id is not None:
                    rows, fresh = self._unused(), time.monotonic()
                    self.progress("collect", min(len(rows), wanted), wanted, dropped=dropped)
                stale = self.config.patience and time.monotonic() - fresh > self.config.patience
                if len(rows) >= wanted or (stale and len(rows) >= self.config.enough):
                    break
        chosen = rows[-wanted:]
        self.progress("collect", len(chosen), len(chosen))
        self._go("round", frames=[row.id for row in chosen])

    def _unused(self) -> list[StoredFrame]:
        source = self.config.source or None
        return [row for row in self.store.rows(source=source) if row.id > self.state["used_up_to"]]

    def _tapped(self) -> Iterator[Any]:
        """Frames of the tap; connects again when the server goes and comes."""
        import grpc

        from runtime.client import Rejected

        last = time.monotonic()
        pause = 0.2
        while True:
            try:
                stream = self.client.frames(
                    self.config.model, max_fps=self.config.max_fps, source=self.config.source
                )
                with contextlib.closing(stream):
                    for tapped in stream:
                        last, pause = time.monotonic(), 0.2
                        yield tapped
                reason = "the server ended the stream"
            except Rejected as error:
                if error.code != "UNAVAILABLE":  # shutting down: it may come back
                    raise LoopError(
                        f"the server refuses the tap of {self.config.model!r}: {error.reason}"
                    ) from error
                reason = error.reason
            except grpc.RpcError as error:
                reason = _details(error)
            waited = time.monotonic() - last
            if self.config.wait and waited > self.config.wait:
                raise LoopError(f"no frame for {waited:.0f} s ({reason}): is the server up and asked?")
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def _round(self) -> RoundResult:
        ids = set(self.state["frames"])
        rows = [row for row in self.store.rows() if row.id in ids]
        if len(rows) < len(ids):
            # The frames were evicted or deleted since; the round that used them cannot be repeated.
            if (self.folder / "state.json").is_file():
                os.replace(self.folder, self.folder.with_name(f"{self.folder.name}.lost-{int(time.time())}"))
            self._go("round", frames=[row.id for row in rows])
        self.say(f"round {self.state['round']}: {len(rows)} frames, {self.folder}")
        return adapt(
            self.pack,
            self.store.frames(rows),
            config=self.config.round,
            out=self.folder,
            progress=self.progress,
        )

    def _build(self, result: RoundResult) -> int:
        """A version for this pack: an earlier one, if the loop was killed after publishing it."""
        assert result.pack is not None
        from runtime.repository import Repository

        repository = Repository(self.repository)
        for version in sorted(_versions(repository, self.config.model), reverse=True):
            try:
                manifest = repository.manifest(self.config.model, version)
            except Exception:  # a damaged version is none of ours
                continue
            if manifest.get("pack", {}).get("sha256") == result.pack.sha256:
                return int(version)
        self.progress("build", 0, 1)
        version = self.build(
            result.pack, self.repository, self.config.model, _adaptation(result), result.report["gate"]
        )
        self.progress("build", 1, 1)
        return version

    def _submit(self, result: RoundResult) -> dict[str, Any]:
        import grpc

        from runtime.client import Rejected

        version = int(self.state["version"])
        started = time.monotonic()
        events: list[dict[str, Any]] = []
        state, reason = "UNKNOWN", "the server ended the stream without a decision"
        while state == "UNKNOWN" and time.monotonic() < started + self.config.swap_timeout:
            decided = self._decided(version)
            if decided is not None:
                state, reason = decided
                break
            try:
                for event in self.client.submit(self.config.model, version):
                    events.append({k: getattr(event, k) for k in ("time", "state", "check", "reason")})
                    words = " ".join(part for part in (event.check, event.reason) if part)
                    self.say(f"version {version}: {event.state} {words}".rstrip())
                    if event.state in ("LIVE", "REJECTED"):
                        state, reason = event.state, words
                        break
            except Rejected as error:
                if error.code != "UNAVAILABLE":
                    state, reason = "REJECTED", error.reason
                    break
                time.sleep(1.0)
            except grpc.RpcError as error:  # the server went away: it comes back, or the time runs out
                reason = _details(error)
                self.say(f"submit: {reason}; trying again")
                time.sleep(1.0)
        return self._end(
            state, result, reason=reason, version=version, events=events,
            swap_seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    def _decided(self, version: int) -> tuple[str, str] | None:
        """What became of a version that was submitted before the loop was killed."""
        from runtime.repository import Repository

        repository = Repository(self.repository)
        live = repository.live(self.config.model) or {}
        if live.get("live") == version:
            return "LIVE", "was live already"
        for line in reversed(list(repository.history(self.config.model))):
            if line.get("version") == version and line.get("state") in ("REJECTED", "ROLLED_BACK"):
                return "REJECTED", f"{line.get('check', '')} {line.get('reason', '')}".strip()
        return None

    @staticmethod
    def _why(result: RoundResult) -> str:
        failed = [c for c in result.report["gate"]["checks"] if not c["passed"]]
        return "; ".join(f"{c['name']}: {c['reason']}" for c in failed) or "refused"

    def _end(self, state: str, result: RoundResult, **more: Any) -> dict[str, Any]:
        report = {
            "model": self.config.model,
            "round": self.state["round"],
            "state": state,
            "parent": self.pack.sha256,
            "pack": str(result.pack.path) if result.pack else "",
            "frames": len(self.state["frames"]),
            "build_seconds": self.state.get("build_seconds", 0.0),
            **more,
            "adaptation": result.report,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.folder / "loop.json", report)
        self._go(
            "collect",
            round=self.state["round"] + 1,
            last=state,
            used_up_to=max(self.state["frames"], default=0),
        )
        return report


def _summary(tapped: Any, classes: int) -> dict[str, Any]:
    """Of a tapped answer; empty where its client did not ask for the confidence."""
    if tapped.labels is None or tapped.confidence is None:
        return {}
    return confidence_summary(tapped.labels, tapped.confidence, classes)


def _details(error: Any) -> str:
    code = error.code().name if hasattr(error, "code") and error.code() else type(error).__name__
    return f"{code}: {error.details() if hasattr(error, 'details') else error}"


def _versions(repository: Any, model: str) -> list[int]:
    return list(repository.versions(model)) if model in repository.models() else []


def _adaptation(result: RoundResult) -> dict[str, Any]:
    """What the engine's manifest says of the round."""
    report = result.report
    keys = ("round", "chosen", "source_free", "frames", "config", "stages", "distance", "torch", "threads")
    return {
        **{key: report[key] for key in keys if key in report},
        "measures": {k: report[f"{k}_measures"] for k in ("parent", "reference", "candidate")},
    }


def _versions_in(repository: Path, model: str) -> list[int]:
    """Without making the directory of a mistyped path."""
    from runtime.repository import Repository

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


def build_version(
    pack: Any, repository: Path, model: str, adaptation: dict[str, Any], gate: dict[str, Any]
) -> int:
    """`export.build.build`, and the number of the version it made."""
    from export.build import build

    return int(build(pack, repository, model=model, adaptation=adaptation, gate=gate).version)


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
        "--source-free", action="store_true", help="leave the pack's labelled source frames unused"
    )
    p.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (1)")
    p.add_argument("--nice", type=int, default=10, metavar="N", help="politeness, 0 to 19 (10)")
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
    return preset(arguments.preset, **told)


def main(argv: list[str] | None = None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.threads < 1 or arguments.frames < 1:
        command.error("--threads and --frames must be 1 or more")
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 0 if not arguments.once else 1
    except (LoopError, RoundError, StoreError, ValueError, FloatingPointError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path and its permissions"
        print(f"adapt.run: {' '.join(text.split())}", file=sys.stderr)
        return 1


def _main(arguments: argparse.Namespace) -> int:
    os.nice(max(0, min(arguments.nice, 19)))
    import signal

    import torch

    from networks.pack import load_pack
    from runtime.client import Client

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(arguments.threads)
    config = LoopConfig(
        model=arguments.model, frames=arguments.frames, max_fps=arguments.max_fps, source=arguments.source,
        wait=arguments.wait, patience=arguments.patience, max_bytes=arguments.max_bytes, near=arguments.near,
        round=round_config(arguments),
    )  # fmt: skip
    pack = load_pack(arguments.pack)
    if not _versions_in(Path(arguments.repository), arguments.model):
        raise LoopError(
            f"repository {arguments.repository!r} holds no version of {arguments.model!r}: give the one that "
            "the server serves, or publish the pack with export.build first"
        )
    client = Client(arguments.server)
    with Bars(quiet=arguments.quiet) as bars:
        loop = Loop(
            client, pack, Path(arguments.repository), Path(arguments.workdir), config, progress=bars
        )  # fmt: skip
        if loop.state["phase"] == "collect":  # a round that was begun needs no server until it submits
            _greet(client, arguments.server, max(FIRST_CONTACT, arguments.wait))
        while True:
            report = loop.once()
            if arguments.json:
                print(json.dumps(report), flush=True)
            else:
                print(
                    f"round {report['round']}: {report['state']} {report.get('reason', '')}".rstrip(),
                    flush=True,
                )
            if arguments.once:
                return 0 if report["state"] == "LIVE" else 1


if __name__ == "__main__":
    sys.exit(main())
