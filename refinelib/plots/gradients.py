"""Figures of a run's gradients, drawn from what its probe left on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from refinelib.gradients.instability import Episode, episodes, levels, rounded
from refinelib.gradients.record import Gradients, read
from refinelib.plots import style
from refinelib.plots.style import BLACK, BLUE, GREEN, ORANGE, VERMILLION, Figure, RunLike
from refinelib.runs import Run, RunError

#: Columns of a heat map, at most: more cannot be told apart at a notebook's width.
COLUMNS = 360
#: The usual size of an update against its weight.
USUAL_UPDATE = 1e-3

Layers = str | Sequence[str] | None
P = ParamSpec("P")
Draw = Callable[Concatenate[Run, Gradients, P], Figure]
Panels = tuple[Figure, dict[str, Axes]]


def _from_disk(draw: Draw[P]) -> Callable[Concatenate[RunLike, P], Figure]:
    """Reads the gradients that ``draw`` needs; the figure says so where there are none yet."""

    def drawn(run: RunLike, /, *arguments: P.args, **keywords: P.kwargs) -> Figure:
        run = style.opened(run)
        try:
            return draw(run, read(run), *arguments, **keywords)
        except RunError as error:
            return style.message(run.name, str(error))

    return functools.update_wrapper(drawn, draw)


@_from_disk
def heat(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Gradient norm by layer and step, and below it how many times its usual level each was.

    ``layers`` are those of :meth:`refinelib.gradients.record.Gradients.select`.
    """
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
    _heat_map(below, found, times, "RdBu_r", LogNorm(1e-2, 1e2))
    for axes in (above, below):
        axes.set_yticks(range(len(rows)), list(rows))
    style.style_axes(above, "L2 norm of the gradient before clipping (black: not finite)")
    style.style_axes(below, "times each layer's usual level, the median of 50 steps before", "step")
    return figure


@_from_disk
def module_norms(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Gradient norm of each module (or chosen layer) by step, its usual level, and where it left it."""
    seen = episodes(found)
    rows = dict(list(found.select(layers).items())[:24])  # nobody looks through more panels
    norms = np.stack([found.of(places) for places in rows.values()], axis=1)
    usual = 10 ** levels(norms)[0]
    figure, panels = _panels(run, "L2 norm of the gradient by module and step", rows, 3)
    for i, (name, axes) in enumerate(panels.items()):
        axes.set_yscale("log", nonpositive="mask")
        color = VERMILLION if seen and seen[0].module == name else BLUE
        style.draw_line(axes, found.steps, norms[:, i].tolist(), color, marker="", label="gradient norm")
        axes.plot(found.steps, usual[:, i], "--", color=BLACK, linewidth=0.9, label="usual level")
        for e in (e for e in seen if e.module == name):
            axes.axvspan(e.first - 0.5, e.last + 0.5, color=ORANGE, alpha=0.3, linewidth=0, gid="episode")
        style.style_axes(axes, name)
    style.figure_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


@_from_disk
def updates(run: Run, found: Gradients, layers: Layers = None) -> Figure:
    """Length of Adam's update over that of the weight: by epoch, and for each parameter in the last one."""
    epoch, last = _statistics(found, None)
    rows, epochs = found.select(layers), sorted(found.epoch_statistics)
    recorded = [found.epoch_statistics[epoch] for epoch in epochs]
    ratios = np.array([[_ratio(one, places) for one in recorded] for places in rows.values()])
    figure = style.run_figure(run, "update-to-weight ratio", max(3.2, 0.19 * len(rows) + 1.3))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    left.set_yscale("log")
    right.set_xscale("log")
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(rows)))
    for y, (places, color) in enumerate(zip(rows.values(), colors, strict=True)):
        left.plot(epochs, ratios[y], "o-", color=color, markersize=3)
        right.plot(last["update_ratios"][places], np.full(len(places), y), "o", color=color, markersize=3)
    right.plot(ratios[:, -1], range(len(rows)), "|", color=BLACK, markersize=9, markeredgewidth=1.6)
    left.axhline(USUAL_UPDATE, color=GREEN, linestyle="--", gid="usual")
    right.axvline(USUAL_UPDATE, color=GREEN, linestyle="--", gid="usual")
    style.style_axes(left, "by epoch, in the colours of the rows", "epoch", "|update| / |weight|")
    style.style_axes(right, f"epoch {epoch}: a dot a parameter, a bar the row", "|update| / |weight|")
    right.set_yticks(range(len(rows)), list(rows), fontsize=8)
    right.invert_yaxis()
    return figure


