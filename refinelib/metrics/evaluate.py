"""Score a trained model on annotated images, beside two baselines that say what a number is worth."""

from __future__ import annotations

import csv
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refinelib.config import Settings
from refinelib.data import CocoPeople, PennFudanPeople, Source, Store, open_store
from refinelib.data.splits import coco_options
from refinelib.files import PathLike, dumps, replacing, write_atomically
from refinelib.metrics import image_space
from refinelib.metrics.predict import Predictor, load, mean_mask, score, threads
from refinelib.metrics.segmentation import KEYS, SegmentationMetrics, metrics_device
from refinelib.modeling.roi import centre_window

#: What the score in COCO results is.
SCORE = "mean probability of the person over the pixels of the mask"
#: Files of a saved evaluation for programs to read, beside those for people.
ARRAYS, REST = "evaluation.npz", "evaluation.json"


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
        entries = ",\n".join(dumps(entry) for entry in self.results)
        write_atomically(coco, f"[\n{entries}\n]\n")
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
    coco = None if images is None or annotations is None else (Path(annotations), Path(images))
    half = coco is None and (images is not None or annotations is not None)
    if half or sum(given is not None for given in (coco, pennfudan, source)) != 1:
        raise ValueError("give images and annotations (COCO), or pennfudan, the folder of that set, not both")
    if coco is None and (category or crowd or exif):
        raise ValueError("category, crowd and exif say how a COCO JSON is read: leave them out here")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images = {max_images}: give at least 1, or leave it out for all")
    predictor = (run if isinstance(run, Predictor) else load(run, device=device)).with_flip(flip)
    settings = predictor.settings
    if pennfudan is not None:
        source = PennFudanPeople(Path(pennfudan), split="val")
    elif coco is not None:
        given = {"allow_outside": allow_images_outside, "category": category, "crowd": crowd, "exif": exif}
        given = {name: value for name, value in given.items() if value is not None}
        source = CocoPeople(*coco, split="val", **{**coco_options(settings), **given})
    assert source is not None
    with tempfile.TemporaryDirectory() as temporary:
        shape: Any = {name: getattr(settings, name) for name in ("roi_size", "mask_size", "context")}
        root = Path(store_dir or temporary)
        with threads(1):
            store = open_store(source, root=root, max_images=max_images, progress=progress, **shape)
        found = _score(predictor, source, store, max_images)
        del store  # its files are mapped, and Windows deletes no mapped file
    return found


def _score(predictor: Predictor, source: Source, store: Store, max_images: int | None) -> Evaluation:
    settings, device, size = predictor.settings, predictor.device, predictor.settings.mask_size
    baseline, place = mean_mask(predictor.mean_coverage.to(device)), metrics_device(device)

    predictors = {
        "model": image_space.pasted_model(predictor.probs, place),
        "mean_mask": image_space.pasted_model(
            lambda image, boxes: centre_window(baseline(boxes), size), place
        ),
        "resolution_bound": image_space.resolution_bound(size),
    }
    where: Any = {"device": device, "mask_size": size, "full": True}
    on_roi, of_baseline = (score(predict, store, **where) for predict in (predictor.roi_probs, baseline))
    truth: list[image_space.CocoEntry] = []
    where = {"device": place, "max_images": max_images, "only": store.annotation_ids}
    pasted = image_space.score_in_images(predictors, source, full=True, truth=truth, **where)
    with threads(1):
        report = on_roi.compute(intervals=True)
        report["mean_mask"] = of_baseline.compute(intervals=True)
        in_image = {name: one.compute(intervals=True) for name, one in pasted.items()}
        precision = {name: image_space.average_precision(truth, one.counted) for name, one in pasted.items()}
    report["resolution_bound"] = in_image["resolution_bound"]
    report["image"] = {**in_image["model"], "mean_mask": in_image["mean_mask"]}
    report["coco"] = {**precision.pop("model"), **precision, "people": len(truth), "score": SCORE}
    report |= {"images": len(np.unique(store.image_ids)), "skipped": dict(store.skipped)}
    report |= {"noted": dict(store.info.notes), "ignored": store.info.ignored}
    report |= {"flip_test": predictor.flip, "checkpoint": str(predictor.path)}
    people, confusion = _columns(on_roi, pasted["model"], store), on_roi.per_roi()["confusion"].cpu().numpy()
    written: dict[str, dict[int, Any]] = getattr(source, "as_written", {})
    results, masks = pasted["model"].coco, pasted["model"].masks
    for name, ids in written.items():  # the file's own, which are not numbers
        results = [{**entry, name: ids.get(entry[name], entry[name])} for entry in results]
    return Evaluation(report, people, results, masks, confusion, predictor.name, settings)


def _columns(on_roi: SegmentationMetrics, in_image: image_space.ImageMetrics, store: Store) -> dict[str, Any]:
    """One row a ROI: its ids and box, its figures on the ROI, its figures in the image."""
    people: dict[str, Any] = {"annotation_id": store.annotation_ids, "image_id": store.image_ids}
    people |= {name: store.boxes[:, i] for i, name in enumerate(("x0", "y0", "x1", "y1"))}
    people["area"] = store.areas
    people |= {name: value.cpu().numpy() for name, value in on_roi.per_roi().items() if name not in KEYS}
    # Both go image by image; an image that could be read for the store and not now leaves nan.
    place = {key: row for row, key in enumerate(in_image.annotation_ids)}
    rows = np.array([place.get(int(one), -1) for one in store.annotation_ids])
    for name, value in in_image.per_roi().items():
        if name not in KEYS:
            people[f"image_{name}"] = np.append(value.cpu().numpy(), np.nan)[rows]
    return people
