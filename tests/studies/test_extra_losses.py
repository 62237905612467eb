"""Losses and a module that were tried and left out are trained through the registries alone."""

from __future__ import annotations

import pytest
import torch

from refinelib import resolve
from refinelib.build import build_loss, build_model
from refinelib.registry import LOSSES, REFINEMENTS
from studies import extra_losses


@pytest.fixture
def registered():
    extra_losses.register()
    yield
    for name in ("boundary_loss", "active_boundary_loss", "points"):
        LOSSES.remove(name)
    REFINEMENTS.remove("point_refinement")


def test_each_variant_adds_its_loss_and_nothing_else(registered):
    size = {"width": 0.0625, "roi_size": 32, "mask_size": 32, "device": "cpu"}
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    added = {"base": set(), "point_refinement": {"points"}}
    for variant, changes in extra_losses.VARIANTS.items():
        settings = resolve("original", **size, **changes)
        model, loss = build_model(settings), build_loss(settings)
        found = added.get(variant, {variant})
        assert (
            set(loss.names)
            == {"ce", "dice", "active_contour", "boundary_aware", "contour", "distance"} | found
        )
        total, parts = loss(model(images), labels)
        total.backward()
        assert parts.isfinite().all() and all(
            bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
        )
    assert "points" in dict(model.named_children())


def test_the_active_boundary_loss_pulls_the_boundary_towards_the_true_one():
    """A mask whose edge is three columns off costs more than one whose edge is one column off."""
    distance = (torch.arange(32.0) - 15.5).abs().expand(1, 32, 32)

    def cost(edge: int) -> float:
        person = torch.where(torch.arange(32) < edge, 4.0, -4.0).expand(1, 32, 32)
        log_probs = torch.stack([-person, person, torch.full_like(person, -9.0)], 1).log_softmax(1)
        return float(extra_losses.active_boundary_loss(log_probs, distance))

    assert 0 < cost(17) < cost(19)
