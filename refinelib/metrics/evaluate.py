"""Score a trained model on annotated images, beside two yardsticks that say what a number is worth."""

from __future__ import annotations

import csv
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable

import numpy as np
import torch

from refinelib.config import Settings
from refinelib.metrics.coco_ap import CocoResults, average_precision
from refinelib.data import CocoPeople, PennFudanPeople, Source, Store, open_store
from refinelib.files import read_json, read_npz
from refinelib.metrics.image_space import AnnotatedImage, ImageMetrics, Predict, pasted_grid, pasted_model, score_in_images
from studies.box_jitter import SIGMAS, jitter_curve
from refinelib.metrics.segmentation import SegmentationMetrics
from refinelib.metrics.paste import Pasted, paste_labels
from refinelib.metrics.predict import Predictor, load
from refinelib.modeling.roi import centre_window
from refinelib.runs import dumps, write_atomically
from refinelib.metrics.scoring import blind, score

#: Bytes of the largest JSON file of an evaluation that is read; COCO's 5000 val images make some 15 MB.
MOST_JSON = 256 << 20
#: What is said of the score in COCO results.
SCORE = "mean probability of the person over the pixels of the mask"


@dataclass
class Evaluation:
    """What :func:`measure` found.

    Attributes:
        report: figures as plain numbers, see :func:`evaluate`.
        people: one row a ROI as columns ``[N]``: ``annotation_id``, ``image_id``, ``x0`` ... ``y1``, ``area``, the
            figures of the ROI by name, those of the whole image with ``image_`` before it; nan where one does not apply.
        results: every person's mask in COCO's results format.
        masks: run lengths of the masks of the rows of ``people``, by annotation id.
        confusion: int64 ``[N, 3, 3]``, pixel counts of each ROI: row = truth, column = prediction.
        name: of the run.
        settings: of the run.
    """

    report: dict[str, Any]
    people: dict[str, np.ndarray]
    results: list[dict[str, Any]] = field(repr=False)
    masks: dict[int, dict[str, Any]] = field(repr=False)
    confusion: np.ndarray = field(repr=False)
    name: str = ""
    settings: Settings | None = field(default=None, repr=False)

    #: What :meth:`read` reads, beside what people read.
    ARRAYS, REST = "evaluation.npz", "evaluation.json"

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Evaluation":
        """What :meth:`save` wrote, without the run, its weights or the images.

        Raises:
            ValueError: the folder holds no evaluation, or one that is not whole.
        """
        folder = Path(folder).expanduser()
        try:
            arrays = read_npz(folder / cls.ARRAYS, {"confusion": "iu n33"})
            confusion = arrays.pop("confusion")
            people = {key.removeprefix("people."): column for key, column in arrays.items()}
            names = (cls.REST, "report.json", "coco_results.json")
            rest, report, results = (read_json(folder / name, limit=MOST_JSON) for name in names)
            masks = {int(key): mask for key, mask in rest["masks"].items()}
            if any(column.shape != confusion.shape[:1] for column in people.values()):
                raise ValueError("its columns have different lengths")
            if max((math.prod(mask["size"]) for mask in masks.values()), default=0) >= 2**28:
                raise ValueError("a mask in it is larger than any image")
            return cls(report, people, results, masks, confusion, rest["name"], Settings(**rest["settings"]))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder} holds no whole evaluation ({error}): make it again with `python -m refinelib evaluate RUN --save {folder}`") from None

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write ``report.json``, ``people.csv`` and ``coco_results.json``, and two files for :meth:`read`; returns the files.

        Raises:
            ValueError: the folder's name is a file's.
        """
        folder = checked_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name for name in ("report.json", "people.csv", "coco_results.json", self.ARRAYS, self.REST)]
        write_atomically(files[0], dumps(self.report, indent=2) + "\n")
        with open(files[1], "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.people)
            for row in zip(*(column.tolist() for column in self.people.values())):
                writer.writerow(["" if value != value else value for value in row])
        entries = ",\n".join(dumps(entry) for entry in self.results)
        write_atomically(files[2], f"[\n{entries}\n]\n")
        np.savez_compressed(files[3], confusion=self.confusion, **{f"people.{name}": column for name, column in self.people.items()})
        settings = None if self.settings is None else self.settings.model_dump(mode="json")
        write_atomically(files[4], dumps({"name": self.name, "settings": settings, "masks": self.masks}) + "\n")
        return files


def checked_folder(folder: str | os.PathLike) -> Path:
    """A folder to write into, that is there or can be made.

    Raises:
        ValueError: the name is a file's.
    """
    folder = Path(folder).expanduser()
    taken = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if taken is not None and not taken.is_dir():
        raise ValueError(f"{taken} is a file: give a folder to write into")
    return folder


def evaluate(run: str | os.PathLike | Predictor, **options: Any) -> dict[str, Any]:
    """Metrics of a model on a COCO JSON with its images, or on Penn-Fudan's validation images.

    The model's own figures on its ROIs stand at the top level: ``miou``, ``iou`` (background, target, non-target;
    pixels of all ROIs pooled), ``miou_roi``, ``target_iou``, ``nontarget_iou``, ``boundary_iou``, ``boundary_f1_1px``,
    ``boundary_f1_2px``, ``hd95``, ``surface_distance`` (means over ROIs, distances in mask pixels), ``rois``,
    ``intervals`` (95 %, bootstrap over images), and the same by COCO's sizes (``by_size``) and by thirds of
    the people (``by_third``). ``blind`` has the same for the average mask of the training set, which looks at no image.

    ``image`` has what is left of that once masks are pasted back, against the truth at full resolution:
    ``boundary_iou`` with a band that grows with the box, ``boundary_iou_image`` with 2 % of the image's diagonal
    (Cheng et al. 2021), distances in image pixels; ``blind`` in it likewise. ``grid`` has it for the truth itself,
    squeezed through the mask's grid: what a mask of that size can reach. ``coco`` is segm AP by pycocotools with the true boxes,
    of all persons, small ones too, for the model, ``blind`` and ``grid``. ``jitter``, where asked for, is the curve of
    :func:`studies.box_jitter.jitter_curve`.

    Takes the arguments of :func:`measure`, which gives the figures of each person too, and raises what it raises.
    """
    return measure(run, **options).report


def measure(
    run: str | os.PathLike | Predictor,
    *,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    pennfudan: str | os.PathLike | None = None,
    source: Source | None = None,
    device: str = "auto",
    flip: bool | None = None,
    max_images: int | None = None,
    store_dir: str | os.PathLike | None = None,
    jitter: bool | Iterable[float] = False,
    allow_images_outside: bool | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a model on annotated images: figures, one row a person, masks as COCO results.

    Args:
        run: a run's name or folder, a checkpoint file, or a loaded predictor.
        images, annotations: folder of images and COCO JSON.
        pennfudan: in place of those, the folder of the Penn-Fudan set.
        source: in place of either, any source of scenes.
        device: ``auto``, ``cpu`` or ``cuda``; not for a loaded predictor, which has one.
        flip: flip test, see :class:`refinelib.Predictor`; none: as the run's settings say, or as the predictor was loaded.
        max_images: score only the first so many images.
        store_dir: keep the decoded crops there for the next time; none: a temporary folder.
        jitter: also measure boxes that are off, at :data:`studies.box_jitter.SIGMAS` or the shares given.
        allow_images_outside: see :func:`refinelib.data.coco.image_file`; none: as the run's settings say.
        progress: show a bar while crops are decoded.

    Raises:
        CheckpointError, DataError: no usable checkpoint, or no usable data.
        ValueError: none or more than one kind of data was given, or a number out of range.
    """
    coco = images is not None or annotations is not None
    if coco + (pennfudan is not None) + (source is not None) != 1 or (coco and (images is None or annotations is None)):
        raise ValueError("give images and annotations (COCO), or pennfudan, the folder of that set, and not both")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images = {max_images}: give at least 1, or leave it out for all")
    predictor = run if isinstance(run, Predictor) else load(run, device=device)
    if flip is not None and flip != predictor.flip:
        predictor = predictor.with_flip(flip)
    settings = predictor.settings
    if source is None and pennfudan:
        source = PennFudanPeople(pennfudan, split="val")
    elif source is None:
        outside = settings.allow_images_outside if allow_images_outside is None else allow_images_outside
        source = CocoPeople(annotations, images, split="val", allow_outside=outside)
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
        found = score(predictor.roi_probs, store, **common)
        report = found.compute(intervals=True)
        report["blind"] = score(blind(predictor.mean_coverage), store, **common).compute(intervals=True)
        where = dict(device=predictor.device, max_images=max_images, only=store.annotation_ids)
        truth = CocoResults()
        model = pasted_model(predictor.probs, predictor.device)
        three = {"model": model, "blind": _pasted_blind(predictor), "grid": pasted_grid(settings.mask_size)}
        pasted = score_in_images(three, source, full=three, truth=truth, **where)
        report["grid"] = pasted["grid"].compute(intervals=True)
        report["image"] = pasted["model"].compute(intervals=True)
        report["image"]["blind"] = pasted["blind"].compute(intervals=True)
        precision = {name: average_precision(truth.entries, one.coco.entries) for name, one in pasted.items()}
        report["coco"] = {**precision.pop("model"), **precision, "people": len(truth.entries), "score": SCORE}
        if jitter is not False:
            report["jitter"] = jitter_curve(predictor.probs, source, sigmas=SIGMAS if jitter is True else jitter, **where)
        report |= {"images": len(np.unique(store.image_ids)), "skipped": dict(store.skipped)}
        people = _columns(found, pasted["model"], store)
        confusion = found.per_roi()["confusion"].cpu().numpy()
        del store  # its files are mapped, and Windows deletes no mapped file
    report |= {"flip_test": predictor.flip, "checkpoint": str(predictor.path)}
    return Evaluation(report, people, pasted["model"].coco.entries, pasted["model"].masks, confusion, predictor.name, settings)


