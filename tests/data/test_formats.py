"""YOLO, LabelMe and masks: every person comes out pixel by pixel, and what cannot be used is counted."""

import json
import os

import numpy as np
import pytest
from limits import in_memory, in_time
from PIL import Image

from refinelib.config import resolve
from refinelib.data import DataError, make_source, open_split, open_store
from refinelib.data.annotations import NO_CATEGORY
from refinelib.data.coco import ELSEWHERE, NOWHERE
from refinelib.data.formats import DAMAGED, NO_PICTURE, LabelmePeople, MaskPeople, YoloPeople, split_of
from refinelib.data.formats import STRAY_MASK as NO_MASKED
from refinelib.data.sources import MISSING, NO_MASK, NOT_TURNED, OTHER_SIZE, TWICE, UNREADABLE
from refinelib.data.store_build import file_stamps

SIZE = (80, 100)
#: Two persons that do not touch, xyxy.
ONE, TWO = (20, 10, 52, 42), (60, 30, 90, 70)
OWN = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.0, progress=False, workers=1)
fifos = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")


def picture(file, *boxes, **save):
    """Persons of 220 on 40, as an image file."""
    pixels = np.full((*SIZE, 3), 40, np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 220
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **save)


def filled(box):
    mask = np.zeros(SIZE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def corners(box):
    x0, y0, x1, y1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def check(source, *images):
    """Images in order, each a list of boxes of persons, are what the source has, to the pixel."""
    found = source.instances()
    assert found.images == len(source) == len(images)
    assert found.boxes.tolist() == [list(box) for boxes in images for box in boxes]
    assert found.areas.tolist() == [(b[2] - b[0]) * (b[3] - b[1]) for boxes in images for b in boxes]
    for index, boxes in enumerate(images):
        scene = source.scene(index)
        mine = found.image_index == index
        for slot, box in zip(found.slots[mine], boxes, strict=True):
            assert np.array_equal(scene.masks[int(slot)], filled(box))
            assert (scene.image[filled(box)] == 220).all()
        assert np.array_equal(scene.masks.any(0), (scene.image == 220).all(-1))
    return found


# -- YOLO ----------------------------------------------------------------------------------------------
def line(*points, kind=0, size=SIZE):
    return " ".join(map(str, (kind, *(np.array(points) / size[::-1]).ravel())))


class Yolo:
    """Writes a data set in YOLO's layout."""

    def __init__(self, folder):
        self.folder = folder
        self.yaml("path: .\ntrain: images/train\nval: images/val\nnames: [person, dog]\n")
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)

    def yaml(self, text, name="data.yaml"):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def label(self, name, split="train"):
        return self.folder / "labels" / split / f"{name}.txt"

    def image(self, name, split="train"):
        return self.folder / "images" / split / f"{name}.png"

    def add(self, name, *boxes, split="train", text=None):
        picture(self.image(name, split), *boxes)
        lines = [line(*corners(box)) for box in boxes] if text is None else [text]
        self.label(name, split).write_text("\n".join(lines) + "\n")


@pytest.fixture
def yolo(tmp_path):
    return Yolo(tmp_path / "set")


def test_yolo_persons_are_read_to_the_pixel(yolo):
    yolo.add("a", ONE, TWO)
    yolo.add("b.c", TWO)
    yolo.add("d", text="\n" + line(*corners(ONE), kind=1))  # a dog
    yolo.add("e", ONE, split="val")
    picture(yolo.image("nobody"))
    found = check(YoloPeople(yolo.folder, "train"), [ONE, TWO], [TWO])
    assert not found.skipped and found.annotation_ids.tolist() == [1, 2, 3]
    check(YoloPeople(yolo.folder / "data.yaml", "val"), [ONE])
    dogs = YoloPeople(yolo.folder, "train", category="Dog").instances()
    assert dogs.boxes.tolist() == [[*ONE]]


YAML = {
    "mapping": "path: .\ntrain: images/train\nnames:\n  0: person\n  1: dog\n",
    "no path": "train: images/train\nnames: [person]\n",
    "path that is not here": "path: ../datasets/people\ntrain: images/train\nnames: [person]\n",
    "path from the file": "path: ../set\ntrain: images/train\nnames: [person]\n",
    "backslashes": "train: images\\train\nnames: [person]\n",
    "list of folders": "train: [images/train, images/val]\nnames: [person]\n",
    "as Roboflow": "train: ../images/train\nnames: [person]\n",
    "all images": "train: images\nnames: [person]\n",
}


