"""Faults on demand: read as they are written, planted where and when they say, and nothing else touched."""

import functools
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import assert_same, final_weights

import refinelib.trainer as loop
from refinelib.build import build_model
from refinelib.guard.faults import Injector, parse
from refinelib.trainer import train

STEPS = 20_000
RIGHT = """
grad:nan@12:boundary activation:inf@3:person loss:nan@5:always input:nan@5% input:overflow@7
label:swap@7 kill@20 file:truncated@3 file:missing@1 grad:spike@1 loss:inf@0.5%
activation:nan@1%:contour.trunk.0 loss:nan@100%
"""
WRONG = """
grad grad@3 grad:nan grad:nan@ grad:nan@0 grad:nan@-1 grad:nan@1.5 grad:nan@two grad:swap@3
grad:nan@3:a:b grad:NaN@3 activation:nan@3 activation:nan@3:always weights:nan@3 label:nan@3 label@3
kill:nan@3 kill@5% file:nan@3 file:truncated@5% file:truncated input:nan@0% input:nan@101%
input:nan@5%:always loss:nan@5%% loss:nan&5 loss:nan@3,grad:nan@4
"""


def due(text, steps=STEPS):
    (fault,) = parse(text)
    return [step for step in range(1, steps + 1) if fault.due(step)]


# -- as written --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", RIGHT.split())
def test_a_fault_reads_back_as_it_was_written(text):
    (fault,) = parse(text)
    assert str(fault) == text and parse(str(fault)) == [fault]


def test_several_stand_side_by_side():
    faults = parse(" grad:nan@3 ;loss:inf@5%; ;kill@9;")
    assert [str(fault) for fault in faults] == ["grad:nan@3", "loss:inf@5%", "kill@9"]
    assert parse("") == []


@pytest.mark.parametrize("text", WRONG.split())
def test_a_wrong_form_is_refused_in_a_sentence_that_shows_right_ones(text):
    with pytest.raises(
        ValueError, match=r"write WHAT:VALUE@WHEN\[:WHERE\]\[:always\], such as grad:nan@12:boundary"
    ):
        parse(text)


