"""Whole-batch augmentation on the device, from random numbers drawn beforehand.

:func:`draw` makes the random numbers of many ROIs at once, on the CPU, from a seeded generator;
:func:`apply` is a pure function of them, the same on every device. So an ROI's augmentation
depends on the seed, the epoch and its place in the epoch alone (and who is pasted into it, on its
neighbour in the batch): a skipped step, a resumed run and a replayed incident see the very same pixels
(compiled kernels and plain ones differ in rounding alone).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Mean and standard deviation of ImageNet's RGB values, of 255: what "normalised" means here.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

#: Columns of the parameter table.
FLIP, ANGLE, SCALE, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, SATURATION, ASPECT, RED, BLUE, PASTE, PASTE_FLIP, PASTE_SCALE, PASTE_X, PASTE_Y, SHEAR, JITTER = range(18)
COLUMNS = 18

#: What PASTE says.
NOBODY, IN_FRONT, BEHIND = 0.0, 1.0, 2.0
#: Somebody pasted in front leaves at least this much of the target visible, and stands behind it otherwise.
LEAST_VISIBLE = 0.5
#: Cells with this much of the target (of 255) bound it: with it the boxes found on crops as they are lie on the annotated ones, 0.05 cells apart in the mean.
BOUNDING = 64.0
#: A fitted box is this many times as large as the one before, at least and at most: of somebody mostly hidden, a shred is no person.
LEAST_FIT, MOST_FIT = 0.4, 1.5


class Amounts(NamedTuple):
    """How much of everything."""

    degrees: float  # largest rotation
    scale: float  # largest relative change of size; drawn uniformly in its logarithm
    aspect: float  # largest relative change of width against height, likewise
    shift: float  # largest shift, of the canvas's side
    colour: float  # largest relative change of brightness, contrast and saturation
    tint: float  # of the red and of the blue channel
    paste: float  # share of ROIs with another person pasted in
    shear: float = 0.0  # largest slant, pixels across a pixel down
    fitted: bool = False  # whether the box is drawn anew around the target as it has become; scale, aspect and shift are then the box's errors


AMOUNTS = {
    "full": Amounts(degrees=10.0, scale=0.15, aspect=0.0, shift=0.06, colour=0.3, tint=0.0, paste=0.0),
    "strong": Amounts(degrees=20.0, scale=0.25, aspect=0.15, shift=0.08, colour=0.4, tint=0.1, paste=0.5, shear=0.15, fitted=True),
}


def draw(count: int, *, mode: str, generator: torch.Generator) -> Tensor:
    """Augmentation parameters of ``count`` ROIs.

    Args:
        count: number of rows.
        mode: ``off``; ``flip`` (left and right, half of all); ``full`` (flip, affine and colour); ``strong`` (more of it,
            people pasted in front and behind, and the box drawn anew around what is then to be seen of the target, well in
            most crops and badly in some: a box is where the person ends, and a network that never met a good one cannot know).
        generator: CPU generator; it gives the same number of values in every mode.

    Returns:
        float32 ``[count, COLUMNS]``.
    """
    # Two draws: what the first eight columns are does not depend on how many others there are.
    uniform = torch.cat([torch.rand(count, SATURATION + 1, generator=generator), torch.rand(count, COLUMNS - SATURATION - 1, generator=generator)], dim=1)
    signed = 2 * uniform - 1
    table = torch.zeros(count, COLUMNS)
    table[:, [SCALE, BRIGHTNESS, CONTRAST, SATURATION, ASPECT, RED, BLUE, PASTE_SCALE]] = 1.0
    if mode != "off":
        table[:, FLIP] = (uniform[:, FLIP] < 0.5).float()
    if mode in AMOUNTS:
        amounts = AMOUNTS[mode]
        table[:, ANGLE] = signed[:, ANGLE] * math.radians(amounts.degrees)
        table[:, SCALE] = torch.exp(signed[:, SCALE] * math.log1p(amounts.scale))
        table[:, ASPECT] = torch.exp(signed[:, ASPECT] * math.log1p(amounts.aspect))
        table[:, [SHIFT_X, SHIFT_Y]] = signed[:, [SHIFT_X, SHIFT_Y]] * (2 * amounts.shift)
        for column in (BRIGHTNESS, CONTRAST, SATURATION):
            table[:, column] = 1 + signed[:, column] * amounts.colour
        table[:, [RED, BLUE]] = 1 + signed[:, [RED, BLUE]] * amounts.tint
        drawn = uniform[:, PASTE]
        table[:, PASTE] = torch.where(drawn < amounts.paste / 2, IN_FRONT, torch.where(drawn < amounts.paste, BEHIND, NOBODY))
        table[:, PASTE_FLIP] = (uniform[:, PASTE_FLIP] < 0.5).float()
        table[:, PASTE_SCALE] = torch.exp(signed[:, PASTE_SCALE] * math.log(1.5))
        table[:, [PASTE_X, PASTE_Y]] = signed[:, [PASTE_X, PASTE_Y]] * torch.tensor([0.9, 0.5])
        table[:, SHEAR] = signed[:, SHEAR] * amounts.shear
        if amounts.fitted:  # most boxes are good, some are bad
            table[:, JITTER] = uniform[:, JITTER].square()
            table[:, [SCALE, ASPECT]] = table[:, [SCALE, ASPECT]] ** table[:, JITTER, None]
            table[:, [SHIFT_X, SHIFT_Y]] *= table[:, JITTER, None]
    return table


def normalise(images: Tensor) -> Tensor:
    """uint8 or float ``[B, 3, H, W]`` in 0..255 to float32 of about -2..2."""
    if torch.compiler.is_compiling():  # numbers in the kernel: a tensor would be copied from the host, which a graph being captured forbids
        return torch.stack([(channel.float() - mean) / std for channel, mean, std in zip(images.unbind(1), MEAN, STD)], dim=1)
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@functools.lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: copying them there for every batch would make the host wait each time.
    return tuple(torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))


def apply(
    images: Tensor, coverage: Tensor, table: Tensor, *, mode: str, window: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Augmented crops and their coverages.

    Labels are warped as coverages, not as class numbers, so their edges stay where they belong.

    Args:
        images: uint8 ``[B, Hc, Wc, 3]``.
        coverage: uint8 ``[B, Hm, Wm, 2]``: share of a cell taken by this person, by others (255: all).
        table: float32 ``[B, COLUMNS]`` from :func:`draw`, on the same device.
        mode: as given to :func:`draw`.
        window: share of the crop's height and width that the person's box takes.

    Returns:
        images float32 ``[B, 3, Hc, Wc]``, normalised, and coverage float32 ``[B, 2, Hm, Wm]`` in
        0..255.
    """
    pixels, shares = images.permute(0, 3, 1, 2).float(), coverage.permute(0, 3, 1, 2).float()
    if mode == "strong" and len(images) > 1:  # nobody is his own neighbour
        pixels, shares = _paste(pixels, shares, table)
    if mode != "off":
        flip = table[:, FLIP].bool().view(-1, 1, 1, 1)
        pixels, shares = (torch.where(flip, x.flip(-1), x) for x in (pixels, shares))
    if mode in AMOUNTS:
        aspect = pixels.shape[-2] / pixels.shape[-1]
        matrix = _matrix(table, aspect, _fit(shares, table, aspect, window) if AMOUNTS[mode].fitted else None)
        places, mask_places = _grids(pixels, shares, matrix)
        itself = _look(shares[:, :1], mask_places, "zeros")
        # Beyond the crop lies its mirror image; whoever is seen in it is somebody else.
        pixels, shares = _look(pixels, places, "reflection"), _look(shares, mask_places, "reflection")
        shares = torch.cat([itself, shares.sum(dim=1, keepdim=True) - itself], dim=1)
        pixels = _recolour(pixels, table, tinted=AMOUNTS[mode].tint > 0)
    return normalise(pixels), shares


