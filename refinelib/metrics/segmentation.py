"""Metrics of three-class labels over a data set: pooled and per ROI, of the target and of others, by size.

``nan`` stands for "does not apply here" (the IoU of a class that neither side has, the target IoU of a
ROI without target) and is left out of every mean. Everything stays on the labels' device;
:meth:`SegmentationMetrics.compute` is the one place that waits for it.

A metric is added by one line: ``METRICS.add(name, Metric(function, "title"))``. Epoch records, reports and
tables of people have it from then on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refinelib import ranks
from refinelib.metrics import boundary
from refinelib.modeling import IGNORED, NON_TARGET, TARGET
from refinelib.registry import METRICS

#: COCO's size groups: a person's area in image pixels, from (included) and to (not included).
SIZE_GROUPS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
#: Terciles of the data by area, which hold as many people each whatever the data set.
TERCILES = ("smaller", "middle", "larger")
#: Sets of images that a bootstrap interval is taken from.
DRAWS = 2000
#: Columns of a table of ROIs that are no metric.
KEYS = ("confusion", "area", "image_id")


# -- what is measured ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """Masks of the target and their truth, and what metrics share, computed when first used.

    Attributes:
        pred, true: bool ``[B, H, W]``: pixels of the target.
        confusion: int64 ``[B, 3, 3]``, pixel counts: row = truth, column = prediction.
        width: of the Boundary IoU band, pixels.
        size: ``(H, W)`` of the whole image where the masks are a window of it; None: they are ROIs.
    """

    pred: Tensor
    true: Tensor
    confusion: Tensor
    width: int
    size: Sequence[int] | None = None

    @cached_property
    def iou(self) -> Tensor:
        """IoU of each class, float64 ``[B, 3]``."""
        return iou_from_confusion(self.confusion)

    @cached_property
    def surfaces(self) -> boundary.Surfaces:
        """Contours and their distances."""
        if self.size is None:
            return boundary.surfaces(self.pred, self.true)
        return boundary.point_surfaces(self.pred, self.true, math.hypot(*self.size))

    def holds(self, label: int) -> Tensor:
        """Whether the truth holds a class, bool ``[B]``."""
        return self.true.any(-1).any(-1) if label == TARGET else self.confusion[:, label].sum(-1) > 0

    def figures(self, *, full: bool) -> dict[str, Tensor]:
        """Every registered metric by name, float64 ``[B]``; ``full``: the costly ones too."""
        found = {}
        for name, metric in METRICS.items():
            if (full or not metric.costly) and (self.size is not None or not metric.needs_image):
                value = metric.function(self)
                found[name] = value if metric.of is None else value.where(self.holds(metric.of), math.nan)
        return found


@dataclass(frozen=True)
class Metric:
    """A metric as :data:`~refinelib.registry.METRICS` holds it.

    Attributes:
        function: from a :class:`Comparison` to float64 ``[B]``, one number a ROI or mask.
        title: as plots and tables show it.
        unit: ``px`` or nothing.
        higher_is_better: the direction.
        needs_image: it is of whole images only; the others are computed on ROIs and on images.
        of: class that the truth must hold for it to apply; None: it always does.
        costly: it is left out of a run's validations, but for the last.
    """

    function: Callable[[Comparison], Tensor]
    title: str
    unit: str = ""
    higher_is_better: bool = True
    needs_image: bool = False
    of: int | None = TARGET
    costly: bool = False


def _image_boundary_iou(masks: Comparison) -> Tensor:
    assert masks.size is not None
    return boundary.boundary_iou(masks.pred, masks.true, boundary.image_band_width(masks.size))


def _add(name: str, title: str, function: Callable[[Comparison], Tensor], **more: Any) -> None:
    METRICS.add(name, Metric(function, title, **more))


_LENGTH: dict[str, Any] = {"unit": "px", "higher_is_better": False, "costly": True}
_add("miou_roi", "mIoU of a ROI", lambda x: x.iou.nanmean(-1), of=None)
_add("target_iou", "target IoU", lambda x: boundary.mask_iou(x.pred, x.true))
_add("nontarget_iou", "non-target IoU", lambda x: x.iou[:, NON_TARGET], of=NON_TARGET)
_add("boundary_iou", "Boundary IoU", lambda x: boundary.boundary_iou(x.pred, x.true, x.width))
_add("boundary_iou_image", "Boundary IoU, 2 % of the diagonal", _image_boundary_iou, needs_image=True)
_add("boundary_f1_1px", "boundary F, 1 px", lambda x: boundary.boundary_f1(x.surfaces, 1), costly=True)
_add("boundary_f1_2px", "boundary F, 2 px", lambda x: boundary.boundary_f1(x.surfaces, 2), costly=True)
_add("hd95", "HD95", lambda x: boundary.hd95(x.surfaces), **_LENGTH)
_add("surface_distance", "surface distance", lambda x: boundary.surface_distance(x.surfaces), **_LENGTH)


def confusion_per_roi(pred_labels: Tensor, labels: Tensor) -> Tensor:
    """Pixel counts of each ROI.

    Args:
        pred_labels: integers ``[B, H, W]``.
        labels: the same of the truth. A pixel where either is none of the three classes counts nowhere.

    Returns:
        int64 ``[B, 3, 3]``: row = truth, column = prediction.

    Raises:
        ValueError: probabilities or logits in place of labels; shapes that differ.

    Example:
        >>> confusion_per_roi(torch.tensor([[[0, 1]]]), torch.tensor([[[1, 1]]]))
        tensor([[[0, 0, 0],
                 [1, 1, 0],
                 [0, 0, 0]]])
    """
    if pred_labels.shape != labels.shape or labels.ndim != 3:
        shapes = f"{list(pred_labels.shape)} and {list(labels.shape)}"
        raise ValueError(f"labels of {shapes} must have the same shape [B, H, W]: cut both to the box window")
    if pred_labels.is_floating_point() or labels.is_floating_point():
        kinds = f"{pred_labels.dtype} and {labels.dtype}"
        raise ValueError(f"labels must be integers, not {kinds}; take probs.argmax(1) first")
    # Comparing and summing: bincount reads its maximum back, a matrix product rounds under autocast.
    predicted, true = ([x == value for value in range(3)] for x in (pred_labels, labels))
    return torch.stack([torch.stack([(t & p).sum((1, 2)) for p in predicted], -1) for t in true], -2)


def iou_from_confusion(counts: Tensor) -> Tensor:
    """IoU of each class from pixel counts; nan for a class that neither side has.

    Args:
        counts: ``[..., C, C]``: row = truth, column = prediction.

    Returns:
        float64 ``[..., C]``.

    Example:
        >>> iou_from_confusion(torch.tensor([[3, 1], [0, 4]]))
        tensor([0.7500, 0.8000], dtype=torch.float64)
    """
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


# -- over a data set -----------------------------------------------------------------------------
def metrics_device(device: torch.device) -> torch.device:
    """Where metrics of a device's results are computed: Apple's GPUs lack float64, and the CPU does it.

    Example:
        >>> metrics_device(torch.device("mps")), metrics_device(torch.device("cuda:1"))
        (device(type='cpu'), device(type='cuda', index=1))
    """
    return torch.device("cpu") if device.type == "mps" else device


class SegmentationMetrics:
    """Gathers metrics over batches on the device; only :meth:`compute` reads them back.

    Args:
        full: also the costly metrics: boundary F, HD95 and surface distance need a distance transform.

    Example:
        >>> metrics, labels = SegmentationMetrics(), torch.ones(2, 8, 8, dtype=torch.int64)
        >>> metrics.update(labels, labels)
        >>> metrics.compute()["target_iou"]
        1.0
    """

    def __init__(self, full: bool = True) -> None:
        self.full = full
        self._batches: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def update(
        self, predicted: Tensor, labels: Tensor, areas: Tensor | None = None, image_ids: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            predicted: integers ``[B, H, W]``, cut to the box window.
            labels: the same of the truth; where it is ``IGNORED``, the prediction does not count.
            areas: ``[B]``, the persons' areas in image pixels, which sort the ROIs into size groups; a ROI
                without one (nan) is in none of them.
            image_ids: ``[B]`` whole numbers, for intervals over images.

        Raises:
            ValueError: shapes that do not fit; labels that are not integers.
        """
        confusion = confusion_per_roi(predicted, labels)
        found = (predicted == TARGET) & (labels != IGNORED)
        masks = Comparison(found, labels == TARGET, confusion, boundary.band_width(labels.shape[-2:]))
        row = {"confusion": confusion, **masks.figures(full=self.full)}
        row["area"] = _column(areas, labels, math.nan, torch.float64)
        row["image_id"] = _column(image_ids, labels, -1, torch.int64)
        self._batches.append(row)

    def gather(self, device: torch.device) -> None:
        """Join the batches of all processes (:mod:`refinelib.ranks`), in their order, on ``device``."""
        if ranks.count() > 1:
            mine = {name: column.cpu() for name, column in self.per_roi().items()}
            tables = ranks.gathered(mine)
            self._batches = [{name: column.to(device) for name, column in rows.items()} for rows in tables]

    def per_roi(self) -> dict[str, Tensor]:
        """Every metric of every ROI in the order of the updates, on the device.

        ``confusion`` is int64 ``[N, 3, 3]``, ``image_id`` int64 ``[N]`` (-1 where none was given); ``area``
        and the metrics by name are float64 ``[N]``. nan where the truth lacks the metric's class or no area
        was given: leave those out before sorting. Empty before the first update.
        """
        if not self._batches:
            nothing, blank = SegmentationMetrics(self.full), torch.zeros((1, 8, 8), dtype=torch.int64)
            nothing.update(blank, blank)
            return {name: column[:0] for name, column in nothing.per_roi().items()}
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}

    def compute(self, *, intervals: bool = False) -> dict[str, Any]:
        """Means over all ROIs as plain numbers, safe for strict JSON; this reads the device.

        Args:
            intervals: add ``intervals``, a 95 % bootstrap interval ``[low, high]`` over images, to the result
                and to each group.

        Returns:
            ``miou`` and ``iou`` ([background, target, non-target]) of pixel counts pooled over all ROIs, a
            class that neither side has left out; every other metric's mean, nan left out, None where nothing
            is left; ``rois``, their number. Where areas were given, ``by_size`` has the same and ``area``
            (from, to; pixels) for COCO's ``small``, ``medium`` and ``large``, ``by_tercile`` for the terciles
            of the data.

        Raises:
            ValueError: intervals without the image of each ROI.
        """
        table = self.per_roi()
        result = _means(table, intervals)
        areas = table["area"].cpu()
        if not areas.isnan().all():
            for title, groups in (("by_size", coco_groups(areas)), ("by_tercile", tercile_groups(areas))):
                result[title] = {}
                for name, (inside, bounds) in groups.items():
                    part = {column: values[inside.to(values.device)] for column, values in table.items()}
                    ends = [None if math.isinf(bound) else bound for bound in bounds]
                    result[title][name] = {**_means(part, intervals), "area": ends}
        return result


