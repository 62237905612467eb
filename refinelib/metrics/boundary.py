"""How well outlines agree: Boundary IoU, boundary F, surface distances, on the masks' own device.

Conventions, for every function here:

* A mask is bool ``[..., H, W]``; everything outside the image is background, so a mask cut off by
  the image's edge has its boundary there.
* Two empty masks agree perfectly: IoU 1, F 1, distances 0. If just one is empty: IoU 0, F 0, and
  both distances are the image's diagonal ``hypot(H, W)``, which no two pixels can reach.
* Nothing but :func:`outline_distances` waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refinelib.modeling.geometry import edt

#: Width of the Boundary IoU band as a share of the diagonal: 2 pixels at 64 x 64.
BAND_RATIO = 2 / math.hypot(64, 64)

#: The same on whole images, as Cheng et al. define it.
IMAGE_BAND_RATIO = 0.02

# Pairs of contour points held at once: 64 MB.
_PAIRS = 2**23


# -- overlap -------------------------------------------------------------------------------------
def mask_iou(pred: Tensor, true: Tensor) -> Tensor:
    """IoU of bool masks ``[..., H, W]``, float64 ``[...]``; 1 where both are empty."""
    union = (pred | true).sum((-2, -1))
    overlap = (pred & true).sum((-2, -1))
    return torch.where(union > 0, overlap.double() / union.clamp(min=1), 1.0)


# -- bands ---------------------------------------------------------------------------------------
def band_width(size_hw: Sequence[int], ratio: float = BAND_RATIO) -> int:
    """Width in pixels of the Boundary IoU band of an H x W mask: 2 at 64 x 64, growing with the diagonal.

    Rounded to the nearest pixel, halves up, at least 1. For whole images see :func:`image_band_width`.
    """
    height, width = size_hw
    # The small term keeps an exact half (48 x 48: 1.5) from falling on either side by floating point.
    return max(1, math.floor(ratio * math.hypot(height, width) + 0.5 + 1e-9))


def image_band_width(size_hw: Sequence[int]) -> int:
    """Width in pixels of the band on a whole H x W image: 2 % of its diagonal, 16 at 480 x 640.

    Rounded as the reference code of Cheng et al., "Boundary IoU", CVPR 2021, rounds it (Python's
    ``round``), so that figures compare to the pixel; at least 1.
    """
    return max(1, round(IMAGE_BAND_RATIO * math.hypot(*size_hw)))


def boundary_band(mask: Tensor, width: int) -> Tensor:
    """Pixels of a mask within ``width`` of its outside: the mask minus its erosion by a (2 width + 1) square.

    ``mask`` and the result are bool ``[..., H, W]``. Source: Cheng et al., "Boundary IoU", CVPR 2021;
    their ``width`` rounds of a 3 x 3 erosion on an image padded with 0 are the same set.
    Raises ValueError for a width under 1.
    """
    if width < 1:
        raise ValueError(f"the boundary band's width is {width}; it must be at least 1 pixel")
    height, breadth = mask.shape[-2:]
    outside = (~mask).reshape(math.prod(mask.shape[:-2]), 1, height, breadth).float()
    # max_pool2d by itself would pad with minus infinity, which means "mask goes on" here.
    grown = F.pad(outside, (width, width, width, width), value=1.0)
    side = 2 * width + 1
    grown = F.max_pool2d(F.max_pool2d(grown, (side, 1), stride=1), (1, side), stride=1)
    return mask & (grown > 0.5).reshape(mask.shape)


def boundary_iou(pred: Tensor, true: Tensor, width: int) -> Tensor:
    """Boundary IoU of bool masks ``[..., H, W]``, float64 ``[...]``: IoU of their bands (Cheng et al., 2021)."""
    return mask_iou(boundary_band(pred, width), boundary_band(true, width))


# -- contours ------------------------------------------------------------------------------------
class Surfaces(NamedTuple):
    """The contours of two masks and how far each pixel is from the other's, made by :func:`surfaces`."""

    pred: Tensor  #: contour pixels of the prediction, bool [..., H * W]
    true: Tensor  #: contour pixels of the truth, bool [..., H * W]
    to_true: Tensor  #: from any pixel to the nearest contour pixel of the truth, in pixels, float32 [..., H * W]
    to_pred: Tensor  #: the same to the prediction's contour
    diagonal: float  #: hypot(H, W) in pixels


