"""Figures that compare runs: gains by size, quality against box noise, outlines close up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke

from refinelib.data import Source, decode_segmentation
from refinelib.metrics.evaluate import AnnotatedImage, annotated_images
from refinelib.plots import style
from refinelib.plots.masks import rgb
from refinelib.plots.style import BLACK, BLUE, ERRORS, GREEN, PURPLE, Figure
from refinelib.plots.style import save as save
from studies.results import Result, difference, estimate, size_groups, title

#: Refinement on and off.
ON, OFF = PURPLE, BLACK
#: How much of the image is shown around the box, as a share of its sides.
MARGIN = 0.12


# -- numbers ---------------------------------------------------------------------------------------
def gains(
    on: Sequence[Result], off: Sequence[Result], keys: Sequence[str] = ("target_iou", "boundary_iou")
) -> Figure:
    """By size: the metric with and without refinement, and below their paired difference."""
    groups = {name: inside for name, inside in size_groups([*on, *off]).items() if inside.any()}
    shown = style.new_figure("refinement on against off; bars: 95 % interval over images", 6.2)
    panels = shown.subplots(2, len(keys), sharex=True, height_ratios=[1.3, 1], squeeze=False)
    places = np.arange(len(groups))
    for column, key in enumerate(keys):
        above, below = panels[:, column]
        for name, runs, color, shift in (("off", off, OFF, -0.12), ("on", on, ON, 0.12)):
            found = [estimate(runs, key, inside) for inside in groups.values()]
            _bars(above, places + shift, found, color, f"refinement {name}")
        _bars(
            below, places, [difference(on, off, key, inside) for inside in groups.values()], ON, "on less off"
        )
        below.axhline(0, color=BLACK, linewidth=0.8)
        names = [f"{name}\n({int(inside.sum())})" for name, inside in groups.items()]
        below.set_xticks(places, [name.replace(" ", "\n", 1) for name in names])
        low, high = above.get_ylim()
        above.set_ylim(max(0.0, low), high)  # a score of 0 has nothing below it
        style.style_axes(above, title(key), "", f"{title(key)}, 0 to 1")
        style.style_axes(
            below, "gain, paired over images", "size of the person (number of people)", "difference"
        )
    panels[0, 0].legend(fontsize=8, frameon=False)
    return shown


def jitter(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Target IoU and Boundary IoU, measured in the image, against the noise of the boxes.

    Args:
        curves: by name, of :func:`studies.box_jitter.jitter_curve`; the first is drawn solid, others broken.
    """
    shown = style.new_figure("box jitter; bands: 95 % interval over images", 4.4)
    panels = shown.subplots(1, 2, sharex=True)
    for axes, key, color in zip(panels, ("target_iou", "boundary_iou"), (BLUE, GREEN), strict=False):
        for (name, curve), line in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
            x = [100 * point["sigma"] for point in curve]
            ends = np.array([point["intervals"][key] for point in curve], dtype=float)
            axes.plot(x, [point[key] for point in curve], line, color=color, marker="o", label=name)
            axes.fill_between(
                x, ends[:, 0], ends[:, 1], color=color, alpha=0.15 if line == "-" else 0.07, linewidth=0
            )
        style.style_axes(
            axes,
            "",
            "standard deviation of centre and sides, % of the box's sides",
            f"{title(key)} in the image, 0 to 1",
        )
        axes.set_ylim(bottom=0)
        points = next(iter(curves.values()))
        above = axes.secondary_xaxis("top")
        above.set_xticks(
            [100 * point["sigma"] for point in points], [f"{point['box_iou']:.2f}" for point in points]
        )
        above.set_xlabel("overlap (IoU) of the moved box with the true one", fontsize=8)
        above.tick_params(labelsize=7)
        if len(curves) > 1:
            # A shorter handle would hide behind its marker that the line is broken.
            axes.legend(fontsize=8, frameon=False, loc="lower left", handlelength=4)
    return shown


# -- pictures --------------------------------------------------------------------------------------
def _shown(people: Mapping[str, np.ndarray], values: np.ndarray, hidden: Sequence[int]) -> np.ndarray:
    """The values, NaN for people in images that are not to be shown."""
    return np.where(np.isin(people["image_id"], list(hidden)), np.nan, values)


