"""What a prediction needs, from what a person gives: an image, boxes."""

from __future__ import annotations

import ast
import math
import os
import reprlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refinelib.config import absolute
from refinelib.data import DataError, SyntheticPeople, decode_image
from refinelib.data.coco import image_file, is_image, person_ids, read_annotations, xyxy


class Inputs(NamedTuple):
    """An image and the boxes in it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    boxes: list[list[float]]  # xyxy, pixels
    name: str  # of the image, for file names
    image_id: int  # COCO's where an annotation file gave it, else 0
    category_id: int  # the person's


def read_inputs(
    image: str | os.PathLike | None = None,
    boxes: str | list | None = None,
    annotations: str | os.PathLike | None = None,
    *,
    allow_images_outside: bool = False,
) -> Inputs:
    """The image and its boxes, checked.

    Args:
        image: file; none: a drawn picture with people in it and their boxes.
        boxes: rows of x0, y0, x1, y1 in pixels, as a list or as its text.
        annotations: COCO JSON that lists the image by its file name; its persons' boxes, where none are given.
        allow_images_outside: by whatever name, see :func:`refinelib.data.coco.image_file`.

    Raises:
        DataError: a file is missing or does not list the image, or a box is not what it should be.
    """
    given = _read_boxes(boxes)
    if image is None:
        if annotations is not None:
            raise DataError("annotations were given and no image: give the file of an image that they list")
        source = SyntheticPeople(1, split="val")
        people = source.instances()
        return Inputs(source.scene(0).image, given or people.boxes.astype(float).tolist(), "synthetic", 0, 1)
    path = Path(os.path.expanduser(image))
    path = path if os.path.exists(path) else absolute(path)
    size, image_id, category_id = None, 0, 1
    if annotations is not None:
        file = Path(os.path.expanduser(annotations))
        size, image_id, category_id, listed = _boxes_of(file, path, allow_images_outside)
        given = given or listed
    pixels = decode_image(path, size)
    for number, (x0, y0, x1, y1) in enumerate(given):
        if min(x1, pixels.shape[1]) <= max(x0, 0) or min(y1, pixels.shape[0]) <= max(y0, 0):
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise DataError(f"box {number}, {[x0, y0, x1, y1]}, lies outside the image of {size} pixels: give x0, y0, x1, y1")
    return Inputs(pixels, given, path.stem, image_id, category_id)


def _read_boxes(boxes: str | list | None) -> list[list[float]]:
    if boxes is None or (isinstance(boxes, str) and not boxes.strip()):
        return []
    rule = "give rows of x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, such as [[10, 20, 110, 220]]"
    try:
        rows = ast.literal_eval(boxes) if isinstance(boxes, str) else boxes
        rows = [rows] if len(rows) == 4 and not isinstance(rows[0], (list, tuple)) else rows
        table = np.array([[float(side) for side in row] for row in rows], dtype=np.float64).reshape(-1, 4)
        assert len(table) == len(rows)
    except Exception:  # literal_eval alone raises seven kinds
        raise DataError(f"boxes = {reprlib.repr(boxes)}: {rule}") from None
    for number, (x0, y0, x1, y1) in enumerate(table.tolist()):
        if not (np.isfinite([x0, y0, x1, y1]).all() and x1 > x0 and y1 > y0):
            raise DataError(f"box {number} is {[x0, y0, x1, y1]}: {rule}")
    return table.tolist()


def _boxes_of(
    annotations: Path, image: Path, allow_outside: bool
) -> tuple[tuple[int, int], int, int, list[list[float]]]:
    """Size ``(h, w)``, image id, category id and boxes of the persons of one image in a COCO JSON."""
    if not os.path.exists(annotations):
        annotations = absolute(annotations)
    content = read_annotations(annotations)
    parts = ("images", "annotations")
    images, annotated = ([one for one in content[part] if isinstance(one, dict)] for part in parts)
    entries = {Path(one["file_name"]).name: one for one in images if isinstance(one.get("file_name"), str)}
    if image.name not in entries:
        rule = f"give one of its {len(entries)} images, or boxes by hand"
        raise DataError(f"{annotations} lists no image {image.name}: {rule}")
    entry = entries[image.name]
    if not is_image(entry):
        rule = "without a whole number as its id, height or width: give it all three, or boxes by hand"
        raise DataError(f"{annotations} lists {image.name} {rule}")
    image_file(image.parent, entry["file_name"], allow_outside)
    people = person_ids(content)
    found = [one for one in annotated if one.get("category_id") in people and not one.get("iscrowd")]
    mine = [list(xyxy(one.get("bbox"))) for one in found if one.get("image_id") == entry["id"]]
    boxes = [box for box in mine if math.isfinite(sum(box)) and box[2] > box[0] and box[3] > box[1]]
    return (entry["height"], entry["width"]), entry["id"], people[0] if people else 1, boxes