def coco_groups(areas: Tensor) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """Members of COCO's small, medium, large (bool ``[N]``) and the group's bounds in pixels, from and to.

    Example:
        >>> coco_groups(torch.tensor([100.0, 5000.0]))["medium"]
        (tensor([False,  True]), (1024.0, 9216.0))
    """
    return {name: ((areas >= low) & (areas < high), (low, high)) for name, (low, high) in SIZE_GROUPS.items()}


def tercile_groups(areas: Tensor) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """Terciles by area, equal in number but for a rest, and the least and largest area of each.

    Of equal areas the earlier comes first; people without area (nan) are in none; a tercile that would
    be empty is left out.

    Example:
        >>> tercile_groups(torch.tensor([3.0, 1.0, 2.0]))["larger"]
        (tensor([ True, False, False]), (3.0, 3.0))
    """
    order = areas.argsort(stable=True)[: int((~areas.isnan()).sum())]  # nan sorts last
    groups = {}
    for name, members in zip(TERCILES, order.tensor_split(3), strict=True):
        if len(members):
            inside = torch.zeros(len(areas), dtype=torch.bool)
            inside[members] = True
            groups[name] = inside, (float(areas[members[0]]), float(areas[members[-1]]))
    return groups


def _means(table: dict[str, Tensor], intervals: bool) -> dict[str, Any]:
    """Pooled and mean figures of a table, without groups."""
    counts, columns = table["confusion"], {name: x for name, x in table.items() if name not in KEYS}
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
        raise ValueError(f"areas and image_ids must be one number a ROI, not {list(values.shape)}")
    return values.to(labels.device, dtype, non_blocking=True)


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


