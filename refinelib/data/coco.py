"""COCO person annotations and their images as a source."""

import hashlib
import itertools
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import numpy as np

from refinelib.data import sources
from refinelib.data.annotations import People, decode_segmentation, read_annotations, read_people, usable
from refinelib.data.sources import DataError, InstancesBuilder, Mask, Masks, Scene, SceneError, box_of
from refinelib.files import PathLike

BAD_POLYGON = "polygon of an odd length, under three points or far outside, left out"
NOT_ITS_BOX = "mask that lies outside its box, ignored"
PART_OF_BOX = "mask that fills less than half of its box"
NOWHERE = "person or crowd of unknown place: the whole image is ignored"

ELSEWHERE = "image outside the image folder, refused without allow_images_outside"
SEVERAL = "image name that fits several files"
Parts = tuple[str, ...]


class CocoPeople(sources.IndexedSource):
    """Persons of a COCO instances file, polygons and RLE.

    The file is parsed on first use, not by the constructor: opening a store that exists does not need it.
    Where a crowd or a person without a mask is, pixels are ignored (:class:`~refinelib.data.sources.Scene`).

    Args:
        annotations: COCO instances JSON.
        images: folder that holds its images; see :class:`ImageFolder`.
        split: name for reports and for the store's folder.
        allow_outside: see :class:`ImageFolder`.
        category: see :func:`~refinelib.data.annotations.read_people`; ``crowd`` likewise.
        exif: ``ignore``: people were annotated on the pixels as stored, which is COCO's rule; ``apply``: on
            the image turned upright.

    Raises:
        DataError: the file or the folder is missing.
    """

    name = "coco"

    def __init__(
        self,
        annotations: PathLike,
        images: PathLike,
        split: str = "val",
        *,
        allow_outside: bool = False,
        category: str = "person",
        crowd: str = "auto",
        exif: str = "ignore",
    ) -> None:
        super().__init__(split)
        self.annotations, self.images = self._existing(annotations, images)
        self.folder = ImageFolder(self.images, allow_outside)
        self.category, self.crowd, self.exif = category, crowd, exif

    def _existing(self, annotations: PathLike, images: PathLike) -> tuple[Path, Path]:
        """Both places, ``~`` expanded, once it is sure that they are there."""
        file = Path(os.path.expanduser(annotations))
        if not os.path.isfile(file):
            raise DataError(f"there is no annotation file {file}, or it is no regular file")
        return file, sources.existing_folder(images, "image folder")

    def read(self) -> dict[str, list[Any]]:
        """The raw content: lists of images, annotations and categories."""
        return read_annotations(self.annotations)

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        file, (height, width), segmentations, persons, regions = json.loads(self._entry(index))
        size, notes, upright = (height, width), list[sources.Note](), self.exif == "apply"
        image = sources.decode_image(self.folder.find(file), size, upright=upright, notes=notes)
        masks = Masks(len(segmentations), size, lambda slot: decode_segmentation(segmentations[slot], *size))
        for slot, person in enumerate(persons):
            kind = compared(masks[slot], person["box"])
            if kind in (NOT_ITS_BOX, PART_OF_BOX):
                box = ", ".join(f"{side:g}" for side in person["box"])
                notes.append((kind, f"annotation {person['annotation_id']} in {file}, box {box} (xyxy)"))
            if kind in (NOT_ITS_BOX, sources.NO_MASK):
                regions.append((segmentations[slot], person["box"], True))
                segmentations[slot] = None
                masks[slot][:] = False  # if it is kept
        ignored, nowhere = _ignored(regions, size) if regions else (None, 0)
        return Scene(image, masks, ignored, notes + [(NOWHERE, file)] * nowhere)

    def annotated_instances(self, index: int) -> list[dict[str, Any]]:
        """All persons of image ``index``, small ones too, in the order of the scene's masks.

        Each has ``annotation_id``, ``category_id``, ``box`` (xyxy) and ``area``, as the file has them, but
        for ids that are no whole numbers: see ``as_written``.
        """
        _, _, _, persons, _ = json.loads(self._entry(index))
        return list(persons)

    @cached_property
    def as_written(self) -> dict[str, dict[int, Any]]:
        """The file's own ids by number, for ``image_id`` and ``category_id``, where they are texts."""
        return self._people.as_written

    def names(self) -> list[str]:
        """The images with a person, as the annotation file names them."""
        return [self._people.images[number]["file_name"] for number in sorted(self._people.persons)]

    def locate(self, name: str) -> Path | None:
        """The image file that a name means."""
        try:
            return self.folder.find(name)
        except SceneError:
            return None

    def fingerprint(self) -> str:
        """Of the annotation file's place, size and times, the image folder's, and how both are read."""
        parts = [*self._stamp, str(self.images.resolve()), self.folder.allow_outside]
        return hashlib.sha256(json.dumps([*parts, self.category, self.crowd, self.exif]).encode()).hexdigest()

    @cached_property
    def _stamp(self) -> list[Any]:
        """Of the annotation file when it was first asked for, or read."""
        return [str(self.annotations.resolve()), *sources.file_stamp(self.annotations)]

    @cached_property
    def _people(self) -> People:
        name, _ = str(self.annotations), self._stamp  # before it is read
        return read_people(self.read(), name, category=self.category, crowd=self.crowd)

    def _listed(self, builder: InstancesBuilder) -> tuple[Iterable[int], str, str]:
        """By image id."""
        for reason, example, _ in self._people.left_out:
            builder.skip(reason, example)
        for kind, example in self._people.notes:
            builder.note(kind, example)
        return sorted(self._people.persons), str(self.annotations), "no annotation of a person"

    def _add(self, image: int, builder: InstancesBuilder) -> bytes | None:
        """Returns JSON, for builder processes share it: file, size, segmentations, persons, regions."""
        where, entry = f"image {image}", self._people.images[image]
        if len(both := self._named_alike.get(image, [])) > 1:
            raise SceneError(sources.TWICE, f"one file for {' and '.join(both[:2])}: give each its own")
        file, size = entry["file_name"], (entry["height"], entry["width"])
        if size[0] is None:
            size = sources.image_size(self.folder.find(file), self.exif == "apply")
        regions = [_region(one, size) for one in self._people.regions.get(image, [])]
        segmentations, found = [], []
        for annotation in self._people.persons[image]:
            what = f"annotation {annotation['id']} of {where} in {self.annotations.name}"
            written = annotation.get("segmentation")
            segmentation, bad = usable(written, *size)
            for part in bad if segmentation else []:
                builder.note(BAD_POLYGON, f"{what}: {sources.printable(part, 80)}")
                if isinstance(part, dict) or (isinstance(part, list) and len(part) > 4):  # of the person?
                    regions.append(_region({**annotation, "segmentation": None}, size))
            person = None if segmentation is None else _person(annotation, segmentation, size)
            if person is None:
                rule = "is no mask; give polygons of three points or more, or run lengths of the image's size"
                builder.skip(sources.NO_MASK, f"{what}: {sources.printable(written, 80)} {rule}")
                regions.append(_region(annotation, size))
            else:
                segmentations.append(segmentation)
                found.append(person)
        ids, boxes, areas = ([one[key] for one in found] for key in ("annotation_id", "box", "area"))
        has_roi = builder.add(where, image, size, ids, boxes, areas)
        return json.dumps([file, size, segmentations, found, regions]).encode() if has_roi else None

    @cached_property
    def _named_alike(self) -> dict[int, list[str]]:
        """Of each image the entries that name its file: its own, if all is well."""
        found, by_file = dict[int, list[str]](), defaultdict[Path, list[str]](list)
        for number, entry in self._people.images.items():
            if file := self.locate(entry["file_name"]):  # else it is said where the image is read
                found[number] = by_file[file]
                by_file[file].append(f"image {number}, {entry['file_name']!r}")
        return found


