"""Score a model, or a mask that knows no image, on a store of ROIs."""

from __future__ import annotations

from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from refinelib.data.augment import normalise
from refinelib.data import Store
from refinelib.guard.oom import ran_out
from refinelib.metrics.segmentation import SegmentationMetrics
from refinelib.modeling.roi import centre_window, labels_from_coverage


def batches(store: Store, device: torch.device, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Crops (float32 ``[B, 3, Hc, Wc]``, normalised), labels (int64 ``[B, Hm, Wm]``) and places, in order."""
    for rois in torch.arange(len(store)).split(size):
        images, coverage = (x.to(device) for x in store.gather(rois))
        yield normalise(images.permute(0, 3, 1, 2)), labels_from_coverage(coverage), rois


@torch.no_grad()
def predict_probs(model: nn.Module, images: Tensor, *, flip: bool = False, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Class probabilities float32 ``[B, 3, Hm, Wm]`` of normalised crops, on the mask canvas.

    What does not fit into memory at once is taken in ever smaller pieces: others may use the device too.

    With ``flip`` the average over each crop and its mirror image, mirrored back.

    With ``weights`` (background, target, non-target) each is multiplied by its class's and the three are divided by their sum, so that
    the likeliest class is the one to draw. A pixel raises the IoU one can expect where its probability is above ``J / (1 + J)``,
    with ``J`` the IoU reached (Lipton et al., "Optimal Thresholding of Classifiers to Maximize F1 Measure", 2014: half the
    F1, written in IoU): at odds of ``J`` to 1, not even ones, which is a weight of ``1 / J`` against all else.

    Raises:
        RuntimeError: one crop alone does not fit (:func:`refinelib.guard.oom.ran_out`).
    """
    probs = _probs(model, images)
    if flip:
        probs = (probs + _probs(model, images.flip(-1)).flip(-1)) / 2
    if set(weights) == {1.0}:
        return probs
    weighed = torch.stack([share * weight for share, weight in zip(probs.unbind(1), weights)], dim=1)
    return weighed / weighed.sum(dim=1, keepdim=True)


def _probs(model: nn.Module, images: Tensor) -> Tensor:
    pieces = 1
    while True:
        try:
            parts = images.contiguous(memory_format=torch.channels_last).tensor_split(pieces)
            return torch.cat([model(part).log_probs().exp() for part in parts])
        except RuntimeError as error:
            if not ran_out(error) or pieces >= len(images):
                raise
        pieces = min(2 * pieces, len(images))
        if images.is_cuda:
            torch.cuda.empty_cache()


def score(
    predict: Callable[[Tensor], Tensor],
    store: Store,
    *,
    device: torch.device,
    mask_size: tuple[int, int],
    batch_size: int = 32,
    full: bool = False,
) -> SegmentationMetrics:
    """Metrics of ``predict`` (crops to class probabilities) over the box window of every ROI of a store."""
    metrics = SegmentationMetrics(full=full)
    for images, labels, rois in batches(store, device, batch_size):
        predicted = predict(images).argmax(dim=1)
        # Which image it is in the store: a data set's own ids may be negative, and those of two may be the same.
        areas, images_of = (torch.as_tensor(column[rois.numpy()], device=device) for column in (store.areas, store.image_index))
        metrics.update(centre_window(predicted, mask_size), centre_window(labels, mask_size), areas, images_of)
    return metrics


def blind(mean_coverage: Tensor) -> Callable[[Tensor], Tensor]:
    """A predictor that looks at nothing: the training set's average mask, whatever the crop.

    Args:
        mean_coverage: float ``[Hm, Wm, 2]`` in 0..1: mean share of target and of non-target.
    """
    target, other = mean_coverage.permute(2, 0, 1).float().unbind(0)
    probs = torch.stack([1 - target - other, target, other])[None]

    def predict(images: Tensor) -> Tensor:
        return probs.to(images.device).expand(len(images), -1, -1, -1)

    return predict
