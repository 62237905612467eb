"""Layers that have a second formulation for GPUs: both must be the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from refinelib.modeling.layers import Conv, GroupNorm, Head, SelfAttention, resize, resize_by_products

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def gradients(function, *inputs, also=()):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    (y * direction).sum().backward(inputs=[*inputs, *also])
    return y, tuple(x.grad for x in inputs)


@pytest.mark.parametrize("channels", [2, 12, 40, 64])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("size", "parts"), [((7, 5), 1), ((16, 12), 4), ((16, 16), 8), ((8, 10), 2)])
def test_normalising_by_channels_is_group_normalisation(channels, offset, size, parts):
    norm = GroupNorm(channels).double()
    assert norm._parts(3, size[0] * size[1]) == parts
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, channels, *size, dtype=torch.float64) + offset
    found = []
    for function in (norm.by_channels, norm):
        norm.zero_grad()
        y, (dx,) = gradients(function, x, also=norm.parameters())
        found.append((y, dx, norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(*found)


def test_it_is_exact_far_from_zero_and_with_an_outlying_first_pixel():
    norm = GroupNorm(16)
    x = torch.randn(2, 16, 32, 32, dtype=torch.float64)
    x[..., 0, 0] = 300.0
    for offset in (0.0, 1e3):
        exact = F.group_norm(x + offset, norm.num_groups, eps=norm.eps)
        found = norm.by_channels((x + offset).float())
        # The input itself is rounded: by 1e3 * 2^-24 where it lies far from zero.
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 + 10 * offset * 2**-24)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_finite_for_extreme_input(value, dtype):
    x = torch.full((2, 16, 8, 8), value, dtype=dtype)
    x[0, :, :4] *= -1
    y, (dx,) = gradients(GroupNorm(16).by_channels, x)
    assert y.dtype == dtype and y.isfinite().all() and dx.isfinite().all()
    assert dx[1].abs().max() <= 40  # flat: at most eps ** -0.5 a unit of gradient


def test_what_is_not_finite_stays_so():
    for bad in (torch.nan, torch.inf):
        x = torch.randn(2, 16, 8, 8)
        x[1, 3, 2, 2] = bad
        y = GroupNorm(16).by_channels(x)
        assert y[0].isfinite().all() and not y[1].isfinite().all()


def test_half_precision_stays_half():
    for amp in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=amp):
            assert GroupNorm(16)(torch.randn(1, 16, 4, 4, dtype=amp)).dtype == amp


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "before, after",
    [((8, 8), (16, 16)), ((5, 7), (10, 14)), ((6, 4), (9, 11)), ((12, 12), (6, 6)), ((1, 3), (4, 6))],
)
def test_resizing_by_products_is_bilinear(before, after, device):
    x = torch.randn(2, 3, *before, dtype=torch.float64, device=device)
    a, (da,) = gradients(lambda t: resize_by_products(t, after), x)
    b, (db,) = gradients(lambda t: F.interpolate(t, size=after, mode="bilinear", align_corners=False), x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(da, db)
    assert resize_by_products(x.float(), after).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many, few", [(16, 5), (8, 1), (24, 4)])
def test_a_convolution_of_two_parts_is_that_of_both(many, few, device):
    conv = Conv(many + few, 6, 3, bias=True).double().to(device)
    a, b = (
        torch.randn(2, many, 9, 9, dtype=torch.float64, device=device),
        torch.randn(2, few, 9, 9, dtype=torch.float64, device=device),
    )
    found, grads = gradients(conv, a, b)
    wanted, others = gradients(
        lambda x, y: F.conv2d(torch.cat([x, y], 1), conv.weight, conv.bias, padding=1), a, b
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, others)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_head_by_products_is_its_convolution(outputs):
    head = Head(12, outputs).double()
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64)
    a, grads = gradients(head.by_products, x)
    b, others = gradients(head, x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(grads, others)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_are_the_eager_ones():
    torch.manual_seed(0)
    layers = (
        torch.nn.Sequential(Conv(16, 24, 3, bias=False), GroupNorm(24), torch.nn.SiLU(), Head(24, 2))
        .cuda()
        .to(memory_format=torch.channels_last)
    )
    x = torch.randn(2, 16, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    a, (da,) = gradients(torch.compile(layers), x)
    b, (db,) = gradients(layers, x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(da, db, rtol=1e-2, atol=1e-3)


def attention(channels=16, **keywords):
    """With its last layers no longer at zero."""
    torch.manual_seed(0)
    layer = SelfAttention(channels, **keywords).double()
    for last in (layer.out, layer.perceptron[-1]):
        torch.nn.init.normal_(last.weight, std=0.2)
        torch.nn.init.normal_(last.bias, std=0.2)
    torch.nn.init.uniform_(layer.temperature, 2.0, 9.0)
    return layer


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (20, 18)])
def test_self_attention_is_that_of_the_paper_on_vectors_within_unit_length(size):
    """Against PyTorch's own attention, a head at a time."""
    layer, x = attention(heads=2), torch.randn(2, 16, *size, dtype=torch.float64)
    seen = layer.norm1(x)
    few = resize(seen, tuple(min(side, 16) for side in size))
    parts = zip(
        (seen, few, few),
        layer.query_key_value.weight.chunk(3),
        layer.query_key_value.bias.chunk(3),
        strict=False,
    )
    query, key, value = (
        F.conv2d(x, weight[:, :, None, None], bias).flatten(2).transpose(1, 2) for x, weight, bias in parts
    )
    found = []
    for head in range(2):
        q, k, v = (t[..., 8 * head : 8 * head + 8] for t in (query, key, value))
        q, k = (t / (1 + t.square().sum(-1, keepdim=True)).sqrt() for t in (q, k))
        found.append(F.scaled_dot_product_attention(q * layer.temperature[head], k, v, scale=1.0))
    middle = x + layer.out(torch.cat(found, -1)).transpose(1, 2).reshape(x.shape)
    last = layer.perceptron(layer.norm2(middle).flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), middle + last.transpose(1, 2).reshape(x.shape))


def test_self_attention_starts_as_the_identity_and_keeps_samples_apart():
    x = torch.randn(3, 16, 6, 6, dtype=torch.float64)
    assert torch.equal(SelfAttention(16).double()(x), x)
    other = x.clone()
    other[1] += 1.0
    before, after = attention()(x), attention()(other)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e18])
def test_self_attention_is_finite_for_extreme_input(value):
    layer = attention().float()
    x = torch.full((2, 16, 6, 6), value)
    x[0, :, :3] *= -1
    y, (dx,) = gradients(layer, x)
    assert y.isfinite().all() and dx.isfinite().all()
    with torch.no_grad():  # and for queries and keys of any size
        layer.query_key_value.weight[:16].mul_(1e20)
        layer.query_key_value.weight[16:].mul_(1e-20)
    y, (dx,) = gradients(layer, torch.randn(2, 16, 6, 6))
    assert y.isfinite().all() and dx.isfinite().all()
