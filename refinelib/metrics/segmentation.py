"""Metrics of three-class labels over a data set: pooled and per ROI, of the target and of others, by size.

``nan`` stands for "does not apply here" (the IoU of a class that neither side has, the target IoU of a
ROI without target) and is left out of every mean. Everything stays on the labels' device;
:func:`summarise` (and so :meth:`SegmentationMetrics.compute`) is the one place that waits for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from refinelib.metrics.boundary import band_width, boundary_f1, boundary_iou, hd95, surface_distance, surfaces
from refinelib.metrics.bootstrap import ImageBootstrap
from refinelib.modeling import NON_TARGET, TARGET

CLASSES = 3

#: COCO's size groups: a person's area in image pixels, from (included) and to (not included).
SIZE_GROUPS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
#: The data's own thirds by area, which hold as many people each whatever the data set.
THIRDS = ("smaller", "middle", "larger")


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


def iou_from_confusion(counts: Tensor) -> Tensor:
    """IoU of each class, float64 ``[..., C]``, from counts ``[..., C, C]``; nan for a class that neither side has."""
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


# -- over a data set -----------------------------------------------------------------------------
class SegmentationMetrics:
    """Gathers metrics over batches on the device; only :meth:`compute` reads them back.

    Args:
        full: also boundary F, HD95 and surface distance, which need an exact distance transform.
        width: the Boundary IoU band in pixels; none: :func:`~refinelib.metrics.boundary.band_width` of the labels' own size.
    """

    def __init__(self, full: bool = True, width: int | None = None) -> None:
        self.full = full
        self.width = width
        self._batches: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def update(
        self, pred_labels: Tensor, labels: Tensor, areas: Tensor | None = None, image_ids: Tensor | None = None
    ) -> None:
        """Add a batch: integer labels ``[B, H, W]`` cut to the box window, the persons' ``[B]`` areas and images.

        ``areas`` are in image pixels and sort the ROIs into size groups; a ROI without one (nan) is in
        none of them. ``image_ids`` are whole numbers, for intervals over images. Raises ValueError where shapes
        do not fit or labels are not integers.
        """
        counts = confusion_per_roi(pred_labels, labels)
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
        rows = {"miou_roi": iou.nanmean(-1), "target_iou": iou[:, TARGET].where(holds[:, TARGET], math.nan)}
        rows["nontarget_iou"] = iou[:, NON_TARGET].where(holds[:, NON_TARGET], math.nan)
        rows |= {name: value.where(holds[:, TARGET], math.nan) for name, value in of_target.items()}
        rows["area"] = _column(areas, labels, math.nan, torch.float64)
        rows["image_id"] = _column(image_ids, labels, -1, torch.int64)
        self._batches.append({"confusion": counts, **rows})

    def per_roi(self) -> dict[str, Tensor]:
        """Every metric of every ROI in the order of the updates, on the device.

        ``confusion`` is int64 ``[N, 3, 3]``, ``image_id`` int64 ``[N]`` (-1 where none was given); ``miou_roi``,
        ``target_iou``, ``nontarget_iou``, ``boundary_iou``, ``area`` (and with ``full`` the others by the names of
        :meth:`compute`) are float64 ``[N]``. nan where the truth has no target (``nontarget_iou``: no non-target)
        or no area was given: leave those out before sorting. Empty before the first update.
        """
        if not self._batches:
            nothing = SegmentationMetrics(self.full, self.width)
            blank = torch.zeros((0, 8, 8), dtype=torch.int64)
            nothing.update(blank, blank)
            return nothing.per_roi()
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}

    def compute(self, *, intervals: bool = False) -> dict[str, Any]:
        """All metrics as plain numbers, safe for strict JSON; see :func:`summarise`."""
        return summarise(self.per_roi(), intervals=intervals)


def summarise(table: dict[str, Tensor], *, intervals: bool = False) -> dict[str, Any]:
    """Means over a table of ROIs as plain numbers, safe for strict JSON; None where there was nothing to average.

    ``miou`` and ``iou`` ([background, target, non-target]) are of pixel counts pooled over all ROIs, a class
    that neither side has left out; every other name is the mean of its column, nan left out: ``miou_roi``
    over all ROIs, ``nontarget_iou`` over ROIs whose truth contains non-target, the rest over those whose truth
    contains the target. ``rois`` counts all ROIs. Where areas were given, ``by_size`` has the means, ``rois`` and
    ``area`` (from, to; pixels) for COCO's ``small``, ``medium`` and ``large``, ``by_third`` for thirds of the data.

    Args:
        table: columns as of :meth:`SegmentationMetrics.per_roi`; all but ``confusion``, ``area`` and
            ``image_id`` are averaged.
        intervals: add ``intervals``, a 95 % bootstrap interval ``[low, high]`` over images, to the result
            and to each group.

    Raises:
        ValueError: intervals without the image of each ROI.
    """
    table = dict(table)
    result = _means(table, intervals)
    areas = table["area"].cpu()
    if not areas.isnan().all():
        for title, groups in (("by_size", coco_groups(areas)), ("by_third", third_groups(areas))):
            result[title] = {}
            for name, (inside, bounds) in groups.items():
                part = {column: values[inside.to(values.device)] for column, values in table.items()}
                result[title][name] = {**_means(part, intervals), "area": [None if math.isinf(b) else b for b in bounds]}
    return result


def coco_groups(areas: Tensor) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """Who belongs to COCO's small, medium, large (bool ``[N]``) and the group's bounds in pixels, from and to."""
    return {name: ((areas >= low) & (areas < high), (low, high)) for name, (low, high) in SIZE_GROUPS.items()}


def third_groups(areas: Tensor) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """Thirds of the people by area, equal in number but for a rest, and the least and largest area of each.

    Of equal areas the earlier comes first; people without area (nan) are in none; a third that would
    hold nobody is left out.
    """
    order = areas.argsort(stable=True)[: int((~areas.isnan()).sum())]  # nan sorts last
    groups = {}
    for name, members in zip(THIRDS, order.tensor_split(3)):
        if len(members):
            inside = torch.zeros(len(areas), dtype=torch.bool)
            inside[members] = True
            groups[name] = inside, (float(areas[members[0]]), float(areas[members[-1]]))
    return groups


def _means(table: dict[str, Tensor], intervals: bool) -> dict[str, Any]:
    """Pooled and mean figures of a table, without groups."""
    counts, columns = table["confusion"], {n: v for n, v in table.items() if n not in ("confusion", "area", "image_id")}
    iou = iou_from_confusion(counts.sum(0))
    result: dict[str, Any] = {"miou": _mean(iou), "iou": [_mean(one) for one in iou]}
    result |= {name: _mean(value) for name, value in columns.items()}
    result["rois"] = len(counts)
    if intervals and len(counts):
        if bool((table["image_id"] < 0).any()):
            raise ValueError("intervals over images need image_ids with every update, 0 or more each")
        draw = ImageBootstrap(table["image_id"])
        found = {"miou": draw.pooled(counts, lambda sums: iou_from_confusion(sums).nanmean(-1))}
        found |= {name: draw.mean(value) for name, value in columns.items()}
        result["intervals"] = {name: None if ends is None else list(ends) for name, ends in found.items()}
    return result


def _column(values: Tensor | None, labels: Tensor, missing: float, dtype: torch.dtype) -> Tensor:
    if values is None:
        return torch.full((len(labels),), missing, dtype=dtype, device=labels.device)
    if values.shape != labels.shape[:1]:
        raise ValueError(f"areas and image_ids must be one number a ROI, [{len(labels)}], not {list(values.shape)}")
    return values.to(labels.device, dtype, non_blocking=True)


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean
