"""COCO person annotations and their images as a source of scenes."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data.errors import DataError
from refinelib.data.scenes import NO_MASK, People, PeopleBuilder, Scene, decode_image

CROWD = "crowd annotation"
NO_FIELD = "annotation that lacks a field"
NO_IMAGE = "annotation of an image that is not listed"


class CocoPeople:
    """Persons of a COCO instances file; crowds left out, polygons and RLE read.

    The file is parsed on first use, not by the constructor: opening a store that exists costs
    two ``stat`` calls. What stays in memory afterwards is compact (columns, and the
    segmentations as JSON bytes), so that builder processes share it.

    Args:
        annotations: COCO instances JSON.
        images: folder that holds its images.
        split: name for reports and for the store's folder.

    Raises:
        DataError: the file or the folder is missing.
    """

    name = "coco"

    def __init__(self, annotations: str | Path, images: str | Path, split: str = "val") -> None:
        self.annotations, self.images, self.split = Path(annotations), Path(images), split
        if not self.annotations.is_file():
            raise DataError(f"there is no annotation file {self.annotations}")
        if not self.images.is_dir():
            raise DataError(f"there is no image folder {self.images}")

    def __len__(self) -> int:
        return self.people().images

    def people(self, max_images: int | None = None) -> People:
        """Every ROI of the first ``max_images`` images by image id.

        Raises:
            DataError: the file does not parse, lacks a part, or has no person that can be used.
        """
        if max_images not in self._indexed:
            self._indexed[max_images] = self._index(max_images)
        return self._indexed[max_images]

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``people()`` and the masks of all its persons."""
        if self._files is None:
            self.people()
        file_name, height, width = self._files[index]
        segmentations = json.loads(self._blobs[index])
        file = self.images / file_name
        if not file.is_file() and (self.images / Path(file_name).name).is_file():
            file = self.images / Path(file_name).name  # file_name may repeat the folder: train2017/x.jpg
        image = decode_image(file, (height, width))
        masks = np.zeros((len(segmentations), height, width), bool)
        for mask, segmentation in zip(masks, segmentations):
            decoded = decode_segmentation(segmentation, height, width)
            if decoded is not None:
                mask[:] = decoded
        return Scene(image, masks)

    def fingerprint(self) -> str:
        """Of the annotation file's name, size and time and the image folder's place and time."""
        file, folder = self.annotations.stat(), self.images.stat()
        parts = [self.annotations.name, file.st_size, file.st_mtime_ns, str(self.images.resolve()), folder.st_mtime_ns]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # -- parsing ---------------------------------------------------------------------------------
    @cached_property
    def _indexed(self) -> dict[int | None, People]:
        return {}

    _files: list[tuple[str, int, int]] | None = None
    _blobs: list[bytes]

    def _index(self, max_images: int | None) -> People:
        persons, listed, builder = self._parse()
        files, blobs = [], []
        for image_id in sorted(persons):
            if max_images is not None and builder.images >= max_images:
                break
            entry, mine = listed[image_id], persons[image_id]
            height, width = int(entry["height"]), int(entry["width"])
            usable = []
            for annotation in mine:
                if _has_mask(annotation["segmentation"]):
                    usable.append(annotation)
                else:
                    builder.skip(NO_MASK, f"annotation {annotation['id']} of image {image_id} in {self.annotations.name}")
            boxes = np.array([_xyxy(a["bbox"]) for a in usable], np.float64).reshape(-1, 4)
            areas = [float(a.get("area", (b[2] - b[0]) * (b[3] - b[1]))) for a, b in zip(usable, boxes)]
            ids = [int(a["id"]) for a in usable]
            if builder.add(image_id, (height, width), ids, list(range(len(usable))), boxes, np.array(areas), f"image {image_id}"):
                files.append((str(entry["file_name"]), height, width))
                blobs.append(json.dumps([a["segmentation"] for a in usable]).encode())
        people = builder.people()
        if not len(people):
            raise DataError(f"{self.annotations} has no person that can be used: {_counts(people.skipped) or 'no annotation of a person'}")
        # A shorter index is a prefix of a longer one: keep the longer.
        if self._files is None or len(files) > len(self._files):
            self._files, self._blobs = files, blobs
        return people

    def _parse(self) -> tuple[dict[int, list], dict[int, dict], PeopleBuilder]:
        """Person annotations by image id, image entries by id, and a builder that counted the rest."""
        content = _load(self.annotations)
        person = [c.get("id") for c in content["categories"] if isinstance(c, dict) and str(c.get("name", "")).lower() == "person"]
        if not person:
            names = sorted(str(c.get("name")) for c in content["categories"] if isinstance(c, dict))
            raise DataError(f"{self.annotations} has no category 'person'; its categories are {', '.join(names[:10]) or 'none'}")
        listed = {}
        for entry in content["images"]:
            if not (isinstance(entry, dict) and {"id", "file_name", "height", "width"} <= set(entry)):
                raise DataError(f"{self.annotations}: each image needs id, file_name, height and width, and one is {str(entry)[:200]}")
            if not all(isinstance(entry[key], int) for key in ("id", "height", "width")):
                raise DataError(f"{self.annotations}: id, height and width of an image are whole numbers, and one image is {str(entry)[:200]}")
            listed[entry["id"]] = entry
        builder, persons = PeopleBuilder(), {}
        for number, annotation in enumerate(content["annotations"]):
            if not isinstance(annotation, dict) or "category_id" not in annotation:
                builder.skip(NO_FIELD, f"entry {number} of the annotations")
            elif annotation["category_id"] not in person:
                continue
            elif annotation.get("iscrowd"):
                builder.skip(CROWD, f"annotation {annotation.get('id', number)}")
            elif missing := {"image_id", "bbox", "segmentation"} - set(annotation):
                builder.skip(NO_FIELD, f"annotation {annotation.get('id', number)} lacks {', '.join(sorted(missing))}")
            elif annotation["image_id"] not in listed:
                builder.skip(NO_IMAGE, f"annotation {annotation.get('id', number)}, image {annotation['image_id']}")
            else:
                annotation.setdefault("id", number)
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
    if data_dir is not None and not data_dir.is_dir() and (annotations is None or images is None):
        raise DataError(f"there is no data folder {data_dir}: data_dir must hold annotations/ and images/ in COCO's layout")
    if annotations is None:
        place = data_dir / "annotations"
        exact = place / f"instances_{folder}.json"
        found = [exact] if exact.is_file() else sorted(place.glob(f"instances_{folder}*.json"))
        if len(found) != 1:
            listing = ", ".join(f.name for f in found) if found else "no such file"
            raise DataError(f"one annotation file instances_{folder}*.json is needed in {place}, and there is {listing}: give {split}_annotations")
        annotations = found[0]
    if images is None:
        found = [place for place in (data_dir / "images" / folder, data_dir / folder) if place.is_dir()]
        if not found:
            raise DataError(f"there is neither {data_dir / 'images' / folder} nor {data_dir / folder}: give {split}_images")
        images = found[0]
    return annotations, images


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool [height, width]; None: no mask in it.

    What would make pycocotools read or write out of bounds (coordinates that are not finite or
    far away, run lengths of another size) counts as no mask.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [p for p in segmentation if _is_polygon(p, height, width)]
            if not polygons:
                return None
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        else:
            if [int(side) for side in segmentation["size"]] != [height, width]:
                return None
            counts = segmentation["counts"]
            if isinstance(counts, list):
                if sum(counts) != height * width or min(counts, default=0) < 0:
                    return None
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = {"size": [height, width], "counts": counts}
        mask = coco_mask.decode(rle).astype(bool)
    except (KeyError, TypeError, ValueError, IndexError, UnicodeError):
        return None
    return mask if mask.any() else None


# -- helpers ---------------------------------------------------------------------------------------
def _load(file: Path) -> dict[str, list]:
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid JSON ({error}): fetch it again, it may be cut short") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not (isinstance(content, dict) and isinstance(content.get(part), list))]
    if missing:
        raise DataError(f"{file} lacks the list {', '.join(missing)}: a COCO instances file has {', '.join(parts)}")
    return content


def _xyxy(bbox: Any) -> tuple[float, float, float, float]:
    try:
        x, y, w, h = (float(value) for value in bbox)
    except (TypeError, ValueError):
        return (0.0, 0.0, 0.0, 0.0)  # counted as a box of no area
    return x, y, x + w, y + h


def _has_mask(segmentation: Any) -> bool:
    """Whether a mask is there at all; whether it covers anything shows when it is decoded."""
    if isinstance(segmentation, list):
        return any(isinstance(p, list) and len(p) >= 6 for p in segmentation)
    return isinstance(segmentation, dict) and bool(segmentation.get("counts")) and len(segmentation.get("size") or ()) == 2


def _is_polygon(polygon: Any, height: int, width: int) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    reach = 2 * max(height, width)
    return all(math.isfinite(value) and -reach <= value <= 2 * reach for value in polygon)


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())
