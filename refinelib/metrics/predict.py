"""Use what was trained: an image and boxes in, masks in image coordinates out."""

import ast
import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from refinelib import checkpoints, ranks
from refinelib.build import autocast, build_device, build_model, mask_canvas
from refinelib.config import Settings
from refinelib.data import DataError, Store, decode_image
from refinelib.data.arrays import as_array
from refinelib.data.augment import MEAN, normalise
from refinelib.data.sources import as_rgb, box_of, wrong_box
from refinelib.data.store_build import usable_cores
from refinelib.files import PathLike, replacing, shown
from refinelib.guard.measure import ran_out
from refinelib.metrics.segmentation import SegmentationMetrics, metrics_device
from refinelib.modeling import TARGET, roi
from refinelib.modeling.roi import centre_window, crop_rois, expand_boxes, labels_from_coverage, paste_patches
from refinelib.runs import Run, RunError

#: Mask pixels of a first prediction that a box is fitted to, at least.
LEAST_PERSON = 16
#: A box is replaced by the one around its first mask where these overlap by less (IoU), or where a larger
#: share of that mask lies outside the given box; no larger share of the second mask may lie outside its own.
FITS, OUTSIDE = 0.75, 0.05

#: Crops that a model gets at a time.
CROPS_AT_ONCE = 32

#: Height and width.
Size = tuple[int, int]

#: From normalised crops, float ``[B, 3, Hc, Wc]``, to class probabilities ``[B, 3, Hm, Wm]``.
CropModel = Callable[[Tensor], Tensor]

#: What a box has to be, for messages.
BOX_RULE = "give x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, such as 10,20,110,220"

#: Threads of a model on a CPU, at most.
MOST_THREADS = 4

#: Fixed ROIs kept every epoch, and as many again: a third each of the worst, the middle and the best.
SAMPLES = 12


