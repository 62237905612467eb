"""A part added from outside the package: its settings, its training and its figures, without another line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refinelib.metrics.segmentation import Metric
from refinelib.modeling.layers import Head
from refinelib.modeling.losses import LossTerm
from refinelib.modeling.refinements import Refinement, bounded
from refinelib.registry import LOSSES, METRICS, REFINEMENTS, Option
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
