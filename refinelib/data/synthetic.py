"""Drawn people in front of clutter, for runs without a data set.

``scenery`` lays out a scene, ``figures`` draws the people in it, ``drawing`` has the pen and the paint.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from refinelib.data import painting as drawing, people as figures, scenery
from refinelib.data.painting import Layout, paint
from refinelib.data.errors import DataError
from refinelib.data.scenery import draw_scene
from refinelib.data.sources import MIN_SIDE, Instances, InstancesBuilder, Scene


class SyntheticPeople:
    """Jointed figures with clothes, hair and shoes, 1 to 4 an image, over clutter of their own colours.

    Image ``i`` depends on ``(seed, split, i)`` alone: any process draws the same one, in any
    order, and a source with more images begins with the same ones. Every image has a ROI.

    Args:
        n_images: number of images, at least 1.
        split: ``train``, ``val`` or any other name; each is a stream of images of its own.
        seed: at least 0.

    Raises:
        DataError: no image asked for, or a negative seed.
    """

    name = "synthetic"

    def __init__(self, n_images: int, split: str = "train", seed: int = 1729) -> None:
        if n_images < 1:
            raise DataError(f"synthetic people need at least one image, and {n_images} were asked for")
        if seed < 0:
            raise DataError(f"the seed of synthetic people is {seed}: give 0 or more")
        self.n_images, self.split, self.seed = int(n_images), split, int(seed)
        self._indexed: dict[int, Instances] = {}

    def __len__(self) -> int:
        return self.n_images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images; draws outlines, not colours.

        Raises:
            DataError: ``max_images`` is under 1.
        """
        count = self.n_images if max_images is None else min(max_images, self.n_images)
        if count < 1:
            raise DataError(f"max_images is {max_images}: give at least 1")
        if count not in self._indexed:
            builder = InstancesBuilder()
            for index in range(count):
                layout = self._layout(index)
                slots = list(range(len(layout.boxes)))
                # An annotation id names the image and the person in it, as for Penn-Fudan.
                ids = [(index + 1) * 1000 + slot for slot in slots]
                builder.add(index + 1, layout.owner.shape, ids, slots, layout.boxes, layout.areas, f"image {index + 1}")
            self._indexed[count] = builder.instances()
        return self._indexed[count]

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``people()`` and the visible pixels of all its persons.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= index < self.n_images:
            raise IndexError(f"there is no synthetic image {index}: they are 0 to {self.n_images - 1}")
        layout = self._layout(index)
        image = paint(layout, self._rng(index, "paint"))
        return Scene(image, layout.owner[None] == np.arange(1, len(layout.boxes) + 1)[:, None, None])

    def fingerprint(self) -> str:
        """Of seed, split, number of images and the modules that draw: another way to draw is other data."""
        digest = hashlib.sha256(json.dumps([self.seed, self.split, self.n_images]).encode())
        for module in (__file__, scenery.__file__, figures.__file__, drawing.__file__):
            digest.update(Path(module).read_bytes())
        return digest.hexdigest()

    def _rng(self, index: int, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index, zlib.crc32(what.encode())])

    def _layout(self, index: int) -> Layout:
        # One stream for all attempts: the first scene in which each person can be made out is taken.
        rng = self._rng(index, "layout")
        while True:
            layout = draw_scene(rng)
            sides = layout.boxes[:, 2:] - layout.boxes[:, :2]
            seen = layout.areas > 0.15 * sides.prod(1)
            if len(sides) and seen.all() and (sides.min(1) >= MIN_SIDE).any():
                return layout
