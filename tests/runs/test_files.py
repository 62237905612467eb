"""Side files: written whole or not at all; read in the stated memory, or refused in a sentence."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import in_memory, read_in_little_memory

from refinelib import files

MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# -- writing ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old", "new ä"), ("wb", b"old", b"new")])
def test_a_file_is_replaced_once_it_is_on_disk(tmp_path, monkeypatch, mode, old, new):
    file, order = tmp_path / "a.txt", []
    monkeypatch.setattr(files.os, "fsync", lambda number: order.append("fsync"))
    real = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), real(a, b)))
    for content in (old, new):
        with files.replacing(file, mode) as half:
            half.write(content)
            assert [path.name for path in tmp_path.glob(".*")] == [f".a.txt.{os.getpid()}.tmp"]
    assert order == ["fsync", "replace"] * 2
    assert file.read_bytes() == (new if mode == "wb" else new.encode()) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error):
    file = tmp_path / "a.txt"
    files.write_atomically(file, "old")
    with pytest.raises(type(error)), files.replacing(file) as half:
        half.write("ne")
        raise error
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_held_by_one_process_and_free_afterwards(tmp_path):
    busy = ValueError("busy")
    first, second = files.exclusive(tmp_path, busy), files.exclusive(tmp_path, busy)
    with first, pytest.raises(ValueError, match="busy"), second:
        pass
    with files.exclusive(tmp_path, busy):
        pass
    (tmp_path / "file").touch()
    with files.exclusive(tmp_path / "file", busy):  # no lock can be made there: it is done without
        pass


def test_nothing_is_replaced_in_another_way():
    """One place for temporary files; the store's builder replaces a folder, a download goes on in its own."""
    root = files.Path(files.__file__).parent
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if "os.replace(" in file.read_text()}
    assert found <= {"files.py", "data/store_build.py", "data/store.py", "workflows/fetch.py"}


# -- JSON ------------------------------------------------------------------------------------------
DAMAGED = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "text": b"hello",
    "nested": b"[" * 100_000,
    "digits": b'{"a": ' + b"7" * 5000 + b"}",
    "negative": b'{"a": -' + b"7" * 5000 + b"}",
    "exponent": b'{"a": 1e999}',
    "nan": b'{"a": NaN}',
    "infinity": b"[-Infinity]",
    "utf8": b'{"a": "\xff\xfe"}',
    "large": b" " * (files.JSON + 1),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json_is_told_in_a_sentence(tmp_path, name):
    file = tmp_path / "status.json"
    file.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"status\.json is damaged: ") as caught:
        files.read_json(file)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_json_that_is_whole_is_read(tmp_path):
    file = tmp_path / "a.json"
    content = {"a": [1, -2.5, None, True, "ä", 2**62], "b": {}}
    file.write_text(json.dumps(content))
    assert files.read_json(file) == content
    with pytest.raises(ValueError, match="more than 3"):
        files.read_json(file, limit=3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.read_json(tmp_path / "nowhere.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):  # and not waited for
        files.read_json(tmp_path / "pipe")


@MANY
@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    try:
        files.read_json(tmp_path / "a.json")
    except ValueError as error:
        assert "a.json is damaged" in str(error)


def test_lines_that_hold_no_record_are_counted(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes(b"\n".join([
        b'{"step": 1}', b"5", b"", b"\xff", b"[" * 100_000, b'{"step": 2}',
        b'{"a": "' + b"x" * 3 * files.LINE + b'"}', b'{"step": 3}', b'{"step": ' + b"9" * 5000 + b"}",
        b'{"st',
    ]))  # fmt: skip
    records, damaged = files.read_lines(file)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert damaged == [2, 3, 4, 5, 7, 9]  # the last is still being written
    assert files.read_lines(file, lambda record: record["step"] != 2)[1] == [2, 3, 4, 5, 6, 7, 9]
    assert files.read_lines(tmp_path / "nowhere") == ([], [])


def test_a_long_line_takes_no_memory(tmp_path):
    file = tmp_path / "m.jsonl"
    with open(file, "wb") as out:
        out.truncate(200 << 20)  # zeros, and no end of a line
    with in_memory(8 * files.LINE / 1e6):
        assert files.read_lines(file) == ([], [1])


# -- YAML ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1, 2", "in line"),
        ("lr: " + "[" * 20_000, "nested too deep"),
        ("lr: " + "7" * 5000, "digits"),
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: 1\n" * 20_000, "more than"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!bool x", ""),
        ("a: !!timestamp x", ""),
        ("a: 2001-99-99", ""),
        ("? [a]\n: 1", "unhashable"),
        ("a: \x00", ""),
    ],
)
def test_hostile_yaml_is_told_in_a_sentence(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="mine.yaml is not valid YAML") as caught:
        files.read_yaml(file)
    assert words in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_plain_yaml_is_read():
    assert files.parse_yaml("a: {lr: 1e-3, on: off}\nb: [1]") == {"a": {"lr": "1e-3", True: False}, "b": [1]}
    assert files.parse_yaml("") is None and files.parse_yaml("[64, 48]") == [64, 48]


