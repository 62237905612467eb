"""One builder of a store at a time, and nothing left of those that were killed."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

from refinelib.locking import held


def building_folder(folder: Path) -> Path:
    """A fresh hidden name beside a store's folder, to build it under."""
    return folder.parent / f".{folder.name}.building-{secrets.token_hex(4)}"


@contextmanager
def only_builder(folder: Path, progress: bool) -> Iterator[None]:
    """Wait until nobody else builds this store, then clear what killed builders left beside it.

    Where there are no locks, this does nothing: builders then race, and the first to finish wins.
    """

    def waits() -> None:
        if progress:
            print(f"another process is building {folder.name}; waiting for it", flush=True)

    with held(_lock_of(folder), waits=waits) as mine:
        if mine:
            with suppress(OSError):
                _clear(folder)
        yield


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _clear(own: Path) -> None:
    """Remove half-built folders of this store, whose lock is ours, and of any other that nobody is building.

    Some shared file systems lock within one machine only: another store's folder must also have lain
    untouched for an hour.
    """
    for stale in own.parent.glob(".*.building-*"):
        folder = own.parent / stale.name[1:].rpartition(".building-")[0]
        if folder == own:
            shutil.rmtree(stale, ignore_errors=True)
        elif time.time() - max(file.stat().st_mtime for file in (stale, *stale.iterdir())) > 3600:
            with suppress(BlockingIOError), held(_lock_of(folder), wait=False) as mine:
                if mine:
                    shutil.rmtree(stale, ignore_errors=True)
