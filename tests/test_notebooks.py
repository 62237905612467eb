"""Notebooks as stored, and papermill's traps in one run of train.ipynb; nbval executes all of them."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import nbformat
import pytest
from helpers import papermill, read
from papermill import inspect_notebook

from refinelib.config import parameters_cell, project_root, settings_class
from refinelib.runs import Run

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
TRAIN = project_root() / "notebooks" / "train.ipynb"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def parameters(path: Path) -> list[str]:
    """Lines of the tagged parameters cell, without comments that stand alone."""
    (cell,) = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    return [line for line in cell.source.splitlines() if line and not line.startswith("#")]


# -- as stored -------------------------------------------------------------------------------------
def test_there_are_notebooks():
    assert TRAIN in NOTEBOOKS


@each_notebook
def test_stored_clean(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, (
                f"cell {cell.id} is stored with what it printed"
            )
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_tells_a_story(path: Path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    missing = [word for word in ("CPU", "GPU", "Needs") if word not in cells[0].source]
    assert not missing, "the first cell says how long it takes and what it needs"
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", f"no prose above {cell.id}"


@each_notebook
def test_cells_are_short_and_hold_no_class(path: Path):
    for cell in read(path).cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        assert len(cell.source.splitlines()) <= 40, cell.id
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), cell.id
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 8, cell.id


@each_notebook
def test_papermill_reads_every_parameter(path: Path):
    """One that it cannot parse (an equals sign in the comment does it) is missing in ``--help-notebook``."""
    lines = parameters(path)
    assert lines and all(
        isinstance(ast.parse(line).body[0], ast.AnnAssign) and "  # " in line for line in lines
    )
    found = inspect_notebook(str(path))
    assert list(found) == [line.split(":")[0] for line in lines]
    assert all(entry["help"] and entry["inferred_type_name"] != "None" for entry in found.values())


@each_notebook
def test_smoke_size_is_told(path: Path):
    """Above the first figure or table, by what ``examples.note_size`` says of it."""
    code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    assert any("examples.note_size(" in source for source in code[1:4])


def test_the_list_of_all_settings_is_folded():
    """Else four screens of it stand before the first picture."""
    assert read(TRAIN).cells[2].metadata.jupyter.source_hidden


def test_train_offers_every_setting():
    (cell,) = [cell for cell in read(TRAIN).cells if "parameters" in cell.metadata.get("tags", [])]
    assert cell.source == parameters_cell(), "settings changed: put config.parameters_cell() into train.ipynb"
    assert {line.split(":")[0] for line in parameters(TRAIN)} == {*settings_class().model_fields, "base"}


@pytest.mark.parametrize("name, own", [("debug", {"recipe"}), ("progressive", {"init_from"})])
def test_a_parameter_that_is_a_setting_says_the_same_everywhere(name, own):
    settings = {line.split(":")[0]: line for line in parameters_cell().splitlines()}
    for line in parameters(TRAIN.with_name(f"{name}.ipynb")):
        setting = line.split(":")[0]
        assert setting in own or line == settings.get(setting, line)


def test_train_checks_its_settings_before_anything_else():
    code = [cell for cell in read(TRAIN).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert (
        code[1].source.startswith("from refinelib.config import")
        and "from_notebook(globals())" in code[1].source
    )


# -- as run ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with ``out.ipynb``, train.ipynb as executed by the command line, and ``runs/second``."""
    folder = tmp_path_factory.mktemp("papermill")
    notebook = read(TRAIN)
    check = "again = from_notebook(globals())\nassert again == settings, (again, settings)"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbformat.write(notebook, folder / "train.ipynb")
    done = papermill(
        *(folder / "train.ipynb", folder / "out.ipynb", "-f", "../params/phase4.yaml", "-p", "lr", "5e-6"),
        *("-p", "init_from", "none", "-p", "use_contour_detection", "false", "-p", "run", "second"),
        *("-p", "output_dir", folder / "runs"),
        cwd=TRAIN.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_number_a_flag_and_a_recipe_file_are_what_they_mean(trained: Path):
    """Also: the settings cell gives the same settings when it is run again after all the others."""
    run = Run(trained / "runs" / "second")
    settings = run.settings()
    assert run.status()["state"] == "ok" and settings.smoke and settings.lr == 5e-6
    assert (settings.recipe, settings.use_contour_detection, settings.use_distance_transform) == (
        "phase4", False, True
    )  # fmt: skip
    assert "contour" not in run.steps()[0]["losses"]


@pytest.mark.slow
def test_figures_are_saved_and_shown_once_and_nothing_untidy_is_kept(trained: Path):
    figures = {"overview", "losses", "gradient_norm", "learning_rate", "ious", "samples"}
    assert {file.stem for file in (trained / "runs" / "second" / "figures").glob("*.png")} == figures
    notebook = read(trained / "out.ipynb")
    outputs = [(cell.id, item) for cell in notebook.cells for item in cell.get("outputs", [])]
    pictures = [cell for cell, item in outputs if "image/png" in item.get("data", {})]
    assert sorted(pictures) == sorted({"data"} | {name.replace("_", "-") for name in figures})
    assert "widgets" not in notebook.metadata


@pytest.mark.slow
def test_a_wrong_parameter_stops_papermill_before_anything_is_trained(tmp_path: Path):
    """What else is refused, and how: test_config.py."""
    given = ("-p", "learning_rate", "1e-3", "-p", "output_dir", tmp_path / "runs")
    done = papermill("notebooks/train.ipynb", tmp_path / "out.ipynb", *given, cwd=project_root())
    assert done.returncode != 0
    assert "there is no setting 'learning_rate'; did you mean 'lr'?" in done.stderr
    assert not (tmp_path / "runs").exists()
    reached = [cell.id for cell in read(tmp_path / "out.ipynb").cells if cell.get("execution_count")]
    assert reached[-1] == "settings"
