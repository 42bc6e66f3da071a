"""Handles the commands that operators send through the server: start or cancel a round, switch collection.

Knows what each command means; knows nothing of the connection that brings it.
"""

from __future__ import annotations

from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.frame_pool import FramePool
from adapt.loop.permit import Permit
from adapt.loop.reporter import Reporter
from adapt.loop.server_channel import Command, NullChannel
from adapt.loop.state import LoopState, Phase
from adapt.loop.trigger import Trigger
from adapt.round import RoundPaused

__all__ = ["Commands", "RoundCancelled"]


class RoundCancelled(RoundPaused):
    """A command cancelled the round that runs."""


class Commands:
    """Commands of one channel to the server, answered between two pieces of work."""

    def __init__(
        self,
        channel: NullChannel,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        pool: FramePool,
        trigger: Trigger,
        permit: Permit,
        reporter: Reporter,
    ) -> None:
        self._channel, self._config, self._tools, self._state = channel, config, tools, state
        self._pool, self._trigger, self._permit, self._reporter = pool, trigger, permit, reporter

    def poll(self, *, running: bool) -> None:
        """Answer the commands that came.  running: a round is under way.  Raises RoundCancelled."""
        replaced = self._channel.replaced
        if replaced and replaced != self._state.get("replaced_said"):
            self._tools.log(replaced)
            self._state.note(replaced_said=replaced)
        for command in self._channel.poll():
            self._handle(command, running)

    def wait_polling(self, seconds: float, *, running: bool) -> None:
        """Wait, and answer commands meanwhile.  Raises RoundCancelled."""
        until = self._tools.clock() + seconds
        while (left := until - self._tools.clock()) > 0:
            self.poll(running=running)
            self._tools.sleep(min(left, 0.25))

    def _handle(self, command: Command, running: bool) -> None:
        if command.kind == "set_collection":
            self._state.update(collecting=bool(command.values.get("on", False)))
            self._channel.answer(command, True)
            self._reporter.report(self._reporter.phase or "collect", force=True)
        elif command.kind == "start_round":
            self._start_round(command, running)
        elif command.kind == "cancel_round":
            self._cancel_round(command)
        else:
            self._channel.answer(command, False, f"this adapter does not know {command.kind!r}")

    def _start_round(self, command: Command, running: bool) -> None:
        config, state = self._config, self._state
        most = max((len(rows) for rows in self._pool.unused_by_camera()), default=0)
        if running or state.phase is not Phase.COLLECT:
            self._channel.answer(command, False, f"round {state.round} is under way")
        elif "command" not in config.on:
            self._channel.answer(command, False, "this adapter begins no round on command (--on)")
        elif most < config.enough:
            few = f"{most} new frames of one camera, {config.enough} are needed"
            self._channel.answer(command, False, few)
        else:
            self._trigger.manual = str(command.values.get("reason", "")) or "no reason given"
            blocked = self._permit.blocked_reason()
            self._channel.answer(command, True, f"it waits: {blocked}" if blocked else "")

    def _cancel_round(self, command: Command) -> None:
        if self._state.phase is not Phase.ROUND:
            self._channel.answer(command, False, f"no round is running (phase {self._state.phase})")
            return
        self._channel.answer(command, True)
        self._state.update(cancelled=True)
        raise RoundCancelled("cancelled by command")
