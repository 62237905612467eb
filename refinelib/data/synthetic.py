"""Drawn people in front of clutter, for runs without a data set."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from refinelib.data.errors import DataError
from refinelib.data.scenes import MIN_SIDE, People, PeopleBuilder, Scene

#: Pixels are drawn this many times finer in each direction, then averaged.
FINER = 2
_SKIN = ((0.96, 0.82, 0.72), (0.90, 0.72, 0.58), (0.78, 0.58, 0.44),
         (0.60, 0.42, 0.30), (0.44, 0.29, 0.20), (0.30, 0.20, 0.15))
_HAIR = ((0.10, 0.08, 0.07), (0.25, 0.16, 0.10), (0.45, 0.29, 0.16),
         (0.74, 0.58, 0.34), (0.55, 0.25, 0.12), (0.62, 0.61, 0.60))
#: See ``_Cloth.mix``: plain (twice as often), mottled, striped, checked, printed finely and coarsely.
_PATTERNS = ((0, 0, 0.15, 0.15), (0, 0, 0.15, 0.15), (0, 0, 0.3, 0), (2, 0, 0, 0), (0, 1, 0, 0.1), (0.5, 0.5, 0, 0.1),
             (0, 0, 0, 1.2), (0, 0, 1, 0.4))

Point = tuple[float, float]
Colour = tuple[float, float, float]


class SyntheticPeople:
    """Jointed figures with clothes, hair and shoes, 1 to 4 an image, over clutter of their own colours.

    Image ``i`` depends on ``(seed, split, i)`` alone: any process draws the same one, in any
    order, and a source with more images begins with the same ones. Every image has a ROI.

    Args:
        n_images: number of images, at least 1.
        split: ``train``, ``val`` or any other name; each is a stream of images of its own.
        seed: at least 0.

    Raises:
        DataError: no image asked for, or a negative seed.
    """

    name = "synthetic"

    def __init__(self, n_images: int, split: str = "train", seed: int = 1729) -> None:
        if n_images < 1:
            raise DataError(f"synthetic people need at least one image, and {n_images} were asked for")
        if seed < 0:
            raise DataError(f"the seed of synthetic people is {seed}: give 0 or more")
        self.n_images, self.split, self.seed = int(n_images), split, int(seed)
        self._indexed: dict[int, People] = {}

    def __len__(self) -> int:
        return self.n_images

    def people(self, max_images: int | None = None) -> People:
        """Every ROI of the first ``max_images`` images; draws outlines, not colours.

        Raises:
            DataError: ``max_images`` is under 1.
        """
        count = self.n_images if max_images is None else min(max_images, self.n_images)
        if count < 1:
            raise DataError(f"max_images is {max_images}: give at least 1")
        if count not in self._indexed:
            builder = PeopleBuilder()
            for index in range(count):
                layout = self._layout(index)
                slots = list(range(len(layout.boxes)))
                # An annotation id names the image and the person in it, as for Penn-Fudan.
                ids = [(index + 1) * 1000 + slot for slot in slots]
                builder.add(index + 1, layout.owner.shape, ids, slots, layout.boxes, layout.areas, f"image {index + 1}")
            self._indexed[count] = builder.people()
        return self._indexed[count]

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``people()`` and the visible pixels of all its persons.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= index < self.n_images:
            raise IndexError(f"there is no synthetic image {index}: they are 0 to {self.n_images - 1}")
        layout = self._layout(index)
        image = _paint(layout, self._rng(index, "paint"))
        return Scene(image, layout.owner[None] == np.arange(1, len(layout.boxes) + 1)[:, None, None])

    def fingerprint(self) -> str:
        """Of seed, split, number of images and this module: another way to draw is other data."""
        parts = json.dumps([self.seed, self.split, self.n_images]).encode()
        return hashlib.sha256(parts + Path(__file__).read_bytes()).hexdigest()

    def _rng(self, index: int, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index, zlib.crc32(what.encode())])

    def _layout(self, index: int) -> _Layout:
        # One stream for all attempts: the first scene in which each person can be made out is taken.
        rng = self._rng(index, "layout")
        while True:
            layout = _draw_scene(rng)
            sides = layout.boxes[:, 2:] - layout.boxes[:, :2]
            seen = layout.areas > 0.15 * sides.prod(1)
            if len(sides) and seen.all() and (sides.min(1) >= MIN_SIDE).any():
                return layout


# -- drawing: every surface has a code; what a code looks like is a row of a table --------------------
@dataclass(frozen=True)
class _Layout:
    """``codes`` intp [2H, 2W]; ``table`` float32 [codes, 19]: see ``_Pen.brush``;
    ``owner`` int [H, W]: 0 nobody, 1.. person;
    ``boxes`` float64 [P, 4] xyxy and ``areas`` float64 [P] of visible pixels."""

    codes: np.ndarray
    table: np.ndarray
    owner: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class _Cloth:
    """Two colours and what mixes them: waves along and across the surface's axis, coarse and fine noise."""

    first: Colour
    second: Colour
    mix: tuple[float, float, float, float] = (0.0, 0.0, 0.2, 0.2)
    wavelength: float = 8.0


