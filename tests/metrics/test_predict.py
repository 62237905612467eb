"""What was trained, used: masks in image coordinates, figures for a folder of images."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

import refinelib
from refinelib import Predictor
from refinelib.__main__ import main
from refinelib.build import mask_canvas
from refinelib.checkpoints import CheckpointError
from refinelib.config import resolve
from refinelib.data import DataError, SyntheticPeople
from refinelib.data.augment import MEAN, normalise
from refinelib.metrics.evaluate import evaluate, resolution_bound, score_in_images
from refinelib.metrics.predict import FITS
from refinelib.modeling.output import MaskOutput
from refinelib.modeling.roi import box_iou, canvas_size, centre_window, labels_from_coverage
from refinelib.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return train(
        resolve("demo", output_dir=str(folder), max_images=12, width=0.0625, roi_size=32, mask_size=32,
                epochs=3, lr=5e-3, batch_size=4, context=0.5, device="cpu", probe_every=0)
    )  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A handful of synthetic people as a COCO set with RLE masks."""
    from pycocotools import mask as rle

    folder = tmp_path_factory.mktemp("coco")
    source = SyntheticPeople(5, split="val")
    people = source.instances()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    for index in range(5):
        scene = source.scene(index)
        Image.fromarray(scene.image).save(folder / f"{index}.png")
        height, width = scene.image.shape[:2]
        content["images"].append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        for slot in people.slots[people.image_index == index]:
            mask = scene.masks[slot]
            encoded = rle.encode(np.asfortranarray(mask))
            box = [float(x) for x in rle.toBbox(encoded)]
            encoded["counts"] = encoded["counts"].decode()
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": index,
                    "category_id": 1,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "segmentation": encoded,
                    "iscrowd": 0,
                }
            )
    (folder / "people.json").write_text(json.dumps(content))
    return folder


def test_masks_lie_inside_their_boxes_and_fit_the_image(run):
    predictor = refinelib.load(run.folder)
    image = SyntheticPeople(1, split="val").scene(0).image
    boxes = np.array([[10.5, 20, 90, 160], [-20, -10, 50, 60], [100, 50, 400, 400]])
    masks = predictor.predict(image, boxes)
    assert masks.shape == (3, *image.shape[:2]) and masks.dtype == bool
    rows, columns = np.arange(image.shape[0]) + 0.5, np.arange(image.shape[1]) + 0.5
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=False):
        outside = ~((rows[:, None] >= y0) & (rows[:, None] < y1) & (columns >= x0) & (columns < x1))
        assert not mask[outside].any()
    assert masks[0].any()


