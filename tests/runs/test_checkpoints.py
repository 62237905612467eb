"""Checkpoints and the run folder: whole or refused, never half."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from helpers import assert_same, final_weights
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from limits import read_in_little_memory

from refinelib import checkpoints
from refinelib.checkpoints import CheckpointError
from refinelib.runs import Run
from refinelib.trainer import Trainer, train


def content(step=3):
    return {
        "model": {
            "w": torch.randn(4, 3),
            "half": torch.randn(5).bfloat16(),
            "scalar": torch.tensor(2.0),
            "empty": torch.zeros(0),
        },
        "position": {"step": step, "epoch": 0},
        "list": [1, None, "text", 2.5, True],
    }


def test_round_trip(tmp_path):
    saved = content()
    checkpoints.save(tmp_path / "a.pt", saved)
    assert "model" in torch.load(tmp_path / "a.pt", weights_only=True)  # plain torch opens it too
    loaded = checkpoints.load(tmp_path / "a.pt")
    assert loaded["list"] == saved["list"] and loaded["position"] == saved["position"]
    for name, value in saved["model"].items():
        assert torch.equal(loaded["model"][name], value) and loaded["model"][name].dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


def test_one_changed_byte_of_a_tensor_is_noticed(tmp_path):
    file = tmp_path / "a.pt"
    saved = {"model": {"w": torch.zeros(4096)}, "position": {"step": 1}}
    checkpoints.save(file, saved)
    data = bytearray(file.read_bytes())
    place = data.find(bytes(2048))  # inside the zeros
    data[place + 512] = 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError):
        checkpoints.load(file)


def test_another_format_and_a_foreign_file_are_told(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not written by refinelib"):
        checkpoints.load(tmp_path / "foreign.pt")
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    checkpoints.save(tmp_path / "future.pt", content())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoints.load(tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="nowhere.pt is not a whole checkpoint .there is no file"):
        checkpoints.load(tmp_path / "nowhere.pt")


def test_newest_whole_skips_the_damaged_and_says_so(tmp_path):
    checkpoints.save(tmp_path / "best.pt", content(step=5))
    checkpoints.save(tmp_path / "last.pt", content(step=9))
    path, found, problems = checkpoints.newest_whole(tmp_path)
    assert (path.name, found["position"]["step"], problems) == ("last.pt", 9, [])
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:200])
    path, found, problems = checkpoints.newest_whole(tmp_path)
    assert path.name == "best.pt" and len(problems) == 1 and "last.pt" in problems[0]
    (tmp_path / "best.pt").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoints.newest_whole(tmp_path)


# -- files from elsewhere ------------------------------------------------------------------------------
MANY = examples(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
#: A number of float32 that takes 160 GB, as a pickle writes it.
HUGE = b"\x8a\x08" + (40 * 10**9).to_bytes(8, "little")


def forged(**parts):
    """Writes a file that only its checksum tells from one of ours."""
    return lambda file: torch.save({"format": checkpoints.FORMAT, "checksum": "0" * 64, **parts}, file)


def rezipped(change, how=zipfile.ZIP_STORED, content=None, more=None):
    """Writes a checkpoint whose zip has other members."""

    def write(file):
        checkpoints.save(file, content or {"model": {"w": torch.zeros(70_000)}})
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as old, zipfile.ZipFile(file, "w", how) as new:
            for member in old.infolist():
                new.writestr(member.filename, change(member.filename, old.read(member)))
            if more is not None:
                new.writestr(old.namelist()[0].partition("/")[0] + more, b"\x80\x02}.")

    return write


def pickled(data: bytes):
    """Writes a checkpoint that holds under the name a what a pickle says."""
    return rezipped(
        lambda name, old: b"\x80\x02}X\x01\x00\x00\x00a" + data + b"s." if name.endswith("data.pkl") else old
    )


def in_itself():
    value = []
    value.append(value)
    return value


def laughs(depth=12):
    value = [0] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def claimed(file):
    """The zip's own list says that a member takes 4 GB."""
    checkpoints.save(file, content())
    data = bytearray(file.read_bytes())
    at = data.rfind(b"PK\1\2", 0, data.rfind(b"/data/0"))
    data[at + 20 : at + 28] = b"\xf0\xff\xff\xff" * 2
    file.write_bytes(data)


