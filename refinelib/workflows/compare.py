"""Any number of runs side by side, from their folders: what differs in their settings, curves, metrics over seeds, the same people.

Runs that differ in ``seed`` alone are a group: one colour, and a mean with its spread. A run that diverged or
failed is never left out: it is marked wherever it is shown.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from refinelib.workflows import examples
from refinelib.plots.style import BLACK, BLUE, CLASSES, GREEN, GREY, ORANGE, PURPLE, SKY, WIDTH
from refinelib.plots.style import VERMILLION, Figure, color_key, draw_line, style_axes, recorded_settings
from refinelib.plots.masks import class_picture, read_samples, tile, window_of
from refinelib.config import names_with_role
from refinelib.runs import Run, find_runs

#: Colours of groups in their order; beyond these the line's style changes.
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, GREY)
STYLES = ("-", "--", ":")
#: Runs looked at where none are named, the newest ones.
MOST = 12
METRICS = {
    "target_iou": "target IoU",
    "boundary_iou": "Boundary IoU",
    "miou": "mIoU",
    "boundary_f1_2px": "boundary F, 2 px (last epoch)",
    "surface_distance": "surface distance, px (last epoch)",
}
MARKS = {"ok": "", "running": " (still running)", "interrupted": " (interrupted)", "failed": " (failed)", "diverged": " (diverged)"}


def find(runs: Sequence[str] | str | None = None, *, output_dir: str = "outputs", most: int = MOST) -> list[Run]:
    """The runs meant, in the order given; none: the newest under ``output_dir``, the oldest of them first; none there: two tiny ones.

    Args:
        runs: names or folders, as a list or a text with commas.

    Raises:
        RunError: one of them is no run.
    """
    names = [word.strip() for word in runs.split(",") if word.strip()] if isinstance(runs, str) else list(runs or [])
    root = examples.root(output_dir)
    if names:
        return [run if isinstance(run, Run) else Run.open(run, output_dir=str(root)) for run in names]
    found = find_runs(root)
    if not found:
        return [examples.tiny(output_dir, seed=seed) for seed in (0, 1)]
    return found[-most:]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group: together are those that differ in nothing but their seed and where they lie.

    A group is called by its first run, and how many seeds it has.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: value for k, value in recorded_settings(run).items() if k not in names_with_role("run") | {"seed"}}
        alike.setdefault(repr(sorted(settings.items())) if settings else str(run.folder), []).append(run)
    called = names_of(runs)
    first = [called[[*runs].index(members[0])] for members in alike.values()]
    return {name + (f" ({len(members)} seeds)" if len(members) > 1 else ""): members for name, members in zip(first, alike.values())}


def names_of(runs: Sequence[Run]) -> list[str]:
    """What each run is called here: its name, with its folder's where two have the same."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}" for run in runs]


def state_of(run: Run) -> str:
    """``ok``, ``running``, ``interrupted``, ``failed`` or ``diverged`` (also where the last loss was not finite)."""
    state = run.status().get("state", "running")
    epochs = run.epochs()
    return "diverged" if state == "ok" and epochs and epochs[-1].get("train_loss") is None else state


