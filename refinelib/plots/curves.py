"""Curves and numbers of a run, drawn from its folder on disk.

Every function takes a :class:`~refinelib.runs.Run`, a run's name or its folder, and returns a figure
that shows itself at the end of a notebook cell. A run that is still going is drawn so far; a value
that was not finite is a gap in its line and a cross at the panel's upper edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes

from refinelib.plots import style
from refinelib.plots.masks import rois as rois
from refinelib.plots.masks import sample_grid as sample_grid
from refinelib.plots.style import BLACK, BLUE, GREEN, VERMILLION, Figure, RunLike, draw_line
from refinelib.plots.style import save as save
from refinelib.registry import METRICS
from refinelib.runs import Run

#: Gradient norms to look out for.
NORM_LINES = {"10: usual": GREEN, "50: high": style.ORANGE, "100: unstable": VERMILLION}

#: Where a step stands on a panel's axis.
Place = Callable[[float], float]
Lines = list[dict[str, Any]]


def losses(run: RunLike) -> Figure:
    """The total loss and its parts, each times its weight."""
    return _one_panel(run, "losses", loss_panel)


def gradient_norm(run: RunLike) -> Figure:
    """L2 norm of the gradient before clipping: mean and largest of each window of steps."""
    return _one_panel(run, "gradient norm", gradient_panel)


def learning_rate(run: RunLike) -> Figure:
    """Learning rate by step, and under fp16 the loss scale."""
    return _one_panel(run, "learning rate", learning_rate_panel)


def ious(run: RunLike) -> Figure:
    """Scores of every validation on the left, the IoU of each class on the right."""
    run = style.opened(run)
    figure = style.run_figure(run, "validation", 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    score_panel(left, run)
    epochs = run.validations()
    for label, (name, color) in enumerate(style.CLASSES.items()):
        values = [(line["metrics"].get("iou") or [None] * 3)[label] for line in epochs]
        draw_line(right, [line["epoch"] for line in epochs], values, color, label=name)
    style.style_axes(right, "IoU of each class, pixels of all ROIs pooled", "epoch")
    style.legend(right)
    return figure


def overview(run: RunLike) -> Figure:
    """Losses times their weights, gradient norm, learning rate and scores on one page."""
    run = style.opened(run)
    figure = style.run_figure(run, "overview", 7.0)
    draw: list[Callable[[Axes, Run], None]] = [loss_panel, gradient_panel, learning_rate_panel, score_panel]
    for panel, axes in zip(draw, figure.subplots(2, 2).ravel(), strict=True):
        panel(axes, run)
    return figure


def metrics_table(run: RunLike) -> str:
    """Last and best validation as a Markdown table."""
    epochs = style.opened(run).validations()
    if not epochs:
        return "No epoch has been validated yet."
    best = max(epochs, key=lambda line: line["metrics"].get("target_iou") or -1.0)
    rows = []
    for name, title, unit, better in _metrics():
        values = [line["metrics"].get(name) for line in (epochs[-1], best)]
        cells = [None if value is None else f"{value:.3f}" for value in values]
        rows += [[title, *cells, unit, better]] if any(cells) else []
    heads = [f"last (epoch {epochs[-1]['epoch']})", f"best (epoch {best['epoch']})"]
    return style.table(rows, ["", *heads, "unit", "better is"])


# -- panels ----------------------------------------------------------------------------------------
def _one_panel(run: RunLike, what: str, panel: Callable[[Axes, Run], None]) -> Figure:
    figure = style.run_figure(style.opened(run), what, 4.4)
    panel(figure.add_subplot(), style.opened(run))
    return figure


def loss_panel(axes: Axes, run: Run, place: Place = float) -> None:
    """Total loss by window of steps and by epoch, and its parts times their weights, at ``place(step)``."""
    settings, ends = style.recorded_settings(run), [0, *(line["step"] for line in run.epochs())]
    parts = [{"step": line["step"], **line["losses"]} for line in run.steps()]
    axes.set_yscale("log")
    for name in dict.fromkeys(name for line in run.steps() for name in line["losses"]):
        look = {"label": style.words(name), "linewidth": 1, "markersize": 0}
        weight = settings.get(f"{name}_weight", 1.0)
        _by_step(axes, parts, name, style.loss_color(name), place, weight, **look)
    _by_step(axes, run.steps(), "loss", BLACK, place, linewidth=1, alpha=0.5, label="total")
    middles = [place((start + end) / 2) for start, end in itertools.pairwise(ends)]
    draw_line(axes, middles, [line["train_loss"] for line in run.epochs()], BLACK, label="total by epoch")
    _mark_skips(axes, run, place)
    style.style_axes(axes, "training loss and its parts, each times its weight", "step", "loss")
    style.legend(axes)


def gradient_panel(axes: Axes, run: Run, place: Place = float) -> None:
    """Mean and largest gradient norm of each window of steps, against the levels to look out for."""
    axes.set_yscale("log")
    axes.margins(y=0.15)
    _by_step(axes, run.steps(), "grad_norm_max", style.PURPLE, place, linewidth=1, label="largest")
    _by_step(axes, run.steps(), "grad_norm", BLACK, place, label="mean")
    for name, color in NORM_LINES.items():
        axes.axhline(float(name.split(":")[0]), color=color, linestyle="--", gid="limit", label=name)
    if clip := style.recorded_settings(run).get("grad_clip"):
        axes.axhline(clip, color=style.GREY, linestyle=":", gid="limit", label=f"clip, {clip:g}")
    _mark_skips(axes, run, place)
    style.style_axes(axes, "gradient norm before clipping, by window of steps", "step", "L2 norm")
    style.legend(axes)


def learning_rate_panel(axes: Axes, run: Run) -> None:
    """Learning rate by step, and under fp16 the loss scale on an axis at the right."""
    _by_step(axes, run.steps(), "lr", BLUE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    style.style_axes(axes, "learning rate", "step", "learning rate")
    if style.recorded_settings(run).get("amp") == "fp16":
        right = axes.twinx()
        right.set_yscale("log", base=2)
        right.set_ylabel("fp16 loss scale (green)", fontsize=9)
        right.tick_params(labelsize=8)
        _by_step(right, run.steps(), "loss_scale", GREEN, drawstyle="steps-post")


def score_panel(axes: Axes, run: Run, offset: float = 0.0) -> None:
    """Scores between 0 and 1 of every validation; the star is the epoch in ``checkpoints/best.pt``."""
    epochs = run.validations()
    x = [offset + line["epoch"] for line in epochs]
    always = set.intersection(*(set(line["metrics"]) for line in epochs)) if epochs else set()
    shares = [one for one in _metrics() if one[0] in always and not one[2]]
    for (name, title, *_), color in zip(shares, (BLACK, *style.PALETTE), strict=False):
        draw_line(axes, x, [line["metrics"][name] for line in epochs], color, label=title)
    scores = [line["metrics"].get("target_iou") or 0.0 for line in epochs]
    if any(scores):
        at = x[scores.index(max(scores))], max(scores)  # the first of equals, as the trainer keeps it
        axes.plot(*at, "*", markersize=13, color=VERMILLION, markeredgecolor="white", zorder=5)
        axes.annotate(f"best {at[1]:.3f}", at, (0, 9), textcoords="offset points", fontsize=8, ha="center")
    axes.set_ylim(0, 1)
    axes.margins(x=0.08)
    style.style_axes(axes, "scores on the validation instances", "epoch", "0 to 1")
    style.legend(axes)


def _metrics() -> list[tuple[str, str, str, str]]:
    """Name, title, unit and better direction of the metrics: mIoU of all pixels, and those registered."""
    found = [(name, m.title, m.unit, "more" if m.higher_is_better else "less") for name, m in METRICS.items()]
    return [("miou", "mIoU", "", "more"), *found]


def _by_step(
    axes: Axes, lines: Lines, key: str, color: str, place: Place = float, weight: float = 1.0, **look: Any
) -> None:
    """The values under ``key`` by step, times ``weight``."""
    values = [None if line.get(key) is None else line[key] * weight for line in lines]
    draw_line(axes, [place(line["step"]) for line in lines], values, color, **look)


def _mark_skips(axes: Axes, run: Run, place: Place) -> None:
    """A triangle at the foot of the panel at every skipped step on record."""
    spikes = [event for event in run.events() if event["kind"] == "spike" and event.get("skipped")]
    skips = [event for event in run.events() if "skip" in (event["kind"], event.get("of"))]
    steps = sorted(place(event["step"]) for event in spikes + skips if "step" in event)
    style.mark(axes, steps, 0.025, "^", color=VERMILLION, label="skipped", gid="skips")
