"""Drawn persons in front of clutter, for runs without a data set."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refinelib.data import painting
from refinelib.data.painting import HAIR, SKIN, Cloth, Floats, Pen, Point, paint, samples
from refinelib.data.sources import MIN_SIDE, DataError, Instances, InstancesBuilder, Scene, box_of

#: Lowest and highest thigh angle, knee bend, arm angle and elbow bend in degrees, of each side of the body.
#: 0 hangs straight down; positive is outwards, or forwards where seen from the side. Repeated ones are
#: likelier.
STAND = (2, 9, -7, 2, 6, 18, -20, 0)
UP = (2, 9, -7, 2, 95, 165, 5, 30)
STAR = (14, 28, -8, -2, 50, 120, 5, 30)
HIP = (2, 9, -7, 2, 38, 50, -95, -70)
FRONT_POSES = ((STAND, STAND),) * 7 + ((UP, STAND), (UP, UP), (STAND, HIP), (STAR, STAR))
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
    if view == "back":
        ovals.append((hair, 0, -0.08, 0.92, 1.15, full))
    elif view == "side":
        ovals.append((skin, 0.8 * facing, 0.15, 0.18, 0.16, full))
        ovals.append((hair, -0.12 * facing, -0.2, 0.92, 1, (95, 330) if facing > 0 else (210, 85)))
    else:
        ovals.append((hair, 0, -0.12, 0.92, 1.08, (190, 350)))
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
    noise = (0, 0, rng.uniform(0.1, 0.6), rng.uniform(0, 0.5))
    pen.block(Cloth(wall, pen.varied(wall, 0.12), noise), 0, 0, width, height)
    tiles = (rng.choice([0, 0.4]), rng.choice([0, 0.3]), *noise[2:])
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

    owners = samples(np.array(pen.owners)[np.asarray(pen.codes)])
    # Most of a pixel's samples decide its owner, the nearest person where as many are another's.
    votes = np.array([(owners == person).sum(0) for person in range(count, -1, -1)])
    owner = count - votes.argmax(0)
    return pen, owner == np.unique(owner[owner > 0])[:, None, None]


class SyntheticPeople:
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
            rule = "give at least 1 image and a seed of 0 or more"
            raise DataError(f"synthetic people of {n_images} images with seed {seed}: {rule}")
        self.n_images, self.split, self.seed = n_images, split, seed
        self._indexed: dict[int, Instances] = {}

    def __len__(self) -> int:
        return self.n_images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images; draws outlines, not colours."""
        count = min(max_images or self.n_images, self.n_images)
        if count not in self._indexed:
            builder = InstancesBuilder()
            for index in range(count):
                _, masks = self._draw(index)
                # An annotation id names the image and the person in it, as for Penn-Fudan.
                ids = [(index + 1) * 1000 + slot for slot in range(len(masks))]
                boxes, areas = [box_of(mask) for mask in masks], masks.sum((1, 2)).tolist()
                builder.add(f"image {index + 1}", index + 1, masks.shape[1:], ids, boxes, areas)
            self._indexed[count] = builder.instances("synthetic")
        return self._indexed[count]

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
        """Of seed, split, number of images and the modules that draw: another way to draw is other data."""
        digest = hashlib.sha256(json.dumps([self.seed, self.split, self.n_images]).encode())
        for module in (__file__, painting.__file__):
            digest.update(Path(module).read_bytes())
        return digest.hexdigest()

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
