"""Draws surfaces as codes on a canvas, and paints the codes: texture, light, optics.

Nothing here knows what a person is. A ``Pen`` lays one surface over another; each has a code, and what
a code looks like is a row of a table, so that one pass over the image paints all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

#: Pixels are drawn this many times finer in each direction, then averaged.
FINER = 2
#: Also found on things that are no skin.
SKIN = ((0.96, 0.82, 0.72), (0.90, 0.72, 0.58), (0.78, 0.58, 0.44),
         (0.60, 0.42, 0.30), (0.44, 0.29, 0.20), (0.30, 0.20, 0.15))
#: See ``Cloth.mix``: plain (twice as often), mottled, striped, checked, printed finely and coarsely.
PATTERNS = ((0, 0, 0.15, 0.15), (0, 0, 0.15, 0.15), (0, 0, 0.3, 0), (2, 0, 0, 0), (0, 1, 0, 0.1), (0.5, 0.5, 0, 0.1),
             (0, 0, 0, 1.2), (0, 0, 1, 0.4))

Point = tuple[float, float]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """``codes`` intp [2H, 2W]; ``table`` float32 [codes, 19]: see ``Pen.brush``;
    ``owner`` int [H, W]: 0 nobody, 1.. person;
    ``boxes`` float64 [P, 4] xyxy and ``areas`` float64 [P] of visible pixels."""

    codes: np.ndarray
    table: np.ndarray
    owner: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Cloth:
    """Two colours and what mixes them: waves along and across the surface's axis, coarse and fine noise."""

    first: Colour
    second: Colour
    mix: tuple[float, float, float, float] = (0.0, 0.0, 0.2, 0.2)
    wavelength: float = 8.0


def varied(colour: Colour, rng: np.random.Generator, spread: float) -> Colour:
    """A little lighter or darker, and of slightly another hue."""
    mixed = np.array(colour) * (1 + 2 * spread * rng.normal()) + rng.normal(0, spread / 2, 3)
    return tuple(np.clip(mixed, 0.02, 1).tolist())


