"""What every figure has in common: colours, titles, axes, legends, tables, and how it is saved."""

import io
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from refinelib.files import replacing
from refinelib.registry import LOSSES
from refinelib.runs import Run, RunError

# Okabe & Ito, "Color Universal Design", 2008.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, SKY, PURPLE, VERMILLION, YELLOW, GREY)
#: One colour a class, by label, and one a kind of wrong pixel.
CLASSES = {"background": GREY, "target": BLUE, "other people": ORANGE}
ERRORS = {"missed": VERMILLION, "too much": SKY, "other people or background": YELLOW}
WIDTH, DPI = 10.0, 100  # inches, pixels an inch

RunLike = Run | str | os.PathLike[str]
Floats = Sequence[float] | NDArray[Any]


class Figure(_Figure):
    """A matplotlib figure that a notebook shows once, without pyplot's list of open figures."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save(place: RunLike, figure: Figure, name: str) -> Figure:
    """Write ``figures/<name>.png`` in the folder of a run or any other; returns the figure, to be shown."""
    folder = Path(place.folder if isinstance(place, Run) else place) / "figures"
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


# -- names and colours -----------------------------------------------------------------------------
def words(name: str) -> str:
    """A loss's name as a heading says it."""
    return {"ce": "cross-entropy", "dice": "Dice"}.get(name, name.replace("_", " "))


def loss_color(name: str) -> str:
    """One colour a loss, by its place in the registry."""
    names = list(LOSSES)
    return PALETTE[names.index(name) % len(PALETTE)] if name in names else GREY


# -- figures ---------------------------------------------------------------------------------------
def new_figure(title: str, height: float = 1.0, *, alarm: bool = False) -> Figure:
    """An empty figure with its title; ``alarm`` makes the title orange-red."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    color = VERMILLION if alarm else BLACK
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color)
    return figure


def run_figure(run: Run, what: str, height: float = 1.0) -> Figure:
    """An empty figure that says what it shows, of which run, and how that run stands."""
    status = run.status()
    state = status.get("state", "unknown")
    done = f"epoch {status.get('epoch', 0)} of {status.get('epochs', '?')}"
    done += f", {status['skipped_steps']} steps skipped" if status.get("skipped_steps") else ""
    return new_figure(f"{run.name}: {what}   [{state}, {done}]", height, alarm=state not in ("ok", "running"))


def message(title: str, text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(title, 1.6)
    figure.text(0.5, 0.45, text, ha="center", va="center", fontsize=10, wrap=True)
    return figure


# -- axes ------------------------------------------------------------------------------------------
def draw_line(axes: Axes, x: Floats, values: Sequence[float | None], color: str, **look: Any) -> None:
    """A line with gaps where a value is none, and a cross at the panel's upper edge there."""
    y = np.array([np.nan if value is None else value for value in values], dtype=float)
    # A marker at every point: a lone point between two gaps would not show.
    size = 2.0 if len(x) > 40 else 4.5
    axes.plot(x, y, color=color, **{"linewidth": 1.5, "marker": "o", "markersize": size, **look})
    lost = np.asarray(x)[~np.isfinite(y)]
    mark(axes, lost, 0.96, "x", color=BLACK, label="not finite", gid="nonfinite")


def mark(axes: Axes, x: Floats, height: float, marker: str, **look: Any) -> None:
    """Markers at one height of the panel, 0 at its foot and 1 at its top."""
    if len(x):
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False, **look}
        axes.plot(x, np.full(len(x), height), marker, markersize=5, **place)


def style_axes(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title, labels, ticks and grid as in every panel; says so where a panel is empty."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_yscale() == "log" and not np.isfinite(axes.dataLim.minposy):
        axes.set_yscale("linear")  # a logarithmic axis without a positive value has no place for anything
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        few = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
        axes.yaxis.set_major_locator(few if high > 5 * low else MaxNLocator(nbins=5))
    if x.startswith(("step", "epoch")):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if not np.isfinite(axes.dataLim.intervaly).all():
        text = "no finite value" if np.isfinite(axes.dataLim.intervalx).all() else "nothing recorded yet"
        axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, fontsize=9)
        axes.set_yticks([])


def legend(axes: Axes) -> None:
    """A legend between title and panel, where it hides no line; each name once."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    columns = 6 if axes.get_position().width > 0.5 else 3
    look: dict[str, Any] = {"loc": "lower left", "borderaxespad": 0.1, "fontsize": 8, "frameon": False}
    place = {"bbox_to_anchor": (-0.01, 0.985), "ncols": columns, **look}
    axes.legend(list(entries.values()), list(entries), **place).set_in_layout(False)
    pad = 6 + 13 * -(-len(entries) // columns)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=10, pad=pad)


def figure_legend(figure: Figure, handles: Sequence[Any] = ()) -> None:
    """A legend below all panels; without handles: what is labelled in any of them, each name once."""
    named = [zip(*axes.get_legend_handles_labels()[::-1], strict=True) for axes in figure.axes]
    handles = handles or list(dict(itertools.chain(*named)).values())
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8, frameon=False)


# -- reading ---------------------------------------------------------------------------------------
def opened(run: RunLike) -> Run:
    """The run itself, from its name or folder."""
    return run if isinstance(run, Run) else Run.open(run)


def recorded_settings(run: Run) -> dict[str, Any]:
    """The settings as recorded; none in a run's first moments, or where they are damaged."""
    try:
        return dict(run.config()["settings"])
    except RunError:
        return {}
