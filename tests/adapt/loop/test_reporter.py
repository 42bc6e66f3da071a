"""Reports to the server: seldom, complete, and never the end of the loop."""

from __future__ import annotations

from types import SimpleNamespace

from adapt.loop.budget import Budget
from adapt.loop.outcome import Decision, Outcome
from adapt.loop.reporter import Reporter
from adapt.loop.state import Phase
from tests.adapt.loop.toys import Clock, PlayedChannel, captured, pool_of, tools


def reporter_of(tmp_path, clock, **settings):
    config, state, pool = pool_of(tmp_path / "work", clock, **settings)
    for number in range(7):
        pool.add(captured(200 + number))
    collector = SimpleNamespace(seen=9, lost=1, refused={"near": 2})
    meter = SimpleNamespace(spent=lambda: {"seconds": 3.0, "steps": 4, "memory": 5.0})
    channel = PlayedChannel()
    made = Reporter(
        channel, config, tools(clock), state, collector=collector, pool=pool, meter=meter, classes=["a", "b"]
    )
    return made, channel, state, pool


def test_a_phase_is_reported_once_a_second_and_a_new_one_at_once(tmp_path):
    clock = Clock()
    reporter, channel, _, _ = reporter_of(tmp_path, clock)
    for _ in range(5):
        clock.now += 0.3
        reporter.report("collect")
    assert len(channel.reports) == 2
    reporter.report("waiting", note="not parked", paused="not parked")
    assert (reporter.phase, channel.reports[-1]["budget"]["paused"]) == ("waiting", "not parked")
    reporter.report("waiting", force=True)
    assert len(channel.reports) == 4


def test_what_was_collected_and_spent_is_in_every_report(tmp_path):
    reporter, channel, _, pool = reporter_of(tmp_path, Clock(), budget=Budget(seconds=60.0))
    reporter.report("collect")
    report = channel.reports[-1]
    assert report["progress"] == 0.5
    collection = report["collection"]
    assert (collection["on"], collection["seen"], collection["kept"], collection["dropped"]) == (
        True,
        9,
        7,
        3,
    )
    assert (report["budget"]["seconds"], report["budget"]["seconds_limit"]) == (3.0, 60.0)
    pool.store.close()
    reporter.report("collect", force=True)
    assert "kept" not in channel.reports[-1]["collection"]


def test_the_round_is_reported_with_its_labels_if_its_record_can_be_read(tmp_path):
    reporter, channel, state, _ = reporter_of(tmp_path, Clock())
    state.enter(Phase.ROUND, frames=[1, 2], trigger="drift")
    reporter.report("round", stage="train 1", done=1, total=4, numbers={"loss": 0.5})
    assert channel.reports[-1]["round"] == {
        "round": 1,
        "stage": "train 1",
        "step": 1,
        "of": 4,
        "trigger": "drift",
        "progress": 0.25,
        "loss": 0.5,
    }
    assert "pseudo_labels" not in channel.reports[-1]
    state.folder.mkdir()
    (state.folder / "state.json").write_text(
        '{"stages": {"label-1": {"labelled": 0.4, "predicted_share": [1, 0], "share": [0.9, 0.1],'
        ' "lambda": [0.5, 0.6]}}}'
    )
    reporter.report("round", stage="train 2", done=1, total=4)
    labels = channel.reports[-1]["pseudo_labels"]
    assert (labels["labelled"], labels["frames"]) == (0.4, 2)
    assert labels["classes"][1] == {"name": "b", "predicted": 0, "labelled": 0.1, "threshold": 0.6}
    channel.listening = False
    reporter.report("round", stage="train 3")
    assert "pseudo_labels" not in channel.reports[-1]


def test_the_end_of_a_round_is_reported_with_its_reason(tmp_path):
    reporter, channel, _, _ = reporter_of(tmp_path, Clock())
    reporter.report_end(3, Outcome(Decision.REJECTED, "x" * 900), 7)
    last = channel.reports[-2]["last"]
    assert (last["round"], last["state"], last["version"], len(last["reason"])) == (3, "REJECTED", 7, 500)
