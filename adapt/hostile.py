"""Are these frames of a road at all?  A covered lens, a stuck camera, a patch that never moves, a screen, two
cameras under one name, damaged pictures, a strobe: a round that would learn from them is declined, with the
reason, before any work is done.

Looks at pixels alone: no network, no label, no file.  Every limit stands in `adapt.limits.Limits`; how often
each look declines an attack and how often an honest drive is measured by ``python -m bench.hostile``
(docs/results/gate.md).  What a camera could really have seen (another country, a flooded street) is not this
module's business: that is the domain shift adaptation is there for, and the gate judges what comes of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from adapt.limits import Check, Limits

__all__ = [
    "camera_features", "damaged", "dead_share", "grid_peak", "look", "order", "populations", "static_share",
]  # fmt: skip

WIDTH = 128  # pixels across at which layouts are compared


def look(
    frames: Sequence[np.ndarray], limits: Limits, *, sizes: Sequence[tuple[int, ...]] = ()
) -> list[Check]:
    """All looks at the frames of a round.

    Args:
        frames: uint8 [H,W,3] each, all of one size, in order of time.
        sizes: (H, W) each frame had when it came from its camera, where they were resized since.
    """
    checks: list[Check] = []

    def check(name: str, value: float, limit: float, words: str, *, passed: bool | None = None) -> None:
        fine = value <= limit if passed is None else passed
        checks.append(Check(name, round(float(value), 5), limit, bool(fine), words))

    luma = [f[::4, ::4].astype(np.float32).mean(-1) for f in frames]
    flat = float(np.mean([x.std() < limits.contrast for x in luma]))
    check(
        "frames-contrast", flat, limits.bad_frames,
        f"{100 * flat:.0f}% of the frames show nothing (luma deviation under {limits.contrast:g}): "
        "is the lens covered?",
    )  # fmt: skip
    still = float(np.mean([np.abs(a - b).mean() < limits.motion for a, b in pairwise(luma)] or [0]))
    check(
        "frames-motion", still, limits.bad_frames,
        f"{100 * still:.0f}% of the frames repeat the one before: is the camera stuck?",
    )  # fmt: skip
    counts = Counter(tuple(s[:2]) for s in sizes or [f.shape for f in frames])
    other = 1 - max(counts.values()) / sum(counts.values())
    shapes = ", ".join(f"{w}x{h}: {n}" for (h, w), n in counts.most_common(3))
    check("frames-size", other, 0.0, f"pictures are of {len(counts)} sizes ({shapes}): mixed cameras?")
    wrong = [damaged(f, before, limits) for f, before in zip(frames, [None, *frames[:-1]], strict=True)]
    reasons = Counter(words for words in wrong if words)
    share = sum(reasons.values()) / max(len(frames), 1)
    what = reasons.most_common(1)[0][0] if reasons else "none is half decoded or torn"
    check("frames-damaged", share, limits.damaged, f"{100 * share:.0f}% of the frames are damaged: {what}")
    # What follows compares frames with each other; fewer are no sample, and a vehicle that stands sees one.
    if min(frames[0].shape[:2]) < 32:  # nothing can be told from a thumbnail
        return checks
    views = _views(frames, limits)
    if len(views) < limits.views:
        return checks
    small = np.stack([_small(frames[i]) for i in views])
    stuck = static_share(small.mean(-1), limits)
    check(
        "frames-static", stuck, limits.static,
        f"{100 * stuck:.1f}% of the picture are edges that stay where they are while the rest moves: "
        "a sticker, dirt, or the frame of a screen?",
    )  # fmt: skip
    dead = dead_share(small.mean(-1), limits)
    check(
        "frames-covered", dead, limits.dead,
        f"{100 * dead:.0f}% of the middle of the picture never change: is a part of the lens covered?",
    )  # fmt: skip
    peak = grid_peak([frames[i] for i in views])
    check(
        "frames-grid", peak, limits.grid,
        f"the strongest regular pattern stands {peak:.1f} deviations out of the spectrum: a screen's pixels?",
    )  # fmt: skip
    everything = np.stack([_small(f, 32) for f in frames])
    brightness = everything.mean((1, 2, 3))

    def strong(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(abs(a - b).max() > limits.strobe * max(a.max(), b.max(), 1.0))

    words = "brightness alternates: a strobe?"
    _alternation(check, "frames-strobe", brightness[:, None], limits, words, least=strong)
    words = "two kinds of pictures alternate: two cameras under one name?"
    worst, seen = (0.0, 0.0, 0.0), ""
    for name, feature in camera_features(frames).items():
        apart, minority, mixing, _ = populations(feature[:, None])
        if minority >= limits.minority and mixing >= limits.mixing and apart > worst[0]:
            worst, seen = (apart, minority, mixing), name
    detail = f"{seen}: separation {worst[0]:.2f}, {100 * worst[1]:.0f}% in one group, mixing {worst[2]:.2f}"
    found = worst[0] > limits.apart
    words = f"two kinds of pictures alternate, two cameras under one name? ({detail})"
    if found and order(everything.mean(-1)) > limits.order:
        # Of pictures that were never one after the other nothing can alternate.
        found, words = False, f"single pictures, no drive: not asked whether of one camera ({detail})"
    elif not found:
        words = f"one kind of pictures ({detail})"
    check("frames-sources", worst[0], limits.apart, words, passed=not found)
    return checks


def order(luma: np.ndarray, reach: int = 2) -> float:
    """How much likelier than chance neighbours are alike: about 1 for single pictures, under it for a drive.

    For each picture the distance to the most alike of its neighbours (`reach` on each side, so that cameras
    in turn have one of their own among them), against what as many of all others, drawn at random, would
    come to; the median over the pictures.

    Args:
        luma: float32 [N,h,w], in order of time, N at least 2.
    """
    n = len(luma)
    x = luma - luma.mean((1, 2), keepdims=True)
    ratio = []
    for i in range(n):
        apart = np.abs(x - x[i]).mean((1, 2), dtype=np.float64)
        near = [j for j in range(max(0, i - reach), min(n, i + reach + 1)) if j != i]
        others, m = np.sort(np.delete(apart, i)), len(near)
        chance = np.array([math.comb(n - 2 - k, m - 1) / math.comb(n - 1, m) for k in range(n - 1)])
        ratio.append(float(apart[near].min()) / max(float(others @ chance), 1e-9))
    return float(np.median(ratio))


def _alternation(
    check: Callable[..., None],
    name: str,
    features: np.ndarray,
    limits: Limits,
    words: str,
    *,
    least: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> None:
    apart, minority, mixing, (a, b) = populations(features)
    found = apart > limits.apart and minority >= limits.minority and mixing >= limits.mixing
    if found and least is not None:
        found = least(a, b)
    detail = f"{100 * minority:.0f}% in the smaller group, separation {apart:.2f}, mixing {mixing:.2f}"
    check(name, apart, limits.apart, f"{words} {detail}" if found else f"one kind of pictures ({detail})",
          passed=not found)  # fmt: skip


def _small(frame: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """float32 [h,w,3], averaged over blocks of whole pixels so that it is about `width` across."""
    k = max(1, round(frame.shape[1] / width))
    h, w = frame.shape[0] // k * k, frame.shape[1] // k * k
    blocks = frame[:h, :w].reshape(h // k, k, w // k, k, 3)
    return np.asarray(blocks.mean((1, 3), dtype=np.float32))


def _views(frames: Sequence[np.ndarray], limits: Limits) -> list[int]:
    """Indices of frames that show something else than the last one taken; a vehicle that stands gives one."""
    taken: list[int] = []
    last: np.ndarray | None = None
    for i, frame in enumerate(frames):
        x = _small(frame, 64).mean(-1)
        threshold = max(2.0, 0.15 * float(x.std()))
        if last is None or float((np.abs(x - last) > threshold).mean()) > limits.changed:
            taken.append(i)
            last = x
    return taken


def static_share(luma: np.ndarray, limits: Limits) -> float:
    """Share of the picture, without its lowest quarter, taken by edges that are always at the same place.

    A pixel is steady when at least `limits.steady` of the frames have it within 8 levels of one value, and
    nearly as many in each third of the time; an edge between two steady pixels is no road's: in a moving
    car edges move.  The own bonnet does stay, and is
    why the lowest quarter is left out.

    Args:
        luma: float32 [N,h,w], frames of a moving vehicle.
    """
    share, level = _modes(luma)
    steady = share >= limits.steady
    # In every third of the time: one long street is not a sticker.
    for part in np.array_split(np.abs(luma - level) <= 6, 3):
        steady &= part.mean(0) >= 0.75 * limits.steady
    edge: np.ndarray = np.zeros(luma.shape[1:], bool)
    step = limits.static_edge
    edge[1:-1] |= (np.abs(level[2:] - level[:-2]) > step) & steady[2:] & steady[:-2]
    edge[:, 1:-1] |= (np.abs(level[:, 2:] - level[:, :-2]) > step) & steady[:, 2:] & steady[:, :-2]
    return float(edge[: edge.shape[0] * 3 // 4].mean())


def dead_share(luma: np.ndarray, limits: Limits) -> float:
    """Share of the picture's middle, where the road and its sides pass by, that stays as it is.

    A pixel is dead when nine in ten of the frames have it within `limits.dead_levels` of its median; glare
    and black are no evidence.

    Args:
        luma: float32 [N,h,w], frames of a moving vehicle.
    """
    h = luma.shape[1]
    band = luma[:, h * 2 // 5 : h * 3 // 4]
    middle = np.median(band, axis=0)
    still = (np.abs(band - middle) <= limits.dead_levels).mean(0) >= 0.9
    return float((still & (middle > 8) & (middle < 247)).mean())


def _modes(luma: np.ndarray, width: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel the largest share of frames within one bin of `width` levels, and their mean; [h,w]."""
    best, level = np.zeros(luma.shape[1:]), np.zeros(luma.shape[1:])
    for offset in (0.0, width / 2):
        bins = np.floor((luma + offset) / width).astype(np.int16)
        for b in range(int(bins.min()), int(bins.max()) + 1):
            inside = bins == b
            share = inside.mean(0)
            more = share > best
            if more.any():
                mean = (luma * inside).sum(0) / np.maximum(inside.sum(0), 1)
                level[more], best[more] = mean[more], share[more]
    return best, level


