"""COCO persons: every form of mask, every form of image, and a sentence and a count for what is wrong."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CocoFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import in_memory, in_time
from PIL import Image
from pycocotools import mask as coco_mask

from refinelib.config import resolve
from refinelib.data import (
    CocoPeople,
    DataError,
    coco,
    coco_paths,
    decode_image,
    decode_segmentation,
    open_split,
    open_store,
)
from refinelib.data import sources as scenes
from refinelib.data.annotations import CROWD, NO_CATEGORY, NO_ENTRY, NO_IMAGE
from refinelib.data.coco import ELSEWHERE, ImageFolder
from refinelib.data.sources import (
    CROWDED,
    MISSING,
    NO_AREA,
    NO_MASK,
    OTHER_SIZE,
    OUTSIDE,
    SMALL,
    UNREADABLE,
    SceneError,
)
from refinelib.modeling.roi import labels_from_coverage

# pycocotools 2.0 and NumPy 2 do not agree about an argument of the reference decoder.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OWN = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.0, progress=False, workers=1)
BOX = (20, 10, 52, 42)  # 32 x 32: a store row of it is the image itself


def build(coco_files, tmp_path, **how):
    return open_store(coco_files.source(), root=tmp_path / "stores", **{**OWN, **how})


def labels(store, row):
    return labels_from_coverage(torch.from_numpy(np.array(store.coverage[row]))).numpy()


def runs(mask):
    """Uncompressed run lengths, by hand: column by column, beginning with background."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


# -- masks -------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 60), width=st.integers(1, 60))
def test_every_form_of_a_mask_is_read_as_pycocotools_does(seed, height, width):
    rng = np.random.default_rng(seed)
    for mask in (rng.random((height, width)) < rng.random(), np.ones((height, width), bool)):
        for form in (runs(mask), compressed(mask)):
            found = decode_segmentation(form, height, width)
            assert found is None if not mask.any() else found.dtype == bool and np.array_equal(found, mask)
    polygons = (rng.uniform(-0.2, 1.2, (2, 14)) * max(height, width)).tolist()
    want = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
    found = decode_segmentation(polygons, height, width)
    assert found is None if not want.any() else np.array_equal(found, want)


def test_each_form_gives_the_same_labels(coco_files, tmp_path):
    body, friend = disc(80, 100, 26, 36, 14), disc(80, 100, 30, 50, 9)
    image = coco_files.image()
    for form in (runs, compressed):
        coco_files.person(image, BOX, form(body))
        coco_files.person(image, (41, 21, 59, 39), form(friend))
        image = coco_files.image()
    square = [[BOX[0], BOX[1], BOX[2], BOX[1], BOX[2], BOX[3], BOX[0], BOX[3]]]
    coco_files.person(image, BOX, square)
    store = build(coco_files, tmp_path)
    assert len(store) == 5 and not store.skipped
    part = (slice(BOX[1], BOX[3]), slice(BOX[0], BOX[2]))
    want = np.where(body, 1, np.where(friend, 2, 0))[part]
    assert {0, 1, 2} == set(want.ravel())
    for row in (0, 2):
        assert np.array_equal(labels(store, row), want)
    assert np.array_equal(store.coverage[1], store.coverage[3])
    assert (labels(store, 4) == 1).all()


