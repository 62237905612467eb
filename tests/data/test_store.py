"""The store: the same however it was built; it can be copied, and says what is wrong with it."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import in_memory, in_time
from PIL import Image

from refinelib.config import Settings, resolve
from refinelib.data import CocoPeople, DataError, Store, SyntheticPeople, open_split, open_splits, open_store
from refinelib.data import store_build as building
from refinelib.data.augment import MEAN
from refinelib.data.sources import COLUMNS, MISSING, UNREADABLE
from refinelib.data.splits import find_store
from refinelib.data.store import FORMAT
from refinelib.modeling.roi import crop_rois, expand_boxes

SMALL = dict(roi_size=(16, 32), mask_size=(16, 32), context=0.5, progress=False, workers=1)
FILES = ("images.u8", "coverage.u8")


def content(store: Store) -> dict:
    """Everything a store holds, but for how long it took."""
    columns = {name: getattr(store, name).tolist() for name in COLUMNS if name != "slots"}
    pixels = {name: (store.folder / name).read_bytes() for name in FILES}
    info = store.info.model_dump(exclude={"seconds"})
    return {**columns, **pixels, "info": info, "mean": store.mean_coverage().tolist()}


@pytest.fixture(scope="module")
def people():
    return SyntheticPeople(20)


@pytest.fixture(scope="module")
def store(people, tmp_path_factory):
    return open_store(people, root=tmp_path_factory.mktemp("stores"), **SMALL)


def hidden(root: Path) -> list[str]:
    return [f.name for f in root.iterdir() if ".building-" in f.name]


# -- what is in it -------------------------------------------------------------------------------------
def test_rows_are_the_crops_of_their_people(people, store):
    index = people.instances()
    assert len(store) == len(index) and store.canvas == store.mask_canvas == (24, 48)
    for row in range(0, len(store), 5):
        scene = people.scene(store.image_index[row])
        box = expand_boxes(torch.from_numpy(index.boxes[row : row + 1]).double(), (1.5, 1.5))
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        want = crop_rois(pixels, box, store.canvas, fill=MEAN)[0].permute(1, 2, 0)
        assert np.abs(store.images[row] - want.numpy()).max() <= 0.5001
        mine = scene.masks[index.slots[row]]
        layers = torch.from_numpy(np.stack([mine, scene.masks.any(0) & ~mine]))
        shares = crop_rois(layers, box, store.mask_canvas)[0].permute(1, 2, 0) * 255
        assert np.abs(store.coverage[row] - shares.numpy()).max() <= 0.5001
    for name in COLUMNS:
        assert name == "slots" or np.array_equal(getattr(store, name), getattr(index, name))


def test_what_a_store_gives(store):
    rows = [7, 0, len(store) - 1, 7]
    for some in (rows, np.array(rows), torch.tensor(rows)):
        images, coverage = store.gather(some)
        assert images.dtype == coverage.dtype == torch.uint8
        assert np.array_equal(images.numpy(), store.images[rows])
        assert np.array_equal(coverage.numpy(), store.coverage[rows])
    images.zero_()  # a copy: the file is not touched
    assert store.images[7].any()
    assert store.gather([])[0].shape == (0, 24, 48, 3)
    assert np.array_equal(store.as_tensors()[0].numpy(), store.images)
    assert store.as_tensors()[1].data_ptr() == store.as_tensors()[1].data_ptr()  # the mapped file, no copy
    few = store.first_images(9)
    for one in (store, few):
        want = np.asarray(one.coverage, np.float64).mean(0) / 255
        assert np.abs(one.mean_coverage() - want).max() < 1e-6
    line = f"synthetic train: {len(store)} ROIs of 16x32, 24x48 with context, from 20 images"
    assert len(few) < len(store) and store.summary().startswith(line)
    for wrong in (-1, len(store)):
        with pytest.raises(IndexError, match=f"the ROIs 0 to {len(store) - 1}"):
            store.gather([0, wrong])


def test_pickled_it_is_mapped_again(store):
    for each in (store, store.first_images(5)):
        data = pickle.dumps(each)
        assert len(data) < 1000
        again = pickle.loads(data)
        assert len(again) == len(each) and np.array_equal(again.images, each.images)


# -- how it is built -------------------------------------------------------------------------------------
def test_several_processes_build_the_same(people, store, tmp_path):
    torch.set_num_threads(2)
    try:  # a thread pool in the parent must not hang its children
        torch.randn(400, 400) @ torch.randn(400, 400)
        several = open_store(people, root=tmp_path, **{**SMALL, "workers": 3})
    finally:
        torch.set_num_threads(1)
    assert content(several) == content(store)
    assert several.folder.name == store.folder.name and not hidden(tmp_path)


class Untouchable(SyntheticPeople):
    """Nothing but its fingerprint may be asked."""

    def instances(self, max_images=None):
        raise AssertionError("the second opening parsed the data set")

    scene = instances


def test_a_second_opening_looks_at_no_data(store):
    started = time.perf_counter()
    again = open_store(Untouchable(20), root=store.folder.parent, **SMALL)
    assert time.perf_counter() - started < 0.5
    assert again.folder == store.folder and len(again) == len(store)


def test_the_key_is_what_made_it(store, tmp_path):
    sizes = {**SMALL, "context": 0.0}
    folders = {store.folder.name}
    for source, how in (
        (SyntheticPeople(4), SMALL),
        (SyntheticPeople(4, "val"), SMALL),
        (SyntheticPeople(4, seed=5), SMALL),
        (SyntheticPeople(4), sizes),
        (SyntheticPeople(4), {**sizes, "mask_size": (32, 64)}),
        (SyntheticPeople(4), {**sizes, "roi_size": (32, 32)}),
        (SyntheticPeople(4), {**sizes, "max_images": 2}),
    ):
        folders.add(open_store(source, root=tmp_path, **how).folder.name)
        assert len(list(tmp_path.glob("synthetic-*"))) == len(folders) - 1


def test_another_way_to_draw_is_other_data(people, tmp_path, monkeypatch):
    name = "refinelib.data.synthetic"
    before, code = people.fingerprint(), Path(sys.modules[name].__file__).read_text()
    (tmp_path / "other.py").write_text(code + "\n")
    monkeypatch.setattr(f"{name}.__file__", str(tmp_path / "other.py"))
    assert people.fingerprint() != before


def test_max_images_of_a_whole_store_and_on_its_own(people, store, tmp_path):
    alone = open_store(people, root=tmp_path, max_images=6, **SMALL)
    part = open_store(Untouchable(20), root=store.folder.parent, max_images=6, **SMALL)
    assert alone.folder != part.folder == store.folder
    assert part.max_images == alone.max_images == 6 and 6 <= len(part) == len(alone) < len(store)
    for name in ("images", "coverage", "boxes", "annotation_ids"):
        assert np.array_equal(getattr(part, name), getattr(alone, name))
    assert np.allclose(part.mean_coverage(), alone.mean_coverage(), atol=1e-6)
    assert len(part.first_images(3)) < len(part) and part.first_images(50) is part
    with pytest.raises(IndexError):
        part.gather([len(part)])


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_fail_leave_the_other_rows_right(coco_files, tmp_path, workers):
    for number in range(18):
        image = coco_files.image((60, 70))
        for person in range(1 + number % 3):
            left = 3.0 + 20 * person
            coco_files.person(image, (left, 4, left + 17.5 + number % 2, 50))
    whole = open_store(coco_files.source(), root=tmp_path / "whole", **SMALL)
    bad = [1, 7, 8, 18]  # the first, two in the middle, the last
    for image in bad:
        coco_files.truncate(image)
    some = open_store(coco_files.source(), root=tmp_path / "some", **{**SMALL, "workers": workers})
    kept = ~np.isin(whole.image_ids, bad)
    assert some.skipped == {UNREADABLE: 4} and "001.jpg cannot be decoded" in some.examples[UNREADABLE]
    assert np.array_equal(some.annotation_ids, whole.annotation_ids[kept])
    for name in ("images", "coverage", "boxes", "image_index", "image_sizes", "areas"):
        assert np.array_equal(getattr(some, name), getattr(whole, name)[kept]), name
    assert np.allclose(some.mean_coverage(), np.asarray(some.coverage, np.float64).mean(0) / 255, atol=1e-6)
    assert not hidden(tmp_path / "some")


def test_an_image_that_was_fetched_again_is_used(coco_files, tmp_path):
    """Its folder's time does not change with it."""
    for _ in range(3):
        coco_files.person(coco_files.image((60, 70)), (4, 4, 40, 50))
    whole = (coco_files.images / "002.jpg").read_bytes()
    coco_files.truncate(2)
    coco_files.source()

    def opened():
        return open_store(
            CocoPeople(coco_files.annotations, coco_files.images, "val"), root=tmp_path / "s", **SMALL
        )

    broken = opened()
    assert len(broken) == 2 and len(opened()) == 2
    before = (broken.folder / "store.json").stat().st_mtime_ns
    (coco_files.images / "002.jpg").write_bytes(whole)
    repaired = opened()
    assert len(repaired) == 3 and not repaired.skipped and repaired.folder == broken.folder
    assert (repaired.folder / "store.json").stat().st_mtime_ns != before
    (broken.folder / "store.json").write_text("{")
    with pytest.raises(DataError, match="damaged|not readable|store.json"):
        opened()


