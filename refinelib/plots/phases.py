"""Figures of progressive training, drawn from a chain's folder: all phases in one, and the same people after each."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure

from refinelib.plots.style import BLACK, CLASSES, LOSSES, METRIC_NAMES, METRICS, NORM_LINES, PURPLE
from refinelib.plots.style import VERMILLION, WIDTH, Figure, color_key, draw_line, style_axes, legend, save_in
from refinelib.workflows.phases import read
from refinelib.plots.masks import class_picture, read_samples, tile, window_of
from refinelib.runs import Run


def all_phases(folder: str | os.PathLike) -> Figure:
    """Loss, validation and gradient norm of all phases over the epochs of the whole chain; a gate stands where a phase ends."""
    state = read(folder)
    figure = _figure(state, "all phases", 8.2)
    panels = figure.subplots(3, 1, sharex=True)
    offset, crossings = 0.0, []
    for entry, run in _runs(state):
        length = _draw(panels, run, offset, first=not crossings)
        crossings.append((offset, offset + length, entry))
        offset += length
    for axes, title, unit in zip(
        panels, ("total training loss", "IoU on the validation people", "gradient norm before clipping"), ("loss", "IoU, 0 to 1", "L2 norm")
    ):
        style_axes(axes, title, "epoch of the whole chain" if axes is panels[-1] else "", unit)
        legend(axes)
        axes.set_xlim(0, max(offset, 1))
        for start, end, entry in crossings:
            axes.axvline(end, color="#666666", linewidth=1.0, gid="limit")
            if crossings.index((start, end, entry)) % 2:
                axes.axvspan(start, end, color="#F2F2F2", zorder=0, linewidth=0)
    for start, end, entry in crossings:
        held = entry["state"] == "held"
        place = dict(xycoords=panels[1].get_xaxis_transform(), ha="center", va="top", fontsize=8)
        word = f"{entry['phase']}\n{'held at its gate' if held else entry['state']}"
        panels[1].annotate(word, ((start + end) / 2, 0.985), **place, color=VERMILLION if held else BLACK)
    panels[1].set_ylim(0, 1)
    return figure


def masks(folder: str | os.PathLike, count: int = 4) -> Figure:
    """The same validation ROIs after each phase: image, truth, then the mask at the end of each phase with its target IoU."""
    state = read(folder)
    found = [(entry["phase"], last[1]) for entry, run in _runs(state) if (last := read_samples(run))]
    if not found:
        figure = _figure(state, "masks", 1.6)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No epoch has ended yet.", ha="center", va="center", fontsize=11)
        return figure
    fixed = np.flatnonzero(found[0][1]["kind"] == "fixed")
    chosen = fixed[np.linspace(0, len(fixed) - 1, min(count, len(fixed))).astype(int)]
    size, columns = found[0][1]["mask_size"], 2 + len(found)
    aspect = found[0][1]["image"].shape[1] / found[0][1]["image"].shape[2]
    side = min(1.5, WIDTH / columns)
    figure = _figure(state, "the same people after each phase", 0.95 + len(chosen) * (aspect * side + 0.25))
    tiles = figure.subplots(len(chosen), columns, squeeze=False)
    for place, (row, roi) in enumerate(zip(tiles, chosen)):
        first = found[0][1]
        window = window_of(first["labels"][roi].shape, size)
        pictures = [("image", first["image"][roi]), ("truth", class_picture(first["labels"][roi]))]
        for name, samples in found:
            predicted = samples["probs"][roi].astype(np.float32).argmax(0)
            pictures.append((f"{name}  {samples['target_iou'][roi]:.2f}", class_picture(predicted)))
        for axes, (head, picture) in zip(row, pictures):
            tile(axes, picture, window, aspect)
            axes.set_title(head if place == 0 or "  " in head else "", fontsize=8, pad=2)
    color_key(figure, CLASSES, loc="outside lower center")
    return figure


def save(folder: str | os.PathLike, figure: _Figure, name: str) -> _Figure:
    """Write ``figures/<name>.png`` in the chain's folder and return the figure, to be shown."""
    place = Path(read(folder)["folder"]) / "figures"
    return save_in(place, figure, name)


# -- panels ----------------------------------------------------------------------------------------
def _draw(panels: list[Axes], run: Run, offset: float, *, first: bool) -> float:
    """One phase into the three panels; returns how many epochs wide it is."""
    steps, epochs, status = run.steps(), run.epochs(), run.status()
    planned = status.get("epochs") or max(len(epochs), 1)
    per_epoch = (status.get("steps") or len(steps) or 1) / planned
    tried = math.ceil(steps[-1]["step"] / per_epoch) if steps else planned
    length = float(max(len(epochs), tried, 1))
    x = [offset + line["step"] / per_epoch for line in steps]
    ends = [offset + line["epoch"] for line in epochs]
    loss, iou, norm = panels

    def label(text: str) -> dict[str, Any]:
        return {"label": text if first else "_"}

    draw_line(loss, x, [line["loss"] for line in steps], color=LOSSES["total"], linewidth=0.9, alpha=0.4, **label("by window of steps"))
    style = dict(color=LOSSES["total"], marker="o", linewidth=1.8)
    draw_line(loss, [end - 0.5 for end in ends], [line["train_loss"] for line in epochs], **style, **label("by epoch"))
    validations = run.validations()
    for name, color in METRICS.items():
        values = [line["metrics"].get(name) for line in validations]
        style = "--" if name == "miou" else "-"
        draw_line(iou, [offset + line["epoch"] for line in validations], values, color=color, marker="o", linestyle=style, crosses=False, **label(METRIC_NAMES[name]))
    norm.set_yscale("log")
    draw_line(norm, x, [line.get("grad_norm_max") for line in steps], color=PURPLE, linewidth=1.0, **label("largest"))
    draw_line(norm, x, [line["grad_norm"] for line in steps], color=BLACK, linewidth=1.4, **label("mean"))
    if first:
        for level, (color, name) in NORM_LINES.items():
            norm.axhline(level, color=color, linewidth=1.2, linestyle="--", zorder=1, gid="limit")
            place = dict(xycoords=norm.get_yaxis_transform(), textcoords="offset points", ha="right", va="bottom")
            norm.annotate(name, (0.995, level), (0, 1), **place, fontsize=8, color="#333333")
    seen = [value for line in steps for value in (line["grad_norm"], line.get("grad_norm_max")) if value]
    low, high = norm.get_ylim() if not first else (0.5, 250.0)
    norm.set_ylim(min([low, *(0.5 * value for value in seen)]), max([high, *(2.5 * value for value in seen)]))
    return length


def _runs(state: dict[str, Any]) -> list[tuple[dict[str, Any], Run]]:
    """Phases that have begun, with their runs."""
    runs = [(entry, Run(Path(state["folder"]) / entry["run"])) for entry in state["phases"] if entry["run"]]
    return [(entry, run) for entry, run in runs if (run.folder / "status.json").is_file()]


def _figure(state: dict[str, Any], what: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    passed = sum(entry["state"] == "passed" for entry in state["phases"])
    text = f"{state['name']}: {what}   [{state['state']}, {passed} of {len(state['phases'])} phases passed]"
    color = BLACK if state["state"] in ("ok", "running") else VERMILLION
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color)
    return figure
