"""Executed copies for readers on the web: one of each notebook, small, with nothing of the machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from refinelib.config import project_root

GALLERY, NOTEBOOKS = project_root() / "gallery", project_root() / "notebooks"
COPIES = sorted(GALLERY.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.~/])/(work|tmp|root|home)\b")

each_copy = pytest.mark.parametrize("path", COPIES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", GALLERY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(notebook) -> list[str]:
    """All that a reader sees but pictures: base64 may spell any word."""
    found = [str(notebook.metadata)] + [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        for item in cell.get("outputs", []):
            found += [item.get("text", ""), "\n".join(item.get("traceback", []))]
            found += [text for kind, text in item.get("data", {}).items() if not kind.startswith("image/")]
    return found


def test_there_is_one_of_each_notebook_and_the_readmes_name_it():
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert [path.stem for path in COPIES] == names
    for name in names:
        assert f"(gallery/{name}.ipynb)" in (project_root() / "README.md").read_text()
        assert f"({name}.ipynb)" in (GALLERY / "README.md").read_text()


@each_copy
def test_executed_whole_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"gallery", "kernelspec", "language_info"}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
        for item in cell.get("outputs", []):
            assert item.output_type != "error", cell.id
            assert not [kind for kind in item.get("data", {}) if "widget" in kind], cell.id
    found = [match.group() for text in texts(notebook) for match in MACHINE.finditer(text)]
    assert not found, "folders of the machine it was executed on"


@each_copy
def test_pictures_are_small(path, make):
    for cell in nbformat.read(path, as_version=4).cells:
        for item in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & set(item.get("data", {})):
                data = base64.b64decode(item.data[kind])
                mode = Image.open(io.BytesIO(data)).mode
                assert len(data) <= make.PICTURE_BYTES, cell.id
                assert mode == ("P" if kind == "image/png" else "RGB"), cell.id


def test_sizes():
    assert (
        sum(path.stat().st_size for path in GALLERY.rglob("*") if path.is_file() and path.suffix != ".pyc")
        < 3e6
    )
    assert sum(path.stat().st_size for path in NOTEBOOKS.glob("*.ipynb")) < 1e6


# -- how they are made -----------------------------------------------------------------------------
def test_a_picture_becomes_small(make):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    noise[:, 100:] = 200
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    kind, small = make.small_picture(file.getvalue(), 20_000)
    assert kind == "image/jpeg" and len(small) <= 20_000 < len(file.getvalue())
    shown = np.asarray(Image.open(io.BytesIO(small)).convert("L"), float)
    assert shown[:, : shown.shape[1] // 5].std() > 10 and shown[-40:, -40:].std() < 3
    flat = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(flat, "PNG")
    kind, small = make.small_picture(flat.getvalue())
    picture = Image.open(io.BytesIO(small))
    assert kind == "image/png" and picture.size == (40, 30) and picture.mode == "P"
    assert set(np.asarray(picture.convert("RGB")).ravel()) == {200}


def test_nothing_of_the_machine_is_kept(make):
    v4 = nbformat.v4
    where = "/tmp/x/outputs"
    cells = [
        v4.new_code_cell("run = None", metadata={"tags": ["parameters"], "papermill": {"duration": 1}}),
        v4.new_code_cell(
            f'# Parameters\ndata_dir = "/home/me/.coco"\noutput_dir = "{where}"',
            metadata={"tags": ["injected-parameters"]},
        ),
        v4.new_code_cell("1", metadata={"execution": {}}, outputs=[
            v4.new_output("stream", name="stdout", text=f"{where}/demo {where}/rootcause\n"),
            v4.new_output("stream", name="stdout", text=f"{project_root()}/params/demo.yaml"),
            v4.new_output(
                "display_data",
                data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children=1)"},
            ),
            v4.new_output(
                "execute_result",
                data={"text/markdown": "`/home/me/.coco/a.jpg`", "text/plain": "<Markdown>"},
            ),
        ]),
    ]  # fmt: skip
    given = {"data_dir": "/home/me/.coco", "output_dir": where}
    done = make.clean(v4.new_notebook(cells=cells), given, 3.2, "a machine", "2026-01-02")
    assert (
        done.cells[1].source == '# Parameters\ndata_dir = "~/coco"'
        and done.cells[1].id == "injected-parameters"
    )
    assert [dict(cell.metadata) for cell in done.cells] == [
        {"tags": ["parameters"]},
        {"tags": ["injected-parameters"]},
        {},
    ]
    stream, markdown = done.cells[2].outputs
    assert stream.text == "outputs/demo outputs/rootcause\nparams/demo.yaml"
    assert dict(markdown.data) == {"text/markdown": "`~/coco/a.jpg`"}
    assert done.metadata.gallery == {
        "date": "2026-01-02",
        "device": "a machine",
        "seconds": 3,
        "parameters": "-p data_dir '~/coco'",
    }
    assert not any(MACHINE.search(text) for text in texts(done))
