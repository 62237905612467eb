"""Builds a store: several processes decode each image once into known rows."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from refinelib import files
from refinelib.data import sources
from refinelib.data.augment import MEAN
from refinelib.data.sources import COLUMNS, DataError, FileSource, Instances, SceneError, Source, Tally
from refinelib.data.store import FORMAT, Store, StoreInfo
from refinelib.modeling.roi import canvas_size, centre_window, crop_rois, expand_boxes, mask_canvas_size

#: Beside a store's rows: the files that it was made from, with size, time of change and time of the entry.
FILES = "files.npz"


def store_sizes(roi_size: tuple[int, int], mask_size: tuple[int, int], context: float) -> dict[str, Any]:
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
    whatever was killed. Of two processes that want it, one waits for the other. It is built again where a
    file that it was made from has changed or come since.

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
        made_of = [fingerprint, sizes, limit, FORMAT, sources.MIN_SIDE, sources.MAX_INSTANCES]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        return root / f"{source.name}-{source.split}-{key}"

    whole, folder = place(None), place(max_images)
    for store in (folder, whole):
        if store.exists() and not changed_files(store, source):
            return Store.open(store, max_images)
    made = {"source": source.name, "split": source.split, "max_images": max_images, **sizes}
    info = StoreInfo(**made, fingerprint=fingerprint)
    with files.retold(DataError, f"the store {folder} cannot be written: ", causes=OSError):
        root.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder, progress):
            changed = changed_files(folder, source) if folder.exists() else 0
            if changed and progress:
                print(f"{changed} of the files of {folder.name} have changed: builds it again", flush=True)
            if changed or not folder.exists():
                _build(source, folder, info, workers, progress)
    built = Store.open(folder)
    if progress:
        with suppress(BrokenPipeError):
            print(built.summary(), flush=True)
    return built


# -- one builder at a time -----------------------------------------------------------------------------
@contextmanager
def _only_builder(folder: Path, progress: bool) -> Iterator[None]:
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


def changed_files(store: Path, source: Source) -> int:
    """How many of the files that a store was made from are others now, or are there only now."""
    try:
        found = files.read_npz(store / FILES, {"names": "u n", "stamps": "i k3"})
        names = found["names"].tobytes().decode("utf-8", "surrogatepass").split("\0")
        return int((file_stamps(source, names) != found["stamps"]).any(1).sum())
    except FileNotFoundError:
        return 0  # one of a source without files
    except (OSError, ValueError):  # it is damaged
        return 1


def file_stamps(source: Any, names: Sequence[str]) -> NDArray[np.int64]:
    """The stamp of each file of a :class:`FileSource`, int64 ``[N, 3]``."""
    stamps = [sources.file_stamp(source.locate(name)) for name in names]
    return np.array(stamps, np.int64).reshape(-1, 3)


# -- the whole store -----------------------------------------------------------------------------------
def _build(source: Source, folder: Path, info: StoreInfo, workers: int | None, progress: bool) -> None:
    started = time.perf_counter()
    names = [name.replace("\0", "") for name in source.names()] if isinstance(source, FileSource) else []
    stamps = file_stamps(source, names)  # before the files are read: a change from now on is seen
    instances = source.instances(info.max_images)
    needed = len(instances) * int(3 * np.prod(info.canvas) + 2 * np.prod(info.mask_canvas))
    if needed > shutil.disk_usage(folder.parent).free:
        room = f"{needed / 1e9:.1f} GB in {folder.parent}, more than are free"
        raise DataError(f"the store needs {room}: set store_dir to a larger disk")
    temporary = folder.parent / f".{folder.name}.building-{os.getpid()}-{time.time_ns():x}"
    temporary.mkdir()
    try:
        if any(names):
            text = np.frombuffer("\0".join(names).encode("utf-8", "surrogatepass"), np.uint8)
            np.savez(temporary / FILES, names=text, stamps=stamps)
        kept, total = np.zeros(len(instances), bool), np.zeros((*info.mask_canvas, 3), np.int64)
        tally = Tally(instances)
        decoded = _decoded(_Rows(source, instances, info), workers)
        how = {"unit": " images", "file": sys.stdout, "delay": 2, "mininterval": 5, "disable": not progress}
        bar = tqdm(decoded, f"{info.source} {info.split}: decoding", instances.images, **how)
        with open(temporary / "images.u8", "wb") as crops, open(temporary / "coverage.u8", "wb") as coverage:
            for found in bar:
                kept[found.rows] = True
                crops.write(found.crops)
                coverage.write(found.coverage)
                total += found.total
                tally = Tally(tally, found.tally)
        info.rois, info.starts = int(kept.sum()), instances.starts
        if not info.rois:
            none = f"none of the {instances.images} images of {info.source} {info.split} could be used"
            raise DataError(f"{none}: {sources.counted(tally.skipped, tally.examples)}")
        columns = {name: getattr(instances, name)[kept] for name in COLUMNS}
        mean = (total / (255 * info.rois)).astype(np.float32)
        info.channels, info.ignored = 3 if total[..., 2].any() else 2, float(mean[..., 2].mean())
        if info.channels == 2:
            _drop_channel(temporary / "coverage.u8")
        np.savez(temporary / "index.npz", mean_coverage=mean[..., :2], **columns)
        for name, counts in vars(tally).items():
            setattr(info, name, dict(sorted(counts.items())))
        info.seconds = time.perf_counter() - started
        (temporary / "store.json").write_text(json.dumps(info.model_dump(), indent=1))
        try:
            with suppress(FileNotFoundError):
                os.rename(folder, f"{temporary}.old")  # its files have changed
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another builder was first, with the same content
                raise
    finally:
        for rest in (temporary, f"{temporary}.old"):
            shutil.rmtree(rest, ignore_errors=True)


def _drop_channel(file: Path) -> None:
    """Leave the first two of three channels: nothing is ignored, as in most data."""
    half = file.with_suffix(".half")
    with open(file, "rb") as three, open(half, "wb") as two:
        while piece := three.read(3 << 22):
            two.write(np.frombuffer(piece, np.uint8).reshape(-1, 3)[:, :2].tobytes())
    os.replace(half, file)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoded(rows: "_Rows", workers: int | None) -> Iterator["_Decoded"]:
    """All images in order, decoded by several processes, or as many as the source says."""
    workers = getattr(rows.source, "workers", None) or workers or usable_cores()
    workers = min(workers, -(-len(rows) // 8))
    loader: DataLoader[_Decoded] = DataLoader(
        rows,
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the training's own random state stays as it is
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        ended = "a process that builds the store was ended from outside, most likely for lack of memory"
        raise DataError(f"{ended}: give a smaller number of workers") from None


def _unchanged(decoded: Any) -> Any:
    """As it is. PyTorch would send arrays through shared memory, of which a container may have little."""
    return decoded


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler belongs to the training loop
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        """PyTorch's own check does not reach a worker whose results wait in a pipe that nobody reads."""
        while parent is not None and os.getppid() == parent.pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# -- one image -----------------------------------------------------------------------------------------
