"""What can go wrong with a camera, on purpose or not: functions from an honest drive to a spoilt one.

Each takes uint8 [H,W,3] frames in order of time and a random generator, and gives frames of the same size.
Used by ``bench.hostile`` and the tests of ``adapt.gate.input_quality``; knows nothing of how they are found out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageFont

__all__ = ["ATTACKS", "interleaved"]

Frames = Sequence[np.ndarray]
Attack = Callable[[Frames, np.random.Generator], list[np.ndarray]]


def _noisy(frame: np.ndarray, rng: np.random.Generator, sigma: float = 1.0) -> np.ndarray:
    return np.asarray(np.clip(np.rint(frame + rng.normal(0, sigma, frame.shape)), 0, 255), np.uint8)


def black(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """No light, sensor noise."""
    return [_noisy(np.zeros_like(f, dtype=np.float32) + 2, rng) for f in frames]


def covered(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A hand on the lens: one dull colour with a soft gradient."""
    h, w = frames[0].shape[:2]
    glow = np.linspace(0, 6, w)[None, :, None] + np.array([70.0, 45.0, 38.0])
    return [_noisy(np.broadcast_to(glow, (h, w, 3)), rng) for _ in frames]


def half_covered(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A leaf or mud on the left half of the lens."""
    h, w = frames[0].shape[:2]
    edge = (0.5 + 0.06 * np.sin(np.linspace(0, 9, h))) * w
    mask = np.arange(w)[None, :] < edge[:, None]
    mud = np.array([58.0, 48.0, 36.0])
    return [_noisy(np.where(mask[..., None], mud, f), rng) for f in frames]


def stuck(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """The same picture again and again, bit for bit."""
    return [frames[0].copy() for _ in frames]


def stuck_noisy(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """The same picture with a little noise, as through a second compression."""
    return [_noisy(frames[0], rng, 0.3) for _ in frames]


def _patch(frames: Frames, rng: np.random.Generator, share: float) -> tuple[slice, slice, np.ndarray]:
    h, w = frames[0].shape[:2]
    side = round((share * h * w) ** 0.5)
    y, x = int(rng.integers(h // 8, h * 5 // 8 - side)), int(rng.integers(w // 8, w * 7 // 8 - side))
    cells = 6
    noise = rng.integers(0, 2, (cells, cells, 3)) * 255
    small = Image.fromarray(noise.astype(np.uint8))
    picture = np.asarray(small.resize((side, side), Image.Resampling.NEAREST))
    return slice(y, y + side), slice(x, x + side), picture


def sticker(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A printed patch on the windscreen, 3 % of the picture, in every frame."""
    rows, columns, picture = _patch(frames, rng, 0.03)
    out = [f.copy() for f in frames]
    for f in out:
        f[rows, columns] = picture
    return [_noisy(f, rng) for f in out]


def sticker_sometimes(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """The same in six frames of ten."""
    spoilt = sticker(frames, rng)
    return [s if rng.random() < 0.6 else f.copy() for s, f in zip(spoilt, frames, strict=True)]


def sticker_small(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """1.5 % of the picture."""
    rows, columns, picture = _patch(frames, rng, 0.015)
    out = [f.copy() for f in frames]
    for f in out:
        f[rows, columns] = picture
    return [_noisy(f, rng) for f in out]


def _shrunk(frame: np.ndarray, share: float) -> tuple[np.ndarray, int, int]:
    h, w = frame.shape[:2]
    inner = Image.fromarray(frame).resize((round(w * share), round(h * share)), Image.Resampling.BILINEAR)
    return np.asarray(inner), (h - inner.height) // 2, (w - inner.width) // 2


def screen(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A screen in a dark room that shows a street: black frame around it, picture in the middle."""
    out = []
    for f in frames:
        inner, y, x = _shrunk(f, 0.72)
        room = np.full(f.shape, 26.0)
        room[y - 4 : y + inner.shape[0] + 4, x - 4 : x + inner.shape[1] + 4] = 6
        room[y : y + inner.shape[0], x : x + inner.shape[1]] = 0.85 * inner + 14
        out.append(_noisy(room, rng))
    return out


def screen_moire(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A screen that fills the view: its pixels beat with the camera's."""
    h, w = frames[0].shape[:2]
    y, x = np.mgrid[:h, :w]
    beat = np.sin(2 * np.pi * (0.213 * x + 0.041 * y)) * np.sin(2 * np.pi * (0.187 * y - 0.037 * x))
    return [_noisy(f * (1 + 0.08 * beat[..., None]), rng) for f in frames]


def strobe(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Light that is on in one frame and off in the next."""
    return [_noisy(f * (1.0 if i % 2 else 0.35), rng) for i, f in enumerate(frames)]


def strobe_random(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Light that is on or off by chance."""
    return [_noisy(f * (1.0 if rng.random() < 0.5 else 0.3), rng) for f in frames]


def half_decoded(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Every third JPEG lost its end on the way and was decoded all the same."""
    out = []
    for i, f in enumerate(frames):
        if i % 3:
            out.append(f.copy())
            continue
        data = io.BytesIO()
        Image.fromarray(f).save(data, "JPEG", quality=85)
        cut = data.getvalue()[: int(len(data.getvalue()) * rng.uniform(0.35, 0.7))]
        kept = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            out.append(np.asarray(Image.open(io.BytesIO(cut)).convert("RGB")))
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = kept
    return out


def torn(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Every second picture has its upper part from the one before: a buffer read while it was written."""
    out = [f.copy() for f in frames]
    for i in range(1, len(out), 2):
        row = int(out[i].shape[0] * rng.uniform(0.3, 0.7))
        out[i][:row] = out[i - 1][:row]
    return out


def interleaved(a: Frames, b: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Two cameras under one name: by chance from one or the other."""
    return [x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=False)]


def _rear(f: np.ndarray) -> np.ndarray:
    """Another mount and lens: closer, lower, warmer, softer."""
    h, w = f.shape[:2]
    part = Image.fromarray(f[h // 4 :, w // 6 : w * 5 // 6]).resize((w, h), Image.Resampling.BILINEAR)
    x = np.asarray(part, np.float32)[:, ::-1] * np.array([1.1, 0.95, 0.8])
    y = np.linspace(1.15, 0.75, h)[:, None, None]
    return np.asarray(np.clip(x * y, 0, 255), np.uint8)


def mixed_in_turn(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Front and rear camera in turn under one name."""
    return [f.copy() if i % 2 else _rear(f) for i, f in enumerate(frames)]


def mixed_by_chance(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Front camera and, in a third of the frames, another one."""
    return interleaved([f.copy() for f in frames], [_rear(f) for f in frames], rng)


def mixed_upside_down(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """One of two cameras is mounted upside down."""
    return interleaved(frames, [np.ascontiguousarray(f[::-1, ::-1]) for f in frames], rng)


def dazzled(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Exposure that runs away, slowly: ten times too bright in the end."""
    return [_noisy(f * (1 + 9.0 * i / (len(frames) - 1)), rng) for i, f in enumerate(frames)]


def _drawn(frames: Frames, text: str, size: int, at: tuple[float, float]) -> np.ndarray:
    """float32 [H,W,1] 0..1: where the text is."""
    h, w = frames[0].shape[:2]
    image = Image.new("L", (w, h))
    where = (w * at[0], h * at[1])
    ImageDraw.Draw(image).text(where, text, fill=255, font=ImageFont.load_default(max(size, 8)))
    return np.asarray(image, np.float32)[..., None] / 255


def watermark(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Words across the picture that let it shine through."""
    mask = 0.4 * _drawn(frames, "DEMO VERSION", frames[0].shape[0] // 6, (0.12, 0.3))
    return [_noisy(f * (1 - mask) + 255 * mask, rng) for f in frames]


def display(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Time and speed drawn in above, the digits change."""
    out = []
    for i, f in enumerate(frames):
        words = f"12:{i // 60:02d}:{i % 60:02d}  {30 + int(rng.integers(0, 9))} km/h"
        mask = _drawn(frames, words, frames[0].shape[0] // 12, (0.03, 0.03))
        out.append(_noisy(f * (1 - mask) + 255 * mask, rng))
    return out


def drops(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Rain or dirt on the lens: 25 soft spots that stay."""
    h, w = frames[0].shape[:2]
    y, x = np.mgrid[:h, :w]
    mask = np.zeros((h, w))
    for _ in range(25):
        cy, cx, r = rng.uniform(0, h * 0.75), rng.uniform(0, w), rng.uniform(0.02, 0.06) * h
        mask = np.maximum(mask, np.clip(1.3 - np.hypot(y - cy, x - cx) / r, 0, 1))
    mask = 0.8 * mask[..., None]
    return [_noisy(f * (1 - mask) + np.array([70, 65, 60]) * mask, rng) for f in frames]


def taped(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Black tape over the left third."""
    return [np.where(np.arange(f.shape[1])[:, None] < f.shape[1] // 3, 0, f).astype(np.uint8) for f in frames]


def lost_parts(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Three bands of every second picture are from elsewhere in it: parts of a stream were lost."""
    out = [f.copy() for f in frames]
    for f in out[1::2]:
        h, w = f.shape[:2]
        for _ in range(3):
            y, n = int(rng.integers(0, h - 16)) // 8 * 8, int(rng.integers(1, 3)) * 8
            moved = np.roll(f[y : y + n], int(rng.integers(w // 4, 3 * w // 4)), axis=1)
            f[y : y + n] = np.clip(moved.astype(int) + rng.integers(-60, 60, 3), 0, 255)
    return out


def grey_parts(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """The same, and the decoder put one colour there."""
    out = [f.copy() for f in frames]
    for f in out[1::2]:
        for y in rng.integers(0, f.shape[0] - 16, 3) // 8 * 8:
            f[y : y + 16] = rng.integers(20, 230, 3)
    return out


def looped(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """A recording of at most 20 frames again and again, with noise."""
    most = min(20, len(frames) // 2)
    return [_noisy(frames[i % most], rng, 3.0) for i in range(len(frames))]


def half_frozen(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """The upper half stays as it was in the first picture."""
    half = frames[0].shape[0] // 2
    return [np.concatenate([frames[0][:half], f[half:]]) for f in frames]


def exchanged(frames: Frames, rng: np.random.Generator) -> list[np.ndarray]:
    """Red and blue are exchanged in four frames of ten."""
    return [np.ascontiguousarray(f[..., ::-1]) if rng.random() < 0.4 else f.copy() for f in frames]


# name: (function, the looks of which one should decline it)
ATTACKS: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "black": (black, ("frames-contrast",)),
    "covered": (covered, ("frames-contrast",)),
    "half-covered": (half_covered, ("frames-covered",)),
    "stuck": (stuck, ("frames-motion",)),
    "stuck-noisy": (stuck_noisy, ("frames-motion",)),
    "sticker-3%": (sticker, ("frames-static", "frames-overlay")),
    "sticker-3%-in-60%": (sticker_sometimes, ("frames-static", "frames-overlay")),
    "sticker-1.5%": (sticker_small, ("frames-static", "frames-overlay")),
    "screen": (screen, ("frames-static", "frames-covered", "frames-grid")),
    "screen-filling-moire": (screen_moire, ("frames-grid",)),
    "strobe": (strobe, ("frames-strobe",)),
    "strobe-random": (strobe_random, ("frames-strobe",)),
    "half-decoded": (half_decoded, ("frames-damaged",)),
    "torn": (torn, ("frames-damaged",)),
    "mixed-in-turn": (mixed_in_turn, ("frames-sources",)),
    "mixed-by-chance": (mixed_by_chance, ("frames-sources",)),
    "mixed-upside-down": (mixed_upside_down, ("frames-sources",)),
    "dazzled": (dazzled, ("frames-glare", "frames-contrast")),
    "watermark": (watermark, ("frames-overlay", "frames-static")),
    "display": (display, ("frames-overlay", "frames-static")),
    "drops": (drops, ("frames-overlay", "frames-static")),
    "taped": (taped, ("frames-covered", "frames-overlay", "frames-static")),
    "lost-parts": (lost_parts, ("frames-damaged",)),
    "grey-parts": (grey_parts, ("frames-damaged",)),
    "looped": (looped, ("frames-repeated", "frames-static")),
    "half-frozen": (half_frozen, ("frames-static", "frames-damaged")),
    "channels-exchanged": (exchanged, ("frames-sources",)),
}
