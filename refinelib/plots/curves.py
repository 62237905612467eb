"""Curves and numbers of a run, drawn from its folder on disk (its masks: pictures.py).

Every function takes a :class:`~refinelib.runs.Run`, a run's name or its folder, and returns a figure
that shows itself at the end of a notebook cell. A run that is still going is drawn so far; a value
that was not finite is a gap in its line and a cross at the panel's upper edge.
"""

from __future__ import annotations

import math
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from refinelib.plots.style import (
    BLACK, BLUE, CLASSES, DPI, ERRORS, GREEN, GREY, LOSS_NAMES, LOSSES, METRIC_NAMES, METRICS, NORM_LINES, ORANGE, PURPLE, SKY, VERMILLION, WIDTH,
    YELLOW, Figure, draw_line, style_axes, legend, logarithmic_if_wide, mark_skips, opened, recorded_settings, save, titled,
)  # fmt: skip
from refinelib.plots.masks import rois, sample_grid
from refinelib.runs import Run

# -- figures ---------------------------------------------------------------------------------------
def losses(run: Run | str | os.PathLike) -> Figure:
    """Total loss by step and by epoch above, each component (before its weight) in a panel of its own below."""
    run = opened(run)
    steps = run.steps()
    names = list(dict.fromkeys(name for line in steps for name in line["losses"]))
    rows = math.ceil(len(names) / 3)
    figure = titled(run, "losses", height=2.9 + 2.0 * max(rows, 1))
    grid = figure.add_gridspec(1 + max(rows, 1), 3, height_ratios=[1.35, *[1] * max(rows, 1)])
    total_panel(figure.add_subplot(grid[0, :]), run)
    weights = recorded_settings(run)
    for i, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + i // 3, i % 3])
        weight = weights.get(f"{name}_weight")
        values = [line["losses"].get(name) for line in steps]
        draw_line(axes, [line["step"] for line in steps], values, color=LOSSES.get(name, GREY))
        logarithmic_if_wide(axes, values)
        title = LOSS_NAMES.get(name, name) + ("" if weight is None else f"   (weight {weight:g})")
        style_axes(axes, title, "step" if i + 3 >= len(names) else "", "loss" if i % 3 == 0 else "")
    return figure


def gradient_norm(run: Run | str | os.PathLike) -> Figure:
    """L2 norm of the gradient before clipping: mean and largest of each window of steps, against 10, 50 and 100."""
    run = opened(run)
    figure = titled(run, "gradient norm", height=4.2)
    gradient_panel(figure.add_subplot(), run)
    return figure


def learning_rate(run: Run | str | os.PathLike) -> Figure:
    """Learning rate by step; under fp16 the loss scale below it."""
    run = opened(run)
    scaled = recorded_settings(run).get("amp") == "fp16"
    figure = titled(run, "learning rate and loss scale" if scaled else "learning rate", height=5.4 if scaled else 3.4)
    top, *below = np.atleast_1d(figure.subplots(1 + scaled, 1, sharex=True))
    learning_rate_panel(top, run)
    for axes in below:
        top.set_xlabel("")
        steps = run.steps()
        values = [line.get("loss_scale") for line in steps]
        draw_line(axes, [line["step"] for line in steps], values, color=GREEN, drawstyle="steps-post")
        style_axes(axes, "fp16 loss scale", "step", "factor")
        axes.set_yscale("log", base=2)
    return figure


