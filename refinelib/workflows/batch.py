"""Several recipes in a row, each through ``notebooks/train.ipynb``: for a night's training."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refinelib.config import Settings, load_recipe, project_root, resolve
from refinelib.plots.style import table as markdown
from refinelib.runs import Run, newest

#: What ``debug`` takes from params/debug.yaml: its size, and nothing else.
SIZE = ("max_images", "epochs", "batch_size", "warmup_epochs", "width")


class Outcome(NamedTuple):
    """How one recipe went."""

    recipe: str
    state: str  # the run's, or failed where the notebook did
    error: str
    seconds: float
    notebook: Path
    run: Run | None


def run(
    recipes: Sequence[str], overrides: Mapping[str, Any] | None = None, *, debug: bool = False
) -> list[Outcome]:
    """Execute ``notebooks/train.ipynb`` for each recipe; a recipe that fails does not stop the next one.

    The executed notebook is ``<recipe>.ipynb`` beside the run folders, ``<recipe>-2.ipynb`` for the second of
    that name; what it prints is printed here too.

    Args:
        recipes: names of files in ``params/``, or paths to some.
        overrides: settings by name, for all of them.
        debug: a rehearsal, small as the recipe ``debug`` is; ``overrides`` come first.

    Raises:
        SettingsError: a recipe or setting is wrong; nothing has been started then.
    """
    size = {name: value for name, value in load_recipe("debug").items() if debug and name in SIZE}
    given = {**size, **(overrides or {})}
    settings = {recipe: resolve(recipe, **given) for recipe in recipes}
    outcomes: list[Outcome] = []
    for recipe in recipes:
        print(f"-- {recipe}, {len(outcomes) + 1} of {len(recipes)}", flush=True)
        same = sum(Path(before.recipe).stem == Path(recipe).stem for before in outcomes)
        name = Path(recipe).stem + (f"-{same + 1}" if same else "")
        outcomes.append(_run_one(name, settings[recipe], {**given, "recipe": recipe}))
        print(f"-- {recipe}: {outcomes[-1].state} {outcomes[-1].error}", flush=True)
        if outcomes[-1].state == "interrupted":
            break
    return outcomes


def _run_one(name: str, settings: Settings, parameters: dict[str, Any]) -> Outcome:
    import papermill  # slow to import

    root, source = settings.path(settings.output_dir), project_root() / "notebooks" / "train.ipynb"
    root.mkdir(parents=True, exist_ok=True)
    notebook, state, error, started = root / f"{name}.ipynb", "ok", "", time.time()
    options = {"kernel_name": "python3", "progress_bar": False, "stdout_file": sys.stdout}
    try:
        papermill.execute_notebook(str(source), str(notebook), parameters=parameters, **options)
    except KeyboardInterrupt:
        state, error = "interrupted", "interrupted by hand"
    except Exception as raised:  # the next recipe is started, whatever stopped this one
        state, error = "failed", f"{getattr(raised, 'ename', '')}: {getattr(raised, 'evalue', raised)}"
        if "DeadKernel" in type(raised).__name__:
            error = "kernel died, killed or out of memory"

    def is_new(run: Run) -> bool:
        return (run.folder / "status.json").stat().st_mtime >= started - 1  # times are rounded

    made = newest(root, settings.run_name, fits=is_new)
    status = made.status() if made else {"state": state}
    if made and status["state"] == "running":  # a dead kernel could not write its last status
        made.update(**status | {"state": "failed" if state == "ok" else state, "last_error": error})
    elif status["state"] != "ok":
        state, error = status["state"], status.get("last_error") or error
    return Outcome(parameters["recipe"], state, error.split("\n")[0], time.time() - started, notebook, made)


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, a line a recipe, and where the executed notebooks are."""
    rows = []
    for outcome in outcomes:
        status = outcome.run.status() if outcome.run else {}
        found = [(status.get("best") or {}).get(key) for key in ("target_iou", "boundary_iou")]
        scores = [None if score is None else f"{score:.3f}" for score in found]
        epochs = f"{status['epoch']} of {status['epochs']}" if status.get("epochs") else ""
        cells = [epochs, *scores, status.get("skipped_steps"), f"{outcome.seconds:.0f}", outcome.error]
        rows.append([outcome.recipe, outcome.state, *cells])
    head = ["recipe", "state", "epochs", "target IoU", "Boundary IoU", "skipped", "seconds", "error"]
    places = [f"{outcome.recipe}: {outcome.notebook}" for outcome in outcomes]
    return "\n".join([markdown(rows, head), "", *places])
