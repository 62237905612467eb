"""Runs side by side: groups over seeds, what differs, and nobody left out."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from helpers import make_run, papermill, read
from PIL import Image

from refinelib.config import project_root
from refinelib.runs import Run, RunError, dumps, latest
from refinelib.workflows import compare, examples


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
        make_run(tmp_path / "lost", amp="fp16", bad_from=70),
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


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


def test_runs_that_differ_in_their_seed_alone_are_a_group(runs):
    found = compare.groups(runs)
    assert {name: [run.name for run in members] for name, members in found.items()} == {
        "a (2 seeds)": ["a", "a-2"], "fast": ["fast"], "lost": ["lost"], "young": ["young"],
    }  # fmt: skip


def test_the_mean_and_its_spread_over_seeds(runs):
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in compare.metrics_table(runs).splitlines()}
    best = 0.9 - 0.5 / 3
    assert rows["a (2 seeds)"][0] == f"{best + 0.05:.3f} ± {0.1 / math.sqrt(2):.3f}"
    assert rows["fast"][0] == f"{best:.3f}" and "±" not in rows["fast"][0]
    assert [rows[name][-1] for name in ("a (2 seeds)", "fast", "lost", "young")] == ["2 ok", "1 failed", "1 diverged", "1 running"]


def test_only_settings_that_differ_are_told(runs):
    table = compare.settings_table(runs[:3])
    assert "| seed | 0 | 1 | 0 |" in table and "| lr | 0.002 | 0.002 | 0.01 |" in table
    assert table.count("\n") == 3  # heads, rule, seed, lr: nothing else, neither the folder nor the width
    assert compare.settings_table(runs[:1]) == "There is one run only."
    assert compare.settings_table([runs[0], runs[0]]) == "They differ in no setting."


def test_diverged_and_failed_runs_stay_and_are_marked(runs):
    table = compare.states_table(runs)
    assert "| fast | **failed** |" in table and "| lost | **diverged** |" in table and "| young | running | 1 of 1 |" in table
    figure = compare.curves(runs)
    for axes in figure.axes:
        assert sorted(line.get_gid() for line in axes.lines if line.get_gid() in ("failed", "diverged", "running")) == ["diverged", "failed", "running"]
        (mean,) = [line for line in axes.lines if line.get_gid() == "mean"]
        assert mean.get_color() == compare.COLORS[0]
    loss = figure.axes[0].lines
    colors = {line.get_color() for line in loss}
    assert set(compare.COLORS[:4]) <= colors
    (mean,) = [line for line in figure.axes[2].lines if line.get_gid() == "mean"]
    assert mean.get_ydata()[-1] == pytest.approx(0.9 - 0.5 / 3 + 0.05)


def test_pictures_show_the_same_people_in_every_run(runs):
    figure = compare.pictures(runs, 5)
    heads = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert heads == ["image", "truth", "a", "a-2", "fast\n(failed)", "lost\n(diverged)"]
    assert "no masks yet of young (still running)" in figure.get_suptitle()
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 6 * 5
    with np.load(runs[0].folder / "samples" / "epoch_0003.npz") as file:
        assert (shown[0] == file["image"][0]).all() and (shown[4] == file["image"][-1]).all()
    none = compare.pictures(runs[-1:])
    assert "no validated person in common" in none.texts[0].get_text()


def test_figures_are_whole(runs):
    for figure in (compare.curves(runs), compare.pictures(runs, 4), compare.curves(runs[-1:]), compare.pictures(runs * 2, 6)):
        picture = pixels(figure)
        assert picture.shape[1] == compare.WIDTH * 100
        assert all((side == 255).all() for side in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]))


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "x" / "demo"), make_run(tmp_path / "y" / "demo", lr=1e-3)
    assert compare.names_of([one, two]) == ["x/demo", "y/demo"]
    assert "| | x/demo | y/demo |" in compare.settings_table([one, two])
    assert len(compare.groups([one, two])) == 2


def test_runs_are_found_by_name_and_the_newest_without_one(runs, tmp_path):
    where = str(tmp_path)
    assert [run.name for run in compare.find("fast, a", output_dir=where)] == ["fast", "a"]
    assert [run.name for run in compare.find([str(runs[1].folder)], output_dir=where)] == ["a-2"]
    assert {run.name for run in compare.find(output_dir=where)} == {run.name for run in runs}
    assert len(compare.find(output_dir=where, most=2)) == 2
    with pytest.raises(RunError, match="there is no run 'fats'.*a, a-2, fast"):
        compare.find("fats", output_dir=where)


def test_a_chain_of_runs_is_no_run(tmp_path):
    """It has a status beside its runs', and neither settings nor curves."""
    run = make_run(tmp_path / "mine")
    chain = tmp_path / "progressive"
    chain.mkdir()
    for name in ("progressive.json", "status.json"):  # later than the run's
        (chain / name).write_text(dumps({"state": "ok", "phases": []}))
    assert [found.folder for found in compare.find(output_dir=str(tmp_path))] == [run.folder]
    assert examples.newest(output_dir=str(tmp_path)).folder == latest(str(tmp_path)).folder == run.folder


def test_without_any_run_two_tiny_ones_are_made(tmp_path):
    found = compare.find(output_dir=str(tmp_path / "empty"))
    assert [run.settings().seed for run in found] == [0, 1] and all(run.settings().smoke for run in found)
    assert list(compare.groups(found)) == ["debug (2 seeds)"]


def test_the_notebook_shows_runs_of_every_fate(runs, tmp_path):
    done = papermill("compare.ipynb", tmp_path / "out.ipynb", "-p", "output_dir", tmp_path, "-p", "people", 3, cwd=project_root() / "notebooks")
    assert done.returncode == 0, done.stderr
    notebook = read(tmp_path / "out.ipynb")
    shown = {cell.id: cell.outputs[-1].data for cell in notebook.cells if cell.get("outputs") and "data" in cell.outputs[-1]}
    assert "**failed**" in shown["open"]["text/markdown"] and "±" in shown["metrics"]["text/markdown"]
    assert {"image/png"} <= set(shown["curves"]) and {"image/png"} <= set(shown["pictures"])
    assert {file.name for file in (tmp_path / "compare" / "figures").iterdir()} == {"curves.png", "pictures.png"}
