"""Mask metrics on the device: IoU, Boundary IoU, boundary F, surface distances.

Conventions, for every function here:

* A mask is bool ``[..., H, W]``; everything outside the image is background, so a mask cut off by
  the image's edge has its boundary there.
* Two empty masks agree perfectly: IoU 1, F 1, distances 0. If just one is empty: IoU 0, F 0, and
  both distances are the image's diagonal ``hypot(H, W)``, which no two pixels can reach.
* ``nan`` stands for "does not apply here" (the IoU of a class that neither side has, the target IoU
  of a ROI without target) and is left out of every mean.
* Nothing but :meth:`SegmentationMetrics.compute` and :func:`bootstrap_interval` waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinelib.geometry import edt

CLASSES = 3
TARGET = 1
NONTARGET = 2

#: Width of the Boundary IoU band as a share of the diagonal: 2 pixels at 64 x 64.
BAND_RATIO = 2 / math.hypot(64, 64)

#: COCO's size groups: a person's area in image pixels, from (included) and to (not included).
SIZE_GROUPS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}


# -- regions -------------------------------------------------------------------------------------
def confusion_per_roi(pred_labels: Tensor, labels: Tensor, classes: int = CLASSES) -> Tensor:
    """Pixel counts of each ROI, int64 ``[B, classes, classes]``: row = truth, column = prediction.

    ``pred_labels`` and ``labels`` are integers ``[B, H, W]`` of equal shape. A pixel where either
    of them is outside ``0 .. classes - 1`` counts nowhere. Raises ValueError for probabilities or logits
    in place of labels, and for shapes that differ.
    """
    if pred_labels.shape != labels.shape or labels.ndim != 3:
        raise ValueError(
            f"predicted labels {list(pred_labels.shape)} and labels {list(labels.shape)} "
            "must have the same shape [B, H, W]; cut both to the box window first"
        )
    if pred_labels.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers, not {pred_labels.dtype} (predicted) and {labels.dtype} (true); "
            "take probs.argmax(1) first"
        )
    # Comparing and summing instead of bincount (reads its maximum back) or a matrix product (rounds under autocast).
    values = range(classes)
    predicted = [pred_labels == value for value in values]
    true = [labels == value for value in values]
    return torch.stack([torch.stack([(t & p).sum((1, 2)) for p in predicted], -1) for t in true], -2)


def confusion(pred_labels: Tensor, labels: Tensor, classes: int = CLASSES) -> Tensor:
    """Pixel counts over the whole batch, int64 ``[classes, classes]``; see :func:`confusion_per_roi`."""
    return confusion_per_roi(pred_labels, labels, classes).sum(0)


def iou_from_confusion(counts: Tensor) -> Tensor:
    """IoU of each class, float64 ``[..., C]``, from counts ``[..., C, C]``; nan for a class that neither side has."""
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


def mask_iou(pred: Tensor, true: Tensor) -> Tensor:
    """IoU of bool masks ``[..., H, W]``, float64 ``[...]``; 1 where both are empty."""
    union = (pred | true).sum((-2, -1))
    overlap = (pred & true).sum((-2, -1))
    return torch.where(union > 0, overlap.double() / union.clamp(min=1), 1.0)


def target_iou(pred_labels: Tensor, labels: Tensor) -> Tensor:
    """IoU of the target of each ROI, float64 ``[B]``, from labels ``[B, H, W]``; 1 where neither side has one."""
    return mask_iou(pred_labels == TARGET, labels == TARGET)


def nontarget_iou(pred_labels: Tensor, labels: Tensor) -> Tensor:
    """IoU of the other people of each ROI, float64 ``[B]``, from labels ``[B, H, W]``; 1 where neither has any."""
    return mask_iou(pred_labels == NONTARGET, labels == NONTARGET)


# -- bands ---------------------------------------------------------------------------------------
def band_width(size_hw: Sequence[int], ratio: float = BAND_RATIO) -> int:
    """Width in pixels of the Boundary IoU band of an H x W mask: 2 at 64 x 64, growing with the diagonal.

    Rounded to the nearest pixel, halves up, at least 1. ``ratio=0.02`` is what Cheng et al. use on
    whole images; at 64 x 64 both give 2.
    """
    height, width = size_hw
    # The small term keeps an exact half (48 x 48: 1.5) from falling on either side by floating point.
    return max(1, math.floor(ratio * math.hypot(height, width) + 0.5 + 1e-9))


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


def _percentile(values: Tensor, where: Tensor, share: float) -> Tensor:
    ranked = torch.where(where, values, math.inf).sort(-1).values.double()
    place = share * (where.sum(-1, keepdim=True) - 1).clamp(min=0).double()
    low, high = ranked.gather(-1, place.floor().long()), ranked.gather(-1, place.ceil().long())
    return torch.lerp(low, high, place - place.floor()).squeeze(-1)


def _empty_as(value: Tensor, found: Surfaces, both: float, one: float) -> Tensor:
    pred, true = found.pred.any(-1), found.true.any(-1)
    return torch.where(pred & true, value, torch.where(pred | true, torch.full_like(value, one), both))


# -- over a data set -----------------------------------------------------------------------------
class SegmentationMetrics:
    """Gathers metrics over batches on the device; only :meth:`compute` reads them back.

    Args:
        full: also boundary F, HD95 and surface distance, which need an exact distance transform.
        width: the Boundary IoU band in pixels; none: :func:`band_width` of the labels' own size.
    """

    def __init__(self, full: bool = True, width: int | None = None) -> None:
        self.full = full
        self.width = width
        self._batches: list[dict[str, Tensor]] = []
        self._has_areas = False

    @torch.no_grad()
    def update(self, pred_labels: Tensor, labels: Tensor, areas: Tensor | None = None) -> None:
        """Add a batch: integer labels ``[B, H, W]`` cut to the box window, and the persons' ``[B]`` areas.

        ``areas`` are in image pixels and sort the ROIs into size groups; a ROI without one (nan) is in
        none of them. Raises ValueError where shapes do not fit or labels are not integers.
        """
        counts = confusion_per_roi(pred_labels, labels)
        if areas is None:
            areas = torch.full((len(labels),), math.nan, dtype=torch.float64, device=labels.device)
        elif areas.shape != labels.shape[:1]:
            raise ValueError(f"areas {list(areas.shape)} must be one number a ROI, [{len(labels)}]")
        else:
            self._has_areas = True
        iou = iou_from_confusion(counts)
        holds = counts.sum(-1) > 0
        pred, true = pred_labels == TARGET, labels == TARGET
        width = band_width(labels.shape[-2:]) if self.width is None else self.width
        of_target = {"boundary_iou": boundary_iou(pred, true, width)}
        if self.full:
            found = surfaces(pred, true)
            of_target["boundary_f1_1px"] = boundary_f1(found, 1)
            of_target["boundary_f1_2px"] = boundary_f1(found, 2)
            of_target["hd95"] = hd95(found)
            of_target["surface_distance"] = surface_distance(found)
        rows = {"miou": iou.nanmean(-1), "target_iou": iou[:, TARGET].where(holds[:, TARGET], math.nan)}
        rows["nontarget_iou"] = iou[:, NONTARGET].where(holds[:, NONTARGET], math.nan)
        rows |= {name: value.where(holds[:, TARGET], math.nan) for name, value in of_target.items()}
        rows["area"] = areas.to(labels.device, torch.float64, non_blocking=True)
        self._batches.append({"confusion": counts, **rows})

    def per_roi(self) -> dict[str, Tensor]:
        """Every metric of every ROI in the order of the updates, on the device.

        ``confusion`` is int64 ``[N, 3, 3]``; ``miou``, ``target_iou``, ``nontarget_iou``, ``boundary_iou``,
        ``area`` (and with ``full`` the others by the names of :meth:`compute`) are float64 ``[N]``. nan where
        the truth has no target (``nontarget_iou``: no non-target) or no area was given: leave those out before
        sorting. Empty before the first update.
        """
        if not self._batches:
            nothing = SegmentationMetrics(self.full, self.width)
            blank = torch.zeros((0, 8, 8), dtype=torch.int64)
            nothing.update(blank, blank)
            return nothing.per_roi()
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}

    def compute(self) -> dict[str, Any]:
        """All metrics as plain numbers, safe for strict JSON; None where there was nothing to average.

        ``miou`` and ``iou`` ([background, target, non-target]) are of pixel counts pooled over all ROIs, a class
        that neither side has left out; ``miou_roi`` is the mean of each ROI's own. ``nontarget_iou`` is the mean
        over ROIs whose truth contains non-target; ``target_iou``, ``boundary_iou`` and, with ``full``,
        ``boundary_f1_1px``, ``boundary_f1_2px``, ``hd95`` and ``surface_distance`` (pixels) over those whose truth
        contains the target. ``rois`` counts all ROIs. Where areas were given, ``by_size`` has ``target_iou``,
        ``boundary_iou`` and ``rois`` for ``small``, ``medium`` and ``large``.
        """
        table = {name: value.cpu() for name, value in self.per_roi().items()}
        counts, miou, areas = table.pop("confusion"), table.pop("miou"), table.pop("area")
        iou = iou_from_confusion(counts.sum(0))
        result: dict[str, Any] = {"miou": _mean(iou), "iou": [_mean(one) for one in iou], "miou_roi": _mean(miou)}
        result |= {name: _mean(value) for name, value in table.items()}
        result["rois"] = len(areas)
        if self._has_areas:
            result["by_size"] = {}
            for group, (least, bound) in SIZE_GROUPS.items():
                inside = (areas >= least) & (areas < bound)
                means = {name: _mean(table[name][inside]) for name in ("target_iou", "boundary_iou")}
                result["by_size"][group] = {**means, "rois": int(inside.sum())}
        return result


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def bootstrap_interval(
    values: Any, groups: Any = None, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a mean over ROIs, whole images drawn with replacement.

    ``values`` ``[N]`` is a tensor, array or list, nan entries left out; ``groups`` ``[N]`` says which image each
    belongs to (none: each by itself), since people of one image are not independent. Source: Efron & Tibshirani,
    "An Introduction to the Bootstrap", 1993, chapter 13. Raises ValueError where nothing is left to draw from.
    """
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    names = np.arange(len(numbers)) if groups is None else groups
    names = np.asarray(names.cpu() if isinstance(names, Tensor) else names)
    if numbers.ndim != 1 or names.shape != numbers.shape:
        raise ValueError(f"values {list(numbers.shape)} and groups {list(names.shape)} must be two lists of one length")
    if not 0 < level < 1 or n < 1:
        raise ValueError(f"level = {level}, n = {n}: the level must lie between 0 and 1, n must be at least 1")
    kept = ~np.isnan(numbers)
    if not kept.any():
        raise ValueError(f"none of the {len(numbers)} values is a number, so there is no mean to bound")
    _, image = np.unique(names[kept], return_inverse=True)
    sums, counts = np.bincount(image, weights=numbers[kept]), np.bincount(image)
    random = np.random.default_rng(seed)
    means = np.empty(n)
    for draw in range(n):
        chosen = random.integers(len(sums), size=len(sums))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