def test_where_no_image_can_be_used(coco_files, tmp_path):
    for _ in range(2):
        coco_files.person(coco_files.image(), (10, 10, 60, 60))
    coco_files.truncate(1)
    (coco_files.images / "002.jpg").unlink()
    with pytest.raises(DataError, match="none of the 2 images of coco val could be used") as error:
        open_store(coco_files.source(), root=tmp_path / "s", **SMALL)
    assert "missing image (1), unreadable image (1)" in str(error.value) and "002.jpg" in str(error.value)
    assert not list((tmp_path / "s").glob("coco-*")) and not hidden(tmp_path / "s")


class Unreadable(SyntheticPeople):
    def scene(self, index):
        if index == 3:
            raise PermissionError("not yours")
        return super().scene(index)


def test_a_file_system_error_of_one_image_is_counted(tmp_path):
    made = open_store(Unreadable(6), root=tmp_path, **SMALL)
    assert (
        made.skipped[UNREADABLE] == 1
        and 3 not in made.image_index
        and "not yours" in made.examples[UNREADABLE]
    )


def test_places_that_cannot_hold_a_store(people, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the store .* cannot be written"):
        open_store(people, root=tmp_path / "file", **SMALL)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda place: full)
    with pytest.raises(DataError, match="needs 0.0 GB in .*: set store_dir to a larger disk"):
        open_store(people, root=tmp_path / "s", **SMALL)
    assert not hidden(tmp_path / "s")


