"""Data in memory: every form gives the same persons, bad items are counted, and a run on them is a run."""

import functools
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import refinelib
from refinelib import checkpoints, ranks
from refinelib.config import Settings, SettingsError, project_root, resolve
from refinelib.data import ArrayPeople, DataError, open_split, open_splits, open_store, sources
from refinelib.data.arrays import BAD_BOXES, BAD_MASK, NO_IMAGE, sources_of
from refinelib.data.formats import split_of

#: xyxy of the persons of every image.
ONE, TWO = (10, 5, 30, 45), (40, 10, 60, 50)
SIZE = (60, 80)
BOXES = np.array([[10, 5, 30, 45], [40, 10, 60, 50]], np.float32)
STORE = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.0, progress=False)


def made(count=12, seed=0):
    """Images of noise, and their masks of ids."""
    images = np.random.default_rng(seed).integers(0, 100, (count, *SIZE, 3), np.uint8)
    masks = np.zeros((count, *SIZE), np.uint8)
    for number, (x0, y0, x1, y1) in ((1, ONE), (7, TWO)):
        masks[:, y0:y1, x0:x1] = number
    images[masks > 0] += 150
    return images, masks


IMAGES, MASKS = made()
STACKS = np.stack([MASKS == 1, MASKS == 7], axis=1)
EMPTY = np.zeros(SIZE, np.uint8)


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


def chw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


PAIRS = [*zip(IMAGES, MASKS, strict=True)]
FORMS = {
    "arrays": (IMAGES, MASKS),
    "tensors": (chw(IMAGES), torch.from_numpy(MASKS).long()),
    "lists": ([*IMAGES], [*MASKS]),
    "no boxes": (IMAGES, MASKS, None),
    "items": PAIRS,
    "lists of items": [[*pair] for pair in PAIRS],
    "torch data set": Items(PAIRS),
    "TensorDataset": TensorDataset(chw(IMAGES), torch.from_numpy(MASKS)),
    "PIL": [(Image.fromarray(image), Image.fromarray(mask)) for image, mask in PAIRS],
    "floats": (IMAGES, MASKS.astype(np.float32)),
    "boxes in part": Items([(image, mask, None) for image, mask in PAIRS]),
}
STACKED = {
    "bool": (IMAGES, STACKS),
    "0 and 1": (IMAGES, STACKS.astype(np.int64)),
    "lists of masks": [(image, [*masks]) for image, masks in zip(IMAGES, STACKS, strict=True)],
    "tensors": [(image, torch.from_numpy(masks)) for image, masks in zip(IMAGES, STACKS, strict=True)],
    "with an empty one": (IMAGES, np.insert(STACKS, 1, False, axis=1)),
}


@pytest.mark.parametrize("data", [*FORMS.values(), *STACKED.values()], ids=[*FORMS, *STACKED])
def test_every_form_gives_the_same_persons(data):
    people = ArrayPeople(data)
    found = people.instances()
    assert found.boxes.tolist() == [[*ONE], [*TWO]] * 12 and not found.skipped
    assert found.areas.tolist() == [800, 800] * 12 and found.image_ids.tolist() == sorted([*range(12)] * 2)
    for index in range(len(people)):
        scene = people.scene(index)
        assert np.array_equal(scene.image, IMAGES[index]) and scene.ignored is None
        assert [np.array_equal(scene.masks[i], STACKS[index, i]) for i in (0, 1)] == [True, True]


def test_forms_of_one_content_have_one_fingerprint_and_another_content_another():
    assert len({ArrayPeople(data).fingerprint() for data in FORMS.values()}) == 1
    first = ArrayPeople((IMAGES, MASKS)).fingerprint()
    for at in (IMAGES, MASKS):
        changed = at.copy()
        changed[3, 20, 20] = changed[3, 20, 20] // 2
        data = (changed, MASKS) if at is IMAGES else (IMAGES, changed)
        assert ArrayPeople(data).fingerprint() != first
    assert ArrayPeople((IMAGES[::-1], MASKS)).fingerprint() != first
    assert ArrayPeople((IMAGES, MASKS, [BOXES] * 12)).fingerprint() != first


def test_boxes_are_taken_in_the_order_of_ids_or_masks():
    wide = BOXES + [-2, 0, 2, 0]
    for masks in (MASKS, STACKS, np.insert(STACKS, 0, False, axis=1)):
        rows = wide if masks.shape[1:2] != (3,) else np.insert(wide, 0, 20, axis=0)
        for boxes in (np.stack([rows] * 12), [torch.from_numpy(rows)] * 12, [rows.tolist()] * 12):
            found = ArrayPeople((IMAGES, masks, boxes)).instances()
            assert found.boxes[:2].tolist() == [[8, 5, 32, 45], [38, 10, 62, 50]]


def test_a_truth_value_a_pixel_is_one_person():
    found = ArrayPeople((IMAGES, MASKS > 0)).instances()
    assert found.boxes.tolist() == [[10, 5, 60, 50]] * 12 and found.areas.tolist() == [1600] * 12


def test_grey_images_and_single_channels_become_rgb():
    grey = IMAGES[..., 0]
    for images in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[:, None]):
        pixels = ArrayPeople((images, MASKS)).scene(2).image
        assert np.array_equal(pixels, np.repeat(grey[2][..., None], 3, -1))


def test_255_is_ignored_in_ids(tmp_path):
    masks = MASKS.copy()
    masks[:, 12:20, 20:28] = 255
    people = ArrayPeople((IMAGES, masks))
    assert np.array_equal(people.scene(0).ignored, masks[0] == 255)
    assert people.instances().areas[0] == 800 - 64
    store = open_store(people, root=tmp_path, **STORE)
    assert store.ignores and store.info.ignored > 0.01


BAD = {
    "float image": ((IMAGES[0] / 255, MASKS[0]), NO_IMAGE, "float64"),
    "no pixel": ((np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)), NO_IMAGE, "[0, 0, 3]"),
    "four channels": ((np.zeros((*SIZE, 4), np.uint8), MASKS[0]), NO_IMAGE, "[60, 80, 4]"),
    "no image": ((None, MASKS[0]), NO_IMAGE, "object"),
    "a float PIL image": ((Image.new("F", SIZE[::-1]), MASKS[0]), NO_IMAGE, "floats"),
    "ragged": (([[1, 2], [3]], MASKS[0]), NO_IMAGE, "inhomogeneous"),
    "broken PIL image": ("truncated", NO_IMAGE, "truncated"),
    "size": ((IMAGES[0], MASKS[0, :-1]), sources.OTHER_SIZE, "80x60 pixels, its mask 80x59"),
    "NaN": ((IMAGES[0], np.where(MASKS[0] == 7, np.nan, 0)), BAD_MASK, "the value nan"),
    "infinite": ((IMAGES[0], np.where(MASKS[0] == 7, np.inf, 0)), BAD_MASK, "the value inf"),
    "negative": ((IMAGES[0], MASKS[0].astype(int) - 1), BAD_MASK, "the value -1"),
    "large id": ((IMAGES[0], MASKS[0].astype(int) * 99_999), BAD_MASK, "the value 99999"),
    "soft stack": ((IMAGES[0], STACKS[0] * 0.5), BAD_MASK, "the value 0.5"),
    "NaN stack": ((IMAGES[0], np.where(STACKS[0], np.nan, 0)), BAD_MASK, "the value nan"),
    "complex": ((IMAGES[0], MASKS[0] * 1j), BAD_MASK, "complex128"),
    "text": ((IMAGES[0], "mask.png"), BAD_MASK, "<U8"),
    "row": ((IMAGES[0], MASKS[0, 0]), BAD_MASK, "[80]"),
    "masks of two sizes": ((IMAGES[0], [EMPTY, EMPTY[1:]]), BAD_MASK, "inhomogeneous"),
    "nobody": ((IMAGES[0], EMPTY), sources.NO_MASK, "no person in its mask"),
    "all ignored": ((IMAGES[0], EMPTY + 255), sources.NO_MASK, "no person in its mask"),
    "empty stack": ((IMAGES[0], np.zeros((0, *SIZE), bool)), sources.NO_MASK, "no person in its mask"),
    "no boxes for persons": ((IMAGES[0], MASKS[0], []), BAD_BOXES, "0 boxes, 2 persons"),
    "a box too many": ((IMAGES[0], MASKS[0], np.ones((3, 4))), BAD_BOXES, "3 boxes, 2 persons"),
    "corners": ((IMAGES[0], MASKS[0], np.ones((2, 2))), BAD_BOXES, "[2, 2]"),
    "words": ((IMAGES[0], MASKS[0], "boxes"), BAD_BOXES, "a str"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_item_is_left_out_and_counted_with_an_example(name):
    item, reason, said = BAD[name]
    if item == "truncated":
        file = io.BytesIO()
        Image.fromarray(IMAGES[0]).save(file, "png")
        item = Image.open(io.BytesIO(file.getvalue()[:3000])), MASKS[0]
    people = ArrayPeople([(IMAGES[0], MASKS[0]), item, (IMAGES[1], MASKS[1])], "val")
    found = people.instances()
    assert found.skipped == {reason: 1} and len(found) == 4
    assert found.examples[reason].startswith("item 1 of the val data") and said in found.examples[reason]
    assert found.image_ids.tolist() == [0, 0, 2, 2] and np.array_equal(people.scene(1).image, IMAGES[1])
    with pytest.raises(DataError, match=reason):
        ArrayPeople([item]).instances()


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([np.nan, 5, 30, 45], sources.NO_AREA),
        ([10, 5, np.inf, 45], sources.NO_AREA),
        ([10, 5, 10, 45], sources.NO_AREA),
        ([10, 5, -10, 45], sources.NO_AREA),
        ([90, 5, 110, 45], sources.OUTSIDE),
        ([10, 5, 25, 45], sources.SMALL),
    ],
)
def test_a_bad_box_leaves_out_its_person(box, reason):
    found = ArrayPeople([(IMAGES[0], MASKS[0], [box, BOXES[1].tolist()])]).instances()
    assert found.boxes.tolist() == [[*TWO]] and found.skipped == {reason: 1} and found.slots.tolist() == [1]


