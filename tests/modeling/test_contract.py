"""The contract of every registered loss and refinement, of the geometry and of the model as a whole.

Finite forward and backward for any finite input in every precision; a bounded gradient; a sample's
output the same alone as in a batch; perfect costs nothing and worse costs more; nothing read back
from the device. A part that is registered in the package is tested with the rest; its bound is in ``BOUNDS``.
"""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext

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
from refinelib.modeling import geometry, layers, losses
from refinelib.modeling import refinements as refine
from refinelib.modeling.losses import MaskLoss, Prediction, targets_of
from refinelib.modeling.output import MaskOutput, hierarchical_log_probs, mask_probs
from refinelib.modeling.unet import HierarchicalUNet
from refinelib.registry import LOSSES, REFINEMENTS

SIZE = (16, 20)
PIXELS = SIZE[0] * SIZE[1]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PRECISIONS = ("fp32", "autocast bf16", "autocast fp16", "bf16")


def casting(precision: str, device: str):
    if precision.startswith("autocast"):
        return torch.autocast(
            device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision.split()[1]]
        )
    return nullcontext()


def all_labels(device="cpu", size=SIZE) -> Tensor:
    return torch.stack(list(label_maps(*size).values())).to(device)


# -- the losses: f(model output, labels) -> one cost a sample -----------------------------------------
#: On the L1 norm of one sample's gradient, as the docstrings say; the parts of two losses by themselves.
BOUNDS = {
    "ce": 2.0,
    "dice": 4.0,
    "active_contour": 0.5 + 2 * 0.1,
    "boundary_aware": 2.0,
    "contour": 1 + 16 * math.sqrt(PIXELS),
    "distance": 1 + 0.5,
    "contour head": 1.0,
    "contour mask": 16 * math.sqrt(PIXELS),
    "distance head": 1.0,
    "distance mask": 0.5,
}
PARTS = {
    "contour head": lambda p, t: losses.contour_head(p.output.contour_logits, t),
    "contour mask": lambda p, t: losses.contour_mask(p.log_probs, t),
    "distance head": lambda p, t: losses.distance_head(p.output.distance, t),
    "distance mask": lambda p, t: losses.distance_mask(p.log_probs, t),
}
FUNCTIONS = {name: term.function for name, term in LOSSES.items()} | PARTS
#: Every loss at the weights of the recipes, capped.
WEIGHTS = {name: 1.0 if name in ("ce", "dice") else 0.1 for name in LOSSES}
BOUNDS["sum"] = sum(weight * BOUNDS[name] for name, weight in WEIGHTS.items())
NAMES = [*FUNCTIONS, "sum"]
SUM = MaskLoss(WEIGHTS, cap=10.0)


def cost(name: str, output: MaskOutput, labels: Tensor) -> Tensor:
    if name == "sum":
        return sum(WEIGHTS[term] * value for term, value in SUM.per_sample(output, labels).items())
    return FUNCTIONS[name](Prediction(hierarchical_log_probs(output.logits), output), targets_of(labels))


