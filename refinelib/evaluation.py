"""Score a trained model on annotated images, beside two yardsticks that say what a number is worth."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .data import CocoPeople, PennFudanPeople, SceneError, Source, open_store
from .losses import NON_TARGET, TARGET
from .metrics import SegmentationMetrics
from .predict import Predictor, load
from .roi import crop_rois, labels_from_coverage, paste_patches
from .scoring import blind, score

def evaluate(
    run: str | os.PathLike | Predictor,
    *,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    pennfudan: str | os.PathLike | None = None,
    device: str = "auto",
    max_images: int | None = None,
    store_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of a model on a COCO JSON with its images, or on Penn-Fudan's validation images.

    The model's own figures stand at the top level. ``blind`` has those of the average mask of its
    training set, which looks at no image; ``grid`` those of the truth itself, squeezed through the
    mask's grid and pasted back into the image: what a mask of that size can reach. Each has ``miou``, ``iou`` (background, target, non-target; pixels of all ROIs
    pooled), ``target_iou``, ``boundary_iou`` (means over ROIs) and ``rois``.

    Args:
        run: a run's name or folder, a checkpoint file, or a loaded predictor.
        images, annotations: folder of images and COCO JSON.
        pennfudan: in place of those, the folder of the Penn-Fudan set.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_images: score only the first so many images.
        store_dir: keep the decoded crops there for the next time; none: a temporary folder.
        progress: show a bar while crops are decoded.

    Raises:
        CheckpointError, DataError: no usable checkpoint, or no usable data.
        ValueError: neither or both kinds of data were given.
    """
    if (pennfudan is None) == (images is None or annotations is None):
        raise ValueError("give images and annotations (COCO), or pennfudan, the folder of that set")
    predictor = run if isinstance(run, Predictor) else load(run, device=device)
    source = PennFudanPeople(pennfudan, split="val") if pennfudan else CocoPeople(annotations, images, split="val")
    settings = predictor.settings
    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(
            source,
            roi_size=settings.roi_size,
            mask_size=settings.mask_size,
            context=settings.context,
            root=Path(store_dir or temporary),
            max_images=max_images,
            progress=progress,
        )
        common = dict(device=predictor.device, mask_size=settings.mask_size, full=True)
        report = score(predictor.roi_probs, store, **common).compute()
        report["blind"] = score(blind(predictor.mean_coverage), store, **common).compute()
        report["grid"] = grid_ceiling(source, mask_size=settings.mask_size, max_images=max_images, only=store.annotation_ids).compute()
        report["skipped"] = dict(store.skipped)
        del store  # its files are mapped, and Windows deletes no mapped file
    report["checkpoint"] = str(predictor.path)
    return report


def grid_ceiling(
    source: Source, *, mask_size: tuple[int, int], max_images: int | None = None, only: np.ndarray | None = None
) -> SegmentationMetrics:
    """Metrics of the truth through a binary grid of ``mask_size``, pasted back, at the image's own pixels.

    The Boundary IoU's band scales with the diagonal of the box, so the figures compare. ``only`` limits it to
    these annotation ids.
    """
    people = source.people(max_images)
    metrics = SegmentationMetrics(full=False)
    chosen = np.ones(len(people), bool) if only is None else np.isin(people.annotation_ids, only)
    for index in np.unique(people.image_index[chosen]):
        try:
            scene = source.scene(int(index))
        except SceneError:  # counted when the store was built
            continue
        masks = torch.from_numpy(scene.masks)
        for row in np.flatnonzero(chosen & (people.image_index == index)):
            target = masks[people.slots[row]]
            truth = target.long() * TARGET + (masks.any(dim=0) & ~target).long() * NON_TARGET
            box = torch.from_numpy(people.boxes[row : row + 1])
            shares = crop_rois(torch.stack([truth == TARGET, truth == NON_TARGET]), box, mask_size) * 255
            grid = F.one_hot(labels_from_coverage(shares[0].round().to(torch.uint8).permute(1, 2, 0)), 3)
            top, left, layers = zip(*paste_patches(grid.permute(2, 0, 1).float(), box.expand(3, 4), truth.shape))
            found = torch.stack(layers).argmax(dim=0)
            if not found.numel():  # less than half a pixel of the box lies in the image
                continue
            window = truth[top[0] : top[0] + found.shape[0], left[0] : left[0] + found.shape[1]]
            metrics.update(found[None], window[None], torch.from_numpy(people.areas[row : row + 1]))
    return metrics
