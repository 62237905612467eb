"""Pictures of a run's people and masks, drawn from its folder on disk: image, truth, prediction, error."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from refinelib.plots.style import CLASSES, ERRORS, WIDTH, Figure, color_key, empty, opened, titled
from refinelib.files import by_epoch, read_npz
from refinelib.runs import Run

#: What a file of samples holds (see samples.py), and the bytes that the largest takes.
_SHAPES = {
    "image": "u KHW3", "labels": "u Khw", "probs": "f K3hw", "target_iou": "f K", "kind": "U K",
    "image_id": "iu K", "annotation_id": "iu K", "mask_size": "iu 2",
}  # fmt: skip
_BUDGET = 1 << 30


def sample_grid(
    run: Run | str | os.PathLike,
    epoch: int | None = None,
    *,
    kinds: Sequence[str] = ("worst", "median", "best"),
    per_kind: int = 4,
) -> Figure:
    """Image, truth, prediction and error of validation ROIs.

    Args:
        epoch: counted from 1, as in the log; none: the last one that was validated.
        kinds: of ``worst``, ``median``, ``best`` (of that epoch) and ``fixed`` (the same ROIs in every epoch).
        per_kind: ROIs of each kind, at most; two stand side by side.

    Raises:
        ValueError: there are no samples of that epoch.
    """
    run = opened(run)
    if (found := read_samples(run, epoch)) is None:
        return empty(run, "samples", "no epoch has been validated yet")
    epoch, samples = found
    groups = {kind: np.flatnonzero(samples["kind"] == kind)[:per_kind] for kind in kinds}
    groups = {kind: rois for kind, rois in groups.items() if len(rois)}
    if not groups:
        return empty(run, f"samples of epoch {epoch}", "no validation ROI has a target")
    aspect = samples["image"].shape[1] / samples["image"].shape[2]
    # All in inches, from the top: a layout engine would make room for the long titles beside the tiles.
    edge, gap, middle, line = 0.08, 0.08, 0.3, 0.16
    width = (WIDTH - 2 * edge - 6 * gap - middle) / 8
    depths = [math.ceil(len(rois) / 2) for rois in groups.values()]
    height = 0.35 + sum(depths) * (aspect * width + 2 * line) + 0.1 * len(depths) + line + 0.35
    figure = titled(run, f"samples of epoch {epoch}", height=height, layout=None)
    top = 0.35 + line
    for (kind, rois), depth in zip(groups.items(), depths):
        for i, roi in enumerate(rois):
            first = i < 2 and top < 1
            y = top + (i // 2) * (aspect * width + 2 * line) + 1.4 * line
            x = edge + (i % 2) * (4 * width + 3 * gap + middle)
            low, extent = 1 - (y + aspect * width) / height, (width / WIDTH, aspect * width / height)
            tiles = [figure.add_axes(((x + j * (width + gap)) / WIDTH, low, *extent)) for j in range(4)]
            sample_tiles(tiles, *(samples[name][roi] for name in ("image", "labels", "probs")), samples["mask_size"])
            title = rf"$\bf{{{kind}}}$  target IoU {samples['target_iou'][roi]:.2f}, image {samples['image_id'][roi]}"
            heads = [title + "\nimage", "truth", "prediction", "error"] if first else [title, "", "", ""]
            for axes, head in zip(tiles, heads):
                axes.set_title(head, loc="left", fontsize=9, pad=3)
        top += depth * (aspect * width + 2 * line) + 0.1
    color_key(figure, CLASSES | ERRORS, loc="lower center", bbox_to_anchor=(0.5, 0.05 / height))
    return figure


def thresholded(run: Run | str | os.PathLike, threshold: float = 0.5, epoch: int | None = None, *, count: int = 8) -> Figure:
    """Masks of the fixed validation ROIs with any person's probability held against a threshold.

    Image, that probability, and right and wrong pixels of "there is a person" at the threshold; the IoU of each is told above
    it, that of all pixels pooled in the title.

    Args:
        threshold: a pixel is person where P(target) + P(other people) is at least this.
        epoch: counted from 1; none: the last one that was validated.
        count: ROIs, at most.
    """
    run = opened(run)
    if (found := read_samples(run, epoch)) is None:
        return empty(run, "threshold", "no epoch has been validated yet")
    epoch, samples = found
    chosen = np.flatnonzero(samples["kind"] == "fixed")[:count]
    chosen = chosen if len(chosen) else np.arange(min(count, len(samples["kind"])))
    foreground = 1 - samples["probs"][chosen, 0].astype(np.float32)
    truth = samples["labels"][chosen] > 0
    guess = foreground >= threshold
    overlap = [float((g & t).sum()) / max(1, (g | t).sum()) for g, t in zip(guess, truth)]
    pooled = float((guess & truth).sum()) / max(1, (guess | truth).sum())
    aspect = samples["image"].shape[1] / samples["image"].shape[2]
    height = 1.15 + 3 * aspect * (WIDTH - 0.3) / max(6, len(chosen))
    figure = titled(run, f"person where P >= {threshold:.2f}, epoch {epoch}: IoU {pooled:.3f}", height=height)
    grid = figure.subplots(3, len(chosen), squeeze=False)
    for (above, middle, below), i, share, shown, iou in zip(grid.T, chosen, foreground, guess, overlap):
        window = window_of(share.shape, samples["mask_size"])
        tile(above, samples["image"][i], window, aspect)
        tile(middle, np.repeat((255 * share).astype(np.uint8)[..., None], 3, -1), window, aspect)
        tile(below, error_picture(samples["image"][i], (samples["labels"][i] > 0).astype(int), shown.astype(int)), window, aspect)
        below.set_title(f"IoU {iou:.2f}", fontsize=8, pad=3)
    for axes, head in zip(grid[:, 0], ("image", "P(person), black 0, white 1", None)):
        if head:
            axes.set_title(head, loc="left", fontsize=8, pad=3)
    color_key(figure, {name: ERRORS[name] for name in ("missed", "too much")}, loc="outside lower center")
    return figure


def rois(store: Any, count: int = 8) -> Figure:
    """Crops of a store (:class:`refinelib.data.Store`) and their labels, spread evenly over it."""
    from refinelib.modeling.roi import labels_from_coverage  # torch: only this figure needs it

    chosen = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
    images, coverage = store.gather(chosen)
    aspect = images.shape[1] / images.shape[2]
    figure = Figure(figsize=(WIDTH, 0.85 + 2 * aspect * WIDTH / len(chosen)), layout="constrained")
    title = f"{len(chosen)} of {len(store)} {store.split} ROIs and their labels"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    tiles = figure.subplots(2, len(chosen), squeeze=False)
    for (above, below), image, labels in zip(tiles.T, images.numpy(), labels_from_coverage(coverage).numpy()):
        for axes, picture in ((above, image), (below, class_picture(labels))):
            tile(axes, picture, window_of(labels.shape, store.mask_size), aspect)
    color_key(figure, CLASSES, loc="outside lower center")
    return figure


def sample_epochs(run: Run | str | os.PathLike) -> list[int]:
    """Epochs whose masks are on disk, counted from 1."""
    return list(by_epoch(opened(run).folder / "samples"))


def read_samples(run: Run, epoch: int | None = None) -> tuple[int, dict[str, np.ndarray]] | None:
    """The masks of an epoch, and which it is; by default the last that can be read (none: there is none).

    Raises:
        ValueError: those of the epoch given are not there, or damaged.
    """
    files = by_epoch(run.folder / "samples")
    if epoch is not None and epoch not in files:
        there = ", ".join(map(str, files)) or "none yet"
        raise ValueError(f"{run.folder / 'samples'} holds no masks of epoch {epoch}; there are {there}")
    for number in [epoch] if epoch is not None else reversed(files):
        try:
            return number, read_npz(files[number], _SHAPES, budget=_BUDGET)
        except (OSError, ValueError) as error:
            if epoch is not None:
                raise
            warnings.warn(f"the masks of epoch {number} were passed over: {error}", stacklevel=2)
    return None


# -- tiles -----------------------------------------------------------------------------------------
def sample_tiles(tiles: Iterable[Axes], image: np.ndarray, labels: np.ndarray, probs: np.ndarray, size: np.ndarray) -> None:
    predicted = probs.astype(np.float32).argmax(0)
    error = error_picture(image, labels, predicted)
    for axes, picture in zip(tiles, (image, class_picture(labels), class_picture(predicted), error)):
        tile(axes, picture, window_of(labels.shape, size), image.shape[0] / image.shape[1])


def tile(axes: Axes, picture: np.ndarray, window: tuple[float, float, float, float], aspect: float) -> None:
    """One picture over the unit square, with the box's outline where the crop is larger than the box."""
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=aspect, interpolation="nearest")
    axes.set_axis_off()
    if window[2:] != (1.0, 1.0):
        left, top, width, height = window
        for style in (dict(edgecolor="white", linewidth=1.8), dict(edgecolor="black", linewidth=0.8, linestyle="--")):
            axes.add_patch(Rectangle((left, top), width, height, fill=False, **style))


def window_of(canvas: Sequence[int], size: Sequence[int]) -> tuple[float, float, float, float]:
    height, width = (inner / outer for inner, outer in zip(size, canvas))
    return (1 - width) / 2, (1 - height) / 2, width, height


def class_picture(labels: np.ndarray) -> np.ndarray:
    return ListedColormap(list(CLASSES.values()))(labels.astype(int), bytes=True)[..., :3]


def error_picture(image: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The image in pale grey, wrong pixels in colour."""
    rows, columns = (np.arange(side) * whole // side for side, whole in zip(labels.shape, image.shape[:2]))
    grey = image[rows][:, columns].mean(-1, keepdims=True) * 0.35 + 160
    picture = np.broadcast_to(grey, (*labels.shape, 3)).astype(np.uint8)
    truth, found = labels == 1, predicted == 1
    for name, where in zip(ERRORS, (truth & ~found, found & ~truth, (labels != predicted) & ~truth & ~found)):
        picture[where] = [int(ERRORS[name][i : i + 2], 16) for i in (1, 3, 5)]
    return picture
