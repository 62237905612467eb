"""A part added from outside the package: its settings, its training and its figures, without another line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from refinelib.config import project_root
from refinelib.data import splits
from refinelib.data.sources import InstancesBuilder, Scene
from refinelib.metrics import segmentation
from refinelib.metrics.segmentation import Metric
from refinelib.modeling import losses, refinements
from refinelib.modeling.layers import Head
from refinelib.modeling.losses import LossTerm
from refinelib.modeling.refinements import Refinement, bounded
from refinelib.registry import DATASETS, LOSSES, METRICS, REFINEMENTS, Option
from refinelib.trainer import train


class Sharpen(nn.Module):
    """A refinement with a head of its own."""

    def __init__(self, channels: int, *, hidden: int, blend_init: float, sharpen_gain: float) -> None:
        super().__init__()
        self.head = Head(channels, 2)
        self.gain = sharpen_gain
        self.blend = nn.Parameter(torch.tensor(blend_init))

    def forward(self, logits, features):
        sharpness = self.gain * bounded(self.head(features))
        return logits + self.blend * sharpness, sharpness


def flatness(prediction, targets, *, flatness_level: float):
    """A loss of the new head."""
    return (prediction.output.sharpness - flatness_level).square().mean(dim=(1, 2, 3))


def area_error(masks):
    return (masks.pred.sum((-2, -1)) - masks.true.sum((-2, -1))).double().abs()


@pytest.fixture
def added():
    """A loss, a refinement and a metric, one line each."""
    REFINEMENTS.add(
        "sharpen",
        Refinement(Sharpen, "use_sharpen", "sharpen", head="sharpness"),
        Option("use_sharpen", False, "sharpen the mask", role="model"),
        Option("sharpen_gain", 1.0, "gain of it", {"ge": 0.0}, role="model"),
    )
    LOSSES.add(
        "flatness",
        LossTerm(flatness, switch="use_sharpen", requires="sharpness"),
        Option("flatness_weight", 0.1, "weight of the flatness loss", {"ge": 0.0}),
        Option("flatness_level", 0.0, "level it draws to"),
    )
    METRICS.add("area_error", Metric(area_error, "area error", "px", higher_is_better=False))
    yield
    REFINEMENTS.remove("sharpen")
    LOSSES.remove("flatness")
    METRICS.remove("area_error")


def test_a_loss_a_refinement_and_a_metric_from_outside_are_trained_with(added, tiny):
    run = train(tiny(run="added", use_sharpen=True, sharpen_gain=0.5, flatness_level=0.2))
    assert run.status()["state"] == "ok"
    assert run.settings().sharpen_gain == 0.5
    assert "flatness" in run.steps()[-1]["losses"]
    assert run.epochs()[-1]["metrics"]["area_error"] >= 0
    without = train(tiny(run="without"))
    assert "flatness" not in without.steps()[-1]["losses"]


class Discs:
    """A data set of one bright disc an image."""

    name = "discs"

    def __init__(self, split: str, radius: int) -> None:
        self.split, self.radius = split, radius

    def __len__(self) -> int:
        return 6

    def scene(self, index: int) -> Scene:
        rows, columns = np.mgrid[:60, :70]
        mask = (rows - 30) ** 2 + (columns - 30 - index) ** 2 < self.radius**2
        return Scene(np.where(mask, 200, 40).astype(np.uint8)[..., None].repeat(3, -1), mask[None])

    def instances(self, max_images: int | None = None):
        builder, r = InstancesBuilder(), self.radius
        for index in range(max_images or len(self)):
            box = (31 + index - r, 31 - r, 30 + index + r, 30 + r)
            builder.add(f"image {index}", index, (60, 70), [index], [box], [3 * r * r])
        return builder.instances(self.name)

    def fingerprint(self) -> str:
        return f"{self.split} {self.radius}"


@pytest.fixture
def discs():
    radius = Option("disc_radius", 12, "radius of a disc, pixels", {"ge": 8, "le": 25}, role="data")
    DATASETS.add("discs", lambda settings, split: Discs(split, settings.disc_radius), radius)
    yield
    DATASETS.remove("discs")


def test_a_data_set_from_outside_is_trained_on(discs, tiny):
    run = train(tiny(run="discs", data="discs", disc_radius=14))
    assert run.status()["state"] == "ok" and run.status()["rois"] == 6
    assert run.settings().disc_radius == 14


@pytest.fixture
def of_the_page():
    """The four parts that CONTRIBUTING.md adds, each as if it stood at the end of its module."""
    blocks = re.findall(r"```python\n(.*?)```", (project_root() / "CONTRIBUTING.md").read_text(), re.DOTALL)
    modules = (losses, refinements, segmentation, splits)
    for module, block in zip(modules, blocks, strict=True):
        exec(block, {**vars(module), "Discs": Discs})
    yield
    for registry, name in zip((LOSSES, REFINEMENTS, METRICS, DATASETS), PAGE, strict=True):
        registry.remove(name)


PAGE = ("jaccard", "sharpen", "area_error", "discs")


def test_what_the_contributors_page_adds_is_trained_with(of_the_page, tiny):
    run = train(tiny(data="discs", disc_radius=10, use_jaccard_loss=True, use_sharpen=True))
    assert run.status()["state"] == "ok" and "jaccard" in run.steps()[-1]["losses"]
    assert run.epochs()[-1]["metrics"]["area_error"] >= 0 and run.settings().use_sharpen
