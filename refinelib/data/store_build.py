"""Builds a store: several processes decode each image once into known rows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch

from refinelib.data.store_lock import building_folder, only_builder
from refinelib.data.errors import DataError
from refinelib.data.store_rows import RowWriter, Written, stamp
from refinelib.data.sources import COLUMNS, MAX_PEOPLE, MIN_SIDE, Source, counted
from refinelib.data.store import FORMAT, Store, read_info
from refinelib.progress import Progress
from refinelib.modeling.roi import canvas_size, mask_canvas_size


#: Files that could not be used, of which a store notes what they were.
MOST_UNREAD = 1000


def sampling(roi_size: tuple[int, int], mask_size: tuple[int, int], context: float) -> dict[str, list[int]]:
    """What decides a store's pixels beside the data, as ``store.json`` has it."""
    canvas = canvas_size(roi_size, context)
    mask_canvas = mask_canvas_size(mask_size, roi_size, canvas)
    sizes = {"roi_size": roi_size, "mask_size": mask_size, "canvas": canvas, "mask_canvas": mask_canvas}
    return {name: list(size) for name, size in sizes.items()}


def open_store(
    source: Source,
    *,
    roi_size: tuple[int, int],
    mask_size: tuple[int, int],
    context: float,
    root: str | Path,
    workers: int | None = None,
    max_images: int | None = None,
    progress: bool = True,
) -> Store:
    """The store of a source, built where it does not exist yet.

    It lies in ``root/<source>-<split>-<key>``; the key changes with the data, the sizes and
    ``max_images``. It is built in a hidden folder beside it and renamed when whole: a folder of
    this name is a whole store, whoever was killed. Where two processes want it, one waits for
    the other.

    Args:
        source: of scenes.
        roi_size, mask_size: (h, w) that the person's box gets, of image and mask.
        context: see ``roi.canvas_size``.
        root: folder of stores; made where absent.
        workers: processes; None: one a core.
        max_images: only the first so many images of the source.
        progress: show how the build goes on, and its outcome in one line.

    Raises:
        DataError: no image of the source could be used, no room on the disk, a worker died.
    """
    root = Path(root)
    sizes = sampling(tuple(roi_size), tuple(mask_size), context)
    fingerprint = source.fingerprint()

    def place(limit: int | None) -> Path:
        made_of = [fingerprint, sizes, limit, FORMAT, MIN_SIDE, MAX_PEOPLE]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        return root / f"{source.name}-{source.split}-{key}"

    whole, folder = place(None), place(max_images)
    for store in {whole, folder}:
        _make_room_if_repaired(store, progress)
    if not folder.exists() and whole.exists():
        return Store.open(whole).first_images(max_images)
    if folder.exists():
        return Store.open(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_builder(folder, progress):
            if not folder.exists():
                info = {"format": FORMAT, "source": source.name, "split": source.split, **sizes, "context": context,
                        "max_images": max_images, "fingerprint": fingerprint,
                        "min_side": MIN_SIDE, "max_people": MAX_PEOPLE}
                _build(source, folder, info, workers, progress)
    except OSError as error:
        raise DataError(f"the store {folder} cannot be written: {error}") from error
    store = Store.open(folder)
    if progress:
        print(store.summary(), flush=True)
    return store


def _make_room_if_repaired(folder: Path, progress: bool) -> None:
    """Remove a store that left out files which are others by now: who fetched one again, as the message said, wants its people."""

    def repaired() -> bool:
        try:
            return folder.exists() and any(stamp(file) != was for file, was in read_info(folder).get("unread", {}).items())
        except DataError:  # whoever opens it says what is wrong
            return False

    with contextlib.suppress(OSError):  # it may not be changed: then it is used as it is
        if repaired():
            with only_builder(folder, progress):
                if repaired():
                    shutil.rmtree(folder)


# -- the whole store -------------------------------------------------------------------------------
def _build(source: Source, folder: Path, info: dict[str, Any], workers: int | None, progress: bool) -> None:
    started = time.perf_counter()
    people = source.instances(info["max_images"])
    row_bytes = (int(np.prod(info["canvas"])) * 3, int(np.prod(info["mask_canvas"])) * 2)
    needed, free = len(people) * sum(row_bytes), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(f"the store needs {needed / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free: "
                        f"set store_dir to a larger disk")
    temporary = building_folder(folder)
    temporary.mkdir()
    try:
        for name, size in zip(("images.u8", "coverage.u8"), row_bytes):
            with open(temporary / name, "wb") as file:
                file.truncate(len(people) * size)
        done = _run((source, people, temporary, info), workers, progress)
        reasons, examples = done.reasons + Counter(people.skipped), {**done.examples, **people.examples}
        kept = np.ones(len(people), bool)
        kept[done.empty] = False
        if not kept.any():
            such = "; ".join(f"{reason}: {example}" for reason, example in examples.items())
            raise DataError(f"none of the {people.images} images of {source.name} {source.split} could be used: "
                            f"{counted(reasons)}; such as {such}")
        for name, size in zip(("images.u8", "coverage.u8"), row_bytes):
            _close_gaps(temporary / name, size, kept)
        count = int(kept.sum())
        mean = (done.coverage / (255 * count)).astype(np.float32)
        columns = {name: getattr(people, name)[kept] for name in COLUMNS}
        np.savez(temporary / "index.npz", mean_coverage=mean, **columns)
        unread = dict(itertools.islice(done.unread.items(), MOST_UNREAD))
        info.update(rois=count, starts=people.starts, unread=unread, skipped=dict(sorted(reasons.items())), examples=dict(sorted(examples.items())),
                    seconds=round(time.perf_counter() - started, 3))
        (temporary / "store.json").write_text(json.dumps(info, indent=1))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another builder was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(arguments: tuple, workers: int | None, progress: bool) -> Written:
    """All images through one process or several."""
    people, info = arguments[1], arguments[3]
    workers = min(workers or _cores(), -(-people.images // 8))
    size = max(1, min(32, people.images // (workers * 8)))
    parts = [range(at, min(at + size, people.images)) for at in range(0, people.images, size)]
    total: Written | None = None
    with Progress(people.images, f"{info['source']} {info['split']}: decoding", "images", show=progress) as bar:
        for part, written in zip(parts, _each(arguments, parts, workers)):
            total = written if total is None else total.add(written)
            bar.add(len(part))
    return total


def _each(arguments: tuple, parts: list[range], workers: int) -> Iterator[Written]:
    """What became of each part, in order: an example is the same however many processes there are."""
    if workers <= 1:
        with closing(RowWriter(*arguments)) as rows:
            for part in parts:
                yield rows.write(part)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    context = multiprocessing.get_context(method)
    initial = (os.getpid(), *arguments)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=initial)
    try:
        with warnings.catch_warnings():
            # Workers touch no thread pool of the parent: one torch thread each, no CUDA.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            waiting = deque(pool.submit(_work, part) for part in parts)
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a process that builds the store was ended from outside, most likely for lack of memory: "
                        "give a smaller number of workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_rows: RowWriter  # of a worker process


def _start_worker(parent: int, *arguments: Any) -> None:
    global _rows
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is of the training loop

    def follow() -> None:  # a killed parent leaves its pool waiting for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _rows = RowWriter(*arguments)


def _work(some: range) -> Written:
    return _rows.write(some)


def _close_gaps(file: Path, row_bytes: int, kept: np.ndarray) -> None:
    """Move the kept rows of a file together, in order, and cut it: afterwards a ROI's row is its place."""
    if not kept.all():
        rows = np.memmap(file, np.uint8, "r+", shape=(len(kept), row_bytes))
        sources = np.flatnonzero(kept)
        first = int(np.argmin(kept))
        for at in range(first, len(sources), 1024):
            some = sources[at : at + 1024]
            rows[at : at + len(some)] = rows[some]
        rows.flush()
        del rows
        os.truncate(file, int(kept.sum()) * row_bytes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
