"""The debug checks: they pass on what is right, and each says what is wrong when it is broken."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
import torch
from torch import nn

import refinelib.trainer as loop
from refinelib.config import project_root, resolve
from refinelib.plots import checks as checks_plots
from refinelib.runs import Run
from refinelib.workflows import checks, verdicts


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return resolve("debug", output_dir=str(folder), smoke=True, device="cpu")


@pytest.fixture
def parts(settings):
    return checks.parts(settings)


def test_all_pass_as_things_stand_and_are_kept(settings, parts):
    results = [checks.shapes(parts), checks.gradients(parts), checks.overfit(parts), checks.whole_run(settings)]
    assert all(check.passed for check in results), results
    assert results[0].figures["loss"] == pytest.approx(2.1, abs=0.2)
    assert results[2].figures["target_iou"][-1] > 0.99 and results[2].figures["loss"][-1] < 0.06 * results[2].figures["loss"][0]
    folder = verdicts.record(results, settings)
    assert verdicts.read(folder) == results
    assert "all 4 checks passed" in verdicts.conclude(folder)
    assert Run.open(folder).status()["state"] == "ok"
    for draw in (checks_plots.overfit, checks_plots.gradients):
        assert "passed" in draw(folder)._suptitle.get_text()


def test_the_gradient_check_leaves_the_model_as_it_was(parts):
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    checks.gradients(parts)
    assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())
    assert all(p.grad is None for p in parts.model.parameters())


@pytest.mark.parametrize(
    "recipe, more", [("phase1", {}), ("finetune", {"init_from": "none"}), ("original", {"amp": "bf16"})], ids=str
)
def test_other_recipes_are_wired_right_too(settings, recipe, more):
    parts = checks.parts(resolve(recipe, output_dir=settings.output_dir, smoke=True, device="cpu", **more))
    for check in (checks.shapes(parts), checks.gradients(parts)):
        assert check.passed, check


class _Reshaped(nn.Module):
    """A model whose output is spoilt by ``change``."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.canvas, self.mask_canvas = model, change, model.canvas, model.mask_canvas

    def forward(self, images):
        return self.change(self.model(images))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda out: out._replace(logits=out.logits[..., :-2]), ["logits", "[1, 2, 32, 30]", "[1, 2, 32, 32]"]),
        (lambda out: out._replace(logits=out.logits.double()), ["logits", "float64"]),
        (lambda out: out._replace(contour_logits=None), ["contour_logits is missing"]),
        (lambda out: out._replace(distance=out.distance * torch.nan), ["distance", "not finite"]),
        (lambda out: out._replace(distance=out.distance + 3), ["distance reaches", "-1 to 1"]),
        (lambda out: out._replace(logits=out.logits - out.logits.mean(0, keepdim=True)), ["others are in its batch"]),
        (lambda out: out.no_such_field, ["AttributeError", "no_such_field"]),
    ],
)  # fmt: skip
def test_a_model_that_returns_something_else_is_told(parts, change, words):
    check = checks.shapes(parts._replace(model=_Reshaped(parts.model, change)))
    assert not check.passed and all(word in check.sentence for word in words), check


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda batch: batch._replace(images=batch.images[:, :1]), ["crops", "[1, 1, 32, 32]"]),
        (lambda batch: batch._replace(images=batch.images * 0), ["should be pictures"]),
        (lambda batch: batch._replace(images=batch.images * 100), ["should be pictures"]),
        (lambda batch: batch._replace(labels=batch.labels.float()), ["labels are float32"]),
        (lambda batch: batch._replace(labels=batch.labels + 2), ["run from 2"]),
        (lambda batch: batch._replace(labels=batch.labels * 0), ["a target"]),
    ],
)  # fmt: skip
def test_a_batch_that_is_no_batch_is_told(parts, change, words):
    check = checks.shapes(parts._replace(batch=change(parts.batch)))
    assert not check.passed and all(word in check.sentence for word in words), check


def test_a_frozen_parameter_is_named(parts):
    parts.model.contour.requires_grad_(False)
    check = checks.gradients(parts)
    assert not check.passed and "frozen" in check.sentence and "contour." in check.sentence


