"""Figures of a run's gradients, drawn from what its probe left on disk.

Those of an epoch's end (updates, distributions, term_shares) need ``found.epoch_statistics`` of one.
"""

from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from refinelib.gradients import Episode, Gradients, episodes, levels, rounded
from refinelib.plots import style
from refinelib.plots.style import BLACK, BLUE, GREEN, ORANGE, VERMILLION, Figure
from refinelib.runs import Run

#: Columns of a heat map, at most: more cannot be told apart at a notebook's width.
COLUMNS = 360
#: The usual size of an update against its weight.
USUAL_UPDATE = 1e-3

Layers = str | Sequence[str] | None  # see refinelib.gradients.Gradients.select


def heat(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Gradient norm by layer and step, and below it how many times its usual level each was."""
    rows = found.select(layers)
    norms = np.stack([found.of(places) for places in rows.values()])
    level = levels(norms.T)[0].T
    with np.errstate(divide="ignore", invalid="ignore"):  # without a level yet, a norm counts as usual
        times = np.where(np.isnan(level) & np.isfinite(norms), 1.0, norms / 10**level)
    positive = norms[np.isfinite(norms) & (norms > 0)]
    low, high = np.percentile(positive, [2, 99.5]) if len(positive) else (0.1, 1.0)
    figure = style.run_figure(run, "gradient norm by layer and step", 2.4 + 0.34 * max(6, len(rows)))
    above, below = figure.subplots(2, 1, sharex=True)
    _heat_map(above, found, norms, "cividis", LogNorm(low, 1.01 * high))
    off = np.abs(np.log10(times[np.isfinite(times) & (times > 0)]))
    most = 10 ** max(1.0, float(off.max(initial=0.0)))  # the colours reach as far as the values
    _heat_map(below, found, times, "RdBu_r", LogNorm(1 / most, most))
    for axes in (above, below):
        axes.set_yticks(range(len(rows)), list(rows))
    style.style_axes(above, "L2 norm of the gradient before clipping (black: not finite)")
    style.style_axes(below, "times each layer's usual level, the median of 50 steps before", "step")
    if found.skipped.any():
        style.figure_legend(figure)
    return figure


def _heat_map(axes: Axes, found: Gradients, values: NDArray[Any], colors: str, norm: LogNorm) -> None:
    """The largest value of the steps that share a column; what is not finite is black."""
    steps = found.steps
    starts = np.unique(np.linspace(0, len(steps), min(COLUMNS, len(steps)), endpoint=False).astype(int))
    values = np.where(np.isfinite(values), np.maximum(values, 1e-38), np.nan)
    cells = np.maximum.reduceat(values, starts, axis=1)
    x, y = np.append(steps[starts], steps[-1] + 1) - 0.5, np.arange(len(values) + 1) - 0.5
    cmap = matplotlib.colormaps[colors].with_extremes(bad="black")
    picture = axes.pcolormesh(x, y, cells, cmap=cmap, norm=norm, rasterized=True)
    axes.figure.colorbar(picture, ax=axes, pad=0.01, aspect=12)
    look = {"color": VERMILLION, "mec": "white", "gid": "skips", "label": "skipped"}
    style.mark(axes, steps[found.skipped], 0.02, "^", **look)
    axes.invert_yaxis()


def module_norms(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Gradient norm of each module (or chosen layer) by step, its usual level, and where it left it."""
    seen = episodes(found)
    rows = dict(list(found.select(layers).items())[:24])  # nobody looks through more panels
    norms = np.stack([found.of(places) for places in rows.values()], axis=1)
    usual = 10 ** levels(norms)[0]
    figure, grid = _panels(run, "L2 norm of the gradient by module and step", rows, 3)
    for i, (name, axes) in enumerate(zip(rows, grid, strict=False)):
        axes.set_yscale("log", nonpositive="mask")
        cause = bool(seen) and seen[0].module == name
        color, label = (VERMILLION, "of the worst module") if cause else (BLUE, "gradient norm")
        style.draw_line(axes, found.steps, norms[:, i].tolist(), color, marker="", label=label)
        axes.plot(found.steps, usual[:, i], "--", color=BLACK, linewidth=0.9, label="usual level")
        for e in seen:
            if e.module == name:
                look: dict[str, Any] = {"color": ORANGE, "alpha": 0.3, "linewidth": 0, "gid": "episode"}
                axes.axvspan(e.first - 0.5, e.last + 0.5, label="unstable", **look)
        style.style_axes(axes, name)
    style.figure_legend(figure)
    return figure


def updates(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Length of Adam's update over that of the weight, in the last epoch and those before it."""
    rows, epoch = found.select(layers), max(found.epoch_statistics)
    recorded = [statistics for _, statistics in sorted(found.epoch_statistics.items())]
    ratios = np.stack([one["update_ratios"] for one in recorded]).astype(float)  # [epochs, parameters]
    weights = np.stack([one["weight_norms"] for one in recorded]).astype(float) ** 2
    weights = np.where(np.isfinite(ratios), weights, 0.0)
    figure = style.run_figure(run, "update-to-weight ratio", max(3.2, 0.19 * len(rows) + 1.3))
    axes = figure.subplots()
    axes.set_xscale("log")
    for y, places in enumerate(rows.values()):
        lengths = weights[:, places].sum(1)
        moved = np.nansum(weights[:, places] * ratios[:, places] ** 2, 1)
        row = np.sqrt(moved / np.where(lengths, lengths, np.nan))
        axes.plot(ratios[-1, places], np.full(len(places), y), "o", color=BLUE, markersize=3, alpha=0.6)
        axes.plot(row[:-1], np.full(len(row) - 1, y), "|", color=style.GREY, markersize=9)
        axes.plot(row[-1:], [y], "|", color=BLACK, markersize=11, markeredgewidth=2)
    axes.axvline(USUAL_UPDATE, color=GREEN, linestyle="--", gid="usual")
    title = f"epoch {epoch}: a dot a parameter, a black bar the row; grey bars: the row in earlier epochs"
    style.style_axes(axes, title, "|update| / |weight|")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    return figure


def distributions(run: Run, found: Gradients) -> Figure:
    """Magnitudes of weights and gradients in each module: share of the elements by power of ten."""
    epoch = max(found.epoch_statistics)
    last = found.epoch_statistics[epoch]
    title = f"% of the weights and gradients by magnitude (power of 10), epoch {epoch}"
    figure, grid = _panels(run, title, found.modules, 4)
    for i, (name, axes) in enumerate(zip(found.modules, grid, strict=False)):
        for kind, color in (("gradient", VERMILLION), ("weight", BLUE)):
            counts = last[f"{kind}_counts"][i]
            shares, lost = 100 * counts[1:-1] / max(1, counts.sum()), counts[-1]
            axes.stairs(shares, last["edges"], color=color, fill=True, alpha=0.4, label=f"{kind}s")
            name += f", {lost} {kind}s not finite" if lost else ""
        axes.set_xlim(-12, 2)
        style.style_axes(axes, name)
    style.figure_legend(figure)
    return figure


def term_shares(run: Run, found: Gradients) -> Figure:
    """Share of each loss in each module's gradient, on one fixed training batch."""
    epoch = max(found.epoch_statistics)
    title = f"share of each loss in the gradient of each module, epoch {epoch}"
    figure = style.run_figure(run, title, 1.35 + 0.24 * len(found.modules))
    axes, start = figure.subplots(), np.zeros(len(found.modules))
    for name, shares in zip(found.terms, np.nan_to_num(100 * found.shares(epoch)), strict=True):
        color, label = style.loss_color(name), style.words(name)
        bars = axes.barh(found.modules, shares, left=start, color=color, label=label)
        axes.bar_label(bars, [f"{s:.0f}" if s >= 8 else "" for s in shares], label_type="center", fontsize=8)
        start += shares
    style.style_axes(axes, "", "% of the sum of the losses' gradient norms")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    style.figure_legend(figure)
    return figure


def episodes_table(seen: Sequence[Episode]) -> str:
    """The ten worst episodes as a Markdown table, the worst first."""
    rows = []
    for e in seen[:10]:
        span = str(e.first) if e.first == e.last else f"{e.first} to {e.last} ({e.count} far off)"
        norm, times = (f"{e.norm:.3g}", rounded(e.times)) if np.isfinite(e.norm) else ("not finite", "")
        term = "" if e.term is None else f"{e.term}, {e.share:.0%}"
        rows.append([e.module, span, norm, f"{e.usual:.3g}", times, f"`{e.parameter}`", term])
    heads = ["module", "steps", "gradient norm", "usual", "times", "most in", "loss"]
    return style.table(rows, heads) if rows else "No module left its usual level."


def _panels(run: Run, title: str, names: Collection[str], columns: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a small panel a name."""
    depth = -(-len(names) // columns)
    figure = style.run_figure(run, title, 1.0 + 1.45 * depth)
    grid = list(figure.subplots(depth, columns, sharex=True, squeeze=False).flat)
    for i, axes in enumerate(grid):
        axes.tick_params(labelbottom=i + columns >= len(names))
        axes.set_visible(i < len(names))
    return figure, grid
