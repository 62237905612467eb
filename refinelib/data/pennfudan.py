"""The Penn-Fudan pedestrian set in its published layout as a source."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from refinelib.data.errors import DataError, SceneError
from refinelib.data.sources import (
    NO_MASK,
    OTHER_SIZE,
    UNREADABLE,
    Masks,
    Instances,
    InstancesBuilder,
    Scene,
    counted,
    decode_image,
    opened,
)


class PennFudanPeople:
    """Persons of Penn-Fudan: instance ids are pixel values of the masks, boxes are taken from them.

    The set has no split of its own: an image is in ``val`` where the SHA-1 of its name is a
    multiple of 5 (about every fifth), whatever other images are there, and in ``train`` else.

    Args:
        folder: holds ``PNGImages`` and ``PedMasks``.
        split: ``train``, ``val`` or ``all``.

    Raises:
        DataError: a folder is missing.
    """

    name = "pennfudan"

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(os.path.expanduser(folder)), split
        if split not in ("train", "val", "all"):
            raise DataError(f"Penn-Fudan has no split {split!r}: give train, val or all")
        for place in (self.folder, self.folder / "PNGImages", self.folder / "PedMasks"):
            if not os.path.isdir(place):
                raise DataError(
                    f"there is no folder {place}: data_dir (or add_pennfudan) must hold PNGImages and PedMasks, as PennFudanPed does"
                )

    def __len__(self) -> int:
        return self.instances().images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images by name; reads the masks, not the images.

        Raises:
            DataError: no person that can be used.
        """
        from scipy import ndimage  # takes a while to import, and most data are other

        builder = InstancesBuilder()
        files = []
        for image_id, file in self._files:
            if max_images is not None and builder.images >= max_images:
                break
            try:
                ids, areas, owner = _read_mask(self._mask_file(file))
            except SceneError as error:
                builder.skip(error.reason, str(error))
                continue
            found = ndimage.find_objects(owner)  # one pass: a damaged mask may hold thousands of numbers
            sides = (found[i - 1] for i in ids)
            boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in sides], np.float64)
            # An annotation id names the image and the person in it.
            numbers = [image_id * 1000 + int(i) for i in ids]
            if builder.add(image_id, owner.shape, numbers, list(range(len(ids))), boxes, areas, file.name):
                files.append(file)
        people = builder.instances()
        if not len(people):
            why = counted(people.skipped) or "no PNG in PNGImages"
            raise DataError(f"{self.folder} has no person of the split {self.split} that can be used: {why}")
        if len(files) > len(self._used):
            self._used[:] = files
        return people

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``people()`` and the masks of all its persons."""
        if index >= len(self._used):
            self.instances()
        file = self._used[index]
        ids, _, owner = _read_mask(self._mask_file(file))
        image = decode_image(file)
        if image.shape[:2] != owner.shape:
            found, wanted = (f"{each.shape[1]}x{each.shape[0]}" for each in (image, owner))
            raise SceneError(OTHER_SIZE, f"{file} has {found} pixels, its mask {wanted}")
        return Scene(image, Masks(len(ids), owner.shape, lambda slot: owner == ids[slot]))

    def fingerprint(self) -> str:
        """Of names, sizes and times of all images and masks of the split."""
        parts = []
        for _, file in self._files:
            for each in (file, self._mask_file(file)):
                parts.append([each.name, *((each.stat().st_size, each.stat().st_mtime_ns) if each.exists() else ())])
        return hashlib.sha256(json.dumps([self.split, parts]).encode()).hexdigest()

    @cached_property
    def _files(self) -> list[tuple[int, Path]]:
        every = sorted((self.folder / "PNGImages").glob("*.png"))
        wanted = {"train": lambda f: not _is_val(f), "val": _is_val, "all": lambda f: True}[self.split]
        return [(number, file) for number, file in enumerate(every, 1) if wanted(file)]

    @cached_property
    def _used(self) -> list[Path]:
        return []

    def _mask_file(self, file: Path) -> Path:
        return self.folder / "PedMasks" / f"{file.stem}_mask.png"


def _is_val(file: Path) -> bool:
    return int(hashlib.sha1(os.fsencode(file.stem)).hexdigest(), 16) % 5 == 0


def _read_mask(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instance ids [P], the pixels of each [P], and the id of each pixel uint16 [H, W]."""
    with opened(file, "mask") as image:
        image.load()
        owner = np.array(image)
    if owner.ndim != 2:
        many = owner.shape[2]
        raise SceneError(UNREADABLE, f"{file} must have one value a pixel, the person's number, and has {many}")
    if owner.dtype.kind not in "bu" and not ((owner % 1 == 0) & (owner >= 0) & (owner < 2**16)).all():
        rule = "must have the person's number in each pixel, from 1 to 65535 and 0 elsewhere"
        raise SceneError(UNREADABLE, f"{file} {rule}")
    owner = owner.astype(np.uint16)
    ids, areas = np.unique(owner, return_counts=True)
    ids, areas = ids[ids > 0], areas[ids > 0]
    if not len(ids):
        raise SceneError(NO_MASK, f"{file} has no person in it")
    return ids, areas, owner
