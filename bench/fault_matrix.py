"""The fault matrix: every kind of fault, in every precision, under every optimizer, on this device.

    python bench/fault_matrix.py [--device cuda] [--out bench/fault_matrix.md]

Real training steps of a small model with every module on; a fault every third step. For each cell:

    survived      every weight and moment is finite afterwards, and the next step is taken
    exact         a skipped step moved nothing: weights, moments, step counts, average, statistics and
                  schedule are bit-identical (fp16's loss scale moves by its own rule, and only by that)
    attribution   the log names what was planted: module, parameter, input or loss

In the columns of 2 ranks, two processes (on CUDA with a GPU each) take the steps, and the fault is planted on
the last one alone. There the checks are of both processes, the log names the rank as well, and

    alike         after this step and those since the fault before, all state is bit-identical on both

Exit code 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from children import end_with_me
from torch import Tensor

from refinelib import ranks
from refinelib.config import resolve
from refinelib.guard.diagnose import Finding, Step
from refinelib.guard.faults import Injector, parse
from refinelib.launch import Follower
from refinelib.runs import Run
from refinelib.trainer import Trainer

#: Fault, and whether the step has to be skipped.
KINDS: dict[str, bool | None] = {
    **dict.fromkeys(("loss:nan", "loss:inf", "loss:spike", "loss:huge", "grad:spike"), True),
    **dict.fromkeys(("grad:nan:boundary", "grad:inf:stem", "grad:nan:target"), True),
    **dict.fromkeys(("grad:overflow:contour", "grad:huge:stem", "grad:huge:shared"), True),
    **dict.fromkeys(("activation:nan:contour", "activation:inf:person"), True),
    **dict.fromkeys(("activation:nan:progressive", "activation:nan:distance"), True),
    **dict.fromkeys(("activation:spike:boundary", "activation:overflow:shared"), None),
    **dict.fromkeys(("activation:huge:target", "input:huge"), None),
    **dict.fromkeys(("input:nan", "input:inf"), True),
    **dict.fromkeys(("input:overflow", "input:spike", "label:swap"), None),
}
PRECISIONS = ("off", "bf16", "fp16")
#: Settings by the path's name. On CUDA all of them are captured as graphs, except those that are not fused.
PATHS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"optimizer": "adam"},
    "adamw, 2 micro-batches": {"accumulate": 2},
    "adamw, eager": {"cuda_graphs": False},
    "adamw, not fused": {"fused_optimizer": False},
    "adam, not fused": {"optimizer": "adam", "fused_optimizer": False},
    "adamw, compiled": {"compile": "on"},
    "adamw, 2 ranks": {},
    "adamw, 2 ranks, 2 micro-batches": {"accumulate": 2},
    "adamw, 2 ranks, compiled": {"compile": "on"},
}
CLEAN = 12  # steps before the first fault, for the statistics of spikes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--workers", type=int, default=1, help="columns measured side by side")
    parser.add_argument("--paths", help="only these, separated by semicolons")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="only these, separated by commas")
    parser.add_argument("--compiled", action="store_true", help="the compiled paths too")
    parser.add_argument("--column", nargs=2, metavar=("JSON", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.column:  # one of the processes of `launched`
        return joined_column(*options.column)
    with tempfile.TemporaryDirectory() as folder:
        usual = [path for path in PATHS if options.compiled or "compiled" not in path]
        if options.device == "cuda" and torch.cuda.device_count() < 2:
            usual = [path for path in usual if "2 ranks" not in path]
        paths = options.paths.split(";") if options.paths else usual
        pairs = itertools.product(options.precisions.split(","), paths)
        jobs = [(options.device, amp, path, folder) for amp, path in pairs]
        one = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), **one) as pool:
            waiting = {pool.submit(launched if "2 ranks" in job[2] else column, *job): job for job in jobs}
            for done in as_completed(waiting):  # a column at a time, so that a run that is stopped has some
                told = dict(zip(("device", "amp", "path"), waiting[done], strict=False))
                told |= {"good": sum(map(good, done.result())), "of": len(KINDS)}
                print(json.dumps(told), file=sys.stderr, flush=True)
            cells = [cell for done in waiting for cell in done.result()]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    text = table(cells, f"{name}, torch {torch.__version__}")
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    failed = [cell for cell in cells if not good(cell)]
    for cell in failed:
        print(json.dumps(cell), file=sys.stderr)
    return 1 if failed else 0


def launched(device: str, amp: str, path: str, folder: str) -> list[dict]:
    """:func:`column` on two processes of this machine, as ``torchrun`` starts them."""
    with tempfile.TemporaryDirectory() as scratch:
        job, told = json.dumps([device, amp, path, folder]), Path(scratch) / "cells.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        package = os.pathsep.join([str(Path(ranks.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, "--column", job, str(told)], env=environment, check=True)
        return json.loads(told.read_text())


def joined_column(job: str, file: str) -> int:
    """:func:`column` as one of several processes; rank 0 writes the cells into a file."""
    torch.set_num_threads(1)
    device, *how = json.loads(job)
    # A hang says where. On a CPU fp16 takes some ten minutes.
    faulthandler.dump_traceback_later(3600 if device == "cpu" else 540, exit=True)
    with ranks.joined(device, timeout=60.0):
        cells = column(device, *how)
        if ranks.rank() == 0:
            Path(file).write_text(json.dumps(cells))
    return 0


def column(device: str, amp: str, path: str, folder: str, kinds: dict = KINDS) -> list[dict]:
    """All faults of one precision and path, one after the other in one run."""
    small = {"batch_size": 2 * ranks.count(), "width": 0.0625, "max_images": 4}
    small |= {"roi_size": 32, "mask_size": 32}
    small |= {"epochs": 1000, "ema_decay": 0.9, "lr": 1e-4, "warmup_epochs": 0, "loss_scale_init": 2.0**24}
    ways = {"on_spike": "skip", "max_incidents": 1000, "max_consecutive_skips": 1000, "deterministic": True}
    faults = (f"{at(kind)}@{CLEAN + 3 * place}{where(kind)}" for place, kind in enumerate(kinds))
    records = {"log_every": 1000, "probe_every": 0, "output_dir": folder, "device": device, "amp": amp}
    given = {"compile": "off", **PATHS[path], **small, **ways, **records, "inject": ";".join(faults)}
    settings = resolve("demo", run=f"{amp}-{path.replace(', ', '-').replace(' ', '-')}", **given)
    run = Run.start(settings) if ranks.rank() == 0 else None
    made = ranks.tell(run and run.folder)
    run = run or Follower(made)
    trainer = Trainer(settings, run)
    trainer.rewinder.start(0)
    if ranks.count() > 1:
        plant_on_last_rank(trainer.injector)
    cells, alike = [], True
    for step in range(1, CLEAN + 3 * len(kinds)):
        due = step >= CLEAN and (step - CLEAN) % 3 == 0
        before = everything(trainer) if due else None
        trainer.log.monitor.seen.clear()  # every cell has events of its own
        trainer.incidents.clear()
        told = len(run.events())
        advance(trainer)
        alike = len(set(ranks.gathered(digest(trainer)))) == 1 and alike
        if due:
            kind = list(kinds)[(step - CLEAN) // 3]
            found = judge(trainer, kind, kinds[kind], before, run.events()[told:])
            cells.append({**found, "alike": alike, "device": device, "amp": amp, "path": path})
            alike = True
    trainer.stepper.graph = None  # the ranks cannot part while a graph holds their collectives
    run.close()
    return cells


def advance(trainer: Trainer) -> None:
    """One step as the loop takes it."""
    per_epoch = trainer.loader.steps_per_epoch
    epoch, at_step = divmod(trainer.step, per_epoch)
    plan = trainer.loader.plan(epoch)
    trainer.model.train()
    report = trainer.train_step(plan, at_step)
    trainer.step += 1
    trainer.log.reports.add(report, trainer.step, epoch + 1)
    trainer.process_reports(plan, wait=True)


def plant_on_last_rank(injector: Injector) -> None:
    """Have faults come on the last rank alone: in training, and in its shares of a step that is replayed."""
    start, count = injector.start, ranks.count()
    last = ranks.rank() == count - 1
    injector.start = lambda step: start(step if last or injector.replaying else 0)

    class Shares:
        """The micro-batches of a replay, rank by rank."""

        def __init__(self, step: Step) -> None:
            self.step = step

        def __len__(self) -> int:
            return len(self.step.batches)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for place, batch in enumerate(self.step.batches):
                injector.start(self.step.number if place % count == count - 1 else 0)
                yield injector.batch(*batch)

    Step.micro_batches = lambda step: Shares(step)


def digest(trainer: Trainer) -> str:
    """Of all that a step may move, the guard's memory included."""
    found = hashlib.sha256()
    for tensor in (*everything(trainer).values(), trainer.guard.memory):
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that a step may move, except the counts of skips and the loss scale's own rule."""
    guard, found = trainer.guard, trainer.guard.tensors()
    ruled = {"skipped", "skips_in_a_row", "capture_enabled", "scale", "headroom_peak", "good_in_a_row"}
    found |= {f"guard.{k}": v for k, v in guard.state.items() if k not in ruled}
    return {k: v.detach().clone() for k, v in found.items()}


