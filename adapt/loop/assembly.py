"""Makes the components of a loop from what a program has: a client, a pack, a repository and a folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapt.loop.budget import EnergyMeter, Meter
from adapt.loop.builder import Build, Builder, build_version
from adapt.loop.collector import Collector, Imports
from adapt.loop.commands import Commands
from adapt.loop.config import EdgeMember, LoopConfig, LoopTools
from adapt.loop.domain_response import DomainResponder
from adapt.loop.frame_pool import FramePool
from adapt.loop.loop import AdaptationLoop
from adapt.loop.permit import Permit
from adapt.loop.reporter import Reporter
from adapt.loop.rounds import Rounds
from adapt.loop.server_channel import NullChannel
from adapt.loop.sessions import Sessions
from adapt.loop.state import LoopState
from adapt.loop.submitter import Submitter
from adapt.loop.throttle import Throttle
from adapt.loop.trigger import Trigger
from adapt.loop.vehicle import Vehicle
from adapt.loop.waiting import Waiting
from adapt.sources import Source
from adapt.sources.live import LiveSource
from networks.pack import Pack

__all__ = ["Loop"]


class Loop(AdaptationLoop):
    """A loop with the standard components.

    Args:
        client: a `runtime.client.Client`, or anything with its `frames` and `submit`.
        pack: the released pack that the served model was built from.
        repository: the engine repository of the server.
        workdir: where the loop keeps its state; the same folder continues after a kill.
        progress: called as progress(stage, done, total, **numbers).
        build: (pack, repository, model, adaptation, gate) -> version; None = `build_version`.
        say: takes one line of the log; None = print it to stderr.
        source: where frames come from; None = the tap of the live service.
        imports: files to read in place of `source` (see `adapt.loop.collector.Collector`).
        remote: the channel to the server (`adapt.loop.server_channel`); None = none.
        vehicle: reports whether the vehicle can spare anything.
        throttle: called after each piece of work.
        edges: the pack whose edges follow each round.
        energy: reads joules; None = RAPL and NVML if they can be read.
        once: raise Paused instead of waiting longer than the budget can last.
        quiet: do not log what the loop waits for.
        clock, sleep: the loop's time, in seconds.

    Raises:
        LoopError: another loop works in `workdir`, or the folder belongs to another pack.
        BudgetError, StoreError: the account or the frame store in `workdir` cannot be used.
    """

    def __init__(
        self,
        client: Any,
        pack: Pack,
        repository: Path,
        workdir: Path,
        config: LoopConfig,
        *,
        progress: Callable[..., None],
        build: Build | None = None,
        say: Callable[[str], None] | None = None,
        source: Source | None = None,
        imports: Imports | None = None,
        remote: NullChannel | None = None,
        vehicle: Vehicle | None = None,
        throttle: Throttle | None = None,
        edges: EdgeMember | None = None,
        energy: EnergyMeter | None = None,
        once: bool = False,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        tools = LoopTools(say or _print_line, progress, clock, sleep, once)
        channel = remote or NullChannel()
        classes = pack.spec.classes
        state = LoopState(workdir, pack.sha256)
        try:
            meter = Meter(config.budget, workdir / "budget.json", energy=energy)
            pool = FramePool(config, tools, state, len(classes))
        except BaseException:
            state.close()
            raise
        source = source or LiveSource(
            client, config.model, max_fps=config.max_fps, source=config.source, wait=config.wait
        )
        collector = Collector(source, pool, state, tools, imports=imports)
        trigger = Trigger(client, config, tools, state, pool)
        permit = Permit(config, tools, state, meter, vehicle)
        reporter = Reporter(
            channel, config, tools, state, collector=collector, pool=pool, meter=meter, classes=classes
        )
        commands = Commands(
            channel, config, tools, state, pool=pool, trigger=trigger, permit=permit, reporter=reporter
        )
        sessions = Sessions(
            config,
            tools,
            state,
            pool=pool,
            permit=permit,
            commands=commands,
            reporter=reporter,
            throttle=throttle,
        )
        submitter = Submitter(
            client,
            repository,
            pack.sha256,
            config,
            tools,
            state,
            edges=edges,
            poll=lambda: commands.poll(running=True),
        )
        responder = None
        if config.respond != "off" and imports is None:
            try:
                responder = DomainResponder(
                    pack,
                    config,
                    tools,
                    state,
                    frames=pool,
                    versions=submitter,
                    blocked_reason=lambda: permit.blocked_reason(refresh=True),
                    report=reporter.report,
                )
            except ValueError as error:
                tools.log(f"no response to a change of road: {error}")
        if responder is not None:
            collector.on_kept = responder.observe
            pool.only_current_domain = True
        super().__init__(
            pack=pack.sha256,
            config=config,
            tools=tools,
            state=state,
            pool=pool,
            collector=collector,
            trigger=trigger,
            permit=permit,
            commands=commands,
            rounds=Rounds(pack, config, tools, state, pool=pool, sessions=sessions, edges=edges),
            builder=Builder(repository, config, tools, state, build=build or build_version, edges=edges),
            submitter=submitter,
            reporter=reporter,
            responder=responder,
            waiting=None if quiet else Waiting(tools.log, tools.clock),
        )


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
