"""One finite damage a run, at a random step and place: how many runs end as if nothing had happened?

    python bench/recovery.py [--runs 200] [--seeds 10] [--workers 8] [--device cuda] [--out FILE.jsonl]
    python bench/recovery.py --healthy 200     # false alarms: healthy runs of every recipe, none may rewind

Small runs of every module on synthetic persons. A damage is drawn from a seed: a weight block scaled, a bias
shifted, an optimizer's moments cleared, or a learning rate 100 times as high for ten steps. Each damaged run
is compared with the undamaged one of the same seed: the mean training loss of the last tenth of its epochs.
Reported: runs that end within 2 % of the undamaged loss, steps from the damage to the first rewind, and steps
lost (from the restored state to the rewind).

Exit code 1 where less than 95 % recover, or a healthy run rewinds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from children import end_with_me

from refinelib.config import recipe_names, resolve
from refinelib.guard.rewind import DivergedError
from refinelib.runs import Run
from refinelib.trainer import Trainer, train

#: A run long enough for a damage in its middle to be forgotten.
TINY = {
    **{"max_images": 60, "width": 0.0625, "roi_size": 16, "mask_size": 16, "batch_size": 8, "lr": 1e-3},
    **{"log_every": 1000, "probe_every": 0, "save_every": 10, "compile": "off", "max_incidents": 0},
}
KINDS = ("weight scaled", "bias shifted", "moments cleared", "learning rate x 100")
#: Not a damage: one weight changed in its last digits, for the scatter between runs that nothing happened to.
CONTROL = "control"
RECOVERED = 1.02
#: Of a run that is not counted.
SPARE_SEED = 9999


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="damaged runs")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first damage, to share the work between calls"
    )
    parser.add_argument(
        "--controls",
        type=int,
        default=20,
        help="runs changed in the last digits of one weight, beside the damaged ones",
    )
    parser.add_argument(
        "--healthy", type=int, default=0, help="in place of them: healthy runs, the recipes in turn"
    )
    parser.add_argument("--seeds", type=int, default=10, help="undamaged runs that these are compared with")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=TINY["lr"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--out", type=Path, help="a JSON line a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = {**TINY, "lr": options.lr, "epochs": options.epochs, "device": options.device}
        common |= {"output_dir": f"{folder}/runs", "store_dir": f"{folder}/stores"}
        run_once(None, SPARE_SEED, "demo", {**common, "epochs": 1})  # builds the stores once
        if options.healthy:
            recipes = [name for name in recipe_names() if name != "debug"]
            own = {name: {**common, "epochs": as_many_steps(name, options.epochs)} for name in recipes}
            each = [divmod(number, len(recipes)) for number in range(options.healthy)]
            rows = measure([(None, seed, recipes[at], own[recipes[at]]) for seed, at in each], options)
            alarms = [row for row in rows if row["rewinds"]]
            steps = sum(row["steps"] for row in rows)
            found = {"healthy_runs": len(rows), "false_alarms": len(alarms), "steps": steps}
            print(json.dumps(found), flush=True)
            return bool(alarms)
        numbers = [*range(-options.controls, 0), *range(options.first, options.first + options.runs)]
        jobs = [(None, seed, "demo", common) for seed in range(options.seeds)]
        rows = measure(
            [*jobs, *((number, number % options.seeds, "demo", common) for number in numbers)], options
        )
    usual = {row["seed"]: row["loss"] for row in rows if "kind" not in row}
    rows = [row for row in rows if "kind" in row]
    for row in rows:
        row["ratio"] = row["loss"] / usual[row["seed"]]
        row["recovered"] = row["state"] == "ok" and row["ratio"] <= RECOVERED
    controls, rows = (
        [row for row in rows if (row["kind"] == CONTROL) == is_control] for is_control in (True, False)
    )
    print(table(rows))
    if controls:
        ratios = sorted(round(row["ratio"], 4) for row in controls)
        within = sum(row["recovered"] for row in controls)
        print(json.dumps({"controls": len(controls), "within_2_percent": within, "ratios": ratios}))
    recovered = sum(row["recovered"] for row in rows) / len(rows)
    print(json.dumps(dict(runs=len(rows), recovered=round(recovered, 4), **delays(rows))), flush=True)
    return int(recovered < 0.95)


def as_many_steps(recipe: str, epochs: int) -> int:
    """Epochs in which a recipe takes as many steps as the trial's own batches take in so many."""
    batch = TINY["batch_size"] if recipe == "demo" else resolve(recipe).batch_size
    return max(1, round(epochs * batch / TINY["batch_size"]))