def contour(mask: Tensor) -> Tensor:
    """Pixels of a bool mask ``[..., H, W]`` with one of their four neighbours, or the image's edge, outside it."""
    padded = F.pad(mask, (1, 1, 1, 1), value=False)
    up, down = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return mask & ~(up & down & left & right)


def surfaces(pred: Tensor, true: Tensor) -> Surfaces:
    """What :func:`boundary_f1`, :func:`hd95` and :func:`surface_distance` need of two bool masks ``[..., H, W]``."""
    both = torch.stack([contour(pred), contour(true)])
    distance = edt(both).flatten(-2)
    both = both.flatten(-2)
    return Surfaces(both[0], both[1], distance[1], distance[0], math.hypot(*pred.shape[-2:]))


def boundary_f1(found: Surfaces, tolerance: float) -> Tensor:
    """Boundary F score, float64 ``[...]``: harmonic mean of boundary precision and recall.

    A contour pixel is matched if the other contour comes within ``tolerance`` pixels of it, by exact
    Euclidean distance (Martin et al., PAMI 2004; with a disc for the matching as in DAVIS, Perazzi
    et al., CVPR 2016).
    """
    reach = tolerance + 1e-4  # whole distances must not fail by rounding; the next distance is farther than this
    precision = (found.pred & (found.to_true <= reach)).sum(-1).double() / found.pred.sum(-1)
    recall = (found.true & (found.to_pred <= reach)).sum(-1).double() / found.true.sum(-1)
    f1 = torch.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0.0)
    return _empty_as(f1, found, both=1.0, one=0.0)


def hd95(found: Surfaces) -> Tensor:
    """95 % Hausdorff distance in pixels, float64 ``[...]``: the larger of both directions' 95th percentiles.

    Percentiles interpolate linearly, as ``numpy.percentile`` does. Definition: Maier-Hein et al.,
    "Metrics reloaded", Nature Methods 2024.
    """
    there, back = _percentile(found.to_true, found.pred, 0.95), _percentile(found.to_pred, found.true, 0.95)
    return _empty_as(torch.maximum(there, back), found, both=0.0, one=found.diagonal)


def surface_distance(found: Surfaces) -> Tensor:
    """Average symmetric surface distance in pixels, float64 ``[...]``: mean over the pixels of both contours."""
    total = torch.where(found.pred, found.to_true, 0.0).sum(-1, dtype=torch.float64)
    total = total + torch.where(found.true, found.to_pred, 0.0).sum(-1, dtype=torch.float64)
    mean = total / (found.pred.sum(-1) + found.true.sum(-1))
    return _empty_as(mean, found, both=0.0, one=found.diagonal)


def outline_distances(pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Distances in pixels from each contour pixel of one mask to the other's contour, there and back.

    Of one pair of bool masks ``[H, W]``, neither empty; float64 ``[points of pred]`` and ``[points of true]``. The same
    numbers as :func:`surfaces` has, from the contours' points alone: at the size of a photograph that is a hundredth of the
    work of two distance transforms, but the number of points must be read back.
    """
    a, b = contour(pred).nonzero().double(), contour(true).nonzero().double()
    there, back = [], torch.full((len(b),), math.inf, dtype=torch.float64, device=b.device)
    for some in a.split(max(1, _PAIRS // max(1, len(b)))):
        apart = torch.cdist(some, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact for whole numbers
        there.append(apart.amin(1))
        back = torch.minimum(back, apart.amin(0))
    return torch.cat(there), back


def _percentile(values: Tensor, where: Tensor, share: float) -> Tensor:
    ranked = torch.where(where, values, math.inf).sort(-1).values.double()
    place = share * (where.sum(-1, keepdim=True) - 1).clamp(min=0).double()
    low, high = ranked.gather(-1, place.floor().long()), ranked.gather(-1, place.ceil().long())
    return torch.lerp(low, high, place - place.floor()).squeeze(-1)


def _empty_as(value: Tensor, found: Surfaces, both: float, one: float) -> Tensor:
    pred, true = found.pred.any(-1), found.true.any(-1)
    return torch.where(pred & true, value, torch.where(pred | true, torch.full_like(value, one), both))
