"""The hierarchical U-Net with attention: person or background first, then whose.

    image -> shared features -> person U-Net ------------------> a: person against background
                    |               |                                        |
                    +-- gate by a, channel and spatial attention -> U-Net -> b: target against non-target
                                                                             |
                           refinements (refinements.py), each on or off   -> logits [B, 2, H, W]

The class probabilities are exact products of the two branches (output.hierarchical_log_probs).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from refinelib.modeling import layers
from refinelib.modeling.layers import Chain, ConvNormAct, Head, ResidualBlock, init_last, resize
from refinelib.modeling.output import MaskOutput, output_type
from refinelib.modeling.refinements import Refinement
from refinelib.registry import REFINEMENTS


class UNet(nn.Module):
    """An encoder-decoder with skips, and self-attention at the coarsest scale; it returns every scale.

    Args:
        widths: channels of each scale, finest first; the input has ``widths[0]``.
        depth: residual blocks of each scale below the finest.

    Example:
        >>> [tuple(x.shape[1:]) for x in UNet((16, 32))(torch.randn(1, 16, 8, 8))]
        [(16, 8, 8), (32, 4, 4)]
    """

    def __init__(self, widths: tuple[int, ...], *, depth: int = 1) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            nn.Sequential(ConvNormAct(a, b, stride=2), *(ResidualBlock(b) for _ in range(depth)))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.attention = nn.Sequential(layers.SelfAttention(widths[-1]), layers.SelfAttention(widths[-1]))
        self.ups = nn.ModuleList(
            nn.Sequential(ConvNormAct(a + b, a), ConvNormAct(a, a) if scale else ResidualBlock(a))
            for scale, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, widths[0], H, W]`` to one ``[B, widths[i], H / 2^i, W / 2^i]`` a scale."""
        scales = [x]
        for down in self.downs:
            scales.append(down(scales[-1]))
        scales[-1] = self.attention(scales[-1])
        for i in reversed(range(len(self.ups))):
            coarse = resize(scales[i + 1], scales[i].shape[-2:])
            scales[i] = self.ups[i](torch.cat([scales[i], coarse], dim=1))
        return scales


