"""Bootstrap intervals over images: how much a figure owes to which images happened to be in the set."""

from __future__ import annotations

from typing import Any, Callable

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
        ValueError: no ROI at all, or a level or a number of draws that means nothing.
    """

    def __init__(self, images: Any, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> None:
        names = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
        if names.ndim != 1 or not len(names):
            raise ValueError(f"images must be a list with the image of each ROI, at least one, and is {list(names.shape)}")
        if not 0 < level < 1 or draws < 1:
            raise ValueError(f"level = {level}, draws = {draws}: the level must lie between 0 and 1, draws must be at least 1")
        known, place = np.unique(names, return_inverse=True)
        counts = np.random.default_rng(seed).multinomial(len(known), np.full(len(known), 1 / len(known)), size=draws)
        self.level = level
        self.images = len(known)
        self._place = torch.from_numpy(place.reshape(-1))
        self._counts = torch.from_numpy(counts).double()  # [draws, images]: how often each was drawn

    def mean(self, values: Any) -> tuple[float, float] | None:
        """Interval ``(low, high)`` of the mean over ROIs of ``values`` ``[N]``; nan is left out, None if nothing is left.

        For two results on the same ROIs, the mean of their differences gives the paired interval.
        """
        values = torch.as_tensor(values).double()
        if values.shape != self._place.shape:
            raise ValueError(f"values {list(values.shape)} must be one number for each of {len(self._place)} ROIs")
        kept = ~values.isnan()
        sums = self._by_image(torch.where(kept, values, 0.0))
        return self._bounds(self._drawn(sums) / self._drawn(self._by_image(kept.double())))

    def pooled(self, counts: Tensor, figure: Callable[[Tensor], Tensor]) -> tuple[float, float] | None:
        """Interval of a figure of sums over all ROIs, such as mean IoU of pooled pixel counts.

        Args:
            counts: ``[N, ...]`` of each ROI, to be summed.
            figure: from sums ``[draws, ...]`` to ``[draws]``; nan is left out.
        """
        sums = self._drawn(self._by_image(counts.flatten(1).double()))
        return self._bounds(figure(sums.unflatten(1, counts.shape[1:])))

    def _by_image(self, values: Tensor) -> Tensor:
        sums = torch.zeros(self.images, *values.shape[1:], dtype=torch.float64, device=values.device)
        return sums.index_add(0, self._place.to(values.device), values)

    def _drawn(self, sums: Tensor) -> Tensor:
        return self._counts.to(sums.device) @ sums

    def _bounds(self, found: Tensor) -> tuple[float, float] | None:
        found = found[~found.isnan()]
        if not len(found):
            return None
        ends = found.new_tensor([(1 - self.level) / 2, (1 + self.level) / 2])
        low, high = found.quantile(ends).tolist()
        return low, high
