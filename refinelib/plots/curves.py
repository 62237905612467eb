"""Curves and numbers of a run, drawn from its folder on disk.

Every function takes a :class:`~refinelib.runs.Run`, a run's name or its folder, and returns a figure
that shows itself at the end of a notebook cell. A run that is still going is drawn so far; a value
that was not finite is a gap in its line and a cross at the panel's upper edge.
"""

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


def curves(run: RunLike, *panels: str) -> Figure:
    """A figure with some of the panels in ``PANELS``; by default an overview of four."""
    names, run = panels or ("losses", "gradient norm", "learning rate", "scores"), style.opened(run)
    rows = len(names) // 2 if len(names) > 2 else 1
    figure = style.run_figure(run, ", ".join(panels) or "overview", 3.0 * rows + 1.2)
    for name, axes in zip(names, figure.subplots(rows, len(names) // rows, squeeze=False).flat, strict=True):
        PANELS[name](axes, run)
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


def _metrics() -> list[tuple[str, str, str, str]]:
    """Name, title, unit and better direction of the metrics: mIoU of all pixels, and those registered."""
    found = [(name, m.title, m.unit, "more" if m.higher_is_better else "less") for name, m in METRICS.items()]
    return [("miou", "mIoU", "", "more"), *found]


# -- panels ----------------------------------------------------------------------------------------
def loss_panel(axes: Axes, run: Run) -> None:
    """Total loss by window of steps and by epoch, and its parts times their weights."""
    settings, steps, epochs = style.recorded_settings(run), run.steps(), run.epochs()
    x = [line["step"] for line in steps]
    axes.set_yscale("log")
    for name in dict.fromkeys(name for line in steps for name in line["losses"]):
        weight = settings.get(f"{name}_weight", 1.0)
        parts = [line["losses"].get(name) for line in steps]
        values = [None if part is None else part * weight for part in parts]
        look = {"label": style.words(name), "linewidth": 1, "markersize": 0}
        draw_line(axes, x, values, style.loss_color(name), **look)
    draw_line(axes, x, [line["loss"] for line in steps], BLACK, linewidth=1, alpha=0.5, label="total")
    ends = itertools.pairwise([0, *(line["step"] for line in epochs)])
    middles = [(a + b) / 2 for a, b in ends]
    draw_line(axes, middles, [line["train_loss"] for line in epochs], BLACK, label="total by epoch")
    _mark_skips(axes, run)
    style.style_axes(axes, "training loss and its parts, each times its weight", "step", "loss")
    style.legend(axes)


def gradient_panel(axes: Axes, run: Run) -> None:
    """Mean and largest gradient norm of each window of steps, against the levels to look out for."""
    axes.set_yscale("log")
    axes.margins(y=0.15)
    _by_step(axes, run, "grad_norm_max", style.PURPLE, linewidth=1, label="largest")
    _by_step(axes, run, "grad_norm", BLACK, label="mean")
    for name, color in NORM_LINES.items():
        axes.axhline(float(name.split(":")[0]), color=color, linestyle="--", gid="limit", label=name)
    if clip := style.recorded_settings(run).get("grad_clip"):
        axes.axhline(clip, color=style.GREY, linestyle=":", gid="limit", label=f"clip, {clip:g}")
    _mark_skips(axes, run)
    style.style_axes(axes, "gradient norm before clipping, by window of steps", "step", "L2 norm")
    style.legend(axes)


def learning_rate_panel(axes: Axes, run: Run) -> None:
    """Learning rate by step, and under fp16 the loss scale on an axis at the right."""
    _by_step(axes, run, "lr", BLUE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    style.style_axes(axes, "learning rate", "step", "learning rate")
    if style.recorded_settings(run).get("amp") == "fp16":
        right = axes.twinx()
        right.set_yscale("log", base=2)
        right.set_ylabel("fp16 loss scale (green)", fontsize=9)
        _by_step(right, run, "loss_scale", GREEN, drawstyle="steps-post")


def score_panel(axes: Axes, run: Run) -> None:
    """Scores between 0 and 1 of every validation; the star is the epoch in ``checkpoints/best.pt``."""
    epochs = run.validations()
    x = [line["epoch"] for line in epochs]
    always = set.intersection(*(set(line["metrics"]) for line in epochs)) if epochs else set()
    shares = [one for one in _metrics() if one[0] in always and not one[2]]
    for (name, title, *_), color in zip(shares, (BLACK, *style.PALETTE), strict=False):
        draw_line(axes, x, [line["metrics"][name] for line in epochs], color, label=title)
    scores = [line["metrics"].get("target_iou") or 0.0 for line in epochs]
    if any(scores):
        at = x[scores.index(max(scores))], max(scores)  # the first of equals, as the trainer keeps it
        axes.plot(*at, "*", markersize=13, color=VERMILLION, markeredgecolor="white", zorder=5)
        side = "left" if at[0] == x[0] else "right" if at[0] == x[-1] else "center"
        paper: dict[str, Any] = {"fc": "white", "ec": "none", "pad": 1}
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": side, "bbox": paper}
        axes.annotate(f"best {at[1]:.3f}", at, (0, 9), **look)
    axes.set_ylim(0, 1)
    axes.margins(x=0.08)
    style.style_axes(axes, "scores on the validation instances", "epoch", "0 to 1")
    style.legend(axes)


def _by_step(axes: Axes, run: Run, key: str, color: str, **look: Any) -> None:
    steps = run.steps()
    x = [line["step"] for line in steps]
    draw_line(axes, x, [line.get(key) for line in steps], color, **look)


def _mark_skips(axes: Axes, run: Run) -> None:
    """A triangle at the foot of the panel at every skipped step on record."""
    skips = [e for e in run.events() if e.get("skipped") or "skip" in (e["kind"], e.get("of"))]
    steps = [event["step"] for event in skips if "step" in event]
    style.mark(axes, sorted(steps), 0.025, "^", color=VERMILLION, label="skipped", gid="skips")


PANELS: dict[str, Callable[[Axes, Run], None]] = {
    "losses": loss_panel,
    "gradient norm": gradient_panel,
    "learning rate": learning_rate_panel,
    "scores": score_panel,
}
