"""The process that makes a run's kernels while the run trains without them: see :class:`refinelib.kernels.Precompile`."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from refinelib.build import build_device, build_guard, build_loss, build_model
from refinelib.config import Settings
from refinelib.data import Store
from refinelib.data.locking import held
from refinelib.feed import Feed
from refinelib.kernels import kill_session, note
from refinelib.safety.inject import Injector
from refinelib.stepping import Stepper


def compile_kernels(settings: Settings, *, store: Path, steps_per_epoch: int) -> None:
    """Take two steps of a run with fresh weights, compiled: its kernels are then on disk."""
    device = build_device(settings)
    torch.backends.cudnn.benchmark = not settings.deterministic  # as the run has it
    model = build_model(settings).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False) if settings.ema_decay else None
    feed = Feed(
        Store.open(store), device=device, batch_size=settings.batch_size, accumulate=settings.accumulate, mode=settings.augment, seed=settings.seed,
        resident=False,
    )  # fmt: skip
    stepper = Stepper(
        settings.model_copy(update={"compile": "on", "cuda_graphs": False}), model=model, loss=build_loss(settings).to(device),
        guard=build_guard(settings, model, average, steps_per_epoch=steps_per_epoch), injector=Injector(settings.inject, model),
        feed=feed, device=device, steps=2, say=_refuse,
    )  # fmt: skip
    plan = feed.plan(0)
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
            compile_kernels(settings, store=Path(given["store"]), steps_per_epoch=given["steps_per_epoch"])


if __name__ == "__main__":
    main()
