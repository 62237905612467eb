"""An image and boxes in, files out."""

from __future__ import annotations

import json
import os
import re
import unicodedata

import numpy as np
import pytest
import torch
from limits import in_memory, in_time
from PIL import Image
from pycocotools import mask as coco_mask

from refinelib.data import DataError
from refinelib.metrics.predict import as_boxes
from refinelib.plots.masks import overlay
from refinelib.workflows.predict_io import index_of, read_inputs, save_masks


@pytest.fixture
def photo(tmp_path):
    """A file of 60 x 40 pixels."""
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file)
    return file


# -- in --------------------------------------------------------------------------------------------
def test_nothing_given_is_a_drawn_picture_with_people():
    inputs = read_inputs()
    assert inputs.pixels.dtype == np.uint8 and len(inputs.boxes) >= 1 and inputs.name == "synthetic"


@pytest.mark.parametrize("boxes", ["[[1, 2, 30, 35], [5, 5, 9, 9.5]]", [[1, 2, 30, 35], [5, 5, 9, 9.5]]])
def test_boxes_as_text_and_as_rows(photo, boxes):
    assert read_inputs(photo, boxes).boxes == [[1, 2, 30, 35], [5, 5, 9, 9.5]]
    assert read_inputs(photo, "[1, 2, 30, 35]").boxes == [[1, 2, 30, 35]]
    assert read_inputs(photo).boxes == []


def test_boxes_from_a_coco_file(coco_files):
    coco_files.image((40, 60), name="first.jpg")
    image = coco_files.image((50, 70), name="second.jpg")
    coco_files.person(image, (5, 6, 20, 30))
    coco_files.person(image, (30, 6, 60, 40), iscrowd=1)
    coco_files.person(image, (1, 1, 9, 9), category_id=7)
    coco_files.source()
    inputs = read_inputs(coco_files.images / "second.jpg", None, coco_files.annotations)
    assert (inputs.boxes, inputs.image_id, inputs.category_ids) == ([[5, 6, 20, 30]], image, [1])
    assert inputs.left_out == "crowd annotation (1)"
    assert read_inputs(coco_files.images / "second.jpg", [[1, 1, 9, 9]], coco_files.annotations).boxes == [
        [1, 1, 9, 9]
    ]


@pytest.mark.parametrize(
    "boxes, sentence",
    [
        ("[[1, 2, 3]]", "give x0, y0, x1, y1"),
        ("ten", "give x0, y0, x1, y1"),
        (5, "give x0, y0, x1, y1"),
        ([[10, 5, 2, 9]], "box 0 is"),
        ([[1, 2, 3, float("nan")]], "box 0 is"),
        ([[0, 0, 5, 5], [70, 0, 90, 9]], "box 1 is .*, a box outside the image: give x0"),
        ([[0, 0, 5, 5], [1, 2, 3]], r"boxes = .*, \[1, 2, 3\]\]: give x0"),
        ([[0.1, 0.2, 0.5, 1.0], [0, 0, 0.3, 0.3]], "look normalised.*width, 60, and y by its height, 40"),
    ],
)
def test_wrong_boxes_get_a_sentence(photo, boxes, sentence):
    with pytest.raises(DataError, match=sentence):
        read_inputs(photo, boxes)


