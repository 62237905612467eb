"""Going back to the last good state: what triggers it, what it restores, when it stops."""

import json
import math
import os
import signal

import pytest
import torch
from helpers import assert_same, final_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refinelib import checkpoints
from refinelib.gradients import read
from refinelib.guard.guard import REPORT
from refinelib.guard.monitor import LossMonitor, Row
from refinelib.guard.rewind import GENERATIONS, DivergedError, Rewinder, Snapshot
from refinelib.runs import Run, latest
from refinelib.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("shallow")


def test_a_fault_for_good_rewinds_a_bounded_number_of_times_and_stops_as_diverged(tiny):
    settings = tiny(
        epochs=20, batch_size=2, inject="loss:nan@9:always", max_consecutive_skips=5, max_rewinds=2
    )
    with pytest.raises(DivergedError, match="5 steps in a row were skipped"):
        train(settings)
    run = Run.open(settings.run_name, output_dir=settings.output_dir)
    status = run.status()
    assert status["state"] == "diverged" and status["rewinds"] == 2 and "rescue" in status["last_error"]
    assert status["step"] == 8 + 3 * 5 and status["skipped_steps"] == 15
    rewinds = [event for event in run.events() if event["kind"] == "rewind"]
    assert [event["step"] for event in rewinds] == [13, 18] and "0.25 of the learning rate" in rewinds[1][
        "message"
    ]
    best = checkpoints.load(run.folder / "checkpoints" / "best.pt")
    assert all(torch.isfinite(w).all() for w in best["model"].values())


def test_a_passing_fault_is_survived_with_one_rewind(tiny):
    faults = ";".join(f"loss:nan@{step}" for step in range(9, 14))
    run = train(
        tiny(epochs=12, batch_size=2, inject=faults, max_consecutive_skips=5, validate_every=4, probe_every=0)
    )
    assert (
        run.status()["state"] == "ok" and run.status()["rewinds"] == 1 and run.status()["skipped_steps"] == 5
    )
    first, last = run.epochs()[0], run.epochs()[-1]
    assert last["train_loss"] < first["train_loss"]


