"""From class probabilities in a box's grid to labels in the image."""

from __future__ import annotations

from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from refinelib.modeling import TARGET
from refinelib.modeling.roi import paste_patches


class Pasted(NamedTuple):
    """The part of one box that lies inside the image; rows ``top`` and columns ``left`` onwards."""

    top: int
    left: int
    labels: Tensor  # int64 [h, w]: the likeliest class
    score: Tensor  # float32 []: mean probability of the target over its mask, 0 where there is no mask


def paste_labels(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Iterator[Pasted]:
    """Labels of each box at the image's own pixels, one box at a time.

    The probabilities are interpolated and then compared: the outline runs between grid cells where
    two classes are equally likely.

    Args:
        probs: float ``[N, 3, h, w]`` in the grids of the boxes.
        boxes: ``[N, 4]`` xyxy in pixels.
        image_size: ``(H, W)``.

    Raises:
        ValueError: shapes that do not fit, or a box without area.
    """
    for grids, box in zip(probs, boxes):
        layers = list(paste_patches(grids, box.expand(len(grids), 4), image_size))
        patch = torch.stack([layer for _, _, layer in layers])
        labels = patch.argmax(dim=0)
        mask = labels == TARGET
        score = (patch[TARGET] * mask).sum() / mask.sum().clamp(min=1)
        yield Pasted(layers[0][0], layers[0][1], labels, score)
