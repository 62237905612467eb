"""Each metric against numpy, scipy or a count by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from refinelib.metrics import boundary
from refinelib.metrics import segmentation as m
from refinelib.metrics.segmentation import ImageBootstrap

SQUARE = np.ones((3, 3), bool)
CROSS = ndimage.generate_binary_structure(2, 1)
few = settings(max_examples=40, deadline=None)


@st.composite
def mask_pairs(draw):
    """Two masks of one random size: noise, blobs, empty, full and single pixels all turn up."""
    shape = (draw(st.integers(1, 14)), draw(st.integers(1, 14)))

    def one():
        kind = draw(st.sampled_from(["noise", "blob", "empty", "full", "pixel"]))
        if kind == "noise":
            return draw(hnp.arrays(bool, shape))
        mask = np.full(shape, kind == "full")
        top, left = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        if kind == "pixel":
            mask[top, left] = True
        if kind == "blob":
            mask[top : draw(st.integers(top, shape[0])), left : draw(st.integers(left, shape[1]))] = True
        return mask

    return one(), one()


label_pairs = hnp.arrays(np.int64, (2, 3, 5, 7), elements=st.integers(0, 2))


def people(count, side=32, seed=0):
    """Labels that look like people: smooth blobs, with a prediction that is a distorted copy."""
    random = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(random.normal(size=(count, 3, side, side)), (0, 0, 4, 4))
    noise = ndimage.gaussian_filter(random.normal(size=(count, 3, side, side)), (0, 0, 2, 2))
    return torch.from_numpy((field + 0.3 * noise).argmax(1)), torch.from_numpy(field.argmax(1))


# -- references ----------------------------------------------------------------------------------
def reference_band(mask, width):
    """As the authors' code does it: pad with 0, erode ``width`` times by 3 x 3, cut the padding."""
    eroded = ndimage.binary_erosion(np.pad(mask, 1), SQUARE, iterations=width, border_value=1)
    return mask & ~eroded[1:-1, 1:-1]


def reference_contour(mask):
    return mask & ~ndimage.binary_erosion(mask, CROSS, border_value=0)


def reference_iou(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def reference_distances(a, b):
    """Distances of a's contour to b's and back, by scipy's exact transform."""
    a, b = reference_contour(a), reference_contour(b)
    return ndimage.distance_transform_edt(~b)[a], ndimage.distance_transform_edt(~a)[b]


def reference_surface_metrics(pred, true):
    diagonal = math.hypot(*pred.shape)
    if not pred.any() or not true.any():
        same = not pred.any() and not true.any()
        distance = 0.0 if same else diagonal
        return {"f1": float(same), "f2": float(same), "hd95": distance, "asd": distance}
    there, back = reference_distances(pred, true)
    found = {"hd95": max(np.percentile(there, 95), np.percentile(back, 95))}
    found["asd"] = np.concatenate([there, back]).mean()
    for tolerance in (1, 2):
        precision, recall = (there <= tolerance).mean(), (back <= tolerance).mean()
        both = precision + recall
        found[f"f{tolerance}"] = 2 * precision * recall / both if both else 0.0
    return found


def surface_metrics(pred, true):
    found = boundary.surfaces(torch.from_numpy(pred), torch.from_numpy(true))
    values = {
        "f1": boundary.boundary_f1(found, 1),
        "f2": boundary.boundary_f1(found, 2),
        "hd95": boundary.hd95(found),
    }
    values["asd"] = boundary.surface_distance(found)
    return {name: value.item() for name, value in values.items()}


# -- regions -------------------------------------------------------------------------------------
@few
@given(label_pairs)
def test_confusion_counts_every_pixel_once(pair):
    pred, true = pair
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (true, pred), 1)
    got = m.confusion_per_roi(torch.from_numpy(pred), torch.from_numpy(true)).sum(0)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), expected)
    for kind, value in enumerate(m.iou_from_confusion(got).tolist()):
        present = ((pred == kind) | (true == kind)).any()
        assert math.isnan(value) != present
        if present:
            assert value == pytest.approx(reference_iou(pred == kind, true == kind))


