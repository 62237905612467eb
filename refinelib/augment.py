"""Whole-batch augmentation on the device, from random numbers drawn beforehand.

:func:`draw` makes the random numbers of many ROIs at once, on the CPU, from a seeded generator;
:func:`apply` is a pure function of them, the same on every device. So an ROI's augmentation
depends on the seed, the epoch and its place in the epoch alone: a skipped step, a resumed run and
a replayed incident see the very same pixels.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Mean and standard deviation of ImageNet's RGB values, of 255: what "normalised" means here.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

#: Columns of the parameter table.
FLIP, ANGLE, SCALE, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, SATURATION = range(8)
COLUMNS = 8


def draw(
    count: int,
    *,
    mode: str,
    generator: torch.Generator,
    degrees: float = 10.0,
    scale: float = 0.15,
    shift: float = 0.06,
    colour: float = 0.3,
) -> Tensor:
    """Augmentation parameters of ``count`` ROIs.

    Args:
        count: number of rows.
        mode: ``off``, ``flip`` (left and right, half of all) or ``full`` (flip, affine and colour).
        generator: CPU generator; it gives the same number of values in every mode.
        degrees: largest rotation.
        scale: largest relative change of size; drawn uniformly in its logarithm.
        shift: largest shift, of the canvas's side.
        colour: largest relative change of brightness, contrast and saturation.

    Returns:
        float32 ``[count, COLUMNS]``.
    """
    uniform = torch.rand(count, COLUMNS, generator=generator)
    signed = 2 * uniform - 1
    table = torch.zeros(count, COLUMNS)
    table[:, [SCALE, BRIGHTNESS, CONTRAST, SATURATION]] = 1.0
    if mode in ("flip", "full"):
        table[:, FLIP] = (uniform[:, FLIP] < 0.5).float()
    if mode == "full":
        table[:, ANGLE] = signed[:, ANGLE] * math.radians(degrees)
        table[:, SCALE] = torch.exp(signed[:, SCALE] * math.log1p(scale))
        table[:, [SHIFT_X, SHIFT_Y]] = signed[:, [SHIFT_X, SHIFT_Y]] * (2 * shift)
        for column in (BRIGHTNESS, CONTRAST, SATURATION):
            table[:, column] = 1 + signed[:, column] * colour
    return table


def normalise(images: Tensor) -> Tensor:
    """uint8 or float ``[B, 3, H, W]`` in 0..255 to float32 of about -2..2."""
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@functools.lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: copying them there for every batch would make the host wait each time.
    return tuple(torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))


def apply(images: Tensor, coverage: Tensor, table: Tensor, *, mode: str) -> tuple[Tensor, Tensor]:
    """Augmented crops and their coverages.

    Labels are warped as coverages, not as class numbers, so their edges stay where they belong.

    Args:
        images: uint8 ``[B, Hc, Wc, 3]``.
        coverage: uint8 ``[B, Hm, Wm, 2]``: share of a cell taken by this person, by others (255: all).
        table: float32 ``[B, COLUMNS]`` from :func:`draw`, on the same device.
        mode: as given to :func:`draw`.

    Returns:
        images float32 ``[B, 3, Hc, Wc]``, normalised, and coverage float32 ``[B, 2, Hm, Wm]`` in
        0..255.
    """
    pixels, shares = images.permute(0, 3, 1, 2).float(), coverage.permute(0, 3, 1, 2).float()
    if mode in ("flip", "full"):
        flip = table[:, FLIP].bool().view(-1, 1, 1, 1)
        pixels, shares = (torch.where(flip, x.flip(-1), x) for x in (pixels, shares))
    if mode == "full":
        aspect = pixels.shape[-2] / pixels.shape[-1]
        pixels, shares = (_warp(x, table, aspect) for x in (pixels, shares))
        pixels = _recolour(pixels, table)
    return normalise(pixels), shares


def _warp(x: Tensor, table: Tensor, aspect: float) -> Tensor:
    """Rotate, scale and shift about the middle; what lies beyond the crop is its mirror image.

    ``aspect`` is the crop's height over its width in input pixels; a mask of another shape covers the same crop.
    """
    cos, sin = table[:, ANGLE].cos() / table[:, SCALE], table[:, ANGLE].sin() / table[:, SCALE]
    # Normalised coordinates run -1..1 along both sides, so a rotation has to know their ratio.
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * aspect, table[:, SHIFT_X]], dim=-1),
            torch.stack([sin / aspect, cos, table[:, SHIFT_Y]], dim=-1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recolour(pixels: Tensor, table: Tensor) -> Tensor:
    """Saturation about each pixel's grey, contrast about each image's mean, then brightness."""
    saturation, contrast, brightness = (
        table[:, column].view(-1, 1, 1, 1) for column in (SATURATION, CONTRAST, BRIGHTNESS)
    )
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + (pixels - grey) * saturation
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * contrast
    return (pixels * brightness).clamp(0.0, 255.0)
