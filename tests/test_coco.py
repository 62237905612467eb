"""COCO persons: every form of mask, every form of image, and a sentence and a count for what is wrong."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from refinelib.data import CocoPeople, DataError, coco_paths, decode_segmentation, open_store
from refinelib.data.coco import CROWD, NO_ENTRY, NO_FIELD, NO_IMAGE
from refinelib.data.scenes import (
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
from refinelib.quality.scoring import blind, score

# pycocotools 2.0 and NumPy 2 do not agree about an argument; only the reference decoder of these tests is concerned.
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
def test_three_forms_of_a_mask_are_one():
    outline = [[20, 10, 52, 10, 52, 30, 36, 30, 36, 42, 20, 42], [60, 50, 70, 50, 70, 60, 60, 60]]
    mask = np.zeros((80, 100), bool)
    mask[10:30, 20:52] = mask[30:42, 20:36] = mask[50:60, 60:70] = True
    for form in (outline, runs(mask), compressed(mask)):
        decoded = decode_segmentation(form, 80, 100)
        assert decoded.dtype == bool and np.array_equal(decoded, mask)


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_against_pycocotools(seed):
    rng = np.random.default_rng(seed)
    for mask in (rng.random((37, 53)) < rng.random(), disc(200, 300, 90, 120, 70), np.ones((9, 4), bool)):
        size = mask.shape
        assert np.array_equal(decode_segmentation(compressed(mask), *size), mask)
        assert np.array_equal(decode_segmentation(runs(mask), *size), mask)
    polygon = rng.uniform(-10, 70, 14).tolist()
    want = coco_mask.decode(coco_mask.frPyObjects([polygon], 60, 50))[..., 0]
    assert np.array_equal(decode_segmentation([polygon], 60, 50), want.astype(bool))


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


def test_the_crop_is_the_images_own_pixels(coco_files, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    coco_files.person(coco_files.image(pixels, "a.png"), BOX)
    store = build(coco_files, tmp_path)
    assert np.array_equal(store.images[0], pixels[10:42, 20:52])
    assert store.boxes.tolist() == [list(BOX)] and store.image_sizes.tolist() == [[80, 100]]


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
    "string cut in a number": {"size": [60, 70], "counts": compressed(np.ones((60, 70), bool))["counts"][:-1]},
    "unfinished number": {"size": [60, 70], "counts": compressed(disc(60, 70, 30, 30, 20))["counts"] + "P"},
    "not ASCII": {"size": [60, 70], "counts": "é€"},
    "nobody": {"size": [60, 70], "counts": [4200]},
    "none": None,
    "a word": "mask",
}


@pytest.mark.parametrize("form", BROKEN.values(), ids=list(BROKEN))
def test_no_mask_in_it(form):
    """Much of this made pycocotools return uninitialised memory or end the process."""
    assert decode_segmentation(form, 60, 70) is None


def test_a_bad_polygon_beside_a_good_one():
    good = [10, 10, 30, 10, 30, 30, 10, 30]
    want = decode_segmentation([good], 60, 70)
    assert want.sum() == 400
    for bad in ([10**400] * 6, ["a"] * 6, [1, 2], None, [math.nan] * 8):
        assert np.array_equal(decode_segmentation([bad, good], 60, 70), want)


# -- who is a ROI --------------------------------------------------------------------------------------
def test_crowds_are_left_out(coco_files, tmp_path):
    image = coco_files.image()
    person = coco_files.person(image, BOX)
    crowd = np.ones((80, 100), bool)
    coco_files.person(image, (0, 0, 100, 80), runs(crowd), iscrowd=1)
    store = build(coco_files, tmp_path)
    assert store.annotation_ids.tolist() == [person] and store.skipped == {CROWD: 1}
    assert (labels(store, 0) == 1).all() and not store.coverage[..., 1].any()


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


def test_dogs_are_background(coco_files, tmp_path):
    image = coco_files.image()
    coco_files.person(image, BOX, [[20, 10, 36, 10, 36, 42, 20, 42]])
    coco_files.person(image, BOX, category_id=7)
    store = build(coco_files, tmp_path)
    assert len(store) == 1 and not store.skipped and not store.coverage[..., 1].any()


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
    kept = [p for p, side in zip(people, sides) if side > 22] + [near]
    assert store.annotation_ids.tolist() == kept  # in the file's order


def test_the_eleventh_is_other_people(coco_files, tmp_path):
    image = coco_files.image((100, 100))
    for i in range(10):
        coco_files.person(image, (20, 10, 52 + i, 90), [[20, 10, 36, 10, 36, 42, 20, 42]], area=1000 + i)
    coco_files.person(image, (36, 10, 52, 42), area=5)
    store = build(coco_files, tmp_path)
    assert len(store) == 10 and (labels(store, 0)[:, 16:][:12] == 2).all()


def test_images_come_by_id_and_max_images_counts_those_with_people(coco_files):
    for number in range(5):
        coco_files.image((60, 60))
        if number != 1:
            coco_files.person(number + 1, (5, 5, 40, 40))
    coco_files.content["annotations"].reverse()
    source = coco_files.source()
    assert len(source) == 4 and source.people().image_ids.tolist() == [1, 3, 4, 5]
    few = coco_files.source()
    assert few.people(2).image_ids.tolist() == [1, 3]
    assert np.array_equal(few.scene(3).image, source.scene(3).image)  # beyond what was indexed so far
    with pytest.raises(IndexError):
        source.scene(4)


def test_file_names_may_repeat_the_folder(coco_files, tmp_path):
    coco_files.person(coco_files.image(), BOX)
    coco_files.content["images"][0]["file_name"] = "train2017/001.jpg"
    assert len(build(coco_files, tmp_path)) == 1


def test_fingerprint_changes_with_the_data(coco_files):
    coco_files.person(coco_files.image(), BOX)
    first = coco_files.source().fingerprint()
    assert coco_files.source().fingerprint() != first  # written again
    again = CocoPeople(coco_files.annotations, coco_files.images)
    before = again.fingerprint()
    assert CocoPeople(coco_files.annotations, coco_files.images, "train").fingerprint() == before
    (coco_files.images / "new.jpg").touch()
    assert again.fingerprint() != before


# -- forms of images -----------------------------------------------------------------------------------
def one_image(coco_files, tmp_path, picture, name, box=BOX, **save):
    coco_files.person(coco_files.image(picture, name, **save), box)
    store = build(coco_files, tmp_path)
    assert len(store) == 1, store.examples
    return np.asarray(store.images[0]).astype(int)


RGB = np.random.default_rng(5).integers(0, 256, (80, 100, 3), dtype=np.uint8)
SMOOTH = np.stack([np.add.outer(np.arange(80), np.arange(100)), np.full((80, 100), 90), np.full((80, 100), 200)], -1)
CROP = (slice(10, 42), slice(20, 52))


def test_grey(coco_files, tmp_path):
    got = one_image(coco_files, tmp_path, Image.fromarray(RGB[..., 0]), "a.png")
    assert np.array_equal(got, RGB[CROP][..., :1].repeat(3, -1))


def test_sixteen_bits(coco_files, tmp_path):
    deep = RGB[..., 0].astype(np.uint16) * 257
    got = one_image(coco_files, tmp_path, Image.fromarray(deep), "a.png")
    assert np.array_equal(got, RGB[CROP][..., :1].repeat(3, -1))  # and not all 255


def test_cmyk(coco_files, tmp_path):
    smooth = Image.fromarray(SMOOTH.astype(np.uint8))
    got = one_image(coco_files, tmp_path, smooth.convert("CMYK"), "a.jpg", quality=95)
    assert np.abs(got - SMOOTH[CROP]).mean() < 4


def test_palette_and_transparency(coco_files, tmp_path):
    few = Image.fromarray(RGB // 128 * 128).quantize(16)
    picture = few.copy()
    got = one_image(coco_files, tmp_path, picture, "a.png", transparency=3)
    assert np.array_equal(got, np.asarray(few.convert("RGB"))[CROP])


def test_rgba(coco_files, tmp_path):
    picture = np.concatenate([RGB, RGB[..., :1]], -1)
    assert np.array_equal(one_image(coco_files, tmp_path, picture, "a.png"), RGB[CROP])


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_is_not_applied_where_the_annotations_are_on_the_stored_pixels(coco_files, tmp_path):
    got = one_image(coco_files, tmp_path, RGB, "a.png", exif=turned(6))
    assert np.array_equal(got, RGB[CROP])


def test_exif_is_applied_where_the_annotations_are_on_the_upright_image(coco_files, tmp_path):
    image = coco_files.image(RGB, "a.png", exif=turned(6))  # to be turned clockwise by 90 degrees
    coco_files.content["images"][0].update(height=100, width=80)
    coco_files.person(image, BOX)
    store = build(coco_files, tmp_path)
    assert np.array_equal(store.images[0], np.rot90(RGB, -1)[CROP])


# -- what is wrong ---------------------------------------------------------------------------------------
def test_missing_files_are_told(tmp_path, coco_files):
    with pytest.raises(DataError, match="there is no annotation file .*nowhere.json"):
        CocoPeople(tmp_path / "nowhere.json", tmp_path)
    coco_files.source()
    with pytest.raises(DataError, match="there is no image folder .*nowhere"):
        CocoPeople(coco_files.annotations, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"images": [', "is not valid JSON .*: fetch it again, it may be cut short"),
        ("", "is not valid JSON"),
        ("\x00\xff", "is not valid JSON"),
        ('{"images": [' + "9" * 5000 + "]}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "lacks the list images, annotations, categories: a COCO instances file has"),
        ('{"images": [], "categories": []}', "lacks the list annotations"),
        ('{"images": {}, "categories": [], "annotations": []}', "lacks the list images"),
    ],
    ids=["cut", "empty", "binary", "endless number", "nested", "a list", "no annotations", "images no list"],
)
def test_a_file_that_is_no_coco_json(coco_files, text, told):
    source = coco_files.source()
    coco_files.annotations.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=f"instances.json {told}"):
        source.people()


def test_no_person_category(coco_files):
    coco_files.person(coco_files.image(), BOX)
    coco_files.content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, "person"]
    with pytest.raises(DataError, match="has no category 'person'; its categories are cat, dog"):
        coco_files.source().people()
    coco_files.content["categories"] = [{"id": 1, "name": "Person"}]
    assert len(coco_files.source().people()) == 1


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
    "no list": (NO_AREA, {"bbox": None}),
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
    "no box": (NO_FIELD, {"bbox": "gone"}),
    "no category": (NO_FIELD, {"category_id": "gone"}),
    "no image": (NO_FIELD, {"image_id": "gone"}),
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


@pytest.mark.parametrize("changes", [{"area": None}, {"area": "big"}, {"area": math.nan}, {"id": "a"}, {"id": 2**70}])
def test_odd_fields_that_matter_little(coco_files, tmp_path, changes):
    coco_files.person(coco_files.image(), BOX, **changes)
    store = build(coco_files, tmp_path)
    assert len(store) == 1 and (store.areas[0] == 1024)


ODD_ENTRIES = [{"height": "gone"}, {"width": 0}, {"height": "80"}, {"id": None}, {"file_name": 5}]


@pytest.mark.parametrize("changes", ODD_ENTRIES)
def test_a_bad_image_entry_is_counted(coco_files, tmp_path, changes):
    for _ in range(2):
        coco_files.person(coco_files.image(), BOX)
    entry = coco_files.content["images"][0]
    coco_files.content["images"][0] = {k: v for k, v in {**entry, **changes}.items() if v != "gone"}
    coco_files.content["images"].append("003.jpg")
    store = build(coco_files, tmp_path)
    assert store.image_ids.tolist() == [2] and store.skipped == {NO_ENTRY: 2, NO_IMAGE: 1}
    assert "id, height, width as whole numbers and file_name are needed" in store.examples[NO_ENTRY]


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
    assert store.skipped == {MISSING: 1, OTHER_SIZE: 1, UNREADABLE: 6}
    assert store.examples[MISSING].endswith("001.jpg") and "there is no image file" in store.examples[MISSING]
    assert "006.jpg has 90x80 pixels, its annotation says 100x80" in store.examples[OTHER_SIZE]
    assert "002.jpg cannot be decoded" in store.examples[UNREADABLE]
    assert "fetch it again or take it out" in store.examples[UNREADABLE]
    with pytest.raises(SceneError, match="there is no image file"):
        coco_files.source().scene(0)


# -- where things lie ------------------------------------------------------------------------------------
def test_paths_in_cocos_layout(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DataError, match=r"one annotation file instances_val2017\*.json is needed .* no such file"):
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
    with pytest.raises(DataError, match="one annotation file instances_train2017"):
        coco_paths("train", tmp_path)
    with pytest.raises(DataError, match="there is neither .*: give train_images"):
        coco_paths("train", tmp_path, annotations=exact)
    with pytest.raises(DataError, match="the val images of COCO are nowhere: give data_dir or val_images"):
        coco_paths("val", None, annotations=exact)
    with pytest.raises(DataError, match="there is no data folder .*nowhere"):
        coco_paths("val", tmp_path / "nowhere")


# -- the real thing --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_stores(real_coco, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    how = dict(roi_size=(64, 64), mask_size=(64, 64), context=0.0, progress=False)
    return {s: open_store(CocoPeople(*coco_paths(s, real_coco), s), root=root, **how) for s in ("train", "val")}


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


def test_a_home_folder_may_be_meant(coco_files, monkeypatch):
    """Quoted, or in a notebook, no shell has written it out."""
    coco_files.person(coco_files.image(), (10, 10, 60, 70))
    coco_files.source()
    monkeypatch.setenv("HOME", str(coco_files.images.parent))
    from refinelib.data import CocoPeople

    assert len(CocoPeople("~/instances.json", "~/images")) == 1


def test_ids_that_say_nothing_are_not_believed(coco_files, tmp_path):
    """Annotations without an id, or with one that another has: each gets one of its own. Two images of one id: nobody knows whose people are whose."""
    image = coco_files.image()
    for fields in ({"id": 2}, {"id": 2}, {"id": None}, {"id": "7"}):
        coco_files.person(image, BOX, **fields)
    ids = coco_files.source().people().annotation_ids.tolist()
    assert ids[0] == 2 and len(set(ids)) == 4
    again = coco_files.image()
    coco_files.content["images"][-1]["id"] = image
    coco_files.person(image, BOX)
    with pytest.raises(DataError, match="two images of id 1, 001.jpg and 002.jpg"):
        coco_files.source().people()
    coco_files.content["images"][-1].update(coco_files.content["images"][0])  # the very same one twice is no harm
    assert len(coco_files.source().people()) == 5 and again == 2


def test_images_may_have_negative_ids(coco_files, tmp_path):
    for number in (-7, -9):
        image = coco_files.image()
        coco_files.content["images"][-1]["id"] = number
        coco_files.person(number, BOX)
    store = build(coco_files, tmp_path)
    found = score(blind(torch.full((*store.mask_size, 2), 0.3)), store, device=torch.device("cpu"), mask_size=store.mask_size)
    assert found.compute(intervals=True)["rois"] == 2 and sorted(store.image_ids.tolist()) == [-9, -7]
