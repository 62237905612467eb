"""Runs for a notebook that was given none."""

from __future__ import annotations

import os

from helpers import make_run

from refinelib.workflows import examples


def test_the_newest_run_that_fits_is_taken(tmp_path):
    for age, name in enumerate(("new", "old")):
        make_run(tmp_path / name)
        for file in (tmp_path / name).glob("*.json*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert examples.find(output_dir=str(tmp_path)).name == "new"
    assert examples.find(output_dir=str(tmp_path), fits=lambda run: run.name == "old").name == "old"
    assert examples.find("old", output_dir=str(tmp_path)).name == "old"
