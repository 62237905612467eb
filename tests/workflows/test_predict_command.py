"""``python -m refinelib predict``: images and boxes in, files out, and what was left out."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from refinelib import checkpoints
from refinelib.__main__ import main
from refinelib.build import build_model
from refinelib.config import resolve
from refinelib.metrics.predict import load
from refinelib.workflows.predict_io import RESULTS, predict_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a model that nobody trained."""
    settings = resolve("demo", width=0.0625, roi_size=32, mask_size=32)
    torch.manual_seed(0)
    content = {"model": build_model(settings).state_dict(), "average": None}
    content |= {"settings": settings.model_dump(mode="json"), "mean_coverage": torch.zeros(32, 32, 2)}
    file = tmp_path_factory.mktemp("weights") / "weights.pt"
    checkpoints.save(file, content)
    return str(file)


@pytest.fixture
def people(coco_files):
    """Four images, of which one has no person, one is cut short and one is missing; one is not listed."""
    for name in ("a.png", "b.png", "none.png", "cut.jpg", "gone.png"):
        image = coco_files.image((40, 60), name)
        if name != "none.png":
            coco_files.person(image, (5, 5, 25, 35))
    coco_files.person(1, (30, 5, 50, 35))
    coco_files.person(2, (1, 1, 20, 20), iscrowd=1)
    coco_files.truncate(4)
    (coco_files.images / "gone.png").unlink()
    Image.new("RGB", (9, 9)).save(coco_files.images / "other.png")
    coco_files.source()
    return coco_files


def predict(weights, *words):
    return main(["predict", weights, *map(str, words), "--device", "cpu"])


def test_a_folder_with_annotations(weights, people, tmp_path, capsys):
    out, places = tmp_path / "out", (people.images, "--annotations", people.annotations)
    assert predict(weights, *places, "--out", out, "--overlays") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"masks: 3, images: 2; in {out}: a folder for each image, {RESULTS}\n")
    for line in (
        "left out: 1 x image without a box in the annotations: ",
        "left out: 1 x unreadable image: ",
        "left out: 1 x missing image: ",
        "left out: 1 x image that the annotations do not list: ",
    ):
        assert line in told
    found = COCO(people.annotations).loadRes(str(out / RESULTS))
    assert sorted(one["image_id"] for one in found.anns.values()) == [1, 1, 2]
    assert {one["category_id"] for one in found.anns.values()} == {1}
    assert sorted(file.name for file in (out / "a").iterdir()) == [
        *("a_coco.json", "a_overlay.png", "a_person0.png", "a_person1.png", "image.json")
    ]
    first = next(one for one in found.anns.values() if one["image_id"] == 1)
    masks = [np.array(Image.open(out / "a" / f"a_person{number}.png")) for number in (0, 1)]
    assert (np.array([found.annToMask(first) * 255]) == masks).all((1, 2)).any()
    assert predict(weights, *places, "--out", out) == 2
    assert f"{out} holds files: give an empty folder, or --overwrite" in capsys.readouterr().err
    assert predict(weights, *places, "--out", out, "--overwrite") == 0
    assert not (out / "a" / "a_overlay.png").exists()  # it would be of other masks
    assert not (out / "none").exists()


def test_an_image_with_boxes(weights, people, tmp_path, capsys):
    out = tmp_path / "out"
    boxes = ("--boxes", "5,5,25,35", "30,5,50,35.5")
    assert predict(weights, people.images / "a.png", *boxes, "--out", out) == 0
    assert len(json.loads((out / RESULTS).read_text())) == 2
    assert not (out / "a" / "a_overlay.png").exists() and capsys.readouterr().out.startswith(
        "masks: 2, images: 1; "
    )
    one = ("--annotations", people.annotations, "--out", tmp_path / "listed")
    assert predict(weights, people.images / "b.png", *one) == 0
    (entry,) = json.loads((tmp_path / "listed" / RESULTS).read_text())
    assert entry["image_id"] == 2


def test_a_box_may_begin_outside_the_image(weights, people, tmp_path, capsys):
    image, areas = people.images / "a.png", {}
    for name, box in (("outside", "-5,-.5,25,35"), ("as one word", "--boxes=-5,-.5,25,35")):
        words = [box] if box.startswith("--") else ["--boxes", box, "5,5,25,35"]
        assert predict(weights, image, *words, "--out", tmp_path / name) == 0
        areas[name] = json.loads((tmp_path / name / RESULTS).read_text())[0]["segmentation"]
    assert areas["outside"] == areas["as one word"]
    assert "whose masks end at its edge: 1\n" in capsys.readouterr().out


def test_earlier_predictions_among_the_images_are_not_counted(weights, people, tmp_path, capsys):
    words = people.images, "--annotations", people.annotations, "--out", people.images / "out"
    for more in ((), ("--overwrite",)):
        assert predict(weights, *words, *more) == 0
        assert "left out: 1 x image that the annotations do not list" in capsys.readouterr().out


def test_images_are_read_as_the_run_reads_them(weights, people, tmp_path):
    """A photograph on its side, and a run that was trained with such turned upright."""
    picture = Image.open(people.images / "a.png").convert("RGB")
    turned = picture.getexif()
    turned[0x0112] = 6
    picture.save(tmp_path / "side.jpg", exif=turned)
    seen = []
    predictor = load(weights, device="cpu")
    for exif in ("ignore", "apply"):
        predictor.settings = predictor.settings.model_copy(update={"exif": exif})
        out = tmp_path / exif
        predict_images(predictor, tmp_path / "side.jpg", out, boxes=["2,2,30,30"])
        seen.append(Image.open(next(out.rglob("*.png"))).size)
    assert seen == [picture.size, picture.size[::-1]]


@pytest.mark.parametrize(
    "path, more, sentence",
    [
        ("a.png", (), "boxes are needed: give --boxes x0,y0,x1,y1 in pixels, or --annotations"),
        (".", (), "boxes are needed"),
        (".", ("--boxes", "1,2,4,6"), "--boxes are those of one image"),
        ("a.png", ("--boxes", "1,2,3"), "give x0, y0, x1, y1 in pixels"),
        ("a.png", ("--boxes", "1,2,1,6"), "a box of no area: give x0"),
        ("a.png", ("--boxes", "100,2,105,7"), "such as 10,20,110,220; the image has 60 x 40 pixels"),
        ("cut.jpg", ("--boxes", "1,2,6,7"), "cut.jpg"),
        ("nowhere.png", ("--boxes", "1,2,6,7"), "nowhere.png"),
        ("a.png", ("--annotations", "nowhere.json"), "nowhere.json"),
        ("none.png", ("--annotations", "{json}"), "has no person's box that can be used"),
    ],
)
def test_what_is_missing_is_a_sentence(weights, people, tmp_path, capsys, path, more, sentence):
    more = [word.format(json=people.annotations) for word in more]
    assert predict(weights, people.images / path, *more, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("predict: ") and sentence in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_which_nothing_can_be_used(weights, people, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    where = ("--annotations", people.annotations, "--out", tmp_path / "out")
    assert predict(weights, tmp_path / "empty", *where) == 2
    assert "could be predicted: missing image (5); such as" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(weights, people, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    out = ("--out", tmp_path / "out")
    assert predict(weights, people.images, "--annotations", people.annotations, *out) == 0
    assert "predict:" in terminal.getvalue() and "5/5" in terminal.getvalue()
