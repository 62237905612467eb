"""Drawn persons in front of clutter, for runs without a data set.

A :class:`Pen` lays one surface over another on a canvas of codes. The look of a code is a row of a table, so
that one pass over the image (:func:`paint`) paints all of them: texture, light, optics.
"""

import hashlib
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from refinelib.data.sources import MIN_SIDE, DataError, IndexedSource, InstancesBuilder, Scene, box_of

Point = tuple[float, float]
Floats = NDArray[Any]

#: Pixels are drawn this many times finer in each direction, then averaged.
FINER = 2
#: Skin, also found on things that are no skin; hair. RGB in 0..255.
SKIN = ((245, 209, 184), (230, 184, 148), (199, 148, 112), (153, 107, 77), (112, 74, 51), (77, 51, 38))
HAIR = ((26, 20, 18), (64, 41, 26), (115, 74, 41), (189, 148, 87), (140, 64, 31), (158, 156, 153))
#: Weights of what mixes the two colours of a cloth: waves along and across it, coarse and fine noise. Plain
#: (twice as often), striped along and across, checked, and printed finely and coarsely.
PLAIN = (0, 0, 0.15, 0.15)
PATTERNS = (PLAIN, PLAIN, (2, 0, 0, 0), (0, 1, 0, 0.1), (0.5, 0.5, 0, 0.1), (0, 0, 0, 1.2), (0, 0, 1, 0.4))
#: Lowest and highest thigh angle, knee bend, arm angle and elbow bend in degrees, of each side of the body.
#: 0 hangs straight down; positive is outwards, or forwards where seen from the side. Repeated ones are
#: likelier.
STAND = (2, 9, -7, 2, 6, 18, -20, 0)
UP = (2, 9, -7, 2, 95, 165, 5, 30)
STAR = (14, 28, -8, -2, 50, 120, 5, 30)
FRONT_POSES = ((STAND, STAND),) * 7 + ((UP, STAND), (UP, UP), (STAR, STAR))
WALK = ((-30, -12, -35, -5, 10, 32, 10, 45), (12, 30, -12, 0, -32, -10, 5, 30))
RUN = ((-35, -10, -80, -20, 30, 55, 60, 95), (35, 65, -80, -40, -55, -30, 50, 90))
SIDE_STAND = (-8, 8, -8, 0, -12, 12, 8, 25)
SIT = (76, 96, -95, -75, 5, 40, 30, 60)
SIDE_POSES = ((SIDE_STAND, SIDE_STAND), WALK) * 4 + (RUN, (SIT, SIT))
Parts = tuple[tuple[float, float, float], ...]
#: Length and radius at both ends of each part of a limb, from the body outwards, in standing heights.
LEG = ((0.245, 0.054, 0.037), (0.24, 0.036, 0.023), (0.05, 0.024, 0.018))
ARM = ((0.165, 0.036, 0.028), (0.14, 0.027, 0.019), (0.03, 0.018, 0.016))
#: Things that are no person: parts of cloth 0 or 1 from (x, height) to (x, height), a capsule of that radius
#: or, for 0, a block; in sizes of the thing.
CLUTTER = (
    # a house, a tree, a bush, a lamp, a car, a coat on a stand
    ((0, -0.4, 1.0, 0.4, 0, 0), (1, -0.45, 1.05, 0.45, 0.95, 0)),
    ((1, 0, 0, 0.03, 0.8, 0.05), (0, -0.15, 0.8, 0.15, 0.75, 0.17), (0, -0.05, 0.95, 0.1, 0.9, 0.15)),
    ((0, -0.2, 0.15, 0.2, 0.2, 0.16), (0, -0.02, 0.3, 0.08, 0.3, 0.14)),
    ((0, 0, 0, 0.03, 1.3, 0.02), (1, -0.04, 1.25, 0.05, 1.25, 0.07)),
    ((0, -0.4, 0.16, 0.4, 0.16, 0.12), (0, -0.2, 0.3, 0.15, 0.3, 0.1), (1, -0.28, 0.05, -0.27, 0.05, 0.07)),
    ((1, 0, 0, 0, 1, 0.015), (0, -0.09, 0.45, -0.05, 0.8, 0.08), (0, 0.09, 0.45, 0.05, 0.8, 0.08)),
)


class Cloth(NamedTuple):
    """Two colours (RGB in 0..1), what mixes them (see ``PATTERNS``), and the waves' length in pixels."""

    first: Floats
    second: Floats
    mix: tuple[float, ...] = PLAIN
    wavelength: float = 8.0


