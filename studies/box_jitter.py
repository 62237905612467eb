"""How much of a model's quality survives boxes that are not perfect, as a detector's are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refinelib.data import Source
from refinelib.metrics.evaluate import AnnotatedImage, Predict, score_in_images
from refinelib.metrics.predict import Pasted, paste_labels
from refinelib.modeling.roi import box_iou

#: Noise of a box's centre and of the logarithm of its sides, as shares of its sides.
SIGMAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)


def noise(annotation_ids: Sequence[int], *, seed: int = 0) -> Tensor:
    """Standard normal numbers float64 ``[N, 4]`` of persons; a person's are the same in whatever company."""
    draws = [np.random.default_rng([seed, abs(int(one))]).standard_normal(4) for one in annotation_ids]
    return torch.from_numpy(np.array(draws).reshape(-1, 4))


def jitter_boxes(boxes: Tensor, normal: Tensor, sigma: float) -> Tensor:
    """Boxes moved and scaled at random.

    The centre moves by ``sigma * side * z`` along each side, and each side is multiplied by
    ``exp(sigma * z)``, which has no bias towards larger or smaller.

    Args:
        boxes: ``[N, 4]`` xyxy.
        normal: ``[N, 4]`` standard normal numbers.
        sigma: as a share of the box's sides; 0 leaves the boxes as they are.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = high - low
    centre = (low + high) / 2 + sigma * sides * normal[:, :2]
    half = sides * (sigma * normal[:, 2:]).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def jitter_curve(
    located: Callable[[np.ndarray, Tensor], tuple[Tensor, Tensor]],
    source: Source,
    *,
    device: torch.device,
    sigmas: Iterable[float] = SIGMAS,
    seed: int = 0,
    max_images: int | None = None,
    only: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Quality against box noise, in the image and against the truth at full resolution: a box's error counts.

    Every sigma scales the same noise, so that points of the curve differ by its size alone.

    Args:
        located: class probabilities, and the boxes in whose grids they are, of an image and boxes:
            :meth:`refinelib.Predictor.located`.
        source: of scenes.
        device: where masks are compared.
        sigmas: see :func:`jitter_boxes`.
        seed: of the noise.
        max_images: see :func:`refinelib.metrics.evaluate.annotated_images`.
        only: likewise.

    Returns:
        for each sigma ``sigma``, ``box_iou`` (mean overlap of the moved and the true boxes), ``target_iou``,
        ``boundary_iou``, ``boundary_iou_image`` (means over persons), ``rois``, and ``intervals`` with the
        bootstrap interval over images of each.

    Raises:
        ValueError: a sigma that is negative or not finite, or none.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    if not sigmas or not all(0 <= sigma < 2 for sigma in sigmas):
        raise ValueError(f"sigmas = {sigmas}: give shares of the box's sides, each at least 0 and below 2")
    overlaps: dict[float, list[Tensor]] = {sigma: [] for sigma in sigmas}

    def moved(sigma: float) -> Predict:
        def predict(image: AnnotatedImage) -> Iterable[Pasted]:
            boxes = jitter_boxes(image.boxes, noise(image.annotation_ids, seed=seed), sigma)
            overlaps[sigma].append(box_iou(boxes, image.boxes)[torch.from_numpy(image.scored)])
            probs, used = located(image.pixels, boxes)
            return paste_labels(probs.to(device), used, image.size)

        return predict

    found = score_in_images(
        {str(sigma): moved(sigma) for sigma in sigmas},
        source,
        device=device,
        max_images=max_images,
        only=only,
    )
    curve = []
    for sigma in sigmas:
        report = found[str(sigma)].compute(intervals=True)
        names = ("target_iou", "boundary_iou", "boundary_iou_image")
        point = {"sigma": sigma, "box_iou": float(torch.cat(overlaps[sigma]).mean()), "rois": report["rois"]}
        point |= {name: report[name] for name in names}
        curve.append({**point, "intervals": {name: report["intervals"][name] for name in names}})
    return curve
