"""``python -m refinelib train``: a recipe in one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from refinelib.__main__ import main
from refinelib.config import project_root

TINY = dict(max_images=6, width=0.0625, roi_size=32, mask_size=32, batch_size=3, probe_every=0, device="cpu")


def arguments(tmp_path, stores, **more):
    settings = {**TINY, "output_dir": tmp_path, "store_dir": stores, **more}
    return ["train", "-f", "demo", *(word for pair in settings.items() for word in ("-p", *map(str, pair)))]


def test_a_recipe_is_trained_and_summarised(tmp_path, stores, capsys):
    assert main(arguments(tmp_path, stores, epochs=1)) == 0
    assert "IoU of target" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo" / "status.json").read_text())["state"] == "ok"


@pytest.mark.parametrize(
    "more, told",
    [
        ({"lrr": 1}, "no setting 'lrr'; did you mean 'lr'"),
        ({"data": "coco"}, "no train annotations of COCO are given: give data_dir"),
        pytest.param(
            {"inject": "loss:nan@1:always", "epochs": 3, "max_consecutive_skips": 2},
            "train: diverged: ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_wrong_is_a_sentence_and_an_exit_code(tmp_path, stores, capsys, more, told):
    assert main(arguments(tmp_path, stores, **more)) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_it_goes_on(tmp_path, stores):
    command = [sys.executable, "-m", "refinelib", *arguments(tmp_path, stores, epochs=12)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project_root())}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        epoch, start = tmp_path / "demo" / "metrics.jsonl", time.time()
        while not (epoch.exists() and epoch.read_text().count("\n") > 2) and time.time() - start < 120:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert (
            "with -p resume true goes on" in running.communicate(timeout=60)[1] and running.returncode == 130
        )
    status = tmp_path / "demo" / "status.json"
    assert json.loads(status.read_text())["state"] == "interrupted"
    assert main(arguments(tmp_path, stores, epochs=12, resume="true")) == 0
    assert json.loads(status.read_text())["state"] == "ok"
