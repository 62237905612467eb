"""Pictures of instances and their masks: image, truth, prediction, error."""

import contextlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from refinelib.data import Store
from refinelib.files import by_epoch, read_npz
from refinelib.metrics.boundary import contour
from refinelib.modeling import IGNORED, TARGET
from refinelib.modeling.roi import canvas_size, centre_window, labels_from_coverage, mask_canvas_size
from refinelib.plots import style
from refinelib.plots.style import CLASSES, ERRORS, PALETTE, Figure, RunLike
from refinelib.runs import Run

Pixels = NDArray[Any]
Samples = dict[str, Pixels]
Rows = list[tuple[str, list[tuple[Pixels, str]]]]
Shape = tuple[float, float, float]
Names = Collection[str]
KINDS = ("worst", "median", "best")
#: What a file of samples holds.
_SHAPES = {"image": "u KHW3", "labels": "u Khw", "probs": "f K3hw", "target_iou": "f K", "kind": "U K"}
_SHAPES |= {"image_id": "iu K", "annotation_id": "iu K", "mask_size": "iu 2"}


# -- figures of a run ------------------------------------------------------------------------------
def sample_grid(run: RunLike, epoch: int | None = None, kinds: Names = KINDS, per_kind: int = 4) -> Figure:
    """Image, truth, prediction and error of validation ROIs.

    Args:
        run: a run, its name or folder.
        epoch: counted from 1, as in the log; none: the last one that was validated.
        kinds: ``worst``, ``median``, ``best`` (of that epoch) and ``fixed`` (the same ROIs in every epoch).
        per_kind: ROIs of each kind, at most; two stand side by side.

    Raises:
        ValueError: there are no samples of that epoch.
    """
    run = style.opened(run)
    rows: Rows = []
    if (found := read_samples(run, epoch)) is not None:
        epoch, samples = found[0], judged(run, found[1])
        for kind in kinds:
            tiles = [sample_tiles(samples, i) for i in np.flatnonzero(samples["kind"] == kind)[:per_kind]]
            rows += [(kind, sum(tiles[i : i + 2], [])) for i in range(0, len(tiles), 2)]
    if not rows:
        return style.message(run.name, "no validated ROI with a target yet")
    figure = style.run_figure(run, f"samples of epoch {epoch}")
    return picture_grid(figure, rows, shape_of(samples), key=CLASSES | ERRORS)


# -- other figures ---------------------------------------------------------------------------------
def rois(store: Store, *, overlays: bool = False) -> Figure:
    """Eight crops of a store and their labels, spread evenly over it.

    With ``overlays`` each mask is also drawn on its crop, which must have its size.
    """
    chosen = np.linspace(0, len(store) - 1, min(8, len(store))).astype(int)
    images, coverage = store.gather(chosen)
    samples = {"image": images.numpy(), "labels": labels_from_coverage(coverage).numpy()}
    rows: Rows = [("image", []), ("mask", []), ("labels", [])]
    for roi, image, labels in zip(chosen, *samples.values(), strict=True):
        ids = store.instance(roi)
        rows[0][1].append((image, f"image {ids['image_id']}"))
        if overlays:
            rows[1][1].append((overlay(image, labels[None] == TARGET), f"annotation {ids['annotation_id']}"))
        rows[2][1].append((class_picture(labels), ""))
    figure = style.new_figure(f"{len(chosen)} of {len(store)} persons of {store.source} {store.split}")
    key = CLASSES | ({"ignored": style.BLACK} if store.ignores else {})
    shape = shape_of(samples | {"mask_size": np.array(store.mask_size)})
    return picture_grid(figure, [row for row in rows if row[1]], shape, key=key)


def boxes_figure(pixels: Pixels, boxes: Sequence[Sequence[float]], labels: Sequence[str]) -> Figure:
    """An image (uint8 ``[H, W, 3]``) with boxes (xyxy in pixels), each with its label."""
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(style.WIDTH, min(6.0, 0.4 + style.WIDTH * height / width)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(pixels)
    for number, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, labels, strict=True)):
        color = PALETTE[number % len(PALETTE)]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linestyle="--"))
        paper = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
        axes.text(max(0.0, x0), max(12.0, y0), label, fontsize=9, bbox=paper, va="bottom")
    style.style_axes(axes, "", "column, pixels", "row, pixels")
    axes.grid(False)
    return figure


def overlay(pixels: Pixels, masks: Pixels) -> Pixels:
    """The image uint8 ``[H, W, 3]`` with each mask (bool ``[N, H, W]``) tinted in a colour and outlined."""
    picture = pixels.astype(np.float32)
    for number, mask in enumerate(masks):
        color = rgb(PALETTE[number % len(PALETTE)]).astype(np.float32)
        picture[mask] = 0.5 * picture[mask] + 0.5 * color
        picture[contour(torch.from_numpy(mask)).numpy()] = color
    return picture.round().astype(np.uint8)


