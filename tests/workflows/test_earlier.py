"""A run that there is already: shown in JupyterLab in place of training it twice, named in a headless run."""

from __future__ import annotations

import os
import subprocess
import sys

import nbclient
import pytest
from helpers import make_run
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from refinelib.config import project_root, resolve
from refinelib.files import owner
from refinelib.plots import widgets
from refinelib.runs import Run
from refinelib.workflows.examples import earlier


@pytest.fixture
def demo(tmp_path) -> Run:
    """A run of the recipe ``demo`` with a checkpoint."""
    run = make_run(tmp_path / "demo", recipe="demo")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "last.pt").touch()
    return run


def settings(run: Run, /, **more):
    return resolve("demo", output_dir=str(run.folder.parent), **more)


@pytest.fixture(params=[True, False], ids=["watched", "headless"])
def watched(request, monkeypatch) -> bool:
    monkeypatch.setattr(widgets, "interactive", lambda: request.param)
    return request.param


@pytest.mark.parametrize("state", ["ok", "killed", "interrupted", "failed", "diverged", "running"])
def test_a_run_of_these_settings_is_named_and_where_somebody_watches_shown(demo, state, watched, capsys):
    demo.update(**demo.status() | owner() | {"state": state, "last_error": "the reason"})
    found = earlier(settings(demo))
    assert (found and found.folder) == (demo.folder if watched else None)
    said = capsys.readouterr().out
    assert said.startswith(f"demo, a run of these settings, is {state} (the reason). ")
    assert ("resume = True" in said or "-p resume true" in said) == (state not in ("ok", "diverged"))
    assert ("nothing is trained here" if watched else "A new run is trained") in said


def test_other_settings_are_another_run(demo, monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    assert earlier(settings(demo)) and not earlier(settings(demo, run="other"))
    for more in ({"lr": 1e-4}, {"epochs": 9}, {"probe_every": 3}):
        assert earlier(settings(demo, **more)) is None, "a finished run has the very same settings"
    demo.update(**demo.status() | {"state": "interrupted"})
    assert earlier(settings(demo, epochs=9, probe_every=3)) and not earlier(settings(demo, lr=1e-4))
    assert earlier(settings(demo, resume=True)) is None
    (demo.folder / "status.json").write_text("{")
    assert earlier(settings(demo)) is None


def test_a_resume_while_another_process_trains_shows_how_far_it_is(demo, monkeypatch, capsys):
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    with demo.exclusive():
        assert earlier(settings(demo, resume=True)).folder == demo.folder
    assert capsys.readouterr().out.endswith("It is shown below, and nothing is trained here.\n")


def test_a_resume_takes_the_run_of_its_settings(demo):
    other = make_run(demo.folder.with_name("demo-2"), recipe="demo", lr=1e-4)
    (other.folder / "checkpoints").mkdir()
    (other.folder / "checkpoints" / "last.pt").touch()
    assert Run.start(settings(demo, resume=True)).name == "demo"
    assert Run.start(settings(demo, lr=1e-4, resume=True)).name == "demo-2"
    assert Run.start(settings(demo, lr=1e-5, resume=True)).name == "demo-2", "whose settings are refused"


CODE = "import json, sys, refinelib; refinelib.train(refinelib.Settings(**json.loads(sys.argv[1])))"


@pytest.mark.slow
def test_run_all_after_a_killed_kernel_shows_the_run_and_resumes_it_when_asked(tiny, tmp_path, monkeypatch):
    """train.ipynb in a kernel that believes to belong to JupyterLab."""
    chosen = tiny(epochs=3, max_images=4)
    killed = chosen.model_copy(update={"inject": "kill@9"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CODE, killed.model_dump_json()], env=environment, check=False)
    assert Run(tmp_path / "demo").status()["state"] == "killed"
    monkeypatch.setenv("JPY_SESSION_NAME", "train.ipynb")
    plain = {name: value for name, value in chosen.model_dump(mode="json", exclude_defaults=True).items()}

    def run_all(**more):
        source = load_notebook_node(str(project_root() / "notebooks" / "train.ipynb"))
        given = parameterize_notebook(source, plain | more, kernel_name="python3", language="python")
        client = nbclient.NotebookClient(given, timeout=300, kernel_name="python3", allow_errors=True)
        client.execute()
        return {cell.id: str(cell.get("outputs")) for cell in given.cells}

    outputs = run_all()
    assert "is killed (stopped after epoch" in outputs["train"] and "resume = True" in outputs["train"]
    assert "image/png" in outputs["overview"] and "| target IoU |" in outputs["metrics"]
    assert (
        "demo killed: stopped after epoch 2 of 3, step 6 of 9; -p resume true goes on" in outputs["verdict"]
    )
    outputs = run_all(resume=True)
    assert "demo: ok" in outputs["verdict"] and "image/png" in outputs["train"]
    assert any(event["kind"] == "resume" for event in Run(tmp_path / "demo").events())
    assert not list(tmp_path.glob("demo-*"))