def test_a_loss_that_stays_high_is_lost_without_any_skip(tiny):
    settings = tiny(
        epochs=200,
        batch_size=2,
        inject="loss:spike@70:always",
        max_rewinds=0,
        on_spike="note",
        validate_every=10,
        save_every=10,
        probe_every=0,
    )
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
        plan = trainer.loader.plan(trainer.step // trainer.loader.steps_per_epoch)
        report = trainer.train_step(plan, trainer.step % trainer.loader.steps_per_epoch)
        trainer.step += 1
        trainer.log.reports.add(report, trainer.step, 1)
        trainer.process_reports(plan, wait=True)


def everything(trainer):
    found = {
        **{f"model.{k}": v for k, v in trainer.model.state_dict().items()},
        **{f"guard.{k}": v for k, v in trainer.guard.state.items()},
    }
    found |= {f"average.{i}": v for i, v in enumerate(trainer.guard.averages)}
    for i, p in enumerate(trainer.guard.parameters):
        found |= {f"moments.{i}.{k}": v for k, v in trainer.guard.optimizer.state.get(p, {}).items()}
    return {k: v.detach().clone() for k, v in found.items()}


@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_snapshot_is_the_state_it_was_taken_of(trainer, before):
    """From the very first state too, which has no moments yet: the same steps give the same states again."""
    advance(trainer, before)
    snapshot = Snapshot.take(trainer.step, trainer.guard)
    advance(trainer, 4)
    once = everything(trainer)
    snapshot.restore(trainer.guard)
    trainer.step = before
    advance(trainer, 4)
    assert_same(once, everything(trainer))


def test_a_parameter_that_gets_its_first_gradient_late_is_restored_too(trainer):
    """Its moments exist after the snapshot only: they become 0, and no other moment is mistaken for them."""
    late = trainer.guard.parameters[5]
    late.requires_grad_(False)
    advance(trainer, 3)
    snapshot = Snapshot.take(3, trainer.guard)
    before = everything(trainer)
    late.requires_grad_(True)
    advance(trainer, 2)
    assert len(everything(trainer)) > len(before)
    snapshot.restore(trainer.guard)
    after = everything(trainer)
    assert_same(before, {name: after[name] for name in before})
    assert all(not after[name].any() for name in after.keys() - before.keys())


def row(step, *, loss=1.0, skipped=0, damaged=0, bad_loss=1, loss_scale=1.0):
    report = dict.fromkeys(REPORT, 0.0) | dict(loss=loss, skipped=skipped, bad_loss=bad_loss, bad_grad=1)
    report |= dict(loss_scale=loss_scale, damaged=damaged)
    return Row(step, 1, torch.zeros(1).numpy(), report, torch.zeros(1).numpy())


@pytest.fixture
def recovery(trainer):
    found = Rewinder(trainer.guard, max_skips=3, max_rewinds=3)
    found.start(0)
    return found


def drive(recovery, losses, start=0):
    """Rows with these losses, None for a skipped step; step and reason of the first rewind."""
    for step, loss in enumerate(losses, start + 1):
        reason = recovery.see(row(step, skipped=1) if loss is None else row(step, loss=loss))
        if reason:
            return step, reason
        recovery.maybe_snapshot(step)
    return None


def noisy(count, level=1.0, sigma=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (level * torch.exp(sigma * torch.randn(count, generator=generator))).tolist()


def test_a_snapshot_is_stable_only_after_a_whole_healthy_window(recovery):
    assert drive(recovery, noisy(50)) is None
    assert [(s.step, s.stable) for s in recovery.snapshots] == [(0, True), (50, False)]
    assert (
        drive(recovery, noisy(62, seed=1), start=50) is None
    )  # judged every 16 losses: 112 is not yet 50 + 64
    assert not recovery.snapshots[-1].stable
    assert drive(recovery, noisy(20, seed=2), start=112) is None
    assert [s.stable for s in recovery.snapshots if s.step == 50] == [True]


@pytest.mark.parametrize("period", [2, 15])
def test_isolated_skips_do_not_keep_a_snapshot_from_becoming_stable(recovery, period):
    losses = [None if step % period == 0 else loss for step, loss in enumerate(noisy(600))]
    assert drive(recovery, losses) is None
    assert recovery.snapshots[-1].step > 300 and sum(s.stable for s in recovery.snapshots) == GENERATIONS


def test_skips_count_only_in_a_row(recovery):
    assert drive(recovery, [None, None, 1.0, None, None]) is None
    assert "3 steps in a row" in recovery.see(row(6, skipped=1))


def test_the_search_for_a_loss_scale_is_no_run_of_skips(recovery):
    recovery.guard.scaled = True
    for step in range(1, 17):
        assert recovery.see(row(step, skipped=1, bad_loss=0, loss_scale=2.0 ** (17 - step))) is None
    assert [recovery.see(row(step, skipped=1, bad_loss=0, loss_scale=1.0)) for step in (17, 18)] == [
        None,
        None,
    ]
    assert "in a row" in recovery.see(row(19, skipped=1, bad_loss=0, loss_scale=1.0))


@settings(max_examples=60, deadline=None)
@given(
    sigma=st.floats(0.02, 0.4),
    seed=st.integers(0, 2**20),
    start=st.floats(1.0, 20.0),
    decay=st.integers(20, 3000),
)
def test_a_healthy_loss_is_never_judged_diverged(sigma, seed, start, decay):
    """Falling or level, with any noise, 3000 steps long."""
    monitor = LossMonitor()
    for step, noise in enumerate(noisy(3000, sigma=sigma, seed=seed)):
        assert monitor.add((start * math.exp(-step / decay) + 0.5) * noise)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    sigma=st.floats(0.02, 0.3), seed=st.integers(0, 2**20), at=st.integers(2, 900), rise=st.floats(5.0, 1e30)
)
def test_a_loss_that_stays_high_is_noticed_from_the_first_steps_on(sigma, seed, at, rise):
    monitor = LossMonitor()
    for step, loss in enumerate(noisy(at + 80, sigma=sigma, seed=seed)):
        if monitor.add(loss * (rise if step >= at else 1.0))[1]:
            assert step >= at
            return
    raise AssertionError(f"a loss {rise:g} times as high since step {at} was not noticed in 80 steps")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# After a rewind to step 0 the rise is judged against the first loss, which may be twice the others.
@given(at=st.integers(150, 800), seed=st.integers(0, 2**20), rise=st.floats(10.0, 100.0))
def test_a_rewind_goes_to_a_state_of_before_the_damage_and_each_further_back(trainer, at, seed, rise):
    recovery = Rewinder(trainer.guard, max_skips=3, max_rewinds=3)
    recovery.start(0)
    losses = [loss * (rise if step > at else 1.0) for step, loss in enumerate(noisy(at + 400, seed=seed), 1)]
    went, step = [], 0
    for _ in range(3):  # the rise stays whatever is restored: all three are needed
        found = drive(recovery, losses[step:], start=step)
        assert found is not None
        step, reason = found
        message, again = recovery.rewind(reason, step)
        # The first one takes the steps again, and the damage comes again.
        assert (again is None) == bool(went), message
        step = again.step if again else step
        went.append(recovery.snapshots[-1].step)
    assert at - 250 <= went[0] <= at, went
    assert all(later < earlier or later == 0 for earlier, later in zip(went, went[1:], strict=False)), went
    with pytest.raises(DivergedError):
        recovery.rewind("still", step)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(1, 200), seed=st.integers(0, 2**20), by=st.floats(1.0, 1e30))
