"""Which road it is, by the statistics that a network sees: the distance against its definition, and the
decisions on rendered streets.
"""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import pytest
import torch

from adapt.data.street import scenes
from adapt.loop.domain_memory import RELEASED, Look, Probe, Response, RoadConfig, distance
from networks.pack import load_pack, normalise


@pytest.fixture(scope="module")
def pack():
    return load_pack("packs/street-day")


@pytest.fixture(scope="module")
def probe(pack):
    return Probe(pack)


@functools.cache
def drive(domain: str, seed: int, n: int = 12):
    """Frames of three streets, at the pack's size."""
    each = [list(scenes.drive(seed + k, domain, n // 3, (128, 256), step=2.0)) for k in range(3)]
    return [frame for part in each for frame, _ in part]


def test_the_distance_is_bhattacharyyas_of_normal_distributions():
    """Against −ln ∫√(pq) by quadrature."""
    rng = np.random.default_rng(0)
    x = np.linspace(-60, 60, 400_001)
    expected, parts = [], []
    for _ in range(5):
        (m, n), (v, w) = rng.normal(0, 2, 2), rng.uniform(0.2, 4, 2)
        p = np.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
        q = np.exp(-((x - n) ** 2) / (2 * w)) / math.sqrt(2 * math.pi * w)
        expected.append(-math.log(np.trapezoid(np.sqrt(p * q), x)))
        parts.append((m, n, v, w))
    m, n, v, w = (np.array(row, np.float32) for row in zip(*parts, strict=True))
    widths = (2, 3)
    found = distance(Look(m, v, widths), Look(n, w, widths))
    assert found == pytest.approx((np.mean(expected[:2]) + np.mean(expected[2:])) / 2, rel=1e-3)
    assert distance(Look(m, v, widths), Look(m, v, widths)) == pytest.approx(0.0, abs=1e-6)
    assert distance(Look(m, v, widths), Look(m[:2], v[:2], (2,))) == math.inf


def test_looks_of_two_halves_join_to_the_look_of_all(probe):
    frames = drive("day", 40)
    whole, halves = probe.look(frames), probe.look(frames[:6]).joined(probe.look(frames[6:]))
    np.testing.assert_allclose(halves.mean, whole.mean, atol=1e-4)
    np.testing.assert_allclose(halves.variance, whole.variance, rtol=1e-3, atol=1e-4)
    assert probe.all_of(iter(frames), chunk=4).frames == 12


def test_a_look_is_what_the_first_batch_normalisation_sees(pack, probe):
    frames = np.stack(drive("dusk", 41)[:4])
    network = pack.network().eval()
    first = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    caught = []
    first.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        network(normalise(torch.from_numpy(frames), pack.spec))
    look = probe.look(list(frames))
    width = look.widths[0]
    np.testing.assert_allclose(look.mean[:width], caught[0].mean((0, 2, 3)).numpy(), atol=1e-4)
    np.testing.assert_allclose(
        look.variance[:width], caught[0].var((0, 2, 3), unbiased=False).numpy(), rtol=1e-3, atol=1e-5
    )


def test_of_large_frames_strips_by_turns_are_looked_at(probe, monkeypatch):
    """Frames that have one value a quarter: each look must meet all of them, and no other."""
    monkeypatch.setattr("adapt.loop.domain_memory.PIXELS", 128 * 256 // 4)
    seen = []
    monkeypatch.setattr(probe, "_run", lambda frames: seen.append(frames))
    frame = np.repeat(np.arange(4, dtype=np.uint8), 64)[None, :, None] * np.ones((128, 1, 3), np.uint8)
    probe._seen = []
    with contextlib.suppress(ValueError):  # nothing was seen: there is nothing to give back
        probe.look([frame] * 6, first=3)
    assert seen[0].shape == (6, 128, 64, 3)
    assert (
        [int(part.min()) for part in seen[0]] == [int(part.max()) for part in seen[0]] == [3, 0, 1, 2, 3, 0]
    )


def feed(response: Response, frames, live: int, source: str = "front"):
    """The last action that was not to stay, or None."""
    found = None
    for frame in frames:
        action = response.offer(frame, live, source)
        if action is not None and action.kind != "stay":
            found = action
    return found


def test_a_road_that_changes_is_noticed_known_again_and_left_again(probe, tmp_path):
    response = Response(probe, RoadConfig(), tmp_path / "roads.npz")
    assert feed(response, drive("day", 50, 24), RELEASED) is None
    fog = drive("fog", 60, 24)
    action = feed(response, fog, RELEASED)
    assert action.kind == "refresh"
    response.learn(1, probe.all_of(fog), "front")
    assert feed(response, drive("fog", 63, 12), 1) is None
    action = feed(response, drive("day", 53, 12), 1)
    assert (action.kind, action.version) == ("back", RELEASED)
    response.start_again()
    action = feed(response, drive("fog", 66, 12), RELEASED)
    assert (action.kind, action.version) == ("back", 1)
    again = Response(probe, RoadConfig(), tmp_path / "roads.npz")
    action = feed(again, drive("fog", 66, 12), RELEASED)
    assert (action.kind, action.version) == ("back", 1), "the roads were kept over a restart"
    again.forget(1)
    assert feed(again, drive("fog", 69, 12), RELEASED).kind == "refresh"


def test_one_look_alone_decides_nothing(probe):
    response = Response(probe, RoadConfig(frames=6, agree=2))
    assert feed(response, drive("fog", 60, 12)[:6], RELEASED) is None
    assert feed(response, drive("day", 50, 12)[:6], RELEASED) is None
    assert feed(response, drive("fog", 60, 12)[6:], RELEASED) is None


def test_the_camera_that_a_version_was_adapted_to_decides(probe):
    response = Response(probe)
    response.learn(1, probe.all_of(drive("fog", 60)), "front")
    assert feed(response, drive("day", 50), 1, "rear") is None
    assert feed(response, drive("day", 50), 1, "front").kind == "back"


def test_a_refused_refresh_is_not_tried_again_on_the_same_road(probe):
    fog = drive("fog", 60)
    response = Response(probe)
    assert response.refreshed(None, ["changed"], 3, probe.all_of(fog), "front") == RELEASED
    assert feed(response, fog, RELEASED) is None
    response = Response(probe)
    response.learn(3, probe.all_of(drive("night", 70)), "front")
    assert response.refreshed(None, ["flip-parent"], 3, probe.all_of(fog), "front") == 3
    assert feed(response, fog, 3) is None


def test_roads_are_bounded_and_those_not_seen_for_longest_go(probe):
    response = Response(probe, RoadConfig(known=2))
    base = probe.released()
    for version in (1, 2, 3):
        response.learn(version, Look(base.mean + 3 * version, base.variance, base.widths, 6), "front")
    assert response.versions() == {2, 3}


def test_names_of_cameras_without_end_hold_no_memory(probe):
    response = Response(probe)
    frame = drive("day", 50)[0]
    for i in range(100):
        response.offer(frame, RELEASED, f"camera {i}")
    assert len(response._frames) <= 17


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x00" * 400])
def test_a_damaged_library_is_begun_afresh(probe, tmp_path, content):
    file = tmp_path / "roads.npz"
    file.write_bytes(content)
    response = Response(probe, RoadConfig(), file)
    assert response.roads == []
    response.learn(1, probe.released(), "front")
    assert Response(probe, RoadConfig(), file).versions() == {1}


def test_a_network_without_batch_normalisation_says_so(pack, monkeypatch):
    monkeypatch.setattr(type(pack), "network", lambda self: torch.nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="no batch normalisation"):
        Probe(pack)
