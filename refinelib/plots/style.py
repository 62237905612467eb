"""What every figure of a run has in common: colours, sizes, titles, axes, legends, and how it is saved."""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from refinelib.files import replacing
from refinelib.runs import Run, RunError

# Okabe & Ito, "Color Universal Design", 2008.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"

#: One colour a class, by label.
CLASSES = {"background": GREY, "target": BLUE, "other people": ORANGE}
#: One colour a loss.
LOSSES = {
    "total": BLACK,
    "ce": BLUE,
    "dice": ORANGE,
    "active_contour": GREEN,
    "boundary_aware": SKY,
    "contour": PURPLE,
    "distance": VERMILLION,
}
LOSS_NAMES = {
    "ce": "cross-entropy",
    "dice": "Dice",
    "active_contour": "active contour",
    "boundary_aware": "boundary-aware",
}
#: One colour a validation metric.
METRICS = {"target_iou": BLUE, "boundary_iou": GREEN, "miou": BLACK}
METRIC_NAMES = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU", "miou": "mIoU"}
#: One colour a kind of wrong pixel.
ERRORS = {"missed": VERMILLION, "too much": SKY, "other people or background": YELLOW}
#: Gradient norms to look out for.
NORM_LINES = {10: (GREEN, "10: usual"), 50: (ORANGE, "50: high"), 100: (VERMILLION, "100: unstable")}

WIDTH = 10.0  # inches, a notebook's
DPI = 100


class Figure(_Figure):
    """A matplotlib figure that a notebook shows once, without pyplot's list of open figures."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save(run: Run | str | os.PathLike, figure: _Figure, name: str) -> _Figure:
    """Write ``figures/<name>.png`` in the run's folder and return the figure, to be shown."""
    return save_in(opened(run).folder / "figures", figure, name)


def save_in(folder: Path, figure: _Figure, name: str) -> _Figure:
    """Write ``<name>.png`` in a folder in one step, and return the figure, to be shown."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.png", "wb") as file:
        figure.savefig(file, format="png", dpi=DPI)
    return figure


def table(rows: Iterable[Sequence[Any]], columns: Sequence[Any]) -> str:
    """A Markdown table; an empty cell for None.

    Example:
        >>> print(table([["stem", None], ["a|b", 3]], ["module", "count"]))
        | module | count |
        | --- | --- |
        | stem |  |
        | a/b | 3 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [["" if cell is None else str(cell).replace("|", "/") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# -- axes ------------------------------------------------------------------------------------------
def titled(run: Run, what: str, *, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure that says above what it shows, of which run, and how that run stands."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    if layout:
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    status = run.status()
    state, done, planned = status.get("state", "unknown"), status.get("epoch", 0), status.get("epochs")
    skipped = f", {status['skipped_steps']} steps skipped" if status.get("skipped_steps") else ""
    text = f"{run.name}: {what}   [{state}, epoch {done} of {planned or '?'}{skipped}]"
    color = BLACK if state in ("ok", "running") else VERMILLION
    place = {} if layout else dict(y=1 - 0.05 / height, va="top")  # a layout engine finds the height itself
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color, **place)
    return figure


def empty(run: Run, what: str, message: str) -> Figure:
    figure = titled(run, what, height=1.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", fontsize=11)
    return figure


def draw_line(
    axes: Axes, x: Sequence[float], values: Sequence[float | None], *, color: str, crosses: bool = True, **style: Any
) -> None:
    """A line with gaps where a value is none, and with ``crosses`` a cross at the upper edge there."""
    y = np.array([math.nan if value is None else value for value in values], dtype=float)
    alone = np.isfinite(y) & ~np.isfinite(np.r_[math.nan, y[:-1]]) & ~np.isfinite(np.r_[y[1:], math.nan])
    if "marker" not in style and alone.any():
        style["marker"], style["markevery"] = "o", np.flatnonzero(alone).tolist()
    crowded = len(x) > 40
    axes.plot(x, y, color=color, **{"linewidth": 1.5, "markersize": 2.5 if crowded else 4.5, **style})
    lost = [place for place, value in zip(x, y) if not math.isfinite(value)]
    if lost and crosses:
        place = dict(transform=axes.get_xaxis_transform(), clip_on=False, label="_", gid="nonfinite")
        axes.plot(lost, [0.96] * len(lost), "x", color=BLACK, markersize=3.5 if crowded else 6, **place)


def mark_skips(axes: Axes, run: Run) -> None:
    events = run.events()
    steps = [event["step"] for event in events if "step" in event and (event["kind"] == "skip" or (event["kind"] == "spike" and event.get("skipped")))]
    # Repeats within an epoch are told in one line, at the last of them.
    again = [event for event in events if event["kind"] == "again" and event.get("of") == "skip"]
    count = len(steps) + sum(event.get("count", 1) - 1 for event in again)
    steps += [event["step"] for event in again if "step" in event]
    if steps:
        place = dict(transform=axes.get_xaxis_transform(), label=f"skipped, {count}", gid="skips")
        axes.plot(steps, [0.025] * len(steps), "^", color=VERMILLION, markersize=5, **place)


def logarithmic_if_wide(axes: Axes, values: Sequence[float | None]) -> None:
    """Logarithmic where the values span more than a factor of 10."""
    finite = [value for value in values if value is not None]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")


def style_axes(axes: Axes, title: str, x: str, y: str, *, whole: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if whole:  # few epochs: room at both ends for their dots
        axes.margins(x=0.06)
    if not axes.patches and not any(line.get_gid() is None and len(line.get_xdata()) for line in axes.lines):
        place = dict(ha="center", va="center", transform=axes.transAxes)
        axes.text(0.5, 0.5, "nothing recorded yet", **place, fontsize=9, color="#555555")


def legend(axes: Axes) -> None:
    """Between title and panel, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    if any(line.get_gid() == "nonfinite" for line in axes.lines):
        handles, labels = [*handles, Line2D([], [], color=BLACK, marker="x", linestyle="")], [*labels, "not finite"]
    if handles:
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=10, pad=20)
        place = dict(loc="lower left", bbox_to_anchor=(-0.01, 0.985), borderaxespad=0.1, ncols=len(handles))
        spacing = dict(handlelength=1.5, columnspacing=1.1, handletextpad=0.5)
        axes.legend(handles, labels, **place, **spacing, fontsize=8, frameon=False)


def color_key(figure: Figure, colors: dict[str, str], **place: Any) -> None:
    entries = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in colors.items()]
    figure.legend(handles=entries, ncols=len(entries), fontsize=9, frameon=False, **place)


# -- reading ---------------------------------------------------------------------------------------
def opened(run: Run | str | os.PathLike) -> Run:
    return run if isinstance(run, Run) else Run.open(run)


def recorded_settings(run: Run) -> dict[str, Any]:
    """The settings as recorded; none in a run's first moments, or, with a warning, where they are damaged."""
    if not (run.folder / "config.json").is_file():
        return {}
    try:
        return run.config()["settings"]
    except RunError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
