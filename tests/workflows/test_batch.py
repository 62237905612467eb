"""Many runs at once: what a grid expands to; processes that end in every way; real runs in smoke size."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinelib.__main__ import main
from refinelib.config import SettingsError, project_root, resolve
from refinelib.runs import Run, newest
from refinelib.workflows import batch, compare

ENVIRONMENT = {**os.environ, "REFINELIB_SMOKE": "1", "OMP_NUM_THREADS": "1"}


def command(*words: object, output_dir: Path) -> list[str]:
    line = [sys.executable, "-m", "refinelib", "run", *words, "-p", "device", "cpu", "-p", "output_dir"]
    return [*map(str, line), str(output_dir)]


# -- what to train -----------------------------------------------------------------------------------
def test_a_plain_list_keeps_its_names():
    assert [(job.name, job.given, job.varied) for job in batch.plan(["phase1", "phase2"], {"seed": "3"})] == [
        ("phase1", {"seed": "3", "recipe": "phase1"}, ()),
        ("phase2", {"seed": "3", "recipe": "phase2"}, ()),
    ]


@settings(deadline=None, max_examples=25)
@given(
    recipes=st.lists(st.sampled_from(["demo", "best", "phase1"]), min_size=1, max_size=3),
    seeds=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True),
    rates=st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=3, unique=True),
    sizes=st.lists(st.tuples(*[st.integers(16, 512)] * 2), min_size=1, max_size=2, unique=True),
)
def test_every_combination_is_one_run_of_a_name_of_its_own(recipes, seeds, rates, sizes):
    texts = {"lr": rates, "roi_size": map(list, sizes), "seed": seeds}
    texts = {name: ", ".join(map(str, values)) for name, values in texts.items()}
    jobs = batch.plan(recipes, {"data": "synthetic", **texts})
    found = [(j.settings.recipe, j.settings.lr, j.settings.roi_size, j.settings.seed) for j in jobs]
    assert found == list(itertools.product(recipes, rates, sizes, seeds))
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert resolve(**job.given) == job.settings and job.settings.run_name == job.name
        assert job.varied == tuple(name for name, text in texts.items() if text.count(",") > text.count("["))


def test_names_tell_what_varies_and_recipes_of_one_name_are_counted(tmp_path):
    def names(recipes, **overrides):
        return [job.name for job in batch.plan(recipes, {"data": "synthetic", **overrides})]

    assert names(["best"], data="coco", data_dir="x", category="a,b", lr="5e-4", seed="1,2") == [
        "best-seed1",
        "best-seed2",
    ]
    assert names(["demo"], augment="off,full") == ["demo-augment-off", "demo-augment-full"]
    assert names(["demo"], use_contour_detection="true,false")[1] == "demo-use_contour_detection-off"
    assert names(["demo"], max_images="none,4", run="mine") == ["mine-max_images-none", "mine-max_images4"]
    assert names(["demo", "demo"], seed="0,1")[1:3] == ["demo-seed1", "demo-seed0-2"]
    assert names(["demo"], lr="1e-3,0.001") == ["demo-lr0.001", "demo-lr0.001-2"]
    files = [tmp_path / folder / "mine.yaml" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("epochs: 2\n")
    first, second = batch.plan([*map(str, files)])
    assert (first.name, second.name) == ("mine", "mine-2")
    assert "run" not in first.given and second.settings.run == "mine-2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("stable", "phse2"), "did you mean 'phase2'?"),
        (("stable", "-p", "learning_rate", "1"), "did you mean 'lr'?"),
        (("stable", "--seeds", "0,1,x"), "seed = 'x': it must be a whole number"),
        (("stable", "--seeds", "0,"), "seed = '': it must be a whole number"),
        (("stable", "--jobs", "0"), "jobs = 0: give at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, arguments, message, capsys):
    assert main(["run", *arguments, "-p", "output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_before_anything_starts(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "demo", "phase1", "-p", "output_dir", str(tmp_path / "file")]) == 2
    told = capsys.readouterr()
    assert "File exists" in told.err and not told.out


# -- where a process runs ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "visible, count, at_once, expected",
    [
        (None, 0, None, [None]),
        (None, 0, 3, [None] * 3),
        (None, 2, None, ["0", "1"]),
        (None, 2, 3, ["0", "1", "0"]),
        ("6,GPU-12", 2, 4, ["6", "GPU-12"] * 2),
        ("3, 9", 1, None, ["3"]),  # CUDA ignores what follows a name that is none
        ("", 0, 2, [None] * 2),
        (None, 8, None, [str(gpu) for gpu in range(5)]),  # five runs
    ],
)
def test_runs_share_the_gpus_that_are_visible(monkeypatch, visible, count, at_once, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = batch.places(at_once, 5)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in found] == expected
    threads = None if len(expected) == 1 else str(9 // len(expected))
    assert {place.get("OMP_NUM_THREADS") for place in found} == {threads}
    if count == 8:  # several of them for each run
        shares = [place["CUDA_VISIBLE_DEVICES"] for place in batch.places(None, 5, each=3)]
        assert shares == ["0,1,2", "3,4,5"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert not any("OMP_NUM_THREADS" in place for place in batch.places(at_once, 5))


# -- processes that end as they are told ---------------------------------------------------------------
CHILD = """
import json, os, pathlib, sys, time
words = sys.argv[4:]
told = dict(zip(words[1::3], words[2::3]))
print("alone" if "alone" in told else "hello", flush=True)
if "state" in told:
    folder = pathlib.Path(told["output_dir"], told["run"])
    folder.mkdir()
    settings = {"run": told["run"], "recipe": sys.argv[3]}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    status = {"state": told["state"], "epoch": 1, "epochs": 2, "last_error": told.get("error")}
    best = {"target_iou": 0.5, "boundary_iou": None, "miou": 0.25}
    (folder / "status.json").write_text(json.dumps({**status, "best": best, "skipped_steps": 3}))