# -- several builders, killed ones ---------------------------------------------------------------------
class Logged(SyntheticPeople):
    """Notes who draws which image; waits at image ``stop`` while the file ``gate`` is there."""

    def __init__(self, n_images: int, gate: Path, stop: int) -> None:
        super().__init__(n_images)
        self.gate, self.log, self.stop = gate, gate.with_name("log"), stop
        self.log.touch()

    def scene(self, index):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {index}\n")
        while index == self.stop and self.gate.exists():
            time.sleep(0.02)
        return super().scene(index)

    def lines(self) -> list[list[int]]:
        return [[int(word) for word in line.split()] for line in self.log.read_text().splitlines()]


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts builders by fork, which this system lacks")


@pytest.fixture
def gate(tmp_path):
    """A closed gate; opened at the latest when the test has failed, so that nobody waits for ever."""
    file = tmp_path / "gate"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def start(source, root: Path, **how) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(
        target=open_store, args=(source,), kwargs={**SMALL, "root": root, **how}
    )
    process.start()
    return process


def wait(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@fork
def test_two_builders_one_builds_the_other_waits(tmp_path, gate, capfd):
    source = Logged(10, gate, stop=5)
    first = start(source, tmp_path / "s")
    wait(lambda: len(source.lines()) == 6)
    second = start(source, tmp_path / "s", progress=True)
    wait(lambda: "another process is building synthetic-train-" in capfd.readouterr().out)
    gate.unlink()
    first.join(30), second.join(30)
    assert first.exitcode == second.exitcode == 0
    assert [index for _, index in source.lines()] == list(range(10))
    reference = open_store(SyntheticPeople(10), root=tmp_path / "reference", **SMALL)
    assert content(open_store(source, root=tmp_path / "s", **SMALL)) == content(reference)


@fork
def test_without_locks_builders_race_and_one_result_stays(tmp_path, gate, monkeypatch):
    def no_locks(lock, **_):
        raise OSError(37, "no locks available")

    monkeypatch.setattr(building.FileLock, "acquire", no_locks)
    source = Logged(8, gate, stop=7)
    both = [start(source, tmp_path / "s") for _ in range(2)]
    wait(lambda: len(source.lines()) == 16)
    assert len(hidden(tmp_path / "s")) == 2
    gate.unlink()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert not hidden(tmp_path / "s") and len(list((tmp_path / "s").glob("synthetic-*"))) == 1
    reference = open_store(SyntheticPeople(8), root=tmp_path / "reference", **SMALL)
    assert content(open_store(Untouchable(8), root=tmp_path / "s", **SMALL)) == content(reference)


@pytest.mark.slow
@fork
def test_killed_half_way_and_started_again(tmp_path, gate):
    source = Logged(20, gate, stop=9)
    builder = start(source, tmp_path / "s", workers=2)
    wait(lambda: 9 in [index for _, index in source.lines()])
    workers = {pid for pid, _ in source.lines()}
    assert builder.pid not in workers
    os.kill(builder.pid, signal.SIGKILL)
    assert len(hidden(tmp_path / "s")) == 1 and not list((tmp_path / "s").glob("synthetic-*"))
    gate.unlink()
    try:  # its workers end by themselves, and the lock goes with them
        wait(lambda: not any(alive(pid) for pid in workers), seconds=15)
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)
    builder.join(30)
    again = open_store(source, root=tmp_path / "s", **SMALL)
    reference = open_store(SyntheticPeople(20), root=tmp_path / "reference", **SMALL)
    assert content(again) == content(reference) and not hidden(tmp_path / "s")


