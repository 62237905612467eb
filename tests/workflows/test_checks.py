"""The debug checks: they pass on what is right, and each says what is wrong when it is broken."""

import json

import pytest
import torch
from torch import nn

import refinelib.trainer as loop
from refinelib.config import resolve
from refinelib.data.coco import CocoPeople
from refinelib.runs import Run
from refinelib.workflows import checks


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return resolve("debug", output_dir=str(folder), smoke=True, device="cpu")


@pytest.fixture
def parts(settings):
    return checks.parts(settings)


def test_all_pass_and_are_kept(settings, parts):
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    results = [checks.shapes(parts), checks.gradients(parts), checks.overfit(parts, steps=90)]
    assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())
    assert all(p.grad is None for p in parts.model.parameters())
    results.append(checks.whole_run(settings))
    assert all(check.passed for check in results), results
    assert results[0].figures["loss"] == pytest.approx(2.1, abs=0.2)
    loss, iou = results[2].figures["loss"], results[2].figures["target_iou"]
    assert iou[-1] > 0.99 and loss[-1] < 0.1 * loss[0]
    folder = checks.record(results)
    recorded = json.loads((folder / "checks.json").read_text())["checks"]
    assert [found["name"] for found in recorded] == [check.name for check in results]
    assert Run.open(folder).status()["state"] == "ok"
    checks.raise_if_failed(results)


@pytest.mark.parametrize(
    "recipe, more",
    [("phase1", {}), ("finetune", {"init_from": "none"}), ("original", {"amp": "bf16"})],
    ids=str,
)
def test_other_recipes_are_wired_right_too(settings, recipe, more):
    parts = checks.parts(resolve(recipe, output_dir=settings.output_dir, smoke=True, device="cpu", **more))
    for check in (checks.shapes(parts), checks.gradients(parts)):
        assert check.passed, check


