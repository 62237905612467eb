"""One process of a run on several: settings as JSON, and what to do to one rank."""

import json
import os
import signal
import sys
import warnings

import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")

from refinelib import resolve  # noqa: E402
from refinelib.trainer import Trainer, train  # noqa: E402

settings, how = json.loads(sys.argv[1]), json.loads(sys.argv[2])
mine = int(os.environ.get("RANK", 0)) == how.get("rank", 1)
if how.get("inject") and mine:
    settings["inject"] = how["inject"]
take = Trainer.train_step


def watched(trainer, plan, at):
    if (
        mine
        and trainer.step + 1 == how.get("at")
        and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    ):
        os.kill(os.getpid(), getattr(signal, how["signal"]))
    report = take(trainer, plan, at)
    if how.get("states"):
        own = [*trainer.guard.tensors().values(), trainer.guard.memory]
        states.append([x.double().sum().item() for x in own])
    return report


states: list = []
Trainer.train_step = watched
try:
    run = train(resolve("demo", **settings))
except KeyboardInterrupt:
    sys.exit(130)
if how.get("states"):
    with open(f"{how['states']}-{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump(states, file)
