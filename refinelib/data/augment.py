"""Whole-batch augmentation on the device, from random numbers drawn beforehand.

:func:`draw` makes the random numbers of many ROIs at once, on the CPU, from a seeded generator. :func:`apply`
is a pure function of them. So an ROI's augmentation depends on the seed, the epoch and its place in the epoch
alone (and what is pasted into it on its neighbour in the batch): a skipped step, a resumed run and a replayed
incident get the same pixels. Compiled and plain kernels differ in rounding only.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own abbreviation)
from torch import Tensor

#: Mean and standard deviation of ImageNet's RGB values, of 255: what "normalised" means here.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

#: Columns of the parameters.
FLIP, ANGLE, SCALE, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, SATURATION = range(8)
ASPECT, RED, BLUE, PASTE, PASTE_FLIP, PASTE_SCALE, PASTE_X, PASTE_Y, SHEAR, JITTER = range(8, 18)
COLUMNS = 18
#: Values of the column PASTE.
NOBODY, IN_FRONT, BEHIND = 0.0, 1.0, 2.0
#: A person pasted in front leaves at least this fraction of the target visible, and stands behind it
#: otherwise.
LEAST_VISIBLE = 0.5
#: Cells with this much of the target (of 255) bound it. The boxes found so on crops without augmentation
#: differ from the annotated ones by 0.05 cells in the mean.
BOUNDING = 64.0
#: A re-fitted box is this many times as large as the one before, at least and at most: the small visible rest
#: of a person who is mostly hidden makes no useful box.
LEAST_FIT, MOST_FIT = 0.4, 1.5


class Amounts(NamedTuple):
    """Strength of every part of an augmentation."""

    degrees: float  # largest rotation
    scale: float  # largest relative change of size; drawn uniformly in its logarithm
    aspect: float  # largest relative change of width against height, likewise
    shift: float  # largest shift, as a fraction of the canvas's side
    colour: float  # largest relative change of brightness, contrast and saturation
    tint: float  # largest relative change of the red and of the blue channel
    paste: float  # fraction of ROIs with another person pasted in
    shear: float  # largest slant, pixels across a pixel down
    fitted: bool  # re-fit the box to the visible target; scale, aspect and shift are then box errors


AMOUNTS = {
    "full": Amounts(10.0, 0.15, 0.0, 0.06, 0.3, tint=0.0, paste=0.0, shear=0.0, fitted=False),
    "strong": Amounts(20.0, 0.25, 0.15, 0.08, 0.4, tint=0.1, paste=0.5, shear=0.15, fitted=True),
}


def draw(count: int, *, mode: str, generator: torch.Generator) -> Tensor:
    """Augmentation parameters of ``count`` ROIs.

    Args:
        count: number of rows.
        mode: ``off``; ``flip`` (left and right, half of all); ``full`` (flip, affine and colour); ``strong``
            (more of these, persons pasted in front and behind, and the box re-fitted to the visible part of
            the target, with small errors in most crops and large ones in some).
        generator: CPU generator; the same number of values is drawn in every mode.

    Returns:
        float32 ``[count, COLUMNS]``.

    Example:
        >>> params = draw(4, mode="flip", generator=torch.Generator().manual_seed(0))
        >>> params.shape, params[:, FLIP].tolist()
        (torch.Size([4, 18]), [1.0, 1.0, 0.0, 1.0])
    """
    # Two draws: the values of the first eight columns do not depend on the number of the other columns.
    sizes = (SATURATION + 1, COLUMNS - SATURATION - 1)
    uniform = torch.cat([torch.rand(count, size, generator=generator) for size in sizes], dim=1)
    signed = 2 * uniform - 1
    params = torch.zeros(count, COLUMNS)
    params[:, [SCALE, BRIGHTNESS, CONTRAST, SATURATION, ASPECT, RED, BLUE, PASTE_SCALE]] = 1.0
    if mode != "off":
        params[:, FLIP] = (uniform[:, FLIP] < 0.5).float()
    if mode not in AMOUNTS:
        return params
    amounts = AMOUNTS[mode]
    colours, tints, shifts = [BRIGHTNESS, CONTRAST, SATURATION], [RED, BLUE], [SHIFT_X, SHIFT_Y]
    params[:, ANGLE] = signed[:, ANGLE] * math.radians(amounts.degrees)
    params[:, SCALE] = torch.exp(signed[:, SCALE] * math.log1p(amounts.scale))
    params[:, ASPECT] = torch.exp(signed[:, ASPECT] * math.log1p(amounts.aspect))
    params[:, SHEAR] = signed[:, SHEAR] * amounts.shear
    params[:, shifts] = signed[:, shifts] * (2 * amounts.shift)
    params[:, colours] = 1 + signed[:, colours] * amounts.colour
    params[:, tints] = 1 + signed[:, tints] * amounts.tint
    pasted, behind = uniform[:, PASTE] < amounts.paste, uniform[:, PASTE] >= amounts.paste / 2
    params[:, PASTE] = torch.where(pasted, torch.where(behind, BEHIND, IN_FRONT), NOBODY)
    params[:, PASTE_FLIP] = (uniform[:, PASTE_FLIP] < 0.5).float()
    params[:, PASTE_SCALE] = torch.exp(signed[:, PASTE_SCALE] * math.log(1.5))
    params[:, [PASTE_X, PASTE_Y]] = signed[:, [PASTE_X, PASTE_Y]] * torch.tensor([0.9, 0.5])
    if amounts.fitted:  # most boxes are good, some are bad
        jitter = params[:, [JITTER]] = uniform[:, [JITTER]].square()
        params[:, [SCALE, ASPECT]] = params[:, [SCALE, ASPECT]] ** jitter
        params[:, shifts] *= jitter
    return params


def normalise(images: Tensor) -> Tensor:
    """Images in 0..255 as float32 of mean 0 and standard deviation 1 (by ImageNet's statistics).

    Args:
        images: uint8 or float ``[B, 3, H, W]``.

    Example:
        >>> normalise(torch.full((1, 3, 1, 1), 255)).flatten().tolist()
        [2.248908281326294, 2.4285714626312256, 2.640000104904175]
    """
    # A CUDA graph forbids copies from the host: numbers become part of the kernel.
    if torch.compiler.is_compiling():
        channels = zip(images.unbind(1), MEAN, STD, strict=True)
        return torch.stack([(channel.float() - mean) / std for channel, mean, std in channels], dim=1)
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@functools.lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, ...]:
    # Kept on the device: copying them there for every batch would make the host wait each time.
    return tuple(torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))


def apply(
    images: Tensor, coverage: Tensor, params: Tensor, *, mode: str, window: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Augmented crops and their area fractions.

    Labels are warped as area fractions, not as class numbers, so their edges stay in place.

    Args:
        images: uint8 ``[B, Hc, Wc, 3]``.
        coverage: uint8 ``[B, Hm, Wm, 2]``: fraction of a cell covered by this person, by others (255: all);
            with three channels also ignored.
        params: float32 ``[B, COLUMNS]`` from :func:`draw`, on the same device.
        mode: as given to :func:`draw`.
        window: fraction of the crop's height and width that the person's box takes.

    Returns:
        images float32 ``[B, 3, Hc, Wc]``, normalised, and fractions float32 ``[B, C, Hm, Wm]`` in 0..255.

    Example:
        >>> crops, coverage = torch.zeros(2, 8, 8, 3).byte(), torch.zeros(2, 4, 4, 2).byte()
        >>> params = draw(2, mode="full", generator=torch.Generator())
        >>> [x.shape for x in apply(crops, coverage, params, mode="full")]
        [torch.Size([2, 3, 8, 8]), torch.Size([2, 2, 4, 4])]
    """
    pixels, fractions = images.permute(0, 3, 1, 2).float(), coverage.permute(0, 3, 1, 2).float()
    if mode == "strong" and len(images) > 1:  # the only crop of a batch has no neighbour
        pixels, fractions = _paste(pixels, fractions, params)
    if mode != "off":
        flip = params[:, FLIP].bool().view(-1, 1, 1, 1)
        pixels, fractions = (torch.where(flip, x.flip(-1), x) for x in (pixels, fractions))
    if mode in AMOUNTS:
        aspect = pixels.shape[-2] / pixels.shape[-1]
        box = _fit(fractions, params, aspect, window) if AMOUNTS[mode].fitted else None
        grid, mask_grid = _grids(pixels, fractions, _matrix(params, aspect, box))
        target = _warp(fractions[:, :1], mask_grid, "zeros")
        # Beyond the crop lies its mirror image; a person seen there is a non-target.
        pixels, fractions = _warp(pixels, grid, "reflection"), _warp(fractions, mask_grid, "reflection")
        people, ignored = fractions[:, :2], fractions[:, 2:]
        fractions = torch.cat([target, people.sum(dim=1, keepdim=True) - target, ignored], dim=1)
        pixels = _recolour(pixels, params, tinted=AMOUNTS[mode].tint > 0)
    return normalise(pixels), fractions


def _turn(params: Tensor, aspect: float) -> Tensor:
    """Rotation after shear, ``[B, 2, 2]``, from where a pixel goes to where it comes from.

    ``aspect`` is the crop's height over its width in input pixels: normalised coordinates run -1..1 along
    both sides, so a rotation has to know their ratio. A mask of another shape covers the same crop.
    """
    cos, sin, shear = params[:, ANGLE].cos(), params[:, ANGLE].sin(), params[:, SHEAR]
    first = torch.stack([cos, sin / aspect], dim=-1)
    second = torch.stack([-sin * aspect, cos], dim=-1)
    return torch.stack([first, second + aspect * shear[:, None] * first], dim=-1)


def _matrix(params: Tensor, aspect: float, box: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn, stretch and shift about the middle, ``[B, 2, 3]`` for :func:`torch.nn.functional.affine_grid`.

    With ``box`` (middle and size, ``[B, 2]`` each, in turned coordinates) the crop is laid on that box first.
    """
    turn = _turn(params, aspect)
    stretch = torch.stack([1 / (params[:, SCALE] * params[:, ASPECT]), 1 / params[:, SCALE]], dim=-1)
    shift = params[:, SHIFT_X : SHIFT_Y + 1]
    if box is None:
        return torch.cat([turn * stretch[:, None], shift[:, :, None]], dim=-1)
    middle, size = box
    return torch.cat([turn * (size * stretch)[:, None], turn @ (middle + size * shift)[:, :, None]], dim=-1)


def _fit(
    fractions: Tensor, params: Tensor, aspect: float, window: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The upright box around the turned target, from the cells that hold a good part of it.

    Returns:
        Its middle (x, y) in turned coordinates and its size relative to the box before, ``[B, 2]`` each.
    """
    height, width = fractions.shape[-2:]
    x, y = ((torch.arange(side, device=params.device) + 0.5) * (2 / side) - 1 for side in (width, height))
    target = fractions[:, 0] >= BOUNDING
    (a, b), (c, d) = (row.unbind(-1) for row in _turn(params, aspect).unbind(1))
    middles, sizes = [], []
    # The inverse of the turn, whose determinant is 1, leads from a cell to its turned x and its turned y.
    for from_x, from_y, part in ((d, -b, window[1]), (-c, a, window[0])):
        turned = from_x[:, None, None] * x + from_y[:, None, None] * y[:, None]
        half_cell = from_x.abs() / width + from_y.abs() / height
        low = torch.where(target, turned, math.inf).amin(dim=(1, 2)) - half_cell
        high = torch.where(target, turned, -math.inf).amax(dim=(1, 2)) + half_cell
        middles.append(0.5 * (low + high))
        sizes.append((0.5 / part * (high - low)).clamp(LEAST_FIT, MOST_FIT))
    seen = target.any(dim=2).any(dim=1)[:, None]
    return torch.where(seen, torch.stack(middles, -1), 0.0), torch.where(seen, torch.stack(sizes, -1), 1.0)


def _grids(pixels: Tensor, fractions: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Where each cell of both comes from, ``[B, H, W, 2]``; one grid where both have one size."""
    sizes = [[len(matrix), 1, *x.shape[-2:]] for x in (pixels, fractions)]
    grid = F.affine_grid(matrix, sizes[0], align_corners=False)
    return grid, grid if sizes[0] == sizes[1] else F.affine_grid(matrix, sizes[1], align_corners=False)


def _warp(x: Tensor, grid: Tensor, beyond: str) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _paste(pixels: Tensor, fractions: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The person of the previous crop in the batch, cut out by its coverage, in front of or behind this one.

    The cut's edges are as soft as the coverage, so that no seam marks the paste (Dwibedi et al., "Cut, Paste
    and Learn", 2017; Ghiasi et al., "Simple Copy-Paste", 2021).
    """
    pasted = (params[:, PASTE] != NOBODY).view(-1, 1, 1, 1)
    front = (params[:, PASTE] == IN_FRONT).view(-1, 1, 1, 1)
    mirror, scale = 1 - 2 * params[:, PASTE_FLIP], params[:, PASTE_SCALE]
    zero = torch.zeros_like(scale)
    across = torch.stack([mirror / scale, zero, -params[:, PASTE_X] * mirror / scale], dim=-1)
    down = torch.stack([zero, 1 / scale, -params[:, PASTE_Y] / scale], dim=-1)
    size = pixels.shape[-2:]
    cut = fractions[:, :1].roll(1, 0) / 255
    grid, mask_grid = _grids(pixels, cut, torch.stack([across, down], dim=1))
    on_mask = _warp(cut, mask_grid, "zeros") * pasted
    cut = _resized(cut, size)
    layer = _warp(torch.cat([pixels.roll(1, 0) * cut, cut], dim=1), grid, "zeros") * pasted

    target, other, *ignored = (fractions / 255).split(1, dim=1)
    left = (target * (1 - on_mask)).sum(dim=(1, 2, 3), keepdim=True)
    front = front & (left >= LEAST_VISIBLE * target.sum(dim=(1, 2, 3), keepdim=True))
    layer = layer * (1 - torch.where(front, 0.0, _resized(target, size)))
    pixels = layer[:, :3] + (1 - layer[:, 3:]) * pixels
    visible = on_mask * (1 - torch.where(front, 0.0, target))  # the target hides a person behind it
    target = torch.where(front, target * (1 - on_mask), target)
    other = torch.minimum(other * (1 - on_mask) + visible, 1 - target)
    return pixels, 255 * torch.cat([target, other, *(x * (1 - on_mask) for x in ignored)], dim=1)


def _recolour(pixels: Tensor, params: Tensor, *, tinted: bool) -> Tensor:
    """Tint, saturation about each pixel's grey, contrast about each image's mean, then brightness."""
    if tinted:
        tint = torch.stack([params[:, RED], torch.ones_like(params[:, RED]), params[:, BLUE]], dim=1)
        pixels = pixels * tint.view(-1, 3, 1, 1)
    saturation, contrast, brightness = (
        params[:, column].view(-1, 1, 1, 1) for column in (SATURATION, CONTRAST, BRIGHTNESS)
    )
    pixels = torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, saturation)
    pixels = torch.lerp(pixels.mean(dim=(1, 2, 3), keepdim=True), pixels, contrast)
    return (pixels * brightness).clamp(0.0, 255.0)