if "beside" in told:  # ends only if another one runs at the same time
    mine, other = (pathlib.Path(told["output_dir"], name) for name in told["beside"].split())
    mine.write_text("")
    while not other.exists():
        time.sleep(0.01)
if "signal" in told:
    os.kill(os.getpid(), int(told["signal"]))
sys.exit(told.get("says", 0))
"""


@pytest.fixture
def outcomes(tmp_path):
    """Outcomes by name, of processes that leave a run and end as they are told."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)

    def outcomes_of(at_once=1, ended=print, **told: dict[str, object]) -> dict[str, batch.Outcome]:
        where = {"output_dir": str(tmp_path)}
        jobs = []
        for name, more in told.items():
            settings = resolve("demo", **where, init_from=more.get("init_from"))
            jobs.append(batch.Job(name, settings, {"recipe": "demo", "run": name, **where, **more}))
        found = batch.train(jobs, at_once=at_once, command=[sys.executable, str(child)], ended=ended)
        return {outcome.job.name: outcome for outcome in found}

    return outcomes_of


def test_a_run_that_fails_or_is_killed_does_not_stop_the_others(outcomes, tmp_path, capfd):
    found = outcomes(
        at_once=2,
        failed=dict(state="failed", error="no room\nand more", says="Traceback"),
        killed=dict(state="running", signal=9),
        diverged=dict(state="diverged", error="its last loss was NaN", says="x"),
        early=dict(says="CheckpointError: there is no run 'phase4'"),
        spoilt=dict(state="ok", says="NameError: name 'plots' is not defined"),  # a cell after the training
        ok=dict(state="ok"),
    )
    killed = "killed by SIGKILL: by hand, or out of memory"
    assert [(name, outcome.state, outcome.error) for name, outcome in found.items()] == [
        ("failed", "failed", "no room"),
        ("killed", "killed", killed),
        ("diverged", "diverged", "its last loss was NaN"),
        ("early", "failed", "CheckpointError: there is no run 'phase4'"),
        ("spoilt", "failed", "NameError: name 'plots' is not defined"),
        ("ok", "ok", ""),
    ]
    status = Run(tmp_path / "killed").status()
    assert (status["state"], status["last_error"], status["skipped_steps"]) == ("killed", killed, 3)
    assert found["early"].run is None and found["ok"].run.folder == tmp_path / "ok"
    assert "early: hello\n" in capfd.readouterr().out
    table = batch.table(list(found.values()))
    assert "| ok | ok | 1 of 2 | 0.500 |  | 0.250 | 3 |" in table and "| early | failed |  |" in table


def test_runs_go_side_by_side_and_one_alone_prints_as_it_is(outcomes, tmp_path, capfd):
    seen = []
    found = outcomes(
        2,
        lambda outcome, environment: seen.append((outcome.job.name, environment["PYTHONUNBUFFERED"])),
        a=dict(state="ok", beside="x y"),
        b=dict(state="ok", beside="y x"),
    )
    assert {outcome.state for outcome in found.values()} == {"ok"} and sorted(seen) == [
        ("a", "1"),
        ("b", "1"),
    ]
    assert "a: hello\n" in capfd.readouterr().out
    outcomes(c=dict(state="ok", alone=1))
    assert "\nalone\n-- c: ok\n" in capfd.readouterr().out


def test_a_run_waits_for_the_one_it_starts_from(outcomes, tmp_path):
    found = outcomes(2, phase1=dict(state="ok"), phase2=dict(state="ok", init_from="phase1"))
    first, second = ((tmp_path / name / "config.json").stat().st_mtime_ns for name in found)
    assert first < second


def test_a_run_that_ended_before_is_not_taken_for_this_one(outcomes, tmp_path):
    earlier = Run(tmp_path / "phase1")
    earlier.folder.mkdir()
    earlier.update(state="ok")
    os.utime(tmp_path / "phase1" / "status.json", (1e9, 1e9))
    assert outcomes(phase1=dict(says="no"))["phase1"].run is None


