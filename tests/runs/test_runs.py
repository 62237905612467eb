"""The run folder: never written over, readable after a crash, found again."""

import io
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from refinelib import runs
from refinelib.__main__ import main
from refinelib.checkpoints import CheckpointError
from refinelib.config import resolve
from refinelib.files import dumps, is_locked, owner
from refinelib.metrics.predict import load
from refinelib.runs import Run, RunError, find_runs, latest, newest


def settings(tmp_path, **keywords):
    return resolve("demo", output_dir=str(tmp_path), **keywords)


def test_a_run_is_never_written_over(tmp_path):
    names = []
    for _ in range(3):
        run = Run.start(settings(tmp_path))
        run.update(state="ok")
        names.append(run.name)
    assert names == ["demo", "demo-2", "demo-3"]
    assert Run.start(settings(tmp_path, run="mine")).name == "mine"


def test_a_start_that_failed_before_its_first_step_gives_its_name_back(tmp_path):
    settings = resolve("demo", output_dir=str(tmp_path))

    def start(state, *files):
        run = Run.start(settings)
        run.record_settings(settings, "cpu")
        run.update(state=state)
        for file in files:
            (run.folder / file).write_text("{}")
        return run.name

    assert start("failed") == start("interrupted", "figures/losses.png") == start("running") == "demo"
    assert start("failed", "notes.txt") == "demo-2"  # the one before is running
    assert start("failed", "metrics.jsonl") == "demo-3"
    assert start("failed", "incidents/report.json") == "demo-4"
    assert start("failed", "checkpoints/last.pt") == "demo-5"
    assert start("ok") == "demo-6" and start("failed") == "demo-7"
    assert (tmp_path / "demo-2" / "notes.txt").exists() and start("ok") == "demo-7"
    assert not [*tmp_path.glob(".*failed*")]


def test_the_error_names_the_nearest_run_also_of_a_phase_sequence(tmp_path):
    for place in ("progressive/phase2", "best"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "status.json").write_text("{}")
    for wrong, near in [("outputs/phase2", "progressive/phase2"), ("bestt", "best")]:
        with pytest.raises(RunError, match=f"no run '{wrong}' in {tmp_path}; did you mean {near}: give"):
            Run.open(wrong, output_dir=str(tmp_path))
    with pytest.raises(RunError, match="no run 'x' in .*: give"):
        Run.open("x", output_dir=str(tmp_path))


def test_resume_takes_the_newest_of_the_name(tmp_path):
    for number in range(12):
        Run.start(settings(tmp_path)).update(state="interrupted", step=number + 1)
    run = Run.start(settings(tmp_path, resume=True))
    assert run.name == "demo-12" and run.status()["step"] == 12
    (tmp_path / "demo-3" / "checkpoints" / "last.pt").touch()  # the others have nothing to resume from
    assert Run.start(settings(tmp_path, resume=True)).name == "demo-3"
    with pytest.raises(RunError, match="no run named 'other'"):
        Run.start(settings(tmp_path, run="other", resume=True))


def test_runs_are_found_by_the_name_they_were_started_under(tmp_path):
    def start(name):
        mine = settings(tmp_path, run=name)
        run = Run.start(mine)
        run.record_settings(mine, "cpu")
        run.update(state="ok")
        return run

    start("coco"), start("coco-2017")
    assert [run.name for run in find_runs(tmp_path)] == ["coco", "coco-2017"]
    assert Run.start(settings(tmp_path, run="coco", resume=True)).name == "coco"
    assert Run.start(settings(tmp_path, run="coco-2017", resume=True)).name == "coco-2017"
    assert start("coco").name == "coco-2"
    assert newest(tmp_path, "coco").name == "coco-2" == latest(str(tmp_path)).name
    assert newest(tmp_path, fits=lambda run: run.name == "coco").name == "coco"
    assert newest(tmp_path, "nonesuch") is None
    phases = tmp_path / "progressive"  # a sequence of runs is no run
    phases.mkdir()
    for name in ("progressive.json", "status.json"):
        (phases / name).write_text('{"state": "ok"}')
    assert latest(str(tmp_path)).name == "coco-2"
    with pytest.raises(RunError, match="no run under"):
        latest(str(tmp_path / "nowhere"))


def test_damaged_records_are_no_end(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="ok")
    lines = b'{"kind": "epoch", "epoch": 1}\n5\n\xff\xfe\n{"kind": "epoch", "ep'
    (run.folder / "metrics.jsonl").write_bytes(lines)
    with pytest.warns(UserWarning, match="lines without a record were passed over"):
        assert [line["epoch"] for line in run.epochs()] == [1]
    for content in ("", "[]", "{"):
        (run.folder / "status.json").write_text(content)
        with pytest.raises(RunError, match="status.json is damaged"):
            Run.start(settings(tmp_path, resume=True)).update(state="running")
    (run.folder / "status.json").write_text("{}")  # as the sentence says
    assert Run.start(settings(tmp_path, resume=True)).name == run.name


