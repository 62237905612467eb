"""The hierarchical U-Net with attention: person or background first, then whose.

    image -> shared features -> person U-Net ------------------> a: person against background
                    |               |                                        |
                    +-- gate by a, channel and spatial attention -> U-Net -> b: target against non-target
                                                                             |
                                refinements (refine.py), each on or off  -> logits [B, 2, H, W]

The class probabilities are exact products of the two branches (losses.hierarchical_log_probs).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refinelib.modeling.layers import Chain, ChannelAttention, Conv, ConvNormAct, Head, ResidualBlock, SelfAttention, SpatialAttention, resize
from refinelib.modeling.losses import hierarchical_log_probs
from refinelib.modeling.refinements import BoundaryRefinement, ContourDetection, DistanceTransform, ProgressiveUpsampling, SubpixelConv


class MaskOutput(NamedTuple):
    """What the model returns; all float32, on the mask's canvas ``H x W``."""

    logits: Tensor  # [B, 2, H, W]: person against background, target against non-target
    contour_logits: Tensor | None  # [B, 2, H, W]: contour of any person, of this person
    distance: Tensor | None  # [B, 2, H, W], -1..1: scaled signed distance of the same two

    def log_probs(self) -> Tensor:
        """float32 ``[B, 3, H, W]``: background, target, non-target."""
        return hierarchical_log_probs(self.logits)


