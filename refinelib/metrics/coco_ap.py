"""Masks as COCO results, and what pycocotools makes of them."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any, Sequence

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data import decode_segmentation

#: The first six figures of COCO's summary, in its order.
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Bool ``[H, W]`` as COCO's compressed run lengths: ``size`` and ``counts``, safe for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """The bool mask ``[H, W]`` of what :func:`encode` gave; an empty mask is all false."""
    height, width = segmentation["size"]
    mask = decode_segmentation(segmentation, height, width)
    return np.zeros((height, width), dtype=bool) if mask is None else mask


class CocoResults:
    """Masks in COCO's results format, in the order they were added.

    ``entries`` is what goes into the JSON file: ``image_id``, ``category_id``, ``segmentation`` (run
    lengths), ``score``. No ``bbox``: given one, pycocotools would take its area for the mask's.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, image_id: int, category_id: int, mask: np.ndarray, score: float, **more: Any) -> None:
        """One mask, bool ``[H, W]`` of its image's size."""
        entry = {"image_id": image_id, "category_id": category_id, "segmentation": encode(mask), "score": round(score, 6)}
        self.entries.append({**entry, **more})


def average_precision(truth: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Segm AP of COCO results as ``pycocotools`` computes it: AP, AP50, AP75 and AP by size.

    Boxes were given, so there is one result a person and none is a false find: AP falls where a mask
    does not overlap its person enough, and the more, the surer the model was of it. The score ranks results across
    images, so it is the mean probability inside the mask and not 1.0 for all, which would leave the order to chance.

    Args:
        truth: entries of a :class:`CocoResults` with the true masks, each with ``id`` and ``area`` (pixels).
        results: entries of one with the found masks.

    Returns:
        each figure in 0..1, None where no person is of that size.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = sorted({entry["category_id"] for entry in truth})
    sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in truth}
    annotations = []
    for number, entry in enumerate(truth, start=1):  # an id of 0 would count as no match
        box = coco_mask.toBbox(entry["segmentation"]).tolist()
        annotations.append({**entry, "id": number, "bbox": box, "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()],
            "annotations": annotations,
            "categories": [{"id": category, "name": "person"} for category in categories],
            "info": {},
        }
        known.createIndex()
        judge = COCOeval(known, known.loadRes(copy.deepcopy(list(results))), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(FIGURES, judge.stats)}
