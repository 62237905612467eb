"""One step: chunks where memory is short, CUDA graphs, compilation and its cache."""

import contextlib
import shutil

import pytest
import torch
from helpers import assert_same, final_weights

import refinelib.trainer as loop
from refinelib import build, step
from refinelib.config import resolve
from refinelib.data.splits import open_split
from refinelib.modeling import layers
from refinelib.runs import Run
from refinelib.step import WARM_UP, Stepper
from refinelib.trainer import train

pytestmark = pytest.mark.usefixtures("shallow")

#: As PyTorch's memory says it, and as CUDA's libraries do.
FULL = [
    torch.OutOfMemoryError("out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Compiled code of a test stays in it."""
    monkeypatch.setenv(step.CACHE_VARIABLE, str(tmp_path / "compiled"))


def assert_same_first_step(a, b):
    assert a.steps()[0]["loss"] == pytest.approx(b.steps()[0]["loss"], rel=1e-4)
    assert a.steps()[0]["grad_norm"] == pytest.approx(b.steps()[0]["grad_norm"], rel=1e-3)


def test_accumulation_gives_the_same_step_as_a_larger_batch(tiny):
    """With losses that are means over samples, two halves make the whole."""
    whole = train(tiny(batch_size=4, epochs=1, grad_clip=1e6, ema_decay=0))
    halves = train(tiny(batch_size=2, accumulate=2, epochs=1, grad_clip=1e6, ema_decay=0))
    assert whole.status()["steps"] == halves.status()["steps"]
    assert_same_first_step(whole, halves)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_training_step_on_cuda_reads_nothing_back(tiny, amp, monkeypatch):
    real, calls = loop.Trainer.train_step, []

    def watched(self, plan, at):
        calls.append(at)
        if len(calls) <= 3:  # libraries choose kernels and find memory in the first steps
            return real(self, plan, at)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, plan, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Trainer, "train_step", watched)
    run = train(tiny(device="cuda", amp=amp, epochs=2, augment="full", ema_decay=0.9))
    assert run.status()["state"] == "ok" and len(calls) > 4


@pytest.mark.parametrize(
    "amp, compiled",
    [("off", "off")]
    + [
        pytest.param(*way, marks=pytest.mark.cuda)
        for way in (("bf16", "off"), ("fp16", "off"), ("bf16", "on"))
    ],
)
def test_training_with_ignored_pixels(coco_files, tiny, amp, compiled):
    """On a CUDA device the step is captured as a graph, compiled or not, and takes the CPU's step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if amp != "off" and device == "cpu":
        pytest.skip("needs a CUDA device")
    for _ in range(6):
        image = coco_files.image((64, 64))
        coco_files.person(image, (4, 4, 28, 60))
        coco_files.person(image, (24, 0, 64, 64), iscrowd=1)
    coco_files.source()
    (coco_files.annotations.parent / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        shutil.copy(
            coco_files.annotations, coco_files.annotations.parent / f"annotations/instances_{split}.json"
        )
        shutil.copytree(coco_files.images, coco_files.images.parent / split)
    common = dict(data="coco", data_dir=str(coco_files.images.parent), context=0.5, epochs=4, log_every=1)
    run = train(tiny(**common, device=device, amp=amp, compile=compiled, augment="full", ema_decay=0.9))
    on_cpu = train(tiny(**common, augment="full", ema_decay=0.9))
    assert open_split(run.settings(), "train").ignores and run.status()["state"] == "ok"
    assert run.steps()[0]["loss"] == pytest.approx(
        on_cpu.steps()[0]["loss"], rel=1e-5 if amp == "off" else 0.05
    )
    assert not any(line["skipped"] for line in run.epochs())
    if device == "cuda":
        assert not [event for event in run.events() if "could not" in event["message"]]


# -- memory ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", FULL, ids=["PyTorch", "cuBLAS"])
def test_a_batch_that_does_not_fit_is_split_with_the_same_result(tiny, error, monkeypatch):
    settings = tiny(batch_size=6, epochs=1, grad_clip=1e6, ema_decay=0)
    whole = train(settings)
    real = Stepper.eager

    def small_memory(self, images, labels):
        if len(labels) > 2:
            raise error
        return real(self, images, labels)

    monkeypatch.setattr(Stepper, "eager", small_memory)
    split = train(settings)
    assert_same_first_step(whole, split)
    messages = [event["message"] for event in split.events() if event["kind"] == "speed"]
    assert len(messages) == 2 and "split into 4 chunks" in messages[-1]


def test_an_update_is_never_taken_twice(tiny, monkeypatch):
    """Where memory ends in the middle of the optimizer's step, part of the weights have moved already."""
    calls = []

    def full(guard, loss):
        calls.append(loss)
        raise FULL[0]

    monkeypatch.setattr(build.Guard, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny(batch_size=4))
    assert len(calls) == 1


def test_another_error_is_no_lack_of_memory(tiny, monkeypatch):
    calls = []

    def broken(self, images, labels):
        calls.append(len(labels))
        raise RuntimeError("expected 3 channels")

    monkeypatch.setattr(Stepper, "eager", broken)
    with pytest.raises(RuntimeError, match="expected 3 channels"):
        train(tiny(batch_size=4))
    assert calls == [4]


@pytest.mark.parametrize("error", FULL, ids=["PyTorch", "cuBLAS"])
def test_chunks_take_plain_steps_before_they_are_captured(tiny, error, monkeypatch):
    """Memory held the step, but not the step and its graph; nothing may compile during a capture."""
    settings = tiny(batch_size=4, epochs=9)
    trainer = loop.Trainer(settings, Run.start(settings))
    stepper, recorded = trainer.stepper, []

    @contextlib.contextmanager
    def recording(graph):
        recorded.append((stepper.taken, stepper.chunks))
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


# -- compilation -------------------------------------------------------------------------------------
def test_what_cannot_be_compiled_trains_uncompiled(tiny, monkeypatch):
    def no_compiler(function, **_):
        def fail(*arguments):
            raise RuntimeError("no C compiler here")

        return fail

    plain = train(tiny(epochs=1))
    monkeypatch.setattr(torch, "compile", no_compiler)
    run = train(tiny(compile="on", epochs=1))
    assert "no C compiler here" in run.events()[1]["message"]
    assert_same(final_weights(plain), final_weights(run))


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["auto", "bf16"])
def test_model_and_loss_compile_as_one_graph(tiny, amp, monkeypatch):
    """A graph break is only slow: no error tells of it. Asking a GPU what it can do is one."""

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


