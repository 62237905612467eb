"""Figures of the checks, drawn from ``checks.json`` in a run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from refinelib.files import read_json
from refinelib.plots import style
from refinelib.plots.style import BLACK, BLUE, GREY, VERMILLION, Figure


def overfit(folder: str | os.PathLike[str]) -> Figure:
    """Loss and target IoU of the overfitted batch by step, with the line that each has to cross."""
    title, check = _find(folder, "one batch overfitted")
    if "enough" not in (found := check["figures"]):
        return style.message(title, check["sentence"])
    figure = style.new_figure(title, 3.6, alarm=not check["passed"])
    left, right = figure.subplots(1, 2)
    iou, share = found["enough"]
    for axes, key, color in ((left, "loss", BLACK), (right, "target_iou", BLUE)):
        limit = iou if axes is right else share * (found["loss"][0] or 1)
        style.draw_line(
            axes, range(1, len(found[key]) + 1), found[key], color, label=key.replace("_iou", " IoU")
        )
        axes.axhline(limit, color=GREY, linestyle="--", gid="limit", label=f"to cross: {limit:.3g}")
    left.set_yscale("log")
    right.set_ylim(0, 1.02)
    style.style_axes(left, "total loss of the batch", "step", "loss")
    style.style_axes(right, "target IoU on the batch", "step", "IoU, 0 to 1")
    style.legend(left)
    style.legend(right)
    return figure


def gradients(folder: str | os.PathLike[str]) -> Figure:
    """Largest gradient norm of each parameter in the first steps, by module; missing ones at the left."""
    title, check = _find(folder, "a gradient in every parameter")
    if not (norms := check["figures"].get("norms")):
        return style.message(title, check["sentence"])
    modules = list(dict.fromkeys(name.split(".")[0] for name in norms))
    figure = style.new_figure(title, 1.4 + 0.28 * len(modules), alarm=not check["passed"])
    axes = figure.subplots()
    axes.set_xscale("log")
    least = min((norm for norm in norms.values() if norm), default=1e-6) / 10
    # Rows are spread a little: parameters of a module would hide each other.
    y = [modules.index(name.split(".")[0]) + 0.5 * (7 * i % 11 / 10 - 0.5) for i, name in enumerate(norms)]
    colors = [BLUE if norm else VERMILLION for norm in norms.values()]
    axes.scatter([norm or least for norm in norms.values()], y, c=colors, s=22, alpha=0.75)
    style.style_axes(
        axes, "a dot a parameter; orange-red: none, 0 or not finite", "L2 norm, largest of the first steps"
    )
    axes.set_yticks(range(len(modules)), modules)
    axes.invert_yaxis()
    return figure


def _find(folder: str | os.PathLike[str], name: str) -> tuple[str, dict[str, Any]]:
    """Title and record of the check of that ``name``."""
    checks = {check["name"]: check for check in read_json(Path(folder) / "checks.json")["checks"]}
    check = checks.get(name, {"passed": False, "sentence": "it was not run", "figures": {}})
    return f"{Path(folder).name}: {name}   [{'passed' if check['passed'] else 'failed'}]", check