def test_confusion_by_hand_rows_are_truth():
    true = torch.tensor([[[0, 0, 1], [1, 1, 2]]], dtype=torch.uint8)
    pred = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    counts = m.confusion_per_roi(pred, true)[0]
    assert counts.tolist() == [[1, 1, 0], [0, 2, 1], [1, 0, 0]]
    assert m.iou_from_confusion(counts).tolist() == [1 / 3, 0.5, 0.0]


def test_a_label_outside_the_classes_counts_nowhere():
    true = torch.tensor([[[0, 255, 1]]])
    assert m.confusion_per_roi(torch.tensor([[[0, 1, 4]]]), true).tolist() == [
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    ]


def test_wrong_input_gets_a_sentence():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="same shape"):
        m.confusion_per_roi(labels[:, :3], labels)
    with pytest.raises(ValueError, match="argmax"):
        m.confusion_per_roi(labels.float(), labels)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        boundary.boundary_band(labels > 0, 0)
    with pytest.raises(ValueError, match="one number a ROI"):
        m.SegmentationMetrics().update(labels, labels, areas=torch.ones(3))
    with pytest.raises(ValueError, match="one number a ROI"):
        m.SegmentationMetrics().update(labels, labels, image_ids=torch.ones(3))
    with pytest.raises(ValueError, match="image_ids"):
        gathered(labels, labels).compute(intervals=True)
    with pytest.raises(ValueError, match="one number for each of 2 ROIs"):
        ImageBootstrap([1, 2]).mean([1.0])
    with pytest.raises(ValueError, match="at least one"):
        ImageBootstrap([])


# -- boundaries ----------------------------------------------------------------------------------
def test_band_width():
    assert [boundary.band_width((side, side)) for side in (4, 32, 64, 80, 96, 128, 256)] == [
        1,
        1,
        2,
        3,
        3,
        4,
        8,
    ]
    assert [boundary.band_width((side, side)) for side in (48, 80, 112)] == [
        2,
        3,
        4,
    ]  # 1.5, 2.5, 3.5: halves go up
    assert boundary.band_width((96, 48)) == 2  # diagonal 107.3 against 90.5: 2.37
    for size in ((480, 640), (64, 64), (315, 420), (3, 4), (427, 640)):  # as the code of Cheng et al. has it
        expected = max(1, int(round(0.02 * np.sqrt(size[0] ** 2 + size[1] ** 2))))
        assert boundary.image_band_width(size) == expected
    assert boundary.image_band_width((480, 640)) == 16


@few
@given(mask_pairs(), st.integers(1, 9))
def test_band_is_that_of_the_reference_code(pair, width):
    pred, true = pair
    side = np.ones((2 * width + 1,) * 2, bool)
    band = boundary.boundary_band(torch.from_numpy(pred), width).numpy()
    np.testing.assert_array_equal(band, pred & ~ndimage.binary_erosion(pred, side, border_value=0))
    np.testing.assert_array_equal(band, reference_band(pred, width))
    got = boundary.boundary_iou(torch.from_numpy(pred), torch.from_numpy(true), width).item()
    assert got == pytest.approx(reference_iou(reference_band(pred, width), reference_band(true, width)))


def test_band_by_hand():
    full = torch.ones(5, 6, dtype=torch.bool)
    assert boundary.boundary_band(full, 2).sum() == 30 - 1 * 2  # the image's edge is a boundary
    assert boundary.boundary_band(full, 1).sum() == 30 - 3 * 4


@few
@given(mask_pairs())
def test_contour_is_the_mask_less_its_erosion_by_a_cross(pair):
    for mask in pair:
        np.testing.assert_array_equal(
            boundary.contour(torch.from_numpy(mask)).numpy(), reference_contour(mask)
        )


@settings(max_examples=150, deadline=None)
@given(mask_pairs())
def test_surface_metrics_against_scipy(pair):
    assert surface_metrics(*pair) == pytest.approx(reference_surface_metrics(*pair), abs=1e-5)


