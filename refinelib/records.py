"""Lines of ``metrics.jsonl`` and ``events.jsonl``: what a record is, and how records are read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from refinelib import files


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file that may be growing; other lines are skipped, with a warning."""
    records, damaged = files.read_lines(path, is_record)
    if damaged:
        warnings.warn(skipped_lines(path, damaged), stacklevel=2)
    return records


def skipped_lines(path: Path, damaged: list[int]) -> str:
    """What to tell of lines that hold no record."""
    return f"{path}: lines without a record were passed over ({len(damaged)}, the first is line {damaged[0]})"


#: Names of numbers, of numbers by name, and of those that are tables, in the status and in a line of records.
_NUMBERS = {"loss", "train_loss", "grad_norm", "grad_norm_max", "lr", "loss_scale", "skipped", "seconds"}
_NUMBERS |= {"step", "steps", "epoch", "epochs", "skipped_steps", "rewinds"}
_SCORES = ("losses", "metrics", "best")
_TABLES = {"by_size", "by_third", "by_tercile", "intervals"}


def is_record(record: dict[str, Any]) -> bool:
    """Whether a line has the types that its readers rely on."""
    kind, counts = record.get("kind"), [record.get(name, 0) for name in ("step", "epoch", "count")]
    if not isinstance(kind, str) or not all(type(count) is int and count >= 0 for count in counts):
        return False
    return kind not in ("step", "epoch") or (kind in record and are_numbers(record))


def are_numbers(found: dict[str, Any]) -> bool:
    """Whether numbers, and numbers by name, are such as the axis of a plot holds, or none."""
    numbers = [value for name, value in found.items() if name in _NUMBERS]
    for scores in (found.get(name) or {} for name in _SCORES):
        three = scores.get("iou") or [None] * 3 if isinstance(scores, dict) else ()
        if not isinstance(three, list) or len(three) != 3:
            return False
        numbers += three + [value for name, value in scores.items() if name not in {*_TABLES, "iou"}]
    return all(x is None or (isinstance(x, (int, float)) and abs(x) < 1e100) for x in numbers)
