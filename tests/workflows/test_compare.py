"""Runs side by side: groups over seeds, what differs, and nobody left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import make_run

from refinelib import checkpoints
from refinelib.files import dumps, owner
from refinelib.runs import Run, RunError, latest
from refinelib.workflows import compare, examples
from refinelib.workflows.compare import groups, names_of


def shift(run: Run, by: float) -> Run:
    """Raise every target IoU on record."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "epoch":
            line["metrics"]["target_iou"] += by
    (run.folder / "metrics.jsonl").write_text("".join(dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    """Two seeds, another learning rate that failed, one that lost its loss, one still going without masks."""
    made = [
        make_run(tmp_path / "a"),
        shift(make_run(tmp_path / "a-2", seed=1), 0.1),
        make_run(tmp_path / "fast", lr=1e-2, state="failed"),
        make_run(tmp_path / "lost", amp="fp16", bad_from=70, state="diverged"),
        make_run(tmp_path / "young", batch_size=16, state="running", epochs=1),
    ]
    for run in made:  # as the trainer writes them: fixed ROIs too
        for file in (run.folder / "samples").glob("*.npz"):
            with np.load(file) as opened:
                content = dict(opened.items())
            np.savez_compressed(file, **content | {"kind": np.array(["fixed"] * len(content["kind"]))})
    for file in (made[-1].folder / "samples").iterdir():
        file.unlink()
    return made


def test_runs_that_differ_in_their_seed_alone_are_a_group(runs):
    found = groups(runs)
    assert {name: [run.name for run in members] for name, members in found.items()} == {
        "a (2 seeds)": ["a", "a-2"], "fast": ["fast"], "lost": ["lost"], "young": ["young"],
    }  # fmt: skip


def test_the_mean_and_its_spread_over_seeds(runs):
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in compare.metrics_table(runs).splitlines()
    }
    best = 0.9 - 0.5 / 3
    assert rows["a (2 seeds)"][0] == f"{best + 0.05:.3f} ± {0.1 / math.sqrt(2):.3f}"
    assert rows["fast"][0] == f"{best:.3f}" and "±" not in rows["fast"][0]
    assert [rows[name][-1] for name in ("a (2 seeds)", "fast", "lost", "young")] == [
        "2 ok",
        "1 failed",
        "1 diverged",
        "1 running",
    ]


def test_only_settings_that_differ_are_told(runs):
    table = compare.settings_table(runs[:3])
    assert "| setting | a | others |" in table
    assert "| seed | 0 | 1: a-2 |" in table and "| lr | 0.002 | 0.01: fast |" in table
    assert table.count("\n") == 3  # heads, rule, seed, lr: nothing else, neither the folder nor the width
    assert compare.settings_table(runs[:1]) == "There is one run only."
    assert compare.settings_table([runs[0], runs[0]]) == "They differ in no setting."


def test_no_table_gets_wider_with_the_number_of_runs(runs):
    for make in (compare.states_table, compare.settings_table, compare.metrics_table):
        columns = {make(some).splitlines()[0].count("|") for some in (runs[:3], runs)}
        assert len(columns) == 1 and columns.pop() <= 8


def test_an_error_stands_below_the_states(runs):
    status = json.loads((runs[2].folder / "status.json").read_text())
    (runs[2].folder / "status.json").write_text(json.dumps({**status, "last_error": "no memory"}))
    rows, _, errors = compare.states_table(runs).partition("\n\n")
    assert "no memory" not in rows and errors == "- **fast**: no memory"


def test_totals_of_different_losses_are_not_compared(runs, tmp_path):
    """With another weight of a term the panel shows the terms that all runs have, without weights."""
    panel = compare.curves(runs[:2]).axes[0]
    assert panel.get_title(loc="left") == "training loss"
    last = runs[0].epochs()[-1]
    assert panel.lines[0].get_ydata()[-1] == last["train_loss"]
    other = make_run(tmp_path / "other", contour_weight=0.5)
    lines = (other.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["losses"]["distance"]
    (other.folder / "metrics.jsonl").write_text("".join(dumps(record) + "\n" for record in records))
    panel = compare.curves([runs[0], other]).axes[0]
    assert "terms that all runs have, unweighted" in panel.get_title(loc="left")
    assert "distance" not in panel.get_ylabel() and "contour" in panel.get_ylabel()
    shared = sum(last["losses"].values()) - last["losses"]["distance"]
    assert panel.lines[0].get_ydata()[-1] == pytest.approx(shared)


def test_phases_follow_each_other(runs):
    chain = [runs[0], runs[2], runs[4]]
    apart, joined = compare.curves(chain), compare.curves(chain, in_sequence=True)
    ends = np.cumsum([0, *(run.epochs()[-1]["epoch"] for run in chain)])
    for panel, other in zip(joined.axes, apart.axes, strict=True):
        drawn = {line.get_label(): line.get_xdata() for line in panel.lines}
        alone = {line.get_label(): line.get_xdata() for line in other.lines}
        for run, before in zip(chain, ends, strict=False):
            assert np.array_equal(drawn[run.name], np.asarray(alone[run.name]) + before)


def test_no_axis_of_scores_goes_below_0(runs):
    for run in runs:  # a run that has learnt nothing yet
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.get("metrics", {}).update(target_iou=0.0, boundary_iou=0.0)
        (run.folder / "metrics.jsonl").write_text("".join(dumps(line) + "\n" for line in lines))
    assert [axes.get_ylim()[0] for axes in compare.curves(runs).axes[2:]] == [0.0, 0.0]


def test_the_legend_explains_the_marks(runs):
    (legend,) = compare.curves(runs).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert {"a (2 seeds)", "diverged, failed or killed", "still running"} <= set(names)
    assert len(names) == len(set(names))


def test_diverged_and_failed_runs_stay_and_are_marked(runs):
    table = compare.states_table(runs)
    assert (
        "| fast | **failed** |" in table
        and "| lost | **diverged** |" in table
        and "| young | running | 1 of 1 |" in table
    )


def test_a_run_that_was_killed_is_marked(runs):
    run = runs[-1]
    with run.exclusive():
        run.update(**run.status() | owner())
        assert "| young | running | 1 of 1 |" in compare.states_table(runs)
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "last.pt").touch()
    goes_on = "stopped after epoch 1 of 1, step 60 of ?; -p resume true goes on"
    assert "| young | **killed** | 1 of 1 |" in (told := compare.states_table(runs)) and goes_on in told
    crosses = [line for line in compare.curves(runs).axes[0].get_lines() if line.get_gid() == "killed"]
    assert len(crosses) == 1 and crosses[0].get_marker() == "X"


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "x" / "demo"), make_run(tmp_path / "y" / "demo", lr=1e-3)
    assert names_of([one, two]) == ["x/demo", "y/demo"]
    assert "| setting | x/demo | others |" in compare.settings_table([one, two])
    assert len(groups([one, two])) == 2


