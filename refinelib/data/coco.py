"""COCO person annotations and their images as a source of scenes."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import stat
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from refinelib.data.errors import DataError, SceneError, printable
from refinelib.data.sources import NO_MASK, Masks, Instances, InstancesBuilder, Scene, counted, decode_image
from refinelib.data.segmentation import decode_segmentation, usable

CROWD = "crowd annotation"
NO_FIELD = "annotation that lacks a field"
NO_IMAGE = "annotation of an image that is not listed"
NO_ENTRY = "image entry that lacks a field"
ELSEWHERE = "image outside the image folder, refused without allow_images_outside"
#: Bytes of memory that reading an annotation file may take; COCO's largest, of half a GB, takes some 3 GB.
MOST_PARSED = 16 << 30


class CocoPeople:
    """Persons of a COCO instances file; crowds left out, polygons and RLE read.

    The file is parsed on first use, not by the constructor: opening a store that exists costs
    two ``stat`` calls. What stays in memory afterwards is compact (columns, and the
    segmentations as JSON bytes), so that builder processes share it.

    Args:
        annotations: COCO instances JSON.
        images: folder that holds its images.
        split: name for reports and for the store's folder.
        allow_outside: see :func:`image_file`.

    Raises:
        DataError: the file or the folder is missing.
    """

    name = "coco"

    def __init__(
        self, annotations: str | Path, images: str | Path, split: str = "val", *, allow_outside: bool = False
    ) -> None:
        self.annotations, self.images = (Path(os.path.expanduser(path)) for path in (annotations, images))
        self.split, self.allow_outside = split, allow_outside
        if not os.path.isfile(self.annotations):
            what = "is no regular file" if os.path.exists(self.annotations) else "does not exist"
            raise DataError(f"there is no annotation file {self.annotations}: it {what}")
        if not os.path.isdir(self.images):
            raise DataError(f"there is no image folder {self.images}")

    def __len__(self) -> int:
        return self.instances().images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images by image id.

        Raises:
            DataError: the file does not parse, lacks a part, or has no person that can be used.
        """
        if max_images not in self._indexed:
            self._indexed[max_images] = self._index(max_images)
        return self._indexed[max_images]

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``people()`` and the masks of all its persons."""
        if index >= len(self._files or ()):
            self.instances()
        file_name, height, width = self._files[index]
        image = decode_image(image_file(self.images, file_name, self.allow_outside), (height, width))
        segmentations = json.loads(self._blobs[index])

        def decode(slot: int) -> np.ndarray | None:
            return decode_segmentation(segmentations[slot], height, width)

        return Scene(image, Masks(len(segmentations), (height, width), decode))

    def annotated_instances(self, index: int) -> list[dict[str, Any]]:
        """All persons of image ``index`` of ``people()``, small ones too, in the order of the scene's masks.

        Each has ``annotation_id``, ``category_id``, ``box`` (xyxy) and ``area``, as the file has them.
        """
        if index >= len(self._files or ()):
            self.instances()
        names = ("annotation_id", "category_id", "box", "area")
        return [dict(zip(names, row)) for row in json.loads(self._everyone[index])]

    def fingerprint(self) -> str:
        """Of the annotation file's name, size and time and the image folder's place and time."""
        file, folder = self.annotations.stat(), self.images.stat()
        parts = [self.annotations.name, file.st_size, file.st_mtime_ns, str(self.images.resolve()), folder.st_mtime_ns]
        parts += ["outside"] * self.allow_outside
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # -- parsing ---------------------------------------------------------------------------------
    @cached_property
    def _indexed(self) -> dict[int | None, Instances]:
        return {}

    _files: list[tuple[str, int, int]] | None = None
    _blobs: list[bytes]
    _everyone: list[bytes]

    def _index(self, max_images: int | None) -> Instances:
        persons, listed, builder = self._parse()
        files, blobs, everyone = [], [], []
        for image_id in sorted(persons):
            if max_images is not None and builder.images >= max_images:
                break
            entry, mine = listed[image_id], persons[image_id]
            height, width = entry["height"], entry["width"]
            masked, segmentations = [], []
            for annotation in mine:
                if segmentation := usable(annotation["segmentation"], height, width):
                    masked.append(annotation)
                    segmentations.append(segmentation)
                else:
                    where = f"image {image_id} in {self.annotations.name}"
                    builder.skip(NO_MASK, f"annotation {annotation['id']} of {where}")
            boxes = np.array([xyxy(a["bbox"]) for a in masked], np.float64).reshape(-1, 4)
            areas = np.array([_area(a.get("area"), box) for a, box in zip(masked, boxes)])
            ids, slots = [a["id"] for a in masked], list(range(len(masked)))
            if builder.add(image_id, (height, width), ids, slots, boxes, areas, f"image {image_id}"):
                files.append((entry["file_name"], height, width))
                blobs.append(json.dumps(segmentations).encode())
                each = zip(masked, boxes.tolist(), areas.tolist())
                rows = [(a["id"], a["category_id"], box, area) for a, box, area in each]
                everyone.append(json.dumps(rows).encode())
        people = builder.instances()
        if not len(people):
            why = counted(people.skipped) or "no annotation of a person"
            raise DataError(f"{self.annotations} has no person that can be used: {why}")
        # A shorter index is a prefix of a longer one: keep the longer.
        if self._files is None or len(files) > len(self._files):
            self._files, self._blobs, self._everyone = files, blobs, everyone
        return people

    def _parse(self) -> tuple[dict[int, list], dict[int, dict], InstancesBuilder]:
        """Person annotations by image id, image entries by id, and a builder that counted the rest."""
        content = read_annotations(self.annotations)
        person = person_ids(content)
        if not person:
            categories = [c for c in content["categories"] if isinstance(c, dict) and _is_whole(c.get("id"))]
            names = ", ".join(sorted(_shown(c.get("name")).strip("'") for c in categories)[:10])
            names = names or "none with a whole number as its id"
            raise DataError(f"{self.annotations} has no category 'person'; its categories are {names}")
        builder, listed, persons = InstancesBuilder(), {}, {}
        for number, entry in enumerate(content["images"]):
            if is_image(entry):
                other = listed.setdefault(entry["id"], entry)
                if any(other[name] != entry[name] for name in ("file_name", "height", "width")):
                    names = " and ".join(printable(one["file_name"]) for one in (other, entry))
                    raise DataError(
                        f"{self.annotations} has two images of id {entry['id']}, {names}: nobody can say "
                        "whose people are whose; give each image an id of its own (files put together need "
                        "new ones)"
                    )
            else:
                needs = "id, height, width as whole numbers and file_name are needed"
                builder.skip(NO_ENTRY, f"entry {number} of the images: {needs}, and it is {_shown(entry)}")
        taken: set[int] = set()
        known = {a["id"] for a in content["annotations"] if isinstance(a, dict) and _is_whole(a.get("id"))}
        free = 1 + max(known, default=-1)
        free = free if free < 2**62 else 0
        for number, annotation in enumerate(content["annotations"]):
            if not isinstance(annotation, dict) or "category_id" not in annotation:
                builder.skip(NO_FIELD, f"entry {number} of the annotations")
            elif annotation["category_id"] not in person:
                continue
            elif annotation.get("iscrowd"):
                builder.skip(CROWD, _named(annotation, number))
            elif missing := {"image_id", "bbox", "segmentation"} - set(annotation):
                builder.skip(NO_FIELD, f"{_named(annotation, number)} lacks {', '.join(sorted(missing))}")
            elif not _is_whole(annotation["image_id"]) or annotation["image_id"] not in listed:
                image = _shown(annotation["image_id"])
                builder.skip(NO_IMAGE, f"{_named(annotation, number)}, image {image}")
            else:
                if not _is_whole(annotation.get("id")) or annotation["id"] in taken:  # figures and masks are kept by it
                    free = max(free, number)  # its place in the file, where no other has that
                    while free in known:
                        free += 1
                    annotation["id"] = free
                    free += 1
                taken.add(annotation["id"])
                persons.setdefault(annotation["image_id"], []).append(annotation)
        return persons, listed, builder


def coco_paths(
    split: str,
    data_dir: Path | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
) -> tuple[Path, Path]:
    """Annotation file and image folder of a split (``train``, ``val``) in COCO's layout.

    A path given is taken as it is; else ``data_dir/annotations/instances_train2017.json`` or the
    only match of ``instances_train2017*.json``; ``data_dir/images/train2017`` or
    ``data_dir/train2017``.

    Raises:
        DataError: nothing or more than one file matches.
    """
    folder = f"{split}2017"
    for given, what in ((annotations, "annotations"), (images, "images")):
        if given is None and data_dir is None:
            raise DataError(f"the {split} {what} of COCO are nowhere: give data_dir or {split}_{what}")
    if data_dir is not None and not os.path.isdir(data_dir) and (annotations is None or images is None):
        raise DataError(
            f"there is no data folder {data_dir}: data_dir must hold annotations/ and images/ in COCO's layout"
        )
    if annotations is None:
        place = data_dir / "annotations"
        exact = place / f"instances_{folder}.json"
        found = [exact] if exact.is_file() else sorted(place.glob(f"instances_{folder}*.json"))
        if len(found) != 1:
            listing = ", ".join(f.name for f in found) if found else "no such file"
            raise DataError(
                f"one annotation file instances_{folder}*.json is needed in {place}, and there is {listing}: "
                f"give {split}_annotations"
            )
        annotations = found[0]
    if images is None:
        found = [place for place in (data_dir / "images" / folder, data_dir / folder) if place.is_dir()]
        if not found:
            places = f"neither {data_dir / 'images' / folder} nor {data_dir / folder}"
            raise DataError(f"there is {places}: give {split}_images")
        images = found[0]
    return annotations, images


def image_file(images: Path, file_name: str, allow_outside: bool = False) -> Path:
    """Where an entry's image lies: in the folder ``images``, under its ``file_name`` or the last part of it.

    The name alone is looked at: links lead where they lead.

    Args:
        allow_outside: take a name that is absolute or climbs out of the folder with ``..``, too. Whoever
            wrote the annotations can then have any picture of this machine read.

    Raises:
        SceneError: it leads out of the folder.
    """
    name = PureWindowsPath(file_name)  # takes / and \\ for separators, whatever the system
    depths = accumulate(-1 if part == ".." else 1 for part in name.parts)
    if not allow_outside and (name.anchor or min(depths, default=0) < 0):
        rule = "name the file in that folder, or set allow_images_outside to true"
        told = f"the file_name {file_name!r} leads out of the image folder {images}: {rule}"
        raise SceneError(ELSEWHERE, told)
    file = images / file_name
    if not os.path.isfile(file) and os.path.isfile(images / Path(file_name).name):
        file = images / Path(file_name).name  # file_name may repeat the folder: train2017/x.jpg
    return file


def read_annotations(file: Path) -> dict[str, list]:
    """The content of a COCO instances file, with its three lists.

    Raises:
        DataError: it cannot be read, is no JSON, or lacks a list.
    """
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):  # reading a FIFO waits for its writer, for ever
            raise DataError(f"{file} is no regular file: give an annotation file in JSON")
        needed = 6 * found.st_size  # the text twice, and its strings: 4 bytes a character where one is rare
        text = file.read_bytes() if needed <= MOST_PARSED else b""
        if 15 * needed > MOST_PARSED:  # else no need to count: a byte of text takes at most 90 of memory
            needed += 0 if text.isascii() else 3 * len(text)
            costs = ((b"[", 64), (b"{", 200), (b",", 40), (b'"', 25))
            needed += sum(text.count(sign) * size for sign, size in costs)
        if needed > MOST_PARSED:
            wants, most = (f"{size / 1e9:.0f} GB" for size in (needed, MOST_PARSED))
            raise DataError(f"{file} would take {wants} of memory, {most} at most: leave only persons in it")
        content = json.loads(text)
    except DataError:
        raise
    except (OSError, MemoryError) as error:
        raise DataError(f"{file} cannot be read: {str(error) or 'it does not fit into the memory'}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error}): fetch it again, it may be cut short") from None
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not (isinstance(content, dict) and isinstance(content.get(part), list))]
    if missing:
        lists = ", ".join(missing)
        raise DataError(f"{file} lacks the list {lists}: a COCO instances file has {', '.join(parts)}")
    return content


def person_ids(content: dict[str, list]) -> list[int]:
    """The ids of the categories named person."""
    categories = [c for c in content["categories"] if isinstance(c, dict) and _is_whole(c.get("id"))]
    return [c["id"] for c in categories if isinstance(c.get("name"), str) and c["name"].lower() == "person"]


# -- helpers ---------------------------------------------------------------------------------------
_short = reprlib.Repr()
_short.maxdict = _short.maxstring = 100


def _shown(value: Any) -> str:
    """Any value of a JSON file in few words, however large or deep."""
    return _short.repr(value)


def _named(annotation: dict, number: int) -> str:
    return f"annotation {_shown(annotation.get('id', number))}"


def xyxy(bbox: Any) -> tuple[float, float, float, float]:
    """Corners of a COCO box, pixels; all 0 where it is none."""
    try:
        x, y, w, h = (float(value) for value in bbox)
    except (TypeError, ValueError, OverflowError):
        return (0.0, 0.0, 0.0, 0.0)  # counted as a box of no area
    return x, y, x + w, y + h


def _area(given: Any, box: np.ndarray) -> float:
    """The annotation's own area in pixels, the box's where it gives none."""
    if isinstance(given, (int, float)) and 0 < given < 1e12:
        return float(given)
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_image(entry: Any) -> bool:
    """Whether an entry of a COCO file's images says all that is needed."""
    if not (isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and _is_whole(entry.get("id"))):
        return False
    return all(_is_whole(entry.get(side)) and 0 < entry[side] < 2**31 for side in ("height", "width"))
