"""The label maps, logits and images that everything differentiable has to survive."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest logit that is promised to be harmless.
EXTREME = 1e4


def label_maps(height: int, width: int) -> dict[str, Tensor]:
    """Awkward label maps by name, int64 ``[height, width]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    empty = torch.zeros(height, width, dtype=torch.int64)
    middle = (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4)))

    def drawn(**regions) -> Tensor:
        labels = empty.clone()
        for label, region in zip((1, 2), (regions.get("target"), regions.get("other")), strict=True):
            if region is not None:
                labels[region] = label
        return labels

    frame = torch.ones(height, width, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    blob = ((rows - height / 2) / (height / 3)) ** 2 + ((columns - width / 2) / (width / 4)) ** 2 < 1
    return {
        "empty": empty,
        "all target": empty + 1,
        "all non-target": empty + 2,
        "one pixel": drawn(target=(height // 2, width // 2)),
        "corner pixel": drawn(target=(0, 0)),
        "all but one pixel": 1 - drawn(target=(height // 2, width // 2)),
        "one line": drawn(target=(slice(None), width // 2)),
        "checkerboard": (rows + columns) % 2,
        "three-colour checkerboard": (rows + columns) % 3,
        "stripes": torch.where(columns % 2 == 0, 1, 2),
        "touches every edge": drawn(target=frame),
        "blob": drawn(target=blob),
        "blob beside another": drawn(target=middle, other=(slice(None), slice(0, width // 4))),
        "no background": torch.where(blob, 1, 2),
    }


def logit_maps(labels: Tensor) -> dict[str, Tensor]:
    """Awkward branch logits by name, float32 ``[B, 2, H, W]`` (also of any other two-channel head)."""
    generator = torch.Generator().manual_seed(0)
    shape = (labels.shape[0], 2, *labels.shape[1:])
    noise = torch.randn(shape, generator=generator)
    right = perfect_logits(labels, size=EXTREME)
    return {
        "zero": torch.zeros(shape),
        "equal": torch.full(shape, 3.7),
        "noise": noise,
        "large noise": noise.clamp(-3, 3) / 3 * EXTREME,
        "saturated high": torch.full(shape, EXTREME),
        "saturated low": torch.full(shape, -EXTREME),
        "perfect": right,
        "inverted": -right,
        "tiny": noise * 1e-30,
        "one spike": torch.zeros(shape).index_put(
            (torch.tensor(0), torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(EXTREME)
        ),
    }


def perfect_logits(labels: Tensor, size: float = 20.0) -> Tensor:
    """Branch logits that give each label a probability of nearly 1: float32 ``[B, 2, H, W]``."""
    person, target = labels != 0, labels == 1
    return torch.stack([person, target], dim=1).float() * (2 * size) - size


def images(count: int, height: int, width: int) -> dict[str, Tensor]:
    """Awkward normalised images by name, float32 ``[count, 3, height, width]``."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, height, width, generator=generator)
    step = torch.zeros(count, 3, height, width)
    step[..., width // 2 :] = 2.0
    return {
        "flat": torch.zeros(count, 3, height, width),
        "white": torch.full((count, 3, height, width), 2.6),
        "noise": noise,
        "step": step,
    }


def logits_on_the_way(labels: Tensor, error: float) -> Tensor:
    """Branch logits of probabilities that have gone the share ``error`` of the way to a wrong class.

    Background goes to target, target to non-target, non-target to background, linearly.
    """
    right, wrong = (
        torch.nn.functional.one_hot(x, 3).movedim(-1, 1).double() for x in (labels, (labels + 1) % 3)
    )
    probs = ((1 - error) * right + error * wrong).clamp(1e-7, 1)
    person = (probs[:, 1] + probs[:, 2]).clamp(max=1 - 1e-7)
    return torch.stack([torch.logit(person), (probs[:, 1] / probs[:, 2]).log()], dim=1).float()
