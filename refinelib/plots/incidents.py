"""Figures and tables of incident.ipynb: one incident, from its folder and from its step taken again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter

from refinelib import checkpoints
from refinelib.data.augment import MEAN, STD
from refinelib.incident_layers import Layer, Layers
from refinelib.plots.style import save_in
from refinelib.plots.curves import BLACK, BLUE, CLASSES, GREEN, LOSS_NAMES, ORANGE, VERMILLION, WIDTH, Figure

#: Pixels and values that are not finite.
BAD = VERMILLION
#: ROIs shown, at most.
PICTURES = 6


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Write ``figures/<name>.png`` in the incident's folder and return the figure, to be shown."""
    return save_in(folder / "figures", figure, name)


# -- tables ----------------------------------------------------------------------------------------
def losses_table(report: Mapping[str, Any]) -> str:
    """Markdown: each loss term as recorded, before its weight, its weight, and the total."""
    lines = ["| loss term | recorded | weight |", "| --- | ---: | ---: |"]
    for name in report["losses"]:
        weight = report["settings"].get(f"{name}_weight")
        lines.append(f"| {LOSS_NAMES.get(name, name)} | {_recorded(report, 'losses', name)} | {'' if weight is None else f'{weight:g}'} |")
    return "\n".join([*lines, f"| **total** | {_recorded(report, 'recorded', 'loss')} | |"])


def people_table(report: Mapping[str, Any]) -> str:
    """Markdown: who was in the batch; who is to blame stands in bold."""
    places = report["finding"]["places"]
    lines = ["| place | source | image | annotation | box (x0, y0, x1, y1), pixels |", "| ---: | --- | ---: | ---: | --- |"]
    for place, person in enumerate(report["people"]):
        box = ", ".join(f"{side:g}" for side in person["box"])
        cells = [str(place), person["source"], str(person["image_id"]), str(person["annotation_id"]), box]
        lines.append("| " + " | ".join(f"**{cell}**" if place in places else cell for cell in cells) + " |")
    return "\n".join(lines)


# -- figures ---------------------------------------------------------------------------------------
def pictures(folder: Path, report: Mapping[str, Any]) -> Figure:
    """ROIs of the batch, image above and labels below, as the model got them; those that were not finite come first."""
    batch = checkpoints.load(folder / "batch.pt", needs=("images", "labels"))
    images, labels = torch.cat(list(batch["images"])).numpy(), torch.cat(list(batch["labels"])).numpy()
    blamed = report["finding"]["places"]
    shown = [*blamed, *(place for place in range(len(images)) if place not in blamed)][:PICTURES]
    whose = f"{len(blamed)} of {len(images)} samples not finite" if blamed else f"of the {len(images)} samples none stands out"
    columns = max(4, len(shown))
    aspect = images.shape[2] / images.shape[3]
    tile = (WIDTH - 1.0) / columns
    figure = _figure(report, whose, height=1.3 + 2 * tile * aspect)
    tiles = figure.subplots(2, columns, squeeze=False)
    for axes in tiles.flat:
        axes.set_axis_off()
    for (top, bottom), place in zip(tiles.T, shown):
        person = report["people"][place]
        top.imshow(_picture(images[place]), interpolation="nearest")
        bottom.imshow(_classes(labels[place]), interpolation="nearest", aspect=aspect * labels.shape[2] / labels.shape[1])
        style = dict(color=BAD, fontweight="bold") if place in blamed else {}
        name = f"place {place}{', not finite' if place in blamed else ''}"
        top.set_title(f"{name}\nimage {person['image_id']}\nannotation {person['annotation_id']}", loc="left", fontsize=9, **style)
    colors = {**CLASSES, **({"pixel not finite": BAD} if not np.isfinite(images).all() else {})}
    handles = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower left", fontsize=9, frameon=False)
    return figure


