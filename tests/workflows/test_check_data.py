"""``check-data``: what training would use, before it is trained."""

import numpy as np
import pytest
from PIL import Image

from refinelib.__main__ import main
from refinelib.data.annotations import CROWD
from refinelib.workflows.checks import check_data


def test_it_says_what_is_used_and_what_is_not(coco_files, tmp_path, capsys):
    for _ in range(3):
        coco_files.person(coco_files.image(), (20, 10, 52, 42), [[20, 10, 36, 10, 36, 42, 20, 42]])
    coco_files.person(1, (30, 10, 52, 42), iscrowd=1)
    coco_files.person(2, (30, 10, 40, 42))
    (coco_files.images / "003.jpg").unlink()
    coco_files.source()
    out = tmp_path / "pictures"
    places = ["--annotations", str(coco_files.annotations), "--images", str(coco_files.images)]
    assert main(["check-data", *places, "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "coco val: 2 persons in 2 images are used"
    assert any(line.startswith(f"left out: 1 x {CROWD}: annotation 103") for line in told)
    assert any("missing image: there is no image file" in line and "003.jpg" in line for line in told)
    assert any(line.startswith("left out: 1 x box with a side under 16 px") for line in told)
    assert any(line.startswith("ignored: ") for line in told) and told[-1] == f"picture: {out / 'val.png'}"
    assert np.asarray(Image.open(out / "val.png")).std() > 10


def test_any_data_set_by_its_settings(tmp_path, capsys):
    chosen = ["-p", "data", "synthetic", "-p", "max_images", "12"]
    assert main(["check-data", *chosen, "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"train.png", "val.png"}
    assert "synthetic train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--annotations", "nowhere.json", "--images", "nowhere"], "there is no annotation file"),
        (["--annotations", "nowhere.json"], "give --annotations and --images"),
        (["-p", "data", "coco"], "data = coco needs data_dir or train_annotations"),
        (["-p", "datas", "coco"], "datas"),
    ],
)
def test_without_data_it_says_what_is_missing(tmp_path, capsys, arguments, told):
    assert main(["check-data", *arguments, "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_nothing_is_left_behind(coco_files, tmp_path):
    coco_files.person(coco_files.image(), (20, 10, 52, 42))
    before = {*coco_files.images.parent.rglob("*"), coco_files.annotations}
    check_data(coco_files.source(), tmp_path / "picture.png", progress=False)
    assert {*coco_files.images.parent.rglob("*")} == before
