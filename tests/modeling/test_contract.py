"""The contract of every public loss, refinement, geometry function and of the model as a whole.

Finite forward and backward for any finite input in every precision; a bounded gradient; a sample's
output the same alone as in a batch; perfect costs nothing and worse costs more; nothing read back
from the device. The sweep takes its subjects from the modules themselves: one that is added without
an entry in the tables below fails ``test_nothing_public_is_left_out``.
"""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import EXTREME, images, label_maps, logit_maps, logits_on_the_way, perfect_logits
from scipy import ndimage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from refinelib import step as stepping
from refinelib.modeling import geometry, losses
from refinelib.modeling import layers as blocks
from refinelib.modeling import refinements as refine
from refinelib.modeling import unet as model
from refinelib.modeling.losses import MaskLoss, hierarchical_log_probs, targets_of
from refinelib.modeling.unet import HierarchicalUNet, MaskOutput

SIZE = (16, 20)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PRECISIONS = ("fp32", "autocast bf16", "autocast fp16", "bf16")


def casting(precision: str, device: str):
    if precision.startswith("autocast"):
        return torch.autocast(device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision.split()[1]])
    return nullcontext()


def all_labels(device="cpu") -> Tensor:
    return torch.stack(list(label_maps(*SIZE).values())).to(device)


# -- the losses: f(branch logits or head output, labels) -> one cost a sample -------------------------
@dataclass(frozen=True)
class Loss:
    call: Callable[[Tensor, Tensor], Tensor]
    bound: float  # on the L1 norm of one sample's gradient, as its docstring says
    perfect: Callable[[Tensor], Tensor] = perfect_logits  # what to give it for a perfect answer