def test_runs_are_found_by_name_and_the_newest_without_one(runs, tmp_path):
    where = str(tmp_path)
    assert [run.name for run in compare.find("fast, a", output_dir=where)] == ["fast", "a"]
    assert [run.name for run in compare.find([str(runs[1].folder)], output_dir=where)] == ["a-2"]
    assert {run.name for run in compare.find(None, output_dir=where)} == {run.name for run in runs}
    assert len(compare.find(None, output_dir=where, most=2)) == 2
    with pytest.raises(RunError, match="there is no run 'fats'.*a, a-2, fast"):
        compare.find("fats", output_dir=where)


def test_the_table_of_a_batch_stands_for_its_runs(runs, tmp_path):
    table = tmp_path / "batch.csv"
    table.write_text("run,folder,state\na,a,ok\nnone,,failed\nfast,fast,failed\n")
    assert [run.name for run in compare.find(f"{table}, lost", output_dir=str(tmp_path))] == [
        "a",
        "fast",
        "lost",
    ]
    assert examples.named([str(table), runs[1]], only_ok=True) == [str(tmp_path / "a"), runs[1]]
    assert examples.named("a, b,,c ") == examples.named(["a", "b", "c"]) == ["a", "b", "c"]
    for content, told in {
        "run,folder,state\nfast,fast,failed\n": "lists no run that ended as ok",
        "run;folder;state\na;a;ok\n": "lists no run",
        "": "lists no run",
        "a\x00b": "lists no run|cannot be read",
        "folder\n\xff": "cannot be read",
    }.items():
        table.write_bytes(content.encode("latin-1"))
        with pytest.raises(RunError, match=told):
            examples.named(str(table), only_ok=True)
    with pytest.raises(RunError, match="cannot be read: .*No such file"):
        examples.named("nowhere.csv")


@pytest.fixture
def training(monkeypatch):
    """Settings of the tiny runs that would be trained."""
    asked = []
    monkeypatch.setattr("refinelib.trainer.train", asked.append)
    return asked


def test_without_any_run_two_tiny_ones_are_trained(tmp_path, training):
    compare.find(None, output_dir=str(tmp_path / "empty"))
    assert [(settings.seed, settings.run) for settings in training] == [(0, "tiny"), (1, "tiny")]


def test_a_notebook_takes_the_run_named_or_the_newest_that_fits_or_a_tiny_one(runs, tmp_path, training):
    where = str(tmp_path)
    assert examples.find("a", output_dir=where).name == "a"
    with pytest.raises(RunError, match="there is no run 'fats'"):
        examples.find("fats", output_dir=where)
    assert examples.find(output_dir=where).folder == latest(where).folder
    assert examples.find(output_dir=where, fits=lambda run: run.name == "fast").name == "fast"
    assert not training
    examples.find(output_dir=where, fits=examples.has_weights, name="tiny-plain", seed=3)
    assert (training[0].run, training[0].seed) == ("tiny-plain", 3)


def test_a_checkpoint_of_another_version_is_passed_over(tmp_path):
    """So that a notebook without a run trains a tiny one rather than fail."""
    run = make_run(tmp_path / "a")
    (run.folder / "checkpoints").mkdir()
    file = run.folder / "checkpoints" / "last.pt"
    assert not examples.has_weights(run)
    checkpoints.save(file, {"model": {"weight": torch.zeros(1)}, "average": None})
    assert examples.has_weights(run)
    torch.save({**torch.load(file, weights_only=True), "format": checkpoints.FORMAT - 1}, file)
    assert not examples.has_weights(run)