class Pen:
    """Draws surfaces over one another as codes, and notes the look and the owner of each code.

    Attributes:
        codes: PIL image, ``FINER`` times as large as the canvas.
        rows: look of each code: two colours, waves, light, and the mix; then the ``owner`` at that time.
        owner: the person that is being drawn, from 1; 0 for all other things.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.rng, self.codes, self.owner = rng, Image.new("I", (width * FINER, height * FINER)), 0
        self._draw = ImageDraw.Draw(self.codes)
        self.rows: list[Floats] = []
        angle = rng.uniform(0, 2 * math.pi)
        self._light = math.cos(angle), math.sin(angle) - 0.5
        # Shared by persons and clutter, so that a colour says little about what it belongs to.
        self._palette = [self._fresh() for _ in range(5)]

    def _fresh(self) -> Floats:
        """Mostly dull, sometimes vivid."""
        hue = self.rng.random(3)
        vivid = 1 - self.rng.beta(1.1, 2.2) * (1 - hue / hue.max())
        return np.asarray(self.rng.uniform(0.08, 0.97) * vivid)

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
        look = [cloth.first, cloth.second, along, across, lit, cloth.mix]
        self.rows.append(np.concatenate([*look, [self.owner]]))
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
        corners = ((p, rp), (q, rq), (q, -rq), (p, -rp))
        self.polygon(code, [(x + nx * r, y + ny * r) for (x, y), r in corners])
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
    look = np.array(pen.rows, np.float32)[:, :-1].T.take(codes, axis=1)
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


def _clutter(pen: Pen, x: float, y: float, size: float) -> None:
    """A thing that stands at (x, y)."""
    cloths, wide = (pen.cloth(size), pen.cloth(size)), pen.rng.choice([-1, 1]) * pen.rng.uniform(0.6, 1.4)
    for cloth, *place, radius in CLUTTER[pen.rng.integers(len(CLUTTER))]:
        x0, x1 = (x + wide * size * dx for dx in place[::2])
        y0, y1 = (y - size * up for up in place[1::2])
        if radius:
            radius *= size * pen.rng.uniform(0.8, 1.2)
            pen.limb(cloths[cloth], (x0, y0), (x1, y1), radius, radius)
        else:
            pen.block(cloths[cloth], min(x0, x1), y0, max(x0, x1), y1)


def _end(start: Point, degrees: float, length: float) -> Point:
    """Where a limb ends; 0 degrees is down, 90 to the right."""
    angle = math.radians(degrees)
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _limb(
    pen: Pen, start: Point, angles: Floats, parts: Parts, cloths: tuple[Cloth, ...], size: float, girth: float
) -> None:
    """An arm or a leg from ``start`` outwards; the part at the body covers the next one."""
    joints = [start]
    for degrees, (length, _, _) in zip(angles, parts, strict=True):
        joints.append(_end(joints[-1], degrees, length * size))
    for i in (2, 1, 0):
        _, first, last = parts[i]
        pen.limb(cloths[i], joints[i], joints[i + 1], first * girth, last * girth)


def _head(pen: Pen, centre: Point, size: float, view: str, facing: float, skin: Cloth, hair: Cloth) -> None:
    """The head, its hair, and eyes where there are pixels for them."""
    full, dark = (0, 360), Cloth(np.full(3, 0.1), np.full(3, 0.2))
    ovals = [(skin, 0.0, 0.0, 0.84, 1.1, full)]
    if view == "side":
        ovals.append((skin, 0.8 * facing, 0.15, 0.18, 0.16, full))
        ovals.append((hair, -0.12 * facing, -0.2, 0.92, 1, (95, 330) if facing > 0 else (210, 85)))
    else:
        ovals.append((hair, 0, -0.1, 0.92, 1.1, full if view == "back" else (190, 350)))
    if view != "back" and size > 4.5:
        eyes = (0.45 * facing,) if view == "side" else (-0.34, 0.34)
        ovals += [(dark, dx, 0.02, 0.11, 0.09, full) for dx in eyes]
    x, y = centre
    for cloth, dx, dy, rx, ry, angles in ovals:
        code = pen.brush(cloth, centre, (x, y + 0.1 * size), size)
        pen.oval(code, (x + dx * size, y + dy * size), rx * size, ry * size, *angles)


def _person(pen: Pen, x: float, foot: float, size: float) -> None:
    """A jointed person of a standing height of ``size`` pixels, whose lower foot is at (x, foot)."""
    rng = pen.rng
    girth, head = rng.uniform(0.85, 1.3) * size, rng.uniform(0.064, 0.082) * size
    view, facing = rng.choice(["front", "back", "side"], p=[0.4, 0.2, 0.4]), rng.choice([-1.0, 1.0])
    sideways = view == "side"
    # Outwards is left for one side and right for the other; seen from the side both face the same way.
    outwards = (facing, facing) if sideways else (-1.0, 1.0)
    poses = SIDE_POSES if sideways else FRONT_POSES
    pose = np.reshape(poses[rng.integers(len(poses))], (2, 4, 2))[:: rng.choice([-1, 1])]
    thighs, knees, arms, elbows = rng.uniform(pose[..., 0], pose[..., 1]).T
    shins, forearms = thighs + knees, arms + elbows

    tone, dye = pen.one_of(SKIN), pen.one_of(HAIR)
    skin, hair = Cloth(tone, tone * 0.85), Cloth(dye, dye * 0.6, (0, 0.4, 0, 0.6), size * 0.03)
    top, bottom, shoe = (pen.cloth(size) for _ in range(3))
    cuff, shin = top if rng.random() < 0.5 else skin, bottom if rng.random() < 0.7 else skin

    drop = 0.245 * np.cos(np.radians(thighs)) + 0.24 * np.cos(np.radians(shins))
    hip = (x, foot - (float(drop.max()) + 0.03) * size)
    neck = _end(hip, facing * (180 - rng.uniform(-4, 12 if sideways else 4)), 0.3 * size)
    hips = 0.012 * size if sideways else 0.048 * girth
    shoulders = 0.02 * size if sideways else 0.075 * size + 0.022 * girth

    def on_axis(above: float, dx: float = 0.0) -> Point:
        """A point ``above`` the neck on the trunk's axis (in standing heights), ``dx`` pixels beside it."""
        return neck[0] + (neck[0] - hip[0]) / 0.3 * above + dx, neck[1] + (neck[1] - hip[1]) / 0.3 * above

    def arm(side: int) -> None:
        start = on_axis(-0.045, (-1, 1)[side] * shoulders)
        angles = outwards[side] * np.array([arms[side], forearms[side], forearms[side]])
        _limb(pen, start, angles, ARM, (top, cuff, skin), size, girth)

    far, near = (0, 1) if facing > 0 else (1, 0)
    if sideways:
        arm(far)
    for side in (far, near):
        start = hip[0] + (-1, 1)[side] * hips, hip[1]
        toe = 78 + shins[side] if sideways else 35
        angles = outwards[side] * np.array([thighs[side], shins[side], toe])
        _limb(pen, start, angles, LEG, (bottom, shin, shoe), size, girth)
    # Half widths of shoulders, waist and hips along the axis.
    seams = [(0.0, 0.035 * size), (-0.045, shoulders + 0.036 * girth)]
    seams += [(-0.2, (0.06 if sideways else 0.082) * girth), (-0.32, hips + 0.054 * girth)]
    code = pen.brush(top, on_axis(0.0), on_axis(-0.32), 0.1 * girth)
    right, left = ([on_axis(above, sign * half) for above, half in seams] for sign in (1, -1))
    pen.polygon(code, right + left[::-1])
    face = on_axis(0.115, 0.015 * size * facing * sideways)
    pen.limb(skin, neck, face, 0.028 * girth, 0.026 * girth)
    _head(pen, face, head, view, facing, skin, hair)
    if not sideways:
        arm(far)
    arm(near)


