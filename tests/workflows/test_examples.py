"""Runs for a notebook that was given none."""

from __future__ import annotations

import os

from helpers import make_run

from refinelib import resolve
from refinelib.config import SMOKE_VARIABLE
from refinelib.workflows import examples


def test_the_newest_run_that_fits_is_taken(tmp_path):
    for age, name in enumerate(("new", "old")):
        make_run(tmp_path / name)
        for file in (tmp_path / name).glob("*.json*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert examples.find(output_dir=str(tmp_path)).name == "new"
    assert examples.find(output_dir=str(tmp_path), fits=lambda run: run.name == "old").name == "old"
    assert examples.find("old", output_dir=str(tmp_path)).name == "old"


def test_smoke_size_and_tiny_runs_say_so_and_others_do_not(tmp_path, monkeypatch):
    from IPython import display as ipython_display

    shown = []
    monkeypatch.setattr(ipython_display, "display", lambda text: shown.append(text.data))
    monkeypatch.delenv(SMOKE_VARIABLE, raising=False)
    real, tiny = make_run(tmp_path / "a"), make_run(tmp_path / "b", recipe="debug")
    examples.note_size(real, real.settings())
    examples.note_size()
    assert shown == []
    examples.note_size(real, tiny)
    examples.note_size(resolve("demo", smoke=True))
    monkeypatch.setenv(SMOKE_VARIABLE, "1")
    examples.note_size(real)
    assert ["A tiny run" in shown[0], "Smoke size" in shown[1], "Smoke size" in shown[2]] == [True] * 3
    assert all("says anything about the method" in text for text in shown)
