"""How well outlines agree: Boundary IoU, boundary F, surface distances, on the masks' own device.

Conventions, for every function here:

* A mask is bool ``[..., H, W]``; everything outside the image is background, so a mask cut off by
  the image's edge has its boundary there.
* Two empty masks agree perfectly: IoU 1, F 1, distances 0. If just one is empty: IoU 0, F 0, and
  both distances are the image's diagonal ``hypot(H, W)``, which no two pixels can reach.
* Nothing but :func:`point_surfaces` waits for the device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from scipy.spatial import KDTree
from torch import Tensor

from refinelib.modeling.geometry import edt

#: Width of the Boundary IoU band as a share of the diagonal: 2 pixels at 64 x 64.
BAND_RATIO = 2 / math.hypot(64, 64)

#: The same on whole images, as Cheng et al. define it.
IMAGE_BAND_RATIO = 0.02


# -- overlap -------------------------------------------------------------------------------------
def mask_iou(pred: Tensor, true: Tensor) -> Tensor:
    """IoU of bool masks ``[..., H, W]``, float64 ``[...]``; 1 where both are empty.

    Example:
        >>> mask_iou(torch.tensor([[True, True]]), torch.tensor([[True, False]]))
        tensor(0.5000, dtype=torch.float64)
    """
    union = (pred | true).sum((-2, -1))
    overlap = (pred & true).sum((-2, -1))
    return torch.where(union > 0, overlap.double() / union.clamp(min=1), 1.0)


# -- bands ---------------------------------------------------------------------------------------
def band_width(size_hw: Sequence[float], ratio: float = BAND_RATIO) -> int:
    """Width in pixels of the Boundary IoU band of an H x W mask; it grows with the diagonal.

    Rounded to the nearest pixel, halves up, at least 1. For whole images see :func:`image_band_width`.

    Example:
        >>> band_width((64, 64)), band_width((480, 640))
        (2, 18)
    """
    # The small term keeps an exact half (48 x 48: 1.5) from falling on either side by floating point.
    return max(1, math.floor(ratio * math.hypot(*size_hw) + 0.5 + 1e-9))


def image_band_width(size_hw: Sequence[int]) -> int:
    """Width in pixels of the band on a whole H x W image: 2 % of its diagonal.

    Rounded as the reference code of Cheng et al., "Boundary IoU", CVPR 2021, rounds it (Python's
    ``round``), so that figures compare to the pixel; at least 1.

    Example:
        >>> image_band_width((480, 640))
        16
    """
    return max(1, round(IMAGE_BAND_RATIO * math.hypot(*size_hw)))


def boundary_band(mask: Tensor, width: int) -> Tensor:
    """Pixels of a mask within ``width`` of its outside: the mask minus its erosion by a (2 width + 1) square.

    Source: Cheng et al., "Boundary IoU", CVPR 2021; their ``width`` rounds of a 3 x 3 erosion on an image
    padded with 0 are the same set.

    Args:
        mask: bool ``[..., H, W]``.
        width: pixels, at least 1.

    Returns:
        bool ``[..., H, W]``.

    Raises:
        ValueError: a width under 1.

    Example:
        >>> boundary_band(torch.ones(3, 3, dtype=torch.bool), 1)[1]
        tensor([ True, False,  True])
    """
    if width < 1:
        raise ValueError(f"the boundary band's width is {width}; it must be at least 1 pixel")
    outside = (~mask).reshape(-1, 1, *mask.shape[-2:]).float()
    # max_pool2d by itself would pad with minus infinity, which means "mask goes on" here.
    grown = F.pad(outside, (width, width, width, width), value=1.0)
    side = 2 * width + 1
    grown = F.max_pool2d(F.max_pool2d(grown, (side, 1), stride=1), (1, side), stride=1)
    return mask & (grown > 0.5).reshape(mask.shape)


def boundary_iou(pred: Tensor, true: Tensor, width: int) -> Tensor:
    """Boundary IoU of bool masks ``[..., H, W]``, float64 ``[...]``: IoU of their bands (Cheng et al., 2021).

    Example:
        >>> mask = torch.ones(9, 9, dtype=torch.bool)
        >>> boundary_iou(mask, mask, 2)
        tensor(1., dtype=torch.float64)
    """
    return mask_iou(boundary_band(pred, width), boundary_band(true, width))


# -- contours ------------------------------------------------------------------------------------
class Surfaces(NamedTuple):
    """The contours of two masks and how far their pixels are from the other's contour.

    Attributes:
        pred: which of the pixels below are on the prediction's contour, bool ``[..., P]``.
        true: the same of the truth's, bool ``[..., Q]``.
        to_true: from a pixel to the nearest contour pixel of the truth, in pixels, float ``[..., P]``.
        to_pred: the same to the prediction's contour, float ``[..., Q]``.
        diagonal: ``hypot(H, W)`` in pixels.
    """

    pred: Tensor
    true: Tensor
    to_true: Tensor
    to_pred: Tensor
    diagonal: float


def contour(mask: Tensor) -> Tensor:
    """Pixels of a bool mask ``[..., H, W]`` with a neighbour (of four), or the image's edge, outside it.

    Example:
        >>> contour(torch.ones(3, 3, dtype=torch.bool))[1]
        tensor([ True, False,  True])
    """
    padded = F.pad(mask, (1, 1, 1, 1), value=False)
    up, down = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return mask & ~(up & down & left & right)


def surfaces(pred: Tensor, true: Tensor) -> Surfaces:
    """What :func:`boundary_f1`, :func:`hd95` and :func:`surface_distance` need, by distance transforms.

    Args:
        pred: bool ``[..., H, W]``.
        true: bool ``[..., H, W]``.

    Example:
        >>> mask = torch.eye(8, dtype=torch.bool)
        >>> hd95(surfaces(mask, mask)).item()
        0.0
    """
    both = torch.stack([contour(pred), contour(true)])
    distance = edt(both).flatten(-2)
    both = both.flatten(-2)
    return Surfaces(both[0], both[1], distance[1], distance[0], math.hypot(*pred.shape[-2:]))


def point_surfaces(pred: Tensor, true: Tensor, diagonal: float) -> Surfaces:
    """The numbers of :func:`surfaces` from the contours' points alone, for one pair of masks.

    At the size of a photograph that is a hundredth of the work of two distance transforms, but the points are
    read back from the device.

    Args:
        pred: bool ``[1, H, W]``, cut from an image.
        true: of the same window.
        diagonal: of the image, pixels.

    Example:
        >>> mask = torch.eye(8, dtype=torch.bool)[None]
        >>> hd95(point_surfaces(mask, mask, 11.3)).item()
        0.0
    """
    a, b = (contour(mask[0]).nonzero().cpu().numpy() for mask in (pred, true))
    if not len(a) or not len(b):
        on = torch.ones(1, 1, dtype=torch.bool, device=pred.device)
        far = torch.full((1, 1), diagonal, dtype=torch.float64, device=pred.device)
        return Surfaces(on & (len(a) > 0), on & (len(b) > 0), far, far, diagonal)
    distances = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    to_true, to_pred = (torch.from_numpy(found)[None].to(pred.device) for found in distances)
    on_pred, on_true = (torch.ones_like(x, dtype=torch.bool) for x in (to_true, to_pred))
    return Surfaces(on_pred, on_true, to_true, to_pred, diagonal)


def boundary_f1(found: Surfaces, tolerance: float) -> Tensor:
    """Boundary F score, float64 ``[...]``: harmonic mean of boundary precision and recall.

    A contour pixel is matched if the other contour comes within ``tolerance`` pixels of it, by exact
    Euclidean distance (Martin et al., PAMI 2004; with a disc for the matching as in DAVIS, Perazzi
    et al., CVPR 2016).

    Example:
        >>> mask = torch.eye(8, dtype=torch.bool)
        >>> round(boundary_f1(surfaces(mask, mask.roll(1, 1)), 1).item(), 2)
        0.93
    """
    reach = tolerance + 1e-4  # rounding does not matter: the next distance is farther than this
    precision = (found.pred & (found.to_true <= reach)).sum(-1).double() / found.pred.sum(-1)
    recall = (found.true & (found.to_pred <= reach)).sum(-1).double() / found.true.sum(-1)
    f1 = torch.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0.0)
    return _empty_as(f1, found, both=1.0, one=0.0)


def hd95(found: Surfaces) -> Tensor:
    """95 % Hausdorff distance in pixels, float64 ``[...]``: the larger of both directions' 95th percentiles.

    Percentiles interpolate linearly, as ``numpy.percentile`` does. Definition: Maier-Hein et al.,
    "Metrics reloaded", Nature Methods 2024.

    Example:
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[:, 2] = True
        >>> hd95(surfaces(mask, mask.roll(3, 1))).item()
        3.0
    """
    there = found.to_true.double().where(found.pred, math.nan).nanquantile(0.95, dim=-1)
    back = found.to_pred.double().where(found.true, math.nan).nanquantile(0.95, dim=-1)
    return _empty_as(torch.maximum(there, back), found, both=0.0, one=found.diagonal)


def surface_distance(found: Surfaces) -> Tensor:
    """Average symmetric surface distance in pixels, float64 ``[...]``: mean over the pixels of both contours.

    Example:
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[:, 2] = True
        >>> surface_distance(surfaces(mask, mask.roll(3, 1))).item()
        3.0
    """
    total = torch.where(found.pred, found.to_true, 0.0).sum(-1, dtype=torch.float64)
    total = total + torch.where(found.true, found.to_pred, 0.0).sum(-1, dtype=torch.float64)
    mean = total / (found.pred.sum(-1) + found.true.sum(-1))
    return _empty_as(mean, found, both=0.0, one=found.diagonal)


def _empty_as(value: Tensor, found: Surfaces, both: float, one: float) -> Tensor:
    pred, true = found.pred.any(-1), found.true.any(-1)
    return torch.where(pred & true, value, torch.where(pred | true, torch.full_like(value, one), both))