@pytest.mark.parametrize("kind", YAML)
def test_yolo_files_of_data(yolo, kind):
    yolo.add("a", ONE), yolo.add("b", TWO)
    yolo.yaml(YAML[kind])
    check(YoloPeople(yolo.folder, "train"), [ONE], [TWO])


def test_yolo_layouts(tmp_path):
    split = Yolo(tmp_path / "set").folder
    split.joinpath("data.yaml").write_text("train: ../train/images\nval: valid/images\nnames: [person]\n")
    for place in ("train", "valid"):
        picture(split / place / "images" / "deep" / "a.jpg", ONE, quality=100, subsampling=0)
        text = split / place / "labels" / "deep" / "a.txt"
        text.parent.mkdir(parents=True)
        text.write_text(line(*corners(ONE)))
    for name in ("train", "val"):
        assert YoloPeople(split, name).instances().boxes.tolist() == [[*ONE]]
    beside = tmp_path / "beside"  # no folder is named images
    picture(beside / "photos" / "a.png", ONE)
    (beside / "photos" / "a.txt").write_text(line(*corners(ONE)))
    (beside / "people.yaml").write_text("train: photos\nnames: [person]\n")
    check(YoloPeople(beside / "people.yaml", "train"), [ONE])


def test_yolo_boxes_and_bad_lines_are_counted(yolo):
    good = line(*corners(ONE))
    lines = [
        good,
        "0 0.75 0.625 0.3 0.5",  # a box
        "0 0.1 0.1 0.2 0.2 0.3",
        "0 0.1 0.1",
        "0",
        "0 0.1 0.1 nan 0.2 0.3 0.3",
        f"0 {'9' * 5000} 0.1 0.2 0.2 0.3 0.3",
        "0 10 10 40 10 40 40 10 40",  # pixels
        "person 0.1 0.1 0.2 0.2 0.3 0.3",
        "7 0.1 0.1 0.2 0.2 0.3 0.3",
        "0.5 0.1 0.1 0.2 0.2 0.3 0.3",
        "nan 0.1 0.1 0.2 0.2 0.3 0.3",
        "1 0.75 0.625 0.3 0.5",  # the box of a dog
    ]
    yolo.add("a", ONE, text="\r\n".join(lines))
    source = YoloPeople(yolo.folder, "train")
    found = source.instances()
    assert found.skipped == {NO_MASK: 7, NO_CATEGORY: 4} and found.boxes.tolist() == [[*ONE]]
    assert "line 2 of a.txt, a box, is no mask; give polygons" in found.examples[NO_MASK]
    assert "'line 9 of a.txt, person 0.1 0.1" in found.examples[NO_CATEGORY]
    scene = source.scene(0)  # nobody knows where line 3's is
    assert scene.ignored.all() and {kind for kind, _ in scene.notes} == {NOWHERE}
    yolo.add("a", ONE, text="\n".join(lines[:2]))
    boxed = YoloPeople(yolo.folder, "train")
    assert np.array_equal(boxed.scene(0).ignored, filled(TWO)) and not boxed.scene(0).notes


def test_yolo_files_that_cannot_be_used_are_counted(yolo):
    for name in "abcdef":
        yolo.add(name, ONE)
    yolo.image("a").write_bytes(yolo.image("a").read_bytes()[:20])
    yolo.label("b").unlink(), yolo.label("b").mkdir()
    yolo.image("c").unlink()
    yolo.label("d").write_bytes(b"\xff\xfe\x00 0 0 0 0\n" + line(*corners(ONE)).encode())
    yolo.label("e").write_bytes(b"0 " * (5 << 20))
    yolo.label("._f").write_bytes(b"\0\5\x16\7Mac OS X"), yolo.image("._f").write_bytes(b"\0\5\x16\7")
    found = check(YoloPeople(yolo.folder, "train"), [ONE], [ONE])
    assert found.skipped == {UNREADABLE: 1, DAMAGED: 2, NO_PICTURE: 1, NO_CATEGORY: 1}
    assert "c.txt" in found.examples[NO_PICTURE] and "b.txt must be a text file" in found.examples[DAMAGED]


