"""One process of a run on several: settings as JSON, and what to do to one rank."""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import unittest.mock
import warnings

import torch

from refinelib import resolve
from refinelib.trainer import Trainer, train


def main(settings, how):
    """Trains; ``how`` says which rank gets faults or a signal at which step, and where states are written."""
    rank = int(os.environ.get("RANK", 0))
    mine, states = rank == how.get("rank", 1), []
    if how.get("inject") and mine:
        settings["inject"] = how["inject"]
    take = Trainer.train_step

    def watched(trainer, plan, at):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if mine and first and trainer.step + 1 == how.get("at"):
            if "raises" in how:
                raise OSError(how["raises"])
            os.kill(os.getpid(), getattr(signal, how["signal"]))
        full = {"graph": None, "forward": once_full(trainer.stepper)}
        full = full if mine and trainer.step + 1 == how.get("full") else {}
        with unittest.mock.patch.multiple(trainer.stepper, **full) if full else contextlib.nullcontext():
            report = take(trainer, plan, at)
        if how.get("states"):
            own = [*trainer.guard.tensors().values(), trainer.guard.memory]
            states.append([x.double().sum().item() for x in own])
        return report

    Trainer.train_step = watched
    try:
        train(resolve("demo", **settings))
    except KeyboardInterrupt:
        return 130
    if how.get("states"):
        with open(f"{how['states']}-{rank}.json", "w") as file:
            json.dump(states, file)
    return 0


def once_full(stepper):
    """The forward pass, whose first call does not fit into memory."""
    whole, calls = stepper.forward, []

    def forward(*inputs):
        calls.append(inputs)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(*inputs)

    return forward


if __name__ == "__main__":
    faulthandler.dump_traceback_later(450, exit=True)  # a hang says where
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.exit(main(json.loads(sys.argv[1]), json.loads(sys.argv[2])))
