"""COCO person annotations and their images as a source."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data import sources
from refinelib.data.sources import DataError, Instances, InstancesBuilder, Mask, Masks, Scene, SceneError
from refinelib.files import shown

CROWD = "crowd annotation"
NO_FIELD = "annotation that lacks a field"
NO_IMAGE = "annotation of an image that is not listed"
NO_ENTRY = "image entry that lacks a field"
ELSEWHERE = "image outside the image folder, refused without allow_images_outside"
#: Bytes of the largest annotation file that is read; COCO's own largest has half a GB.
MOST_BYTES = 2 << 30
#: Pixels along the outlines of one person's polygons, at most: pycocotools takes up to 200 bytes for each.
MOST_OUTLINE = 1 << 20


class CocoPeople:
    """Persons of a COCO instances file; crowds are left out, polygons and RLE are read.

    The file is parsed on first use, not by the constructor: opening a store that exists costs two ``stat``
    calls. What stays in memory is compact (columns, and the segmentations as JSON): builder processes share
    it.

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
        self._indexed: dict[int | None, Instances] = {}
        self._scenes: list[tuple[str, tuple[int, int], bytes, bytes]] = []
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
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        file_name, size, segmentations, _ = self._scene(index)
        image = sources.decode_image(image_file(self.images, file_name, self.allow_outside), size)
        parsed = json.loads(segmentations)
        return Scene(image, Masks(len(parsed), size, lambda slot: decode_segmentation(parsed[slot], *size)))

    def annotated_instances(self, index: int) -> list[dict[str, Any]]:
        """All persons of image ``index``, small ones too, in the order of the scene's masks.

        Each has ``annotation_id``, ``category_id``, ``box`` (xyxy) and ``area``, as the file has them.
        """
        found: list[dict[str, Any]] = json.loads(self._scene(index)[3])
        return found

    def fingerprint(self) -> str:
        """Of the annotation file's name, size and time and the image folder's place and time."""
        file, folder = self.annotations.stat(), self.images.stat()
        parts = [self.annotations.name, file.st_size, file.st_mtime_ns]
        parts += [str(self.images.resolve()), folder.st_mtime_ns, self.allow_outside]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _scene(self, index: int) -> tuple[str, tuple[int, int], bytes, bytes]:
        if index >= len(self._scenes):
            self.instances()
        return self._scenes[index]

    def _index(self, max_images: int | None) -> Instances:
        """ROIs as columns; keeps file name, size, segmentations and persons of their images."""
        persons, entries, builder = self._parse()
        scenes = []
        for image_id in sorted(persons):
            if max_images is not None and builder.images >= max_images:
                break
            entry = entries[image_id]
            size = entry["height"], entry["width"]
            segmentations, found = [], []
            for annotation in persons[image_id]:
                number = annotation["id"]
                segmentation = usable(annotation["segmentation"], *size)
                if segmentation is None:
                    where = f"annotation {number} of image {image_id} in {self.annotations.name}"
                    builder.skip(sources.NO_MASK, where)
                    continue
                box, area = xyxy(annotation["bbox"]), annotation.get("area")
                if not (isinstance(area, (int, float)) and 0 < area < 1e12):
                    area = (box[2] - box[0]) * (box[3] - box[1])
                segmentations.append(segmentation)
                category = annotation["category_id"]
                found.append(
                    {"annotation_id": number, "category_id": category, "box": box, "area": float(area)}
                )
            ids, boxes, areas = ([one[key] for one in found] for key in ("annotation_id", "box", "area"))
            if builder.add(f"image {image_id}", image_id, size, ids, boxes, areas):
                columns = json.dumps(segmentations).encode(), json.dumps(found).encode()
                scenes.append((entry["file_name"], size, *columns))
        instances = builder.instances(str(self.annotations), "no annotation of a person")
        self._scenes = max(self._scenes, scenes, key=len)  # a shorter index is a prefix of a longer one
        return instances

    def _parse(self) -> tuple[dict[int, list[Any]], dict[int, Any], InstancesBuilder]:
        """Person annotations by image id, image entries by id, and a builder that counted the others."""
        content = read_annotations(self.annotations)
        categories = person_ids(content)
        if not categories:
            names = (shown(one.get("name")) for one in content["categories"] if isinstance(one, dict))
            known = ", ".join(sorted(names)[:10]).replace("'", "") or "none"
            raise DataError(f"{self.annotations} has no category 'person'; its categories are {known}")
        builder, entries = InstancesBuilder(), dict[int, Any]()
        for number, entry in enumerate(content["images"]):
            if not is_image(entry):
                needs = "id, height, width as whole numbers and file_name are needed"
                builder.skip(NO_ENTRY, f"entry {number} of the images: {needs}, and it is {shown(entry)}")
                continue
            other = entries.setdefault(entry["id"], entry)
            if any(other[name] != entry[name] for name in ("file_name", "height", "width")):
                both = " and ".join(sources.printable(one["file_name"]) for one in (other, entry))
                rule = "give each image an id of its own (files put together need new ones)"
                raise DataError(f"{self.annotations} has two images of id {entry['id']}, {both}: {rule}")
        persons: dict[int, list[Any]] = {}
        for number, one in enumerate(content["annotations"]):
            if not isinstance(one, dict) or "category_id" not in one:
                builder.skip(NO_FIELD, f"entry {number} of the annotations")
                continue
            if one["category_id"] not in categories:
                continue
            name = f"annotation {shown(one.get('id', number))}"
            if one.get("iscrowd"):
                builder.skip(CROWD, name)
            elif missing := {"image_id", "bbox", "segmentation"} - set(one):
                builder.skip(NO_FIELD, f"{name} lacks {', '.join(sorted(missing))}")
            elif not _is_whole(one["image_id"]) or one["image_id"] not in entries:
                builder.skip(NO_IMAGE, f"{name}, image {shown(one['image_id'])}")
            else:
                persons.setdefault(one["image_id"], []).append(one)
        taken, free = set[int](), itertools.count(-1, -1)
        for one in itertools.chain.from_iterable(persons.values()):
            while not _is_whole(one.get("id")) or one["id"] in taken:  # metrics and masks are kept by it
                one["id"] = next(free)
            taken.add(one["id"])
        return persons, entries, builder