BROKEN = {
    "no polygon": [],
    "two points": [[1, 1, 9, 9]],
    "odd number": [[1, 1, 9, 1, 9, 9, 1]],
    "not a number": [[math.nan] * 6],
    "infinite": [[1, 1, math.inf, 1, 9, 9]],
    "far away": [[1, 1, 1e9, 1, 1e9, 1e9]],
    "too large for a float": [[10**400] * 6],
    "words": [["a"] * 6],
    "nothing": [[None] * 6],
    "runs too short": {"size": [60, 70], "counts": [100, 50]},
    "runs too long": {"size": [60, 70], "counts": [100, 5000]},
    "negative run": {"size": [60, 70], "counts": [4300, -100]},
    "fractional run": {"size": [60, 70], "counts": [4199.5, 0.5]},
    "huge run": {"size": [60, 70], "counts": [10**400, 1]},
    "words for runs": {"size": [60, 70], "counts": ["4200"]},
    "another size": {"size": [70, 60], "counts": [100, 4100]},
    "size is a number": {"size": 4200, "counts": [100, 4100]},
    "no counts": {"size": [60, 70]},
    "counts is a number": {"size": [60, 70], "counts": 5},
    "empty string": {"size": [60, 70], "counts": ""},
    "garbage string": {"size": [60, 70], "counts": "zzzzzzz"},
    "unending string": {"size": [60, 70], "counts": "o" * 50},
    "cut string": {"size": [60, 70], "counts": compressed(disc(60, 70, 30, 30, 20))["counts"][:-3]},
    "string cut in a number": {
        "size": [60, 70],
        "counts": compressed(np.ones((60, 70), bool))["counts"][:-1],
    },
    "unfinished number": {"size": [60, 70], "counts": compressed(disc(60, 70, 30, 30, 20))["counts"] + "P"},
    "not ASCII": {"size": [60, 70], "counts": "é€"},
    "nobody": {"size": [60, 70], "counts": [4200]},
    "gigantic runs": {"size": [60, 70], "counts": [10**12, 10**13]},
    "gigantic size": {"size": [10**9, 10**9], "counts": [10**18 // 2, 10**18 // 2]},
    "gigantic text": {"size": [60, 70], "counts": "o" * 11 + "0" + "o" * 11 + "0"},
    "none": None,
    "a word": "mask",
}


@pytest.mark.parametrize("form", BROKEN.values(), ids=list(BROKEN))
def test_no_mask_in_it(form):
    """Much of this made pycocotools return uninitialised memory or end the process."""
    with in_memory(20):
        assert decode_segmentation(form, 60, 70) is None


def test_a_bad_polygon_beside_a_good_one():
    good = [10, 10, 30, 10, 30, 30, 10, 30]
    want = decode_segmentation([good], 60, 70)
    assert want.sum() == 400
    for bad in ([10**400] * 6, ["a"] * 6, [1, 2], None, [math.nan] * 8):
        assert np.array_equal(decode_segmentation([bad, good], 60, 70), want)


# -- who is a ROI --------------------------------------------------------------------------------------
def test_crowds_and_dogs_are_left_out(coco_files, tmp_path):
    image = coco_files.image()
    person = coco_files.person(image, BOX)
    coco_files.person(image, BOX, category_id=7)
    crowd = np.ones((80, 100), bool)
    coco_files.person(image, (0, 0, 100, 80), runs(crowd), iscrowd=1)
    store = build(coco_files, tmp_path)
    assert store.annotation_ids.tolist() == [person] and store.skipped == {CROWD: 1}
    assert (labels(store, 0) == 1).all() and not store.coverage[..., 1].any()
    assert store.boxes.tolist() == [list(BOX)] and store.image_sizes.tolist() == [[80, 100]]


def test_small_people_are_no_roi_but_other_people(coco_files, tmp_path):
    image = coco_files.image()
    left = coco_files.person(image, BOX, [[20, 10, 36, 10, 36, 42, 20, 42]])
    coco_files.person(image, (38, 12, 48, 40))  # 10 px wide
    coco_files.person(image, (0, 60, 40, 75.9))  # 15.9 px high
    exact = coco_files.person(image, (60, 60, 76, 76))  # 16 px are enough
    store = build(coco_files, tmp_path)
    assert store.annotation_ids.tolist() == [left, exact] and store.skipped == {SMALL: 2}
    want = np.zeros((32, 32), int)
    want[:, :16] = 1
    want[2:30, 18:28] = 2
    assert np.array_equal(labels(store, 0), want)


def test_overlapping_people_belong_to_the_target_first(coco_files, tmp_path):
    image = coco_files.image()
    coco_files.person(image, BOX)
    coco_files.person(image, (36, 10, 68, 42))
    store = build(coco_files, tmp_path)
    assert (labels(store, 0) == 1).all()  # the overlap too, and likewise for the other
    assert (labels(store, 1) == 1).all()


def test_at_most_the_ten_largest_people(coco_files, tmp_path):
    image = coco_files.image((200, 400))
    sides = [20, 31, 22, 23, 30, 25, 26, 21, 28, 29, 24, 27]
    people = [coco_files.person(image, (30 * i, 5, 30 * i + 16, 5 + side)) for i, side in enumerate(sides)]
    near = coco_files.person(image, (0, 100, 390, 190))  # the largest; all others lie outside its box
    store = build(coco_files, tmp_path)
    assert store.skipped == {CROWDED: 3}
    kept = [p for p, side in zip(people, sides, strict=False) if side > 22] + [near]
    assert store.annotation_ids.tolist() == kept  # in the file's order


def test_images_come_by_id_and_max_images_counts_those_with_people(coco_files):
    for number in range(5):
        coco_files.image((60, 60))
        if number != 1:
            coco_files.person(number + 1, (5, 5, 40, 40))
    coco_files.content["annotations"].reverse()
    source = coco_files.source()
    assert len(source) == 4 and source.instances().image_ids.tolist() == [1, 3, 4, 5]
    few = coco_files.source()
    assert few.instances(2).image_ids.tolist() == [1, 3]
    assert np.array_equal(few.scene(3).image, source.scene(3).image)  # beyond what was indexed so far
    with pytest.raises(IndexError):
        source.scene(4)


def test_fingerprint_changes_with_the_data(coco_files):
    coco_files.person(coco_files.image(), BOX)
    first = coco_files.source().fingerprint()
    assert coco_files.source().fingerprint() != first  # written again
    again = CocoPeople(coco_files.annotations, coco_files.images)
    before = again.fingerprint()
    assert CocoPeople(coco_files.annotations, coco_files.images, "train").fingerprint() == before
    for reading in ({"category": "people"}, {"crowd": "keep"}, {"exif": "apply"}, {"allow_outside": True}):
        assert CocoPeople(coco_files.annotations, coco_files.images, **reading).fingerprint() != before


# -- forms of images -----------------------------------------------------------------------------------
RGB = np.random.default_rng(5).integers(0, 256, (80, 100, 3), dtype=np.uint8)
SMOOTH = np.stack(
    [np.add.outer(np.arange(80), np.arange(100)), np.full((80, 100), 90), np.full((80, 100), 200)], -1
)
CROP = (slice(10, 42), slice(20, 52))


GREY = RGB[CROP][..., :1].repeat(3, -1)
FEW = Image.fromarray(RGB // 128 * 128).quantize(16)
PICTURES = {
    "grey": (Image.fromarray(RGB[..., 0]), GREY, {}),
    "16 bits": (Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), GREY, {}),  # and not all 255
    "palette": (FEW, np.asarray(FEW.convert("RGB"))[CROP], {"transparency": 3}),
    "RGBA": (np.concatenate([RGB, RGB[..., :1]], -1), RGB[CROP], {}),
    "CMYK": (Image.fromarray(SMOOTH.astype(np.uint8)).convert("CMYK"), SMOOTH[CROP], {"quality": 95}),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_forms_of_images(coco_files, tmp_path, kind):
    picture, want, save = PICTURES[kind]
    name = "a.jpg" if kind == "CMYK" else "a.png"
    coco_files.person(coco_files.image(picture, name, **save), BOX)
    got = np.asarray(build(coco_files, tmp_path).images[0]).astype(int)
    assert np.abs(got - want).mean() < 4 if kind == "CMYK" else np.array_equal(got, want)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_is_applied_where_the_annotations_are_on_the_upright_image_only(coco_files, tmp_path):
    for number in range(2):  # to be turned clockwise by 90 degrees
        coco_files.person(coco_files.image(RGB, f"{number}.png", exif=turned(6)), BOX)
    coco_files.content["images"][1].update(height=100, width=80)
    store = build(coco_files, tmp_path)
    assert np.array_equal(store.images[0], RGB[CROP])
    assert np.array_equal(store.images[1], np.rot90(RGB, -1)[CROP])


# -- what is wrong ---------------------------------------------------------------------------------------
def test_missing_files_are_told(tmp_path, coco_files):
    with pytest.raises(DataError, match="there is no annotation file .*nowhere.json"):
        CocoPeople(tmp_path / "nowhere.json", tmp_path)
    coco_files.source()
    for nowhere in (tmp_path / "nowhere", "~nobody-of-this-name/nowhere", "x" * 300 + "nowhere", "\0nowhere"):
        with pytest.raises(DataError, match="there is no image folder .*nowhere"):
            CocoPeople(coco_files.annotations, nowhere)


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"images": [', "is not valid JSON .*: it may be packed or cut short"),
        ("", "is not valid JSON"),
        ("\x00\xff", "is not valid JSON"),
        ('{"images": [' + "9" * 5000 + "]}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "lacks the list images, annotations, categories: COCO's have"),
        ('{"images": [], "categories": []}', "lacks the list annotations"),
        ('{"images": {}, "categories": [], "annotations": []}', "lacks the list images"),
    ],
    ids=["cut", "empty", "binary", "endless number", "nested", "a list", "no annotations", "images no list"],
)
def test_a_file_that_is_no_coco_json(coco_files, text, told):
    source = coco_files.source()
    coco_files.annotations.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=f"instances.json {told}"):
        source.instances()


def test_no_person_category(coco_files):
    coco_files.person(coco_files.image(), BOX)
    coco_files.content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, "person"]
    with pytest.raises(
        DataError, match="no category .person.; its categories are cat, dog: set category to one"
    ):
        coco_files.source().instances()
    coco_files.content["categories"] = [{"id": 1, "name": "Person"}]
    assert len(coco_files.source().instances()) == 1


def test_no_people(coco_files, tmp_path):
    image = coco_files.image()
    with pytest.raises(DataError, match="has no person that can be used: no annotation of a person"):
        build(coco_files, tmp_path)
    coco_files.person(image, (5, 5, 9, 9))
    coco_files.person(image, BOX, iscrowd=1)
    told = r"has no person that can be used: box with a side under 16 px \(1\), crowd annotation \(1\)"
    with pytest.raises(DataError, match=told):
        build(coco_files, tmp_path)


BAD_PEOPLE = {
    "no width": (NO_AREA, {"bbox": [10, 10, 0, 30]}),
    "negative height": (NO_AREA, {"bbox": [10, 10, 30, -30]}),
    "nan": (NO_AREA, {"bbox": [10, 10, math.nan, 30]}),
    "three numbers": (NO_AREA, {"bbox": [10, 10, 30]}),
    "no list": (NO_AREA, {"bbox": 5}),
    "words": (NO_AREA, {"bbox": ["a", "b", "c", "d"]}),
    "too large for a float": (NO_AREA, {"bbox": [10**400, 1, 30, 30]}),
    "too large for the store": (NO_AREA, {"bbox": [0, 0, 1e39, 1e39]}),
    "outside": (OUTSIDE, {"bbox": [100, 10, 30, 30]}),
    "above": (OUTSIDE, {"bbox": [10, -40, 30, 30]}),
    "huge": (NO_MASK, {"bbox": [-1e30, -1e30, 2e30, 2e30]}),
    "small": (SMALL, {"bbox": [10, 10, 30, 15]}),
    "no segmentation": (NO_MASK, {"segmentation": []}),
    "segmentation is none": (NO_MASK, {"segmentation": None}),
    "mask elsewhere": (NO_MASK, {"segmentation": [[70, 50, 90, 50, 90, 70, 70, 70]]}),
    "mask of another size": (NO_MASK, {"segmentation": {"size": [5, 5], "counts": [5, 20]}}),
    "damaged mask": (NO_MASK, {"segmentation": {"size": [80, 100], "counts": "zzzz"}}),
    "image not listed": (NO_IMAGE, {"image_id": 99}),
    "image is no number": (NO_IMAGE, {"image_id": [1]}),
    "nowhere": (NO_MASK, {"bbox": "gone", "segmentation": "gone"}),
    "of no category": (NO_CATEGORY, {"category_id": 99}),
    "no category": (NO_CATEGORY, {"category_id": "gone"}),
    "no image": (NO_IMAGE, {"image_id": "gone"}),
}


@pytest.mark.parametrize("reason, changes", BAD_PEOPLE.values(), ids=list(BAD_PEOPLE))
def test_a_bad_person_is_counted_and_the_rest_is_used(coco_files, tmp_path, reason, changes):
    image = coco_files.image()
    coco_files.person(image, BOX)
    coco_files.person(image, BOX)
    good = coco_files.person(image, (5, 5, 45, 45))
    entry = coco_files.content["annotations"][1]
    coco_files.content["annotations"][1] = {k: v for k, v in {**entry, **changes}.items() if v != "gone"}
    store = build(coco_files, tmp_path)
    assert store.skipped == {reason: 1}
    assert store.annotation_ids.tolist() == [100, good]
    assert np.allclose(store.mean_coverage(), np.asarray(store.coverage, np.float64).mean(0) / 255, atol=1e-6)
    example = store.examples[reason]
    assert "101" in example or "entry 1" in example
    assert f"left out: {reason} (1)" in store.summary()


@pytest.mark.parametrize(
    "changes", [{"area": None}, {"area": "big"}, {"area": math.nan}, {"id": "a"}, {"id": 2**70}]
)
def test_odd_fields_that_matter_little(coco_files, tmp_path, changes):
    coco_files.person(coco_files.image(), BOX, **changes)
    store = build(coco_files, tmp_path)
    assert len(store) == 1 and (store.areas[0] == 1024)


ODD_ENTRIES = [{"id": "gone"}, {"id": None}, {"id": [1]}, {"file_name": 5}, {"file_name": "gone"}]


@pytest.mark.parametrize("changes", ODD_ENTRIES)
def test_a_bad_image_entry_is_counted(coco_files, tmp_path, changes):
    for _ in range(2):
        coco_files.person(coco_files.image(), BOX)
    entry = coco_files.content["images"][0]
    coco_files.content["images"][0] = {k: v for k, v in {**entry, **changes}.items() if v != "gone"}
    coco_files.content["images"].append("003.jpg")
    store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [2] and store.skipped == {NO_ENTRY: 2, NO_IMAGE: 1}
    assert "an id and a file_name are needed" in store.examples[NO_ENTRY]


def test_bad_images_are_counted_and_the_rest_is_used(coco_files, tmp_path):
    for _ in range(9):
        coco_files.person(coco_files.image(), BOX)
    files = [coco_files.images / entry["file_name"] for entry in coco_files.content["images"]]
    files[0].unlink()
    coco_files.truncate(2, 0.7)
    coco_files.truncate(3, 0.01)
    files[3].write_bytes(b"")
    files[4].write_text("<html>not found</html>")
    Image.new("RGB", (90, 80)).save(files[5])
    files[6].unlink(), files[6].mkdir()
    coco_files.content["images"][7]["file_name"] = "x" * 300 + ".jpg"
    store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [9]
    assert store.skipped == {MISSING: 2, OTHER_SIZE: 1, UNREADABLE: 5}
    assert store.examples[MISSING].endswith("001.jpg") and "there is no image file" in store.examples[MISSING]
    assert "006.jpg has 90x80 pixels, its annotation says 100x80" in store.examples[OTHER_SIZE]
    assert "002.jpg cannot be decoded" in store.examples[UNREADABLE]
    assert "fetch it again or take it out" in store.examples[UNREADABLE]
    with pytest.raises(SceneError, match="there is no image file"):
        coco_files.source().scene(0)


# -- where things lie ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "file, folder",
    [
        ("annotations/instances_val.json", "images/val"),  # CVAT and Datumaro
        ("val/labels.json", "val/data"),  # FiftyOne
        ("valid/_annotations.coco.json", "valid"),  # Roboflow
    ],
)
def test_paths_in_other_tools_layouts(tmp_path, file, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert coco_paths("val", tmp_path) == (tmp_path / file, tmp_path / folder)


def test_paths_in_cocos_layout(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    with pytest.raises(
        DataError, match=r"one annotation file annotations/instances_val2017\*.json is needed .* no such file"
    ):
        coco_paths("val", tmp_path)
    persons = tmp_path / "annotations" / "instances_val2017_persons.json"
    persons.touch()
    assert coco_paths("val", tmp_path) == (persons, tmp_path / "val2017")
    (tmp_path / "annotations" / "instances_val2017_other.json").touch()
    with pytest.raises(DataError, match="other.json, instances_val2017_persons.json: give val_annotations"):
        coco_paths("val", tmp_path)
    exact = tmp_path / "annotations" / "instances_val2017.json"
    exact.touch()
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    assert coco_paths("val", tmp_path) == (exact, tmp_path / "images" / "val2017")
    assert coco_paths("val", tmp_path, annotations=persons) == (persons, tmp_path / "images" / "val2017")
    assert coco_paths("val", None, persons, tmp_path) == (persons, tmp_path)
    with pytest.raises(DataError, match="one annotation file annotations/instances_train2017"):
        coco_paths("train", tmp_path)
    with pytest.raises(DataError, match="there is neither .*: give train_images"):
        coco_paths("train", tmp_path, annotations=exact)
    with pytest.raises(DataError, match="no val images of COCO are given: give data_dir or val_images"):
        coco_paths("val", None, annotations=exact)
    with pytest.raises(DataError, match="there is no data folder .*nowhere"):
        coco_paths("val", tmp_path / "nowhere")


# -- the real thing --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_stores(real_coco, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    how = dict(roi_size=(64, 64), mask_size=(64, 64), context=0.0, progress=False)
    return {
        s: open_store(CocoPeople(*coco_paths(s, real_coco), s), root=root, **how) for s in ("train", "val")
    }


@pytest.mark.real_data
def test_real_rois(real_stores):
    train, val = real_stores["train"], real_stores["val"]
    assert (len(train), len(val)) == (666, 134)
    assert train.skipped == {SMALL: 38, CROWDED: 7} and val.skipped == {SMALL: 19}
    for store in real_stores.values():
        assert (store.coverage[..., 0] > 0).any((1, 2)).all()
        # A person's share of the box's cells is its annotated area.
        sides = (store.boxes[:, 2:] - store.boxes[:, :2]).prod(1)
        share = np.asarray(store.coverage[..., 0], np.float64).mean((1, 2)) / 255 * sides / store.areas
        assert abs(np.median(share) - 1) < 0.02 and np.mean(np.abs(share - 1) < 0.1) > 0.9


@pytest.mark.real_data
def test_real_blind_mask(real_stores):
    """The average mask of the training set, which looks at no image: target IoU about 0.554."""
    target, other = np.moveaxis(real_stores["train"].mean_coverage(), -1, 0)
    blind = np.stack([1 - target - other, target, other]).argmax(0) == 1
    truth = labels_from_coverage(torch.from_numpy(np.array(real_stores["val"].coverage))).numpy() == 1
    ious = (truth & blind).sum((1, 2)) / (truth | blind).sum((1, 2))
    assert truth.any((1, 2)).all() and abs(ious.mean() - 0.554) < 0.005


@pytest.mark.real_data
def test_real_masks_as_pycocotools_reads_them(real_coco):
    file, _ = coco_paths("val", real_coco)
    content = json.loads(file.read_text())
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    for annotation in content["annotations"][:25]:
        size = sizes[annotation["image_id"]]
        want = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], *size)))
        assert np.array_equal(decode_segmentation(annotation["segmentation"], *size), want.astype(bool))


