"""A loop that waits for frames says for what, not too often."""

from __future__ import annotations

from adapt.loop import Loop, LoopConfig
from adapt.loop.waiting import Waiting, words
from adapt.sources import Captured
from tests.adapt.conftest import toy_scene
from tests.adapt.loop.toys import Clock


def test_a_line_comes_at_once_then_as_things_change_then_seldom():
    clock, said = Clock(), []
    waiting = Waiting(said.append, clock)
    for second in range(200):
        clock.now = float(second)
        waiting("none" if second >= 40 else f"{second} seen")
    assert said == ["0 seen", "10 seen", "20 seen", "30 seen", "none", "none", "none"]
    waiting.begin()
    waiting("none")
    assert len(said) == 8


def told(**more) -> str:
    return words(
        **{
            "model": "road",
            "seen": 0,
            "kept": 0,
            "wanted": 60,
            "refused": {},
            "starts": ("frames",),
            "held": "",
            "reason": "nothing was sent",
            **more,
        }
    )


def test_the_line_names_frames_seen_kept_and_wanted_and_what_is_in_the_way():
    assert told() == (
        "waiting for frames of 'road': 0 frames seen, 0 of 60 kept; none comes (nothing was sent): send "
        "frames to the server, e.g. with python -m adapt.send"
    )
    line = told(seen=50, kept=7, refused={"near": 40, "age": 3})
    assert line == "waiting for frames of 'road': 50 frames seen, 7 of 60 kept (left out: 40 near, 3 age)"
    assert "then for drift or command" in told(starts=("drift", "command"))
    held = told(kept=60, held="not parked")
    assert held == "waiting: 60 frames are kept, a round may not begin: not parked"


class Slow:
    """A camera that sends a frame every twelve seconds of the clock, five in all."""

    reason = "nothing was sent"

    def __init__(self, clock: Clock) -> None:
        self.clock, self.sent = clock, 0
        self.finished = False

    def get(self, timeout: float) -> Captured | None:
        self.clock.now += timeout
        if self.clock.now < 12.0 * (self.sent + 1):
            return None
        self.sent += 1
        return Captured(toy_scene(300 + self.sent, dark=True)[0], self.clock.now, "front")

    def close(self) -> None: ...


def collected(toy_pack, path, **more) -> tuple[list[str], Loop]:
    clock, said = Clock(), []
    loop = Loop(
        None,
        toy_pack,
        path / "repo",
        path / "work",
        LoopConfig("road", frames=3, near=0),
        progress=lambda *a, **k: None,
        say=said.append,
        source=Slow(clock),
        clock=clock,
        sleep=clock.sleep,
        **more,
    )
    loop.collect()
    loop.close()
    return said, loop


def test_the_loop_counts_while_it_collects(toy_pack, tmp_path):
    said, _ = collected(toy_pack, tmp_path / "a")
    assert said[0].startswith("waiting for frames of 'road': 0 frames seen, 0 of 3 kept; none comes")
    assert [line for line in said if "1 frames seen, 1 of 3 kept" in line]
    assert len(said) <= 5
    assert collected(toy_pack, tmp_path / "b", quiet=True)[0] == []