def _person(annotation: dict[str, Any], segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """A person's ids, box and area; from the mask, where they are not given. None: there is no mask."""
    box: Any = xyxy(annotation["bbox"]) if annotation.get("bbox") else None
    area: Any = annotation.get("area")
    has_area = isinstance(area, (int, float)) and 1e-3 < area < 1e12
    if not (box and has_area):
        mask = decode_segmentation(segmentation, *size)
        if mask is None:
            return None
        box, area = box or [*map(float, box_of(mask))], area if has_area else mask.sum()
    ids = {"annotation_id": annotation["id"], "category_id": annotation["category_id"]}
    return {**ids, "box": box, "area": float(area)}


def _region(annotation: dict[str, Any], size: tuple[int, int]) -> tuple[Any, Any, bool]:
    """Segmentation and box of a crowd or a person without mask, and whether the former is only a part."""
    segmentation, bad = usable(annotation.get("segmentation"), *size)
    return segmentation, xyxy(annotation.get("bbox")), bool(bad)


def compared(mask: Mask, box: Sequence[float]) -> str | None:
    """What is wrong with a mask and its box (xyxy); None: nothing, or the box is too small to tell.

    Example:
        >>> mask = np.zeros((40, 40), bool)
        >>> mask[:20, :20] = True
        >>> compared(mask, (0, 0, 20, 20)), compared(mask, (20, 0, 40, 20))
        (None, 'mask that lies outside its box, ignored')
    """
    if not mask.any():
        return sources.NO_MASK
    if not (min(box[2] - box[0], box[3] - box[1]) >= sources.MIN_SIDE):
        return None
    inside = _cut(box, mask.shape)
    if mask[inside].sum() < mask.sum() / 2:
        return NOT_ITS_BOX
    left, top, right, bottom = box_of(mask[inside])
    return PART_OF_BOX if (right - left) * (bottom - top) < mask[inside].size / 2 else None


def _cut(box: Sequence[float], size: tuple[int, ...]) -> tuple[slice, slice]:
    """The pixels that a box (xyxy) touches; none where it is not finite."""
    sides = box if np.isfinite(box).all() else (0.0,) * 4
    x0, y0, x1, y1 = np.clip([*np.floor(sides[:2]), *np.ceil(sides[2:])], 0, max(size)).astype(int).tolist()
    return slice(y0, y1), slice(x0, x1)


def _ignored(regions: list[Any], size: tuple[int, int]) -> tuple[Mask, int]:
    """Pixels of regions, and the number of those of unknown place, for which all pixels are ignored.

    A region's pixels are those of its mask, and of its box where the mask is only a part or cannot be drawn.
    """
    ignored, nowhere = np.zeros(size, bool), 0
    for segmentation, box, part in regions:
        mask = decode_segmentation(segmentation, *size)
        if mask is not None:
            ignored |= mask
        if mask is None or part:
            inside = _cut(box, size) if max(box) > 1 else _cut((0.0,) * 4, size)  # 0 to 1: fractions
            nowhere += ignored[inside].size == 0
            ignored[inside if ignored[inside].size else ...] = True
    return ignored, nowhere


def xyxy(bbox: Any) -> tuple[float, float, float, float]:
    """Corners of a COCO box in pixels; all 0 where it is none.

    Example:
        >>> xyxy([10, 20, 30, 40]), xyxy("none")
        ((10.0, 20.0, 40.0, 60.0), (0.0, 0.0, 0.0, 0.0))
    """
    try:
        x, y, width, height = (float(value) for value in (bbox if isinstance(bbox, list) else ()))
    except (TypeError, ValueError, OverflowError):
        return (0.0, 0.0, 0.0, 0.0)  # counted as a box of no area
    return x, y, x + width, y + height


def coco_paths(
    split: str, data_dir: Path | None = None, annotations: Path | None = None, images: Path | None = None
) -> tuple[Path, Path]:
    """Annotation file and image folder of a split (``train``, ``val``) in the layout of a tool.

    A path given is taken as it is. Else it is found in ``data_dir``: ``annotations/instances_train2017.json``
    or the only match of ``instances_train2017*.json`` (COCO), ``annotations/instances_train.json`` (CVAT,
    Datumaro), ``train/labels.json`` (FiftyOne) or ``train/_annotations.coco.json`` (Roboflow), and the images
    in ``images/train2017``, ``train2017``, ``images/train``, ``train/data`` or ``train``.

    Raises:
        DataError: nothing or more than one file matches.
    """
    names = (f"{split}2017", split, "valid") if split == "val" else (f"{split}2017", split)
    if annotations is not None and images is not None:
        return annotations, images
    if data_dir is None:
        what = "annotations" if annotations is None else "images"
        raise DataError(f"no {split} {what} of COCO are given: give data_dir or {split}_{what}")
    sources.existing_folder(data_dir, "data folder", "it must hold annotations/ and images/ as COCO's does")
    if annotations is None:
        tried = [f"annotations/instances_{name}{end}.json" for name in names for end in ("", "*")]
        tried += [f"{name}/{file}" for name in names for file in ("labels.json", "_annotations.coco.json")]
        found = next(filter(None, (sorted(data_dir.glob(pattern)) for pattern in tried)), [])
        if len(found) != 1:
            listing = ", ".join(file.name for file in found) or "no such file"
            rule = f"one annotation file {tried[1]} is needed in {data_dir}"
            raise DataError(f"{rule}, and there is {listing}: give {split}_annotations")
        annotations = found[0]
    if images is None:
        places = [data_dir / place / name for name in names for place in ("images", ".")]
        places = [part for place in places for part in (place / "data", place)]
        images = next((place for place in places if place.is_dir()), None)
        if images is None:
            raise DataError(f"there is neither {places[1]} nor {places[3]}: give {split}_images")
    return annotations, images


# -- which file a name means --------------------------------------------------------------------------------
class ImageFolder:
    """Finds images by the names in an annotation file.

    A name fits a file where one of the two paths, from the last part on, is the end of the other: the name
    ``train2017/1.jpg`` fits ``train2017/1.jpg`` and ``1.jpg`` in the folder, and ``1.jpg`` fits
    ``camera/1.jpg``. The longest common end wins. Backslashes separate parts; of a URL the path counts. Where
    no file fits as written, ``%20``, upper and lower case, and the normal form of Unicode may differ.

    Args:
        folder: of the images.
        allow_outside: take names that are absolute or climb out of the folder with ``..``, too. The author
            of the annotations can then have any picture of this machine read.
    """

    def __init__(self, folder: Path, allow_outside: bool = False) -> None:
        self.folder, self.allow_outside, self._above = folder, allow_outside, folder.absolute().parts

    def find(self, name: str) -> Path:
        """The file that is meant. Only names are looked at: links may lead anywhere.

        Raises:
            SceneError: there is none, there are several, or the name leads out of the folder.
        """
        parts = name_parts(name)
        depths = itertools.accumulate(-1 if part == ".." else 1 for part in parts)
        anchored = "://" not in name and bool(PureWindowsPath(name).anchor)
        outside = anchored or min(depths, default=0) < 0
        if outside and not self.allow_outside:
            raise SceneError(ELSEWHERE, f"{name!r} leaves {self.folder}: set allow_images_outside to true")
        file = self.folder / name if anchored else self.folder.joinpath(*parts)
        if outside or os.path.exists(file):
            return file
        fitting = self._fitting(parts)
        if len(fitting) > 1:
            both = " and ".join(str(self.folder.joinpath(*one)) for one in fitting[:2])
            raise SceneError(SEVERAL, f"{name!r} may be {both}: write more of the path into file_name")
        if not fitting:
            raise SceneError(sources.MISSING, f"there is no image file {file}", file)
        return self.folder.joinpath(*fitting[0])

    def _fitting(self, parts: Parts) -> list[Parts]:
        """The files that share the longest end with a name; of these, the whole name, or as written."""
        wanted, ends = tuple(map(plain, parts)), dict[Parts, tuple[int, bool, int]]()
        alike = self._files.get(wanted[-1:], [])
        if len(wanted) > 1:  # then two parts must agree, unless the file lies in the folder itself
            alike = self._files.get(("", *wanted[-1:]), []) + self._files.get(wanted[-2:], [])
        for file in alike:
            path = (*self._above, *file)
            end = common_end(tuple(map(plain, path)), wanted)
            if end >= min(len(file), len(wanted)):
                ends[file] = end, len(file) == len(wanted), common_end(path, parts)
        return [file for file, end in ends.items() if end == max(ends.values())]

    @cached_property
    def _files(self) -> dict[Parts, list[Parts]]:
        """Files in the folder, as parts of their paths in it, by the plain form of the last one and two."""
        found: dict[Parts, list[Parts]] = {}
        for file in files_in(self.folder):
            parts = file.relative_to(self.folder).parts
            for end in (parts[-1:], parts[-2:] if len(parts) > 1 else ("", *parts)):
                found.setdefault(tuple(map(plain, end)), []).append(parts)
        return found


def files_in(folder: Path) -> Iterator[Path]:
    """Files and folders in a folder and the folders in it, links followed; not what tools leave there.

    Left out are hidden files and folders, leftovers (:func:`is_leftover`), and runs and stores of this
    package, which may lie among the data.

    Example:
        >>> [*files_in(Path("nowhere"))]
        []
    """
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        if {"store.json", "images.u8"} <= {*names} or {"status.json", "config.json"} <= {*names}:
            folders.clear()
            continue
        new: dict[str, str] = {}
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(place, name)), name)):
            if not name.startswith(".") and (real := os.path.realpath(os.path.join(place, name))) not in seen:
                new.setdefault(real, name)
        folders[:] = new.values()
        seen.update(new)
        yield from (Path(place, name) for name in sorted(names + folders) if not is_leftover(name))


