"""Runs side by side, as tables and figures; a run that failed or diverged is marked and never left out.

Runs that differ in ``seed`` alone are a group, with one colour and one mean.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refinelib.config import names_with_role
from refinelib.plots import style
from refinelib.plots.masks import Rows, judged, picture_grid, read_samples, sample_tiles, shape_of
from refinelib.plots.style import BLACK, PALETTE, Figure, recorded_settings, table
from refinelib.registry import METRICS
from refinelib.runs import Run, find_runs
from refinelib.workflows import examples

SCORES = ("target_iou", "boundary_iou", "miou", "boundary_f1_2px", "surface_distance")
#: Title and unit by key of an epoch's line or of its metrics.
PANELS = {
    "train_loss": ("training loss", "loss"),
    "grad_norm": ("gradient norm before clipping, median of an epoch", "L2 norm"),
    "target_iou": ("target IoU on the validation instances", "IoU, 0 to 1"),
    "boundary_iou": ("Boundary IoU on the validation instances", "IoU, 0 to 1"),
}
ENDS = dict.fromkeys(("failed", "diverged", "killed"), ("X", "diverged, failed or killed"))
ENDS |= {"running": (">", "still running")}


def find(runs: Sequence[str | Run] | str | None, *, output_dir: str = "outputs", most: int = 12) -> list[Run]:
    """The runs that are named; else the ``most`` newest, the oldest of them first; else two tiny ones.

    Args:
        runs: as :func:`refinelib.workflows.examples.named` reads them.
        output_dir: folder of all runs.
        most: how many are taken if none is named.

    Raises:
        RunError: one of them does not exist.
    """
    if names := examples.named(runs):
        return [examples.find(name, output_dir=output_dir) for name in names]
    found = find_runs(examples.root(output_dir))[-most:]
    return found or [examples.tiny(output_dir, seed=seed) for seed in (0, 1)]


def names_of(runs: Sequence[Run]) -> list[str]:
    """What each run is called: its name, with its folder's where two have the same."""
    names = [run.name for run in runs]
    return [f"{run.folder.parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group, which is called by its first run and how many seeds it has."""
    apart = names_with_role("run") | {"seed"}
    alike: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in recorded_settings(run).items() if key not in apart}
        alike.setdefault(repr(sorted(settings.items())) if settings else str(run.folder), []).append(run)
    names = dict(zip((run.folder for run in runs), names_of(runs), strict=True))
    return {names[g[0].folder] + (f" ({len(g)} seeds)" if len(g) > 1 else ""): g for g in alike.values()}


def state_of(run: Run) -> str:
    """The state of its status."""
    return str(run.status().get("state", "running"))


# -- tables ----------------------------------------------------------------------------------------
def states_table(runs: Sequence[Run]) -> str:
    """The state of each run, as a Markdown table; below it the error of each that has one."""
    rows, errors = [], []
    for name, run in zip(names_of(runs), runs, strict=True):
        status, state = run.status(), state_of(run)
        best = (status.get("best") or {}).get("target_iou")
        shown = state if state in ("ok", "running") else f"**{state}**"
        counts = [f"{status.get('epoch', 0)} of {status.get('epochs', '?')}", status.get("step", 0)]
        counts += [status.get("skipped_steps", 0), None if best is None else f"{best:.3f}"]
        rows.append([name, shown, *counts])
        errors += [f"- **{name}**: {error}"] if (error := status.get("last_error")) else []
    heads = ["run", "state", "epoch", "steps", "skipped", "best target IoU"]
    return "\n".join([table(rows, heads), *[""] * bool(errors), *errors])