def _draw_scene(rng: np.random.Generator) -> tuple[Pen, NDArray[np.bool_]]:
    """Background, clutter and persons from back to front; the visible pixels of each person ``[P, H, W]``."""
    height, width = int(rng.integers(176, 209)), int(rng.integers(176, 225))
    pen = Pen(height, width, rng)
    horizon, camera, tilt = height * rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0), rng.normal(0, 4)
    wall, floor = pen.colour(), pen.colour()
    noise = rng.uniform(0.1, 0.6), rng.uniform(0, 0.5)
    pen.block(Cloth(wall, pen.varied(wall, 0.12), (0, 0, *noise)), 0, 0, width, height)
    tiles = (rng.choice([0, 0.4]), rng.choice([0, 0.3]), *noise)
    ground = Cloth(floor, pen.varied(floor, 0.1), tiles, rng.uniform(5, 40))
    code = pen.brush(ground, (0, horizon), (width, horizon + rng.normal(0, 40)), 150)
    pen.polygon(code, [(0, horizon - tilt), (width, horizon + tilt), (width, height), (0, height)])
    for _ in range(rng.integers(3, 12)):
        _clutter(pen, rng.uniform(0, width), horizon + abs(rng.normal(0, 18)), rng.uniform(25, 120))

    count = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))
    sizes = np.sort(np.exp(rng.uniform(math.log(45), math.log(150), count)))
    if rng.random() < 0.5:  # a group: much the same distance
        sizes = np.sort(rng.uniform(0.8, 1, count)) * sizes[-1].clip(60)
    spots, x = [], width * rng.uniform(0.15, 0.85)
    for size in sizes.tolist():
        spots.append((x, min(horizon + camera * size + rng.normal(0, 3), height + 0.35 * size), size))
        beside = x + size * rng.uniform(0.12, 0.45) * rng.choice([-1, 1])
        x = min(max(beside if rng.random() < 0.65 else width * rng.random(), 0.03 * width), 0.97 * width)
    shadow = Cloth(0.5 * ground.first, 0.5 * ground.second, ground.mix, ground.wavelength)
    for x, foot, size in spots:  # before all persons, so that no shadow hides part of one
        pen.oval(pen.brush(shadow, (x, foot), (x + 9, foot), 150), (x, foot), 0.2 * size, 0.03 * size)
    for number, (x, foot, size) in enumerate(spots, 1):
        pen.owner = number
        _person(pen, x, foot, size)
        pen.owner = 0
        if rng.random() < 0.2:  # a thing that hides part of the person
            beside = size * rng.uniform(0.15, 0.45) * rng.choice([-1, 1])
            _clutter(pen, x + beside, foot + 2, size * rng.uniform(0.2, 0.7))

    owners = samples(np.array(pen.rows)[:, -1].astype(int)[np.asarray(pen.codes)])
    # Most of a pixel's samples decide its owner, the nearest person where as many are another's.
    votes = np.array([(owners == person).sum(0) for person in range(count, -1, -1)])
    owner = count - votes.argmax(0)
    return pen, owner == np.unique(owner[owner > 0])[:, None, None]


