"""What a request says of its frame being kept, all the way to whoever keeps frames."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.client import Client
from runtime.config import TapConfig
from runtime.serving.request import permission
from runtime.serving.tap import Observation, Tap
from tests.runtime import builders as b

BLANK = np.zeros((1, 4, 4, 3), np.uint8)


def passed(collect: bool | None, *, opt_in: bool) -> bool:
    tap = Tap(TapConfig(opt_in=opt_in))
    subscription = tap.subscribe("road")
    tap(Observation("road", 1, "", BLANK, {"labels": BLANK[..., 0]}, 0.0, collect))
    subscription.close()
    return bool(subscription._queue)


def test_no_is_no_and_silence_is_what_the_policy_says():
    assert [passed(c, opt_in=False) for c in (None, True, False)] == [True, True, False]
    assert [passed(c, opt_in=True) for c in (None, True, False)] == [False, True, False]


@pytest.mark.parametrize(
    ("parameters", "collect", "place"),
    [
        ({}, None, None),
        ({"collect": True}, True, None),
        ({"collect": False}, False, None),
        ({"collect": "yes"}, False, None),  # not understood: not kept
        ({"collect": 1}, False, None),
        ({"latitude": 48.1, "longitude": 11}, None, (48.1, 11.0)),
        ({"latitude": "48.1", "longitude": "11.5"}, None, (48.1, 11.5)),
        ({"latitude": "north", "longitude": 1.0}, None, None),
        ({"latitude": float("nan"), "longitude": 1.0}, None, None),
        ({"latitude": 1.0}, None, None),
        ({"latitude": 10**400, "longitude": 1}, None, None),
    ],
)
def test_parameters_of_a_request(parameters, collect, place):
    assert permission(parameters) == (collect, place)


def test_over_the_wire(repository, quick, serve):
    """Sent by the client, seen by a subscriber; a frame that says no is answered and not seen."""
    b.publish(repository)
    frame, _ = b.blocks(np.random.default_rng(0))
    with Client(serve(quick).target) as client, client.frames("road") as stream:
        assert client.infer("road", frame, source="hidden", collect=False).labels is not None
        client.infer("road", frame, source="front", collect=True, place=(48.137, 11.575))
        client.infer("road", frame, source="rear")
        first, second = next(stream), next(stream)
    assert (first.source, first.collect, first.place) == ("front", True, (48.137, 11.575))
    assert (second.source, second.collect, second.place) == ("rear", None, None)