def settings_table(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, as a Markdown table.

    A row a setting: its value in the first run, then every other value with the runs that have it.
    """
    found, rows = [recorded_settings(run) for run in runs], []
    apart = names_with_role("run") - {"recipe", "smoke"}
    for name in dict.fromkeys(name for settings in found for name in settings if name not in apart):
        having: dict[str, list[str]] = {}
        for run, settings in zip(names_of(runs), found, strict=True):
            v = settings.get(name)
            cell = f"{v:g}" if isinstance(v, float) else "none" if v is None else str(v)
            having.setdefault(cell, []).append(run)
        (first, _), *others = having.items()
        rows += [[name, first, "; ".join(f"{v}: {', '.join(of)}" for v, of in others)]] if others else []
    if not rows:
        return "They differ in no setting." if len(runs) > 1 else "There is one run only."
    return table(rows, ["setting", names_of(runs)[0], "others"])


def metrics_table(runs: Sequence[Run]) -> str:
    """Metrics of each group's best epochs (by target IoU): mean over seeds, after ± the standard deviation.

    What only the last epoch measures is of that one. A run that was never validated adds nothing to the
    mean; the last column counts it.
    """
    rows = []
    for name, members in groups(runs).items():
        states = [state_of(run) for run in members]
        found: list[dict[str, Any]] = []
        for run in members:
            metrics = [line["metrics"] for line in run.validations()] or [{}]
            found.append(metrics[-1] | max(metrics, key=lambda scores: scores.get("target_iou") or 0.0))
        cells = []
        for key in SCORES:
            known = [scores[key] for scores in found if scores.get(key) is not None]
            deviation = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
            cells.append(f"{np.mean(known):.3f}{deviation}" if known else "")
        marks = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        rows.append([name, *cells, marks])
    titles = ["mIoU" if key == "miou" else METRICS[key].title for key in SCORES]
    return table(rows, ["group", *titles, "runs"])


# -- figures ---------------------------------------------------------------------------------------
def curves(runs: Sequence[Run], in_sequence: bool = False) -> Figure:
    """Loss, gradient norm, target IoU and boundary IoU by epoch, a line a run, in the colour of its group.

    Runs that differ in their loss terms or in a weight of one have no total to compare: the panel shows the
    sum of the terms that all of them have, without weights.

    Args:
        runs: in the order of their colours.
        in_sequence: each run starts from the weights of the one before: its epochs are drawn after those.
    """
    figure = style.new_figure(f"{len(runs)} runs", 6.8)
    shared = _shared_terms(runs)
    for (key, (title, unit)), axes in zip(PANELS.items(), figure.subplots(2, 2).flat, strict=True):
        if key == "train_loss" and shared is not None:
            title += ": the terms that all runs have, unweighted"
            unit = textwrap.fill(" + ".join(map(style.words, shared)) or "no term", 36)
        axes.set_yscale("log" if key == "grad_norm" else "linear")
        before = 0
        for number, (name, members) in enumerate(groups(runs).items()):
            color = PALETTE[number % len(PALETTE)]
            for run in members:
                lines = [line | (line.get("metrics") or {}) for line in run.epochs()]
                if shared is not None:
                    lines = [line | {"train_loss": _sum_of(line, shared)} for line in lines]
                points = [(before + line["epoch"], line[key]) for line in lines if key in line]
                before += lines[-1]["epoch"] if in_sequence and lines else 0
                label = name if run is members[0] else "_"
                style.draw_line(axes, [x for x, _ in points], [y for _, y in points], color, label=label)
                if (state := state_of(run)) in ENDS:
                    # A run that died before there was anything to draw has its cross at the panel's left.
                    known = [point for point in points if point[1] is not None]
                    at, place = (known[-1], {}) if known else ((0.02, 0.5), {"transform": axes.transAxes})
                    look = {"color": color, "mec": BLACK, "markersize": 9, "gid": state, **place}
                    axes.plot(*at, ENDS[state][0], linestyle="", label=ENDS[state][1], **look)
        if key in METRICS:
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # no score is below 0
        style.style_axes(axes, title, "epoch", unit)
    style.figure_legend(figure)
    return figure


def _shared_terms(runs: Sequence[Run]) -> list[str] | None:
    """The loss terms that all runs have; none: they have the same ones with the same weights."""
    found = [(run.epochs()[0]["losses"], recorded_settings(run)) for run in runs if run.epochs()]
    weights = [{name: own.get(f"{name}_weight") for name in losses} for losses, own in found]
    if all(one == weights[0] for one in weights):
        return None
    return [name for name in weights[0] if all(name in one for one in weights)]


def _sum_of(line: Mapping[str, Any], terms: Sequence[str]) -> float | None:
    parts = [line["losses"].get(name) for name in terms]
    return None if None in parts or not parts else sum(parts)


def pictures(runs: Sequence[Run], count: int = 6) -> Figure:
    """The same validation ROIs in every run: image, truth, then each run's last masks of them, a row a run.

    Args:
        runs: those without masks are named in the title.
        count: ROIs, at most; those that all runs with masks have in common.
    """
    found, places, alarm, missing = {}, {}, [], []
    for name, run in zip(names_of(runs), runs, strict=True):
        state = state_of(run)
        name += "" if state == "ok" else f"\n({state})"
        alarm += [name] * (state in ENDS and state != "running")
        if (read := read_samples(run)) is None:
            missing.append(name)
            continue
        found[name] = samples = judged(run, read[1])
        fixed = np.flatnonzero(samples["kind"] == "fixed")
        places[name] = {(samples["image_id"][i], samples["annotation_id"][i]): int(i) for i in fixed}
    title = f"the same instances in {len(runs)} runs"
    title += f"; no masks yet of {', '.join(missing)}" if missing else ""
    first = next(iter(found), "")
    common = [key for key in places.get(first, ()) if all(key in other for other in places.values())]
    if not common:
        return style.message(title, "the runs have no validated instance in common")
    keys = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, count).round().astype(int))]
    tiles = {name: [sample_tiles(found[name], places[name][key]) for key in keys] for name in found}
    rows: Rows = [(("image", "truth")[i], [(roi[i][0], "") for roi in tiles[first]]) for i in (0, 1)]
    rows += [(name, [roi[2] for roi in rois]) for name, rois in tiles.items()]
    return picture_grid(style.new_figure(title), rows, shape_of(found[first]), alarm=alarm)
