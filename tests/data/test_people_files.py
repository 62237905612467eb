"""Annotation files as people's tools write them: the same people, or a count and a sentence."""

import contextlib
import json
import os
import pickle
import tempfile
import unicodedata
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import CocoFiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import in_memory
from PIL import Image
from pycocotools import mask as coco_mask

from refinelib.data import CocoPeople, DataError, open_store
from refinelib.data.annotations import CROWD, CROWD_KEPT, MARKED, NO_CATEGORY, NO_IMAGE, whole
from refinelib.data.coco import (
    BAD_POLYGON,
    ELSEWHERE,
    NOT_ITS_BOX,
    NOWHERE,
    PART_OF_BOX,
    SEVERAL,
    ImageFolder,
)
from refinelib.data.sources import (
    MISSING,
    NO_MASK,
    NOT_TURNED,
    OTHER_SIZE,
    TURNED,
    TWICE,
    UNREADABLE,
    SceneError,
)
from refinelib.modeling import IGNORED
from refinelib.modeling.roi import labels_from_coverage

OWN = dict(roi_size=(32, 32), mask_size=(32, 32), context=0.0, progress=False, workers=1)
PERSON, GROUND = 220, 40


def people_of(folder, count=3):
    """Images of grey value 40 with a person of 220 in each, in one folder a camera."""
    files = CocoFiles(folder)
    for number in range(count):
        box = 20 + number, 10, 52 + number, 42
        pixels = np.full((80, 100, 3), GROUND, np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = PERSON
        (files.images / "Café one").mkdir(exist_ok=True)
        files.person(files.image(pixels, f"Café one/{number}.png"), box)
    return files


def build(source, folder):
    return open_store(source, root=folder, **OWN)


def labels(store, row=0):
    return labels_from_coverage(torch.from_numpy(np.array(store.coverage[row]))).numpy()


def runs(segmentation, as_type=int):
    x0, y0, x1, _, _, y1, *_ = map(int, segmentation[0])
    mask = np.zeros((100, 80), bool)  # column by column
    mask[x0:x1, y0:y1] = True
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=False))
    return {"size": [80, 100], "counts": [as_type(n) for n in np.diff([0, *edges, 8000])]}


# -- the same people in another dress ----------------------------------------------------------------
def points(polygon):
    return [[x, y] for x, y in zip(polygon[::2], polygon[1::2], strict=True)]


def rename(entry, change):
    entry["file_name"] = change(entry["file_name"])


