"""How long from the start of a process to its tenth step.

    python bench/start.py [--fresh] [-p recipe original] [-p batch_size 16] [--steps 300]

Trains as a user would, in a new process: with ``--fresh`` with an empty compile cache (cold), else with
the user's (warm). One JSON line a figure, in seconds since the process was started, imports and store
included: the first and the tenth step, messages about speed, and the time a step every 100 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

STARTED = "REFINELIB_BENCH_STARTED"


def say(**line) -> None:
    print(json.dumps({**line, "seconds": round(time.time() - float(os.environ[STARTED]), 2)}), flush=True)


def one(given: dict, most: int) -> None:
    import torch

    from refinelib import resolve
    from refinelib.step import Stepper
    from refinelib.trainer import train

    counted = {"steps": 0, "block": 0.0}
    plain = Stepper.step

    def step(stepper: Stepper, plan, at: int, number: int):
        if not counted["steps"]:
            tell, stepper.say = stepper.say, lambda message: (tell(message), said(message))
        report = plain(stepper, plan, at, number)
        counted["steps"] += 1
        done = counted["steps"]
        if done in (1, 10) or done % 100 == 0 or done == most:
            if report.is_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            more = (
                {"ms_a_step": round(10 * (now - counted["block"]), 2), "compiled": stepper.compiled}
                if done % 100 == 0 and done > 100
                else {}
            )
            counted["block"] = now if done % 100 == 0 else counted["block"]
            say(figure="step", number=done, **more)
        if done >= most:
            raise SystemExit
        return report

    def said(message: str) -> None:
        say(figure="speed", step=counted["steps"], message=message)

    Stepper.step = step
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = resolve(**{"output_dir": folder, **given})
            say(
                figure="settings",
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                torch=torch.__version__,
                compile=settings.compile,
            )
            train(settings)
        except SystemExit:
            pass


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(json.loads(sys.argv[2]), int(sys.argv[3]))
        return
    from children import end_with_me  # what is timed does not import it

    end_with_me()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="with an empty compile cache")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    given = {
        "recipe": "original",
        "data": "synthetic",
        "epochs": 1000,
        "validate_every": 1000,
        "save_every": 1000,
        "probe_every": 0,
        **dict(options.p),
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": folder} if options.fresh else {})
        line = [sys.executable, __file__, "--one", json.dumps(given), str(options.steps)]
        subprocess.run(line, env=environment | {STARTED: str(time.time())}, check=True)


if __name__ == "__main__":
    main()
