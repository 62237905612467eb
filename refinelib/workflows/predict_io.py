"""Masks of an image or of a folder of images: what they are made from, and the files that they leave."""

import contextlib
import glob
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import Image
from tqdm import tqdm

from refinelib.config import existing
from refinelib.data import DataError, SyntheticPeople, decode_image
from refinelib.data.annotations import decode_segmentation, read_annotations, read_people
from refinelib.data.coco import ImageFolder, Parts, common_end, files_in, name_parts, plain_parts, xyxy
from refinelib.data.formats import IMAGES
from refinelib.data.sources import SceneError, Tally, box_of, counted, wrong_box
from refinelib.files import PathLike, dumps, numbered, retold, shown, write_atomically
from refinelib.metrics.evaluate import checked_folder, coco_entry, encode, write_results
from refinelib.metrics.predict import Predictor, as_boxes
from refinelib.plots.masks import Pixels
from refinelib.plots.masks import overlay as with_masks

NO_BOX = "annotation without box or mask"
NO_BOXES = "image without a box in the annotations"
BAD_BOXES = "image whose boxes cannot be used"
NOT_LISTED = "image that the annotations do not list"
#: All masks of one call, in COCO's results format.
RESULTS = "coco_results.json"


class Inputs(NamedTuple):
    """An image and the boxes in it."""

    pixels: Pixels  # uint8 [H, W, 3]
    boxes: list[list[float]]  # xyxy, pixels
    category_ids: list[Any]  # of each box, as its annotation gives it
    name: str  # of the image, for file names
    image_id: Any = 0  # as an annotation file gives it
    category_id: Any = 1  # of boxes given by hand: the annotation file's first person's where there is one
    left_out: str = ""  # the image's annotations that are not used, by reason; what is unusual about it
    source: str = "synthetic"  # the image's file

    def with_boxes(self, boxes: Sequence[Sequence[float]]) -> "Inputs":
        """The same image with other boxes; one that stays in its place keeps its category.

        Example:
            >>> inputs = Inputs(np.zeros((9, 9, 3), np.uint8), [[0, 0, 9, 9]], [7], "a")
            >>> inputs.with_boxes([[0, 0, 9, 9], [2, 2, 5, 5]]).category_ids
            [7, 1]
        """
        rows = [[*box] for box in boxes]
        known = itertools.zip_longest(rows, self.boxes, self.category_ids)
        ids = [of if box == before else self.category_id for box, before, of in known][: len(rows)]
        return self._replace(boxes=rows, category_ids=ids)


def read_inputs(
    image: PathLike | None = None,
    boxes: Any = None,
    annotations: PathLike | None = None,
    *,
    category: str = "person",
    exif: str = "ignore",
) -> Inputs:
    """The image and its boxes, checked.

    Args:
        image: file; none: a synthetic picture with people in it and their boxes.
        boxes: rows of x0, y0, x1, y1 in pixels, see :func:`~refinelib.metrics.predict.as_boxes`.
        annotations: COCO JSON that lists the image (:func:`index_of`); its persons' boxes, if none are given.
        category: see :func:`~refinelib.data.annotations.read_people`.
        exif: ``ignore``: boxes are in the pixels as stored; ``apply``: in the image turned upright.

    Raises:
        DataError: a file is missing, does not list the image or has no person's box in it, or a box is not
            what it should be.
    """
    given = as_boxes([] if boxes is None else boxes).tolist()
    if image is None:
        if annotations is not None:
            raise DataError("annotations were given and no image: give the file of an image that they list")
        source = SyntheticPeople(1, split="val")
        drawn = source.instances().boxes.tolist()
        inputs = Inputs(source.scene(0).image, drawn, [1] * len(drawn), "synthetic")
    else:
        path = Path(os.path.abspath(existing(image)))
        if annotations is None:
            notes = list[tuple[str, str]]()
            pixels = decode_image(path, upright=exif == "apply", notes=notes)
            inputs = Inputs(pixels, [], [], path.stem, left_out=_noted(notes), source=str(path))
        else:
            inputs = Annotations(annotations, category=category).inputs(path, exif=exif)
    if given:
        inputs = inputs.with_boxes(given)
    if annotations is not None and not inputs.boxes:
        why = f", left out: {inputs.left_out}" if inputs.left_out else ""
        raise DataError(f"{annotations} has no person's box that can be used in {image}{why}: give boxes")
    as_boxes(inputs.boxes, inputs.pixels.shape[:2])
    return inputs


class Annotations:
    """A COCO file, read once: the persons' boxes in each of its images.

    Args:
        file: COCO JSON; masks may lack where there is a box.
        category: see :func:`~refinelib.data.annotations.read_people`.

    Attributes:
        names: of the images, as the file has them.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, file: PathLike, *, category: str = "person") -> None:
        self.file = existing(file)
        content = read_annotations(self.file)
        for one in content["annotations"]:
            if isinstance(one, dict):
                one["segmentation"] = one.get("segmentation") or True  # a person's box is enough here
        self.people = people = read_people(content, str(self.file), category=category)
        self.numbers, self.names = [*people.images], [one["file_name"] for one in people.images.values()]
        self.left_out: dict[int | None, Counter[str]] = {}
        for reason, _, where in people.left_out:
            self.left_out.setdefault(where, Counter())[reason] += 1
        self.stems: dict[Parts, list[Parts]] = {}  # of the images' names, by the last part
        for stem in map(_stem, self.names):
            self.stems.setdefault(stem[-1:], []).append(stem)

    def inputs(self, image: Path, index: int | None = None, *, exif: str = "ignore") -> Inputs:
        """An image and its persons' boxes.

        Args:
            image: file.
            index: of its name in ``names``; none: the one that fits (:func:`index_of`).
            exif: see :func:`read_inputs`.

        Raises:
            DataError: the file cannot be read, or is not listed.
        """
        people = self.people
        with retold(DataError, f"{self.file} lists "):
            index = index_of(image, self.names) if index is None else index
        number = self.numbers[index]
        size = people.images[number]["height"], people.images[number]["width"]
        notes = list[tuple[str, str]]()
        pixels = decode_image(image, size if all(size) else None, upright=exif == "apply", notes=notes)
        left_out = Counter(self.left_out.get(number))
        images, categories = people.as_written["image_id"], people.as_written["category_id"]
        found = [(_box(one, *pixels.shape[:2]), one["category_id"]) for one in people.persons.get(number, [])]
        left_out.update(box for box, _ in found if isinstance(box, str))
        kept = [(box, categories.get(of, of)) for box, of in found if not isinstance(box, str)]
        first = next((one["category_id"] for persons in people.persons.values() for one in persons), 1)
        own_ids = images.get(number, number), categories.get(first, first)
        folders = plain_parts(self.names[index])[:-1]
        if common_end(plain_parts(str(image.parent)), folders) < len(folders):
            notes.append(("the image is listed under other folders", self.names[index]))
        told = "; ".join(filter(None, (counted(left_out), _noted(notes))))
        boxes, ids = ([one[place] for one in kept] for place in (0, 1))
        return Inputs(pixels, boxes, ids, self._name(image, index), *own_ids, told, str(image))

    def _name(self, image: Path, index: int) -> str:
        """The image's name with as many folders before it as tell it from the other images listed."""
        stem = _stem(self.names[index])
        others = [*self.stems[stem[-1:]]]
        others.remove(stem)
        alike = max((common_end(other, stem) for other in others), default=0)
        return "_".join([*image.parts[1:-1], image.stem][-1 - alike :])


def _stem(name: str) -> Parts:
    return plain_parts(os.path.splitext(name)[0])


