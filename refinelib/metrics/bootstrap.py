"""Bootstrap intervals over images: how much a figure depends on which images are in the set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ImageBootstrap:
    """Whole images drawn with replacement, the same draws for every figure they bound.

    People of one image are not independent, so images are drawn and not ROIs. Percentile intervals:
    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. All draws are taken at once,
    as one matrix product on the device of the values.

    Args:
        images: ``[N]``, tensor, array or list: the image of each ROI.
        draws: how many times a set of images is drawn.
        level: share of the draws inside the interval.
        seed: of the draws.

    Raises:
        ValueError: no ROI at all.

    Example:
        >>> ImageBootstrap([1, 1, 2]).mean([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """

    def __init__(self, images: Any, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> None:
        names = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
        if not names.size:
            raise ValueError("images must have the image of at least one ROI, and is empty")
        known, place = np.unique(names, return_inverse=True)
        random, even = np.random.default_rng(seed), np.full(len(known), 1 / len(known))
        self.level, self.images = level, len(known)
        self._place = torch.from_numpy(place.reshape(-1))
        # [draws, images]: how often each was drawn
        self._counts = torch.from_numpy(random.multinomial(len(known), even, size=draws)).double()

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
            raise ValueError(
                f"values {list(values.shape)} must be one number for each of {len(self._place)} ROIs"
            )
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
        found = found[~found.isnan()]
        if not len(found):
            return None
        ends = found.new_tensor([(1 - self.level) / 2, (1 + self.level) / 2])
        low, high = found.quantile(ends).tolist()
        return low, high