def _near(colour: Colour, rng: np.random.Generator, spread: float) -> Colour:
    """A little lighter or darker, and of slightly another hue."""
    mixed = np.array(colour) * (1 + 2 * spread * rng.normal()) + rng.normal(0, spread / 2, 3)
    return tuple(np.clip(mixed, 0.02, 1).tolist())


class _Pen:
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
            base = _SKIN[self.rng.integers(len(_SKIN))]
        else:
            base = self.palette[self.rng.integers(5)] if draw < 0.5 else self._fresh()
        return _near(base, self.rng, 0.04)

    def cloth(self, size: float) -> _Cloth:
        """Plain, striped along or across, checked or printed; ``size``: of its wearer, pixels."""
        mix = _PATTERNS[self.rng.integers(len(_PATTERNS))]
        first = self.colour()
        second = self.colour() if any(m > 0.4 for m in mix) else tuple(0.75 * c for c in first)
        return _Cloth(first, second, mix, size * self.rng.uniform(0.03, 0.09))

    def brush(self, cloth: _Cloth, start: Point, end: Point, radius: float) -> int:
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

    def limb(self, cloth: _Cloth, p: Point, q: Point, rp: float, rq: float) -> None:
        """A capsule that tapers from radius ``rp`` at p to ``rq`` at q."""
        code = self.brush(cloth, p, q, max(rp, rq))
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length, dx / length
        self.polygon(code, [(p[0] + nx * rp, p[1] + ny * rp), (q[0] + nx * rq, q[1] + ny * rq),
                            (q[0] - nx * rq, q[1] - ny * rq), (p[0] - nx * rp, p[1] - ny * rp)])
        self.oval(code, p, rp, rp)
        self.oval(code, q, rq, rq)

    def block(self, cloth: _Cloth, x0: float, y0: float, x1: float, y1: float) -> None:
        code = self.brush(cloth, ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), max(x1 - x0, 4))
        self.polygon(code, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _draw_scene(rng: np.random.Generator) -> _Layout:
    """Background, clutter and people from back to front, perhaps something before them."""
    height, width = int(rng.integers(176, 209)), int(rng.integers(176, 225))
    pen = _Pen(height, width, rng)
    horizon, camera = height * rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0)
    wall_colour, ground_colour = pen.colour(), pen.colour()
    wall = _Cloth(wall_colour, _near(wall_colour, rng, 0.12), (0, 0, rng.uniform(0.1, 0.6), rng.uniform(0, 0.5)))
    pen.block(wall, 0, 0, width, height)
    tiles = (rng.choice([0, 0.4]), rng.choice([0, 0.3]), rng.uniform(0, 0.5), rng.uniform(0, 0.6))
    ground = _Cloth(ground_colour, _near(ground_colour, rng, 0.1), tiles, rng.uniform(5, 40))
    tilt = rng.normal(0, 4)
    code = pen.brush(ground, (0, horizon), (width, horizon + rng.normal(0, 40)), 150)
    pen.polygon(code, [(0, horizon - tilt), (width, horizon + tilt), (width, height), (0, height)])
    for _ in range(rng.integers(3, 12)):
        _clutter(pen, rng.uniform(0, width), horizon + abs(rng.normal(0, 18)), rng.uniform(25, 120))

    tall = np.sort(np.exp(rng.uniform(math.log(45), math.log(150), rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))))
    if len(tall) > 1 and rng.random() < 0.5:  # a group: much the same distance
        tall = np.clip(tall[-1] * np.sort(rng.uniform(0.8, 1, len(tall))), 45, 150)
    spots, x = [], width * rng.uniform(0.15, 0.85)
    for size in tall:
        spots.append((x, min(horizon + camera * size + rng.normal(0, 3), height + 0.35 * size), size))
        near = rng.random() < 0.65
        x = x + size * rng.uniform(0.12, 0.45) * rng.choice([-1, 1]) if near else width * rng.uniform(0.05, 0.95)
        x = min(max(x, 0.02 * width), 0.98 * width)
    # All shadows first: a shadow upon a person would hide nothing of them.
    first, second = (tuple(0.5 * c for c in colour) for colour in (ground.first, ground.second))
    shadow = _Cloth(first, second, ground.mix, ground.wavelength)
    for x, foot, size in spots:
        code = pen.brush(shadow, (x, foot), (x + 9, foot), 150)
        pen.oval(code, (x + size * rng.uniform(-0.1, 0.1), foot), 0.2 * size, 0.03 * size)
    for number, (x, foot, size) in enumerate(spots, 1):
        pen.owner = number
        _figure(pen, x, foot, size)
        pen.owner = 0
        if rng.random() < 0.15:
            beside = size * rng.uniform(0.1, 0.45) * rng.choice([-1, 1])
            _clutter(pen, x + beside, foot + 2, size * rng.uniform(0.2, 0.6))
    if rng.random() < 0.25:
        _clutter(pen, rng.uniform(0, width), height + rng.uniform(0, 30), rng.uniform(40, 130))

    codes = np.asarray(pen.image).astype(np.intp)
    quarters = _quarters(np.asarray(pen.owners, np.uint8)[codes])
    # Most of a pixel's quarters decide whose it is, the nearest person where as many are another's.
    shares = np.stack([sum((q == n).view(np.uint8) for q in quarters) for n in range(len(tall), -1, -1)])
    owner = len(tall) - shares.argmax(0)
    seen = np.bincount(owner.ravel(), minlength=len(tall) + 1) > 0
    seen[0] = False  # the numbers of hidden people close up
    owner = (np.cumsum(seen) * seen)[owner]
    boxes, areas = [], []
    for number in range(1, owner.max() + 1):
        mask = owner == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        areas.append(mask.sum())
    table, boxes = np.array(pen.rows, np.float32), np.array(boxes, np.float64).reshape(-1, 4)
    return _Layout(codes, table, owner, boxes, np.array(areas, np.float64))