def activations(report: Mapping[str, Any], found: Layers) -> Figure:
    """Above, the largest finite magnitude of every layer's output in forward order; below, the share that is not finite."""
    figure = _figure(report, "activations by layer", height=5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 1])
    _values(top, found.forward, [layer.largest for layer in found.forward], BLUE)
    _dress(top, found.forward, "largest magnitude of the output (finite part)", "magnitude", names=True)
    if report["settings"]["amp"] == "fp16":
        top.axhline(65504, color=ORANGE, linestyle="--", linewidth=1)
        top.annotate("float16's largest", (len(found.forward) - 0.5, 65504), (0, 3), textcoords="offset points", fontsize=8, ha="right")
    _shares(bottom, [layer.nonfinite for layer in found.forward])
    _dress(bottom, found.forward, "share of the output that is not finite", "share of elements")
    bottom.set_xlabel("layers in forward order: input, modules, loss terms", fontsize=9)
    _mark((top, bottom), found.forward, found.first_bad, "first not finite")
    return figure


def gradients(report: Mapping[str, Any], found: Layers) -> Figure:
    """The loss's gradient with respect to every layer's output, in the same order: its norm above, the share not finite below."""
    figure = _figure(report, "gradient by layer", height=5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 1])
    _values(top, found.forward, [math.nan if layer.gradient is None else layer.gradient for layer in found.forward], GREEN)
    _dress(top, found.forward, "L2 norm of the loss's gradient with respect to the output (finite part)", "gradient norm", names=True)
    _shares(bottom, [layer.gradient_nonfinite for layer in found.forward])
    _dress(bottom, found.forward, "share of that gradient that is not finite", "share of elements")
    bottom.set_xlabel("layers in forward order; the backward pass comes from the right", fontsize=9)
    _mark((top, bottom), found.forward, found.first_bad_gradient, "first not finite, from the right")
    return figure