def test_ids_that_say_nothing_are_not_believed(coco_files, tmp_path):
    """Annotations without an id, or with a repeated one, get their own; images of one id are an error."""
    image = coco_files.image()
    for fields in ({"id": 2}, {"id": 2}, {"id": None}, {"id": "7"}):
        coco_files.person(image, BOX, **fields)
    ids = coco_files.source().instances().annotation_ids.tolist()
    assert ids[0] == 2 and len(set(ids)) == 4
    again = coco_files.image()
    coco_files.content["images"][-1]["id"] = image
    coco_files.person(image, BOX)
    with pytest.raises(DataError, match="two images of id 1, 001.jpg and 002.jpg"):
        coco_files.source().instances()
    coco_files.content["images"][-1].update(
        coco_files.content["images"][0]
    )  # the very same one twice is no harm
    assert len(coco_files.source().instances()) == 5 and again == 2


# -- files that are no files, names that are no names ------------------------------------------------------
def something_else(file, kind):
    """A FIFO, a folder, a socket or a device under this name."""
    file.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(file.parent)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(file.name)
        os.chdir(here)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "socket"])
def test_what_is_no_regular_file_is_a_bad_image(coco_files, tmp_path, kind):
    for _ in range(3):
        coco_files.person(coco_files.image(), BOX)
    something_else(coco_files.images / "002.jpg", kind)
    (coco_files.images / "003.jpg").rename(tmp_path / "elsewhere.jpg")
    (coco_files.images / "003.jpg").symlink_to(tmp_path / "elsewhere.jpg")  # a link to one is one
    with in_time():
        store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [1, 3] and store.skipped == {UNREADABLE: 1}
    assert "002.jpg is no regular file" in store.examples[UNREADABLE]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "socket"])
