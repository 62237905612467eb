"""Penn-Fudan: people are read from the masks, the split is fixed, and what is wrong is told and counted."""

import hashlib
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import in_memory, in_time
from PIL import Image

from refinelib.config import Settings
from refinelib.data import DataError, PennFudanPeople, open_split, open_store
from refinelib.data import sources as scenes
from refinelib.data.formats import STRAY_MASK as NO_PICTURE
from refinelib.data.sources import MISSING, NO_MASK, OTHER_SIZE, SMALL, UNREADABLE
from refinelib.data.store_build import file_stamps
from refinelib.modeling.roi import labels_from_coverage

OWN = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.0, progress=False, workers=1)


class Files:
    """Writes a small data set in Penn-Fudan's layout."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("PNGImages", "PedMasks"):
            (folder / name).mkdir(parents=True)

    def add(self, name, owner=None, size=(70, 90)):
        """An image of seeded noise and its mask of instance ids."""
        if owner is None:
            owner = np.zeros(size, np.uint8)
            owner[10:42, 20:52] = 1
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.folder / "PNGImages" / f"{name}.png")
        Image.fromarray(owner).save(self.mask(name))
        return pixels

    def mask(self, name):
        return self.folder / "PedMasks" / f"{name}_mask.png"

    def source(self, split="all"):
        return PennFudanPeople(self.folder, split)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "PennFudanPed")


def build(files, tmp_path, split="all", **how):
    return open_store(files.source(split), root=tmp_path / "stores", **{**OWN, **how})


def labels(store, row):
    return labels_from_coverage(torch.from_numpy(np.array(store.coverage[row]))).numpy()


def test_people_come_from_the_mask(files, tmp_path):
    owner = np.zeros((70, 90), np.uint8)
    owner[10:42, 20:40] = 1
    owner[10:42, 40:52] = 3  # ids need not be dense; 12 px wide: no ROI, but other people
    owner[20:60, 60:85] = 4
    owner[25:30, 30:35] = 4  # in two parts: the box holds both
    pixels = files.add("PennPed00001", owner)
    store = build(files, tmp_path)
    assert store.skipped == {SMALL: 1}
    assert store.boxes.tolist() == [[20, 10, 40, 42], [30, 20, 85, 60]]
    assert store.areas.tolist() == [32 * 20 - 25, 40 * 25 + 25]
    assert store.annotation_ids.tolist() == [1001, 1004] and store.image_ids.tolist() == [1, 1]
    scene = files.source().scene(0)
    assert np.array_equal(scene.image, pixels) and np.array_equal(scene.masks, owner == [[[1]], [[3]], [[4]]])


def test_labels(files, tmp_path):
    owner = np.zeros((70, 90), np.uint8)
    owner[10:42, 20:36] = owner[10:12, 36:52] = 1  # the box is 20..52
    owner[20:30, 40:60] = 2
    pixels = files.add("a", owner)
    store = build(files, tmp_path)
    assert store.boxes[0].tolist() == [20, 10, 52, 42]
    assert np.array_equal(store.images[0], pixels[10:42, 20:52])
    want = owner[10:42, 20:52]
    assert {0, 1, 2} == set(want.ravel()) and np.array_equal(labels(store, 0), want)


def test_the_split_of_an_image_is_its_names(files):
    names = [f"FudanPed{i:05}" for i in range(12)]
    for name in names:
        files.add(name)
    val = [n for n in names if int(hashlib.sha1(n.encode()).hexdigest(), 16) % 5 == 0]
    counts = {split: files.source(split).instances().image_ids.tolist() for split in ("train", "val", "all")}
    assert counts["val"] == [names.index(n) + 1 for n in val] and 0 < len(val) < 12
    assert sorted(counts["train"] + counts["val"]) == counts["all"] == list(range(1, 13))
    assert len(files.source("all")) == 12 and files.source("all").instances(5).image_ids.tolist() == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_fingerprint_changes_with_the_data(files):
    files.add("a"), files.add("b")
    first, stamps = files.source().fingerprint(), file_stamps(files.source(), files.source().names())
    assert files.source().fingerprint() == first != files.source("train").fingerprint()
    os.utime(files.mask("b"), (1, 1))
    assert (file_stamps(files.source(), files.source().names()) != stamps).any(1).tolist() == [False] * 3 + [
        True
    ]
    files.add("c")
    assert files.source().fingerprint() != first


def test_settings_lead_to_it(files, tmp_path):
    for i in range(12):
        files.add(f"FudanPed{i:05}")
    places = dict(data_dir=str(files.folder), output_dir=str(tmp_path))
    settings = Settings(data="pennfudan", roi_size=16, mask_size=16, workers=1, **places)
    train, val = (open_split(settings, split, progress=False) for split in ("train", "val"))
    assert (
        train.source == "pennfudan" and len(train) + len(val) == 12 and len(val) == len(files.source("val"))
    )
    with pytest.raises(DataError, match="data = pennfudan needs data_dir"):
        open_split(Settings(data="pennfudan", store_dir=str(tmp_path / "none")), "train")


def test_what_a_mac_or_windows_leaves_moves_no_id(files):
    for name in "abc":
        files.add(name)
    clean = files.source().instances()
    for folder in (files.folder / "PNGImages", files.folder / "PedMasks"):
        for file in list(folder.iterdir()):
            (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\0\0\1Bud1")
    found = files.source().instances()
    assert found.annotation_ids.tolist() == clean.annotation_ids.tolist() == [1001, 2001, 3001]
    assert found.image_ids.tolist() == [1, 2, 3] and not found.skipped


def test_masks_without_image_are_counted(files):
    files.add("a"), files.add("b")
    (files.folder / "PNGImages" / "a.png").unlink()
    found = files.source().instances()
    assert len(found) == 1 and found.skipped == {NO_PICTURE: 1} and "a_mask.png" in found.examples[NO_PICTURE]


# -- what is wrong ---------------------------------------------------------------------------------------
def test_missing_folders_and_splits_are_told(files, tmp_path):
    with pytest.raises(
        DataError,
        match="there is no folder .*nowhere.PNGImages: data_dir .or add_pennfudan. must hold PNGImages and",
    ):
        PennFudanPeople(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no split 'test': give train, val or all"):
        files.source("test")
    with pytest.raises(
        DataError, match="the split all of .* has no person that can be used: no .png file in .*PNGImages"
    ):
        files.source().instances()
    (files.folder / "PedMasks").rmdir()
    with pytest.raises(DataError, match="there is no folder .*PedMasks"):
        files.source()


def test_bad_files_are_counted_and_the_rest_is_used(files, tmp_path):
    names = "abcdefghi"
    for name in names:
        files.add(name)
    images = {name: files.folder / "PNGImages" / f"{name}.png" for name in names}
    for file in (images["a"], files.mask("b")):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) * 2 // 3])
    files.mask("c").unlink()
    Image.new("RGB", (90, 70)).save(files.mask("d"))
    Image.new("L", (90, 70)).save(files.mask("e"))
    Image.new("RGB", (90, 71)).save(images["f"])
    images["g"].write_text("not an image")
    files.mask("h").write_bytes(b"")
    store = build(files, tmp_path)
    assert store.image_ids.tolist() == [9]
    assert store.skipped == {UNREADABLE: 5, MISSING: 1, NO_MASK: 1, OTHER_SIZE: 1}
    assert "there is no mask file" in store.examples[MISSING] and "c_mask.png" in store.examples[MISSING]
    assert "f.png has 90x71 pixels, its annotation says 90x70" in store.examples[OTHER_SIZE]
    assert "e_mask.png has no person in it" in store.examples[NO_MASK]
    assert "fetch it again or take it out" in store.examples[UNREADABLE]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_images_and_masks_that_are_no_regular_files(files, tmp_path):
    for name in "abcd":
        files.add(name)
    for file in (files.folder / "PNGImages" / "a.png", files.mask("b")):
        file.unlink()
        os.mkfifo(file)
    files.mask("c").unlink(), files.mask("c").mkdir()
    with in_time():
        store = build(files, tmp_path)
    assert store.image_ids.tolist() == [4] and store.skipped == {UNREADABLE: 3}
    assert "is no regular file: put the mask there or take it out" in store.examples[UNREADABLE]


def test_names_that_are_not_unicode(files, tmp_path):
    files.add("a")
    bad = os.fsdecode(b"Fudan\xff")
    for source, place in (
        (files.folder / "PNGImages" / "a.png", files.folder / "PNGImages" / f"{bad}.png"),
        (files.mask("a"), files.mask(bad)),
    ):
        try:
            place.write_bytes(source.read_bytes())
        except OSError:
            pytest.skip("this file system has Unicode names only")
    assert sum(len(files.source(split)._files) for split in ("train", "val")) == 2
    files.mask(bad).write_bytes(b"")
    for _ in range(2):
        store = build(files, tmp_path)
        assert (
            len(store) == 1 and store.skipped == {UNREADABLE: 1} and store.examples[UNREADABLE].isprintable()
        )


@pytest.mark.slow
def test_a_mask_of_noise_is_thousands_of_people(files, monkeypatch):
    """Decoded together they would take 13 GB; looked for one after the other, half a minute."""
    monkeypatch.setattr(scenes, "MASK_BYTES", 1 << 20)
    owner = (
        np.random.default_rng(0).permutation(450 * 450).reshape(450, 450).clip(max=65_535).astype(np.uint16)
    )
    files.add("a", owner, size=(450, 450))
    with in_time(), in_memory(120):
        source = files.source()
        people = source.instances()
        masks = source.scene(0).masks
        assert (
            people.annotation_ids.tolist() == [1000 + 65_535]
            and len(masks) == 65_535
            and masks[65_534].sum() == 450 * 450 - 65_535
        )


BAD_VALUES = {
    "fractions": np.float32([0, 0.5]),
    "NaN": np.float32([0, np.nan]),
    "negative": np.int32([-1, 3]),
    "too large": np.int32([0, 70_000]),
    "colours": np.zeros((70, 90, 3), np.uint8),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_numbers_that_no_person_has(files, kind):
    files.add("a"), files.add("b")
    values = BAD_VALUES[kind]
    owner = values if kind == "colours" else np.resize(values, (70, 90))
    Image.fromarray(owner).save(files.mask("a"), "TIFF")
    found = files.source().instances()
    assert found.skipped == {UNREADABLE: 1}
    assert "one value a pixel, the person's number, from 1 to 65535" in found.examples[UNREADABLE]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), top=st.sampled_from([3, 255, 65_535]))
def test_people_of_any_mask(tmp_path_factory, seed, top):
    files = Files(tmp_path_factory.mktemp("any"))
    random = np.random.default_rng(seed)
    ids = random.integers(1, top + 1, 4)
    owner = np.zeros((60, 80), np.uint8 if top < 256 else np.uint16)
    for one in ids:
        y, x, h, w = random.integers([0, 0, 16, 16], [30, 40, 40, 50])
        owner[y : y + h, x : x + w] = one
    files.add("a", owner, size=(60, 80))
    people, found = files.source().instances(), [i for i in np.unique(owner) if i]
    scene = files.source().scene(0)
    assert np.array_equal(np.stack([*scene.masks]), [owner == i for i in found]) and np.array_equal(
        scene.masks.any(0), owner > 0
    )
    for row, slot in enumerate(people.slots):
        mine = owner == found[slot]
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        assert people.boxes[row].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert people.areas[row] == mine.sum() and people.annotation_ids[row] == 1000 + int(found[slot])


# -- the real thing --------------------------------------------------------------------------------------
@pytest.mark.real_data
def test_real_people(real_pennfudan):
    train, val = (PennFudanPeople(real_pennfudan, split).instances() for split in ("train", "val"))
    assert (len(train), train.images, train.skipped) == (325, 130, {SMALL: 2})
    assert (len(val), val.images, val.skipped) == (95, 40, {SMALL: 1})


@pytest.mark.real_data
def test_real_boxes_are_the_published_ones(real_pennfudan):
    """The set's own text files list a box a person; they count pixels from 1."""
    people = PennFudanPeople(real_pennfudan, "all").instances()
    names = sorted(file.stem for file in (real_pennfudan / "PNGImages").glob("*.png"))
    gaps = []
    for box, number in zip(people.boxes, people.annotation_ids, strict=True):
        text = (real_pennfudan / "Annotation" / f"{names[number // 1000 - 1]}.txt").read_text(
            errors="replace"
        )
        found = re.search(
            rf"Bounding box for object {number % 1000} .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)", text
        )
        x0, y0, x1, y1 = (int(side) for side in found.groups())
        gaps.append(np.abs(box - (x0 - 1, y0 - 1, x1, y1)).max())
    assert len(gaps) == 420 and max(gaps) <= 7 and np.mean(np.array(gaps) == 0) > 0.95


@pytest.mark.real_data
def test_real_store(real_pennfudan, tmp_path):
    store = open_store(
        PennFudanPeople(real_pennfudan, "val"), root=tmp_path, max_images=10, **{**OWN, "context": 0.5}
    )
    assert len(np.unique(store.image_ids)) == 10 and store.canvas == (48, 48)
    middle = np.asarray(store.coverage[:, 8:40, 8:40, 0], np.float64).sum((1, 2)) / 255
    sides = (store.boxes[:, 2:] - store.boxes[:, :2]).prod(1) / 32**2
    assert np.allclose(middle * sides, store.areas, rtol=0.02)  # no pixel of a person lies outside its box
