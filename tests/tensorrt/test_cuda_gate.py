"""The gate's promises: a capture is alone, runs and changes go on beside each other, nothing is stuck."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from runtime.engines.cuda.gate import Gate

LONG = 20.0  # seconds that nothing here takes, unless something is stuck


@contextmanager
def holding(enter: Callable[[], object]) -> Iterator[threading.Event]:
    """Another thread is inside `enter()` until the block ends."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with enter():  # type: ignore[attr-defined]
            inside.set()
            leave.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(LONG)
    try:
        yield leave
    finally:
        leave.set()
        thread.join(LONG)
        assert not thread.is_alive()


@pytest.mark.parametrize("one", ["run", "change"])
@pytest.mark.parametrize("other", ["run", "change"])
def test_runs_and_changes_go_on_beside_each_other(one: str, other: str) -> None:
    gate = Gate()
    with holding(getattr(gate, one)), getattr(gate, other)():
        pass


def test_a_capture_waits_for_a_run_and_has_the_device_to_itself() -> None:
    gate = Gate()
    seen: list[str] = []

    def capture() -> None:
        with gate.capture(LONG) as alone:
            seen.append(f"alone {alone}")

    with holding(gate.run):
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        seen.append("the run ends")
    thread.join(LONG)
    assert seen == ["the run ends", "alone True"]


def test_a_capture_does_not_wait_for_a_change_or_for_a_run_that_does_not_end() -> None:
    gate = Gate()
    with holding(gate.change), gate.capture(LONG) as alone:
        assert not alone
    with holding(gate.run), gate.capture(0.01) as alone:
        assert not alone
    with gate.capture(0.0) as alone:
        assert alone


def test_a_run_that_captures_is_a_run_again_afterwards() -> None:
    gate = Gate()
    with gate.run():
        with gate.capture(LONG) as alone:
            assert alone
            with gate.run(), gate.change():  # the thread that is alone may do anything
                pass
        with holding(gate.run):  # others may again
            pass
        # This thread is inside: nobody else can be alone.
        with holding(lambda: gate.capture(0.01)):
            pass
        nobody: list[bool] = []

        def other() -> None:
            with gate.capture(0.01) as alone:
                nobody.append(alone)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(LONG)
        assert nobody == [False]


def test_an_error_inside_leaves_the_gate() -> None:
    gate = Gate()
    for enter in (gate.run, gate.change, gate.capture):
        with pytest.raises(ValueError, match="no"), enter():
            raise ValueError("no")
    with pytest.raises(ValueError, match="no"), gate.run(), gate.capture(LONG):
        raise ValueError("no")
    with holding(gate.run):
        pass
    with gate.capture(LONG) as alone:
        assert alone


def test_many_threads_never_meet_a_capture_and_none_is_stuck() -> None:
    gate = Gate()
    inside: dict[int, str] = {}
    wrong: list[str] = []

    def note(kind: str) -> None:
        me = threading.get_ident()
        inside[me] = kind
        others = [other for thread, other in list(inside.items()) if thread != me]
        if others and (kind == "capture" or "capture" in others):
            wrong.append(f"{kind} beside {others}")

    def work(seed: int) -> None:
        me, dice = threading.get_ident(), random.Random(seed)
        for _ in range(150):
            kind = dice.choice(["run", "run", "change"])
            with getattr(gate, kind)():
                note(kind)
                if kind == "run" and dice.random() < 0.3:
                    del inside[me]
                    with gate.capture(0.002) as alone:
                        if alone:
                            note("capture")
                            del inside[me]
                    note(kind)
                del inside[me]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