def test_surface_metrics_of_real_shapes_against_scipy():
    pred, true = (labels.numpy() == 1 for labels in people(8, side=48))
    for p, t in zip(pred, true, strict=False):
        assert surface_metrics(p, t) == pytest.approx(reference_surface_metrics(p, t), abs=1e-5)


def test_surface_metrics_by_hand():
    pred, true = np.zeros((2, 20, 30), bool)
    pred[5, 5], true[7, 5] = True, True
    assert surface_metrics(pred, true) == pytest.approx({"f1": 0, "f2": 1, "hd95": 2, "asd": 2})
    true[5, 6] = True  # the distances are now 1 there, 1 and 2 back; precision 1, recall 1/2 at one pixel
    assert surface_metrics(pred, true) == pytest.approx({"f1": 2 / 3, "f2": 1, "hd95": 1.95, "asd": 4 / 3})
    diagonal = pred.copy()
    pred[5, 5], pred[6, 6] = False, True
    got = surface_metrics(
        pred, diagonal
    )  # sqrt(2) apart: a disc of 1 pixel does not reach it, a square would
    assert got == pytest.approx({"f1": 0, "f2": 1, "hd95": math.sqrt(2), "asd": math.sqrt(2)})


@pytest.mark.parametrize("empty_first", [True, False])
def test_empty_masks(empty_first):
    empty, some = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    some[2:4, 3:5] = True
    pair = (empty, some) if empty_first else (some, empty)
    assert surface_metrics(*pair) == {"f1": 0, "f2": 0, "hd95": 10, "asd": 10}
    assert boundary.boundary_iou(*map(torch.from_numpy, pair), 2) == 0
    assert surface_metrics(empty, empty) == {"f1": 1, "f2": 1, "hd95": 0, "asd": 0}
    assert boundary.boundary_iou(torch.from_numpy(empty), torch.from_numpy(empty), 2) == 1


# -- over a data set -----------------------------------------------------------------------------
def gathered(pred, true, areas=None, images=None, parts=1, **options):
    metrics = m.SegmentationMetrics(**options)
    for index in torch.arange(len(true)).tensor_split(parts):
        more = (None if column is None else column[index] for column in (areas, images))
        metrics.update(pred[index], true[index], *more)
    return metrics


def test_compute_against_loops_over_rois():
    pred, true = people(12)
    true[0][true[0] == 1] = 0  # a ROI without target, one without others, one of background alone
    true[1][true[1] == 2] = 0
    true[2], pred[2] = 0, 0
    areas = torch.tensor([10.0, 1023.9, 1024.0, 9215.0, 9216.0, 1e5, 500, 500, 2000, 2000, 1e4, 1e4])
    got = gathered(pred, true, areas).compute()

    p, t = pred.numpy(), true.numpy()
    pooled = [reference_iou(p == kind, t == kind) for kind in range(3)]
    assert got["iou"] == pytest.approx(pooled)
    assert got["miou"] == pytest.approx(np.mean(pooled))
    rows = []
    for a, b in zip(p, t, strict=False):
        each = [reference_iou(a == kind, b == kind) for kind in range(3) if ((a == kind) | (b == kind)).any()]
        band = reference_iou(reference_band(a == 1, 1), reference_band(b == 1, 1))
        rows.append({"miou": np.mean(each), "target": reference_iou(a == 1, b == 1), "band": band})
        rows[-1] |= {"nontarget": reference_iou(a == 2, b == 2), **reference_surface_metrics(a == 1, b == 1)}

    def mean(name, where):
        return pytest.approx(
            np.mean([row[name] for row, yes in zip(rows, where, strict=False) if yes]), abs=1e-5
        )

    has_target, has_others = (t == 1).any((1, 2)), (t == 2).any((1, 2))
    assert not has_target.all() and not has_others.all()
    assert got["miou_roi"] == mean("miou", np.ones(12, bool))
    assert got["nontarget_iou"] == mean("nontarget", has_others)
    names = {"target_iou": "target", "boundary_iou": "band", "boundary_f1_1px": "f1", "boundary_f1_2px": "f2"}
    names |= {"hd95": "hd95", "surface_distance": "asd"}
    for name, ours in names.items():
        assert got[name] == mean(ours, has_target), name
    size = areas.numpy()
    groups = {"small": size < 1024, "medium": (size >= 1024) & (size < 9216), "large": size >= 9216}
    for group, inside in groups.items():
        assert got["by_size"][group]["rois"] == inside.sum() == 4
        assert got["by_size"][group]["target_iou"] == mean("target", inside & has_target)
        assert got["by_size"][group]["boundary_iou"] == mean("band", inside & has_target)
    assert got["rois"] == 12
    ranked = np.argsort(size, kind="stable")
    for third, members in zip(("smaller", "middle", "larger"), np.split(ranked, 3), strict=False):
        inside = np.isin(np.arange(12), members)
        assert got["by_tercile"][third]["rois"] == 4
        assert got["by_tercile"][third]["area"] == pytest.approx([size[members].min(), size[members].max()])
        assert got["by_tercile"][third]["hd95"] == mean("hd95", inside & has_target)
        pooled = [reference_iou(p[inside] == kind, t[inside] == kind) for kind in range(3)]
        assert got["by_tercile"][third]["miou"] == pytest.approx(np.mean(pooled))


