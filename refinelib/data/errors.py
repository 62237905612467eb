"""What is wrong with data, in a sentence."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong, where, and what would be right."""


class SceneError(DataError):
    """One image cannot be used; the build counts it under ``reason`` and goes on. ``file``: which one it is, where another would help."""

    def __init__(self, reason: str, message: str, file: Path | None = None):
        super().__init__(printable(message))
        self.reason, self.file = reason, file

    def __reduce__(self):  # travels between processes
        return SceneError, (self.reason, str(self), self.file)


def printable(text: object, most: int = 1000) -> str:
    """Text for any terminal and file: unprintable characters as escapes, without the middle of a long one."""
    words = str(text)
    if len(words) > most:
        words = f"{words[: most // 2]} ... {words[-(most // 2) :]}"
    return words if words.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
