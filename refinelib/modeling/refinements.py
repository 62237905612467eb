"""The refinement modules: each adds a bounded residual to the mask's logits.

All share one contract. They take the logits so far (float32 ``[B, 2, H, W]``: person against
background, target against non-target) and features, and return new logits of the same shape, and
their head's output where they have one.

- The residual is bounded: ``|new - old| <= |blend| * LIMIT`` (for the distance, see there).
- What they look at of the mask so far, they take as given: no gradient flows back through it. So the
  gradient with respect to the logits is exactly that of the identity, bound 1, and a refinement can
  neither amplify nor turn round what the mask learns.
- No statistic is taken over the batch.
- At the start the blending weight is small: each is the identity, or nearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinelib.modeling.layers import Chain, ConvNormAct, Head, resize
from refinelib.modeling.geometry import edge_strength

#: The largest residual a module can write before its blending weight: e^10 in odds.
LIMIT = 10.0


def bounded(residual: Tensor) -> Tensor:
    """``residual`` squashed smoothly into -LIMIT..LIMIT; slope 1 at 0, never above."""
    return LIMIT * torch.tanh(residual / LIMIT)


class BoundaryRefinement(nn.Module):
    """Rewrites the mask near its own edges, from features, the image and the mask so far.

    The gate opens where the mask has an edge (its smooth gradient magnitude, averaged over 3 x 3)
    or is undecided (``4 p (1 - p)``), each pixel by itself: normalising edges by the batch's minimum
    and maximum would let one sample change another's mask.

    Args:
        channels: of the features.
        hidden: of the module's own layers.
        blend_init: blending weight at the start.
        edge_gain_init: initial gain of the edge convolution, the last layer, which no
            normalisation follows, so that the gain acts.
    """

    def __init__(self, channels: int, *, hidden: int, blend_init: float = 0.1, edge_gain_init: float = 1.0) -> None:
        super().__init__()
        self.trunk = Chain(ConvNormAct(channels + 5, hidden), ConvNormAct(hidden, hidden))
        self.edge_conv = Head(hidden, 2, 3)
        nn.init.normal_(self.edge_conv.weight, std=edge_gain_init * (9 * hidden) ** -0.5)
        nn.init.zeros_(self.edge_conv.bias)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor, image: Tensor) -> Tensor:
        """
        Args:
            logits: float32 ``[B, 2, H, W]``.
            features: float ``[B, channels, H, W]``.
            image: float ``[B, 3, H, W]``, normalised.
        """
        probs = torch.sigmoid(logits.detach())
        edges = F.avg_pool2d(edge_strength(probs), 3, stride=1, padding=1, count_include_pad=False)
        undecided = 4 * probs * (1 - probs)
        gate = 1 - (1 - edges / (edges + 0.1)) * (1 - undecided)
        seen = torch.cat([image.to(features.dtype), probs.to(features.dtype)], dim=1)
        return logits + self.blend * gate * bounded(self.edge_conv(self.trunk(features, seen)))


class ProgressiveUpsampling(nn.Module):
    """Brings coarse features to the mask's size in steps of two, and adds what they say.

    Each step is a bilinear resize followed by a convolution (Odena et al., "Deconvolution and
    Checkerboard Artifacts", 2016), not a transposed convolution. The last layer starts at zero.

    Args:
        channels: of the coarse features.
        hidden: channels of each step; it has ``len(hidden)`` steps.
        blend_init: blending weight at the start.
    """

    def __init__(self, channels: int, *, hidden: tuple[int, ...], blend_init: float = 0.1) -> None:
        super().__init__()
        widths = [channels, *hidden]
        self.steps = nn.ModuleList(ConvNormAct(a, b) for a, b in zip(widths, widths[1:]))
        self.head = Head(widths[-1], 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, coarse: Tensor) -> Tensor:
        """
        Args:
            logits: float32 ``[B, 2, H, W]``.
            coarse: float ``[B, channels, h, w]``, any h and w.
        """
        height, width = logits.shape[-2:]
        for left, step in zip(reversed(range(len(self.steps))), self.steps):
            coarse = step(resize(coarse, (-(-height // 2**left), -(-width // 2**left))))
        return logits + self.blend * bounded(self.head(coarse))


class SubpixelConv(nn.Module):
    """Sub-pixel convolution (Shi et al., ESPCN, 2016, eq. 3): channels become pixels.

    All ``scale^2`` sub-pixels of a cell start with the same weights (ICNR, Aitken et al., 2017), so
    the start has no checkerboard in it.

    Args:
        channels: of the coarse features.
        hidden: channels before the shuffle.
        scale: pixels per coarse cell along each side.
        blend_init: blending weight at the start.
    """

    def __init__(self, channels: int, *, hidden: int, scale: int = 2, blend_init: float = 0.1) -> None:
        super().__init__()
        self.scale = scale
        self.trunk = ConvNormAct(channels, hidden)
        self.conv = Head(hidden, 2 * scale * scale, 3)
        with torch.no_grad():
            kernel = torch.randn(2, hidden, 3, 3) * (9 * hidden) ** -0.5
            self.conv.weight.copy_(kernel.repeat_interleave(scale * scale, dim=0))
            self.conv.bias.zero_()
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, coarse: Tensor) -> Tensor:
        """
        Args:
            logits: float32 ``[B, 2, H, W]``.
            coarse: float ``[B, channels, h, w]``, any h and w.
        """
        fine = F.pixel_shuffle(self.conv(self.trunk(coarse)), self.scale)
        return logits + self.blend * bounded(resize(fine, tuple(logits.shape[-2:])))


class ContourDetection(nn.Module):
    """A contour head whose contours, with its features, write into the mask.

    Args:
        channels: of the features.
        hidden: of the module's own layers.
        blend_init: blending weight at the start.
    """

    def __init__(self, channels: int, *, hidden: int, blend_init: float = 0.1) -> None:
        super().__init__()
        self.trunk = ConvNormAct(channels, hidden)
        self.head = Head(hidden, 2)
        self.fuse = Chain(ConvNormAct(hidden + 4, hidden), Head(hidden, 2))
        for last in (self.head, self.fuse[-1]):
            nn.init.normal_(last.weight, std=1e-3)
            nn.init.zeros_(last.bias)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: float32 ``[B, 2, H, W]``.
            features: float ``[B, channels, H, W]``.

        Returns:
            New logits, and contour logits float32 ``[B, 2, H, W]`` (any person, this person).
        """
        own = self.trunk(features)
        contour_logits = self.head(own)
        evidence = torch.cat([torch.sigmoid(contour_logits), torch.sigmoid(logits.detach())], dim=1)
        return logits + self.blend * bounded(self.fuse(own, evidence.to(own.dtype))), contour_logits


class DistanceTransform(nn.Module):
    """A signed distance head; where the distance lies above a learned level, the mask gains.

    The head gives d in -1..1; scaled to 0..1, its excess over the threshold (0.5 is the outline)
    is added to the logits, LIMIT for a whole unit: at most ``|blend| LIMIT (1 + |threshold|)``.

    Args:
        channels: of the features.
        hidden: of the module's own layers.
        blend_init: blending weight at the start.
        threshold_init: level of the scaled distance taken as the mask's edge at the start.
    """

    def __init__(self, channels: int, *, hidden: int, blend_init: float = 0.1, threshold_init: float = 0.5) -> None:
        super().__init__()
        self.trunk = ConvNormAct(channels, hidden)
        self.head = Head(hidden, 2)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)
        self.threshold = nn.Parameter(torch.tensor(float(threshold_init)))
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: float32 ``[B, 2, H, W]``.
            features: float ``[B, channels, H, W]``.

        Returns:
            New logits, and the distance float32 ``[B, 2, H, W]`` in -1..1 (any person, this person).
        """
        distance = torch.tanh(self.head(self.trunk(features)))
        excess = (distance + 1) / 2 - self.threshold
        return logits + self.blend * LIMIT * excess, distance