class HierarchicalUNet(nn.Module):
    """Mask logits of one person in a crop, from its RGB image.

    Gradient: what arrives at the logits is bounded by the loss (:class:`~refinelib.modeling.losses.MaskLoss`)
    and the refinements pass it on unchanged; below them a layer multiplies it by no more than its weights'
    norm and, where it normalises, by 32 (see :class:`~refinelib.modeling.layers.GroupNorm`): bounded for
    finite weights, whatever the image.

    Args:
        width: channels relative to the full model; 1.0 has 256 at full resolution.
        coarse_width: channels of the two coarsest scales relative to those of ``width``.
        coarse_depth: residual blocks of each scale below the finest.
        roi_size: input pixels across the person's box (height, width).
        canvas: input pixels of the whole crop (height, width), which has the box in its middle;
            none: the box is the whole crop.
        mask_canvas: size of the masks written (height, width); none: that of the input.
        conv_gain: factor on the first weights of convolutions whose output is normalised. It changes no
            output; their gradients are divided by it (Salimans & Kingma, 2016, section 2.1).
        blend_init: blending weight of each refinement at the start.
        **options: of the refinements (:data:`~refinelib.registry.REFINEMENTS`), by the settings' names, such
            as ``use_contour_detection``; for what is left out, the registered defaults hold.

    Raises:
        TypeError: an option that no refinement has.

    Example:
        >>> model = HierarchicalUNet(width=0.0625, roi_size=(32, 32), use_distance_transform=False)
        >>> output = model(torch.zeros(2, 3, 32, 32))
        >>> output.logits.shape, output.contour_logits.shape, output.distance
        (torch.Size([2, 2, 32, 32]), torch.Size([2, 2, 32, 32]), None)
    """

    coordinates: Tensor

    def __init__(
        self,
        *,
        width: float = 1.0,
        coarse_width: float = 1.0,
        coarse_depth: int = 1,
        roi_size: tuple[int, int] = (64, 64),
        canvas: tuple[int, int] | None = None,
        mask_canvas: tuple[int, int] | None = None,
        conv_gain: float = 1.0,
        blend_init: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.canvas = tuple(canvas or roi_size)
        self.mask_canvas = tuple(mask_canvas or self.canvas)

        def channels(full: float) -> int:
            # CPU and GPU kernels are several times slower between multiples of 16.
            return 16 * math.ceil(full * width / 16)

        c, half = channels(256), channels(128)
        widths = (c, channels(192), channels(160 * coarse_width), channels(192 * coarse_width))
        self.stem = nn.Sequential(ConvNormAct(5, half), ConvNormAct(half, c))
        self.shared = nn.Sequential(*(ResidualBlock(c) for _ in range(4)))
        self.person = UNet(widths, depth=coarse_depth)
        self.person_head = Head(c, 1)
        self.gate = Chain(layers.Conv(c + 1, c, 1), nn.Sigmoid())
        self.merge = nn.Conv2d(2 * c, c, 1)
        self.attention = nn.Sequential(layers.ChannelAttention(c), layers.SpatialAttention())
        self.target = UNet(widths, depth=coarse_depth)
        self.target_head = Head(c, 1)
        for head in (self.person_head, self.target_head):
            init_last(head, 1e-2 * c**-0.5)  # nearly undecided: the first loss is that of ignorance

        inputs = {"fine": c, "half": widths[1], "quarter": widths[2], "image": 3}
        scale = max(1, round(2 * self.mask_canvas[0] / self.canvas[0]))
        self._add_refinements(options, inputs, hidden=c, scale=scale, blend_init=blend_init)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, layers.Conv) and layer.bias is None:  # a normalisation follows
                    layer.weight *= conv_gain
        self.register_buffer("coordinates", self._coordinates(roi_size), persistent=False)

    def _add_refinements(self, options: dict[str, Any], channels: dict[str, int], **known: Any) -> None:
        """Make the modules that are switched on; all others are None."""
        registered = {option.name: option.default for option in REFINEMENTS.options()}
        if unknown := options.keys() - registered.keys():
            there = ", ".join(registered)
            raise TypeError(f"no refinement has the option {unknown.pop()!r}; there are {there}")
        options = registered | options
        self.refinements: list[Refinement] = []
        for name, part in REFINEMENTS.items():
            setattr(self, part.attribute, None)
            if options[part.switch]:
                own = {o.name: options[o.name] for o in REFINEMENTS.options(name) if o.name != part.switch}
                own |= {name: known[name] for name in part.takes}
                setattr(self, part.attribute, part.module(channels[part.inputs[0]], **own))
                self.refinements.append(part)
        self.output = output_type(part.head for part in self.refinements if part.head)

    def _coordinates(self, roi_size: tuple[int, int]) -> Tensor:
        """Y and x of every input pixel, -1..1 across the box: only its place tells whose box it is."""
        sides = zip(self.canvas, roi_size, strict=True)
        axes = [(torch.arange(whole) + 0.5 - whole / 2) * (2 / box) for whole, box in sides]
        return torch.stack(torch.meshgrid(axes, indexing="ij"))[None]

    def forward(self, image: Tensor) -> MaskOutput:
        """Logits and the heads' outputs; see :class:`~refinelib.modeling.output.MaskOutput`.

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

        given = (person[0] + target[0], logits, image)
        features, logits, resized = (resize(x, self.mask_canvas) for x in given)
        inputs = {"fine": features, "half": target[1], "quarter": target[2], "image": resized}
        heads = {}
        for part in self.refinements:
            found = getattr(self, part.attribute)(logits, *(inputs[name] for name in part.inputs))
            if part.head is None:
                logits = found
            else:
                logits, heads[part.head] = found
        output: MaskOutput = self.output(logits, **heads)
        return output
