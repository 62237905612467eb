"""Notebooks as people run them: how they are stored, and papermill's traps, for real and in smoke size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import papermill, read
from papermill import inspect_notebook

from refinelib.config import Settings, parameters_cell, project_root
from refinelib.runs import Run

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
TRAIN = project_root() / "notebooks" / "train.ipynb"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)






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
            assert cell.outputs == [] and cell.execution_count is None, f"cell {cell.id} is stored with what it printed"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_tells_a_story(path: Path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    missing = [word for word in ("CPU", "GPU", "Needs") if word not in cells[0].source]
    assert not missing, "the first cell says how long it takes and what it needs"
    for before, cell in zip(cells, cells[1:]):
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
def test_has_a_parameters_cell_with_types_and_comments(path: Path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in tagged[0].source.splitlines() if line and not line.startswith("#")]
    assert lines and all(isinstance(ast.parse(line).body[0], ast.AnnAssign) and "  # " in line for line in lines)


@each_notebook
def test_papermill_reads_every_parameter(path: Path):
    """One that it cannot parse (an equals sign in the comment does it) is missing in ``--help-notebook``."""
    tagged = next(cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", []))
    found = inspect_notebook(str(path))
    assert set(found) == {node.target.id for node in ast.parse(tagged.source).body}
    assert all(entry["help"] and entry["inferred_type_name"] != "None" for entry in found.values())


def test_train_offers_every_setting():
    tagged = next(cell for cell in read(TRAIN).cells if "parameters" in cell.metadata.get("tags", []))
    assert tagged.source == parameters_cell(), "settings changed: put config.parameters_cell() into train.ipynb again"
    assert {node.target.id for node in ast.parse(tagged.source).body} == set(Settings.model_fields)


def test_train_refuses_settings_before_it_imports_torch():
    code = [cell for cell in read(TRAIN).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert code[1].source.startswith("from refinelib.config import") and "from_notebook(globals())" in code[1].source
    loaded = "import sys\n" + code[1].source + "\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, cwd=project_root())


# -- as run ----------------------------------------------------------------------------------------
def check_run(folder: Path, executed: Path, output: str) -> Run:
    """The run finished in smoke size, its figures are on disk and shown, once each; nothing untidy is kept."""
    run = Run(folder)
    assert run.status()["state"] == "ok", output
    assert run.settings().smoke
    figures = {"overview", "losses", "gradient_norm", "learning_rate", "ious", "samples"}
    assert {file.stem for file in (folder / "figures").glob("*.png")} == figures
    notebook = read(executed)
    outputs = [(cell.id, item) for cell in notebook.cells for item in cell.get("outputs", [])]
    pictures = [cell for cell, item in outputs if "image/png" in item.get("data", {})]
    assert sorted(pictures) == sorted({"data"} | {name.replace("_", "-") for name in figures})
    assert "widgets" not in notebook.metadata
    return run


def test_papermill_inside_notebooks_with_a_small_learning_rate(tmp_path: Path):
    where = ("-p", "output_dir", tmp_path / "runs")
    done = papermill("train.ipynb", tmp_path / "out.ipynb", "-p", "lr", "5e-6", *where, cwd=TRAIN.parent)
    assert done.returncode == 0, done.stderr
    run = check_run(tmp_path / "runs" / "demo", tmp_path / "out.ipynb", done.stderr)
    assert run.settings().lr == 5e-6


def test_papermill_from_the_root_with_a_recipe_file_and_a_flag(tmp_path: Path):
    """Also: the settings cell gives the same settings when it is run again after all the others."""
    notebook = read(TRAIN)
    check = "again = from_notebook(globals())\nassert again == settings, (again, settings)"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbformat.write(notebook, tmp_path / "train.ipynb")
    done = papermill(
        *(tmp_path / "train.ipynb", tmp_path / "out.ipynb", "-f", "params/phase4.yaml"),
        *("-p", "use_contour_detection", "false", "-p", "run", "second", "-p", "output_dir", tmp_path / "runs"),
        cwd=project_root(),
    )
    assert done.returncode == 0, done.stderr
    run = check_run(tmp_path / "runs" / "second", tmp_path / "out.ipynb", done.stderr)
    settings = run.settings()
    assert (settings.recipe, settings.use_contour_detection, settings.use_distance_transform) == ("phase4", False, True)
    assert "contour" not in run.steps()[0]["losses"]


def test_papermill_stops_at_once_with_a_sentence(tmp_path: Path):
    """What else is refused, and how: test_config.py."""
    given = ("-p", "learning_rate", "1e-3", "-p", "output_dir", tmp_path / "runs")
    done = papermill("train.ipynb", tmp_path / "out.ipynb", *given, cwd=TRAIN.parent)
    assert done.returncode != 0
    assert "there is no setting 'learning_rate'; did you mean 'lr'?" in done.stderr
    assert not (tmp_path / "runs").exists()
    reached = [cell.id for cell in read(tmp_path / "out.ipynb").cells if cell.get("execution_count")]
    assert reached[-1] == "settings"


INCIDENT = project_root() / "notebooks" / "incident.ipynb"


def test_incident_makes_its_own_where_there_is_none_and_finds_it_again(tmp_path: Path):
    where = ("-p", "output_dir", tmp_path / "runs", "-p", "device", "cpu")
    done = papermill("incident.ipynb", tmp_path / "out.ipynb", *where, cwd=INCIDENT.parent)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "incident" / "incidents").iterdir()
    assert {file.stem for file in (folder / "figures").glob("*.png")} == {"pictures", "activations", "gradients", "parameter_gradients"}
    outputs = [(cell.id, item) for cell in read(tmp_path / "out.ipynb").cells for item in cell.get("outputs", [])]
    assert sorted(cell for cell, item in outputs if "image/png" in item.get("data", {})) == ["activations", "gradients", "parameter-gradients", "pictures"]
    text = "".join(item["text"] for cell, item in outputs if cell in ("words", "replay"))
    assert "planted by inject: activation:nan@5:contour" in text and "same step: bit for bit" in text
    assert "the first output that is not finite is that of contour: 1 of its" in text
    # by its folder, which may have come from another machine: no run around it
    travelled = (tmp_path / "elsewhere").with_suffix(".incident")
    folder.rename(travelled)
    done = papermill("notebooks/incident.ipynb", tmp_path / "out.ipynb", "-p", "incident", travelled, *where, cwd=project_root())
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs" / "incident-2").exists()


def pictures(executed: Path) -> list[str]:
    """Cells that show a picture; nothing untidy is kept."""
    notebook = read(executed)
    assert "widgets" not in notebook.metadata
    outputs = [(cell.id, item) for cell in notebook.cells for item in cell.get("outputs", [])]
    return [cell for cell, item in outputs if "image/png" in item.get("data", {})]


def test_predict_and_results_run_with_nothing_given(tmp_path: Path):
    """Each trains what it lacks; results leaves runs that predict then finds."""
    where = ("-p", "output_dir", tmp_path / "runs")
    done = papermill("results.ipynb", tmp_path / "results.ipynb", *where, cwd=TRAIN.parent)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "results.ipynb") == ["gains", "jitter", "worst-and-best", "closeups"]
    left = tmp_path / "runs" / "results"
    assert {file.stem for file in left.glob("*.png")} == {"gains", "jitter", "worst_and_best", "closeups"}
    assert "## Refinement on against off" in (left / "tables.md").read_text()
    assert (left / "tiny-refined" / "coco_results.json").is_file() and (left / "tiny-plain" / "people.csv").is_file()

    done = papermill("notebooks/predict.ipynb", tmp_path / "predict.ipynb", *where, cwd=project_root())
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "predict.ipynb") == ["boxes", "masks"]
    saved = {file.name for file in (tmp_path / "runs" / "predictions" / "synthetic").iterdir()}
    assert {"synthetic_overlay.png", "synthetic_coco.json", "synthetic_person0.png"} <= saved
    assert not (tmp_path / "runs" / "tiny").exists()

    runs = ("-p", "runs", f"{tmp_path}/runs/tiny-refined", "-p", "jitter", "false", "-p", "max_images", "4")
    done = papermill("results.ipynb", tmp_path / "alone.ipynb", *where, *runs, cwd=TRAIN.parent)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "alone.ipynb") == ["worst-and-best"]