class _Changed(nn.Module):
    """A model whose output is changed by ``change``."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.canvas, self.mask_canvas = (
            model,
            change,
            model.canvas,
            model.mask_canvas,
        )

    def forward(self, images):
        return self.change(self.model(images))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda out: out._replace(logits=out.logits[..., :-2]),
            ["logits", "[1, 2, 32, 30]", "[1, 2, 32, 32]"],
        ),
        (lambda out: out._replace(logits=out.logits.double()), ["logits", "float64"]),
        (lambda out: out._replace(distance=out.distance * torch.nan), ["distance", "not finite"]),
        (lambda out: out._replace(logits=out.logits - out.logits.mean(0, keepdim=True)), ["with its batch"]),
        (lambda out: out.no_such_field, ["AttributeError", "no_such_field", "(workflows/checks.py, line "]),
    ],
)
def test_a_wrong_output_is_named(parts, change, words):
    check = checks.shapes(parts._replace(model=_Changed(parts.model, change)))
    assert not check.passed and all(word in check.sentence for word in words), check


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda batch: batch._replace(images=batch.images[:, :1]), "crops is torch.float32 [1, 1, 32, 32]"),
        (lambda batch: batch._replace(images=batch.images * 0), "every crop is of one flat colour"),
        (
            lambda batch: batch._replace(images=batch.images * 0 + 1.65),
            "vary by 0 at most: look at the images",
        ),
        (lambda batch: batch._replace(images=batch.images * 100), "outside -3 to 3: see data/augment.py"),
        (lambda batch: batch._replace(images=batch.images * float("nan")), "crops run from nan"),
        (lambda batch: batch._replace(labels=batch.labels.float()), "labels is torch.float32"),
        (lambda batch: batch._replace(labels=batch.labels + 2), "not 0, 1, 2"),
        (lambda batch: batch._replace(labels=batch.labels * 0), "a target"),
    ],
)
def test_a_wrong_batch_is_named(parts, change, words):
    check = checks.shapes(parts._replace(batch=change(parts.batch)))
    assert not check.passed and words in check.sentence, check


def test_the_place_of_an_error_is_the_innermost_line_of_the_package(parts, tmp_path):
    parts.model.stem = nn.Identity()
    check = checks.shapes(parts)
    assert not check.passed and "(modeling/layers.py, line " in check.sentence, check
    with pytest.raises(Exception) as caught:
        CocoPeople(tmp_path / "none.json", tmp_path)
    assert checks.place(caught.value).startswith(" (data/coco.py, line ")
    assert checks.place(ValueError("raised nowhere")) == ""


def test_a_frozen_parameter_is_named(parts):
    parts.model.contour.requires_grad_(False)
    check = checks.gradients(parts)
    assert not check.passed and "frozen" in check.sentence and "contour." in check.sentence


def test_a_module_that_no_gradient_reaches_is_named(parts):
    parts.model.forgotten = nn.Conv2d(3, 3, 1)
    check = checks.gradients(parts)
    assert (
        not check.passed and "forgotten.weight" in check.sentence and "no gradient at all" in check.sentence
    )
    assert "progressive" not in check.sentence, "what starts at 0 is not to blame when no step could be made"


def test_a_gradient_of_0_and_one_that_is_not_finite_are_named(parts):
    parts.model.contour.blend.data.zero_()
    handle = parts.model.contour.blend.register_hook(torch.zeros_like)
    check = checks.gradients(parts)
    assert not check.passed and "exactly 0" in check.sentence and "contour.blend" in check.sentence
    handle.remove()
    parts.model.boundary.blend.register_hook(lambda grad: grad * torch.nan)
    check = checks.gradients(parts)
    assert not check.passed and "not finite: boundary.blend" in check.sentence


def test_what_keeps_a_batch_from_being_overfitted_is_named(parts):
    check = checks.overfit(parts, lr=1e-9, steps=10)
    assert not check.passed and "nothing is learned" in check.sentence and "1e-09" in check.sentence
    check = checks.overfit(parts, steps=8)
    assert not check.passed and "learns too little" in check.sentence
    parts.model.boundary.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    check = checks.overfit(parts, steps=5)
    assert not check.passed and "5 steps were skipped" in check.sentence


def test_a_run_that_skips_a_step_is_named(settings):
    check = checks.whole_run(settings.model_copy(update={"inject": "grad:nan@3:boundary"}))
    assert not check.passed and "steps, 1 steps were skipped" in check.sentence


def test_a_checkpoint_that_holds_other_weights_is_named(settings, monkeypatch):
    real = loop.Trainer.state_dict

    def other(self):
        saved = real(self)
        return {**saved, "model": {name: value * 1.5 for name, value in saved["model"].items()}}

    monkeypatch.setattr(loop.Trainer, "state_dict", other)
    check = checks.whole_run(settings)
    assert not check.passed and "masks differ" in check.sentence


def test_a_run_that_fails_is_named_and_its_status_says_so(settings, tmp_path, monkeypatch):
    settings = settings.model_copy(update={"output_dir": str(tmp_path)})
    monkeypatch.setattr(loop.Trainer, "end_epoch", lambda self, epoch, started: 1 / 0)
    check = checks.whole_run(settings)
    assert (
        not check.passed and "ZeroDivisionError" in check.sentence and "(trainer.py, line " in check.sentence
    )
    status = Run(checks.record([check])).status()
    assert status["state"] == "failed" and "one whole tiny run" in status["last_error"]
    with pytest.raises(
        checks.CheckError, match="1 of 1 checks failed: one whole tiny run: ZeroDivisionError"
    ):
        checks.raise_if_failed([check])
    with pytest.raises(checks.CheckError, match="the tiny run left no folder; 1 of 1"):
        checks.record([check._replace(figures={})])


@pytest.mark.slow
@pytest.mark.usefixtures("half_here")
def test_a_loss_scale_that_is_still_too_high_is_no_fault_of_the_model(tmp_path):
    """fp16: its first gradients overflow; a run skips such steps, halves the scale and is healthy."""
    size = {"max_images": 4, "batch_size": 1, "device": "cpu", "output_dir": str(tmp_path)}
    settings = resolve("original", smoke=True, loss_scale_init=2.0**21, **size)
    parts = checks.parts(settings)
    results = [checks.shapes(parts), checks.gradients(parts), checks.overfit(parts, steps=6)]
    assert results[0].passed and results[1].passed, results
    assert results[2].figures["skipped"] == 0 and "skipped" not in results[2].sentence
    run = checks.whole_run(settings)
    assert run.passed and Run(run.figures["folder"]).status()["skipped_steps"] > 0, run
    parts.model.boundary.blend.register_hook(lambda grad: grad * torch.nan)
    broken = checks.gradients(parts)
    assert not broken.passed and "not finite: boundary.blend" in broken.sentence
