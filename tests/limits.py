"""Limits for tests of hostile files: of time, and of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


READ = """
import json, pathlib, resource, sys
{prepare}
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + ({megabytes} << 20),) * 2)
for file in pathlib.Path(sys.argv[1]).iterdir():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        {read}
        found = "read", ""
    except BaseException as error:
        found = type(error).__name__, str(error)
    print(json.dumps([file.stem, [*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]]))
"""


def read_in_little_memory(
    folder: Path, prepare: str, read: str, megabytes: int
) -> dict[str, tuple[str, str, int]]:
    """What reading each file of a folder gives, in a process that has room for so many MB more.

    Args:
        folder: of hostile files.
        prepare: code that imports what reads, and reads something once.
        read: code that reads ``file``.
        megabytes: room.

    Returns:
        By the file's stem: name of the error or "read", its text, kilobytes by which the process grew.
    """
    code = READ.format(prepare=prepare, read=read, megabytes=megabytes)
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))