def legacy(file):
    torch.save(
        {"format": checkpoints.FORMAT, "checksum": "0", "model": {}},
        file,
        _use_new_zipfile_serialization=False,
    )


def two_in_one(file):
    """torch reads the old format in front, a zip reader the zip behind."""
    legacy(file)
    front = file.read_bytes()
    checkpoints.save(file, content())
    file.write_bytes(front + file.read_bytes())


def same(data):
    return lambda name, old: data(old) if name.endswith("data.pkl") else old


HOSTILE = {
    "no format": lambda file: torch.save({"checksum": "0", "model": {}}, file),
    "a tensor as format": lambda file: torch.save({"checksum": "0", "format": torch.zeros(3)}, file),
    "a tensor as checksum": lambda file: torch.save(
        {"checksum": torch.zeros(3), "format": checkpoints.FORMAT}, file
    ),
    "a list": lambda file: torch.save([1, 2], file),
    "set": forged(model={"w": {1, 2}}),
    "in itself": forged(a=in_itself()),
    "laughs": forged(a=laughs()),
    "deep lists": pickled(b"]" * 10_000 + b"a" * 9_999),
    "deep dictionaries": pickled(b"}X\x01\x00\x00\x00a" * 10_000 + b"N" + b"s" * 10_000),
    "tuple as key": forged(model={(1, 2): torch.zeros(2)}),
    "none as key": forged(model={None: torch.zeros(2)}),
    "tensor as key": forged(model={torch.zeros(2): 1}),
    "expanded": forged(model={"w": torch.zeros(1).expand(200_000, 200_000)}),
    "overlapping": forged(model={"w": torch.zeros(1000).as_strided((10**6, 1000), (0, 1))}),
    "one in many places": forged(model=dict.fromkeys(map(str, range(10_000)), torch.zeros(250_000))),
    "sparse": lambda file: forged(
        model={"w": torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (200_000, 200_000))}
    )(file),
    "quantized": lambda file: forged(
        model={"w": torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)}
    )(file),
    "meta": forged(model={"w": torch.empty(200_000, 200_000, device="meta")}),
    "parameter": forged(model={"w": torch.nn.Parameter(torch.zeros(4))}),
    "conjugate": forged(model={"w": torch.zeros(3, dtype=torch.complex64).conj()}),
    "packed": rezipped(lambda name, old: old, zipfile.ZIP_DEFLATED),
    "short storage": rezipped(lambda name, old: old[:100] if "/data/" in name else old),
    "long claim": rezipped(same(lambda old: old.replace(b"J" + (70_000).to_bytes(4, "little"), HUGE))),
    "wide shape": rezipped(
        same(lambda old: old.replace(b"K\x00\x85", HUGE + b"\x85")), content={"model": {"w": torch.zeros(0)}}
    ),
    "storage called": pickled(b"ctorch\nFloatStorage\n" + HUGE + b"\x85R"),
    "storage made": pickled(b"ctorch\nFloatStorage\n" + HUGE + b"\x85\x81"),
    "bytearray": pickled(b"cbuiltins\nbytearray\n" + HUGE + b"\x85R"),
    "claimed bytearray": pickled(b"\x96" + (4 << 30).to_bytes(8, "little")),
    "long text": pickled(b"X\xff\xff\xff\xffabc"),
    "long pickle": pickled(b"]" * (5 << 20)),
    "second pickle": rezipped(lambda name, old: old, more="/DATA.PKL"),
    "claimed": claimed,
    "members": lambda file: [
        archive := zipfile.ZipFile(file, "w"),
        *(archive.writestr(f"a/{i}", b"") for i in range(100_000)),
        archive.close(),
    ],
    "legacy": legacy,
    "two in one": two_in_one,
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """What loading each hostile file gave."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, write in HOSTILE.items():
        write(folder / f"{name}.pt")
    prepare = """
