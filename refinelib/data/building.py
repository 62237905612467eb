"""Builds a store: several processes decode each image once into known rows."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch

from refinelib.augment import MEAN
from refinelib.data.errors import DataError, SceneError
from refinelib.data.progress import Progress
from refinelib.data.scenes import COLUMNS, MAX_PEOPLE, MIN_SIDE, NO_MASK, People, Source
from refinelib.data.store import FORMAT, Store
from refinelib.roi import canvas_size, centre_window, crop_rois, expand_boxes, mask_canvas_size

try:
    import fcntl
except ImportError:  # Windows: two builders of one store may both build it, and one result stays
    fcntl = None


def sampling(roi_size: tuple[int, int], mask_size: tuple[int, int], context: float) -> dict[str, list[int]]:
    """What decides a store's pixels beside the data, as ``store.json`` has it."""
    canvas = canvas_size(roi_size, context)
    sizes = {"roi_size": roi_size, "mask_size": mask_size, "canvas": canvas, "mask_canvas": mask_canvas_size(mask_size, roi_size, canvas)}
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
        return root / f"{source.name}-{source.split}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"

    whole, folder = place(None), place(max_images)
    if not folder.exists() and whole.exists():
        return Store.open(whole).first_images(max_images)
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _only_builder(root / f".{folder.name}.lock", progress) as alone:
                if not folder.exists():
                    if alone:
                        for stale in root.glob(f".{folder.name}.building-*"):
                            shutil.rmtree(stale, ignore_errors=True)
                    info = {"format": FORMAT, "source": source.name, "split": source.split, **sizes, "context": context,
                            "max_images": max_images, "fingerprint": fingerprint, "min_side": MIN_SIDE, "max_people": MAX_PEOPLE}
                    _build(source, folder, info, workers, progress)
        except OSError as error:
            raise DataError(f"the store {folder} cannot be written: {error}") from error
        store = Store.open(folder)
        if progress:
            print(store.summary(), flush=True)
        return store
    return Store.open(folder)


