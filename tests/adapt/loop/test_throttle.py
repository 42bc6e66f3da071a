"""The throttle against a server that is played: pauses if it suffers, and work that goes on."""

from __future__ import annotations

import pytest

from adapt.loop.throttle import Throttle, ThrottleConfig


class Served:
    """A server whose answers take `alone` seconds, and `beside` while somebody works; 50 a second."""

    def __init__(self, alone: float, beside: float) -> None:
        self.alone, self.beside, self.now, self.working = alone, beside, 0.0, True
        self.count, self.seconds = 0.0, 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.count += 50 * seconds
        self.seconds += 50 * seconds * (self.beside if self.working else self.alone)

    def sleep(self, seconds: float) -> None:
        self.working = False
        self.pass_(seconds)
        self.working = True

    def counters(self) -> tuple[int, float]:
        return int(self.count), self.seconds


def work(served: Served, pieces: int, config: ThrottleConfig | None = None) -> Throttle:
    throttle = Throttle(
        served.counters, config or ThrottleConfig(), clock=lambda: served.now, sleep=served.sleep
    )
    for _ in range(pieces):
        served.pass_(0.5)
        throttle()
    return throttle


def test_a_server_that_suffers_gets_pauses_but_work_goes_on():
    served = Served(0.010, 0.020)
    throttle = work(served, 400)
    assert throttle.share == pytest.approx(0.1, abs=0.01)
    assert throttle.ratio == pytest.approx(2.0, abs=0.2)
    assert throttle.slept <= 0.92 * served.now, "the least share is kept"


def test_a_server_that_does_not_mind_costs_a_look_now_and_then():
    served = Served(0.010, 0.0105)
    throttle = work(served, 400)
    assert throttle.share == 1.0
    assert throttle.slept < 0.12 * served.now


def test_it_works_more_again_when_the_server_has_recovered():
    served = Served(0.010, 0.020)
    throttle = Throttle(served.counters, clock=lambda: served.now, sleep=served.sleep)
    for i in range(900):
        served.beside = 0.020 if i < 200 else 0.010
        served.pass_(0.5)
        throttle()
    assert throttle.share == 1.0


def test_without_requests_or_without_a_server_nothing_is_known():
    served = Served(0.0, 0.0)
    served.pass_ = lambda seconds: setattr(served, "now", served.now + seconds)  # type: ignore[method-assign]
    assert work(served, 100).share == 1.0

    def away():
        raise ConnectionError

    throttle = Throttle(away, clock=lambda: served.now, sleep=served.sleep)
    throttle()
    assert throttle.share == 1.0
    restarted = Served(0.010, 0.020)
    throttle = Throttle(restarted.counters, clock=lambda: restarted.now, sleep=restarted.sleep)
    restarted.pass_(5)
    throttle()
    restarted.count = restarted.seconds = 0.0
    restarted.pass_(0.5)
    throttle()
    assert throttle.share == 1.0


@pytest.mark.parametrize("wrong", [{"slow": 1.0}, {"least": 0.0}, {"requests": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        ThrottleConfig(**wrong)
