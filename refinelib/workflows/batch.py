"""Many runs at once: recipes x values x seeds, each run in a process of its own, shared out over the GPUs."""

import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from refinelib.config import Settings, SettingsError, fields, resolve
from refinelib.files import numbered, shipped
from refinelib.launch import Interruption, options, say, start
from refinelib.plots import style
from refinelib.runs import Run, newest
from refinelib.trainer import SCORES

#: The last columns of the table.
ENDS = ("skipped", "seconds", "error")
#: The command line that trains without a notebook.
REFINELIB = (sys.executable, "-m", "refinelib")
#: Seconds that an interrupted kernel has for its checkpoint.
PATIENCE = 300
#: Seconds that the output of a process is awaited after its end: what it started may hold it open.
LAST_WORDS = 10.0


class Job(NamedTuple):
    """A run to make."""

    name: str  # the run's, before a number is added to it
    settings: Settings
    given: dict[str, Any]  # what ``settings`` were resolved from
    varied: tuple[str, ...] = ()  # names of settings with several values in the batch

    @property
    def root(self) -> Path:
        """Folder of the run's folder."""
        return self.settings.path(self.settings.output_dir)

    @property
    def notebook(self) -> Path:
        """File of the executed notebook."""
        return self.root / f"{self.name}.ipynb"


class Outcome(NamedTuple):
    """How a run went."""

    job: Job
    state: str  # the run's own, or failed, or not started
    error: str = ""
    seconds: float = 0.0
    run: Run | None = None


# -- what to train -----------------------------------------------------------------------------------
def plan(
    recipes: Sequence[str], overrides: Mapping[str, Any] | None = None, *, debug: bool = False
) -> list[Job]:
    """Every combination of recipes and values, validated; the last setting changes fastest.

    A recipe or a value that comes twice is trained twice.

    Args:
        recipes: names of files in ``params/``, or paths to some.
        overrides: settings by name; a text with commas is several values, unless the setting is a text.
        debug: a debug run of each (:func:`refinelib.workflows.examples.debug_run`); ``overrides`` come first.

    Raises:
        SettingsError: a recipe or setting is wrong.

    Example:
        >>> [job.name for job in plan(["best"], {"data": "synthetic", "lr": "1e-3,5e-4", "seed": "0,1"})]
        ['best-lr0.001-seed0', 'best-lr0.001-seed1', 'best-lr0.0005-seed0', 'best-lr0.0005-seed1']
    """
    grid = {name: values_of(name, value) for name, value in (overrides or {}).items()}
    varied = tuple(name for name, values in grid.items() if len(values) > 1)
    jobs: dict[str, Job] = {}
    for recipe in recipes:
        for values in itertools.product(*grid.values()):
            given = {**dict(zip(grid, values, strict=True)), "recipe": recipe}
            if debug:
                from refinelib.workflows.examples import debug_run  # with Jupyter's packages, as papermill

                given = debug_run(given)
            settings = resolve(recipe, **given)
            if ":" in settings.device:
                rule = "the batch shares out the GPUs: give cuda, and choose some by CUDA_VISIBLE_DEVICES"
                raise SettingsError(f"device = {settings.device}: {rule}")
            label = "".join(f"-{name}{_text(getattr(settings, name))}" for name in varied)
            name = next(name for name in numbered(settings.run_name + label) if name not in jobs)
            if name != settings.run_name:
                given["run"] = name
                settings = resolve(recipe, **given)
            jobs[name] = Job(name, settings, given, varied)
    return [*jobs.values()]


def values_of(name: str, value: Any) -> list[Any]:
    """The values of a setting in a text with commas; a setting that is a text has one.

    Example:
        >>> values_of("seed", "0, 1"), values_of("roi_size", "[64, 48],96"), values_of("category", "a,b")
        (['0', '1'], ['[64, 48]', '96'], ['a,b'])
    """
    kind = fields()[name].annotation if name in fields() else str
    if not isinstance(value, str) or str in (kind, *get_args(kind)):
        return [value]
    return [part.strip() for part in re.split(r",(?![^\[]*\])", value)]  # not those in brackets


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value).replace("+", "")  # 1e+20
    words = ("off", "on")[value] if isinstance(value, bool) else value
    return "-" + ("x".join(map(str, words)) if isinstance(words, tuple) else str(words).lower())