def coco_paths(
    split: str, data_dir: Path | None = None, annotations: Path | None = None, images: Path | None = None
) -> tuple[Path, Path]:
    """Annotation file and image folder of a split (``train``, ``val``) in COCO's layout.

    A path given is taken as it is. Else the file is ``data_dir/annotations/instances_train2017.json`` or the
    only match of ``instances_train2017*.json``, the folder ``data_dir/images/train2017`` or
    ``data_dir/train2017``.

    Raises:
        DataError: nothing or more than one file matches.
    """
    folder = f"{split}2017"
    if annotations is not None and images is not None:
        return annotations, images
    if data_dir is None:
        what = "annotations" if annotations is None else "images"
        raise DataError(f"no {split} {what} of COCO are given: give data_dir or {split}_{what}")
    if not os.path.isdir(data_dir):
        rule = "data_dir must hold annotations/ and images/ in COCO's layout"
        raise DataError(f"there is no data folder {data_dir}: {rule}")
    if annotations is None:
        place, name = data_dir / "annotations", f"instances_{folder}"
        found = [*place.glob(f"{name}.json")] or sorted(place.glob(f"{name}*.json"))
        if len(found) != 1:
            listing = ", ".join(file.name for file in found) or "no such file"
            rule = f"one annotation file {name}*.json is needed in {place}"
            raise DataError(f"{rule}, and there is {listing}: give {split}_annotations")
        annotations = found[0]
    if images is None:
        places = [data_dir / "images" / folder, data_dir / folder]
        images = next((place for place in places if place.is_dir()), None)
        if images is None:
            raise DataError(f"there is neither {places[0]} nor {places[1]}: give {split}_images")
    return annotations, images


