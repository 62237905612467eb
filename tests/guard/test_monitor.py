"""Events: the first time in a sentence, repeats in one line an epoch."""

import math
import random

import pytest

from refinelib.config import resolve
from refinelib.guard.guard import REPORT
from refinelib.guard.watch import StepMonitor
from refinelib.runs import Run

GOOD = dict(zip(REPORT, [1.0, 2.0, 0.5, 1e-3, 1024.0] + [0] * 7))
NORMS = [1.0, 3.0]


@pytest.fixture
def watch(tmp_path):
    run = Run.start(resolve("demo", output_dir=str(tmp_path)))
    return StepMonitor(run, losses=["ce", "contour"], parameters=["stem.weight", "contour.weight"], cap=10.0, scale_floor=1.0)


def test_ordinary_steps_leave_no_event(watch):
    for step in range(1, 50):
        watch.step(step, 1, GOOD, [1.0, 9.0], NORMS)
    watch.end_epoch(1)
    assert watch.run.events() == []


@pytest.mark.parametrize(("norm", "kind", "line"), [(60.0, "high", "above 50"), (150.0, "unstable", "above 100")])
def test_large_gradients_name_the_parameter_they_are_in(watch, norm, kind, line):
    watch.step(7, 1, {**GOOD, "grad_norm": norm}, [1.0, 1.0], NORMS)
    (event,) = watch.run.events()
    assert event["kind"] == kind and line in event["message"] and "contour.weight" in event["message"] and event["step"] == 7


def test_repeats_are_merged_into_one_line_an_epoch(watch):
    for step in range(1, 101):
        watch.step(step, 1, {**GOOD, "grad_norm": 100.0 + step}, [1.0, 1.0], NORMS)
    watch.end_epoch(1)
    first, again = watch.run.events()
    assert first["step"] == 1 and (again["kind"], again["of"]) == ("again", "unstable") and again["count"] == 100 and again["first_step"] == 1 and again["step"] == 100
    assert "100 steps" in again["message"] and "at worst 200" in again["message"]
    watch.step(101, 2, {**GOOD, "grad_norm": 120.0}, [1.0, 1.0], NORMS)
    assert len(watch.run.events()) == 3  # a new epoch tells it anew


def test_a_skip_says_loss_or_gradient_which_term_and_which_parameter(watch):
    watch.step(3, 1, {**GOOD, "skipped": 1, "bad_grad": 1, "grad_max": math.inf}, [1.0, 1.0], [1.0, math.inf])
    watch.step(4, 1, {**GOOD, "skipped": 1, "bad_loss": 1, "bad_grad": 1}, [1.0, math.nan], [math.nan, math.nan])
    gradient, loss = watch.run.events()
    assert "the gradient was not finite in 1 of 2 parameters, first contour.weight" in gradient["message"] and gradient["terms"] == []
    assert "the loss was not finite (terms: contour)" in loss["message"] and loss["terms"] == ["contour"]


def test_a_gradient_too_large_to_clip_is_told_from_one_that_is_not_finite(watch):
    watch.step(3, 1, {**GOOD, "skipped": 1, "bad_grad": 1, "grad_max": 3e37}, [1.0, 1.0], [1.0, math.inf])
    (event,) = watch.run.events()
    assert "finite but too large to clip in float32 (largest element 3e+37) in 1 of 2 parameters" in event["message"]


def test_cap_and_floor_are_events(watch):
    watch.step(5, 1, {**GOOD, "loss_scale": 1.0}, [20.0, 10.0], NORMS)
    assert [(e["kind"], e["step"]) for e in watch.run.events()] == [("scale_floor", 5), ("capped", 5)]
    assert "contour" in watch.run.events()[1]["message"]  # cross-entropy has no cap


