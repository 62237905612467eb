"""Figures of the checks find the checks that workflows.checks records."""

from __future__ import annotations

import json

import pytest

from refinelib.plots import checks as plots
from refinelib.workflows import checks

MEASURED = {
    "overfit": {"loss": [3.0, None, 0.2], "target_iou": [0.1, 0.5, 0.97], "enough": [0.95, 0.1]},
    "gradients": {"norms": {"stem.0.weight": 0.5, "stem.0.bias": None, "contour.head.weight": 0.0}},
}


def name_of(check) -> str:
    """The name under which a check is recorded; without arguments it breaks off at once."""
    return check().name


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_drawn(tmp_path, name):
    record = {"name": name_of(getattr(checks, name)), "passed": False, "sentence": "the head has no gradient"}
    file, draw = tmp_path / "checks.json", getattr(plots, name)
    file.write_text(json.dumps({"checks": [record | {"figures": MEASURED[name]}]}))
    figure = draw(tmp_path)
    assert figure.axes and "[failed]" in figure.get_suptitle() and figure._repr_png_()
    file.write_text(json.dumps({"checks": [record | {"figures": {}}]}))  # it broke off
    assert "the head has no gradient" in [text.get_text() for text in draw(tmp_path).texts]