def test_wrong_files_get_a_sentence(photo, tmp_path, coco_files):
    with pytest.raises(DataError, match="no image file"):
        read_inputs(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="no image: give"):
        read_inputs(None, None, coco_files.annotations)
    with pytest.raises(DataError, match="cannot be read"):
        read_inputs(photo, None, tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="lacks the list images"):
        read_inputs(photo, None, tmp_path / "list.json")
    coco_files.person(coco_files.image((10, 10)), (1, 1, 9, 9))
    coco_files.source()
    with pytest.raises(DataError, match="lists no image photo.png"):
        read_inputs(photo, None, coco_files.annotations)
    coco_files.image((10, 10), name="photo.png")
    coco_files.source()
    with pytest.raises(DataError, match="has 60x40 pixels, its annotation says 10x10"):
        read_inputs(photo, None, coco_files.annotations)


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        list,
        lambda rows: [np.array(row) for row in rows],
        lambda rows: torch.tensor(rows, dtype=torch.bfloat16),
        lambda rows: torch.tensor(rows, dtype=torch.float32, requires_grad=True),
        lambda rows: [torch.tensor(row, dtype=torch.bfloat16) for row in rows],
        str,
    ],
)
def test_four_boxes_of_any_kind_are_four_boxes(photo, make):
    rows = [[1, 2, 30, 35], [5, 5, 9, 9], [0, 0, 60, 40], [-5, -5, 8, 50]]
    assert read_inputs(photo, make(rows)).boxes == rows
    assert as_boxes(make(rows)).tolist() == rows
    assert read_inputs(photo, make(rows[0])).boxes == rows[:1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_boxes_on_cuda(photo):
    assert read_inputs(photo, torch.tensor([[1, 2, 30, 35]], device="cuda")).boxes == [[1, 2, 30, 35]]


def test_one_box_of_a_pixel_beside_others_is_not_taken_for_normalised(photo):
    assert read_inputs(photo, [[0, 0, 1, 1], [5, 5, 9, 9]]).category_ids == [1, 1]


# -- which entry -----------------------------------------------------------------------------------
@pytest.fixture
def cameras(tmp_path):
    """Writes images of one name in several folders, and a COCO file of a person in each."""

    def write(names, ids=None, categories=(1,), **more):
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": number, "name": "person"} for number in categories]
        for number, name in enumerate(names):
            file = tmp_path / name.replace("\\", "/").replace("%20", " ")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 60, 3), 40 * number, np.uint8)).save(file)
            identity = (ids or range(1, 9))[number]
            content["images"].append({"id": identity, "file_name": name, "height": 40, "width": 60})
            category = categories[number % len(categories)]
            one = {"image_id": identity, "category_id": category, "bbox": [number, 1, 20, 30], **more}
            content["annotations"].append(one)
        (tmp_path / "people.json").write_text(json.dumps(content))
        return tmp_path / "people.json"

    return write


def test_of_two_cameras_the_right_one_is_taken(cameras, tmp_path, monkeypatch):
    file = cameras(["cam1/x.png", "cam2/x.png"])
    for number in (1, 2):
        found = read_inputs(tmp_path / f"cam{number}" / "x.png", None, file)
        assert (found.image_id, found.boxes) == (number, [[number - 1, 1, number + 19, 31]])
        assert found.pixels[0, 0, 0] == 40 * (number - 1) and found.name == f"cam{number}_x"
    monkeypatch.chdir(tmp_path / "cam2")
    assert read_inputs("x.png", None, file).image_id == 2


def test_an_image_that_may_be_either_is_refused(cameras, tmp_path):
    file = cameras(["cam1/x.png", "cam2/x.png"])
    Image.new("RGB", (60, 40)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"lists 'cam1/x.png' and 'cam2/x.png', and either"):
        read_inputs(tmp_path / "x.png", None, file)


E = "\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.mark.parametrize(
    "image, names, index",
    [
        ("a/cam2/x.png", [r"b\cam1\x.png", r"b\cam2\x.png"], 1),
        ("cam1/my x.png", ["cam2/my%20x.png", "cam1/my%20x.png"], 1),
        (f"cam1/{unicodedata.normalize('NFD', E)}.png", [f"cam2/{E}.png", f"cam1/{E}.png"], 1),
        ("cam1/x.png", ["cam1/X.png", "cam1/x.png"], 1),
        ("Cam1/x.PNG", ["cam2/x.png", "cam1/x.png"], 1),
        ("/data/val/x.png", ["/elsewhere/val/x.png"], 0),
        ("x.png", ["./x.png", "y.png"], 0),
    ],
)
def test_the_longest_common_end_decides(image, names, index):
    assert index_of(image, names) == index


@pytest.mark.parametrize(
    "image, names",
    [
        ("x.png", ["x.png", "x.png"]),
        ("x.png", ["X.png", "x.PNG"]),
        ("cam1/X.png", ["cam1/x.png", "cam2/X.png"]),  # the folder says one, the letters the other
        ("cam3/x.png", ["cam1/x.png", "cam2/x.png"]),
    ],
)
def test_what_fits_twice_is_refused_with_both_names(image, names):
    with pytest.raises(DataError) as error:
        index_of(image, names)
    assert all(repr(name) in str(error.value) for name in names)


@pytest.mark.parametrize("names", [[], ["", "/", "ax.png", "x.png/y"]])
def test_what_is_not_listed_is_refused(names):
    with pytest.raises(DataError, match=f"no image x.png: give one of its {len(names)} images"):
        index_of("cam1/x.png", names)


def test_ids_that_a_tool_wrote_as_texts(cameras, tmp_path):
    file = cameras(["x.png"], ids=["7"], category_id="1")
    found = read_inputs(tmp_path / "x.png", None, file)
    assert (found.image_id, found.category_ids, len(found.boxes)) == (
        "7",
        [1],
        1,
    )  # as the file has it: pycocotools compares


