"""Small runs of the benches: hard kills, the fault matrix, variants side by side, a cold start."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import bench

from refinelib.config import project_root, resolve
from refinelib.data import open_split
from refinelib.modeling.layers import GroupNorm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_hard_kills_lose_nothing(tmp_path, capfd):
    outcome = bench("kill").attack(tmp_path, 2, random.Random(1), epochs=5)
    assert outcome["kills"] == 2 and outcome["equal"] and outcome["damaged_checkpoints"] == 0, outcome
    (run,) = [file.parents[1] for file in tmp_path.glob("hurt*/checkpoints/last.pt")]
    assert not list(run.glob("**/.*.tmp"))


def test_a_comparison_of_killed_runs_can_fail(tmp_path):
    """Epochs that differ in anything but how long they took are told apart."""
    kill = bench("kill")
    assert kill._plain({"epoch": 1, "train_loss": 2.0, "seconds": 1.0}) == kill._plain(
        {"epoch": 1, "train_loss": 2.0, "seconds": 9.0}
    )
    assert kill._plain({"epoch": 1, "train_loss": 2.0}) != kill._plain({"epoch": 1, "train_loss": 2.0000001})
    assert not kill._whole(tmp_path / "nowhere.pt")


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    matrix = bench("fault_matrix")
    return matrix, matrix.column("cpu", "off", "adamw", str(tmp_path_factory.mktemp("matrix")))


@pytest.mark.slow
def test_every_fault_in_full_precision_is_survived_exact_and_attributed(column):
    matrix, cells = column
    assert [cell["kind"] for cell in cells] == list(matrix.KINDS)
    wrong = [cell for cell in cells if not (cell["survived"] and cell["exact"] and cell["attribution"])]
    assert not wrong
    assert sum(cell["skipped"] for cell in cells) >= sum(bool(skips) for skips in matrix.KINDS.values())
    text = matrix.table(cells, "CPU")
    assert f"{len(cells)} of {len(cells)} cells good" in text and "**not" not in text


@pytest.mark.slow
def test_the_matrix_notices_what_is_wrong(column):
    """A step that was called skipped and moved something; one that names another place; one that left NaN."""
    matrix, cells = column
    text = matrix.table([{**cells[0], "exact": False}, *cells[1:]], "CPU")
    assert f"{len(cells) - 1} of {len(cells)}" in text and "**not exact**" in text
    skip = dict(kind="skip", message="step 3 skipped", parameters=["stem.0.0.weight"])
    assert matrix.attributed("grad:nan:stem", True, [skip]) and not matrix.attributed(
        "grad:nan:boundary", True, [skip]
    )
    assert not matrix.attributed("grad:nan:stem", True, [])


PARENT = """
import subprocess, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from children import end_with_me

def work(folder):
    nested = [sys.executable, "-c", "import time; time.sleep(300)"]
    command = f"import subprocess; subprocess.run({nested})"
    Path(folder, "pool").touch()
    subprocess.run([sys.executable, "-c", command], start_new_session=True)

if __name__ == "__main__":
    end_with_me()
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            if sys.argv[2] == "pool":
                list(pool.map(work, [sys.argv[1]]))
            elif sys.argv[2] == "run":
                work(sys.argv[1])
            else:
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
                sys.stdin.read()  # until the test has seen it
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pool", "run", "exit"])
def test_a_bench_that_is_ended_ends_what_it_started(tmp_path, how):
    file, runs = tmp_path / "parent.py", tmp_path / "runs"
    file.write_text(PARENT)
    runs.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(project_root() / "bench")}
    command = [sys.executable, str(file), str(runs), how]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as parent:
        process, deadline, started = psutil.Process(parent.pid), time.time() + 60, []
        deep = {"pool": 4, "run": 2, "exit": 1}[how]  # a pool has a process that watches its semaphores
        while len(started) < deep and time.time() < deadline and parent.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                started = process.children(recursive=True)
            time.sleep(0.02)
        assert len(started) >= deep
        if how == "exit":
            parent.stdin.close()
        else:
            parent.terminate()
        assert parent.wait(30) == (0 if how == "exit" else 128 + signal.SIGTERM)
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive and not [place for place in runs.iterdir() if place.is_dir()]


def test_every_bench_that_starts_processes_ends_them():
    for file in (project_root() / "bench").glob("*.py"):
        text = file.read_text()
        starts = re.search(r"^(import subprocess|import multiprocessing|from multiprocessing)", text, re.M)
        assert not starts or re.search(r"^ +end_with_me\(\)$", text, re.M), file.name