# -- samples on disk -------------------------------------------------------------------------------
def read_samples(run: Run, epoch: int | None = None) -> tuple[int, Samples] | None:
    """The masks of an epoch, and which it is; by default the last that can be read (none: there is none).

    Raises:
        ValueError: those of the epoch given are not there, or damaged.
    """
    files = by_epoch(run.folder / "samples")
    if epoch is not None:
        if epoch not in files:
            there = ", ".join(map(str, files)) or "none yet"
            raise ValueError(f"{run.folder / 'samples'} holds no masks of epoch {epoch}; there are {there}")
        return epoch, read_npz(files[epoch], _SHAPES, budget=1 << 30)
    for number in reversed(files):
        try:
            return number, read_npz(files[number], _SHAPES, budget=1 << 30)
        except (OSError, ValueError) as error:
            warnings.warn(f"the masks of epoch {number} were passed over: {error}", stacklevel=2)
    return None


def judged(run: Run, samples: Samples) -> Samples:
    """Of each crop the part that counted in the run's losses: what a mask says beyond was never taught."""
    own = style.recorded_settings(run)
    # Nothing is cut where all of it counted, in an old run's samples, or where the file is damaged.
    with contextlib.suppress(KeyError, TypeError, ValueError):
        seen = canvas_size(own["roi_size"], own["loss_context"])
        masks = mask_canvas_size(own["mask_size"], own["roi_size"], seen)
        arrays = {name: torch.from_numpy(samples[name]) for name in ("labels", "probs", "image")}
        image = centre_window(arrays.pop("image").movedim(-1, 1), seen)
        cut = {name: centre_window(x, masks).numpy() for name, x in arrays.items()}
        return samples | cut | {"image": image.movedim(1, -1).numpy()}
    return samples


def shape_of(samples: Samples) -> Shape:
    """Height of a crop over its width; height and width of the box as shares of the crop's."""
    height, width = samples["image"].shape[1:3]
    rows, columns = samples["mask_size"] / samples["labels"].shape[1:]
    return height / width, float(rows), float(columns)


def sample_tiles(samples: Samples, i: int) -> list[tuple[Pixels, str]]:
    """Image, truth, prediction and error of one ROI, each with its title."""
    image, truth, score = samples["image"][i], samples["labels"][i], samples["target_iou"][i]
    predicted = samples["probs"][i].astype(np.float32).argmax(0)
    shown = f"IoU {score:.2f}" if np.isfinite(score) else ""
    tiles = [(image, f"image {samples['image_id'][i]}"), (class_picture(truth), "truth")]
    return [*tiles, (class_picture(predicted), shown), (error_picture(image, truth, predicted), "error")]


# -- grids of pictures -----------------------------------------------------------------------------
def picture_grid(
    figure: Figure, rows: Rows, shape: Shape, key: Mapping[str, str] = CLASSES, alarm: Names = ()
) -> Figure:
    """Rows of pictures in a figure, which gets the height they need.

    Args:
        figure: empty but for its title.
        rows: the name at each row's left, then its pictures (uint8 ``[h, w, 3]``) with their titles.
        shape: height of a picture over its width; height and width of the box in it as shares of these.
        key: entries of the legend.
        alarm: names of rows that stand in orange-red.
    """
    columns, (aspect, height, width) = max(4, *(len(tiles) for _, tiles in rows)), shape
    lines = sum(max(title.count("\n") + bool(title) for _, title in tiles) for _, tiles in rows)
    figure.set_figheight(0.95 + 0.18 * lines + len(rows) * (0.1 + aspect * (style.WIDTH - 1.2) / columns))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for row, (name, tiles) in zip(grid, rows, strict=True):
        color = style.VERMILLION if name in alarm else style.BLACK
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=color)
        for axes, (picture, title) in zip(row, tiles, strict=False):
            axes.imshow(picture, extent=(0, 1, 1, 0), aspect=aspect, interpolation="nearest")
            axes.set_title(title, loc="left", fontsize=8, pad=3)
            if height < 1 or width < 1:
                corner = (1 - width) / 2, (1 - height) / 2
                axes.add_patch(Rectangle(corner, width, height, fill=False, linestyle="--", linewidth=0.8))
    style.figure_legend(figure, [Patch(facecolor=color, label=name) for name, color in key.items()])
    return figure


def rgb(color: str) -> Pixels:
    """A colour as uint8 ``[3]``."""
    return (255 * np.array(to_rgb(color))).round().astype(np.uint8)


def class_picture(labels: Pixels) -> Pixels:
    """Label maps as colours, uint8 ``[h, w, 3]``; ignored pixels are black."""
    colors = np.stack([rgb(color) for color in (*CLASSES.values(), style.BLACK)])
    return colors[np.minimum(labels, len(CLASSES))]


def error_picture(image: Pixels, labels: Pixels, predicted: Pixels) -> Pixels:
    """The image in pale grey, wrong pixels in colour."""
    rows, columns = (np.linspace(0, image.shape[i], labels.shape[i], False).astype(int) for i in (0, 1))
    grey = image[rows][:, columns].mean(-1, keepdims=True) * 0.35 + 160
    picture: Pixels = grey.repeat(3, -1).astype(np.uint8)
    truth, found = labels == TARGET, predicted == TARGET
    predicted, found = np.where(labels == IGNORED, labels, predicted), found & (labels != IGNORED)
    wrong = (truth & ~found, found & ~truth, (labels != predicted) & ~truth & ~found)
    for color, where in zip(ERRORS.values(), wrong, strict=True):
        picture[where] = rgb(color)
    return picture