def is_leftover(name: str) -> bool:
    """Whether a file's name is one that macOS or Windows leaves beside people's files.

    Example:
        >>> is_leftover("._1.png"), is_leftover("Thumbs.db"), is_leftover("1.png")
        (True, True, False)
    """
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def name_parts(name: str) -> Parts:
    r"""The parts of a path or URL, separated by ``/`` or a backslash.

    Example:
        >>> name_parts("http://host/val/1.jpg?x=2"), name_parts("val\\\\1.jpg")
        (('val', '1.jpg'), ('val', '1.jpg'))
    """
    if "://" in name:
        path = name.partition("://")[2].partition("/")[2]
        name = unquote(path.partition("?")[0].partition("#")[0]).lstrip("/")
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def plain(part: str) -> str:
    """A part of a path in the form in which it is compared where nothing fits as written.

    Example:
        >>> plain("My%20Image.JPG")
        'my image.jpg'
    """
    return unicodedata.normalize("NFC", unquote(part)).casefold()


def plain_parts(name: str) -> Parts:
    """The parts of a path or URL in the form in which they are compared.

    Example:
        >>> plain_parts("Val/My%20Image.JPG")
        ('val', 'my image.jpg')
    """
    return tuple(map(plain, name_parts(name)))


def common_end(a: Parts, b: Parts) -> int:
    """How many parts two paths share, from the last one on.

    Example:
        >>> common_end(("cam1", "x.png"), ("cam2", "x.png"))
        1
    """
    return len(os.path.commonprefix([a[::-1], b[::-1]]))
