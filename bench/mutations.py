"""Which small changes of the code does no test notice?

    python bench/mutations.py refinelib/modeling/losses.py tests/modeling [--number 40] [--seed 0]

Changes one operator or constant at a time, at places drawn at random, in a copy of the project, and runs the
tests until the first failure. Prints a JSON line a change, flushed, then how many went unnoticed: each is
either the same function written differently, or wants a test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from children import end_with_me

ROOT = Path(__file__).resolve().parents[1]
#: What each operator becomes.
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes that can be changed, and the field that holds what is changed; no annotation, no text."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OPERATORS:
            yield node, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            yield node, "ops"
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            yield node, "value"
        elif isinstance(node, (ast.If, ast.IfExp)):
            yield node, "test"


def plain(tree: ast.Module) -> ast.Module:
    """The tree without annotations, which change nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for one in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                one.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Name("object", ast.Load())
    return tree


def changed(source: str, number: int) -> tuple[str, int, str]:
    """The source with its place ``number`` changed, the line, and what was changed."""
    tree = plain(ast.parse(source))
    node, field = list(places(tree))[number]
    before = ast.unparse(node)
    value = getattr(node, field)
    if field == "op":
        new = OPERATORS[type(value)]()
    elif field == "ops":
        new = [OPERATORS[type(value[0])](), *value[1:]]
    elif field == "test":
        new = ast.UnaryOp(ast.Not(), copy.deepcopy(value))
    else:
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2
    setattr(node, field, new)
    after = ast.unparse(ast.fix_missing_locations(node))
    return ast.unparse(tree), node.lineno, f"{before.splitlines()[0][:90]} -> {after.splitlines()[0][:90]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="module, from the project's root")
    parser.add_argument("tests", nargs="+", help="files or folders of tests")
    parser.add_argument("--number", type=int, default=40, help="of changes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end_with_me()
    source = (ROOT / options.file).read_text()
    numbers = list(range(len(list(places(plain(ast.parse(source)))))))
    random.Random(options.seed).shuffle(numbers)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "refinelib"
        ignored = shutil.ignore_patterns(".*", "outputs", "gallery", "__pycache__")
        shutil.copytree(ROOT, copied, ignore=ignored)
        environment = {**os.environ, "PYTHONPATH": str(copied), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:nbval"]
        command += ["-m", "not slow and not browser", *options.tests]
        for number in numbers[: options.number]:
            text, line, what = changed(source, number)
            (copied / options.file).write_text(text)
            begun = time.monotonic()
            try:
                status = subprocess.run(
                    command, cwd=copied, env=environment, stdout=subprocess.DEVNULL, timeout=900
                ).returncode
            except subprocess.TimeoutExpired:
                status = 1
            unnoticed += status == 0
            took = round(time.monotonic() - begun, 1)
            print(json.dumps({"line": line, "change": what, "noticed": status != 0, "s": took}), flush=True)
    print(json.dumps({"changes": min(options.number, len(numbers)), "unnoticed": unnoticed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
