"""Masks pasted back into their images, scored against the truth at full resolution; COCO results of them."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pycocotools import mask as coco_mask
from torch import Tensor

from refinelib.data import CocoPeople, SceneError, Source
from refinelib.data.sources import Masks, box_of
from refinelib.metrics.boundary import band_width
from refinelib.metrics.predict import Pasted, paste_labels, threads
from refinelib.metrics.segmentation import Comparison, SegmentationMetrics, confusion_per_roi
from refinelib.modeling import IGNORED, NON_TARGET, TARGET
from refinelib.modeling.roi import crop_rois, labels_from_coverage

#: Persons of an image that are worked on at a time; what a predictor returns is in memory for all of them.
MOST_TOGETHER = 256
#: The first six figures of COCO's summary, in its order.
COCO_FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
#: A mask in COCO's results format, see :func:`coco_entry`.
CocoEntry = dict[str, Any]
#: xyxy of the pixels of a mask.
Extent = tuple[int, int, int, int]


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and the persons in it whose masks are asked for, ``N`` of the ``P`` that are annotated.

    Attributes:
        index: in its source.
        image_id: its data set's.
        pixels: uint8 ``[H, W, 3]``.
        masks: bool ``[P, H, W]``: of everybody.
        anyone: bool ``[H, W]``: where anybody is.
        ignored: bool ``[H, W]``: where nobody is known to be, and somebody may be; None: nowhere.
        slots: int ``[N]``: place in ``masks``.
        boxes: float64 ``[N, 4]`` xyxy.
        areas: float64 ``[N]``, pixels.
        annotation_ids: ``[N]``.
        category_ids: ``[N]``.
        scored: bool ``[N]``: a ROI; others (a side under 16 px) count for average precision only.
    """

    index: int
    image_id: int
    pixels: Any
    masks: Any | Masks
    anyone: Any
    ignored: Any
    slots: Any
    boxes: Tensor
    areas: Any
    annotation_ids: list[int]
    category_ids: list[int]
    scored: Any

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.pixels.shape[0], self.pixels.shape[1]


#: From an image with its boxes to the mask of each, in order.
Predict = Callable[[AnnotatedImage], Iterable[Pasted]]


def annotated_images(
    source: Source, *, max_images: int | None = None, only: Any | None = None
) -> Iterator[AnnotatedImage]:
    """The images of a source, one at a time; of COCO with all persons that have a mask and a box.

    One with more than ``MOST_TOGETHER`` persons comes several times, with other persons each time.

    Args:
        source: of scenes.
        max_images: only the first so many.
        only: annotation ids of the ROIs to be scored; none: all.
    """
    instances = source.instances(max_images)
    wanted = np.isin(instances.annotation_ids, instances.annotation_ids if only is None else only)
    for index, start in zip(*np.unique(instances.image_index, return_index=True), strict=True):
        try:
            scene = source.scene(int(index))
        except (SceneError, OSError):  # counted when the store was built
            continue
        height, width = scene.image.shape[:2]
        rows = np.flatnonzero(wanted & (instances.image_index == index))
        rois = instances.slots[rows].tolist()
        columns: Any = instances.annotation_ids, np.ones(len(wanted), int), instances.boxes, instances.areas
        known = dict(zip(rois, zip(*(column[rows] for column in columns), strict=True), strict=True))
        if isinstance(source, CocoPeople):
            known = {i: (*row.values(),) for i, row in enumerate(source.annotated_instances(int(index)))}
        slots = [i for i in sorted(known) if _in_image(known[i][2], height, width) and scene.masks[i].any()]
        anyone = scene.masks.any(0)
        ignored = None if scene.ignored is None else scene.ignored & ~anyone
        of_image: Any = {"index": int(index), "image_id": int(instances.image_ids[start])}
        of_image |= {"pixels": scene.image, "masks": scene.masks, "anyone": anyone, "ignored": ignored}
        for first in range(0, len(slots), MOST_TOGETHER):
            some = slots[first : first + MOST_TOGETHER]
            ids, categories, boxes, areas = map(np.array, zip(*(known[slot] for slot in some), strict=True))
            yield AnnotatedImage(
                **of_image,
                slots=np.array(some),
                boxes=torch.as_tensor(boxes, dtype=torch.float64),
                areas=areas.astype(np.float64),
                annotation_ids=ids.tolist(),
                category_ids=categories.tolist(),
                scored=np.isin(some, rois),
            )


def _in_image(box: Any, height: int, width: int) -> bool:
    """Whether a box is finite and has an area in the image."""
    x0, y0, x1, y1 = box
    return all(map(math.isfinite, box)) and min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)


