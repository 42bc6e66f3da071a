"""Which domain it is: the distance of feature statistics against its definition, decisions on streets."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from adapt.data.street import scenes
from adapt.loop.domain_memory import (
    RELEASED,
    DomainConfig,
    DomainPolicy,
    FeatureProbe,
    FeatureStats,
    distance,
)
from networks.pack import load_pack, normalise


@pytest.fixture(scope="module")
def pack():
    return load_pack("packs/street-day")


@pytest.fixture(scope="module")
def probe(pack):
    return FeatureProbe(pack)


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
    found = distance(FeatureStats(m, v, widths), FeatureStats(n, w, widths))
    assert found == pytest.approx((np.mean(expected[:2]) + np.mean(expected[2:])) / 2, rel=1e-3)
    assert distance(FeatureStats(m, v, widths), FeatureStats(m, v, widths)) == pytest.approx(0.0, abs=1e-6)
    assert distance(FeatureStats(m, v, widths), FeatureStats(m[:2], v[:2], (2,))) == math.inf


def test_statistics_of_two_halves_join_to_those_of_all(probe):
    frames = drive("day", 40)
    whole, halves = probe.measure(frames), probe.measure(frames[:6]).joined(probe.measure(frames[6:]))
    np.testing.assert_allclose(halves.mean, whole.mean, atol=1e-4)
    np.testing.assert_allclose(halves.variance, whole.variance, rtol=1e-3, atol=1e-4)
    assert probe.measure_all(iter(frames), chunk=4).frames == 12


def test_the_statistics_are_of_what_the_first_batch_normalisation_gets(pack, probe):
    frames = np.stack(drive("dusk", 41)[:4])
    network = pack.network().eval()
    first = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    caught = []
    first.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        network(normalise(torch.from_numpy(frames), pack.spec))
    stats = probe.measure(list(frames))
    width = stats.widths[0]
    np.testing.assert_allclose(stats.mean[:width], caught[0].mean((0, 2, 3)).numpy(), atol=1e-4)
    np.testing.assert_allclose(
        stats.variance[:width], caught[0].var((0, 2, 3), unbiased=False).numpy(), rtol=1e-3, atol=1e-5
    )


def test_of_large_frames_one_strip_each_is_measured_in_turn(probe, monkeypatch):
    """Frames that have one value a quarter: each measurement must meet all of them, and no other."""
    monkeypatch.setattr("adapt.loop.domain_memory.PIXELS", 128 * 256 // 4)
    frame = np.repeat(np.arange(4, dtype=np.uint8), 64)[None, :, None] * np.ones((128, 1, 3), np.uint8)
    strips = probe.strips([frame] * 6, first=3)
    assert strips.shape == (6, 128, 64, 3)
    assert [int(part.min()) for part in strips] == [int(part.max()) for part in strips] == [3, 0, 1, 2, 3, 0]


def feed(policy: DomainPolicy, frames, live: int, source: str = "front"):
    """The last action that was not to stay, or None."""
    found = None
    for frame in frames:
        action = policy.offer(frame, live, source)
        if action is not None and action.kind != "stay":
            found = action
    return found


def test_a_road_that_changes_is_noticed_known_again_and_left_again(probe, tmp_path):
    policy = DomainPolicy(probe, DomainConfig(), tmp_path / "roads.npz")
    assert feed(policy, drive("day", 50, 24), RELEASED) is None
    fog = drive("fog", 60, 24)
    action = feed(policy, fog, RELEASED)
    assert action.kind == "refresh"
    policy.learn(1, probe.measure_all(fog), "front")
    assert feed(policy, drive("fog", 63, 12), 1) is None
    action = feed(policy, drive("day", 53, 12), 1)
    assert (action.kind, action.version) == ("back", RELEASED)
    policy.start_again()
    action = feed(policy, drive("fog", 66, 12), RELEASED)
    assert (action.kind, action.version) == ("back", 1)
    again = DomainPolicy(probe, DomainConfig(), tmp_path / "roads.npz")
    action = feed(again, drive("fog", 66, 12), RELEASED)
    assert (action.kind, action.version) == ("back", 1), "the roads were kept over a restart"
    again.forget(1)
    assert feed(again, drive("fog", 69, 12), RELEASED).kind == "refresh"


def test_one_measurement_alone_decides_nothing(probe):
    policy = DomainPolicy(probe, DomainConfig(frames=6, agree=2))
    assert feed(policy, drive("fog", 60, 12)[:6], RELEASED) is None
    assert feed(policy, drive("day", 50, 12)[:6], RELEASED) is None
    assert feed(policy, drive("fog", 60, 12)[6:], RELEASED) is None


def test_the_camera_that_a_version_was_adapted_to_decides(probe):
    policy = DomainPolicy(probe)
    policy.learn(1, probe.measure_all(drive("fog", 60)), "front")
    assert feed(policy, drive("day", 50), 1, "rear") is None
    assert feed(policy, drive("day", 50), 1, "front").kind == "back"


def test_a_refused_refresh_is_not_tried_again_on_the_same_road(probe):
    fog = drive("fog", 60)
    policy = DomainPolicy(probe)
    assert policy.refreshed(None, ["changed"], 3, probe.measure_all(fog), "front") == RELEASED
    assert feed(policy, fog, RELEASED) is None
    policy = DomainPolicy(probe)
    policy.learn(3, probe.measure_all(drive("night", 70)), "front")
    assert policy.refreshed(None, ["flip-parent"], 3, probe.measure_all(fog), "front") == 3
    assert feed(policy, fog, 3) is None


def test_roads_are_bounded_and_those_not_seen_for_longest_go(probe):
    policy = DomainPolicy(probe, DomainConfig(known=2))
    base = probe.released()
    for version in (1, 2, 3):
        policy.learn(version, FeatureStats(base.mean + 3 * version, base.variance, base.widths, 6), "front")
    assert policy.versions() == {2, 3}


def test_names_of_cameras_without_end_hold_no_memory(probe):
    policy = DomainPolicy(probe)
    frame = drive("day", 50)[0]
    for i in range(100):
        policy.offer(frame, RELEASED, f"camera {i}")
    assert policy.cameras <= 17


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x00" * 400])
def test_a_damaged_library_is_begun_afresh(probe, tmp_path, content):
    file = tmp_path / "roads.npz"
    file.write_bytes(content)
    policy = DomainPolicy(probe, DomainConfig(), file)
    assert policy.domains == []
    policy.learn(1, probe.released(), "front")
    assert DomainPolicy(probe, DomainConfig(), file).versions() == {1}


def test_a_network_without_batch_normalisation_says_so(pack, monkeypatch):
    monkeypatch.setattr(type(pack), "network", lambda self: torch.nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="no batch normalisation"):
        FeatureProbe(pack)