def _turn(table: Tensor, aspect: float) -> Tensor:
    """Rotation after shear, ``[B, 2, 2]``, from where a pixel goes to where it comes from.

    ``aspect`` is the crop's height over its width in input pixels: normalised coordinates run -1..1 along both sides, so a
    rotation has to know their ratio. A mask of another shape covers the same crop.
    """
    cos, sin, shear = table[:, ANGLE].cos(), table[:, ANGLE].sin(), table[:, SHEAR]
    first = torch.stack([cos, sin / aspect], dim=-1)
    second = torch.stack([-sin * aspect, cos], dim=-1)
    return torch.stack([first, second + aspect * shear[:, None] * first], dim=-1)


def _matrix(table: Tensor, aspect: float, fitted: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn, stretch and shift about the middle, ``[B, 2, 3]`` as :func:`torch.nn.functional.affine_grid` takes it.

    With ``fitted`` (middle and size, ``[B, 2]`` each, in turned coordinates) the box is laid there first.
    """
    turn = _turn(table, aspect)
    stretch = torch.stack([1 / (table[:, SCALE] * table[:, ASPECT]), 1 / table[:, SCALE]], dim=-1)
    shift = table[:, SHIFT_X : SHIFT_Y + 1]
    if fitted is None:
        return torch.cat([turn * stretch[:, None], shift[:, :, None]], dim=-1)
    middle, size = fitted
    return torch.cat([turn * (size * stretch)[:, None], turn @ (middle + size * shift)[:, :, None]], dim=-1)


def _fit(shares: Tensor, table: Tensor, aspect: float, window: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The upright box of the turned target: its middle (x, y) and its size relative to the box before, ``[B, 2]`` each."""
    (a, b), (c, d) = (row.unbind(-1) for row in _turn(table, aspect).unbind(1))
    height, width = shares.shape[-2:]
    y, x = ((torch.arange(side, device=shares.device) + 0.5) * (2 / side) - 1 for side in (height, width))
    there = shares[:, 0] >= BOUNDING
    ends = []
    for along_x, along_y, part in ((d, -b, window[1]), (-c, a, window[0])):  # the turn's inverse: its determinant is 1
        turned = along_x[:, None, None] * x + along_y[:, None, None] * y[:, None]
        half = along_x.abs() / width + along_y.abs() / height  # of a cell
        low = torch.where(there, turned, math.inf).amin(dim=(1, 2)) - half
        high = torch.where(there, turned, -math.inf).amax(dim=(1, 2)) + half
        ends.append((0.5 * (low + high), (0.5 / part * (high - low)).clamp(LEAST_FIT, MOST_FIT)))
    seen = there.any(dim=2).any(dim=1)[:, None]
    middle, size = (torch.stack(pair, dim=-1) for pair in zip(*ends))
    return torch.where(seen, middle, 0.0), torch.where(seen, size, 1.0)


def _grids(pixels: Tensor, shares: Tensor, matrix: Tensor) -> list[Tensor]:
    """Where each cell of pixels and of shares comes from, ``[B, H, W, 2]``. Many small kernels: made once where both have one size."""
    sizes = [list(x.shape[-2:]) for x in (pixels, shares)]
    first = F.affine_grid(matrix, [len(matrix), 1, *sizes[0]], align_corners=False)
    return [first, first if sizes[0] == sizes[1] else F.affine_grid(matrix, [len(matrix), 1, *sizes[1]], align_corners=False)]


def _look(x: Tensor, grid: Tensor, beyond: str) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def _paste(pixels: Tensor, shares: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The person of the crop before in the batch, cut out by its coverage, as a non-target in front of or behind this one.

    The cut's edges are as soft as the coverage, so no seam tells the network where somebody was pasted (Dwibedi et al.,
    "Cut, Paste and Learn", 2017; Ghiasi et al., "Simple Copy-Paste", 2021).
    """
    pasted, front = (table[:, PASTE] != NOBODY).view(-1, 1, 1, 1), (table[:, PASTE] == IN_FRONT).view(-1, 1, 1, 1)
    mirror, scale = 1 - 2 * table[:, PASTE_FLIP], table[:, PASTE_SCALE]
    zero = torch.zeros_like(scale)
    matrix = torch.stack(
        [
            torch.stack([mirror / scale, zero, -table[:, PASTE_X] * mirror / scale], dim=-1),
            torch.stack([zero, 1 / scale, -table[:, PASTE_Y] / scale], dim=-1),
        ],
        dim=1,
    )
    size = pixels.shape[-2:]
    cut = shares[:, :1].roll(1, 0) / 255
    places, mask_places = _grids(pixels, cut, matrix)
    on_mask = _look(cut, mask_places, "zeros") * pasted
    cut = cut if cut.shape[-2:] == size else F.interpolate(cut, size=size, mode="bilinear", align_corners=False)
    layer = _look(torch.cat([pixels.roll(1, 0) * cut, cut], dim=1), places, "zeros") * pasted

    target, other = (shares / 255).split(1, dim=1)
    left = (target * (1 - on_mask)).sum(dim=(1, 2, 3), keepdim=True)
    front = front & (left >= LEAST_VISIBLE * target.sum(dim=(1, 2, 3), keepdim=True))
    hidden = torch.where(front, 0.0, target)  # what the target hides of the one behind it
    seen = target if target.shape[-2:] == size else F.interpolate(target, size=size, mode="bilinear", align_corners=False)
    layer = layer * (1 - torch.where(front, 0.0, seen))
    pixels = layer[:, :3] + (1 - layer[:, 3:]) * pixels
    visible = on_mask * (1 - hidden)
    target = torch.where(front, target * (1 - on_mask), target)
    other = torch.minimum(other * (1 - on_mask) + visible, 1 - target)
    return pixels, 255 * torch.cat([target, other], dim=1)


def _recolour(pixels: Tensor, table: Tensor, *, tinted: bool) -> Tensor:
    """Tint, saturation about each pixel's grey, contrast about each image's mean, then brightness."""
    if tinted:
        pixels = pixels * torch.stack([table[:, RED], torch.ones_like(table[:, RED]), table[:, BLUE]], dim=1).view(-1, 3, 1, 1)
    saturation, contrast, brightness = (
        table[:, column].view(-1, 1, 1, 1) for column in (SATURATION, CONTRAST, BRIGHTNESS)
    )
    pixels = torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, saturation)
    pixels = torch.lerp(pixels.mean(dim=(1, 2, 3), keepdim=True), pixels, contrast)
    return (pixels * brightness).clamp(0.0, 255.0)