def test_annotations_must_be_a_regular_file(coco_files, kind):
    source = coco_files.source()
    something_else(coco_files.annotations, kind)
    with in_time(), pytest.raises(DataError, match="instances.json, or it is no regular file"):
        CocoPeople(coco_files.annotations, coco_files.images)
    with in_time(), pytest.raises(DataError, match="instances.json is no regular file"):
        source.instances()  # it was one when the source was made


ODD_NAMES = {
    "NUL": "a\0b.jpg",
    "surrogate": "a\ud800.jpg",
    "too long": "x" * 300,
    "endless": "y" * 10**6,
    "a folder's": "",
    "ESC": "\x1b[2J.jpg",
    "file in a file": "001.jpg/x",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_a_name_that_no_file_can_have_is_a_bad_image(coco_files, tmp_path, name):
    for _ in range(2):
        coco_files.person(coco_files.image(), BOX)
    coco_files.content["images"][1]["file_name"] = name
    source = coco_files.source()
    for _ in range(2):  # built, then opened: the second looks whether the bad file is another by now
        store = open_store(source, root=tmp_path / "stores", **OWN)
        assert store.image_ids.tolist() == [1] and sum(store.skipped.values()) == 1
        assert set(store.skipped) <= {MISSING, UNREADABLE}
        (told,) = store.examples.values()
        assert told.isprintable() and len(told) < 1100
    assert (store.folder / "store.json").stat().st_size < 10_000


@settings(max_examples=25, deadline=None)
@given(name=st.one_of(st.text(st.characters(), max_size=30), st.text("./\\a\0:~\ud800\n", max_size=12)))
def test_whatever_a_name_is_the_others_are_used(name):
    with tempfile.TemporaryDirectory() as folder:
        files = CocoFiles(Path(folder) / "coco")
        for _ in range(2):
            files.person(files.image((40, 40)), (5, 5, 30, 30))
        files.content["images"][1]["file_name"] = name
        store = open_store(files.source(), root=Path(folder) / "stores", **OWN)
        assert store.image_ids[0] == 1 and (sum(store.skipped.values()) == 1 or len(store) == 2)
        assert all(told.isprintable() for told in store.examples.values())
        del store


# -- where images may lie ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..\\there\\x.jpg", "C:x.jpg", "\\\\server\\x.jpg", "..", "../images/001.jpg"]
)
def test_an_image_outside_its_folder_is_refused(coco_files, tmp_path, name):
    for _ in range(2):
        coco_files.person(coco_files.image(), BOX)
    coco_files.content["images"][1]["file_name"] = name
    store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [1] and store.skipped == {ELSEWHERE: 1}
    assert "set allow_images_outside to true" in store.examples[ELSEWHERE]


