"""The same fault under several loops: the guard is exact, and the others end as the notebook says."""

from __future__ import annotations

import math

import pytest
from helpers import bench

from studies import guards

SIZE = {"steps": 40, "at": 12}


@pytest.fixture(scope="module")
def clean():
    return {name: guards.run(name, steps=40) for name in ("plain", "scaler", "clipping", "guard")}


def cell(name, fault, clean):
    without = guards.run(name, steps=40, without=guards.poisoned(fault, 12))
    return guards.cell(guards.run(name, fault, **SIZE), clean[name], without)


@pytest.mark.parametrize("fault", ["loss", "gradient", "overflow", "spike", "image"])
def test_with_the_guard_the_run_is_exactly_that_without_the_bad_batches(fault, clean):
    found = cell("guard", fault, clean)
    assert found["exact"] == "yes" and found["told"] and found["lost"] == len(found["steps"])


@pytest.mark.parametrize("name, fault", [("plain", "loss"), ("clipping", "gradient"), ("scaler", "image")])
def test_what_the_others_end_with_is_not_finite(name, fault, clean):
    found = cell(name, fault, clean)
    assert (found["exact"], found["told"], found["lost"], found["final_loss"]) == ("no", False, "all", None)


def test_a_gradient_scaler_alone_keeps_the_training_loss_and_loses_the_model(clean):
    course = guards.run("scaler", "image", every=10, **SIZE)
    assert math.isfinite(course.losses[-1]) and not math.isfinite(course.final)
    assert "loss nan at step 12" in guards.summary(course)


def test_a_fault_changes_nothing_before_its_step(clean):
    for name, course in clean.items():
        assert guards.run(name, "loss", **SIZE).losses[:11] == course.losses[:11]


def test_figure_and_table(clean):
    courses = [guards.run(name, "image", every=10, **SIZE) for name in ("scaler", "guard")]
    scaler, guarded = guards.draw(courses).axes
    assert [text.get_text() for text in scaler.texts] == ["held-out loss: NaN"] and not guarded.texts
    text = bench("guards").table([cell("guard", "loss", clean)], ["loss"])
    assert "| NaN loss | refinelib.guard |" in text and "| yes | yes |" in text


@pytest.mark.parametrize("name", guards.MODELS)
def test_each_measured_model_takes_a_step(name):
    model, criterion, (x, y) = guards.measured_model(name, large=False)
    criterion(model(x), y).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
