"""The few layers that the model and its refinements are built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinelib.modeling.geometry import to_float32


def for_gpu(x: Tensor) -> bool:
    """Whether a layer with two formulations takes the one for GPUs."""
    return x.is_cuda


#: Sums that a large GPU takes at once: 64 on each of 132 multiprocessors. From there on PyTorch's compiler splits none of them by itself.
SIDE_BY_SIDE = 64 * 132


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He, 2018): statistics of one sample only, so a batch never changes a sample's output.

    The sums are float32 whatever comes in; the result has the input's type, so that half precision stays half the
    memory. On a flat crop the variance is 0 and the gradient grows by ``eps ** -0.5`` a layer: 316 with PyTorch's
    default, which float16 does not survive twice; 32 with this one.
    """

    def __init__(self, channels: int) -> None:
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0 and channels // g >= 2)
        super().__init__(groups, channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if for_gpu(x) and torch.compiler.is_compiling():
            return self.by_channels(x)
        return super().forward(x).to(x.dtype)

    def by_channels(self, x: Tensor) -> Tensor:
        """The same from sums over each channel's pixels: see :class:`_ByChannels`."""
        batch, _, height, width = x.shape
        return _ByChannels.apply(x, self.weight, self.bias, self.num_groups, self._parts(batch, height * width), self.eps)

    def _parts(self, batch: int, pixels: int) -> int:
        """Equal parts to sum a sample's pixels in: enough sums side by side to keep a GPU busy, of 32 pixels at least."""
        parts = 1
        while batch * parts * self.num_channels < SIDE_BY_SIDE and pixels % (2 * parts) == 0 and pixels >= 64 * parts:
            parts *= 2
        return parts


class _ByChannels(torch.autograd.Function):
    """Group normalisation of ``[B, C, H, W]`` whose channels lie last in memory, as a compiled kernel reads it.

    PyTorch's own kernel wants all pixels of a channel side by side, and copies the convolutions' output there and back. Here both ways are
    three passes: pixels are summed in ``parts``, as many as keep a GPU busy; a group is put together from all its channels' parts at
    once; every pixel is looked at once more. What autograd would make of the first two is twice as many, hence a gradient by hand.

    Variances are taken about each channel's first pixel. It is one of the values, so its distance to the mean is at most
    ``sqrt(pixels)`` standard deviations and rounding stays below ``pixels * 2^-24`` of the variance, however far the
    values are from 0. Groups are put together as in Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979, eq. 2.1; the gradient is that of Ioffe & Szegedy, "Batch Normalization", 2015, section 3, over a group.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, parts: int, eps: float) -> Tensor:
        wide, shape = _in_parts(x, parts), (len(x), parts, groups, -1)
        first = wide[:, :1, :1]
        off = (wide - first).clamp(-1e18, 1e18)  # whose squares are finite
        mean, square = off.mean(dim=2, keepdim=True), off.square().mean(dim=2, keepdim=True)
        variances, means = (square - mean.square()).clamp(min=0).reshape(shape), (first + mean).reshape(shape)
        middle = means.mean(dim=(1, 3), keepdim=True)
        between = (means - middle).clamp(-1e18, 1e18).square()
        scale = (variances.mean(dim=(1, 3), keepdim=True) + between.mean(dim=(1, 3), keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, middle, scale)
        ctx.parts = parts
        across, channels = to_float32(weight).view(1, 1, groups, -1), len(weight)
        y = (wide - _by_channel(middle, channels)) * _by_channel(scale * across, channels) + to_float32(bias)
        return _out_of_parts(y, x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, middle, scale = ctx.saved_tensors
        groups, channels = middle.shape[2], len(weight)
        across, shape = to_float32(weight).view(1, 1, groups, -1), (len(x), ctx.parts, groups, -1)
        off, slope = _in_parts(x, ctx.parts) - _by_channel(middle, channels), _in_parts(dy, ctx.parts)
        plain, along = slope.sum(dim=2, keepdim=True), (slope * off).sum(dim=2, keepdim=True)
        d_weight, d_bias = torch.stack([along * _by_channel(scale, channels), plain]).sum(dim=(1, 2, 3))
        # Both sums over a group hold all that they are multiplied by, so that the last pass reads two numbers a group.
        share = -scale / (x[0].numel() // groups)
        constant = (plain.reshape(shape) * across * share).sum(dim=(1, 3), keepdim=True)
        linear = (along.reshape(shape) * scale * across * scale * share).sum(dim=(1, 3), keepdim=True)
        dx = slope * _by_channel(scale * across, channels) + off * _by_channel(linear, channels) + _by_channel(constant, channels)
        return _out_of_parts(dx, x), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """``[B, C, H, W]`` as float32 (or wider) ``[B, parts, pixels, C]``; no copy where channels lie last in memory."""
    return to_float32(_places(x).unflatten(1, (parts, -1)))


def _out_of_parts(y: Tensor, like: Tensor) -> Tensor:
    """``[B, parts, pixels, C]`` back, in the shape and the type of ``like``."""
    return _map(y.to(like.dtype).flatten(1, 2), tuple(like.shape[2:]))


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """Numbers of a group, or of each of its channels, ``[B, 1, groups, 1 or C / groups]``, as ``[B, 1, 1, C]``."""
    return x.expand(-1, -1, -1, channels // x.shape[2]).reshape(len(x), 1, 1, channels)


class Conv(nn.Conv2d):
    """Convolution that keeps the size (or divides it by ``stride``), at full speed for any number of input channels.

    A GPU's matrix units take channels by eight: 261 of them would go through a kernel several times slower than 264 do,
    so the missing ones are filled with zeros on the way.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, size, stride=stride, padding=size // 2, bias=bias)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """
        Args:
            x: float ``[B, inputs, H, W]``, or its first channels.
            extra: the others. On a GPU a few channels beside many are convolved by themselves: cheaper than copying
                all of them together.
        """
        if extra is None:
            return self._padded(x, self.weight, self.bias)
        if not for_gpu(x):
            return super().forward(torch.cat([x, extra], dim=1))
        many = x.shape[1]
        return self._padded(x, self.weight[:, :many], self.bias) + self._padded(extra, self.weight[:, many:], None)

    def _padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        missing = -x.shape[1] % 8
        if missing and for_gpu(x):
            x, weight = (F.pad(t, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def conv3x3(inputs: int, outputs: int, *, stride: int = 1) -> Conv:
    return Conv(inputs, outputs, 3, stride=stride, bias=False)


class Head(nn.Conv2d):
    """Convolution to a few output channels, in float32 (or wider) whatever the precision around it.

    Its weights' gradient is a sum over every pixel of the batch: in float16, times a loss scale of
    65,536, that is the first thing to overflow. It costs next to nothing to keep it out of there.
    (A GPU multiplies float32 in TF32 where PyTorch lets it, as it does in convolutions: fewer digits, the same range.)
    """

    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            if for_gpu(x) and self.kernel_size == (1, 1) and torch.compiler.is_compiling():
                return self.by_products(x)
            return F.conv2d(to_float32(x), to_float32(self.weight), to_float32(self.bias), padding=self.padding)

    def by_products(self, x: Tensor) -> Tensor:
        """A convolution of one pixel as sums of products: a compiler reads the half-precision input once, without a float32 copy.

        Channels come last, as they lie in memory, and each sample has its own copy of the weights, whose gradient is then
        summed over pixels in as many places at once as there are samples.
        """
        wide = to_float32(x).permute(0, 2, 3, 1)
        weights = (weight.view(1, 1, 1, -1).expand(len(x), -1, -1, -1) for weight in to_float32(self.weight))
        sums = [(wide * weight).sum(dim=-1) for weight in weights]
        return torch.stack(sums, dim=1) + to_float32(self.bias).view(1, -1, 1, 1)


class Chain(nn.Sequential):
    """Layers one after the other; the first may take its input in two parts, as :class:`Conv` does."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        first, *others = self
        x = first(x) if extra is None else first(x, extra)
        for layer in others:
            x = layer(x)
        return x


class ConvNormAct(Chain):
    """3 x 3 convolution, group normalisation, SiLU: ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__(conv3x3(inputs, outputs, stride=stride), GroupNorm(outputs), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions added to their input (He et al., 2016); keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.norm1 = GroupNorm(channels)
        self.conv2 = conv3x3(channels, channels)
        self.norm2 = GroupNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(y)))


class ChannelAttention(nn.Module):
    """Weighs channels by their mean over the image (Hu et al., Squeeze-and-Excitation, 2018, eq. 2-4)."""

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.excite(F.silu(self.squeeze(x.mean(dim=(-2, -1)))))
        return x * torch.sigmoid(weight)[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weighs pixels by the mean and maximum over channels (Woo et al., CBAM, 2018, eq. 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        # Not amax: its backward shares the gradient among all elements that equal the maximum, by comparing again. Compiled
        # in half precision the two sides are rounded at different places, none is equal, and the share is 0/0.
        largest = x.max(dim=1, keepdim=True).values
        summary = torch.cat([x.mean(dim=1, keepdim=True), largest], dim=1)
        return x * torch.sigmoid(self.conv(summary))


class SelfAttention(nn.Module):
    """Lets every place of a coarse map look at every other: self-attention, then a perceptron, each added to its input (Vaswani et al., 2017).

    Convolutions see a person piece by piece; whose leg this is may be decided at the other end of the box. Queries and keys
    are held within unit length (query-key normalisation, Henry et al., 2020), smoothly, with slope 1 at most, so that a score is at
    most the learned temperature whatever comes in. A map of more than ``MOST`` places a side is looked at through a copy of
    that size (spatial reduction, Wang et al., PVT, 2021), so the cost stays proportional to the places. Both branches end in
    zeros: at the start it is the identity.

    Args:
        channels: of the map; a multiple of ``heads``.
        heads: independent attentions, each on its share of the channels.
    """

    #: Places a side that are looked at, at most.
    MOST = 16

    def __init__(self, channels: int, *, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = GroupNorm(channels), GroupNorm(channels)
        # Matrix products over places, not convolutions of one pixel: on so few places those spend most of their time getting ready.
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.perceptron = nn.Sequential(nn.Linear(channels, 2 * channels), nn.SiLU(), nn.Linear(2 * channels, channels))
        self.temperature = nn.Parameter(torch.full((heads,), 8.0))  # one axis: weight decay is for matrices
        for last in (self.out, self.perceptron[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float ``[B, channels, H, W]``, the same back."""
        size = tuple(x.shape[-2:])
        query, *both = self.query_key_value(_places(self.norm1(x))).chunk(3, dim=-1)
        few = tuple(min(side, self.MOST) for side in size)
        if few != size:  # as good as resizing what they are made from: neither step knows of the other's axes
            both = [_places(resize(_map(t, size), few)) for t in both]
        query, key, value = (self._by_head(t) for t in (query, *both))
        scores = (_within_unit(query) * self.temperature.view(-1, 1, 1)).to(value.dtype) @ _within_unit(key).to(value.dtype).transpose(-1, -2)
        found = torch.softmax(to_float32(scores), dim=-1).to(value.dtype) @ value
        x = x + _map(self.out(found.transpose(1, 2).flatten(2)), size)
        return x + _map(self.perceptron(_places(self.norm2(x))), size)

    def _by_head(self, x: Tensor) -> Tensor:
        """``[B, places, channels]`` to ``[B, heads, places, channels / heads]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _places(x: Tensor) -> Tensor:
    """``[B, channels, H, W]`` to ``[B, H W, channels]``; no copy where channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H W, channels]`` back to ``[B, channels, H, W]``."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def _within_unit(x: Tensor) -> Tensor:
    """float32 (or wider) vectors along the last axis, their length ``r`` made ``r / sqrt(1 + r^2)``."""
    wide = to_float32(x)
    # The largest element first: squares of numbers beyond 1e19 are not finite.
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1.0).detach()
    scaled = wide / largest
    return scaled * (scaled.square().sum(dim=-1, keepdim=True) + largest.square().reciprocal()).rsqrt()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` (height, width), pixel centres aligned by area; nothing at all where it fits already."""
    if x.shape[-2:] == torch.Size(size):
        return x
    if for_gpu(x):
        return resize_by_products(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same as one matrix product a direction.

    The gradient is then two products as well, repeatable and at the speed of memory; PyTorch's own adds every pixel's share to
    its neighbours atomically, in any order, and takes longer than the convolutions around it.
    """
    batch, channels, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_bilinear(a, b, x) for a, b in zip((height, width), size))
        tall = torch.bmm(rows.expand(batch, -1, -1), x.permute(0, 2, 3, 1).reshape(batch, height, width * channels))
        lines = tall.view(batch * size[0], width, channels)
        whole = torch.bmm(columns.expand(len(lines), -1, -1), lines)
    return whole.view(batch, *size, channels).permute(0, 3, 1, 2)


def _bilinear(before: int, after: int, like: Tensor) -> Tensor:
    """Weights ``[after, before]`` of a bilinear resize of one side; each row sums to 1, but for rounding."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    old, new = (torch.arange(side, dtype=kind, device=like.device) for side in (before, after))
    distance = ((new + 0.5) * (before / after) - 0.5).clamp(0, before - 1)[:, None] - old
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)