@contextlib.contextmanager
def threads(most: int) -> Iterator[None]:
    """Limit PyTorch's threads on the CPU.

    Small operations that are spread over every core take longer, and processes beside each other wait for
    each other's threads.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: CropModel, images: Tensor) -> Tensor:
    """A function of crops on a CPU, each thread with its own share of them.

    PyTorch's way, all threads in every operation, makes them wait for each other thousands of times a batch:
    beside other processes that takes ten times as long. Here they wait once.

    Args:
        function: of ``[B, ...]``, works on each crop by itself.
        images: ``[B, ...]``; a single one keeps one thread busy.

    Returns:
        the results in the order of the images.

    Example:
        >>> side_by_side(lambda part: part + 1, torch.arange(3.0))
        tensor([1., 2., 3.])
    """
    most = min(MOST_THREADS, usable_cores(), torch.get_num_threads(), len(images))
    with threads(1):
        if most < 2:
            return function(images)
        with ThreadPoolExecutor(most, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat([*pool.map(function, images.tensor_split(most))])


def load(
    source: PathLike,
    *,
    device: str = "auto",
    output_dir: str = "outputs",
    flip: bool | None = None,
    refit: bool | None = None,
) -> "Predictor":
    """The model of a run, of a release or of a checkpoint file, ready to predict.

    Args:
        source: a run's name, its folder (its best checkpoint is taken), a release's name (of a file in
            ``$REFINELIB_ZOO``, else ``outputs/zoo``) or a checkpoint file.
        device: see the setting of that name.
        output_dir: where runs are looked for by name.
        flip: flip test, see :class:`Predictor`; none: as the run's own settings say.
        refit: likewise.

    Raises:
        CheckpointError: no such run or release, or its checkpoint is not whole.
    """
    path = checkpoints.find(source, output_dir=output_dir)
    try:
        saved = checkpoints.load(path, needs=("model", "average", "settings"))
    except checkpoints.CheckpointError as error:
        other = path.with_name("last.pt" if path.name == "best.pt" else "best.pt")
        hint = ""
        with contextlib.suppress(checkpoints.CheckpointError):
            checkpoints.load(other)
            hint = f"; {other} is whole: give that file"
        raise checkpoints.CheckpointError(f"{error}{hint}") from None
    with contextlib.suppress(RunError):  # a file that lies in no run's folder
        status = Run(path.absolute().parent.parent).status()
        if status.get("state", "ok") not in ("ok", "running"):
            told = f"{path} is of a run that is {status['state']} ({status.get('last_error')})"
            warnings.warn(told, stacklevel=2)
    settings = Settings(**saved["settings"]).model_copy(update={"device": device})
    model = build_model(settings)
    model.load_state_dict(saved["average"] or saved["model"])
    predictor = Predictor(model, settings, path=path, mean_coverage=saved["mean_coverage"])
    return predictor.with_options(flip, refit)


class Predictor:
    """A trained model with what it needs to crop an image and to paste a mask back.

    Args:
        model: trained, of these settings.
        settings: of the run that trained it.
        path: the checkpoint it came from.
        mean_coverage: float32 ``[Hm, Wm, 2]``, the training set's average mask.

    Attributes:
        model: in evaluation mode, on ``device``.
        settings: of the run that trained it.
        flip: whether it averages the probabilities of each crop and of its mirror image, at twice the time:
            the setting ``flip_test``, or as :meth:`with_options` says.
        refit: whether a box is fitted to a first mask before the mask that counts is predicted
            (:meth:`located`): the setting ``refit_box``, or as :meth:`with_options` says.
        weights: decision weights of background, target and non-target, from the settings; ``(1, 1, 1)`` gives
            the model's own probabilities.

    Example:
        >>> settings = Settings(width=0.0625, roi_size=(32, 32), mask_size=(32, 32), device="cpu")
        >>> model, coverage = build_model(settings), torch.zeros(32, 32, 2)
        >>> predictor = Predictor(model, settings, path=Path("none.pt"), mean_coverage=coverage)
        >>> predictor.predict(np.zeros((40, 60, 3), np.uint8), [[0, 0, 30, 40]]).shape
        (1, 40, 60)
    """

    def __init__(self, model: nn.Module, settings: Settings, *, path: Path, mean_coverage: Tensor) -> None:
        self.device = build_device(settings)
        # mypy does not know the memory format's overload.
        self.model: Any = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.eval().requires_grad_(False)
        self.settings, self.path, self.mean_coverage = settings, path, mean_coverage
        self.flip, self.refit = settings.flip_test, settings.refit_box
        self.weights = settings.decision_weights

    @property
    def name(self) -> str:
        """The run's, or that of a checkpoint file that lies in no run."""
        return self.path.parents[1].name if self.path.parent.name == "checkpoints" else self.path.stem

    def with_options(self, flip: bool | None = None, refit: bool | None = None) -> "Predictor":
        """The same model with flip test and refitted boxes on or off; None: as it is."""
        other = copy.copy(self)
        given = {"flip": flip, "refit": refit}
        vars(other).update({name: value for name, value in given.items() if value is not None})
        return other

    def located(self, image: Any, boxes: Any) -> tuple[Tensor, Tensor]:
        """Class probabilities, and the boxes in whose grids they are.

        The boxes are the given ones, but with :attr:`refit` where the person's mask does not fit: the box
        around it takes the place of the given one and the mask is predicted again, unless that mask leaves
        its new box too. What this gains and costs: bench/quality.md.

        Args:
            image: as :meth:`probs` takes it.
            boxes: likewise.

        Returns:
            float32 ``[N, 3, *mask_size]`` on the CPU, and float64 ``[N, 4]`` xyxy.
        """
        pixels, size, used = _rgb(image), self.settings.mask_size, as_boxes(boxes).clone()
        found = [torch.zeros(0, 3, *size)]
        for part in used.split(CROPS_AT_ONCE):  # views of `used`
            probs = self.roi_probs(self.crops(pixels, part))
            if self.refit:
                around, outside = self.around(probs, part)
                off = (roi.box_iou(around, part) < FITS) | (outside > OUTSIDE)
                if bool(off.any()):
                    again = self.roi_probs(self.crops(pixels, around[off]))
                    # A mask that leaves its new box too has run into something else than the person.
                    held = self.around(again, around[off])[1] <= OUTSIDE
                    kept, on = off.nonzero()[held, 0], probs.device
                    part[kept], probs[kept.to(on)] = around[kept], again[held.to(on)]
            found.append(centre_window(probs, size).cpu())
        return torch.cat(found), used

    def around(self, probs: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes around the masks, and the share of each mask that lies outside the given box.

        A mask is looked for over the box with as much around it as the losses counted (``loss_context``). One
        of hardly a pixel says nothing: its box is the given one, and no share of it is outside.

        Args:
            probs: of the boxes, as :meth:`roi_probs` gives them.
            boxes: float64 ``[N, 4]`` xyxy.
        """
        settings, size = self.settings, self.settings.mask_size
        counted = settings.context if settings.loss_context is None else settings.loss_context
        window = mask_canvas(settings, counted)
        masks = centre_window(probs.argmax(dim=1), window).cpu() == TARGET
        pixels, inside = (x.sum(dim=(1, 2)) for x in (masks, centre_window(masks, size)))
        seen = pixels >= LEAST_PERSON
        region = expand_boxes(boxes, (window[0] / size[0], window[1] / size[1]))
        cell = (region[:, 2:] - region[:, :2]) / torch.tensor([window[1], window[0]])
        extents = [box_of(x.numpy()) if some else (0,) * 4 for x, some in zip(masks, seen, strict=True)]
        around = region[:, :2].repeat(1, 2) + torch.tensor(extents) * cell.repeat(1, 2)
        return torch.where(seen[:, None], around, boxes), torch.where(seen, 1 - inside / pixels, 0)

    def probs(self, image: Any, boxes: Any) -> Tensor:
        """Class probabilities in each box's own grid.

        Multiplied by the decision weights, after which they sum to 1 again (:func:`predict_probs`).

        Args:
            image: uint8 ``[H, W, 3]`` RGB (array, PIL image, or path of a file). The pixels as stored, as
                COCO annotates them: a file's or a PIL image's EXIF orientation is not applied, and
                boxes made on the upright image need that (``PIL.ImageOps.exif_transpose``).
            boxes: ``[N, 4]`` xyxy in pixels, or one box (:func:`as_boxes`); may lie outside the image.

        Returns:
            float32 ``[N, 3, *mask_size]`` on the CPU: background, this person, other people.

        Raises:
            ValueError: an image that is not RGB, or boxes that are not what they should be.
        """
        return self.with_options(refit=False).located(image, boxes)[0]

    def crops(self, image: Any, boxes: Any) -> Tensor:
        """What the model gets: normalised crops of the boxes with their context.

        Arguments and errors are those of :meth:`probs`.

        Returns:
            float32 ``[N, 3, *canvas]`` on ``device``.
        """
        pixels = torch.from_numpy(_rgb(image)).permute(2, 0, 1)
        canvas, size = self.model.canvas, self.settings.roi_size
        regions = expand_boxes(as_boxes(boxes), (canvas[0] / size[0], canvas[1] / size[1]))
        with threads(1):
            crops = crop_rois(pixels, regions, canvas, fill=MEAN).round()  # as the store's bytes are
            return normalise(crops.to(self.device))

    def predict(self, image: Any, boxes: Any) -> Any:
        """One mask a box, in image coordinates.

        Arguments and errors are those of :meth:`probs`; a box that lies outside the image is an error too.

        Returns:
            bool ``[N, H, W]``: where this person is likelier than background and than other people, as the
            settings' decision weights weigh them. Nothing outside the box, given or refitted.
        """
        return self.predict_scored(image, boxes)[0]

    def predict_scored(self, image: Any, boxes: Any) -> tuple[Any, Any]:
        """The masks of :meth:`predict` and how sure the model is of each.

        Returns:
            masks bool ``[N, H, W]``; scores float64 ``[N]`` in 0..1: the IoU to be expected of the mask, by
            the probabilities (weighed, see :meth:`probs`) of its pixels and the others; 0 for an empty one.
        """
        pixels = _rgb(image)
        size = pixels.shape[:2]
        boxes = as_boxes(boxes, size)
        masks, scores = np.zeros((len(boxes), *size), dtype=bool), np.zeros(len(boxes))
        for some in torch.arange(len(boxes)).split(CROPS_AT_ONCE):
            probs, used = self.located(pixels, boxes[some])
            with threads(1):
                pasted = zip(some.tolist(), paste_labels(probs, used, size), strict=True)
                for i, found in pasted:
                    masks[i][found.window] = (found.labels == TARGET).numpy()
                    scores[i] = float(found.score)
        return masks, scores

    def roi_probs(self, images: Tensor) -> Tensor:
        """Class probabilities float32 ``[B, 3, *mask_canvas]`` of normalised crops ``[B, 3, *canvas]``."""
        on_cpu = images.device.type == "cpu"
        return side_by_side(self._roi_probs, images) if on_cpu else self._roi_probs(images)

    def _roi_probs(self, images: Tensor) -> Tensor:
        with autocast(self.settings, self.device):
            return predict_probs(self.model, images, flip=self.flip, weights=self.weights).float()


@torch.no_grad()
def predict_probs(
    model: nn.Module, images: Tensor, *, flip: bool = False, weights: Sequence[float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """Class probabilities of normalised crops, on the mask canvas.

    What does not fit into memory at once is computed in ever smaller chunks: others may use the device too.

    A pixel raises the IoU one can expect where its probability is above ``J / (1 + J)``, with ``J`` the IoU
    reached (Lipton et al., "Optimal Thresholding of Classifiers to Maximize F1 Measure", 2014: half the F1,
    written in IoU): at odds of ``J`` to 1, not even ones, which is a weight of ``1 / J`` against all else.

    Args:
        model: returns a :class:`~refinelib.modeling.output.MaskOutput`.
        images: float ``[B, 3, Hc, Wc]``.
        flip: average over each crop and its mirror image, mirrored back.
        weights: of background, target, non-target: each class's probability is multiplied by its weight and
            the three are divided by their sum, so that the likeliest class is the one to draw.

    Returns:
        float32 ``[B, 3, Hm, Wm]``.

    Raises:
        RuntimeError: one crop alone does not fit (:func:`refinelib.guard.measure.ran_out`).
    """
    probs: Tensor = _probs(model, images)
    if flip:
        probs = (probs + _probs(model, images.flip(-1)).flip(-1)) / 2
    if set(weights) == {1.0}:
        return probs
    weighed = torch.stack([x * weight for x, weight in zip(probs.unbind(1), weights, strict=True)], dim=1)
    return weighed / weighed.sum(dim=1, keepdim=True)


def _probs(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images.contiguous(memory_format=torch.channels_last)).log_probs().exp()
    except RuntimeError as error:
        if not ran_out(error) or len(images) < 2:
            raise
    if images.is_cuda:
        torch.cuda.empty_cache()
    return torch.cat([_probs(model, half) for half in images.tensor_split(2)])


# -- on a store ------------------------------------------------------------------------------------
def score(
    predict: CropModel, store: Store, *, device: torch.device, mask_size: Size, full: bool = False
) -> SegmentationMetrics:
    """Metrics over the box window of every ROI of a store; several processes share the ROIs.

    Args:
        predict: normalised crops to class probabilities.
        store: of ROIs.
        device: where crops and, as far as :func:`metrics_device` says, metrics are computed.
        mask_size: of the box window.
        full: the costly metrics too.
    """
    metrics, where = SegmentationMetrics(full=full), metrics_device(device)
    for rois in torch.arange(len(store))[ranks.share(len(store))].split(CROPS_AT_ONCE):
        with threads(1):
            images, coverage = (x.to(device) for x in store.gather(rois))
            labels, images = labels_from_coverage(coverage), normalise(images.permute(0, 3, 1, 2))
        probs = predict(images)
        # The image's place in the store: a data set's own ids may be negative, and those of two the same.
        columns = (torch.as_tensor(of[rois.numpy()]) for of in (store.areas, store.image_index))
        with threads(1):
            predicted = probs.argmax(dim=1)
            pair = (centre_window(x, mask_size).to(where) for x in (predicted, labels))
            metrics.update(*pair, *columns)
    metrics.gather(where)
    return metrics


@torch.no_grad()
def write_samples(
    file: Path, store: Store, predict: CropModel, target_iou: Tensor, *, device: torch.device, mask_size: Size
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
    probs, rows = predict(normalise(images.to(device).permute(0, 3, 1, 2))), rois.numpy()
    content = {
        "image": images.numpy(),
        "labels": labels_from_coverage(coverage).numpy().astype(np.uint8),
        "probs": probs.float().cpu().numpy().astype(np.float16),
        "target_iou": scores[rois].numpy().astype(np.float32),
        **{"roi": rows, "image_id": store.image_ids[rows], "annotation_id": store.annotation_ids[rows]},
        "kind": np.repeat(list(groups), [len(group) for group in groups.values()]),
        "mask_size": np.array(mask_size),
    }
    with replacing(file, "wb") as half:
        np.savez_compressed(half, **content)


def mean_mask(mean_coverage: Tensor) -> CropModel:
    """The mean-mask baseline, a predictor that sees no image: the training set's average mask.

    Args:
        mean_coverage: float ``[Hm, Wm, 2]`` in 0..1: mean area fraction of target and of non-target.

    Example:
        >>> mean_mask(torch.full((2, 2, 2), 0.25))(torch.zeros(5, 3, 8, 8))[0, :, 0, 0]
        tensor([0.5000, 0.2500, 0.2500])
    """
    target, other = mean_coverage.permute(2, 0, 1).float().unbind(0)
    probs = torch.stack([1 - target - other, target, other])[None]

    return lambda images: probs.to(images.device).expand(len(images), -1, -1, -1)


# -- into the image --------------------------------------------------------------------------------
class Pasted(NamedTuple):
    """The part of one box that lies inside the image.

    Attributes:
        top: first row.
        left: first column.
        labels: int64 ``[h, w]``: the likeliest class.
        score: float32 ``[]``: the IoU to be expected of the target's mask, if the probabilities hold: that of
            the expected intersection and union (Nowozin, "Optimal Decisions from Probabilistic Models: the
            Intersection-over-Union Case", 2014). 0 where there is no mask.
    """

    top: int
    left: int
    labels: Tensor
    score: Tensor

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        rows, columns = self.labels.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


def paste_labels(probs: Tensor, boxes: Tensor, size: Size, ignored: Tensor | None = None) -> Iterator[Pasted]:
    """Labels of each box at the image's own pixels, one box at a time.

    The probabilities are interpolated and then compared: the outline runs between grid cells where
    two classes are equally likely.

    Args:
        probs: float ``[N, 3, h, w]`` in the grids of the boxes.
        boxes: ``[N, 4]`` xyxy in pixels.
        size: ``(H, W)``.
        ignored: bool ``[H, W]``, pixels that do not count in the score; none: all do.

    Raises:
        ValueError: shapes that do not fit, or a box without area.

    Example:
        >>> probs = torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1)
        >>> next(paste_labels(probs, torch.tensor([[0, 0, 2, 1]]), (4, 4)))
        Pasted(top=0, left=0, labels=tensor([[1, 1]]), score=tensor(0.7000))
    """
    for top, left, patch in paste_patches(probs, boxes, size):
        labels = patch.max(dim=0).indices  # ten times as fast as argmax on a CPU, of ties the first too
        mask, target = labels == TARGET, patch[TARGET]
        if ignored is not None:
            counted = ~ignored[top : top + len(mask), left : left + mask.shape[1]]
            mask, target = mask & counted, target * counted
        inside = (target * mask).sum()
        yield Pasted(top, left, labels, inside / (mask.sum() + target.sum() - inside).clamp(min=1))


def _rgb(image: Any) -> Any:
    if isinstance(image, (str, os.PathLike)):
        return decode_image(Path(image))
    array = as_array(as_rgb(image) if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"the image must be uint8 [H, W, 3], and is {array.dtype} {list(array.shape)}")
    return np.array(array)


def as_boxes(boxes: Any, size: Size | None = None) -> Tensor:
    """Boxes as a user gives them, checked.

    Args:
        boxes: rows of x0, y0, x1, y1 in pixels: lists, tuples, an array, tensors of any type and device, or
            the text of a list; four numbers are one box.
        size: ``(H, W)`` of the image that they must touch; none: they may lie anywhere.

    Returns:
        float64 ``[N, 4]`` on the CPU.

    Raises:
        DataError: they are no such rows, not finite, without area, normalised, or outside the image.

    Example:
        >>> as_boxes([0, 0, 2, 1])
        tensor([[0., 0., 2., 1.]], dtype=torch.float64)
        >>> as_boxes([[0.1, 0.2, 0.5, 1.0]], (40, 60))
        Traceback (most recent call last):
        ...
        refinelib.data.sources.DataError: the boxes look normalised, no coordinate is above 1: multiply x by \
the image's width, 60, and y by its height, 40
    """
    try:
        value = ast.literal_eval(boxes) if isinstance(boxes, str) else boxes
        rows = np.atleast_2d(as_array(value).astype(np.float64))
        if rows.shape[1:] != (4,) and rows.shape != (1, 0):
            raise ValueError
    except Exception:  # whatever a user's value raises
        raise DataError(f"boxes = {' '.join(shown(boxes).split())}: {BOX_RULE}") from None
    rows = rows.reshape(-1, 4)
    if size is not None and len(rows) and np.abs(rows).max() <= 1 and max(size) > 2:
        rule = f"multiply x by the image's width, {size[1]}, and y by its height, {size[0]}"
        raise DataError(f"the boxes look normalised, no coordinate is above 1: {rule}")
    for number, row in enumerate(rows.tolist()):
        if wrong := wrong_box(row, size):
            image = f"; the image has {size[1]} x {size[0]} pixels" if size is not None else ""
            raise DataError(f"box {number} is {row}, a {wrong}: {BOX_RULE}{image}")
    return torch.from_numpy(rows)