# -- training ----------------------------------------------------------------------------------------
def train(
    jobs: Sequence[Job],
    *,
    at_once: int | None = None,
    command: Sequence[str] | None = None,
    ended: Callable[[Outcome, dict[str, str]], object] = lambda outcome, environment: None,
) -> list[Outcome]:
    """Train all, each in a process of its own; one that fails does not stop the others.

    A run executes ``notebooks/train.ipynb`` to ``<name>.ipynb`` beside the run folders. What it prints is
    printed, after its name where several run at once. A run whose ``init_from`` names another of the batch
    waits for it. A first Ctrl-C (or SIGTERM) lets every run leave its checkpoint and starts no other; a
    second one kills them.

    Args:
        jobs: in the order they are started in.
        at_once: how many at a time; none: one a GPU, one where there is none.
        command: in place of a notebook, what understands ``train -f RECIPE -p NAME VALUE``, as
            :data:`REFINELIB` does.
        ended: called with each outcome, and the environment that it had, before the next run takes its place.

    Returns:
        An outcome a job, in their order.

    Raises:
        ValueError: ``at_once`` is below 1; before anything is started.
        OSError: a folder of runs cannot be made; likewise.
    """
    each = max((job.settings.gpus for job in jobs), default=1)
    free, lock, running = places(at_once, len(jobs), each), threading.Lock(), set[subprocess.Popen[str]]()
    several, stopped = len(free) > 1, threading.Event()

    def stop(number: int) -> None:
        with lock:
            stopped.set()
            for process in running:
                process.send_signal(number)

    def work(job: Job, number: int, before: Future[Outcome] | None) -> Outcome:
        wait([before] if before else [])
        with lock:  # none is started after a signal was sent to all
            if stopped.is_set():
                return Outcome(job, "not started", "the batch was interrupted before")
            place, began = free.pop(0), time.time()
            say(f"-- {job.name}, {number} of {len(jobs)}{'' if command else f': {job.notebook}'}")
            prefix = f"{job.name}: " if several else ""
            process, printer, last = start(_line(job, command), os.environ | place, prefix)
            running.add(process)
        try:
            code = process.wait()
            printer.join(LAST_WORDS)
            outcome = _outcome(job, code, last[0], began, stopped.is_set())
            say(f"-- {job.name}: {outcome.state} {outcome.error}".rstrip())
            ended(outcome, os.environ | place)
            return outcome
        finally:
            with lock:
                running.discard(process)
                free.append(place)

    for job in jobs:
        job.root.mkdir(parents=True, exist_ok=True)
    futures: dict[str, Future[Outcome]] = {}
    with Interruption() as interruption, ThreadPoolExecutor(len(free)) as pool:
        interruption.deferred = True
        try:
            for number, job in enumerate(jobs, 1):
                before = futures.get(Path(job.settings.init_from or "").name)
                futures[job.name] = pool.submit(work, job, number, before)
            while wait(futures.values(), timeout=0.2).not_done:
                if interruption.requested and not stopped.is_set():
                    stop(min(interruption.requested))
        except KeyboardInterrupt:  # the second
            stop(getattr(signal, "SIGKILL", signal.SIGTERM))
    return [future.result() for future in futures.values()]


def places(at_once: int | None, most: int, each: int = 1) -> list[dict[str, str]]:
    """What to add to the environment of a process, for each of those that run at once.

    Args:
        at_once: how many; none: as many as the GPUs suffice for, one where there is none.
        most: number of runs.
        each: GPUs of a run.

    Raises:
        ValueError: ``at_once`` is below 1.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"jobs = {at_once}: give at least 1")
    count = torch.cuda.device_count()  # of those in CUDA_VISIBLE_DEVICES
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    shares = [",".join(map(str.strip, names[at : at + each])) for at in range(0, count - each + 1, each)]
    number, common = max(1, min(at_once or len(shares), most)), {"PYTHONUNBUFFERED": "1"}
    if number > 1 and "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // number // each))
    gpus = [{"CUDA_VISIBLE_DEVICES": share} for share in shares] or [{}]
    return [common | gpus[place % len(gpus)] for place in range(number)]


def _line(job: Job, command: Sequence[str] | None) -> list[str]:
    """The command line of a run's process."""
    given = {name: value for name, value in job.given.items() if value is not None}
    if job.settings.resume and not newest(job.root, job.name, fits=lambda run: run.has_checkpoint):
        given["resume"] = False  # the batch was interrupted before this run had begun
    if command is None:
        return [sys.executable, "-m", "refinelib.workflows.batch", str(job.notebook), json.dumps(given)]
    return [*command, "train", "-f", given.pop("recipe"), *options(given)]


