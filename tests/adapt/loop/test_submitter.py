"""Submissions: followed to the decision, repeated while the server is away, and known again after a kill."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import pytest

from adapt.loop import EdgeMember, LoopConfig
from adapt.loop.outcome import Decision, Outcome
from adapt.loop.state import LoopState, Phase
from adapt.loop.submitter import Submitter
from runtime.client import Rejected
from runtime.repository.repository import Repository
from tests.adapt.loop.toys import Clock, tools
from tests.runtime import builders

PACK = "a" * 64


def event(state, check="", reason="", **more):
    return SimpleNamespace(time=0.0, state=state, check=check, reason=reason, version=2, **more)


def away():
    error = grpc.RpcError()
    error.code = lambda: grpc.StatusCode.UNAVAILABLE
    error.details = lambda: "gone"
    raise error


def submitter(tmp_path, client, **more):
    log, clock = [], Clock()
    state = LoopState(tmp_path / "work", PACK)
    state.enter(Phase.SUBMIT, version=2, members={"road": 2})
    settings = {key: more.pop(key) for key in ("keep_versions", "swap_timeout") if key in more}
    config = LoopConfig("road", **settings)
    made = Submitter(client, tmp_path / "repo", PACK, config, tools(clock, log=log.append), state, **more)
    return made, state, log


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([event("SUBMITTED"), event("LIVE")], Outcome(Decision.LIVE)),
        ([event("REJECTED", "golden", "differs")], Outcome(Decision.REJECTED, "golden differs")),
        (
            [event("SUBMITTED")],
            Outcome(Decision.UNKNOWN, "the server ended the stream without a decision"),
        ),
        (
            [event("LIVE", model="edges"), event("REJECTED", "x", model="edges")],
            Outcome(Decision.REJECTED, "x"),
        ),
    ],
)
def test_events_are_followed_to_the_decision_about_the_model(tmp_path, events, outcome):
    made, _, log = submitter(tmp_path, None)
    submission = made.follow(lambda: iter(events))
    assert submission.outcome == outcome
    assert [e["state"] for e in submission.events] == [e.state for e in events]
    assert len(log) == len(events)


def test_a_server_that_is_away_is_asked_again_and_commands_are_answered_meanwhile(tmp_path):
    polls, tries = [], []

    def submit(model, version):
        tries.append(version)
        if len(tries) == 1:
            away()
        if len(tries) == 2:
            raise Rejected("starts", "UNAVAILABLE")
        yield event("LIVE")

    made, _, log = submitter(tmp_path, SimpleNamespace(submit=submit), poll=lambda: polls.append(1))
    submission = made.submit()
    assert submission.outcome.decision is Decision.LIVE
    assert (tries, len(polls)) == ([2, 2, 2], 2)
    assert log[:2] == ["submit: UNAVAILABLE: gone; trying again", "submit: starts; trying again"]


def test_a_refusal_is_a_decision_and_time_that_runs_out_is_none(tmp_path):
    def submit(model, version):
        raise Rejected("needs the role adapt", "PERMISSION_DENIED")
        yield

    made, *_ = submitter(tmp_path / "a", SimpleNamespace(submit=submit))
    assert made.submit().outcome == Outcome(Decision.REJECTED, "needs the role adapt")
    never, *_ = submitter(tmp_path / "b", None, swap_timeout=0.0)
    assert never.submit().outcome.decision is Decision.UNKNOWN


def test_edges_are_submitted_with_the_model_as_a_group(tmp_path):
    asked = []

    def submit_group(group, members):
        asked.append((group, members))
        yield event("LIVE", model="edges")
        yield event("LIVE", model="road")

    member = EdgeMember(None, "edges", "both")
    made, state, _ = submitter(tmp_path, SimpleNamespace(submit_group=submit_group), edges=member)
    state.update(members={"road": 2, "edges": 5})
    assert made.submit().outcome.decision is Decision.LIVE
    assert asked == [("both", {"road": 2, "edges": 5})]


def test_which_version_answers_is_read_from_the_repository(tmp_path):
    made, state, _ = submitter(tmp_path, None)
    assert made.answering_version() == 0, "an empty repository: what was known before"
    repository = Repository(tmp_path / "repo")
    for pack in ({"sha256": PACK}, {"sha256": "b" * 64, "parent": PACK}, {"sha256": "c" * 64}):
        builders.publish(repository, model=b"x", foreign=True, pack=pack)
    found = {}
    for live in (1, 2, 3):
        repository.set_live("road", {"live": live})
        found[live] = made.answering_version()
    assert found == {1: 0, 2: 2, 3: None}
    state.update(answers=3)
    assert made.answering_version() == 3


def test_a_version_that_was_live_or_rejected_before_a_kill_is_not_submitted_again(tmp_path):
    made, _, _ = submitter(tmp_path, None)
    repository = Repository(tmp_path / "repo")
    for _ in range(2):
        builders.publish(repository, model=b"x", foreign=True)
    repository.set_live("road", {"live": 2})
    assert made.submit().outcome == Outcome(Decision.LIVE, "was live already")


def test_old_versions_are_pruned_if_the_config_says_so(tmp_path):
    asked = []

    def prune(model, keep):
        asked.append((model, keep))
        if model == "edges":
            raise Rejected("no", "PERMISSION_DENIED")
        return {"deleted": [1, 3]}

    made, _, log = submitter(tmp_path / "a", SimpleNamespace(prune=prune), keep_versions=4)
    assert made.prune_versions(["road", "edges"]) == [1, 3]
    assert asked == [("road", 4), ("edges", 4)]
    assert log[0].startswith("old versions of edges stay: ")
    keeps_all, *_ = submitter(tmp_path / "b", SimpleNamespace(prune=prune))
    assert keeps_all.prune_versions(["road"]) == []