def judge(trainer: Trainer, kind: str, skips: bool | None, before: dict, events: list[dict]) -> dict:
    """Survived, exact, attribution of the step just taken; the events are rank 0's."""
    after = everything(trainer)
    finite = all(bool(v.isfinite().all()) for v in after.values() if v.is_floating_point())
    finite = all(ranks.gathered(finite))
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    moved = list(itertools.chain(*ranks.gathered(moved)))
    skipped = any(
        event["kind"] == "incident" or (event["kind"] in ("skip", "spike") and "skipped" in event["message"])
        for event in events
    )
    exact = not moved if skipped else bool(moved)  # a step that was not skipped was taken
    if skips is not None:
        exact = exact and skipped == skips
    last, size = ranks.count() - 1, trainer.settings.batch_size
    first = range(ranks.share(size, last).start, size * trainer.settings.accumulate, size)
    # Ranks sum their own micro-batches first, a replay sums them in turn.
    rounded = trainer.stepper.compiled or (ranks.count() > 1 and trainer.settings.accumulate > 1)
    named = attributed(kind, skipped, events, first=first, rounded=rounded)
    if ranks.count() > 1:
        named = named and all(event.get("ranks") == [last] for event in events if event["kind"] == "skip")
    outcome = {"kind": kind, "survived": finite, "exact": exact, "attribution": named, "skipped": skipped}
    return {**outcome, "moved": moved[:3], "events": [event["message"] for event in events]}