class _Decoded(NamedTuple):
    """What became of an image."""

    tally: Tally  # what was left out, and what was found unusual
    rows: list[int] = []  # of the index, one a ROI that has a mask
    crops: bytes = b""  # uint8 [n, Hc, Wc, 3]
    coverage: bytes = b""  # uint8 [n, Hm, Wm, 3]
    total: NDArray[np.int64] | int = 0  # [Hm, Wm, 3], the sum of the coverage


class _Rows(Dataset[_Decoded]):
    """Decodes image by image."""

    def __init__(self, source: Source, instances: Instances, info: StoreInfo) -> None:
        self.source, self.instances, self.info = source, instances, info
        self.starts = np.searchsorted(instances.image_index, np.arange(instances.images + 1)).tolist()

    def __len__(self) -> int:
        return self.instances.images

    def __getitem__(self, index: int) -> _Decoded:
        rows, tally = slice(self.starts[index], self.starts[index + 1]), Tally()
        slots = self.instances.slots[rows]
        try:
            scene = self.source.scene(index)
            if len(slots) and slots.max() >= len(scene.masks):
                less = f"image {index} of {self.source.name} has fewer persons than when it was listed"
                raise SceneError(sources.UNREADABLE, f"{less}: its files were changed in between")
        except (SceneError, OSError) as error:  # OSError: a folder that may not be read, a disk that fails
            tally.skip(getattr(error, "reason", sources.UNREADABLE), str(error))
            return _Decoded(tally)
        for kind, example in scene.notes:
            tally.note(kind, example)
        boxes, info = torch.from_numpy(self.instances.boxes[rows]).double(), self.info

        def regions(canvas: tuple[int, int], box: tuple[int, int]) -> torch.Tensor:
            return expand_boxes(boxes, (canvas[0] / box[0], canvas[1] / box[1]))

        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        crops = _bytes(crop_rois(pixels, regions(info.canvas, info.roi_size), info.canvas, fill=MEAN))
        anyone, fractions = scene.masks.any(0), []
        ignored = [] if scene.ignored is None else [scene.ignored & ~anyone]
        places = zip(slots, regions(info.mask_canvas, info.mask_size), strict=True)
        for slot, region in places:
            mine = scene.masks[slot]
            layers = torch.from_numpy(np.stack([mine, anyone & ~mine, *ignored]))
            cells = crop_rois(layers, region[None], info.mask_canvas)[0]
            fractions.append(functional.pad(cells, (0, 0, 0, 0, 0, 1 - len(ignored))))
        coverage = _bytes(255 * torch.stack(fractions))
        window = centre_window(torch.from_numpy(coverage[..., 0]), info.mask_size)
        covered = (window > 0).flatten(1).any(1).numpy()
        for number in self.instances.annotation_ids[rows][~covered]:
            tally.skip(sources.NO_MASK, f"annotation {number} has no mask inside its box")
        kept, coverage = (np.flatnonzero(covered) + rows.start).tolist(), coverage[covered]
        total = coverage.sum(0, dtype=np.int64)
        return _Decoded(tally, kept, crops[covered].tobytes(), coverage.tobytes(), total)


def _bytes(planes: torch.Tensor) -> NDArray[np.uint8]:
    """``[n, C, H, W]`` in 0..255 as uint8 ``[n, H, W, C]``."""
    rounded = planes.round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())
