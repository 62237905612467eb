"""Read a data set once, without training: what will be used, what will not and why, and a picture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from refinelib.data import Source, Store, open_store
from refinelib.modeling import TARGET
from refinelib.modeling.roi import labels_from_coverage
from refinelib.plots import style
from refinelib.plots.masks import Rows, class_picture, overlay, picture_grid
from refinelib.plots.style import CLASSES

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
        figure(store, people).savefig(picture, dpi=style.DPI)
        images = len(np.unique(store.image_index))
        lines = [f"{store.source} {store.split}: {len(store)} persons in {images} images are used"]
        for title, counts in (("left out", store.skipped), ("noted", store.info.notes)):
            lines += [f"{title}: {n} x {name}: {store.examples[name]}" for name, n in counts.items()]
        if store.ignores:
            lines.append(f"ignored: {store.info.ignored:.2%} of the pixels in the persons' boxes")
        del store  # its files are mapped, and Windows deletes no mapped file
    return "\n".join(lines)


def figure(store: Store, people: int = 8) -> style.Figure:
    """Crops of some persons, their masks on them, and their labels; the box is stretched to a square."""
    chosen = np.unique(np.linspace(0, len(store) - 1, people).astype(int))
    images, coverage = store.gather(chosen)
    rows: Rows = [("image", []), ("mask", []), ("labels", [])]
    for roi, image, labels in zip(
        chosen, images.numpy(), labels_from_coverage(coverage).numpy(), strict=True
    ):
        one = store.instance(roi)
        rows[0][1].append((image, f"image {one['image_id']}"))
        rows[1][1].append((overlay(image, labels[None] == TARGET), f"annotation {one['annotation_id']}"))
        rows[2][1].append((class_picture(labels), ""))
    title = f"{len(chosen)} of {len(store)} persons of {store.source} {store.split}"
    key = CLASSES | ({"ignored": style.BLACK} if store.ignores else {})
    return picture_grid(style.new_figure(title), rows, (1.0, 1.0, 1.0), key=key)