HOSTILE_JSON = [
    b"", b"[]", b"{", b"5", b"\xff{}", b"[" * 100_000, b'{"step": ' + b"7" * 5000 + b"}",
    b'{"step": "a"}', b'{"state": 5}', b'{"epoch": [1]}',
    b'{"best": 3}', b'{"metrics": {"target_iou": "high"}}', b'{"metrics": {"iou": 0.5}}',
    b'{"metrics": {"iou": [1]}}', b" " * (5 << 20),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
def test_a_hostile_status_or_config_is_told_in_a_sentence(tmp_path, content):
    run = Run.start(settings(tmp_path))
    run.update(state="ok")
    for name in ("status.json", "config.json"):
        (run.folder / name).write_bytes(content)
    for read in (run.status, run.summary, run.config, run.settings):
        with pytest.raises(RunError, match="(status|config).json") as caught:
            read()
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [None, 5, {"lr": "x"}, {"boundary_aware_weight": [1]}, {"no_setting": 1}, {"run": "../x"}]
)
def test_hostile_settings_are_told_in_a_sentence(tmp_path, values):
    run = Run.start(settings(tmp_path))
    (run.folder / "config.json").write_text(json.dumps({"settings": values}))
    with pytest.raises(RunError, match="config.json"):
        run.settings()


def test_open_by_folder_and_the_sentence_otherwise(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="ok")
    assert Run.open(run.folder).status()["state"] == "ok"
    with pytest.raises(RunError, match="no run 'nonesuch'"):
        Run.open("nonesuch")


def test_a_run_that_says_running_and_holds_no_lock_was_killed(tmp_path, capsys):
    """Unless it runs on another host, or its launcher may start it again, or nothing can be told."""
    run = Run.start(settings(tmp_path))
    first = {"state": "running", "epoch": 1, "epochs": 5, "step": 20, "steps": 100}
    run.update(**first, **owner())
    assert run.status()["state"] == "running", "it never had a lock"
    with run.exclusive():
        assert run.status()["state"] == "running" and main(["summary", str(run.folder)]) == 0
    assert main(["summary", str(run.folder)]) == 1
    told = "killed (stopped after epoch 1 of 5, step 20 of 100; there is no checkpoint, so start it again)"
    assert told in (shown := capsys.readouterr().out) and "newest of this name" not in shown
    second = Run.start(settings(tmp_path))
    second.update(state="ok")
    assert f"newest of this name  {second.name}: ok\n" in f"{run.summary()}\n"
    shutil.rmtree(second.folder)
    (run.folder / "checkpoints" / "last.pt").touch()
    assert run.status()["last_error"].endswith("; -p resume true goes on")
    run.update(host="another")
    assert run.status()["state"] == "running" and main(["summary", str(run.folder)]) == 0
    assert "running (on another, last record 20" in capsys.readouterr().out
    run.update(**owner(launched=True))  # the process that started this one lives
    assert run.status()["state"] == "running"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    run.update(launcher=ended.pid)
    assert run.status()["state"] == "killed"
    for launcher in ("a", [1], 1e300, 10**30, -(10**30)):
        run.update(launcher=launcher)
        assert run.status()["state"] == "killed"
    again = Run.start(settings(tmp_path, resume=True))
    with again.exclusive():
        again.update(state="running", last_error=None)
        assert run.status()["state"] == "running"


def test_a_glance_at_the_lock_keeps_nobody_from_training(tmp_path):
    run = Run.start(settings(tmp_path))
    with run.exclusive():
        pass
    with ThreadPoolExecutor(1) as pool:
        glances = pool.submit(lambda: [is_locked(run.folder) for _ in range(3000)])
        held = 0
        while not glances.done():
            with run.exclusive():
                held += 1
    assert held and set(glances.result()) == {True, False}


