"""How the cost of training grows: with the batch, the crop, the width and the data set.

    python bench/growth.py [--curves batch,size,width,data] [-p width 0.125] [--out bench/growth.json]

    batch   milliseconds a ROI and peak memory, batches doubling up to the largest that fits (or --largest)
    size    the same for crops of 32 to 256 pixels
    width   the same and the number of parameters, for widths of 0.125 to 2
    data    opening, planning an epoch, serving a ROI and an epoch of whole steps, for stores of --rows rows,
            really written; memory of the host and the device

Under ``torchrun`` the steps are those of all processes: a batch is theirs together, memory is told of each.

    torchrun --nproc-per-node 2 bench/growth.py --curves data --rows 262000 --served 256

The time of an epoch is that of its steps by the median of ``measured_steps``; ``data_epoch_s`` is that of
making the batches alone, on one process its own share of them. Of the host's memory ``rss`` counts pages of
the store's files in each process that has read them, ``pss`` a part of each page, by how many share it.

Steps are whole, but not compiled (--compile compiles them too, minutes a point). One JSON line a point,
as it is measured; the exponent between neighbours says where a curve bends: 1 is a straight line through
zero.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import speed
import store as stores
import torch
from speed import say

from refinelib import ranks
from refinelib.config import Settings, resolve
from refinelib.data import Store, open_split
from refinelib.data.loader import BatchLoader
from refinelib.guard.measure import ran_out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", default="batch,size,width,data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="ROIs a step along the curves of size and width")
    parser.add_argument(
        "--largest", type=int, default=1024, help="where the curve of batches stops at the latest"
    )
    parser.add_argument("--sizes", default="32,64,96,128,192,256")
    parser.add_argument("--widths", default="0.125,0.25,0.5,1,1.5,2")
    parser.add_argument("--rows", default="500,5000,50000,262000")
    parser.add_argument("--served", type=int, default=64, help="ROIs a step along the curve of data")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    with ranks.joined(options.device, speed.TIMEOUT):
        return run(options)


def run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    say(curve="device", **speed.told_of(device))
    with tempfile.TemporaryDirectory() as folder:
        given = dict(
            augment="full",
            ema_decay=0.98,
            device=device.type,
            output_dir=ranks.tell(folder),
            compile="on" if options.compile else "off",
            max_images=40,
        )
        base = resolve("original", **{**given, "amp": "auto", **dict(options.p)})
        with contextlib.redirect_stdout(sys.stderr), ranks.one_a_host_first():
            small = open_split(base, "train")
        for curve in options.curves.split(","):
            points = list(
                {"batch": by_batch, "size": by_size, "width": by_width, "data": by_data}[curve](
                    base, small, device, options
                )
            )
            for before, after in itertools.pairwise(points):
                say(curve=curve, between=[before["at"], after["at"]], **exponents(before, after))
    if options.out and ranks.rank() == 0:
        options.out.write_text(json.dumps(speed.LINES, indent=1) + "\n")
    return 0


def by_batch(
    base: Settings, small: Store, device: torch.device, options: argparse.Namespace
) -> Iterable[dict]:
    batch, largest = 1, None
    while batch <= options.largest:
        point = step_cost(base.model_copy(update={"batch_size": batch}), small, device)
        if point is None:
            break
        yield told("batch", batch, per_roi_ms=round(point["ms"] / batch, 4), **point)
        largest, batch = batch, 2 * batch
    say(
        curve="batch",
        largest_that_fits=largest,
        stopped_by="--largest" if batch > options.largest else "memory",
    )


def by_size(
    base: Settings, small: Store, device: torch.device, options: argparse.Namespace
) -> Iterable[dict]:
    for size in map(int, options.sizes.split(",")):
        settings = base.model_copy(
            update=dict(batch_size=options.batch, roi_size=(size, size), mask_size=(size, size))
        )
        with contextlib.redirect_stdout(sys.stderr), ranks.one_a_host_first():
            crops = open_split(settings, "train")
        point = step_cost(settings, crops, device)
        if point is None:
            break
        yield told("size", size, per_pixel_ns=round(1e6 * point["ms"] / options.batch / size**2, 3), **point)


def by_width(
    base: Settings, small: Store, device: torch.device, options: argparse.Namespace
) -> Iterable[dict]:
    for width in map(float, options.widths.split(",")):
        point = step_cost(base.model_copy(update=dict(batch_size=options.batch, width=width)), small, device)
        if point is None:
            break
        yield told("width", width, **point)


def by_data(
    base: Settings, small: Store, device: torch.device, options: argparse.Namespace
) -> Iterable[dict]:
    for rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as own:
            folder, written = Path(ranks.tell(own)) / "large", 0.0
            with ranks.one_a_host_first():
                if not folder.exists():
                    written = stores.write(small, rows, folder)
            started = time.perf_counter()
            large = Store.open(folder)
            opened = time.perf_counter()
            settings = base.model_copy(update={"batch_size": min(options.served, rows)})
            size, mode = settings.batch_size, base.augment
            loader = BatchLoader(large, device=device, batch_size=size, mode=mode, seed=0)
            ready = time.perf_counter()
            plan = loader.plan(0)
            planned = time.perf_counter()
            taken = min(loader.steps_per_epoch, 200)
            for step in range(taken):
                loader.batch(plan, step)
            speed.synchronize(device)
            served = (time.perf_counter() - planned) / taken
            figures = dict(
                write_s=round(written, 1),
                opening_s=round(opened - started, 4),
                feed_s=round(ready - opened, 4),
                plan_s=round(planned - ready, 4),
                serving_us_a_roi=round(1e6 * served / size * ranks.count(), 2),
                on_device=loader.resident is not None,
                plan_mib=round(sum(x.nbytes for x in plan) / 2**20, 2),
                store_gib=round(rows * (large.images[0].nbytes + large.coverage[0].nbytes) / 2**30, 3),
                served=size,
                steps=loader.steps_per_epoch,
                data_epoch_s=round(served * loader.steps_per_epoch, 2),
            )
            del loader, plan  # the step has its own
            point = step_cost(settings, large, device)
            if point is not None:
                figures["epoch_s"] = round(point["ms"] * figures["steps"] / 1e3, 1)
                figures |= {name: point[name] for name in ("ms", "measured_steps")}
            memory = ranks.gathered({**host_memory(), "device_peak_gib": point and point["peak_gib"]})
            figures |= {name: [each[name] for each in memory] for name in memory[0]}
            yield told("data", rows, **figures)


def host_memory() -> dict[str, float]:
    """GiB that this process has in memory, by how Linux counts shared pages."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # another system
        return {}
    kib = {line.split(":")[0].lower(): int(line.split()[1]) for line in lines}
    return {f"{name}_gib": round(kib[name] / 2**20, 3) for name in ("rss", "pss")}


