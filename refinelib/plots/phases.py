"""Figures of progressive training: all phases in one, and the same instances after each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from refinelib.files import read_json
from refinelib.plots import style
from refinelib.plots.curves import gradient_panel, loss_panel, score_panel
from refinelib.plots.masks import same_rois
from refinelib.plots.style import Figure
from refinelib.plots.style import save as save
from refinelib.runs import Run


def all_phases(folder: str | os.PathLike[str]) -> Figure:
    """Loss, validation and gradient norm of all phases, by epoch of the whole sequence."""
    state, runs = _read(folder)
    passed = f"{sum(entry['state'] == 'passed' for entry in state['phases'])} of {len(state['phases'])}"
    title = f"{state['name']}: all phases   [{state['state']}, {passed} phases passed]"
    figure = style.new_figure(title, 9.0, alarm=state["state"] not in ("ok", "running"))
    panels = figure.subplots(3, 1, sharex=True)
    start = 0.0
    for phase, run in runs.items():
        epochs = run.status().get("epochs") or 1
        length = epochs / (run.status().get("steps") or epochs)

        def place(step: float, start: float = start, length: float = length) -> float:
            return start + step * length

        loss_panel(panels[0], run, place)
        score_panel(panels[1], run, start)
        gradient_panel(panels[2], run, place)
        end = start + max(1, len(run.epochs()))
        panels[1].text((start + end) / 2, 0.99, phase, ha="center", va="top", fontsize=8)
        for axes in panels:
            axes.axvline(end, color=style.GREY, linewidth=1.0, gid="limit")
            axes.set(xlabel="", xlim=(0, end))
        start = end
    panels[2].set_xlabel("epoch of the whole sequence", fontsize=9)
    return figure


def masks(folder: str | os.PathLike[str], count: int = 6) -> Figure:
    """The same validation ROIs at the end of each phase, a row a phase."""
    state, runs = _read(folder)
    return same_rois(f"{state['name']}: the same instances after each phase", runs, count)


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Run]]:
    """The state of a phase sequence, and the runs of the phases that have begun, by phase and its state."""
    state = read_json(Path(folder) / "progressive.json")
    found = {f"{e['phase']}\n{e['state']}": Run(Path(folder) / e["run"]) for e in state["phases"] if e["run"]}
    return state, {name: run for name, run in found.items() if (run.folder / "status.json").is_file()}
