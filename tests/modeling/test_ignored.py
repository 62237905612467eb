"""Ignored pixels: no loss, no gradient, no score; without any, nothing changes by a bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinelib.data import augment
from refinelib.metrics.segmentation import SegmentationMetrics
from refinelib.modeling import IGNORED
from refinelib.modeling.losses import MaskLoss, targets_of
from refinelib.modeling.output import MaskOutput
from refinelib.modeling.roi import labels_from_coverage
from refinelib.registry import LOSSES

WEIGHTS = dict.fromkeys(LOSSES, 1.0)
SIZE = (24, 20)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def a_batch(seed, ignored=True):
    """Outputs of a model, and labels of blobs; part of them ignored."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    smooth = torch.nn.functional.avg_pool2d(noise(3, 3, SIZE[0] + 4, SIZE[1] + 4), 5, stride=1)
    labels = smooth.argmax(1)
    if ignored:
        patch = torch.nn.functional.avg_pool2d(noise(3, 1, SIZE[0] + 6, SIZE[1] + 6), 7, stride=1)[:, 0]
        labels = labels.masked_fill(patch > 0.1, IGNORED)
    output = (4 * noise(3, 2, *SIZE), noise(3, 2, *SIZE), noise(3, 2, *SIZE).tanh())
    return MaskOutput(*(x.to(DEVICE) for x in output)), labels.to(DEVICE)


def loss_of(**more):
    return MaskLoss(WEIGHTS, cap=10.0, **more)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), value=st.sampled_from([0.0, 50.0, -50.0, 1e30, float("nan"), float("inf")])
)
def test_what_stands_at_an_ignored_pixel_changes_no_loss(seed, value):
    output, labels = a_batch(seed)
    ignored = (labels == IGNORED)[:, None]
    loss = loss_of(ignores=True)
    changed = MaskOutput(*(x.masked_fill(ignored, value).requires_grad_() for x in output))
    before, after = loss.per_sample(output, labels), loss.per_sample(changed, labels)
    heads = {"contour", "distance"} if value != value or abs(value) > 1e6 else set()
    for name in before:
        if name not in heads:  # a head that is not finite is seen, wherever
            assert torch.equal(before[name], after[name]), name
    if not heads:
        sum(cost.sum() for cost in after.values()).backward()
        for x in changed:
            assert (x.grad[ignored.expand_as(x)] == 0).all() and x.grad.isfinite().all()
            assert (x.grad != 0).any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_ignored_pixels_it_is_the_same_to_the_bit(seed):
    output, labels = a_batch(seed, ignored=False)
    outputs = [MaskOutput(*(x.clone().requires_grad_() for x in output)) for _ in range(2)]
    totals = [loss_of(ignores=ignores)(x, labels) for x, ignores in zip(outputs, (False, True), strict=True)]
    assert torch.equal(totals[0][0], totals[1][0]) and torch.equal(totals[0][1], totals[1][1])
    for total, _ in totals:
        total.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*outputs, strict=True))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_truth_hidden_by_ignored_pixels_is_taught(seed):
    """A perfect prediction of the hidden truth costs the heads nothing, although they cannot see it."""
    _, hidden = a_batch(seed, ignored=False)
    _, cut = a_batch(seed)
    labels = torch.where(cut == IGNORED, IGNORED, hidden)
    truth = targets_of(hidden)
    perfect = MaskOutput(
        torch.where(truth.masks, 40.0, -40.0),
        torch.where(truth.signed.abs() < 1, 40.0, -40.0),
        (truth.signed / 8).clamp(-1, 1),
    )
    costs = loss_of(ignores=True).per_sample(perfect, labels)
    heads = MaskLoss({"distance": 1.0}, ignores=True).per_sample(perfect, labels)["distance"]
    assert costs["ce"].max() < 1e-6 and costs["dice"].max() < 1e-2
    assert heads.max() < 1e-4


def test_all_pixels_ignored():
    output, labels = a_batch(0)
    labels = torch.full_like(labels, IGNORED)
    total, _ = loss_of(ignores=True)(MaskOutput(*(x.requires_grad_() for x in output)), labels)
    total.backward()
    assert total.isfinite() and (output.logits.grad == 0).all()


@pytest.mark.parametrize("mode", ["off", "flip", "full", "strong"])
def test_augmentation_moves_ignored_pixels_with_the_image(mode):
    """Crops whose left half is dark and ignored: where the augmented crop is dark, it is ignored."""
    images = torch.full((16, 32, 32, 3), 250, dtype=torch.uint8)
    images[:, :, :16] = 0
    coverage = torch.zeros(16, 32, 32, 3, dtype=torch.uint8)
    coverage[:, :, :16, 2] = 255
    coverage[:, 8:24, 20:28, 0] = 255
    params = augment.draw(16, mode=mode, generator=torch.Generator().manual_seed(1))
    params[:, [augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.RED, augment.BLUE]] = 1
    params[:, augment.PASTE] = 0
    pixels, fractions = augment.apply(*(x.to(DEVICE) for x in (images, coverage, params)), mode=mode)
    pixels, labels = pixels.cpu(), labels_from_coverage(fractions.cpu().round().permute(0, 2, 3, 1))
    grey = (pixels[:, 0] * augment.STD[0] + augment.MEAN[0]) / 250
    assert ((labels == IGNORED) == (grey < 0.5))[(grey - 0.5).abs() > 0.05].all()
    assert (labels == IGNORED).any()  # a box that is fitted to the target may leave them all out


def test_a_person_pasted_onto_ignored_pixels_is_no_longer_ignored():
    images, coverage = torch.zeros(2, 32, 32, 3).byte(), torch.zeros(2, 32, 32, 3).byte()
    coverage[..., 2] = 255
    coverage[1, 8:24, 8:24] = torch.tensor([255, 0, 0]).byte()
    params = augment.draw(2, mode="off", generator=torch.Generator())
    params[0, augment.PASTE] = augment.BEHIND
    _, fractions = augment._paste(
        images.permute(0, 3, 1, 2).float(), coverage.permute(0, 3, 1, 2).float(), params
    )
    labels = labels_from_coverage(fractions.round().permute(0, 2, 3, 1))
    assert (labels[0, 9:23, 9:23] == 2).all() and (labels[0, :7] == IGNORED).all()
    assert (labels[1] == labels_from_coverage(coverage[1])).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_predicted_at_an_ignored_pixel_changes_no_figure(seed):
    _, labels = a_batch(seed)
    _, predicted = a_batch(seed + 1, ignored=False)
    _, other = a_batch(seed + 2, ignored=False)
    found = []
    for one in (predicted, torch.where(labels == IGNORED, other, predicted)):
        metrics = SegmentationMetrics()
        metrics.update(one, labels)
        found.append(metrics.per_roi())
    for name, column in found[0].items():
        assert torch.equal(column.nan_to_num(-1), found[1][name].nan_to_num(-1)), name