def attributed(
    kind: str, skipped: bool, events: list[dict], first: Sequence[int] = (0,), rounded: bool = False
) -> bool:
    """Whether the events name what was planted, and the replay is the same step.

    A finite fault that was taken as an ordinary step needs no name.

    Args:
        kind: of the fault.
        skipped: whether the step was.
        events: of the step.
        first: places of the first sample of each micro-batch, or of the last rank's share, which has the
            fault.
        rounded: whether the replay sums in another order, as of compiled steps: it is the same within
            rounding, of others bit for bit.
    """
    if not skipped:
        return True
    what, value, *place = kind.split(":")
    (fault,) = parse(f"{what}:{value}@1{''.join(':' + p for p in place)}")
    for event in events:
        if event["kind"] == "spike":
            anywhere = what in ("loss", "label", "input", "activation")
            return anywhere or event.get("parameter", "").startswith(fault.where)
        if event["kind"] == "incident":
            finding = Finding(same_step=event["same_step"], apart=event["apart"])
            if not (finding.alike if rounded else finding.same_step):
                return False
            if what == "loss":
                return event["phase"] == "loss"
            inside = event["module"].startswith(fault.where)
            if what in ("input", "activation") and value not in ("nan", "inf"):
                return bool(event["module"])
            if what == "input":
                return event["phase"] == "input" and event["places"] == list(first)
            if what == "activation":
                return inside
            if value == "huge":
                return event["phase"] == "large" and inside
            names = event["parameters"]
            return event["phase"] == "gradient" and len(names) == 1 and names[0].startswith(fault.where)
    # fp16 that overflows is no incident the first few times; the skip itself names the parameters.
    large = what == "activation" and value in ("spike", "overflow", "huge")  # the loss scale was too high
    skips = [event["parameters"] for event in events if event["kind"] == "skip"]
    return any(large or all(name.startswith(fault.where) for name in names) for names in skips)


def at(kind: str) -> str:
    return ":".join(kind.split(":")[:2])


def where(kind: str) -> str:
    place = kind.split(":")[2:]
    return f":{place[0]}" if place else ""


def wrong(cell: dict) -> list[str]:
    return [name for name in ("survived", "exact", "attribution", "alike") if not cell[name]]


def good(cell: dict) -> bool:
    return not wrong(cell)


def table(cells: list[dict], device: str) -> str:
    """A row a fault, a column a precision and path; what failed is spelt out."""
    taken = {(cell["amp"], cell["path"]) for cell in cells}
    paths = [pair for pair in itertools.product(PRECISIONS, PATHS) if pair in taken]
    heads = ["fault", *(f"{'fp32' if amp == 'off' else amp} {path}" for amp, path in paths)]
    count = f"{sum(map(good, cells))} of {len(cells)} cells good (survived, state exact, attribution right)"
    lines = [f"Fault matrix, {device}: {count}.", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for kind in dict.fromkeys(c["kind"] for c in cells):
        row = {(c["amp"], c["path"]): c for c in cells if c["kind"] == kind}
        lines.append(f"| `{kind}` | " + " | ".join(word(row[key]) for key in paths) + " |")
    words = "*skipped*: nothing moved, named in the log; *taken*: finite, an ordinary clipped step."
    return "\n".join([*lines, "", words])


def word(cell: dict) -> str:
    if not good(cell):
        return f"**not {', '.join(wrong(cell))}**"
    return "skipped" if cell["skipped"] else "taken"


if __name__ == "__main__":
    end_with_me()
    sys.exit(main())
