"""Measure the ROI store: building, the second start, and serving at COCO's size.

    python bench/store.py                                   COCO persons beside the project, or synthetic ones
    python bench/store.py --annotations FILE --images DIR   any COCO instances file
    python bench/store.py --data-dir DIR [--split val]      a folder in COCO's layout
    python bench/store.py --scale 262000                    besides, a store of so many rows, really written

Prints one JSON line. Everything is written into a temporary folder (``--scratch`` says where) and deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from children import end_with_me

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_person"

#: Run by a fresh interpreter: what a second start costs, measured from its own first line.
SECOND_START = """
import json, sys, time
started = time.perf_counter()
from pathlib import Path
from refinelib.data import CocoPeople, SyntheticPeople, open_store
imported = time.perf_counter()
kind, arguments, how = json.loads(sys.argv[1])
source = {"coco": CocoPeople, "synthetic": SyntheticPeople}[kind](*arguments)
store = open_store(source, progress=False, **how)
store.gather([0, len(store) - 1])
opened = time.perf_counter()
print(json.dumps({"imports": imported - started, "opening": opened - imported}))
"""

#: Run by a fresh interpreter: random batches from a store, and what they keep in memory.
SERVE = """
import json, sys, time
import torch
from refinelib.data import Store

def memory():
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return {}
    status = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own_mb": int(status["RssAnon"]) // 1024, "mapped_mb": int(status["RssFile"]) // 1024}

def serve(store, seed, seconds=15.0, batches=1000):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(store), (batches, 64), generator=generator)
    started, done = time.perf_counter(), 0
    for rows in order:
        images, coverage = store.gather(rows)
        done += len(rows)
        if time.perf_counter() - started > seconds:
            break
    return round(done / (time.perf_counter() - started))

before, started = memory(), time.perf_counter()
store = Store.open(sys.argv[1])
opening = time.perf_counter() - started
opened = memory()
first, second = serve(store, 0), serve(store, 0)
rates = {"from_disk": first, "from_memory": second}
print(json.dumps({"opening_s": round(opening, 4), "gather_rois_per_s": rates,
                  "memory": {"before_opening": before, "after_opening": opened, "after_serving": memory()}}))
"""


def main() -> None:
    options = _options()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from refinelib.data import DataError
    from refinelib.data.store_build import usable_cores

    try:
        with tempfile.TemporaryDirectory(prefix="refinelib-bench-", dir=options.scratch) as scratch:
            report = measure(options, Path(scratch))
    except DataError as error:
        sys.exit(f"bench/store.py: {error}")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({**report, "cores": usable_cores(), **versions}))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Builds a store in ``scratch`` and says what it cost; with ``--scale``, a large one after it."""
    from refinelib.data import CocoPeople, SyntheticPeople, coco_paths, open_store

    if options.annotations:
        kind, arguments = "coco", (options.annotations, options.images, options.split)
    elif options.data_dir or BESIDE.is_dir():
        folder = Path(options.data_dir) if options.data_dir else BESIDE
        kind, arguments = "coco", (*map(str, coco_paths(options.split, folder)), options.split)
    else:
        kind, arguments = "synthetic", (240, options.split)
    size = (options.size, options.size)
    how = dict(roi_size=size, mask_size=size, context=options.context, root=str(scratch / "stores"))
    started = time.perf_counter()
    source = {"coco": CocoPeople, "synthetic": SyntheticPeople}[kind](*arguments)
    with contextlib.redirect_stdout(sys.stderr):  # standard output has the JSON alone
        store = open_store(source, workers=options.workers, **how)
    seconds = time.perf_counter() - started
    report = {
        "source": f"{store.source} {store.split}",
        "rois": len(store),
        "build_s": round(seconds, 2),
        "rois_per_s": round(len(store) / seconds, 1),
        "skipped": store.skipped,
        "bytes": sum(file.stat().st_size for file in store.folder.iterdir()),
        "second_start_s": second_start([kind, arguments, how]),
    }
    if options.scale:
        report["scale"] = scale(store, options.scale, scratch / "large")
    return report


def second_start(what: list) -> dict[str, float]:
    """The same store opened by fresh processes, the median of three; ``process`` includes starting Python."""
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        inside = _fresh(SECOND_START, json.dumps(what))
        runs.append({**inside, "process": time.perf_counter() - started})
    return {name: round(sorted(run[name] for run in runs)[1], 4) for name in runs[0]}


def scale(store: Any, rows: int, folder: Path) -> dict[str, Any]:
    """Writes a store of so many rows, see :func:`write`, and serves it in a fresh process."""
    written = write(store, rows, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"rois": rows, "bytes": size, "write_s": round(written, 1), **_fresh(SERVE, str(folder))}


def write(store: Any, rows: int, folder: Path) -> float:
    """Writes a store of ``rows`` rows, the small one's over and over; returns the seconds that it took."""
    import numpy as np

    from refinelib.data import DataError

    names = {"images.u8": store.images, "coverage.u8": store.coverage}
    needed = rows * sum(array[0].nbytes for array in names.values())
    free = shutil.disk_usage(folder.parent).free
    if needed * 1.05 > free:
        raise DataError(
            f"{rows} rows take {needed / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free: "
            f"give --scratch on a larger disk"
        )
    folder.mkdir()
    started = time.perf_counter()
    for name, array in names.items():
        block = np.ascontiguousarray(array)
        with open(folder / name, "wb") as file:
            for at in range(0, rows, len(block)):
                file.write(block[: rows - at])
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # the first pass has to read from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with np.load(store.folder / "index.npz") as index:
        columns = {name: index[name] for name in index.files}
    copies = np.arange(rows) // len(store)
    mean = columns.pop("mean_coverage")
    columns = {name: np.resize(column, (rows, *column.shape[1:])) for name, column in columns.items()}
    columns["image_index"] = (columns["image_index"] + copies * (store.image_index.max() + 1)).astype(
        np.int32
    )
    np.savez(folder / "index.npz", mean_coverage=mean, **columns)
    (folder / "store.json").write_text(json.dumps({**store.info.model_dump(), "rois": rows}))
    return time.perf_counter() - started


def _fresh(code: str, argument: str) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code, argument], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", help="COCO instances JSON (with --images)")
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--data-dir", help="folder in COCO's layout, in place of those two")
    parser.add_argument(
        "--split", default="train", choices=("train", "val"), help="which split (default: train)"
    )
    parser.add_argument(
        "--size", type=int, default=64, help="pixels across the box, of image and mask (default: 64)"
    )
    parser.add_argument("--context", type=float, default=0.0, help="added around the box (default: 0)")
    parser.add_argument("--workers", type=int, help="processes that build (default: one a core)")
    parser.add_argument(
        "--scale", type=int, help="also write and serve a store of so many rows, 20 KB each at size 64"
    )
    parser.add_argument("--scratch", help="where the temporary folder is made (default: the system's)")
    options = parser.parse_args()
    if bool(options.annotations) != bool(options.images) or (options.annotations and options.data_dir):
        parser.error("give --annotations and --images together, or --data-dir, or none of them")
    for name in ("annotations", "images"):  # the fresh processes run elsewhere
        if getattr(options, name):
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    if options.scale is not None and options.scale < 1:
        parser.error("--scale is a number of rows, at least 1")
    return options


if __name__ == "__main__":
    end_with_me()
    main()
