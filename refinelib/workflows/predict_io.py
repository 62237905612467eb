"""What a prediction is made from and what it leaves: an image with boxes in, masks as files out."""

from __future__ import annotations

import ast
import glob
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinelib.config import absolute
from refinelib.data import DataError, SyntheticPeople, decode_image
from refinelib.data.coco import is_image, person_ids, read_annotations, xyxy
from refinelib.files import dumps, shown, write_atomically
from refinelib.metrics.evaluate import checked_folder
from refinelib.metrics.image_space import CocoResults, encode

Pixels = NDArray[Any]
RULE = "give rows of x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, such as [[10, 20, 110, 220]]"


class Inputs(NamedTuple):
    """An image and the boxes in it."""

    pixels: Pixels  # uint8 [H, W, 3]
    boxes: list[list[float]]  # xyxy, pixels
    name: str  # of the image, for file names
    image_id: int  # COCO's where an annotation file gave it, else 0
    category_id: int  # the person's


def read_inputs(
    image: str | os.PathLike[str] | None = None,
    boxes: str | list[Any] | None = None,
    annotations: str | os.PathLike[str] | None = None,
) -> Inputs:
    """The image and its boxes, checked.

    Args:
        image: file; none: a synthetic picture with people in it and their boxes.
        boxes: rows of x0, y0, x1, y1 in pixels, as a list or as its text.
        annotations: COCO JSON that lists the image by its file name; its persons' boxes, if none are given.

    Raises:
        DataError: a file is missing or does not list the image, or a box is not what it should be.
    """
    given = _read_boxes(boxes)
    if image is None:
        if annotations is not None:
            raise DataError("annotations were given and no image: give the file of an image that they list")
        source = SyntheticPeople(1, split="val")
        return Inputs(source.scene(0).image, given or source.instances().boxes.tolist(), "synthetic", 0, 1)
    path, size, image_id, category_id = _existing(image), None, 0, 1
    if annotations is not None:
        size, image_id, category_id, listed = _annotated(_existing(annotations), path)
        given = given or listed
    pixels = decode_image(path, size)
    height, width = pixels.shape[:2]
    for number, box in enumerate(given):
        if min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0):
            where = f"lies outside the image of {width} x {height} pixels"
            raise DataError(f"box {number}, {box}, {where}: {RULE}")
    return Inputs(pixels, given, path.stem, image_id, category_id)


def _existing(file: str | os.PathLike[str]) -> Path:
    path = Path(os.path.expanduser(file))
    return path if os.path.exists(path) else absolute(path)


def _read_boxes(boxes: str | list[Any] | None) -> list[list[float]]:
    if boxes is None or (isinstance(boxes, str) and not boxes.strip()):
        return []
    try:
        rows = ast.literal_eval(boxes) if isinstance(boxes, str) else boxes
        rows = [rows] if len(rows) == 4 and not isinstance(rows[0], (list, tuple)) else rows
        table = [[float(side) for side in row] for row in rows]
        assert all(len(row) == 4 for row in table)
    except Exception:  # literal_eval alone raises seven kinds
        raise DataError(f"boxes = {shown(boxes)}: {RULE}") from None
    for number, box in enumerate(table):
        if not _has_area(*box):
            raise DataError(f"box {number} is {box}: {RULE}")
    return table


def _has_area(x0: float, y0: float, x1: float, y1: float) -> bool:
    """Whether a box is finite and not empty."""
    return math.isfinite(x0 + y0 + x1 + y1) and x1 > x0 and y1 > y0


def _annotated(annotations: Path, image: Path) -> tuple[tuple[int, int], int, int, list[list[float]]]:
    """Size ``(h, w)``, image id, category id and boxes of the persons of one image in a COCO JSON."""
    content = read_annotations(annotations)
    images = [one for one in content["images"] if isinstance(one, dict)]
    named = {Path(one["file_name"]).name: one for one in images if isinstance(one.get("file_name"), str)}
    if (entry := named.get(image.name)) is None:
        rule = f"give one of its {len(named)} images, or boxes by hand"
        raise DataError(f"{annotations} lists no image {image.name}: {rule}")
    if not is_image(entry):
        rule = "without a whole number as its id, height or width: give it all three, or boxes by hand"
        raise DataError(f"{annotations} lists {image.name} {rule}")
    people, boxes = person_ids(content), []
    for one in content["annotations"]:
        if isinstance(one, dict) and one.get("category_id") in people and not one.get("iscrowd"):
            box = xyxy(one.get("bbox"))
            if one.get("image_id") == entry["id"] and _has_area(*box):
                boxes.append([*box])
    return (entry["height"], entry["width"]), entry["id"], people[0] if people else 1, boxes


def save_masks(
    folder: str | os.PathLike[str], inputs: Inputs, masks: Pixels, scores: Pixels, overlay: Pixels
) -> list[Path]:
    """Write a PNG a person (0 and 255), the overlay as PNG, and all masks as COCO results.

    Args:
        folder: created if needed; files of the same image in it are replaced.
        inputs: image and boxes.
        masks: bool ``[N, H, W]``.
        scores: float ``[N]``.
        overlay: uint8 ``[H, W, 3]``, the image with the masks in colour.

    Returns:
        the files: masks, overlay, JSON.

    Raises:
        ValueError: there is a file of the folder's name.
    """
    folder = checked_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{glob.escape(inputs.name)}_person*.png"):  # there may have been more boxes
        if old.stem.removeprefix(f"{inputs.name}_person").isdigit():
            old.unlink()
    coco, files = CocoResults(), []
    pictures = {f"person{number}": mask.astype(np.uint8) * 255 for number, mask in enumerate(masks)}
    for name, picture in [*pictures.items(), ("overlay", overlay)]:
        files.append(folder / f"{inputs.name}_{name}.png")
        Image.fromarray(picture).save(files[-1])
    for mask, score in zip(masks, scores, strict=True):
        coco.add(inputs.image_id, inputs.category_id, encode(mask), float(score))
    results = folder / f"{inputs.name}_coco.json"
    write_atomically(results, "[\n" + ",\n".join(dumps(entry) for entry in coco.entries) + "\n]\n")
    return [*files, results]