def test_a_weight_that_moved_further_than_steps_can_is_noticed_without_the_loss(trainer, at, seed, by):
    recovery = Rewinder(trainer.guard, max_skips=3, max_rewinds=3)
    recovery.start(0)
    before = trainer.model.person_head.bias.detach().clone()
    for step, loss in enumerate(noisy(at + 65, seed=seed), 1):
        if step == at:
            shift(trainer, by)
        reason = recovery.see(row(step, loss=loss, damaged=float(trainer.guard.state["damaged"])))
        if reason:
            break
        recovery.maybe_snapshot(step)
    assert step > at and reason.startswith("1 of ") and "person_head.bias" in reason, (step, reason)
    message, again = recovery.rewind(reason, step)
    assert again.step < at and torch.equal(trainer.model.person_head.bias, before), message


def test_a_snapshot_of_a_step_after_an_incident_is_not_kept(recovery):
    """Its number is that of a step that did not happen: updates were suspended."""
    assert drive(recovery, noisy(50)) is None
    incident = row(49, skipped=1)
    incident.report["incident"] = 1.0
    assert recovery.see(incident) is None
    assert [snapshot.step for snapshot in recovery.snapshots] == [0]


def test_a_burst_of_skips_goes_back_no_further_than_the_newest_snapshot(recovery):
    assert drive(recovery, noisy(60)) is None
    step, reason = drive(recovery, [None] * 3, start=60)
    message, again = recovery.rewind(reason, step)
    assert "restored the state after step 50, goes on with the data after step 63" in message
    assert again is None


def test_what_a_rewind_needs_is_in_the_state(trainer, recovery):
    losses = noisy(700)
    assert drive(recovery, losses[:333]) is None
    other = Rewinder(trainer.guard, max_skips=3, max_rewinds=3)
    copies = [Snapshot(s.step, s.tensors, s.memory, s.host) for s in recovery.snapshots]
    other.load_state_dict(json.loads(json.dumps(recovery.state_dict())), copies)
    for each in (recovery, other):
        assert drive(each, losses[333:], start=333) is None
    assert recovery.state_dict() == other.state_dict()
    assert recovery.rewind("test", 700)[0] == other.rewind("test", 700)[0]


@pytest.mark.parametrize("place", ["moment", "average"])
def test_a_nan_written_into_the_state_leads_to_a_rewind(trainer, place):
    advance(trainer, 3)
    trainer.rewinder.start(3)
    before = everything(trainer)
    guard = trainer.guard
    tensor = {
        "weight": guard.parameters[7],
        "average": guard.averages[7],
        "moment": guard.optimizer.state[guard.parameters[7]]["exp_avg"],
    }[place]
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] = math.nan
    trainer.ensure_healthy(1)
    event = trainer.run.events()[-1]
    assert (
        event["kind"] == "rewind"
        and "not finite, first" in event["message"]
        and guard.names[7] in event["message"]
    )
    assert_same(before, everything(trainer))


