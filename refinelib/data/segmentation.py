"""COCO segmentations as masks: polygons, run lengths, compressed run lengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool [height, width]; None: no mask in it.

    Polygons that pycocotools would read or write out of bounds (coordinates that are not finite or
    far away) are left out. Run lengths are decoded here: pycocotools does not check them, and
    damaged ones make it read uninitialised memory or end the process.
    """
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if _is_polygon(p, height, width)]
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    runs = _runs(segmentation, height, width)
    if runs is None:
        return None
    # Column by column, beginning with background.
    values = np.arange(len(runs)) % 2 == 1
    mask = np.repeat(values, runs).reshape(width, height).T
    return mask if mask.any() else None


def has_mask(segmentation: Any) -> bool:
    """Whether a mask is there at all, at a glance; whether it covers anything shows when it is decoded."""
    if isinstance(segmentation, list):
        return any(isinstance(p, list) and len(p) >= 6 for p in segmentation)
    return isinstance(segmentation, dict) and bool(segmentation.get("counts")) and "size" in segmentation


def _is_polygon(polygon: Any, height: int, width: int) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    reach = 2 * max(height, width)
    # Compared before anything else looks at it: a whole number in JSON may be too large for a float.
    return all(isinstance(v, (int, float)) and -reach <= v <= 2 * reach and math.isfinite(v) for v in polygon)


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
