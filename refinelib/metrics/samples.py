"""Masks of some validation ROIs, kept after every validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refinelib.data import Store
from refinelib.data.augment import normalise
from refinelib.files import replacing
from refinelib.modeling.roi import labels_from_coverage

#: Fixed ROIs kept every epoch, and as many again: a third each of the worst, the middle and the best.
SAMPLES = 12


@torch.no_grad()
def write_samples(
    file: Path,
    store: Store,
    predict: Callable[[Tensor], Tensor],
    target_iou: Tensor,
    *,
    device: torch.device,
    mask_size: tuple[int, int],
) -> None:
    """Write ``SAMPLES`` fixed ROIs and this epoch's worst, middle and best to a compressed ``.npz``.

    It holds ``image`` uint8 ``[K, Hc, Wc, 3]``, ``labels`` uint8 ``[K, Hm, Wm]``, ``probs`` float16
    ``[K, 3, Hm, Wm]``, ``target_iou`` float32, ``roi``, ``image_id``, ``annotation_id`` int64 and ``kind``
    (``fixed``, ``worst``, ``median``, ``best``), all ``[K]``, and ``mask_size``.

    Args:
        file: to write.
        store: of the validation ROIs.
        predict: normalised crops to class probabilities.
        target_iou: float ``[len(store)]``; nan where there is no target.
        device: of the crops for ``predict``.
        mask_size: pixels across the box.

    Raises:
        OSError: it cannot be written; an older file of that name stays.

    Example:
        >>> import tempfile
        >>> from refinelib.config import Settings
        >>> from refinelib.data import open_split
        >>> folder, cpu, size = Path(tempfile.mkdtemp()), torch.device("cpu"), (32, 32)
        >>> settings = Settings(store_dir=str(folder), max_images=4, roi_size=size, mask_size=size)
        >>> store = open_split(settings, "val", progress=False)
        >>> predict, iou = lambda x: torch.zeros(len(x), 3, *size), torch.rand(len(store))
        >>> write_samples(folder / "epoch.npz", store, predict, iou, device=cpu, mask_size=size)
        >>> np.load(folder / "epoch.npz")["probs"].shape[1:]
        (3, 32, 32)
    """
    scores = target_iou.cpu()
    ranked = scores.nan_to_num(2.0).argsort()[: int((~scores.isnan()).sum())]
    third = SAMPLES // 3
    middle = max(0, len(ranked) // 2 - third // 2)
    groups = {
        "fixed": torch.linspace(0, len(store) - 1, min(SAMPLES, len(store))).long(),
        "worst": ranked[:third],
        "median": ranked[middle : middle + third],
        "best": ranked[-third:].flip(0),
    }
    rois = torch.cat([*groups.values()])
    images, coverage = store.gather(rois)
    probs = predict(normalise(images.to(device).permute(0, 3, 1, 2)))
    content = {
        "image": images.numpy(),
        "labels": labels_from_coverage(coverage).numpy().astype(np.uint8),
        "probs": probs.float().cpu().numpy().astype(np.float16),
        "target_iou": scores[rois].numpy().astype(np.float32),
        "roi": rois.numpy(),
        "image_id": store.image_ids[rois.numpy()],
        "annotation_id": store.annotation_ids[rois.numpy()],
        "kind": np.repeat(list(groups), [len(group) for group in groups.values()]),
        "mask_size": np.array(mask_size),
    }
    with replacing(file, "wb") as half:
        np.savez_compressed(half, **content)