def test_a_damaged_state_is_updated_no_further_until_it_is_restored(trainer):
    advance(trainer, 2)
    trainer.rewinder.start(2)
    with torch.no_grad():
        trainer.guard.averages[3][(0,) * trainer.guard.averages[3].ndim] = (
            math.inf
        )  # no loss and no gradient ever shows it
    trainer.guard.check_state()
    before = everything(trainer)
    plan = trainer.loader.plan(0)
    report = trainer.train_step(plan, 0)
    ruled = ("guard.skip", "guard.good")
    after = everything(trainer)
    assert_same(
        *({name: x for name, x in found.items() if not name.startswith(ruled)} for found in (before, after))
    )
    trainer.step += 1
    trainer.log.reports.add(report, trainer.step, 1)
    trainer.process_reports(plan, wait=True)
    assert trainer.rewinder.rewinds == 1 and all(
        bool(x.isfinite().all()) for x in trainer.guard.tensors().values()
    )


def test_a_rewind_halves_the_learning_rate_for_a_while(trainer):
    advance(trainer, 2)
    trainer.rewinder.start(2)
    before = float(trainer.guard.optimizer.param_groups[0]["lr"])
    trainer.rewinder.skips = trainer.rewinder.max_skips
    trainer.rewinder.rewind("test", 2)
    advance(trainer, 1)
    assert float(trainer.guard.optimizer.param_groups[0]["lr"]) == pytest.approx(before / 2, rel=0.02)
    trainer.guard.state["lr_factor_until"].fill_(int(trainer.guard.state["applied"]))
    advance(trainer, 1)
    assert float(trainer.guard.optimizer.param_groups[0]["lr"]) == pytest.approx(before, rel=0.02)


def damaging(monkeypatch, at, hurt):
    """Have ``hurt(trainer)`` called once, before step number ``at`` + 1."""
    take, done = Trainer.train_step, []

    def step(self, plan, place):
        if self.step == at and not done:
            done.append(1)
            with torch.no_grad():
                hurt(self)
        return take(self, plan, place)

    monkeypatch.setattr(Trainer, "train_step", step)


@torch.no_grad()
def shift(trainer, by):
    trainer.model.person_head.bias.add_(by)


@pytest.mark.parametrize(
    ("at", "by", "epochs"),
    [
        (3, 100.0, 24),
        *(pytest.param(*late, 80, marks=pytest.mark.slow) for late in ((150, 1.0), (-2, 100.0))),
    ],
)
def test_a_finite_damage_that_comes_once_has_changed_nothing(tiny, monkeypatch, at, by, epochs):
    """Loss or weights reveal it, the steps are repeated: weights and records are an undamaged run's."""
    given = dict(
        epochs=epochs,
        batch_size=3,
        lr=1e-3,
        roi_size=16,
        mask_size=16,
        validate_every=40,
        save_every=20,
        probe_every=20,
        ema_decay=0.9,
    )
    plain = train(tiny(run="plain", **given))
    at %= plain.status()["steps"]
    damaging(monkeypatch, at, lambda trainer: shift(trainer, by))
    run = train(tiny(run="damaged", **given))
    assert run.status()["state"] == "ok" and run.status()["rewinds"] == 1
    (event,) = [event for event in run.events() if event["kind"] == "rewind"]
    assert (
        at < event["step"] <= at + 65
        and int(event["message"].split("state after step ")[1].split(",")[0]) <= at
    )
    assert_same(final_weights(plain), final_weights(run))
    steps = [line["step"] for line in run.steps()]
    assert steps == sorted(set(steps)) and steps[-1] == run.status()["steps"]
    without_times = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in each.epochs()] for each in (plain, run)
    ]
    assert without_times[0] == without_times[1]
    gradients = [read(each) for each in (plain, run)]
    assert gradients[0].steps.tolist() == gradients[1].steps.tolist()


