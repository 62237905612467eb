"""A whole drawn scene: background, clutter and people, and whose each pixel is."""

from __future__ import annotations

import math

import numpy as np

from refinelib.data.painting import Cloth, Layout, Pen, sample_grids, varied
from refinelib.data.people import figure
from refinelib.data.sources import box_of


def draw_scene(rng: np.random.Generator) -> Layout:
    """Background, clutter and people from back to front, perhaps something before them."""
    height, width = int(rng.integers(176, 209)), int(rng.integers(176, 225))
    pen = Pen(height, width, rng)
    horizon, camera = height * rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0)
    wall_colour, ground_colour = pen.colour(), pen.colour()
    wall = Cloth(wall_colour, varied(wall_colour, rng, 0.12), (0, 0, rng.uniform(0.1, 0.6), rng.uniform(0, 0.5)))
    pen.block(wall, 0, 0, width, height)
    tiles = (rng.choice([0, 0.4]), rng.choice([0, 0.3]), rng.uniform(0, 0.5), rng.uniform(0, 0.6))
    ground = Cloth(ground_colour, varied(ground_colour, rng, 0.1), tiles, rng.uniform(5, 40))
    tilt = rng.normal(0, 4)
    code = pen.brush(ground, (0, horizon), (width, horizon + rng.normal(0, 40)), 150)
    pen.polygon(code, [(0, horizon - tilt), (width, horizon + tilt), (width, height), (0, height)])
    for _ in range(rng.integers(3, 12)):
        clutter(pen, rng.uniform(0, width), horizon + abs(rng.normal(0, 18)), rng.uniform(25, 120))

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
    shadow = Cloth(first, second, ground.mix, ground.wavelength)
    for x, foot, size in spots:
        code = pen.brush(shadow, (x, foot), (x + 9, foot), 150)
        pen.oval(code, (x + size * rng.uniform(-0.1, 0.1), foot), 0.2 * size, 0.03 * size)
    for number, (x, foot, size) in enumerate(spots, 1):
        pen.owner = number
        figure(pen, x, foot, size)
        pen.owner = 0
        if rng.random() < 0.15:
            beside = size * rng.uniform(0.1, 0.45) * rng.choice([-1, 1])
            clutter(pen, x + beside, foot + 2, size * rng.uniform(0.2, 0.6))
    if rng.random() < 0.25:
        clutter(pen, rng.uniform(0, width), height + rng.uniform(0, 30), rng.uniform(40, 130))

    codes = np.asarray(pen.image).astype(np.intp)
    quarters = sample_grids(np.asarray(pen.owners, np.uint8)[codes])
    # Most of a pixel's quarters decide whose it is, the nearest person where as many are another's.
    shares = np.stack([sum((q == n).view(np.uint8) for q in quarters) for n in range(len(tall), -1, -1)])
    owner = len(tall) - shares.argmax(0)
    seen = np.bincount(owner.ravel(), minlength=len(tall) + 1) > 0
    seen[0] = False  # the numbers of hidden people close up
    owner = (np.cumsum(seen) * seen)[owner]
    boxes, areas = [], []
    for number in range(1, owner.max() + 1):
        mask = owner == number
        boxes.append(box_of(mask))
        areas.append(mask.sum())
    table, boxes = np.array(pen.rows, np.float32), np.array(boxes, np.float64).reshape(-1, 4)
    return Layout(codes, table, owner, boxes, np.array(areas, np.float64))


def clutter(pen: Pen, x: float, y: float, size: float) -> None:
    """Something that stands at (x, y) and is no person: building, tree, bush, pole, sign, bin, car, bench, coat."""
    rng, cloth = pen.rng, pen.cloth(size)
    other = pen.cloth(size)
    kind = rng.integers(9)
    leaf = Cloth(cloth.first, varied(cloth.first, rng, 0.2), (0, 0, 0.4, 1.0))
    if kind == 0:
        windows = Cloth(cloth.first, other.first, (0.4, 0.4, 0.1, 0), size * rng.uniform(0.1, 0.25))
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
        code = pen.brush(Cloth((0.06,) * 3, (0.2,) * 3), (x, y), (x, y + 1), 5)
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