@pytest.mark.parametrize("name", ["{there}/x.jpg", "../there/x.jpg", "a/../../there/x.jpg"])
def test_an_image_outside_is_read_where_that_is_allowed(coco_files, tmp_path, name):
    for _ in range(2):
        coco_files.person(coco_files.image(), BOX)
    (coco_files.images / "a").mkdir()
    there = coco_files.images.parent / "there"
    there.mkdir()
    (coco_files.images / "002.jpg").rename(there / "x.jpg")
    coco_files.content["images"][1]["file_name"] = name.format(there=there)
    coco_files.source()
    places = dict(
        train_annotations=str(coco_files.annotations),
        train_images=str(coco_files.images),
        output_dir=str(tmp_path),
    )
    how = dict(data="coco", roi_size=16, mask_size=16, workers=1, **places)
    stores = [
        open_split(resolve("demo", **how, **more), "train", progress=False)
        for more in ({}, {"allow_images_outside": "true"}, {})
    ]
    assert [len(store) for store in stores] == [1, 2, 1] and stores[0].folder == stores[2].folder != stores[
        1
    ].folder


@given(
    parts=st.lists(st.sampled_from(["..", ".", "a", "b.jpg", "", "..."]), max_size=6),
    separators=st.lists(st.sampled_from("/\\"), min_size=6, max_size=6),
)
def test_a_name_leads_out_where_a_part_of_it_does(parts, separators):
    name = "".join(part + separator for part, separator in zip(parts, separators, strict=False))
    plain = name.replace("\\", "/")
    starts = [
        os.path.normpath("/images/" + plain[:end])
        for end in range(len(plain) + 1)
        if plain[end : end + 1] in ("/", "")
    ]
    inside = not plain.startswith("/") and all(
        start == "/images" or start.startswith("/images/") for start in starts
    )
    for allowed in (False, True):
        try:
            ImageFolder(Path("/images"), allowed).find(name)
        except SceneError as error:
            assert error.reason == (MISSING if inside or allowed else ELSEWHERE), name
        else:
            assert allowed and not inside, name