import tempfile, torch
from refinelib import checkpoints
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    checkpoints.save(pathlib.Path(folder) / "warm", {"model": {"w": torch.zeros(10)}})
    checkpoints.load(pathlib.Path(folder) / "warm")
"""
    return read_in_little_memory(folder, prepare, "checkpoints.load(file)", megabytes=500)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_told_in_a_sentence_and_takes_no_memory(hostile, name):
    kind, sentence, grown = hostile[name]
    assert kind == "CheckpointError" and f"{name}.pt " in sentence and len(sentence) < 500
    assert grown < 50 << 10, "kilobytes"
    assert not any(
        word in sentence for word in ("allocate", "MemoryError", "recursion")
    )  # it was never tried


@pytest.mark.parametrize(
    "part",
    [
        {"model": [torch.zeros(2)]}, {"model": {"w": 1}}, {"model": {1: torch.zeros(2)}}, {"average": 3},
        {"average": {"w": None}},
        {"position": 3}, {"position": {"step": "a"}}, {"position": {"step": -1}},
        {"position": {"step": None}}, {"position": {"step": 1.5}},
        {"guard": [1]}, {"log": None}, {"recovery": "x" * 10**6}, {"random": {"torch": [1]}},
        {"settings": None}, {"best": 1}, {"mean_coverage": 1},
        {"images": torch.zeros(2)}, {"labels": [1]},
    ],
)  # fmt: skip
def test_a_part_of_another_type_is_refused(tmp_path, part):
    checkpoints.save(tmp_path / "a.pt", content() | part)
    with pytest.raises(
        CheckpointError, match=f"a.pt is no checkpoint of this version: {next(iter(part))}: "
    ) as caught:
        checkpoints.load(tmp_path / "a.pt")
    assert len(str(caught.value)) < 400


def test_parts_that_are_needed_are_named(tmp_path):
    checkpoints.save(tmp_path / "a.pt", content())
    assert checkpoints.load(tmp_path / "a.pt", needs=("model", "position"))
    with pytest.raises(CheckpointError, match="it lacks average, settings"):
        checkpoints.load(tmp_path / "a.pt", needs=("settings", "model", "average"))


@MANY
@given(
    cut=st.none() | st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    inside=st.booleans(),
)
def test_a_checkpoint_cut_or_changed_anywhere_is_as_it_was_or_refused(tmp_path, cut, flips, inside):
    """``inside``: the pickle is changed, and the zip around it is whole."""
    saved = {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([1, 2])},
        "position": {"step": 3},
        "list": [1, None, "text", 2.5, True],
    }
    file = tmp_path / "a.pt"

    def spoil(data):
        data = bytearray(data)
        for place, value in flips:
            data[int(place * len(data))] = value
        return bytes(data if cut is None else data[: int(cut * len(data))])

    if inside:
        rezipped(same(spoil), content=saved)(file)
    else:
        checkpoints.save(file, saved)
        file.write_bytes(spoil(file.read_bytes()))
    try:
        found = checkpoints.load(file)
    except CheckpointError as error:
        assert "a.pt " in str(error) and len(str(error)) < 500
    else:
        assert checkpoints.checksum(found) == checkpoints.checksum(saved)


# -- written in the background ------------------------------------------------------------------------
def test_what_is_saved_is_the_content_at_the_time_of_saving(tmp_path, monkeypatch):
    go, real = threading.Event(), checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda *given: (go.wait(10), real(*given)))
    writer, weights = checkpoints.Writer(), torch.zeros(4)
    writer.save(tmp_path / "a.pt", {"w": weights, "nested": [{"w": weights}], "position": {"step": 1}})
    weights.fill_(7.0)  # the next training step, before anything is on disk
    go.set()
    writer.flush()
    loaded = checkpoints.load(tmp_path / "a.pt")
    assert torch.equal(loaded["w"], torch.zeros(4)) and torch.equal(loaded["nested"][0]["w"], torch.zeros(4))


def test_saving_does_not_wait_and_the_newest_wins(tmp_path, monkeypatch):
    go, started_writing, real, written = threading.Event(), threading.Event(), checkpoints._write, []

    def slow(path, content):
        started_writing.set()
        go.wait(10)
        written.append((path.name, content["position"]["step"]))
        real(path, content)

    monkeypatch.setattr(checkpoints, "_write", slow)
    writer, started = checkpoints.Writer(), time.perf_counter()
    for step in range(1, 6):
        writer.save(tmp_path / "last.pt", content(step=step))
        if step == 1:
            writer.save(tmp_path / "best.pt", content(step=step))
            assert started_writing.wait(10)
    assert time.perf_counter() - started < 5 and not list(tmp_path.glob("*.pt"))
    go.set()
    writer.flush()
    assert [name for name, step in written if step in (2, 3, 4)] == []
    assert checkpoints.load(tmp_path / "last.pt")["position"]["step"] == 5
    assert checkpoints.load(tmp_path / "best.pt")["position"]["step"] == 1
    assert writer.problems == [] and not writer.failing


def test_what_failed_is_told_once_and_tried_again_with_the_newest_content(tmp_path, monkeypatch):
    real, broken = checkpoints._write, True

    def write(path, content):
        if broken and path.name == "best.pt":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoints, "_write", write)
    real(tmp_path / "best.pt", checkpoints.to_cpu(content(step=1)))
    writer = checkpoints.Writer()
    for step in (2, 3):
        writer.save(tmp_path / "best.pt", content(step=step))
        writer.save(tmp_path / "last.pt", content(step=step))
        writer.flush()
    (problem,) = writer.problems
    assert (
        "best.pt could not be written" in problem
        and "No space left" in problem
        and "the one before it stays" in problem
    )
    assert (
        list(writer.failing) == [tmp_path / "best.pt"]
        and checkpoints.load(tmp_path / "best.pt")["position"]["step"] == 1
    )
    broken = False
    writer.save(tmp_path / "last.pt", content(step=4))  # makes no mention of best.pt
    writer.close()
    assert not writer.failing and ["after all" in message for message in writer.problems] == [False, True]
    assert [checkpoints.load(tmp_path / name)["position"]["step"] for name in ("best.pt", "last.pt")] == [
        3,
        4,
    ]


def test_a_snapshot_taken_again_after_a_rewind_replaces_the_file_of_the_first(tiny):
    settings = tiny()
    trainer = Trainer(settings, Run.start(settings))
    for value in (1.0, 2.0):
        with torch.no_grad():
            weight = trainer.guard.parameters[0].fill_(value)
        trainer.rewinder.snapshots.clear()
        trainer.rewinder.start(0)
        trainer.save("last.pt")
        trainer.writer.flush()
    kept = checkpoints.load(trainer.snapshot_file(0))["tensors"]
    assert any(x.shape == weight.shape and torch.equal(x, weight) for x in kept.values())


def test_content_that_cannot_be_written_at_all_does_not_end_the_thread_for_the_others(tmp_path):
    writer = checkpoints.Writer()
    writer.save(tmp_path / "bad.pt", {"position": {"step": 1}, "thing": threading})  # no JSON, no tensor
    writer.save(tmp_path / "good.pt", content())
    writer.flush()
    assert (
        "bad.pt could not be written" in writer.problems[0]
        and "none before it" in writer.failing[tmp_path / "bad.pt"]
    )
    assert checkpoints.load(tmp_path / "good.pt")


LIMITED = """
import json, resource, sys, time
from refinelib.config import Settings
from refinelib.trainer import train
settings = Settings(**json.loads(sys.argv[1]))
def limit(run):
    while not (run.folder / "checkpoints" / "last.pt").exists():
        time.sleep(0.01)  # it is written in the background
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))  # bytes a file
train(settings, on_epoch=limit)
"""


@pytest.mark.slow
def test_a_run_that_cannot_write_its_last_checkpoint_goes_on_to_its_end_and_says_so(tiny, tmp_path):
    """After the first epoch no file may be longer than 6 KB: no checkpoint, no samples, no records."""
    settings = tiny(run="full", epochs=3, log_every=1)
    whole = train(settings.model_copy(update={"run": "whole"}))
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", LIMITED, settings.model_dump_json(), "6144"]
    done = subprocess.run(command, capture_output=True, text=True, env=threads)
    run = Run.open(tmp_path / "full")
    status = run.status()
    assert done.returncode == 1 and status["state"] == "failed" and status["step"] == status["steps"]
    assert (
        "last.pt could not be written" in status["last_error"]
        and "make room" in status["last_error"]
        and "resume=true" in status["last_error"]
    )
    assert (
        done.stderr.count("a record could not be written") == 1 and "could not be written in" in done.stderr
    )
    assert "epoch    3/3" in done.stdout.replace("\r", "\n")
    kept = checkpoints.load(run.folder / "checkpoints" / "last.pt")
    assert kept["position"]["epoch"] < 3
    assert not list(run.folder.glob("**/.*.tmp"))
    assert all(line.endswith("}") for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    again = train(settings.model_copy(update={"resume": True}))
    assert again.status()["state"] == "ok"
    assert_same(final_weights(whole), final_weights(again))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 40 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    """Leave not a byte."""
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@pytest.mark.usefixtures("shallow_here")
def test_a_disk_that_is_full_for_a_while_costs_nothing(tiny, small_disk, capfd):
    keywords = dict(epochs=6, log_every=1, probe_every=1, inject="grad:nan@6:stem")
    whole = train(tiny(run="whole", **keywords))

    ended = []

    def disk(run):
        ended.append(run)
        if len(ended) == 1:
            deadline = time.time() + 20
            while time.time() < deadline and not (run.folder / "checkpoints" / "last.pt").exists():
                time.sleep(0.01)  # it is written in the background
            fill(small_disk)
        if len(ended) == 4:
            (small_disk / "filler").unlink()

    run = train(tiny(run="full", output_dir=str(small_disk), **keywords), on_epoch=disk)
    assert run.status()["state"] == "ok" and run.status()["epoch"] == 6
    assert_same(final_weights(whole), final_weights(run))
    assert [line["epoch"] for line in run.epochs()] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in run.steps()] == [line["loss"] for line in whole.steps()]  # none is lost
    told = [event["message"] for event in run.events()]
    assert any(
        "last.pt could not be written" in message and "the one before it stays" in message for message in told
    )
    assert any("last.pt could be written after all" in message for message in told)
    assert any("samples of epoch 2 could not be written" in message for message in told)
    assert any("gradients of epoch 2 could not be written" in message for message in told)
    assert any("the incident could not be kept" in message for message in told) and not list(
        (run.folder / "incidents").iterdir()
    )
    assert checkpoints.load(run.folder / "checkpoints" / "best.pt") and not list(run.folder.glob("**/.*.tmp"))
    assert capfd.readouterr().err.count("a record could not be written") == 1


HALF = """
import json, os, signal, sys, torch
from refinelib.config import Settings
from refinelib.trainer import train
real = torch.save
def save(content, file):  # as kill -9 would find it
    if save.count == 3:
        file.write(bytes(1000)); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    save.count += 1
    real(content, file)
save.count, torch.save = 0, save
train(Settings(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_half_written_files_of_killed_processes_do_not_pile_up(tiny, tmp_path):
    settings = tiny(run="killed", epochs=3)
    done = subprocess.run([sys.executable, "-c", HALF, settings.model_dump_json()], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "killed"
    assert len(list((folder / "checkpoints").glob(".*.tmp"))) == 1
    (folder / ".status.json.1.tmp").write_text("{")
    run = train(settings.model_copy(update={"resume": True}))
    assert run.status()["state"] == "ok" and not list(folder.glob("**/.*.tmp"))
