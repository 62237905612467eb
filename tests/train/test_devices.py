"""Which device a run uses: what is accepted, and that a kind of device is never compared with its name."""

import re

import pytest
import torch

from refinelib.build import autocast, build_device, device_name, precision
from refinelib.config import SettingsError, project_root, resolve
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
