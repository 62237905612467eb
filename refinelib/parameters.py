"""Parameters of the notebooks that use runs, read as the command line means them.

``papermill -p flip false`` passes the text "false", ``-p run 7`` a number. Settings of a training run are
read by :mod:`refinelib.config`; these few belong to no run.
"""

from __future__ import annotations

from typing import Any

from refinelib.config import SettingsError

_DEVICES = ("auto", "cpu", "cuda")


def checked(**values: Any) -> Any:
    """The values in their order, each as its name means it; a single one by itself.

    ``flip`` and ``jitter`` are truth values (or none), ``max_images`` a whole number from 1 (or none), ``device``
    one of auto, cpu, cuda; anything else a text or a list, or none for the text "none".

    Raises:
        SettingsError: a sentence with the name, what it is and what would be right.
    """
    found = [_read(name, value) for name, value in values.items()]
    return found[0] if len(found) == 1 else found


def _read(name: str, value: Any) -> Any:
    word = str(value).strip().lower()
    if value is None or word in ("none", "null", ""):
        return None
    if name in ("flip", "jitter"):
        if word not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            raise SettingsError(f"{name} = {value!r}: give true or false")
        return word in ("true", "yes", "on", "1")
    if name == "max_images":
        if isinstance(value, bool) or not word.isdecimal() or int(word) < 1:
            raise SettingsError(f"max_images = {value!r}: give a whole number, at least 1, or none for all")
        return int(word)
    if name == "device":
        if word not in _DEVICES:
            raise SettingsError(f"device = {value!r}: give one of {', '.join(_DEVICES)}")
        return word
    return value if isinstance(value, (list, tuple)) else str(value)