class Pen:
    """Draws surfaces over one another as codes, and notes the look and the owner of each code."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image = Image.new("I", (width * FINER, height * FINER))
        self._draw = ImageDraw.Draw(self.image)
        self.rows: list[tuple[float, ...]] = []
        self.owners: list[int] = []
        self.owner = 0
        angle = rng.uniform(0, 2 * math.pi)
        self.light = (math.cos(angle), math.sin(angle) - 0.5)
        #: Shared by people and clutter, so that a colour says little about what it belongs to.
        self.palette = np.array([self._fresh() for _ in range(5)])

    def _fresh(self) -> np.ndarray:
        """Mostly dull, sometimes vivid."""
        hue = self.rng.random(3)
        return self.rng.uniform(0.08, 0.97) * (1 - self.rng.beta(1.1, 2.2) * (1 - hue / hue.max()))

    def colour(self) -> Colour:
        draw = self.rng.random()
        if draw < 0.12:  # skin on things that are no skin
            base = SKIN[self.rng.integers(len(SKIN))]
        else:
            base = self.palette[self.rng.integers(5)] if draw < 0.5 else self._fresh()
        return varied(base, self.rng, 0.04)

    def cloth(self, size: float) -> Cloth:
        """Plain, striped along or across, checked or printed; ``size``: of its wearer, pixels."""
        mix = PATTERNS[self.rng.integers(len(PATTERNS))]
        first = self.colour()
        second = self.colour() if any(m > 0.4 for m in mix) else tuple(0.75 * c for c in first)
        return Cloth(first, second, mix, size * self.rng.uniform(0.03, 0.09))

    def brush(self, cloth: Cloth, start: Point, end: Point, radius: float) -> int:
        """A new code: ``cloth`` laid along start-end, lit as a cylinder of that radius."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        k = 2 * math.pi / max(cloth.wavelength, 2.5) / length
        along = (k * dx, k * dy, -k * (dx * start[0] + dy * start[1]))
        across = (-k * dy, k * dx, k * (dy * start[0] - dx * start[1]))
        lx, ly = (component / max(radius, 1.0) for component in self.light)
        lit = (lx, ly, -lx * (start[0] + end[0]) / 2 - ly * (start[1] + end[1]) / 2)
        change = (b - a for a, b in zip(cloth.first, cloth.second))
        self.rows.append((*cloth.first, *change, *along, *across, *lit, *cloth.mix))
        self.owners.append(self.owner)
        return len(self.rows) - 1

    def polygon(self, code: int, points: list[Point]) -> None:
        self._draw.polygon([(x * FINER, y * FINER) for x, y in points], fill=code)

    def oval(self, code: int, centre: Point, rx: float, ry: float, angles: tuple[float, float] | None = None) -> None:
        """An ellipse, or its part between two angles (degrees, clockwise from the right)."""
        (x, y), s = centre, FINER
        box = ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)
        self._draw.ellipse(box, fill=code) if angles is None else self._draw.chord(box, *angles, fill=code)

    def limb(self, cloth: Cloth, p: Point, q: Point, rp: float, rq: float) -> None:
        """A capsule that tapers from radius ``rp`` at p to ``rq`` at q."""
        code = self.brush(cloth, p, q, max(rp, rq))
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length, dx / length
        self.polygon(code, [(p[0] + nx * rp, p[1] + ny * rp), (q[0] + nx * rq, q[1] + ny * rq),
                            (q[0] - nx * rq, q[1] - ny * rq), (p[0] - nx * rp, p[1] - ny * rp)])
        self.oval(code, p, rp, rp)
        self.oval(code, q, rq, rq)

    def block(self, cloth: Cloth, x0: float, y0: float, x1: float, y1: float) -> None:
        code = self.brush(cloth, ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), max(x1 - x0, 4))
        self.polygon(code, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def sample_grids(fine: np.ndarray) -> list[np.ndarray]:
    """The samples of each pixel: ``FINER**2`` arrays [H, W] of one [FINER*H, FINER*W]."""
    return [np.ascontiguousarray(fine[i::FINER, j::FINER]) for i in range(FINER) for j in range(FINER)]


def paint(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Colours, patterns, shading, light across the image, optics and sensor: uint8 [H, W, 3]."""
    height, width = layout.owner.shape
    noise = []
    for sides in ((5, 14), (50, 110)):
        field = np.zeros((height, width), np.float32)
        for side in sides:
            grid = Image.fromarray(rng.standard_normal((side, side), dtype=np.float32))
            field += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        noise.append(field.repeat(FINER, 0).repeat(FINER, 1))
    columns = np.ascontiguousarray(layout.table.T)
    x = ((np.arange(width * FINER, dtype=np.float32) + 0.5) / FINER)[None]
    y = ((np.arange(height * FINER, dtype=np.float32) + 0.5) / FINER)[:, None]

    def look(column: int) -> np.ndarray:
        return columns[column].take(layout.codes)

    def plane(column: int) -> np.ndarray:
        return look(column) * x + look(column + 1) * y + look(column + 2)

    mixed = 0.5 + look(17) * noise[0] * 0.5 + look(18) * noise[1] * 0.5
    for amplitude, phase in ((15, 6), (16, 9)):
        weight = look(amplitude)
        mixed += weight * np.sin(plane(phase), where=weight > 0, out=np.zeros_like(mixed))
    np.clip(mixed, 0, 1, out=mixed)
    lit = 1 + rng.uniform(0.1, 0.35) * np.clip(plane(12), -1, 1)
    image = np.empty((height, width, 3), np.float32)
    for c in range(3):
        fine = (look(c) + mixed * look(3 + c)) * lit
        image[..., c] = sum(sample_grids(fine)) / FINER**2
    # Light falls off across the image, a lens blurs, a sensor adds noise.
    slope = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    light = 1 + slope[0] * (x[:, ::FINER] / width - 0.5) + slope[1] * (y[::FINER] / height - 0.5)
    image *= (light * rng.uniform(0.7, 1.15))[..., None] * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    side = rng.uniform(0, 0.25)
    for _ in range(2):
        padded = np.pad(image, ((1, 1), (0, 0), (0, 0)), "edge")
        image = ((1 - 2 * side) * image + side * (padded[2:] + padded[:-2])).swapaxes(0, 1)
    image = image * 255 + rng.uniform(1, 9) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