class SyntheticPeople(IndexedSource):
    """Jointed figures with clothes, hair and shoes, 1 to 4 an image, over clutter of their own colours.

    Image ``i`` depends on ``(seed, split, i)`` alone: any process draws the same one, in any order, and a
    source with more images begins with the same ones. Every image has a ROI.

    Args:
        n_images: number of images, at least 1.
        split: ``train``, ``val`` or any other name; each is a stream of images of its own.
        seed: at least 0.

    Raises:
        DataError: no image asked for, or a negative seed.

    Example:
        >>> source = SyntheticPeople(2, "val")
        >>> source.scene(0).image.dtype.name, source.instances().images
        ('uint8', 2)
    """

    name = "synthetic"

    def __init__(self, n_images: int, split: str = "train", seed: int = 1729) -> None:
        if n_images < 1 or seed < 0:
            raise DataError(f"give at least 1 image and a seed of 0 or more, not {n_images} and {seed}")
        super().__init__(split)
        self.n_images, self.seed = n_images, seed

    def __len__(self) -> int:
        return self.n_images

    def _listed(self, builder: InstancesBuilder) -> tuple[Iterable[int], str, str]:
        return range(self.n_images), "synthetic", ""

    def _add(self, image: int, builder: InstancesBuilder) -> None:
        _, masks = self._draw(image)
        # An annotation id names the image and the person in it, as for Penn-Fudan.
        ids = [(image + 1) * 1000 + slot for slot in range(len(masks))]
        boxes, areas = [box_of(mask) for mask in masks], masks.sum((1, 2)).tolist()
        builder.add(f"image {image + 1}", image + 1, masks.shape[1:], ids, boxes, areas)

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the visible pixels of all its persons.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= index < self.n_images:
            raise IndexError(f"there is no synthetic image {index}: they are 0 to {self.n_images - 1}")
        pen, masks = self._draw(index)
        return Scene(paint(pen, self._rng(index, "paint")), masks)

    def fingerprint(self) -> str:
        """Of seed, split, number of images and this module: another way to draw is other data."""
        key = repr((self.seed, self.split, self.n_images)).encode()
        return hashlib.sha256(key + Path(__file__).read_bytes()).hexdigest()

    def _rng(self, index: int, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.split} {what}".encode()), index])

    def _draw(self, index: int) -> tuple[Pen, NDArray[np.bool_]]:
        """The first scene of the image's stream in which each person can be made out, and its masks."""
        rng = self._rng(index, "layout")
        while True:
            pen, masks = _draw_scene(rng)
            boxes = np.array([box_of(mask) for mask in masks]).reshape(-1, 4)
            sides = boxes[:, 2:] - boxes[:, :2]
            visible = masks.sum((1, 2)) > 0.15 * sides.prod(1)
            if visible.all() and (sides.min(1) >= MIN_SIDE).any():
                return pen, masks
