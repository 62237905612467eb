"""No process that a bench started outlives it: a benchmark that is ended early leaves nothing that trains.

A bench calls :func:`end_with_me` first. A process that is killed by SIGKILL cannot do anything: its children
go on.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
from typing import Any

import psutil


def end_with_me() -> None:
    """Kill this process's children and theirs when it ends, also by SIGTERM (``timeout``) or SIGHUP."""
    atexit.register(kill_all)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _ended)


def kill_all() -> None:
    """Kill every process that this one started, and those that these did, whatever their group."""
    while children := [one for one in psutil.Process().children(recursive=True) if _runs(one)]:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=5.0)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _ended(number: int, frame: Any) -> None:
    kill_all()
    sys.exit(128 + number)  # temporary folders are removed on the way out