PIXELS = SIZE[0] * SIZE[1]


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum as trained, as one cost a sample, the heads fed with the same values."""
    criterion = MaskLoss(active_contour_weight=0.1, boundary_aware_weight=0.1, contour_weight=0.1, distance_weight=0.1, cap=10.0)
    output = MaskOutput(logits, logits, torch.tanh(logits))
    costs = criterion.per_sample(output, labels)
    return sum(criterion.weights[name] * cost for name, cost in costs.items())


LOSSES = {
    "cross_entropy": Loss(lambda z, y: losses.cross_entropy(hierarchical_log_probs(z), y), 2.0),
    "dice": Loss(lambda z, y: losses.dice(hierarchical_log_probs(z), y), 4.0),
    "active_contour": Loss(lambda z, y: losses.active_contour(hierarchical_log_probs(z), targets_of(y), smoothness=0.1), 0.5 + 2 * 0.1),
    "boundary_aware": Loss(lambda z, y: losses.boundary_aware(hierarchical_log_probs(z), targets_of(y)), 2.0),
    "contour_head": Loss(lambda z, y: losses.contour_head(z, targets_of(y)), 1.0, lambda y: torch.where(geometry.contour_band(targets_of(y).signed), 20.0, -20.0)),
    "contour_mask": Loss(lambda z, y: losses.contour_mask(hierarchical_log_probs(z), targets_of(y)), 16 * math.sqrt(PIXELS)),
    "distance_head": Loss(lambda z, y: losses.distance_head(z, targets_of(y)), 1.0, lambda y: geometry.scaled_sdf(targets_of(y).signed)),
    "distance_mask": Loss(lambda z, y: losses.distance_mask(hierarchical_log_probs(z), targets_of(y)), 0.5),
    "MaskLoss": Loss(mask_loss, 2 + 4 + 0.1 * (0.7 + 2 + 1 + 16 * math.sqrt(PIXELS) + 1 + 0.5)),
}
#: Public in losses.py and no cost: each has a test of its own below.
NOT_COSTS = {"targets_of", "Targets", "hierarchical_log_probs", "mask_probs", "capped"}

HIDDEN, CHANNELS = 8, 16
REFINEMENTS = {
    "BoundaryRefinement": (lambda: refine.BoundaryRefinement(CHANNELS, hidden=HIDDEN), lambda m, z, f, x: m(z, f, x)),
    "ProgressiveUpsampling": (lambda: refine.ProgressiveUpsampling(CHANNELS, hidden=(HIDDEN, HIDDEN, HIDDEN)), lambda m, z, f, x: m(z, f[..., ::4, ::4])),
    "SubpixelConv": (lambda: refine.SubpixelConv(CHANNELS, hidden=HIDDEN), lambda m, z, f, x: m(z, f[..., ::2, ::2])),
    "ContourDetection": (lambda: refine.ContourDetection(CHANNELS, hidden=HIDDEN), lambda m, z, f, x: m(z, f)[0]),
    "DistanceTransform": (lambda: refine.DistanceTransform(CHANNELS, hidden=HIDDEN), lambda m, z, f, x: m(z, f)[0]),
}
NOT_REFINEMENTS = {"bounded"}
GEOMETRY = {"edt", "signed_distance", "scaled_sdf", "contour_band", "edge_vectors", "edge_strength", "to_float32"}


def public(module) -> set[str]:
    return {
        name for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
    }  # fmt: skip


def test_nothing_public_is_left_out():
    assert public(losses) == set(LOSSES) | NOT_COSTS
    assert public(refine) == set(REFINEMENTS) | NOT_REFINEMENTS
    assert public(geometry) == GEOMETRY
    assert public(model) == {"HierarchicalUNet", "UNet", "MaskOutput"}  # swept whole, below
    assert public(blocks) == {
        "GroupNorm", "Conv", "conv3x3", "Head", "Chain", "ConvNormAct", "ResidualBlock", "ChannelAttention", "SpatialAttention",
        "SelfAttention", "for_gpu", "resize", "resize_by_products",
    }


def test_every_bound_is_in_its_docstring():
    for name in set(LOSSES) - {"MaskLoss"}:
        text = inspect.getdoc(getattr(losses, name))
        assert "Gradient: at" in text.replace("\n", " "), name


# -- losses ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_finite_with_a_bounded_gradient(name, precision, device):
    loss, labels = LOSSES[name], all_labels(device)
    for kind, values in logit_maps(labels.cpu()).items():
        logits = values.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_()
        with casting(precision, device):
            cost = loss.call(logits, labels)
            (gradient,) = torch.autograd.grad(cost.sum(), logits)
        assert cost.shape == labels.shape[:1] and cost.dtype == torch.float32
        assert torch.isfinite(cost).all(), (kind, cost)
        norms = gradient.float().abs().sum(dim=(1, 2, 3))
        assert torch.isfinite(norms).all(), kind
        assert (norms <= loss.bound * 1.02 + 1e-6).all(), (kind, norms.max())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", LOSSES)
def test_loss_on_random_maps(name, data):
    """Hypothesis looks for a label map and logits that break finiteness or the bound."""
    height, width = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    cells = st.lists(st.integers(0, 2), min_size=height * width, max_size=height * width)
    labels = torch.tensor(data.draw(cells)).view(1, height, width)
    numbers = st.floats(-EXTREME, EXTREME, width=32)
    values = data.draw(st.lists(numbers, min_size=2 * height * width, max_size=2 * height * width))
    logits = torch.tensor(values).view(1, 2, height, width).requires_grad_()
    cost = LOSSES[name].call(logits, labels)
    (gradient,) = torch.autograd.grad(cost.sum(), logits)
    assert torch.isfinite(cost).all() and torch.isfinite(gradient).all()
    assert gradient.abs().sum() <= LOSSES[name].bound * 1.02 + 1e-6  # PIXELS here is no smaller than these maps
    assert cost.min() >= -1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_sample_does_not_depend_on_the_batch(name, device):
    loss, labels = LOSSES[name], all_labels(device)
    logits = logit_maps(labels.cpu())["noise"].to(device) * 5
    together = loss.call(logits, labels)
    alone = torch.cat([loss.call(z[None], y[None]) for z, y in zip(logits, labels)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(loss.call(logits[order], labels[order]), together[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"MaskLoss"}))
def test_perfect_costs_nothing_and_worse_costs_more(name):
    loss, labels = LOSSES[name], all_labels()
    best = loss.perfect(labels)
    assert (loss.call(best, labels).abs() < 2e-3).all()
    if loss.perfect is perfect_logits:
        way = [logits_on_the_way(labels, t / 10) for t in range(11)]
    else:  # a head: its own answer, turned into its opposite
        way = [best * (1 - 2 * t / 10) for t in range(11)]
    costs = torch.stack([loss.call(values, labels) for values in way])
    # Nowhere does a worse answer cost less (1e-5: rounding), and in the end it has cost more.
    assert (costs.diff(dim=0) >= -1e-5).all(), costs.diff(dim=0).min()
    assert (costs[5] > costs[0] + 1e-3).all() and (costs[-1] > costs[5] + 1e-3).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"MaskLoss"}))
def test_a_mask_in_the_wrong_place_costs_more_than_in_the_right_one(name):
    loss = LOSSES[name]
    labels = label_maps(*SIZE)["blob"][None]
    best = loss.perfect(labels)
    right = loss.call(best, labels)
    shifted = [loss.call(best.roll(pixels, dims=-1), labels) for pixels in (1, 2, 4, 6)]
    assert all(cost > right + 1e-3 for cost in shifted)
    if name not in ("contour_head", "contour_mask"):  # a contour wholly beside the true one is as wrong as can be
        assert all(a < b for a, b in zip(shifted, shifted[1:]))


def test_a_perfect_sum_costs_nothing():
    labels = all_labels()
    truth = targets_of(labels)
    criterion = MaskLoss(active_contour_weight=0.1, boundary_aware_weight=0.1, contour_weight=0.1, distance_weight=0.1)
    output = MaskOutput(perfect_logits(labels), torch.where(geometry.contour_band(truth.signed), 20.0, -20.0), geometry.scaled_sdf(truth.signed))
    total, parts = criterion(output, labels)
    assert total.abs() < 2e-3 and parts.abs().max() < 2e-3
    wrong, _ = criterion(MaskOutput(*(-x for x in output)), labels)
    assert wrong > 5


SMOOTH = ["cross_entropy", "dice", "active_contour", "boundary_aware", "contour_head", "contour_mask", "distance_head", "distance_mask"]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck_in_float64(name):
    labels = torch.stack([label_maps(6, 7)[kind] for kind in ("blob", "empty", "three-colour checkerboard")])
    logits = torch.randn(3, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name].call(z, labels), logits)


def test_log_probs_are_exact_products_of_the_branches():
    logits = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    person, target = torch.sigmoid(logits).unbind(1)
    expected = torch.stack([1 - person, person * target, person * (1 - target)], dim=1)
    torch.testing.assert_close(hierarchical_log_probs(logits).exp(), expected)
    masks = losses.mask_probs(hierarchical_log_probs(logits))
    torch.testing.assert_close(masks, torch.stack([person, person * target], dim=1))
    extreme = hierarchical_log_probs(torch.tensor([EXTREME, -EXTREME]).view(1, 2, 1, 1))
    assert torch.isfinite(extreme).all()
    # A half-sure person branch is half-sure in the classes: nothing is added to both sides.
    assert hierarchical_log_probs(torch.zeros(1, 2, 1, 1)).exp().flatten().tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_cap_holds_the_value_and_keeps_the_gradients_direction():
    x = torch.tensor([0.5, 30.0, 2.0], requires_grad=True)
    cost = losses.capped(x.square(), 10.0)
    assert cost.tolist() == pytest.approx([0.25, 10.0, 4.0])
    (gradient,) = torch.autograd.grad(cost.sum(), x)
    assert gradient.tolist() == pytest.approx([1.0, 60.0 * 10 / 900, 4.0])
    assert math.isnan(losses.capped(torch.tensor(math.nan), 10.0)) and losses.capped(x, None) is x


def test_an_absent_class_neither_costs_nor_pulls_in_dice():
    labels = label_maps(*SIZE)["blob"][None]
    assert losses.dice(hierarchical_log_probs(perfect_logits(labels)), labels).item() < 1e-3
    log_probs = hierarchical_log_probs(torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(0)))
    probs = log_probs.exp()[0]
    by_hand = [
        1 - (2 * probs[c][labels[0] == c].sum() + 1) / (probs[c].sum() + (labels == c).sum() + 1) for c in (0, 1)  # nobody is class 2
    ]
    assert losses.dice(log_probs, labels).item() == pytest.approx(float(sum(by_hand)) / 2, rel=1e-5)


def test_boundary_aware_weights_are_those_of_the_formula():
    labels = label_maps(*SIZE)["blob beside another"][None]
    logits = torch.randn(1, 2, *SIZE)
    person, target = (labels[0] > 0).numpy(), (labels[0] == 1).numpy()
    inside = lambda m: ndimage.distance_transform_edt(m) - 0.5  # noqa: E731
    distance = np.minimum(*(np.where(m, inside(m), inside(~m)) for m in (person, target)))
    weights = 1 + 5 * np.exp(-(distance**2) / (2 * 2.0**2))
    surprise = -hierarchical_log_probs(logits).gather(1, labels[:, None])[0, 0].numpy()
    expected = (weights * surprise).sum() / weights.sum()
    assert losses.boundary_aware(hierarchical_log_probs(logits), targets_of(labels)).item() == pytest.approx(expected, rel=1e-5)


# -- refinements -----------------------------------------------------------------------------------
def refinement_case(name: str, precision: str, device: str, trained: bool):
    torch.manual_seed(0)
    build, call = REFINEMENTS[name]
    module = build()
    if trained:  # as far from its gentle start as a long training could bring it
        for parameter in module.parameters():
            parameter.data += torch.randn_like(parameter)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = module.to(device, dtype)
    labels = all_labels(device)
    count = len(labels)
    features = torch.randn(count, CHANNELS, *SIZE, device=device, dtype=dtype)
    features[0] = 0  # a flat crop
    image = images(count, *SIZE)["noise"].to(device, dtype)
    image[0] = 0
    return module, call, labels, features.requires_grad_(), image


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_is_finite_bounded_and_the_identity_to_the_gradient(name, trained, precision, device):
    module, call, labels, features, image = refinement_case(name, precision, device, trained)
    reach = module.blend.detach().float().abs() * refine.LIMIT * (1 + getattr(module, "threshold", torch.zeros(())).detach().abs())
    for kind, values in logit_maps(labels.cpu()).items():
        logits = values.to(device).requires_grad_()
        with casting(precision, device):
            new = call(module, logits, features, image)
        assert new.shape == logits.shape and new.dtype == torch.float32
        assert torch.isfinite(new).all(), kind
        # 2e-3: the spacing of float32 at 1e4, where the residual is added.
        assert ((new - logits).abs() <= reach * 1.01 + 2e-3).all(), kind
        weight = torch.randn_like(new)
        found = torch.autograd.grad((new * weight).sum(), [logits, features, *module.parameters()], allow_unused=True)
        torch.testing.assert_close(found[0], weight)  # the bound, 1, is met exactly
        assert all(g is None or torch.isfinite(g).all() for g in found), kind


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_of_a_sample_does_not_depend_on_the_batch(name, device):
    module, call, labels, features, image = refinement_case(name, "fp32", device, trained=True)
    logits = logit_maps(labels.cpu())["noise"].to(device)
    with torch.no_grad():
        together = call(module, logits, features, image)
        alone = torch.cat([call(module, *(x[i : i + 1] for x in (logits, features, image))) for i in range(len(labels))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", [0.01, 0.1])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_is_harmless_at_the_start(name, blend):
    module, call, labels, features, image = refinement_case(name, "fp32", "cpu", trained=False)
    module.blend.data.fill_(blend)
    logits = logit_maps(labels)["noise"]
    change = (call(module, logits, features, image) - logits).abs()
    assert change.max() < 8 * blend and change.mean() < 2 * blend


@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_gradcheck_in_float64(name):
    torch.manual_seed(0)
    build, call = REFINEMENTS[name]
    module = build().double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    logits, features, image = (torch.randn(1, c, 4, 4, dtype=torch.float64) for c in (2, CHANNELS, 3))
    assert torch.autograd.gradcheck(lambda f: call(module, logits, f, image), features.requires_grad_(), atol=1e-4)


def test_subpixel_convolution_starts_without_a_checkerboard():
    torch.manual_seed(0)
    module = refine.SubpixelConv(CHANNELS, hidden=HIDDEN)
    logits = torch.zeros(1, 2, 32, 32)
    change = module(logits, torch.randn(1, CHANNELS, 16, 16))
    assert change.abs().max() > 0
    for cell in (change[..., ::2, 1::2], change[..., 1::2, ::2], change[..., 1::2, 1::2]):
        torch.testing.assert_close(change[..., ::2, ::2], cell)


def test_gate_opens_at_edges_and_where_undecided_only():
    torch.manual_seed(0)
    module = refine.BoundaryRefinement(CHANNELS, hidden=HIDDEN)
    logits = torch.full((1, 2, 16, 16), -20.0)
    logits[..., 8:] = 20.0  # a sharp edge in a decided mask
    change = (module(logits, torch.randn(1, CHANNELS, 16, 16), torch.randn(1, 3, 16, 16)) - logits).abs().amax(dim=(0, 1, 2))
    assert change[7:9].min() > 10 * change[:5].max() and change[7:9].min() > 10 * change[11:].max()


# -- the model as a whole --------------------------------------------------------------------------
def small_model(**keywords) -> HierarchicalUNet:
    torch.manual_seed(0)
    return HierarchicalUNet(width=0.0625, roi_size=(24, 32), **keywords)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_model_and_loss_are_finite(precision, device):
    network = small_model().to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    criterion = MaskLoss(active_contour_weight=0.1, boundary_aware_weight=0.1, contour_weight=0.1, distance_weight=0.1)
    every = torch.stack(list(label_maps(24, 32).values())).to(device)
    kinds = list(images(1, 24, 32))
    for number, kind in enumerate(kinds):
        # fp16 convolutions take most of a minute on a CPU: there, each label map meets one picture only.
        labels = every[number :: len(kinds)] if (precision, device) == ("autocast fp16", "cpu") else every
        picture = images(len(labels), 24, 32)[kind]
        with casting(precision, device):
            output = network(picture.to(device, network.coordinates.dtype if precision != "bf16" else torch.bfloat16))
        assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in output), kind
        total, parts = criterion(output, labels)
        network.zero_grad()
        total.backward()
        assert torch.isfinite(total) and torch.isfinite(parts).all(), kind
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), (kind, name)


@pytest.mark.parametrize("device", DEVICES)
def test_model_output_of_a_sample_does_not_depend_on_the_batch(device):
    network = small_model().to(device).eval()
    picture = images(4, 24, 32)["noise"].to(device)
    with torch.no_grad():
        together = network(picture)
        for i in range(4):
            for whole, one in zip(together, network(picture[i : i + 1])):
                torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-4, atol=2e-4)


def test_contour_and_distance_reach_the_mask():
    network = small_model()
    for module in (network.contour, network.distance):
        module.blend.data.fill_(0.5)
    output = network(torch.randn(2, 3, 24, 32))
    reached = torch.autograd.grad(output.logits.square().sum(), [network.contour.head.weight, network.distance.head.weight])
    assert all(g.abs().max() > 0 for g in reached)


@pytest.mark.parametrize("switch", ["boundary_refinement", "progressive_upsampling", "subpixel_conv", "contour_detection", "distance_transform"])
def test_each_refinement_switches_on_by_itself(switch):
    off = dict.fromkeys(["use_boundary_refinement", "use_progressive_upsampling", "use_subpixel_conv", "use_contour_detection", "use_distance_transform"], False)
    plain, one = small_model(**off), small_model(**{**off, f"use_{switch}": True})
    names = {n.split(".")[0] for n, _ in one.named_parameters()} - {n.split(".")[0] for n, _ in plain.named_parameters()}
    assert len(names) == 1
    output = one(torch.randn(2, 3, 24, 32))
    assert (output.contour_logits is not None) == (switch == "contour_detection")
    assert (output.distance is not None) == (switch == "distance_transform")


def test_full_width_has_the_size_it_was_written_for():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = HierarchicalUNet(width=1.0)
        sizes = {name: p.numel() for name, p in network.named_parameters()}
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 64, 64))
    looking = sum(size for name, size in sizes.items() if name.startswith(("person.attention.", "target.attention.")))  # came later
    assert sum(sizes.values()) - looking == pytest.approx(23e6, rel=0.03) and 0 < looking < 1.3e6
    assert counter.get_total_flops() == pytest.approx(122e9, rel=0.03)


# -- geometry --------------------------------------------------------------------------------------
def masks_to_try(draw) -> Tensor:
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    cells = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return torch.tensor(cells).view(height, width)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edt_equals_scipy(data):
    mask = masks_to_try(data.draw)
    found = geometry.edt(mask)
    if mask.any():
        np.testing.assert_allclose(found.numpy(), ndimage.distance_transform_edt(~mask.numpy()), atol=1e-5)
    else:
        assert (found == found.flatten()[0]).all() and found.flatten()[0] >= math.hypot(*mask.shape) - 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_edt_batched_and_large_equals_scipy(device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 2, 100, 140, generator=generator) < torch.tensor([0.001, 0.05, 0.9]).view(3, 1, 1, 1)
    masks[:, :, 50, 70] = True
    expected = np.stack([[ndimage.distance_transform_edt(~m.numpy()) for m in pair] for pair in masks])
    np.testing.assert_allclose(geometry.edt(masks.to(device)).cpu().numpy(), expected, atol=1e-5)
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 100_000)  # in many pieces
    np.testing.assert_allclose(geometry.edt(masks.to(device)).cpu().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", label_maps(*SIZE))
def test_signed_distance_and_band_are_symmetric(kind):
    mask = label_maps(*SIZE)[kind] == 1
    signed = geometry.signed_distance(mask)
    torch.testing.assert_close(geometry.signed_distance(~mask), -signed)
    assert torch.equal(signed > 0, mask) and torch.isfinite(signed).all()
    for turned in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)):
        torch.testing.assert_close(geometry.signed_distance(turned(mask)), turned(signed))
    band = geometry.contour_band(signed)
    neighbours = ndimage.binary_dilation(mask.numpy(), np.ones((3, 3))) & ~mask.numpy() | ndimage.binary_dilation(~mask.numpy(), np.ones((3, 3))) & mask.numpy()
    assert np.array_equal(band.numpy(), neighbours)  # exactly one pixel on either side
    scaled = geometry.scaled_sdf(signed, clip=4.0)
    assert scaled.abs().max() <= 1 and torch.equal(scaled > 0, mask)


def test_edge_strength_has_a_gradient_everywhere_and_the_right_size():
    for size in (1e-20, 1e-3, 1.0, 2e4):
        for pattern in (torch.zeros(6, 6), torch.eye(6), (torch.arange(36).view(6, 6) % 2).float()):
            x = (pattern * size).requires_grad_()
            strength = geometry.edge_strength(x)
            (gradient,) = torch.autograd.grad(strength.sum(), x)
            assert torch.isfinite(strength).all() and torch.isfinite(gradient).all() and gradient.abs().max() < 4
            assert strength.min() >= 0
    flat = geometry.edge_strength(torch.full((5, 5), 0.3))
    assert flat.abs().max() == 0
    step = torch.zeros(5, 6)
    step[:, 3:] = 1
    assert geometry.edge_strength(step).sum().item() == pytest.approx(5, abs=0.06)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(geometry.edge_strength, x)


# -- nothing is read back from the device ----------------------------------------------------------
class Reads(TorchDispatchMode):
    """Notes every operation that a GPU would have to wait for the host on."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in self.FORBIDDEN):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_reader_sees_a_read():
    with Reads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(reads.found) == 2


