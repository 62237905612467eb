"""Checkpoints and the run folder: whole or refused, never half."""

import json
import math

import pytest
import torch

from refinelib import checkpoints
from refinelib.checkpoints import CheckpointError
from refinelib.config import resolve
from refinelib.runs import Run, RunError, dumps, read_lines


def content(step=3):
    return {
        "model": {"w": torch.randn(4, 3), "half": torch.randn(5).bfloat16(), "scalar": torch.tensor(2.0), "empty": torch.zeros(0)},
        "position": {"step": step, "epoch": 0},
        "list": [1, None, "text", 2.5, True],
    }


def test_round_trip(tmp_path):
    saved = content()
    checkpoints.save(tmp_path / "a.pt", saved)
    loaded = checkpoints.load(tmp_path / "a.pt")
    assert loaded["list"] == saved["list"] and loaded["position"] == saved["position"]
    for name, value in saved["model"].items():
        assert torch.equal(loaded["model"][name], value) and loaded["model"][name].dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


def test_opens_with_plain_torch_and_weights_only(tmp_path):
    checkpoints.save(tmp_path / "a.pt", content())
    assert "model" in torch.load(tmp_path / "a.pt", weights_only=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    file = tmp_path / "a.pt"
    checkpoints.save(file, content())
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="a.pt"):
        checkpoints.load(file)


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
    with pytest.raises(CheckpointError, match="no checkpoint"):
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
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoints.newest_whole(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    checkpoints.save(file, content(step=1))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        checkpoints.save(file, content(step=2))
    monkeypatch.undo()
    assert checkpoints.load(file)["position"]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# -- run folders -----------------------------------------------------------------------------------
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


def test_resume_takes_the_newest_of_the_name(tmp_path):
    for number in range(12):
        Run.start(settings(tmp_path)).update(state="interrupted", step=number)
    run = Run.start(settings(tmp_path, resume=True))
    assert run.name == "demo-12" and run.status()["step"] == 11
    with pytest.raises(RunError, match="no run named 'other'"):
        Run.start(settings(tmp_path, run="other", resume=True))


def test_open_by_folder_and_the_sentence_otherwise(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="ok")
    assert Run.open(run.folder).status()["state"] == "ok"
    with pytest.raises(RunError, match="no run 'nonesuch'"):
        Run.open("nonesuch")


def test_lines_are_strict_json(tmp_path):
    run = Run.start(settings(tmp_path))
    run.update(state="running")
    run.metrics({"kind": "step", "step": 1, "loss": math.nan, "losses": {"ce": math.inf, "dice": 0.5}, "more": [1.0, -math.inf]})
    run.close()
    line = (run.folder / "metrics.jsonl").read_text().strip()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["loss"] is None and record["losses"] == {"ce": None, "dice": 0.5}
    assert record["nonfinite"] == {"loss": "nan", "losses.ce": "inf", "more[1]": "-inf"}
    assert list((run.folder / "tb").glob("events*"))


def test_a_half_written_line_is_left_out(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text(dumps({"kind": "step", "step": 1}) + '\n{"kind": "st')
    assert read_lines(file) == [{"kind": "step", "step": 1}]


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


def test_config_says_what_ran(tmp_path):
    run = Run.start(settings(tmp_path, lr=1e-3))
    run.record_settings(settings(tmp_path, lr=1e-3), "cpu")
    config = run.config()
    assert config["settings"]["lr"] == 1e-3 and config["recipe"] == "demo" and config["device"] == "cpu"
    assert set(config["versions"]) == {"python", "torch", "cuda", "numpy"}
    assert run.settings() == settings(tmp_path, lr=1e-3)
