"""Draws surfaces as codes on a canvas, and paints the codes: texture, light, optics.

A :class:`Pen` lays one surface over another; each has a code, and the look of a code is a row of a table, so
that one pass over the image paints all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

#: Pixels are drawn this many times finer in each direction, then averaged.
FINER = 2
#: Skin, also found on things that are no skin; hair. RGB in 0..255.
SKIN = ((245, 209, 184), (230, 184, 148), (199, 148, 112), (153, 107, 77), (112, 74, 51), (77, 51, 38))
HAIR = ((26, 20, 18), (64, 41, 26), (115, 74, 41), (189, 148, 87), (140, 64, 31), (158, 156, 153))
#: Weights of what mixes the two colours of a cloth: waves along and across it, coarse and fine noise. Plain
#: (twice as often), striped along and across, checked, and printed finely and coarsely.
PLAIN = (0, 0, 0.15, 0.15)
PATTERNS = (PLAIN, PLAIN, (2, 0, 0, 0), (0, 1, 0, 0.1), (0.5, 0.5, 0, 0.1), (0, 0, 0, 1.2), (0, 0, 1, 0.4))

Point = tuple[float, float]
Floats = NDArray[Any]


@dataclass(frozen=True)
class Cloth:
    """Two colours (RGB in 0..1), what mixes them (see ``PATTERNS``), and the waves' length in pixels."""

    first: Floats
    second: Floats
    mix: tuple[float, ...] = PLAIN
    wavelength: float = 8.0


