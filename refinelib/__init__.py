"""refinelib: boundary-refined person masks with NaN-safe training.

The names below are the public ones; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Settings": "config",
    "SettingsError": "config",
    "resolve": "config",
    "from_notebook": "config",
    "describe": "config",
    "recipe_names": "config",
    "train": "trainer",
    "DivergedError": "guard.rewind",
    "replay": "incidents",
    "IncidentError": "incidents",
    "Run": "runs",
    "RunError": "runs",
    "CheckpointError": "checkpoints",
    "DataError": "data",
    "load": "metrics.predict",
    "Predictor": "metrics.predict",
    "evaluate": "metrics.evaluate",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refinelib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
