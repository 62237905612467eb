"""Any number of runs side by side, as tables; a run that failed or diverged is marked and never left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refinelib.config import names_with_role
from refinelib.plots.compare import groups, names_of, state_of
from refinelib.plots.style import recorded_settings, table
from refinelib.runs import Run, find_runs
from refinelib.workflows import examples

#: What is compared, and whether it is of the best epoch or of the last, the only one that measures it.
SCORES = {
    "target_iou": ("target IoU", "best"),
    "boundary_iou": ("Boundary IoU", "best"),
    "miou": ("mIoU", "best"),
    "boundary_f1_2px": ("boundary F, 2 px (last epoch)", "last"),
    "surface_distance": ("surface distance, px (last epoch)", "last"),
}


def find(runs: Sequence[str | Run] | str | None, *, output_dir: str = "outputs", most: int = 12) -> list[Run]:
    """The runs that are named; else the ``most`` newest, the oldest of them first; else two tiny ones.

    Args:
        runs: names or folders, as a list or a text with commas.
        output_dir: folder of all runs.
        most: how many are taken if none is named.

    Raises:
        RunError: one of them does not exist.
    """
    words = runs.split(",") if isinstance(runs, str) else runs or []
    names = [word.strip() if isinstance(word, str) else word for word in words]
    if names := [name for name in names if name]:
        return [examples.find(name, output_dir=output_dir) for name in names]
    found = find_runs(examples.root(output_dir))[-most:]
    return found or [examples.tiny(output_dir, seed=seed) for seed in (0, 1)]


def states_table(runs: Sequence[Run]) -> str:
    """The state of each run, as a Markdown table."""
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        status, state = run.status(), state_of(run)
        best = (status.get("best") or {}).get("target_iou")
        shown = state if state in ("ok", "running") else f"**{state}**"
        counts = [f"{status.get('epoch', 0)} of {status.get('epochs', '?')}", status.get("step", 0)]
        counts += [status.get("skipped_steps", 0), None if best is None else f"{best:.3f}"]
        rows.append([name, shown, *counts, status.get("last_error")])
    return table(rows, ["run", "state", "epoch", "steps", "skipped", "best target IoU", "last error"])


def settings_table(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, one a line, as a Markdown table."""
    found = [recorded_settings(run) for run in runs]
    names = dict.fromkeys(name for settings in found for name in settings)
    rows = [[name, *(_shown(settings.get(name)) for settings in found)] for name in names]
    apart = names_with_role("run") - {"recipe", "smoke"}
    rows = [row for row in rows if row[0] not in apart and len(set(row[1:])) > 1]
    if not rows:
        return "They differ in no setting." if len(runs) > 1 else "There is one run only."
    return table(rows, ["", *names_of(runs)])


def metrics_table(runs: Sequence[Run]) -> str:
    """Metrics of each group's best epochs (by target IoU): mean over seeds, after ± the standard deviation.

    A run that was never validated adds nothing to the mean; the last column counts it.
    """
    rows = []
    for name, members in groups(runs).items():
        scores = [_scores(run) for run in members]
        states = [state_of(run) for run in members]
        marks = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        rows.append([name, *(_spread([found.get(key) for found in scores]) for key in SCORES), marks])
    return table(rows, ["group", *(title for title, _ in SCORES.values()), "runs"])


def _scores(run: Run) -> dict[str, Any]:
    validated: list[dict[str, Any]] = [line["metrics"] for line in run.validations()] or [{}]
    best = max(validated, key=lambda metrics: metrics.get("target_iou") or 0.0)
    return {key: (best if epoch == "best" else validated[-1]).get(key) for key, (_, epoch) in SCORES.items()}


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    deviation = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{deviation}" if known else ""


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
