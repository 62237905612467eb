"""The layout: a module imports only what stands left of it, and no file grows beyond reading."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "refinelib"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Rooms from left to right. A room imports from rooms of a lower number only, and from itself.
ORDER = [
    {"files", "registry", "ranks"},
    {"guard", "modeling", "config"},
    {"data", "runs", "checkpoints"},
    {"build"},
    {"step"},
    {"metrics", "incidents", "gradients"},
    {"state", "launch", "export"},
    {"trainer"},
    {"plots"},
    {"workflows"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
#: Files that stand side by side: the right one uses the left one.
SIDE_BY_SIDE = [("files", "registry"), ("runs", "checkpoints")]
#: Lines of one file, files, and lines in all: lowered with every line that goes, raised for a feature only.
MOST_LINES, MOST_FILES, MOST_IN_ALL = 320, 65, 10544


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Modules that a file imports from, at its top or inside its functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: a relative import hides its room: write it from refinelib on"
            )
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "refinelib" else [module]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("refinelib.")}


def wrong_imports(path: Path) -> set[str]:
    mine = room_of(path)
    others = imported_rooms(path) - {mine}
    return {other for other in others if not RANK[other] < RANK[mine] and (other, mine) not in SIDE_BY_SIDE}


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kinds = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {
        line
        for token in tokens
        if token.type not in kinds
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docstrings)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room_of(path) != "__init__"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_room_imports_only_what_stands_left_of_it(path):
    assert not wrong_imports(path)


def test_the_guard_imports_nothing_else_of_the_package():
    assert {room for path in FILES if room_of(path) == "guard" for room in imported_rooms(path)} <= {"guard"}


def test_the_search_finds_an_arrow_to_the_right(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "data" / "store.py"
    file.parent.mkdir()
    file.write_text(
        "def later():\n    from refinelib import trainer\n    from refinelib.config import Settings\n"
    )
    assert wrong_imports(file) == {"trainer"}


def test_studies_stay_outside():
    assert not [path for path in FILES if "studies" in {name.split(".")[0] for name in imports(path)}]


def test_the_package_stays_thin():
    lines = {str(path.relative_to(PACKAGE)): code_lines(path.read_text()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert len(lines) <= MOST_FILES and sum(lines.values()) <= MOST_IN_ALL
