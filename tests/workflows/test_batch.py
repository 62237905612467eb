"""Recipes in a row by one line, and each by papermill with its parameter file: real runs in smoke size."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from refinelib.config import project_root, resolve
from refinelib.runs import Run
from refinelib.trainer import train
from refinelib.workflows import batch

SMALL = ("-p", "max_images", "3", "-p", "device", "cpu")


def shell(*command: object, output_dir: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "REFINELIB_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, command), "-p", "output_dir", str(output_dir)]
    return subprocess.run(
        command, cwd=project_root(), env=environment, capture_output=True, text=True, timeout=280
    )


def cells_of(notebook: Path):
    return nbformat.read(notebook, as_version=4).cells


def test_goes_on_after_failed_ones_and_ends_with_a_table_and_the_exit_code(tmp_path):
    """The first breaks off with a sentence, the second is killed, the third is well."""
    kill = tmp_path / "kill.yaml"
    kill.write_text((project_root() / "params" / "phase2.yaml").read_text() + "\ninject: kill@2\n")
    done = shell(
        "refinelib",
        "run",
        "finetune",
        kill,
        "stable",
        "--epochs",
        1,
        "--batch-size",
        2,
        *SMALL,
        output_dir=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    head, *rows = done.stdout[done.stdout.index("\nrecipe") + 1 :].splitlines()[:4]
    assert [word for word in batch.HEAD if word not in head] == []
    found = {row.split()[0]: row for row in rows}
    assert set(found) == {"finetune", str(kill), "stable"}
    assert "failed" in found["finetune"] and "there is no run 'phase4'" in found["finetune"]
    assert "failed" in found[str(kill)] and "kernel died" in found[str(kill)]
    assert " ok " in found["stable"] and "1 of 1" in found["stable"]
    assert done.stdout.count("epoch    1/1") == 1 and "blend_init" not in done.stdout

    last = cells_of(tmp_path / "finetune.ipynb")[-1].source
    assert "failed" in last and "In the cell `" in last and "there is no run 'phase4'" in last
    assert "phase4" in Run(tmp_path / "finetune").status()["last_error"]
    killed = Run(tmp_path / "kill").status()
    assert killed["state"] == "failed" and "kernel died" in killed["last_error"]
    assert "kernel died" in cells_of(tmp_path / "kill.ipynb")[-1].source
    assert "failed" not in cells_of(tmp_path / "stable.ipynb")[-1].source
    settings = Run(tmp_path / "stable").settings()
    assert (settings.epochs, settings.batch_size, settings.max_images, settings.smoke) == (1, 2, 3, True)


def test_a_rehearsal_is_small_and_what_is_given_stays(tmp_path):
    done = shell(
        "refinelib", "run", "phase1", "--debug", "--epochs", 1, "-p", "device", "cpu", output_dir=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    settings = Run(tmp_path / "phase1").settings()
    assert (settings.max_images, settings.batch_size, settings.epochs, settings.lr) == (6, 1, 1, 5e-6)


@pytest.mark.parametrize(
    "arguments, sentence",
    [(("stable", "phse2"), "did you mean 'phase2'?"), (("stable", "-p", "learning_rate", "1"), "did you mean 'lr'?"), (("stable", "--epochs", "0"), "epochs = 0")],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, arguments, sentence):
    done = shell("refinelib", "run", *arguments, output_dir=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ended_before_is_not_taken_for_this_one(tmp_path):
    for name in ("phase1", "phase1-2", "phase1-alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
    for name, age in (("phase1", 500), ("phase1-2", 10)):
        os.utime(tmp_path / name / "status.json", (1e9 - age, 1e9 - age))
    assert batch._made_since(1e9, tmp_path, "phase1") is None
    assert batch._made_since(1e9 - 100, tmp_path, "phase1") == tmp_path / "phase1-2"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained run to start from."""
    where = dict(
        output_dir=str(tmp_path_factory.mktemp("before")), smoke=True, epochs=1, max_images=3, device="cpu"
    )
    return train(resolve("phase1", **where)).folder


# phase1 is rehearsed above, test_notebooks.py runs phase4 by its file, and test_recipes.py reads every file.
@pytest.mark.parametrize("recipe", ["finetune", "debug"])
def test_each_recipe_by_papermill_and_its_parameter_file(tmp_path, source, recipe):
    """``papermill notebooks/train.ipynb outputs/phase2.ipynb -f params/phase2.yaml``, from the weights of the phase before."""
    before = None if recipe == "debug" else str(source)
    given = ("-p", "init_from", before) if before else ()
    line = (
        "papermill",
        "notebooks/train.ipynb",
        tmp_path / f"{recipe}.ipynb",
        "-f",
        f"params/{recipe}.yaml",
        *given,
        "-p",
        "epochs",
        1,
        *SMALL,
    )
    done = shell(*line, output_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / recipe)
    assert run.status()["state"] == "ok"
    assert (run.settings().recipe, run.settings().init_from) == (recipe, before)