# -- when --------------------------------------------------------------------------------------------
def test_a_step_once_or_from_then_on():
    assert due("loss:nan@7") == [7]
    assert due("loss:nan@7:always", 12) == [7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("per_cent", [0.5, 1, 5, 20, 60])
@pytest.mark.parametrize(
    "fault", ["input:nan", "loss:inf", "grad:nan:person", "activation:spike:contour.trunk"]
)
def test_a_share_is_that_share_and_scattered(per_cent, fault):
    """Within four standard deviations of independent draws: as a whole, in every window, and two in a row."""
    what, value, *place = fault.split(":")
    found = due(f"{what}:{value}@{per_cent:g}%" + "".join(f":{p}" for p in place))
    share = per_cent / 100

    def as_drawn(count, draws, chance):
        return abs(count - draws * chance) <= 4 * math.sqrt(draws * chance * (1 - chance)) + 1

    assert as_drawn(len(found), STEPS, share)
    for start in range(0, STEPS, 2000):
        assert as_drawn(sum(start < step <= start + 2000 for step in found), 2000, share)
    following = sum(b - a == 1 for a, b in zip(found, found[1:], strict=False))
    assert abs(following - STEPS * share**2) <= 5 * math.sqrt(STEPS * share**2) + 1
    every_hundredth = len({step % 100 for step in found})  # no pattern in tens and hundreds
    assert every_hundredth >= 0.9 * min(100, 100 * (1 - math.exp(-len(found) / 100)))


def test_two_faults_of_the_same_share_have_steps_of_their_own():
    one, other = set(due("loss:nan@20%")), set(due("grad:nan@20%"))
    assert abs(len(one & other) - 0.04 * STEPS) < 5 * math.sqrt(0.04 * STEPS)


@pytest.mark.slow
def test_a_share_takes_the_same_steps_in_every_process():
    code = "from refinelib.guard.faults import parse; (f,) = parse('input:nan@5%'); "
    code += "print([s for s in range(1, 2001) if f.due(s)])"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == str(due("input:nan@5%", 2000))


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_here")
def test_a_share_survives_a_resume(tiny, monkeypatch):
    inject = "grad:nan@20%:stem;input:inf@10%"
    settings = functools.partial(tiny, epochs=4, batch_size=2, inject=inject, validate_every=4, probe_every=0)
    whole = train(settings(run="whole"))
    skipped = {
        step for fault in parse(inject) for step in range(1, whole.status()["steps"] + 1) if fault.due(step)
    }
    assert whole.status()["skipped_steps"] == len(skipped) and len(skipped) > 2
    real, calls = loop.Trainer.train_step, []

    def stop_at_eight(self, plan, at):
        calls.append(at)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, at)

    monkeypatch.setattr(loop.Trainer, "train_step", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        train(settings(run="parts"))
    monkeypatch.undo()
    parts = train(settings(run="parts", resume=True))
    assert parts.status()["skipped_steps"] == whole.status()["skipped_steps"]
    assert_same(final_weights(whole), final_weights(parts))


# -- what --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    from refinelib.config import resolve

    torch.manual_seed(0)
    return build_model(resolve("demo", width=0.0625, roi_size=32, mask_size=32))


def planted(model, text):
    """An injector whose hooks go when the test ends."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    injector = Injector(text, model)
    return injector, [
        (module, key) for module in model.modules() for key in set(module._forward_hooks) - before[module]
    ]


@pytest.mark.parametrize(("value", "check"), [
    ("nan", lambda x, y: math.isnan(y.flatten()[0])), ("inf", lambda x, y: y.flatten()[0] == math.inf),
    ("overflow", lambda x, y: y.flatten()[0].isfinite() and not y.flatten()[0].square().isfinite()),
])  # fmt: skip
def test_an_input_fault_spoils_one_element_of_the_first_crop_at_its_step_only(model, value, check):
    injector, _ = planted(model, f"input:{value}@3")
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    for step in (2, 3, 4):
        injector.start(step)
        spoilt, same = injector.batch(images, labels)
        assert torch.equal(same, labels)
        assert torch.equal(spoilt.flatten()[1:], images.flatten()[1:])
        assert check(images, spoilt) if step == 3 else torch.equal(spoilt, images)


def test_a_spike_is_a_thousand_times_and_labels_swap_to_other_classes(model):
    injector, _ = planted(model, "input:spike@1;label:swap@1;loss:spike@1")
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    injector.start(1)
    spoilt, other = injector.batch(images, labels)
    torch.testing.assert_close(spoilt, 1000 * images)
    assert (other != labels).all() and set(other.unique().tolist()) <= {0, 1, 2}
    assert injector.loss(torch.tensor(2.0)) == 2000.0
    injector.start(2)
    assert torch.equal(injector.batch(images, labels)[0], images) and injector.loss(torch.tensor(2.0)) == 2.0


def test_a_gradient_fault_spoils_the_first_parameter_of_that_name(model):
    injector, _ = planted(model, "grad:nan@1:boundary")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    injector.start(1)
    injector.after_backward()
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    model.zero_grad(set_to_none=True)
    assert bad == [next(name for name, _ in model.named_parameters() if name.startswith("boundary"))]


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("contour", "contour"),
        ("contour.trunk", "contour.trunk"),
        ("person.ups", "person.ups.0"),
        ("pers", "person"),
    ],
)
def test_an_activation_fault_lies_in_the_first_module_of_that_name_that_is_called(model, where, module):
    """A list of modules, such as person.ups, is never called itself."""
    injector, hooks = planted(model, f"activation:nan@2:{where}")
    try:
        assert [name for name, m in model.named_modules() if m is hooks[0][0]] == [module] and len(hooks) == 1
        image = torch.randn(1, 3, 32, 32)
        for step, good in ((1, True), (2, False), (3, True)):
            injector.start(step)
            assert bool(model(image).logits.isfinite().all()) == good
        with torch.no_grad():  # validation runs at no step of its own
            injector.start(2)
            assert model(image).logits.isfinite().all()
    finally:
        for owner, key in hooks:
            del owner._forward_hooks[key]


def test_a_place_that_is_nowhere_is_refused_with_those_there_are(model):
    for what in ("grad", "activation"):
        with pytest.raises(ValueError, match="no such place in the model; there are .*boundary.*stem"):
            Injector(f"{what}:nan@3:bondary", model)


def test_a_step_that_is_looked_at_again_is_not_killed_again(model):
    injector, _ = planted(model, "kill@3")
    injector.replaying = True
    injector.start(3)  # this process goes on
    assert injector.planted(3) == []


def test_faults_that_never_come_change_no_bit(tiny):
    plain = train(tiny(run="plain", epochs=1))
    armed = train(
        tiny(
            run="armed",
            epochs=1,
            inject="grad:nan@999:stem;input:spike@999;activation:inf@999:contour;label:swap@999;loss:nan@999",
        )
    )
    assert_same(final_weights(plain), final_weights(armed))
    assert [line["loss"] for line in plain.steps()] == [line["loss"] for line in armed.steps()]