def parameter_gradients(report: Mapping[str, Any], found: Layers) -> Figure:
    """L2 norm of each parameter's gradient, as recorded in the run and as the step gives it now; below, which are not finite."""
    names = list(report["gradient_norms"])
    recorded = np.array([_number(report, "gradient_norms", name) for name in names])
    now = np.array([found.parameters.get(name, math.nan) for name in names])
    same = np.array_equal(recorded.astype(np.float32), now.astype(np.float32), equal_nan=True)
    figure = _figure(report, "gradient by parameter", height=4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    places = [Layer(name, name.partition(".")[0]) for name in names]
    for values, style in ((recorded, dict(label="recorded", markersize=3.5, color=BLUE)),
                          (now, dict(label="replayed", markersize=7, color=BLACK, fillstyle="none", markeredgewidth=0.8))):  # fmt: skip
        top.plot(range(len(names)), np.where(np.isfinite(values) & (values > 0), values, math.nan), "o", **style)
    _logarithmic(top, np.concatenate([recorded, now]))
    title = f"L2 norm of each parameter's gradient, before clipping: recorded and replayed are {'' if same else 'not '}the same bit for bit"
    _dress(top, places, title, "gradient norm", names=True)
    if np.isfinite([recorded, now]).any():
        top.legend(loc="lower left", fontsize=8, framealpha=0.9, ncols=2)
    for row, values in enumerate((recorded, now)):
        bad = np.flatnonzero(~np.isfinite(values))
        bottom.broken_barh([(i - 0.5, 1.0) for i in bad], (row + 0.1, 0.8), color=BAD)
    bad = [int((~np.isfinite(values)).sum()) for values in (recorded, now)]
    _dress(bottom, places, f"not finite: {bad[0]} of {len(names)} recorded, {bad[1]} of {len(names)} replayed", "")
    bottom.set_ylim(2, 0)
    bottom.set_yticks([0.5, 1.5], ["recorded", "replayed"])
    bottom.set_xlabel("parameters, in the order of the model", fontsize=9)
    return figure


def first_bad_sentence(found: Layers) -> str:
    """Where, in forward order and in backward order, the first value that is not finite stands."""
    forward, backward = found.first_bad, found.first_bad_gradient
    lines = ["Forward, every layer's output is finite."] if forward is None else [
        f"Forward, the first output that is not finite is that of {forward.name}: {_count(*forward.counts[:2])}."
    ]  # fmt: skip
    if backward is None:
        lines.append("Backward, every layer's gradient is finite.")
    else:
        lines.append(f"Backward, the first gradient that is not finite is that at {backward.name}: {_count(*backward.counts[2:])}.")
    bad = [name for name, norm in found.parameters.items() if not math.isfinite(norm)]
    nearest = f", {bad[-1]} nearest to the loss" if bad else ""
    lines.append(f"Parameters without a finite gradient: {len(bad)} of {len(found.parameters)}{nearest}.")
    return "\n".join(lines)


# -- parts -----------------------------------------------------------------------------------------
def _figure(report: Mapping[str, Any], what: str, *, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    settings = report["settings"]
    text = f"{settings.get('run') or settings['recipe']}, step {report['step']}: {what}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _values(axes: Axes, places: Sequence[Layer], values: Sequence[float], color: str) -> None:
    y = np.array(values, float)
    axes.plot(range(len(places)), np.where(y > 0, y, math.nan), marker="o", markersize=3, linewidth=1, color=color)
    _logarithmic(axes, y)


def _shares(axes: Axes, shares: Sequence[float]) -> None:
    axes.fill_between(range(len(shares)), shares, step="mid", color=BAD, linewidth=0)
    thin = [i for i, share in enumerate(shares) if 0 < share < 0.05]  # one bad element has to be seen too
    axes.plot(thin, [0.04] * len(thin), "v", color=BAD, markersize=4)
    axes.set_ylim(0, 1.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _logarithmic(axes: Axes, values: np.ndarray) -> None:
    good = values[np.isfinite(values) & (values > 0)]
    if not good.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none of them is finite", ha="center", va="center", transform=axes.transAxes, fontsize=10)
    else:
        axes.set_yscale("log")
        axes.set_ylim(good.min() / 3, good.max() * 6)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _mark(panels: Sequence[Axes], places: Sequence[Layer], layer: Layer | None, what: str) -> None:
    """A line through all panels at a layer, with its name."""
    if layer is None:
        return
    x = places.index(layer)
    for axes in panels:
        axes.axvline(x, color=BLACK, linestyle="--", linewidth=1)
    right = x > len(places) / 2
    panels[-1].annotate(
        f"{what}: {layer.name}", (x, 0.85), (-6 if right else 6, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right" if right else "left", va="center", fontsize=9, fontweight="bold",
        bbox=dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1.5),
    )  # fmt: skip


def _dress(axes: Axes, places: Sequence[Layer], title: str, y: str, *, names: bool = False) -> None:
    """Labels, and a band for every part of the model, named above the panel where it is wide enough."""
    axes.set_title(title, loc="left", fontsize=10, pad=42 if names else 6)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    start, room = 0, -math.inf  # room: how far to the right the last name reaches
    for number, end in enumerate(i for i in range(1, len(places) + 1) if i == len(places) or places[i].part != places[i - 1].part):
        if number % 2 == 0:
            axes.axvspan(start - 0.5, end - 0.5, color="#F1F1F1", zorder=0)
        if names:
            place = dict(xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7.5, rotation=35, color="#333333")
            room = max((start + end - 1) / 2, room + 0.024 * len(places))
            axes.annotate(places[start].part, (room, 1.0), (-3, 2), ha="left", va="bottom", **place)
        start = end


def _picture(image: np.ndarray) -> np.ndarray:
    """A normalised crop float32 [3, H, W] as RGB uint8 [H, W, 3]; pixels that are not finite in their colour."""
    pixels = np.moveaxis(image.astype(np.float64), 0, -1) * STD + MEAN
    bad = ~np.isfinite(pixels).all(-1)
    picture = np.nan_to_num(pixels, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).astype(np.uint8)
    picture[bad] = _rgb(BAD)
    return picture


def _classes(labels: np.ndarray) -> np.ndarray:
    return np.array([_rgb(color) for color in CLASSES.values()], np.uint8)[labels]


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _count(bad: int, elements: int) -> str:
    return f"{bad} of its {elements} elements" if elements > 1 else "its one value"


def _number(report: Mapping[str, Any], section: str, name: str) -> float:
    value = report[section][name]
    return float(report.get("nonfinite", {}).get(f"{section}.{name}", "nan")) if value is None else value


def _recorded(report: Mapping[str, Any], section: str, name: str) -> str:
    value = _number(report, section, name)
    return f"{value:.4g}" if math.isfinite(value) else f"**{value}**"