def test_a_perfect_prediction():
    _, true = people(4)
    got = gathered(true, true).compute()
    assert got["hd95"] == got["surface_distance"] == 0 and got["iou"] == [1, 1, 1]
    ones = (
        "miou",
        "miou_roi",
        "target_iou",
        "nontarget_iou",
        "boundary_iou",
        "boundary_f1_1px",
        "boundary_f1_2px",
    )
    assert {got[name] for name in ones} == {1}


@pytest.mark.parametrize("full", [True, False])
def test_in_parts_equals_at_once_and_rois_do_not_see_each_other(full):
    pred, true = people(11)
    areas = torch.rand(11) * 20000
    once = gathered(pred, true, areas, full=full)
    assert gathered(pred, true, areas, parts=4, full=full).compute() == once.compute()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    mixed = gathered(pred[order], true[order], areas[order], parts=11, full=full).per_roi()
    for name, values in once.per_roi().items():
        torch.testing.assert_close(mixed[name], values[order], rtol=0, atol=0, equal_nan=True)


def test_cheap_subset_agrees_with_the_full_one():
    pred, true = people(5)
    full, cheap = gathered(pred, true).compute(), gathered(pred, true, full=False).compute()
    assert set(full) - set(cheap) == {"boundary_f1_1px", "boundary_f1_2px", "hd95", "surface_distance"}
    assert cheap == {name: full[name] for name in cheap}


def test_strict_json_and_none_where_nothing_applies():
    blank = torch.zeros(2, 8, 8, dtype=torch.long)
    got = gathered(blank, blank, torch.tensor([5.0, math.nan])).compute()
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["iou"] == [1, None, None] and got["miou"] == got["miou_roi"] == 1
    assert got["target_iou"] is got["nontarget_iou"] is got["hd95"] is None
    assert [group["rois"] for group in got["by_size"].values()] == [1, 0, 0]


def test_before_the_first_update():
    metrics = m.SegmentationMetrics()
    got = metrics.compute()
    json.dumps(got, allow_nan=False)
    assert got["rois"] == 0 and got["miou"] is None
    assert metrics.per_roi()["hd95"].shape == (0,)


def test_band_follows_the_size():
    pred, true = people(3, side=64)
    got = gathered(pred, true).per_roi()["boundary_iou"]
    assert torch.equal(got, boundary.boundary_iou(pred == 1, true == 1, 2))


class NoHostRead(TorchDispatchMode):
    """Fails at any operation whose result or shape must be known on the host."""

    banned = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "unique",
        "equal.",
        "is_nonzero",
        "item",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not any(name.startswith(word) for word in self.banned), f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("full", [True, False])
