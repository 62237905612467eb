"""Events: the first time in a sentence, repeats in one line an epoch."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from refinelib.guard.guard import REPORT
from refinelib.guard.monitor import Row, StepMonitor

GOOD = dict.fromkeys(REPORT, 0.0) | {
    "loss": 1.0,
    "grad_norm": 2.0,
    "grad_max": 0.5,
    "lr": 1e-3,
    "loss_scale": 1024.0,
}
NORMS = [1.0, 3.0]


@pytest.fixture
def events():
    return []


def watching(events, *, scaled=True, **caps):
    guard = SimpleNamespace(
        names=["stem.weight", "contour.weight"], scaled=scaled, scale_floor=1.0, on_spike="note"
    )
    record = lambda kind, message, **fields: events.append({"kind": kind, "message": message, **fields})  # noqa: E731
    return StepMonitor(record, guard, losses=["ce", "contour"], caps=caps)


@pytest.fixture
def monitor(events):
    return watching(events, contour=10.0)


def take(monitor, step, components=(1.0, 1.0), norms=NORMS, *, epoch=1, **report):
    monitor.update(Row(step, epoch, np.array(components), GOOD | report, np.array(norms)))


def test_ordinary_steps_leave_no_event(monitor, events):
    for step in range(1, 50):
        take(monitor, step, [1.0, 9.0])
    monitor.end_epoch(1)
    assert events == []


@pytest.mark.parametrize(
    ("norm", "kind", "line"), [(60.0, "high", "above 50"), (150.0, "unstable", "above 100")]
)
def test_large_gradients_name_the_parameter_they_are_in(monitor, events, norm, kind, line):
    take(monitor, 7, grad_norm=norm)
    (event,) = events
    assert event["kind"] == kind and line in event["message"]
    assert "contour.weight" in event["message"] and event["step"] == 7


def test_repeats_are_merged_into_one_line_an_epoch(monitor, events):
    for step in range(1, 101):
        take(monitor, step, grad_norm=100.0 + step)
    monitor.end_epoch(1)
    first, again = events
    assert first["step"] == 1 and (again["kind"], again["of"]) == ("again", "unstable")
    assert (again["count"], again["first_step"], again["step"]) == (100, 1, 100)
    assert "100 steps" in again["message"] and "at worst 200" in again["message"]
    take(monitor, 101, epoch=2, grad_norm=120.0)
    assert len(events) == 3  # a new epoch reports it again


def test_a_skip_says_loss_or_gradient_which_term_and_which_parameter(monitor, events):
    take(monitor, 3, norms=[1.0, math.inf], skipped=1, bad_grad=1, grad_max=math.inf)
    take(monitor, 4, [1.0, math.nan], [math.nan, math.nan], skipped=1, bad_loss=1, bad_grad=1)
    gradient, loss = events
    assert "the gradient was not finite in 1 of 2 parameters, first contour.weight" in gradient["message"]
    assert "the loss was not finite (terms: contour)" in loss["message"]
    assert (gradient["terms"], loss["terms"]) == ([], ["contour"])


def test_a_gradient_too_large_to_clip_is_told_from_one_that_is_not_finite(monitor, events):
    take(monitor, 3, norms=[1.0, math.inf], skipped=1, bad_grad=1, grad_max=3e37)
    text = "finite but too large to clip in float32 (largest element 3e+37) in 1 of 2 parameters"
    assert text in events[0]["message"]


def test_cap_and_floor_are_events(monitor, events):
    take(monitor, 5, [20.0, 10.0], loss_scale=1.0)
    assert [(e["kind"], e["step"]) for e in events] == [("scale_floor", 5), ("capped", 5)]
    assert "contour" in events[1]["message"]  # cross-entropy has no cap


@pytest.mark.parametrize(
    ("on_spike", "done"),
    [("skip", "skipped"), ("clip", "clipped to the usual norm"), ("note", "applied as it is")],
)
def test_a_spike_says_what_stood_out_where_and_what_was_done(monitor, events, on_spike, done):
    monitor.guard.on_spike = on_spike
    skipped = int(on_spike == "skip")
    take(monitor, 9, [80.0, 1.0], loss=80.0, spike_loss=1, spike_grad=1, grad_norm=40.0, skipped=skipped)
    loss, gradient = events  # a spike that was skipped is not called "not finite"
    assert all(e["kind"] == "spike" and e["message"].endswith(done) for e in events)
    assert "the loss 80 is far above its past" in loss["message"]
    assert "gradient norm 40" in gradient["message"] and gradient["parameter"] == "contour.weight"


def test_spikes_of_loss_and_gradient_are_merged_each_by_itself(monitor, events):
    for step in range(1, 31):
        take(monitor, step, loss=10.0 + step, spike_loss=1, spike_grad=int(step > 20), grad_norm=30.0)
    monitor.end_epoch(1)
    again = {e["message"].partition(": ")[2]: e["count"] for e in events if e["kind"] == "again"}
    assert again == {
        "spike (loss) in 30 steps, 1 to 30, at worst 40": 30,
        "spike (gradient) in 10 steps, 21 to 30, at worst 30": 10,
    }


def test_at_the_floor_of_the_loss_scale_the_module_nearest_the_loss_is_named(monitor, events):
    bad = {"norms": [math.inf, math.inf], "skipped": 1, "bad_grad": 1, "grad_max": math.inf}
    take(monitor, 3, **bad, loss_scale=1.0)
    monitor.end_epoch(1)
    take(monitor, 5, epoch=2, **bad, loss_scale=64.0)
    assert "at its floor 1: float16 overflows in contour by itself" in events[0]["message"]
    assert events[0]["loss_scale"] == 1.0 and "floor" not in events[1]["message"]


def test_without_a_loss_scale_there_is_no_floor(events):
    take(watching(events, scaled=False), 1, [1e6, 1e6], loss_scale=1.0)
    assert events == []


def test_an_unusual_loss_component_is_named_with_the_samples_in_the_batch(monitor, events):
    monitor.batch_instances = lambda step: [{"annotation_id": 10 * step}]
    generator = random.Random(0)
    for step in range(1, 200):
        take(monitor, step, [generator.lognormvariate(0, 0.3), generator.lognormvariate(-1, 0.3)])
    assert events == []
    take(monitor, 200, [1.0, 9.0])
    (event,) = events
    assert event["kind"] == "unusual" and "the contour loss is 9" in event["message"]
    assert event["people"] == [{"annotation_id": 2000}]


def test_a_level_that_moves_slowly_is_not_unusual(monitor, events):
    for step in range(1, 2000):
        take(monitor, step, [1.0, 0.01 * 1.003**step])
    assert not [event for event in events if event["kind"] == "unusual"]
