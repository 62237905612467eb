"""pyproject.toml, constraints.txt and environment.yml say the same thing."""

import re
import tomllib

import yaml

from refinelib.config import project_root

ROOT = project_root()


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement.strip())[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {_name(line): line.split("==")[1] for line in lines if line}


def _declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["test"], *extras["browser"], *extras["export"]]


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


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[test]"]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == f"python{wanted}"


def test_make_installs_with_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    assert '-c constraints.txt -e ".[test]"' in makefile
