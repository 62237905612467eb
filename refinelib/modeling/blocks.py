"""The few layers that the model and its refinements are built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinelib.modeling.geometry import widen


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation: statistics of one sample only, so a batch never changes a sample's output.

    On a flat crop the variance is 0 and the gradient grows by ``eps ** -0.5`` a layer: 316 with PyTorch's
    default, which float16 does not survive twice; 32 with this one.
    """
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0 and channels // g >= 2)
    return nn.GroupNorm(groups, channels, eps=1e-3)


class Conv(nn.Conv2d):
    """Convolution that keeps the size (or divides it by ``stride``), at full speed for any number of input channels.

    A GPU's matrix units take channels by eight: 261 of them would go through a kernel several times slower than 264 do,
    so the missing ones are filled with zeros on the way.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, size, stride=stride, padding=size // 2, bias=bias)
        self.missing = -inputs % 8

    def forward(self, x: Tensor) -> Tensor:
        if not self.missing or not x.is_cuda:
            return super().forward(x)
        wider = (0, 0, 0, 0, 0, self.missing)
        return F.conv2d(F.pad(x, wider), F.pad(self.weight, wider), self.bias, self.stride, self.padding)


def conv3x3(inputs: int, outputs: int, *, stride: int = 1) -> Conv:
    return Conv(inputs, outputs, 3, stride=stride, bias=False)


class Head(nn.Conv2d):
    """Convolution to a few output channels, in float32 (or wider) whatever the precision around it.

    Its weights' gradient is a sum over every pixel of the batch: in float16, times a loss scale of
    65,536, that is the first thing to overflow. It costs next to nothing to keep it out of there.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            if x.is_cuda and self.kernel_size == (1, 1) and torch.compiler.is_compiling():
                # As a sum of products the compiler reads the half-precision input once; a convolution needs a float32 copy of it.
                products = widen(x)[:, None] * widen(self.weight).unsqueeze(0)
                return products.sum(dim=2) + widen(self.bias).view(1, -1, 1, 1)
            return F.conv2d(widen(x), widen(self.weight), widen(self.bias), padding=self.padding)


class ConvNormAct(nn.Sequential):
    """3 x 3 convolution, group normalisation, SiLU: ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__(conv3x3(inputs, outputs, stride=stride), group_norm(outputs), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions added to their input (He et al., 2016); keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.norm1 = group_norm(channels)
        self.conv2 = conv3x3(channels, channels)
        self.norm2 = group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(y)))


class ChannelAttention(nn.Module):
    """Weighs channels by their mean over the image (Hu et al., Squeeze-and-Excitation, 2018, eq. 2-4)."""

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.excite(F.silu(self.squeeze(x.mean(dim=(-2, -1), keepdim=True))))
        return x * torch.sigmoid(weight)


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


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` (height, width); nothing at all where it fits already."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