def test_smoke_runs_and_debug_runs_live_apart_and_are_found_where_they_live(tmp_path, monkeypatch):
    monkeypatch.setattr("refinelib.config.project_root", lambda: tmp_path)

    def made(name):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        (folder / "status.json").write_text('{"state": "ok"}')
        return folder

    smoke, _, debug = made("smoke/w1"), made("debug-runs/original"), made("debug-runs/original-2")
    with pytest.raises(CheckpointError, match=r"no run 'w1' in .*outputs; did you mean smoke/w1: give"):
        load("w1")
    both = "debug-runs/original or debug-runs/original-2"
    with pytest.raises(RunError, match=f"'original' in .*outputs; did you mean {both}: give"):
        Run.open("original")
    with pytest.raises(RunError, match=r"no run under .*outputs: .* debug-runs/original-2, smoke/w1"):
        latest()
    assert Run.open("smoke/w1").folder == smoke and Run.open("debug-runs/original-2").folder == debug
    mine, weights = made("original"), made("phase1")
    assert Run.open("original").folder == mine and newest("outputs", "original").folder == mine
    inside = {"output_dir": "outputs/debug-runs"}  # init_from of a debug run: a debug run, else any run
    assert Run.open("original-2", **inside).folder == debug and Run.open("phase1", **inside).folder == weights
    monkeypatch.setenv("REFINELIB_SMOKE", "1")
    assert Run.open("w1").folder == latest().folder == smoke and Run.open("phase1").folder == weights
    monkeypatch.setenv("REFINELIB_SMOKE", "0")
    assert latest().folder in (mine, weights)


