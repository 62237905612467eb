"""The loop: what it leaves, that it resumes exactly, that bad steps cost nothing."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import assert_same, final_weights

import refinelib.trainer as loop
from refinelib import build, checkpoints
from refinelib import step as stepping
from refinelib.config import SettingsError, resolve
from refinelib.data import DataError, Store
from refinelib.guard.rewind import DivergedError
from refinelib.locking import held
from refinelib.modeling.unet import HierarchicalUNet
from refinelib.plots import curves as plots
from refinelib.runs import Run, RunError, latest
from refinelib.step import WARM_UP, worth_compiling
from refinelib.trainer import train


def test_leaves_what_the_readme_promises(tiny):
    run = train(tiny(lr=3e-3, ema_decay=0))
    status = run.status()
    assert status["state"] == "ok" and status["epoch"] == 2 and status["skipped_steps"] == 0
    assert 0 <= status["metrics"]["target_iou"] <= 1 and status["best"]["target_iou"] >= status["metrics"]["target_iou"]
    names = {p.name for p in run.folder.iterdir()}
    assert {"config.json", "status.json", "metrics.jsonl", "checkpoints", "figures", "samples", "incidents", "tb"} <= names
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    epochs, steps = run.epochs(), run.steps()
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert set(steps[0]["losses"]) == {"ce", "dice", "active_contour", "boundary_aware", "contour", "distance"}
    assert steps[-1]["step"] == status["step"] == status["steps"]
    assert all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in steps)
    sample = np.load(run.folder / "samples" / "epoch_0002.npz")
    assert {"worst", "median", "best", "fixed"} == set(sample["kind"].tolist())
    assert sample["probs"].shape[1:] == (3, 32, 32)
    np.testing.assert_allclose(sample["probs"].astype(np.float32).sum(1), 1.0, atol=5e-3)
    worst, best = (sample["target_iou"][sample["kind"] == kind].mean() for kind in ("worst", "best"))
    assert worst <= best and worst <= sample["target_iou"].mean() <= best


def test_validated_now_and_then_it_is_the_same_run(tiny):
    often, seldom = train(tiny(epochs=5)), train(tiny(epochs=5, validate_every=2))
    assert_same(final_weights(often), final_weights(seldom))
    assert [bool(line["metrics"]) for line in seldom.epochs()] == [False, True, False, True, True]
    by_epoch = {line["epoch"]: line["metrics"] for line in often.epochs()}
    assert all(line["metrics"] == by_epoch[line["epoch"]] for line in seldom.validations())
    assert seldom.status()["best"]["epoch"] in (2, 4, 5) and seldom.status()["metrics"] == by_epoch[5]
    assert len(list((seldom.folder / "samples").iterdir())) == 3
    for draw in (plots.overview, plots.ious, plots.live):
        draw(seldom)
    (line, *_) = plots.ious(seldom).axes[0].get_lines()
    assert list(line.get_xdata()) == [2, 4, 5]


def test_the_loss_falls_and_the_mask_beats_the_untrained_one(tiny):
    run = train(tiny(epochs=8, lr=3e-3, warmup_epochs=1, ema_decay=0, augment="off"))
    losses = [e["train_loss"] for e in run.epochs()]
    assert losses[-1] < 0.85 * losses[0]


def test_same_seed_same_run_and_another_seed_another(tiny):
    first, again, other = train(tiny()), train(tiny()), train(tiny(seed=1))
    assert_same(final_weights(first), final_weights(again))
    assert any(not torch.equal(a, b) for a, b in zip(final_weights(first).values(), final_weights(other).values()))


def test_interrupted_and_resumed_equals_never_stopped(tiny, monkeypatch):
    whole = train(tiny(run="whole", epochs=3, augment="full"))
    real, calls = loop.Trainer.train_step, []

    def stop_at_seven(self, plan, at):
        calls.append(at)
        if len(calls) == 7:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, at)

    monkeypatch.setattr(loop.Trainer, "train_step", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(run="parts", epochs=3, augment="full"))
    monkeypatch.undo()
    status = Run.open(tiny(run="parts").path(tiny().output_dir) / "parts").status()
    assert status["state"] == "interrupted" and status["step"] == 7 and "resume" in status["last_error"]
    parts = train(tiny(run="parts", epochs=3, augment="full", resume=True))
    assert parts.name == "parts" and parts.status()["state"] == "ok"
    assert_same(final_weights(whole), final_weights(parts))
    assert [e["train_loss"] for e in whole.epochs()] == [e["train_loss"] for e in parts.epochs()]
    assert len({s["step"] for s in parts.steps()}) == len(parts.steps())  # no step is recorded twice


def test_killed_and_resumed_from_the_last_whole_checkpoint(tiny, tmp_path):
    settings = tiny(run="killed", epochs=6)
    whole = train(settings.model_copy(update={"run": "whole"}))
    code = "import json, sys; from refinelib.config import Settings; from refinelib.trainer import train; train(Settings(**json.loads(sys.argv[1])))"
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order
    process = subprocess.Popen([sys.executable, "-c", code, settings.model_dump_json()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    metrics, last = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed" / "checkpoints" / "last.pt"
    deadline = time.time() + 180
    while time.time() < deadline and not (last.exists() and metrics.exists() and metrics.read_text().count('"kind": "epoch"') >= 2):
        time.sleep(0.05)
    process.kill()
    process.wait()
    if Run(tmp_path / "killed").status()["state"] == "ok":
        pytest.skip("the run was over before it could be killed")
    (tmp_path / "killed" / "checkpoints" / "best.pt").write_bytes(b"cut short")
    run = train(settings.model_copy(update={"resume": True}))
    assert run.status()["state"] == "ok"
    assert_same(final_weights(whole), final_weights(run))
    assert any("best.pt" in e["message"] for e in run.events()) or any(e["kind"] == "resume" for e in run.events())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("loss:nan@4", ["the loss was not finite"]),
        ("loss:inf@4", ["the loss was not finite"]),
        ("grad:nan@4:boundary", ["the gradient was not finite", "1 of", "boundary."]),
        ("grad:inf@4:stem", ["the gradient was not finite", "1 of", "stem."]),
        ("activation:nan@4:contour.trunk", ["contour"]),
        ("activation:inf@4:person", ["not finite"]),
        ("input:nan@4", ["the loss was not finite", "ce"]),
    ],
)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_bad_step_is_skipped_counted_and_named(tiny, fault, words, amp):
    run = train(tiny(inject=fault, amp=amp, epochs=1))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 1
    event, incident = run.events()
    assert (event["kind"], incident["kind"]) == ("skip", "incident") and event["step"] == incident["step"] == 4
    assert all(word in event["message"] for word in words), event["message"]
    assert f"planted by inject: {fault}" in incident["message"] and incident["same_step"]
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


@pytest.mark.parametrize("fault", ["grad:overflow@4", "label:swap@4", "grad:spike@4"])
def test_a_finite_fault_is_no_reason_to_skip(tiny, fault):
    run = train(tiny(inject=fault, epochs=1))
    assert run.status()["skipped_steps"] == 0 and all(e["kind"] != "skip" for e in run.events())
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


def test_killed_by_injection(tiny, tmp_path):
    settings = tiny(run="killed", inject="kill@5", epochs=2)
    code = "import json, sys; from refinelib.config import Settings; from refinelib.trainer import train; train(Settings(**json.loads(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, settings.model_dump_json()], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert Run.open(tmp_path / "killed").status()["state"] == "running"  # it had no time to say otherwise


@pytest.mark.parametrize("text", ["grad@3", "grad:nan", "grad:nan@0", "loss:swap@3", "activation:nan@3", "weights:nan@3", "grad:nan@3:nowhere"])
def test_a_fault_that_cannot_be_read_is_refused(tiny, text):
    with pytest.raises((SettingsError, ValueError), match="inject"):
        train(tiny(inject=text))


def test_every_step_bad_never_writes_nan(tiny):
    with pytest.raises(DivergedError, match="none of 8 steps were applied"):
        train(tiny(amp="bf16", inject="loss:inf@1:always"))
    run = latest(tiny().output_dir)
    assert run.status()["skipped_steps"] == run.status()["steps"] and run.status()["state"] == "diverged"
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None


def test_accumulation_gives_the_same_step_as_a_larger_batch(tiny):
    """With losses that are means over samples, two halves make the whole."""
    whole = train(tiny(batch_size=4, epochs=1, grad_clip=1e6, ema_decay=0))
    halves = train(tiny(batch_size=2, accumulate=2, epochs=1, grad_clip=1e6, ema_decay=0))
    assert whole.status()["steps"] == halves.status()["steps"]
    assert whole.steps()[0]["loss"] == pytest.approx(halves.steps()[0]["loss"], rel=1e-4)
    assert whole.steps()[0]["grad_norm"] == pytest.approx(halves.steps()[0]["grad_norm"], rel=1e-3)


def test_starts_from_another_runs_weights(tiny):
    first = train(tiny("phase1", run="first", epochs=1, lr=1e-3))
    second = train(tiny("phase4", run="second", init_from=str(first.folder), epochs=1, lr=1e-12, min_lr=1e-12))
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


def test_a_failure_is_recorded_in_a_sentence(tiny, tmp_path):
    with pytest.raises(ValueError):
        train(tiny(data="coco", data_dir=str(tmp_path / "nowhere"), store_dir=str(tmp_path / "none"), run="bad"))
    status = Run.open(tmp_path / "bad").status()
    assert status["state"] == "failed" and "nowhere" in status["last_error"]


def test_stable_starts_between_1_5_and_2(tiny):
    for seed in range(3):
        run = train(tiny("stable", epochs=1, seed=seed, batch_size=2, max_images=4))
        assert 1.5 < run.steps()[0]["loss"] < 2.0


@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_other_shapes_contexts_and_the_subpixel_decoder(tiny, size):
    run = train(tiny(epochs=1, roi_size=size, mask_size=size, context=0.5, use_subpixel_conv=True, use_progressive_upsampling=False))
    assert run.status()["state"] == "ok"


def test_fp16_on_the_cpu_trains(tiny):
    run = train(tiny(epochs=1, amp="fp16", max_images=3))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] <= 2
    assert run.steps()[0]["loss_scale"] > 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_deterministic_on_cuda_is_bitwise_and_resumes_exactly(tiny, amp, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    common = dict(device="cuda", deterministic=True, amp=amp, epochs=3, augment="full")
    first, again = train(tiny(run="first", **common)), train(tiny(run="again", **common))
    assert_same(final_weights(first), final_weights(again))
    real, calls = loop.Trainer.train_step, []

    def stop_at_seven(self, plan, at):
        calls.append(at)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, at)

    monkeypatch.setattr(loop.Trainer, "train_step", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(run="parts", **common))
    monkeypatch.setattr(loop.Trainer, "train_step", real)
    assert_same(final_weights(first), final_weights(train(tiny(run="parts", resume=True, **common))))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fault", ["grad:nan@4:boundary", "loss:inf@4", "activation:nan@4:contour.trunk"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_bad_step_on_cuda_is_skipped_and_named(tiny, fault, amp):
    run = train(tiny(device="cuda", inject=fault, amp=amp, epochs=1))
    assert run.status()["skipped_steps"] >= 1 and any(e["step"] == 4 and e["kind"] == "skip" for e in run.events())
    assert all(torch.isfinite(w).all() for w in final_weights(run).values())


def test_public_names_stay_functions_after_first_use():
    import refinelib

    for name in ("train", "evaluate", "load", "resolve"):
        assert callable(getattr(refinelib, name)) and callable(getattr(refinelib, name)), name


def test_resume_refuses_other_settings_and_leaves_the_run_as_it_was(tiny):
    train(tiny(run="mine", epochs=2))
    with pytest.raises(checkpoints.CheckpointError, match="lr was .*, is .*optimizer was adamw, is adam|optimizer.*lr"):
        train(tiny(run="mine", epochs=3, lr=1e-4, optimizer="adam", resume=True))
    assert Run.open(tiny().path(tiny().output_dir) / "mine").status()["state"] == "ok"
    longer = train(tiny(run="mine", epochs=3, resume=True))
    assert longer.status()["state"] == "ok" and [e["epoch"] for e in longer.epochs()] == [1, 2, 3]


def test_interrupted_at_the_end_of_an_epoch_the_epoch_is_not_lost(tiny, monkeypatch):
    whole = train(tiny(run="whole", epochs=2))
    per_epoch = whole.status()["steps"] // 2
    real, calls = loop.Trainer.train_step, []

    def stop_at_the_end(self, plan, at):
        calls.append(at)
        if len(calls) == per_epoch:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, at)

    monkeypatch.setattr(loop.Trainer, "train_step", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(run="parts", epochs=2))
    monkeypatch.undo()
    parts = train(tiny(run="parts", epochs=2, resume=True))
    assert_same(final_weights(whole), final_weights(parts))
    assert [e["metrics"] for e in whole.epochs()] == [e["metrics"] for e in parts.epochs()]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_training_step_on_cuda_reads_nothing_back(tiny, amp, monkeypatch):
    real, calls = loop.Trainer.train_step, []

    def watched(self, plan, at):
        calls.append(at)
        if len(calls) <= 3:  # kernels are chosen and memory is found in the first steps
            return real(self, plan, at)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, plan, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Trainer, "train_step", watched)
    run = train(tiny(device="cuda", amp=amp, epochs=2, augment="full", ema_decay=0.9))
    assert run.status()["state"] == "ok" and len(calls) > 4


#: As PyTorch's memory says it, and as CUDA's libraries do.
FULL = [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


@pytest.mark.parametrize("error", FULL, ids=["PyTorch", "cuBLAS"])
def test_a_batch_that_does_not_fit_is_taken_in_pieces_with_the_same_result(tiny, error, monkeypatch):
    whole = train(tiny(run="whole", batch_size=6, epochs=1, grad_clip=1e6, ema_decay=0))
    real = loop.Stepper.eager

    def small_memory(self, images, labels):
        if len(labels) > 2:
            raise error
        return real(self, images, labels)

    monkeypatch.setattr(loop.Stepper, "eager", small_memory)
    pieces = train(tiny(run="pieces", batch_size=6, epochs=1, grad_clip=1e6, ema_decay=0))
    for a, b in zip(whole.steps(), pieces.steps()):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    told = [event["message"] for event in pieces.events() if event["kind"] == "speed"]
    assert len(told) == 2 and "taken in 4 pieces" in told[-1]


def test_an_update_is_never_taken_twice(tiny, monkeypatch):
    """Where memory ends in the middle of the optimizer's step, part of the weights have moved already."""
    calls = []

    def full(guard, loss):
        calls.append(loss)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(build.Guard, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny(run="once", batch_size=4))
    assert len(calls) == 1