def test_a_loss_that_explodes_in_the_first_steps_is_not_ok(tiny):
    """It is 1000 times as high from the third step on, whatever is restored."""
    settings = tiny(
        epochs=40,
        batch_size=3,
        inject="loss:spike@3:always",
        on_spike="note",
        validate_every=40,
        save_every=40,
        probe_every=0,
    )
    with pytest.raises(DivergedError, match="what it began with"):
        train(settings)
    run = Run.open(settings.run_name, output_dir=settings.output_dir)
    assert (
        run.status()["state"] == "diverged"
        and min(event["step"] for event in run.events() if event["kind"] == "rewind") <= 32
    )


def test_a_run_that_applied_fewer_than_half_of_its_steps_is_not_ok(tiny):
    faults = ";".join(f"loss:nan@{step}" for step in range(1, 61) if step % 3)
    with pytest.raises(DivergedError, match=r"\d of \d+ steps were applied"):
        train(tiny(epochs=4, batch_size=3, inject=faults, max_incidents=0))


def test_resume_then_rewind_is_what_the_run_left_alone_does(tiny, monkeypatch):
    """Stopped once and resumed before the trouble: the snapshots are in the checkpoint's company."""
    faults = ";".join(f"loss:nan@{step}" for step in range(62, 67))
    given = dict(
        epochs=20,
        batch_size=3,
        inject=faults,
        max_consecutive_skips=5,
        roi_size=16,
        mask_size=16,
        validate_every=40,
        probe_every=0,
    )
    plain = train(tiny(run="plain", **given))
    damaging(monkeypatch, 55, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(run="stopped", **given))
    run = train(tiny(run="stopped", resume=True, **given))
    rewinds = [
        [event["message"] for event in each.events() if event["kind"] == "rewind"] for each in (plain, run)
    ]
    assert rewinds[0] == rewinds[1] and len(rewinds[0]) == 1
    assert_same(final_weights(plain), final_weights(run))
    assert not (run.folder / "checkpoints" / "snapshots").exists()  # nothing goes back to them any more


def test_a_damaged_snapshot_is_noted_and_passed_over(tiny, monkeypatch):
    given = dict(epochs=12, batch_size=3, roi_size=16, mask_size=16, validate_every=40, probe_every=0)
    damaging(monkeypatch, 30, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(run="stopped", **given))
    folder = latest(tiny().output_dir).folder / "checkpoints" / "snapshots"
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    run = train(tiny(run="stopped", resume=True, **given))
    assert run.status()["state"] == "ok"
    assert any("snapshot cannot be used" in event["message"] for event in run.events())


def test_going_back_keeps_the_count_of_skips_and_the_place_in_the_data(tiny):
    faults = ";".join(f"grad:nan@{step}:stem" for step in range(4, 9))
    settings = tiny(epochs=6, batch_size=2, inject=faults, max_consecutive_skips=5)
    run = train(settings)
    steps = [line["step"] for line in run.steps()]
    assert steps == sorted(set(steps)) and run.status()["step"] == run.status()["steps"]
    weights = final_weights(run)
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize(
    "message, kept", [("CUDA error: out of memory", True), ("a shape does not fit", False)]
)
def test_a_snapshot_without_room_is_not_taken_and_the_run_goes_on(trainer, monkeypatch, message, kept):
    advance(trainer, 2)
    rewinder = trainer.rewinder
    rewinder.start(2)
    own, checked = trainer.guard.check_state, []

    def full(*anything, **named):
        raise RuntimeError(message)

    def check(*references):
        checked.append(len(references))
        if references:
            full()
        own()

    monkeypatch.setattr(Snapshot, "take", full)
    monkeypatch.setattr(trainer.guard, "check_state", check)
    if kept:
        rewinder.maybe_snapshot(3, after=1)
        assert checked == [1, 0]  # without the differences, which need as much memory
        assert [one.step for one in rewinder.snapshots] == [2]
    else:
        with pytest.raises(RuntimeError, match=message):
            rewinder.maybe_snapshot(3, after=1)