def test_a_file_that_cannot_be_read_is_counted_and_another_error_is_the_callers():
    class Files(Items):
        def __getitem__(self, number):
            if number == 1:
                raise self.items
            return PAIRS[number]

        def __len__(self):
            return 3

    people = ArrayPeople(Files(FileNotFoundError("there is no 1.png")))
    assert people.instances().skipped == {sources.UNREADABLE: 1}
    with pytest.raises(DataError, match="item 1 of the train data cannot be read .KeyError: 'mask'.: give"):
        ArrayPeople(Files(KeyError("mask"))).instances()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(PAIRS)


WRONG = {
    "a generator": ((pair for pair in PAIRS), "a generator, without a length"),
    "a stream": (Stream(), "a Stream, without a length"),
    "an image alone": (IMAGES, "item 0 of the train data is a ndarray .60, 80, 3.: give .image, mask."),
    "lengths": ((IMAGES, MASKS[:-1]), "images, masks and boxes have .12, 11. entries"),
    "boxes": ((IMAGES, MASKS, [BOXES]), "have .12, 12, 1. entries"),
    "four parts": ((IMAGES, MASKS, None, None), "give one of each"),
    "one mask": ((IMAGES[0], MASKS[0]), "the masks are one mask"),
    "a dictionary": ({"images": IMAGES, "masks": MASKS}, "the data are a dict, without"),
    "dictionaries": ([{"image": IMAGES[0]}] * 12, "is a dict: give .image, mask."),
    "quadruples": ([(1, 2, 3, 4)] * 12, "is a tuple: give .image, mask."),
    "two data sets in a list": ([Items(PAIRS), Items(PAIRS)] * 5, "is a Items: give"),
    "nothing": ([], "chooses none of the 0 items"),
    "one item": (PAIRS[:1], "chooses none of the 1 items for val: give .train, val."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_data_set_is_refused_in_a_sentence(name):
    data, sentence = WRONG[name]
    with pytest.raises(DataError, match=sentence) as error:
        _, found = sources_of(data, Settings())
        [split.instances() for split in found.values()]
    assert "\n" not in str(error.value)


def test_one_data_set_is_split_by_the_seed():
    numbers = {}
    for seed in (0, 1):
        _, found = sources_of((IMAGES, MASKS), Settings(seed=seed))
        both = [set(found[split].instances().image_ids.tolist()) for split in ("train", "val")]
        assert both[0] | both[1] == {*range(12)} and not both[0] & both[1]
        numbers[seed] = both[1]
        assert both[1] == {n for n in range(12) if split_of(type(project_root())(f"{seed}-{n}")) == "val"}
    assert numbers[0] != numbers[1]


def test_a_pair_of_data_sets_is_train_and_val():
    pairs = ((IMAGES, MASKS), (IMAGES[:3], MASKS[:3])), (Items(PAIRS), PAIRS[:3]), (PAIRS, Items(PAIRS[:3]))
    for pair in pairs:
        settings, found = sources_of(pair, Settings())
        assert settings.data == "arrays" and [len(found[split]) for split in ("train", "val")] == [12, 3]


class Changing(Items):
    """Gives other items the second time."""

    def __init__(self, items, how):
        super().__init__(items)
        self.how, self.reads = how, 0

    def __getitem__(self, number):
        self.reads += 1
        if self.reads > len(self.items):
            if self.how == "length":
                del self.items[-1]
            number = -number - 1 if self.how == "order" else number
            if self.how == "bad":
                return None, None
        return self.items[number]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("order", "item 0 of the train data is another than when it was first read: give data whose items"),
        ("bad", "item 0 of the train data is another"),
        ("length", "item . of the train data cannot be read .IndexError: list index out of range.: give"),
    ],
)
def test_data_that_change_between_the_readings_are_refused(how, sentence, tmp_path):
    with pytest.raises(DataError, match=sentence):
        open_store(ArrayPeople(Changing([*PAIRS], how)), root=tmp_path, workers=2, **STORE)
    assert not [*tmp_path.glob("arrays*")]


