"""Kernels made by another process while the run trains without them."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from refinelib import build, checkpoints
from refinelib import step as stepping
from refinelib import step_kernels as kernels
from refinelib import step_precompile as precompile
from refinelib import trainer as loop
from refinelib.modeling import layers as blocks
from refinelib.runs import Run
from refinelib.trainer import train


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Kernels of a test stay in it."""
    monkeypatch.setenv(kernels.KERNELS_VARIABLE, str(tmp_path / "kernels"))


class Answers:
    """Stands where the other process would: works for so many looks, then has an answer."""

    made: list["Answers"] = []

    def __init__(self, looks, answer):
        self.looks, self.answer, self.closed = looks, answer, False
        Answers.made.append(self)

    def poll(self):
        self.looks -= 1
        return None if self.looks >= 0 else self.answer

    def close(self):
        self.closed = True


def run_beside(tiny, monkeypatch, *, looks, answer, precompile=None):
    """A run on a CPU that trains as one on a GPU does that has no kernels yet; what is compiled is only noted."""
    compiled = []
    monkeypatch.setattr(stepping, "Precompile", precompile or (lambda *given, **named: Answers(looks, answer)))
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    start = stepping.Stepper.__init__

    def beside(self, *given, **named):
        start(self, *given, **named)
        self.beside = True

    with monkeypatch.context() as patch:
        patch.setattr(stepping.Stepper, "__init__", beside)
        return train(tiny(run="beside")), compiled


def weights(run):
    return checkpoints.load(run.folder / "checkpoints" / "last.pt")["model"]


def test_a_run_goes_over_once_the_kernels_are_there(tiny, monkeypatch):
    plain = train(tiny(run="plain"))
    run, compiled = run_beside(tiny, monkeypatch, looks=2, answer="")
    told = [event for event in run.events() if event["kind"] == "speed"]
    assert [event["step"] for event in told] == [stepping.WARM_UP, stepping.WARM_UP + 2] and "goes over" in told[1]["message"]
    assert len(compiled) == 3  # model and loss; the guard's judgement; its moving average
    assert Answers.made[-1].closed
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(run).values()))
    assert kernels.note(run.settings()).exists()  # the next run of this shape need not train without


def test_what_another_process_could_not_the_run_does_itself(tiny, monkeypatch):
    run, compiled = run_beside(tiny, monkeypatch, looks=1, answer="OutOfMemoryError: no room for two")
    (_, told) = [event["message"] for event in run.events() if event["kind"] == "speed"]
    assert "no room for two" in told and "waits" in told
    assert len(compiled) == 3 and run.status()["state"] == "ok" and kernels.note(run.settings()).exists()


def test_a_machine_that_starts_no_more_processes_is_no_reason_to_fail(tiny, monkeypatch):
    def refuse(*given, **named):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(kernels.subprocess, "Popen", refuse)
    with pytest.raises(BlockingIOError):
        kernels.Precompile(tiny(), store=kernels.kernels_folder())
    run, compiled = run_beside(tiny, monkeypatch, looks=0, answer="", precompile=kernels.Precompile)
    (told,) = [event["message"] for event in run.events() if event["kind"] == "speed"]
    assert "no more processes" in told and len(compiled) == 3 and run.status()["state"] == "ok"


def test_where_memory_holds_one_run_only_it_waits(tiny, monkeypatch):
    monkeypatch.setattr(stepping.Stepper, "_room_for_another", lambda self: False)
    before = len(Answers.made)
    run, compiled = run_beside(tiny, monkeypatch, looks=0, answer="")
    (told,) = [event["message"] for event in run.events() if event["kind"] == "speed"]
    assert "waits" in told and len(compiled) == 3 and len(Answers.made) == before


def test_a_run_that_ends_first_ends_the_other_process(tiny, monkeypatch):
    run, compiled = run_beside(tiny, monkeypatch, looks=10**6, answer="")
    assert run.status()["state"] == "ok" and not compiled and Answers.made[-1].closed


def test_a_process_that_fails_tells_why(tiny, tmp_path):
    made = kernels.Precompile(tiny(), store=tmp_path / "nowhere")
    end = time.monotonic() + 120
    while made.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert "nowhere" in made.poll()
    made.close()


def test_a_process_that_works_can_be_ended(tiny, tmp_path):
    made = kernels.Precompile(tiny(), store=tmp_path / "nowhere")
    made.close()
    assert made._process.returncode == -signal.SIGKILL
    ended = kernels.Precompile(tiny(), store=tmp_path / "nowhere")
    kernels.kill_session(ended._process.pid)
    ended._process.wait()
    assert ended.poll() == f"ended by signal {signal.SIGKILL:d}"
    ended.close()


def test_what_was_raised_is_told_and_not_the_advice_below_it(tiny, monkeypatch, tmp_path):
    package = tmp_path / "refinelib"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "precompile.py").write_text('raise RuntimeError("CUDA error: out of memory\\nCompile with something to enable device-side assertions.")')
    monkeypatch.setattr(kernels, "__file__", str(package / "kernels.py"))
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    made = kernels.Precompile(tiny(), store=tmp_path)
    with contextlib.closing(made):
        made._process.wait()
        assert made.poll() == "RuntimeError: CUDA error: out of memory"