@pytest.mark.parametrize(
    "recipe, steps, pays",
    [("original", 400, False), ("original", 33_300, True), ("best", 1_200, False), ("best", 1_400, True)],
)
def test_auto_compiles_on_a_gpu_where_a_run_gains_by_it(tiny, recipe, steps, pays, monkeypatch):
    assert step.worth_compiling(resolve(recipe, device="cpu"), steps) is pays
    settings = tiny(compile="auto")
    trainer = loop.Trainer(settings, Run.start(settings))
    monkeypatch.setattr(step, "worth_compiling", lambda *_: pays)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = {
        kind: Stepper(settings, trainer.parts, device=torch.device(kind), steps=steps).compiled
        for kind in ("cpu", "cuda")
    }
    assert compiled == {"cpu": False, "cuda": pays}


@pytest.mark.parametrize(
    "release, recipe, batch, options",
    [
        ("2.11.0+cu130", "original", 2, step.FEWER_KERNELS),
        ("2.11.0+cu130", "original", 16, step.LESS_TRAFFIC),
        ("2.11.0+cu130", "best", 32, step.LESS_TRAFFIC),
        ("2.6.0", "original", 2, None),
        ("2.6.0", "original", 64, step.LESS_TRAFFIC),
    ],
)
def test_small_batches_have_fewer_kernels_and_large_ones_less_traffic(
    release, recipe, batch, options, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", release)
    settings = resolve(recipe, device="cpu", batch_size=batch)
    assert step.compiler_options(settings, torch.device("cuda")) == options
    assert step.compiler_options(settings, torch.device("cpu")) is None  # all was measured on GPUs


@pytest.mark.slow
@pytest.mark.parametrize("options", [step.FEWER_KERNELS, step.LESS_TRAFFIC], ids=["kernels", "traffic"])
def test_the_compiler_knows_these_options(options):
    def function(x):
        return x.sin().sum() + x.square()

    x = torch.arange(6.0)
    torch.testing.assert_close(torch.compile(function, options=options)(x), function(x))


@pytest.mark.slow
def test_the_next_process_need_not_trace_again(monkeypatch):
    """Nor where PyTorch by itself keeps nothing: a gradient by hand, a change of precision."""
    config = pytest.importorskip("torch._functorch.config")
    if not hasattr(config, "autograd_cache_allow_custom_autograd_functions"):
        pytest.skip("this PyTorch keeps no graph with a gradient by hand in it")
    monkeypatch.setattr(layers, "for_gpu", lambda x: True)
    model = torch.nn.Sequential(layers.GroupNorm(4), layers.Head(4, 1, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)

    def counts() -> dict[str, int]:
        """What a process finds that starts now."""
        torch._dynamo.reset()
        found = torch._dynamo.utils.counters["aot_autograd"]
        found.clear()
        with step.compile_cache(), torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, dynamic=False, fullgraph=True)(x).sum().backward()
        return {name: found[f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}

    assert counts() == {"hit": 0, "miss": 1, "bypass": 0}
    assert counts() == {"hit": 1, "miss": 0, "bypass": 0}
    monkeypatch.setattr(step, "_sources", lambda: "other code")
    assert counts() == {"hit": 0, "miss": 1, "bypass": 0}