def test_an_update_never_waits_for_the_device(full):
    pred, true = people(3)
    with pytest.raises(AssertionError, match="reads from the device"), NoHostRead():
        float(true.sum())
    with NoHostRead():
        m.SegmentationMetrics(full=full).update(pred, true, torch.ones(3))
    m.SegmentationMetrics(full=full).update(pred.to("meta"), true.to("meta"), torch.ones(3))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu_and_never_waits():
    pred, true = people(6, side=64)
    on_cpu = gathered(pred, true)
    metrics, gpu = m.SegmentationMetrics(), (pred.cuda(), true.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(*gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, values in on_cpu.per_roi().items():
        torch.testing.assert_close(metrics.per_roi()[name].cpu(), values, rtol=0, atol=1e-5, equal_nan=True)


# -- intervals -----------------------------------------------------------------------------------
def test_interval_is_the_textbook_one_and_repeats():
    values = np.random.default_rng(1).normal(0.7, 0.2, 400)
    low, high = ImageBootstrap(range(400)).mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert (low, high) == ImageBootstrap(np.arange(400)).mean(torch.from_numpy(values))
    assert (low, high) != ImageBootstrap(range(400), seed=1).mean(values)


def test_interval_draws_whole_images():
    of_image = np.random.default_rng(2).normal(size=100)
    values, groups = np.repeat(of_image, 9), np.repeat([f"image {i}" for i in range(100)], 9)
    low, high = ImageBootstrap(groups).mean(values)
    # Nine copies of each image tell nothing new: the interval is that of 100 values, not of 900.
    assert (low, high) == pytest.approx(ImageBootstrap(range(100)).mean(of_image), abs=0.05)
    free = ImageBootstrap(range(900)).mean(values)
    assert 2.5 < (high - low) / (free[1] - free[0]) < 3.5


def test_interval_leaves_out_nan_and_weighs_rois_alike():
    values, groups = [1.0, math.nan, 1.0, 1.0, 0.0, math.nan], [0, 0, 0, 0, 1, 2]
    assert ImageBootstrap(groups).mean(values) == (0.0, 1.0)
    assert ImageBootstrap(torch.tensor([1, 2, 2])).mean([0.5, 0.5, math.nan]) == (0.5, 0.5)
    assert ImageBootstrap([1, 2]).mean([math.nan] * 2) is None
    values, groups = np.r_[np.ones(200), np.zeros(100)], np.r_[np.arange(200) // 2, 100 + np.arange(100)]
    assert np.mean(ImageBootstrap(groups).mean(values)) == pytest.approx(2 / 3, abs=0.02)


def test_intervals_of_a_report_against_a_loop_over_draws():
    """Written out in numpy: draw images by name, put their ROIs together, take the figure."""
    pred, true = people(30)
    images = torch.arange(30) // 2
    got = gathered(pred, true, images=images).compute(intervals=True)
    random, p, t = np.random.default_rng(5), pred.numpy(), true.numpy()
    target = np.array(
        [reference_iou(a == 1, b == 1) if (b == 1).any() else np.nan for a, b in zip(p, t, strict=False)]
    )
    mious, means = [], []
    for _ in range(1000):
        drawn = random.integers(15, size=15)
        rois = np.concatenate([np.flatnonzero(images.numpy() == image) for image in drawn])
        mious.append(np.mean([reference_iou(p[rois] == kind, t[rois] == kind) for kind in range(3)]))
        means.append(np.nanmean(target[rois]))
    for name, draws in (("miou", mious), ("target_iou", means)):
        low, high = np.quantile(draws, [0.025, 0.975])
        assert got["intervals"][name] == pytest.approx([low, high], abs=0.25 * (high - low))
        assert low < got[name] < high
    assert "intervals" not in gathered(pred, true, images=images).compute()


def test_paired_interval_is_narrower_than_two_apart():
    random = np.random.default_rng(3)
    hard = random.normal(0.6, 0.2, 200)
    better = hard + 0.02 + random.normal(0, 0.02, 200)
    draw = ImageBootstrap(range(200))
    low, high = draw.mean(better - hard)
    assert low > 0.01 and high < 0.03
    assert draw.mean(better)[0] < hard.mean()  # unpaired, nothing could be said