def test_items_are_read_in_this_process(tmp_path):
    people = ArrayPeople(Items([*PAIRS] * 4))
    read = []
    people._items.__class__.__getitem__, before = (
        (lambda s, n: read.append(n) or s.items[n]),
        Items.__getitem__,
    )
    try:
        open_store(people, root=tmp_path, workers=2, **STORE)
    finally:
        Items.__getitem__ = before
    assert len(read) == 2 * 48


def test_the_store_has_the_crops_of_a_coco_store(tmp_path, coco_files):
    """The same images and masks, through files."""
    for number in range(2):
        image = coco_files.image(IMAGES[number], name=f"{number}.png")
        for box in (ONE, TWO):
            coco_files.person(image, box)
    theirs = open_store(coco_files.source(), root=tmp_path, **STORE)
    ours = open_store(ArrayPeople((IMAGES[:2], MASKS[:2])), root=tmp_path, **STORE)
    assert np.array_equal(ours.images, theirs.images) and np.array_equal(ours.coverage, theirs.coverage)


# -- a run -----------------------------------------------------------------------------------------------
def test_a_run_on_arrays_is_resumed_replayed_and_loaded(shallow, tiny):
    data = (IMAGES, MASKS)
    settings = functools.partial(tiny, run="mine", inject="grad:nan@2")
    run = refinelib.train(settings(epochs=1), data=data)
    assert run.status()["state"] == "ok" and run.settings().data == "arrays"
    config = run.config()
    assert all(config["data"][split].startswith("sha256:") for split in ("train", "val"))
    assert len({*config["data"].values()}) == 2 and not [*run.folder.glob("config.resumed*")]

    (incident,) = run.folder.glob("incidents/*")
    finding = refinelib.replay(incident, device="cpu")
    assert finding.phase == "gradient" and finding.same_step
    report = json.loads((incident / "report.json").read_text())
    assert {one["source"] for one in report["people"]} == {"arrays"}

    longer = refinelib.train(settings(epochs=2, resume=True), data=data)
    assert longer.folder == run.folder and longer.status()["state"] == "ok" and longer.status()["epoch"] == 2
    brighter, repainted = IMAGES.copy(), MASKS.copy()
    brighter[:, 20, 20], repainted[:, 20, 20] = 0, 0
    for other in ((brighter, MASKS), (IMAGES, repainted), (IMAGES[:-1], MASKS[:-1])):
        with pytest.raises(checkpoints.CheckpointError, match="resume with the data of its start"):
            refinelib.train(settings(epochs=3, resume=True), data=other)

    predictor = refinelib.load(run.folder, device="cpu")
    assert predictor.predict(IMAGES[0], [ONE, TWO]).shape == (2, *SIZE)
    report = refinelib.evaluate(predictor, source=ArrayPeople(data, "val"), max_images=2)
    assert report["rois"] == 4 and report["images"] == 2


