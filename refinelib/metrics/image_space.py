"""Masks pasted back into their images, scored against the truth at full resolution."""

from __future__ import annotations

import math
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinelib.metrics.boundary import band_width, boundary_iou, image_band_width, mask_iou, outline_distances
from refinelib.metrics.coco_ap import CocoResults
from refinelib.data import CocoPeople, SceneError, Source
from refinelib.data.sources import Masks, box_of
from refinelib.modeling import NON_TARGET, TARGET
from refinelib.metrics.segmentation import confusion_per_roi, iou_from_confusion, summarise
from refinelib.metrics.paste import Pasted, paste_labels
from refinelib.modeling.roi import crop_rois, labels_from_coverage


#: Persons of an image that are worked on at a time; what a predictor returns is in memory for all of them.
MOST_TOGETHER = 256


class AnnotatedImage(NamedTuple):
    """One image and the persons in it whose masks are asked for, ``N`` of the ``P`` that are annotated."""

    index: int  # in its source
    image_id: int  # its data set's
    pixels: np.ndarray  # uint8 [H, W, 3]
    masks: np.ndarray | Masks  # bool [P, H, W]: everybody's
    slots: np.ndarray  # int [N]: place in masks
    boxes: Tensor  # float64 [N, 4] xyxy
    areas: np.ndarray  # float64 [N], pixels
    annotation_ids: list[int]  # [N]
    category_ids: list[int]  # [N]
    scored: np.ndarray  # bool [N]: a ROI; others (a side under 16 px) count for average precision only

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.pixels.shape[:2]


#: From an image with its boxes to the mask of each, in order.
Predict = Callable[[AnnotatedImage], Iterable[Pasted]]


def annotated_images(
    source: Source, *, max_images: int | None = None, only: np.ndarray | None = None
) -> Iterator[AnnotatedImage]:
    """The images of a source, one at a time; of COCO with all persons that have a mask and a box.

    One with more than ``MOST_TOGETHER`` persons comes several times, with other persons each time.

    Args:
        source: of scenes.
        max_images: only the first so many.
        only: annotation ids of the ROIs to be scored; none: all.
    """
    people = source.instances(max_images)
    for index, start in zip(*np.unique(people.image_index, return_index=True)):
        try:
            scene = source.scene(int(index))
        except (SceneError, OSError):  # counted when the store was built
            continue
        rows = range(start, start + int((people.image_index == index).sum()))
        rois = {int(people.slots[row]): row for row in rows if only is None or people.annotation_ids[row] in only}
        known = {slot: (people.annotation_ids[row], 1, people.boxes[row], people.areas[row]) for slot, row in rois.items()}
        if isinstance(source, CocoPeople):
            known = {slot: (*person.values(),) for slot, person in enumerate(source.annotated_instances(int(index)))}
        height, width = scene.image.shape[:2]
        known = {
            slot: person for slot, person in sorted(known.items())
            if scene.masks[slot].any() and _has_area(person[2], height, width)
        }  # fmt: skip
        for first in range(0, len(known), MOST_TOGETHER):
            slots = [*known][first : first + MOST_TOGETHER]
            ids, categories, boxes, areas = zip(*(known[slot] for slot in slots))
            yield AnnotatedImage(
                index=int(index),
                image_id=int(people.image_ids[start]),
                pixels=scene.image,
                masks=scene.masks,
                slots=np.array(slots),
                boxes=torch.as_tensor(np.array(boxes), dtype=torch.float64),
                areas=np.array(areas, dtype=np.float64),
                annotation_ids=[int(one) for one in ids],
                category_ids=[int(one) for one in categories],
                scored=np.array([slot in rois for slot in slots]),
            )


class ImageMetrics:
    """Figures of one predictor over the persons of many images, and its masks as COCO results.

    Attributes:
        full: surface distances too.
        coco: every person's mask.
        annotation_ids: of the persons scored, in the order of :meth:`table`.
        masks: run lengths of their masks, by annotation id.
    """

    def __init__(self, *, full: bool = True) -> None:
        self.full = full
        self.coco = CocoResults()
        self.annotation_ids: list[int] = []
        self.masks: dict[int, dict[str, Any]] = {}
        self._rows: list[dict[str, Tensor]] = []

    def add(self, image: AnnotatedImage, person: int, found: Pasted, truth: Tensor) -> None:
        """Compare one mask with the truth, labels ``[H, W]`` on the device, 1 where person ``person`` is."""
        mask = np.zeros(image.size, dtype=bool)
        rows, columns = found.labels.shape
        mask[found.top : found.top + rows, found.left : found.left + columns] = (found.labels == TARGET).cpu().numpy()
        self.coco.add(image.image_id, image.category_ids[person], mask, float(found.score))
        if not image.scored[person]:
            return
        x0, y0, x1, y1 = image.boxes[person].tolist()
        row = compare(found, truth, box_of(image.masks[image.slots[person]]), band_width((y1 - y0, x1 - x0)), full=self.full)
        row["area"] = torch.tensor(image.areas[person], dtype=torch.float64, device=truth.device)
        row["image_id"] = torch.tensor(image.index, device=truth.device)
        self._rows.append(row)
        self.annotation_ids.append(image.annotation_ids[person])
        self.masks[image.annotation_ids[person]] = self.coco.entries[-1]["segmentation"]

    def table(self) -> dict[str, Tensor]:
        """Columns by name, one row a scored person, as :func:`refinelib.metrics.segmentation.summarise` takes them."""
        if not self._rows:
            raise ValueError("none of the images could be scored")
        return {name: torch.stack([row[name] for row in self._rows]) for name in self._rows[0]}

    def compute(self, *, intervals: bool = False) -> dict[str, Any]:
        """Means over persons as plain numbers; see :func:`refinelib.metrics.segmentation.summarise`."""
        return summarise(self.table(), intervals=intervals)


