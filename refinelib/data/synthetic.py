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
from refinelib.data.painting import HAIR, SKIN, Cloth, Pen, Point, paint, samples
from refinelib.data.sources import MIN_SIDE, DataError, Instances, InstancesBuilder, Scene, box_of

#: Lowest and highest thigh angle, knee bend, arm angle and elbow bend in degrees, of each side of the body.
#: 0 hangs straight down; positive is outwards, or forwards where seen from the side. Repeated ones are
#: likelier.
STAND = (2, 9, -7, 2, 6, 18, -20, 0)
UP = (2, 9, -7, 2, 95, 165, 5, 30)
HIP, FOLD = (2, 9, -7, 2, 38, 50, -95, -70), (2, 9, -7, 2, 8, 14, -115, -90)
STAR = (14, 28, -8, -2, 50, 120, 5, 30)
FRONT_POSES = ((STAND, STAND),) * 7 + ((UP, STAND), (UP, UP), (STAND, HIP), (FOLD, FOLD), (STAR, STAR))
WALK = ((-30, -12, -35, -5, 10, 32, 10, 45), (12, 30, -12, 0, -32, -10, 5, 30))
RUN = ((-35, -10, -80, -20, 30, 55, 60, 95), (35, 65, -80, -40, -55, -30, 50, 90))
SIDE_STAND = (-8, 8, -8, 0, -12, 12, 8, 25)
REACH = (-8, 8, -8, 0, 50, 165, 5, 40)
SIT = (76, 96, -95, -75, 5, 40, 30, 60)
SIDE_POSES = ((SIDE_STAND, SIDE_STAND), WALK) * 4 + (RUN, (SIDE_STAND, REACH), (SIT, SIT))

