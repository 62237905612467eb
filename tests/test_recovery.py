"""Going back to the last good state: what triggers it, what it restores, when it stops."""

import math

import pytest
import torch
from test_train import assert_same, final_weights

from refinelib import checkpoints
from refinelib.safety.recovery import DivergedError, Recovery, Snapshot
from refinelib.steplog import Row
from refinelib.training import Trainer, train
from refinelib.runs import Run, dumps


def test_a_fault_for_good_rewinds_a_bounded_number_of_times_and_stops_as_diverged(tiny):
    settings = tiny(epochs=20, batch_size=2, inject="loss:nan@9:always", max_consecutive_skips=5, max_rewinds=2)
    with pytest.raises(DivergedError, match="5 steps in a row were skipped"):
        train(settings)
    run = Run.open(settings.run_name, output_dir=settings.output_dir)
    status = run.status()
    assert status["state"] == "diverged" and status["rewinds"] == 2 and "rescue" in status["last_error"]
    assert status["step"] == 8 + 3 * 5 and status["skipped_steps"] == 15
    rewinds = [event for event in run.events() if event["kind"] == "rewind"]
    assert [event["step"] for event in rewinds] == [13, 18] and "0.25 of the learning rate" in rewinds[1]["message"]
    best = checkpoints.load(run.folder / "checkpoints" / "best.pt")
    assert all(torch.isfinite(w).all() for w in best["model"].values())


def test_a_passing_fault_is_survived_with_one_rewind(tiny):
    faults = ";".join(f"loss:nan@{step}" for step in range(9, 14))
    run = train(tiny(epochs=12, batch_size=2, inject=faults, max_consecutive_skips=5, validate_every=4, probe_every=0))
    assert run.status()["state"] == "ok" and run.status()["rewinds"] == 1 and run.status()["skipped_steps"] == 5
    first, last = run.epochs()[0], run.epochs()[-1]
    assert last["train_loss"] < first["train_loss"]


def test_a_loss_that_stays_high_is_lost_without_any_skip(tiny):
    settings = tiny(epochs=200, batch_size=2, inject="loss:spike@70:always", max_rewinds=0, on_spike="note", validate_every=10, save_every=10, probe_every=0)
    with pytest.raises(DivergedError, match="the loss stays at"):
        train(settings)
    assert Run.open(settings.run_name, output_dir=settings.output_dir).status()["skipped_steps"] == 0


@pytest.fixture
def trainer(tiny):
    settings = tiny(epochs=100, batch_size=2, ema_decay=0.9, lr=1e-3, warmup_epochs=0)
    run = Run.start(settings)
    yield Trainer(settings, run)
    run.close()


def advance(trainer, count):
    for _ in range(count):
        plan = trainer.feed.plan(trainer.step // trainer.feed.steps_per_epoch)
        report = trainer.train_step(plan, trainer.step % trainer.feed.steps_per_epoch)
        trainer.step += 1
        trainer.log.add(report, trainer.step, 1)
        trainer.oversee(plan, wait=True)


def everything(trainer):
    found = {**{f"model.{k}": v for k, v in trainer.model.state_dict().items()}, **{f"guard.{k}": v for k, v in trainer.guard.state.items()}}
    found |= {f"average.{i}": v for i, v in enumerate(trainer.guard.averages)}
    for i, p in enumerate(trainer.guard.parameters):
        found |= {f"moments.{i}.{k}": v for k, v in trainer.guard.optimizer.state.get(p, {}).items()}
    return {k: v.detach().clone() for k, v in found.items()}


@pytest.mark.parametrize("before", [0, 3])
def test_a_snapshot_put_back_is_the_state_it_was_taken_of(trainer, before):
    """From the very first state too, which has no moments yet: the same steps give the same states again."""
    advance(trainer, before)
    snapshot = Snapshot(trainer.model, trainer.guard).take(trainer.step)
    advance(trainer, 4)
    once = everything(trainer)
    snapshot.put_back()
    trainer.step = before
    advance(trainer, 4)
    assert_same(once, everything(trainer))


def row(step, *, loss=1.0, skipped=0, spike=0):
    report = dict(loss=loss, skipped=skipped, spike_loss=spike, spike_grad=0)
    return Row(step, 1, torch.zeros(1).numpy(), report, torch.zeros(1).numpy())


@pytest.fixture
def recovery(trainer):
    found = Recovery(trainer.model, trainer.guard, max_consecutive_skips=3, max_rewinds=1)
    found.start(0)
    return found


def test_a_snapshot_is_good_only_after_clean_steps(recovery):
    for step in range(1, 51):
        recovery.look(row(step))
        recovery.offer(step)
    assert (recovery.waiting, recovery.candidate.step, recovery.good.step) == (True, 50, 0)
    for step in range(51, 70):
        recovery.look(row(step))
    assert recovery.good.step == 0
    recovery.look(row(70))
    assert recovery.good.step == 50


@pytest.mark.parametrize("trouble", [dict(skipped=1), dict(spike=1)])
def test_trouble_soon_after_a_snapshot_spoils_it(recovery, trouble):
    for step in range(1, 51):
        recovery.look(row(step))
        recovery.offer(step)
    recovery.look(row(55, **trouble))
    for step in range(56, 90):
        recovery.look(row(step))
    assert recovery.good.step == 0


def test_skips_count_only_in_a_row(recovery):
    assert recovery.look(row(1, skipped=1)) is recovery.look(row(2, skipped=1)) is recovery.look(row(3)) is None
    assert recovery.look(row(4, skipped=1)) is recovery.look(row(5, skipped=1)) is None
    assert "3 steps in a row" in recovery.look(row(6, skipped=1))


def test_an_ordinary_wavering_loss_is_not_lost(recovery):
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 2000):
        loss = 2.0 * math.exp(-step / 500) + 0.5 + 0.5 * float(torch.rand((), generator=generator))
        assert recovery.look(row(step, loss=loss)) is None


def test_a_rewind_halves_the_learning_rate_for_a_while(trainer):
    advance(trainer, 2)
    trainer.recovery.start(2)
    before = float(trainer.guard.optimizer.param_groups[0]["lr"])
    trainer.recovery.rewind("test", 2)
    advance(trainer, 1)
    assert float(trainer.guard.optimizer.param_groups[0]["lr"]) == pytest.approx(before / 2, rel=0.02)
    trainer.guard.state["lr_factor_until"].fill_(int(trainer.guard.state["applied"]))
    advance(trainer, 1)
    assert float(trainer.guard.optimizer.param_groups[0]["lr"]) == pytest.approx(before, rel=0.02)


def test_going_back_keeps_the_count_of_skips_and_the_place_in_the_data(tiny):
    faults = ";".join(f"grad:nan@{step}:stem" for step in range(4, 9))
    settings = tiny(epochs=6, batch_size=2, inject=faults, max_consecutive_skips=5)
    run = train(settings)
    steps = [line["step"] for line in run.steps()]
    assert steps == sorted(set(steps)) and run.status()["step"] == run.status()["steps"]
    weights = final_weights(run)
    assert all(torch.isfinite(w).all() for w in weights.values())
