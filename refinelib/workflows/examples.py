"""Runs for a notebook that was given none: the newest there is, else a tiny one made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from refinelib.config import Settings, absolute, resolve
from refinelib import runs
from refinelib.runs import Run
from refinelib.gradients import read as gradients


def root(output_dir: str = "outputs") -> Path:
    """Folder of the runs meant: in smoke size, where smoke runs go."""
    settings = resolve("debug", output_dir=output_dir)
    return settings.path(settings.output_dir)


def tiny(output_dir: str = "outputs", **overrides) -> Run:
    """Train the recipe ``debug`` in smoke size, some ten seconds on a CPU."""
    from refinelib.trainer import train  # torch: only this needs it

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
        found = runs.newest(folder, fits=fit)
        if found is not None:
            return found
    return tiny(output_dir)


def usable_run(run: str | None, *, output_dir: str = "outputs") -> str | Path:
    """The run that is meant: the one named, else the newest with a checkpoint that this version reads, else a tiny one trained now.

    Args:
        run: a run's name or folder or a checkpoint file; none: see above.
        output_dir: folder of all runs.
    """
    if run:
        return run
    for folder in dict.fromkeys((root(output_dir), absolute(output_dir))):  # one and the same, but in smoke size
        found = newest_readable(folder, "*")
        if found is not None:
            return found
    return tiny_with_masks("tiny", output_dir=output_dir).folder


def newest_readable(under: Path, name: str) -> Path | None:
    """The folder under ``under`` of the run of that name (a pattern) with the newest checkpoint that can be used; none: there is none."""
    from refinelib import checkpoints  # torch

    files = [file for file in under.glob(f"{name}/checkpoints/*.pt") if (file.parents[1] / "status.json").is_file()]
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    folders = dict.fromkeys(file.parents[1] for file in newest)  # each once: reading a checkpoint takes a while
    return next((folder for folder in folders if checkpoints.readable(checkpoints.find(folder))), None)


def tiny_with_masks(name: str, *, output_dir: str = "outputs", **overrides: Any) -> Run:
    """Train the recipe ``debug``, smaller and a little longer than it says: some 15 seconds, a mask but no good one.

    Args:
        name: of the run.
        output_dir: folder of all runs.
        **overrides: settings.
    """
    from refinelib.trainer import train

    longer = dict(epochs=8, max_images=24, width=0.0625, batch_size=4, lr=3e-3, roi_size=32, mask_size=32, context=0.5)
    return train(resolve("debug", run=name, output_dir=output_dir, **{**longer, **overrides}))


def tiny_pair(output_dir: str = "outputs") -> tuple[list[str], list[str]]:
    """Two runs of the recipe ``debug``, refinement on and off, trained where they are not there yet; their folders."""
    from studies.results import REFINEMENT_OFF  # torch

    folders = []
    for name, changes in (("tiny-refined", {}), ("tiny-plain", REFINEMENT_OFF)):
        folder = newest_readable(root(output_dir), f"{name}*") or tiny_with_masks(name, output_dir=output_dir, **changes).folder
        folders.append([str(folder)])
    return folders[0], folders[1]


def has_gradients(run: Run) -> bool:
    """Whether the probe has written at least one file."""
    return bool(gradients.files(run))
