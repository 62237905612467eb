"""Figures of the checks, drawn from ``checks.json`` in a run's folder."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np

from refinelib.plots.style import BLACK, BLUE, GREY, VERMILLION, WIDTH, Figure, style_axes, legend
from refinelib.workflows.verdicts import Check, read


def overfit(folder: str | os.PathLike) -> Figure:
    """Loss and target IoU of the one batch learned by heart, by step, with the line that each has to cross."""
    check = _find(folder, "loss", "one batch learned by heart")
    found = check.figures
    if "enough" not in found:
        return _broken_off(folder, check)
    figure = _figure(folder, check, 3.6)
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(found["loss"]) + 1)
    iou, share = found["enough"]
    left.plot(steps, [np.nan if value is None else value for value in found["loss"]], color=BLACK, linewidth=1.6, label="loss")
    if found["loss"][0]:
        left.axhline(share * found["loss"][0], color=GREY, linestyle="--", gid="limit", label=f"{share:.0%} of the first")
        left.set_yscale("log")
    style_axes(left, "total loss of the batch", "step", "loss")
    right.plot(steps, found["target_iou"], color=BLUE, linewidth=1.6, label="target IoU")
    right.axhline(iou, color=GREY, linestyle="--", gid="limit", label=f"{iou:g}")
    right.set_ylim(0, 1.02)
    style_axes(right, "target IoU on the batch", "step", "IoU, 0 to 1")
    for axes in (left, right):
        legend(axes)
    return figure


def gradients(folder: str | os.PathLike) -> Figure:
    """Largest gradient norm of each parameter in the first steps, a row a module; those without one stand at the left."""
    check = _find(folder, "norms", "a gradient in every parameter")
    if "norms" not in check.figures:
        return _broken_off(folder, check)
    norms = check.figures["norms"]
    modules = list(dict.fromkeys(name.split(".")[0] for name in norms))
    figure = _figure(folder, check, 1.3 + 0.28 * len(modules))
    axes = figure.subplots()
    good = [value for value in norms.values() if value]
    edge = min(good, default=1e-6) / 10
    for marker, color, label, chosen in (
        ("o", BLUE, "finite, not 0", lambda value: bool(value)),
        ("X", VERMILLION, "none, 0 or not finite", lambda value: not value),
    ):
        shown = [(value or edge, modules.index(name.split(".")[0])) for name, value in norms.items() if chosen(value)]
        if shown:
            # A little apart from one another, always the same: parameters of a module hide each other else.
            rows = [row + 0.5 * ((7 * i) % 11 / 10 - 0.5) for i, (_, row) in enumerate(shown)]
            axes.scatter([x for x, _ in shown], rows, s=26, marker=marker, color=color, alpha=0.75, linewidths=0, label=label)
            axes.plot([], [], marker=marker, color=color, linestyle="", label="_")
    axes.set_xscale("log")
    axes.set_yticks(range(len(modules)), modules)
    axes.set_ylim(len(modules) - 0.4, -0.6)
    axes.set_title("gradient of each parameter, by module", loc="left", fontsize=10)
    axes.set_xlabel("L2 norm, largest of the first steps", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend(axes)
    return figure


def _find(folder: str | os.PathLike, key: str, name: str) -> Check:
    """The check that measured ``key``; the one of that ``name`` where it broke off before."""
    results = read(folder)
    measured = [check for check in results if key in check.figures and "stages" not in check.figures]
    named = [check for check in results if check.name == name]
    return (measured or named or [Check(name, False, "it was not run")])[0]


def _broken_off(folder: str | os.PathLike, check: Check) -> Figure:
    figure = _figure(folder, check, 1.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0, 0.5, textwrap.fill(check.sentence, 110), va="center", fontsize=10)
    return figure


def _figure(folder: str | os.PathLike, check: Check, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    text = f"{Path(folder).name}: {check.name}   [{'passed' if check.passed else 'failed'}]"
    color = BLACK if check.passed else VERMILLION
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color)
    return figure
