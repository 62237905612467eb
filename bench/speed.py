"""What a guarded step costs, beside an unguarded baseline on the same model in the same run.

    python bench/speed.py [--recipe best] [--batches 2,16,64,128] [-p data coco -p store_dir DIR]
                          [--out bench/speed.json] [--inductor '{"combo_kernels": true}']
    torchrun --nproc-per-node 2 bench/speed.py --batches 32,128 --kinds "refinelib,no guard" >two.json
    python bench/speed.py --scaling one.json two.json

For each batch size, interleaved in blocks on the same data:

    refinelib   the step as a user gets it: augmentation, every module and loss, guard, report, average;
                compiled and captured as a CUDA graph
    no guard    the same, with clip_grad_norm_ and the optimizer in the guard's place
    captured    refinelib captured as a CUDA graph, but not compiled
    eager       refinelib without compiling or graphs
    base        the network alone, cross-entropy only, no refinements, no guard, compiled and captured

One JSON line a figure, as it is measured. ``start`` is the time to build the objects, to compile and to
take four steps. ``share`` is the model's arithmetic (counted by torch, forward and backward) per second
over the rate of an 8192 x 8192 x 8192 bf16 matrix product measured in the same run.

Under ``torchrun`` the steps are those of all processes: a batch is theirs together, ``share`` and memory are
of one of them. ``--scaling`` measures nothing: from the output of runs with one process and with more it
prints a table of the ROIs a second, and how many times those of one process they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from refinelib import ranks
from refinelib import step as stepping
from refinelib.build import build_step
from refinelib.config import resolve
from refinelib.data import open_split
from refinelib.guard.measure import ran_out
from refinelib.step import WARM_UP, Stepper

#: Steps an epoch of the schedule: a long run's rate, whatever the batch and however small the store.
SCHEDULED = 1000
#: Seconds without a sign of life of a process after which the others end.
TIMEOUT = 60.0

LINES: list[dict] = []


def say(**line) -> None:
    """Print a line, on rank 0 of several processes."""
    if ranks.rank() == 0:
        LINES.append(line)
        print(json.dumps(line), flush=True)


def synchronize(device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def meet() -> None:
    """Wait for the other ranks."""
    if ranks.count() > 1:
        dist.all_reduce(torch.zeros(1))


def compiler_options(options: dict | None):
    """A context in which PyTorch's compiler has these options in place of the package's."""
    if options is None:
        return contextlib.nullcontext()
    return mock.patch.object(stepping, "compiler_options", lambda *_: options or None)


class NoGuard:
    """What a plain loop does where the guard stands: clip, step, average."""

    def __init__(self, guard) -> None:
        self.inner, self.optimizer, self.parameters, self.averages = (
            guard,
            guard.optimizer,
            guard.parameters,
            guard.averages,
        )
        self.decay, self.clip, self.memory = guard.ema_decay, guard.grad_clip, guard.memory

    fused = True

    def compile(self) -> None: ...

    def uncompile(self) -> None: ...

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.total = 0.0

    def backward(self, loss) -> None:
        loss.backward()
        self.total = self.total + loss.detach()

    @torch.no_grad()
    def step(self, loss):
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        if self.averages:
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.decay)
        return torch.stack([loss, norm])


class CrossEntropy(nn.Module):
    """Of the class scores alone."""

    def forward(self, output, labels):
        loss = nn.functional.nll_loss(output.log_probs(), labels)
        return loss, loss.detach()[None]


def stepper(settings, store, device, *, guarded=True, base=False):
    torch.manual_seed(0)
    parts = build_step(
        settings.model_copy(update={"ema_decay": 0.0}) if base else settings,
        store,
        device,
        steps_per_epoch=SCHEDULED,
    )
    if base:
        parts = parts._replace(loss=CrossEntropy())
    if not guarded:
        parts = parts._replace(guard=NoGuard(parts.guard))
    found = Stepper(settings, parts, device=device, steps=10**6, say=lambda m: say(figure="note", text=m))
    found.plan, found.number = parts.loader.plan(0), 0
    return found


def take(stepper: Stepper, count: int) -> None:
    for _ in range(count):
        at = stepper.number % stepper.loader.steps_per_epoch
        stepper.number += 1
        stepper.step(stepper.plan, at, stepper.number)


def seconds_a_step(stepper: Stepper, count: int, device) -> float:
    synchronize(device)
    meet()
    started = time.perf_counter()
    take(stepper, count)
    synchronize(device)
    return (time.perf_counter() - started) / count


def steps_for(seconds: float, stepper: Stepper, device, *, least: int) -> int:
    """How many steps take so long; the same on all ranks."""
    return ranks.tell(max(least, int(seconds / seconds_a_step(stepper, least, device))))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--batches", default="2,16,64", help="or auto: the recipe's own")
    parser.add_argument("--kinds", default="refinelib,no guard,captured,eager,base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=float, default=0.25, help="seconds of a block")
    parser.add_argument(
        "--inductor",
        type=json.loads,
        metavar="JSON",
        help="options of PyTorch's compiler in place of the package's; {}: none",
    )
    parser.add_argument("--scaling", type=Path, nargs="+", metavar="FILE", help="print the table of these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    if options.scaling:
        print(scaling(options.scaling))
        return 0
    with ranks.joined(options.device, TIMEOUT):
        return run(options)


def run(options) -> int:
    device = torch.device(options.device)
    say(figure="device", **told_of(device))
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder, compiler_options(options.inductor):
        given = dict(
            amp="bf16" if device.type == "cuda" else "off",
            augment="full",
            ema_decay=0.98,
            device=device.type,
            output_dir=ranks.tell(folder),
            compile="on",
        )
        settings = resolve(options.recipe, **{**given, "data": "synthetic", **dict(options.p)})
        with contextlib.redirect_stdout(sys.stderr), ranks.one_a_host_first():
            store = open_split(settings, "train")
        rate = matrix_rate(device)
        say(figure="matrix_rate", tflops=round(rate / 1e12, 1))
        for batch in options.batches.split(","):
            size = settings.batch_size if batch == "auto" else int(batch)
            measure(settings.model_copy(update={"batch_size": size}), store, device, options, rate)
    if options.out and ranks.rank() == 0:
        options.out.write_text(json.dumps(LINES, indent=1) + "\n")
    return 0


def measure(settings, store, device, options, rate: float) -> None:
    plain = settings.model_copy(update=dict(compile="off", cuda_graphs=False))
    bare = settings.model_copy(
        update={name: False for name in type(settings).model_fields if name.startswith("use_")}
    )
    makers = {
        "refinelib": lambda: stepper(settings, store, device),
        "no guard": lambda: stepper(settings, store, device, guarded=False),
        "captured": lambda: stepper(settings.model_copy(update=dict(compile="off")), store, device),
        "eager": lambda: stepper(plain, store, device),
        "base": lambda: stepper(bare, store, device, guarded=False, base=True),
    }
    steppers, work, memory = {}, {}, {}
    for name in options.kinds.split(","):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        try:
            steppers[name] = made = makers[name]()
            take(made, WARM_UP + 1)
            synchronize(device)
        except RuntimeError as error:
            if not ran_out(error) or ranks.count() > 1:  # other ranks would wait for this one
                raise
            steppers.pop(name, None)
            say(figure="step", batch=settings.batch_size, kind=name, note="out of memory")
            continue
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
        work[name] = flops(made, device) * settings.batch_size / ranks.count()
        say(
            figure="start",
            batch=settings.batch_size,
            kind=name,
            seconds=round(time.perf_counter() - started, 2),
        )
    times: dict[str, list[float]] = {name: [] for name in steppers}
    counts = {name: steps_for(options.block, made, device, least=3) for name, made in steppers.items()}
    for _ in range(options.rounds):
        for name, made in steppers.items():
            times[name].append(seconds_a_step(made, counts[name], device))
    for name, found in times.items():
        middle = statistics.median(found)
        say(
            figure="step",
            batch=settings.batch_size,
            kind=name,
            processes=ranks.count(),
            ms=round(1e3 * middle, 3),
            least=round(1e3 * min(found), 3),
            most=round(1e3 * max(found), 3),
            rois_per_second=round(settings.batch_size / middle, 1),
            share=round(work[name] / middle / rate, 3),
            peak_gib=round(memory[name], 2),
        )
    if {"refinelib", "no guard"} <= times.keys():
        ratios = [a / b - 1 for a, b in zip(times["refinelib"], times["no guard"], strict=True)]
        say(
            figure="guard_share",
            batch=settings.batch_size,
            median=round(statistics.median(ratios), 4),
            least=round(min(ratios), 4),
            most=round(max(ratios), 4),
        )
    for made in steppers.values():
        made.graph = None
    steppers.clear()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def scaling(files: list[Path]) -> str:
    """ROIs a second by the number of processes, in Markdown; from what :func:`run` printed or wrote."""
    found = {}
    for text in (file.read_text() for file in files):
        printed = (json.loads(line) for line in text.splitlines() if line.startswith("{"))
        for line in json.loads(text) if text.startswith("[") else printed:
            if "rois_per_second" in line:
                found[line["kind"], line["batch"], line["processes"]] = line["rois_per_second"]
    heads = ["kind", "batch of all", "processes", "ROIs a second"]
    heads += ["times one process, same batch of all", "times one process, same batch each"]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for (kind, batch, count), rate in sorted(found.items()):
        alone = (found.get((kind, size, 1)) for size in (batch, batch / count))
        ratios = (f"{rate / one:.2f}" if one and count > 1 else "" for one in alone)
        rows.append([kind, str(batch), str(count), f"{rate:g}", *ratios])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def told_of(device) -> dict[str, object]:
    """The machine, for the first line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    return {"name": name, **versions, "processes": ranks.count()}


def flops(made: Stepper, device) -> float:
    """Operations a ROI of the model, forward and backward, as torch counts them."""
    images = torch.zeros(1, 3, *made.model.canvas, device=device)
    with FlopCounterMode(display=False) as counter:
        made.model(images).logits.sum().backward()
    made.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matrix_rate(device) -> float:
    """Operations a second of a matrix product of random numbers: bf16 on a GPU, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    best = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(device)
        best.append(10 * 2 * side**3 / (time.perf_counter() - started))
    return statistics.median(best)


if __name__ == "__main__":
    sys.exit(main())