@_from_disk
def distributions(run: Run, found: Gradients, epoch: int | None = None) -> Figure:
    """Magnitudes of weights and gradients in each module: share of the elements by power of ten."""
    epoch, last = _statistics(found, epoch)
    title = f"% of the weights and gradients by magnitude (power of 10), epoch {epoch}"
    figure, panels = _panels(run, title, found.modules, 4)
    for i, (name, axes) in enumerate(panels.items()):
        for kind, color in (("gradient", VERMILLION), ("weight", BLUE)):
            counts = last[f"{kind}_counts"][i]
            shares, lost = 100 * counts[1:-1] / max(1, counts.sum()), counts[-1]
            axes.stairs(shares, last["edges"], color=color, fill=True, alpha=0.4, label=f"{kind}s")
            name += f", {lost} {kind}s not finite" if lost else ""
        axes.set_xlim(-12, 2)
        style.style_axes(axes, name)
    style.figure_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


@_from_disk
def term_shares(run: Run, found: Gradients, epoch: int | None = None) -> Figure:
    """Share of each loss in each module's gradient, on one fixed training batch."""
    epoch, _ = _statistics(found, epoch)
    title = f"share of each loss in the gradient of each module, epoch {epoch}"
    figure = style.run_figure(run, title, 1.35 + 0.24 * len(found.modules))
    axes = figure.subplots()
    start = np.zeros(len(found.modules))
    for name, shares in zip(found.terms, np.nan_to_num(100 * found.shares(epoch)), strict=True):
        look: dict[str, Any] = {"color": style.loss_color(name), "label": style.words(name)}
        bars = axes.barh(found.modules, shares, left=start, **look)
        axes.bar_label(bars, [f"{s:.0f}" if s >= 8 else "" for s in shares], label_type="center", fontsize=8)
        start += shares
    style.style_axes(axes, "", "% of the sum of the losses' gradient norms")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    style.figure_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def episodes_table(seen: Sequence[Episode], most: int = 10) -> str:
    """Episodes as a Markdown table, the worst first."""
    rows = []
    for e in seen[:most]:
        span = str(e.first) if e.first == e.last else f"{e.first} to {e.last} ({e.count} far off)"
        norm, times = (f"{e.norm:.3g}", rounded(e.times)) if np.isfinite(e.norm) else ("not finite", "")
        term = "" if e.term is None else f"{e.term}, {e.share:.0%}"
        rows.append([e.module, span, norm, f"{e.usual:.3g}", times, f"`{e.parameter}`", term])
    heads = ["module", "steps", "gradient norm", "usual", "times", "most in", "loss"]
    return style.table(rows, heads) if rows else "No module left its usual level."


# -- helpers ---------------------------------------------------------------------------------------
def _statistics(found: Gradients, epoch: int | None) -> tuple[int, dict[str, NDArray[Any]]]:
    """The statistics of an epoch's end, and which it is; by default the last."""
    epoch = epoch or max(found.epoch_statistics, default=0)
    if epoch not in found.epoch_statistics:
        known = ", ".join(map(str, sorted(found.epoch_statistics))) or "none is on disk yet"
        raise RunError(f"there are no statistics of epoch {epoch}; whole epochs: {known}")
    return epoch, found.epoch_statistics[epoch]


def _ratio(statistics: dict[str, NDArray[Any]], places: NDArray[Any]) -> float:
    """Length of a layer's update over that of its weights."""
    weights, ratios = (
        statistics["weight_norms"][places].astype(np.float64),
        statistics["update_ratios"][places],
    )
    weights, ratios = weights[np.isfinite(ratios)], ratios[np.isfinite(ratios)]
    return float(np.linalg.norm(ratios * weights) / (np.linalg.norm(weights) or np.nan))


def _panels(run: Run, title: str, names: Collection[str], columns: int) -> Panels:
    """A figure with a small panel a name."""
    depth = -(-len(names) // columns)
    figure = style.run_figure(run, title, 1.0 + 1.45 * depth)
    grid = figure.subplots(depth, columns, sharex=True, squeeze=False).ravel()
    for i, axes in enumerate(grid):
        axes.tick_params(labelbottom=i + columns >= len(names))
        axes.set_visible(i < len(names))
    return figure, dict(zip(names, grid, strict=False))


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
    style.mark(axes, steps[found.skipped], 0.02, "^", color=VERMILLION, mec="white", gid="skips")
    axes.invert_yaxis()