def step_cost(settings: Settings, rois: Store, device: torch.device) -> dict[str, Any] | None:
    """Median time of a step, its peak memory and the model's parameters; none where it does not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stepper = None
    try:
        stepper = speed.stepper(settings, rois, device)
        speed.take(stepper, speed.WARM_UP + 1)
        if max(ranks.gathered(stepper.chunks)) > 1:  # it took smaller pieces to make the batch fit
            return None
        count = speed.steps_for(0.3, stepper, device, least=2)
        times = [speed.seconds_a_step(stepper, count, device) for _ in range(3)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        parameters = sum(p.numel() for p in stepper.model.parameters())
        return dict(
            ms=round(1e3 * statistics.median(times), 3),
            peak_gib=peak and round(peak, 3),
            parameters=parameters,
            measured_steps=3 * count,
        )
    except RuntimeError as error:
        if not ran_out(error) or ranks.count() > 1:  # other ranks would wait for this one
            raise
        return None
    finally:
        if stepper is not None:
            stepper.graph = None
        torch.compiler.reset()


def told(curve: str, at: float, **figures: Any) -> dict[str, Any]:
    say(curve=curve, at=at, **figures)
    return dict(at=at, **figures)


def exponents(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """``log(y2 / y1) / log(x2 / x1)`` of every figure that grows."""
    wide = math.log(after["at"] / before["at"])
    found = {
        name: round(math.log(after[name] / before[name]) / wide, 2)
        for name in before
        if name != "at"
        and isinstance(before[name], (int, float))
        and not isinstance(before[name], bool)
        and before[name] > 0
        and (after[name] or 0) > 0
    }
    return {"exponents": found}


if __name__ == "__main__":
    sys.exit(main())