@torch.no_grad()
def compare(
    found: Pasted, truth: Tensor, extent: tuple[int, int, int, int], width: int, *, full: bool = True
) -> dict[str, Tensor]:
    """Figures of one pasted mask.

    ``target_iou``, ``boundary_iou`` (band of ``width``, which grows with the person's box as on the ROI),
    ``boundary_iou_image`` (band of 2 % of the image's diagonal, Cheng et al. 2021) and, with ``full``, ``hd95`` and
    ``surface_distance`` in image pixels are of the whole image: what the box cut off counts as missed.
    ``confusion``, ``miou_roi`` and ``nontarget_iou`` are of the pixels inside the predicted box, since nothing is said of
    others. No mask at all is as far away as the image's diagonal is long.

    Args:
        found: labels of the box.
        truth: integers ``[H, W]``, holds the target.
        extent: xyxy of the target's own pixels.
        width: of the band, pixels.
        full: surface distances too.
    """
    rows, columns = found.labels.shape
    labels = found.labels.to(truth.device)
    inside = truth[found.top : found.top + rows, found.left : found.left + columns]
    counts = confusion_per_roi(labels[None], inside[None])[0]
    iou = iou_from_confusion(counts)
    # Both masks lie in this window whole, and outside of it is background for both: no figure changes by the cut.
    x0, y0, x1, y1 = extent
    if labels.numel():
        x0, x1 = min(x0, found.left), max(x1, found.left + columns)
        y0, y1 = min(y0, found.top), max(y1, found.top + rows)
    true = truth[y0:y1, x0:x1] == TARGET
    pred = torch.zeros_like(true)
    if labels.numel():
        pred[found.top - y0 : found.top - y0 + rows, found.left - x0 : found.left - x0 + columns] = labels == TARGET
    figures = {
        "confusion": counts,
        "miou_roi": iou.nanmean(),
        "target_iou": mask_iou(pred, true),
        "nontarget_iou": iou[NON_TARGET].where(counts[NON_TARGET].sum() > 0, math.nan),
        "boundary_iou": boundary_iou(pred, true, width),
        "boundary_iou_image": boundary_iou(pred, true, image_band_width(truth.shape)),
    }
    if full:
        both = torch.full((2,), math.hypot(*truth.shape), dtype=torch.float64, device=truth.device)
        if pred.any():
            there, back = outline_distances(pred, true)
            both = torch.stack([torch.maximum(there.quantile(0.95), back.quantile(0.95)), torch.cat([there, back]).mean()])
        figures |= {"hd95": both[0], "surface_distance": both[1]}
    return figures


def score_in_images(
    predictors: dict[str, Predict],
    source: Source,
    *,
    device: torch.device,
    max_images: int | None = None,
    only: np.ndarray | None = None,
    full: Iterable[str] = (),
    truth: CocoResults | None = None,
) -> dict[str, ImageMetrics]:
    """Figures of several predictors on the same images, each decoded once.

    Args:
        predictors: by name.
        source, max_images, only: see :func:`annotated_images`.
        device: where masks are compared.
        full: names of predictors that get surface distances too.
        truth: filled with the true masks, for :func:`refinelib.metrics.coco_ap.average_precision`.
    """
    full = set(full)
    found = {name: ImageMetrics(full=name in full) for name in predictors}
    for image in annotated_images(source, max_images=max_images, only=only):
        anyone = torch.from_numpy(image.masks.any(0)).to(device)
        # Person by person: the truth of one is as large as the image.
        each = zip(image.slots.tolist(), *(predict(image) for predict in predictors.values()), strict=True)
        for person, (slot, *pasted) in enumerate(each):
            mask = image.masks[slot]
            labels = _labels(torch.from_numpy(mask).to(device), anyone)
            for one, figures in zip(pasted, found.values()):
                figures.add(image, person, one, labels)
            if truth is not None:
                more = dict(area=float(image.areas[person]), id=image.annotation_ids[person])
                truth.add(image.image_id, image.category_ids[person], mask, 1.0, **more)
    return found


# -- predictors ------------------------------------------------------------------------------------
def pasted_model(probs: Callable[[np.ndarray, Tensor], Tensor], device: torch.device) -> Predict:
    """A model, from ``probs(image, boxes)``, class probabilities in each box's grid, with the true boxes; pasted on ``device``."""

    def predict(image: AnnotatedImage) -> Iterable[Pasted]:
        return paste_labels(probs(image.pixels, image.boxes).to(device), image.boxes, image.size)

    return predict


def pasted_grid(mask_size: tuple[int, int]) -> Predict:
    """The truth itself, squeezed through a binary grid over the box and pasted back: what such a grid can reach."""

    def predict(image: AnnotatedImage) -> Iterator[Pasted]:
        anyone = image.masks.any(0)
        for slot, box in zip(image.slots.tolist(), image.boxes):
            mask = image.masks[slot]
            shares = crop_rois(torch.from_numpy(np.stack([mask, anyone & ~mask])), box[None], mask_size) * 255
            grid = F.one_hot(labels_from_coverage(shares[0].round().to(torch.uint8).permute(1, 2, 0)), 3)
            yield from paste_labels(grid.permute(2, 0, 1)[None].float(), box[None], image.size)

    return predict


def _labels(target: Tensor, anyone: Tensor) -> Tensor:
    return target.byte() * TARGET + (anyone & ~target).byte() * NON_TARGET


def _has_area(box: Any, height: int, width: int) -> bool:
    x0, y0, x1, y1 = (float(side) for side in box)
    finite = all(math.isfinite(side) for side in (x0, y0, x1, y1))
    return finite and x1 > x0 and y1 > y0 and min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)