class Suicidal(SyntheticPeople):
    def scene(self, index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().scene(index)


@fork
def test_a_killed_worker_is_told(tmp_path):
    with pytest.raises(
        DataError, match="ended from outside, most likely for lack of memory: give a smaller number"
    ):
        open_store(Suicidal(16), root=tmp_path, **{**SMALL, "workers": 2})
    assert not hidden(tmp_path) and not list(tmp_path.glob("synthetic-*"))


def test_stale_folders_go_and_those_in_use_stay(people, store, tmp_path):
    for name in (store.folder.name, "coco-train-aaaaaaaaaaaa", "coco-val-bbbbbbbbbbbb"):
        (tmp_path / f".{name}.building-0a").mkdir()
        (tmp_path / f".{name}.building-0a" / "images.u8").write_bytes(b"half")
    for file in (*tmp_path.glob(".coco-train-*/*"), *tmp_path.glob(".coco-train-*")):
        os.utime(file, (1, 1))
    open_store(people, root=tmp_path, **SMALL)
    # Its own at once; another store's where no builder wrote for an hour.
    assert hidden(tmp_path) == [".coco-val-bbbbbbbbbbbb.building-0a"]


# -- damage ----------------------------------------------------------------------------------------------
@pytest.fixture
def copy(store, tmp_path):
    return Path(shutil.copytree(store.folder, tmp_path / "copy"))


def edit(folder: Path, **changes) -> None:
    info = json.loads((folder / "store.json").read_text())
    info = {name: value for name, value in {**info, **changes}.items() if value != "gone"}
    (folder / "store.json").write_text(json.dumps(info))


@pytest.mark.parametrize("name", ["images.u8", "coverage.u8", "index.npz", "store.json"])
@pytest.mark.parametrize("how", ["cut short", "missing"])
def test_a_damaged_store_is_told(copy, name, how):
    file = copy / name
    whole = file.stat().st_size
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, whole - 100)
    if name == "store.json" and how == "missing":
        told = "there is no store in .*copy: a store is a folder with store.json"
    else:
        left = 0 if how == "missing" else whole - 100
        what = f"has {left} of {whole} bytes" if name.endswith("u8") else "cannot be read"
        told = f"copy is damaged: {name} {what}.*; copy it again, or delete the folder, and it is built again"
    with pytest.raises(DataError, match=told):
        Store.open(copy)