def test_lines_are_strict_json(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    losses = {"ce": math.inf, "dice": 0.5}
    run.metrics({"kind": "step", "step": 1, "loss": math.nan, "losses": losses, "more": [1.0, -math.inf]})
    run.close()
    line = (run.folder / "metrics.jsonl").read_text().strip()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["loss"] is None and record["losses"] == {"ce": None, "dice": 0.5}
    assert record["nonfinite"] == {"loss": "nan", "losses.ce": "inf", "more[1]": "-inf"}
    assert list((run.folder / "tb").glob("events*"))


def test_rewinding_the_records_drops_later_steps(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    for step in range(1, 6):
        run.metrics({"kind": "step", "step": step, "loss": 1.0})
    run.event("skip", "something", step=5)
    (run.folder / "samples" / "epoch_0002.npz").touch()
    run.rewind_records(3, epoch=1)
    assert not list((run.folder / "samples").iterdir())
    assert [line["step"] for line in run.steps()] == [1, 2, 3] and run.events() == []
    run.close()


HOSTILE_LINES = [
    b'{"step": null}', b'{"kind": "step", "step": null}', b'{"kind": "step", "step": "a"}',
    b'{"kind": "step"}', b'{"kind": "epoch", "step": 1}', b'{"step": 1}',
    b'{"kind": ["step"], "step": 1}', b'{"kind": "step", "step": -1}', b'{"kind": "step", "step": 1.5}',
    b'{"kind": "step", "step": true}',
    b'{"kind": "step", "step": ' + b"9" * 4000 + b"}", b'{"kind": "step", "step": 1, "loss": "a"}',
    b'{"kind": "step", "step": 1, "losses": [1]}',
    b'{"kind": "step", "step": 1, "losses": {"ce": "a"}}',
    b'{"kind": "epoch", "epoch": 1, "metrics": {"iou": 3}}', b"[1]", b"x", b"\xff", b"[" * 100_000,
]  # fmt: skip


def test_hostile_lines_are_passed_over_counted_and_gone_after_a_rewind(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    values = {"loss": 1.0, "losses": {"ce": 1.0}, "grad_norm": 1.0, "lr": 1e-3}
    good = {"kind": "step", "step": 1, "epoch": 1, **values}
    epoch = {"kind": "epoch", "epoch": 1, "step": 2, "metrics": {"miou": 0.5, "iou": [0.1, None, 1]}}
    whole = [dumps(good).encode(), *HOSTILE_LINES, dumps(epoch).encode()]
    for name in ("metrics.jsonl", "events.jsonl"):
        (run.folder / name).write_bytes(b"\n".join(whole) + b"\n")
    passed_over = r"metrics.jsonl: lines without a record were passed over \(19, the first is line 2\)"
    with pytest.warns(UserWarning, match=passed_over):
        assert run.steps() == [good]
    with pytest.warns(UserWarning):
        assert [line["epoch"] for line in run.validations()] == [1]
    for name in ("epoch_x.npz", "epoch_0003.npz"):
        (run.folder / "samples" / name).touch()
    run.rewind_records(2, epoch=1)
    events = [event["message"] for event in run.events() if event["kind"] == "damaged"]
    assert len(events) == 2 and "events.jsonl" in events[1]
    assert "metrics.jsonl" in events[0] and "(19, the first is line 2)" in events[0]
    assert [file.name for file in (run.folder / "samples").iterdir()] == ["epoch_x.npz"]
    assert run.steps() == [good] and len(run.epochs()) == 1  # and no warning any more


@examples(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.floats(0, 1, exclude_max=True),
    piece=st.binary(max_size=12)
    | st.sampled_from([b"null", b'"a"', b"9" * 400, b"}\n{", b"\n", b"[]", b"{}", b"1e999"]),
    length=st.integers(0, 40),
)
@pytest.mark.filterwarnings("ignore:.*lines without a record")
def test_records_changed_anywhere_are_still_read_drawn_from_and_rewound(tmp_path, place, piece, length):
    run = Run(tmp_path)
    (tmp_path / "samples").mkdir(exist_ok=True)
    values = {"loss": 1.0, "losses": {"ce": 1.0}, "grad_norm": 2.0, "grad_norm_max": 3.0, "lr": 1e-3}
    lines = [{"kind": "step", "step": step, "epoch": 1, **values} for step in (1, 2)]
    scores = {"metrics": {"target_iou": 0.5, "iou": [0.1, None, 1.0]}}
    lines.append({"kind": "epoch", "epoch": 1, "step": 2, "train_loss": 1.0, "seconds": 2.0, **scores})
    data = "".join(dumps(line) + "\n" for line in lines).encode()
    at = int(place * len(data))
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(data[:at] + piece + data[at + length :])
    numbers = [(line["step"], line["loss"], line["lr"], *line["losses"].values()) for line in run.steps()]
    found = [line["metrics"] for line in run.validations()]
    numbers += [(metrics.get("target_iou"), *(metrics.get("iou") or ())) for metrics in found]
    assert all(f"{value:.3f}" for row in numbers for value in row if value is not None)
    run.rewind_records(1, epoch=1)
    assert all(line["step"] <= 1 for line in run.steps())


def test_a_killed_process_leaves_no_half_incident(tmp_path):
    run = Run.start(settings(tmp_path))
    whole, half, other = (run.folder / "incidents" / name for name in ("000003", "000007", "notes"))
    for folder in (whole, half, other):
        folder.mkdir()
        (folder / ".state.pt.1.tmp").write_bytes(b"half")
        (folder / "batch.pt").write_bytes(b"whole")
    (whole / "report.json").write_text("{}")
    snapshots = run.folder / "checkpoints" / "snapshots"
    snapshots.mkdir()
    (snapshots / ".00000003.pt.1.tmp").touch()
    (run.folder / "checkpoints" / ".folder.tmp").mkdir()  # cannot be unlinked, and stops nothing
    with run.exclusive():
        pass
    assert sorted(folder.name for folder in (run.folder / "incidents").iterdir()) == ["000003", "notes"]
    assert not [file for file in run.folder.glob("**/.*.tmp") if file.is_file()]
    (event,) = run.events()
    assert event["kind"] == "damaged" and event["message"].endswith("removed: 000007")


def test_config_says_what_ran(tmp_path):
    run = Run.start(settings(tmp_path, lr=1e-3))
    run.record_settings(settings(tmp_path, lr=1e-3), "cpu")
    config = run.config()
    assert config["settings"]["lr"] == 1e-3 and config["recipe"] == "demo" and config["device"] == "cpu"
    assert set(config["versions"]) == {"python", "refinelib", "torch", "cuda", "numpy"}
    assert run.settings() == settings(tmp_path, lr=1e-3)


def test_lines_wait_for_room_and_come_in_order(tmp_path, monkeypatch, capfd):
    """A file system that takes half a line and then no more, as a full one does."""
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    run.event("one", "first", step=1)
    file, real = run.folder / "events.jsonl", open
    monkeypatch.setattr(
        "builtins.open", lambda at, *given, **how: (Half if at == file else real)(at, *given, **how)
    )
    run.event("two", "second", step=2)
    run.event("three", "third", step=3)
    monkeypatch.undo()
    assert [line["kind"] for line in run.events()] == ["one"] and file.read_text().endswith("}\n")
    run.metrics({"kind": "step", "step": 4, "loss": 1.0})  # there is room for this, so for what waits too
    assert [line["kind"] for line in run.events()] == ["one", "two", "three"]
    run.close()
    assert capfd.readouterr().err.count("records wait in memory") == 1


class Half(io.FileIO):
    """An unbuffered file on a disk with 10 bytes left."""

    def __init__(self, path, mode, buffering):
        super().__init__(path, mode.replace("b", ""))

    def write(self, data):
        return super().write(data[:10])


def test_what_never_finds_room_is_told_at_the_end(tmp_path, capfd):
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    (run.folder / "events.jsonl").mkdir()  # nothing can be appended to a folder
    run.event("one", "first", step=1)
    run.event("two", "second", step=2)
    run.close()
    assert "2 lines of its records could not be written" in capfd.readouterr().err


def test_a_status_that_cannot_be_replaced_waits_but_a_first_one_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = Run.start(settings(tmp_path))
    run.update(state="running")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            Run.start(settings(tmp_path)).update(state="running")
        run.update(state="ok")
    assert run.status()["state"] == "running"
    run.close()
    assert run.status()["state"] == "ok"