# -- what a sentence shows ---------------------------------------------------------------------------
def test_long_values_are_cut():
    nested = []
    nested.append(nested)
    for value in ("x" * 10**7, 10**5000, ["x" * 10**6], nested, {"a": 10**5000}):
        assert len(files.shown(value)) < 150
    assert files.shown(5e-6) == "5e-06" and files.shown("ten") == "'ten'"
    assert len(files.reason(ValueError("x\n" * 10**6))) < 250 and files.reason(KeyError()) == "KeyError"


# -- arrays ------------------------------------------------------------------------------------------
SHAPES = {"names": "U P", "norms": "f nP", "steps": "iu n", "size?": "iu 2"}


def whole(file) -> dict[str, np.ndarray]:
    content = {
        "names": np.array(["a", "b", "c"]),
        "norms": np.random.default_rng(0).random((5, 3)),
        "steps": np.arange(5),
        "size": np.array([4, 6]),
    }
    np.savez_compressed(file, **content)
    return content


def claiming(file, header: dict | bytes, data: bytes = bytes(80), how=zipfile.ZIP_DEFLATED) -> None:
    """An .npz with one array that says of itself what it likes."""
    text = header if isinstance(header, bytes) else repr(header).encode()
    text = text.ljust(118 if len(text) < 118 else len(text)) + b"\n"
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("norms.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)


def head(descr="<f8", shape=(10,)) -> dict:
    return {"descr": descr, "fortran_order": False, "shape": shape}


def bomb(file) -> None:
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("norms.npy", "w") as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))


def lying(file) -> None:
    """The list of members says that one takes 200 bytes; it takes 300 MB."""
    bomb(file)
    data = bytearray(file.read_bytes())
    at = data.rfind(b"PK\1\2") + 24
    data[at : at + 4] = (200).to_bytes(4, "little")
    file.write_bytes(data)


