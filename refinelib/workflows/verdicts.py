"""What a check found, in a sentence, and where that is kept."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable

from refinelib.config import Settings
from refinelib.files import read_json, reason, write_atomically
from refinelib.runs import Run, RunError, dumps


class CheckError(RuntimeError):
    """A check failed; the message says which and what to look at."""


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the check.
        passed: whether all is as it should be.
        sentence: what was found; where something is wrong, what and where to look.
        figures: the numbers behind it, plain values that JSON holds.
    """

    name: str
    passed: bool
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.sentence}"

    __repr__ = __str__


def told(name: str) -> Callable:
    """Makes a check of a function that returns what is wrong (empty: nothing), the sentence if all is well, and the figures.

    Whatever the function raises is what is wrong.
    """

    def decorate(function: Callable) -> Callable[..., Check]:
        @functools.wraps(function)
        def check(*arguments: Any, **keywords: Any) -> Check:
            try:
                wrong, good, figures = function(*arguments, **keywords)
            except Exception as error:  # whatever breaks is what the check is there to tell
                where = _own_line(error)
                return Check(name, False, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}{where}")
            return Check(name, not wrong, wrong or good, figures)

        return check

    return decorate


def record(results: list[Check], settings: Settings) -> Path:
    """Write the checks into ``checks.json`` of the tiny run's folder, and any failure into its ``status.json``.

    Returns:
        the run's folder.
    """
    folder = next((Path(c.figures["folder"]) for c in results if "folder" in c.figures), None) or _newest(settings)
    write_atomically(folder / "checks.json", dumps({"checks": [asdict(check) for check in results]}, indent=1))
    if not all(check.passed for check in results):
        run = Run(folder)
        status = run.status() if (folder / "status.json").is_file() else {}
        run.update(**status | {"state": "failed", "last_error": _verdict(results)})
    return folder


def read(folder: str | os.PathLike) -> list[Check]:
    """The checks on record in a run's folder.

    Raises:
        RunError: there are none, or they are damaged.
    """
    file = Path(folder) / "checks.json"
    if not file.is_file():
        raise RunError(f"there is no {file}: run notebooks/debug.ipynb first")
    try:
        return [Check(**found) for found in read_json(file)["checks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({reason(error)}): run notebooks/debug.ipynb again") from None


def conclude(folder: str | os.PathLike) -> str:
    """All checks on record, a line each.

    Raises:
        CheckError: not all passed; the message is one sentence a failed check.
    """
    results = read(folder)
    if not all(check.passed for check in results):
        raise CheckError(_verdict(results))
    return "\n".join([*map(str, results), f"all {len(results)} checks passed"])


# -- helpers ---------------------------------------------------------------------------------------
def _verdict(results: list[Check]) -> str:
    failed = [check for check in results if not check.passed]
    return f"{len(failed)} of {len(results)} checks failed: " + "; ".join(f"{c.name}: {c.sentence}" for c in failed)


def _newest(settings: Settings) -> Path:
    """Folder of the newest start of the run: where a run that broke off has left its status."""
    root = settings.path(settings.output_dir)
    found = sorted(root.glob(f"{settings.run_name}*/status.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise CheckError(f"the tiny run left no folder {settings.run_name} under {root}: is it writable?")
    return found[-1].parent


def _own_line(error: BaseException) -> str:
    """Where in the package it came from."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.parent.name in ("refinelib", "data") and file.name not in ("checks.py", "verdicts.py"):
            found = f" (refinelib/{file.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