def test_another_error_is_no_lack_of_memory(tiny, monkeypatch):
    calls = []

    def broken(self, images, labels):
        calls.append(len(labels))
        raise RuntimeError("expected 3 channels")

    monkeypatch.setattr(loop.Stepper, "eager", broken)
    with pytest.raises(RuntimeError, match="expected 3 channels"):
        train(tiny(batch_size=4))
    assert calls == [4]


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


@pytest.mark.parametrize("error", FULL, ids=["PyTorch", "cuBLAS"])
def test_pieces_are_warmed_up_before_they_are_recorded(tiny, error, monkeypatch):
    """There was memory for the step, and not for the step and its graph; a graph that is being recorded may not compile anything."""
    settings = tiny(batch_size=4, epochs=9)
    trainer = loop.Trainer(settings, Run.start(settings))
    stepper, recorded = trainer.stepper, []

    @contextlib.contextmanager
    def recording(graph):
        recorded.append((stepper.taken, stepper.pieces))
        if len(recorded) == 1:
            raise error
        yield

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    stepper.captures = True
    plan, number = trainer.loader.plan(0), 0
    while stepper.graph is None:
        number += 1
        stepper.step(plan, 0, number)
    assert recorded == [(WARM_UP, 1), (WARM_UP, 2)] and number == 2 * WARM_UP


