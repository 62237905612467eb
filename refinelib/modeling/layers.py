"""The few layers that the model and its refinements are built from.

Some have a second formulation for GPUs, or for compiled code there; both give the same result but for
rounding (tests/modeling/test_layers.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from refinelib.modeling.geometry import to_float32

#: Sums that a large GPU takes at once: 64 on each of 132 multiprocessors. PyTorch's compiler splits no
#: reduction that has as many.
PARALLEL_SUMS = 64 * 132


def for_gpu(x: Tensor) -> bool:
    """Whether a layer with two formulations takes the one for GPUs.

    Example:
        >>> for_gpu(torch.zeros(1))
        False
    """
    return x.is_cuda


def init_last(layer: Any, std: float = 0.0) -> None:
    """Start a convolution or linear layer small: weights normal with ``std`` (0: all zero), bias zero.

    Example:
        >>> init_last(layer := nn.Linear(2, 1))
        >>> layer(torch.ones(2)).item()
        0.0
    """
    if std:
        nn.init.normal_(layer.weight, std=std)
    else:
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He, 2018): statistics of one sample, whatever else is in the batch.

    The sums are float32 whatever comes in; the result has the input's type, so that half precision stays half
    the memory. On a flat crop the variance is 0 and the gradient grows by ``eps ** -0.5`` a layer: 316 with
    PyTorch's default, which float16 does not survive twice; 32 with this one.

    Args:
        channels: of the input, float ``[B, channels, H, W]``; even.

    Example:
        >>> bool(GroupNorm(16)(torch.full((1, 16, 4, 4), 7.0)).abs().max() < 1e-4)
        True
    """

    def __init__(self, channels: int) -> None:
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0 and channels // g >= 2)
        super().__init__(groups, channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float ``[B, C, H, W]``; the same shape and type back."""
        if for_gpu(x) and torch.compiler.is_compiling():
            return self.by_channels(x)
        return super().forward(x).to(x.dtype)

    def by_channels(self, x: Tensor) -> Tensor:
        """The same from sums over each channel's pixels: see :class:`_ByChannels`."""
        parts = self._parts(len(x), x.shape[2] * x.shape[3])
        apply: Callable[..., Tensor] = _ByChannels.apply
        return apply(x, self.weight, self.bias, self.num_groups, parts, self.eps)

    def _parts(self, batch: int, pixels: int) -> int:
        """Equal parts, of 32 pixels at least, to sum a sample's pixels in, so that a GPU is busy."""
        parts, sums = 1, batch * self.num_channels
        while sums * parts < PARALLEL_SUMS and pixels % (2 * parts) == 0 and pixels >= 64 * parts:
            parts *= 2
        return parts


class _ByChannels(torch.autograd.Function):
    """Group normalisation of ``[B, C, H, W]`` whose channels lie last in memory, for compiled code.

    PyTorch's own kernel wants all pixels of a channel side by side, and copies the convolutions' output there
    and back. Here forward and backward are three passes each: sum each channel over the pixels of each part
    (as many parts as keep a GPU busy), combine the sums of a group's channels and parts, and visit each pixel
    once more. Autograd would need twice as many passes, hence a gradient by hand.

    Variances are taken about each channel's first pixel. It is one of the values, so its distance to the mean
    is at most ``sqrt(pixels)`` standard deviations, and rounding stays below ``pixels * 2^-24`` of the
    variance however far the values are from 0. Sums are combined as in Chan et al., "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979, eq. 2.1. The gradient is that of Ioffe &
    Szegedy, "Batch Normalization", 2015, section 3, over a group.

    Shapes below: pixels ``[B, parts, pixels, C]``; sums of channels ``[B, parts, 1, C]``, which seen by group
    are ``[B, parts, groups, C / groups]``; figures of groups ``[B, 1, groups, 1]``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, parts: int, eps: float
    ) -> Tensor:
        values, by_group = _pixels(x, parts), (len(x), parts, groups, -1)
        first = values[:, :1, :1]
        shifted = (values - first).clamp(-1e18, 1e18)  # whose squares are finite
        mean = shifted.mean(dim=2, keepdim=True)
        square = shifted.square().mean(dim=2, keepdim=True)
        variances = (square - mean.square()).clamp(min=0).reshape(by_group)
        means = (first + mean).reshape(by_group)
        group_mean = means.mean(dim=(1, 3), keepdim=True)
        between = (means - group_mean).clamp(-1e18, 1e18).square()
        variance = variances.mean(dim=(1, 3), keepdim=True) + between.mean(dim=(1, 3), keepdim=True)
        inverse_std = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, group_mean, inverse_std)
        ctx.parts = parts
        channels, weights = len(weight), to_float32(weight).view(1, 1, groups, -1)
        centred = values - _per_channel(group_mean, channels)
        return _image(centred * _per_channel(inverse_std * weights, channels) + to_float32(bias), like=x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, group_mean, inverse_std = ctx.saved_tensors
        groups, channels = group_mean.shape[2], len(weight)
        weights, by_group = to_float32(weight).view(1, 1, groups, -1), (len(x), ctx.parts, groups, -1)
        centred = _pixels(x, ctx.parts) - _per_channel(group_mean, channels)
        slope = _pixels(dy, ctx.parts)
        slope_sum = slope.sum(dim=2, keepdim=True)
        product_sum = (slope * centred).sum(dim=2, keepdim=True)
        both = torch.stack([product_sum * _per_channel(inverse_std, channels), slope_sum])
        d_weight, d_bias = both.sum(dim=(1, 2, 3))
        # dx = slope * weight / std + centred * linear + constant: the last pass reads two numbers a group.
        factor = -inverse_std / (x[0].numel() // groups)
        constant = (slope_sum.reshape(by_group) * weights * factor).sum(dim=(1, 3), keepdim=True)
        linear = product_sum.reshape(by_group) * inverse_std * weights * inverse_std * factor
        linear = linear.sum(dim=(1, 3), keepdim=True)
        dx = slope * _per_channel(inverse_std * weights, channels) + centred * _per_channel(linear, channels)
        dx = _image(dx + _per_channel(constant, channels), like=x)
        return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None


def _pixels(x: Tensor, parts: int) -> Tensor:
    """``[B, C, H, W]`` as float32 ``[B, parts, pixels, C]``; no copy where channels lie last in memory."""
    return to_float32(torch.unflatten(_places(x), 1, (parts, -1)))


def _image(pixels: Tensor, *, like: Tensor) -> Tensor:
    """``[B, parts, pixels, C]`` in the shape and the type of ``like``."""
    return _map(pixels.to(like.dtype).flatten(1, 2), like.shape[2:])


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """Figures of groups, or of their channels, ``[B, 1, groups, 1 or C / groups]`` as ``[B, 1, 1, C]``."""
    return x.expand(-1, -1, -1, channels // x.shape[2]).reshape(len(x), 1, 1, channels)


class Conv(nn.Conv2d):
    """Convolution that keeps the size (or divides it by ``stride``), fast for any number of input channels.

    A GPU's matrix units take channels by eight: 261 of them would go through a kernel several times slower
    than 264 do, so there the missing ones are filled with zeros.

    Args:
        inputs, outputs: channels.
        size: of the kernel; odd.
        stride: of the convolution.
        bias: whether it has one.

    Example:
        >>> conv = Conv(5, 8, 3)
        >>> conv(torch.ones(1, 4, 6, 6), torch.ones(1, 1, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, size, stride=stride, padding=size // 2, bias=bias)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Convolve ``x``, or ``x`` and ``extra`` side by side.

        Args:
            x: float ``[B, inputs, H, W]``, or its first channels.
            extra: the others. On a GPU a few channels beside many are convolved by themselves: cheaper than
                copying all of them together.
        """
        if extra is None:
            return self._padded(x, self.weight, self.bias)
        if not for_gpu(x):
            return super().forward(torch.cat([x, extra], dim=1))
        many = x.shape[1]
        y = self._padded(x, self.weight[:, :many], self.bias)
        return y + self._padded(extra, self.weight[:, many:], None)

    def _padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        missing = -x.shape[1] % 8
        if missing and for_gpu(x):
            padded = [F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (x, weight)]
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in padded)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class Head(nn.Conv2d):
    """Convolution to a few output channels, in float32 (or wider) whatever the precision around it.

    Its weights' gradient is a sum over every pixel of the batch: in float16, times a loss scale of
    65,536, that is the first thing to overflow. In float32 it costs next to nothing.
    (A GPU multiplies float32 in TF32 where PyTorch lets it, as it does in convolutions: fewer digits, the
    same range.)

    Args:
        inputs, outputs: channels.
        size: of the kernel; odd.

    Example:
        >>> Head(8, 2)(torch.ones(1, 8, 4, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, inputs, H, W]`` to float32 ``[B, outputs, H, W]``."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            if for_gpu(x) and self.kernel_size == (1, 1) and torch.compiler.is_compiling():
                return self.by_products(x)
            x, weight, bias = map(to_float32, (x, self.weight, self.bias))
            return F.conv2d(x, weight, bias, padding=self.padding)

    def by_products(self, x: Tensor) -> Tensor:
        """A convolution of one pixel as sums of products.

        A compiler reads the half-precision input once, without a float32 copy. Each sample has its own
        copy of the weights, whose gradient is then summed over pixels for all samples in parallel.
        """
        values = to_float32(x).permute(0, 2, 3, 1)
        weights = (weight.view(1, 1, 1, -1).expand(len(x), -1, -1, -1) for weight in to_float32(self.weight))
        sums = [(values * weight).sum(dim=-1) for weight in weights]
        return torch.stack(sums, dim=1) + to_float32(self.bias).view(1, -1, 1, 1)


class Chain(nn.Sequential):
    """Layers one after the other; the first may take its input in two parts, as :class:`Conv` does.

    Example:
        >>> Chain(Conv(3, 8, 1), nn.SiLU())(torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """All layers in order, from ``x`` (and ``extra``)."""
        first, *others = self
        x = first(x) if extra is None else first(x, extra)
        for layer in others:
            x = layer(x)
        return x


class ConvNormAct(Chain):
    """3 x 3 convolution, group normalisation, SiLU.

    Float ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``.

    Example:
        >>> ConvNormAct(3, 8, stride=2)(torch.ones(1, 3, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__(Conv(inputs, outputs, 3, stride=stride, bias=False), GroupNorm(outputs), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions added to their input (He et al., 2016); keeps the shape.

    Example:
        >>> ResidualBlock(8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 3, bias=False)
        self.norm1 = GroupNorm(channels)
        self.conv2 = Conv(channels, channels, 3, bias=False)
        self.norm2 = GroupNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, channels, H, W]``, the same back."""
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(y)))


class ChannelAttention(nn.Module):
    """Weighs channels by their mean over the image (Hu et al., Squeeze-and-Excitation, 2018, eq. 2-4).

    Example:
        >>> ChannelAttention(8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, channels, H, W]``, the same back."""
        weight = self.excite(F.silu(self.squeeze(x.mean(dim=(-2, -1)))))
        return x * torch.sigmoid(weight)[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weighs pixels by the mean and maximum over channels (Woo et al., CBAM, 2018, eq. 3).

    Example:
        >>> SpatialAttention()(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, C, H, W]``, the same back."""
        # Not amax: its backward shares the gradient among all elements that equal the maximum, by comparing
        # again. Compiled in half precision the two sides are rounded at different places, none is equal, and
        # it divides 0 by 0.
        largest = x.max(dim=1, keepdim=True).values
        summary = torch.cat([x.mean(dim=1, keepdim=True), largest], dim=1)
        return x * torch.sigmoid(self.conv(summary))


class SelfAttention(nn.Module):
    """Self-attention between all places of a coarse map, then a perceptron, each added to its input.

    Vaswani et al., 2017. Convolutions see a person piece by piece; whose leg this is may be decided at the
    other end of the box. Queries and keys are held within unit length (query-key normalisation, Henry et al.,
    2020), smoothly, with slope 1 at most, so that a score is at most the learned temperature whatever comes
    in. Keys and values of a map of more than ``MOST`` places a side are resized to that size (spatial
    reduction, Wang et al., PVT, 2021), so the cost stays proportional to the places. Both branches end in
    zeros: at the start it is the identity.

    Args:
        channels: of the map; a multiple of ``heads``.
        heads: independent attentions, each on its part of the channels.

    Example:
        >>> x = torch.randn(1, 16, 4, 4)
        >>> bool((SelfAttention(16)(x) == x).all())
        True
    """

    #: Places a side of the keys' and values' map, at most.
    MOST = 16

    def __init__(self, channels: int, *, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = GroupNorm(channels), GroupNorm(channels)
        # Linear layers over places: convolutions of one pixel take longer on so few places.
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        hidden = 2 * channels
        self.perceptron = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels))
        self.temperature = nn.Parameter(torch.full((heads,), 8.0))  # one axis: weight decay is for matrices
        init_last(self.out)
        init_last(self.perceptron[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, channels, H, W]``, the same back."""
        size = x.shape[-2:]
        query, *others = self.query_key_value(_places(self.norm1(x))).chunk(3, dim=-1)
        few = [min(side, self.MOST) for side in size]
        if few != list(size):  # resizing after the linear layer is the same: each works along other axes
            others = [_places(resize(_map(t, size), few)) for t in others]
        # [B, places, channels] to [B, heads, places, channels / heads]
        by_head = (torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2) for t in (query, *others))
        query, key, value = by_head
        query = (_within_unit(query) * self.temperature.view(-1, 1, 1)).to(value.dtype)
        scores = query @ _within_unit(key).to(value.dtype).transpose(-1, -2)
        found = torch.softmax(to_float32(scores), dim=-1).to(value.dtype) @ value
        x = x + _map(self.out(found.transpose(1, 2).flatten(2)), size)
        return x + _map(self.perceptron(_places(self.norm2(x))), size)


def _places(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H W, C]``; no copy where channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(x: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, H W, C]`` back to ``[B, C, H, W]``."""
    return torch.unflatten(x, 1, tuple(size)).permute(0, 3, 1, 2)


def _within_unit(x: Tensor) -> Tensor:
    """float32 (or wider) vectors along the last axis, their length ``r`` made ``r / sqrt(1 + r^2)``."""
    values = to_float32(x)
    # The largest element first: squares of numbers beyond 1e19 are not finite.
    largest = values.abs().amax(dim=-1, keepdim=True).clamp(min=1.0).detach()
    scaled = values / largest
    return scaled * (scaled.square().sum(dim=-1, keepdim=True) + largest.square().reciprocal()).rsqrt()


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize, pixel centres aligned by area; ``x`` itself where it has that size already.

    Args:
        x: float ``[B, C, h, w]``.
        size: height and width of the result.

    Example:
        >>> resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten().tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    if list(x.shape[-2:]) == list(size):
        return x
    if for_gpu(x):
        return resize_by_products(x, size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_by_products(x: Tensor, size: Sequence[int]) -> Tensor:
    """:func:`resize` as one matrix product a direction.

    The gradient is then two products as well: bit-identical in every run, and limited by bandwidth only.
    PyTorch's own adds every pixel's part to its neighbours atomically, in any order, and takes longer than
    the convolutions around it.

    Example:
        >>> resize_by_products(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten().tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    batch, channels, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_bilinear(a, b, x) for a, b in ((height, size[0]), (width, size[1])))
        lines = x.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        lines = torch.bmm(rows.expand(batch, -1, -1), lines).view(batch * size[0], width, channels)
        whole = torch.bmm(columns.expand(len(lines), -1, -1), lines)
    return whole.view(batch, *size, channels).permute(0, 3, 1, 2)


def _bilinear(before: int, after: int, like: Tensor) -> Tensor:
    """Weights ``[after, before]`` of a bilinear resize of one side; each row sums to 1, but for rounding."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    old, new = (torch.arange(side, dtype=kind, device=like.device) for side in (before, after))
    distance = ((new + 0.5) * (before / after) - 0.5).clamp(0, before - 1)[:, None] - old
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)
