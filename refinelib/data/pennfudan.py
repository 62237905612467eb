"""Images with masks whose pixel values are the persons' numbers, Penn-Fudan among them, as sources."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from refinelib.data import sources
from refinelib.data.image_folder import files_in
from refinelib.data.sources import DataError, InstancesBuilder, Mask, Masks, Scene, SceneError

#: Endings of the files that are taken for images.
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
NO_PICTURE = "mask without image"
#: Of a pixel of a mask with a palette: nobody knows who is there.
VOID = 255


class MaskPeople(sources.IndexedSource):
    """Persons whose numbers are the pixel values of masks: the image ``NAME.jpg`` has the mask ``NAME.png``.

    Masks have 1, 8 or 16 bits or a palette, and 0 where there is nobody; with a palette, 255 is ignored, as
    in PASCAL VOC. Boxes are taken from them. Folders are searched with the folders in them; one folder may
    hold both images and masks.

    Args:
        images: folder of images.
        masks: folder of masks.
        split: name for reports and for the store's folder.
        part: the images to take, by :func:`split_of`: ``train``, ``val`` or ``all``.
        exif: ``ignore``: masks were made of the pixels as stored; ``apply``: of the image turned upright.

    Raises:
        DataError: a folder is missing.
    """

    name = "masks"
    rule = "data_dir must hold images and masks, or give train_images and train_annotations, and those of val"
    suffixes: tuple[str, ...] = IMAGES
    #: Of a mask's name, after that of its image; and the step from one image's annotation ids to the next's.
    ending, ids = ".png", 1 << 16

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        split: str = "train",
        part: str = "all",
        *,
        exif: str = "ignore",
    ) -> None:
        super().__init__(split)
        self.part, self.exif = part, exif
        self.images = sources.existing_folder(images, rule=self.rule)
        self.masks = sources.existing_folder(masks, rule=self.rule)

    def _index(self, builder: InstancesBuilder) -> tuple[str, str]:
        """Reads the masks, not the images; takes the images by name."""
        for mask in self._strays:
            builder.skip(NO_PICTURE, f"there is no image of the mask {mask} in {self.images}")
        owners = defaultdict[Path, list[str]](list)
        for _, file in self._files:
            owners[self._mask_file(file)].append(file.name)
        for image_id, file in self._files:
            if len(both := owners[mask := self._mask_file(file)]) > 1:
                rule = "give each image one of its own"
                builder.skip(sources.TWICE, f"{mask} is the mask of {' and '.join(both)}: {rule}")
                continue
            if builder.full:
                break
            try:
                ids, areas, owner, _ = _read_mask(mask)
            except SceneError as error:
                builder.skip(error.reason, str(error))
                continue
            found = ndimage.find_objects(owner)  # one pass: a damaged mask may hold thousands of numbers
            boxes = [(x.start, y.start, x.stop, y.stop) for y, x in (found[i - 1] for i in ids)]
            # An annotation id names the image and the person in it.
            numbers = [image_id * self.ids + int(i) for i in ids]
            if builder.add(file.name, image_id, owner.shape, numbers, boxes, areas):
                builder.entries.append(file)
        empty = f"no {' or '.join(self.suffixes)} file in {self.images}"
        return f"the split {self.split} of {self.images.parent}", empty

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        file = self._entry(index)
        ids, _, owner, void = _read_mask(self._mask_file(file))
        size, upright, notes = owner.shape, self.exif == "apply", list[tuple[str, str]]()
        image = sources.decode_image(file, (size[0], size[1]), upright=upright, notes=notes)
        return Scene(image, Masks(len(ids), size, lambda slot: owner == ids[slot]), void, notes)

    def names(self) -> list[str]:
        """All images and masks of the split."""
        return [str(file) for _, image in self._files for file in (image, self._mask_file(image))]

    def locate(self, name: str) -> Path | None:
        """The file of that name."""
        return Path(name)

    def fingerprint(self) -> str:
        """Of the folders, the names of all images and masks of the split, and how they are read."""
        parts = [self.split, self.part, self.exif, *self.names(), *map(str, self._strays)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _images(self) -> list[Path]:
        found = listed(self.images, self.suffixes)
        masks = {self._mask_file(file) for file in found}  # those that lie among the images are none
        return [file for file in found if file not in masks]

    @cached_property
    def _files(self) -> list[tuple[int, Path]]:
        """Images of the split, each with its number among all images."""
        return [(number, file) for number, file in enumerate(self._images, 1) if self._takes(file)]

    @cached_property
    def _strays(self) -> list[Path]:
        """Masks of the split that no image has."""
        masks = {*listed(self.masks, (".png",))} - {self._mask_file(file) for file in self._images}
        return sorted(filter(self._takes, masks))

    def _takes(self, file: Path) -> bool:
        return self.part in ("all", split_of(file))

    def _mask_file(self, file: Path) -> Path:
        return self.masks / file.relative_to(self.images).with_name(file.stem + self.ending)


class PennFudanPeople(MaskPeople):
    """Persons of the Penn-Fudan pedestrian set in its published layout.

    The set has no split of its own: :func:`split_of` tells it by an image's name.

    Args:
        folder: holds ``PNGImages`` and ``PedMasks``.
        split: ``train``, ``val`` or ``all``.

    Raises:
        DataError: a folder is missing.
    """

    name = "pennfudan"
    rule = "data_dir (or add_pennfudan) must hold PNGImages and PedMasks, as PennFudanPed does"
    suffixes = (".png",)
    ending, ids = "_mask.png", 1000

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in ("train", "val", "all"):
            raise DataError(f"Penn-Fudan has no split {split!r}: give train, val or all")
        super().__init__(Path(folder, "PNGImages"), Path(folder, "PedMasks"), split, part=split)


def listed(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with these endings in a folder and the folders in it, sorted; see :func:`files_in`.

    Example:
        >>> listed(Path("nowhere"), (".png",))
        []
    """
    return sorted(file for file in files_in(folder) if file.suffix.lower() in suffixes)


def split_of(file: Path) -> str:
    """The split of an image in a set that has none: ``val`` where its name's SHA-1 is a multiple of 5.

    That is about every fifth, whatever other images are there.

    Example:
        >>> split_of(Path("FudanPed00001.png"))
        'train'
    """
    return "train" if int(hashlib.sha1(os.fsencode(file.stem)).hexdigest(), 16) % 5 else "val"


def _read_mask(file: Path) -> tuple[NDArray[np.uint16], NDArray[Any], NDArray[np.uint16], Mask | None]:
    """Instance ids ``[P]``, pixels of each ``[P]``, id of each pixel ``[H, W]``, and where it is void."""
    with sources.opened(file, "mask") as image:
        image.load()
        owner, palette = np.array(image), image.mode == "P"
    if owner.ndim != 2:
        rule = "must have one value a pixel, the person's number"
        raise SceneError(sources.UNREADABLE, f"{file} {rule}, and has {owner.shape[2]}")
    if owner.dtype.kind not in "bu" and not ((owner % 1 == 0) & (owner >= 0) & (owner < 2**16)).all():
        rule = "must have the person's number in each pixel, from 1 to 65535 and 0 elsewhere"
        raise SceneError(sources.UNREADABLE, f"{file} {rule}")
    void = owner == VOID if palette and (owner == VOID).any() else None
    owner = np.where(False if void is None else void, 0, owner).astype(np.uint16)
    ids, areas = np.unique(owner, return_counts=True)
    if not ids.any():
        raise SceneError(sources.NO_MASK, f"{file} has no person in it")
    return ids[ids > 0], areas[ids > 0], owner, void