def test_a_module_off_the_way_to_the_loss_is_named(parts):
    parts.model.forgotten = nn.Conv2d(3, 3, 1)
    check = checks.gradients(parts)
    assert not check.passed and "forgotten.weight" in check.sentence and "no gradient at all" in check.sentence
    assert "progressive" not in check.sentence, "what starts at 0 is not blamed when no step could be made"


def test_a_head_that_no_loss_reaches_is_named(parts):
    """The first attempt's contour head: its loss switched off, it only runs beside the mask."""
    parts.model.contour.blend.data.zero_()
    parts.model.contour.blend.register_hook(torch.zeros_like)
    check = checks.gradients(parts)
    assert not check.passed and "exactly 0" in check.sentence and "contour.blend" in check.sentence


def test_a_gradient_that_is_not_finite_is_named(parts):
    parts.model.boundary.blend.register_hook(lambda grad: grad * torch.nan)
    check = checks.gradients(parts)
    assert not check.passed and "not finite: boundary.blend" in check.sentence


def test_a_learning_rate_of_nearly_nothing_is_told(parts):
    check = checks.overfit(parts, lr=1e-9, steps=20)
    assert not check.passed and "nothing is learned" in check.sentence and "1e-09" in check.sentence


def test_too_few_steps_are_told(parts):
    check = checks.overfit(parts, steps=8)
    assert not check.passed and "does not get there" in check.sentence


def test_steps_that_are_skipped_are_told(parts):
    parts.model.boundary.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    check = checks.overfit(parts, steps=5)
    assert not check.passed and "5 steps were skipped" in check.sentence


def test_a_run_that_skips_a_step_is_told(settings):
    check = checks.whole_run(settings.model_copy(update={"inject": "grad:nan@3:boundary"}))
    assert not check.passed and "1 of 26 steps were skipped" in check.sentence


def test_a_checkpoint_that_holds_other_weights_is_told(settings, monkeypatch):
    real = loop.Trainer.state_dict

    def other(self):
        saved = real(self)
        return {**saved, "model": {name: value * 1.5 for name, value in saved["model"].items()}}

    monkeypatch.setattr(loop.Trainer, "state_dict", other)
    check = checks.whole_run(settings)
    assert not check.passed and "masks differ" in check.sentence


def test_a_run_that_breaks_off_is_told_and_its_status_says_so(settings, tmp_path, monkeypatch):
    settings = settings.model_copy(update={"output_dir": str(tmp_path)})
    monkeypatch.setattr(loop.Trainer, "end_epoch", lambda self, epoch, started: 1 / 0)
    check = checks.whole_run(settings)
    assert not check.passed and "ZeroDivisionError" in check.sentence and "training.py" in check.sentence
    folder = verdicts.record([check], settings)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "one whole tiny run" in status["last_error"]
    with pytest.raises(verdicts.CheckError, match="1 of 1 checks failed: one whole tiny run: ZeroDivisionError"):
        verdicts.conclude(folder)
    for draw in (checks_plots.overfit, checks_plots.gradients):  # nothing to draw, and no second error over the first
        assert "failed" in draw(folder)._suptitle.get_text()


def test_the_notebook_goes_on_after_a_failed_check_and_fails_in_its_last_cell(tmp_path):
    where = ("-p", "output_dir", tmp_path, "-p", "overfit_lr", "1e-9", "-p", "overfit_steps", 10)
    command = [sys.executable, "-m", "papermill", "notebooks/debug.ipynb", tmp_path / "out.ipynb", *where]
    environment = {**os.environ, "REFINELIB_SMOKE": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=project_root(), env=environment, timeout=200)
    assert done.returncode != 0 and "CheckError: 1 of 4 checks failed: one batch learned by heart" in done.stderr
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    failed = [cell.id for cell in cells if any(item.output_type == "error" for item in cell.get("outputs", []))]
    assert failed == [cells[-1].id] == ["verdict"]
    status = Run.open(tmp_path / "debug").status()
    assert status["state"] == "failed" and "nothing is learned" in status["last_error"] and status["epoch"] == 2
    assert {file.stem for file in (tmp_path / "debug" / "figures").iterdir()} == {"overfit", "parameter_gradients"}
