"""The process that makes a run's kernels while the run trains without them: see :class:`refinelib.step_kernels.Precompile`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from refinelib.build import build_device, build_step
from refinelib.config import Settings
from refinelib.data import Store
from refinelib.locking import held
from refinelib.step_kernels import kill_session, note
from refinelib.step import Stepper


def compile_kernels(settings: Settings, *, store: Path) -> None:
    """Take two steps of a run with fresh weights, compiled: its kernels are then on disk."""
    device = build_device(settings)
    torch.backends.cudnn.benchmark = not settings.deterministic  # as the run has it
    parts = build_step(settings, Store.open(store), device, resident=False)
    stepper = Stepper(settings.model_copy(update={"compile": "on", "cuda_graphs": False}), parts, device=device, steps=2, say=_refuse)
    plan = parts.loader.plan(0)
    for number in (1, 2):
        stepper.step(plan, 0, number)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _end_with(parent: int) -> None:
    """End this process and its helpers when the run that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1.0)
    kill_session(os.getpid())


def _refuse(message: str) -> None:
    raise RuntimeError(message)


def main() -> None:
    given = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(given["parent"],), daemon=True).start()
    settings = Settings(**given["settings"])
    if hasattr(os, "nice"):
        os.nice(10)  # the run goes first
    place = note(settings)
    place.parent.mkdir(parents=True, exist_ok=True)
    with held(place.with_suffix(".lock")):  # runs of one shape side by side: one compiles, the others' processes wait for it
        if not place.exists():
            compile_kernels(settings, store=Path(given["store"]))


if __name__ == "__main__":
    main()
