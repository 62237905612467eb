"""refinelib: boundary-refined person masks with NaN-safe training.

The names below are the public ones; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "config": ("Settings", "SettingsError", "resolve", "from_notebook", "describe", "recipe_names"),
    "trainer": ("train",),
    "guard.rewind": ("DivergedError",),
    "incidents": ("replay", "IncidentError"),
    "runs": ("Run", "RunError"),
    "checkpoints": ("CheckpointError",),
    "data": ("DataError",),
    "metrics.predict": ("load", "Predictor"),
    "metrics.evaluate": ("evaluate",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'refinelib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