class ImageMetrics(SegmentationMetrics):
    """Figures of one predictor over the persons of many images, and its masks as COCO results.

    Args:
        full: the costly metrics too.

    Attributes:
        coco: everybody's mask.
        counted: the same without ignored pixels, for :func:`average_precision`.
        annotation_ids: of the persons scored, in the order of :meth:`per_roi`.
        masks: run lengths of their masks, by annotation id.
    """

    def __init__(self, full: bool = True) -> None:
        super().__init__(full)
        self.coco, self.counted = list[CocoEntry](), list[CocoEntry]()
        self.annotation_ids: list[int] = []
        self.masks: dict[int, dict[str, Any]] = {}

    def add(self, image: AnnotatedImage, person: int, found: Pasted, truth: Tensor, extent: Extent) -> None:
        """Compare one mask with the truth.

        Args:
            image: that it is in.
            person: its place among the image's.
            found: labels of its box.
            truth: labels ``[H, W]`` on the device, 1 where the person is; not looked at if it is not scored.
            extent: xyxy of the person's own pixels.
        """
        mask = (found.labels == TARGET).cpu().numpy()
        where: Any = {"top": found.top, "left": found.left, "size": image.size}
        segmentation = encode(mask, **where)
        entry = coco_entry(image.image_id, image.category_ids[person], segmentation, float(found.score))
        self.coco.append(entry)
        if image.ignored is not None:
            entry = {**entry, "segmentation": encode(mask & ~image.ignored[found.window], **where)}
        self.counted.append(entry)
        if not image.scored[person]:
            return
        x0, y0, x1, y1 = image.boxes[person].tolist()
        row = compare(found, truth, extent, band_width((y1 - y0, x1 - x0)), full=self.full)
        row["area"] = torch.tensor([image.areas[person]], dtype=torch.float64, device=truth.device)
        row["image_id"] = torch.tensor([image.index], device=truth.device)
        self._batches.append(row)
        self.annotation_ids.append(image.annotation_ids[person])
        self.masks[image.annotation_ids[person]] = segmentation


@torch.no_grad()
def compare(
    found: Pasted, truth: Tensor, extent: Extent, width: int, *, full: bool = True
) -> dict[str, Tensor]:
    """Every registered metric of one pasted mask, ``[1]`` each, and ``confusion``, int64 ``[1, 3, 3]``.

    Metrics of the target are of the whole image: what the box cut off counts as missed. ``confusion``,
    ``miou_roi`` and ``nontarget_iou`` are of the pixels inside the predicted box, since nothing is said of
    others. No mask at all is as far away as the image's diagonal is long.

    Args:
        found: labels of the box.
        truth: integers ``[H, W]``, holds the target; where it is ``IGNORED``, no mask counts.
        extent: xyxy of the target's own pixels.
        width: of the Boundary IoU band, pixels.
        full: the costly metrics too.

    Example:
        >>> truth = torch.tensor([[0, 1, 1, 0]])
        >>> found = Pasted(0, 1, torch.tensor([[1]]), torch.tensor(0.9))
        >>> compare(found, truth, (1, 0, 3, 1), 1)["target_iou"]
        tensor([0.5000], dtype=torch.float64)
    """
    rows, columns = found.labels.shape
    labels, inside = found.labels.to(truth.device), truth[found.window]
    # Both masks lie in this window whole, and outside of it is background: no figure changes by the cut.
    x0, y0, x1, y1 = extent
    if labels.numel():
        x0, x1 = min(x0, found.left), max(x1, found.left + columns)
        y0, y1 = min(y0, found.top), max(y1, found.top + rows)
    window = truth[y0:y1, x0:x1]
    true = window == TARGET
    pred = torch.zeros_like(true)
    if labels.numel():
        top, left = found.top - y0, found.left - x0
        pred[top : top + rows, left : left + columns] = labels == TARGET
        pred &= window != IGNORED
    confusion = confusion_per_roi(labels[None], inside[None])
    masks = Comparison(pred[None], true[None], confusion, width, size=(truth.shape[0], truth.shape[1]))
    return {"confusion": confusion, **masks.figures(full=full)}


def score_in_images(
    predictors: dict[str, Predict],
    source: Source,
    *,
    device: torch.device,
    max_images: int | None = None,
    only: Any | None = None,
    full: bool = False,
    truth: list[CocoEntry] | None = None,
) -> dict[str, ImageMetrics]:
    """Figures of several predictors on the same images, each decoded once.

    Args:
        predictors: by name.
        source: of scenes.
        device: where masks are compared.
        max_images: see :func:`annotated_images`.
        only: see :func:`annotated_images`.
        full: the costly metrics too.
        truth: filled with the true masks, for :func:`average_precision`.
    """
    found = {name: ImageMetrics(full=full) for name in predictors}
    for image in annotated_images(source, max_images=max_images, only=only):
        anyone = torch.from_numpy(image.anyone).to(device)
        ignored = None if image.ignored is None else torch.from_numpy(image.ignored).to(device)
        # Person by person: the truth of one is as large as the image.
        each = zip(image.slots.tolist(), *(predict(image) for predict in predictors.values()), strict=True)
        with threads(1):
            for person, (slot, *pasted) in enumerate(each):
                mask = image.masks[slot]
                extent, scored = box_of(mask), image.scored[person]
                labels = _labels(torch.from_numpy(mask).to(device), anyone, ignored) if scored else anyone
                for one, figures in zip(pasted, found.values(), strict=True):
                    figures.add(image, person, one, labels, extent)
                if truth is not None:
                    x0, y0, x1, y1 = extent
                    segmentation = encode(mask[y0:y1, x0:x1], top=y0, left=x0, size=image.size)
                    more = {"area": float(image.areas[person]), "id": image.annotation_ids[person]}
                    ids = image.image_id, image.category_ids[person]
                    truth.append(coco_entry(*ids, segmentation, 1.0) | more)
    return found