def test_resume_is_refused_for_other_validation_data_too(shallow, tiny):
    train, val = (IMAGES, MASKS), (IMAGES[:3], MASKS[:3])
    refinelib.train(tiny(run="two", epochs=1), data=(train, val))
    with pytest.raises(checkpoints.CheckpointError, match="other people"):
        refinelib.train(tiny(run="two", epochs=2, resume=True), data=(train, (IMAGES[3:6], MASKS[3:6])))
    assert refinelib.train(tiny(run="two", epochs=2, resume=True), data=(train, val)).status()["epoch"] == 2


def test_a_resume_without_the_data_says_what_to_give_and_leaves_the_run(shallow, tiny, tmp_path):
    own = {"run": "mine", "store_dir": str(tmp_path / "stores")}
    run = refinelib.train(tiny(**own, epochs=1), data=(IMAGES, MASKS))
    with pytest.raises(DataError, match="call refinelib.train.settings, data=...."):
        refinelib.train(tiny(**{**own, "store_dir": None}, epochs=2, resume=True, data="arrays"))
    assert run.status()["state"] == "ok"
    # The store is enough, as for data on disk.
    assert refinelib.train(tiny(**own, epochs=2, resume=True, data="arrays")).status()["epoch"] == 2


def test_settings_that_exclude_data_in_memory_are_refused_before_a_run_is_made(tiny, tmp_path, monkeypatch):
    data = (IMAGES, MASKS)
    for settings, sentence in (
        (tiny(data="pennfudan", data_dir="there"), "data = pennfudan in the settings, and data in memory"),
        (tiny(gpus=2), "gpus = 2: data in memory cannot be given to the processes that this starts: leave"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            refinelib.train(settings, data=data)
    with pytest.raises(DataError, match="give .image, mask.|entries"):
        refinelib.train(tiny(), data=(IMAGES, MASKS[1:]))
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(ranks, "launched", lambda: True)  # each process runs the caller's own script
    assert len(sources_of(data, tiny(gpus=2))[1]) == 2


def test_data_in_memory_join_others_and_corrupted_files(tiny, tmp_path):
    settings, given = sources_of((IMAGES, MASKS), tiny(inject="file:missing@2", max_images=None))
    train, val = open_splits(settings, given, progress=False)
    assert train.skipped == {sources.MISSING: 1} and train.content == given["train"].fingerprint()
    assert len(train) == 2 * (len(given["train"]) - 1) and not val.skipped
    plain = open_split(settings.model_copy(update={"inject": None}), "train", given, progress=False)
    assert plain.identity != train.identity


def test_the_example_trains_and_finds_the_person(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example_arrays", project_root() / "examples" / "arrays.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    run = example.main(output_dir=str(tmp_path), epochs=1, max_images=6, device="cpu")
    assert run.status()["state"] == "ok" and "pixels were found" in capsys.readouterr().out


def test_a_setting_alone_does_not_name_them():
    with pytest.raises(DataError, match="in a program's memory"):
        open_split(resolve("demo", data="arrays"), "train")