@pytest.mark.parametrize("name", [*LOSSES, *REFINEMENTS, "model"])
def test_nothing_is_read_back(name):
    labels = all_labels()
    with Reads() as reads:
        if name in LOSSES:
            logits = torch.randn(len(labels), 2, *SIZE, requires_grad=True)
            LOSSES[name].call(logits, labels).sum().backward()
        elif name in REFINEMENTS:
            module, call, labels, features, image = refinement_case(name, "fp32", "cpu", trained=True)
            call(module, torch.randn(len(labels), 2, *SIZE, requires_grad=True), features, image).sum().backward()
        else:
            network = small_model()
            MaskLoss(contour_weight=1.0)(network(torch.randn(2, 3, 24, 32)), torch.ones(2, 24, 32, dtype=torch.int64))[0].backward()
    assert reads.found == []


# -- compiled --------------------------------------------------------------------------------------
# On a CPU the kernels alone would take minutes of compiling: there, the graphs they are made from, and the kernels of each kind of layer;
# on a GPU all of it in every precision.
BACKEND = {"cpu": "aot_eager", "cuda": "inductor"}
#: What the compiler is told for small batches and for large ones.
OPTIONS = {"cpu": [None], "cuda": [stepping.FEWER_KERNELS, stepping.LESS_TRAFFIC]}
WAYS = [(device, options) for device in DEVICES for options in OPTIONS[device]]


