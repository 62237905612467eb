"""What the commands' help says is what they do."""

import subprocess
import sys

import numpy as np
import pytest

from refinelib.__main__ import main
from refinelib.metrics.evaluate import Evaluation


def told(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_help_of_save_names_every_file(tmp_path, capsys):
    evaluation = Evaluation({}, {"annotation_id": np.array([1])}, [], {}, np.zeros((1, 3, 3)))
    files = {file.name for file in evaluation.save(tmp_path)}
    assert files == {file.name for file in tmp_path.iterdir()}
    text = told(capsys, "evaluate")
    assert not [name for name in files if name not in text]


@pytest.mark.parametrize("command", ["train", "run"])
def test_the_help_says_where_the_settings_are(capsys, command):
    assert "papermill --help-notebook notebooks/train.ipynb" in told(capsys, command)


@pytest.mark.parametrize("command", ["evaluate", "replay", "predict"])
def test_the_help_says_which_devices_there_are(capsys, command):
    assert "auto, cpu, mps, cuda, or one GPU as cuda:1" in told(capsys, command)


@pytest.mark.parametrize(
    "words",
    [["evaluate", "{run}", "--images", ".", "--annotations", "x.json"], ["predict", "{run}", "{image}"]],
)
def test_a_device_that_is_none_is_refused_in_a_sentence(tmp_path, capsys, words, tiny):
    import torch
    from PIL import Image

    from refinelib import checkpoints
    from refinelib.build import build_model

    settings, image, weights = tiny(), tmp_path / "a.png", tmp_path / "weights.pt"
    Image.new("RGB", (60, 40)).save(image)
    content = {"model": build_model(settings).state_dict(), "average": None}
    content |= {"settings": settings.model_dump(mode="json"), "mean_coverage": torch.zeros(32, 32, 2)}
    checkpoints.save(weights, content)
    words = [word.format(run=weights, image=image) for word in words]
    words += ["--boxes", "1,1,9,9", "--out", str(tmp_path / "out")] if words[0] == "predict" else []
    assert main([*words, "--device", "gpu:1"]) == 2
    assert "device = 'gpu:1': give auto, cpu, mps, cuda, or one GPU by its number" in capsys.readouterr().err


def test_a_reader_that_closes_early_is_no_error():
    program = (
        "import sys; from refinelib import __main__ as m; m._doctor = lambda given: print('x' * 99999) or 0"
    )
    command = [sys.executable, "-c", f"{program}; sys.exit(m.main(['doctor']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
