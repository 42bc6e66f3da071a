from __future__ import annotations

import itertools

import numpy as np
import pytest

from adapt.data.street import scenes
from networks.labels import STREET

SMALL = (64, 128)


def test_the_classes_are_those_of_the_label_space() -> None:
    assert STREET.classes == scenes.CLASSES


@pytest.mark.parametrize("domain", scenes.DOMAINS)
def test_a_seed_gives_the_same_bytes_again(domain: str) -> None:
    frame, label = scenes.render(3, domain, SMALL)
    again, label_again = scenes.render(3, domain, SMALL)
    assert frame.dtype == np.uint8
    assert frame.shape == (*SMALL, 3)
    assert label.dtype == np.uint8
    assert label.shape == SMALL
    assert frame.tobytes() == again.tobytes()
    assert label.tobytes() == label_again.tobytes()


def test_another_seed_gives_another_street() -> None:
    labels = {scenes.render(seed, "day", SMALL)[1].tobytes() for seed in range(12)}
    assert len(labels) == 12


def test_labels_are_valid_and_every_class_occurs() -> None:
    pixels = np.zeros(256, np.int64)
    pictures_with = np.zeros(len(scenes.CLASSES), np.int64)
    for seed in range(40):
        label = scenes.render(seed, "day", SMALL)[1]
        pixels += np.bincount(label.ravel(), minlength=256)
        pictures_with[np.unique(label)] += 1
    assert pixels[len(scenes.CLASSES) :].sum() == 0
    assert pictures_with.min() >= 5, dict(zip(scenes.CLASSES, pictures_with.tolist(), strict=True))


def test_domains_share_the_labels_of_a_seed_except_another_camera() -> None:
    for seed in range(4):
        label = {domain: scenes.render(seed, domain, SMALL)[1] for domain in scenes.DOMAINS}
        for domain in ("dusk", "fog", "night"):
            np.testing.assert_array_equal(label[domain], label["day"])
        assert (label["camera"] != label["day"]).mean() > 0.05


def test_domains_look_different() -> None:
    mean = {
        d: np.mean([scenes.render(seed, d, SMALL)[0].mean() for seed in range(6)]) for d in scenes.DOMAINS
    }
    assert mean["night"] < mean["dusk"] < mean["day"] < mean["fog"]


def test_a_drive_begins_at_the_render_and_moves_smoothly() -> None:
    frames = list(scenes.drive(8, "day", 30, SMALL))
    first, label = scenes.render(8, "day", SMALL)
    np.testing.assert_array_equal(frames[0][0], first)
    np.testing.assert_array_equal(frames[0][1], label)
    steps = [(a[1] == b[1]).mean() for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0.75
    # It does move: over three seconds much changes.
    assert (frames[0][1] == frames[-1][1]).mean() < np.mean(steps) - 0.05


def test_a_short_drive_is_the_beginning_of_a_long_one() -> None:
    short = list(scenes.drive(5, "dusk", 4, SMALL))
    long = list(itertools.islice(scenes.drive(5, "dusk", 300, SMALL), 4))
    for a, b in zip(short, long, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_a_long_drive_leaves_the_first_cells_behind() -> None:
    label = np.zeros(0)
    for _, label in scenes.drive(2, "day", 12, SMALL, step=30.0):
        assert (label == scenes.CLASSES.index("road")).mean() > 0.05
    assert label.shape == SMALL


def test_no_road_above_the_horizon_and_no_sky_below_it() -> None:
    ground = [scenes.CLASSES.index(name) for name in ("road", "marking", "pavement", "terrain")]
    for seed in range(20):
        label = scenes.render(seed, "day", SMALL)[1]
        assert not np.isin(label[: SMALL[0] // 4], ground).any()
        assert not (label[3 * SMALL[0] // 4 :] == scenes.CLASSES.index("sky")).any()


def test_colour_alone_does_not_give_the_class_away() -> None:
    """A Gaussian per class in RGB, fitted on 40 streets, must do badly on 20 others."""

    def pixels(seeds: range) -> tuple[np.ndarray, np.ndarray]:
        pairs = [scenes.render(seed, "day", SMALL) for seed in seeds]
        return (
            np.concatenate([frame.reshape(-1, 3) for frame, _ in pairs]).astype(np.float64),
            np.concatenate([label.ravel() for _, label in pairs]),
        )

    colour, label = pixels(range(100, 140))
    score = []
    test_colour, test_label = pixels(range(200, 220))
    for c in range(len(scenes.CLASSES)):
        own = colour[label == c]
        centre, spread = own.mean(0), np.cov(own.T) + np.eye(3)
        delta = test_colour - centre
        distance = np.einsum("ni,ij,nj->n", delta, np.linalg.inv(spread), delta)
        score.append(-0.5 * (distance + np.linalg.slogdet(spread)[1]))
    guess = np.argmax(score, axis=0)
    iou = [
        ((guess == c) & (test_label == c)).sum() / max(1, ((guess == c) | (test_label == c)).sum())
        for c in range(len(scenes.CLASSES))
    ]
    assert np.mean(iou) < 0.30


def test_an_unknown_domain_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'rain' is unknown; choose one of: day"):
        scenes.render(0, "rain")
