"""Masks pasted back into images, against numpy, scipy and pycocotools on whole images."""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import in_memory, in_time
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from refinelib.build import build_model
from refinelib.config import resolve
from refinelib.data import SyntheticPeople
from refinelib.data import sources as scenes
from refinelib.metrics import boundary
from refinelib.metrics import evaluate as evaluation
from refinelib.metrics.evaluate import (
    Evaluation,
    annotated_images,
    average_precision,
    compare,
    encode,
    measure,
    resolution_bound,
    score_in_images,
)
from refinelib.metrics.predict import Pasted, Predictor, paste_labels
from refinelib.modeling.roi import crop_rois
from studies.box_jitter import jitter_boxes, jitter_curve, noise
from studies.results import read_evaluation

CPU = torch.device("cpu")
CROSS = ndimage.generate_binary_structure(2, 1)


def blobs(seed: int, height: int = 60, width: int = 84) -> np.ndarray:
    """Labels [H, W] with a target, others and background."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(3, height, width)), (0, 6, 6))
    return field.argmax(0)


# -- references on the whole image -----------------------------------------------------------------
def whole_band(mask: np.ndarray, width: int) -> np.ndarray:
    side = np.ones((2 * width + 1,) * 2, bool)
    return mask & ~ndimage.binary_erosion(mask, side, border_value=0)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, CROSS, border_value=0)


def scipy_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = outline(a), outline(b)
    return ndimage.distance_transform_edt(~b)[a], ndimage.distance_transform_edt(~a)[b]


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# -- one mask --------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_figures_are_those_of_the_whole_image(seed: int):
    """The window that is looked at, wherever the box lies, changes no figure."""
    random, truth, labels = np.random.default_rng(seed), blobs(seed), blobs(seed + 100)
    labels = np.where(random.random(labels.shape) < 0.5, truth, labels) if seed % 3 else labels
    top, left = random.integers(0, 40, 2)
    rows, columns = random.integers(12, 40, 2)
    labels = labels[top : top + rows, left : left + columns]
    pred = np.zeros(truth.shape, bool)
    pred[top : top + rows, left : left + columns] = labels == 1
    assert pred.any() and (truth == 1).any()
    found = Pasted(int(top), int(left), torch.from_numpy(labels.copy()), torch.tensor(1.0))
    got = compare(found, torch.from_numpy(truth), extent(truth == 1), 3)

    assert got["target_iou"].item() == pytest.approx(iou(pred, truth == 1))
    image_width = max(1, int(round(0.02 * math.hypot(*truth.shape))))
    for name, width in (("boundary_iou", 3), ("boundary_iou_image", image_width)):
        assert got[name].item() == pytest.approx(iou(whole_band(pred, width), whole_band(truth == 1, width)))
    there, back = scipy_distances(pred, truth == 1)
    assert got["hd95"].item() == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert got["surface_distance"].item() == pytest.approx(np.concatenate([there, back]).mean())
    inside = truth[top : top + rows, left : left + columns]
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (inside.ravel(), labels.ravel()), 1)
    assert got["confusion"].tolist() == [expected.tolist()]


def test_no_mask_and_a_box_outside_the_image():
    truth = torch.from_numpy(blobs(1))
    where = extent(truth.numpy() == 1)
    nothing = Pasted(3, 4, torch.zeros(10, 12, dtype=torch.int64), torch.tensor(0.0))
    outside = Pasted(60, 84, torch.zeros(0, 0, dtype=torch.int64), torch.tensor(0.0))
    for found in (nothing, outside):
        got = compare(found, truth, where, 2)
        assert got["target_iou"] == got["boundary_iou"] == got["boundary_iou_image"] == 0
        assert got["hd95"] == got["surface_distance"] == pytest.approx(math.hypot(60, 84))
        assert got["boundary_f1_1px"] == 0
    assert got["confusion"].sum() == 0 and got["nontarget_iou"].isnan()


def test_distances_of_points_are_those_of_the_transform():
    for seed in range(4):
        pred, true = blobs(seed) == 1, blobs(seed + 50) == 1
        masks = torch.from_numpy(np.stack([pred, true]))
        points = boundary.point_surfaces(masks[:1], masks[1:], 100.0)
        for got, expected in zip((points.to_true, points.to_pred), scipy_distances(pred, true), strict=True):
            np.testing.assert_allclose(got[0].numpy(), expected)
        whole = boundary.surfaces(*masks)
        for figure in (
            boundary.hd95,
            boundary.surface_distance,
            lambda found: boundary.boundary_f1(found, 1),
        ):
            assert figure(points).item() == pytest.approx(figure(whole).item(), abs=1e-5)


def test_pasted_labels_and_score():
    probs = torch.zeros(1, 3, 4, 4)
    probs[0, 0] = 0.3
    probs[0, 1, :, :2], probs[0, 2, :, 2:] = 0.7, 0.7
    (found,) = paste_labels(probs, torch.tensor([[2.0, 1.0, 10.0, 9.0]]), (20, 12))
    assert (found.top, found.left, tuple(found.labels.shape)) == (1, 2, (8, 8))
    assert (found.labels[:, :4] == 1).all() and (found.labels[:, 4:] == 2).all()
    patch = torch.nn.functional.interpolate(probs, size=(8, 8), mode="bilinear")[0, 1]
    inside, whole = patch[:, :4].sum().item(), patch.sum().item()
    assert inside < whole  # some of the target is expected beyond its mask
    assert found.score.item() == pytest.approx(inside / (8 * 4 + whole - inside), abs=1e-6)


@given(st.integers(0, 2**31))
def test_the_score_is_the_expected_intersection_over_the_expected_union(seed):
    rng = torch.Generator().manual_seed(seed)
    probs = torch.rand(1, 3, 5, 5, generator=rng).softmax(dim=1)
    ignored = torch.rand(5, 5, generator=rng) < 0.3
    (found,) = paste_labels(probs, torch.tensor([[0.0, 0.0, 5.0, 5.0]]), (5, 5), ignored)
    mask = (found.labels == 1) & ~ignored
    truths = (torch.rand(20_000, 5, 5, generator=rng) < probs[0, 1]) & ~ignored  # as the probabilities say
    union = (truths | mask).sum(dim=(1, 2)).float().mean()
    expected = (truths & mask).sum(dim=(1, 2)).float().mean() / union.clamp(min=1)
    assert found.score.item() == pytest.approx(expected.item(), abs=0.02)


# -- many images -----------------------------------------------------------------------------------
def seeing(shift: int = 0):
    """A predictor that sees the truth in each box, ``shift`` pixels to the right."""

    def probs(image, boxes, masks, slots):
        moved = np.roll(masks, shift, axis=2)
        grids = []
        for slot, box in zip(slots, boxes, strict=False):
            target, others = moved[slot], moved.any(0) & ~moved[slot]
            layers = torch.from_numpy(np.stack([~(target | others), target, others])).float()
            grids.append(crop_rois(layers, box[None], (48, 48))[0])
        return torch.stack(grids)

    return lambda image: paste_labels(
        probs(image.pixels, image.boxes, image.masks, image.slots), image.boxes, image.size
    )


@pytest.fixture
def people(coco_files):
    """Three images: two people side by side, a small one, polygons and run lengths."""
    random = np.random.default_rng(0)
    for _number in range(3):
        image = coco_files.image((90, 110))
        coco_files.person(image, (10, 12, 50, 80), [[10, 12, 45, 15, 50, 80, 20, 70]], area=1700.0)
        mask = np.zeros((90, 110), bool)
        mask[20:70, 55:90] = ndimage.gaussian_filter(random.normal(size=(50, 35)), 4) > -0.02
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        coco_files.person(image, tuple(map(int, box)), encode(mask), area=float(mask.sum()))
        coco_files.person(image, (92, 5, 104, 20))  # 12 pixels wide: no ROI
    return coco_files


def test_small_people_count_for_average_precision_only(people):
    source = people.source()
    images = list(annotated_images(source))
    assert [list(image.scored) for image in images] == [[True, True, False]] * 3
    assert images[0].annotation_ids == [100, 101, 102] and images[1].image_id == 2
    truth = []
    found = score_in_images({"shifted": seeing(3)}, source, device=CPU, truth=truth)["shifted"]
    assert len(found.per_roi()["target_iou"]) == 6 and len(found.coco) == len(truth) == 9
    only = score_in_images({"shifted": seeing(3)}, source, device=CPU, only=np.array([100, 103]))["shifted"]
    assert only.annotation_ids == [100, 103]


def test_average_precision_is_that_of_pycocotools_on_the_file_itself(people, tmp_path):
    source, truth = people.source(), []
    found = score_in_images({"a": seeing(1), "b": seeing(6)}, source, device=CPU, truth=truth)
    for one in found.values():
        file = tmp_path / "results.json"
        file.write_text(json.dumps(one.coco))
        known = COCO(str(people.annotations))
        judge = COCOeval(known, known.loadRes(str(file)), "segm")
        judge.evaluate(), judge.accumulate(), judge.summarize()
        got = average_precision(truth, one.coco)
        expected = [None if value < 0 else value for value in judge.stats[:6]]
        assert list(got.values()) == expected
    assert 0 < got["AP"] < 1 and got["AP50"] > got["AP75"]


def test_the_truth_itself_is_perfect(people):
    truth = []
    found = score_in_images(
        {"grid": resolution_bound((96, 96)), "seeing": seeing()}, people.source(), device=CPU, truth=truth
    )
    assert average_precision(truth, truth)["AP"] == pytest.approx(1)
    for one in found.values():
        report = one.compute(intervals=True)
        assert report["target_iou"] > 0.95 and report["miou"] > 0.95
        low, high = report["intervals"]["target_iou"]
        assert low <= report["target_iou"] <= high
    small = sum(area < 1024 for area in found["grid"].per_roi()["area"].tolist())
    assert [group["rois"] for group in report["by_size"].values()] == [small, 6 - small, 0] and 0 < small < 6
    assert [group["rois"] for group in report["by_tercile"].values()] == [2, 2, 2]


# -- many people, large pictures ---------------------------------------------------------------------
def figures_of(source, **how):
    truth = []
    found = score_in_images(
        {"shifted": seeing(3), "grid": resolution_bound((24, 24))},
        source,
        device=CPU,
        full=True,
        truth=truth,
        **how,
    )
    tables = {
        name: {key: value.tolist() for key, value in one.per_roi().items()} for name, one in found.items()
    }
    curve = jitter_curve(
        lambda pixels, boxes: (torch.ones(len(boxes), 3, 8, 8) / 3, boxes),
        source,
        device=CPU,
        sigmas=(0, 0.1),
    )
    return repr(
        (tables, curve, truth, [one.coco for one in found.values()], [one.masks for one in found.values()])
    )


@pytest.mark.parametrize("budget, together", [(0, 256), (20_000, 2), (1 << 20, 1)])
def test_figures_are_the_same_whatever_fits_into_memory(people, monkeypatch, budget, together):
    want = figures_of(people.source())
    monkeypatch.setattr(scenes, "MASK_BYTES", budget)
    monkeypatch.setattr(evaluation, "MOST_TOGETHER", together)
    assert figures_of(people.source()) == want
    parts = list(annotated_images(people.source()))
    assert [len(part.slots) for part in parts][: 3 // together + 1] == (
        [3] if together == 256 else [2, 1] if together == 2 else [1, 1, 1, 1]
    )
    assert all(part.masks[slot].any() for part in parts for slot in part.slots)


def test_the_masks_of_a_crowd_are_never_all_in_memory(coco_files, monkeypatch):
    """60 people in a picture of 13,000 pixels have masks of 10 GB, and labels of 80 GB."""
    monkeypatch.setattr(scenes, "MASK_BYTES", 4 << 20)
    image = coco_files.image(np.zeros((1200, 1200, 3), np.uint8))
    for number in range(60):
        coco_files.person(image, (10 + 15 * number, 20, 40 + 15 * number, 90))
    source = coco_files.source()
    source.instances()
    made, real = [], evaluation._labels

    def labels(*of):  # what PyTorch allocates is not traced
        assert sum(one() is not None for one in made) <= 1
        found = real(*of)
        made.append(weakref.ref(found))
        assert found.dtype == torch.uint8
        return found

    monkeypatch.setattr(evaluation, "_labels", labels)
    with in_memory(30):  # all masks: 86 MB
        found = score_in_images({"grid": resolution_bound((24, 24))}, source, device=CPU)["grid"]
    assert len(found.coco) == 60 and len(made) == 10 and found.compute()["target_iou"] > 0.9


# -- data and folders of others ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "of_the_run, given, allowed",
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_evaluation_takes_images_outside_their_folder_as_training_does(
    people, monkeypatch, of_the_run, given, allowed
):
    people.source()
    seen = []

    def stop(source, **_):
        seen.append(source)
        raise KeyError("far enough")

    monkeypatch.setattr(evaluation, "open_store", stop)
    predictor = object.__new__(Predictor)
    how = dict(data="coco", data_dir="any", roi_size=16, mask_size=16, context=0.0)
    predictor.settings = resolve("demo", allow_images_outside=of_the_run, **how)
    with pytest.raises(KeyError, match="far enough"):
        measure(predictor, images=people.images, annotations=people.annotations, allow_images_outside=given)
    assert seen[0].folder.allow_outside is allowed


def test_images_that_are_gone_once_the_store_is_built_are_told(monkeypatch):
    own = resolve("demo", roi_size=16, mask_size=16, context=0.0, width=0.0625, device="cpu")
    predictor = Predictor(build_model(own), own, path=Path("none.pt"), mean_coverage=torch.zeros(16, 16, 2))
    monkeypatch.setattr(evaluation, "annotated_images", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match="none of the images could be scored"):
        measure(predictor, source=SyntheticPeople(2, "val"))


@pytest.fixture
def saved(tmp_path):
    masks = {100 + i: encode(np.eye(20, dtype=bool)) for i in range(3)}
    columns = {"annotation_id": np.arange(3), "target_iou": np.linspace(0, 1, 3)}
    Evaluation({"rois": 3}, columns, [], masks, np.ones((3, 3, 3), np.int64)).save(tmp_path / "e")
    rest = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    (tmp_path / "e" / "evaluation.json").write_text(json.dumps({**rest, "settings": {}}))
    return tmp_path / "e"


DAMAGE = {
    "nested": ("report.json", "[" * 100_000),
    "endless number": ("coco_results.json", "9" * 5000),
    "a list": ("evaluation.json", "[]"),
    "masks of 10^18 pixels": (
        "evaluation.json",
        '{"name": "a", "settings": {}, "masks": {"100": {"size": [1000000000, 1000000000], "counts": "0"}}}',
    ),
    "masks are words": ("evaluation.json", '{"name": "a", "settings": {}, "masks": {"100": "mask"}}'),
    "a FIFO": ("report.json", None),
    "no zip": ("evaluation.npz", "PK"),
}


@pytest.mark.parametrize("name, text", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_evaluation_is_told(saved, name, text):
    assert read_evaluation(saved).report == {"rois": 3}
    (saved / name).unlink()
    os.mkfifo(saved / name) if text is None else (saved / name).write_text(text)
    with (
        in_time(),
        in_memory(30),
        pytest.raises(ValueError, match="holds no whole evaluation .*: make it again with"),
    ):
        read_evaluation(saved)


def test_an_evaluation_of_foreign_arrays_is_told(saved):
    for arrays in (
        {"confusion": np.ones(3)},
        {"confusion": np.ones((3, 3, 3), int), "people.area": np.ones(99)},
        {"confusion": np.array([{}])},
    ):
        np.savez(saved / "evaluation.npz", **arrays)
        with pytest.raises(ValueError, match="holds no whole evaluation"):
            read_evaluation(saved)


# -- boxes that are off ----------------------------------------------------------------------------
def test_noise_is_a_persons_own_and_has_the_size_it_says():
    ids = list(range(4000))
    normal = noise(ids)
    assert torch.equal(noise([7, 3]), normal[[7, 3]])
    assert not torch.equal(noise(ids, seed=1), normal)
    boxes = torch.tensor([[100.0, 50, 140, 150]]).expand(4000, 4).double()
    moved = jitter_boxes(boxes, normal, 0.1)
    sides = moved[:, 2:] - moved[:, :2]
    centres = (moved[:, :2] + moved[:, 2:]) / 2
    np.testing.assert_allclose(centres.std(0), [4, 10], rtol=0.05)
    np.testing.assert_allclose(centres.mean(0), [120, 100], atol=0.6)
    np.testing.assert_allclose((sides / torch.tensor([40.0, 100])).log().std(0), [0.1, 0.1], rtol=0.05)
    torch.testing.assert_close(jitter_boxes(boxes, normal, 0.0), boxes)


def test_the_curve_falls_and_begins_at_the_true_boxes():
    source = SyntheticPeople(6, split="val")
    scenes = {image.image_id: image for image in annotated_images(source)}
    by_pixels = {image.pixels.tobytes(): image for image in scenes.values()}

    def probs(pixels, boxes):  # sees whatever of the target lies in the box it is given
        image = by_pixels[pixels.tobytes()]
        layers = [
            torch.from_numpy(np.stack([~image.masks[slot], image.masks[slot]])).float()
            for slot in image.slots
        ]
        grids = [crop_rois(layer, box[None], (48, 48))[0] for layer, box in zip(layers, boxes, strict=False)]
        return torch.nn.functional.pad(torch.stack(grids), (0, 0, 0, 0, 0, 1))

    located = lambda pixels, boxes: (probs(pixels, boxes), boxes)  # noqa: E731
    curve = jitter_curve(located, source, device=CPU, sigmas=(0, 0.1, 0.2))
    exact = score_in_images(
        {"exact": lambda image: paste_labels(probs(image.pixels, image.boxes), image.boxes, image.size)},
        source,
        device=CPU,
    )["exact"].compute()
    assert curve[0]["box_iou"] == pytest.approx(1) and curve[0]["target_iou"] == exact["target_iou"]
    for name in ("box_iou", "target_iou", "boundary_iou"):
        values = [point[name] for point in curve]
        assert values[0] > values[1] > values[2]
    assert (
        curve[2]["intervals"]["target_iou"][0]
        < curve[2]["target_iou"]
        < curve[2]["intervals"]["target_iou"][1]
    )
    with pytest.raises(ValueError, match="sigmas"):
        jitter_curve(located, source, device=CPU, sigmas=(0.1, -0.1))
