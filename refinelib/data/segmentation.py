"""Segmentations as annotation files write them, and their masks."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data.sources import Mask

#: Pixels along the outlines of one person's polygons, at most: pycocotools takes up to 200 bytes for each.
MOST_OUTLINE = 1 << 20
#: Pixels of the largest image of which a mask is decoded.
MOST_PIXELS = 1 << 28
_WHOLE = re.compile(r"(0|-?[1-9][0-9]{0,18})(\.0{1,9})?")


def whole(value: Any) -> int | None:
    """A whole number of under 64 bits in any dress (``1``, ``1.0``, ``"1"``); None: it is none.

    Texts that number things in another way (``"007"``, ``"1_2"``, ``"1e2"``) are none.

    Example:
        >>> whole("7"), whole(7.0), whole("7.5"), whole(True), whole("007")
        (7, 7, None, None, None)
    """
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value.partition(".")[0])
    number = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if number and abs(value) < 2**63 else None


def usable(segmentation: Any, height: int, width: int) -> tuple[Any, list[Any]]:
    """What of a segmentation may hold a mask, at a glance, and its polygons that may not.

    Whether they cover anything shows when they are decoded. A polygon is left out that has an odd length or
    under three points, or a corner that is not finite or far outside the image.

    Args:
        segmentation: a polygon ``[x, y, x, y, ...]`` or ``[[x, y], ...]``, a list of such, or run lengths.
        height: of the image, pixels.
        width: likewise.

    Returns:
        a list of polygons of six numbers or more, or run lengths of this image's size, or None.

    Example:
        >>> usable([0, 0, 9, 0, 9, 9], 10, 10)
        ([[0, 0, 9, 0, 9, 9]], [])
        >>> usable([[[0, 0], [9, 0], [9, 9]], [5, 5, 6]], 10, 10)
        ([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]], [[5, 5, 6]])
    """
    if isinstance(segmentation, list):
        lengths = {len(part) if isinstance(part, list) else None for part in segmentation}
        points = len(segmentation) > 2 and lengths == {2}
        one = points or not any(isinstance(part, (list, dict)) for part in segmentation)
        parts, reach = [segmentation] if one and segmentation else segmentation, 2 * max(height, width)
        found = [_polygon(part, reach) for part in parts]
        bad = [part for part, polygon in zip(parts, found, strict=True) if polygon is None]
        return [polygon for polygon in found if polygon] or None, bad
    run_lengths = segmentation if isinstance(segmentation, dict) else {}
    sides, counts = run_lengths.get("size"), run_lengths.get("counts")
    if isinstance(counts, list) and {*map(type, counts)} != {int}:
        counts = [whole(count) for count in counts]
    same_size = isinstance(sides, list) and [*map(whole, sides)] == [height, width]
    given = isinstance(counts, str) or (isinstance(counts, list) and None not in counts)
    return {"size": [height, width], "counts": counts} if same_size and counts and given else None, []


def _polygon(part: Any, reach: float) -> list[float] | None:
    """A polygon as a plain list of numbers; None: it is none, or one that pycocotools cannot draw."""
    if isinstance(part, list) and not {*map(type, part)} <= {int, float}:
        try:
            corners = np.array(part, np.float64)
        except (TypeError, ValueError, OverflowError):  # uneven rows, words, numbers beyond any
            return None
        part = corners.ravel().tolist() if corners.ndim == 1 or corners.shape[1:] == (2,) else None
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return None
    near = -reach <= min(part) and max(part) <= 2 * reach
    return part if near and math.isfinite(sum(part)) else None


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool ``[height, width]``; None: no mask in it.

    pycocotools draws the polygons, unless they have millions of pixels of outline. Run lengths are checked
    and decoded here: pycocotools does not check them, and damaged ones make it read uninitialised memory or
    end the process.

    Example:
        >>> decode_segmentation({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2).tolist()
        [[False, True], [True, False]]
    """
    segmentation, _ = usable(segmentation, height, width)
    if height * width > MOST_PIXELS:
        return None
    if isinstance(segmentation, list):
        if _outline(segmentation) > MOST_OUTLINE:
            return None
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        segmentation["counts"] = segmentation["counts"].decode()
    counts = segmentation and segmentation["counts"]
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if counts is None or min(counts) < 0 or sum(counts) != height * width:
        return None
    # Column by column, beginning with background.
    mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    return mask if mask.any() else None


def _outline(polygons: list[list[float]]) -> float:
    """Pixels along all edges, at least one an edge; the number of edges, where that is too many already."""
    points = sum(map(len, polygons)) / 2
    if points > MOST_OUTLINE:
        return points
    closed = (np.reshape([*one, *one[:2]], (-1, 2)) for one in polygons)
    return float(sum(np.abs(np.diff(corners, axis=0)).max(1).clip(1).sum() for corners in closed))


def _decompressed(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form: 5 bits a character, the lowest first, and a flag for more.

    From the fourth on, a number is the difference from the one two places before it (cocoapi,
    ``common/maskApi.c``, ``rleFrString``).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of this number; its highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return None if shift else counts