def _noted(notes: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{kind}: {example}" for kind, example in notes)


def _box(annotation: dict[str, Any], height: int, width: int) -> list[float] | str:
    """An annotation's box, of its mask where it has none else, or why it cannot be used."""
    box = xyxy(annotation.get("bbox"))
    if not annotation.get("bbox"):
        mask = decode_segmentation(annotation["segmentation"], height, width)
        return NO_BOX if mask is None or not mask.any() else [float(side) for side in box_of(mask)]
    return wrong_box(box, (height, width)) or [*box]


# -- which entry of an annotation file -----------------------------------------------------------------
def index_of(image: PathLike, file_names: Sequence[str]) -> int:
    r"""Which of an annotation file's names is an image's: the one that ends as its path does, for longest.

    Whole parts of the path count, from the file's name upwards. ``\`` is ``/``; a URL's ``%20``, letters with
    their accents apart, and other cases count as equal, unless another name is closer in its very letters.

    Raises:
        DataError: none has the image's name, or several come equally close.

    Example:
        >>> index_of("images/cam1/x.png", ["cam1/x.png", "cam2/x.png"])
        0
        >>> index_of("images/cam2/my x.png", [r"cam1\my x.png", r"Cam2\my%20x.png"])
        1
    """
    path, plain_path = _parts(os.fspath(image)), plain_parts(os.fspath(image))
    ranks = [(common_end(plain_path, plain_parts(x)), common_end(path, _parts(x))) for x in file_names]
    loose, exact = (max(column) for column in zip((0, 0), *ranks, strict=True))
    if not loose:
        rule = f"give one of its {len(ranks)} images, or boxes and no annotations"
        raise DataError(f"no image {Path(image).name}: {rule}")
    close = [index for index, rank in enumerate(ranks) if rank[0] == loose or rank[1] == exact]
    best = [index for index in close if ranks[index] == (loose, exact)]
    if len(best) != 1:
        both = " and ".join(shown(file_names[index]) for index in (best or close)[:2])
        rule = "give a path whose folders fit only one, or boxes and no annotations"
        raise DataError(f"{both}, and either may be {image}: {rule}")
    return best[0]


def _parts(path: str) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", unquote(part)) for part in name_parts(path))


# -- files ---------------------------------------------------------------------------------------------
def save_masks(
    folder: PathLike, inputs: Inputs, masks: Pixels, scores: Pixels, overlay: Pixels | None
) -> list[Path]:
    """Write a PNG a person (0 and 255), the overlay as PNG where there is one, and all masks as COCO results.

    They go into a folder of the image's own: its name, with a number where another image has that folder, as
    ``image.json`` in it says. Files of an earlier prediction of the same image are replaced.

    Args:
        folder: of all predictions; created if needed.
        inputs: image and boxes.
        masks: bool ``[N, H, W]``.
        scores: float ``[N]``.
        overlay: uint8 ``[H, W, 3]``, the image with the masks in colour; none: it is not written.

    Returns:
        the files: masks, overlay, JSON.

    Raises:
        ValueError: there is a file of the folder's name.
    """
    folder = _own_folder(checked_folder(folder), inputs)
    for old in folder.glob(f"{glob.escape(inputs.name)}_person*.png"):  # there may have been more boxes
        if old.stem.removeprefix(f"{inputs.name}_person").isdigit():
            old.unlink()
    (folder / f"{inputs.name}_overlay.png").unlink(missing_ok=True)
    files = []
    pictures = {f"person{number}": mask.astype(np.uint8) * 255 for number, mask in enumerate(masks)}
    for name, picture in (pictures | ({} if overlay is None else {"overlay": overlay})).items():
        files.append(folder / f"{inputs.name}_{name}.png")
        Image.fromarray(picture).save(files[-1])
    found = zip(inputs.category_ids, masks, scores, strict=True)
    entries = (coco_entry(inputs.image_id, of, encode(mask), float(score)) for of, mask, score in found)
    return [*files, write_results(folder / f"{inputs.name}_coco.json", entries)]


def _own_folder(root: Path, inputs: Inputs) -> Path:
    """The image's folder in ``root``, made if there is none."""
    mark = dumps({"image": inputs.source}) + "\n"
    for folder in map(root.joinpath, numbered(inputs.name)):
        file = folder / "image.json"
        if file.is_file() and file.read_text("utf-8") == mark:
            break
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            write_atomically(file, mark)
            break
    return folder


# -- an image or a folder ------------------------------------------------------------------------------
def check(path: Path, out: Path, boxes: Sequence[str], annotations: PathLike | None, overwrite: bool) -> None:
    """Refuse what can be known to be wrong before a model is loaded.

    Raises:
        ValueError: no boxes are given; a box for a whole folder; the folder to write into holds files.
    """
    if not boxes and annotations is None:
        rule = "give --boxes x0,y0,x1,y1 in pixels, or --annotations, a COCO JSON that lists the image"
        raise DataError(f"boxes are needed: {rule}")
    if boxes and path.is_dir():
        raise DataError(f"--boxes are those of one image, and {path} is a folder: give --annotations for it")
    existing(path)
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
) -> str:
    """Write the masks of an image, or of every image of a folder that has boxes.

    Args:
        predictor: a loaded model.
        path: an image, or a folder of images.
        out: folder; each image has a folder in it (:func:`save_masks`).
        boxes: texts ``x0,y0,x1,y1`` in pixels, of one image.
        annotations: COCO JSON whose persons' boxes are taken.
        category: see :func:`~refinelib.data.annotations.read_people`; none: as the run was trained.
        exif: see :func:`read_inputs`; none: likewise.
        overlays: also write each image with its masks in colour.
        progress: show a bar.

    Returns:
        What was written, and a line for each reason for which images were left out.

    Raises:
        DataError: there is no image with a box that can be read.
    """
    tally, entries, images, beyond = Tally(), list[dict[str, Any]](), 0, 0
    category, exif = category or predictor.settings.category, exif or predictor.settings.exif
    if path.is_dir() and annotations is not None:
        found = _inputs(path, Annotations(annotations, category=category), exif, tally, progress)
    else:
        rows = f"[[{'],['.join(boxes)}]]" if boxes else None
        found = iter([read_inputs(path, rows, annotations, category=category, exif=exif)])
    for inputs in found:
        masks, scores = predictor.predict_scored(inputs.pixels, inputs.boxes)
        drawn = with_masks(inputs.pixels, masks) if overlays else None
        files = save_masks(out, inputs, masks, scores, drawn)
        entries += json.loads(files[-1].read_text("utf-8"))
        images += 1
        height, width = inputs.pixels.shape[:2]
        beyond += sum(min(box[:2]) < 0 or box[2] > width or box[3] > height for box in inputs.boxes)
    if not images:
        reasons = counted(tally.skipped, tally.examples) or "the annotations list none"
        raise DataError(f"no image of {path} could be predicted: {reasons}")
    written = f"a folder for each image, {write_results(out / RESULTS, entries).name}"
    lines = [f"masks: {len(entries)}, images: {images}; in {out}: {written}"]
    if beyond:
        lines.append(f"boxes that reach beyond their image, whose masks end at its edge: {beyond}")
    left = tally.skipped.items()
    return "\n".join(lines + [f"left out: {n} x {name}: {tally.examples[name]}" for name, n in left])


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
