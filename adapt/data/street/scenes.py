"""A small procedural renderer of street scenes with exact labels: source and target of demo and tests.

    frame, label = street.render(seed, "day", (128, 256))
    for frame, label in street.drive(seed, "dusk", 200): ...

A domain is a way of looking at a street: light, weather, sensor, and for "camera" another mount and lens.
What stands in the street depends on the seed alone, so all domains but "camera" have the same labels for a
seed.  No class has a colour of its own: asphalt, stone, leaves, paint and cloth vary from street to street
and overlap.

Pure NumPy and Pillow; one core renders about 60 frames of 128×256 a second.  Knows nothing of networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from adapt.data.street.paint import Camera, Look, View, paint
from adapt.data.street.world import CLASSES, SPEED, START, World

__all__ = ["CLASSES", "DOMAINS", "SIZE", "drive", "render"]

DOMAINS = ("day", "dusk", "fog", "night", "camera")
SIZE = (128, 256)


def render(seed: int, domain: str = "day", size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """One frame of a street of its own.

    Args:
        seed: the street; any whole number from 0.
        domain: one of ``DOMAINS``.
        size: (H, W).
    Returns:
        frame uint8 [H,W,3] RGB, label uint8 [H,W] with indices into ``CLASSES``.
    Raises:
        ValueError: an unknown domain.
    """
    return next(drive(seed, domain, 1, size))


def drive(
    seed: int, domain: str, n: int, size: tuple[int, int] = SIZE, *, step: float = 0.9
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``n`` frames of a vehicle that moves ``step`` metres a frame down one street (0.9: ten a second).

    Shapes, types and errors as of ``render``; ``render(seed, domain, size)`` is the first frame.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is unknown; choose one of: {', '.join(DOMAINS)}")
    world = World(seed)
    mount = _mount(seed, domain)
    look = _look(seed, domain)
    noise = np.random.default_rng([0x5E25, seed, DOMAINS.index(domain)])
    return _frames(world, mount, look, noise, n, size, step)


def _frames(
    world: World,
    mount: Camera,
    look: Look,
    noise: np.random.Generator,
    n: int,
    size: tuple[int, int],
    step: float,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(n):
        s = START + i * step
        # The body rocks on its springs.
        camera = replace(
            mount,
            pitch=mount.pitch + 0.004 * math.sin(s / 2.9) + 0.002 * math.sin(s / 0.83),
            height=mount.height + 0.012 * math.sin(s / 1.7),
        )
        sunny = max(look.sun) > 0.25
        view = View(world, camera, s, i * step / SPEED, size, look.sun_from if sunny else None)
        yield paint(view, look, noise), view.label


def _mount(seed: int, domain: str) -> Camera:
    rng = np.random.default_rng([0x3007, seed])
    camera = Camera(
        height=float(rng.uniform(1.25, 1.55)),
        view=float(rng.uniform(1.05, 1.22)),
        pitch=float(rng.uniform(0.0, 0.05)),
        roll=float(rng.normal(0, 0.006)),
        yaw=float(rng.normal(0, 0.03)),
    )
    if domain == "camera":
        camera = replace(
            camera, height=camera.height + 0.85, view=camera.view + 0.42, pitch=camera.pitch + 0.09
        )
    return camera


def _look(seed: int, domain: str) -> Look:
    rng = np.random.default_rng([0x100C, seed])
    azimuth, sunny = float(rng.uniform(0, 2 * math.pi)), bool(rng.random() < 0.6)
    u = rng.uniform(-1, 1, 8)

    def towards(elevation: float) -> tuple[float, float, float]:
        c = math.cos(elevation)
        return (c * math.sin(azimuth), math.sin(elevation), c * math.cos(azimuth))

    def grade(colour: tuple[float, float, float], k: float) -> tuple[float, float, float]:
        return (colour[0] * k, colour[1] * k, colour[2] * k)

    exposure = 1.0 + 0.16 * float(u[0])
    clouds = 0.30 + 0.25 * float(u[1]) if sunny else 0.85 + 0.15 * float(u[1])
    day = Look(
        ambient=(0.52, 0.56, 0.62) if sunny else (0.82, 0.85, 0.90),
        sun=(1.05, 0.98, 0.86) if sunny else (0.16, 0.16, 0.16),
        sun_from=towards(0.75 + 0.3 * float(u[2])),
        zenith=(0.20, 0.38, 0.80) if sunny else (0.62, 0.67, 0.74),
        horizon=(0.72, 0.80, 0.92) if sunny else (0.78, 0.80, 0.83),
        clouds=clouds,
        fog=0.0012 + 0.0008 * float(u[3]),
        exposure=exposure,
        balance=(1 + 0.04 * float(u[4]), 1.0, 1 - 0.04 * float(u[4])),
        saturation=1.0 + 0.12 * float(u[5]),
        noise=0.008,
        shot=0.015,
        blur=0.45 + 0.1 * float(u[6]),
        vignette=0.10,
    )
    if domain == "day":
        return day
    if domain == "camera":
        return replace(
            day,
            balance=(1.22, 0.98, 0.74),
            gamma=1.55,
            saturation=0.72,
            blur=0.95,
            vignette=0.34,
            noise=0.02,
            exposure=exposure * 0.92,
        )
    if domain == "dusk":
        return replace(
            day,
            ambient=grade((0.30, 0.29, 0.42), 0.75 + 0.15 * float(u[7])),
            sun=grade((0.62, 0.30, 0.14), 0.5 + 0.3 * float(u[1])),
            sun_from=towards(0.10 + 0.05 * float(u[2])),
            zenith=(0.22, 0.27, 0.50),
            horizon=(0.84, 0.60, 0.48),
            clouds=0.35 + 0.25 * float(u[1]),
            fog=0.004,
            lamps=0.35,
            beams=0.25,
            lit=0.30,
            exposure=exposure * 0.72,
            balance=(1.10, 0.96, 1.02),
            saturation=0.92,
            noise=0.022,
            shot=0.022,
            blur=0.6,
            vignette=0.2,
        )
    if domain == "fog":
        grey = 0.66 + 0.10 * float(u[7])
        return replace(
            day,
            ambient=(0.62, 0.63, 0.65),
            sun=(0.06, 0.06, 0.06),
            zenith=(grey, grey, grey * 1.02),
            horizon=(grey, grey * 1.01, grey * 1.03),
            clouds=0.9,
            fog=0.034 + 0.016 * float(u[3]),
            beams=0.05,
            lit=0.1,
            exposure=exposure * 0.95,
            saturation=0.7,
            noise=0.012,
            blur=0.7,
        )
    return replace(
        day,
        ambient=grade((0.050, 0.058, 0.085), 1 + 0.3 * float(u[7])),
        sun=(0.0, 0.0, 0.0),
        sun_from=towards(0.6),
        zenith=(0.010, 0.014, 0.030),
        horizon=(0.034, 0.030, 0.034),
        clouds=0.3,
        fog=0.003,
        lamps=0.75,
        beams=0.9,
        lit=0.35,
        exposure=exposure * 0.95,
        balance=(1.06, 0.98, 0.92),
        saturation=0.85,
        noise=0.035,
        shot=0.03,
        blur=0.6,
        vignette=0.25,
    )
