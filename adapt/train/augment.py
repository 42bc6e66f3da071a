"""Training crops: scale, crop, flip, and the colours of another light.

Everything random comes from the generator given, and everything stays uint8 until the pack's own
normalisation, so that training sees exactly what serving sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

__all__ = ["Augmentation", "Window", "crop"]

IGNORE = 255


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training frame.

    size: (H, W) of the crop.  scale: the range a frame is magnified by before cropping.  flip: mirror every
    second frame.  brightness: largest factor (and its inverse) of one gain over the frame, 1 = none, e.g.
    2.5.  colour: largest change of gamma and of each channel's gain, 0 = none, e.g. 0.3.  blur: chance of a
    Gaussian blur.  noise: largest sigma of sensor noise in levels.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.6)
    flip: bool = True
    brightness: float = 1.0
    colour: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale {self.scale}: give (smallest, largest), both positive")
        if min(self.size) <= 0:
            raise ValueError(f"crop {self.size}: both sides are positive")
        for name, least, most in (
            ("brightness", 1, 100),
            ("colour", 0, 10),
            ("blur", 0, 1),
            ("noise", 0, 255),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)}: give {least} to {most}")


@dataclass(frozen=True)
class Window:
    """What a crop shows, in pixels of the original frame, so that one resize both scales and crops."""

    scale: float
    top: float
    left: float
    height: float
    width: float

    @classmethod
    def draw(cls, rng: np.random.Generator, shape: tuple[int, ...], how: Augmentation) -> Window:
        """A random one in a frame of that shape."""
        scale = float(np.exp(rng.uniform(*np.log(how.scale))))
        height, width = how.size[0] / scale, how.size[1] / scale
        top = rng.uniform(0, max(shape[0] - height, 0))
        left = rng.uniform(0, max(shape[1] - width, 0))
        return cls(scale, top, left, min(height, shape[0]), min(width, shape[1]))

    def share(self, label: np.ndarray, c: int, how: Augmentation) -> float:
        """How much of the crop class c of a label [H,W] would take, to a pixel at the borders."""
        rows = slice(round(self.top), round(self.top + self.height))
        columns = slice(round(self.left), round(self.left + self.width))
        found = np.count_nonzero(label[rows, columns] == c)
        return found * self.scale**2 / (how.size[0] * how.size[1])


def crop(
    rng: np.random.Generator,
    frame: np.ndarray,
    label: np.ndarray,
    how: Augmentation,
    window: Window | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One random crop of a frame uint8 [H,W,3] and its label uint8 [H,W] or [H,W,K], both of `how.size`.

    A crop larger than the scaled frame is padded: black, label 255 (in every one of K planes).  window: what
    it shows, where that was drawn already.
    """
    window = window or Window.draw(rng, label.shape, how)
    scale, top, left, inside_h, inside_w = window.scale, window.top, window.left, window.height, window.width
    out_h = min(how.size[0], max(1, round(inside_h * scale)))
    out_w = min(how.size[1], max(1, round(inside_w * scale)))
    box = (left, top, left + inside_w, top + inside_h)
    picture = Image.fromarray(frame).resize((out_w, out_h), Image.Resampling.BILINEAR, box=box)
    planes = [label] if label.ndim == 2 else [label[..., k] for k in range(label.shape[2])]
    truth = [
        np.asarray(Image.fromarray(plane).resize((out_w, out_h), Image.Resampling.NEAREST, box=box))
        for plane in planes
    ]
    if how.blur and rng.random() < how.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    x, y = np.asarray(picture), truth[0] if label.ndim == 2 else np.stack(truth, axis=-1)
    if (out_h, out_w) != how.size:
        padded_x = np.zeros((*how.size, 3), np.uint8)
        padded_y = np.full((*how.size, *y.shape[2:]), IGNORE, np.uint8)
        padded_x[:out_h, :out_w], padded_y[:out_h, :out_w] = x, y
        x, y = padded_x, padded_y
    if how.flip and rng.random() < 0.5:
        x, y = x[:, ::-1], y[:, ::-1]
    return _light(rng, np.ascontiguousarray(x), how), np.ascontiguousarray(y)


def _light(rng: np.random.Generator, x: np.ndarray, how: Augmentation) -> np.ndarray:
    """Gain, gamma and channel balance as one look-up table a channel; then noise."""
    if how.brightness > 1 or how.colour:
        level = np.arange(256) / 255.0
        gain = float(np.exp(rng.uniform(-1, 1) * np.log(how.brightness)))
        gamma = float(np.exp(rng.uniform(-how.colour, how.colour)))
        table = []
        for _ in range(3):
            channel = gain * float(np.exp(rng.uniform(-how.colour, how.colour)))
            table += np.clip(level**gamma * channel * 255.0 + 0.5, 0, 255).astype(np.uint8).tolist()
        x = np.asarray(Image.fromarray(x).point(table))
    if how.noise:
        sigma = rng.uniform(0, how.noise)
        x = np.clip(x + rng.normal(0, sigma, x.shape), 0, 255).astype(np.uint8)
    return x
