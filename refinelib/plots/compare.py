"""Runs side by side. Runs that differ in ``seed`` alone are a group, with one colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from refinelib.config import names_with_role
from refinelib.plots import style
from refinelib.plots.masks import same_rois
from refinelib.plots.style import BLACK, PALETTE, Figure
from refinelib.runs import Run

#: Title and unit by key of an epoch's line or of its metrics.
PANELS = {
    "train_loss": ("training loss", "loss"),
    "grad_norm": ("gradient norm before clipping, median of an epoch", "L2 norm"),
    "target_iou": ("target IoU on the validation instances", "IoU, 0 to 1"),
    "boundary_iou": ("boundary IoU on the validation instances", "IoU, 0 to 1"),
}
ENDS = {"failed": "X", "diverged": "X", "running": ">"}


def names_of(runs: Sequence[Run]) -> list[str]:
    """What each run is called: its name, with its folder's where two have the same."""
    names = [run.name for run in runs]
    longer = [f"{run.folder.parent.name}/{run.name}" for run in runs]
    return [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]


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
    """The state of its status; ``diverged`` also where its last loss was not finite."""
    state: str = run.status().get("state", "running")
    epochs = run.epochs()
    return "diverged" if state == "ok" and epochs and epochs[-1].get("train_loss") is None else state


def curves(runs: Sequence[Run]) -> Figure:
    """Loss, gradient norm, target IoU and boundary IoU by epoch, a line a run, in the colour of its group."""
    found = groups(runs)
    figure = style.new_figure(f"{len(runs)} runs; X: diverged or failed, >: still running", 6.6)
    panels = dict(zip(PANELS, figure.subplots(2, 2).ravel(), strict=True))
    panels["grad_norm"].set_yscale("log")
    for number, (name, members) in enumerate(found.items()):
        look = {"color": PALETTE[number % len(PALETTE)], "linestyle": "-" if number < len(PALETTE) else "--"}
        for run in members:
            for key, axes in panels.items():
                _draw_run(axes, run, key, look | {"label": name if run is members[0] else "_"})
    for key, axes in panels.items():
        style.style_axes(axes, PANELS[key][0], "epoch", PANELS[key][1])
    style.figure_legend(figure, panels["train_loss"].get_legend_handles_labels()[0])
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


def _draw_run(axes: Axes, run: Run, key: str, look: dict[str, Any]) -> None:
    """A run's line, with a cross where it died and an arrow where it still goes on."""
    lines = [line | (line.get("metrics") or {}) for line in run.epochs()]
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    style.draw_line(axes, [x for x, _ in points], [y for _, y in points], **look)
    known = [point for point in points if point[1] is not None]
    if (state := state_of(run)) in ENDS:
        # A run that died before there was anything to draw has its cross at the panel's left edge.
        end = {"color": look["color"], "mec": BLACK, "markersize": 9, "gid": state}
        end |= {} if known else {"transform": axes.transAxes}
        axes.plot(*(known[-1] if known else (0.02, 0.5)), ENDS[state], **end)
