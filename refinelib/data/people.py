"""One jointed person: pose, clothes, hair and shoes, drawn limb by limb."""

from __future__ import annotations

import math

import numpy as np

from refinelib.data.painting import SKIN, Cloth, Pen, Point

HAIR = ((0.10, 0.08, 0.07), (0.25, 0.16, 0.10), (0.45, 0.29, 0.16),
         (0.74, 0.58, 0.34), (0.55, 0.25, 0.12), (0.62, 0.61, 0.60))


def pose(rng: np.random.Generator, sideways: bool) -> tuple[np.ndarray, float, tuple[float, float]]:
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


def figure(pen: Pen, x: float, foot: float, size: float) -> None:
    """A person of that standing height whose lower foot is at (x, foot)."""
    rng, owner = pen.rng, pen.owner
    view = rng.choice(["front", "back", "side"], p=[0.4, 0.2, 0.4])
    sideways, facing = view == "side", float(rng.choice([-1, 1]))
    sides, lean, thighs = pose(rng, sideways)
    girth = rng.uniform(0.85, 1.3) * size
    head = size * (rng.uniform(0.064, 0.072) if size > 75 or rng.random() < 0.6 else 0.088)
    tone, dye = (np.clip(c[rng.integers(len(c))] + rng.normal(0, 0.03, 3), 0, 1) for c in (SKIN, HAIR))
    skin = Cloth(tuple(tone), tuple(tone * 0.85), (0, 0, 0.2, 0.1))
    hair = Cloth(tuple(dye), tuple(dye * 0.6), (0, 0.4, 0, 0.6), size * 0.03)
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
        dark = pen.brush(Cloth((0.12, 0.08, 0.08), (0.2, 0.1, 0.1)), centre, below, head)
        for dx in (0.45 * front,) if sideways else (-0.34, 0.34):
            pen.oval(dark, face(dx, 0.02), 0.11 * head, 0.09 * head)
        lips = pen.brush(Cloth((0.6, 0.25, 0.25), (0.5, 0.2, 0.2)), centre, below, head)
        pen.oval(lips, face(0.55 * front, 0.58), (0.12 if sideways else 0.24) * head, 0.07 * head)
    if not arms_behind:
        if not sideways:
            arm(first)
        arm(second)
