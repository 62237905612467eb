"""Runs that end before their time, and what a resume makes of what they left."""

import io
import os
import shutil
import signal
import sys

import pytest
import torch
from helpers import assert_same, final_weights

import refinelib.state
from refinelib import checkpoints
from refinelib.runs import Run, latest
from refinelib.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture
def small(tiny):
    return lambda **given: tiny(**{**dict(batch_size=3, roi_size=16, mask_size=16, probe_every=0), **given})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("before", ["the loop", "a step"])
def test_a_signal_leaves_an_interrupted_run(small, monkeypatch, number, before):
    owner, name = (refinelib.state, "open_splits") if before == "the loop" else (Trainer, "train_step")
    real = getattr(owner, name)

    def hit(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, hit)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before_all = signal.signal(number, usual)  # under nohup it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            train(small())
    finally:
        signal.signal(number, before_all)
    run = latest(small().output_dir)
    assert run.status()["state"] == "interrupted"
    assert (run.folder / "checkpoints" / "last.pt").is_file() == (before == "a step")


def test_an_ignored_signal_stays_ignored(small):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = train(small(epochs=2), on_epoch=lambda run: os.kill(os.getpid(), signal.SIGHUP))
        assert run.status()["state"] == "ok" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(small, monkeypatch, at=10, **given):
    """A run of four epochs of four steps, stopped before step ``at`` + 1."""
    real = Trainer.train_step

    def step(trainer, plan, place):
        if trainer.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, plan, place)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(small(epochs=4, **given))
    return latest(small().output_dir)


def changed(file, change):
    content = checkpoints.load(file)
    change(content)
    checkpoints.save(file, content)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda c: c["model"].__setitem__("stem.0.0.weight", c["model"]["stem.0.0.weight"] * torch.nan),
            "are not finite",
        ),
        pytest.param(
            lambda c: next(iter(c["average"].values())).fill_(torch.inf), "not finite", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda c: c["guard"]["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan),
            "not finite",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c["guard"]["state"]["loss_center"].fill_(torch.nan),
            "not finite",
            marks=pytest.mark.slow,
        ),
        (lambda c: c["model"].pop("stem.0.0.weight"), "do not fit"),
        pytest.param(lambda c: c.update(people="others"), "other people", marks=pytest.mark.slow),
        (lambda c: c.pop("guard"), "last.pt"),
    ],
)
def test_a_last_checkpoint_that_cannot_be_used_is_passed_over(small, monkeypatch, change, words):
    """Whole, and foreign or not finite: the best one serves, and an event says why."""
    run = interrupted(small, monkeypatch, ema_decay=0.9)
    changed(run.folder / "checkpoints" / "last.pt", change)
    run = train(small(epochs=4, ema_decay=0.9, resume=True))
    assert run.status()["state"] == "ok" and run.status()["step"] == run.status()["steps"]
    assert any(event["kind"] == "checkpoint" and words in event["message"] for event in run.events())
    assert all(
        not checkpoints.nonfinite(checkpoints.load(run.folder / "checkpoints" / name)["average"])
        for name in ("last.pt", "best.pt")
    )


def test_killed_between_the_two_checkpoints_of_the_last_epoch(small):
    """The best one is of the last step, the last one an epoch older: the resumed run leaves both whole."""
    run = train(small(epochs=3))
    folder, steps = run.folder / "checkpoints", run.status()["steps"] // 3
    shutil.copy(folder / "last.pt", folder / "best.pt")
    changed(folder / "last.pt", lambda c: c["position"].update(step=2 * steps, epoch=2))
    run.update(state="running", epoch=2, step=2 * steps)
    run = train(small(epochs=3, resume=True))
    assert run.status()["state"] == "ok" and (run.status()["epoch"], run.status()["step"]) == (3, 3 * steps)
    assert checkpoints.load(folder / "last.pt")["position"]["step"] == 3 * steps
    assert_same(checkpoints.load(folder / "best.pt")["model"], final_weights(run))


def test_resume_takes_the_run_whose_last_record_is_the_latest(small):
    first, second = train(small(epochs=1)), train(small(epochs=1))
    assert second.name == f"{first.name}-2"
    for file, age in ((second, 3600), (first, 0)):
        for name in ("status.json", "metrics.jsonl", "events.jsonl"):
            if (file.folder / name).is_file():
                os.utime(file.folder / name, (1.7e9 - age, 1.7e9 - age))
    assert Run.start(small(resume=True)).name == first.name


def test_a_reader_of_the_output_that_closes_stops_no_run(small, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert train(small(epochs=2)).status()["state"] == "ok"