# -- words -----------------------------------------------------------------------------------------
def states_table(runs: Sequence[Run]) -> str:
    """How each run stands, as a Markdown table."""
    lines = ["| run | stands | epoch | steps | skipped | best target IoU | last error |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, run in zip(names_of(runs), runs):
        status, state = run.status(), state_of(run)
        best = (status.get("best") or {}).get("target_iou")
        shown = state if state in ("ok", "running") else f"**{state}**"
        epochs = f"{status.get('epoch', 0)} of {status.get('epochs', '?')}"
        cells = (name, shown, epochs, status.get("step", 0), status.get("skipped_steps", 0))
        error = str(status.get("last_error") or "").replace("|", "/")
        lines.append("| " + " | ".join(map(str, (*cells, "" if best is None else f"{best:.3f}", error))) + " |")
    return "\n".join(lines)


def settings_table(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, one a line, as a Markdown table."""
    found = dict(zip(names_of(runs), map(recorded_settings, runs)))
    names = list(dict.fromkeys(name for settings in found.values() for name in settings))
    outside = names_with_role("run") - {"recipe", "smoke"}
    names = [name for name in names if name not in outside and len({repr(settings.get(name)) for settings in found.values()}) > 1]
    if not names:
        return "They differ in no setting." if len(runs) > 1 else "There is one run only."
    lines = [f"| | {' | '.join(found)} |", "| --- |" + " --- |" * len(found)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_shown(settings.get(name)) for settings in found.values()) + " |")
    return "\n".join(lines)


def metrics_table(runs: Sequence[Run]) -> str:
    """Metrics of each group's best epochs (by target IoU): the mean over seeds, and after ± their standard deviation.

    What is measured at the end of a run only is that of its last epoch.

    A run that has not been validated counts for nothing in the mean and is told in the last column.
    """
    lines = [f"| group | {' | '.join(METRICS.values())} | runs |", "| --- |" + " --- |" * (len(METRICS) + 1)]
    for name, members in groups(runs).items():
        best = [_best(run) for run in members]
        cells = [_spread([metrics.get(key) for metrics in best if metrics]) for key in METRICS]
        states = [state_of(run) for run in members]
        marks = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(marks)} |")
    return "\n".join(lines)


# -- figures ---------------------------------------------------------------------------------------
def curves(runs: Sequence[Run]) -> Figure:
    """Training loss, gradient norm, target IoU and Boundary IoU by epoch: a thin line a run, a thick one a group's mean."""
    found = groups(runs)
    figure = Figure(figsize=(WIDTH, 6.2 + 0.22 * math.ceil(len(found) / 3)), layout="constrained")
    figure.suptitle(f"{len(runs)} runs side by side", x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(2, 2).ravel()
    readers = (
        ("training loss", "loss", lambda line: line.get("train_loss")),
        ("gradient norm before clipping, median of an epoch", "L2 norm", lambda line: line.get("grad_norm")),
        ("target IoU on the validation people", "IoU, 0 to 1", lambda line: line["metrics"].get("target_iou")),
        ("Boundary IoU on the validation people", "IoU, 0 to 1", lambda line: line["metrics"].get("boundary_iou")),
    )
    for axes, (title, unit, read) in zip(panels, readers):
        if unit == "L2 norm":
            axes.set_yscale("log")
        for (name, members), (color, style) in zip(found.items(), _looks(len(found))):
            by_epoch: dict[int, list[float]] = {}
            for run in members:
                lines = run.validations() if unit == "IoU, 0 to 1" else run.epochs()
                x, y = [line["epoch"] for line in lines], [read(line) for line in lines]
                thin = dict(linewidth=1.0, alpha=0.6) if len(members) > 1 else dict(linewidth=1.8)
                draw_line(axes, x, y, color=color, linestyle=style, **thin)
                _ending(axes, run, x, y, color)
                for epoch, value in zip(x, y):
                    if value is not None:
                        by_epoch.setdefault(epoch, []).append(value)
            if len(members) > 1:
                shared = [epoch for epoch, values in sorted(by_epoch.items()) if len(values) == max(map(len, by_epoch.values()))]
                axes.plot(shared, [np.mean(by_epoch[epoch]) for epoch in shared], color=color, linestyle=style, linewidth=2.8, gid="mean")
        if unit == "IoU, 0 to 1":
            axes.set_ylim(0, min(1.0, max(0.2, 1.15 * axes.get_ylim()[1])))
        style_axes(axes, title, "epoch", unit, whole=True)
    handles = [Line2D([], [], color=c, linestyle=s, linewidth=2.4, label=name) for name, (c, s) in zip(found, _looks(len(found)))]
    marks = (("X", "diverged or failed"), (">", "still running"))
    handles += [Line2D([], [], color=BLACK, marker=marker, linestyle="", label=label) for marker, label in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    return figure


def pictures(runs: Sequence[Run], count: int = 6) -> Figure:
    """The same validation people in every run: image, truth, then each run's last masks of them, a row a run.

    Args:
        count: people, at most; those that all runs with masks have in common.
    """
    samples = {name: found for name, run in zip(names_of(runs), runs) if (found := _fixed(run)) is not None}
    marks = {name: MARKS.get(state_of(run), "") for name, run in zip(names_of(runs), runs)}
    common = [key for key in next(iter(samples.values()), {}) if all(key in other for other in samples.values())]
    if not common:
        figure = Figure(figsize=(WIDTH, 1.2))
        figure.text(0.5, 0.5, "the runs have no validated person in common", ha="center", va="center")
        return figure
    people = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int))]
    missing = [name + marks[name] for name in marks if name not in samples]
    rows = 2 + len(samples)
    first = next(iter(samples.values()))
    aspect = first[people[0]]["image"].shape[0] / first[people[0]]["image"].shape[1]
    side = min(1.35, (WIDTH - 2.2) / len(people))
    figure = Figure(figsize=(WIDTH, 0.8 + rows * (aspect * side + 0.12)), layout="constrained")
    note = f"; no masks yet of {', '.join(missing)}" if missing else ""
    figure.suptitle(f"the same people in {len(samples)} runs{note}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(rows, len(people), squeeze=False)
    heads = ["image", "truth", *(name + marks[name] for name in samples)]
    for row, (tiles, head) in enumerate(zip(grid, heads)):
        for axes, person in zip(tiles, people):
            shown = first[person] if row < 2 else samples[list(samples)[row - 2]][person]
            labels = shown["labels"] if row < 2 else shown["probs"].astype(np.float32).argmax(0)
            tile(axes, shown["image"] if row == 0 else class_picture(labels), window_of(labels.shape, shown["mask_size"]), aspect)
            if row >= 2 and np.isfinite(shown["target_iou"]):
                axes.set_title(f"IoU {shown['target_iou']:.2f}", fontsize=7, pad=2)
        bad = any(word in head for word in ("(failed)", "(diverged)"))
        place = dict(rotation=0, ha="right", va="center", fontsize=8, color=VERMILLION if bad else BLACK)
        tiles[0].set_axis_on()
        tiles[0].set(xticks=[], yticks=[])
        tiles[0].spines[:].set_visible(False)
        tiles[0].set_ylabel(head.replace(" (", "\n("), **place)
    color_key(figure, CLASSES, loc="outside lower center")
    return figure


# -- helpers ---------------------------------------------------------------------------------------
def _looks(count: int) -> list[tuple[str, str]]:
    return [(COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]) for i in range(count)]


def _ending(axes: Axes, run: Run, x: list[int], y: list[float | None], color: str) -> None:
    """A cross where a run died, an arrow where it still goes on."""
    marker = {"failed": "X", "diverged": "X", "running": ">"}.get(state_of(run))
    known = [(epoch, value) for epoch, value in zip(x, y) if value is not None]
    style = dict(color=color, markersize=9, markeredgecolor=BLACK, zorder=5, gid=state_of(run))
    if marker and known:
        axes.plot(*known[-1], marker, **style)
    elif marker == "X":  # it died before there was anything to draw
        axes.plot([0.02], [0.5], marker, transform=axes.transAxes, **style)


def _best(run: Run) -> dict[str, Any]:
    scored = [line["metrics"] for line in run.validations()]
    best = max(scored, key=lambda metrics: -1.0 if metrics.get("target_iou") is None else metrics["target_iou"], default={})
    return {key: (scored[-1] if "last" in name else best).get(key) for key, name in METRICS.items()} if scored else {}


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{np.mean(known):.3f}" + (f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else "")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value).replace("|", "/")


def _fixed(run: Run) -> dict[tuple[int, int], dict[str, np.ndarray]] | None:
    """The fixed ROIs of a run's last masks, by image and annotation."""
    if (found := read_samples(run)) is None:
        return None
    content = found[1]
    rows = np.flatnonzero(content["kind"] == "fixed")
    keys = ("image", "labels", "probs", "target_iou")
    return {
        (int(content["image_id"][i]), int(content["annotation_id"][i])): {
            **{name: content[name][i] for name in keys}, "mask_size": content["mask_size"],
        }
        for i in rows
    }
