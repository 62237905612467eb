"""Recipes in a row by one line: one real run in smoke size; what happens when a notebook fails or dies."""

import os
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from refinelib.__main__ import main
from refinelib.config import project_root
from refinelib.runs import Run
from refinelib.workflows import batch


def shell(*command: object, output_dir: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "REFINELIB_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "refinelib",
        "run",
        *map(str, command),
        "-p",
        "output_dir",
        str(output_dir),
    ]
    return subprocess.run(
        command, cwd=project_root(), env=environment, capture_output=True, text=True, timeout=280
    )


def test_a_rehearsal_is_small_and_what_is_given_stays(tmp_path):
    done = shell("phase1", "--debug", "--epochs", 1, "-p", "device", "cpu", output_dir=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = Run(tmp_path / "phase1").settings()
    assert (settings.max_images, settings.batch_size, settings.epochs, settings.lr) == (6, 1, 1, 5e-6)
    assert "epoch    1/1" in done.stdout and "| phase1 | ok | 1 of 1 |" in done.stdout
    assert f"phase1: {tmp_path / 'phase1.ipynb'}" in done.stdout and (tmp_path / "phase1.ipynb").is_file()


class DeadKernelError(RuntimeError):
    """As nbclient raises it."""


class CellError(RuntimeError):
    """As papermill raises it."""

    ename, evalue = "CheckpointError", "there is no run 'phase4': train it first\nand more"


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    """Outcomes by recipe, of notebooks that leave a run and end as they are told."""

    def outcomes_of(**ends: tuple[str | None, BaseException | None]) -> dict[str, batch.Outcome]:
        def execute(source, target, parameters, **_):
            state, error = ends[parameters["recipe"]]
            if state is not None:
                run = Run(tmp_path / parameters["recipe"])
                run.folder.mkdir()
                run.update(
                    state=state,
                    epoch=1,
                    epochs=2,
                    last_error="its last loss was NaN" if state == "diverged" else None,
                )
            if error is not None:
                raise error

        monkeypatch.setattr(papermill, "execute_notebook", execute)
        found = batch.run(list(ends), {"output_dir": str(tmp_path), "init_from": "none"})
        return {outcome.recipe: outcome for outcome in found}

    return outcomes_of


def test_a_recipe_that_fails_does_not_stop_the_next_one(outcomes, tmp_path):
    found = outcomes(
        finetune=("failed", CellError()),
        phase2=("running", DeadKernelError()),
        phase3=("diverged", None),
        phase4=(None, CellError()),
        stable=("ok", None),
    )
    assert {recipe: outcome.state for recipe, outcome in found.items()} == {
        "finetune": "failed", "phase2": "failed", "phase3": "diverged", "phase4": "failed", "stable": "ok"
    }  # fmt: skip
    assert found["finetune"].error == "CheckpointError: there is no run 'phase4': train it first"
    assert found["phase3"].error == "its last loss was NaN" and found["phase4"].run is None
    killed = Run(tmp_path / "phase2").status()
    assert killed["state"] == "failed" and "kernel died" in killed["last_error"] == found["phase2"].error
    table = batch.table(list(found.values()))
    assert "| stable | ok | 1 of 2 |" in table and "| phase4 | failed |  |" in table


def test_recipes_of_one_name_keep_their_notebooks(tmp_path, monkeypatch):
    recipes = [str(tmp_path / folder / "mine.yaml") for folder in "ab"]
    for recipe in map(Path, recipes):
        recipe.parent.mkdir()
        recipe.write_text("epochs: 2\n")
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda source, target, **_: Path(target).write_text("")
    )
    found = batch.run([*recipes, "phase1"], {"output_dir": str(tmp_path)})
    names = ["mine.ipynb", "mine-2.ipynb", "phase1.ipynb"]
    assert [outcome.notebook.name for outcome in found] == names and [o.recipe for o in found][:2] == recipes
    assert all((tmp_path / name).is_file() for name in names)


def test_an_interruption_ends_the_batch(outcomes):
    found = outcomes(phase1=("interrupted", KeyboardInterrupt()), phase2=("ok", None))
    assert [outcome.state for outcome in found.values()] == ["interrupted"]


def test_a_run_that_ended_before_is_not_taken_for_this_one(outcomes, tmp_path):
    earlier = Run(tmp_path / "phase1")
    earlier.folder.mkdir()
    earlier.update(state="ok")
    os.utime(tmp_path / "phase1" / "status.json", (1e9, 1e9))
    assert outcomes(phase1=(None, CellError()))["phase1"].run is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("stable", "phse2"), "did you mean 'phase2'?"),
        (("stable", "-p", "learning_rate", "1"), "did you mean 'lr'?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, arguments, message, capsys):
    assert main(["run", *arguments, "-p", "output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
