"""Builds a store: several processes decode each image once into known rows."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from refinelib.data.augment import MEAN
from refinelib.data.sources import (
    COLUMNS,
    MAX_INSTANCES,
    MIN_SIDE,
    NO_MASK,
    UNREADABLE,
    DataError,
    Instances,
    SceneError,
    Source,
    counted,
)
from refinelib.data.store import FORMAT, Store, StoreInfo, read_info
from refinelib.modeling.roi import canvas_size, centre_window, crop_rois, expand_boxes, mask_canvas_size

#: Files that could not be used, of which a store notes the names.
MOST_UNREAD = 1000
Sizes = dict[str, Any]


def store_sizes(roi_size: tuple[int, int], mask_size: tuple[int, int], context: float) -> Sizes:
    """Sizes of a store's rows, as ``store.json`` has them."""
    canvas = canvas_size(roi_size, context)
    mask_canvas = mask_canvas_size(mask_size, roi_size, canvas)
    return {"roi_size": roi_size, "mask_size": mask_size, "canvas": canvas, "mask_canvas": mask_canvas}


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

    It lies in ``root/<source>-<split>-<key>``; the key changes with the data, the sizes and ``max_images``.
    It is built in a hidden folder beside it and renamed when whole: a folder of this name is a whole store,
    whatever was killed. Of two processes that want it, one waits for the other.

    Args:
        source: of images and masks.
        roi_size: (h, w) pixels of the image across the person's box.
        mask_size: (h, w) cells of the mask across the person's box.
        context: margin around the box, in box sizes; see :func:`refinelib.modeling.roi.canvas_size`.
        root: folder of stores; made where absent.
        workers: processes; None: one a core.
        max_images: only the first so many images of the source.
        progress: show the build's progress, and its outcome in one line.

    Raises:
        DataError: no image of the source could be used, no room on the disk, a worker died.
    """
    root, sizes, fingerprint = Path(root), store_sizes(roi_size, mask_size, context), source.fingerprint()

    def place(limit: int | None) -> Path:
        made_of = [fingerprint, sizes, limit, FORMAT, MIN_SIDE, MAX_INSTANCES]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        return root / f"{source.name}-{source.split}-{key}"

    whole, folder = place(None), place(max_images)
    for store in {whole, folder}:
        _remove_if_repaired(store)
    if folder.exists():
        return Store.open(folder)
    if whole.exists():
        return Store.open(whole).first_images(max_images)
    info = StoreInfo(
        source=source.name, split=source.split, **sizes, max_images=max_images, fingerprint=fingerprint
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder, progress):
            if not folder.exists():
                _build(source, folder, info, workers, progress)
    except OSError as error:
        raise DataError(f"the store {folder} cannot be written: {error}") from error
    built = Store.open(folder)
    if progress:
        print(built.summary(), flush=True)
    return built


# -- one builder at a time -----------------------------------------------------------------------------
@contextmanager
def _only_builder(folder: Path, progress: bool = False) -> Iterator[None]:
    """Wait until no other process builds this store, then remove what killed builders left.

    On a file system without locks builders race, and the first to finish wins.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with suppress(OSError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print(f"another process is building {folder.name}; waiting for it", flush=True)
            lock.acquire()
        for half in folder.parent.glob(".*.building-*"):
            age = time.time() - max(file.stat().st_mtime for file in (half, *half.iterdir()))
            if half.name.startswith(f".{folder.name}.") or age > 3600:  # a builder writes all the time
                shutil.rmtree(half, ignore_errors=True)
    try:
        yield
    finally:
        lock.release()


def _remove_if_repaired(folder: Path) -> None:
    """Remove a store that left out a file which was written since: the file may be usable now."""
    with suppress(OSError, DataError):  # a store that cannot be read or removed is left to Store.open
        built, unread = os.stat(folder / "store.json").st_mtime, read_info(folder).unread
        if any(os.path.exists(file) and os.stat(file).st_ctime > built for file in unread):
            with _only_builder(folder):
                shutil.rmtree(folder)


# -- the whole store -----------------------------------------------------------------------------------
def _build(source: Source, folder: Path, info: StoreInfo, workers: int | None, progress: bool) -> None:
    started, instances = time.perf_counter(), source.instances(info.max_images)
    row_bytes = {"images.u8": 3 * math.prod(info.canvas), "coverage.u8": 2 * math.prod(info.mask_canvas)}
    needed, free = len(instances) * sum(row_bytes.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        room = f"{needed / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free"
        raise DataError(f"the store needs {room}: set store_dir to a larger disk")
    temporary = folder.parent / f".{folder.name}.building-{os.getpid()}-{time.time_ns():x}"
    temporary.mkdir()
    try:
        for name, size in row_bytes.items():
            with open(temporary / name, "wb") as file:
                file.truncate(len(instances) * size)
        kept, coverage = np.ones(len(instances), bool), np.zeros((*info.mask_canvas, 2), np.int64)
        reasons, examples = Counter(instances.skipped), dict(instances.examples)
        title = f"{info.source} {info.split}: decoding"
        bar = tqdm(
            desc=title, total=instances.images, unit=" images", file=sys.stdout, delay=2, disable=not progress
        )
        with bar:
            for part in _decoded(_RowWriter(source, instances, temporary, info), workers):
                coverage += part.coverage
                kept[part.empty] = False
                info.unread = [*info.unread, *part.unread][:MOST_UNREAD]
                for reason, example in part.left_out:
                    reasons[reason] += 1
                    examples.setdefault(reason, example)
                bar.update(part.images)
        if not kept.any():
            such = "; ".join(f"{reason}: {example}" for reason, example in examples.items())
            none = f"none of the {instances.images} images of {info.source} {info.split} could be used"
            raise DataError(f"{none}: {counted(reasons)}; such as {such}")
        for name, size in row_bytes.items():
            _close_gaps(temporary / name, size, kept)
        columns = {name: getattr(instances, name)[kept] for name in COLUMNS}
        mean = (coverage / (255 * kept.sum())).astype(np.float32)
        np.savez(temporary / "index.npz", mean_coverage=mean, **columns)
        info.rois, info.starts, info.seconds = (
            int(kept.sum()),
            instances.starts,
            time.perf_counter() - started,
        )
        info.skipped, info.examples = dict(sorted(reasons.items())), dict(sorted(examples.items()))
        (temporary / "store.json").write_text(json.dumps(info.model_dump(), indent=1))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another builder was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decoded(writer: _RowWriter, workers: int | None) -> Iterator[_Written]:
    """All images, part by part, in order: an example is the same however many processes there are."""
    images = writer.instances.images
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, -(-images // 8))
    size = max(1, min(32, images // (workers * 8)))
    parts = [range(at, min(at + size, images)) for at in range(0, images, size)]
    if workers == 1:
        yield from map(writer.write, parts)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), writer)) as pool:
            yield from pool.map(_work, parts)
    except BrokenProcessPool:
        ended = "a process that builds the store was ended from outside, most likely for lack of memory"
        raise DataError(f"{ended}: give a smaller number of workers") from None


_writer: _RowWriter  # of a worker process


def _start_worker(parent: int, writer: _RowWriter) -> None:
    global _writer
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler belongs to the training loop

    def end_with_parent() -> None:  # the pool of a killed parent would wait for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _writer = writer


def _work(images: range) -> _Written:
    return _writer.write(images)


def _close_gaps(file: Path, row_bytes: int, kept: NDArray[np.bool_]) -> None:
    """Move the kept rows of a file together, in order, and cut the file behind them."""
    if kept.all():
        return
    rows = np.memmap(file, np.uint8, "r+", shape=(len(kept), row_bytes))
    places = np.flatnonzero(kept)
    for at in range(int(np.argmin(kept)), len(places), 1024):
        some = places[at : at + 1024]
        rows[at : at + len(some)] = rows[some]
    rows.flush()
    del rows
    os.truncate(file, len(places) * row_bytes)


# -- one image -----------------------------------------------------------------------------------------
@dataclass
class _Written:
    """What became of some images."""

    images: int
    coverage: NDArray[np.int64]  # [Hm, Wm, 2], the sum over all rows with a ROI
    empty: list[int] = field(default_factory=list)  # rows without a ROI
    left_out: list[tuple[str, str]] = field(default_factory=list)  # reason and example
    unread: list[str] = field(default_factory=list)  # files that could not be used


class _RowWriter:
    """Writes images into the rows of their ROIs; one in each process. ROI ``i`` is row ``i``."""

    def __init__(self, source: Source, instances: Instances, folder: Path, info: StoreInfo) -> None:
        self.source, self.instances, self.folder, self.info = source, instances, folder, info
        self.starts = np.searchsorted(instances.image_index, np.arange(instances.images + 1)).tolist()

    def write(self, images: range) -> _Written:
        """All ROIs of some images; an image that cannot be used is noted.

        Raises:
            OSError: the files cannot be written.
        """
        done = _Written(len(images), np.zeros((*self.info.mask_canvas, 2), np.int64))
        for index in images:
            rows = slice(self.starts[index], self.starts[index + 1])
            try:
                crops, coverage = self._crops(index, rows)
            except SceneError as error:
                done.empty += range(rows.start, rows.stop)
                done.left_out.append((error.reason, str(error)))
                if error.file is not None and len(str(error.file)) < 1000:  # store.json must stay small
                    done.unread.append(str(error.file))
                continue
            window = centre_window(torch.from_numpy(coverage[..., 0]), self.info.mask_size)
            covered = (window > 0).flatten(1).any(1).numpy()
            for row in (np.flatnonzero(~covered) + rows.start).tolist():
                done.empty.append(row)
                example = f"annotation {self.instances.annotation_ids[row]} has no mask inside its box"
                done.left_out.append((NO_MASK, example))
            done.coverage += coverage[covered].sum(0, dtype=np.int64)
            for name, block in (("images.u8", crops), ("coverage.u8", coverage)):
                with open(self.folder / name, "r+b") as file:
                    file.seek(rows.start * block[0].nbytes)
                    file.write(block.tobytes())
        return done

    def _crops(self, index: int, rows: slice) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Crops uint8 ``[n, Hc, Wc, 3]`` and coverage uint8 ``[n, Hm, Wm, 2]`` of an image's ROIs."""
        try:
            scene = self.source.scene(index)
        except OSError as error:  # a name too long, a folder that may not be read, a disk that fails
            message = f"image {index} of {self.source.name} cannot be read: {error}"
            raise SceneError(UNREADABLE, message) from None
        boxes, info = torch.from_numpy(self.instances.boxes[rows]).double(), self.info

        def regions(canvas: tuple[int, int], box: tuple[int, int]) -> torch.Tensor:
            return expand_boxes(boxes, (canvas[0] / box[0], canvas[1] / box[1]))

        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        crops = crop_rois(pixels, regions(info.canvas, info.roi_size), info.canvas, fill=MEAN)
        anyone, fractions = scene.masks.any(0), []
        for slot, region in zip(
            self.instances.slots[rows], regions(info.mask_canvas, info.mask_size), strict=True
        ):
            mine = scene.masks[slot]
            both = torch.from_numpy(np.stack([mine, anyone & ~mine]))
            fractions.append(crop_rois(both, region[None], info.mask_canvas)[0])
        return _bytes(crops), _bytes(255 * torch.stack(fractions))


def _bytes(planes: torch.Tensor) -> NDArray[np.uint8]:
    """``[n, C, H, W]`` in 0..255 as uint8 ``[n, H, W, C]``."""
    rounded = planes.round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())