def test_links_lead_where_they_lead(coco_files, tmp_path):
    coco_files.person(coco_files.image(), BOX)
    coco_files.content["images"][0]["file_name"] = "here/../001.jpg"  # climbs, but not out
    (coco_files.images / "here").mkdir()
    coco_files.images.rename(tmp_path / "disk")
    coco_files.images.symlink_to(tmp_path / "disk")
    assert len(build(coco_files, tmp_path)) == 1


# -- more people and pixels than memory ----------------------------------------------------------------------
def crowded(files, people, side):
    """One image with so many people."""
    image = files.image(Image.new("RGB", (side, side), (90, 40, 10)))
    random = np.random.default_rng(0)
    for _ in range(people):
        x, y = random.integers(0, side - 60, 2).tolist()
        files.person(image, (x, y, x + 20 + int(random.integers(0, 20)), y + 40))
    return files.source()


@pytest.mark.parametrize("people, side", [(2000, 300), (60, 1700)])
def test_masks_are_decoded_under_a_budget(coco_files, monkeypatch, people, side):
    """All at once they take 180 MB: 20,000 people, or 60 in a picture of 13,000 pixels, take gigabytes."""
    monkeypatch.setattr(scenes, "MASK_BYTES", 4 << 20)
    source = crowded(coco_files, people, side)
    source.instances()
    with in_memory(60):
        masks = source.scene(0).masks
        anyone = masks.any(0)
        some = [masks[slot] for slot in (0, people - 1)]
    assert len(masks) == people and anyone.shape == (side, side)
    assert all(mask.dtype == bool and mask.any() and not (mask & ~anyone).any() for mask in some)
    for wrong in (-1, people):
        with pytest.raises(IndexError):
            masks[wrong]
    with pytest.raises(AssertionError):
        masks.any(1)
    assert sum(mask.nbytes for mask in masks._kept.values()) <= 4 << 20