def _quarters(fine: np.ndarray) -> list[np.ndarray]:
    """The samples of each pixel: ``FINER**2`` arrays [H, W] of one [FINER*H, FINER*W]."""
    return [np.ascontiguousarray(fine[i::FINER, j::FINER]) for i in range(FINER) for j in range(FINER)]


def _clutter(pen: _Pen, x: float, y: float, size: float) -> None:
    """Something that stands at (x, y) and is no person: building, tree, bush, pole, sign, bin, car, bench, coat."""
    rng, cloth = pen.rng, pen.cloth(size)
    other = pen.cloth(size)
    kind = rng.integers(9)
    leaf = _Cloth(cloth.first, _near(cloth.first, rng, 0.2), (0, 0, 0.4, 1.0))
    if kind == 0:
        windows = _Cloth(cloth.first, other.first, (0.4, 0.4, 0.1, 0), size * rng.uniform(0.1, 0.25))
        pen.block(windows, x - size * rng.uniform(0.2, 0.6), y - size, x + size * rng.uniform(0.2, 0.6), y)
    elif kind in (1, 2):
        crown = y - size * (0.75 if kind == 1 else 0.2)
        if kind == 1:
            pen.limb(other, (x, y), (x + rng.normal(0, 0.05) * size, crown), size * 0.05, size * 0.035)
            for side in (-1, 1):
                pen.limb(other, (x, y - 0.45 * size), (x + side * 0.2 * size, crown), size * 0.03, size * 0.02)
        code = pen.brush(leaf, (x, crown), (x + 1, crown), 0.4 * size)
        for dx, dy, r in rng.uniform((-0.22, -0.16, 0.07), (0.22, 0.16, 0.17), (7, 3)) * size:
            pen.oval(code, (x + dx, crown + dy), r, r * 0.9)
    elif kind == 3:
        r = max(size * rng.uniform(0.01, 0.04), 1)
        pen.limb(cloth, (x, y), (x + rng.normal(0, 2), y - size * 1.3), r, r)
        if rng.random() < 0.6:  # a lamp or a sign, head-high
            code = pen.brush(other, (x, y - size), (x, y), r * 3)
            pen.oval(code, (x, y - size * 1.25), *(size * rng.uniform(0.05, 0.13, 2)))
    elif kind == 4:
        pen.block(cloth, x - 0.2 * size, y - 0.55 * size, x + 0.2 * size, y)
        pen.block(other, x - 0.23 * size, y - 0.6 * size, x + 0.23 * size, y - 0.5 * size)
    elif kind == 5:
        pen.limb(cloth, (x - 0.4 * size, y - 0.16 * size), (x + 0.4 * size, y - 0.16 * size), 0.12 * size, 0.12 * size)
        pen.limb(other, (x - 0.2 * size, y - 0.3 * size), (x + 0.15 * size, y - 0.3 * size), 0.1 * size, 0.1 * size)
        code = pen.brush(_Cloth((0.06,) * 3, (0.2,) * 3), (x, y), (x, y + 1), 5)
        for dx in (-0.28, 0.28):
            pen.oval(code, (x + dx * size, y - 0.05 * size), 0.08 * size, 0.08 * size)
    elif kind == 6:
        for height in (0.25, 0.4, 0.55):
            pen.block(cloth, x - 0.45 * size, y - height * size, x + 0.45 * size, y - (height - 0.07) * size)
        for dx in (-0.4, 0.36):
            pen.block(other, x + dx * size, y - 0.55 * size, x + (dx + 0.05) * size, y)
    elif kind == 7:
        r = size * rng.uniform(0.06, 0.2)
        pen.oval(pen.brush(cloth, (x, y - r), (x + 1, y - r), r), (x, y - r), r, r)
    else:  # a coat on a stand: clothes without anybody in them
        pen.limb(other, (x, y), (x, y - size), 0.015 * size, 0.015 * size)
        for side in (-1, 1):
            shoulder, cuff = (x + side * 0.08 * size, y - 0.82 * size), (x + side * 0.13 * size, y - 0.5 * size)
            pen.limb(cloth, shoulder, cuff, 0.04 * size, 0.03 * size)
        pen.limb(cloth, (x, y - 0.8 * size), (x, y - 0.45 * size), 0.09 * size, 0.12 * size)