def measure(jobs: list[tuple], options: argparse.Namespace) -> list[dict]:
    """A row a job, in the order in which they end; written as they do."""
    rows = []
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for done in as_completed([pool.submit(run_once, *job) for job in jobs]):
            rows.append(done.result())
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def run_once(number: int | None, seed: int, recipe: str, common: dict[str, Any]) -> dict[str, Any]:
    """Train once, with damage ``number`` or none."""
    own = {
        name: value for name, value in common.items() if recipe == "demo" or name not in ("lr", "batch_size")
    }
    if recipe == "finetune":  # the one recipe that starts from another run's weights
        own["init_from"] = f"demo-{SPARE_SEED}-None"
    settings = resolve(
        recipe,
        **own,
        data="synthetic",
        context=0.0,
        add_pennfudan=None,
        seed=seed,
        run=f"{recipe}-{seed}-{number}",
        validate_every=own["epochs"],
    )
    damage = Damage(number) if number is not None else None
    take = Trainer.train_step
    if damage is not None:
        Trainer.train_step = lambda trainer, plan, at: damage.step(trainer, lambda: take(trainer, plan, at))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                run = train(settings)
            except DivergedError as error:
                run = error.run
    finally:
        Trainer.train_step = take
    return row_of(run, seed, recipe, damage)


class Damage:
    """One finite damage, drawn from its number."""

    def __init__(self, number: int) -> None:
        self.draw = random.Random(number)
        self.kind = CONTROL if number < 0 else KINDS[number % len(KINDS)]
        self.at, self.size = self.draw.random(), 0.0
        self.since: int | None = (
            None  # steps since the damage; steps that are taken again are not damaged again
        )
        self.place = ""
        self.begin, self.last = 0, 0

    def step(self, trainer: Trainer, take):
        total = trainer.settings.epochs * trainer.loader.steps_per_epoch
        self.begin = self.begin or 2 + int(self.at * (total - 2))
        rate = trainer.guard.schedule
        if self.since and trainer.step < self.last:  # it went back: the damage is over
            self.since = max(self.since, 10)
        self.last = trainer.step
        if self.since is None and trainer.step + 1 == self.begin:
            self.since = 0
            self.hurt(trainer)
        if self.kind == "learning rate x 100" and self.since in (0, 10):
            rate.lr, rate.min_lr = (
                (1 if self.since else 100) * x for x in (trainer.settings.lr, trainer.settings.min_lr)
            )
            if trainer.stepper.graph is not None:  # the rate is a constant of the captured step
                trainer.stepper.graph, trainer.stepper.taken = None, 0
        self.since = None if self.since is None else self.since + 1
        return take()

    @torch.no_grad()
    def hurt(self, trainer: Trainer) -> None:
        model, guard = trainer.model, trainer.guard
        names = guard.names
        if self.kind == "weight scaled":
            names = [name for name in names if model.get_parameter(name).ndim >= 2]
        elif self.kind == "bias shifted":
            names = [name for name in names if name.endswith("bias")]
        self.place = self.draw.choice(names)
        parameter = model.get_parameter(self.place)
        if self.kind == "weight scaled":
            self.size = self.draw.choice([0.0, -1.0, 10 ** self.draw.uniform(-2, 4)])
            parameter.mul_(self.size)
        elif self.kind == "bias shifted":
            self.size = 10 ** self.draw.uniform(-1, 4) * self.draw.choice([-1, 1])
            parameter.add_(self.size)
        elif self.kind == CONTROL:
            parameter.mul_(1 + 1e-6)
        elif self.kind == "moments cleared":
            self.place = "all"
            for state in guard.optimizer.state.values():
                for moment in state.values():
                    moment.zero_()
        else:
            self.place, self.size = "all", 100.0


def row_of(run: Run, seed: int, recipe: str, damage: Damage | None) -> dict[str, Any]:
    status, epochs = run.status(), run.epochs()
    losses = [line["train_loss"] for line in epochs[-max(1, len(epochs) // 10) :]]
    found = {"seed": seed, "recipe": recipe, "state": status["state"], "rewinds": status["rewinds"]}
    found |= {"steps": status["step"], "loss": statistics.fmean(losses) if losses else float("inf")}
    if damage is not None:
        rewinds = [
            event for event in run.events() if event["kind"] == "rewind" and event["step"] >= damage.begin
        ]
        to = [int(event["message"].split("state after step ")[1].split(",")[0]) for event in rewinds]
        found |= {"kind": damage.kind, "place": damage.place, "size": damage.size, "at": damage.begin}
        found["delay"] = rewinds[0]["step"] - damage.begin + 1 if rewinds else None
        found["lost"] = rewinds[0]["step"] - to[0] if rewinds else None
        found["to_damaged"] = bool(to) and to[0] >= damage.begin
    return found


def delays(rows: list[dict]) -> dict[str, Any]:
    seen = [row for row in rows if row["delay"] is not None]
    middle = {
        name: statistics.median(row[name] for row in seen) if seen else None for name in ("delay", "lost")
    }
    return dict(
        rewound=len(seen), first_rewind_to_a_damaged_state=sum(row["to_damaged"] for row in seen), **middle
    )


def table(rows: list[dict]) -> str:
    lines = [
        "| damage | runs | within 2 % | rewound | delay, steps (median, most) | steps lost (median, most) |",
        "| --- " * 6 + "|",
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        seen = [row for row in mine if row["delay"] is not None]
        found = [kind, len(mine), sum(row["recovered"] for row in mine), len(seen)]
        for name in ("delay", "lost"):
            values = [row[name] for row in seen]
            found.append(f"{statistics.median(values):g}, {max(values)}" if seen else "")
        lines.append(f"| {' | '.join(map(str, found))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    end_with_me()
    sys.exit(main())
