"""Lock files between processes: a lock dies with the last process that holds it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows: nobody waits for anybody
    fcntl = None


@contextmanager
def held(lock: Path, *, wait: bool = True, waits: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold a lock file meanwhile; gives whether it is ours.

    It is not where the system or the file system has no locks, nor where another process has it and there is no waiting.

    Args:
        lock: file to lock; made where there is none, and left.
        wait: until whoever has it lets go.
        waits: called before that.
    """
    if fcntl is None:
        yield False
        return
    with open(lock, "w") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = wait
            if wait:
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without
            mine = False
        yield mine
