"""Runs for a notebook that was given none: the newest there is, else a tiny one trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refinelib import checkpoints, trainer
from refinelib.config import absolute, resolve
from refinelib.runs import Run, newest


def root(output_dir: str = "outputs") -> Path:
    """Folder of the runs; in smoke size the folder of smoke runs."""
    settings = resolve("debug", output_dir=output_dir)
    return settings.path(settings.output_dir)


def find(
    run: str | Run | None = None,
    *,
    output_dir: str = "outputs",
    name: str | None = None,
    fits: Callable[[Run], Any] = lambda run: True,
    **overrides: Any,
) -> Run:
    """The run that is named; else the newest that fits; else a tiny one, trained now.

    Args:
        run: name or folder.
        output_dir: folder of all runs.
        name: only runs that were started under this name; the tiny run gets it.
        fits: whether a run holds what is needed: :func:`has_weights`, ``gradients.record.files``.
        **overrides: settings of the tiny run.

    Raises:
        RunError: the run that is named does not exist.
    """
    if run is not None:
        return run if isinstance(run, Run) else Run.open(run, output_dir=str(root(output_dir)))
    for folder in (root(output_dir), absolute(output_dir), absolute(output_dir) / "smoke"):
        if found := newest(folder, name, fits=fits):
            return found
    return tiny(output_dir, run=name, **overrides)


def tiny(output_dir: str = "outputs", **overrides: Any) -> Run:
    """Train the recipe ``debug`` on fewer pixels, for longer: 15 seconds on a CPU, masks but no good ones."""
    size = {"epochs": 8, "max_images": 24, "width": 0.0625, "batch_size": 4, "roi_size": 32, "mask_size": 32}
    settings = {"output_dir": output_dir, **size, "lr": 3e-3, "context": 0.5, **overrides}
    return trainer.train(resolve("debug", **{**settings, "run": settings.get("run") or "tiny"}))


def has_weights(run: Run) -> bool:
    """Whether the run has a checkpoint that this version reads."""
    try:
        checkpoints.load(checkpoints.find(run.folder))
    except checkpoints.CheckpointError:
        return False
    return True
