"""Several recipes in a row, each through ``notebooks/train.ipynb``, as people leave it running overnight."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from refinelib.config import Settings, load_recipe, project_root, resolve
from refinelib.runs import Run

#: What ``debug`` takes from params/debug.yaml: its size, and nothing else.
SIZE = ("max_images", "epochs", "batch_size", "warmup_epochs", "width")
HEAD = ("recipe", "state", "epochs", "target IoU", "Boundary IoU", "skipped", "seconds", "error")


@dataclass
class Outcome:
    """How one recipe went."""

    recipe: str
    state: str  # the run's, or failed where the notebook did
    seconds: float
    notebook: Path
    run: Path | None = None
    error: str = ""

    def row(self) -> tuple[str, ...]:
        """Cells of the table, in the order of ``HEAD``."""
        status = Run(self.run).status() if self.run else {}
        best = status.get("best") or {}
        scores = ("" if best.get(key) is None else f"{best[key]:.3f}" for key in ("target_iou", "boundary_iou"))
        epochs = f"{status.get('epoch', 0)} of {status['epochs']}" if status.get("epochs") else ""
        return (self.recipe, self.state, epochs, *scores, str(status.get("skipped_steps", "")), f"{self.seconds:.0f}", self.error)


def run(recipes: Sequence[str], overrides: Mapping[str, Any] = {}, *, debug: bool = False) -> list[Outcome]:
    """Execute ``notebooks/train.ipynb`` for each recipe, one after the other, and go on after one that failed.

    The executed notebook is ``<recipe>.ipynb`` beside the run folders; of one that failed, the last cell says why. The lines
    about its epochs are printed here too.

    Args:
        recipes: names of files in ``params/``, or paths to some.
        overrides: settings by name, for all of them.
        debug: a rehearsal, small as the recipe ``debug`` is; what ``overrides`` say stays.

    Raises:
        SettingsError: a recipe or setting is wrong; nothing has been started then.
    """
    overrides = {**({name: value for name, value in load_recipe("debug").items() if name in SIZE} if debug else {}), **overrides}
    settings = {recipe: resolve(recipe, **overrides) for recipe in recipes}
    outcomes: list[Outcome] = []
    for recipe, checked in settings.items():
        print(f"-- {recipe}, {len(outcomes) + 1} of {len(settings)}", flush=True)
        outcomes.append(_one(recipe, checked, {**overrides, "recipe": recipe}))
        print(f"-- {recipe}: {outcomes[-1].state}" + (f", {outcomes[-1].error}" if outcomes[-1].error else ""), flush=True)
        if outcomes[-1].state == "interrupted":
            break
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a recipe, in columns, and where the executed notebooks lie."""
    rows = [HEAD, *(outcome.row() for outcome in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    lines += ["", *(f"{outcome.recipe}: {outcome.notebook}" for outcome in outcomes)]
    return "\n".join(lines)


class _Epochs:
    """Passes on what a notebook prints of its progress, and keeps the rest for the executed notebook."""

    def __init__(self) -> None:
        self.rest = ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith("epoch ") or re.search(r"\d+ a second, \d+ s left", line):
                print(line, flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


# -- one recipe ------------------------------------------------------------------------------------
def _one(recipe: str, settings: Settings, parameters: dict[str, Any]) -> Outcome:
    import papermill  # slow to import, and only a batch needs it

    root = settings.path(settings.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(recipe, "ok", 0.0, root / f"{Path(recipe).stem}.ipynb")
    started, clock = time.time(), time.perf_counter()
    try:
        papermill.execute_notebook(
            str(project_root() / "notebooks" / "train.ipynb"), str(outcome.notebook), parameters=parameters,
            kernel_name="python3", progress_bar=False, stdout_file=_Epochs(),
        )  # fmt: skip
    except KeyboardInterrupt:
        outcome.state, outcome.error = "interrupted", "interrupted by hand"
    except Exception as error:  # whatever stopped it, the next one is begun
        outcome.state, outcome.error = "failed", _sentence(error)
    outcome.seconds = time.perf_counter() - clock
    outcome.run = _made_since(started, root, settings.run_name)
    if outcome.run is not None:
        _agree(outcome)
    if outcome.error:
        _say_so_at_the_end(outcome)
    return outcome


def _sentence(error: Exception) -> str:
    """One line: what the cell raised, or what happened to the kernel."""
    if type(error).__name__ == "DeadKernelError":
        return "the notebook's kernel died: killed, or out of memory"
    if hasattr(error, "ename"):
        first = (str(error.evalue).splitlines() or ["no message"])[0]
        return f"{error.ename}: {first}"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _made_since(started: float, root: Path, name: str) -> Path | None:
    """The folder of this run: the one of its name whose status changed last, if it has since then."""
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    found = [(file.stat().st_mtime, file.parent) for file in root.glob(f"{name}*/status.json") if numbered.fullmatch(file.parent.name)]
    found = [item for item in found if item[0] >= started - 1]  # file systems round
    return max(found)[1] if found else None


def _agree(outcome: Outcome) -> None:
    """Let the run's status and the outcome say the same."""
    run = Run(outcome.run)
    status = run.status()
    if status["state"] == "running":  # a dead kernel had no time to say otherwise
        outcome.state = "interrupted" if outcome.state == "interrupted" else "failed"
        outcome.error = outcome.error or "the notebook ended and the run did not"
        run.update(**status | {"state": outcome.state, "last_error": outcome.error})
    elif status["state"] != "ok":
        outcome.state, outcome.error = status["state"], status.get("last_error") or outcome.error


def _say_so_at_the_end(outcome: Outcome) -> None:
    """Append a last cell with the sentence to the executed notebook."""
    import nbformat

    if not outcome.notebook.is_file():
        return
    notebook = nbformat.read(outcome.notebook, as_version=4)
    where = next((c.id for c in notebook.cells if any(o.output_type == "error" for o in c.get("outputs", []))), None)
    text = f"## This notebook {'was interrupted' if outcome.state == 'interrupted' else 'failed'}\n\n"
    text += (f"In the cell `{where}`: " if where else "") + outcome.error
    if outcome.run is not None:
        text += f"\n\nThe run is `{outcome.run.name}`; its `status.json` says the same."
    notebook.cells.append(nbformat.v4.new_markdown_cell(text, id="outcome"))
    nbformat.write(notebook, outcome.notebook)