def test_other_formats_and_contents_are_told(copy):
    edit(copy, format=FORMAT + 1)
    told = f"has format {FORMAT + 1}, this version reads format {FORMAT}: delete the folder"
    with pytest.raises(DataError, match=told):
        Store.open(copy)
    edit(copy, format=FORMAT, rois=3)
    with pytest.raises(DataError, match="images.u8 has .* bytes"):
        Store.open(copy)
    edit(copy, canvas="gone", source="gone")
    with pytest.raises(DataError, match="store.json has no usable canvas, source"):
        Store.open(copy)
    (copy / "store.json").write_text("[]")
    with pytest.raises(DataError, match="store.json cannot be read"):
        Store.open(copy)


def test_a_store_is_built_again_when_a_file_changes(coco_files, tmp_path):
    """Content, content of the same size and time, a file that was missing, one that went."""
    for _ in range(4):
        coco_files.person(coco_files.image((60, 70)), (4, 4, 40, 50))
    first, second, missing, _ = (coco_files.images / f"{number:03d}.jpg" for number in range(1, 5))
    kept = missing.read_bytes()
    missing.unlink()
    source = coco_files.source()

    def built_again(rois):
        before = folder.stat().st_ino
        store = open_store(source, root=tmp_path / "stores", **SMALL)
        assert len(store) == rois and open_store(source, root=tmp_path / "stores", **SMALL).folder == folder
        return folder.stat().st_ino != before and store

    folder = open_store(source, root=tmp_path / "stores", **SMALL).folder
    assert not built_again(3)
    Image.new("RGB", (70, 60), (200, 0, 0)).save(first)
    assert np.median(built_again(3).images[0, ..., 0]) > 190
    times, size = second.stat(), second.stat().st_size
    Image.new("RGB", (70, 60), (0, 200, 0)).save(second)
    second.write_bytes(second.read_bytes().ljust(size, b"\0"))
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.median(built_again(3).images[1, ..., 1]) > 190
    missing.write_bytes(kept)
    assert built_again(4)
    (coco_files.images / "another.jpg").write_bytes(kept)
    assert not built_again(4)
    first.unlink()
    assert built_again(3)
    (folder / "files.npz").write_bytes(b"damaged")
    assert built_again(3)


def test_a_store_stays_where_it_cannot_be_built_again(coco_files, tmp_path):
    coco_files.person(coco_files.image((60, 70)), (4, 4, 40, 50))
    source = coco_files.source()
    store = open_store(source, root=tmp_path, **SMALL)
    (coco_files.images / "001.jpg").unlink()
    with pytest.raises(DataError, match="none of the 1 images of coco val could be used"):
        open_store(source, root=tmp_path, **SMALL)
    assert len(Store.open(store.folder)) == 1 and len([*tmp_path.glob(".*building*")]) == 0


HOSTILE_INFO = {
    "nested": "[" * 100_000,
    "nested inside": '{"format": ' + "[" * 900 + "]" * 900 + "}",
    "endless number": '{"format": ' + "9" * 5000 + "}",
    "a number": "1",
    "binary": "\0\1\2",
    "NaN": '{"format": NaN}',
}


@pytest.mark.parametrize("text", HOSTILE_INFO.values(), ids=list(HOSTILE_INFO))
def test_a_hostile_store_json_is_told(copy, text):
    (copy / "store.json").write_text(text)
    with in_memory(20), pytest.raises(DataError, match="store.json cannot be read|has format"):
        Store.open(copy)


@pytest.mark.parametrize("name", FILES + ("index.npz", "store.json"))
@pytest.mark.parametrize("what", ["FIFO", "folder", "160 GB"])
def test_files_of_a_store_that_are_no_such_files(copy, name, what):
    if what == "160 GB":
        os.truncate(copy / name, 160 << 30)  # takes no room on the disk
    else:
        (copy / name).unlink()
        (copy / name).mkdir() if what == "folder" else os.mkfifo(copy / name)
    with in_time(), in_memory(20), pytest.raises(DataError, match="is damaged|there is no store"):
        Store.open(copy)