CHILD = """
import json, sys
from pathlib import Path
told = dict(zip(sys.argv[5::3], sys.argv[6::3]))
if told["seed"] == "9":
    sys.exit("seed 9 is bad luck")
folder, reach = Path(told["output_dir"], told["run"]), float(told["ema_decay"])
smaller = {f: reach - 0.1 for f in ("target_iou", "boundary_iou", "miou")}
smaller |= {"nontarget_iou": None, "iou": [0, 0, 0.2], "rois": 1}
scores = {"target_iou": reach, "boundary_iou": reach / 2, "miou": 0.5, "nontarget_iou": None}
scores |= {"iou": [0, 0, reach - 0.5], "by_size": {"smaller": smaller, "none": {"rois": 0}}, "by_tercile": {}}
folder.mkdir()
(folder / "config.json").write_text(json.dumps({"settings": {"run": told["run"]}}))
(folder / "status.json").write_text(json.dumps({"state": "ok", "skipped_steps": 1}))
epochs = zip([17.0, 7.0, 6.0], [{"target_iou": 0.5}, {"target_iou": 0.66}, scores])
lines = [{"kind": "epoch", "epoch": n, "seconds": s, "metrics": m} for n, (s, m) in enumerate(epochs, 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def test_variants_are_trained_side_by_side_and_compared_seed_by_seed(tmp_path, capfd):
    quality = bench("quality")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    reach = {("on", 0): 0.75, ("on", 1): 0.77, ("off", 0): 0.72, ("off", 1): 0.70, ("on", 9): 0.9}
    where = {"recipe": "demo", "output_dir": str(tmp_path), "store_dir": None}
    jobs = [quality.job(*name, {**where, "ema_decay": value}) for name, value in reach.items()]
    finished = quality.run_all(jobs, parallel=2, command=[sys.executable, str(script)])
    assert set(finished) == {"on-0", "on-1", "off-0", "off-1"}
    assert '{"run": "on-9", "failed": "seed 9 is bad luck"}' in capfd.readouterr().out
    one = finished["on-0"]
    assert (one["first_step"], one["training"], one["early"], one["skipped"]) == (10.0, 20.0, 14.0, 1)
    assert (tmp_path / "batch.csv").read_text().count("ok") == 4
    means, gains = quality.table(finished, ["on", "off"], [0, 1, 9]).split("\n\n")
    assert "| on | 2 | 0.760 (0.750 to 0.770) | 0.380 (0.375 to 0.385) |" in means and means.endswith("| 2 |")
    assert (
        "| off | all | 2 | 5.0 (3.0 to 7.0) | 2.5 (1.5 to 3.5) | 0.0 (0.0 to 0.0) |  | 5.0 (3.0 to 7.0) |"
        in gains
    )
    assert "| off | smaller | 2 | 5.0 (3.0 to 7.0) |" in gains


def test_every_variant_is_one_that_can_be_trained():
    for name, changes in bench("quality").VARIANTS.items():
        settings = resolve("best", **changes)
        assert all(getattr(settings, setting) == value for setting, value in changes.items()), name


@pytest.mark.slow
def test_a_start_is_timed_from_the_process_on():
    small = [
        "-p",
        "recipe",
        "debug",
        "-p",
        "width",
        "0.0625",
        "-p",
        "roi_size",
        "16",
        "-p",
        "mask_size",
        "16",
        "-p",
        "data",
        "synthetic",
    ]
    done = subprocess.run(
        [sys.executable, str(project_root() / "bench" / "start.py"), "--fresh", "--steps", "12", *small],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line.get("number") for line in lines if line["figure"] == "step"] == [1, 10, 12]
    assert 0 < lines[0]["seconds"] <= lines[-1]["seconds"]


def test_the_step_without_a_guard_moves_the_weights(tiny):
    speed = bench("speed")
    stepper = speed.stepper(
        tiny(batch_size=2), open_split(tiny(), "train"), torch.device("cpu"), guarded=False
    )
    before = [p.detach().clone() for p in stepper.model.parameters()]
    speed.take(stepper, 2)
    moved = [not torch.equal(p, old) for p, old in zip(stepper.model.parameters(), before, strict=True)]
    assert all(bool(p.isfinite().all()) for p in stepper.model.parameters()) and any(moved)


def test_a_bench_steps_at_the_rate_of_a_long_run_whatever_its_store(tiny):
    speed = bench("speed")
    settings = tiny(batch_size=2, warmup_epochs=0, lr=1e-3, epochs=100)
    stepper = speed.stepper(settings, open_split(settings, "train"), torch.device("cpu"))
    rates = [
        float(stepper.guard.schedule(torch.tensor(step, dtype=torch.float64))) for step in (0, 500, 50_000)
    ]
    assert (
        rates[0] == pytest.approx(1e-3)
        and rates[1] > 0.999e-3
        and rates[2] == pytest.approx(0.5e-3, rel=0.02)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"),
    reason="bench/kernels.py reaches into the compiler of torch 2.13",
)
def test_normalisation_takes_three_passes_each_way():
    """Sums of pixels, sums of a group, every pixel; backward also the weights' sums, in two steps at most."""
    layers = torch.nn.Sequential(GroupNorm(64), torch.nn.SiLU())
    x = torch.randn(48, 64, 32, 32).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    forward, backward = bench("kernels").count(layers, x)
    assert (forward["direction"], forward["reductions"], forward["pointwise"]) == ("forward", 2, 1)
    assert (
        backward["direction"] == "backward"
        and 3 <= backward["reductions"] <= 4
        and 1 <= backward["pointwise"] <= 2
    )


def test_a_wrong_kernel_shows_in_its_parameters_gradient(monkeypatch):
    monkeypatch.syspath_prepend(str(project_root() / "bench"))
    compare = bench("same").compare_gradients
    torch.manual_seed(0)
    exact = {"large": torch.randn(1000), "small": 0.01 * torch.randn(10), "none": torch.zeros(3)}
    rounded = {
        way: {name: x * (1 + 0.004 * torch.randn_like(x)) for name, x in exact.items()}
        for way in ("plain", "fast")
    }
    assert compare(exact, rounded)["gradients_same"]
    wrong = {**rounded, "fast": rounded["fast"] | {"small": 0.8 * exact["small"]}}
    found = compare(exact, wrong)
    assert not found["gradients_same"] and found["worst_parameter"]["name"] == "small"
    assert (
        found["gradient_error"]["fast"] < 1.5 * found["gradient_error"]["plain"]
    )  # the whole would not have told