def _pose(rng: np.random.Generator, sideways: bool) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Angles in degrees [2 sides, (thigh, shin, upper arm, forearm)], lean of the torso, length of each thigh.

    0 hangs down; positive is forwards (seen from the side) or outwards (from the front).
    """
    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    kinds = {"stand": 0.22, "walk": 0.27, "run": 0.1, "raise": 0.13,
             "hips": 0.08, "sit": 0.09, "star": 0.05, "fold": 0.06}
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    lean, thighs = between(-4, 4), (1.0, 1.0)
    if not sideways:
        sides = np.array([[between(2, 9), between(-2, 5), between(6, 18), between(-8, 12)] for _ in range(2)])
        if kind in ("walk", "run"):  # the leg behind is foreshortened, its shin more
            thighs, sides[0, 1] = (between(0.8, 0.95), 1.0), between(-12, 0)
            sides[:, 3] -= between(0, 30)
        elif kind == "raise":
            for side in sides[: rng.integers(1, 3)]:
                side[2:] = between(95, 165), between(110, 190)
        elif kind == "hips":
            sides[rng.integers(2):, 2:] = between(38, 50), between(-50, -30)
        elif kind == "sit":
            thighs, sides[:, 0] = (between(0.35, 0.5),) * 2, between(10, 30)
            sides[:, 1] = between(-8, 4)
        elif kind == "star":
            sides[:] = between(14, 28), between(10, 22), between(50, 120), between(50, 140)
        elif kind == "fold":
            sides[:, 2:] = (between(8, 14), between(-105, -80))
        return sides, lean, thighs
    sides = np.array([[s * between(1, 8), between(-8, 0), s * between(3, 12), between(8, 25)] for s in (-1, 1)])
    if kind in ("walk", "star", "hips"):
        swing, arm = between(12, 30), between(10, 32)
        sides = np.array([[-swing, -swing - between(5, 35), arm, arm + between(10, 45)],
                          [swing, swing - between(0, 12), -arm, -arm + between(5, 30)]])
    elif kind == "run":
        drive, push, arm = between(35, 65), between(10, 35), between(30, 55)
        sides = np.array([[-push, -push - between(20, 80), arm, arm + between(60, 95)],
                          [drive, drive - between(40, 80), -arm, -arm + between(50, 90)]])
        lean = between(5, 16)
    elif kind in ("raise", "fold"):
        for side in sides[: rng.integers(1, 3)]:
            side[2:] = between(50, 165), between(80, 175)
    elif kind == "sit":
        for side in sides:
            side[:] = between(76, 96), between(-14, 14), between(5, 40), between(45, 95)
        lean = between(-8, 10)
    return sides[:: rng.choice([-1, 1])], lean, thighs


def _figure(pen: _Pen, x: float, foot: float, size: float) -> None:
    """A person of that standing height whose lower foot is at (x, foot)."""
    rng, owner = pen.rng, pen.owner
    view = rng.choice(["front", "back", "side"], p=[0.4, 0.2, 0.4])
    sideways, facing = view == "side", float(rng.choice([-1, 1]))
    sides, lean, thighs = _pose(rng, sideways)
    girth = rng.uniform(0.85, 1.3) * size
    head = size * (rng.uniform(0.064, 0.072) if size > 75 or rng.random() < 0.6 else 0.088)
    tone, dye = (np.clip(c[rng.integers(len(c))] + rng.normal(0, 0.03, 3), 0, 1) for c in (_SKIN, _HAIR))
    skin = _Cloth(tuple(tone), tuple(tone * 0.85), (0, 0, 0.2, 0.1))
    hair = _Cloth(tuple(dye), tuple(dye * 0.6), (0, 0.4, 0, 0.6), size * 0.03)
    top, bottom, shoe = pen.cloth(size), pen.cloth(size), pen.cloth(size)
    sleeve = top if rng.random() < 0.8 else skin
    forearm = sleeve if rng.random() < 0.55 else skin
    legs = rng.choice(["trousers", "shorts", "skirt", "coat"], p=[0.62, 0.14, 0.14, 0.1])
    thigh = skin if legs == "skirt" and rng.random() < 0.7 else bottom
    shin = bottom if legs in ("trousers", "coat") else skin

    def turned(start: Point, angle: float, length: float, outward: float) -> Point:
        turn = math.radians(angle)
        return start[0] + outward * length * math.sin(turn), start[1] + length * math.cos(turn)

    # Outwards is left for one side and right for the other; seen from the side both face the same way.
    ways = (facing, facing) if sideways else (-1.0, 1.0)
    reach = np.multiply(thighs, 0.245) * np.cos(np.radians(sides[:, 0])) + 0.24 * np.cos(np.radians(sides[:, 1]))
    hip = (x, foot - (float(reach.max()) + 0.03) * size)
    neck = turned(hip, 180 - lean, 0.3 * size, facing)
    axis = ((neck[0] - hip[0]) / 0.3, (neck[1] - hip[1]) / 0.3)
    width, hips = (0.02 * size, 0.012 * size) if sideways else (0.075 * size + 0.022 * girth, 0.048 * girth)

    def leg(i: int) -> None:
        start = (hip[0] + (-1, 1)[i] * hips, hip[1])
        knee = turned(start, sides[i, 0], thighs[i] * 0.245 * size, ways[i])
        ankle = turned(knee, sides[i, 1], 0.24 * size, ways[i])
        pen.limb(shin, knee, ankle, 0.036 * girth, 0.023 * girth)
        pen.limb(thigh, start, knee, 0.054 * girth, 0.037 * girth)
        toe = turned(ankle, 78 + sides[i, 1] if sideways else 35, (0.06 if sideways else 0.03) * size, ways[i])
        pen.limb(shoe, (ankle[0], ankle[1] + 0.008 * size), (toe[0], toe[1] + 0.01 * size), 0.024 * size, 0.018 * size)

    def arm(i: int) -> None:
        start = (neck[0] + (-1, 1)[i] * width - 0.045 * axis[0], neck[1] - 0.045 * axis[1])
        elbow = turned(start, sides[i, 2], 0.165 * size, ways[i])
        wrist = turned(elbow, sides[i, 3], 0.14 * size, ways[i])
        hand = turned(wrist, sides[i, 3], 0.03 * size, ways[i])
        pen.limb(skin, wrist, hand, 0.018 * size, 0.016 * size)
        pen.limb(forearm, elbow, wrist, 0.027 * girth, 0.019 * girth)
        pen.limb(sleeve, start, elbow, 0.036 * girth, 0.028 * girth)
        if i == carries:
            pen.owner = 0  # what is carried is not the person
            pen.block(bag, hand[0] - 0.06 * size, hand[1], hand[0] + 0.06 * size, hand[1] + 0.13 * size)
            pen.owner = owner

    carries = int(rng.integers(2)) if rng.random() < 0.15 and abs(sides[:, 2:]).max() < 60 else -1
    bag = pen.cloth(size)
    seat = sides[:, 0].min() > 60 or thighs[1] < 0.6
    if seat:
        pen.owner = 0
        chair = pen.cloth(size)
        pen.block(chair, hip[0] - 0.2 * size, hip[1] + 0.03 * size, hip[0] + 0.2 * size, hip[1] + 0.09 * size)
        if not sideways and rng.random() < 0.5:
            pen.block(chair, hip[0] - 0.19 * size, hip[1] - 0.2 * size, hip[0] + 0.19 * size, hip[1] + 0.05 * size)
        for dx in (-0.19, 0.16):
            pen.block(chair, hip[0] + dx * size, hip[1] + 0.05 * size, hip[0] + (dx + 0.03) * size, foot)
        pen.owner = owner
    centre = (neck[0] + axis[0] * 0.115 + (0.015 * size * facing if sideways else 0), neck[1] + axis[1] * 0.115)
    front = facing if sideways else 0.0

    def face(dx: float, dy: float) -> Point:
        return centre[0] + dx * head, centre[1] + dy * head

    long_hair = rng.random() < 0.4
    if long_hair and view != "back":
        end = (neck[0] - 0.035 * size * front, neck[1])
        pen.limb(hair, face(-0.4 * front, 0), end, head * 1.1, head * (0.6 if sideways else 1.0))
    first, second = (0, 1) if facing > 0 else (1, 0)
    arms_behind = view == "back" and abs(sides[:, 3]).max() > 60
    if sideways or arms_behind:
        arm(first)
    if arms_behind:
        arm(second)
    leg(first)
    leg(second)
    if legs in ("skirt", "coat") and not seat:
        knees = [turned(hip, sides[i, 0], 0.2 * size, ways[i])[0] + (i - 0.5) * 2 * hips for i in range(2)]
        cloth, low = (bottom if legs == "skirt" else top), hip[1] + size * rng.uniform(0.13, 0.27)
        flare = 0.055 * girth + size * rng.uniform(0, 0.05)
        code = pen.brush(cloth, hip, (hip[0], low), flare * 2)
        band, high = hips + 0.05 * girth, hip[1] - 0.06 * size
        pen.polygon(code, [(hip[0] - band, high), (hip[0] + band, high),
                           (max(knees) + flare, low), (min(knees) - flare, low)])
    # The trunk: rounded shoulders, a waist, hips.
    code = pen.brush(top, neck, hip, 0.1 * girth)
    outer, waist = width + 0.036 * girth, (0.06 if sideways else 0.082) * girth
    shoulder = (neck[0] - 0.045 * axis[0], neck[1] - 0.045 * axis[1])
    middle = (neck[0] - 0.2 * axis[0], neck[1] - 0.2 * axis[1])
    base = hips + 0.054 * girth
    seams = [(neck, 0.035 * size, 0), (shoulder, outer, 0), (middle, waist, 0), (hip, base, 0.02 * size)]
    right, left = ([(p[0] + side * half, p[1] + down) for p, half, down in seams] for side in (1, -1))
    pen.polygon(code, right + left[::-1])
    for side in (-1, 1):
        pen.oval(code, (shoulder[0] + side * width, shoulder[1]), 0.037 * girth, 0.037 * girth)
    pen.limb(skin, neck, centre, 0.028 * girth, 0.026 * girth)
    # The head, its hair and a face where there are pixels for one.
    below = face(0, 0.1)
    pen.oval(pen.brush(skin, centre, below, head * 1.1), centre, head * 0.84, head * 1.1)
    style = rng.choice(["hair", "hat", "bald"], p=[0.78, 0.14, 0.08])
    if sideways:
        pen.oval(pen.brush(skin, centre, below, head), face(0.8 * front, 0.15), 0.18 * head, 0.16 * head)
    if style != "bald" or long_hair:
        crown = pen.brush(hair, centre, below, head)
        if view == "back":
            pen.oval(crown, face(0, -0.08), head * 0.92, head * (1.3 if long_hair else 1.15))
            if long_hair:
                pen.limb(hair, centre, (neck[0] - 0.06 * axis[0], neck[1] - 0.06 * axis[1]), head * 0.9, head * 0.75)
        elif sideways:
            pen.oval(crown, face(-0.12 * front, -0.2), head * 0.92, head, (95, 330) if front > 0 else (210, 85))
        else:
            pen.oval(crown, face(0, -0.12), head * 0.92, head * 1.08, (180, 360) if long_hair else (200, 340))
    if style == "hat":
        felt = pen.brush(shoe, centre, below, head)
        pen.oval(felt, face(0, -0.35), head * 0.95, head * 0.9, (180, 360))
        pen.oval(felt, face(0.5 * front, -0.38), head * 1.15, head * 0.16)
    if view != "back" and head > 4.5:
        dark = pen.brush(_Cloth((0.12, 0.08, 0.08), (0.2, 0.1, 0.1)), centre, below, head)
        for dx in (0.45 * front,) if sideways else (-0.34, 0.34):
            pen.oval(dark, face(dx, 0.02), 0.11 * head, 0.09 * head)
        lips = pen.brush(_Cloth((0.6, 0.25, 0.25), (0.5, 0.2, 0.2)), centre, below, head)
        pen.oval(lips, face(0.55 * front, 0.58), (0.12 if sideways else 0.24) * head, 0.07 * head)
    if not arms_behind:
        if not sideways:
            arm(first)
        arm(second)


def _paint(layout: _Layout, rng: np.random.Generator) -> np.ndarray:
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
        image[..., c] = sum(_quarters(fine)) / FINER**2
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