def grid_ceiling(
    source: Source, *, mask_size: tuple[int, int], max_images: int | None = None, only: np.ndarray | None = None
) -> ImageMetrics:
    """Figures of the truth through a binary grid of ``mask_size``, pasted back, at the image's own pixels.

    ``only`` limits it to these annotation ids.
    """
    found = score_in_images(
        {"grid": pasted_grid(mask_size)}, source, device=torch.device("cpu"), max_images=max_images, only=only
    )
    return found["grid"]


def _pasted_blind(predictor: Predictor) -> Predict:
    size = predictor.settings.mask_size
    (probs,) = centre_window(blind(predictor.mean_coverage)(torch.zeros(1, device=predictor.device)), size)

    def predict(image: AnnotatedImage) -> Iterable[Pasted]:
        return paste_labels(probs.expand(len(image.boxes), *probs.shape), image.boxes, image.size)

    return predict


def _columns(on_roi: SegmentationMetrics, in_image: ImageMetrics, store: Store) -> dict[str, np.ndarray]:
    """One row a ROI: who it is, its figures on the ROI, its figures in the image."""
    people = {"annotation_id": store.annotation_ids, "image_id": store.image_ids}
    people |= {name: store.boxes[:, i] for i, name in enumerate(("x0", "y0", "x1", "y1"))}
    people["area"] = store.areas
    left_out = ("confusion", "area", "image_id")
    people |= {name: value.cpu().numpy() for name, value in on_roi.per_roi().items() if name not in left_out}
    # Both go image by image; an image that could be read for the store and not now leaves nan.
    table = {name: value.cpu().numpy() for name, value in in_image.table().items() if name not in left_out}
    place = {key: row for row, key in enumerate(in_image.annotation_ids)}
    rows = np.array([place.get(int(one), -1) for one in store.annotation_ids])
    for name, value in table.items():
        people[f"image_{name}"] = np.where(rows < 0, np.nan, value[rows])
    return people
