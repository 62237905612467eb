"""Several processes train one run: the same training, one decision, and an end when one of them is lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refinelib import ranks
from refinelib.config import SettingsError
from refinelib.runs import Run
from refinelib.trainer import train

WORKER = Path(__file__).with_name("rank_worker.py")
#: Rounding of sums taken in another order, grown over a dozen steps: in float32 and in bf16. Later losses of
#: bf16 drift further apart.
SAME, DOZEN = {"off": 1e-4, "bf16": 2e-2}, {"off": None, "bf16": 12}
#: Settings by the name of a way to take steps; on GPUs a step is captured as a CUDA graph.
WAYS = {
    "cpu": {"device": "cpu", "amp": "off"},
    "cuda": {"device": "cuda", "amp": "bf16", "compile": "off"},
    "compiled": {"device": "cuda", "amp": "bf16", "compile": "on"},
}


@pytest.fixture(params=[way if way == "cpu" else pytest.param(way, marks=pytest.mark.cuda) for way in WAYS])
def way(request):
    """Settings of a way to take steps; the test is skipped where there are not two GPUs for it."""
    if request.param != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return WAYS[request.param]


@pytest.fixture
def small(tiny):
    """Settings of a run of a dozen steps, 4 ROIs in each."""
    usual = dict(batch_size=4, epochs=4, augment="strong", ema_decay=0.9, log_every=1)
    return lambda **own: tiny(**usual | own)


def launch(settings, *options, **how):
    """Trains on two processes of this machine, as torchrun does; what it printed, and its exit status."""
    given = settings.model_dump(mode="json", exclude={"recipe"}, exclude_defaults=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *options]
    command += [str(WORKER), json.dumps(given), json.dumps(how)]
    package = os.pathsep.join([str(Path(ranks.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    return done.stdout + done.stderr, done.returncode


def losses(run):
    return [(line["step"], line["loss"]) for line in run.steps()]


def same_losses(one, other, amp="off"):
    assert [step for step, _ in one] == [step for step, _ in other]
    one, other = ([loss for _, loss in both[: DOZEN[amp]]] for both in (one, other))
    assert one == pytest.approx(other, rel=SAME[amp])


def states(folder):
    """What every rank held after each step."""
    return [json.loads((folder / f"states-{rank}.json").read_text()) for rank in range(2)]


@given(size=st.integers(1, 1000), count=st.integers(1, 64))
def test_shares_are_whole_and_even(size, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: count)
        parts = [range(size)[ranks.share(size, rank)] for rank in range(count)]
    assert [place for part in parts for place in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_run_moves_between_them(small, way, tmp_path):
    whole = train(small(**way, run="one"))
    text, status = launch(small(**way, run="two"), states=str(tmp_path / "states"))
    assert status == 0, text
    two = Run.open(tmp_path / "two")
    same_losses(losses(whole), losses(two), way["amp"])
    first, second = states(tmp_path)
    assert first == second and len(first) == 12
    assert two.status()["state"] == "ok" and len(two.epochs()) == 4  # written once

    text, status = launch(small(**way, run="moved"), at=5, signal="SIGTERM")  # rank 1 alone is told to stop
    moved = Run.open(tmp_path / "moved")
    assert status != 0 and moved.status()["state"] == "interrupted", text
    assert 5 <= moved.status()["step"] < 8
    train(small(**way, run="moved", resume=True))
    same_losses(losses(whole), losses(Run.open(tmp_path / "moved")), way["amp"])

    text, status = launch(small(**way, run="moved", epochs=6, resume=True))  # and on two again
    assert status == 0, text
    train(small(**way, run="one", epochs=6, resume=True))
    same_losses(losses(Run.open(tmp_path / "one")), losses(Run.open(tmp_path / "moved")), way["amp"])


def test_what_goes_wrong_on_one_rank_is_skipped_by_all_and_named(small, way, tmp_path):
    planted = "loss:nan@2;grad:inf@4:boundary;activation:nan@6:contour;input:nan@8"
    text, status = launch(small(**way, run="bad"), inject=planted, full=10, states=str(tmp_path / "states"))
    assert status == 0, text
    run = Run.open(tmp_path / "bad")
    first, second = states(tmp_path)
    assert first == second
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 4
    skips = [event for event in run.events() if event["kind"] == "skip"]
    assert {event["step"] for event in skips} == {2, 4, 6, 8}
    assert all(event["ranks"] == [1] and "on rank 1" in event["message"] for event in skips)
    found = {event["step"]: event for event in run.events() if event["kind"] == "incident"}
    slowed = [event["message"] for event in run.events() if event["kind"] == "speed"]
    assert "rank 1: a batch of 2 does not fit into memory: it is split into 2 chunks" in slowed
    assert not any("could not" in message for message in slowed)  # compile, or capture a graph
    assert found[2]["phase"] == "loss" and found[8]["phase"] == "input"
    assert found[4]["parameters"][0].startswith("boundary") and found[6]["module"].startswith("contour")
    assert all((tmp_path / "bad" / event["folder"] / "report.json").is_file() for event in found.values())


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_goes_on(small, way, tmp_path):
    whole = train(small(**way, run="one"))
    text, status = launch(small(**way, run="killed"), "--max-restarts", "1", at=8, signal="SIGKILL")
    assert status == 0, text
    run = Run.open(tmp_path / "killed")
    assert run.status()["state"] == "ok"
    assert [event["step"] for event in run.events() if event["kind"] == "resume"] == [6]
    same_losses(losses(whole), losses(run), way["amp"])


@pytest.mark.slow
def test_what_ends_one_process_ends_the_run_with_its_reason(small, way, tmp_path):
    text, status = launch(small(**way, run="failed"), at=8, raises="the disk is gone")
    run = Run.open(tmp_path / "failed")
    assert status != 0 and run.status()["state"] == "failed", text
    assert "rank 1 of 2 failed, OSError: the disk is gone" in run.status()["last_error"]
    assert run.has_checkpoint


@pytest.mark.slow
def test_the_setting_gpus_starts_processes_that_an_interrupt_stops(small, way, tmp_path):
    def interrupt(run):
        raise KeyboardInterrupt

    long = {**way, "epochs": 6, "run": "two", "gpus": 2}
    with pytest.raises(KeyboardInterrupt):
        train(small(**long), on_epoch=interrupt)
    run = Run.open(tmp_path / "two")
    assert run.status()["state"] == "interrupted" and 3 <= run.status()["step"] < 18
    assert train(small(**long, resume=True)).status()["state"] == "ok"
    same_losses(losses(train(small(**way, epochs=6, run="one"))), losses(run), way["amp"])
    with pytest.raises(SettingsError, match="batch_size = 4: batch_size is of all 5 processes together"):
        train(small(gpus=5))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_run_by_name(small, way, tmp_path):
    text, status = launch(small(**way, run="silent", rank_timeout=5.0), at=8, signal="SIGSTOP")
    assert status != 0 and re.search("rank 1 of 2 has not answered for 5 s: rank 0 ends", text), text
    run = Run.open(tmp_path / "silent")
    assert run.has_checkpoint and "rank 1 of 2 has not answered" in run.status()["last_error"]
