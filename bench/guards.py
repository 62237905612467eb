"""The same poisoned training runs under several loops, side by side; and what the guard costs a step.

    python bench/guards.py [--steps 200] [--at 100] [--frameworks plain,scaler,guard]
                           [--faults loss,gradient,buffer,overflow,spike] [--device cuda] [--half]
    python bench/guards.py --overhead [--device cuda] [--blocks 30] [--modes eager,compiled]

The first prints one JSON line a cell, then a Markdown table. Each cell takes three runs: with the fault,
without it (``clean_loss``), and without the batches that had it (``exact``: the states are equal bit for
bit). ``lost`` counts the steps that the final state does not contain.

The second measures blocks of steps of the same model, in turns: bare, clipped, guarded. It prints ratios of
medians, one JSON line a model, then a table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from refinelib.guard import Guard, Rewinder
from studies import guards

FIVE = [name for name in guards.FAULTS if name != "image"]
WARM = 3  # blocks before any is counted


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--at", type=int, help="first step with the fault, from 1; none: half of the steps")
    parser.add_argument("--frameworks", default=",".join(guards.LOOPS))
    parser.add_argument("--faults", default=",".join(FIVE), help=f"of {', '.join(guards.FAULTS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--half", action="store_true", help="float16 autocast: overflows are true ones")
    parser.add_argument("--overhead", action="store_true", help="measure the guard's share of a step")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--models", default=",".join(guards.MODELS))
    parser.add_argument("--blocks", type=int, default=30, help="of each kind")
    parser.add_argument("--block", type=int, default=10, help="steps in a block")
    options = parser.parse_args()
    print(json.dumps(versions(options.device)), flush=True)
    print(overhead(options) if options.overhead else faults(options), flush=True)
    return 0


def versions(device: str) -> dict[str, str]:
    """What it runs on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lightning", "transformers", "accelerate"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return {**found, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


# -- faults ----------------------------------------------------------------------------------------
def faults(options: argparse.Namespace) -> str:
    """Print each cell as JSON; the table."""
    at = options.at or options.steps // 2
    kinds, given = options.faults.split(","), {"steps": options.steps, "at": at, "device": options.device}
    given["half"] = options.half
    cells, missing = [], []
    for name in options.frameworks.split(","):
        if not guards.installed(name):
            missing.append(name)
            continue
        clean, without = guards.run(name, **given), {}
        for kind in kinds:
            bad = guards.poisoned(kind, at)
            if len(bad) not in without:
                without[len(bad)] = guards.run(name, without=bad, **given)
            course = guards.run(name, kind, **given)
            cells.append(guards.cell(course, clean, without[len(bad)]))
            print(json.dumps(cells[-1]), flush=True)
    left_out = f"\nNot installed, left out: {', '.join(missing)}." if missing else ""
    return table(cells, kinds) + left_out


def table(cells: list[dict], kinds: list[str]) -> str:
    """The cells as Markdown, fault by fault."""
    lines = [
        "| fault | loop | final loss, of the clean run's | exact | told what and where | seen | steps lost |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in kinds:
        for cell in (cell for cell in cells if cell["fault"] == kind):
            final, clean = cell["final_loss"], cell["clean_loss"]
            loss = "not finite" if final is None else f"{final:.3f} of {clean:.3f}"
            told, title = "yes" if cell["told"] else "no", guards.TITLES[cell["framework"]]
            row = (guards.FAULTS[kind], title, loss, cell["exact"], told, cell["seen"], cell["lost"])
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


# -- overhead --------------------------------------------------------------------------------------
def steppers(name: str, mode: str, device: str) -> dict[str, Callable[[], object]]:
    """A step of the same model by kind: bare, clipped, guarded, and guarded with snapshots and reports."""
    found: dict[str, Callable[[], object]] = {}
    for kind in ("bare", "clipped", "guarded", "rewinder"):
        model, criterion, (x, y) = guards.measured_model(name, large=device == "cuda")
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        guard = Guard(model, optimizer, grad_clip=1.0) if kind in ("guarded", "rewinder") else None
        rewinder = Rewinder(guard) if guard and kind == "rewinder" else None
        if mode == "compiled":
            if guard:
                guard.compile()
            model.compile()
        found[kind] = _stepper(model, criterion, x, y, optimizer, guard, rewinder, kind == "clipped")
    return found


def _stepper(model, criterion, x, y, optimizer, guard, rewinder, clip) -> Callable[[], object]:
    def bare() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def guarded() -> None:
        guard.zero_grad()
        guard.backward(criterion(model(x), y))
        report = guard.step()
        if rewinder:
            rewinder.update(report)

    return guarded if guard else bare


def overhead(options: argparse.Namespace) -> str:
    """Print each model's ratios as JSON; the table."""
    lines = ["| model | mode | bare step | clipped | guarded | with Rewinder | guard's share of its step |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models.split(","):
        for mode in options.modes.split(","):
            torch.compiler.reset()
            steps = steppers(name, mode, options.device)
            times: dict[str, list[float]] = {kind: [] for kind in steps}
            for block in range(WARM + options.blocks):
                for kind, step in steps.items():
                    spent = _time(step, options.block, options.device)
                    if block >= WARM:
                        times[kind].append(spent)
            middle = {kind: statistics.median(found) for kind, found in times.items()}
            ratios = {kind: round(middle[kind] / middle["bare"], 4) for kind in list(steps)[1:]}
            share = round(1 - middle["bare"] / middle["guarded"], 4)
            row = {"model": name, "mode": mode, "bare_ms": round(1e3 * middle["bare"], 4), **ratios}
            print(json.dumps({**row, "share": share}), flush=True)
            parts = [f"{ratios[kind]:.3f}" for kind in ratios]
            lines.append(f"| {name} | {mode} | {row['bare_ms']:.2f} ms | {' | '.join(parts)} | {share:.1%} |")
    return "\n".join(lines)


def _time(step: Callable[[], object], count: int, device: str) -> float:
    """Seconds a step."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    sys.exit(main())