class SeesBrightness(torch.nn.Module):
    """Calls the target what white covers more than half of, beside the grey that lies around an image too."""

    HALF = normalise(torch.full((1, 3, 1, 1), 255)).mean().item() / 2

    def __init__(self, settings):
        super().__init__()
        self.canvas = canvas_size(settings.roi_size, settings.context)
        self.mask_canvas = mask_canvas(settings, settings.context)

    def forward(self, images):
        bright = torch.nn.functional.interpolate(
            images.mean(dim=1, keepdim=True), self.mask_canvas, mode="area"
        )
        return MaskOutput(torch.cat([50 * (bright - self.HALF), torch.full_like(bright, 50.0)], dim=1))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_box_that_is_off_is_fitted_to_the_person_and_one_that_fits_stays(data):
    """As long as the person lies in the region where losses counted, whatever lies beyond it."""
    draw = data.draw
    roi, mask = draw(st.sampled_from([((32, 32), (32, 32)), ((32, 48), (32, 48)), ((32, 32), (64, 64))]))
    given_settings = refinelib.resolve(
        "demo", width=0.0625, roi_size=roi, mask_size=mask, context=0.75, loss_context=0.5, device="cpu",
        refit_box=True,
    )  # fmt: skip
    coverage = torch.zeros(*mask, 2)
    predictor = Predictor(
        SeesBrightness(given_settings), given_settings, path=Path("x.pt"), mean_coverage=coverage
    )
    width, height = draw(st.integers(30, 90)), draw(st.integers(30, 90))
    x0, y0 = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    image = np.full((200, 240, 3), np.round(MEAN), np.uint8)
    image[y0 : y0 + height, x0 : x0 + width] = 255
    image[:, 200:] = 255  # others, too far away to be seen: a box and a quarter of it end at 193
    true = np.array([x0, y0, x0 + width, y0 + height], float)
    sides = np.array([width, height, width, height])
    off = true + sides * np.array(draw(st.lists(st.floats(-0.15, 0.15), min_size=4, max_size=4)))
    given = np.array([off])
    probs, (found,) = predictor.located(image, given)
    assert probs.shape == (1, 3, *mask) and np.array_equal(given[0], off)
    cell = np.array([width, height, width, height]) * 1.2 / np.array([*mask[::-1], *mask[::-1]])
    replaced = found.tolist() != [*off]
    event("replaced" if replaced else "kept")
    if replaced:
        assert (np.abs(found.numpy() - true) <= 1.01 * cell).all()
    else:
        assert box_iou(*torch.tensor(np.array([[off], [true]]))) > FITS - 0.15  # a cell at each side
    covered = predictor.predict(image, [off])[0]
    assert covered[y0 : y0 + height, x0 : x0 + width].mean() > (0.9 if replaced else 0.85)
    both, (_, second) = predictor.located(image, [off, true])
    plain = predictor.with_options(refit=False)
    assert torch.allclose(both[0], probs[0]) and second.tolist() == true.tolist()
    assert torch.allclose(both[1], plain.probs(image, true)[0])
    loose, cut = true + sides * [-0.1, -0.1, 0.1, 0.1], true + sides * [0, 0.15, 0, 0]
    # One overlaps too little; the other enough, but leaves a part of the person outside.
    assert (np.abs(predictor.located(image, [loose, cut])[1].numpy() - true) <= 1.01 * cell).all()
    same, (kept,) = plain.located(image, [off])
    assert np.allclose(kept, off) and torch.equal(same, plain.probs(image, [off]))
    image[:] = np.round(MEAN)  # nobody: the given box stays
    assert torch.equal(predictor.located(image, [off])[1], plain.located(image, [off])[1])
    image[:] = 255  # a mask without an end, which leaves the second box too: the given one stays
    for found, expected in zip(predictor.located(image, [off]), plain.located(image, [off]), strict=True):
        assert torch.equal(found, expected)


def test_prediction_is_the_same_alone_and_in_a_batch_and_as_in_validation(run):
    predictor = refinelib.load(run.folder)
    source = SyntheticPeople(60, split="val")
    people = source.instances(6)
    row = 3
    scene = source.scene(int(people.image_index[row]))
    box = people.boxes[row : row + 1]
    alone = predictor.probs(scene.image, box)
    together = predictor.probs(scene.image, np.concatenate([box, [[0, 0, 50, 50]], box]))
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=0)
    from refinelib.data import open_splits

    _, store = open_splits(run.settings().model_copy(update={"max_images": 6}), progress=False)
    images, _ = store.gather(torch.tensor([row]))

    stored = predictor.roi_probs(normalise(images.permute(0, 3, 1, 2)))
    torch.testing.assert_close(alone, centre_window(stored, (32, 32)), atol=1e-3, rtol=0)


def test_bad_input_gets_a_sentence(run):
    predictor = refinelib.load(run.folder / "checkpoints" / "last.pt")
    image = np.zeros((50, 60, 3), np.uint8)
    assert predictor.predict(image, []).shape == (0, 50, 60)
    for boxes in ([[5, 5, 5, 20]], [[0, 0, float("nan"), 4]], [[10, 10, 2, 20]]):
        with pytest.raises(ValueError, match="box 0"):
            predictor.predict(image, boxes)
    with pytest.raises(DataError, match="look normalised"):
        predictor.predict(image, [[0.1, 0.1, 0.5, 0.9]])
    with pytest.raises(DataError, match="box 1 is .*, a box outside the image: give x0"):
        predictor.predict(image, [[0, 0, 9, 9], [60, 0, 90, 9]])
    with pytest.raises(DataError, match=r"boxes = \[\[0, 0, 9, 9\], \[0, 0, 9\]\]: give x0"):
        predictor.predict(image, [[0, 0, 9, 9], [0, 0, 9]])
    with pytest.raises(ValueError, match=r"and is float32 \[50, 60, 3\]"):
        predictor.predict(torch.zeros(50, 60, 3, dtype=torch.bfloat16), [[0, 0, 9, 9]])
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        predictor.predict(image[..., 0], [[0, 0, 10, 10]])
    with pytest.raises(ValueError, match="uint8"):
        predictor.predict(image.astype(np.float32), [[0, 0, 10, 10]])
    with pytest.raises(CheckpointError, match="no run"):
        refinelib.load("never-trained")