def other_index(folder: Path, **changes) -> None:
    with np.load(folder / "index.npz") as index:
        columns = {name: index[name] for name in index.files}
    columns = {name: value for name, value in {**columns, **changes}.items() if value is not None}
    np.savez(folder / "index.npz", **columns)


FOREIGN = {
    "a shape": dict(boxes=np.zeros((3, 5), np.float32)),
    "a length": dict(areas=np.zeros(7, np.float32)),
    "words": dict(image_ids=np.array(["a", "b"])),
    "objects": dict(image_ids=np.array([{}, None], object)),
    "floats for numbers": dict(image_index=np.zeros(5)),
    "a missing column": dict(image_sizes=None),
    "a mean of another size": dict(mean_coverage=np.zeros((5, 5, 2), np.float32)),
    "no array": dict(boxes=np.float32(3)),
}


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=list(FOREIGN))
def test_foreign_arrays_are_told(copy, changes):
    other_index(copy, **changes)
    with pytest.raises(DataError, match="is damaged: index.npz"):
        Store.open(copy)


@pytest.mark.parametrize("how", ["claimed", "packed"])
def test_an_index_of_gigabytes_is_told(copy, how):
    with (
        zipfile.ZipFile(copy / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("boxes.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=(10**10, 4)))
        for _ in range(0 if how == "claimed" else 300):
            file.write(bytes(1 << 20))
    assert (copy / "index.npz").stat().st_size < 1e6
    with in_memory(20), pytest.raises(DataError, match="index.npz cannot be read"):
        Store.open(copy)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_store_json_holds_is_a_store_or_a_sentence(store, copy, data):
    whole = (store.folder / "store.json").read_text()
    changes = data.draw(
        st.dictionaries(
            st.sampled_from([*json.loads(whole), "starts", "notes", "channels"]), JSON, min_size=1, max_size=2
        )
    )
    edit(copy, **{**json.loads(whole), **changes})
    own = Settings(data="synthetic", store_dir=str(copy), roi_size=(16, 32), mask_size=(16, 32), context=0.5)
    for opens in (Store.open, lambda folder: find_store(folder, own, "train")):
        try:
            found = opens(copy)
        except DataError as error:
            assert len(str(error)) < 2000
            continue
        if found is not None:
            assert found.summary() and found.instance(0) and found.gather([0])[0].shape == (1, 24, 48, 3)


# -- it travels ------------------------------------------------------------------------------------------
@pytest.fixture
def coco_dir(coco_files, tmp_path):
    """The same COCO data as both splits, in COCO's layout."""
    for number in range(6):
        coco_files.person(coco_files.image((60, 70)), (5, 6, 40.5 + number, 50))
    coco_files.source()
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(coco_files.images, root / "images" / f"{split}2017")
        shutil.copy(coco_files.annotations, root / "annotations" / f"instances_{split}2017.json")
    return root


def coco_settings(**changes) -> Settings:
    return Settings(**{"data": "coco", "roi_size": 16, "mask_size": 16, "workers": 1, **changes})


def test_a_run_starts_from_a_store_without_images(coco_dir, tmp_path, capsys):
    built = open_splits(
        coco_settings(data_dir=str(coco_dir), store_dir=str(tmp_path / "stores")), progress=False
    )
    want = [content(store) for store in built]
    shutil.rmtree(coco_dir)
    moved = (tmp_path / "stores").rename(tmp_path / "elsewhere")
    for data_dir in (None, str(coco_dir)):  # none given, or none here
        stores = open_splits(coco_settings(data_dir=data_dir, store_dir=str(moved)))
        assert [content(store) for store in stores] == want
        assert [store.split for store in stores] == ["train", "val"]
    assert "images are not at hand, using the store" in capsys.readouterr().out
    few = open_split(coco_settings(store_dir=str(moved), max_images=2), "train", progress=False)
    assert len(few) == 2 and np.array_equal(few.images, stores[0].images[:2])
    own = open_split(coco_settings(store_dir=str(stores[1].folder)), "val", progress=False)
    assert content(own) == want[1]
    told = "holds no store of coco train with roi_size 32x32, mask_size 16x16, context 0$"
    with pytest.raises(DataError, match=told):
        open_splits(coco_settings(store_dir=str(moved), roi_size=32))
    with pytest.raises(DataError, match=f"there is no data folder {coco_dir}"):
        open_splits(coco_settings(data_dir=str(coco_dir)))


def test_a_travelled_store_of_fewer_images_serves_only_fewer(coco_dir, tmp_path):
    stores = str(tmp_path / "stores")
    open_split(coco_settings(data_dir=str(coco_dir), store_dir=stores, max_images=4), "train", progress=False)
    assert len(open_split(coco_settings(store_dir=stores, max_images=3), "train", progress=False)) == 3
    for limit in (5, None):
        with pytest.raises(DataError, match="holds no store of coco train"):
            open_split(coco_settings(store_dir=stores, max_images=limit), "train")


def test_travelled_stores_that_cannot_be_told_apart(coco_dir, tmp_path):
    settings = coco_settings(store_dir=str(tmp_path / "stores"))
    with_data = settings.model_copy(update={"data_dir": str(coco_dir)})
    first = open_split(with_data, "val", progress=False)
    file = coco_dir / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text() + "\n")
    second = open_split(with_data, "val", progress=False)
    with pytest.raises(DataError, match="stores of different data") as error:
        open_split(settings, "val")
    assert first.folder.name in str(error.value) and second.folder.name in str(error.value)
    shutil.rmtree(first.folder)
    os.truncate(second.folder / "coverage.u8", 5)
    with pytest.raises(DataError, match="is damaged: coverage.u8 has 5 of"):
        open_split(settings, "val")
    edit(second.folder, format=0)
    with pytest.raises(DataError, match="has format 0"):
        open_split(settings, "val")


def test_synthetic_stores_lie_in_the_output_folder(tmp_path):
    settings = Settings(output_dir=str(tmp_path), max_images=3, roi_size=16, mask_size=16, workers=1)
    train, val = open_splits(settings, progress=False)
    assert train.folder.parent == val.folder.parent == tmp_path / "stores"
    assert (train.split, val.split) == ("train", "val") and not np.array_equal(train.images[0], val.images[0])
    index = SyntheticPeople(240, "train").instances(3)
    assert np.array_equal(train.boxes, index.boxes)


# -- corrupted files of the setting inject ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "reason", "words"),
    [("truncated", UNREADABLE, "cannot be decoded"), ("missing", MISSING, "there is no image file")],
)
def test_a_corrupted_file_is_left_out_and_counted(tmp_path, how, reason, words):
    common = dict(output_dir=str(tmp_path), max_images=6, roi_size=16, mask_size=16, workers=1)
    whole = open_split(resolve("demo", **common), "train", progress=False)
    settings = resolve("demo", inject=f"file:{how}@3;grad:nan@9", **common)
    corrupted, val = open_splits(settings, progress=False)
    lost = int((whole.image_index == 2).sum())
    assert lost and len(corrupted) == len(whole) - lost and 2 not in corrupted.image_index
    assert corrupted.skipped == {**whole.skipped, reason: 1} and f"{reason} (1)" in corrupted.summary()
    assert words in corrupted.examples[reason] and "image 3 of synthetic train" in corrupted.examples[reason]
    kept = whole.image_index != 2
    assert np.array_equal(corrupted.images, whole.images[kept]) and np.array_equal(
        corrupted.annotation_ids, whole.annotation_ids[kept]
    )
    assert reason not in val.skipped  # training images only
    assert corrupted.folder != whole.folder  # the good store is not taken for it, nor it for the good one
    again = open_split(resolve("demo", **common), "train", progress=False)
    assert again.folder == whole.folder and len(again) == len(whole)


def test_corrupted_files_cost_a_run_nothing_but_those_people(tiny):
    from refinelib.trainer import train

    run = train(tiny(run="corrupted", epochs=1, inject="file:truncated@1;file:missing@4"))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 0
    assert run.status()["rois"] < train(tiny(run="whole", epochs=1)).status()["rois"]