@fifos
def test_fifos_are_not_waited_for(yolo):
    for name in "abc":
        yolo.add(name, ONE)
    for file in (yolo.label("a"), yolo.image("b")):
        file.unlink(), os.mkfifo(file)
    with in_time():
        assert check(YoloPeople(yolo.folder, "train"), [ONE]).skipped == {DAMAGED: 1, UNREADABLE: 1}
    (yolo.folder / "data.yaml").unlink(), os.mkfifo(yolo.folder / "data.yaml")
    with in_time(), pytest.raises(DataError, match="there is no file .*data.yaml; give its folder"):
        YoloPeople(yolo.folder)


def test_yolo_fractions_count_on_the_upright_image(yolo):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right shows it upright
    stored = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
    stored[::-1].transpose(1, 0, 2)[filled(ONE)] = 220
    Image.fromarray(stored).save(yolo.image("a").with_suffix(".jpg"), exif=exif, quality=100)
    yolo.label("a").write_text(line(*corners(ONE)))
    source = YoloPeople(yolo.folder, "train")
    assert source.instances().boxes.tolist() == [[*ONE]]
    scene = source.scene(0)
    assert scene.image.shape == (*SIZE, 3) and np.array_equal(scene.masks[0], scene.image[..., 0] > 130)


WRONG_YAML = {
    "must have names": "train: images/train\n",
    "must have names, a list or a mapping from numbers; train": "names: [person]\n",
    "must have names, a list or a mapping": "- 1\n",
    "is not valid YAML": "names: [person\n",
    "is not valid YAML: it has": "names: [person]\n" * 10_000,
    "there is no image folder .*: correct nowhere or path in .*data.yaml": "train: nowhere\nnames: [a]\n",
    "there is no label folder .*labels.other": "train: images/other\nnames: [person]\n",
    "no image folder .*list.txt": "train: list.txt\nnames: [person]\n",
    "no category .person.; its categories are cat, dog": "train: images/train\nnames: [cat, dog]\n",
    "not valid YAML.*": f"nc: {'9' * 5000}\nnames: [person]\n",
}


@pytest.mark.parametrize("message", WRONG_YAML)
def test_yolo_data_that_cannot_be_read_is_told(yolo, message):
    yolo.add("a", ONE), (yolo.folder / "images" / "other").mkdir()
    yolo.yaml(WRONG_YAML[message])
    with pytest.raises(DataError, match=message):
        YoloPeople(yolo.folder, "train").instances()


def test_nothing_to_read_is_told(yolo, tmp_path):
    with pytest.raises(DataError, match="the split train of .* no person that can be used: no image has"):
        YoloPeople(yolo.folder, "train").instances()
    yolo.add("a", ONE), yolo.image("a").write_bytes(b"")
    with pytest.raises(DataError, match="no person that can be used: unreadable image .1."):
        YoloPeople(yolo.folder, "train").instances()
    with pytest.raises(DataError, match="there is no folder .*none: give data_dir, or val_annotations"):
        LabelmePeople(tmp_path / "none", tmp_path, "val")


# -- LabelMe -------------------------------------------------------------------------------------------
def shape(points, label="person", kind="polygon", group=None):
    return {
        "label": label,
        "points": [list(p) for p in points],
        "group_id": group,
        "shape_type": kind,
        "flags": {},
    }


def note(file, *shapes, path=None, **more):
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": path or f"{file.stem}.png",
    }
    content |= {"imageData": None, "imageHeight": SIZE[0], "imageWidth": SIZE[1], **more}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def labelme(folder, images=None, **options):
    return LabelmePeople(folder, images or folder, "train", **options)


def test_labelme_persons_are_read_to_the_pixel(tmp_path):
    for name, *boxes in (("a", ONE, TWO), ("b", TWO)):
        picture(tmp_path / f"{name}.png", *boxes)
        note(tmp_path / f"{name}.json", *(shape(corners(box)) for box in boxes))
    picture(tmp_path / "c.png", ONE)
    note(tmp_path / "c.json", shape(corners(ONE)), imageHeight=None)
    picture(tmp_path / "d.png", ONE)
    note(
        tmp_path / "d.json",
        shape(corners(TWO), "dog"),
        shape(corners(ONE), kind=None),
        path="C:\\photos\\d.png",
    )
    assert not check(labelme(tmp_path), [ONE, TWO], [TWO], [ONE], [ONE]).skipped
    assert labelme(tmp_path, category="dog").instances().boxes.tolist() == [[*TWO]]