# -- intervals --------------------------------------------------------------------------------------
class ImageBootstrap:
    """Whole images drawn with replacement, the same draws for every figure they bound.

    People of one image are not independent, so images are drawn and not ROIs. 95 % percentile intervals:
    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. All draws are taken at once,
    as one matrix product on the device of the values.

    Args:
        images: ``[N]``, tensor, array or list: the image of each ROI.
        seed: of the draws.

    Raises:
        ValueError: no ROI at all.

    Example:
        >>> ImageBootstrap([1, 1, 2]).mean([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """

    def __init__(self, images: Any, *, seed: int = 0) -> None:
        names = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
        if not names.size:
            raise ValueError("images must have the image of at least one ROI, and is empty")
        known, place = np.unique(names, return_inverse=True)
        random, even = np.random.default_rng(seed), np.full(len(known), 1 / len(known))
        self.images = len(known)
        self._place = torch.from_numpy(place.reshape(-1))
        # [draws, images]: how often each was drawn
        self._counts = torch.from_numpy(random.multinomial(len(known), even, size=DRAWS)).double()

    def mean(self, values: Any) -> tuple[float, float] | None:
        """Interval of the mean over ROIs.

        For two results on the same ROIs, the mean of their differences gives the paired interval.

        Args:
            values: ``[N]``, one number a ROI; nan is left out.

        Returns:
            ``(low, high)``; None if nothing is left.

        Raises:
            ValueError: not one number a ROI.
        """
        values = torch.as_tensor(values).double()
        if values.shape != self._place.shape:
            raise ValueError(f"give one number for each of {len(self._place)} ROIs, not {list(values.shape)}")
        kept = ~values.isnan()
        sums = self._drawn(torch.where(kept, values, 0.0))
        return self._bounds(sums / self._drawn(kept.double()))

    def pooled(self, counts: Tensor, figure: Callable[[Tensor], Tensor]) -> tuple[float, float] | None:
        """Interval of a figure of sums over all ROIs, such as mean IoU of pooled pixel counts.

        Args:
            counts: ``[N, ...]`` of each ROI, to be summed.
            figure: from sums ``[draws, ...]`` to ``[draws]``; nan is left out.

        Returns:
            ``(low, high)``; None if nothing is left.
        """
        return self._bounds(figure(self._drawn(counts.flatten(1).double()).unflatten(1, counts.shape[1:])))

    def _drawn(self, values: Tensor) -> Tensor:
        """Sums over the ROIs of each draw's images, ``[draws, ...]`` from ``[N, ...]``."""
        sums = torch.zeros(self.images, *values.shape[1:], dtype=torch.float64, device=values.device)
        return self._counts.to(sums.device) @ sums.index_add(0, self._place.to(values.device), values)

    def _bounds(self, found: Tensor) -> tuple[float, float] | None:
        low, high = found.nanquantile(found.new_tensor([0.025, 0.975])).tolist()
        return None if math.isnan(low) else (low, high)
