"""Exported files give what the predictor gives, for every format and refinement, in batches of any size."""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import bench
from PIL import Image

from refinelib import checkpoints, export, load
from refinelib.__main__ import main
from refinelib.config import names_with_role, project_root, resolve
from refinelib.data import SyntheticPeople
from refinelib.metrics import predict
from refinelib.modeling import TARGET
from refinelib.modeling.roi import centre_window
from refinelib.registry import REFINEMENTS
from refinelib.trainer import train

SWITCHES = {part.switch: name for name, part in REFINEMENTS.items()}


def needs(*packages):
    """Skips where a format's packages are not installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install {package}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Models with every kind of module but fewer of each: their graphs are exported in seconds."""
    model = functools.partial(bench("sweep").small_model, buffers=False)
    for module in ("refinelib.build", "refinelib.metrics.predict", "refinelib.export"):
        monkeypatch.setattr(importlib.import_module(module), "build_model", model)
    return model


@pytest.fixture
def checkpoint(tmp_path, small):
    """Writes a checkpoint of random weights, far from the start, where refinements change little."""

    def write(**settings):
        given = {"width": 0.0625, "roi_size": 16, "mask_size": 32, "context": 0.5, **settings}
        values = resolve("demo", **given)
        torch.manual_seed(0)
        model = small(values)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        content = {"model": model.state_dict(), "average": None, "mean_coverage": torch.zeros(32, 32, 2)}
        checkpoints.save(tmp_path / "best.pt", {**content, "settings": values.model_dump(mode="json")})
        return tmp_path / "best.pt"

    return write


def assert_equal_to_predictor(written, predictor, sizes=(1, 2, 5)):
    """The file's probabilities are the predictor's, in batches of any size."""
    probs, about = export.opened(written.path)
    pixels = SyntheticPeople(2, "val").scene(1).image
    boxes = np.random.default_rng(0).uniform([0, 0, 50, 60], [40, 50, 120, 110], (max(sizes), 4))
    crops = predictor.crops(pixels, boxes)
    assert about["images"][1:] == list(crops.shape[1:])
    theirs = predictor.probs(pixels, boxes)
    for size in sizes:
        ours = probs(crops[:size])
        assert list(ours.shape) == [size, *about["probs"][1:]]
        torch.testing.assert_close(ours, theirs[:size], atol=export.TOLERANCE, rtol=0)


def chosen(*on):
    """Settings with these refinements on and all others off."""
    return {switch: switch in on for switch in SWITCHES}


SUBPIXEL = "use_subpixel_conv"  # it excludes progressive upsampling


SLOW = [pytest.param(x, marks=pytest.mark.slow) if x in ("pt2", "onnx") else x for x in export.FORMATS]


@pytest.mark.parametrize("format", SLOW)
def test_a_file_of_any_format_gives_the_predictors_probabilities(format, checkpoint):
    needs(*export.FORMATS[format].packages)
    file = checkpoint(**chosen(*SWITCHES.keys() - {SUBPIXEL}), target_decision_weight=1.3)
    written = export.export(file, format)
    assert written.path == file.with_suffix(export.FORMATS[format].suffix)
    assert_equal_to_predictor(written, load(file, device="cpu"))


@pytest.mark.parametrize(  # of onnx the consumer's test does it
    "format",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "pt2" else ())
        for name in sorted(set(export.FORMATS) - {"onnx"})
    ],
)
def test_with_the_other_refinements_on_and_off_too(format, checkpoint):
    needs(*export.FORMATS[format].packages)
    file = checkpoint(**chosen(SUBPIXEL))
    assert_equal_to_predictor(export.export(file, format), load(file, device="cpu"))


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_each_refinement_is_in_the_file(switch, checkpoint):
    file = checkpoint(**chosen(switch))
    written = export.export(file, "torchscript")
    predictor = load(file, device="cpu")
    assert_equal_to_predictor(written, predictor)
    if switch:  # without its residual the probabilities are others
        getattr(predictor.model, REFINEMENTS[SWITCHES[switch]].attribute).blend.zero_()
        with pytest.raises(AssertionError):
            assert_equal_to_predictor(written, predictor)


