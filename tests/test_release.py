"""A finished run as a release: weights alone, a card, found by name, refused where it was changed."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_same, bench

import refinelib
from refinelib import checkpoints
from refinelib.__main__ import main
from refinelib.config import resolve
from refinelib.data import ArrayPeople
from refinelib.runs import Run
from refinelib.trainer import train

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
BOX = [5, 5, 45, 45]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    size = dict(width=0.0625, roi_size=32, mask_size=32, max_images=4, batch_size=4, probe_every=0)
    settings = resolve(
        "demo", output_dir=str(folder), run="mine", epochs=2, ema_decay=0.9, device="cpu", **size
    )
    return train(settings)


@pytest.fixture
def released(run, tmp_path, monkeypatch):
    """The release ``small`` of the run, in the folder that the environment names."""
    monkeypatch.setenv("REFINELIB_ZOO", str(tmp_path / "zoo"))
    assert bench("release").main([str(run.folder), "--name", "small", "--out", str(checkpoints.zoo())]) == 0
    return tmp_path / "zoo" / "small.pt"


def test_a_release_is_found_by_name_and_predicts_as_the_run_does(run, released):
    by_name, by_file = refinelib.load("small", device="cpu"), refinelib.load(released, device="cpu")
    ours = refinelib.load(run.folder, device="cpu")
    for other in (by_name, by_file):
        assert other.name == "small" and torch.equal(other.probs(IMAGE, BOX), ours.probs(IMAGE, BOX))
    saved = checkpoints.load(checkpoints.find(run.folder))
    content = checkpoints.load(released)
    assert content.keys() == {"model", "average", "card", "settings", "mean_coverage"}
    assert_same(content["model"], saved["average"])
    assert released.stat().st_size < checkpoints.find(run.folder).stat().st_size / 3


def test_a_release_is_evaluated_and_trained_from(released, tmp_path, tiny):
    ids = np.zeros(IMAGE.shape[:2], np.uint8)
    ids[5:45, 5:45] = 1
    report = refinelib.evaluate("small", source=ArrayPeople([(IMAGE, ids)]), device="cpu")
    assert report["rois"] == 1 and report["checkpoint"] == str(released)
    assert train(tiny(run="next", init_from="small", epochs=1, max_images=2)).status()["state"] == "ok"


def test_a_name_with_folders_and_a_report_that_is_none_are_refused(run, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "last.json").write_text('{"checkpoint": "elsewhere/mine/checkpoints/last.pt"}')
    of_list, of_last = str(tmp_path / "list.json"), str(tmp_path / "last.json")
    for name, report, said in (
        ("../x", None, "is a path"),
        ("x", of_list, "no report"),
        ("x", of_last, "is not of .*best.pt, whose weights are packed"),
    ):
        with pytest.raises(ValueError, match=said):
            bench("release").pack(run, name=name, report=report, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_is_not_overwritten(run, released):
    before = released.read_bytes()
    with pytest.raises(ValueError, match="there is a release .*small.pt"):
        bench("release").pack(run, name="small", out=released.parent)
    assert released.read_bytes() == before


def test_the_card_says_what_it_is(run, released, tmp_path):
    card = json.loads(released.with_suffix(".json").read_text())
    assert (
        card["name"] == "small" and card["licence"].startswith("MIT") and card["data"]["data"] == "synthetic"
    )
    best = run.status()["best"]
    assert card["epoch"] == best["epoch"] and card["figures"]["target_iou"] == best["target_iou"]
    assert (
        card["command"].startswith("python -m refinelib train -f demo -p ")
        and "-p ema_decay 0.9" in card["command"]
    )
    texts = released.with_suffix(".json").read_text() + json.dumps(checkpoints.load(released)["settings"])
    assert str(run.folder.parent) not in texts and str(tmp_path) not in texts
    assert {**checkpoints.load(released)["card"], "sha256": card["sha256"]} == card
    report = tmp_path / "report.json"
    measured = {"target_iou": 0.25, "image": {}, "intervals": {"target_iou": [0.2, 0.3]}}
    report.write_text(json.dumps({**measured, "checkpoint": str(run.folder / "checkpoints" / "best.pt")}))
    bench("release").pack(run, name="other", report=str(report), out=tmp_path)
    card = json.loads((tmp_path / "other.json").read_text())
    assert card["figures"] == {"target_iou": 0.25, "intervals": {"target_iou": [0.2, 0.3]}}
    assert card["figures_of"] == "report.json"


def test_paths_lose_all_but_their_last_part():
    release = bench("release")
    assert release.short("/home/me/coco") == "coco" and release.short("C:\\data\\coco") == "coco"
    assert release.short("best") == "best" and release.short(0.5) == 0.5 and release.short(None) is None
    settings = resolve("demo", data="coco", data_dir="/home/me/coco", lr=1e-3)
    assert "-p data_dir coco" in release.command(settings, [])
    lost = settings.model_copy(update={"recipe": "/home/me/lost.yaml"})
    assert release.command(lost, ["/home/me/train.py", "--fast"]) == "train.py --fast"


def test_a_changed_release_is_refused(released):
    card = released.with_suffix(".json")
    content = released.read_bytes()
    released.write_bytes(content[:-1] + b"x")
    for source in ("small", released):
        with pytest.raises(
            checkpoints.CheckpointError, match="its card small.json says .*copy both files again"
        ):
            refinelib.load(source)
    released.write_bytes(content)
    text = card.read_text()
    for wrong in ("{", "no card"):
        card.write_text(wrong)
        with pytest.raises(checkpoints.CheckpointError, match="the card .*small.json cannot be read"):
            refinelib.load("small")
    card.write_text(text)
    refinelib.load("small", device="cpu")
    for own in ('{"of": "something else"}', "[]"):  # files of the user's own
        card.write_text(own)
        refinelib.load("small", device="cpu")
    card.unlink()  # the weights have a checksum of their own
    refinelib.load("small", device="cpu")
    released.write_bytes(content[: len(content) // 2])
    with pytest.raises(checkpoints.CheckpointError, match="not a whole checkpoint"):
        refinelib.load("small")


def test_an_absent_release_says_where_it_belongs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REFINELIB_ZOO", str(tmp_path))
    with pytest.raises(checkpoints.CheckpointError, match=f"no release {tmp_path}/none.pt: `make release`"):
        refinelib.load("none")
    assert main(["evaluate", "none", "--pennfudan", "there"]) == 2
    assert "make release" in capsys.readouterr().err
    monkeypatch.delenv("REFINELIB_ZOO")
    assert checkpoints.zoo().parts[-2:] == ("outputs", "zoo")


def test_a_run_comes_before_a_release_of_its_name(run, released, tmp_path):
    released.rename(tmp_path / "zoo" / "mine.pt")
    found = checkpoints.find("mine", output_dir=str(run.folder.parent))
    assert found == run.folder / "checkpoints" / "best.pt"
    assert checkpoints.find("mine", output_dir=str(tmp_path)) == tmp_path / "zoo" / "mine.pt"


def test_a_run_that_is_not_finished_is_not_packed(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    Run(tmp_path / "half").update(state="running")
    assert bench("release").main([str(tmp_path / "half"), "--out", str(tmp_path)]) == 2
    assert "is running: a release is made of a run that ended as ok" in capsys.readouterr().err
    assert bench("release").main([str(tmp_path / "none")]) == 2