def test_the_table_is_kept_and_read_by_the_notebooks(outcomes, tmp_path):
    found = list(outcomes(a=dict(state="ok"), b=dict(says="no"), c=dict(state="diverged")).values())
    file, again = batch.save(found), batch.save(found[:1])
    assert (file.name, again.name) == ("batch.csv", "batch-2.csv")
    rows = list(csv.DictReader(file.open()))
    assert [(row["run"], row["folder"], row["state"]) for row in rows] == [
        ("a", "a", "ok"), ("b", "", "failed"), ("c", "c", "diverged")
    ]  # fmt: skip
    assert rows[0]["target_iou"] == "0.5" and rows[0]["boundary_iou"] == "" and rows[1]["error"] == "no"
    assert [run.name for run in compare.find(str(file))] == ["a", "c"]
    assert f"-p runs {file}" in batch.compare_command(file)


# -- notebooks ---------------------------------------------------------------------------------------
class DeadKernelError(RuntimeError):
    """As nbclient raises it."""


class CellError(RuntimeError):
    """As papermill raises it."""

    ename, evalue = "CheckpointError", "there is no run 'phase4': train it first\nand more"


@pytest.mark.parametrize(
    "raised, line",
    [
        (CellError(), "CheckpointError: there is no run 'phase4': train it first"),
        (DeadKernelError(), "the kernel died, killed or out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError("no room"), "OSError: no room"),
        (None, None),
    ],
)
def test_how_a_notebook_ended_is_one_line(monkeypatch, raised, line):
    def execute_notebook(source, target, parameters, **_):
        assert (Path(source).name, target, parameters) == ("train.ipynb", "b", {"seed": "1"})
        if raised is not None:
            raise raised

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    assert batch.execute("b", '{"seed": "1"}') == line


@pytest.mark.slow
def test_a_debug_run_is_small_and_apart_and_what_is_given_stays(tmp_path):
    line = command("phase1", "--debug", "--epochs", 1, output_dir=tmp_path)
    done = subprocess.run(
        line, cwd=project_root(), env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    apart = tmp_path / "debug-runs"
    settings = Run(apart / "phase1").settings()
    assert (settings.max_images, settings.batch_size, settings.epochs, settings.lr) == (6, 1, 1, 5e-6)
    assert "\nepoch    1/1" in done.stdout and "| phase1 | ok | 1 of 1 |" in done.stdout
    assert f"phase1, 1 of 1: {apart / 'phase1.ipynb'}" in done.stdout
    assert (apart / "phase1.ipynb").is_file() and not (apart / "batch.csv").exists()
    assert newest(tmp_path, "phase1") is None and {file.name for file in tmp_path.iterdir()} == {
        "debug-runs", "stores"
    }  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_stops_all_and_each_leaves_a_checkpoint(tmp_path):
    """Two notebooks at once, a third that waits."""
    size = [f"-p {name} {value}".split() for name, value in {"smoke": "false", "width": 0.0625}.items()]
    size += [f"-p {name} {value}".split() for name, value in {"roi_size": 16, "mask_size": 16}.items()]
    words = ["debug", "--seeds", "0,1,2", "--jobs", 2, "--epochs", 5000, *itertools.chain(*size)]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "REFINELIB_SMOKE"}
    line = command(*words, "-p", "probe_every", 0, output_dir=tmp_path)
    records = [tmp_path / f"debug-seed{seed}" / "checkpoints" / "last.pt" for seed in (0, 1)]
    with subprocess.Popen(
        line, cwd=project_root(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        start = time.time()
        while not all(file.exists() for file in records) and running.poll() is None:
            assert time.time() - start < 120
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[0]
    assert running.returncode == 1, said
    for seed in (0, 1):
        assert Run(tmp_path / f"debug-seed{seed}").status()["state"] == "interrupted"
        notebook = json.loads((tmp_path / f"debug-seed{seed}.ipynb").read_text())
        assert "KeyboardInterrupt" in json.dumps(notebook)
        assert f"| debug-seed{seed} | {seed} | interrupted |" in said and f"debug-seed{seed}: epoch " in said
    assert "| debug-seed2 | 2 | not started |" in said and not (tmp_path / "debug-seed2.ipynb").exists()
    states = [row["state"] for row in csv.DictReader((tmp_path / "batch.csv").open())]
    assert states == ["interrupted", "interrupted", "not started"]
    again = batch.plan(["debug"], {"seed": "0,1,2", "resume": "true", "output_dir": str(tmp_path)})
    lines = [batch._line(job, batch.REFINELIB) for job in again]
    assert [line[line.index("resume") + 1].lower() for line in lines] == ["true", "true", "false"]


def test_a_grid_is_refused_with_the_settings_sentence():
    with pytest.raises(SettingsError, match="epochs = '0': "):
        batch.plan(["demo"], {"epochs": "1,0"})
