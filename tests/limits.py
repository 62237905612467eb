"""Limits for tests of hostile files: of time, and of memory."""

from __future__ import annotations

import signal
import tracemalloc
from contextlib import contextmanager
from typing import Iterator

import pytest


@contextmanager
def in_time(seconds: float = 30) -> Iterator[None]:
    """Fail where the block runs for longer; pytest's failure passes every ``except Exception``."""

    def late(*_) -> None:
        pytest.fail(f"it still runs after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def in_memory(megabytes: float) -> Iterator[None]:
    """Fail where the block's Python objects and arrays take more than so many MB at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak < megabytes, f"{peak:.0f} MB"
