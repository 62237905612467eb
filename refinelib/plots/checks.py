"""Figures of the checks, drawn from ``checks.json`` in a run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from refinelib.files import read_json
from refinelib.plots import style
from refinelib.plots.style import BLACK, BLUE, GREY, VERMILLION, Figure


def overfit(folder: str | os.PathLike[str]) -> Figure:
    """Loss and target IoU of the one batch learned by heart, by step, with the line that each has to cross."""
    title, check = _find(folder, "one batch learned by heart")
    if "enough" not in (found := check["figures"]):
        return style.message(title, check["sentence"])
    figure = style.new_figure(title, 3.6, alarm=not check["passed"])
    left, right = figure.subplots(1, 2)
    iou, share = found["enough"]
    for axes, key, color, limit in (
        (left, "loss", BLACK, share * (found["loss"][0] or 1)),
        (right, "target_iou", BLUE, iou),
    ):
        style.draw_line(axes, range(1, len(found[key]) + 1), found[key], color, label=style.words(key))
        axes.axhline(limit, color=GREY, linestyle="--", gid="limit", label=f"to cross: {limit:.3g}")
    left.set_yscale("log")
    right.set_ylim(0, 1.02)
    style.style_axes(left, "total loss of the batch", "step", "loss")
    style.style_axes(right, "target IoU on the batch", "step", "IoU, 0 to 1")
    style.legend(left)
    style.legend(right)
    return figure


def gradients(folder: str | os.PathLike[str]) -> Figure:
    """Largest gradient norm of each parameter in the first steps, a row a module; those without one at the left."""
    title, check = _find(folder, "a gradient in every parameter")
    if not (norms := check["figures"].get("norms")):
        return style.message(title, check["sentence"])
    modules = list(dict.fromkeys(name.split(".")[0] for name in norms))
    figure = style.new_figure(title, 1.4 + 0.28 * len(modules), alarm=not check["passed"])
    axes = figure.subplots()
    axes.set_xscale("log")
    least = min((norm for norm in norms.values() if norm), default=1e-6) / 10
    for i, (name, norm) in enumerate(norms.items()):
        # Rows are spread a little: parameters of a module would hide each other.
        y = modules.index(name.split(".")[0]) + 0.5 * (7 * i % 11 / 10 - 0.5)
        look = (
            {"color": BLUE, "label": "finite, not 0"}
            if norm
            else {"color": VERMILLION, "label": "none, 0 or not finite"}
        )
        axes.plot(norm or least, y, "o" if norm else "X", markersize=5, alpha=0.75, **look)
    style.style_axes(axes, "gradient of each parameter, by module", "L2 norm, largest of the first steps")
    axes.set_yticks(range(len(modules)), modules)
    axes.invert_yaxis()
    style.legend(axes)
    return figure


def _find(folder: str | os.PathLike[str], name: str) -> tuple[str, dict[str, Any]]:
    """Title and record of the check of that ``name``."""
    checks = {check["name"]: check for check in read_json(Path(folder) / "checks.json")["checks"]}
    check = checks.get(name, {"passed": False, "sentence": "it was not run", "figures": {}})
    return f"{Path(folder).name}: {name}   [{'passed' if check['passed'] else 'failed'}]", check
