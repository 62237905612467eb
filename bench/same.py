"""Whether compiled steps learn the same as eager ones: losses and gradients.

    python bench/same.py [--steps 200] [--nudges 3] [-p amp bf16] [-p batch_size 16] [--inductor JSON]

Both kinds take the same steps from the same weights (on CUDA the compiled ones as a CUDA graph). Rounding
differs between them, and training amplifies a difference. The yardstick is the drift of eager runs whose
weights start about one rounding step away. Then the gradient of one batch, at the weights where the eager
run ended, both ways and in float32: a wrong kernel shows in the parameter it belongs to.

Prints one JSON line. Exit code 1 where the compiled steps' mean loss over the last quarter is off by more
than ``--tolerance``, where they drift ten times as fast as nudged runs do, or where the compiled gradient
lies further from float32's than 1.5 times the eager one (for any parameter: than three times and a tenth
of its length).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import tempfile
from typing import NamedTuple

import speed
import torch

from refinelib.config import resolve
from refinelib.data import open_split
from refinelib.guard.guard import REPORT
from refinelib.step import compile_cache


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--nudges", type=int, default=3, help="plain runs from weights one rounding step away"
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--inductor",
        type=json.loads,
        metavar="JSON",
        help="options of PyTorch's compiler in place of the package's; {}: none",
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, speed.compiler_options(options.inductor):
        given = dict(
            amp="auto",
            augment="full",
            ema_decay=0.98,
            device=device.type,
            output_dir=folder,
            max_images=64,
            lr=1e-3,
            warmup_epochs=0,
        )
        settings = resolve("original", **{**given, **dict(options.p)})
        with contextlib.redirect_stdout(sys.stderr):
            store = open_split(settings, "train")
        plain = settings.model_copy(update=dict(compile="off", cuda_graphs=False))
        fast = settings.model_copy(update=dict(compile="on"))
        exact = plain.model_copy(update=dict(amp="off"))
        runs, weights = {}, {}
        for name, how, nudge in [
            ("plain", plain, 0),
            ("fast", fast, 0),
            *((f"nudged {i}", plain, i) for i in range(1, options.nudges + 1)),
        ]:
            runs[name], weights[name] = run(how, store, device, options.steps, nudge=nudge)
        batch = gradient(exact, store, device, weights["plain"])
        slopes = {
            name: gradient(how, store, device, weights["plain"], batch.batch).slopes
            for name, how in (("plain", plain), ("fast", fast))
        }
    line = compare(runs, options) | compare_gradients(batch.slopes, slopes)
    line["same"] = line["losses_same"] and line["gradients_same"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        json.dumps(
            {"device": name, "torch": torch.__version__, "steps": options.steps, "amp": settings.amp, **line}
        )
    )
    return 0 if line["same"] else 1


def run(settings, store, device, steps: int, *, nudge: int = 0) -> tuple[dict[str, torch.Tensor], dict]:
    """Loss and skips of each step, and the weights at the end. ``nudge`` is a seed; 0 moves nothing."""
    stepper = speed.stepper(settings, store, device)
    if nudge:
        random = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for p in stepper.guard.parameters:
                p.mul_(1 + 2.0**-23 * torch.randint(-1, 2, p.shape, generator=random).to(device))
    reports, plan = [], stepper.plan
    for step in range(steps):
        epoch, at = divmod(step, stepper.loader.steps_per_epoch)
        plan = stepper.loader.plan(epoch) if at == 0 else plan
        reports.append(stepper.step(plan, at, step + 1))
    table = torch.stack(reports).cpu()
    before = len(stepper.loss.names)
    wanted = settings.compile == "on"
    if (stepper.compiled, stepper.graph is not None) != (wanted, wanted and device.type == "cuda"):
        sys.exit("the fast path was not taken: see what was noted above")  # it would be compared with itself
    stepper.graph = None
    return {name: table[:, before + REPORT.index(name)] for name in ("loss", "skipped")}, copy.deepcopy(
        stepper.model.state_dict()
    )


class Gradient(NamedTuple):
    """Of one batch: the batch itself, and the slope of each parameter by its name, float32."""

    batch: tuple[torch.Tensor, torch.Tensor]
    slopes: dict[str, torch.Tensor]


def gradient(settings, store, device, weights: dict, batch: tuple | None = None) -> Gradient:
    """The gradient at ``weights``, of a given batch or the first of the first epoch."""
    stepper = speed.stepper(settings, store, device)
    stepper.model.load_state_dict(weights)
    images, labels = batch or stepper.loader.make(*stepper.loader.inputs(stepper.plan, 0))
    with compile_cache(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        loss, _ = stepper.forward(images.contiguous(memory_format=torch.channels_last), labels)
        factor = stepper.guard.scale(torch.ones((), device=device))
        (loss * factor).backward()
    return Gradient(
        (images, labels),
        {name: p.grad.float() / factor for name, p in stepper.model.named_parameters() if p.grad is not None},
    )


def compare(runs: dict, options) -> dict:
    """The losses of runs, in words of a JSON line."""
    last = options.steps - options.steps // 4
    means = {name: float(found["loss"][last:].mean()) for name, found in runs.items()}
    apart = {
        name: float((found["loss"] - runs["plain"]["loss"]).abs().mean())
        for name, found in runs.items()
        if name != "plain"
    }
    off = {name: means[name] / means["plain"] - 1 for name in apart}
    drift = max((value for name, value in apart.items() if name != "fast"), default=0.0)
    return {
        "first_loss": {name: round(float(found["loss"][0]), 6) for name, found in runs.items()},
        "last_quarter": {name: round(value, 5) for name, value in means.items()},
        "off": {name: round(value, 5) for name, value in off.items()},
        "mean_distance_from_plain": {name: round(value, 6) for name, value in apart.items()},
        "skipped": {name: int(found["skipped"].sum()) for name, found in runs.items()},
        "losses_same": abs(off["fast"]) <= options.tolerance and apart["fast"] <= max(10 * drift, 1e-3),
    }


def compare_gradients(exact: dict[str, torch.Tensor], slopes: dict[str, dict[str, torch.Tensor]]) -> dict:
    """Distance of both gradients from float32's, over its length: in all, and for the worst parameter."""
    whole = math.hypot(*(float(x.norm()) for x in exact.values()))
    distances = {
        way: {name: float((found[name] - x).norm()) for name, x in exact.items()}
        for way, found in slopes.items()
    }
    total = {way: math.hypot(*found.values()) / whole for way, found in distances.items()}
    # Those of next to no gradient apart, whose every way is rounding.
    own = {
        name: {way: distances[way][name] / float(x.norm()) for way in slopes}
        for name, x in exact.items()
        if x.norm() > 1e-5 * whole
    }
    worst = max(own, key=lambda name: own[name]["fast"] - 3 * own[name]["plain"])
    return {
        "gradient_error": {way: round(value, 6) for way, value in total.items()},
        "worst_parameter": {"name": worst, **{way: round(value, 6) for way, value in own[worst].items()}},
        "gradients_same": total["fast"] <= 1.5 * total["plain"] + 1e-5
        and own[worst]["fast"] <= 3 * own[worst]["plain"] + 0.1,
    }


if __name__ == "__main__":
    sys.exit(main())
