"""A hundred random ``kill -9`` during training: the run, resumed each time, ends like an undisturbed one.

    python bench/kill.py [--kills 100] [--seed 0]

Trains in child processes that are killed at random moments, also in the middle of writing a checkpoint, and
resumes. Then compares every tensor of the final checkpoint, and every epoch's record, with an undisturbed
run's. Prints one JSON line; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from children import end_with_me

from refinelib import checkpoints
from refinelib.config import Settings, resolve
from refinelib.runs import Run
from refinelib.trainer import train


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = attack(Path(folder), options.kills, random.Random(options.seed))
    print(json.dumps(outcome), flush=True)
    return 0 if outcome["equal"] and outcome["kills"] == options.kills else 1


def attack(folder: Path, kills: int, chance: random.Random, epochs: int = 0) -> dict:
    """Kill and resume until the run is through, then compare it with one that was left alone."""
    torch.set_num_threads(1)
    small = {"max_images": 4, "width": 0.0625, "roi_size": 32, "mask_size": 32, "batch_size": 2}
    ways = {"ema_decay": 0.9, "device": "cpu", "log_every": 2, "augment": "full"}
    places = {"output_dir": str(folder), "store_dir": str(folder / "stores"), "run": "whole"}
    settings = resolve("demo", epochs=epochs or kills + 4, **small, **ways, **places)
    seconds = time.perf_counter()
    whole = train(settings)
    epoch_seconds = (time.perf_counter() - seconds) / settings.epochs
    done, found_damaged, hurt = 0, 0, settings.model_copy(update={"run": "hurt"})
    while True:
        child = multiprocessing.get_context("fork").Process(target=_train, args=(hurt,))
        child.start()
        # Long enough for an epoch now and then: each epoch's end is kept, so the run gets on.
        child.join(chance.uniform(0.0, 2.0 * epoch_seconds) if done < kills else None)
        if child.is_alive():
            child.kill()
            child.join()
            done += 1
        elif child.exitcode == 0:
            break
        elif child.exitcode != 3:  # 3: refused to resume, as there was no checkpoint yet
            return {"equal": False, "kills": done, "why": f"a resumed run failed with {child.exitcode}"}
        kept = list(folder.glob("hurt*/checkpoints/*.pt"))
        if kept:
            hurt = hurt.model_copy(update={"resume": True})
        found_damaged += sum(not _whole(file) for file in kept)
    resumed = Run.open(folder / _last(folder))
    a, b = (checkpoints.load(run.folder / "checkpoints" / "last.pt") for run in (whole, resumed))
    parts = ("model", "average", "guard", "position", "best")
    same = all(checkpoints.checksum(a[part]) == checkpoints.checksum(b[part]) for part in parts)
    epochs_same = [_plain(e) for e in whole.epochs()] == [_plain(e) for e in resumed.epochs()]
    outcome = {"equal": same and epochs_same, "kills": done, "epochs": settings.epochs}
    seconds = round(time.perf_counter() - seconds, 1)
    return {**outcome, "damaged_checkpoints": found_damaged, "seconds": seconds}


def _train(settings: Settings) -> None:
    torch.set_num_threads(1)
    try:
        with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(settings)
    except checkpoints.CheckpointError:
        sys.exit(3)


def _last(folder: Path) -> str:
    """The run with checkpoints: a start that was killed before its first one leaves a folder of its own."""
    return next(file.parents[1].name for file in folder.glob("hurt*/checkpoints/last.pt"))


def _plain(epoch: dict) -> dict:
    return {name: value for name, value in epoch.items() if name != "seconds"}


def _whole(file: Path) -> bool:
    try:
        checkpoints.load(file)
    except checkpoints.CheckpointError:
        return False
    return True


if __name__ == "__main__":
    end_with_me()
    sys.exit(main())
