"""The loop: what it leaves, that it resumes exactly, that bad steps cost nothing."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import assert_same, final_weights

import refinelib.trainer as loop
from refinelib import checkpoints, state
from refinelib.config import SettingsError
from refinelib.data import DataError, Store
from refinelib.guard.rewind import DivergedError
from refinelib.modeling.unet import HierarchicalUNet
from refinelib.plots import curves as plots
from refinelib.runs import Run, RunError, latest
from refinelib.trainer import train
from refinelib.workflows.compare import state_of

CODE = """import json, sys
from refinelib.config import Settings
from refinelib.trainer import train
train(Settings(**json.loads(sys.argv[1])))"""
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def train_interrupted(settings, monkeypatch, at):
    """Interrupts a run in its step ``at``; gives its folder."""
    real, calls = loop.Trainer.train_step, []

    def stop(self, plan, place):
        calls.append(place)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "train_step", stop)
        train(settings)
    return Run.open(settings.path(settings.output_dir) / settings.run_name)


#: As PyTorch's memory says it, and as CUDA's libraries do.
FULL = [
    torch.OutOfMemoryError("out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def test_leaves_what_the_readme_promises(tiny):
    run = train(tiny(lr=3e-3, ema_decay=0))
    status = run.status()
    assert status["state"] == "ok" and status["epoch"] == 2 and status["skipped_steps"] == 0
    assert (
        0 <= status["metrics"]["target_iou"] <= 1
        and status["best"]["target_iou"] >= status["metrics"]["target_iou"]
    )
    names = {p.name for p in run.folder.iterdir()}
    assert {
        "config.json",
        "status.json",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "samples",
        "incidents",
        "tb",
    } <= names
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    epochs, steps = run.epochs(), run.steps()
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert set(steps[0]["losses"]) == {
        "ce",
        "dice",
        "active_contour",
        "boundary_aware",
        "contour",
        "distance",
    }
    assert steps[-1]["step"] == status["step"] == status["steps"]
    assert all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in steps)
    sample = np.load(run.folder / "samples" / "epoch_0002.npz")
    assert {"worst", "median", "best", "fixed"} == set(sample["kind"].tolist())
    assert sample["probs"].shape[1:] == (3, 32, 32)
    np.testing.assert_allclose(sample["probs"].astype(np.float32).sum(1), 1.0, atol=5e-3)
    worst, best = (sample["target_iou"][sample["kind"] == kind].mean() for kind in ("worst", "best"))
    assert worst <= best and worst <= sample["target_iou"].mean() <= best


@pytest.mark.usefixtures("shallow_here")
def test_validated_now_and_then_it_is_the_same_run(tiny):
    often, seldom = train(tiny(epochs=5)), train(tiny(epochs=5, validate_every=2))
    assert_same(final_weights(often), final_weights(seldom))
    assert [bool(line["metrics"]) for line in seldom.epochs()] == [False, True, False, True, True]
    by_epoch = {line["epoch"]: line["metrics"] for line in often.epochs()}
    assert all(line["metrics"] == by_epoch[line["epoch"]] for line in seldom.validations())
    assert seldom.status()["best"]["epoch"] in (2, 4, 5) and seldom.status()["metrics"] == by_epoch[5]
    assert len(list((seldom.folder / "samples").iterdir())) == 3
    plots.curves(seldom)
    (line, *_) = plots.curves(seldom, "scores").axes[0].get_lines()
    assert list(line.get_xdata()) == [2, 4, 5]


def test_the_loss_falls_and_the_mask_beats_the_untrained_one(tiny):
    run = train(tiny(epochs=8, lr=3e-3, warmup_epochs=1, ema_decay=0, augment="off"))
    losses = [e["train_loss"] for e in run.epochs()]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.usefixtures("shallow_here")
def test_same_seed_same_run_and_another_seed_another(tiny):
    first, again, other = train(tiny()), train(tiny()), train(tiny(seed=1))
    assert_same(final_weights(first), final_weights(again))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(*(final_weights(run).values() for run in (first, other)), strict=True)
    )


@pytest.mark.usefixtures("shallow_here")
def test_interrupted_and_resumed_equals_never_stopped(tiny, monkeypatch):
    """In the middle of an epoch, and at its end."""
    whole = train(tiny(run="whole", epochs=3, augment="full"))
    for at in (7, whole.status()["steps"] // 3):
        settings = tiny(run=f"parts-at-{at}", epochs=3, augment="full")
        status = train_interrupted(settings, monkeypatch, at).status()
        assert status["state"] == "interrupted" and status["step"] == at and "resume" in status["last_error"]
        parts = train(settings.model_copy(update={"resume": True}))
        assert parts.status()["state"] == "ok"
        assert_same(final_weights(whole), final_weights(parts))
        for name in ("train_loss", "metrics"):
            assert [e[name] for e in whole.epochs()] == [e[name] for e in parts.epochs()]
        assert len({s["step"] for s in parts.steps()}) == len(parts.steps())  # no step is recorded twice


def test_killed_and_resumed_from_the_last_whole_checkpoint(tiny, tmp_path):
    settings = tiny(run="killed", epochs=4)
    whole = train(settings.model_copy(update={"run": "whole"}))
    per_epoch = whole.status()["steps"] // 4
    killed = settings.model_copy(update={"inject": f"kill@{2 * per_epoch + 2}"})
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order
    subprocess.run([sys.executable, "-c", CODE, killed.model_dump_json()], capture_output=True, env=threads)
    (tmp_path / "killed" / "checkpoints" / "best.pt").write_bytes(b"cut short")
    assert Run(tmp_path / "killed").status()["last_error"].endswith("-p resume true goes on")
    run = train(settings.model_copy(update={"resume": True}))
    assert run.status()["state"] == "ok" and any(e["kind"] == "resume" for e in run.events())
    assert_same(final_weights(whole), final_weights(run))


@pytest.mark.usefixtures("shallow_here")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("loss:nan@3", ["the loss was not finite"]),
        ("loss:inf@3", ["the loss was not finite"]),
        ("grad:nan@3:boundary", ["the gradient was not finite", "1 of", "boundary."]),
        ("grad:inf@3:stem", ["the gradient was not finite", "1 of", "stem."]),
        ("activation:nan@3:contour.trunk", ["contour"]),
        ("activation:inf@3:person", ["not finite"]),
        ("input:nan@3", ["the loss was not finite", "ce"]),
    ],
)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_bad_step_is_skipped_counted_and_named(tiny, fault, words, amp):
    run = train(tiny(inject=fault, amp=amp, epochs=1))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 1
    event, incident = run.events()
    assert (event["kind"], incident["kind"]) == ("skip", "incident") and event["step"] == incident[
        "step"
    ] == 3
    assert all(word in event["message"] for word in words), event["message"]
    assert f"planted by inject: {fault}" in incident["message"] and incident["same_step"]
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


@pytest.mark.usefixtures("shallow_here")
@pytest.mark.parametrize("fault", ["grad:overflow@3", "label:swap@3", "grad:spike@3"])
def test_a_finite_fault_is_no_reason_to_skip(tiny, fault):
    run = train(tiny(inject=fault, epochs=1))
    assert run.status()["skipped_steps"] == 0 and all(e["kind"] != "skip" for e in run.events())
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


@pytest.mark.slow
def test_killed_by_injection(tiny, tmp_path):
    settings = tiny(run="killed", inject="kill@5", epochs=2)
    done = subprocess.run([sys.executable, "-c", CODE, settings.model_dump_json()], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    status = Run.open(tmp_path / "killed").status()  # it had no time to say so
    assert status["state"] == "killed" and status["last_error"].startswith(
        "stopped after epoch 1 of 2, step 4 of 8"
    )


@pytest.mark.usefixtures("shallow_here")
@pytest.mark.parametrize(
    "text",
    [
        "grad@3",
        "grad:nan",
        "grad:nan@0",
        "loss:swap@3",
        "activation:nan@3",
        "weights:nan@3",
        "grad:nan@3:nowhere",
    ],
)
def test_a_fault_that_cannot_be_read_is_refused(tiny, text):
    with pytest.raises((SettingsError, ValueError), match="inject"):
        train(tiny(inject=text))


@pytest.mark.usefixtures("shallow_here")
def test_a_last_epoch_without_a_finite_loss_is_no_success_anywhere(tiny):
    steps = train(tiny(run="healthy", epochs=1)).status()["steps"]
    with pytest.raises(DivergedError, match="were skipped, all those of the last epoch among them"):
        train(tiny(run="lost", epochs=3, inject=f"loss:nan@{2 * steps + 1}:always"))
    run = latest(tiny().output_dir)
    assert run.status()["state"] == state_of(run) == "diverged" and run.status()["skipped_steps"] == steps
    assert train(tiny(run="healthy", epochs=1, resume=True)).status()["state"] == "ok"  # no step was left


@pytest.mark.usefixtures("shallow_here")
def test_every_step_bad_never_writes_nan(tiny):
    with pytest.raises(DivergedError, match=r"none of \d+ steps were applied"):
        train(tiny(amp="bf16", inject="loss:inf@1:always"))
    run = latest(tiny().output_dir)
    assert run.status()["skipped_steps"] == run.status()["steps"] and run.status()["state"] == "diverged"
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_name_to_the_next_one(tiny, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="no run 'outputs/phase1'"):
        train(tiny("phase2", init_from="outputs/phase1"))
    assert not (tmp_path / "phase2").exists()
    with pytest.raises(DataError):
        train(tiny("phase2", data="coco", data_dir=str(tmp_path)))
    assert Run(tmp_path / "phase2").status()["state"] == "failed"
    assert train(tiny("phase2", epochs=1)).name == train(tiny("phase1", epochs=1)).name.replace("1", "2")
    assert not (tmp_path / "phase2-2").exists() and not [*tmp_path.glob(".*.failed*")]


def test_a_planted_fault_that_never_comes_is_told_at_the_start(tiny, capsys):
    run = train(tiny(epochs=1, inject="grad:nan@99999; loss:nan@1; file:missing@99; input:nan@1%"))
    sentence = "the planted fault grad:nan@99999 never comes: the run has 4 steps"
    first, *others = run.events()
    assert (first["kind"], first["step"]) == ("inject", 0) and first["message"] == sentence
    out = capsys.readouterr().out
    assert sentence in out and "planted fault beyond the last image" in out
    assert "inject" not in [event["kind"] for event in others]


def test_starts_from_another_runs_weights(tiny):
    first = train(tiny("phase1", run="first", epochs=1, ema_decay=0.0, lr=1e-3))
    second = train(
        tiny(
            "phase4",
            run="second",
            init_from=str(first.folder),
            epochs=1,
            ema_decay=0.0,
            lr=1e-12,
            min_lr=1e-12,
        )
    )
    weights, before = final_weights(second), final_weights(first)
    for name, value in before.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    assert any(name.startswith("distance.") for name in weights.keys() - before.keys())
    with pytest.raises(checkpoints.CheckpointError, match="width"):
        train(tiny("phase2", init_from=str(first.folder), width=0.125))
    deep = train(tiny("phase2", run="deep", epochs=1, coarse_depth=2))
    for depth in (1, 3):  # blocks that are trained and left out are as wrong as blocks that are not
        with pytest.raises(checkpoints.CheckpointError, match="width 0.0625, coarse_width 1, coarse_depth 2"):
            train(tiny("phase2", init_from=str(deep.folder), epochs=1, coarse_depth=depth))
    with pytest.raises(checkpoints.CheckpointError, match="no run"):
        train(tiny("finetune", init_from="no-such-run"))


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_is_noticed_at_once(tiny):
    """There is no warm-up either. The first steps explode, and lower rates save the run or end it."""
    settings = tiny(
        epochs=10,
        batch_size=3,
        seed=1,
        lr=1.0,
        min_lr=1.0,
        warmup_epochs=0,
        amp="off",
        validate_every=40,
        save_every=40,
        probe_every=0,
    )
    with contextlib.suppress(DivergedError):
        train(settings)
    run = Run.open(settings.run_name, output_dir=settings.output_dir)
    assert min(event["step"] for event in run.events() if event["kind"] == "rewind") <= 32


def test_a_failure_is_recorded_in_a_sentence(tiny, tmp_path):
    with pytest.raises(ValueError):
        train(
            tiny(data="coco", data_dir=str(tmp_path / "nowhere"), store_dir=str(tmp_path / "none"), run="bad")
        )
    status = Run.open(tmp_path / "bad").status()
    assert status["state"] == "failed" and "nowhere" in status["last_error"]


@pytest.mark.slow
def test_stable_starts_between_1_5_and_2(tiny):
    for seed in range(3):
        run = train(tiny("stable", epochs=1, seed=seed, batch_size=2, max_images=4))
        assert 1.5 < run.steps()[0]["loss"] < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_other_shapes_contexts_and_the_subpixel_decoder(tiny, size):
    run = train(
        tiny(
            epochs=1,
            roi_size=size,
            mask_size=size,
            context=0.5,
            use_subpixel_conv=True,
            use_progressive_upsampling=False,
        )
    )
    assert run.status()["state"] == "ok"


@pytest.mark.usefixtures("half_here")
def test_fp16_on_the_cpu_trains(tiny):
    run = train(tiny(epochs=1, amp="fp16", max_images=3))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] <= 2
    assert run.steps()[0]["loss_scale"] > 1


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_deterministic_on_cuda_is_bitwise_and_resumes_exactly(tiny, amp, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    common = {"device": "cuda", "deterministic": True, "amp": amp, "epochs": 3, "augment": "full"}
    first, again = train(tiny(run="first", **common)), train(tiny(run="again", **common))
    assert_same(final_weights(first), final_weights(again))
    train_interrupted(tiny(run="parts", **common), monkeypatch, 7)
    assert_same(final_weights(first), final_weights(train(tiny(run="parts", resume=True, **common))))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("fault", ["grad:nan@3:boundary", "loss:inf@3", "activation:nan@3:contour.trunk"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_bad_step_on_cuda_is_skipped_and_named(tiny, fault, amp):
    run = train(tiny(device="cuda", inject=fault, amp=amp, epochs=1))
    assert run.status()["skipped_steps"] >= 1 and any(
        e["step"] == 3 and e["kind"] == "skip" for e in run.events()
    )
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


def test_public_names_stay_functions_after_first_use():
    import refinelib

    for name in ("train", "evaluate", "load", "resolve"):
        assert callable(getattr(refinelib, name)) and callable(getattr(refinelib, name)), name


def test_resume_refuses_other_settings_and_leaves_the_run_as_it_was(tiny, capsys):
    train(tiny(run="mine", epochs=2))
    with pytest.raises(
        checkpoints.CheckpointError, match="lr was .*, is .*optimizer was adamw, is adam|optimizer.*lr"
    ):
        train(tiny(run="mine", epochs=3, lr=1e-4, optimizer="adam", resume=True))
    assert Run.open(tiny().path(tiny().output_dir) / "mine").status()["state"] == "ok"
    longer = train(tiny(run="mine", epochs=3, resume=True))
    assert longer.status()["state"] == "ok" and [e["epoch"] for e in longer.epochs()] == [1, 2, 3]
    assert "; it ends after 3 epochs, and was to end after 2\n" in capsys.readouterr().out


@pytest.mark.usefixtures("shallow_here")
@pytest.mark.parametrize("error", FULL, ids=["PyTorch", "cuBLAS"])
def test_memory_that_others_took_meanwhile_is_no_end_of_validation(tiny, error, monkeypatch):
    whole = train(tiny(run="whole", epochs=1, ema_decay=0.9, flip_test=True))
    real, most, taken = HierarchicalUNet.forward, 3, []

    def small_memory(model, images, **given):
        if not model.training:
            taken.append(len(images))
            if len(images) > most:
                raise error
        return real(model, images, **given)

    monkeypatch.setattr(HierarchicalUNet, "forward", small_memory)
    pieces = train(tiny(run="pieces", epochs=1, ema_decay=0.9, flip_test=True))
    assert max(taken) > most and pieces.epochs()[-1]["metrics"] == whole.epochs()[-1]["metrics"]
    most = 0  # not one crop by itself
    with pytest.raises(type(error)):
        train(tiny(run="none", epochs=1, ema_decay=0.9))


@pytest.mark.usefixtures("shallow_here")
def test_a_run_is_trained_by_one_process_at_a_time(tiny):
    run = train(tiny(run="mine", epochs=1))
    told = run.status()
    with run.exclusive(), pytest.raises(RunError, match="being trained by another process"):
        train(tiny(run="mine", epochs=2, resume=True))
    assert run.status() == told
    assert train(tiny(run="mine", epochs=2, resume=True)).status()["epoch"] == 2


@pytest.mark.usefixtures("shallow_here")
def test_a_resume_that_finds_no_data_leaves_a_finished_run_finished(tiny, monkeypatch):
    run = train(tiny(run="mine", epochs=1))
    told = run.status()

    def nowhere(settings, **_):
        raise DataError("there is no data folder")

    monkeypatch.setattr(state, "open_splits", nowhere)
    with pytest.raises(DataError):
        train(tiny(run="mine", epochs=2, resume=True))
    assert {**run.status(), "updated": None} == {**told, "updated": None}
    with pytest.raises(DataError):
        train(tiny(run="fresh", epochs=2))
    assert Run.open(run.folder.parent / "fresh").status()["state"] == "failed"


@pytest.mark.usefixtures("shallow_here")
def test_a_run_goes_on_with_the_people_it_was_started_with(tiny, monkeypatch):
    train(tiny(run="mine", epochs=1))
    monkeypatch.setattr(Store, "identity", "others")
    with pytest.raises(checkpoints.CheckpointError, match="other people"):
        train(tiny(run="mine", epochs=2, resume=True))
