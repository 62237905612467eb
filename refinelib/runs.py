"""The run folder: what a run leaves behind, written so that a crash at any moment leaves it readable."""

import contextlib
import difflib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import refinelib
from refinelib import config, files
from refinelib.config import Settings, absolute, names_with_role
from refinelib.files import PathLike, dumps, exclusive, numbered, read_json, retold, shipped, write_atomically

#: Folder of debug runs in the folder of all runs.
DEBUG_DIR = "debug-runs"
#: What a start leaves that failed before its first step.
_FAILED_START = {"config.json", "status.json", "events.jsonl", ".lock", "figures"}


class RunError(RuntimeError):
    """A run folder is missing or not what it should be; the message says which and what to do."""


# -- a run -------------------------------------------------------------------------------------------
class Run:
    """One folder under ``outputs/``. Make one with :meth:`start`, look at one with :meth:`open`.

    A record that cannot be written (a full disk) never stops a run: lines and the status wait in memory and
    are written as soon as there is room. Standard error says so once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self._status: dict[str, Any] = {}
        self._waiting: dict[str, list[str]] = {}  # lines by file, and the status, that are not on disk yet
        self._warned = False
        self._tensorboard: Any = None
        self._purge_step: int | None = None

    @classmethod
    def start(cls, settings: Settings) -> "Run":
        """A new folder for this run; with ``resume`` the newest one of its name and settings.

        No folder of a run that took a step is ever written over: the next free number is appended to the
        name. A start that failed before its first step gives its name back (:func:`is_free`).
        """
        root, name = settings.path(settings.output_dir), settings.run_name
        root.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            # A start that failed early has no checkpoint: it must not hide the run before it.
            found = sorted(find_runs(root, name), key=lambda run: (run.has_checkpoint, run.fits(settings)))
            if found:
                return found[-1]
            raise RunError(f"there is no run named {name!r} under {root} to resume: start it without resume")
        for folder in map(root.joinpath, numbered(name)):
            if is_free(folder):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    failed = folder.rename(root / f".{folder.name}.failed-{os.getpid()}")
                    shutil.rmtree(failed, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        for part in ("checkpoints", "figures", "samples", "incidents", "tb"):
            (folder / part).mkdir()
        return cls(folder)

    @classmethod
    def open(cls, run: PathLike, *, output_dir: str = "outputs") -> "Run":
        """A run on disk, finished or still going, by its folder or its name under ``outputs/``.

        Raises:
            RunError: there is none; the message names a smoke run, a debug run or a phase of that name.
        """
        root, *others = places(output_dir)
        for folder in (Path(run), root / run, *(other / run for other in others), absolute(run)):
            if (folder / "status.json").is_file():
                return cls(folder)
        below = _folders(root)
        near = difflib.get_close_matches(Path(run).name, {Path(name).name for name in below}, 2)
        near = [name for name in below if Path(name).name in near]
        hint = f"; did you mean {' or '.join(near)}" if near else ""
        known = ", ".join(name for name in below if "/" not in name) or "none: train first"
        rule = f"give its name or a folder with status.json; there are {known}"
        raise RunError(f"there is no run {str(run)!r} in {root}{hint}: {rule}")

    # -- writing
    def record_settings(self, settings: Settings, device: str, **further: Any) -> None:
        """Write ``config.json``: settings as resolved, versions, device, commit; and what is ``further``."""
        import numpy
        import torch

        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "numpy": numpy.__version__}
        versions["refinelib"] = refinelib.__version__
        content = {
            "settings": settings.model_dump(mode="json"),
            "recipe": settings.recipe,
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "device": device,
            "command": sys.argv,
            "started": _now(),
            **further,
        }
        resumed = (self.folder / "config.json").exists()
        name = f"config.resumed-{int(time.time())}.json" if resumed else "config.json"
        write_atomically(self.folder / name, dumps(content, indent=2))

    def update(self, **changes: Any) -> None:
        """Change fields of ``status.json``, atomically.

        Raises:
            OSError: the first status of a run cannot be written; later ones wait.
        """
        if not self._status and (self.folder / "status.json").exists():
            self._status = self.status()
        first = not self._status
        self._status.update(changes, updated=_now())
        self._waiting["status.json"] = [dumps(self._status, indent=2)]
        if (error := self._write()) and first:
            raise error

    def metrics(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        if self._append("metrics.jsonl", record) is not None:
            return  # no room for TensorBoard's copy either
        prefix = "train" if record["kind"] == "step" else "epoch"
        try:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._tensorboard = SummaryWriter(str(self.folder / "tb"), purge_step=self._purge_step)
            for name, value in _scalars(record):
                if name not in ("step", "epoch"):
                    self._tensorboard.add_scalar(f"{prefix}/{name}", value, record["step"])
        except OSError as error:
            self._close_tensorboard()
            self._warn(error)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Append a line to ``events.jsonl``."""
        self._append("events.jsonl", {"kind": kind, "message": message, "time": _now(), **fields})

    def rewind_records(self, step: int, epoch: int, *, events: bool = True) -> None:
        """Drop the records of later steps and epochs, which are about to be trained again."""
        self._close_tensorboard()  # the next file hides what this one holds of later steps
        self._purge_step = step + 1
        for number, file in files.by_epoch(self.folder / "samples").items():
            if number > epoch:
                file.unlink(missing_ok=True)
        for name in ("metrics.jsonl", "events.jsonl")[: 1 + events]:
            records, damaged = files.read_lines(self.folder / name, files.is_record)
            kept = [line for line in records if line.get("step", 0) <= step]
            write_atomically(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            if damaged:
                self.event("damaged", files.skipped_lines(self.folder / name, damaged), step=step)

    def close(self) -> None:
        """Write what still waits, and say so where that is not possible."""
        self._close_tensorboard()
        if self._write() is not None:
            lines = sum(map(len, self._waiting.values()))
            print(f"{lines} lines of its records could not be written in {self.folder}", file=sys.stderr)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run while this process trains it, and remove what a killed process left unfinished.

        Raises:
            RunError: another process is training it.
        """
        wait = "wait until it ends, or start a run of another name"
        with exclusive(self.folder, RunError(f"{self.folder} is being trained by another process: {wait}")):
            for file in self.folder.rglob(".*.tmp"):
                with contextlib.suppress(OSError):
                    file.unlink()
            incidents = sorted(folder for folder in self.folder.glob("incidents/*/") if folder.name.isdigit())
            unfinished = [folder for folder in incidents if not (folder / "report.json").is_file()]
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            if names := ", ".join(folder.name for folder in unfinished):
                self.event("damaged", f"unfinished incidents of a killed process were removed: {names}")
            yield

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _append(self, name: str, record: dict[str, Any]) -> OSError | None:
        self._waiting.setdefault(name, []).append(dumps(record) + "\n")
        return self._write()

    def _write(self) -> OSError | None:
        """Write what waits; an error where there was no room for some."""
        failed = None
        for name, lines in self._waiting.items():
            try:
                if name == "status.json" and lines:
                    write_atomically(self.folder / name, lines[0])
                elif lines:
                    files.append_whole(self.folder / name, "".join(lines).encode())
                lines.clear()
            except OSError as error:
                failed = error
                self._warn(error)
        return failed

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            what = f"a record could not be written in {self.folder} ({error})"
            print(f"{what}; records wait in memory for room", file=sys.stderr, flush=True)
        self._warned = True

    # -- reading
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds.

        Raises:
            RunError: it is missing or damaged.
        """
        file = self.folder / "config.json"
        with retold(RunError, f"the settings in {file} cannot be read: ", causes=files.DAMAGE):
            found: dict[str, Any] = read_json(file)
            if not isinstance(found["settings"], dict):
                raise ValueError("it is damaged")
        return found

    def settings(self) -> Settings:
        """The settings the run was made with.

        Raises:
            RunError: they are damaged, or another version's.
        """
        with retold(RunError, f"{self.folder / 'config.json'} holds settings that this version lacks: "):
            return Settings(**self.config()["settings"])

    def status(self) -> dict[str, Any]:
        """What ``status.json`` holds: state, step, epoch, best, metrics.

        The state of a run whose process was killed is ``killed`` in place of ``running``; see
        :func:`~refinelib.files.was_killed`.

        Raises:
            RunError: it is missing or damaged.
        """
        file = self.folder / "status.json"
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = read_json(file)
            plain = isinstance(found, dict) and isinstance(found.get("state", ""), str)
            if plain and files.are_numbers(found):
                return found | self._end_of_killed(found) if files.was_killed(self.folder, found) else found
        raise RunError(f"{file} is damaged or missing: put {{}} into it, and resume=true continues")

    def _end_of_killed(self, status: dict[str, Any]) -> dict[str, str]:
        pairs = ((name, status.get(name, 0), status.get(f"{name}s", "?")) for name in ("epoch", "step"))
        where = ", ".join(f"{name} {done} of {most}" for name, done, most in pairs)
        how = "-p resume true goes on" if self.has_checkpoint else "there is no checkpoint, so start it again"
        return {"state": "killed", "last_error": f"stopped after {where}; {how}"}

    def steps(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``, one for every ``log_every`` steps."""
        return self._lines("step", loss=None, losses={}, grad_norm=None, lr=None)

    def epochs(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``, one an epoch."""
        return self._lines("epoch", step=0, train_loss=None, losses={}, seconds=0.0)

    def _lines(self, kind: str, **blank: Any) -> list[dict[str, Any]]:
        lines = files.read_records(self.folder / "metrics.jsonl")
        return [{**blank, **line} for line in lines if line["kind"] == kind]

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from, whole or not."""
        return any(self.folder.glob("checkpoints/*.pt"))

    def validations(self) -> list[dict[str, Any]]:
        """The epochs that were validated: every ``validate_every``-th and the last."""
        return [line for line in self.epochs() if line.get("metrics")]

    def events(self) -> list[dict[str, Any]]:
        """Lines of ``events.jsonl``."""
        return files.read_records(self.folder / "events.jsonl")

    def summary(self) -> str:
        """The run's state, its metrics and where its figures lie, a few lines."""
        status = self.status()
        state, more = status.get("state", "unknown"), status.get("last_error")
        if state == "running":  # nothing tells this host whether a process of another one lives
            host, last = status.get("host", "an unknown host"), status.get("updated", "unknown")
            more = f"on {host}, last record {last}"
        metrics = status.get("metrics") or {}
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        three = zip(("background", "target", "non-target"), metrics.get("iou") or (), strict=False)
        numbers |= {f"IoU of {name}": value for name, value in three}
        rows = {"run": f"{self.name}: {state}{f' ({more})' if more else ''}"}
        rows |= {name: "none" if value is None else f"{value:.3f}" for name, value in numbers.items()}
        rows["skipped steps"] = f"{status.get('skipped_steps', 0)} of {status.get('step', 0)}"
        filled = [name for name in ("checkpoints", "figures") if any(self.folder.glob(f"{name}/*"))]
        rows |= {name: str(self.folder / name) for name in filled}
        if incidents := sorted(self.folder.glob("incidents/*/report.json")):
            rows["incidents"] = f"{len(incidents)}; look into one: refinelib replay {incidents[-1].parent}"
        last = newest(self.folder.parent, self.started_as()) if state != "ok" else None
        if last and last.name != self.name:
            rows["newest of this name"] = f"{last.name}: {last.status().get('state', 'unknown')}"
        return "\n".join(f"{name:20} {text}" for name, text in rows.items())

    def fits(self, settings: Settings, *, exactly: bool = False) -> bool:
        """Whether it was started with these settings, as far as a resume needs; or ``exactly``."""
        with contextlib.suppress(RunError):
            then, now = self.config()["settings"], settings.model_dump(mode="json")
            same = then | {"resume": settings.resume} == now
            return same if exactly else not changed_settings(settings, then)
        return False

    def started_as(self) -> str:
        """The name the run was started under: ``coco-2017`` may be the 2017th run of ``coco``, or not."""
        with contextlib.suppress(RunError, KeyError, TypeError):
            settings = self.config()["settings"]
            return str(settings["run"] or Path(settings["recipe"]).stem)
        return re.sub(r"-\d+$", "", self.name)  # it has no settings yet


def places(output_dir: str = config.RUNS_DIR) -> list[Path]:
    """Folders in which a run is looked for by its name; new ones are made in the first.

    With ``REFINELIB_SMOKE`` smoke runs come first. A debug run may start from the weights of any run.
    """
    root = absolute(output_dir)
    smoke = config.checked(smoke=os.environ.get(config.SMOKE_VARIABLE) or False)
    first = [absolute(config.SMOKE_DIR)] if smoke and output_dir == config.RUNS_DIR else []
    return [*first, root, *[root.parent] * (root.name == DEBUG_DIR)]


def _folders(root: Path) -> list[str]:
    """Runs in a folder and the two levels below it, as :meth:`Run.open` finds them."""
    folders = [root, *root.glob("*/"), *root.glob("*/*/")]
    return sorted(str(run.folder.relative_to(root)) for folder in folders for run in find_runs(folder))


def changed_settings(settings: Settings, then: dict[str, Any]) -> list[str]:
    """What differs from the settings that a run was started with, and must not where it is resumed.

    What only says where a run lies and what it leaves may differ, and ``epochs``, which stretches the rest of
    the schedule.
    """
    now = settings.model_dump(mode="json")
    free = names_with_role("run", "inference") | {"add_pennfudan", "epochs", "init_from", "max_rewinds"}
    names = [name for name in then if name in now and name not in free and then[name] != now[name]]
    return [f"{name} was {then[name]}, is {now[name]}" for name in names]


def find_runs(root: PathLike = "outputs", name: str | None = None) -> list[Run]:
    """Runs under a folder, the one that wrote a record last at the end; phase sequences are left out.

    Args:
        root: folder of runs; a relative path starts at the project's root.
        name: only runs that were started under this name.
    """

    def last_record(run: Run) -> tuple[float, int, str]:
        records = [run.folder / name for name in ("status.json", "metrics.jsonl", "events.jsonl")]
        newest = max(file.stat().st_mtime for file in records if file.is_file())
        return newest, len(run.name), run.name  # run-10 was made after run-9, maybe at the same moment

    runs = [Run(file.parent) for file in absolute(root).glob("*/status.json")]
    runs = [run for run in runs if not (run.folder / "progressive.json").is_file()]
    return sorted((run for run in runs if name in (None, run.name, run.started_as())), key=last_record)


def is_free(folder: Path) -> bool:
    """Whether a run may take a folder: there is none, or that of a start that failed before its first step.

    Such a start left its settings, its status and figures of nothing.
    """
    if not folder.exists():
        return True
    with contextlib.suppress(RunError, OSError):
        left = {file.relative_to(folder).parts[0] for file in folder.rglob("*") if file.is_file()}
        status = Run(folder).status()
        ended = status.get("state") in ("failed", "interrupted") and not status.get("step")
        return ended and left <= _FAILED_START
    return False


def newest(
    root: PathLike = "outputs", name: str | None = None, *, fits: Callable[[Run], bool] = lambda run: True
) -> Run | None:
    """The run that wrote a record last, of those that :func:`find_runs` finds and that fit."""
    return next((run for run in reversed(find_runs(root, name)) if fits(run)), None)


def latest(output_dir: str = "outputs") -> Run:
    """The run that wrote a record last.

    Raises:
        RunError: there is none.
    """
    root = places(output_dir)[0]
    if run := newest(root):
        return run
    below = ", ".join(_folders(root)) or "none"
    raise RunError(f"there is no run under {root}: `make train` makes one; in its folders there are {below}")


# -- helpers -----------------------------------------------------------------------------------------
def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git_commit() -> str | None:
    """The checkout's commit, with ``+changes`` where the tree differs from it; none outside a checkout."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    if not (shipped() / ".git").exists():  # git would take a repository around an installed package
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(git, cwd=shipped(), capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()
    return None
