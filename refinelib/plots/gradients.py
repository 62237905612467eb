"""Figures of a run's gradients, drawn from what its probe left on disk (see gradients.py)."""

from __future__ import annotations

import os
from typing import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator

from refinelib.plots.style import BLACK, BLUE, GREEN, GREY, LOSS_NAMES, LOSSES, ORANGE, PURPLE, VERMILLION, Figure
from refinelib.plots.style import style_axes, empty, legend, opened, titled
from refinelib.runs import Run, RunError
from refinelib.gradients.read import Gradients, read
from refinelib.gradients.instability import Episode, episodes, levels, rounded

#: Columns of a heat map, at most: more cannot be told apart at a notebook's width.
COLUMNS = 360
#: The usual size of an update against its weight.
USUAL_UPDATE = 1e-3
#: One colour a refinement module; the rest of the model is grey.
MODULES = {"progressive": GREEN, "subpixel": GREEN, "contour": PURPLE, "distance": VERMILLION, "boundary": BLUE}

Layers = str | Sequence[str] | None


def heat(run: Run | str | os.PathLike, layers: Layers = None) -> Figure:
    """Gradient norm by layer and step, and below it how many times its usual level each was.

    Args:
        layers: see :meth:`refinelib.gradients.read.Gradients.select`.
    """
    run = opened(run)
    if (found := _read(run)) is None:
        return empty(run, "gradients", "no epoch of gradients is on disk yet")
    rows = found.select(layers)
    norms = np.stack([found.of(places) for places in rows.values()])
    level = levels(norms.T)[0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(np.isfinite(norms), np.nan_to_num(norms / 10**level, nan=1.0), np.inf)  # no level yet: as usual
    each = max(1.3, (0.17 if len(rows) < 40 else 0.11) * len(rows) + 0.35)
    bar = dict(pad=0.01, extend="both", shrink=min(1.0, 2.4 / each), aspect=12, anchor=(0.0, 1.0))
    figure = titled(run, "gradient norm by layer and step", height=2 * each + 1.75)
    above, below = figure.subplots(2, 1, sharex=True)
    positive = norms[np.isfinite(norms) & (norms > 0)]
    low, high = np.percentile(positive, [2, 99.5]) if len(positive) else (0.1, 1.0)
    picture = _map(above, found, norms, list(rows), cmap="cividis", norm=LogNorm(max(low, high * 1e-6), max(high, low * 1.01)))
    figure.colorbar(picture, ax=above, **bar).set_label("L2 norm", fontsize=8)
    above.set_title("gradient norm before clipping (the largest of each column; black: not finite)", loc="left", fontsize=10)
    picture = _map(below, found, times, list(rows), cmap="RdBu_r", norm=LogNorm(1e-2, 1e2))
    figure.colorbar(picture, ax=below, **bar).set_label("times usual", fontsize=8)
    below.set_title("against each layer's usual level, the median of 50 steps before", loc="left", fontsize=10)
    below.set_xlabel("step", fontsize=9)
    for axes, color in ((above, "white"), (below, BLACK)):
        _skipped(axes, found, color)
    return figure


def module_norms(run: Run | str | os.PathLike, layers: Layers = None) -> Figure:
    """Gradient norm of each module (or chosen layer) by step in a panel of its own, its usual level, and where it left it."""
    run = opened(run)
    if (found := _read(run)) is None:
        return empty(run, "gradients", "no epoch of gradients is on disk yet")
    rows, seen = found.select(layers), episodes(found)
    rows = dict(list(rows.items())[:24])  # more panels than that nobody looks through
    norms = np.stack([found.of(places) for places in rows.values()], axis=1)
    level = levels(norms)[0]
    columns = min(3, len(rows))
    depth = -(-len(rows) // columns)
    figure = titled(run, "gradient norm by module", height=0.9 + 1.45 * depth + 0.3)
    panels = figure.subplots(depth, columns, sharex=True, squeeze=False).ravel()
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    for i, (name, axes) in enumerate(zip(rows, panels)):
        blamed = any(e.module == name for e in seen[:1])
        axes.set_yscale("log")
        values = np.where(np.isfinite(norms[:, i]) & (norms[:, i] > 0), norms[:, i], np.nan)
        axes.plot(found.steps, values, color=VERMILLION if blamed else BLUE, linewidth=1.0)
        axes.plot(found.steps, 10 ** level[:, i], color=BLACK, linewidth=0.9, linestyle="--")
        lost = found.steps[~np.isfinite(norms[:, i])]
        axes.plot(lost, [0.95] * len(lost), "x", color=BLACK, markersize=4, transform=axes.get_xaxis_transform(), gid="nonfinite")
        for e in seen:
            if e.module == name:
                axes.axvspan(e.first - 0.5, e.last + 0.5, color=ORANGE, alpha=0.3, linewidth=0, gid="episode")
        style_axes(axes, name, "step" if i + columns >= len(rows) else "", "L2 norm" if i % columns == 0 else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.tick_params(labelbottom=i + columns >= len(rows))  # where no panel is below
    handles = [panels[0].lines[0], panels[0].lines[1]]
    figure.legend(handles, ["gradient norm", "usual level"], loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def updates(run: Run | str | os.PathLike, layers: Layers = None) -> Figure:
    """Adam's update against the weight by epoch, a line a layer, with the usual 1e-3; and the last epoch's, a dot a parameter."""
    run = opened(run)
    found = _read(run)
    if found is None or not found.looks:
        return empty(run, "update-to-weight ratio", "no whole epoch of gradients is on disk yet")
    rows = found.select(layers)
    epochs = sorted(found.looks)
    figure = titled(run, "update-to-weight ratio", height=max(3.2, 0.19 * len(rows) + 1.3))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    table = np.array([[_ratio(found, epoch, places) for epoch in epochs] for places in rows.values()])
    left.set_yscale("log")
    told: set[str] = set()  # a module's name stands in the legend once
    for name, values in zip(rows, table):
        module = name.split(".")[0]
        label = module if module in MODULES else "the rest"
        style = dict(linewidth=1.5, marker="o", markersize=3, label=None if label in told else label)
        left.plot(epochs, values, color=MODULES.get(module, GREY), **style)
        told.add(label)
    last = found.looks[epochs[-1]]["update_ratios"]
    right.set_xscale("log")
    for y, places in enumerate(rows.values()):
        right.plot(last[places], np.full(len(places), y), "o", color=BLUE, markersize=3.5, alpha=0.6, markeredgewidth=0)
    right.plot(table[:, -1], range(len(rows)), "|", color=BLACK, markersize=9, markeredgewidth=1.6)
    for axes, draw in ((left, left.axhline), (right, right.axvline)):
        draw(USUAL_UPDATE, color=GREEN, linewidth=1.2, linestyle="--", gid="usual")
    style_axes(left, "by epoch", "epoch", "|update| / |weight|", whole=True)
    legend(left)
    style_axes(right, f"epoch {epochs[-1]}, a dot a parameter, a bar the whole", "|update| / |weight|", "")
    right.set_yticks(range(len(rows)), list(rows), fontsize=8)
    right.invert_yaxis()
    right.xaxis.set_major_locator(LogLocator(numticks=8))
    return figure


def distributions(run: Run | str | os.PathLike, epoch: int | None = None) -> Figure:
    """Magnitudes of weights and gradients in each module: share of the elements by power of ten."""
    run = opened(run)
    found = _read(run)
    if found is None or not found.looks:
        return empty(run, "distributions", "no whole epoch of gradients is on disk yet")
    epoch, look = _look(found, epoch)
    columns = 4
    depth = -(-len(found.modules) // columns)
    figure = titled(run, f"magnitudes of weights and of the last step's gradients, epoch {epoch}", height=0.9 + 1.35 * depth)
    panels = figure.subplots(depth, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(found.modules) :]:
        axes.set_axis_off()
    edges = look["edges"]
    for i, (name, axes) in enumerate(zip(found.modules, panels)):
        for kind, color in (("gradient", VERMILLION), ("weight", BLUE)):
            counts = look[f"{kind}_counts"][i]
            share = 100 * counts[1:-1] / max(1, counts.sum())
            axes.stairs(share, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(share, edges, color=color, linewidth=1.2, label=f"{kind}s")
            if counts[-1]:
                axes.annotate(f"{counts[-1]} {kind}s\nnot finite", (0.97, 0.9), xycoords="axes fraction", ha="right", va="top", fontsize=7)
        lowest = i + columns >= len(found.modules)
        style_axes(axes, name, "magnitude, power of 10" if lowest else "", "% of elements" if i % columns == 0 else "")
        axes.tick_params(labelbottom=lowest)
    panels[0].set_xlim(-12, 2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def term_shares(run: Run | str | os.PathLike, epoch: int | None = None) -> Figure:
    """Share of each loss term in each module's gradient, on one fixed training batch."""
    run = opened(run)
    found = _read(run)
    if found is None or not found.looks:
        return empty(run, "loss terms", "no whole epoch of gradients is on disk yet")
    epoch, _ = _look(found, epoch)
    shares = 100 * found.shares(epoch)
    figure = titled(run, f"whose gradient it is: loss terms in each module, epoch {epoch}", height=1.35 + 0.24 * len(found.modules))
    axes = figure.subplots()
    start = np.zeros(len(found.modules))
    for name, share in zip(found.terms, np.nan_to_num(shares)):
        style = dict(color=LOSSES.get(name, GREY), edgecolor="white", linewidth=0.6)
        axes.barh(found.modules, share, left=start, label=LOSS_NAMES.get(name, name), **style)
        for y, (x, width) in enumerate(zip(start, share)):
            if width >= 8:
                dark = name in ("ce", "distance")
                place = dict(ha="center", va="center", fontsize=8, color="white" if dark else BLACK)
                axes.text(x + width / 2, y, f"{width:.0f}", **place)
        start += share
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("% of the sum of the terms' gradient norms", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(found.terms), fontsize=8, frameon=False)
    return figure


def episodes_table(seen: Sequence[Episode], most: int = 10) -> str:
    """Episodes as a Markdown table, the worst first."""
    lines = ["| module | steps | gradient norm | usual | times | most in | loss term |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for e in seen[:most]:
        span = str(e.first) if e.first == e.last else f"{e.first} to {e.last} ({e.count} far off)"
        norm, times = (f"{e.norm:.3g}", rounded(e.times)) if np.isfinite(e.norm) else ("not finite", "")
        term = "" if e.term is None else f"{e.term}, {e.share:.0%}"
        lines.append(f"| {e.module} | {span} | {norm} | {e.usual:.3g} | {times} | `{e.parameter}` | {term} |")
    return "\n".join(lines) if seen else "No module left its usual level."


# -- helpers ---------------------------------------------------------------------------------------
def _read(run: Run) -> Gradients | None:
    try:
        return read(run)
    except RunError:
        return None


def _look(found: Gradients, epoch: int | None) -> tuple[int, dict[str, np.ndarray]]:
    if epoch is not None and epoch not in found.looks:
        raise ValueError(f"there is no look at epoch {epoch}; there are {', '.join(map(str, sorted(found.looks)))}")
    epoch = epoch or max(found.looks)
    return epoch, found.looks[epoch]


def _ratio(found: Gradients, epoch: int, places: np.ndarray) -> float:
    """Length of a layer's update over that of its weights."""
    look = found.looks[epoch]
    weights, ratios = look["weight_norms"][places].astype(np.float64), look["update_ratios"][places]
    known = np.isfinite(ratios)
    whole = np.sqrt((weights[known] ** 2).sum())
    return float(np.sqrt(((ratios * weights)[known] ** 2).sum()) / whole) if whole > 0 else float("nan")


def _map(axes: Axes, found: Gradients, values: np.ndarray, names: list[str], *, cmap: str, norm: LogNorm):
    """A heat map, the largest value of the steps that share a column; what is not finite is black."""
    count = values.shape[1]
    starts = np.unique(np.linspace(0, count, min(COLUMNS, count) + 1)[:-1].astype(int))
    clean = np.where(np.isfinite(values), values, -np.inf)
    table = np.maximum.reduceat(clean, starts, axis=1)
    lost = np.maximum.reduceat(~np.isfinite(values), starts, axis=1)
    x = np.append(found.steps[starts] - 0.5, found.steps[-1] + 0.5)
    y = np.arange(len(names) + 1) - 0.5
    colors = matplotlib.colormaps[cmap].with_extremes(bad="black")
    picture = axes.pcolormesh(x, y, np.ma.masked_array(np.maximum(table, 1e-38), mask=lost), cmap=colors, norm=norm, rasterized=True)
    axes.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 40 else 6)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    return picture


def _skipped(axes: Axes, found: Gradients, color: str) -> None:
    steps = found.steps[found.skipped]
    if len(steps):
        place = dict(transform=axes.get_xaxis_transform(), clip_on=False, gid="skips")
        axes.plot(steps, np.full(len(steps), 0.02), "^", color=VERMILLION, markeredgecolor=color, markersize=6, **place)