def grid_peak(frames: Sequence[np.ndarray], most: int = 24) -> float:
    """How far the strongest lone peak of the mean spectrum stands out, in robust deviations.

    Streets have edges of every period, so their spectrum is smooth; the pixels of a screen seen by the pixels
    of a camera beat at one period, in every frame.  Left out are low frequencies, the axes (horizon, poles)
    and the multiples of 1/8, where JPEG's blocks are.
    """
    from scipy.ndimage import median_filter

    chosen = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, most).astype(int))]
    h, w = chosen[0].shape[:2]
    window = np.outer(np.hanning(h), np.hanning(w))
    total = np.zeros((h, w // 2 + 1))
    for frame in chosen:
        x = frame.astype(np.float32).mean(-1)
        total += np.log1p(np.abs(np.fft.rfft2((x - x.mean()) * window)))
    total /= len(chosen)
    rest = total - median_filter(total, size=9, mode="wrap")
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    near_y, near_x = 2.5 / h, 2.5 / w

    def on_block(f: np.ndarray, near: float) -> np.ndarray:
        return np.asarray(np.abs(f * 8 - np.round(f * 8)) / 8 < near)

    keep = (np.hypot(fy, fx) > 0.08) & (np.abs(fy) > near_y) & (fx > near_x) & (fx < 0.5 - near_x)
    keep &= ~(on_block(fy, near_y) & on_block(fx, near_x))
    values = rest[keep]
    if values.size < 100:
        return 0.0
    spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    return float((values.max() - np.median(values)) / max(spread, 1e-6))


def camera_features(frames: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Numbers that belong to a camera and its mount more than to the street, float64 [N] each.

    Colour balance, sharpness, light above against below, and the principal axes of the layout with brightness
    and contrast taken out.  (Centre against edges was tried: cars ahead come and go, and make it alternate.)
    """
    small = np.stack([_small(f, 32) for f in frames]).astype(np.float64)
    mean = small.mean((1, 2)) + 1.0
    luma = small.mean(-1)
    level, spread = luma.mean((1, 2)), np.maximum(luma.std((1, 2)), 1.0)
    h = luma.shape[1]
    found = {
        "colour balance": np.log(mean[:, 0] / mean[:, 2]),
        "green": np.log(mean[:, 1] ** 2 / (mean[:, 0] * mean[:, 2])),
        "up and down": (luma[:, : h // 3].mean((1, 2)) - luma[:, -(h // 3) :].mean((1, 2))) / spread,
    }
    fine = []
    for frame in frames:
        x = frame[::2, ::2].astype(np.float32).mean(-1)
        near, far = np.abs(np.diff(x, axis=1)).mean(), np.abs(x[:, 4:] - x[:, :-4]).mean()
        fine.append(np.log((near + 0.1) / (far + 0.1)))
    found["sharpness"] = np.array(fine)
    layout = ((luma - level[:, None, None]) / spread[:, None, None]).reshape(len(luma), -1)
    layout = layout - layout.mean(0)
    axes = np.linalg.svd(layout, full_matrices=False)[2][:2]
    for i, axis in enumerate(axes):
        found[f"layout {i + 1}"] = layout @ axis
    return found


def damaged(frame: np.ndarray, before: np.ndarray | None, limits: Limits) -> str:
    """What is wrong with a single picture, in words; "" where nothing is.

    Half decoded: rows of one colour from some row down to the bottom, which no sensor delivers (black and
    white are left out: night and glare do).  Torn: rows equal those of the frame before to the bit while
    others do not.
    """
    row = frame.reshape(frame.shape[0], -1, 3)
    plain = (row.max(1).astype(np.int16) - row.min(1)).max(-1) <= 2
    level = row.mean((1, 2))
    bottom = plain & (level > 8) & (level < 247)
    rows = len(plain) if bottom.all() else int(np.argmin(bottom[::-1]))
    if rows >= limits.damaged_rows * len(plain):
        return f"the lowest {100 * rows / len(plain):.0f}% of a picture are one colour: half decoded?"
    if before is not None and before.shape == frame.shape:
        busy = row.max((1, 2)).astype(np.int16) - row.min((1, 2)) > 8
        equal = (frame == before).all((1, 2)) & busy
        if limits.damaged_rows <= equal.sum() / max(int(busy.sum()), 1) <= 1 - limits.damaged_rows:
            return f"{100 * equal.mean():.0f}% of a picture's rows are the last picture's: torn?"
    return ""


def populations(features: np.ndarray) -> tuple[float, float, float, tuple[np.ndarray, np.ndarray]]:
    """Are these one kind of pictures or two that alternate?

    Args:
        features: float [N,d], in order of time.

    Returns:
        Of the best split along the first principal axis: the part of that axis' variance it explains (0.64
        for a Gaussian, towards 1 for two kinds), the share of the smaller group, how often neighbours are of
        different groups compared with chance (0: first one, then the other; 1: shuffled; 2: in turn), and
        the mean features of both groups.
    """
    x = features.astype(np.float64)
    x = x - x.mean(0)
    axis = np.linalg.svd(x, full_matrices=False)[2][0]
    along = x @ axis
    order = np.sort(along)
    n = len(order)
    total = float((order**2).sum())
    if total <= 1e-9 or n < 4:
        mean = features.mean(0)
        return 0.0, 0.0, 0.0, (mean, mean)
    sums = np.cumsum(order)[:-1]
    left = np.arange(1, n)
    between = sums**2 / left + (order.sum() - sums) ** 2 / (n - left)
    cut = int(np.argmax(between))
    second = along > order[cut]
    share = float(second.mean())
    chance = 2 * share * (1 - share)
    switches = float((second[1:] != second[:-1]).mean())
    return (
        float(between[cut] / total), min(share, 1 - share), switches / chance,
        (features[~second].mean(0), features[second].mean(0)),
    )  # fmt: skip
