"""Score a trained model on annotated images, beside two baselines that say what a number is worth.

Masks are scored on ROIs, and pasted back into their images against the truth at full resolution; pycocotools
scores COCO results of them.
"""

import contextlib
import copy
import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pycocotools import mask as coco_mask
from torch import Tensor

from refinelib.config import Settings
from refinelib.data import CocoPeople, PennFudanPeople, SceneError, Source, Store, open_store
from refinelib.data.sources import Masks, box_of, wrong_box
from refinelib.data.splits import coco_options
from refinelib.files import PathLike, dumps, replacing, write_atomically
from refinelib.metrics import segmentation
from refinelib.metrics.boundary import band_width
from refinelib.metrics.predict import Pasted, Predictor, load, mean_mask, paste_labels, score, threads
from refinelib.modeling import IGNORED, NON_TARGET, TARGET
from refinelib.modeling.roi import centre_window, crop_rois, labels_from_coverage

#: What the score in COCO results is.
SCORE = "expected IoU of the mask, from the probabilities of its pixels"
#: Files of a saved evaluation for programs to read, beside those for people.
ARRAYS, REST = "evaluation.npz", "evaluation.json"
#: Persons of an image that are worked on at a time; what a predictor returns is in memory for all of them.
MOST_TOGETHER = 256
#: The first six figures of COCO's summary, in its order.
COCO_FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
#: A mask in COCO's results format, see :func:`coco_entry`.
CocoEntry = dict[str, Any]
#: xyxy of the pixels of a mask.
Extent = tuple[int, int, int, int]


@dataclass
class Evaluation:
    """What :func:`measure` found.

    Attributes:
        report: figures as plain numbers, see :func:`evaluate`.
        people: one row a ROI as columns ``[N]``: ``annotation_id``, ``image_id``, ``x0`` ... ``y1``,
            ``area``, the figures of the ROI by name, those of the whole image with ``image_`` before it; nan
            where one does not apply.
        results: every person's mask in COCO's results format.
        masks: run lengths of the masks of the rows of ``people``, by annotation id.
        confusion: int64 ``[N, 3, 3]``, pixel counts of each ROI: row = truth, column = prediction.
        name: of the run.
        settings: of the run.
    """

    report: dict[str, Any]
    people: dict[str, Any]
    results: list[dict[str, Any]] = field(repr=False)
    masks: dict[int, dict[str, Any]] = field(repr=False)
    confusion: Any = field(repr=False)
    name: str = ""
    settings: Settings | None = field(default=None, repr=False)

    def save(self, folder: PathLike) -> list[Path]:
        """Write ``report.json``, ``people.csv``, ``coco_results.json``; for programs ``ARRAYS`` and ``REST``.

        Returns:
            the files.

        Raises:
            ValueError: the folder's name is a file's.
        """
        folder = checked_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        report, table, coco = (folder / name for name in ("report.json", "people.csv", "coco_results.json"))
        write_atomically(report, dumps(self.report, indent=2) + "\n")
        with replacing(table) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.people)
            for row in zip(*(column.tolist() for column in self.people.values()), strict=True):
                writer.writerow(["" if value != value else value for value in row])
        write_results(coco, self.results)
        columns = {f"people.{name}": column for name, column in self.people.items()}
        with replacing(folder / ARRAYS, "wb") as file:
            np.savez_compressed(file, confusion=self.confusion, **columns)
        settings = None if self.settings is None else self.settings.model_dump(mode="json")
        rest = {"name": self.name, "settings": settings, "masks": self.masks}
        write_atomically(folder / REST, dumps(rest) + "\n")
        return [report, table, coco, folder / ARRAYS, folder / REST]


def checked_folder(folder: PathLike) -> Path:
    """A folder to write into, that is there or can be made.

    Raises:
        ValueError: the name is a file's.
    """
    folder = Path(folder).expanduser()
    taken = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if taken is not None and not taken.is_dir():
        raise ValueError(f"{taken} is a file: give a folder to write into")
    return folder