def test_of_a_trained_run_the_moving_average_is_exported(tiny, capsys):
    run = train(tiny(ema_decay=0.9, flip_test=True, nontarget_decision_weight=1.4))
    folder = run.folder / "checkpoints"
    saved = checkpoints.load(folder / "best.pt")
    assert not torch.equal(saved["average"]["merge.weight"], saved["model"]["merge.weight"])
    command = ["export", run.folder.name, "--format", "torchscript", "--output-dir", str(run.folder.parent)]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    file = re.fullmatch(
        r"wrote (.+) \([\d.]+ MiB\): its probabilities differ from PyTorch's by .+ at most, in batches of "
        r"1 and 3 \(allowed: 1e-04\)\n",
        said,
    )[1]
    assert file == str(folder / "best.ts")
    assert_equal_to_predictor(export.Exported(file, 0), load(run.folder, device="cpu"))
    assert main([*command, "--no-flip", "--out", str(folder / "fast.ts")]) == 0
    written = export.Exported(folder / "fast.ts", 0)
    assert_equal_to_predictor(written, load(run.folder, device="cpu", flip=False))
    about = export.opened(written.path)[1]
    assert about["run"] == run.folder.name and about["checkpoint"] == "best.pt" and not about["flip_test"]
    assert about["classes"][TARGET] == "target" and about["decision_weights"] == [1, 1, 1.4]


def test_what_a_run_was_trained_on_and_in_changes_nothing(checkpoint, tmp_path):
    plain = export.export(checkpoint(), "torchscript", tmp_path / "plain.ts")
    there = checkpoint(device="cuda", amp="fp16", compile="on")
    assert checkpoints.load(there)["settings"]["device"] == "cuda"
    trained = export.export(there, "torchscript", tmp_path / "trained.ts")
    assert_equal_to_predictor(trained, load(checkpoint(), device="cpu"))
    graphs = [str(export.opened(written.path)[0].inlined_graph) for written in (plain, trained)]
    for graph in graphs:
        assert not [line for line in graph.splitlines() if "cuda" in line or "Half" in line]
        assert "aten::_convolution" in graph


def test_metadata_says_all_that_makes_the_network_again(checkpoint):
    file = checkpoint(use_distance_transform=False, mask_size="[32, 16]", roi_size="[32, 16]")
    settings = export.metadata(load(file, device="cpu"))["settings"]
    assert settings.keys() == names_with_role("model") | {"roi_size", "mask_size", "context"}
    weights = checkpoints.load(file)["model"]
    again = predict.build_model(resolve("demo", **json.loads(json.dumps(settings)))).state_dict()
    assert {name: w.shape for name, w in again.items()} == {name: w.shape for name, w in weights.items()}


class TimesBatch(torch.nn.Module):
    """Depends on the batch in a way that a trace takes for a constant."""

    def forward(self, x):
        return x * len(x)


def test_a_file_that_differs_is_not_written(checkpoint, monkeypatch, small):
    def wrong(settings):
        model = small(settings)
        model.attention.append(TimesBatch())
        return model

    file = checkpoint()
    monkeypatch.setattr(predict, "build_model", wrong)
    older = file.with_suffix(".ts")
    for content in (None, b"of before"):
        if content:
            older.write_bytes(content)
        with pytest.raises(
            export.ExportError, match=r"best.ts was not written: .* by \d\S+, more than 1e-04"
        ):
            export.export(file, "torchscript")
        assert [*file.parent.glob(".*tmp")] == [] and older.exists() == bool(content)
    assert older.read_bytes() == b"of before"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "h5"}, "there is no format 'h5'; there are onnx, pt2, torchscript, safetensors"),
        ({"run": "never-trained"}, "there is no run .*never-trained"),
        ({"out": "best.pt"}, "best.pt cannot be written as torchscript: give a file that ends in .ts and"),
        ({"out": "model.onnx"}, "model.onnx cannot be written as torchscript"),
        ({"out": "folder.ts"}, "folder.ts cannot be written as torchscript"),
        ({"out": "best.pt/model.ts"}, "best.pt is a file: give a folder to write into"),
        ({"out": "n" * 245 + ".ts"}, "n.ts was not written: .*File name too long"),
    ],
)
def test_a_wrong_word_gets_a_sentence(given, message, checkpoint, capsys):
    file = checkpoint()
    folder = file.parent / "folder.ts"
    folder.mkdir()
    before = file.read_bytes()
    options = {"run": str(file), "format": "torchscript", **given}
    out = ["--out", str(file.parent / options["out"])] if "out" in options else []
    assert main(["export", options["run"], "--format", options["format"], *out]) == 2
    assert re.search(f"^export: .*{message}", capsys.readouterr().err)
    assert {*file.parent.iterdir()} == {file, folder} and file.read_bytes() == before


