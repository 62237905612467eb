"""COCO segmentations as masks: polygons, run lengths, compressed run lengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

#: Pixels along the outlines of one person's polygons, at most: pycocotools takes up to 200 bytes for each.
MOST_OUTLINE = 1 << 20


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool [height, width]; None: no mask in it.

    Polygons that pycocotools would read or write out of bounds (coordinates that are not finite or
    far away) are left out. Run lengths are decoded here: pycocotools does not check them, and
    damaged ones make it read uninitialised memory or end the process. Polygons with an outline of more
    than ``MOST_OUTLINE`` pixels are no mask.
    """
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if _is_polygon(p, height, width)]
        if _outline(polygons, 6 * max(height, width)) > MOST_OUTLINE:
            return None
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    runs = _runs(segmentation, height, width)
    if runs is None:
        return None
    # Column by column, beginning with background.
    values = np.arange(len(runs)) % 2 == 1
    mask = np.repeat(values, runs).reshape(width, height).T
    return mask if mask.any() else None


def usable(segmentation: Any, height: int, width: int) -> list | dict | None:
    """What of a segmentation may hold a mask, at a glance; None where nothing does.

    That is lists of six numbers or more, or run lengths of this image's size. Whether they cover anything
    shows when they are decoded.
    """
    if isinstance(segmentation, list):
        long = [p for p in segmentation if isinstance(p, list) and len(p) >= 6]
        return [p for p in long if {*map(type, p)} <= {int, float}] or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    plain = isinstance(counts, str) or (isinstance(counts, list) and {*map(type, counts)} <= {int})
    return {"size": [height, width], "counts": counts} if counts and plain else None


def _is_polygon(polygon: Any, height: int, width: int) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    reach = 2 * max(height, width)
    # Compared before anything else looks at it: a whole number in JSON may be too large for a float.
    return all(isinstance(v, (int, float)) and -reach <= v <= 2 * reach and math.isfinite(v) for v in polygon)


def _outline(polygons: list[list], longest: int) -> float:
    """Length of all edges in pixels, each from 1 to ``longest``; their number, where that decides."""
    points = sum(map(len, polygons)) / 2
    if points > MOST_OUTLINE or points * longest <= MOST_OUTLINE:
        return points
    corners = [np.array(p, np.float64).reshape(-1, 2) for p in polygons]
    return sum(np.maximum(np.abs(c - np.roll(c, 1, 0)).max(1), 1).sum() for c in corners)


def _runs(rle: Any, height: int, width: int) -> list[int] | None:
    """Run lengths that fill [height, width] exactly; None where they do not."""
    if not isinstance(rle, dict) or rle.get("size") not in ([height, width], (height, width)):
        return None
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _decompressed(counts.encode() if isinstance(counts, str) else counts)
    whole = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    return counts if whole and sum(counts) == height * width else None


def _decompressed(text: bytes) -> list[int] | None:
    """Run lengths of COCO's compressed form: 5 bits a character, from the lowest, and a flag that more follow.

    From the fourth on, a number is the difference from the one two places before it
    (cocoapi, ``common/maskApi.c``, ``rleFrString``).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                return None
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift else counts