def test_what_cannot_be_compiled_trains_all_the_same(tiny, monkeypatch):
    def no_compiler(function, **_):
        def fail(*arguments):
            raise RuntimeError("no C compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = train(tiny(run="plain", compile="on", epochs=1))
    assert run.status()["state"] == "ok" and "no C compiler here" in run.events()[0]["message"]


@pytest.mark.parametrize("amp", ["auto", "bf16"])
def test_model_and_loss_compile_as_one_graph(tiny, amp, monkeypatch):
    """A break in it is no error, only slow: nothing else would tell. Asking a GPU what it can do is one."""

    def asked(settings, device):
        if settings.amp == "auto":
            torch._dynamo.graph_break()
        return "bf16"

    monkeypatch.setattr(build, "precision", asked)
    settings = tiny(amp=amp, epochs=1)
    trainer = loop.Trainer(settings, Run.start(settings))
    batch = trainer.loader.batch(trainer.loader.plan(0), 0)
    found = torch._dynamo.explain(trainer.stepper.eager)(batch.images, batch.labels)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


def test_auto_is_what_the_device_has_and_stays_auto_in_the_records(tiny):
    run = train(tiny(amp="auto", epochs=1))
    assert run.settings().amp == "auto" and build.precision(tiny(amp="auto"), torch.device("cpu")) == "off"
    assert_same(final_weights(run), final_weights(train(tiny(amp="off", epochs=1))))


@pytest.mark.parametrize("recipe, steps, worth", [("original", 400, False), ("original", 33_300, True), ("best", 1_200, False), ("best", 1_400, True)])
def test_only_a_run_that_gains_by_it_is_compiled(recipe, steps, worth):
    """Two minutes of compiling pay after 17,000 steps of two ROIs, or after 1,300 of the recipe best."""
    assert worth_compiling(resolve(recipe, device="cpu"), steps) is worth


@pytest.mark.parametrize(
    "release, recipe, changes, options",
    [
        ("2.11.0+cu130", "original", dict(batch_size=2), stepping.FEWER_KERNELS),
        ("2.11.0+cu130", "original", dict(batch_size=16), stepping.LESS_TRAFFIC),
        ("2.11.0+cu130", "best", {}, stepping.LESS_TRAFFIC),
        ("2.6.0", "original", dict(batch_size=2), None),
        ("2.6.0", "original", dict(batch_size=64), stepping.LESS_TRAFFIC),
    ],
)
def test_small_batches_have_fewer_kernels_and_large_ones_less_traffic(release, recipe, changes, options, monkeypatch):
    monkeypatch.setattr(torch, "__version__", release)
    settings = resolve(recipe, device="cpu", **changes)
    assert stepping.compiler_options(settings, torch.device("cuda")) == options
    assert stepping.compiler_options(settings, torch.device("cpu")) is None  # all of it was measured on GPUs


@pytest.mark.parametrize("options", [stepping.FEWER_KERNELS, stepping.LESS_TRAFFIC], ids=["fewer kernels", "less traffic"])
def test_the_compiler_knows_these_options(options):
    x = torch.arange(6.0)
    torch.testing.assert_close(torch.compile(lambda x: x.sin().sum() + x.square(), options=options)(x), x.sin().sum() + x.square())


def test_an_option_that_the_compiler_does_not_know_is_not_given(monkeypatch):
    monkeypatch.setattr(stepping, "LESS_TRAFFIC", {**stepping.LESS_TRAFFIC, "no_such_option": 3})
    given = stepping.compiler_options(resolve("best", device="cpu"), torch.device("cuda"))
    assert given and "no_such_option" not in given


def test_a_run_is_trained_by_one_process_at_a_time(tiny):
    run = train(tiny(run="mine", epochs=1))
    told = run.status()
    with held(run.folder / ".lock"), pytest.raises(RunError, match="being trained by another process"):
        train(tiny(run="mine", epochs=2, resume=True))
    assert run.status() == told
    assert train(tiny(run="mine", epochs=2, resume=True)).status()["epoch"] == 2


def test_a_resume_that_finds_no_data_leaves_a_finished_run_finished(tiny, monkeypatch):
    run = train(tiny(run="mine", epochs=1))
    told = run.status()

    def nowhere(settings):
        raise DataError("there is no data folder")

    monkeypatch.setattr(loop, "open_splits", nowhere)
    with pytest.raises(DataError):
        train(tiny(run="mine", epochs=2, resume=True))
    assert {**run.status(), "updated": None} == {**told, "updated": None}
    with pytest.raises(DataError):
        train(tiny(run="fresh", epochs=2))
    assert Run.open(run.folder.parent / "fresh").status()["state"] == "failed"


def test_a_run_goes_on_with_the_people_it_was_started_with(tiny, monkeypatch):
    train(tiny(run="mine", epochs=1))
    monkeypatch.setattr(Store, "identity", "others")
    with pytest.raises(checkpoints.CheckpointError, match="other people"):
        train(tiny(run="mine", epochs=2, resume=True))
