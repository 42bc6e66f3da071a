"""What work may spend: counted over restarts, clocks that jump, and counters that wrap."""

from __future__ import annotations

import pytest

from adapt.loop.budget import Budget, BudgetError, EnergyMeter, Meter
from tests.adapt.loop.toys import Clock


def test_pauses_of_the_throttle_are_no_work(tmp_path):
    clock = Clock()
    energy = EnergyMeter(tmp_path, nvml=False)
    meter = Meter(Budget(seconds=5.0), tmp_path / "budget.json", clock=clock, energy=energy)
    meter.start()
    for _ in range(4):
        clock.now += 1.0 + 20.0
        meter.rested(20.0)
    assert not meter.exceeded()
    assert meter.spent()["seconds"] == pytest.approx(4.0)


def test_a_budget_lasts_over_restarts_and_is_full_after_its_period(tmp_path):
    wall, clock = Clock(), Clock()
    wall.now = 1000.0

    def meter() -> Meter:
        limits = Budget(seconds=10.0, steps=3, period=100.0)
        return Meter(
            limits, tmp_path / "budget.json", wall=wall, clock=clock, energy=EnergyMeter(tmp_path, nvml=False)
        )

    one = meter()
    one.start()
    clock.now += 7
    assert one.exceeded() == ""
    one.stop()
    two = meter()
    two.start()
    clock.now += 4
    assert "11 of 10 s" in two.exceeded()
    two.stop()
    wall.now -= 500  # the clock jumps back: nothing is given
    assert meter().exceeded()
    wall.now += 99
    assert meter().exceeded()
    three = meter()
    three.save()
    wall.now += 101
    assert meter().exceeded() == ""
    (tmp_path / "budget.json").write_text("{")
    assert meter().exceeded(), "what was spent is not known: the period counts as spent"
    with pytest.raises(BudgetError, match="is damaged"):
        Meter(Budget(seconds=1.0), tmp_path / "budget.json", energy=EnergyMeter(tmp_path, nvml=False))
    with pytest.raises(BudgetError, match="seconds is -1"):
        Budget(seconds=-1)


def test_energy_is_read_from_powercap_over_its_wrap(tmp_path):
    for zone, value in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 0), ("other", 1)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(str(value * 1_000_000))
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000000")
    meter = EnergyMeter(tmp_path, nvml=False)
    assert meter.readable
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50000000")  # 1000 J is nought again
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("25000000")
    assert meter.joules() == pytest.approx(150 + 25)
    counted = Meter(Budget(joules=100.0), tmp_path / "b.json", energy=meter)
    counted.start()
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("130000000")
    assert "105 of 100 J" in counted.exceeded()
    with pytest.raises(BudgetError, match="joules cannot be limited"):
        Meter(Budget(joules=1.0), tmp_path / "c.json", energy=EnergyMeter(tmp_path / "none", nvml=False))
