"""Runs for a notebook: those that are named; else the newest there is, else a tiny one trained now."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from IPython import display

from refinelib import checkpoints, trainer
from refinelib.config import Settings, absolute, existing, load_recipe, resolve
from refinelib.files import is_locked, retold
from refinelib.plots import widgets
from refinelib.plots.style import recorded_settings
from refinelib.runs import DEBUG_DIR, Run, RunError, newest, places

#: What a debug run takes from params/debug.yaml: its size, and nothing else.
SIZE = ("max_images", "epochs", "batch_size", "warmup_epochs", "width")


def root(output_dir: str = "outputs") -> Path:
    """Folder of the runs; in smoke size the folder of smoke runs."""
    return places(output_dir)[0]


def named(runs: Iterable[str | Run] | str | None, *, only_ok: bool = False) -> list[str | Run]:
    """Runs in a list, or in a text with commas between them; the table of a batch stands for its runs.

    Args:
        runs: names or folders, or files that :func:`refinelib.workflows.batch.save` wrote.
        only_ok: take only those runs of a table that ended as ok.

    Raises:
        RunError: a table cannot be read, or lists no such run.

    Example:
        >>> named("best, best-2,"), named(None)
        (['best', 'best-2'], [])
    """
    found: list[str | Run] = []
    for run in runs.split(",") if isinstance(runs, str) else runs or ():
        name = run if isinstance(run, Run) else run.strip()
        if isinstance(name, str) and name.endswith(".csv"):
            found += _listed(name, only_ok)
        elif name:
            found.append(name)
    return found


def _listed(table: str, only_ok: bool) -> list[str]:
    file = existing(table)
    with retold(RunError, f"the table {file} cannot be read: ", causes=(OSError, ValueError, csv.Error)):
        rows = list(csv.DictReader(io.StringIO(file.read_text("utf-8"))))
    kept = [row for row in rows if row.get("folder") and (not only_ok or row.get("state") == "ok")]
    if not kept:
        raise RunError(f"the table {file} lists no run{' that ended as ok' * only_ok}")
    return [str(file.parent / row["folder"]) for row in kept]


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
        fits: whether a run holds what is needed: :func:`has_weights`, ``gradients.files``.
        **overrides: settings of the tiny run.

    Raises:
        RunError: the run that is named does not exist.
    """
    if run is not None:
        return run if isinstance(run, Run) else Run.open(run, output_dir=output_dir)
    for folder in (root(output_dir), absolute(output_dir), absolute(output_dir) / "smoke"):
        if found := newest(folder, name, fits=fits):
            return found
    return tiny(output_dir, run=name, **overrides)


def debug_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a debug run: small as the recipe ``debug``, and apart from the runs of its own recipe.

    It lies in the folder ``debug-runs`` of its ``output_dir``, so that nobody takes it for a result.

    Args:
        given: settings by name, which come first.
    """
    size = {name: value for name, value in load_recipe("debug").items() if name in SIZE}
    chosen = {**size, **{name: value for name, value in given.items() if value is not None}}
    settings = resolve(**chosen)
    root, store = settings.output_dir, settings.store_dir
    return {**chosen, "output_dir": f"{root}/{DEBUG_DIR}", "store_dir": store or f"{root}/stores"}


def tiny(output_dir: str = "outputs", **overrides: Any) -> Run:
    """Train the recipe ``debug`` on fewer pixels, for longer: 15 seconds on a CPU, masks but no good ones."""
    size = {"epochs": 8, "max_images": 24, "width": 0.0625, "batch_size": 4, "roi_size": 32, "mask_size": 32}
    settings = {"output_dir": output_dir, **size, "lr": 3e-3, "context": 0.5, **overrides}
    return trainer.train(resolve("debug", **{**settings, "run": settings.get("run") or "tiny"}))


def earlier(settings: Settings) -> Run | None:
    """The run of this name and these settings that a notebook shows, in place of training it twice.

    It prints what there is and how to go on. A run without any epoch or checkpoint does not count.

    Args:
        settings: of the notebook. A finished run has the very same ones, another one those of a resume.

    Returns:
        None where the notebook trains: there is no such run, nobody watches (papermill), or with ``resume``.
    """

    def is_same(run: Run) -> bool:
        with contextlib.suppress(RunError):
            state = run.status().get("state")
            has_something = state == "running" or run.has_checkpoint or bool(run.epochs())
            return has_something and run.fits(settings, exactly=state == "ok")
        return False

    run = newest(settings.path(settings.output_dir), settings.run_name, fits=is_same)
    if run is None or (settings.resume and not (widgets.interactive() and is_locked(run.folder))):
        return None
    status = run.status()
    state, goes_on = status.get("state"), run.has_checkpoint and status.get("state") not in ("ok", "diverged")
    where = status.get("last_error") or f"epoch {status.get('epoch')} of {status.get('epochs')}"
    about = f"{run.name}, a run of these settings, is {state} ({where})"
    if not widgets.interactive():
        print(f"{about}. A new run is trained{'; with -p resume true that one goes on' if goes_on else ''}.")
        return None
    again = "resume = True in the parameters goes on with it, " if goes_on else ""
    again = "" if settings.resume else f": {again}run = 'NAME' trains a new one"
    print(f"{about}. It is shown below, and nothing is trained here{again}.")
    return run


def note_size(*made: Any) -> None:
    """Display a sentence where smoke size or a tiny run forbids conclusions; nothing elsewhere.

    Args:
        *made: what the notebook shows: runs, settings, or what has ``settings`` of a run.
    """
    own = [recorded_settings(one) if isinstance(one, Run) else getattr(one, "settings", one) for one in made]
    found = [dict(settings) for settings in own]
    smoke = resolve("debug").smoke or any(settings.get("smoke") for settings in found)
    if smoke or any(settings.get("recipe") == "debug" for settings in found):
        text = f"{'Smoke size' if smoke else 'A tiny run'}: trained for seconds, to show how this works."
        text += " No score, difference or verdict below says anything about the method."
        display.display(display.Markdown(f"> **{text}**"))  # type: ignore[no-untyped-call]


def has_weights(run: Run) -> bool:
    """Whether the run has a checkpoint that this version reads."""
    try:
        checkpoints.load(checkpoints.find(run.folder))
    except checkpoints.CheckpointError:
        return False
    return True