def evaluate(run: PathLike | Predictor, **options: Any) -> dict[str, Any]:
    """Metrics of a model on a COCO JSON with its images, or on Penn-Fudan's validation images.

    Takes the arguments of :func:`measure`, which gives the figures of each person too, and raises what it
    raises.

    Returns:
        The model's own figures on its ROIs at the top level: ``miou``, ``iou`` (background, target,
        non-target; pixels of all ROIs pooled), the registered metrics by name (means over ROIs, distances in
        mask pixels), ``rois``, ``intervals`` (95 %, bootstrap over images), and the same by COCO's sizes
        (``by_size``) and by terciles of the people (``by_tercile``).

        ``mean_mask`` has the same for the mean-mask baseline, the average mask of the training set.

        ``image`` has the same of masks pasted back, against the truth at full resolution: ``boundary_iou``
        with a band that grows with the box, ``boundary_iou_image`` with 2 % of the image's diagonal (Cheng et
        al. 2021), distances in image pixels; ``mean_mask`` in it likewise. ``resolution_bound`` has it for
        the truth itself, resampled to the mask's grid: the most that masks of that size reach.

        ``coco`` is segm AP by pycocotools with the true boxes, of all persons, small ones too, for the
        model, ``mean_mask`` and ``resolution_bound``.
    """
    return measure(run, **options).report


