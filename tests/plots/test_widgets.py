"""Widgets: where somebody watches they answer, elsewhere there is nothing at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys

import ipykernel  # noqa: F401  # as in a notebook
import nbclient
import nbformat
import numpy as np
import pytest
from helpers import make_run

import refinelib
from refinelib.gradients import read
from refinelib.plots import gradients as gradient_plots
from refinelib.plots import masks as pictures
from refinelib.plots import widgets
from refinelib.runs import Run
from refinelib.workflows.examples import tiny


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return tiny(str(tmp_path_factory.mktemp("runs")), epochs=2, max_images=6)


def test_nothing_is_made_where_nobody_watches(trained, monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: False)
    import ipywidgets

    def forbidden(*_, **__):
        raise AssertionError("a widget was made")

    monkeypatch.setattr(ipywidgets.Widget, "__init__", forbidden)
    assert widgets.live_panel() is None
    assert all(make(trained) is None for make in (widgets.epoch_slider, widgets.layer_picker))


def test_the_epoch_slider_shows_the_masks_of_its_epoch(tmp_path, watched):
    run = make_run(tmp_path / "run")
    box = widgets.epoch_slider(run, kinds=("worst",), per_kind=2)
    slider, picture, note = box.children
    assert slider.options == (1, 2, 3) and slider.value == 3
    before = bytes(picture.value)
    slider.value = 1
    assert bytes(picture.value) != before
    assert bytes(picture.value) == pictures.sample_grid(run, 1, kinds=("worst",), per_kind=2)._repr_png_()
    (run.folder / "samples" / "epoch_0002.npz").unlink()  # a resumed run takes its later epochs away
    slider.value = 2
    assert "no masks of epoch 2; there are 1, 3" in note.value
    slider.value = 3
    assert note.value == "" and bytes(picture.value) == before


def test_the_layer_picker_shows_the_layers_of_a_module(trained, watched):
    picker, picture, _ = widgets.layer_picker(trained).children
    assert bytes(picture.value) == gradient_plots.module_norms(trained, read(trained))._repr_png_()
    found = read(trained)
    for module, value in picker.options[1:]:  # "person" must not bring "person_head" with it
        assert {name.split(".")[0] for name in found.select(value)} == {module}
    picker.value = "boundary."
    assert (
        bytes(picture.value) == gradient_plots.module_norms(trained, read(trained), "boundary.")._repr_png_()
    )


def test_a_run_with_nothing_on_disk_yet_has_no_widgets(tmp_path, watched):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "status.json").write_text(json.dumps({"state": "running"}))
    assert all(make(tmp_path / "new") is None for make in (widgets.epoch_slider, widgets.layer_picker))


def test_the_live_panel_is_shown_once_and_then_replaced_in_place(tmp_path, watched, monkeypatch):
    """A display that is updated, no widget: the notebook keeps pictures and no state."""
    from IPython import display as ipython_display

    shown, updated = [], []

    class Handle:
        def update(self, figure):
            updated.append(figure._repr_png_())

    def display(figure, *, display_id):
        shown.append(figure._repr_png_())
        return Handle()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(ipython_display, "display", display)
    settings = refinelib.resolve("debug", output_dir=str(tmp_path), smoke=True, epochs=2)
    run = refinelib.train(settings, on_epoch=widgets.live_panel(samples=2))
    assert len(shown) == 2 and len(updated) == 4  # two epochs and the end of the run
    assert len({shown[0], *updated[::2]}) == len({shown[1], *updated[1::2]}) == 3
    assert "ipykernel" in sys.modules and terminal.getvalue() == ""  # no bar whose old states would stay
    assert run.status()["state"] == "ok"
    assert all(part.startswith(b"\x89PNG") for part in shown + updated)


@pytest.mark.parametrize(
    "inject, state",
    [
        pytest.param("", "ok", marks=pytest.mark.slow),
        ("loss:nan@1:always", "diverged"),
        pytest.param("kernel", "interrupted", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_live_panel_shows_how_the_run_ended(tmp_path, watched, monkeypatch, inject, state):
    from IPython import display as ipython_display

    titles = []

    class Handle:
        def update(self, figure):
            titles.append(figure.get_suptitle())

    def stop(run):
        panel(run)
        if inject == "kernel":  # as a click on the button
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ipython_display, "display", lambda figure, **_: Handle())
    panel = widgets.live_panel(samples=2)
    size = {"smoke": True, "epochs": 2, "inject": inject.replace("kernel", "") or None, "max_rewinds": 0}
    settings = refinelib.resolve("debug", output_dir=str(tmp_path), **size)
    with contextlib.suppress(refinelib.DivergedError, KeyboardInterrupt):
        refinelib.train(settings, on_epoch=stop)
    assert refinelib.Run.open(tmp_path / "debug").status()["state"] == state
    epoch = 2 if state == "ok" else 1
    assert all(f"[{state}, epoch {epoch} of 2" in title for title in titles[-2:])


@pytest.mark.slow
def test_in_a_watched_kernel_the_panel_is_two_pictures_and_the_sliders_are_widgets(trained, monkeypatch):
    """A real kernel, told that a Jupyter server started it; what the page holds afterwards."""
    monkeypatch.setenv("JPY_SESSION_NAME", "watched.ipynb")
    source = f"""
from refinelib.plots import widgets
from refinelib.runs import Run
run, panel = Run.open({str(trained.folder)!r}), widgets.live_panel()
panel(run)
panel(run)
"""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(text)
            for text in (source, "widgets.epoch_slider(run)", "widgets.layer_picker(run)")
        ]
    )
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    pictures = [item for item in notebook.cells[0].outputs if "image/png" in item.get("data", {})]
    assert len(pictures) == 2  # replaced in place: two epochs do not make four
    for cell in notebook.cells[1:]:
        assert "application/vnd.jupyter.widget-view+json" in cell.outputs[0].data


def test_boxes_are_drawn_by_hand_and_read_in_the_next_cell(watched):
    given = [1.25, 2.1, 30.7, 35.3]
    picker = widgets.BoxPicker(np.zeros((40, 60, 3), np.uint8), [given])
    assert picker.boxes == [given] and picker.widget() is picker.widget()
    drawn = picker.widget()
    assert bytes(drawn.image_bytes).startswith(b"\xff\xd8") and "vh)" in drawn.layout.width
    assert picker.boxes == [given]  # to the last bit: such a box keeps its category
    box = {"label": "", "y": 10, "height": 28}
    more = [{**box, "x": 5, "width": 20}, {**box, "x": 50, "width": 20}, {**box, "x": 7, "width": 0}]
    drawn.bboxes = [*drawn.bboxes, *more]  # as the browser does; the last has no area
    assert picker.boxes == [given, [5, 10, 25, 38], [50, 10, 60, 38]]
    drawn.bboxes = []
    assert picker.boxes == []


def test_without_a_viewer_the_boxes_are_a_picture(monkeypatch):
    from IPython import display as ipython_display

    shown = []
    monkeypatch.setattr(ipython_display, "display", shown.append)
    picker = widgets.BoxPicker(np.zeros((40, 60, 3), np.uint8), [[1, 2, 30, 35]])
    monkeypatch.setattr(widgets, "interactive", lambda: False)
    picker._ipython_display_()
    assert shown[0]._repr_png_().startswith(b"\x89PNG") and picker._widget is None
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    picker._ipython_display_()
    assert shown[1] is picker.widget()
