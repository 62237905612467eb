"""Runs for a notebook that was given none: the newest there is, else a tiny one made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from refinelib.config import Settings, resolve
from refinelib.runs import Run


def root(output_dir: str = "outputs") -> Path:
    """Folder of the runs meant: in smoke size, where smoke runs go."""
    settings = resolve("debug", output_dir=output_dir)
    return settings.path(settings.output_dir)


def tiny(output_dir: str = "outputs", **overrides) -> Run:
    """Train the recipe ``debug`` in smoke size, some ten seconds on a CPU."""
    from refinelib.training import train  # torch: only this needs it

    settings: Settings = resolve("debug", **{"output_dir": output_dir, "smoke": True, "data": "synthetic", **overrides})
    return train(settings)


def newest(run: str | None = None, *, output_dir: str = "outputs", fit: Callable[[Run], bool] = lambda run: True) -> Run:
    """The run named; else the newest that is fit; else a tiny one.

    Args:
        run: name or folder.
        output_dir: where runs lie; smoke runs are looked at too, after the others.
        fit: whether a run holds what is wanted.

    Raises:
        RunError: the run named is not there.
    """
    if run:
        return Run.open(run, output_dir=str(root(output_dir)))
    for folder in (root(output_dir), root(output_dir) / "smoke"):
        files = sorted(folder.glob("*/status.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        for candidate in (Run(file.parent) for file in files):
            if fit(candidate):
                return candidate
    return tiny(output_dir)


def has_gradients(run: Run) -> bool:
    """Whether the probe has written at least one file."""
    return any((run.folder / "gradients").glob("epoch_*.npz"))
