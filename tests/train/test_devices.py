"""Which device a run uses: what is accepted, and that a kind of device is never compared with its name."""

import contextlib
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refinelib import step
from refinelib.build import autocast, build_device, build_step, device_name, precision
from refinelib.config import SettingsError, project_root, resolve
from refinelib.data import open_split
from refinelib.guard import measure
from refinelib.launch import refuse_processes
from refinelib.workflows import batch

HERE = torch.cuda.device_count()


@pytest.mark.parametrize(
    "given, sentence",
    [
        (f"cuda:{HERE}", f"device = cuda:{HERE}, and PyTorch sees .* here: set device to auto or cpu"),
        pytest.param(
            "cuda",
            "device = cuda, and PyTorch sees no CUDA device here",
            marks=pytest.mark.skipif(HERE > 0, reason="there is one"),
        ),
        pytest.param(
            "mps",
            "device = mps, and PyTorch sees no GPU of Apple's here",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one"),
        ),
        ("gpu", "device = 'gpu': give auto, cpu, mps, cuda, or one GPU by its number"),
    ],
)
def test_a_device_that_is_not_there_is_told(given, sentence):
    settings = resolve().model_copy(update={"device": given})  # as `load` does
    with pytest.raises(ValueError, match=sentence):
        build_device(settings)


def test_a_device_left_blank_is_chosen():
    blank, chosen = (resolve().model_copy(update={"device": given}) for given in ("", None))
    assert build_device(blank) == build_device(chosen) == build_device(resolve(device="auto"))


def test_the_number_of_a_gpu_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [build_device(resolve(device=given)) for given in ("auto", "cuda", "cuda:1")]
    assert devices == [torch.device("cuda"), torch.device("cuda"), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="cuda:2, and PyTorch sees 2 of them, numbered from 0 here"):
        build_device(resolve(device="cuda:2"))


def test_apples_gpu_trains_like_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settings = resolve(device="mps")
    device = build_device(settings)
    assert device_name(device) == device.type == "mps" and precision(settings, device) == "off"
    assert not autocast(settings, device)._enabled


class Wide(TorchDispatchMode):
    """Notes the float64 results on a device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.device == self.device:
                self.found.append(str(function))
        return out


@pytest.mark.parametrize("lacks", [True, False])
def test_a_step_on_a_device_without_float64_needs_none_and_stays_there(monkeypatch, tiny, lacks):
    """The meta device stands for one that is neither a CPU nor CUDA: a tensor left elsewhere is an error."""
    meta, widest = torch.device("meta"), measure.widest
    kind = torch.device("mps") if lacks else meta
    monkeypatch.setattr(measure, "widest", lambda device: widest(kind))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it has no meta
    settings = tiny(augment="strong", ema_decay=0.9)
    store = open_split(settings, "train", progress=False)
    with Wide(meta) as seen:
        parts = build_step(settings, store, meta)
        stepper = step.Stepper(settings, parts, device=meta, steps=10)
        plan = parts.loader.plan(0)
        components, total, _ = stepper.gradient([parts.loader.inputs(plan, 0)])
        decision = parts.guard.decide(total, *measure.measured(parts.guard.parameters))
    assert {components.device, total.device, decision.report.device, decision.memory.device} == {meta}
    assert bool(seen.found) != lacks, seen.found


@pytest.mark.parametrize("given", ["cuda:1", "mps"])
def test_several_processes_take_no_single_gpu(given):
    settings = resolve(device=given, batch_size=8)
    refuse_processes(settings, 1)
    with pytest.raises(SettingsError, match=f"device = {given} is one GPU, and 2 processes take a GPU each"):
        refuse_processes(settings, 2)


def test_a_batch_of_runs_shares_out_the_gpus_itself():
    with pytest.raises(SettingsError, match="device = cuda:1: the batch shares out the GPUs: give cuda"):
        batch.plan(["demo"], {"device": "cuda:1"})
    assert len(batch.plan(["demo"], {"device": "mps"})) == 1


def test_nothing_compares_a_device_with_the_name_of_its_kind():
    """``torch.device("cuda", 1) != "cuda"``, and the setting may be ``cuda:1``."""
    wrong = re.compile(r"""device\s*[!=]=\s*["'](cuda|mps)|["'](cuda|mps)["']\s*[!=]=\s*[\w.]*device\b""")
    files = [*(project_root() / "refinelib").rglob("*.py"), *(project_root() / "studies").glob("*.py")]
    assert not [(file.name, hit) for file in files for hit in wrong.findall(file.read_text())]