@pytest.mark.parametrize(("on_spike", "done"), [("skip", "skipped"), ("clip", "clipped to the usual norm"), ("note", "applied as it is")])
def test_a_spike_says_what_stood_out_where_and_what_was_done(watch, on_spike, done):
    watch.on_spike = on_spike
    spike = {**GOOD, "loss": 80.0, "spike_loss": 1, "spike_grad": 1, "grad_norm": 40.0, "skipped": int(on_spike == "skip")}
    watch.step(9, 1, spike, [80.0, 1.0], NORMS)
    loss, gradient = watch.run.events()
    assert [e["kind"] for e in (loss, gradient)] == ["spike", "spike"] and all(e["message"].endswith(done) for e in (loss, gradient))
    assert "the loss 80 is far above its past" in loss["message"]
    assert "gradient norm 40" in gradient["message"] and gradient["parameter"] == "contour.weight" and "contour.weight" in gradient["message"]


def test_a_spike_that_was_skipped_is_not_called_not_finite(watch):
    watch.on_spike = "skip"
    watch.step(9, 1, {**GOOD, "spike_grad": 1, "skipped": 1}, [1.0, 1.0], NORMS)
    assert [e["kind"] for e in watch.run.events()] == ["spike"] and "not finite" not in watch.run.events()[0]["message"]


def test_spikes_of_loss_and_gradient_are_merged_each_by_itself(watch):
    for step in range(1, 31):
        watch.step(step, 1, {**GOOD, "loss": 10.0 + step, "spike_loss": 1, "spike_grad": int(step > 20), "grad_norm": 30.0}, [1.0, 1.0], NORMS)
    watch.end_epoch(1)
    again = {e["message"].partition(": ")[2]: e["count"] for e in watch.run.events() if e["kind"] == "again"}
    assert again == {"spike (loss) in 30 steps, 1 to 30, at worst 40": 30, "spike (gradient) in 10 steps, 21 to 30, at worst 30": 10}
    assert len(watch.run.events()) == 4


def test_at_the_floor_of_the_loss_scale_the_module_nearest_the_loss_is_named(watch):
    """What overflows there overflows by itself; what lies below it only inherits."""
    watch.step(3, 1, {**GOOD, "skipped": 1, "bad_grad": 1, "loss_scale": 1.0}, [1.0, 1.0], [math.inf, math.inf])
    watch.step(4, 1, {**GOOD, "skipped": 1, "bad_grad": 1, "loss_scale": 64.0}, [1.0, 1.0], [math.inf, math.inf])
    (event,) = watch.run.events()
    assert "at its floor 1: float16 overflows in contour by itself" in event["message"] and event["loss_scale"] == 1.0
    watch.end_epoch(1)
    watch.step(5, 2, {**GOOD, "skipped": 1, "bad_grad": 1, "loss_scale": 64.0}, [1.0, 1.0], [math.inf, math.inf])
    assert "floor" not in watch.run.events()[-1]["message"]


def test_without_a_loss_scale_nobody_speaks_of_its_floor(tmp_path):
    watch = StepMonitor(Run.start(resolve("demo", output_dir=str(tmp_path))), losses=["ce"], parameters=["stem.weight"], cap=None, scale_floor=None)
    watch.step(1, 1, {**GOOD, "loss_scale": 1.0}, [1e6], [1.0])
    assert watch.run.events() == []


def test_a_loss_component_far_out_of_its_range_is_named_with_the_people_in_the_batch(watch):
    watch.batch_instances = lambda step: [{"annotation_id": 10 * step}]
    generator = random.Random(0)
    for step in range(1, 200):
        watch.step(step, 1, GOOD, [generator.lognormvariate(0, 0.3), generator.lognormvariate(-1, 0.3)], NORMS)
    assert watch.run.events() == []
    watch.step(200, 1, GOOD, [1.0, 9.0], NORMS)
    (event,) = watch.run.events()
    assert event["kind"] == "unusual" and "the contour loss is 9" in event["message"] and event["people"] == [{"annotation_id": 2000}]


def test_a_level_that_moves_slowly_is_not_unusual(watch):
    for step in range(1, 2000):
        watch.step(step, 1, GOOD, [1.0, 0.01 * 1.003**step], NORMS)
    assert not [event for event in watch.run.events() if event["kind"] == "unusual"]
