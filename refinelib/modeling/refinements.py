"""The refinement modules: each adds a bounded residual to the mask's logits.

All share one contract. They take the logits so far (float32 ``[B, 2, H, W]``: person against
background, target against non-target) and features, and return new logits of the same shape, and
their head's output where they have one.

- The residual is bounded: ``|new - old| <= |blend| * LIMIT`` (for the distance, see there).
- The mask so far enters without a gradient. So the gradient with respect to the logits is exactly
  that of the identity, bound 1, and a refinement can neither amplify nor turn round what the mask learns.
- No statistic is taken over the batch.
- At the start the blending weight is small: each is the identity, or nearly.

A refinement is added by one line: ``REFINEMENTS.add(name, Refinement(module, ...), Option(switch, ...))``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from refinelib.modeling.geometry import edge_strength
from refinelib.modeling.layers import Chain, ConvNormAct, Head, init_last, resize
from refinelib.registry import REFINEMENTS, Option

#: The largest residual a module can write before its blending weight: e^10 in odds.
LIMIT = 10.0


@dataclass(frozen=True)
class Refinement:
    """A refinement as :data:`~refinelib.registry.REFINEMENTS` holds it. They act in the registry's order.

    Attributes:
        module: called with the channels of the first of ``inputs`` and, by keyword, with what ``takes``
            names and with the settings registered with it, but for the switch. The module is called with
            the logits so far and ``inputs``, and returns new logits, or with a ``head`` these and its output.
        switch: name of the setting that turns it on.
        attribute: name of the module in the model, and so in checkpoints.
        inputs: names of what it is given: ``fine`` (features at the mask's size), ``half`` and ``quarter``
            (features at a half and a quarter of the input's size), ``image`` (the input at the mask's size).
        takes: names out of ``hidden`` (channels of its own layers), ``blend_init`` and ``scale`` (mask
            pixels along a side of a cell of ``half``).
        head: name under which the model returns its head's output; None: it has none.
    """

    module: Callable[..., nn.Module]
    switch: str
    attribute: str
    inputs: tuple[str, ...] = ("fine",)
    takes: tuple[str, ...] = ("hidden", "blend_init")
    head: str | None = None


def bounded(residual: Tensor) -> Tensor:
    """``residual`` squashed smoothly into -LIMIT..LIMIT; slope 1 at 0, never above.

    Example:
        >>> bounded(torch.tensor([0.0, 0.1, 1e9]))
        tensor([ 0.0000,  0.1000, 10.0000])
    """
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

    Example:
        >>> refine = BoundaryRefinement(16, hidden=8)
        >>> features, image = torch.randn(1, 16, 12, 12), torch.randn(1, 3, 12, 12)
        >>> refine(torch.zeros(1, 2, 12, 12), features, image).shape
        torch.Size([1, 2, 12, 12])
    """

    def __init__(
        self, channels: int, *, hidden: int, blend_init: float = 0.1, edge_gain_init: float = 1.0
    ) -> None:
        super().__init__()
        self.trunk = Chain(ConvNormAct(channels + 5, hidden), ConvNormAct(hidden, hidden))
        self.edge_conv = Head(hidden, 2, 3)
        init_last(self.edge_conv, edge_gain_init * (9 * hidden) ** -0.5)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor, image: Tensor) -> Tensor:
        """Return new logits, float32 ``[B, 2, H, W]``.

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
        hidden: channels of each step.
        steps: how many there are.
        blend_init: blending weight at the start.

    Example:
        >>> refine = ProgressiveUpsampling(16, hidden=8)
        >>> refine(torch.ones(1, 2, 16, 16), torch.randn(1, 16, 4, 4)).unique()  # the identity at the start
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    def __init__(self, channels: int, *, hidden: int, steps: int = 3, blend_init: float = 0.1) -> None:
        super().__init__()
        inputs = [channels, *[hidden] * (steps - 1)]
        self.steps = nn.ModuleList(ConvNormAct(channels, hidden) for channels in inputs)
        self.head = Head(hidden, 2)
        init_last(self.head)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, coarse: Tensor) -> Tensor:
        """Return new logits, float32 ``[B, 2, H, W]``.

        Args:
            logits: float32 ``[B, 2, H, W]``.
            coarse: float ``[B, channels, h, w]``, any h and w.
        """
        height, width = logits.shape[-2:]
        for i, step in enumerate(self.steps, start=1):
            cells = 2 ** (len(self.steps) - i)
            coarse = step(resize(coarse, (-(-height // cells), -(-width // cells))))
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

    Example:
        >>> SubpixelConv(16, hidden=8)(torch.zeros(1, 2, 12, 12), torch.randn(1, 16, 6, 6)).shape
        torch.Size([1, 2, 12, 12])
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
        """Return new logits, float32 ``[B, 2, H, W]``.

        Args:
            logits: float32 ``[B, 2, H, W]``.
            coarse: float ``[B, channels, h, w]``, any h and w.
        """
        fine = F.pixel_shuffle(self.conv(self.trunk(coarse)), self.scale)
        return logits + self.blend * bounded(resize(fine, logits.shape[-2:]))


class ContourDetection(nn.Module):
    """A contour head whose contours, with its features, write into the mask.

    Args:
        channels: of the features.
        hidden: of the module's own layers.
        blend_init: blending weight at the start.

    Example:
        >>> refine = ContourDetection(16, hidden=8)
        >>> logits, contour = refine(torch.zeros(1, 2, 12, 12), torch.randn(1, 16, 12, 12))
        >>> logits.shape == contour.shape
        True
    """

    def __init__(self, channels: int, *, hidden: int, blend_init: float = 0.1) -> None:
        super().__init__()
        self.trunk = ConvNormAct(channels, hidden)
        self.head = Head(hidden, 2)
        self.fuse = Chain(ConvNormAct(hidden + 4, hidden), Head(hidden, 2))
        init_last(self.head, 1e-3)
        init_last(self.fuse[-1], 1e-3)
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return new logits and the head's output.

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
        distance_threshold_init: level of the scaled distance taken as the mask's edge at the start.

    Example:
        >>> refine = DistanceTransform(16, hidden=8)
        >>> logits, distance = refine(torch.zeros(1, 2, 12, 12), torch.randn(1, 16, 12, 12))
        >>> bool(distance.abs().max() <= 1)
        True
    """

    def __init__(
        self, channels: int, *, hidden: int, blend_init: float = 0.1, distance_threshold_init: float = 0.5
    ) -> None:
        super().__init__()
        self.trunk = ConvNormAct(channels, hidden)
        self.head = Head(hidden, 2)
        init_last(self.head, 1e-3)
        self.threshold = nn.Parameter(torch.tensor(float(distance_threshold_init)))
        self.blend = nn.Parameter(torch.tensor(float(blend_init)))

    def forward(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return new logits and the head's output.

        Args:
            logits: float32 ``[B, 2, H, W]``.
            features: float ``[B, channels, H, W]``.

        Returns:
            New logits, and the distance float32 ``[B, 2, H, W]`` in -1..1 (any person, this person).
        """
        distance = torch.tanh(self.head(self.trunk(features)))
        excess = (distance + 1) / 2 - self.threshold
        return logits + self.blend * LIMIT * excess, distance


def _option(name: str, default: bool | float, description: str, **limits: float) -> Option:
    return Option(name, default, description, limits, role="model")


REFINEMENTS.add(
    "progressive_upsampling",
    Refinement(ProgressiveUpsampling, "use_progressive_upsampling", "progressive", ("quarter",)),
    _option("use_progressive_upsampling", True, "coarse-to-fine resize-convolution decoder"),
)
REFINEMENTS.add(
    "subpixel_conv",
    Refinement(SubpixelConv, "use_subpixel_conv", "subpixel", ("half",), ("hidden", "blend_init", "scale")),
    _option("use_subpixel_conv", False, "pixel shuffle decoder, the alternative to progressive upsampling"),
)
REFINEMENTS.add(
    "contour_detection",
    Refinement(ContourDetection, "use_contour_detection", "contour", head="contour_logits"),
    _option("use_contour_detection", True, "contour head, fused into the mask"),
)
_LEVEL = "level of the distance map, scaled to 0..1, taken as the mask's edge at the start (learned)"
REFINEMENTS.add(
    "distance_transform",
    Refinement(DistanceTransform, "use_distance_transform", "distance", head="distance"),
    _option("use_distance_transform", True, "signed distance head, fused into the mask"),
    _option("distance_threshold_init", 0.5, _LEVEL, gt=0.0, lt=1.0),
)
_GAIN = "initial gain of the edge convolution that writes the boundary residual"
REFINEMENTS.add(
    "boundary_refinement",
    Refinement(BoundaryRefinement, "use_boundary_refinement", "boundary", ("fine", "image")),
    _option("use_boundary_refinement", True, "residual on the mask, gated by edge strength"),
    _option("edge_gain_init", 1.0, _GAIN, gt=0.0, le=10.0),
)