# -- one image -------------------------------------------------------------------------------------
class _Rows:
    """Writes an image's ROIs into their rows; one in each process."""

    def __init__(self, source: Source, people: People, folder: Path, info: dict[str, Any]) -> None:
        self.source, self.people, self.info = source, people, info
        self.roi_size, self.mask_size, self.canvas, self.mask_canvas = (tuple(info[n]) for n in ("roi_size", "mask_size", "canvas", "mask_canvas"))
        self.starts = np.searchsorted(people.image_index, np.arange(people.images + 1))
        self.files = [open(folder / name, "r+b", buffering=0) for name in ("images.u8", "coverage.u8")]

    def write(self, some: range) -> tuple[list[int], Counter, dict[str, str], np.ndarray]:
        """Rows that stay empty, why, an example of each reason, and the sum of all coverage written."""
        empty: list[int] = []
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        total = np.zeros((*self.mask_canvas, 2), np.int64)
        for index in some:
            rows = range(self.starts[index], self.starts[index + 1])
            try:
                images, coverage, has_mask = self._crops(index, rows)
            except SceneError as error:
                empty.extend(rows)
                reasons[error.reason] += 1
                examples.setdefault(error.reason, str(error))
                continue
            for row in np.asarray(rows)[~has_mask].tolist():
                empty.append(row)
                reasons[NO_MASK] += 1
                examples.setdefault(NO_MASK, f"annotation {self.people.annotation_ids[row]} has no mask inside its box")
            total += coverage[has_mask].sum(0, dtype=np.int64)
            for file, block in zip(self.files, (images, coverage)):
                file.seek(rows.start * block[0].nbytes)
                if file.write(block.tobytes()) != block.nbytes:
                    raise OSError("the disk is full")
        return empty, reasons, examples, total

    def _crops(self, index: int, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scene = self.source.scene(index)
        boxes = torch.from_numpy(self.people.boxes[rows.start : rows.stop]).double()

        def region(canvas: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
            return expand_boxes(boxes, (canvas[0] / size[0], canvas[1] / size[1]))

        crops = crop_rois(torch.from_numpy(scene.image).permute(2, 0, 1), region(self.canvas, self.roi_size), self.canvas, fill=MEAN)
        images = crops.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        anyone = scene.masks.any(0)
        covers = []
        for slot, box in zip(self.people.slots[rows.start : rows.stop], region(self.mask_canvas, self.mask_size)):
            mine = scene.masks[slot]
            layers = torch.from_numpy(np.stack([mine, anyone & ~mine]))
            covers.append(crop_rois(layers, box[None], self.mask_canvas)[0])
        stacked = torch.stack(covers).mul(255).round().to(torch.uint8)
        has_mask = (centre_window(stacked[:, 0], self.mask_size) > 0).flatten(1).any(1).numpy()
        return images, stacked.permute(0, 2, 3, 1).contiguous().numpy(), has_mask


_rows: _Rows  # of a worker process


def _start_worker(parent: int, *arguments: Any) -> None:
    global _rows
    torch.set_num_threads(1)

    def follow() -> None:  # a killed parent leaves its pool waiting for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _rows = _Rows(*arguments)


def _work(some: range) -> tuple[list[int], Counter, dict[str, str], np.ndarray]:
    return _rows.write(some)


# -- the whole store -------------------------------------------------------------------------------
def _build(source: Source, folder: Path, info: dict[str, Any], workers: int | None, progress: bool) -> None:
    people = source.people(info["max_images"])
    started = time.perf_counter()
    row_bytes = (int(np.prod(info["canvas"])) * 3, int(np.prod(info["mask_canvas"])) * 2)
    needed, free = len(people) * sum(row_bytes), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(f"the store needs {needed / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free: set store_dir to a larger disk")
    temporary = folder.parent / f".{folder.name}.building-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        for name, size in zip(("images.u8", "coverage.u8"), row_bytes):
            with open(temporary / name, "wb") as file:
                file.truncate(len(people) * size)
        empty, reasons, examples, total = _run((source, people, temporary, info), workers, progress)
        reasons.update(people.skipped)
        examples = {**examples, **people.examples}
        kept = np.ones(len(people), bool)
        kept[empty] = False
        if not kept.any():
            told = "; ".join(f"{count} {reason}, such as: {examples[reason]}" for reason, count in reasons.items())
            raise DataError(f"none of the {people.images} images of {source.name} {source.split} could be used: {told}")
        for name, size in zip(("images.u8", "coverage.u8"), row_bytes):
            _close_gaps(temporary / name, size, kept)
        count = int(kept.sum())
        np.savez(temporary / "index.npz", mean_coverage=(total / (255 * count)).astype(np.float32), **{name: getattr(people, name)[kept] for name in COLUMNS})
        info.update(rois=count, skipped=dict(reasons), examples=examples, seconds=round(time.perf_counter() - started, 3))
        (temporary / "store.json").write_text(json.dumps(info, indent=1))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another builder was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(arguments: tuple, workers: int | None, progress: bool) -> tuple[list[int], Counter, dict[str, str], np.ndarray]:
    """All images through one process or several."""
    people, info = arguments[1], arguments[3]
    workers = min(workers or _cores(), -(-people.images // 8))
    size = max(1, min(32, people.images // (workers * 8)))
    parts = [range(at, min(at + size, people.images)) for at in range(0, people.images, size)]
    empty: list[int] = []
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    total = np.zeros((*info["mask_canvas"], 2), np.int64)
    with Progress(people.images, f"{info['source']} {info['split']}: decoding", "images", progress) as bar:
        for part, (nothing, why, such_as, covered) in _each(arguments, parts, workers):
            empty.extend(nothing)
            reasons.update(why)
            examples = {**such_as, **examples}
            total += covered
            bar.add(len(part))
    return empty, reasons, examples, total


def _each(arguments: tuple, parts: list[range], workers: int) -> Iterator[tuple[range, tuple]]:
    if workers <= 1:
        rows = _Rows(*arguments)
        for part in parts:
            yield part, rows.write(part)
        for file in rows.files:
            file.close()
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), *arguments))
    try:
        with warnings.catch_warnings():
            # Workers touch no thread pool of the parent: one torch thread each, no CUDA.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            futures = {pool.submit(_work, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise DataError("a process that builds the store was ended from outside, most likely for lack of memory: give a smaller number of workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


@contextmanager
def _only_builder(lock: Path, progress: bool) -> Iterator[bool]:
    """Wait until nobody else builds this store; yields False where the file system has no locks."""
    if fcntl is None:
        yield False
        return
    with open(lock, "w") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process is building {lock.name[1:-5]}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
