"""pyproject.toml, constraints.txt, environment.yml, Makefile and the workflow say the same thing."""

import os
import re
import subprocess
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata

import yaml
from packaging.specifiers import SpecifierSet

from refinelib.config import project_root

ROOT = project_root()
#: Extras whose packages have a tested version.
PINNED = ("test", "browser", "docs", "export")
#: The end of the line that installs the package, for conda users.
INSTALL = 'install -c constraints.txt -e ".[test]"'


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement.strip())[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {_name(line): line.split("==")[1] for line in lines if line}


def _declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for name in PINNED for line in extras[name])]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0]))


def test_every_dependency_is_pinned_within_its_range():
    pins = _pins()
    for requirement in _declared():
        name, least = _name(requirement), re.search(r">=([\d.]+)", requirement)
        assert name in pins, f"{name} has no tested version in constraints.txt"
        assert least and _version(pins[name]) >= _version(least[1]), requirement


def test_constraints_pin_exactly_and_name_no_place():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.\-]+==[\w.]+", line), line
    assert "torch" in _pins()


def test_every_pin_installs_on_the_oldest_python():
    """Its first patch release, too, as Linux distributions keep one for years."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    installed = {}
    for name in _pins():
        with suppress(PackageNotFoundError):  # of an extra that is not installed here
            installed[name] = metadata(name).get("Requires-Python") or ""
    assert len(installed) > 100
    assert [name for name, rule in installed.items() if not SpecifierSet(rule).contains(oldest)] == []


def test_conda_installs_the_same():
    text = (ROOT / "environment.yml").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python, *others) = yaml.safe_load(text)["dependencies"]
    assert others == ["pip", "make", "git"], "packages come from pip: conda would take other versions"
    assert python == "python=3.12" and "Programming Language :: Python :: 3.12" in project["classifiers"]
    assert _version(python) >= _version(project["requires-python"])
    assert f"#   pip {INSTALL}\n" in text


def make(*words: str) -> str:
    """What make would execute."""
    line = ["make", "--always-make", "--dry-run", "--directory", str(ROOT), *words]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def pins(*words: str) -> list[str]:
    (line,) = [line for line in make("env", *words).splitlines() if line.startswith("sed ")]
    return subprocess.check_output(line.split(" > ")[0], shell=True, cwd=ROOT, text=True).splitlines()


def test_make_installs_with_the_constraints():
    assert '-c .venv/constraints.txt -e ".[test]"' in make("env")
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert pins() == tested
    changed = [line for line in pins("TORCH=2.6.0") if line not in tested]
    assert changed == ["torch==2.6.0"] and len(pins("TORCH=2.6.0")) == len(tested) - 1  # sympy is torch's


def test_jupyterlab_starts_as_root_and_takes_arguments():
    (line,) = [line for line in make("lab", "ARGS=--no-browser").splitlines() if "jupyter lab" in line]
    assert line.endswith("--no-browser") and ("--allow-root" in line) == (os.getuid() == 0)


def test_git_compares_notebooks_as_nbdime_asks():
    """``make nbdime`` adds what it misses here: a changed file in everyone's checkout."""
    words = (ROOT / ".gitattributes").read_text().split()
    assert words == ["*.ipynb", "diff=jupyternotebook", "*.ipynb", "merge=jupyternotebook"]


def test_the_workflow_calls_targets_that_there_are():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {word for step in steps for word in re.findall(r"make (\w+)", step.get("run", ""))}
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "test", "docs", "nightly", "coverage"} <= called <= targets
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [f"Programming Language :: Python :: {name}" for name in matrix["python"]] == [
        line for line in project["classifiers"] if "Python :: 3" in line
    ]
    oldest, newest = (row["torch"] for row in matrix["include"])
    assert f"torch>={oldest.removesuffix('.0')}" in project["dependencies"] and newest == _pins()["torch"]


def test_the_tools_of_a_commit_are_those_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff-check", "mypy", "nbstripout"]
    assert hooks[-1]["entry"] == "nbstripout --keep-id"  # tests and gallery know cells by their ids
    assert all(re.match(hooks[-1]["files"], name) is None for name in ("gallery/train.ipynb", "a.py"))
    assert re.match(hooks[-1]["files"], "notebooks/train.ipynb")