def ious(run: Run | str | os.PathLike) -> Figure:
    """Validation by epoch: target IoU, Boundary IoU and mIoU on the left, the IoU of each class on the right."""
    run = opened(run)
    figure = titled(run, "validation", height=4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    iou_panel(left, run)
    epochs = run.validations()
    x = [line["epoch"] for line in epochs]
    for label, (name, color) in enumerate(CLASSES.items()):
        values = [(line["metrics"].get("iou") or [None] * 3)[label] for line in epochs]
        style = dict(marker="o", linestyle="--" if name == "other people" else "-")
        draw_line(right, x, values, color=color, label=name, crosses=False, **style)
    style_axes(right, "IoU of each class, pixels of all ROIs pooled", "epoch", "", whole=True)
    legend(right)
    return figure


def overview(run: Run | str | os.PathLike) -> Figure:
    """Loss, gradient norm, learning rate and IoUs on one page."""
    run = opened(run)
    figure = titled(run, "overview", height=7.0)
    (a, b), (c, d) = figure.subplots(2, 2)
    total_panel(a, run)
    gradient_panel(b, run)
    learning_rate_panel(c, run)
    iou_panel(d, run)
    return figure


def live(run: Run | str | os.PathLike) -> Figure:
    """What one watches while a run goes on: each loss times its weight, and the gradient norm against its lines."""
    run = opened(run)
    figure = titled(run, "so far", height=4.1)
    left, right = figure.subplots(1, 2)
    steps, settings = run.steps(), recorded_settings(run)
    x = [line["step"] for line in steps]
    left.set_yscale("log")
    draw_line(left, x, [line["loss"] for line in steps], color=LOSSES["total"], linewidth=2.0, label="total")
    for name in dict.fromkeys(name for line in steps for name in line["losses"]):
        values = [line["losses"].get(name) for line in steps]
        weighted = [None if value is None else value * settings.get(f"{name}_weight", 1.0) for value in values]
        draw_line(left, x, weighted, color=LOSSES.get(name, GREY), linewidth=1.2, label=LOSS_NAMES.get(name, name), crosses=False)
    style_axes(left, "losses, each times its weight", "step", "loss")
    handles = left.get_legend_handles_labels()[0]  # below both panels, where it hides no line
    figure.legend(handles=handles, loc="outside lower left", ncols=max(1, len(handles)), fontsize=8, frameon=False)
    gradient_panel(right, run)
    return figure


# -- words -----------------------------------------------------------------------------------------
def metrics_table(run: Run | str | os.PathLike) -> str:
    """Last and best validation as a Markdown table."""
    epochs = opened(run).validations()
    if not epochs:
        return "No epoch has been validated yet."
    last, best = epochs[-1], max(epochs, key=lambda line: line["metrics"].get("target_iou") or -1.0)
    rows = [
        ("target IoU", "mean over ROIs: overlap with this person", "target_iou"),
        ("Boundary IoU", "the same within a thin band along the outline", "boundary_iou"),
        ("mIoU", "mean of the three classes' IoU, pixels pooled", "miou"),
        ("boundary F, 2 px", "share of the outline that is hit within 2 px", "boundary_f1_2px"),
        ("surface distance, px", "mean distance between the outlines; less is better", "surface_distance"),
        ("95 % Hausdorff distance, px", "distance that 95 % of the outline stays below; less is better", "hd95"),
    ]
    lines = [f"| | last (epoch {last['epoch']}) | best (epoch {best['epoch']}) | what it says |"]
    lines.append("| --- | --- | --- | --- |")
    for name, meaning, key in rows:
        found = [line["metrics"].get(key) for line in (last, best)]
        if any(value is not None for value in found):
            shown = " | ".join("" if value is None else f"{value:.3f}" for value in found)
            lines.append(f"| {name} | {shown} | {meaning} |")
    return "\n".join(lines)


# -- panels ----------------------------------------------------------------------------------------
def total_panel(axes: Axes, run: Run) -> None:
    steps, epochs = run.steps(), run.epochs()
    values = [line["loss"] for line in steps]
    style = dict(linewidth=1.0, alpha=0.55, label="by window of steps")
    draw_line(axes, [line["step"] for line in steps], values, color=LOSSES["total"], **style)
    ends = [0, *(line["step"] for line in epochs)]
    middles = [(start + end) / 2 for start, end in zip(ends, ends[1:])]
    means = [line["train_loss"] for line in epochs]
    draw_line(axes, middles, means, color=LOSSES["total"], marker="o", linewidth=1.8, label="by epoch")
    logarithmic_if_wide(axes, values)
    mark_skips(axes, run)
    style_axes(axes, "total training loss", "step", "loss")
    legend(axes)


def gradient_panel(axes: Axes, run: Run) -> None:
    steps = run.steps()
    x, mean = [line["step"] for line in steps], [line["grad_norm"] for line in steps]
    largest = [line.get("grad_norm_max") for line in steps]
    axes.set_yscale("log")
    draw_line(axes, x, largest, color=PURPLE, linewidth=1.0, marker="v", label="largest")
    draw_line(axes, x, mean, color=BLACK, linewidth=1.6, label="mean")
    positive = [value for value in (*mean, *largest) if value]
    axes.set_ylim(min([0.5, *(0.5 * value for value in positive)]), max([250.0, *(2.5 * value for value in positive)]))
    for level, (color, name) in NORM_LINES.items():
        axes.axhline(level, color=color, linewidth=1.2, linestyle="--", zorder=1, gid="limit")
        place = dict(xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right", va="bottom")
        axes.annotate(name, (0.995, level), (0, 1), **place, fontsize=8, color="#333333")
    clip = recorded_settings(run).get("grad_clip")
    if clip:
        axes.axhline(clip, color=GREY, linewidth=1.0, linestyle=":", zorder=1, gid="limit", label=f"clip, {clip:g}")
    mark_skips(axes, run)
    style_axes(axes, "gradient norm before clipping, by window of steps", "step", "L2 norm")
    legend(axes)


def learning_rate_panel(axes: Axes, run: Run) -> None:
    steps = run.steps()
    draw_line(axes, [line["step"] for line in steps], [line["lr"] for line in steps], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    style_axes(axes, "learning rate", "step", "learning rate")


def iou_panel(axes: Axes, run: Run) -> None:
    epochs = run.validations()
    x = [line["epoch"] for line in epochs]
    for name, color in METRICS.items():
        style = "--" if name == "miou" else "-"
        values = [line["metrics"].get(name) for line in epochs]
        draw_line(axes, x, values, color=color, marker="o", linestyle=style, label=METRIC_NAMES[name], crosses=False)
    scored = [(line["metrics"].get("target_iou"), epoch) for line, epoch in zip(epochs, x)]
    scored = [(value, epoch) for value, epoch in scored if value is not None]
    if scored:
        value, epoch = max(scored, key=lambda pair: pair[0])  # the first of equals, as the trainer keeps it
        axes.plot([epoch], [value], "*", markersize=15, color=BLUE, markeredgecolor="white", zorder=5)
        place = dict(textcoords="offset points", fontsize=8, ha="right" if epoch > 1 else "left")
        axes.annotate(f"best {value:.3f}", (epoch, value), (6, -18 if value > 0.9 else 9), **place)
    axes.set_ylim(0, 1)
    style_axes(axes, "IoU on the validation people", "epoch", "IoU, 0 to 1", whole=True)
    legend(axes)