MASK = {
    "as COCO says": lambda a: None,
    "flat polygon": lambda a: a.update(segmentation=a["segmentation"][0]),
    "polygon of points": lambda a: a.update(segmentation=[points(a["segmentation"][0])]),
    "list of points": lambda a: a.update(segmentation=points(a["segmentation"][0])),
    "text numbers": lambda a: a.update(segmentation=[[str(x) for x in a["segmentation"][0]]]),
    "run lengths": lambda a: a.update(segmentation=runs(a["segmentation"])),
    "float run lengths": lambda a: a.update(segmentation=runs(a["segmentation"], float)),
    "one polygon too many": lambda a: a["segmentation"].append([1, 2, 3]),
}
ANNOTATION = {
    "no box": lambda a: a.pop("bbox"),
    "empty box": lambda a: a.update(bbox=[]),
    "no area": lambda a: a.pop("area"),
    "no crowd": lambda a: a.pop("iscrowd"),
    "crowd in words": lambda a: a.update(iscrowd="0"),
    "crowd as float": lambda a: a.update(iscrowd=0.0),
    "crowd is false": lambda a: a.update(iscrowd=False),
    "text image": lambda a: a.update(image_id=str(a["image_id"])),
    "float image": lambda a: a.update(image_id=float(a["image_id"])),
    "text category": lambda a: a.update(category_id="1"),
    "float category": lambda a: a.update(category_id=1.0),
    "several categories": lambda a: a.update(category_id=[7, 1]),
    "text id": lambda a: a.update(id=f"{a['id']}"),
}
IMAGE = {
    "no size": lambda e: (e.pop("width"), e.pop("height")),
    "half a size": lambda e: e.update(width=None),
    "size in words": lambda e: e.update(width=str(e["width"]), height=f"{e['height']}.0"),
    "text id": lambda e: e.update(id=str(e["id"])),
}
NAME = {
    "as COCO says": lambda e: None,
    "backslashes": lambda e: rename(e, lambda name: "images\\" + name.replace("/", "\\")),
    "folder above": lambda e: rename(e, lambda name: "data/images/" + name),
    "bare name": lambda e: rename(e, lambda name: name.split("/")[-1]),
    "quoted": lambda e: rename(e, quote),
    "URL": lambda e: rename(e, lambda name: f"https://host.org/a/images/{quote(name)}?v=1"),
    "upper case": lambda e: rename(e, str.upper),
    "decomposed": lambda e: rename(e, lambda name: unicodedata.normalize("NFD", name)),
    "LVIS": lambda e: e.update(coco_url=f"http://host.org/images/{quote(e.pop('file_name'))}"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of images, the content and the store of a file that is as COCO says."""
    folder = tmp_path_factory.mktemp("plain")
    files = people_of(folder / "data")
    return files, json.dumps(files.content), build(files.source(), folder / "stores")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_people_whatever_the_dress(plain, data):
    """Any mixture of dresses, another one for each image and annotation."""
    files, text, want = plain
    content = json.loads(text)
    for part, dresses in (("images", IMAGE), ("annotations", ANNOTATION)):
        for entry in content[part]:
            for name in data.draw(st.sets(st.sampled_from([*dresses]), max_size=3), label=part):
                with contextlib.suppress(KeyError):  # another one has taken the field away
                    dresses[name](entry)
            exclusive = MASK if part == "annotations" else NAME
            exclusive[data.draw(st.sampled_from([*exclusive]))](entry)
    more = data.draw(st.sampled_from([[], [{"id": 9, "name": "person"}], [{"id": "x", "name": "Person "}]]))
    content["categories"] += more
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    ascii_only = encoding == "latin-1" and "\u0301" in json.dumps(content, ensure_ascii=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "people.json"
        file.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding=encoding)
        store = build(CocoPeople(file, files.images), Path(folder) / "stores")
        assert store.skipped == {} and set(store.info.notes) <= {BAD_POLYGON}, store.examples
        for name in ("images", "coverage", "boxes", "areas", "image_ids", "annotation_ids"):
            assert np.array_equal(getattr(store, name), getattr(want, name)), name
        del store


def test_ids_that_are_no_numbers(tmp_path):
    files = people_of(tmp_path / "data")
    for entry in (*files.content["images"], *files.content["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"frame_{entry[key]}"
    for one in files.content["categories"]:
        one["id"] = one["name"]
    for one in files.content["annotations"]:
        one["category_id"] = "person"
    source = files.source()
    assert len(source.instances()) == 3 and source.instances().skipped == {}
    assert set(source.as_written["image_id"].values()) == {"frame_1", "frame_2", "frame_3"}
    number = source.annotated_instances(0)[0]["category_id"]
    assert source.as_written["category_id"][number] == "person"


def test_texts_that_number_in_another_way_are_texts(tmp_path):
    """Video and frame "1_12", hexadecimal "0e1", "007" beside "7": each is an id of its own."""
    files = people_of(tmp_path / "data", 6)
    texts = ["1_12", "11_2", "0e1", "0e2", "007", "7"]
    for entry, one, text in zip(files.content["images"], files.content["annotations"], texts, strict=True):
        entry["id"] = one["image_id"] = text
    source = files.source()
    found = source.instances()
    own = [source.as_written["image_id"][number] for number in found.image_ids.tolist()]
    assert sorted(own) == sorted(texts) and 7 in found.image_ids and not found.skipped
    files.content["annotations"][0]["image_id"] = "1e2"
    assert files.source().instances().skipped == {NO_IMAGE: 1}


@given(st.one_of(st.integers(), st.floats(), st.text(max_size=6), st.booleans(), st.none(), st.binary()))
def test_whole(value):
    found = whole(value)
    if isinstance(value, bool) or value is None or isinstance(value, bytes):
        assert found is None
    elif isinstance(value, (int, float)):
        same = value == value and abs(value) < 2**63 and value == int(value)
        assert found == (int(value) if same else None)
    elif found is not None:
        assert value.removesuffix(".0").rstrip("0").rstrip(".") == str(found).rstrip("0")


# -- whose file is it --------------------------------------------------------------------------------
def touched(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return ImageFolder(folder)


@pytest.mark.parametrize(
    "name, file",
    [
        ("cam1/1.png", "cam1/1.png"),
        ("data\\cam2\\1.png", "cam2/1.png"),
        ("https://host/x/cam2/1.png", "cam2/1.png"),
        ("2.png", "deep/er/2.png"),
        ("er/2.png", "deep/er/2.png"),
        ("x/3.png", "backup/x/3.png"),
        ("set/images/3.png", "3.png"),
        ("4.PNG", "4.png"),
        ("5.png", "5.png"),
        ("a/5.PNG", "5.PNG"),
        ("my%20file.png", "my file.png"),
        ("100%.png", "100%.png"),
    ],
)
def test_the_longest_common_end_wins(tmp_path, name, file):
    there = ("cam1/1.png", "cam2/1.png", "deep/er/2.png", "3.png", "backup/x/3.png", "4.png", "5.png")
    folder = touched(tmp_path / "images", *there, "5.PNG", "my file.png", "100%.png", "._4.png")
    assert folder.find(name) == tmp_path / "images" / file


@pytest.mark.parametrize(
    "name, reason, told",
    [
        ("1.png", SEVERAL, "cam1/1.png and .*cam2/1.png: write more of the path"),
        ("cam3/1.png", MISSING, "there is no image file .*cam3/1.png"),
        ("er/1.png", MISSING, "there is no image file"),
    ],
)
def test_nobody_else_s_file(tmp_path, name, reason, told):
    folder = touched(tmp_path / "images", "cam1/1.png", "cam2/1.png")
    with pytest.raises(SceneError, match=told) as error:
        folder.find(name)
    assert error.value.reason == reason


def test_many_folders_of_the_same_names(tmp_path):
    """The search takes no longer for each where thousands share a name; a link beside its target is one."""
    names = [f"s{number}/0001.png" for number in range(3000)]
    folder = touched(tmp_path / "images", *names)
    (tmp_path / "images" / "link").symlink_to(tmp_path / "images" / "s7")
    looked = []
    for name in names[::100]:
        assert folder.find(f"frames/{name}") == tmp_path / "images" / name
        looked.append(len(folder._files[tuple(name.split("/"))]))
    assert max(looked) == 1
    assert folder.find("x/s7/0001.png").parent.resolve().name == "s7"


@pytest.mark.parametrize("names", [("1.png", "1.png"), ("cam1/1.png", "cam2/1.png"), ("1.png", "1.PNG")])
def test_a_file_that_two_entries_name_is_neither_s(tmp_path, names):
    files = people_of(tmp_path / "data", 2)
    Image.new("RGB", (100, 80)).save(files.images / "1.png")
    for name in names:
        files.person(len(files.content["images"]) + 1, (30, 30, 60, 70))
        files.content["images"].append(
            dict(id=len(files.content["images"]) + 1, file_name=name, height=80, width=100)
        )
    store = build(files.source(), tmp_path)
    assert len(store) == 2 and store.skipped == {TWICE: 2}
    told = store.examples[TWICE]
    assert "image 3" in told and "image 4" in told and all(repr(name) in told for name in names)
    files.content["images"], files.content["annotations"] = (
        files.content[part][2:] for part in ("images", "annotations")
    )
    with pytest.raises(DataError, match="no person that can be used: image file that two .*image 3.*image 4"):
        files.source().instances()


NAMES = {
    "a file that was missing": ("9.png", [], ["9.png"]),
    "one in a folder": ("9.png", [], ["sub/9.png"]),
    "one of another case": ("9.png", [], ["9.PNG"]),
    "one closer to the name": ("x/9.png", ["9.png"], ["x/9.png"]),
    "a second that fits": ("9.png", ["sub/9.png"], ["other/9.png"]),
}


@pytest.mark.parametrize("name, before, after", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("sized", [True, False])
def test_a_store_follows_what_a_name_means(tmp_path, name, before, after, sized):
    files = people_of(tmp_path / "data", 2)
    size = dict(height=80, width=100) if sized else {}
    files.person(3, (30, 30, 60, 70))
    files.content["images"].append(dict(id=3, file_name=name, **size))

    def put(place, grey):
        (files.images / place).parent.mkdir(exist_ok=True)
        Image.new("L", (100, 80), grey).save(files.images / place)

    def store():
        return build(CocoPeople(files.annotations, files.images), tmp_path / "stores")

    files.source()
    for place in before:
        put(place, 100)
    first = store()
    for place in after:
        put(place, 200)
    second = store()
    several = len(before) and "other" in after[0]
    assert len(first) == (3 if before else 2) and len(second) == (2 if several else 3)
    assert several or np.median(second.images[-1]) == 200
    (files.images / "unrelated.png").touch()
    assert store().folder.stat().st_ino == second.folder.stat().st_ino


def test_an_annotation_file_of_the_same_size_and_time(tmp_path):
    files = people_of(tmp_path / "data")
    source, times = files.source(), files.annotations.stat()
    assert len(build(source, tmp_path / "stores")) == 3
    text = files.annotations.read_text().replace('"category_id": 1', '"category_id": 7', 1)
    files.annotations.write_text(text)
    os.utime(files.annotations, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = CocoPeople(files.annotations, files.images)
    assert len(build(source, tmp_path / "stores")) == 3  # read before, and known by that
    assert len(build(again, tmp_path / "stores")) == 2


# -- masks and boxes -------------------------------------------------------------------------------------
def test_a_part_that_cannot_be_drawn_is_ignored(tmp_path):
    files = CocoFiles(tmp_path / "data")
    half, far = [20, 10, 36, 10, 36, 42, 20, 42], [36, 10, 52, 10, 99999, 42]
    files.person(files.image((80, 100)), (20, 10, 52, 42), [half, far])
    files.person(files.image((80, 100)), (20, 10, 52, 42), [half, [1, 2, 3, 4]])
    store = build(files.source(), tmp_path)
    assert store.info.notes == {BAD_POLYGON: 2} and not store.skipped
    assert (labels(store)[:, 16:] == IGNORED).all() and (labels(store)[:, :16] == 1).all()
    assert (labels(store, 1)[:, 16:] == 0).all()  # two points cover nothing


@pytest.mark.parametrize(
    "box, kind",
    [
        ([20, 10, 52, 42], PART_OF_BOX),  # x, y, x, y
        ([36, 26, 32, 32], NOT_ITS_BOX),  # centre
        ([10, 60, 32, 32], NOT_ITS_BOX),
        ([19.5, 9.5, 33, 33], None),
    ],
)
def test_masks_that_are_not_their_boxes(tmp_path, box, kind):
    files = people_of(tmp_path / "data")
    files.content["annotations"][0]["bbox"] = box
    store = build(files.source(), tmp_path)
    assert store.info.notes == ({kind: 1} if kind else {})
    assert len(store) == (2 if kind == NOT_ITS_BOX else 3)
    assert kind is None or "annotation 100" in store.examples[kind]


@pytest.mark.parametrize(
    "spot",
    [
        [[99, 79, 99.9, 79, 99.9, 79.9]],
        [[40, 20, 62, 20, 62, 24, 40, 24]],
        [[60, 60, 75, 60, 75, 70, 60, 70]],
    ],
)
def test_a_mask_that_reaches_beyond_its_box_is_the_person_s(tmp_path, spot):
    """A stray pixel, an arm, a second part: most of the mask lies inside."""
    files = people_of(tmp_path / "data")
    files.content["annotations"][0]["segmentation"] += spot
    store = build(files.source(), tmp_path)
    assert len(store) == 3 and store.info.notes == {} and (labels(store) == 1).all()


BAD_RLE = {"size": [80, 100], "counts": "zzzz"}


@pytest.mark.parametrize(
    "fields, known",
    [
        (dict(iscrowd=1, segmentation=BAD_RLE, bbox=[36, 10, 16, 16]), True),
        (dict(iscrowd=1, segmentation={"size": [80, 100], "counts": [8000]}, bbox=[36, 10, 16, 16]), True),
        (dict(iscrowd=1, segmentation=BAD_RLE, bbox=None), False),
        (dict(iscrowd=1, segmentation=[[36, 10, 52, 10, 52, 26], [1, 2, 3, 4, 5, 6, 7]], bbox=None), False),
        (dict(iscrowd=1, segmentation=[], bbox=[0.1, 0.2, 0.2, 0.5]), False),
        (dict(iscrowd=1, segmentation=[], bbox=[300, 10, 50, 50]), False),
        (dict(segmentation=BAD_RLE, bbox={"x": 1}), False),
        (dict(segmentation=BAD_RLE, bbox=[300, 10, 50, 50]), False),
    ],
)
def test_a_place_is_known_where_something_can_be_drawn(tmp_path, fields, known):
    def other(files, image):
        files.person(image, (0, 0, 1, 1), **{"segmentation": [], **fields})

    store = build(with_neighbour(tmp_path / "data", other).source(), tmp_path)
    assert (
        len(store) == 1 and (labels(store)[:, :16] == 1).all() and (labels(store)[:16, 16:] == IGNORED).all()
    )
    assert (labels(store)[16:, 16:] == (0 if known else IGNORED)).all()
    assert store.info.notes.get(NOWHERE, 0) == (not known)


def test_who_is_somewhere_makes_all_of_the_image_unknown(tmp_path):
    def nowhere(files, image):
        files.person(image, (0, 0, 1, 1), segmentation="lost", bbox={"x": 1})

    store = build(with_neighbour(tmp_path / "data", nowhere).source(), tmp_path)
    assert store.info.notes == {NOWHERE: 1} and store.skipped == {NO_MASK: 1}
    assert (labels(store)[:, :16] == 1).all() and (labels(store)[:, 16:] == IGNORED).all()


def test_a_mask_of_gigabytes_is_not_decoded(tmp_path):
    files = people_of(tmp_path / "data")
    side = 2**31 - 1
    files.content["images"][0].update(height=side, width=side)
    files.content["annotations"][0]["segmentation"] = {"size": [side, side], "counts": [0, side * side]}
    del files.content["annotations"][0]["bbox"]
    with in_memory(30):
        assert build(files.source(), tmp_path).skipped == {NO_MASK: 1}


# -- ignored is not background -----------------------------------------------------------------------
def with_neighbour(folder, neighbour, count=1):
    """One person of 32 x 32, and to the right half of it something else."""
    files = CocoFiles(folder)
    for _ in range(count):
        image = files.image((80, 100))
        files.person(image, (20, 10, 52, 42), [[20, 10, 36, 10, 36, 42, 20, 42]], area=512)
        neighbour(files, image)
    return files


CROWD_MASK = [[36, 10, 52, 10, 52, 26, 36, 26]]  # the upper right quarter


@pytest.mark.parametrize(
    "more, reason, where",
    [
        (dict(iscrowd=1, segmentation=CROWD_MASK), CROWD, (slice(0, 16), slice(16, 32))),
        (dict(iscrowd=1, segmentation=[], bbox=[36, 10, 16, 16]), CROWD, (slice(0, 16), slice(16, 32))),
        (dict(segmentation=[], bbox=[36, 10, 16, 16]), NO_MASK, (slice(0, 16), slice(16, 32))),
        (dict(segmentation=[[1, 2, 3]], bbox=[30, 10, 22, 16]), NO_MASK, (slice(0, 16), slice(16, 32))),
        (dict(segmentation=[[36, 50, 36, 50, 36, 50]], bbox=[36, 10, 16, 16]), NO_MASK, None),
    ],
)
def test_who_has_no_mask_is_ignored(tmp_path, more, reason, where):
    files = with_neighbour(tmp_path / "data", lambda files, image: files.person(image, (0, 0, 1, 1), **more))
    store = build(files.source(), tmp_path)
    assert store.skipped.get(reason) == 1 and len(store) == 1
    want = np.zeros((32, 32), int)
    want[:, :16] = 1
    want[slice(0, 16) if where is None else where[0], 16:] = IGNORED
    if where is None:  # a polygon of one point: pycocotools may draw it or not, and its box is ignored then
        assert set(np.unique(labels(store))) <= {0, 1, IGNORED}
    else:
        assert store.ignores and np.array_equal(labels(store), want)
        assert store.info.ignored == pytest.approx(0.25) and "25.00% of all cells ignored" in store.summary()


@pytest.mark.parametrize("small", [(36, 10, 46, 26), (36, 10, 52, 26)])
def test_who_is_left_out_is_somebody_else(tmp_path, small):
    """A person too small to be a ROI, and the eleventh: their masks are known."""

    def crowd(files, image):
        files.person(image, small, area=1)
        for number in range(9):
            files.person(image, (60, 10 + number, 90, 60 + number))

    store = build(with_neighbour(tmp_path / "data", crowd).source(), tmp_path)
    assert sum(store.skipped.values()) == 1 and not store.ignores
    assert (labels(store)[: small[3] - 10, 16 : small[2] - 20] == 2).all()


def test_crowds_of_which_all_are_marked(tmp_path):
    """Some tools mark every mask; COCO marks regions of many people."""
    marked = with_neighbour(tmp_path / "a", lambda *_: None)
    for one in marked.content["annotations"]:
        one["iscrowd"] = 1
    store = build(marked.source(), tmp_path / "a")
    assert (
        len(store) == 1
        and store.info.notes == {CROWD_KEPT: 1}
        and "set crowd to skip" in store.summary() + str(store.examples)
    )
    skipping = CocoPeople(marked.annotations, marked.images, crowd="skip")
    with pytest.raises(DataError, match="set crowd to keep if each is a single person"):
        skipping.instances()

    def other(files, image):
        files.person(image, (36, 10, 52, 26), CROWD_MASK, iscrowd=1)

    mixed = with_neighbour(tmp_path / "b", other, count=3)
    assert build(mixed.source(), tmp_path / "b").skipped == {CROWD: 3}
    kept = build(CocoPeople(mixed.annotations, mixed.images, crowd="keep"), tmp_path / "b")
    assert len(kept) == 6 and (labels(kept)[:16, 16:] == 2).all() and not kept.skipped


# -- EXIF --------------------------------------------------------------------------------------------
def turned(files, orientation, size):
    """The image stored turned, as a phone does, and the entry with the size ``size``."""
    entry = files.content["images"][0]
    upright = Image.open(files.images / entry["file_name"])
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(back).save(files.images / entry["file_name"], exif=exif)
    entry.update(width=size[0], height=size[1])


@pytest.mark.parametrize(
    "orientation, exif, note", [(3, "ignore", NOT_TURNED), (3, "apply", None), (6, "ignore", TURNED)]
)
@pytest.mark.parametrize("sized", [True, False])
def test_orientation(tmp_path, orientation, exif, note, sized):
    files = people_of(tmp_path / "data", 1)
    turned(files, orientation, (100, 80))
    if not sized and orientation == 3:
        files.content["images"][0].pop("width")
    files.source()
    store = build(CocoPeople(files.annotations, files.images, exif=exif), tmp_path)
    assert store.info.notes == ({note: 1} if note else {})
    assert store.images.mean() == (PERSON if note != NOT_TURNED else pytest.approx(GROUND, abs=90))
    if note == NOT_TURNED:
        assert store.images.mean() < PERSON - 20 and "set exif to apply" in store.examples[note]
        assert "noted: image whose EXIF orientation was not applied (1)" in store.summary()


def test_tiff_files_are_always_turned(tmp_path):
    files = people_of(tmp_path / "data", 1)
    files.content["images"][0]["file_name"] = "a.tiff"
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = Image.open(files.images / "Caf\u00e9 one/0.png")
    upright.transpose(Image.Transpose.ROTATE_180).save(files.images / "a.tiff", exif=exif)
    store = build(files.source(), tmp_path)
    assert (store.images == PERSON).all()


def test_sizes_that_fit_no_orientation(tmp_path):
    files = people_of(tmp_path / "data", 1)
    turned(files, 6, (99, 80))
    with pytest.raises(DataError, match="has 80x100 pixels, its annotation says 99x80"):
        build(files.source(), tmp_path)


# -- categories --------------------------------------------------------------------------------------
def test_people_called_otherwise(tmp_path):
    files = people_of(tmp_path / "data")
    files.content["categories"] = [{"id": 1, "name": "pedestrian"}, {"id": 2, "name": "rider"}]
    files.content["annotations"][0]["category_id"] = 2
    files.content["annotations"][1]["category_id"] = "unheard of"
    with pytest.raises(DataError, match="no category 'person'; .* pedestrian, rider: set category to"):
        files.source().instances()
    several = CocoPeople(files.annotations, files.images, category="Pedestrian, rider")
    assert len(several.instances()) == 2 and several.instances().skipped == {NO_CATEGORY: 1}
    one = CocoPeople(files.annotations, files.images, category="pedestrian")
    assert len(one.instances()) == 1


def test_categories_of_one_id_are_refused(tmp_path):
    files = people_of(tmp_path / "data")
    files.content["categories"] = [{"id": 1, "name": "person"}, {"id": "1", "name": "car"}]
    with pytest.raises(DataError, match="two categories of id 1, 'person' and 'car': give each an id"):
        files.source().instances()


def test_what_is_marked_to_be_ignored_is_never_a_person(tmp_path):
    """Whatever ``crowd`` says, and however many are."""
    files = people_of(tmp_path / "data", 10)
    for one in files.content["annotations"][1:]:
        one["ignore"] = 1
    for one in files.content["annotations"]:
        one["iscrowd"] = 1
    files.source()
    for crowd in ("auto", "keep"):
        found = CocoPeople(files.annotations, files.images, crowd=crowd).instances()
        assert found.skipped == {MARKED: 9} and len(found) == 1


@pytest.mark.parametrize("mark", [{"iscrowd": "true"}, {"iscrowd": "1"}, {"is_crowd": True}])
def test_marks_in_other_dress(tmp_path, mark):
    files = people_of(tmp_path / "data")
    files.content["annotations"][0].update(mark)
    assert build(files.source(), tmp_path).skipped == {CROWD: 1}


def test_a_list_that_stands_twice_is_refused(tmp_path):
    files = people_of(tmp_path / "data")
    source = files.source()
    files.annotations.write_text('{"annotations": [], ' + files.annotations.read_text()[1:])
    with pytest.raises(DataError, match="a list stands in it twice"):
        source.instances()


@pytest.mark.parametrize("name", ["http://[bad/9.png", "http://\u2100/x.png", "://", "http://", "a://?#"])
def test_a_name_that_is_no_url(tmp_path, name):
    files = people_of(tmp_path / "data")
    files.content["images"][0]["file_name"] = name
    assert build(files.source(), tmp_path).skipped in ({MISSING: 1}, {UNREADABLE: 1})


def test_the_error_has_up_to_three_examples(tmp_path):
    files = people_of(tmp_path / "data", 4)
    first, second, third, fourth = files.content["annotations"]
    first.pop("segmentation"), second.update(image_id=99), third.update(bbox=[0, 0, 2, 2])
    fourth.update(segmentation="a mask")
    with pytest.raises(DataError) as error:
        files.source().instances()
    told = str(error.value)
    assert (
        "annotation 100 of image 1 in instances.json: None is no mask" in told
        and "annotation 101, image 99" in told
    )
    assert told.count(": ") >= 3 and "such as" in told and len(told) < 1500


@pytest.mark.parametrize("field, want", [("image_id", "frame_2"), ("category_id", "p")])
def test_results_carry_the_file_s_own_ids(tmp_path, field, want):
    from refinelib.build import build_model
    from refinelib.config import Settings
    from refinelib.metrics.evaluate import measure
    from refinelib.metrics.predict import Predictor

    files = people_of(tmp_path / "data")
    for one in files.content["images"]:
        one["id"] = f"frame_{one['id']}"
    for one in files.content["annotations"]:
        one.update(image_id=f"frame_{one['image_id']}", category_id="p")
    files.content["categories"] = [{"id": "q", "name": "person"}, {"id": "p", "name": "person"}]
    files.source()
    own = Settings(roi_size=32, mask_size=32, width=0.0625, context=0.0)
    predictor = Predictor(build_model(own), own, path=Path("none.pt"), mean_coverage=torch.zeros(32, 32, 2))
    found = measure(predictor, images=files.images, annotations=files.annotations)
    assert [one[field] for one in found.results][1] == want and len(found.results) == 3
    assert found.report["coco"]["resolution_bound"]["AP"] == pytest.approx(1.0)


def test_what_is_ignored_scores_nothing(tmp_path):
    """Pixels of a crowd beside a person change no figure, whatever the model says there."""
    from refinelib.build import build_model
    from refinelib.config import Settings
    from refinelib.metrics.evaluate import measure
    from refinelib.metrics.predict import Predictor

    def crowd(files, image):
        files.person(image, (36, 10, 52, 26), CROWD_MASK, iscrowd=1)

    files = with_neighbour(tmp_path / "data", crowd)
    files.source()
    own = Settings(roi_size=32, mask_size=32, width=0.0625, context=0.0)
    predictor = Predictor(build_model(own), own, path=Path("none.pt"), mean_coverage=torch.zeros(32, 32, 2))
    everywhere = torch.zeros(1, 3, 32, 32)
    everywhere[:, 1] = 1.0
    everywhere[:, :, 16:, 16:] = torch.tensor([1.0, 0.0, 0.0]).view(
        3, 1, 1
    )  # the target, and all of the crowd
    predictor.roi_probs = lambda images: everywhere.expand(len(images), -1, -1, -1)
    predictor.probs = lambda image, boxes: everywhere
    found = measure(predictor, images=files.images, annotations=files.annotations)
    assert found.report["target_iou"] == found.report["image"]["target_iou"] == 1.0
    assert found.report["coco"]["AP"] == pytest.approx(1.0)
    whole_mask = coco_mask.decode(found.results[0]["segmentation"])
    assert whole_mask[10:26, 20:52].all()  # what is saved is what was predicted
    assert found.report["ignored"] == pytest.approx(0.25) and found.confusion.sum() == 32 * 32 * 3 / 4


# -- damaged at random -------------------------------------------------------------------------------
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.lists(st.floats() | st.integers(-9, 200), max_size=7),
    st.sampled_from(["1", "1.0", "-1", "person", "001.png", "../x.png", "9" * 5000, [[1, 2], [3, 4]], 1e308]),
)


#: Reasons for which an image is left out, and all people in it.
OF_IMAGES = (MISSING, UNREADABLE, OTHER_SIZE, TWICE, ELSEWHERE, SEVERAL)


def changed(draw, content):
    """One random change somewhere in the content."""
    part = draw(st.sampled_from(["images", "annotations", "annotations", "categories"]))
    entries = content[part]
    if not entries:
        return
    place = draw(st.integers(0, len(entries) - 1))
    what = draw(st.sampled_from(["drop", "field", "field", "field", "entry", "double", "inside"]))
    entry = entries[place]
    if what == "drop" or not isinstance(entry, dict):
        del entries[place]
    elif what == "entry":
        entries[place] = draw(VALUES)
    elif what == "double":
        entries.append(json.loads(json.dumps(entry)))
    elif entry:
        name = draw(st.sampled_from(sorted(entry)))
        if what == "inside" and isinstance(entry[name], list) and entry[name]:
            inner = entry[name][0] if isinstance(entry[name][0], list) and entry[name][0] else entry[name]
            inner[draw(st.integers(0, len(inner) - 1))] = draw(VALUES)
        elif draw(st.booleans()):
            entry[name] = draw(VALUES)
        else:
            del entry[name]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_ends_in_a_count_or_a_sentence(plain, data):
    check_damaged(plain, data.draw, data.draw(st.integers(1, 4)))


def check_damaged(plain, draw, changes):
    files, text, _ = plain
    content = json.loads(text)
    for _ in range(changes):
        changed(draw, content)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "people.json"
        file.write_text(json.dumps(content))
        try:
            store = build(CocoPeople(file, files.images), Path(folder) / "stores")
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) < 5000
            return
        # Every annotation is used, of another known category, or counted, by itself or with its image.
        people = len(content["annotations"]) - of_others(content)
        of_images = sum(store.skipped.get(reason, 0) for reason in OF_IMAGES)  # each may have had them all
        assert len(store) + sum(store.skipped.values()) + of_images * (people - 1) >= people
        assert np.isfinite(store.boxes).all() and (store.areas > 0).all()
        del store


def of_others(content):
    """Annotations of categories that are listed and are no persons."""
    ids = [
        whole(one.get("id")) if whole(one.get("id")) is not None else one.get("id")
        for one in content["categories"]
        if isinstance(one, dict) and str(one.get("name")).strip().lower() != "person"
    ]
    found = 0
    for one in content["annotations"]:
        kinds = one.get("category_id") if isinstance(one, dict) else None
        kinds = kinds if isinstance(kinds, list) else [kinds]
        found += any((whole(kind) if whole(kind) is not None else kind) in ids for kind in kinds)
    return found


def test_notes_and_ignored_pixels_survive_a_copy(tmp_path):
    """``Store.first_images`` and pickling keep the third channel."""

    def crowd(files, image):
        files.person(image, (36, 10, 52, 26), CROWD_MASK, iscrowd=1)

    store = build(with_neighbour(tmp_path / "data", crowd, count=3).source(), tmp_path)
    for part in (store.first_images(2), pickle.loads(pickle.dumps(store))):
        assert part.ignores and part.gather([1])[1].shape == (1, 32, 32, 3)
        assert part.mean_coverage().shape == (32, 32, 2)
