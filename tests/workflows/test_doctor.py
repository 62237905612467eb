"""``python -m refinelib doctor``: a line for each part, and what to fix."""

import shutil
import sys
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from refinelib import config
from refinelib.__main__ import main
from refinelib.workflows.doctor import examine

Usage = namedtuple("Usage", "total used free")


def found(**given):
    return {one.what: one for one in examine(given)}


def test_a_line_for_every_part_and_an_exit_code(tmp_path, capsys):
    code = main(["doctor", "-p", "output_dir", str(tmp_path / "not" / "yet")])
    lines = capsys.readouterr().out.splitlines()
    assert code == any(line.startswith("FIX") for line in lines)
    assert all(line.startswith(("ok  ", "FIX ")) for line in lines)
    for part in (
        "Python: 3.",
        "packages: ",
        "torch: 2.",
        "Jupyter kernel: ",
        "outputs: ",
        "recipes: ",
        "data: ",
    ):
        assert any(line[4:].startswith(part) for line in lines), part
    assert any("CUDA" in line or "cuda:0" in line for line in lines)
    assert f"{tmp_path}/not/yet can be written to" in "\n".join(lines) and not (tmp_path / "not").exists()
    assert f"recipes: {len(config.recipe_names())} in" in "\n".join(lines)


def test_a_data_set_that_is_given_is_looked_at(coco_files, tmp_path):
    coco_files.image()
    coco_files.source()
    places = dict.fromkeys(("train_annotations", "val_annotations"), str(coco_files.annotations))
    places |= dict.fromkeys(("train_images", "val_images"), str(coco_files.images))
    assert not found(data="coco", **places)["data"].fix
    wrong = found(data="coco", data_dir=str(tmp_path / "nowhere"))["data"]
    assert wrong.fix and "there is no data folder" in wrong.text
    assert "did you mean 'coco'" in found(data="cocoo")["data"].text


def test_a_device_that_is_asked_for_is_looked_at():
    assert found(device="cpu")["device"].text == "training takes cpu" and "device" not in found()
    wrong = found(device="cuda:99")["device"]
    assert wrong.fix and "device = cuda:99" in wrong.text
    assert "give auto, cpu" in found(device="CUDA:1")["device"].text


def test_a_full_disk_and_one_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in found(output_dir=str(tmp_path / "file" / "in"))["outputs"].text
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**40, 2**40, 2**20))
    assert "make room" in found(output_dir=str(tmp_path))["outputs"].fix


def test_a_recipe_that_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").write_text("lrr: 1\n")
    (tmp_path / "params" / "good.yaml").write_text("lr: 1e-3\n")
    one = found()["recipes"]
    assert one.fix and "mine.yaml: there is no setting 'lrr'" in one.text


def test_packages_that_lack_or_are_too_old(monkeypatch):
    lines = ["numpy>=99", "no-such-package", 'lightning>=99; extra == "guard-examples"', "torch>=2.6"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    parts = found()
    assert "numpy" in parts["packages"].text and "no-such-package missing" in parts["packages"].text
    assert "torch" not in parts["packages"].text and parts["packages"].fix
    assert not parts["optional packages, guard-examples"].fix  # they may lack


@pytest.mark.parametrize(
    "executable, right", [("python", True), (sys.executable, True), ("/x/python", False)]
)
def test_the_kernel_must_be_of_this_python(tmp_path, monkeypatch, executable, right):
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    spec = KernelSpec(argv=[executable, "-m", "ipykernel_launcher"])
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    one = found()["Jupyter kernel"]
    assert bool(one.fix) != right and (right or "-m ipykernel install --sys-prefix" in one.fix)


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a torch that is built for CUDA" in found()["CUDA"].fix
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in found()["CUDA"].fix


def test_a_part_that_breaks_is_a_finding_and_the_others_are_looked_at(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    parts = found()
    assert parts["torch"].fix == "mend this first" and "data" in parts