def worst_and_best(
    result: Result,
    source: Source,
    *,
    each: int = 5,
    max_images: int | None = None,
    hidden: Sequence[int] = (),
) -> Figure:
    """The people with the lowest and the highest target IoU in the image, at full resolution.

    Images whose ids are in ``hidden`` are passed over, as their licence may ask.
    """
    people = result.evaluation.people
    scores = _shown(people, people["image_target_iou"], hidden)
    ranked = np.argsort(scores, kind="stable")[: int((~np.isnan(scores)).sum())]
    each = max(1, min(each, len(ranked) // 2))
    rows = {"worst": ranked[:each], "best": ranked[-each:][::-1]}
    chosen = people["annotation_id"][np.concatenate(list(rows.values()))]
    crops = _crops(source, chosen, max_images)
    shown = style.new_figure(f"{result.name}: worst and best masks, at the image's own pixels", 6.0)
    panels = shown.subplots(2, each, squeeze=False)
    for (kind, members), tiles in zip(rows.items(), panels, strict=False):
        for axes, row in zip(tiles, members, strict=False):
            one = int(people["annotation_id"][row])
            image, person, window = crops[one]
            mask = decode(result.evaluation.masks[one])
            _masked(axes, image, person, mask, window)
            axes.set_title(f"IoU {scores[row]:.2f}\nimage {people['image_id'][row]}", loc="left", fontsize=8)
        tiles[0].set_ylabel(kind, fontsize=10, fontweight="bold")
    _error_key(shown)
    return shown


def closeups(
    on: Result, off: Result, source: Source, *, max_images: int | None = None, hidden: Sequence[int] = ()
) -> Figure:
    """Outlines close up where two masks differ most: greatest gain, middle, greatest loss of Boundary IoU.

    Two people each. The window is a third of the box, around the place with the most differing pixels.
    ``hidden`` as in :func:`worst_and_best`.
    """
    people, key = on.evaluation.people, "image_boundary_iou"
    gain = _shown(people, people[key] - off.evaluation.people[key], hidden)
    ranked = np.argsort(-gain, kind="stable")[: int((~np.isnan(gain)).sum())]
    middle = max(0, len(ranked) // 2 - 1)
    kinds = {
        "greatest gain": ranked[:2],
        "middle": ranked[middle : middle + 2],
        "greatest loss": ranked[-2:][::-1],
    }
    rows = [(kind, row) for kind, members in kinds.items() for row in members]
    crops = _crops(source, people["annotation_id"][[row for _, row in rows]], max_images)
    shown = style.new_figure(f"refinement off ({off.name}) and on ({on.name})", 2.1 * len(rows))
    panels = shown.subplots(len(rows), 4, squeeze=False)
    for (kind, row), tiles in zip(rows, panels, strict=False):
        one = int(people["annotation_id"][row])
        image, person, window = crops[one]
        masks = [decode(run.evaluation.masks[one]) for run in (off, on)]
        truth, zoom = (
            image.masks[image.slots[person]],
            _where_they_differ(*masks, image.boxes[person].tolist()),
        )
        _picture(tiles[0], image.pixels, window)
        x0, y0, x1, y1 = zoom
        for color, width in (("white", 2.4), (BLACK, 1.0)):
            tiles[0].add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width)
            )
        _picture(tiles[1], image.pixels, zoom)
        for mask, color, line in ((truth, "white", "-"), (masks[0], OFF, "--"), (masks[1], ON, "-")):
            _outline(tiles[1], mask, zoom, color, line)
        for axes, mask, run in zip(tiles[2:], masks, (off, on), strict=False):
            _masked(axes, image, person, mask, zoom)
            axes.set_title(f"Boundary IoU {run.evaluation.people[key][row]:.2f}", loc="left", fontsize=8)
        tiles[0].set_title(f"{kind}, {gain[row]:+.2f}", loc="left", fontsize=8, fontweight="bold")
        tiles[0].set_ylabel(f"image {people['image_id'][row]}", fontsize=8)
    for axes, name in zip(panels[0], ("", "outlines", "off", "on"), strict=False):
        title = axes.get_title(loc="left")
        axes.set_title(
            "  ".join(part for part in (name, title) if part), loc="left", fontsize=8, fontweight="bold"
        )
    lines = [
        Line2D([], [], color="#BBBBBB", label="truth"),
        Line2D([], [], color=OFF, linestyle="--", label="refinement off"),
    ]
    _error_key(shown, [*lines, Line2D([], [], color=ON, label="refinement on")])
    return shown


# -- drawing ---------------------------------------------------------------------------------------
def _crops(
    source: Source, wanted: np.ndarray, max_images: int | None
) -> dict[int, tuple[AnnotatedImage, int, tuple[int, ...]]]:
    """The image of each annotation id, the person's place in it, and the box with a margin."""
    found = {}
    for image in annotated_images(source, max_images=max_images):
        for person, one in enumerate(image.annotation_ids):
            if one in wanted and image.scored[person]:
                x0, y0, x1, y1 = image.boxes[person].tolist()
                dx, dy = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
                height, width = image.size
                ends = max(0, x0 - dx), max(0, y0 - dy), min(width, x1 + dx), min(height, y1 + dy)
                found[one] = image, person, tuple(round(end) for end in ends)
    return found


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """The bool mask ``[H, W]`` of what ``encode`` gave; an empty mask is all false."""
    height, width = segmentation["size"]
    mask = decode_segmentation(segmentation, height, width)
    return np.zeros((height, width), dtype=bool) if mask is None else mask


def _where_they_differ(a: np.ndarray, b: np.ndarray, box: list[float]) -> tuple[int, int, int, int]:
    """A square of a third of the box's longer side around the most differing pixels, else its middle."""
    from scipy.ndimage import uniform_filter

    height, width = a.shape
    side = int(min(max(16, max(box[2] - box[0], box[3] - box[1]) / 3), height, width))
    density = uniform_filter((a ^ b).astype(np.float32), side, mode="constant")
    y, x = np.unravel_index(int(density.argmax()), density.shape)
    if density.max() <= 0:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    x0, y0 = int(min(max(0, x - side // 2), width - side)), int(min(max(0, y - side // 2), height - side))
    return x0, y0, x0 + side, y0 + side


def _picture(axes: Axes, pixels: np.ndarray, window: Sequence[int]) -> None:
    x0, y0, x1, y1 = window
    axes.imshow(pixels[y0:y1, x0:x1], extent=(x0, x1, y1, y0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _masked(axes: Axes, image: AnnotatedImage, person: int, mask: np.ndarray, window: Sequence[int]) -> None:
    """The image in pale grey, missed and extra pixels in colour, the true outline in white."""
    truth = image.masks[image.slots[person]]
    grey = (
        np.broadcast_to(image.pixels.mean(-1, keepdims=True) * 0.45 + 120, image.pixels.shape)
        .astype(np.uint8)
        .copy()
    )
    grey[truth & mask] = (0.75 * grey[truth & mask] + 0.25 * 255).astype(np.uint8)
    for name, where in (("missed", truth & ~mask), ("too much", mask & ~truth)):
        grey[where] = rgb(ERRORS[name])
    _picture(axes, grey, window)
    _outline(axes, truth, window, "white", "-")


def _outline(axes: Axes, mask: np.ndarray, window: Sequence[int], color: str, line: str) -> None:
    x0, y0, x1, y1 = window
    part = np.pad(mask[y0:y1, x0:x1].astype(float), 1, mode="edge")
    if part.min() < part.max():
        x, y = np.arange(x0 - 1, x1 + 1) + 0.5, np.arange(y0 - 1, y1 + 1) + 0.5
        halo = [Stroke(linewidth=2.6, foreground=BLACK if color == "white" else "white"), Normal()]
        lines = axes.contour(x, y, part, levels=[0.5], colors=[color], linestyles=[line], linewidths=1.4)
        lines.set_path_effects(halo)
        axes.set_xlim(x0, x1)
        axes.set_ylim(y1, y0)


def _bars(axes: Axes, x: np.ndarray, found: Sequence[Any], color: str, label: str) -> None:
    for place, one in zip(x, found, strict=False):
        if one is None:
            continue
        if one.interval is not None:
            axes.plot([place, place], one.interval, color=color, linewidth=1.6)
        axes.plot([place], [one.mean], "o", color=color, markersize=5)
    axes.plot([], [], "o-", color=color, markersize=5, label=label)


def _error_key(shown: Figure, more: Sequence[Any] = ()) -> None:
    wrong = [Patch(facecolor=ERRORS[name], label=name) for name in ("missed", "too much")]
    style.figure_legend(shown, [*more, *wrong])
