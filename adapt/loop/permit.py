"""Whether work is permitted now: the vehicle's conditions, the budget, the memory.

Knows neither frames nor the server.
"""

from __future__ import annotations

from adapt.loop.budget import Meter
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.state import LoopState
from adapt.loop.vehicle import Vehicle
from adapt.round import RoundPaused

__all__ = ["Permit"]

CHECK_SECONDS = 2.0  # between two checks of vehicle, budget and memory during a round


class Permit:
    """Permission to work.

    Args:
        vehicle: reports whether the vehicle can spare anything; None if nothing is asked of it.
    """

    def __init__(
        self, config: LoopConfig, tools: LoopTools, state: LoopState, meter: Meter, vehicle: Vehicle | None
    ) -> None:
        self.meter = meter
        self._config, self._tools, self._state, self._vehicle = config, tools, state, vehicle
        self._checked_at = -float("inf")

    def blocked_reason(self, *, refresh: bool | None = None) -> str:
        """Return why no work is permitted now, or "".

        refresh: the work is a refresh of batch statistics; None = if the round that runs is one.
        """
        if refresh is None:
            refresh = self._state.is_refresh
        if refresh and self._config.refresh_driving:
            return self.meter.exceeded()
        return self._config.conditions.refuses(self._vehicle) or self.meter.exceeded()

    def is_budget_spent(self) -> bool:
        return bool(self.meter.exceeded())

    def begin(self) -> None:
        """Count work from now on.  Call `end` when it pauses or is done."""
        self.meter.start()
        self._checked_at = self._tools.clock()

    def end(self) -> None:
        self.meter.stop()

    def check(self, *, after_step: bool, is_last: bool) -> None:
        """Check the permission after a piece of work: after every training step, else every few seconds.

        Raises RoundPaused if work is not permitted any more and this was not the last piece of its stage.
        """
        now = self._tools.clock()
        if not after_step and now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        reason = self.blocked_reason() or self.meter.memory_exceeded()
        if reason and not is_last:
            raise RoundPaused(reason)