def test_boxes_of_any_kind_give_the_same_masks(run):
    predictor = refinelib.load(run.folder)
    image = torch.from_numpy(SyntheticPeople(1, split="val").scene(0).image)
    rows = [[10.0, 20, 90, 160], [100, 50, 200, 150]]
    masks = predictor.predict(image.numpy(), np.array(rows))
    assert masks.any((1, 2)).all()
    for boxes in (
        torch.tensor(rows, dtype=torch.bfloat16),
        torch.tensor(rows, requires_grad=True),
        [torch.tensor(row) for row in rows],
        str(rows),
    ):
        assert np.array_equal(predictor.predict(image, boxes), masks)
    assert np.array_equal(predictor.predict(image, rows[0]), masks[:1])
    assert (
        predictor.probs(image, [[-90, 0, -10, 9]]).isfinite().all()
    )  # a score of moved boxes may ask for it


def test_where_the_best_checkpoint_is_damaged_the_whole_one_is_named(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    best, last = folder / "checkpoints" / "best.pt", folder / "checkpoints" / "last.pt"
    best.write_bytes(b"half of it")
    with pytest.raises(
        CheckpointError,
        match=f"best.pt is not a whole checkpoint .*; {re.escape(str(last))} is whole: give that file",
    ):
        refinelib.load(folder)
    last.write_bytes(b"")
    with pytest.raises(CheckpointError) as told:
        refinelib.load(folder)
    assert "give that file" not in str(told.value)


def test_evaluate_gives_the_model_beside_two_yardsticks(run, coco):
    report = evaluate(run.folder, images=coco, annotations=coco / "people.json")
    for figures in (report, report["mean_mask"], report["resolution_bound"]):
        assert {"miou", "iou", "target_iou", "boundary_iou", "rois"} <= figures.keys()
        assert figures["rois"] == report["rois"] > 0 and len(figures["iou"]) == 3
    assert report["resolution_bound"]["target_iou"] > 0.9 > report["mean_mask"]["target_iou"]
    # The same images through the run's own validation path.
    trained = run.status()["metrics"]
    assert 0.2 < report["target_iou"] < 1 and abs(report["target_iou"] - trained["target_iou"]) < 0.25


def test_evaluate_from_the_shell_prints_one_json_object(run, coco, capsys):
    words = ["evaluate", str(run.folder), "--images", str(coco), "--annotations"]
    assert main([*words, str(coco / "people.json")]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["rois"] > 0
    for name in ("target_iou", "boundary_iou", "miou"):
        assert f"\n{name}: {round(report[name], 3)}, 95 % interval [" in told.err
    assert main([*words, str(coco / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_resolution_bound_of_finer_grids_is_higher():
    source, device = SyntheticPeople(4, split="val"), torch.device("cpu")
    bounds = {n: resolution_bound((n, n)) for n in (16, 64)}
    coarse, fine = (one.compute() for one in score_in_images(bounds, source, device=device).values())
    assert coarse["target_iou"] < fine["target_iou"] <= 1
    assert fine["target_iou"] > 0.97


def test_labels_from_coverage_ties_go_to_background():
    coverage = torch.tensor([[128, 127], [100, 100], [255, 0], [0, 255]], dtype=torch.uint8)
    assert labels_from_coverage(coverage).tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("flip", [False, True])
def test_decision_weights_move_the_odds_and_nothing_else(flip):
    from refinelib.metrics.predict import predict_probs
    from refinelib.modeling.unet import HierarchicalUNet

    torch.manual_seed(0)
    model = HierarchicalUNet(width=0.0625, roi_size=(16, 16)).eval()
    torch.nn.init.normal_(model.person_head.weight), torch.nn.init.normal_(model.target_head.weight)
    images = torch.randn(3, 3, 16, 16)
    plain, weighed = (
        predict_probs(model, images, flip=flip, weights=weights)
        for weights in ((1.0, 1.0, 1.0), (1.0, 1.25, 2.0))
    )
    torch.testing.assert_close(weighed.sum(dim=1), torch.ones(3, 16, 16))
    torch.testing.assert_close(weighed[:, 1] / weighed[:, 0], 1.25 * plain[:, 1] / plain[:, 0])
    torch.testing.assert_close(weighed[:, 2] / weighed[:, 0], 2.0 * plain[:, 2] / plain[:, 0])
    labels, plainly = weighed.argmax(dim=1), plain.argmax(dim=1)
    assert (labels != plainly).any() and (labels >= plainly)[plainly != 1].all()


def test_a_run_and_its_predictor_weigh_and_flip_alike(tiny):
    """The masks that are validated are the masks that are delivered."""
    run = train(tiny(nontarget_decision_weight=4.0, flip_test=True, epochs=1, lr=1e-3))
    saved = np.load(run.folder / "samples" / "epoch_0001.npz")
    images = normalise(torch.from_numpy(saved["image"]).permute(0, 3, 1, 2))
    predictor = refinelib.load(run.folder, device="cpu")
    validated = torch.from_numpy(saved["probs"].astype(np.float32))
    torch.testing.assert_close(predictor.roi_probs(images), validated, atol=2e-3, rtol=0)
    assert (predictor.with_options(flip=False).roi_probs(images) - validated).abs().max() > 4e-3
    predictor.weights = (1.0, 1.0, 1.0)
    assert (predictor.roi_probs(images) - validated).abs().max() > 4e-3
    assert predictor.with_options(flip=False).weights == (1.0, 1.0, 1.0)


def test_a_picture_of_16_bits_is_the_same_open_or_by_its_path(tmp_path):
    file = tmp_path / "grey.png"
    Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 20).reshape(64, 48)).save(file)
    from refinelib.metrics import predict

    with Image.open(file) as picture:
        mine = predict._rgb(picture)
    assert np.array_equal(mine, predict._rgb(file)) and len(np.unique(mine)) > 200


def test_a_picture_of_floats_is_refused_rather_than_black(tmp_path):
    file = tmp_path / "grey.tiff"
    picture = Image.fromarray(np.random.default_rng(0).uniform(0, 1, (8, 8)).astype(np.float32))
    picture.save(file)
    from refinelib.data.sources import decode_image
    from refinelib.metrics import predict

    with pytest.raises(ValueError, match="floats, which have no agreed range: save it with 8 or 16 bits"):
        predict._rgb(picture)
    with pytest.raises(DataError, match="grey.tiff cannot be decoded .*no agreed range"):
        decode_image(file)


def test_crops_on_a_cpu_are_shared_by_threads_that_do_not_wait_for_each_other(monkeypatch):
    from refinelib.metrics import predict

    monkeypatch.setattr(predict, "usable_cores", lambda: 3)
    seen = []

    def function(part):
        seen.append((len(part), torch.get_num_threads()))
        return part * 2

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(32)
        found = predict.side_by_side(function, torch.arange(7.0))
        assert torch.get_num_threads() == 32
        assert sorted(seen) == [(2, 1), (2, 1), (3, 1)]
        assert found.tolist() == [0, 2, 4, 6, 8, 10, 12]
        seen.clear()
        predict.side_by_side(function, torch.arange(1.0))
        with predict.threads(1):
            predict.side_by_side(function, torch.arange(4.0))
        assert seen == [(1, 1), (4, 1)]
    finally:
        torch.set_num_threads(before)
