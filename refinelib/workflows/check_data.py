"""Read a data set once, without training: what will be used, what will not and why, and a picture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from refinelib.data import Source, open_store
from refinelib.plots import style
from refinelib.plots.masks import rois

#: Pixels along a side of the crops in the picture.
SIDE = 128


def check_data(
    source: Source, picture: Path, *, people: int = 8, max_images: int | None = None, progress: bool = True
) -> str:
    """Decode every image and mask as training would, report, and draw a few persons.

    Args:
        source: of images and masks.
        picture: file to write, a PNG: crops, the person's mask on them, and the labels.
        max_images: read only the first so many images.
        people: drawn, spread evenly over the data set.
        progress: show a bar.

    Returns:
        What is used, then a line for each reason for which something is left out or worth a note: how often,
        and an example.

    Raises:
        DataError: nothing can be used.

    Example:
        >>> from refinelib.data import SyntheticPeople
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(check_data(SyntheticPeople(3), Path(folder, "people.png"), progress=False))
        synthetic train: 6 persons in 3 images are used
    """
    with tempfile.TemporaryDirectory() as root:
        size = (SIDE, SIDE)
        how: Any = {"roi_size": size, "mask_size": size, "context": 0.0, "max_images": max_images}
        store = open_store(source, root=root, progress=progress, **how)
        rois(store, people, overlays=True).savefig(picture, dpi=style.DPI)
        images = len(np.unique(store.image_index))
        lines = [f"{store.source} {store.split}: {len(store)} persons in {images} images are used"]
        for title, counts in (("left out", store.skipped), ("noted", store.info.notes)):
            lines += [f"{title}: {n} x {name}: {store.examples[name]}" for name, n in counts.items()]
        if store.ignores:
            lines.append(f"ignored: {store.info.ignored:.2%} of the pixels in the persons' boxes")
        del store  # its files are mapped, and Windows deletes no mapped file
    return "\n".join(lines)