def test_a_person_without_a_box_gets_that_of_the_mask(cameras, tmp_path):
    file = cameras(["x.png"], bbox=None, segmentation=[[5, 6, 25, 6, 25, 30, 5, 30]])
    assert read_inputs(tmp_path / "x.png", None, file).boxes == [[5, 6, 25, 30]]


def test_persons_of_another_name(cameras, tmp_path):
    file = cameras(["x.png"])
    file.write_text(file.read_text().replace('"person"', '"pedestrian"'))
    with pytest.raises(DataError, match="no category 'person'; its categories are pedestrian"):
        read_inputs(tmp_path / "x.png", None, file)
    assert len(read_inputs(tmp_path / "x.png", None, file, category="pedestrian").boxes) == 1


def test_each_box_keeps_its_own_category(cameras, tmp_path):
    file = cameras(["x.png"], categories=(4, 9))
    content = json.loads(file.read_text())
    content["annotations"].append({"image_id": 1, "category_id": 9, "bbox": [30, 1, 20, 30]})
    file.write_text(json.dumps(content))
    found = read_inputs(tmp_path / "x.png", None, file)
    assert found.category_ids == [4, 9]
    assert found.with_boxes([found.boxes[0], [1, 1, 5, 5]]).category_ids == [4, 4]
    saved = save_masks(tmp_path / "out", found, np.ones((2, 40, 60), bool), np.ones(2), found.pixels)
    assert [entry["category_id"] for entry in json.loads(saved[-1].read_text())] == [4, 9]


def test_an_image_without_a_box_left_says_why(cameras, tmp_path):
    file = cameras(["x.png", "y.png"], bbox=None)
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 0, 5]},
        {"image_id": 1, "category_id": 1, "bbox": [70, 1, 5, 5]},
    ]
    file.write_text(json.dumps(content))
    reasons = "annotation without box or mask (1), box of no area (1), box outside the image (1)"
    reasons += ", crowd annotation (1)"
    with pytest.raises(
        DataError, match=f"no person's box that can be used in .*x.png, left out: {re.escape(reasons)}"
    ):
        read_inputs(tmp_path / "x.png", None, file)
    found = read_inputs(tmp_path / "x.png", [[1, 1, 9, 9]], file)
    assert found.boxes == [[1, 1, 9, 9]] and found.left_out == reasons


# -- out -------------------------------------------------------------------------------------------
def test_saved_files_hold_the_masks(photo, tmp_path):
    inputs = read_inputs(photo, [[1, 2, 30, 35], [20, 5, 50, 30]])._replace(image_id=12, category_ids=[1, 3])
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:20, 5:20], masks[1, 10:25, 30:45] = True, True
    files = save_masks(
        tmp_path / "a" / "b", inputs, masks, np.array([0.9, 0.25]), overlay(inputs.pixels, masks)
    )
    assert [file.name for file in files] == [
        "photo_person0.png",
        "photo_person1.png",
        "photo_overlay.png",
        "photo_coco.json",
    ]
    for mask, file in zip(masks, files[:2], strict=True):
        np.testing.assert_array_equal(np.array(Image.open(file)), mask * 255)
    entries = json.loads(files[-1].read_text())
    assert [(entry["image_id"], entry["category_id"], entry["score"]) for entry in entries] == [
        (12, 1, 0.9),
        (12, 3, 0.25),
    ]
    np.testing.assert_array_equal(coco_mask.decode(entries[1]["segmentation"]).astype(bool), masks[1])
    picture = np.array(Image.open(files[2]))
    np.testing.assert_array_equal(picture[~masks.any(0)], inputs.pixels[~masks.any(0)])
    assert (picture[masks[0]] != inputs.pixels[masks[0]]).any(1).mean() > 0.95
    with pytest.raises(ValueError, match="is a file"):
        save_masks(files[0], inputs, masks, np.zeros(2), inputs.pixels)
    mine = files[0].with_name("photo_persons of mine.png")
    mine.write_bytes(b"")
    inputs = inputs.with_boxes(inputs.boxes[:1])
    save_masks(tmp_path / "a" / "b", inputs, masks[:1], np.array([0.9]), inputs.pixels)
    assert (
        not files[1].exists() and files[0].exists() and mine.exists()
    )  # nobody takes the second for today's