def test_labelme_groups_are_one_person(tmp_path):
    picture(tmp_path / "a.png", ONE, TWO)
    parts = [shape(corners(ONE), group=1), shape(corners(TWO), group=1), shape(corners(ONE), "dog", group=1)]
    note(tmp_path / "a.json", *parts)
    source = labelme(tmp_path)
    found, scene = source.instances(), source.scene(0)
    assert found.boxes.tolist() == [[20, 10, 90, 70]] and found.areas.tolist() == [32 * 32 + 30 * 40]
    assert np.array_equal(scene.masks[0], filled(ONE) | filled(TWO)) and len(scene.masks) == 1


def test_labelme_shapes_that_are_no_polygons(tmp_path):
    picture(tmp_path / "a.png")
    others = [
        shape([ONE[2:], ONE[:2]], kind="rectangle"),
        shape([(50, 40), (60, 50)], kind="linestrip"),
        shape([(50, 40)], kind="point"),
        shape([(50, 40), (60, 50)]),
        shape([(50, 40), (60, 50), (70, 1e300)]),
        {"label": "person", "points": "none"},
        {"label": "person", "points": [[1, 2], [3], [4, 5]]},
        {"label": "person"},
    ]
    others += [shape([(50, 40)], "nose", "point"), shape(corners(ONE), 7), "no shape"]
    note(tmp_path / "a.json", shape(corners(TWO)), *others)
    source = labelme(tmp_path)
    found = source.instances()
    assert found.skipped == {NO_MASK: 8, NO_CATEGORY: 2} and len(found) == 1
    assert "shape 2 of a.json, a rectangle, is no mask" in found.examples[NO_MASK]
    assert "shape 11 of a.json, without label" in found.examples[NO_CATEGORY]
    scene = source.scene(0)
    assert np.array_equal(scene.masks[0], filled(TWO)) and scene.ignored[filled(ONE)].all()


@pytest.mark.parametrize("path", ["../photos/a.png", "..\\photos\\a.png", "photos/../../photos/./a.png"])
def test_labelme_images_above_their_files(tmp_path, path):
    picture(tmp_path / "photos" / "a.png", ONE)
    note(tmp_path / "notes" / "a.json", shape(corners(ONE)), path=path)
    check(labelme(tmp_path / "notes", tmp_path), [ONE])
    check(labelme(tmp_path / "notes", tmp_path / "photos"), [ONE])
    picture(tmp_path / "notes" / "b.png", ONE)
    note(tmp_path / "notes" / "b.json", shape(corners(ONE)))
    with pytest.raises(DataError, match=rf"{ELSEWHERE} \(1\)"):
        (tmp_path / "notes" / "b.json").unlink()
        labelme(tmp_path / "notes").instances()
    check(labelme(tmp_path / "notes", allow_outside=True), [ONE])


