"""Each example ends with the very state of a run without the bad batch, and names where the fault began."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from refinelib.config import project_root

EXAMPLES = project_root() / "examples" / "guard"
#: Imported by an example of another name, from its own folder.
PLUGINS = {"lightning_guard": "lightning_run", "transformers_trainer": "transformers_run"}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """An example imports what lies beside it, as a script does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def _load(name, *packages):
    """The example as a module; skips where one of its packages is missing."""
    if packages and importlib.util.find_spec("torchvision"):  # all of them import it where it is installed
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"needs a torchvision for this build of torch, or none: {error}")
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install {package.replace('_', '-')}")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _assert_same(ours, theirs):
    (ours, our_form), (theirs, their_form) = tree_flatten(ours), tree_flatten(theirs)
    assert our_form == their_form
    assert sum(isinstance(x, torch.Tensor) for x in ours) > 4
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert bool(one.isfinite().all())
            assert torch.equal(one, other)
        else:
            assert one == other


def test_unet_of_segmentation_models():
    ours, theirs, found = _load("segmentation_models", "segmentation_models_pytorch").main()
    _assert_same(ours, theirs)
    assert any(name.endswith("running_var") for name in ours["model"])
    assert [(step, finding.phase, finding.places) for step, finding in found.items()] == [(3, "input", [2])]


def test_classifier_of_timm():
    ours, theirs, found = _load("timm_classifier", "timm").main()
    _assert_same(ours, theirs)
    assert ours["scheduler"]["last_epoch"] == 8
    assert [(step, x.phase, x.module, x.places) for step, x in found.items()] == [
        (4, "forward", "conv1.0", [5])
    ]


def test_gpt():
    ours, theirs, found = _load("gpt", "transformers").main()
    _assert_same(ours, theirs)
    assert [(step, x.phase, x.module) for step, x in found.items()] == [(4, "forward", "transformer.wte")]


def test_gan():
    ours, theirs, found = _load("gan").main()
    _assert_same(ours, theirs)
    assert list(found) == [("critic", 3), ("generator", 3)]
    assert {(finding.phase, *finding.places) for finding in found.values()} == {("input", 1)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate):
    ours, theirs, found = _load("lightning_run", "lightning").main(accumulate, poisoned=5)
    _assert_same(ours, theirs)
    assert ours["scheduler"]["last_epoch"] == 12 // accumulate - 1
    assert found == {5 // accumulate: ["encoder.weight"]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_of_transformers(accumulate):
    example = _load("transformers_run", "transformers", "accelerate")
    ours, theirs, found = example.main(accumulate, poisoned=9)
    _assert_same(ours, theirs)
    assert ours["scheduler"]["last_epoch"] == 12 // accumulate - 1
    assert (found[0].module, found[0].places) == ("transformer.wte", [1])
    assert [finding.phase for finding in found[1:]] == ["none"] * (accumulate - 1)


def test_every_example_is_tested_and_in_the_table():
    table, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'_load("{PLUGINS.get(path.stem, path.stem)}"' in tests, path.name
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f"[{path.name}]({path.name})" in table
