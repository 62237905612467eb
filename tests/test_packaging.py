"""What is installed: the wheel and the source distribution, and what an import costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import refinelib
from refinelib.__main__ import main
from refinelib.config import project_root, recipe_names
from refinelib.runs import Run

ROOT = project_root()
HEAVY = ("torch", "matplotlib", "scipy", "papermill", "tensorboard", "pycocotools", "numpy", "pydantic")
TINY = dict(epochs=1, max_images=6, width=0.0625, roi_size=32, mask_size=32, batch_size=3, device="cpu")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, with one thread."""
    full = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=full, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def tracked_files() -> list[str]:
    return run("git", "ls-files", cwd=ROOT).splitlines()


def test_an_import_of_the_package_imports_nothing_heavy():
    code = f"import sys, refinelib; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).strip() == "[]"


def test_there_is_one_version():
    assert f"## {refinelib.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == refinelib.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_notebooks_are_copied_and_nothing_is_overwritten(tmp_path, capsys):
    there = tmp_path / "new" / "train.ipynb"
    assert main(["notebooks", str(there.parent)]) == 0
    assert f"wrote {there}\n" in capsys.readouterr().out
    originals = {file.name: file.read_bytes() for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert {file.name: file.read_bytes() for file in there.parent.iterdir()} == originals
    there.write_text("mine")
    assert main(["notebooks", str(there.parent)]) == 2 and there.read_text() == "mine"
    assert "already holds compare.ipynb, debug.ipynb" in capsys.readouterr().err
    assert main(["notebooks", str(there)]) == 2
    assert "is a file: give a folder" in capsys.readouterr().err
    assert main(["notebooks", str(there / "in")]) == 2
    assert "is a file: give a folder" in capsys.readouterr().err


def test_a_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["notebooks", "~/copies"]) == 0
    assert (tmp_path / "copies" / "train.ipynb").is_file()


# -- built ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that is made of it.

    They are built of a copy: setuptools also packs what an earlier ``*.egg-info`` names.
    """
    pytest.importorskip("build", reason="no wheel is built: there is no package build; make env installs it")
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel in a folder of its own, to be put on the path; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", folder, *built.glob("*.whl"), cwd=folder)
    return folder


def test_a_script_beside_the_clone_imports_the_package(tmp_path):
    (tmp_path / "refinelib").symlink_to(ROOT, target_is_directory=True)  # a clone has this name
    code = "import refinelib; print(refinelib.__version__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == f"{refinelib.__version__}\n"


@pytest.mark.slow
def test_the_wheel_has_recipes_notebooks_and_types(built):
    names = set(zipfile.ZipFile(*built.glob("*.whl")).namelist())
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "refinelib").rglob("*.py")} | {
        f"refinelib/{file.relative_to(ROOT)}"
        for folder, kind in (("params", "*.yaml"), ("notebooks", "*.ipynb"))
        for file in (ROOT / folder).glob(kind)
    }
    assert wanted | {"refinelib/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"refinelib", "studies"}


@pytest.mark.slow
def test_an_installed_package_trains_by_a_recipes_name(installed, tmp_path):
    """Its files go into the working folder, and a recipe in ``params/`` there is found as well."""
    words = [word for name, value in TINY.items() for word in ("-p", name, value)]
    command = installed / "bin" / "refinelib"
    here = {"cwd": tmp_path, "PYTHONPATH": str(installed)}
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").write_text("epochs: 1\n")
    names = run(sys.executable, "-c", "import refinelib; print(refinelib.recipe_names())", **here)
    assert names.strip() == str(sorted([*recipe_names(), "mine"]))
    assert "usage: refinelib " in run(command, "--help", **here)
    assert "IoU of target" in run(command, "train", "-f", "demo", *words, **here)
    made = Run(tmp_path / "outputs" / "demo")
    assert made.status()["state"] == "ok" and made.config()["git_commit"] is None
    assert made.config()["versions"]["refinelib"] == refinelib.__version__
    assert "IoU of target" in run(command, "summary", "latest", **here)


@pytest.mark.slow
def test_copied_notebooks_run_with_the_installed_package(installed, tmp_path):
    here = {"cwd": tmp_path / "book", "PYTHONPATH": str(installed), "REFINELIB_SMOKE": "1"}
    run(installed / "bin" / "refinelib", "notebooks", "book", **(here | {"cwd": tmp_path}))
    run(sys.executable, "-m", "papermill", "train.ipynb", "out.ipynb", **here)
    assert Run(tmp_path / "book" / "outputs" / "smoke" / "demo").status()["state"] == "ok"
    run(sys.executable, "-c", "from studies import results", **here)


@pytest.mark.slow
def test_the_source_distributions_tests_run(built, tmp_path):
    with tarfile.open(*built.glob("*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    missing = [name for name in tracked_files() if not (folder / name).exists()]
    assert not missing, "name them in MANIFEST.in"
    files = ("tests/test_environment.py", "tests/runs/test_steplog.py")
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow")
    told = run(sys.executable, "-m", "pytest", *options, *files, cwd=folder, PYTHONPATH=str(folder))
    assert " passed" in told and "failed" not in told