@pytest.mark.parametrize(("device", "options"), WAYS)
def test_compiled_losses_equal_eager_ones(device, options):
    labels = all_labels(device)

    def everything(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([loss.call(logits, labels) for loss in LOSSES.values()])

    compiled = torch.compile(everything, dynamic=False, fullgraph=True, backend=BACKEND[device], options=options)
    for kind, values in logit_maps(labels.cpu()).items():
        results = []
        for function in (everything, compiled):
            logits = values.to(device).clone().requires_grad_()
            costs = function(logits, labels)
            (gradient,) = torch.autograd.grad(costs.sum(), logits)
            results.append((costs, gradient))
            assert torch.isfinite(costs).all() and torch.isfinite(gradient).all(), kind
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("device", "options"), WAYS)
def test_compiled_layers_are_finite_and_equal_eager_ones(device, options):
    """Each kind of layer once, in half precision, on pictures that are flat and pictures that are not."""
    torch.manual_seed(0)
    attention = blocks.SelfAttention(16)
    for last in (attention.out, attention.perceptron[-1]):
        nn.init.normal_(last.weight, std=0.1)
    layers = nn.Sequential(
        blocks.ConvNormAct(3, 16, stride=2), blocks.ResidualBlock(16), attention, blocks.ChannelAttention(16), blocks.SpatialAttention(), blocks.Head(16, 2)
    ).to(device)  # fmt: skip
    compiled = torch.compile(layers, dynamic=False, fullgraph=True, options=options)
    for kind, picture in images(3, 24, 32).items():
        found = []
        for function in (layers, compiled):
            layers.zero_grad()
            with casting("autocast bf16", device):
                output = function(picture.to(device))
            output.square().mean().backward()
            found.append((output.detach(), torch.cat([p.grad.flatten() for p in layers.parameters()])))
            assert all(torch.isfinite(x).all() for x in found[-1]), kind
        torch.testing.assert_close(found[0][0], found[1][0], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(("device", "options", "precision"), [(*way, precision) for way in WAYS for precision in (PRECISIONS if way[0] == "cuda" else ("autocast bf16",))])
def test_compiled_model_is_finite_and_equals_eager(device, options, precision):

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = small_model().to(device, dtype)
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend=BACKEND[device], options=options)
    criterion = MaskLoss(active_contour_weight=0.1, boundary_aware_weight=0.1, contour_weight=0.1, distance_weight=0.1)
    labels = torch.stack(list(label_maps(24, 32).values())).to(device)
    for kind, picture in images(len(labels), 24, 32).items():
        totals, gradients = [], []
        for function in (network, compiled):
            network.zero_grad()
            with casting(precision, device):
                output = function(picture.to(device, dtype))
            total, _ = criterion(output, labels)
            total.backward()
            totals.append(total.detach())
            gradients.append(torch.cat([p.grad.flatten().float() for p in network.parameters()]))
        assert all(torch.isfinite(g).all() for g in (*totals, *gradients)), kind
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-3 if precision == "fp32" else 3e-2, atol=1e-4)
        if precision == "fp32":
            assert (gradients[0] - gradients[1]).norm() <= 2e-2 * gradients[0].norm() + 1e-4, kind