def image_file(images: Path, file_name: str, allow_outside: bool = False) -> Path:
    """Where an entry's image lies: in the folder ``images``, under its ``file_name`` or the last part of it.

    Only the name is looked at: links may lead anywhere.

    Args:
        images: the folder.
        file_name: as the entry has it.
        allow_outside: take a name that is absolute or climbs out of the folder with ``..``, too. The author
            of the annotations can then have any picture of this machine read.

    Raises:
        SceneError: it leads out of the folder.

    Example:
        >>> image_file(Path("images"), "train2017/1.jpg").as_posix()
        'images/train2017/1.jpg'
    """
    name = PureWindowsPath(file_name)  # takes / and \\ for separators, whatever the system
    depths = itertools.accumulate(-1 if part == ".." else 1 for part in name.parts)
    if not allow_outside and (name.anchor or min(depths, default=0) < 0):
        rule = "name the file in that folder, or set allow_images_outside to true"
        leads = f"the file_name {file_name!r} leads out of the image folder {images}"
        raise SceneError(ELSEWHERE, f"{leads}: {rule}")
    file, plain = images / file_name, images / Path(file_name).name
    # file_name may repeat the folder: train2017/x.jpg
    return plain if not os.path.isfile(file) and os.path.isfile(plain) else file


def read_annotations(file: Path) -> dict[str, list[Any]]:
    """The content of a COCO instances file, with its three lists.

    Raises:
        DataError: it cannot be read, is no JSON, takes too much memory, or lacks a list.
    """
    try:
        found = os.stat(file)
        regular, small = stat.S_ISREG(found.st_mode), found.st_size <= MOST_BYTES
        # Reading a FIFO would wait for its writer.
        content = json.loads(file.read_bytes()) if regular and small else None
    except (OSError, MemoryError) as error:
        raise DataError(f"{file} cannot be read: {str(error) or 'it does not fit into the memory'}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error}): fetch it again, it may be cut short") from None
    if not regular:
        raise DataError(f"{file} is no regular file: give an annotation file in JSON")
    if not small:
        sizes = f"{found.st_size / 1e9:.0f} GB, more than {MOST_BYTES / 1e9:.0f} GB"
        raise DataError(f"{file} has {sizes}: leave only persons in it")
    parts = ("images", "annotations", "categories")
    content = content if isinstance(content, dict) else {}
    if missing := [part for part in parts if not isinstance(content.get(part), list)]:
        lists = ", ".join(missing)
        raise DataError(f"{file} lacks the list {lists}: a COCO instances file has {', '.join(parts)}")
    return {part: content[part] for part in parts}


def person_ids(content: dict[str, list[Any]]) -> list[int]:
    """The ids of the categories named person.

    Example:
        >>> person_ids({"categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]})
        [1]
    """
    categories = [one for one in content["categories"] if isinstance(one, dict) and _is_whole(one.get("id"))]
    return [one["id"] for one in categories if str(one.get("name")).lower() == "person"]


def xyxy(bbox: Any) -> tuple[float, float, float, float]:
    """Corners of a COCO box in pixels; all 0 where it is none.

    Example:
        >>> xyxy([10, 20, 30, 40]), xyxy("none")
        ((10.0, 20.0, 40.0, 60.0), (0.0, 0.0, 0.0, 0.0))
    """
    try:
        x, y, width, height = (float(value) for value in bbox)
    except (TypeError, ValueError, OverflowError):
        return (0.0, 0.0, 0.0, 0.0)  # counted as a box of no area
    return x, y, x + width, y + height


def is_image(entry: Any) -> bool:
    """Whether an entry of a COCO file's images says all that is needed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return False
    whole = all(_is_whole(entry.get(name)) for name in ("id", "height", "width"))
    return whole and all(0 < entry[side] < 2**31 for side in ("height", "width"))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


# -- segmentations -----------------------------------------------------------------------------------
def usable(segmentation: Any, height: int, width: int) -> Any:
    """What of a segmentation may hold a mask, at a glance; None where nothing does.

    That is lists of six numbers or more, or run lengths of this image's size. Whether they cover anything
    shows when they are decoded.
    """
    if isinstance(segmentation, list):
        long = [one for one in segmentation if isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0]
        return [one for one in long if {*map(type, one)} <= {int, float}] or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    plain = isinstance(counts, str) or (isinstance(counts, list) and {*map(type, counts)} <= {int})
    return {"size": [height, width], "counts": counts} if counts and plain else None


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool ``[height, width]``; None: no mask in it.

    pycocotools draws the polygons. Those that it would read or write out of bounds (coordinates that are not
    finite or far away, millions of pixels of outline) are left out. Run lengths are checked and decoded here:
    pycocotools does not check them, and damaged ones make it read uninitialised memory or end the process.

    Example:
        >>> decode_segmentation({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2).tolist()
        [[False, True], [True, False]]
    """
    segmentation = usable(segmentation, height, width)
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