@pytest.mark.parametrize("budget", [0, 50_000, 1 << 20])
def test_a_store_is_the_same_whatever_the_budget(coco_files, tmp_path, monkeypatch, budget):
    source = crowded(coco_files, 40, 200)
    want = open_store(source, root=tmp_path / "want", **OWN)
    monkeypatch.setattr(scenes, "MASK_BYTES", budget)
    got = open_store(source, root=tmp_path / "got", **OWN)
    assert np.array_equal(got.images, want.images) and np.array_equal(got.coverage, want.coverage)


def test_an_ordinary_image_decodes_each_mask_once(coco_files, monkeypatch):
    asked = []
    monkeypatch.setattr(coco, "decode_segmentation", lambda *of: asked.append(of) or decode_segmentation(*of))
    masks = crowded(coco_files, 12, 100).scene(0).masks
    anyone = masks.any(0)
    assert np.array_equal(np.stack([*masks]), np.stack([decode_segmentation(*of) for of in asked[:12]]))
    assert np.array_equal(anyone, np.stack([*masks]).any(0)) and len(asked) == 12


MODES = ("RGB", "L", "RGBA", "LA", "CMYK", "1", "YCbCr", "P", "P transparent", "I;16", "I")


@pytest.mark.parametrize("mode", MODES)
def test_a_large_image_is_converted_in_bands(monkeypatch, mode):
    picture = Image.fromarray(RGB)
    if mode.startswith("I"):
        picture = Image.fromarray(
            (RGB[..., 0].astype(np.uint16) * 200 + 77).astype(np.uint16 if mode == "I;16" else np.int32)
        )
    elif mode != "RGB":
        picture = picture.quantize(16) if mode.startswith("P") else picture.convert(mode)
    picture.info.update({"transparency": 3} if mode == "P transparent" else {})
    whole = scenes.as_rgb(picture)
    monkeypatch.setattr(scenes, "_BAND", 700)  # 7 of 80 rows
    assert np.array_equal(scenes.as_rgb(picture), whole) and whole.std() > 10