def _labels(target: Tensor, anyone: Tensor, ignored: Tensor | None) -> Tensor:
    labels = target.byte() * TARGET + (anyone & ~target).byte() * NON_TARGET
    return labels if ignored is None else labels.masked_fill_(ignored, IGNORED)


# -- predictors ------------------------------------------------------------------------------------
def pasted_model(probs: Callable[[Any, Tensor], Tensor], device: torch.device) -> Predict:
    """A model with the true boxes.

    Args:
        probs: ``probs(image, boxes)``, class probabilities in each box's grid.
        device: where masks are pasted.
    """

    def predict(image: AnnotatedImage) -> Iterable[Pasted]:
        ignored = None if image.ignored is None else torch.from_numpy(image.ignored).to(device)
        return paste_labels(probs(image.pixels, image.boxes).to(device), image.boxes, image.size, ignored)

    return predict


def resolution_bound(mask_size: tuple[int, int]) -> Predict:
    """The truth itself, resampled to a binary grid over the box: the most that masks of that size reach."""

    def predict(image: AnnotatedImage) -> Iterator[Pasted]:
        for slot, box in zip(image.slots.tolist(), image.boxes, strict=True):
            mask = image.masks[slot]
            layers = torch.from_numpy(np.stack([mask, image.anyone & ~mask]))
            coverage = (crop_rois(layers, box[None], mask_size)[0] * 255).round().to(torch.uint8)
            grid = F.one_hot(labels_from_coverage(coverage.permute(1, 2, 0)), 3)
            yield from paste_labels(grid.permute(2, 0, 1)[None].float(), box[None], image.size)

    return predict


# -- COCO ------------------------------------------------------------------------------------------
def encode(mask: Any, *, top: int = 0, left: int = 0, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths.

    Args:
        mask: bool ``[h, w]``.
        top: row of the image where it begins.
        left: column where it begins.
        size: ``(H, W)`` of the image; none: the mask's own.

    Returns:
        ``size`` and ``counts``, safe for JSON.

    Example:
        >>> encode(np.eye(2, dtype=bool), top=1, left=0, size=(3, 2))
        {'size': [3, 2], 'counts': '1130'}
    """
    height, width = size or mask.shape
    rows = np.zeros((height, mask.shape[1]), np.int8)
    rows[top : top + len(mask)] = mask
    # Runs go column by column and begin with background; the window's are shifted to its place.
    changes = np.flatnonzero(np.diff(rows.ravel(order="F"), prepend=0, append=0)) + left * height
    counts = np.diff(changes[changes < height * width], prepend=0, append=height * width).tolist()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}


def coco_entry(image_id: Any, category_id: Any, segmentation: dict[str, Any], score: float) -> CocoEntry:
    """A mask, of its image's size as :func:`encode` gives it, in COCO's results format.

    It has no ``bbox``: given one, pycocotools would take its area for the mask's.

    Example:
        >>> coco_entry(7, 1, encode(np.ones((2, 2), dtype=bool)), 0.5)["image_id"]
        7
    """
    ids = {"image_id": image_id, "category_id": category_id}
    return {**ids, "segmentation": segmentation, "score": round(score, 6)}


def average_precision(truth: Sequence[CocoEntry], results: Sequence[CocoEntry]) -> dict[str, float | None]:
    """Segm AP of COCO results as ``pycocotools`` computes it: AP, AP50, AP75 and AP by size.

    Boxes were given, so there is one result a person and none is a false find: AP falls where a mask
    does not overlap its person enough, and the more, the surer the model was of it. The score ranks results
    across images, so it is the mean probability inside the mask and not 1.0 for all, which would leave the
    order to chance.

    Args:
        truth: entries of the true masks, each with ``id`` and ``area`` (pixels).
        results: entries of the found masks.

    Returns:
        each figure in 0..1, None where no person is of that size.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = []
    for number, entry in enumerate(truth, start=1):  # an id of 0 would count as no match
        box = coco_mask.toBbox(entry["segmentation"]).tolist()
        annotations.append({**entry, "id": number, "bbox": box, "iscrowd": 0})
    sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()],
            "annotations": annotations,
            "categories": [{"id": one} for one in sorted({entry["category_id"] for entry in truth})],
            "info": {},
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(copy.deepcopy(list(results))), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = zip(COCO_FIGURES, evaluation.stats[:6].tolist(), strict=True)
    return {name: None if value < 0 else value for name, value in found}