class UNet(nn.Module):
    """An encoder-decoder with skips, and self-attention at the coarsest scale, that returns the features of every scale, finest first.

    Args:
        widths: channels of each scale, finest first; the input has ``widths[0]``.
        depth: residual blocks of each scale below the finest.
    """

    def __init__(self, widths: tuple[int, ...], *, depth: int = 1) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            nn.Sequential(ConvNormAct(a, b, stride=2), *(ResidualBlock(b) for _ in range(depth))) for a, b in zip(widths, widths[1:])
        )
        self.attention = nn.Sequential(SelfAttention(widths[-1]), SelfAttention(widths[-1]))
        self.ups = nn.ModuleList(
            nn.Sequential(ConvNormAct(a + b, a), ConvNormAct(a, a) if scale else ResidualBlock(a))
            for scale, (a, b) in enumerate(zip(widths, widths[1:]))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, widths[0], H, W]`` to one ``[B, widths[i], H / 2^i, W / 2^i]`` a scale."""
        scales = [x]
        for down in self.downs:
            scales.append(down(scales[-1]))
        scales[-1] = self.attention(scales[-1])
        for i in reversed(range(len(self.ups))):
            coarse = resize(scales[i + 1], tuple(scales[i].shape[-2:]))
            scales[i] = self.ups[i](torch.cat([scales[i], coarse], dim=1))
        return scales


class HierarchicalUNet(nn.Module):
    """Mask logits of one person in a crop, from its RGB image.

    Gradient: what arrives at the logits is bounded by the loss (:class:`~refinelib.modeling.losses.MaskLoss`) and the
    refinements pass it on unchanged; below them a layer multiplies it by no more than its weights' norm
    and, where it normalises, by 32 (see ``blocks.GroupNorm``): bounded for finite weights, whatever the
    image.

    Args:
        width: channels relative to the full model; 1.0 has 256 at full resolution.
        coarse_width: channels of the two coarsest scales relative to those of ``width``.
        coarse_depth: residual blocks of each scale below the finest. There a block costs little and sees much.
        roi_size: input pixels across the person's box (height, width).
        canvas: input pixels of the whole crop (height, width), which has the box in its middle;
            none: the box is the whole crop.
        mask_canvas: size of the masks written (height, width); none: that of the input.
        use_boundary_refinement, use_progressive_upsampling, use_subpixel_conv,
        use_contour_detection, use_distance_transform: which refinements there are.
        blend_init: blending weight of each refinement at the start.
        edge_gain_init: see :class:`~refinelib.modeling.refinements.BoundaryRefinement`.
        distance_threshold_init: see :class:`~refinelib.modeling.refinements.DistanceTransform`.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        coarse_width: float = 1.0,
        coarse_depth: int = 1,
        roi_size: tuple[int, int] = (64, 64),
        canvas: tuple[int, int] | None = None,
        mask_canvas: tuple[int, int] | None = None,
        use_boundary_refinement: bool = True,
        use_progressive_upsampling: bool = True,
        use_subpixel_conv: bool = False,
        use_contour_detection: bool = True,
        use_distance_transform: bool = True,
        blend_init: float = 0.1,
        edge_gain_init: float = 1.0,
        distance_threshold_init: float = 0.5,
    ) -> None:
        super().__init__()
        self.canvas = tuple(canvas or roi_size)
        self.mask_canvas = tuple(mask_canvas or self.canvas)

        def channels(full: float) -> int:
            return 16 * math.ceil(full * width / 16)  # CPU and GPU kernels are several times slower between multiples of 16

        c, half = channels(256), channels(128)
        widths = (c, channels(192), channels(160 * coarse_width), channels(192 * coarse_width))
        self.stem = nn.Sequential(ConvNormAct(5, half), ConvNormAct(half, c))
        self.shared = nn.Sequential(*(ResidualBlock(c) for _ in range(4)))
        self.person = UNet(widths, depth=coarse_depth)
        self.person_head = Head(c, 1)
        self.gate = Chain(Conv(c + 1, c, 1), nn.Sigmoid())
        self.merge = nn.Conv2d(2 * c, c, 1)
        self.attention = nn.Sequential(ChannelAttention(c), SpatialAttention())
        self.target = UNet(widths, depth=coarse_depth)
        self.target_head = Head(c, 1)
        for head in (self.person_head, self.target_head):
            # Nearly undecided at the start, so that the first loss is that of ignorance.
            nn.init.normal_(head.weight, std=1e-2 * c**-0.5)
            nn.init.zeros_(head.bias)

        blend = dict(blend_init=blend_init)
        self.progressive = self.subpixel = self.contour = self.distance = self.boundary = None
        if use_progressive_upsampling:
            self.progressive = ProgressiveUpsampling(widths[2], hidden=(c, c, c), **blend)
        if use_subpixel_conv:
            scale = max(1, round(2 * self.mask_canvas[0] / self.canvas[0]))
            self.subpixel = SubpixelConv(widths[1], hidden=c, scale=scale, **blend)
        if use_contour_detection:
            self.contour = ContourDetection(c, hidden=c, **blend)
        if use_distance_transform:
            self.distance = DistanceTransform(c, hidden=c, threshold_init=distance_threshold_init, **blend)
        if use_boundary_refinement:
            self.boundary = BoundaryRefinement(c, hidden=c, edge_gain_init=edge_gain_init, **blend)
        self.register_buffer("coordinates", self._coordinates(roi_size), persistent=False)

    def _coordinates(self, roi_size: tuple[int, int]) -> Tensor:
        """y and x of every input pixel, -1..1 across the box: whose box it is, is told by place alone."""
        rows, columns = (
            (torch.arange(whole) + 0.5 - whole / 2) * (2 / box) for whole, box in zip(self.canvas, roi_size)
        )
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]

    def forward(self, image: Tensor) -> MaskOutput:
        """
        Args:
            image: float ``[B, 3, *canvas]``, normalised to about -2..2 (``augment.normalise``).
        """
        place = self.coordinates.to(image.dtype).expand(image.shape[0], -1, -1, -1)
        shared = self.shared(self.stem(torch.cat([image, place], dim=1)))
        person = self.person(shared)
        person_logit = self.person_head(person[0])
        probability = torch.sigmoid(person_logit).to(shared.dtype)
        gated = shared * self.gate(person[0], probability)
        target = self.target(self.attention(self.merge(torch.cat([gated, person[0]], dim=1))))
        logits = torch.cat([person_logit, self.target_head(target[0])], dim=1)

        features, logits = (resize(x, self.mask_canvas) for x in (person[0] + target[0], logits))
        contour_logits = distance = None
        if self.progressive is not None:
            logits = self.progressive(logits, target[2])
        if self.subpixel is not None:
            logits = self.subpixel(logits, target[1])
        if self.contour is not None:
            logits, contour_logits = self.contour(logits, features)
        if self.distance is not None:
            logits, distance = self.distance(logits, features)
        if self.boundary is not None:
            logits = self.boundary(logits, features, resize(image, self.mask_canvas))
        return MaskOutput(logits, contour_logits, distance)