# -- annotations that claim or hold too much -----------------------------------------------------------------
def png_of(width, height):
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_pictures_and_entries_that_claim_gigantic_sizes(coco_files, tmp_path):
    for _ in range(4):
        coco_files.person(coco_files.image(), BOX)
    entries = coco_files.content["images"]
    (coco_files.images / "002.jpg").write_bytes(png_of(30_000, 30_000))  # beyond PIL's limit
    entries[1].update(height=30_000, width=30_000)
    (coco_files.images / "003.jpg").write_bytes(png_of(12_000, 12_000))  # within it, and not the entry's size
    entries[3].update(height=2**31 - 1, width=2**31 - 1)
    with in_memory(30):
        store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [1] and store.skipped == {UNREADABLE: 1, OTHER_SIZE: 2}
    assert (
        "002.jpg cannot be decoded (Image size (900000000 pixels) exceeds limit" in store.examples[UNREADABLE]
    )
    entries[3]["file_name"] = "nowhere.jpg"
    assert build(coco_files, tmp_path).skipped[MISSING] == 1


def test_a_picture_of_another_size_is_not_decoded(coco_files, tmp_path, monkeypatch):
    image = coco_files.images / "a.png"
    image.write_bytes(png_of(9000, 9000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(SceneError, match="has 9000x9000 pixels, its annotation says 60x50"):
        decode_image(image, (50, 60))


@pytest.mark.slow
def test_outlines_of_millions_of_pixels_are_no_mask():
    """pycocotools takes memory for each of them and does not look if it got any: it ended the process."""
    code = """
import resource
from refinelib.data import decode_segmentation
limit = 3 << 30  # of the addresses, most of which are the libraries'
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
across = [0, 0, 1900, 470] * 100_000
for polygons in ([across], [across[:4000]] * 100, [[5.0, 5.0] * 3_000_000], [[1, 1, 1, 1, 1, 1]] * 500_000):
    assert decode_segmentation(polygons, 480, 640) is None
zigzag = [value for x in range(500) for value in (x, 0 if x % 2 else 470)]
assert decode_segmentation([zigzag], 480, 640).any()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_annotation_file_without_end(coco_files):
    source = coco_files.source()
    os.truncate(coco_files.annotations, 160 << 30)
    with in_time(), in_memory(10), pytest.raises(DataError, match="has 160 GB, more than 2 GB"):
        source.instances()


#: Values in JSON's own text, as no writer makes them.
HOSTILE = st.one_of(
    st.integers(1, 3000).map(lambda deep: "[" * deep + "]" * deep),
    st.integers(1, 3000).map(lambda deep: '{"a":' * deep + "1" + "}" * deep),
    st.integers(1, 4299).map(lambda digits: "9" * digits),
    st.integers(4301, 9000).map(lambda digits: "9" * digits),
    st.sampled_from(["null", "true", "NaN", "-Infinity", '""', '"\\u0000"', '"\\ud800"', "[]", "{}", "-1"]),
    st.sampled_from(["1.5", "1e400", "9223372036854775807", "4611686018427387904", "[null]", '["a"]']),
    st.sampled_from(['{"size": [80, 100], "counts": [[8000]]}', '{"size": [[80], 100], "counts": [8000]}']),
    st.text(max_size=20).map(json.dumps),
)  # fmt: skip
ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd")
PLACES = [("images", 0, field) for field in ("id", "file_name", "height", "width", None)]
PLACES += [("annotations", 0, field) for field in (*ANNOTATION, None, ("bbox", 2))]
PLACES += [("annotations", 0, ("segmentation", place)) for place in (0, 1)]
PLACES += [("categories", 1, "id"), ("categories", 1, "name"), ("categories", 0, None)]


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), HOSTILE), min_size=1, max_size=2))
def test_whatever_the_json_holds_is_a_sentence_or_counted(hostile_files, changes):
    content = json.loads(json.dumps(hostile_files.content))
    for number, ((part, entry, field), _) in enumerate(changes):
        if field is None or not isinstance(content[part][entry], dict):
            content[part][entry] = f"@{number}@"
        elif isinstance(field, tuple):
            inner = content[part][entry][field[0]]
            if isinstance(inner, list):
                inner[field[1] :] = [f"@{number}@"]
        else:
            content[part][entry][field] = f"@{number}@"
    text = json.dumps(content)
    for number, (_, hostile) in enumerate(changes):
        text = text.replace(f'"@{number}@"', hostile)
    hostile_files.annotations.write_text(text)
    source = CocoPeople(hostile_files.annotations, hostile_files.images)
    with tempfile.TemporaryDirectory() as folder, in_time():
        try:
            store = open_store(source, root=folder, **OWN)
        except DataError as error:
            assert len(str(error)) < 3000
            return
        listed = len(store) + sum(store.skipped.values())
        assert listed >= 1 and all(told.isprintable() for told in store.examples.values())
        for index in range(len(source)):
            json.dumps(source.annotated_instances(index))
        del store


@pytest.fixture(scope="module")
def hostile_files(tmp_path_factory):
    files = CocoFiles(tmp_path_factory.mktemp("hostile") / "coco")
    for _ in range(2):
        image = files.image()
        files.person(image, BOX)
        files.person(image, (5, 5, 45, 45))
    return files
