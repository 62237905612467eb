"""What is wrong with data, in a sentence."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong, where, and what would be right."""


class SceneError(DataError):
    """One image cannot be used; the build counts it under ``reason`` and goes on. ``file``: which one it is, where another would help."""

    def __init__(self, reason: str, message: str, file: Path | None = None):
        super().__init__(message)
        self.reason, self.file = reason, file

    def __reduce__(self):  # travels between processes
        return SceneError, (self.reason, str(self), self.file)
