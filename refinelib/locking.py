"""Lock files between processes: a lock dies with the last process that holds it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows: nobody waits for anybody
    fcntl = None


@contextmanager
def held(lock: Path, *, wait: bool = True, waits: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold a lock file meanwhile; gives whether it is ours, which it is not where the system or the file system has no locks.

    Args:
        lock: file to lock; made where there is none, and left.
        wait: until whoever has it lets go.
        waits: called before that.

    Raises:
        BlockingIOError: another process has it, and there was to be no waiting.
    """
    if fcntl is None:
        yield False
        return
    with open(lock, "w") as file:
        mine = _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if mine is False and not wait:
            raise BlockingIOError(f"{lock} is held by another process")
        if mine is False:
            waits()
            mine = _locked(file, fcntl.LOCK_EX)
        yield bool(mine)


@contextmanager
def alone(folder: Path, refusal: Exception) -> Iterator[None]:
    """Have a folder to oneself meanwhile, by ``.lock`` in it; ``refusal`` is raised where another process has it. Where no lock file can be written nobody can be told."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / ".lock", wait=False))
        except BlockingIOError:
            raise refusal from None
        except OSError:
            pass
        yield


def _locked(file: IO, how: int) -> bool | None:
    """Whether the lock is ours now; False: another process has it; None: a file system without locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
