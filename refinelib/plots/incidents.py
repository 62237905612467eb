"""Figures and tables of incident.ipynb: one incident, from its folder and from its step replayed."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from refinelib import checkpoints
from refinelib.data.augment import MEAN, STD
from refinelib.incidents import Layer, Layers, gradient_norms, number
from refinelib.plots import style
from refinelib.plots.masks import class_picture, picture_grid, rgb
from refinelib.plots.style import BLACK, BLUE, VERMILLION, Figure
from refinelib.plots.style import save as save

Report = dict[str, Any]

#: ROIs shown, at most.
PICTURES = 6


def losses_table(report: Report) -> str:
    """Markdown: each loss as recorded, before its weight, its weight, and the total."""
    found = {style.words(name): number(report, "losses", name) for name in report["losses"]}
    found["**total**"] = number(report, "recorded", "loss")
    weights = [report["settings"].get(f"{name}_weight") for name in report["losses"]] + [None]
    shown = [f"{value:.4g}" if math.isfinite(value) else f"**{value}**" for value in found.values()]
    return style.table(zip(found, shown, weights, strict=True), ["loss", "recorded", "weight"])


def people_table(report: Report) -> str:
    """Markdown: the instances of the batch; those that were not finite stand in bold."""
    rows = []
    for place, one in enumerate(report["people"]):
        box = ", ".join(f"{side:g}" for side in one["box"])
        cells = [place, one["source"], one["image_id"], one["annotation_id"], box]
        rows.append([f"**{cell}**" if place in report["finding"]["places"] else cell for cell in cells])
    return style.table(rows, ["place", "source", "image", "annotation", "box (x0, y0, x1, y1), pixels"])


def pictures(folder: Path, report: Report) -> Figure:
    """ROIs of the batch as the model got them; those that were not finite come first."""
    batch = checkpoints.load(folder / "batch.pt", needs=("images", "labels"))
    images, labels = (torch.cat(list(batch[name])).numpy() for name in ("images", "labels"))
    blamed, above, below = report["finding"]["places"], [], []
    for place in sorted(range(len(images)), key=lambda place: place not in blamed)[:PICTURES]:
        one, bad = report["people"][place], ", not finite" if place in blamed else ""
        title = f"place {place}{bad}\nimage {one['image_id']}\nannotation {one['annotation_id']}"
        above.append((_picture(images[place]), title))
        below.append((class_picture(labels[place]), ""))
    figure = _figure(report, f"{len(blamed)} of {len(images)} samples not finite")
    colors = style.CLASSES | {"pixel not finite": VERMILLION}
    shape = (images.shape[2] / images.shape[3], 1.0, 1.0)
    return picture_grid(figure, [("image", above), ("labels", below)], shape, key=colors)


def activations(report: Report, found: Layers) -> Figure:
    """Largest finite magnitude of every layer's output in forward order, and the share that is not finite."""
    values = [(layer.largest, layer.nonfinite) for layer in found.forward]
    figure = _by_layer(report, found, "largest finite output", values, found.first_bad)
    if report["settings"]["amp"] == "fp16":
        figure.axes[0].axhline(65504, color=BLACK, linestyle=":")  # the largest float16
    return figure


def gradients(report: Report, found: Layers) -> Figure:
    """Norm of the loss's gradient by every layer's output, and the share of it that is not finite."""
    values = [(layer.gradient, layer.gradient_nonfinite) for layer in found.forward]
    what = "L2 norm of the loss's gradient by the output"
    return _by_layer(report, found, what, values, found.first_bad_gradient)


def parameter_gradients(report: Report, found: Layers) -> Figure:
    """L2 norm of each parameter's gradient, as recorded in the run and as the replay gives it."""
    names = list(report["gradient_norms"])
    recorded = np.array(gradient_norms(report), np.float32)
    replayed = np.array([found.parameters.get(name, math.nan) for name in names], np.float32)
    figure = _figure(report, "gradient by parameter", 4.2)
    axes = figure.subplots()
    axes.set_yscale("log", nonpositive="mask")
    ring: dict[str, Any] = {"linestyle": "", "label": "replayed", "markersize": 8, "fillstyle": "none"}
    style.draw_line(axes, range(len(names)), recorded.tolist(), BLUE, linestyle="", label="recorded")
    style.draw_line(axes, range(len(names)), replayed.tolist(), BLACK, **ring)
    same = "" if np.array_equal(recorded, replayed, equal_nan=True) else "not "
    title = f"recorded and replayed are {same}the same bit for bit"
    style.style_axes(axes, title, y="L2 norm before clipping")
    _name_parts(axes, names)
    style.legend(axes)
    return figure


def _figure(report: Report, what: str, height: float = 1.0) -> Figure:
    name = report["settings"].get("run") or report["settings"]["recipe"]
    return style.new_figure(f"{name}, step {report['step']}: {what}", height)


def _by_layer(
    report: Report, found: Layers, what: str, values: Sequence[tuple[Any, Any]], first: Layer | None
) -> Figure:
    """A panel for values and one for shares that are not finite, with a line at the first of these."""
    figure = _figure(report, what + (f"; not finite first: {first.name}" if first else ""), 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 1])
    x, known = range(len(values)), [i for i, (value, _) in enumerate(values) if value is not None]
    # Where no element is finite there is no largest of them and no norm.
    finite = [math.nan if values[i][1] == 1 else values[i][0] for i in known]
    if any(value > 0 for value in finite):
        top.set_yscale("log", nonpositive="mask")
    style.draw_line(top, known, finite, BLUE)
    # A dot on each: one bad element among many has to be seen too.
    bottom.stem(x, [share or math.nan for _, share in values], linefmt=VERMILLION, basefmt=" ")
    bottom.set_ylim(-0.05, 1.1)
    if first:
        top.axvline(found.forward.index(first), color=BLACK, linestyle="--")
        bottom.axvline(found.forward.index(first), color=BLACK, linestyle="--")
    style.style_axes(top, f"{what}, in forward order: input, modules, losses")
    style.legend(top)
    any_bad = any(share for _, share in values)
    style.style_axes(bottom, "share of its elements that is not finite" + ("" if any_bad else ": none"))
    _name_parts(bottom, [layer.name for layer in found.forward])
    return figure


def _name_parts(axes: Axes, names: Sequence[str]) -> None:
    """A tick where each part of the model begins, and below it, or as near as there is room, its name."""
    parts = [re.split("[.:]", name)[0] for name in names]
    starts = [i for i, part in enumerate(parts) if i == 0 or parts[i - 1] != part]
    axes.set_xticks(starts, [""] * len(starts))
    look: dict[str, Any] = {"rotation": 90, "fontsize": 6, "ha": "center", "va": "top"}
    place = -math.inf
    for start in starts:
        place = max(float(start), place + len(names) / 75)
        axes.text(place, -0.04, parts[start], transform=axes.get_xaxis_transform(), **look)


def _picture(image: NDArray[Any]) -> NDArray[Any]:
    """A normalised crop (float32 [3, H, W]) as uint8 [H, W, 3]; orange-red pixels are not finite."""
    pixels = np.moveaxis(image.astype(np.float64), 0, -1) * STD + MEAN
    picture = np.nan_to_num(pixels).clip(0, 255).astype(np.uint8)
    picture[~np.isfinite(pixels).all(-1)] = rgb(VERMILLION)
    return picture
