"""The Penn-Fudan pedestrian set in its published layout as a source."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from refinelib.data import sources
from refinelib.data.sources import DataError, Instances, InstancesBuilder, Masks, Scene, SceneError


class PennFudanPeople:
    """Persons of Penn-Fudan: instance ids are pixel values of the masks, boxes are taken from them.

    The set has no split of its own: an image is in ``val`` where the SHA-1 of its name is a multiple of 5
    (about every fifth), whatever other images are there, and in ``train`` otherwise.

    Args:
        folder: holds ``PNGImages`` and ``PedMasks``.
        split: ``train``, ``val`` or ``all``.

    Raises:
        DataError: a folder is missing.
    """

    name = "pennfudan"

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(os.path.expanduser(folder)), split
        self._used: list[Path] = []
        if split not in ("train", "val", "all"):
            raise DataError(f"Penn-Fudan has no split {split!r}: give train, val or all")
        for place in (self.folder, self.folder / "PNGImages", self.folder / "PedMasks"):
            if not os.path.isdir(place):
                rule = "data_dir (or add_pennfudan) must hold PNGImages and PedMasks, as PennFudanPed does"
                raise DataError(f"there is no folder {place}: {rule}")

    def __len__(self) -> int:
        return self.instances().images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images by name; reads the masks, not the images.

        Raises:
            DataError: no person that can be used.
        """
        builder, used = InstancesBuilder(), []
        for image_id, file in self._files:
            if max_images is not None and builder.images >= max_images:
                break
            try:
                ids, areas, owner = _read_mask(self._mask_file(file))
            except SceneError as error:
                builder.skip(error.reason, str(error))
                continue
            found = ndimage.find_objects(owner)  # one pass: a damaged mask may hold thousands of numbers
            boxes = [(x.start, y.start, x.stop, y.stop) for y, x in (found[i - 1] for i in ids)]
            # An annotation id names the image and the person in it.
            numbers = [image_id * 1000 + int(i) for i in ids]
            if builder.add(file.name, image_id, owner.shape, numbers, boxes, areas):
                used.append(file)
        self._used = max(self._used, used, key=len)
        return builder.instances(f"the split {self.split} of {self.folder}", "no PNG in PNGImages")

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        if index >= len(self._used):
            self.instances()
        file = self._used[index]
        ids, _, owner = _read_mask(self._mask_file(file))
        image = sources.decode_image(file)
        if image.shape[:2] != owner.shape:
            found, wanted = (f"{each.shape[1]}x{each.shape[0]}" for each in (image, owner))
            raise SceneError(sources.OTHER_SIZE, f"{file} has {found} pixels, its mask {wanted}")
        return Scene(image, Masks(len(ids), owner.shape, lambda slot: owner == ids[slot]))

    def fingerprint(self) -> str:
        """Of names, sizes and times of all images and masks of the split."""
        parts = []
        for _, image in self._files:
            for file in (image, self._mask_file(image)):
                found = file.stat() if file.exists() else None
                parts.append([file.name, found and (found.st_size, found.st_mtime_ns)])
        return hashlib.sha256(json.dumps([self.split, parts]).encode()).hexdigest()

    @cached_property
    def _files(self) -> list[tuple[int, Path]]:
        """Images of the split, each with its number among all images."""
        every = enumerate(sorted((self.folder / "PNGImages").glob("*.png")), 1)
        return [(number, file) for number, file in every if self.split in ("all", _split_of(file))]

    def _mask_file(self, file: Path) -> Path:
        return self.folder / "PedMasks" / f"{file.stem}_mask.png"


def _split_of(file: Path) -> str:
    return "train" if int(hashlib.sha1(os.fsencode(file.stem)).hexdigest(), 16) % 5 else "val"


def _read_mask(file: Path) -> tuple[NDArray[np.uint16], NDArray[Any], NDArray[np.uint16]]:
    """Instance ids ``[P]``, the pixels of each ``[P]``, and the id of each pixel uint16 ``[H, W]``."""
    with sources.opened(file, "mask") as image:
        image.load()
        owner = np.array(image)
    if owner.ndim != 2:
        rule = "must have one value a pixel, the person's number"
        raise SceneError(sources.UNREADABLE, f"{file} {rule}, and has {owner.shape[2]}")
    if owner.dtype.kind not in "bu" and not ((owner % 1 == 0) & (owner >= 0) & (owner < 2**16)).all():
        rule = "must have the person's number in each pixel, from 1 to 65535 and 0 elsewhere"
        raise SceneError(sources.UNREADABLE, f"{file} {rule}")
    owner = owner.astype(np.uint16)
    ids, areas = np.unique(owner, return_counts=True)
    if not ids.any():
        raise SceneError(sources.NO_MASK, f"{file} has no person in it")
    return ids[ids > 0], areas[ids > 0], owner