def test_images_of_one_name_do_not_overwrite_each_other(cameras, tmp_path):
    cameras(["cam1/x.png", "cam2/x.png", "cam1/x.jpg"])
    mask, folders = np.ones((1, 40, 60), bool), []
    for name in ("cam1/x.png", "cam2/x.png", "cam1/x.jpg", "cam1/x.png"):
        inputs = read_inputs(tmp_path / name, [[1, 1, 9, 9]])
        files = save_masks(tmp_path / "out", inputs, mask, np.ones(1), inputs.pixels)
        folders.append(files[0].parent.name)
        assert json.loads((files[0].parent / "image.json").read_text()) == {"image": str(tmp_path / name)}
        assert len(list(files[0].parent.iterdir())) == 4
    assert folders == ["x", "x-2", "x-3", "x"]
    (tmp_path / "out" / "synthetic").mkdir()  # somebody's own
    drawn = read_inputs()._replace(boxes=[[1, 1, 9, 9]], category_ids=[1])
    assert save_masks(tmp_path / "out", drawn, mask, np.ones(1), drawn.pixels)[0].parent.name == "synthetic-2"


def test_annotations_that_training_counts_and_leaves_out_are_left_out_here_too(photo, tmp_path):
    people = [
        {"bbox": [1, 2, 20, 30], "image_id": 3},
        {"bbox": None, "image_id": 3},
        {"bbox": [1, 2, 20, 30]},
        {"bbox": [1, 2, float("nan"), 30], "image_id": 3},
    ]
    content = {
        "images": [{"id": 3, "file_name": photo.name, "height": 40, "width": 60}],
        "categories": [{"id": 1, "name": "person"}],
    }
    content["annotations"] = [{"category_id": 1, **one} for one in people] + [
        {"image_id": 3, "bbox": [0, 0, 9, 9]}
    ]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    found = read_inputs(photo, None, file)
    assert found.boxes == [[1.0, 2.0, 21.0, 32.0]] and found.image_id == 3
    counts = "annotation of a category that is not listed (1), annotation without box or mask (1)"
    counts += ", box of no area (1)"
    assert found.left_out == counts
    content["images"][0]["id"] = None
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="lists no image photo.png"):
        read_inputs(photo, None, file)


def test_a_picture_on_its_side_is_turned_as_its_annotations_are(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=orientation)
    content = {
        "images": [{"id": 3, "file_name": "photo.png", "height": 60, "width": 40}],
        "categories": [{"id": 1, "name": "person"}],
    }
    content["annotations"] = [{"category_id": 1, "image_id": 3, "bbox": [1, 41, 20, 18]}]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    found = read_inputs(tmp_path / "photo.png", None, tmp_path / "instances.json")
    np.testing.assert_array_equal(found.pixels, np.rot90(stored, -1))
    assert found.boxes == [[1.0, 41.0, 21.0, 59.0]]


# -- inputs of others ----------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_what_is_no_regular_file_is_told(photo, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with in_time(), pytest.raises(DataError, match="pipe is no regular file"):
        read_inputs(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with (
            in_time(),
            in_memory(20),
            pytest.raises(DataError, match="is no regular file: give an annotation file"),
        ):
            read_inputs(photo, None, file)
    for name in ("a\0b.jpg", "\ud800.jpg", "x" * 300 + ".jpg"):
        with pytest.raises(DataError, match="cannot be decoded") as error:
            read_inputs(name)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [' + "9" * 5000 + "]}", '{"images": 5}', ""])
def test_annotations_that_are_no_coco_file(photo, tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="a.json (is not valid JSON|lacks the list)"):
        read_inputs(photo, None, tmp_path / "a.json")


def test_wrong_types_beside_the_image_do_not_matter(photo, tmp_path):
    """Training counts such entries, and uses the others."""
    images = [
        None,
        {"file_name": 5},
        {"id": 1},
        {"id": 3, "file_name": photo.name, "height": 40, "width": 60},
    ]
    people = [
        7,
        {"category_id": [1]},
        {"category_id": 1, "image_id": {}, "bbox": 3},
        {"category_id": 1, "image_id": 3, "bbox": [1, 2, 20, 30]},
    ]
    categories = [
        "person",
        {"id": [], "name": "person"},
        {"name": ["person"], "id": 4},
        {"id": 1, "name": "person"},
    ]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": people, "categories": categories})
    )
    found = read_inputs(photo, None, tmp_path / "a.json")
    assert found.boxes == [[1.0, 2.0, 21.0, 32.0]] and found.category_ids == [1]


@pytest.mark.parametrize(
    "boxes",
    [[[10**400, 0, 5, 5]], "[" * 10_000, {1: 2, 3: 4, 5: 6, 7: 8}, "9" * 100_000, "\0", [[1, 2, 3, {}]]],
)
def test_boxes_of_any_kind_get_a_sentence(photo, boxes):
    with pytest.raises(DataError, match="give x0, y0, x1, y1") as error:
        read_inputs(photo, boxes)
    assert len(str(error.value)) < 1000