_COAT = (0, 0, 0.5, 0, 0.8, 0.1)
#: Things that are no person: parts of cloth 0 or 1 from (x, height) to (x, height), a capsule of that radius
#: or, for 0, a block; in sizes of the thing.
CLUTTER = (
    # a house, a bin, a tree, a bush, a lamp, a car, a bench, a coat on a stand
    ((0, -0.4, 1.0, 0.4, 0, 0), (1, -0.45, 1.05, 0.45, 0.95, 0)),
    ((0, -0.2, 0.55, 0.2, 0, 0), (1, -0.23, 0.6, 0.23, 0.5, 0)),
    ((1, 0, 0, 0.03, 0.8, 0.05), (0, -0.15, 0.8, 0.15, 0.75, 0.17), (0, -0.05, 0.95, 0.1, 0.9, 0.15)),
    ((0, -0.2, 0.15, 0.2, 0.2, 0.16), (0, -0.02, 0.3, 0.08, 0.3, 0.14)),
    ((0, 0, 0, 0.03, 1.3, 0.02), (1, -0.04, 1.25, 0.05, 1.25, 0.07)),
    ((0, -0.4, 0.16, 0.4, 0.16, 0.12), (0, -0.2, 0.3, 0.15, 0.3, 0.1), (1, -0.28, 0.05, -0.27, 0.05, 0.07)),
    ((0, -0.45, 0.55, 0.45, 0.4, 0), (0, -0.45, 0.3, 0.45, 0.2, 0), (1, -0.4, 0.3, -0.35, 0, 0)),
    ((1, 0, 0, 0, 1, 0.015), (0, -0.13, 0.5, -0.07, 0.82, 0.04), (0, 0.13, 0.5, 0.07, 0.82, 0.04), _COAT),
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


class _Figure:
    """One jointed person of a standing height of ``size`` pixels, whose lower foot is at (x, foot)."""

    def __init__(self, pen: Pen, x: float, foot: float, size: float) -> None:
        self.pen, self.size, rng = pen, size, pen.rng
        self.girth, self.head = rng.uniform(0.85, 1.3) * size, rng.uniform(0.064, 0.082) * size
        self.view, facing = rng.choice(["front", "back", "side"], p=[0.4, 0.2, 0.4]), rng.choice([-1.0, 1.0])
        self.sideways = self.view == "side"
        self.front = facing if self.sideways else 0.0
        # Outwards is left for one side and right for the other; seen from the side both face the same way.
        self.outwards = (facing, facing) if self.sideways else (-1.0, 1.0)
        poses = SIDE_POSES if self.sideways else FRONT_POSES
        pose = np.reshape(poses[rng.integers(len(poses))], (2, 4, 2))[:: rng.choice([-1, 1])]
        self.thighs, knees, self.arms, elbows = rng.uniform(pose[..., 0], pose[..., 1]).T
        self.shins, self.forearms = self.thighs + knees, self.arms + elbows

        tone, dye = pen.one_of(SKIN), pen.one_of(HAIR)
        self.skin, self.hair = Cloth(tone, tone * 0.85), Cloth(dye, dye * 0.6, (0, 0.4, 0, 0.6), size * 0.03)
        self.top, self.bottom, self.shoe = (pen.cloth(size) for _ in range(3))
        self.sleeve = self.top if rng.random() < 0.8 else self.skin
        self.cuff = self.sleeve if rng.random() < 0.55 else self.skin
        self.skirt, self.long_hair = rng.random() < 0.2 and self.thighs.max() < 60, rng.random() < 0.4
        self.shin = self.skin if self.skirt or rng.random() < 0.17 else self.bottom

        drop = 0.245 * np.cos(np.radians(self.thighs)) + 0.24 * np.cos(np.radians(self.shins))
        self.hip = (x, foot - (float(drop.max()) + 0.03) * size)
        lean = rng.uniform(5, 16) if self.arms.min() < -30 else rng.uniform(-4, 4)
        self.neck = _end(self.hip, facing * (180 - lean), 0.3 * size)
        self.hips = 0.012 * size if self.sideways else 0.048 * self.girth
        self.shoulders = 0.02 * size if self.sideways else 0.075 * size + 0.022 * self.girth
        self.face = self.on_axis(0.115, 0.015 * size * self.front)

    def on_axis(self, above: float, dx: float = 0.0) -> Point:
        """A point ``above`` the neck on the trunk's axis (in standing heights), ``dx`` pixels beside it."""
        (hip_x, hip_y), (x, y) = self.hip, self.neck
        return x + (x - hip_x) / 0.3 * above + dx, y + (y - hip_y) / 0.3 * above

    def on_face(self, dx: float, dy: float) -> Point:
        """A point relative to the middle of the face, in sizes of the head."""
        return self.face[0] + dx * self.head, self.face[1] + dy * self.head

    def draw(self) -> None:
        """Limb by limb, from back to front."""
        far, near = (0, 1) if self.outwards[0] > 0 else (1, 0)
        arms_behind = self.view == "back" and abs(self.forearms).max() > 60
        if self.long_hair and self.view != "back":
            ends = self.on_face(-0.4 * self.front, 0), self.on_axis(0, -0.035 * self.size * self.front)
            self.pen.limb(self.hair, *ends, self.head * 1.1, self.head * (0.6 if self.sideways else 1.0))
        if self.sideways or arms_behind:
            self.arm(far)
        if arms_behind:
            self.arm(near)
        self.leg(far)
        self.leg(near)
        self.trunk()
        self.draw_head()
        if not (self.sideways or arms_behind):
            self.arm(far)
        if not arms_behind:
            self.arm(near)

    def leg(self, side: int) -> None:
        """Shin, thigh and shoe of one side."""
        pen, girth, size, out = self.pen, self.girth, self.size, self.outwards[side]
        start = (self.hip[0] + (-1, 1)[side] * self.hips, self.hip[1])
        knee = _end(start, out * self.thighs[side], 0.245 * size)
        ankle = _end(knee, out * self.shins[side], 0.24 * size)
        toe = _end(ankle, out * (78 + self.shins[side] if self.sideways else 35), 0.05 * size)
        pen.limb(self.shin, knee, ankle, 0.036 * girth, 0.023 * girth)
        pen.limb(self.skin if self.skirt else self.bottom, start, knee, 0.054 * girth, 0.037 * girth)
        pen.limb(self.shoe, ankle, toe, 0.024 * size, 0.018 * size)

    def arm(self, side: int) -> None:
        """Hand, forearm and upper arm of one side."""
        pen, girth, size, out = self.pen, self.girth, self.size, self.outwards[side]
        start = self.on_axis(-0.045, (-1, 1)[side] * self.shoulders)
        elbow = _end(start, out * self.arms[side], 0.165 * size)
        wrist = _end(elbow, out * self.forearms[side], 0.14 * size)
        hand = _end(wrist, out * self.forearms[side], 0.03 * size)
        pen.limb(self.skin, wrist, hand, 0.018 * size, 0.016 * size)
        pen.limb(self.cuff, elbow, wrist, 0.027 * girth, 0.019 * girth)
        pen.limb(self.sleeve, start, elbow, 0.036 * girth, 0.028 * girth)

    def hull(self, cloth: Cloth, seams: list[tuple[float, float]]) -> int:
        """A surface about the trunk's axis through seams of (place on the axis, half width); its code."""
        points = [(self.on_axis(above), half) for above, half in seams]
        code = self.pen.brush(cloth, points[0][0], points[-1][0], 0.1 * self.girth)
        right, left = ([(x + side * half, y) for (x, y), half in points] for side in (1, -1))
        self.pen.polygon(code, right + left[::-1])
        return code

    def trunk(self) -> None:
        """Perhaps a skirt, then shoulders, a waist, hips, and the neck."""
        girth, uniform = self.girth, self.pen.rng.uniform
        if self.skirt:
            hem = (-0.3 - uniform(0.13, 0.27), self.hips + uniform(0.09, 0.14) * girth)
            self.hull(self.bottom, [(-0.24, self.hips + 0.05 * girth), hem])
        seams = [(0.0, 0.035 * self.size), (-0.045, self.shoulders + 0.036 * girth)]
        seams += [(-0.2, (0.06 if self.sideways else 0.082) * girth), (-0.32, self.hips + 0.054 * girth)]
        code = self.hull(self.top, seams)
        for side in (-1, 1):
            self.pen.oval(code, self.on_axis(-0.045, side * self.shoulders), 0.037 * girth, 0.037 * girth)
        self.pen.limb(self.skin, self.neck, self.face, 0.028 * girth, 0.026 * girth)

    def draw_head(self) -> None:
        """The head, its hair or hat, and a face where there are pixels for one."""

        def oval(cloth: Cloth, dx: float, dy: float, rx: float, ry: float, *angles: int) -> None:
            code = self.pen.brush(cloth, self.face, self.on_face(0, 0.1), head)
            self.pen.oval(code, self.on_face(dx, dy), rx * head, ry * head, *angles)

        head, front, style = self.head, self.front, self.pen.rng.random()
        oval(self.skin, 0, 0, 0.84, 1.1)
        if self.view == "back":
            oval(self.hair, 0, -0.08, 0.92, 1.3 if self.long_hair else 1.15)
        elif self.sideways:
            oval(self.skin, 0.8 * front, 0.15, 0.18, 0.16)
            oval(self.hair, -0.12 * front, -0.2, 0.92, 1, *((95, 330) if front > 0 else (210, 85)))
        elif style > 0.1:
            oval(self.hair, 0, -0.12, 0.92, 1.08, *((180, 360) if self.long_hair else (200, 340)))
        if style > 0.86:  # a hat
            oval(self.shoe, 0, -0.35, 0.95, 0.9, 180, 360)
            oval(self.shoe, 0.5 * front, -0.38, 1.15, 0.16)
        if self.view != "back" and head > 4.5:
            dark = Cloth(np.full(3, 0.1), np.full(3, 0.2))
            for dx in (0.45 * front,) if self.sideways else (-0.34, 0.34):
                oval(dark, dx, 0.02, 0.11, 0.09)
            oval(Cloth(np.array([0.6, 0.25, 0.25]), dark.second), 0.55 * front, 0.58, 0.2, 0.07)


def _draw_scene(rng: np.random.Generator) -> tuple[Pen, NDArray[np.bool_]]:
    """Background, clutter and persons from back to front; the visible pixels of each person ``[P, H, W]``."""
    height, width = int(rng.integers(176, 209)), int(rng.integers(176, 225))
    pen = Pen(height, width, rng)
    horizon, camera, tilt = height * rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0), rng.normal(0, 4)
    wall, floor = pen.colour(), pen.colour()
    noise = (0, 0, rng.uniform(0.1, 0.6), rng.uniform(0, 0.5))
    pen.block(Cloth(wall, pen.varied(wall, 0.12), noise), 0, 0, width, height)
    tiles = (rng.choice([0, 0.4]), rng.choice([0, 0.3]), rng.uniform(0, 0.5), rng.uniform(0, 0.6))
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
        code = pen.brush(shadow, (x, foot), (x + 9, foot), 150)
        pen.oval(code, (x + size * rng.uniform(-0.1, 0.1), foot), 0.2 * size, 0.03 * size)
    for number, (x, foot, size) in enumerate(spots, 1):
        pen.owner = number
        _Figure(pen, x, foot, size).draw()
        pen.owner = 0
        if rng.random() < 0.15:
            beside = size * rng.uniform(0.15, 0.45) * rng.choice([-1, 1])
            _clutter(pen, x + beside, foot + 2, size * rng.uniform(0.2, 0.6))
    if rng.random() < 0.25:
        _clutter(pen, rng.uniform(0, width), height + rng.uniform(0, 30), rng.uniform(40, 130))

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
        >>> source.scene(0).masks.shape[0], source.instances().images
        (1, 2)
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