def measure(
    run: PathLike | Predictor,
    *,
    images: PathLike | None = None,
    annotations: PathLike | None = None,
    pennfudan: PathLike | None = None,
    source: Source | None = None,
    device: str = "auto",
    flip: bool | None = None,
    refit: bool | None = None,
    max_images: int | None = None,
    store_dir: PathLike | None = None,
    allow_images_outside: bool | None = None,
    category: str | None = None,
    crowd: str | None = None,
    exif: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a model on annotated images: figures, one row a person, masks as COCO results.

    Args:
        run: a run's name or folder, a checkpoint file, or a loaded predictor.
        images: folder of images.
        annotations: COCO JSON of the people in them.
        pennfudan: in place of both, the folder of the Penn-Fudan set.
        source: in place of either, any source of scenes.
        device: see the setting of that name; not for a loaded predictor, which has one.
        flip: flip test, see :class:`refinelib.Predictor`; none: as the run's settings say, or as the
            predictor was loaded.
        refit: refitted boxes, likewise; in the image, not in the crop.
        max_images: score only the first so many images.
        store_dir: keep the decoded crops there for the next time; none: a temporary folder.
        allow_images_outside: see the setting of that name; none: as the run's settings say.
        category: likewise.
        crowd: likewise.
        exif: likewise.
        progress: show a bar while crops are decoded.

    Raises:
        CheckpointError, DataError: no usable checkpoint, or no usable data.
        ValueError: none or more than one kind of data was given, or a number out of range.
    """
    given = sum(one is not None for one in (images, pennfudan, source))
    if (images is None) != (annotations is None) or given != 1:
        raise ValueError("give images and annotations (COCO), or pennfudan, the folder of that set, not both")
    if images is None and (category or crowd or exif):
        raise ValueError("category, crowd and exif say how a COCO JSON is read: leave them out here")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images = {max_images}: give at least 1, or leave it out for all")
    predictor = (run if isinstance(run, Predictor) else load(run, device=device)).with_options(flip, refit)
    settings = predictor.settings
    if pennfudan is not None:
        source = PennFudanPeople(pennfudan, split="val")
    elif images is not None and annotations is not None:
        reading = {"allow_outside": allow_images_outside, "category": category, "crowd": crowd, "exif": exif}
        reading = {name: value for name, value in reading.items() if value is not None}
        source = CocoPeople(annotations, images, split="val", **{**coco_options(settings), **reading})
    assert source is not None
    with tempfile.TemporaryDirectory() as temporary:
        root, shape = Path(store_dir or temporary), settings.pick("roi_size", "mask_size", "context")
        with threads(1):
            store = open_store(source, root=root, max_images=max_images, progress=progress, **shape)
        found = _score(predictor, source, store, max_images)
        del store  # its files are mapped, and Windows deletes no mapped file
    return found


def _score(predictor: Predictor, source: Source, store: Store, max_images: int | None) -> Evaluation:
    settings, device, size = predictor.settings, predictor.device, predictor.settings.mask_size
    baseline, place = mean_mask(predictor.mean_coverage.to(device)), segmentation.metrics_device(device)
    predictors = {
        "model": pasted_model(predictor.located, place),
        "mean_mask": pasted_model(lambda image, boxes: (centre_window(baseline(boxes), size), boxes), place),
        "resolution_bound": resolution_bound(size),
    }
    where: Any = {"device": device, "mask_size": size, "full": True}
    on_roi, of_baseline = (score(predict, store, **where) for predict in (predictor.roi_probs, baseline))
    truth: list[CocoEntry] = []
    where = {"device": place, "max_images": max_images, "only": store.annotation_ids}
    pasted = score_in_images(predictors, source, full=True, truth=truth, **where)
    if not truth:
        raise ValueError("none of the images could be scored")
    with threads(1):
        report = on_roi.compute(intervals=True)
        report["mean_mask"] = of_baseline.compute(intervals=True)
        in_image = {name: one.compute(intervals=True) for name, one in pasted.items()}
        precision = {name: average_precision(truth, one.counted) for name, one in pasted.items()}
    report["resolution_bound"] = in_image["resolution_bound"]
    report["image"] = {**in_image["model"], "mean_mask": in_image["mean_mask"]}
    report["coco"] = {**precision.pop("model"), **precision, "people": len(truth), "score": SCORE}
    report |= {"images": len(np.unique(store.image_ids)), "skipped": dict(store.skipped)}
    report |= {"noted": dict(store.info.notes), "ignored": store.info.ignored}
    report |= {"flip_test": predictor.flip, "refit_box": predictor.refit, "checkpoint": str(predictor.path)}
    table, found = on_roi.per_roi(), pasted["model"]
    people, confusion, results = _columns(table, found, store), table["confusion"].cpu().numpy(), found.coco
    for name, ids in getattr(source, "as_written", {}).items():  # the file's own, which are not numbers
        results = [{**entry, name: ids.get(entry[name], entry[name])} for entry in results]
    return Evaluation(report, people, results, found.masks, confusion, predictor.name, settings)


def _columns(on_roi: dict[str, Tensor], in_image: "ImageMetrics", store: Store) -> dict[str, Any]:
    """One row a ROI: its ids and box, its figures on the ROI, its figures in the image."""
    people: dict[str, Any] = {"annotation_id": store.annotation_ids, "image_id": store.image_ids}
    people |= {name: store.boxes[:, i] for i, name in enumerate(("x0", "y0", "x1", "y1"))}
    people["area"] = store.areas
    people |= {name: x.cpu().numpy() for name, x in on_roi.items() if name not in segmentation.KEYS}
    # Both go image by image; an image that could be read for the store and not now leaves nan.
    place = {key: row for row, key in enumerate(in_image.annotation_ids)}
    rows = np.array([place.get(int(one), -1) for one in store.annotation_ids])
    for name, value in in_image.per_roi().items():
        if name not in segmentation.KEYS:
            people[f"image_{name}"] = np.append(value.cpu().numpy(), np.nan)[rows]
    return people


# -- in the image ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AnnotatedImage:
    """One image and the persons in it whose masks are asked for, ``N`` of the ``P`` that are annotated.

    Attributes:
        index: in its source.
        image_id: its data set's.
        pixels: uint8 ``[H, W, 3]``.
        masks: bool ``[P, H, W]``: of everybody.
        anyone: bool ``[H, W]``: where anybody is.
        ignored: bool ``[H, W]``: where nobody is known to be, and somebody may be; None: nowhere.
        slots: int ``[N]``: place in ``masks``.
        boxes: float64 ``[N, 4]`` xyxy.
        areas: float64 ``[N]``, pixels.
        annotation_ids: ``[N]``.
        category_ids: ``[N]``.
        scored: bool ``[N]``: a ROI; others (a side under 16 px) count for average precision only.
        size: ``(H, W)``.
    """

    index: int
    image_id: int
    pixels: Any
    masks: Any | Masks
    anyone: Any
    ignored: Any
    slots: Any
    boxes: Tensor
    areas: Any
    annotation_ids: list[int]
    category_ids: list[int]
    scored: Any
    size: tuple[int, int]


#: From an image with its boxes to the mask of each, in order.
Predict = Callable[[AnnotatedImage], Iterable[Pasted]]
#: See :meth:`~refinelib.metrics.predict.Predictor.located`.
Located = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def annotated_images(
    source: Source, *, max_images: int | None = None, only: Any | None = None
) -> Iterator[AnnotatedImage]:
    """The images of a source, one at a time; of COCO with all persons that have a mask and a box.

    One with more than ``MOST_TOGETHER`` persons comes several times, with other persons each time.

    Args:
        source: of scenes.
        max_images: only the first so many.
        only: annotation ids of the ROIs to be scored; none: all.
    """
    instances = source.instances(max_images)
    wanted = np.isin(instances.annotation_ids, instances.annotation_ids if only is None else only)
    for index, start in zip(*np.unique(instances.image_index, return_index=True), strict=True):
        try:
            scene = source.scene(int(index))
        except (SceneError, OSError):  # counted when the store was built
            continue
        size = scene.image.shape[:2]
        rows = np.flatnonzero(wanted & (instances.image_index == index))
        rois = instances.slots[rows].tolist()
        columns: Any = instances.annotation_ids, np.ones(len(wanted), int), instances.boxes, instances.areas
        known = dict(zip(rois, zip(*(column[rows] for column in columns), strict=True), strict=True))
        if isinstance(source, CocoPeople):
            known = {i: (*row.values(),) for i, row in enumerate(source.annotated_instances(int(index)))}
        slots = [i for i in sorted(known) if not wrong_box(known[i][2], size) and scene.masks[i].any()]
        anyone = scene.masks.any(0)
        ignored = None if scene.ignored is None else scene.ignored & ~anyone
        of_image: Any = {"index": int(index), "image_id": int(instances.image_ids[start]), "size": size}
        of_image |= {"pixels": scene.image, "masks": scene.masks, "anyone": anyone, "ignored": ignored}
        for first in range(0, len(slots), MOST_TOGETHER):
            some = slots[first : first + MOST_TOGETHER]
            ids, categories, boxes, areas = map(np.array, zip(*(known[slot] for slot in some), strict=True))
            of_each: Any = {"slots": np.array(some), "scored": np.isin(some, rois)}
            of_each |= {"annotation_ids": ids.tolist(), "category_ids": categories.tolist()}
            of_each["areas"] = areas.astype(float)
            yield AnnotatedImage(**of_image, **of_each, boxes=torch.as_tensor(boxes, dtype=torch.float64))


class ImageMetrics(segmentation.SegmentationMetrics):
    """Figures of one predictor over the persons of many images, and its masks as COCO results.

    Args:
        full: the costly metrics too.

    Attributes:
        coco: everybody's mask.
        counted: the same without ignored pixels, for :func:`average_precision`.
        annotation_ids: of the persons scored, in the order of :meth:`per_roi`.
        masks: run lengths of their masks, by annotation id.
    """

    def __init__(self, full: bool = True) -> None:
        super().__init__(full)
        self.coco, self.counted = list[CocoEntry](), list[CocoEntry]()
        self.annotation_ids: list[int] = []
        self.masks: dict[int, dict[str, Any]] = {}

    def add(self, image: AnnotatedImage, person: int, found: Pasted, truth: Tensor, extent: Extent) -> None:
        """Compare one mask with the truth.

        Args:
            image: that it is in.
            person: its place among the image's.
            found: labels of its box.
            truth: labels ``[H, W]`` on the device, 1 where the person is; not looked at if it is not scored.
            extent: xyxy of the person's own pixels.
        """
        mask = (found.labels == TARGET).cpu().numpy()
        where: Any = {"top": found.top, "left": found.left, "size": image.size}
        run_lengths = encode(mask, **where)
        entry = coco_entry(image.image_id, image.category_ids[person], run_lengths, float(found.score))
        self.coco.append(entry)
        if image.ignored is not None:
            entry = {**entry, "segmentation": encode(mask & ~image.ignored[found.window], **where)}
        self.counted.append(entry)
        if not image.scored[person]:
            return
        x0, y0, x1, y1 = image.boxes[person].tolist()
        row = compare(found, truth, extent, band_width((y1 - y0, x1 - x0)), full=self.full)
        row["area"] = torch.tensor([image.areas[person]], dtype=torch.float64, device=truth.device)
        row["image_id"] = torch.tensor([image.index], device=truth.device)
        self._batches.append(row)
        self.annotation_ids.append(image.annotation_ids[person])
        self.masks[image.annotation_ids[person]] = run_lengths


@torch.no_grad()
def compare(found: Pasted, truth: Tensor, extent: Extent, width: int, full: bool = True) -> dict[str, Tensor]:
    """Every registered metric of one pasted mask, ``[1]`` each, and ``confusion``, int64 ``[1, 3, 3]``.

    Metrics of the target are of the whole image: what the box cut off counts as missed. ``confusion``,
    ``miou_roi`` and ``nontarget_iou`` are of the pixels inside the predicted box, since nothing is said of
    others. No mask at all is as far away as the image's diagonal is long.

    Args:
        found: labels of the box.
        truth: integers ``[H, W]``, holds the target; where it is ``IGNORED``, no mask counts.
        extent: xyxy of the target's own pixels.
        width: of the Boundary IoU band, pixels.
        full: the costly metrics too.

    Example:
        >>> truth = torch.tensor([[0, 1, 1, 0]])
        >>> found = Pasted(0, 1, torch.tensor([[1]]), torch.tensor(0.9))
        >>> compare(found, truth, (1, 0, 3, 1), 1)["target_iou"]
        tensor([0.5000], dtype=torch.float64)
    """
    rows, columns = found.labels.shape
    labels, inside = found.labels.to(truth.device), truth[found.window]
    # Both masks lie in this window whole, and outside of it is background: no figure changes by the cut.
    x0, y0, x1, y1 = extent
    if labels.numel():
        x0, x1 = min(x0, found.left), max(x1, found.left + columns)
        y0, y1 = min(y0, found.top), max(y1, found.top + rows)
    window = truth[y0:y1, x0:x1]
    true = window == TARGET
    pred = torch.zeros_like(true)
    if labels.numel():
        top, left = found.top - y0, found.left - x0
        pred[top : top + rows, left : left + columns] = labels == TARGET
        pred &= window != IGNORED
    confusion = segmentation.confusion_per_roi(labels[None], inside[None])
    masks = segmentation.Comparison(pred[None], true[None], confusion, width, truth.shape)
    return {"confusion": confusion, **masks.figures(full=full)}


def score_in_images(
    predictors: dict[str, Predict],
    source: Source,
    *,
    device: torch.device,
    max_images: int | None = None,
    only: Any | None = None,
    full: bool = False,
    truth: list[CocoEntry] | None = None,
) -> dict[str, ImageMetrics]:
    """Figures of several predictors on the same images, each decoded once.

    Args:
        predictors: by name.
        source: of scenes.
        device: where masks are compared.
        max_images: see :func:`annotated_images`.
        only: see :func:`annotated_images`.
        full: the costly metrics too.
        truth: filled with the true masks, for :func:`average_precision`.
    """
    found = {name: ImageMetrics(full=full) for name in predictors}
    for image in annotated_images(source, max_images=max_images, only=only):
        anyone = torch.from_numpy(image.anyone).to(device)
        ignored = None if image.ignored is None else torch.from_numpy(image.ignored).to(device)
        # Person by person: the truth of one is as large as the image.
        each = zip(image.slots.tolist(), *(predict(image) for predict in predictors.values()), strict=True)
        with threads(1):
            for person, (slot, *pasted) in enumerate(each):
                mask = image.masks[slot]
                extent, scored = box_of(mask), image.scored[person]
                labels = _labels(torch.from_numpy(mask).to(device), anyone, ignored) if scored else anyone
                for one, figures in zip(pasted, found.values(), strict=True):
                    figures.add(image, person, one, labels, extent)
                if truth is not None:
                    more = {"area": float(image.areas[person]), "id": image.annotation_ids[person]}
                    entry = coco_entry(image.image_id, image.category_ids[person], encode(mask), 1.0)
                    truth.append(entry | more)
    return found


def _labels(target: Tensor, anyone: Tensor, ignored: Tensor | None) -> Tensor:
    labels = target.byte() * TARGET + (anyone & ~target).byte() * NON_TARGET
    return labels if ignored is None else labels.masked_fill_(ignored, IGNORED)


# -- predictors ------------------------------------------------------------------------------------
def pasted_model(located: Located, device: torch.device) -> Predict:
    """A model with the true boxes.

    Args:
        located: class probabilities, and the boxes in whose grids they are, of an image's boxes.
        device: where masks are pasted.
    """

    def predict(image: AnnotatedImage) -> Iterable[Pasted]:
        ignored = None if image.ignored is None else torch.from_numpy(image.ignored).to(device)
        probs, boxes = located(image.pixels, image.boxes)
        return paste_labels(probs.to(device), boxes, image.size, ignored)

    return predict


def resolution_bound(mask_size: tuple[int, int]) -> Predict:
    """The truth itself, resampled to a binary grid over the box: the most that masks of that size reach."""

    def predict(image: AnnotatedImage) -> Iterator[Pasted]:
        for slot, box in zip(image.slots.tolist(), image.boxes, strict=True):
            mask = image.masks[slot]
            layers = torch.from_numpy(np.stack([mask, image.anyone & ~mask]))
            coverage = (crop_rois(layers, box[None], mask_size)[0] * 255).round().to(torch.uint8)
            grid = F.one_hot(labels_from_coverage(coverage.permute(1, 2, 0)), 3)
            yield from paste_labels(grid.permute(2, 0, 1)[None].float(), box[None], image.size)

    return predict


# -- COCO ------------------------------------------------------------------------------------------
def encode(mask: Any, *, top: int = 0, left: int = 0, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths.

    Args:
        mask: bool ``[h, w]``.
        top: row of the image where it begins.
        left: column where it begins.
        size: ``(H, W)`` of the image; none: the mask's own.

    Returns:
        ``size`` and ``counts``, safe for JSON.

    Example:
        >>> encode(np.eye(2, dtype=bool), top=1, left=0, size=(3, 2))
        {'size': [3, 2], 'counts': '1130'}
    """
    whole = np.zeros(size or mask.shape, np.uint8, order="F")
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return {"size": [*map(int, whole.shape)], "counts": coco_mask.encode(whole)["counts"].decode("ascii")}


def coco_entry(image_id: Any, category_id: Any, segmentation: dict[str, Any], score: float) -> CocoEntry:
    """A mask, of its image's size as :func:`encode` gives it, in COCO's results format.

    It has no ``bbox``: given one, pycocotools would take its area for the mask's.

    Example:
        >>> coco_entry(7, 1, encode(np.ones((2, 2), dtype=bool)), 0.5)["image_id"]
        7
    """
    ids = {"image_id": image_id, "category_id": category_id}
    return {**ids, "segmentation": segmentation, "score": round(score, 6)}


def write_results(file: Path, entries: Iterable[CocoEntry]) -> Path:
    """Write masks in COCO's results format, a line each; returns the file."""
    write_atomically(file, "[\n" + ",\n".join(map(dumps, entries)) + "\n]\n")
    return file


def average_precision(truth: Sequence[CocoEntry], results: Sequence[CocoEntry]) -> dict[str, float | None]:
    """Segm AP of COCO results as ``pycocotools`` computes it: AP, AP50, AP75 and AP by size.

    Boxes were given, so there is one result a person and none is a false find: AP falls where a mask
    does not overlap its person enough, and the more, the surer the model was of it. The score ranks results
    across images, so it is the IoU to be expected of the mask and not 1.0 for all, which would leave the
    order to chance.

    Args:
        truth: entries of the true masks, each with ``id`` and ``area`` (pixels).
        results: entries of the found masks.

    Returns:
        each figure in 0..1, None where no person is of that size.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = []
    for number, entry in enumerate(truth, start=1):  # an id of 0 would count as no match
        box = coco_mask.toBbox(entry["segmentation"]).tolist()
        annotations.append({**entry, "id": number, "bbox": box, "iscrowd": 0})
    sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()],
            "annotations": annotations,
            "categories": [{"id": one} for one in sorted({entry["category_id"] for entry in truth})],
            "info": {},
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(copy.deepcopy(list(results))), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = zip(COCO_FIGURES, evaluation.stats[:6].tolist(), strict=True)
    return {name: None if value < 0 else value for name, value in found}