def test_a_missing_package_gets_the_command_that_installs_it(checkpoint, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    words = r"onnx needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime$"
    with pytest.raises(export.ExportError, match=words):
        export.export("any", "onnx")
    with pytest.raises(export.ExportError, match="^safetensors needs safetensors: pip install safetensors$"):
        export.export("any", "safetensors")


def test_files_that_are_no_export_get_a_sentence(tmp_path):
    with pytest.raises(export.ExportError, match="best.pt has none of the endings .onnx, .pt2, .ts, .safe"):
        export.opened("best.pt")
    with pytest.raises(export.ExportError, match="none.ts is no exported model: .*none.ts"):
        export.opened(tmp_path / "none.ts")
    (tmp_path / "half.pt2").write_bytes(b"PK")
    with pytest.raises(export.ExportError, match="half.pt2 is no exported model"):
        export.opened(tmp_path / "half.pt2")


#: Imports of these fail; then a script runs as a user would run it.
WITHOUT = """
import runpy, sys
sys.modules.update(torch=None, refinelib=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_consumer_draws_the_predictors_mask(checkpoint, tmp_path):
    """Of the pixels inside a box at most 1 in 1000 may differ.

    Those are pixels where two classes are equally likely but for :data:`export.TOLERANCE`; and an average
    that lies in the middle of two whole numbers may be rounded either way.
    """
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    file = checkpoint(**chosen(SUBPIXEL), roi_size="[32, 16]", target_decision_weight=1.3)
    model, predictor = export.export(file, "onnx").path, load(file, device="cpu")
    pixels = SyntheticPeople(1, "val").scene(0).image
    height, width = pixels.shape[:2]
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    script = project_root() / "examples" / "export" / "consume.py"
    given = [model, tmp_path / "photo.png", 20.5, 10, 90, 100.25, tmp_path / "mask.png"]
    subprocess.run([sys.executable, "-c", WITHOUT, script, *map(str, given)], check=True, timeout=60)
    drawn = np.asarray(Image.open(tmp_path / "mask.png"))
    (mask,) = predictor.predict(pixels, [20.5, 10, 90, 100.25])
    assert drawn.shape == mask.shape and mask.any() and (drawn != mask).sum() <= 70 * 90 / 1000

    spec = importlib.util.spec_from_file_location("consume", script)
    consume = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(consume)
    session, random = onnxruntime.InferenceSession(model), np.random.default_rng(1)
    corners = np.sort(random.uniform(-0.4, 1.4, (30, 2, 2)) * [width, height], axis=1).reshape(30, 4)
    corners = corners[(corners[:, 2:] > 1).all(1) & (corners[:, :2] < [width, height]).all(1)]
    boxes = [*corners, [5, 5, 7.5, 90], [0, 0, width, height], [-0.5, 3, 0.5, 9], [3.6, 4, 4.4, 40]]
    for box, mask in zip(boxes, predictor.predict(pixels, boxes), strict=True):
        differ = (consume.mask_of(session, pixels, box) != mask).sum()
        assert differ <= max(1, (box[2] - box[0]) * (box[3] - box[1]) / 1000), box
    assert len(boxes) > 20


def test_the_predictors_crops_are_those_its_probabilities_come_from(checkpoint):
    predictor = load(checkpoint(), device="cpu")
    pixels = SyntheticPeople(1, "val").scene(0).image
    boxes = [[10, 20, 60, 90], [-20, 0, 30, 40]]
    probs = centre_window(predictor.roi_probs(predictor.crops(pixels, boxes)), (32, 32))
    torch.testing.assert_close(predictor.probs(pixels, boxes), probs, atol=1e-6, rtol=0)


def test_the_bench_compares_every_runtime_with_eager_pytorch(checkpoint, tmp_path):
    compared = bench("export")
    model, _ = export.opened(export.export(checkpoint(), "torchscript").path)
    lines = compared.measured(({"eager": model, "torchscript": model}, (24, 24)), 2, 3, least=0.0)
    assert [line["runtime"] for line in lines] == ["eager", "torchscript"]
    assert lines[0]["least"] == lines[0]["most"] == 1 and lines[0]["ms_a_roi"] > 0
    assert lines[1]["least"] <= lines[1]["median"] <= lines[1]["most"]
