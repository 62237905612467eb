"""Masks for an image or a folder of images, from the command line: files, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from refinelib.data import DataError
from refinelib.data.coco import ImageFolder, files_in
from refinelib.data.formats import IMAGES
from refinelib.data.sources import SceneError, Tally, counted
from refinelib.files import PathLike, shown
from refinelib.metrics.evaluate import checked_folder
from refinelib.metrics.predict import Predictor, as_boxes
from refinelib.plots.masks import overlay
from refinelib.workflows.predict_io import Annotations, Inputs, read_inputs, save_masks, write_results

#: All masks of one call, in COCO's results format.
RESULTS = "coco_results.json"
NO_BOXES = "image without a box in the annotations"
BAD_BOXES = "image whose boxes cannot be used"
NOT_LISTED = "image that the annotations do not list"
BOXES_RULE = (
    "the model draws the mask of the person in each box, so boxes are needed: give --boxes "
    "x0,y0,x1,y1 in pixels, or --annotations, a COCO JSON that lists the image"
)


class Predictions(NamedTuple):
    """What :func:`predict_images` wrote."""

    images: int
    masks: int
    results: Path  # the file of all masks
    tally: Tally  # images without a prediction, by reason

    def __str__(self) -> str:
        """A line, and one for each reason for which images were left out."""
        left = self.tally.skipped.items()
        lines = [f"{self.masks} masks in {self.images} images: {self.results}"]
        return "\n".join(lines + [f"left out: {n} x {name}: {self.tally.examples[name]}" for name, n in left])


def corners(text: str) -> list[float]:
    """The corners of a box that was typed.

    Raises:
        DataError: it is not four numbers.

    Example:
        >>> corners("10,20,110,70.5")
        [10.0, 20.0, 110.0, 70.5]
    """
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        rule = "give x0,y0,x1,y1 in pixels, four numbers with commas and no blanks, such as 10,20,110,220"
        raise DataError(f"the box {shown(text)} is not four numbers: {rule}") from None
    return [x0, y0, x1, y1]


def check(path: Path, out: Path, boxes: Sequence[str], annotations: PathLike | None, overwrite: bool) -> None:
    """Refuse what can be known to be wrong before a model is loaded.

    Raises:
        ValueError: no boxes are given; a box for a whole folder; the folder to write into holds files.
    """
    if not boxes and annotations is None:
        raise DataError(BOXES_RULE)
    if boxes and path.is_dir():
        raise DataError(f"--boxes are those of one image, and {path} is a folder: give --annotations for it")
    if checked_folder(out).is_dir() and any(out.iterdir()) and not overwrite:
        rule = "give an empty folder, or --overwrite to replace earlier predictions of the same images"
        raise ValueError(f"{out} holds files: {rule}")


def predict_images(
    predictor: Predictor,
    path: Path,
    out: Path,
    *,
    boxes: Sequence[str] = (),
    annotations: PathLike | None = None,
    category: str | None = None,
    exif: str | None = None,
    overlays: bool = False,
    progress: bool = False,
) -> Predictions:
    """Write the masks of an image, or of every image of a folder that has boxes.

    Args:
        predictor: a loaded model.
        path: an image, or a folder of images.
        out: folder; each image has a folder in it (:func:`~refinelib.workflows.predict_io.save_masks`).
        boxes: texts ``x0,y0,x1,y1`` in pixels, of one image.
        annotations: COCO JSON whose persons' boxes are taken.
        category: see :func:`~refinelib.data.annotations.read_people`; none: as the run was trained.
        exif: see :func:`~refinelib.workflows.predict_io.read_inputs`; none: likewise.
        overlays: also write each image with its masks in colour.
        progress: show a bar.

    Raises:
        DataError: there is no image with a box that can be read.
    """
    tally, entries, images = Tally(), list[dict[str, Any]](), 0
    category, exif = category or predictor.settings.category, exif or predictor.settings.exif
    found: Iterator[Inputs]
    if path.is_dir():
        if annotations is None:
            raise DataError(BOXES_RULE)
        found = _inputs(path, Annotations(annotations, category=category), exif, tally, progress)
    else:
        rows = [corners(box) for box in boxes]
        found = iter([read_inputs(path, rows, annotations, category=category, exif=exif)])
    for inputs in found:
        masks, scores = predictor.predict_scored(inputs.pixels, inputs.boxes)
        drawn = overlay(inputs.pixels, masks) if overlays else None
        files = save_masks(out, inputs, masks, scores, drawn)
        entries += json.loads(files[-1].read_text("utf-8"))
        images += 1
    if not images:
        reasons = counted(tally.skipped, tally.examples) or "the annotations list none"
        raise DataError(f"no image of {path} could be predicted: {reasons}")
    return Predictions(images, len(entries), write_results(out / RESULTS, entries), tally)


def _inputs(folder: Path, listed: Annotations, exif: str, tally: Tally, progress: bool) -> Iterator[Inputs]:
    """The images of a folder that have boxes, in the annotations' order; the others are counted."""
    place, seen = ImageFolder(folder), set[Path]()
    for index, name in enumerate(tqdm(listed.names, "predict", unit=" images", disable=not progress)):
        try:
            file = place.find(name)
            seen.add(file)
            inputs = listed.inputs(file, index, exif=exif)
            as_boxes(inputs.boxes, inputs.pixels.shape[:2])
        except SceneError as error:
            tally.skip(error.reason, str(error))
        except DataError as error:
            tally.skip(BAD_BOXES, f"{file}: {error}")
        else:
            if inputs.boxes:
                yield inputs
            else:
                tally.skip(NO_BOXES, f"{file}{inputs.left_out and f', left out: {inputs.left_out}'}")
    for file in files_in(folder):
        own = (file.parent / "image.json").is_file()  # an earlier prediction's mask
        if file not in seen and not own and file.suffix.lower() in IMAGES:
            tally.skip(NOT_LISTED, str(file))
