"""Segmentations as annotation files write them, and their masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data.sources import Mask

#: Pixels along the outlines of one person's polygons, at most: pycocotools takes up to 200 bytes for each.
MOST_OUTLINE = 1 << 20


def whole(value: Any) -> int | None:
    """A whole number of under 64 bits in any dress (``1``, ``1.0``, ``"1"``); None: it is none.

    Example:
        >>> whole("7"), whole(7.0), whole("7.5"), whole(True), whole("x7")
        (7, 7, None, None, None)
    """
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    if isinstance(value, bool) or not isinstance(value, (str, float)) or len(str(value)) > 40:
        return None
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        try:
            number = float(value)  # "7.0"
        except ValueError:
            return None
    return int(number) if abs(number) < 2**63 and number == int(number) else None


def usable(segmentation: Any, height: int, width: int) -> tuple[Any, int]:
    """What of a segmentation may hold a mask, at a glance, and the number of its polygons that may not.

    Whether they cover anything shows when they are decoded.

    Args:
        segmentation: a polygon ``[x, y, x, y, ...]`` or ``[[x, y], ...]``, a list of such, or run lengths.
        height: of the image, pixels.
        width: likewise.

    Returns:
        a list of polygons of six numbers or more, or run lengths of this image's size, or None.

    Example:
        >>> usable([0, 0, 9, 0, 9, 9], 10, 10)
        ([[0, 0, 9, 0, 9, 9]], 0)
        >>> usable([[[0, 0], [9, 0], [9, 9]], [5, 5, 6]], 10, 10)
        ([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]], 1)
    """
    if isinstance(segmentation, list):
        points = len(segmentation) > 2 and all(
            isinstance(one, list) and len(one) == 2 for one in segmentation
        )
        one = points or not any(isinstance(part, (list, dict)) for part in segmentation)
        parts = [segmentation] if one and segmentation else segmentation
        good = [polygon for polygon in map(_polygon, parts) if polygon]
        return good or None, len(parts) - len(good)
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("size"), list):
        return None, 0
    counts = segmentation.get("counts")
    if [whole(side) for side in segmentation["size"]] != [height, width] or not counts:
        return None, 0
    if isinstance(counts, list) and {*map(type, counts)} != {int}:
        counts = [whole(count) for count in counts]
    if not isinstance(counts, str) and (not isinstance(counts, list) or None in counts):
        return None, 0
    return {"size": [height, width], "counts": counts}, 0


def _polygon(part: Any) -> list[float] | None:
    """A polygon as a plain list of numbers; None: of an odd length, under three points, or no numbers."""
    if isinstance(part, list) and not {*map(type, part)} <= {int, float}:
        try:
            part = np.array(part, np.float64).ravel().tolist()
        except (TypeError, ValueError, OverflowError):  # uneven rows, words, numbers beyond any
            return None
    return part if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 else None


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool ``[height, width]``; None: no mask in it.

    pycocotools draws the polygons. Those that it would read or write out of bounds (coordinates that are not
    finite or far away, millions of pixels of outline) are left out. Run lengths are checked and decoded here:
    pycocotools does not check them, and damaged ones make it read uninitialised memory or end the process.

    Example:
        >>> decode_segmentation({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2).tolist()
        [[False, True], [True, False]]
    """
    segmentation, _ = usable(segmentation, height, width)
    if isinstance(segmentation, list):
        reach = 2 * max(height, width)
        polygons = [one for one in segmentation if all(-reach <= value <= 2 * reach for value in one)]
        if not polygons or _outline(polygons) > MOST_OUTLINE:
            return None
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
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