HOSTILE = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello"),
    "zeros": lambda file: file.write_bytes(bytes(10_000)),
    "npy": lambda file: file.write_bytes(b"\x93NUMPY\x01\x00"),
    "bomb": bomb,
    "lying": lying,
    "160 GB": lambda file: claiming(file, head(shape=(20 * 10**9,))),
    "160 GB of one": lambda file: claiming(file, head("|V160000000000", (1,))),
    "160 GB in rows": lambda file: claiming(file, head(("<f8", (10**5, 10**5)), (2,))),
    "nothing, often": lambda file: claiming(file, head("|V0", (10**12,))),
    "overflow": lambda file: claiming(file, head(shape=(2**33, 2**33))),
    "below nothing": lambda file: claiming(file, head(shape=(-10,))),
    "objects": lambda file: np.savez(file, norms=np.array([{}], dtype=object)),
    "code": lambda file: claiming(file, b"__import__('os').getpid()"),
    "deep": lambda file: claiming(file, b"(" * 5000),
    "digits": lambda file: claiming(
        file, b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"7" * 5000 + b",)}"
    ),
    "bz2": lambda file: claiming(file, head(), how=zipfile.ZIP_BZIP2),
    "lzma": lambda file: claiming(file, head(), how=zipfile.ZIP_LZMA),
    "members": lambda file: [
        archive := zipfile.ZipFile(file, "w"),
        *(archive.writestr(str(i), b"") for i in range(100_000)),
        archive.close(),
    ],
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """What reading each hostile file gave."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, write in HOSTILE.items():
        write(folder / f"{name}.npz")
    prepare = "import numpy as np; from numpy.lib import format; from refinelib import files"
    return read_in_little_memory(folder, prepare, "files.read_npz(file, {'norms': 'f n'})", megabytes=400)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_told_in_a_sentence_and_take_no_memory(hostile, name):
    kind, sentence, _ = hostile[name]
    assert kind == "ValueError" and f"{name}.npz is damaged: " in sentence and len(sentence) < 400
    assert (
        "allocate" not in sentence and sentence.rpartition(": ")[2] != "MemoryError"
    )  # it was never asked for


def test_whole_arrays_are_read_and_may_be_written_to(tmp_path):
    content = whole(tmp_path / "a.npz")
    found = files.read_npz(tmp_path / "a.npz", SHAPES)
    assert found.keys() == content.keys() and all((found[name] == content[name]).all() for name in content)
    found["norms"][0] = 0
    with pytest.raises(ValueError, match="more than 100"):
        files.read_npz(tmp_path / "a.npz", budget=100)
    with pytest.raises(FileNotFoundError):
        files.read_npz(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"names": None}, "lacks names"),
        ({"size": None}, None),
        ({"steps": np.arange(4)}, "steps is int64"),
        ({"norms": np.zeros((5, 2))}, "norms is float64"),
        ({"norms": np.zeros(5)}, "norms is float64"),
        ({"steps": np.array(["a"] * 5)}, "steps is <U1"),
        ({"steps": np.arange(0), "norms": np.zeros((0, 3))}, "norms is"),
        ({"size": np.arange(3)}, "size is"),
    ],
)
def test_arrays_of_another_kind_or_shape_are_refused(tmp_path, changed, words):
    content = {
        name: array for name, array in (whole(tmp_path / "a.npz") | changed).items() if array is not None
    }
    if words is None:
        return files.check_arrays(content, SHAPES)
    with pytest.raises(ValueError, match=words):
        files.check_arrays(content, SHAPES)


@MANY
@given(
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_a_file_cut_or_changed_anywhere_is_read_or_refused(tmp_path, cut, flips):
    content = whole(buffer := io.BytesIO())
    data = bytearray(buffer.getvalue())
    for place, value in flips:
        data[int(place * len(data))] = value
    del data[int(cut * len(data)) if not flips else len(data) :]
    (tmp_path / "a.npz").write_bytes(data)
    try:
        found = files.read_npz(tmp_path / "a.npz", SHAPES)
    except ValueError as error:
        assert "a.npz is damaged: " in str(error) and len(str(error)) < 500
    else:
        assert set(SHAPES) - {"size?"} <= found.keys() and found["norms"].shape == content["norms"].shape


# -- by epoch ----------------------------------------------------------------------------------------
def test_files_by_epoch_and_what_only_looks_like_one(tmp_path):
    for name in (
        "epoch_0002.npz",
        "epoch_0001.npz",
        "epoch_12345.npz",
        "epoch_x.npz",
        "epoch_00003.npz",
        "epoch_3.npz",
        "epoch_.npz",
        "epoch_٣٣٣٣.npz",
        ".epoch_0004.npz.1.tmp",
    ):
        (tmp_path / name).touch()
    (tmp_path / "epoch_0007.npz").mkdir()
    found = files.by_epoch(tmp_path)
    assert list(found) == [1, 2, 12345] and found[2].name == "epoch_0002.npz"
    assert files.by_epoch(tmp_path / "nowhere") == {}


def test_damaged_masks_are_passed_over_for_the_last_that_are_whole(tmp_path):
    from refinelib.plots.masks import read_samples
    from refinelib.runs import Run

    folder = tmp_path / "samples"
    folder.mkdir()
    content = {
        "image": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros((2, 8, 8), np.uint8),
        "probs": np.zeros((2, 3, 8, 8), np.float16),
        "target_iou": np.zeros(2, np.float32), "image_id": np.arange(2), "annotation_id": np.arange(2),
        "kind": np.array(["fixed", "best"]),
        "mask_size": np.array([8, 8]),
    }  # fmt: skip
    for epoch in range(1, 5):
        np.savez_compressed(folder / f"epoch_{epoch:04d}.npz", **content)
    (folder / "epoch_x.npz").touch()
    data = (folder / "epoch_0004.npz").read_bytes()
    (folder / "epoch_0004.npz").write_bytes(data[: len(data) // 2])
    np.savez_compressed(folder / "epoch_0003.npz", **content | {"probs": np.zeros((2, 2, 8, 8), np.float16)})
    run = Run(tmp_path)
    assert list(files.by_epoch(folder)) == [1, 2, 3, 4]
    with pytest.warns(UserWarning, match="the masks of epoch [34] were passed over: .*is damaged"):
        epoch, found = read_samples(run)
    assert epoch == 2 and found.keys() == content.keys()
    assert read_samples(run, 1)[0] == 1
    with pytest.raises(ValueError, match="epoch_0004.npz is damaged"):
        read_samples(run, 4)
    for file in folder.glob("epoch_000*.npz"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning):
        assert read_samples(run) is None  # as where no epoch was validated