def test_labelme_images_that_are_not_there_or_of_another_size(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png", ONE)
        note(
            tmp_path / f"{name}.json", shape(corners(ONE)), imageData="iVBORw0KGgo=" if name == "a" else None
        )
    (tmp_path / "a.png").unlink(), (tmp_path / "b.png").unlink()
    note(tmp_path / "c.json", shape(corners(ONE)), imageHeight=SIZE[0] + 1)
    store = open_store(labelme(tmp_path), root=tmp_path / "stores", **OWN)
    assert len(store) == 1 and store.skipped == {MISSING: 2, OTHER_SIZE: 1}
    assert "a.png: save the one inside" in store.examples[MISSING]


BAD_JSON = {
    "cut short": b'{"shapes": [',
    "not UTF-8": b'{"shapes": [], "imagePath": "\xff"}',
    "NaN": b'{"shapes": [{"label": "person", "points": [[NaN, 1]]}], "imagePath": "a.png"}',
    "5,000 digits": b'{"shapes": [], "imagePath": "a.png", "imageHeight": ' + b"9" * 5000 + b"}",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "nothing": b"",
    "no shapes": b'{"imagePath": "a.png"}',
    "a number for shapes": b'{"imagePath": "a.png", "shapes": 3}',
    "a list for a path": b'{"imagePath": ["a.png"], "shapes": []}',
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_damaged_labelme_files_are_counted(tmp_path, kind):
    picture(tmp_path / "a.png", ONE)
    note(tmp_path / "a.json", shape(corners(ONE)))
    (tmp_path / "b.json").write_bytes(BAD_JSON[kind])
    found = check(labelme(tmp_path), [ONE])
    assert found.skipped == {DAMAGED: 1} and "b.json" in found.examples[DAMAGED]


@fifos
def test_labelme_files_that_are_no_files(tmp_path):
    picture(tmp_path / "a.png", ONE)
    note(tmp_path / "a.json", shape(corners(ONE)))
    note(tmp_path / "._a.json"), note(tmp_path / ".ipynb_checkpoints" / "a.json", shape(corners(TWO)))
    (tmp_path / "b.json").mkdir(), os.mkfifo(tmp_path / "c.json")
    (tmp_path / "d.json").write_bytes(b" " * (33 << 20))
    with in_time(), in_memory(200):
        assert check(labelme(tmp_path), [ONE]).skipped == {DAMAGED: 3}


# -- masks ---------------------------------------------------------------------------------------------
def owner(*boxes, ids=(1, 2), dtype=np.uint8):
    numbers = np.zeros(SIZE, dtype)
    for number, (x0, y0, x1, y1) in zip(ids, boxes, strict=False):
        numbers[y0:y1, x0:x1] = number
    return numbers


def palette(numbers):
    image = Image.fromarray(numbers, "L").convert("P")
    image.putdata(numbers.ravel().tolist())
    image.putpalette([*range(256)] * 3)
    return image


MASKS = {
    "8 bits": lambda: Image.fromarray(owner(ONE, TWO, ids=(7, 250))),
    "16 bits": lambda: Image.fromarray(owner(ONE, TWO, ids=(300, 65_535), dtype=np.uint16)),
    "palette": lambda: palette(owner(ONE, TWO)),
    "1 bit": lambda: Image.fromarray(owner(ONE, ids=(255,))).convert("1"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_depth(tmp_path, kind):
    boxes = [ONE] if kind == "1 bit" else [ONE, TWO]
    for folder, masks in (("images", "masks"), ("both", "both")):  # in two folders, or in one
        picture(tmp_path / folder / "cam" / "a.b.jpg", *boxes, quality=100)
        mask = tmp_path / masks / "cam" / "a.b.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        MASKS[kind]().save(mask)
        source = MaskPeople(tmp_path / folder, tmp_path / masks)
        found, scene = source.instances(), source.scene(0)
        assert found.boxes.tolist() == [[*box] for box in boxes] and not found.skipped
        assert all(np.array_equal(scene.masks[i], filled(box)) for i, box in enumerate(boxes))
        assert np.array_equal(scene.masks.any(0), scene.image[..., 0] > 130)
        assert len({*found.annotation_ids}) == len(boxes)


def test_void_pixels_of_a_palette_are_ignored(tmp_path):
    picture(tmp_path / "a.jpg", ONE)
    palette(owner(ONE, TWO, ids=(1, 255))).save(tmp_path / "a.png")
    scene = MaskPeople(tmp_path, tmp_path).scene(0)
    assert len(scene.masks) == 1 and np.array_equal(scene.ignored, filled(TWO))


def test_masks_and_images_without_the_other_are_counted(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png", ONE)
        picture(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(owner(ONE)).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "images" / "a.png").unlink(), (tmp_path / "masks" / "b.png").unlink()
    for leftover in ("._c.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        for folder in ("images", "masks"):
            (tmp_path / folder / leftover).write_bytes(b"\0\5\x16\7")
    found = check(MaskPeople(tmp_path / "images", tmp_path / "masks"), [ONE])
    assert found.skipped == {MISSING: 1, NO_MASKED: 1} and "a.png" in found.examples[NO_MASKED]
    with pytest.raises(DataError, match="there is no folder .*none: data_dir must hold images and masks"):
        MaskPeople(tmp_path / "none", tmp_path)


# -- from settings -------------------------------------------------------------------------------------
def write(kind, images, labels, name, box=ONE):
    """An image and its labels in two folders."""
    picture(images / f"{name}.png", box)
    labels.mkdir(parents=True, exist_ok=True)
    if kind == "yolo":
        (labels / f"{name}.txt").write_text(line(*corners(box)))
    elif kind == "labelme":
        note(
            labels / f"{name}.json", shape(corners(box)), path=os.path.relpath(images / f"{name}.png", labels)
        )
    else:
        Image.fromarray(owner(box)).save(labels / f"{name}.png")


def layout(kind, folder, split):
    """Folders of a split's images and labels."""
    if kind == "labelme":
        return folder / "photos", folder / split
    return (folder / "images" / split, folder / ("labels" if kind == "yolo" else "masks") / split)


KINDS = ("yolo", "labelme", "masks")


@pytest.mark.parametrize("kind", KINDS)
def test_settings_lead_to_the_splits_own_folders(tmp_path, kind):
    folder = tmp_path / "set"
    for split, box in (("train", ONE), ("val", TWO)):
        for name in range(2):
            write(kind, *layout(kind, folder, split), f"{split}{name}", box)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [person]\n")
    where = dict(
        data=kind, data_dir=str(folder), output_dir=str(tmp_path), workers=1, roi_size=32, mask_size=32
    )
    for split, box in (("train", ONE), ("val", TWO)):
        source = make_source(resolve("demo", **where), split)
        assert check(source, [box], [box]).skipped == {} and source.name == kind
        store = open_split(resolve("demo", **where), split, progress=False)
        assert len(store) == 2 and store.source == kind and store.boxes.tolist() == [[*box]] * 2


@pytest.mark.parametrize("kind", ["labelme", "masks"])
def test_settings_without_splits_of_their_own(tmp_path, kind):
    names = [f"p{number}" for number in range(12)]
    places = tmp_path / "images", tmp_path / ("notes" if kind == "labelme" else "masks")
    for name in names:
        write(kind, *places, name)
    settings = resolve("demo", data=kind, data_dir=str(tmp_path))
    for split in ("train", "val"):
        mine = [name for name in names if split_of(tmp_path / name) == split]
        check(make_source(settings, split), *[[ONE]] * len(mine))
    assert 0 < len(mine) < 12
    own = dict(train_images=str(places[0]), train_annotations=str(places[1]))
    check(make_source(resolve("demo", data=kind, **own), "train"), *[[ONE]] * 12)
    with pytest.raises(
        DataError, match=f"data = {kind} needs .*: give data_dir, or val_annotations and val_"
    ):
        make_source(resolve("demo", data=kind, **own), "val")


def test_other_splits_of_masks(tmp_path):
    for split, box in (("train", ONE), ("val", TWO)):
        write("masks", tmp_path / split / "images", tmp_path / split / "masks", "a", box)
        check(make_source(resolve("demo", data="masks", data_dir=str(tmp_path)), split), [box])


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_seen(tmp_path, kind):
    images, labels = layout(kind, tmp_path, "train")
    write(kind, images, labels, "a"), write(kind, images, labels, "b")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [person]\n")

    def fingerprint():
        source = make_source(resolve("demo", data=kind, data_dir=str(tmp_path)), "train")
        source.instances()
        return json.dumps([source.fingerprint(), file_stamps(source, source.names()).tolist()])

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    for file in sorted([*images.iterdir(), *labels.iterdir()]):
        os.utime(file, (1, 1))
        seen.append(fingerprint())
        file.write_bytes(file.read_bytes() + b" ")
        os.utime(file, (1, 1))
        seen.append(fingerprint())
    write(kind, images, labels, "c")
    seen.append(fingerprint())
    (images / "c.png").unlink()
    seen.append(fingerprint())
    assert len({*seen}) == len(seen)


# -- whose file is it --------------------------------------------------------------------------------
def test_labels_and_masks_of_two_images_are_neither_s(tmp_path, yolo):
    yolo.add("a", ONE), yolo.add("b", TWO)
    picture(yolo.image("a").with_suffix(".jpg"), TWO)
    found = check(YoloPeople(yolo.folder, "train"), [TWO])
    assert found.skipped == {TWICE: 1} and "a.jpg and a.png" in found.examples[TWICE]
    for name in ("a.png", "a.jpg", "b.png"):
        picture(tmp_path / "m" / "images" / name, ONE)
    for name in "ab":
        write("masks", tmp_path / "m" / "images", tmp_path / "m" / "masks", name, ONE)
    found = check(MaskPeople(tmp_path / "m" / "images", tmp_path / "m" / "masks"), [ONE])
    assert found.skipped == {TWICE: 2} and "a.jpg and a.png" in found.examples[TWICE]


def test_labelme_does_not_take_another_camera_s_image(tmp_path):
    for camera, box in (("cam1", ONE), ("cam2", TWO)):
        picture(tmp_path / "images" / camera / "a.png", box)
        note(tmp_path / "notes" / camera / "a.json", shape(corners(box)), path="a.png")
    source = labelme(tmp_path / "notes", tmp_path / "images")
    check(source, [ONE], [TWO])  # the folder of the JSON file decides
    (tmp_path / "images" / "cam1" / "a.png").unlink()
    for path in ("a.png", "..\\..\\images\\cam1\\a.png"):
        note(tmp_path / "notes" / "cam1" / "a.json", shape(corners(ONE)), path=path)
        assert check(labelme(tmp_path / "notes", tmp_path / "images"), [TWO]).skipped == {MISSING: 1}


def test_yolo_poses_are_refused(yolo):
    yolo.add("a", ONE)
    (yolo.folder / "data.yaml").write_text("train: images/train\nnames: [person]\nkpt_shape: [17, 3]\n")
    with pytest.raises(DataError, match="has kpt_shape: its labels are poses"):
        YoloPeople(yolo.folder, "train")
    (yolo.folder / "data.yaml").write_text("train: images/train\nnames: {'0': person}\n")
    check(YoloPeople(yolo.folder, "train"), [ONE])


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_among_the_data_changes_nothing(tmp_path, kind):
    images, labels = layout(kind, tmp_path, "train")
    write(kind, images, labels, "a")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [person]\n")
    settings = resolve("demo", data=kind, data_dir=str(tmp_path))
    places = {
        open_store(make_source(settings, "train"), root=tmp_path / place, **OWN).folder
        for place in ("stores", "stores")
    }
    assert len(places) == 1
    (labels / "README.md").write_text("a note")
    store = open_store(make_source(settings, "train"), root=tmp_path / "stores", **OWN)
    assert {store.folder} == places and not store.skipped


def test_masks_of_turned_images(tmp_path):
    picture(tmp_path / "a.jpg", ONE)
    upright = Image.open(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.jpg", exif=exif, quality=100)
    Image.fromarray(owner(ONE)).save(tmp_path / "a.png")
    scene = MaskPeople(tmp_path, tmp_path).scene(0)
    assert [kind for kind, _ in scene.notes] == [NOT_TURNED]
    scene = MaskPeople(tmp_path, tmp_path, exif="apply").scene(0)
    assert not scene.notes and np.array_equal(scene.masks[0], scene.image[..., 0] > 130)


def test_a_mask_that_loses_its_people_meanwhile(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.jpg", ONE, TWO)
        Image.fromarray(owner(ONE, TWO)).save(tmp_path / f"{name}.png")

    class Changing(MaskPeople):
        def instances(self, max_images=None):
            found = super().instances(max_images)
            Image.fromarray(owner(ONE)).save(tmp_path / "a.png")
            return found

    store = open_store(Changing(tmp_path, tmp_path), root=tmp_path / "stores", **OWN)
    assert len(store) == 2 and "its files were changed in between" in store.examples[UNREADABLE]
    assert len(open_store(MaskPeople(tmp_path, tmp_path), root=tmp_path / "stores", **OWN)) == 3


@pytest.mark.parametrize("kind", ["yolo", "labelme"])
def test_an_image_that_comes_later_is_taken_up(tmp_path, kind):
    images, labels = layout(kind, tmp_path, "train")
    for name in "abc":
        write(kind, images, labels, name)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [person]\n")
    kept = (images / "b.png").read_bytes(), (images / "c.png").read_bytes()
    (images / "b.png").unlink(), (images / "c.png").write_bytes(kept[1][:20])

    def rois():
        settings = resolve("demo", data=kind, data_dir=str(tmp_path))
        return len(open_store(make_source(settings, "train"), root=tmp_path / "stores", **OWN))

    one = rois()
    (images / "b.png").write_bytes(kept[0])
    assert rois() == 2 * one
    (images / "c.png").write_bytes(kept[1])
    assert rois() == 3 * one