RUN = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
HELPER = """
import sys, threading, time
from refinelib import step_precompile as precompile
threading.Thread(target=precompile._end_with, args=(int(sys.argv[1]),), daemon=True).start()
print("works", flush=True)
time.sleep(600)
"""


def test_it_ends_with_the_run_that_started_it():
    """Killed hard, the run has no chance to end it."""
    run = subprocess.Popen([sys.executable, "-c", RUN, HELPER], stdout=subprocess.PIPE, text=True)
    helper = int(run.stdout.readline())
    run.wait()
    end = time.monotonic() + 60
    while _lives(helper) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _lives(helper)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("free, room", [(2, False), (3, False), (4.5, True)])
def test_room_is_measured_by_what_a_step_took(tiny, monkeypatch, free, room):
    settings = tiny()
    trainer = loop.Trainer(settings, Run.start(settings))
    trainer.stepper.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert trainer.stepper._room_for_another() is room


def test_it_takes_the_steps_of_the_run(tiny, monkeypatch):
    """With kernels left as graphs, which is quick: the whole of it runs, and leaves the note."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = tiny()
    trainer = loop.Trainer(settings, Run.start(settings))
    assert not kernels.note(settings).exists()
    precompile.compile_kernels(settings, store=trainer.loader.store.folder)
    assert kernels.note(settings).exists()


def test_of_runs_side_by_side_one_compiles(tiny, tmp_path, monkeypatch):
    calls = []
    given = json.dumps({"settings": tiny().model_dump(mode="json"), "store": str(tmp_path), "parent": os.getppid()})
    monkeypatch.setattr(precompile, "_end_with", lambda parent: None)
    monkeypatch.setattr(precompile.os, "nice", lambda by: None)
    monkeypatch.setattr(precompile.sys, "argv", ["precompile", given])
    monkeypatch.setattr(precompile, "compile_kernels", lambda *given, **named: (time.sleep(0.3), calls.append(1), kernels.keep_note(tiny())))
    both = [threading.Thread(target=precompile.main) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert calls == [1]


def test_kernels_belong_to_shapes_precision_and_code_not_to_rates(tiny, monkeypatch):
    first = kernels.note(tiny())
    assert first == kernels.note(tiny(lr=1e-4, seed=5, epochs=7, run="other"))
    others = [kernels.note(tiny(**change)) for change in (dict(batch_size=4), dict(amp="bf16"), dict(width=0.125), dict(use_contour_detection=False), dict(inject="grad:nan@3"))]
    monkeypatch.setattr(kernels, "_code", lambda: "other code")
    assert len({first, *others, kernels.note(tiny())}) == 7


def test_on_a_gpu_auto_waits_only_where_it_must(tiny, monkeypatch):
    """Kept kernels are taken up at once; without any the run goes ahead, unless it has to be repeatable."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    monkeypatch.setattr(stepping, "worth_compiling", lambda settings, steps: True)

    def stepper(**named):
        settings = tiny(compile="auto", **named)
        trainer = loop.Trainer(settings, Run.start(settings))
        compiled.clear()
        return stepping.Stepper(settings, build.build_step(settings, trainer.train_store, torch.device("cpu")), device=torch.device("cuda"), steps=10), len(compiled)

    waiting, count = stepper()
    assert waiting.beside and count == 0
    waiting, count = stepper(deterministic=True)
    assert not waiting.beside and count == 3
    kernels.keep_note(tiny())
    waiting, count = stepper()
    assert not waiting.beside and count == 3


def test_the_next_process_need_not_trace_again(monkeypatch):
    """Nor with the two things that PyTorch by itself would not keep: normalisation's own gradient, and a change of precision. Other code is traced anew."""
    from torch._functorch import config

    if not hasattr(config, "autograd_cache_allow_custom_autograd_functions"):
        pytest.skip("this PyTorch keeps no graph with a gradient by hand in it")
    monkeypatch.setattr(blocks, "for_gpu", lambda x: True)
    layers = torch.nn.Sequential(blocks.GroupNorm(4), blocks.Head(4, 1, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)

    def taken_up() -> dict[str, int]:
        """What a process finds that starts now."""
        torch._dynamo.reset()
        found = torch._dynamo.utils.counters["aot_autograd"]
        found.clear()
        with kernels.keeping_graphs(), torch.autocast("cpu", torch.bfloat16):
            torch.compile(layers, dynamic=False, fullgraph=True)(x).sum().backward()
        return {name: found[f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}

    assert taken_up() == {"hit": 0, "miss": 1, "bypass": 0}
    assert taken_up() == {"hit": 1, "miss": 0, "bypass": 0}
    monkeypatch.setattr(kernels, "_code", lambda: "other code")
    assert taken_up() == {"hit": 0, "miss": 1, "bypass": 0}
