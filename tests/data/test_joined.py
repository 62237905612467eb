"""Penn-Fudan's people beside those of another data set."""

import os

import numpy as np
import pytest
from limits import in_time
from PIL import Image

from refinelib.config import SettingsError, resolve
from refinelib.data import PennFudanPeople, Store, SyntheticPeople, open_split, open_store
from refinelib.data.coco import ELSEWHERE
from refinelib.data.sources import MISSING, UNREADABLE
from refinelib.data.splits import SYNTHETIC, JoinedSources


@pytest.fixture
def pennfudan(tmp_path):
    folder = tmp_path / "PennFudanPed"
    for name in ("PNGImages", "PedMasks"):
        (folder / name).mkdir(parents=True)
    for number in range(5):
        owner = np.zeros((70, 90), np.uint8)
        owner[10:42, 20:52], owner[20:60, 60:80] = 1, 2
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "PNGImages" / f"F{number}.png")
        Image.fromarray(owner).save(folder / "PedMasks" / f"F{number}_mask.png")
    return folder


def content(store: Store, rows: slice) -> tuple[bytes, bytes, list]:
    return store.images[rows].tobytes(), store.coverage[rows].tobytes(), store.annotation_ids[rows].tolist()


def test_each_part_is_what_it_is_alone(pennfudan, tmp_path):
    how = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.5, workers=1, progress=False)
    parts = [SyntheticPeople(3, split="train"), PennFudanPeople(pennfudan, "all")]
    alone = [open_store(part, root=tmp_path / "alone", **how) for part in parts]
    both = open_store(JoinedSources(parts, "train"), root=tmp_path / "both", **how)
    cut = len(alone[0])
    assert len(both) == cut + len(alone[1]) == cut + 10
    assert content(both, slice(cut)) == content(alone[0], slice(None)) and content(
        both, slice(cut, None)
    ) == content(alone[1], slice(None))
    assert both.image_index[cut] == both.image_index[cut - 1] + 1 and both.source == "synthetic+pennfudan"
    assert [both.instance(row)["source"] for row in (0, cut - 1, cut, len(both) - 1)] == ["synthetic"] * 2 + [
        "pennfudan"
    ] * 2  # whose ids these are
    few = open_store(JoinedSources(parts, "train"), root=tmp_path / "few", max_images=4, **how)
    assert len(few) == cut + 2 and content(few, slice(cut, None)) == content(both, slice(cut, cut + 2))
    for index in (-9, 8):
        with pytest.raises(IndexError):
            JoinedSources(parts, "train").scene(abs(index))


def test_only_the_training_people_are_joined_and_a_store_travels(pennfudan, tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHETIC, "train", 3)
    monkeypatch.setitem(SYNTHETIC, "val", 2)

    def settings(**more):
        return resolve(
            "demo", roi_size=16, mask_size=16, workers=1, store_dir=str(tmp_path / "stores"), **more
        )

    joined = settings(add_pennfudan=str(pennfudan))
    train, val = (open_split(joined, split, progress=False) for split in ("train", "val"))
    assert (train.source, val.source) == ("synthetic+pennfudan", "synthetic")
    assert open_split(settings(), "train", progress=False).source == "synthetic"
    pennfudan.rename(tmp_path / "elsewhere")
    again = open_split(joined, "train", progress=False)
    assert again.folder == train.folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_bad_images_of_each_part_are_counted(pennfudan, coco_files, tmp_path):
    for _ in range(3):
        coco_files.person(coco_files.image((60, 70)), (4, 4, 40, 50))
    coco_files.content["images"][1]["file_name"] = "a\0b.jpg"
    coco_files.content["images"][2]["file_name"] = "/etc/passwd"
    (pennfudan / "PNGImages" / "F3.png").unlink()
    os.mkfifo(pennfudan / "PNGImages" / "F3.png")
    both = JoinedSources([coco_files.source(), PennFudanPeople(pennfudan, "all")], "train")
    with in_time():
        store = open_store(
            both,
            root=tmp_path / "both",
            roi_size=(16, 16),
            mask_size=(16, 16),
            context=0.0,
            workers=1,
            progress=False,
        )
    assert store.skipped == {UNREADABLE: 1, MISSING: 1, ELSEWHERE: 1} and len(store) == 1 + 8


def test_it_is_not_added_to_itself(pennfudan):
    with pytest.raises(SettingsError, match="leave add_pennfudan out"):
        resolve("demo", data="pennfudan", data_dir=str(pennfudan), add_pennfudan=str(pennfudan))


def test_sources_without_files_are_built_once(tmp_path, capsys):
    settings = resolve(
        "demo", inject="file:truncated@2", store_dir=str(tmp_path), max_images=4, roi_size=32, mask_size=32
    )
    for _ in range(2):
        assert open_split(settings, "train").examples
    assert "changed" not in capsys.readouterr().out