def execute(target: str, parameters: str) -> str | None:
    """Execute ``notebooks/train.ipynb`` in this process; a signal to stop interrupts its kernel.

    Args:
        target: file of the executed notebook.
        parameters: JSON of its parameters by name.

    Returns:
        Why it did not come to its end, in one line; none if it did.
    """
    try:
        with Interruption():
            import papermill  # not on machines that only train
            from traitlets.config import Config

            source = str(shipped() / "notebooks" / "train.ipynb")
            waits = Config(KernelManager={"shutdown_wait_time": 2 * PATIENCE})  # half, then a signal
            how: dict[str, Any] = {"kernel_name": "python3", "progress_bar": False, "stdout_file": sys.stdout}
            papermill.execute_notebook(source, target, json.loads(parameters), config=waits, **how)
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as raised:  # whatever stopped it is told in one line
        if (name := getattr(raised, "ename", type(raised).__name__)) == "DeadKernelError":
            return "the kernel died, killed or out of memory"
        return f"{name}: {getattr(raised, 'evalue', raised)}".split("\n")[0]
    return None


def _outcome(job: Job, code: int, last: str, started: float, stopped: bool) -> Outcome:
    """What became of a run whose process ended with ``code`` after it printed the line ``last``."""

    def is_new(run: Run) -> bool:
        fresh = (run.folder / "status.json").stat().st_mtime >= started - 1  # times are rounded
        return fresh and (job.settings.resume or run.started_as() == job.name)

    run = newest(job.root, job.name, fits=is_new)
    status = run.status() if run else {"state": "running"}
    state, error = status["state"], status.get("last_error") or ""
    if state in ("running", "killed") or (state == "ok" and code):  # or its notebook failed afterwards
        by = code < 0 and f"killed by {signal.Signals(-code).name}: by hand, or out of memory"
        died = "killed" if state == "killed" or (state == "running" and by) else "failed"
        state, error = "interrupted" if stopped else died, by or last or f"it ended with {code}"
        if run and status["state"] != "ok":
            told = "; ".join(filter(None, [error, status.get("last_error")]))
            run.update(**status | {"state": state, "last_error": told})
    return Outcome(job, state, error.split("\n")[0], time.time() - started, run)


# -- tables ------------------------------------------------------------------------------------------
def records(outcomes: Sequence[Outcome], folder: Path) -> list[dict[str, Any]]:
    """Outcomes as rows of a table, with run folders relative to ``folder`` and scores of the best epochs."""
    rows = []
    for job, state, error, seconds, run in outcomes:
        status: dict[str, Any] = run.status() if run else {}
        place = os.path.relpath(run.folder, folder) if run else None
        row: dict[str, Any] = {"run": job.name, "folder": place}
        row |= {**job.settings.pick("recipe", "seed", *job.varied), "state": state}
        row |= {name: status.get(name) for name in ("epoch", "epochs")}
        row |= {name: (status.get("best") or {}).get(name) for name in SCORES}
        row |= {"skipped": status.get("skipped_steps"), "seconds": round(seconds), "error": error}
        rows.append(row)
    return rows


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, a line a run, with the settings that vary."""
    varied, rows = outcomes[0].job.varied, []
    for row in records(outcomes, Path()):
        row["epochs"] = f"{row['epoch']} of {row['epochs']}" if row["epochs"] else None
        row |= {name: f"{row[name]:.3f}" for name in SCORES if row[name] is not None}
        rows.append([row[name] for name in ("run", *varied, "state", "epochs", *SCORES, *ENDS)])
    return style.table(rows, ["run", *varied, "state", "epochs", *SCORES.values(), *ENDS])


def save(outcomes: Sequence[Outcome]) -> Path:
    """Write the rows as a new file ``batch.csv``, ``batch-2.csv``, ... beside the run folders."""
    root = outcomes[0].job.root
    rows, files = records(outcomes, root), (root / f"{name}.csv" for name in numbered("batch"))
    file = next(file for file in files if not file.exists())
    with open(file, "x", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def compare_command(file: Path) -> str:
    """The command line that compares the runs of a table."""
    source = os.path.relpath(shipped() / "notebooks" / "compare.ipynb")
    return shlex.join(["papermill", source, str(file.with_name("compare.ipynb")), "-p", "runs", str(file)])


if __name__ == "__main__":
    sys.exit(execute(*sys.argv[1:]))