def cost_of(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Every head fed with the same values."""
    return cost(name, MaskOutput(logits, logits, torch.tanh(logits)), labels)


def perfect(labels: Tensor) -> MaskOutput:
    signed = targets_of(labels).signed
    contour = torch.where(geometry.contour_band(signed), 20.0, -20.0)
    return MaskOutput(perfect_logits(labels), contour, geometry.scaled_sdf(signed))


def test_every_bound_is_in_its_docstring():
    functions = [
        value for name, value in vars(losses).items() if inspect.isfunction(value) and name[0] != "_"
    ]
    costs = [f for f in functions if f.__module__ == losses.__name__ and f not in (targets_of, losses.capped)]
    assert len(costs) == 8
    for function in costs:
        assert "Gradient: at" in inspect.getdoc(function).replace("\n", " "), function


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_with_a_bounded_gradient(name, precision, device):
    labels = all_labels(device)
    for kind, values in logit_maps(labels.cpu()).items():
        logits = values.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_()
        with casting(precision, device):
            found = cost_of(name, logits, labels)
            (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found.shape == labels.shape[:1] and found.dtype == torch.float32
        assert torch.isfinite(found).all(), (kind, found)
        norms = gradient.float().abs().sum(dim=(1, 2, 3))
        assert torch.isfinite(norms).all(), kind
        assert (norms <= BOUNDS[name] * 1.02 + 1e-6).all(), (kind, norms.max())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_loss_on_random_maps(name, data):
    """Hypothesis looks for a label map and logits that break finiteness or the bound."""
    height, width = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    cells = st.lists(st.integers(0, 2), min_size=height * width, max_size=height * width)
    labels = torch.tensor(data.draw(cells)).view(1, height, width)
    numbers = st.floats(-EXTREME, EXTREME, width=32)
    values = data.draw(st.lists(numbers, min_size=2 * height * width, max_size=2 * height * width))
    logits = torch.tensor(values).view(1, 2, height, width).requires_grad_()
    found = cost_of(name, logits, labels)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    assert gradient.abs().sum() <= BOUNDS[name] * 1.02 + 1e-6  # PIXELS here is no smaller than these maps
    assert found.min() >= -1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_a_sample_does_not_depend_on_the_batch(name, device):
    labels = all_labels(device)
    logits = logit_maps(labels.cpu())["noise"].to(device) * 5
    together = cost_of(name, logits, labels)
    alone = torch.cat([cost_of(name, z[None], y[None]) for z, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_costs_nothing_and_worse_costs_more(name):
    labels = all_labels()
    best = perfect(labels)
    way = [best] + [
        MaskOutput(logits_on_the_way(labels, t / 10), best[1] * (1 - t / 5), best[2] * (1 - t / 5))
        for t in range(1, 11)
    ]
    costs = torch.stack([cost(name, output, labels) for output in way])
    assert (costs[0].abs() < 2e-3).all()
    # Nowhere does a worse answer cost less (1e-5: rounding), and in the end it has cost more.
    assert (costs.diff(dim=0) >= -1e-5).all(), costs.diff(dim=0).min()
    assert (costs[5] > costs[0] + 1e-3).all() and (costs[-1] > costs[5] + 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_in_the_wrong_place_costs_more_than_in_the_right_one(name):
    labels = label_maps(*SIZE)["blob"][None]
    best = perfect(labels)
    right = cost(name, best, labels)
    shifted = [cost(name, MaskOutput(*(x.roll(n, dims=-1) for x in best)), labels) for n in (1, 2, 4, 6)]
    assert all(wrong > right + 1e-3 for wrong in shifted)
    if "contour " not in name and name != "contour":  # a contour beside the true one is as wrong as can be
        assert all(a < b for a, b in zip(shifted, shifted[1:], strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_float64(name):
    labels = torch.stack([label_maps(6, 7)[kind] for kind in ("blob", "empty", "three-colour checkerboard")])
    logits = torch.randn(3, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: cost_of(name, z, labels), logits.requires_grad_())


def test_a_loss_that_nobody_registered_is_refused_with_those_there_are():
    with pytest.raises(KeyError, match="no loss 'dise'; there are ce, dice, "):
        MaskLoss({"dise": 1.0})
    with pytest.raises(KeyError, match="no loss has the option 'smooth'; there are ce_weight"):
        MaskLoss({"dice": 1.0}, {"smooth": 2.0})
    with pytest.raises(ValueError, match="the distance loss needs distance, and the model has no such head"):
        MaskLoss({"distance": 1.0})(MaskOutput(torch.zeros(1, 2, *SIZE)), all_labels()[:1])
    with pytest.raises(
        TypeError, match="no refinement has the option 'use_magic'; there are use_progressive"
    ):
        small_model(use_magic=True)


def test_options_and_weights_reach_the_losses():
    labels = all_labels()
    output = MaskOutput(logit_maps(labels)["noise"])
    log_probs, targets = hierarchical_log_probs(output.logits), targets_of(labels)
    options = {"active_contour_smoothness": 0.7, "boundary_weight": 2.0}
    criterion = MaskLoss({"active_contour": 3.0, "dice": 0.0, "boundary_aware": 1.0}, options)
    total, parts = criterion(output, labels)
    assert criterion.names == ("active_contour", "boundary_aware")
    contour = losses.active_contour(log_probs, targets, smoothness=0.7).mean()
    boundary = losses.boundary_aware(log_probs, targets, boundary_weight=2.0).mean()
    torch.testing.assert_close(parts, torch.stack([contour, boundary]))
    torch.testing.assert_close(total, 3 * contour + boundary)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_lies_outside_the_window_counts_in_no_loss(data):
    height, width = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12))
    across, down = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    size = (height + 2 * down, width + 2 * across)
    labels = torch.randint(0, 3, (2, *size), generator=seed)
    heads = [torch.randn(2, 2, *size, generator=seed).requires_grad_() for _ in range(3)]
    windowed = MaskLoss(WEIGHTS, cap=10.0, window=(height, width))

    def inside(x: Tensor) -> Tensor:
        return x[..., down : down + height, across : across + width]

    total, parts = windowed(MaskOutput(*heads), labels)
    expected, expected_parts = SUM(MaskOutput(*map(inside, heads)), inside(labels))
    assert torch.equal(total, expected) and torch.equal(parts, expected_parts)
    for gradient in torch.autograd.grad(total, heads):
        assert inside(gradient).any() and gradient.count_nonzero() == inside(gradient).count_nonzero()


def test_log_probs_are_exact_products_of_the_branches():
    logits = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    person, target = torch.sigmoid(logits).unbind(1)
    expected = torch.stack([1 - person, person * target, person * (1 - target)], dim=1)
    torch.testing.assert_close(hierarchical_log_probs(logits).exp(), expected)
    masks = mask_probs(hierarchical_log_probs(logits))
    torch.testing.assert_close(masks, torch.stack([person, person * target], dim=1))
    extreme = hierarchical_log_probs(torch.tensor([EXTREME, -EXTREME]).view(1, 2, 1, 1))
    assert torch.isfinite(extreme).all()
    # A half-sure person branch is half-sure in the classes: nothing is added to both sides.
    assert hierarchical_log_probs(torch.zeros(1, 2, 1, 1)).exp().flatten().tolist() == pytest.approx(
        [0.5, 0.25, 0.25]
    )


def test_cap_holds_the_value_and_keeps_the_gradients_direction():
    x = torch.tensor([0.5, 30.0, 2.0], requires_grad=True)
    cost = losses.capped(x.square(), 10.0)
    assert cost.tolist() == pytest.approx([0.25, 10.0, 4.0])
    (gradient,) = torch.autograd.grad(cost.sum(), x)
    assert gradient.tolist() == pytest.approx([1.0, 60.0 * 10 / 900, 4.0])
    assert math.isnan(losses.capped(torch.tensor(math.nan), 10.0)) and losses.capped(x, None) is x


def test_a_cap_holds_for_the_refinements_losses_alone():
    labels = label_maps(*SIZE)["blob"][None]
    wrong = MaskOutput(-20 * perfect_logits(labels))
    for cap in (0.01, None):
        loss = MaskLoss({"ce": 1.0, "boundary_aware": 1.0}, cap=cap)
        costs = loss.per_sample(wrong, labels)
        assert costs["ce"] > 1 and (costs["boundary_aware"] > 1) == (cap is None), (cap, costs)


def test_an_absent_class_neither_costs_nor_pulls_in_dice():
    labels = label_maps(*SIZE)["blob"][None]
    assert losses.dice(hierarchical_log_probs(perfect_logits(labels)), labels).item() < 1e-3
    log_probs = hierarchical_log_probs(torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(0)))
    probs = log_probs.exp()[0]
    by_hand = [
        1 - (2 * probs[c][labels[0] == c].sum() + 1) / (probs[c].sum() + (labels == c).sum() + 1)
        for c in (0, 1)  # nobody is class 2
    ]
    assert losses.dice(log_probs, labels).item() == pytest.approx(float(sum(by_hand)) / 2, rel=1e-5)


def test_boundary_aware_weights_are_those_of_the_formula():
    labels = label_maps(*SIZE)["blob beside another"][None]
    logits = torch.randn(1, 2, *SIZE)
    person, target = (labels[0] > 0).numpy(), (labels[0] == 1).numpy()
    edt = ndimage.distance_transform_edt
    distance = np.minimum(*(np.where(m, edt(m), edt(~m)) - 0.5 for m in (person, target)))
    weights = 1 + 5 * np.exp(-(distance**2) / (2 * 2.0**2))
    surprise = -hierarchical_log_probs(logits).gather(1, labels[:, None])[0, 0].numpy()
    expected = (weights * surprise).sum() / weights.sum()
    assert losses.boundary_aware(hierarchical_log_probs(logits), targets_of(labels)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_contour_and_others_count_alone_where_there_are_no_others_or_no_contour():
    undecided = torch.zeros(1, 2, 1, 2)
    for row in ([0, 0], [0, 1]):  # no contour; both pixels are contour
        cost = losses.contour_head(undecided, targets_of(torch.tensor([[row]])))
        assert cost.item() == pytest.approx(math.log(2))


def test_an_option_has_the_default_of_its_functions_parameter():
    pairs = [
        (inspect.signature(term.function).parameters[option.name].default, option.default)
        for name, term in LOSSES.items()
        for option in LOSSES.options(name)
        if option.name in inspect.signature(term.function).parameters
    ]
    assert len(pairs) == 2 and all(own == other for own, other in pairs)


# -- refinements -----------------------------------------------------------------------------------
HIDDEN, CHANNELS = 8, 16
FEATURES = {"fine": 1, "half": 2, "quarter": 4}  # pixels along a side of a cell


def make_refinement(name: str) -> nn.Module:
    torch.manual_seed(0)
    part = REFINEMENTS[name]
    known = {"hidden": HIDDEN, "blend_init": 0.1, "scale": 2}
    return part.module(CHANNELS, **{name: known[name] for name in part.takes})


def call(name: str, module: nn.Module, logits: Tensor, features: Tensor, image: Tensor) -> Tensor:
    given = {kind: features[..., ::step, ::step] for kind, step in FEATURES.items()} | {"image": image}
    part = REFINEMENTS[name]
    found = module(logits, *(given[kind] for kind in part.inputs))
    return found if part.head is None else found[0]


def refinement_case(name: str, precision: str, device: str, trained: bool):
    module = make_refinement(name)
    if trained:  # as far from its gentle start as a long training could bring it
        for parameter in module.parameters():
            parameter.data += torch.randn_like(parameter)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    labels = all_labels(device)
    features = torch.randn(len(labels), CHANNELS, *SIZE, device=device, dtype=dtype)
    image = images(len(labels), *SIZE)["noise"].to(device, dtype)
    features[0] = image[0] = 0  # a flat crop
    return module.to(device, dtype), labels, features.requires_grad_(), image


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_is_finite_bounded_and_the_identity_to_the_gradient(name, trained, precision, device):
    module, labels, features, image = refinement_case(name, precision, device, trained)
    threshold = getattr(module, "threshold", torch.zeros(())).detach().abs()
    reach = module.blend.detach().float().abs() * refine.LIMIT * (1 + threshold)
    for kind, values in logit_maps(labels.cpu()).items():
        logits = values.to(device).requires_grad_()
        with casting(precision, device):
            new = call(name, module, logits, features, image)
        assert new.shape == logits.shape and new.dtype == torch.float32
        assert torch.isfinite(new).all(), kind
        # 2e-3: the spacing of float32 at 1e4, where the residual is added.
        assert ((new - logits).abs() <= reach * 1.01 + 2e-3).all(), kind
        weight = torch.randn_like(new)
        inputs = [logits, features, *module.parameters()]
        found = torch.autograd.grad((new * weight).sum(), inputs, allow_unused=True)
        torch.testing.assert_close(found[0], weight)  # the bound, 1, is met exactly
        assert all(g is None or torch.isfinite(g).all() for g in found), kind


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_of_a_sample_does_not_depend_on_the_batch(name, device):
    module, labels, features, image = refinement_case(name, "fp32", device, trained=True)
    given = logit_maps(labels.cpu())["noise"].to(device), features, image
    with torch.no_grad():
        together = call(name, module, *given)
        alone = [call(name, module, *(x[i : i + 1] for x in given)) for i in range(len(labels))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", [0.01, 0.1])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_is_harmless_at_the_start(name, blend):
    module, labels, features, image = refinement_case(name, "fp32", "cpu", trained=False)
    module.blend.data.fill_(blend)
    logits = logit_maps(labels)["noise"]
    change = (call(name, module, logits, features, image) - logits).abs()
    assert change.max() < 8 * blend and change.mean() < 2 * blend


@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_gradcheck_in_float64(name):
    module = make_refinement(name).double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    logits, features, image = (torch.randn(1, c, 4, 4, dtype=torch.float64) for c in (2, CHANNELS, 3))
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: call(name, module, logits, f, image), features, atol=1e-4)


def test_subpixel_convolution_starts_without_a_checkerboard():
    change = make_refinement("subpixel_conv")(torch.zeros(1, 2, 32, 32), torch.randn(1, CHANNELS, 16, 16))
    assert change.abs().max() > 0
    for cell in (change[..., ::2, 1::2], change[..., 1::2, ::2], change[..., 1::2, 1::2]):
        torch.testing.assert_close(change[..., ::2, ::2], cell)


def test_gate_opens_at_edges_and_where_undecided_only():
    module = make_refinement("boundary_refinement")
    logits = torch.full((1, 2, 16, 16), -20.0)
    logits[..., 8:] = 20.0  # a sharp edge in a decided mask
    new = module(logits, torch.randn(1, CHANNELS, 16, 16), torch.randn(1, 3, 16, 16))
    change = (new - logits).abs().amax(dim=(0, 1, 2))
    assert change[7:9].min() > 10 * change[:5].max() and change[7:9].min() > 10 * change[11:].max()


# -- the model as a whole --------------------------------------------------------------------------
def small_model(**keywords) -> HierarchicalUNet:
    torch.manual_seed(0)
    return HierarchicalUNet(width=0.0625, roi_size=(24, 32), **keywords)


@pytest.mark.usefixtures("half_here")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_model_and_loss_are_finite(precision, device):
    network = small_model().to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    criterion = MaskLoss(WEIGHTS)
    every = all_labels(device, (24, 32))
    kinds = list(images(1, 24, 32))
    for number, kind in enumerate(kinds):
        # fp16 convolutions take most of a minute on a CPU: there, each label map meets one picture only.
        labels = every[number :: len(kinds)] if (precision, device) == ("autocast fp16", "cpu") else every
        picture = images(len(labels), 24, 32)[kind]
        with casting(precision, device):
            output = network(picture.to(device, next(network.parameters()).dtype))
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
            for whole, one in zip(together, network(picture[i : i + 1]), strict=False):
                torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-4, atol=2e-4)


def test_contour_and_distance_reach_the_mask():
    network = small_model()
    for module in (network.contour, network.distance):
        module.blend.data.fill_(0.5)
    output = network(torch.randn(2, 3, 24, 32))
    reached = torch.autograd.grad(
        output.logits.square().sum(), [network.contour.head.weight, network.distance.head.weight]
    )
    assert all(g.abs().max() > 0 for g in reached)


@pytest.mark.parametrize("name", REFINEMENTS)
def test_each_refinement_switches_on_by_itself(name):
    off = {part.switch: False for part in REFINEMENTS.values()}
    part = REFINEMENTS[name]
    plain, one = small_model(**off), small_model(**{**off, part.switch: True})
    further = set(one.state_dict()) - set(plain.state_dict())
    assert further and all(key.startswith(f"{part.attribute}.") for key in further)
    output = one(torch.randn(2, 3, 24, 32))
    heads = {head for head in MaskOutput._fields[1:] if getattr(output, head) is not None}
    assert heads == ({part.head} if part.head else set())


def test_full_width_has_the_size_it_was_written_for():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = HierarchicalUNet(width=1.0)
        sizes = {name: p.numel() for name, p in network.named_parameters()}
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 64, 64))
    looking = sum(
        size for name, size in sizes.items() if name.startswith(("person.attention.", "target.attention."))
    )  # came later
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
    masks = torch.rand(3, 2, 100, 140, generator=generator) < torch.tensor([0.001, 0.05, 0.9]).view(
        3, 1, 1, 1
    )
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
    neighbours = (
        ndimage.binary_dilation(mask.numpy(), np.ones((3, 3))) & ~mask.numpy()
        | ndimage.binary_dilation(~mask.numpy(), np.ones((3, 3))) & mask.numpy()
    )
    assert np.array_equal(band.numpy(), neighbours)  # exactly one pixel on either side
    scaled = geometry.scaled_sdf(signed, clip=4.0)
    assert scaled.abs().max() <= 1 and torch.equal(scaled > 0, mask)


def test_edge_strength_has_a_gradient_everywhere_and_the_right_size():
    for size in (1e-20, 1e-3, 1.0, 2e4):
        for pattern in (torch.zeros(6, 6), torch.eye(6), (torch.arange(36).view(6, 6) % 2).float()):
            x = (pattern * size).requires_grad_()
            strength = geometry.edge_strength(x)
            (gradient,) = torch.autograd.grad(strength.sum(), x)
            assert (
                torch.isfinite(strength).all() and torch.isfinite(gradient).all() and gradient.abs().max() < 4
            )
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


@pytest.mark.parametrize("name", [*FUNCTIONS, *REFINEMENTS, "model and sum"])
def test_nothing_is_read_back(name):
    labels = all_labels()
    logits = torch.randn(len(labels), 2, *SIZE, requires_grad=True)
    with Reads() as reads:
        if name in FUNCTIONS:
            cost_of(name, logits, labels).sum().backward()
        elif name in REFINEMENTS:
            module, labels, features, image = refinement_case(name, "fp32", "cpu", trained=True)
            call(name, module, logits, features, image).sum().backward()
        else:
            output = small_model()(torch.randn(2, 3, 24, 32))
            MaskLoss(WEIGHTS)(output, torch.ones(2, 24, 32, dtype=torch.int64))[0].backward()
    assert reads.found == []


# -- compiled --------------------------------------------------------------------------------------
# On a CPU the kernels alone would take minutes of compiling: there, the graphs they are made from, and the
# kernels of each kind of layer; on a GPU all of it in every precision.
BACKEND = {"cpu": "aot_eager", "cuda": "inductor"}
#: What the compiler is told for small batches and for large ones.
OPTIONS = {"cpu": [None], "cuda": [stepping.FEWER_KERNELS, stepping.LESS_TRAFFIC]}
WAYS = [(device, options) for device in DEVICES for options in OPTIONS[device]]


@pytest.mark.slow
@pytest.mark.parametrize(("device", "options"), WAYS)
def test_compiled_losses_equal_eager_ones(device, options):
    labels = all_labels(device)

    def everything(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([cost_of(name, logits, labels) for name in NAMES])

    compiled = torch.compile(
        everything, dynamic=False, fullgraph=True, backend=BACKEND[device], options=options
    )
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


@pytest.mark.slow
@pytest.mark.parametrize(("device", "options"), WAYS)
def test_compiled_layers_are_finite_and_equal_eager_ones(device, options):
    """Each kind of layer once, in half precision, on pictures that are flat and pictures that are not."""
    torch.manual_seed(0)
    attention = layers.SelfAttention(16)
    for last in (attention.out, attention.perceptron[-1]):
        nn.init.normal_(last.weight, std=0.1)
    chain = nn.Sequential(
        layers.ConvNormAct(3, 16, stride=2),
        layers.ResidualBlock(16),
        attention,
        layers.ChannelAttention(16),
        layers.SpatialAttention(),
        layers.Head(16, 2),
    ).to(device)
    compiled = torch.compile(chain, dynamic=False, fullgraph=True, options=options)
    for kind, picture in images(3, 24, 32).items():
        found = []
        for function in (chain, compiled):
            chain.zero_grad()
            with casting("autocast bf16", device):
                output = function(picture.to(device))
            output.square().mean().backward()
            found.append((output.detach(), torch.cat([p.grad.flatten() for p in chain.parameters()])))
            assert all(torch.isfinite(x).all() for x in found[-1]), kind
        torch.testing.assert_close(found[0][0], found[1][0], rtol=5e-2, atol=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "options", "precision"),
    [
        (*way, precision)
        for way in WAYS
        for precision in (PRECISIONS if way[0] == "cuda" else ("autocast bf16",))
    ],
)
def test_compiled_model_is_finite_and_equals_eager(device, options, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = small_model().to(device, dtype)
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend=BACKEND[device], options=options)
    criterion = MaskLoss(WEIGHTS)
    labels = all_labels(device, (24, 32))
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
        torch.testing.assert_close(
            totals[0], totals[1], rtol=1e-3 if precision == "fp32" else 3e-2, atol=1e-4
        )
        if precision == "fp32":
            assert (gradients[0] - gradients[1]).norm() <= 2e-2 * gradients[0].norm() + 1e-4, kind


@pytest.mark.parametrize("gain", (0.5, 8.0))
def test_a_gain_on_normalised_weights_divides_their_gradients_and_changes_no_output(gain):
    image, gradients, outputs = images(2, *SIZE)["noise"], [], []
    for factor in (1.0, gain):
        torch.manual_seed(0)
        model = HierarchicalUNet(width=0.0625, roi_size=SIZE, conv_gain=factor).double()
        for module in model.modules():
            if isinstance(module, layers.GroupNorm):
                module.eps = 0.0  # which is what keeps it from being exact
        logits = model(image.double()).logits
        logits.square().sum().backward()
        outputs.append(logits.detach())
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    torch.testing.assert_close(outputs[1], outputs[0])
    normalised = {
        f"{at}.weight" for at, m in model.named_modules() if isinstance(m, layers.Conv) and m.bias is None
    }
    assert len(normalised) > 20
    for name, before in gradients[0].items():
        factor = gain if name in normalised else 1.0
        torch.testing.assert_close(gradients[1][name] * factor, before, msg=name)
