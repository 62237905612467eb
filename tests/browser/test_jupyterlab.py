"""Every notebook in JupyterLab, in smoke size: open, run all, move each widget, look at the page.

``make browser`` runs this; ``make test`` leaves it out. A picture of each page and the wall times go into
``outputs/browser``.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path

import nbformat
import pytest
from lab import FLAGS, HEIGHT, WIDTH, Notebook, Server, Widgets, chromium
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from refinelib.config import project_root

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no browser test: Playwright is not installed; make browser installs it"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        chromium() is None, reason="no browser test: there is no Chromium; make browser says how to get it"
    ),
]

#: Slowest first, so that two at a time end at about the same time.
NOTEBOOKS = [
    "rootcause",
    "progressive",
    "results",
    "compare",
    "train",
    "predict",
    "guard",
    "incident",
    "gradients",
    "debug",
]
#: What must be there to be moved, by cell.
WIDGETS = {
    "train": {"epochs-slider": ["epoch"]},
    "gradients": {"picker": ["layers"]},
    "predict": {"boxes": []},
}
#: Seconds that a notebook may run on two busy cores.
LIMIT = {"rootcause": 600}
LEFT = project_root() / "outputs" / "browser"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    yield context.new_page()
    context.close()


def test_every_notebook_is_here():
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in (project_root() / "notebooks").glob("*.ipynb"))


def _serve(server: Server, name: str, runs: Path) -> None:
    """The notebook with ``output_dir`` set as papermill sets it, in a cell after the parameters."""
    notebook = load_notebook_node(str(project_root() / "notebooks" / f"{name}.ipynb"))
    given = parameterize_notebook(
        notebook, {"output_dir": str(runs)}, kernel_name="python3", language="python"
    )
    nbformat.write(given, server.root / f"{name}.ipynb")


def _record(name: str, **seconds: float) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {
        "notebook": name,
        "date": now,
        "cores": len(os.sched_getaffinity(0)),
        **{key: round(value, 1) for key, value in seconds.items()},
    }
    with (LEFT / "times.jsonl").open("a") as file:  # one short write: notebooks may run side by side
        file.write(json.dumps(line) + "\n")


def _move(widgets: Widgets) -> None:
    """Move each control there is, here and there; the picture must answer each time."""
    labels = widgets.labels()
    if not labels:  # a picture to draw boxes on
        assert widgets.draw_box(0.1) < widgets.draw_box(0.6)
    for label in labels:
        if label == "epoch":
            widgets.answers(widgets.drag, label, 0.0)
            widgets.answers(widgets.drag, label, 1.0)
        elif label == "layers":
            first, *others = widgets.options(label)
            for option in (*others[::5], first):
                widgets.answers(widgets.pick, label, option)
        else:
            raise AssertionError(f"{widgets.name}: what is {label}?")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_top_to_bottom_and_its_widgets_answer(name, server, page, tmp_path):
    LEFT.mkdir(parents=True, exist_ok=True)
    _serve(server, name, tmp_path / "runs")
    began = time.monotonic()
    notebook = Notebook(page, server, name)
    opened = time.monotonic()
    panels: dict[str, None] = {}

    def watch() -> None:
        """Pictures of the cell that trains, while it trains."""
        for cell in notebook.cells():
            if cell["id"] == "train":
                panels.update(
                    {
                        item["data"]["image/png"]: None
                        for item in cell["outputs"]
                        if "image/png" in item.get("data", {})
                    }
                )

    notebook.run_all(LIMIT.get(name, 200), watch)
    ran = time.monotonic()
    assert not notebook.errors()
    found = {widgets.name: widgets for widgets in notebook.widgets()}
    assert {cell: widgets.labels() for cell, widgets in found.items()} == WIDGETS.get(name, {})
    for widgets in found.values():
        _move(widgets)
    moved = time.monotonic()
    cut_off = notebook.screenshot(LEFT / f"{name}.png")
    _record(name, open_s=opened - began, run_s=ran - opened, widgets_s=moved - ran)
    assert not cut_off
    assert not notebook.complaints
    if panels:  # losses and masks, redrawn after each epoch, in the same two places
        (cell,) = [cell for cell in notebook.cells() if cell["id"] == "train"]
        assert sum("image/png" in item.get("data", {}) for item in cell["outputs"]) == 2
        assert len(panels) > 2
    assert bool(panels) == (name in ("train", "progressive"))
