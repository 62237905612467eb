"""Use what was trained: an image and boxes in, masks in image coordinates out."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refinelib import checkpoints
from refinelib.data.augment import MEAN, normalise
from refinelib.build import autocast, build_device, build_model
from refinelib.config import Settings
from refinelib.data import decode_image
from refinelib.data.sources import as_rgb
from refinelib.modeling import TARGET
from refinelib.metrics.paste import paste_labels
from refinelib.modeling.roi import centre_window, crop_rois, expand_boxes
from refinelib.metrics.scoring import predict_probs


def load(
    source: str | os.PathLike, *, device: str = "auto", output_dir: str = "outputs", flip: bool | None = None
) -> "Predictor":
    """The model of a run or of a checkpoint file, ready to predict.

    Args:
        source: a run's name, its folder (its best checkpoint is taken) or a checkpoint file.
        device: ``auto``, ``cpu`` or ``cuda``.
        output_dir: where runs are looked for by name.
        flip: flip test, see :class:`Predictor`; none: as the run's own settings say.

    Raises:
        CheckpointError: no such run, or its checkpoint is not whole.
    """
    path = checkpoints.find(source, output_dir=output_dir)
    try:
        saved = checkpoints.load(path, needs=("model", "average", "settings"))
    except checkpoints.CheckpointError as error:
        other = path.with_name("last.pt" if path.name == "best.pt" else "best.pt")
        hint = f"; {other} is whole: give that file" if checkpoints.readable(other) else ""
        raise checkpoints.CheckpointError(f"{error}{hint}") from None
    settings = Settings(**saved["settings"]).model_copy(update={"device": device})
    model = build_model(settings)
    model.load_state_dict(saved["average"] or saved["model"])
    return Predictor(model, settings, path=path, mean_coverage=saved["mean_coverage"], flip=flip)


class Predictor:
    """A trained model with what it needs to crop an image and to paste a mask back.

    Args:
        model: trained, of these settings.
        settings: of the run that trained it.
        path: the checkpoint it came from.
        mean_coverage: float32 ``[Hm, Wm, 2]``, the training set's average mask.
        flip: average the probabilities of each crop and of its mirror image, at twice the time;
            none: as the setting ``flip_test`` says.

    Attributes:
        model: in evaluation mode, on ``device``.
        settings: of the run that trained it.
        flip: whether it averages with the mirror image.
        weights: of background, target and non-target in what is drawn, from the settings; ``(1, 1, 1)`` gives the model's own
            probabilities.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Settings,
        *,
        path: Path,
        mean_coverage: Tensor,
        flip: bool | None = None,
    ) -> None:
        self.device = build_device(settings)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.settings, self.path, self.mean_coverage = settings, path, mean_coverage
        self.flip = settings.flip_test if flip is None else flip
        self.weights = settings.decision_weights

    @property
    def name(self) -> str:
        """The run's, or that of a checkpoint file that lies in no run."""
        return self.path.parents[1].name if self.path.parent.name == "checkpoints" else self.path.stem

    def with_flip(self, flip: bool) -> "Predictor":
        """The same model with the flip test on or off."""
        other = copy.copy(self)
        other.flip = flip
        return other

    def probs(self, image: Any, boxes: Any, *, batch_size: int = 32) -> Tensor:
        """Class probabilities in each box's own grid.

        Weighed by ``weights``, after which they sum to 1 again (:func:`~refinelib.metrics.scoring.predict_probs`): the likeliest
        class is the one to draw.

        Args:
            image: uint8 ``[H, W, 3]`` RGB (array, PIL image, or path of a file). The pixels as stored, as COCO annotates them: a file's or a PIL
                image's EXIF orientation is not applied, and boxes made on the upright image need that (``PIL.ImageOps.exif_transpose``).
            boxes: ``[N, 4]`` xyxy in pixels; may reach outside the image.
            batch_size: ROIs at once.

        Returns:
            float32 ``[N, 3, *mask_size]`` on the CPU: background, this person, other people.

        Raises:
            ValueError: an image that is not RGB, or a box without area.
        """
        pixels = torch.from_numpy(_rgb(image)).permute(2, 0, 1)
        boxes = _checked_boxes(boxes)
        canvas, size = self.model.canvas, self.settings.roi_size
        regions = expand_boxes(boxes, (canvas[0] / size[0], canvas[1] / size[1]))
        found = [torch.zeros(0, 3, *self.settings.mask_size)]
        for part in regions.split(batch_size):
            crops = crop_rois(pixels, part, canvas, fill=MEAN).round().to(self.device)  # rounded as the store's bytes are
            found.append(self._probs(normalise(crops)).cpu())
        return torch.cat(found)

    def predict(self, image: Any, boxes: Any, *, batch_size: int = 32) -> np.ndarray:
        """One mask a box, in image coordinates.

        Arguments and errors are those of :meth:`probs`.

        Returns:
            bool ``[N, H, W]``: where this person is likelier than background and than other people, as the settings'
            decision weights weigh them. Nothing outside the box.
        """
        return self.predict_scored(image, boxes, batch_size=batch_size)[0]

    def predict_scored(self, image: Any, boxes: Any, *, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """The masks of :meth:`predict` and how sure the model is of each.

        Returns:
            masks bool ``[N, H, W]``; scores float64 ``[N]`` in 0..1: the mean probability of this person (weighed, see
            :meth:`probs`) over the pixels of the mask, 0 for an empty one.
        """
        pixels = _rgb(image)
        probs = self.probs(pixels, boxes, batch_size=batch_size)
        masks, scores = np.zeros((len(probs), *pixels.shape[:2]), dtype=bool), np.zeros(len(probs))
        for i, found in enumerate(paste_labels(probs, _checked_boxes(boxes), pixels.shape[:2])):
            mask = found.labels == TARGET
            rows, columns = mask.shape
            masks[i, found.top : found.top + rows, found.left : found.left + columns] = mask.numpy()
            scores[i] = float(found.score)
        return masks, scores

    def roi_probs(self, images: Tensor) -> Tensor:
        """Class probabilities float32 ``[B, 3, *mask_canvas]`` of normalised crops ``[B, 3, *canvas]``."""
        with autocast(self.settings, self.device):
            return predict_probs(self.model, images, flip=self.flip, weights=self.weights).float()

    def _probs(self, crops: Tensor) -> Tensor:
        return centre_window(self.roi_probs(crops), self.settings.mask_size)


def _rgb(image: Any) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return decode_image(Path(image))
    if isinstance(image, Image.Image):
        image = as_rgb(image)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"the image must be uint8 [H, W, 3] in RGB, and is {array.dtype} {list(array.shape)}")
    return np.array(array)


def _checked_boxes(boxes: Any) -> Tensor:
    boxes = boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes
    table = torch.as_tensor(np.asarray(boxes, dtype=np.float64))
    if table.numel() == 0:
        return torch.zeros(0, 4, dtype=torch.float64)
    if table.dim() != 2 or table.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], x0, y0, x1, y1 a row, and are {list(table.shape)}")
    for number, (x0, y0, x1, y1) in enumerate(table.tolist()):
        if not (np.isfinite([x0, y0, x1, y1]).all() and x1 > x0 and y1 > y0):
            raise ValueError(f"box {number} is {[x0, y0, x1, y1]}: give x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1")
    return table