class Pen:
    """Draws surfaces over one another as codes, and notes the look and the owner of each code.

    Attributes:
        codes: PIL image, ``FINER`` times as large as the canvas.
        rows: look of each code: two colours, waves, light, and the mix.
        owners: the value of ``owner`` when each code was made.
        owner: the person that is being drawn, from 1; 0 for all other things.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.rng, self.codes, self.owner = rng, Image.new("I", (width * FINER, height * FINER)), 0
        self._draw = ImageDraw.Draw(self.codes)
        self.rows: list[Floats] = []
        self.owners: list[int] = []
        angle = rng.uniform(0, 2 * math.pi)
        self._light = math.cos(angle), math.sin(angle) - 0.5
        # Shared by persons and clutter, so that a colour says little about what it belongs to.
        self._palette = [self._fresh() for _ in range(5)]

    def _fresh(self) -> Floats:
        """Mostly dull, sometimes vivid."""
        hue = self.rng.random(3)
        vivid = self.rng.uniform(0.08, 0.97) * (1 - self.rng.beta(1.1, 2.2) * (1 - hue / hue.max()))
        return np.asarray(vivid)

    def varied(self, colour: Floats, spread: float) -> Floats:
        """A little lighter or darker, and of slightly another hue."""
        mixed = colour * (1 + 2 * spread * self.rng.normal()) + self.rng.normal(0, spread / 2, 3)
        return np.clip(mixed, 0.02, 1)

    def one_of(self, colours: Any) -> Floats:
        """One of RGB colours in 0..255, varied."""
        return self.varied(np.array(colours[self.rng.integers(len(colours))]) / 255, 0.04)

    def colour(self) -> Floats:
        """Of the palette or new, sometimes one of skin."""
        drawn = self.rng.random()
        if drawn < 0.12:
            return self.one_of(SKIN)
        return self.varied(self._palette[self.rng.integers(5)] if drawn < 0.5 else self._fresh(), 0.04)

    def cloth(self, size: float) -> Cloth:
        """A cloth of any pattern; ``size``: of its wearer, pixels."""
        mix, first = PATTERNS[self.rng.integers(len(PATTERNS))], self.colour()
        second = self.colour() if max(mix) > 0.4 else 0.75 * first
        return Cloth(first, second, mix, size * self.rng.uniform(0.03, 0.09))

    def brush(self, cloth: Cloth, start: Point, end: Point, radius: float) -> int:
        """A new code: ``cloth`` laid along start-end, lit as a cylinder of that radius."""
        (x, y), dx, dy = start, end[0] - start[0], end[1] - start[1]
        k = 2 * math.pi / max(cloth.wavelength, 2.5) / (math.hypot(dx, dy) or 1.0)
        along, across = (k * dx, k * dy, -k * (dx * x + dy * y)), (-k * dy, k * dx, k * (dy * x - dx * y))
        lx, ly = (component / max(radius, 1.0) for component in self._light)
        lit = (lx, ly, -lx * (x + dx / 2) - ly * (y + dy / 2))
        self.rows.append(np.concatenate([cloth.first, cloth.second, along, across, lit, cloth.mix]))
        self.owners.append(self.owner)
        return len(self.rows) - 1

    def polygon(self, code: int, points: list[Point]) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * FINER, y * FINER) for x, y in points], fill=code)

    def oval(self, code: int, centre: Point, rx: float, ry: float, start: int = 0, end: int = 360) -> None:
        """An ellipse, or its part between two angles (degrees, clockwise from the right)."""
        (x, y), s = centre, FINER
        self._draw.chord(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), start, end, fill=code)

    def limb(self, cloth: Cloth, p: Point, q: Point, rp: float, rq: float) -> None:
        """A capsule that tapers from radius ``rp`` at p to ``rq`` at q."""
        code, length = self.brush(cloth, p, q, max(rp, rq)), math.dist(p, q) or 1.0
        nx, ny = (p[1] - q[1]) / length, (q[0] - p[0]) / length
        ends = ((p, rp), (q, rq), (q, -rq), (p, -rp))
        self.polygon(code, [(x + nx * r, y + ny * r) for (x, y), r in ends])
        self.oval(code, p, rp, rp)
        self.oval(code, q, rq, rq)

    def block(self, cloth: Cloth, x0: float, y0: float, x1: float, y1: float) -> None:
        """An upright rectangle."""
        code = self.brush(cloth, ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), max(x1 - x0, 4))
        self.polygon(code, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def samples(fine: NDArray[Any]) -> NDArray[Any]:
    """The samples of each pixel, ``[FINER**2, H, W]`` of ``[FINER * H, FINER * W]``."""
    return np.array([fine[i::FINER, j::FINER] for i in range(FINER) for j in range(FINER)])


def paint(pen: Pen, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colours, patterns, shading, light across the image, optics and sensor: uint8 ``[H, W, 3]``."""
    codes = np.asarray(pen.codes)
    height, width = codes.shape[0] // FINER, codes.shape[1] // FINER
    look = np.array(pen.rows, np.float32).T.take(codes, axis=1)
    y, x = (((np.arange(side * FINER, dtype=np.float32) + 0.5) / FINER) for side in (height, width))

    def plane(row: int) -> Floats:
        return np.asarray(look[row] * x + look[row + 1] * y[:, None] + look[row + 2])

    mixed = 0.5 + look[15] * np.sin(plane(6)) + look[16] * np.sin(plane(9))
    for row, sides in ((17, (5, 14)), (18, (50, 110))):
        for side in sides:
            grid = Image.fromarray(rng.standard_normal((side, side), dtype=np.float32))
            noise = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
            mixed += 0.5 * look[row] * noise.repeat(FINER, 0).repeat(FINER, 1)
    colours = look[:3] + np.clip(mixed, 0, 1) * (look[3:6] - look[:3])
    colours *= 1 + rng.uniform(0.1, 0.35) * np.clip(plane(12), -1, 1)
    image = np.stack([samples(channel).mean(0) for channel in colours], -1)
    # Light falls off across the image, a lens blurs, a sensor adds noise.
    right, down = np.ix_(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width))
    light = 1 + rng.uniform(-0.3, 0.3) * right + rng.uniform(-0.3, 0.3) * down
    image *= (light * rng.uniform(0.7, 1.15))[..., None] * rng.uniform(0.9, 1.1, 3)
    blur = rng.uniform(0, 0.25)
    for axis in (0, 1):
        image = ndimage.correlate1d(image, [blur, 1 - 2 * blur, blur], axis)
    image = image * 255 + rng.uniform(1, 9) * rng.standard_normal(image.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
