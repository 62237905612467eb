"""Runs side by side. Runs that differ in ``seed`` alone are a group, with one colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from refinelib.config import names_with_role
from refinelib.plots import style
from refinelib.plots.masks import same_rois
from refinelib.plots.style import BLACK, PALETTE, Figure
from refinelib.runs import Run

#: Key of an epoch's line or of its metrics, title, unit.
PANELS = [
    ("train_loss", "training loss", "loss"),
    ("grad_norm", "gradient norm before clipping, median of an epoch", "L2 norm"),
    ("target_iou", "target IoU on the validation instances", "IoU, 0 to 1"),
    ("boundary_iou", "boundary IoU on the validation instances", "IoU, 0 to 1"),
]


def names_of(runs: Sequence[Run]) -> list[str]:
    """What each run is called: its name, with its folder's where two have the same."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}" for run in runs
    ]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group, which is called by its first run and how many seeds it has."""
    apart = names_with_role("run") | {"seed"}
    alike: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in style.recorded_settings(run).items() if key not in apart}
        alike.setdefault(repr(sorted(settings.items())) if settings else str(run.folder), []).append(run)
    names = dict(zip((run.folder for run in runs), names_of(runs), strict=True))
    seeds = {1: ""}
    return {names[g[0].folder] + seeds.get(len(g), f" ({len(g)} seeds)"): g for g in alike.values()}


def state_of(run: Run) -> str:
    """``ok``, ``running``, ``interrupted``, ``failed`` or ``diverged`` (also where the last loss was not finite)."""
    state: str = run.status().get("state", "running")
    epochs = run.epochs()
    return "diverged" if state == "ok" and epochs and epochs[-1].get("train_loss") is None else state


def curves(runs: Sequence[Run]) -> Figure:
    """Loss, gradient norm, target IoU and boundary IoU by epoch, a line a run, in the colour of its group."""
    found = groups(runs)
    figure = style.new_figure(f"{len(runs)} runs side by side", 6.4 + 0.22 * len(found) / 3)
    panels = figure.subplots(2, 2).ravel()
    panels[1].set_yscale("log")
    handles = [
        Line2D([], [], color=BLACK, marker=marker, label=_ENDS[marker], linestyle="") for marker in _ENDS
    ]
    for number, (name, members) in enumerate(found.items()):
        look = {"color": PALETTE[number % len(PALETTE)], "linestyle": "-" if number < len(PALETTE) else "--"}
        handles.append(Line2D([], [], label=name, **look))
        for run in members:
            for axes, (key, *_) in zip(panels, PANELS, strict=True):
                _draw_run(axes, run, key, look)
    for axes, (_, title, unit) in zip(panels, PANELS, strict=True):
        style.style_axes(axes, title, "epoch", unit)
    style.figure_legend(figure, handles)
    return figure


def pictures(runs: Sequence[Run], count: int = 6) -> Figure:
    """The same validation ROIs in every run: image, truth, then each run's last masks of them, a row a run.

    Args:
        runs: those without masks are named in the title.
        count: ROIs, at most; those that all runs with masks have in common.
    """
    shown, alarm = {}, []
    for name, run in zip(names_of(runs), runs, strict=True):
        if (state := state_of(run)) != "ok":
            name += f"\n({state})"
        shown[name] = run
        alarm += [name] * (state in ("failed", "diverged"))
    return same_rois(f"the same instances in {len(runs)} runs", shown, count, alarm=alarm)


_ENDS = {"X": "diverged or failed", ">": "still running"}


def _draw_run(axes: Axes, run: Run, key: str, look: dict[str, Any]) -> None:
    """A run's line, with a cross where it died and an arrow where it still goes on."""
    lines = [line | (line.get("metrics") or {}) for line in run.epochs()]
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    style.draw_line(axes, [x for x, _ in points], [y for _, y in points], **look)
    known = [point for point in points if point[1] is not None]
    if marker := {"failed": "X", "diverged": "X", "running": ">"}.get(state := state_of(run)):
        # A run that died before there was anything to draw has its cross at the panel's left edge.
        place = {} if known else {"transform": axes.transAxes}
        end: dict[str, Any] = {"color": look["color"], "mec": BLACK, "markersize": 9, "gid": state}
        axes.plot(*(known[-1] if known else (0.02, 0.5)), marker, **end, **place)
