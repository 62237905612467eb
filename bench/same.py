"""Whether the fast path learns the same: the losses of some steps, compiled (and on CUDA captured as a graph) against plain ones.

    python bench/same.py [--steps 200] [-p amp bf16] [-p batch_size 16]

Both take the same steps from the same weights. Rounding differs between them, and training carries a difference on, so beside
them goes a third run, plain too, whose weights start one rounding step away: how far that one drifts is what no method can be asked to
beat. Prints one JSON line; exit code 1 where the fast path's mean loss over the last quarter is further off than ``--tolerance``, or
the two drift apart ten times as fast as the nudged run does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile

import torch

from refinelib.config import resolve
from refinelib.data import open_split
from refinelib.safety.guard import REPORT

import speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(amp="auto", augment="full", ema_decay=0.98, device=device.type, output_dir=folder, max_images=64, lr=1e-3, warmup_epochs=0)
        settings = resolve("original", **{**given, **dict(options.p)})
        with contextlib.redirect_stdout(sys.stderr):
            store = open_split(settings, "train")
        plain = settings.model_copy(update=dict(compile="off", cuda_graphs=False))
        fast = settings.model_copy(update=dict(compile="on"))
        runs = {"plain": losses(plain, store, device, options.steps), "fast": losses(fast, store, device, options.steps)}
        runs["nudged"] = losses(plain, store, device, options.steps, nudge=True)
    last = options.steps - options.steps // 4
    means = {name: float(found["loss"][last:].mean()) for name, found in runs.items()}
    apart = {name: float((runs[name]["loss"] - runs["plain"]["loss"]).abs().mean()) for name in ("fast", "nudged")}
    off = abs(means["fast"] / means["plain"] - 1)
    same = off <= options.tolerance and apart["fast"] <= max(10 * apart["nudged"], 1e-3)
    print(json.dumps({
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__, "steps": options.steps, "amp": settings.amp,
        "first_loss": {name: round(float(found["loss"][0]), 6) for name, found in runs.items()},
        "last_quarter": {name: round(value, 5) for name, value in means.items()}, "off": round(off, 5),
        "mean_distance_from_plain": {name: round(value, 6) for name, value in apart.items()},
        "skipped": {name: int(found["skipped"].sum()) for name, found in runs.items()}, "same": same,
    }))  # fmt: skip
    return 0 if same else 1


def losses(settings, store, device, steps: int, *, nudge: bool = False) -> dict[str, torch.Tensor]:
    """Loss and skips of each step, read back at the end."""
    stepper = speed.stepper(settings, store, device)
    if nudge:
        with torch.no_grad():
            for p in stepper.guard.parameters:
                p.mul_(1 + 2.0**-23)
    reports = []
    for step in range(steps):
        epoch, at = divmod(step, stepper.feed.steps_per_epoch)
        plan = stepper.feed.plan(epoch) if at == 0 else plan
        reports.append(stepper.step(plan, at, step + 1))
    table = torch.stack(reports).cpu()
    before = len(stepper.loss.names)
    wanted = settings.compile == "on"
    if (stepper.compiled, stepper.graph is not None) != (wanted, wanted and device.type == "cuda"):
        sys.exit("the fast path was not taken: see what was noted above")  # it would be compared with itself
    stepper.graph = None
    return {name: table[:, before + REPORT.index(name)] for name in ("loss", "skipped")}


if __name__ == "__main__":
    sys.exit(main())
