"""Are these frames of a road at all?  A covered or dazzled lens, a stuck camera, a recording in a loop, a
patch or a watermark that never moves, a screen, two cameras under one name, damaged pictures, a strobe: a
round refuses to learn from them, with the reason, before any work is done.

Uses pixels alone: no network, no label, no file.  Every limit stands in `adapt.gate.limits.Limits`; how
often each check refuses an attack, and how often an honest drive, is measured by ``python -m bench.hostile``
(docs/results/gate.md).  What a camera could really have seen (another country, a flooded street) is not this
module's business: that is the domain shift adaptation is there for, and the gate judges what comes of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from adapt.gate.checks import Check, at_most
from adapt.gate.corruption import damaged
from adapt.gate.limits import Limits

__all__ = [
    "camera_features",
    "check_frames",
    "damaged",
    "dead_share",
    "grid_peak",
    "order",
    "overlay_share",
    "populations",
    "repeated_share",
    "static_share",
]

WIDTH = 128  # pixels across at which layouts are compared


def check_frames(
    frames: Sequence[np.ndarray], limits: Limits, *, sizes: Sequence[tuple[int, ...]] = ()
) -> list[Check]:
    """Run every check on the frames of a round.

    Args:
        frames: uint8 [H,W,3] each, all of one size, in order of time.
        sizes: (H, W) of each frame as its camera delivered it, if frames were resized since.
    """
    checks = [
        *_exposure_checks(frames, limits),
        _size_check(sizes or [f.shape for f in frames]),
        _damage_check(frames, limits),
    ]
    # What follows compares frames with each other; fewer are no sample, and a vehicle that stands sees one.
    if min(frames[0].shape[:2]) < 32:  # nothing can be told from a thumbnail
        return checks
    views = _views(frames, limits)
    if len(views) < limits.views:
        return checks
    checks += _view_checks([frames[i] for i in views], limits)
    everything = np.stack([_small(f, 32) for f in frames])
    # Of pictures that were never one after the other nothing can alternate.
    single = order(everything.mean(-1)) > limits.order
    return [
        *checks,
        _strobe_check(everything.mean((1, 2, 3)), limits, single=single),
        _camera_check(frames, limits, single=single),
    ]


def _exposure_checks(frames: Sequence[np.ndarray], limits: Limits) -> list[Check]:
    """A covered lens, a dazzled one, and a camera that repeats itself."""
    luma = [f[::4, ::4].astype(np.float32).mean(-1) for f in frames]
    flat = float(np.mean([x.std() < limits.contrast for x in luma]))
    glare = float(np.mean([(x >= limits.clipped).mean() > limits.glare for x in luma]))
    still = float(np.mean([np.abs(a - b).mean() < limits.motion for a, b in pairwise(luma)] or [0]))
    return [
        at_most(
            "frames-contrast",
            flat,
            limits.bad_frames,
            f"{100 * flat:.0f}% of the frames show nothing (luma deviation under {limits.contrast:g}): "
            "is the lens covered?",
        ),
        at_most(
            "frames-glare",
            glare,
            limits.bad_frames,
            f"{100 * glare:.0f}% of the frames are white in more than {100 * limits.glare:.0f}% of the "
            "picture: is the camera dazzled, or its exposure stuck?",
        ),
        at_most(
            "frames-motion",
            still,
            limits.bad_frames,
            f"{100 * still:.0f}% of the frames repeat the one before: is the camera stuck?",
        ),
    ]


def _size_check(sizes: Sequence[tuple[int, ...]]) -> Check:
    counts = Counter(tuple(s[:2]) for s in sizes)
    other = 1 - max(counts.values()) / sum(counts.values())
    shapes = ", ".join(f"{w}x{h}: {n}" for (h, w), n in counts.most_common(3))
    return at_most(
        "frames-size", other, 0.0, f"pictures are of {len(counts)} sizes ({shapes}): mixed cameras?"
    )


def _damage_check(frames: Sequence[np.ndarray], limits: Limits) -> Check:
    wrong = [damaged(f, before, limits) for f, before in zip(frames, [None, *frames[:-1]], strict=True)]
    reasons = Counter(reason for reason in wrong if reason)
    share = sum(reasons.values()) / max(len(frames), 1)
    what = reasons.most_common(1)[0][0] if reasons else "none is half decoded or torn"
    reason = f"{100 * share:.0f}% of the frames are damaged: {what}"
    return at_most("frames-damaged", share, limits.damaged, reason)


def _view_checks(views: Sequence[np.ndarray], limits: Limits) -> list[Check]:
    """What stays or comes again over frames that show different things."""
    luma = np.stack([_small(view) for view in views]).mean(-1)
    stuck = static_share(luma, limits)
    checks = [
        at_most(
            "frames-static",
            stuck,
            limits.static,
            f"{100 * stuck:.1f}% of the picture are edges that stay where they are while the rest moves: "
            "a sticker, dirt, or the frame of a screen?",
        )
    ]
    if len(views) >= limits.overlay_views:
        drawn = overlay_share(luma, limits)
        checks.append(
            at_most(
                "frames-overlay",
                drawn,
                limits.overlay,
                f"{100 * drawn:.1f}% of the picture are edges drawn over whatever is behind them: a "
                "watermark, a display, drops on the lens?",
            )
        )
    again = repeated_share(np.stack([_small(view, 32).mean(-1) for view in views]), limits)
    dead = dead_share(luma, limits)
    peak = grid_peak(views)
    return [
        *checks,
        at_most(
            "frames-repeated",
            again,
            limits.repeated,
            f"{100 * again:.0f}% of the views were there before, with others between: a recording in a loop?",
        ),
        at_most(
            "frames-covered",
            dead,
            limits.dead,
            f"{100 * dead:.0f}% of the middle of the picture never change: is a part of the lens covered?",
        ),
        at_most(
            "frames-grid",
            peak,
            limits.grid,
            f"the strongest regular pattern stands {peak:.1f} deviations out of the spectrum: a screen's "
            "pixels?",
        ),
    ]


def _strobe_check(brightness: np.ndarray, limits: Limits, *, single: bool) -> Check:
    """Does the light alternate?  `single`: the pictures are no drive, so that nothing alternates."""
    apart, minority, mixing, (a, b) = populations(brightness[:, None])
    strong = bool(abs(a - b).max() > limits.strobe * max(a.max(), b.max(), 1.0))
    detail = f"{100 * minority:.0f}% in the smaller group, separation {apart:.2f}, mixing {mixing:.2f}"
    found = apart > limits.apart and minority >= limits.minority and mixing >= limits.mixing and strong
    reason = f"brightness alternates: a strobe? {detail}" if found else f"one kind of light ({detail})"
    if found and single:
        found, reason = False, f"single pictures, no drive: not asked whether the light flickers ({detail})"
    return Check("frames-strobe", round(float(apart), 5), limits.apart, not found, reason)


def _camera_check(frames: Sequence[np.ndarray], limits: Limits, *, single: bool) -> Check:
    """Do two cameras alternate under one name?  `single`: as for `_strobe_check`."""
    worst, which = (0.0, 0.0, 0.0), ""
    for name, feature in camera_features(frames).items():
        apart, minority, mixing, _ = populations(feature[:, None])
        if minority >= limits.minority and mixing >= limits.mixing and apart > worst[0]:
            worst, which = (apart, minority, mixing), name
    detail = f"{which}: separation {worst[0]:.2f}, {100 * worst[1]:.0f}% in one group, mixing {worst[2]:.2f}"
    found = worst[0] > limits.apart
    reason = f"two kinds of pictures alternate, two cameras under one name? ({detail})"
    if found and len(frames) < limits.crowd:
        found, reason = False, f"too few pictures to tell cameras apart ({detail})"
    elif found and single:
        found, reason = False, f"single pictures, no drive: not asked whether of one camera ({detail})"
    elif not found:
        reason = f"one kind of pictures ({detail})"
    return Check("frames-sources", round(float(worst[0]), 5), limits.apart, not found, reason)


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

    A pixel is dead when nine in ten of the frames have it within `limits.dead_levels` of its median.  Glare
    is no evidence, and black is none where all is dark: at night a road can be.

    Args:
        luma: float32 [N,h,w], frames of a moving vehicle.
    """
    h = luma.shape[1]
    band = luma[:, h * 2 // 5 : h * 3 // 4]
    middle = np.median(band, axis=0)
    still = (np.abs(band - middle) <= limits.dead_levels).mean(0) >= 0.9
    bright = not still.all() and float(np.median(middle[~still])) >= limits.daylight
    return float((still & ((middle > 8) | bright) & (middle < 247)).mean())


def overlay_share(luma: np.ndarray, limits: Limits) -> float:
    """Share of the picture, without its lowest quarter, where an edge always goes the same way.

    What is drawn over the picture, half transparent too, adds the same step to whatever is behind it: there
    the median over the frames of the signed difference of two neighbouring pixels is large against its
    deviation.  A street's own edges come and go.

    Args:
        luma: float32 [N,h,w], frames of a moving vehicle.
    """
    drawn: np.ndarray = np.zeros(luma.shape[1:], bool)
    for axis in (1, 2):
        step = np.diff(luma, axis=axis)
        middle = np.median(step, axis=0)
        spread = 1.4826 * np.median(np.abs(step - middle), axis=0) + 0.5  # of rounding alone
        least = np.maximum(limits.overlay_step, limits.overlay_ratio * spread)
        drawn[: middle.shape[-2], : middle.shape[-1]] |= np.abs(middle) > least
    return float(drawn[: drawn.shape[0] * 3 // 4].mean())


def repeated_share(luma: np.ndarray, limits: Limits) -> float:
    """Share of views that come again, noise aside, with at least two others between.

    Args:
        luma: float32 [N,h,w] of different views, small enough to average noise away.
    """
    n = len(luma)
    found = 0
    for i in range(n):
        others = [j for j in range(n) if abs(i - j) > 2]
        apart = np.abs(luma[others] - luma[i]).mean((1, 2))
        found += bool(apart.size and apart.min() < limits.same_view)
    return found / max(n, 1)


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

    Colour balance and where it is, sharpness, light above against below, and the principal axes of the
    layout with brightness and contrast taken out.  (Centre against edges was tried: cars
    ahead come and go, and make it alternate.)
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
    h4, w4 = (n // 4 * 4 for n in luma.shape[1:])
    chroma = (small[..., 0] - small[..., 2])[:, :h4, :w4].reshape(len(luma), h4 // 4, 4, w4 // 4, 4)
    chroma = chroma.mean((2, 4)).reshape(len(luma), -1)
    # Where it is warm and where cold, with the mean left in: exchanged channels turn the sign.
    found["colours' places"] = chroma @ np.linalg.svd(chroma, full_matrices=False)[2][0]
    layout = ((luma - level[:, None, None]) / spread[:, None, None]).reshape(len(luma), -1)
    layout = layout - layout.mean(0)
    axes = np.linalg.svd(layout, full_matrices=False)[2][:2]
    for i, axis in enumerate(axes):
        found[f"layout {i + 1}"] = layout @ axis
    return found


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
        float(between[cut] / total),
        min(share, 1 - share),
        switches / chance,
        (features[~second].mean(0), features[second].mean(0)),
    )
