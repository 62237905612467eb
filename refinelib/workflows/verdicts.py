"""Checks on record; read by plots/checks.py until it reads them itself."""

from pathlib import Path

from refinelib.files import read_json
from refinelib.workflows.checks import Check as Check


def read(folder):  # type: ignore[no-untyped-def]  # goes with this file
    """The checks on record in a run's folder."""
    return [Check(**found) for found in read_json(Path(folder) / "checks.json")["checks"]]
