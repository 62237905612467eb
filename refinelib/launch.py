"""Start one run on several processes of this host with ``torchrun``, and follow it from its folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import torch

from refinelib import checkpoints
from refinelib.config import Settings, SettingsError, fields, resolve
from refinelib.files import retold, shown
from refinelib.guard import faults
from refinelib.guard.rewind import DivergedError
from refinelib.registry import DATASETS
from refinelib.runs import Run

#: Tells the processes which folder their run has.
FOLDER = "REFINELIB_RUN_FOLDER"
#: How often ``torchrun`` starts the processes again after one of them has died.
RESTARTS = 3
#: Seconds between two looks at the run's records.
LOOK = 0.5


class Follower(Run):
    """A run as the ranks see it that do not write it (:mod:`refinelib.ranks`): records go nowhere."""

    def _write_nothing(self, *_: Any, **fields: Any) -> None:
        """Rank 0 writes it."""

    record_settings = update = metrics = event = rewind_records = _write_nothing

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Rank 0 holds the run."""
        yield


class Interruption:
    """Turns Ctrl-C, SIGTERM and SIGHUP (a closed terminal) into an orderly end.

    Before the training loop they raise ``KeyboardInterrupt`` at once. In the loop (``deferred``) they are a
    request that it honours between two steps: within a step half of the parameters may be updated, and a
    checkpoint would be of a state that never was. The same signal a second time stops at once. A signal that
    was ignored (``nohup``) stays ignored.
    """

    def __enter__(self) -> "Interruption":
        self.deferred = False
        self.requested: set[int] = set()  # the signals that came in the loop
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if number in self.requested or not self.deferred:
            raise KeyboardInterrupt
        self.requested.add(number)


def launch(settings: Settings, on_epoch: Callable[[Run], None] | None = None) -> Run:
    """Train a run on ``settings.gpus`` processes; see :func:`refinelib.trainer.train`.

    Args:
        settings: from :func:`refinelib.resolve`.
        on_epoch: called in this process with the run after each epoch, and once more at its end.

    Raises:
        SettingsError: this host has fewer GPUs, or the batch fewer ROIs.
        DivergedError: skipping steps and rewinding did not help.
        KeyboardInterrupt: it was interrupted, after a checkpoint.
        RuntimeError: whatever else stopped the run.
    """
    refuse_processes(settings, settings.gpus)
    there = torch.cuda.device_count()
    if settings.device in ("auto", "cuda") and 0 < there < settings.gpus:
        raise SettingsError(f"gpus = {settings.gpus}: this host has {there}: give at most so many")
    run = Run.start(settings)
    if not settings.resume:
        run.update(state="running", last_error=None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(settings.gpus), "--max-restarts", str(RESTARTS)]
    command += ["-m", "refinelib", "train", "-f", settings.recipe, *overrides(settings)]
    threads = str(max(1, (os.cpu_count() or 1) // settings.gpus))
    environment = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **os.environ, FOLDER: str(run.folder)}
    told = len(run.epochs())
    with Interruption():
        process, reader, _ = start(command, environment)
        try:
            while process.poll() is None or reader.is_alive():
                reader.join(LOOK)
                epochs = len(run.epochs())
                if epochs != told and on_epoch is not None:
                    on_epoch(run)
                told = epochs
        except BaseException as error:
            process.send_signal(signal.SIGINT)  # each process ends after the step it is in, with a checkpoint
            process.wait()
            show_end(run, on_epoch)
            error.run = run  # type: ignore[attr-defined]  # a notebook shows what there is
            raise
    try:
        return _ended(run, process.returncode)
    finally:
        show_end(run, on_epoch)


def show_end(run: Run, on_epoch: Callable[[Run], None] | None) -> None:
    """Show the last state of a run that has ended; an error of ``on_epoch`` does not change how it did."""
    if on_epoch is not None and not isinstance(run, Follower) and run.epochs():
        with contextlib.suppress(Exception):
            on_epoch(run)


def start(
    command: Sequence[str], environment: Mapping[str, str], prefix: str = ""
) -> tuple[subprocess.Popen[str], threading.Thread, list[str]]:
    """Start a process that a terminal's Ctrl-C does not reach, and print what it prints.

    Returns:
        The process; the thread that prints; a list that holds the last line so far.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    last = [""]
    printer = threading.Thread(target=_echo, args=(process.stdout, prefix, last), daemon=True)
    printer.start()
    return process, printer, last


def _echo(pipe: IO[str], prefix: str, last: list[str]) -> None:
    with pipe:
        for line in pipe:
            say(prefix + line.rstrip("\n"))
            last[0] = line.strip() or last[0]


def say(line: str) -> None:
    """Print a line in one piece: others print as well."""
    with contextlib.suppress(OSError):  # nobody reads any more: the runs go on
        print(f"{line}\n", end="", flush=True)


def _ended(run: Run, status: int) -> Run:
    """The run, if it went well.

    Raises:
        DivergedError, KeyboardInterrupt, RuntimeError: as its status says.
    """
    state, why = (run.status().get(name) for name in ("state", "last_error"))
    if status == 0 and state == "ok":
        return run
    why = why or f"its processes ended with status {status}: their messages stand above"
    if state == "running":  # killed
        run.update(state="failed", last_error=why)
    kinds = {"diverged": DivergedError, "interrupted": KeyboardInterrupt}
    error = kinds.get(str(state), RuntimeError)(why)
    error.run = run  # type: ignore[attr-defined]
    raise error


def refuse_wrong_values(settings: Settings) -> None:
    """Refuse what can be known to be wrong before any work.

    Raises:
        SettingsError: the faults to plant cannot be read.
        CheckpointError: ``init_from`` names no checkpoint.
    """
    with retold(SettingsError, f"inject = {shown(settings.inject)}: "):
        faults.parse(settings.inject or "")
    if settings.init_from:
        checkpoints.find(settings.init_from, output_dir=settings.output_dir)


def refuse_processes(settings: Settings, processes: int) -> None:
    """Refuse settings that so many processes cannot train.

    Raises:
        SettingsError: the batch has fewer ROIs than there are processes; or the device is a single GPU.
    """
    if processes > 1 and settings.device not in ("auto", "cpu", "cuda"):
        rule = f"{processes} processes take a GPU each: give cuda or auto, or cpu"
        raise SettingsError(f"device = {settings.device} is one GPU, and {rule}")
    if settings.batch_size < processes:
        rule = f"batch_size is of all {processes} processes together: give at least as many"
        raise SettingsError(f"batch_size = {settings.batch_size}: {rule}")


def overrides(settings: Settings) -> list[str]:
    """The options that turn the recipe into these settings.

    Example:
        >>> overrides(resolve("demo", lr=1e-4, roi_size=32))
        ['-p', 'roi_size', '[32, 32]', '-p', 'lr', '0.0001']
    """
    places = settings.pick("data", "store_dir", *(option.name for option in DATASETS.options(settings.data)))
    # A recipe may name a data set and leave its place to the command line: by itself it is not whole.
    needed = {name: value for name, value in places.items() if value != fields()[name].default}
    usual = resolve(settings.recipe, **needed)
    return options({n: value for n, value in settings if n in needed or value != getattr(usual, n)})


def options(given: Mapping[str, Any]) -> list[str]:
    """Settings by name as options ``-p NAME VALUE`` of a command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return [word for name, text in texts.items() for word in ("-p", name, text)]
