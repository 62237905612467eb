"""The run folder: what a run leaves behind, written so that a crash at any moment leaves it readable."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Iterator

from refinelib import files
from refinelib.config import Settings, absolute, project_root
from refinelib.files import read_json, reason, write_atomically
from refinelib.locking import alone


class RunError(RuntimeError):
    """A run folder is missing or not what it should be; the message says which and what to do."""


def strict(value: Any, found: dict[str, str] | None = None, at: str = "") -> Any:
    """``value`` as strict JSON: a number that is not finite becomes null, and ``found[path]`` says which it was."""
    if isinstance(value, float) and not math.isfinite(value):
        if found is not None:
            found[at] = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return None
    if isinstance(value, dict):
        return {str(k): strict(v, found, f"{at}.{k}" if at else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v, found, f"{at}[{i}]") for i, v in enumerate(value)]
    return value


def dumps(record: dict[str, Any], *, indent: int | None = None) -> str:
    """One strict JSON object; ``nonfinite`` names the values that were not finite."""
    found: dict[str, str] = {}
    clean = strict(record, found)
    if found:
        clean["nonfinite"] = found
    return json.dumps(clean, indent=indent, allow_nan=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file that may be growing; lines without one are passed over, with a warning."""
    records, damaged = files.read_lines(path, _is_record)
    if damaged:
        warnings.warn(_passed_over(path, damaged), stacklevel=2)
    return records


def _passed_over(path: Path, damaged: list[int]) -> str:
    return f"{path}: lines without a record were passed over ({len(damaged)}, the first is line {damaged[0]})"


#: Numbers of a line of ``metrics.jsonl``, and those of its metrics that are tables of numbers.
_NUMBERS = ("loss", "train_loss", "grad_norm", "grad_norm_max", "lr", "loss_scale", "skipped", "seconds")
_TABLES = ("by_size", "by_third", "intervals")


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line is of the types that its readers count on."""
    kind, counts = record.get("kind"), [record.get(name, 0) for name in ("step", "epoch", "count")]
    if not isinstance(kind, str) or not all(type(count) is int and count >= 0 for count in counts):
        return False
    if kind not in ("step", "epoch"):
        return True
    scores = all(_are_scores(record.get(name)) for name in ("losses", "metrics"))
    return kind in record and scores and all(_is_number(record.get(name)) for name in _NUMBERS)


def _is_number(value: Any) -> bool:
    """Whether this is a number that a figure's axis holds, or none."""
    return value is None or isinstance(value, (int, float)) and abs(value) < 1e100


def _are_scores(scores: Any) -> bool:
    """Whether this is numbers by name, and under ``iou`` three of them; or none."""
    if not isinstance(scores, dict):
        return scores is None
    three = scores.get("iou") or [None] * 3
    plain = [value for name, value in scores.items() if name not in (*_TABLES, "iou")]
    return isinstance(three, list) and len(three) == 3 and all(map(_is_number, three + plain))


def _last_record(folder: Path) -> tuple[float, int]:
    """When a run last wrote a record, and its number to tell those of one moment apart."""
    records = [folder / name for name in ("status.json", "metrics.jsonl", "events.jsonl")]
    number = re.search(r"-(\d+)$", folder.name)
    return max(file.stat().st_mtime for file in records if file.is_file()), int(number[1]) if number else 1


def _is_of(folder: Path, name: str) -> bool:
    """Whether a run's folder was made for this name: ``coco-2017`` may be the 2017th run of ``coco``, or one of a name of its own."""
    if folder.name == name:
        return True
    try:
        settings = read_json(folder / "config.json")["settings"]
        return (settings["run"] or Path(settings["recipe"]).stem) == name
    except (OSError, ValueError, KeyError, TypeError):
        return True  # it cannot say


class Run:
    """One folder under ``outputs/``. Make one with :meth:`start`, look at one with :meth:`open`.

    A record that cannot be written (a full disk) never stops a run: lines wait in memory, the status too, and both are
    written as soon as there is room. Standard error says so once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._status: dict[str, Any] = {}
        self._waiting: dict[str, list[str]] = {}  # lines by file, that could not be written yet
        self._stale = False  # whether status.json is older than the status
        self._warned = False
        self._tensorboard = None
        self._purge_step: int | None = None

    # -- making one --------------------------------------------------------------------------------
    @classmethod
    def start(cls, settings: Settings) -> "Run":
        """A new folder for this run, or with ``resume`` the newest one of its name.

        A folder that is there is never written over: the next free number is appended.
        """
        root = settings.path(settings.output_dir)
        root.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            run = cls(cls._newest(root, settings.run_name))
            run._status = run.status()
            return run
        for number in range(1, 100_000):
            folder = root / (settings.run_name if number == 1 else f"{settings.run_name}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        for name in ("checkpoints", "figures", "samples", "incidents", "tb"):
            (folder / name).mkdir()
        return cls(folder)

    @classmethod
    def open(cls, run: str | os.PathLike, *, output_dir: str = "outputs") -> "Run":
        """A run on disk, finished or still going, by its folder or its name under ``outputs/``."""
        for folder in (Path(run).expanduser(), absolute(output_dir) / run, absolute(run)):
            if (folder / "status.json").is_file():
                return cls(folder)
        root = absolute(output_dir)
        known = sorted(file.parent.name for file in status_files(root))
        raise RunError(f"there is no run {str(run)!r}: give a folder that holds status.json, or one of {', '.join(known) or 'none yet: train first'}")

    @classmethod
    def _newest(cls, root: Path, name: str) -> Path:
        """The run of this name whose last record is the latest."""
        found = [
            folder
            for folder in root.iterdir()
            if re.fullmatch(re.escape(name) + r"(?:-\d+)?", folder.name) and (folder / "status.json").is_file() and _is_of(folder, name)
        ]
        # A start that failed early has nothing to go on from: it must not hide the run before it.
        found = [folder for folder in found if any((folder / "checkpoints").glob("*.pt"))] or found
        if not found:
            raise RunError(f"resume: there is no run named {name!r} under {root}; start it without resume first")
        return max(found, key=_last_record)

    # -- writing -----------------------------------------------------------------------------------
    def record_settings(self, settings: Settings, device: str) -> None:
        """Write ``config.json``: settings as resolved, versions, device, commit."""
        import numpy
        import torch

        config = {
            "settings": settings.model_dump(mode="json"),
            "recipe": settings.recipe,
            "git_commit": _git_commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "numpy": numpy.__version__,
            },
            "threads": torch.get_num_threads(),
            "device": device,
            "command": sys.argv,
            "started": _now(),
        }
        name = "config.json" if not (self.folder / "config.json").exists() else f"config.resumed-{int(time.time())}.json"
        write_atomically(self.folder / name, dumps(config, indent=2))

    def update(self, **changes: Any) -> None:
        """Change fields of ``status.json``, atomically.

        Raises:
            OSError: the first status of a run cannot be written; later ones wait.
        """
        first = not self._status
        self._status.update(changes, updated=_now())
        try:
            write_atomically(self.folder / "status.json", dumps(self._status, indent=2))
            self._stale = False
        except OSError as error:
            if first:
                raise
            self._stale = True
            self._warn(error)

    def metrics(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        if not self._append("metrics.jsonl", record):
            return  # no room for TensorBoard's copy either
        prefix = "train" if record["kind"] == "step" else "epoch"
        try:
            for name, value in _scalars(record):
                if name not in ("step", "epoch"):
                    self.tensorboard.add_scalar(f"{prefix}/{name}", value, record["step"])
        except OSError as error:
            self._drop_tensorboard()
            self._warn(error)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Append a line to ``events.jsonl``."""
        self._append("events.jsonl", {"kind": kind, "message": message, "time": _now(), **fields})

    def rewind_records(self, step: int, epoch: int, *, events: bool = True) -> None:
        """Drop what is on record of later steps and epochs, which a resumed run is about to take again."""
        self._drop_tensorboard()  # the next one hides what the last one wrote of these steps
        self._purge_step = step + 1
        for number, file in files.by_epoch(self.folder / "samples")[0].items():
            if number > epoch:
                file.unlink(missing_ok=True)
        notes = []
        for place in ("samples", "gradients"):
            if others := files.by_epoch(self.folder / place)[1]:
                notes.append(f"{place}/: files of no epoch were passed over ({len(others)}, as {others[0]})")
        for name in ("metrics.jsonl", "events.jsonl")[: 1 + events]:
            records, damaged = files.read_lines(self.folder / name, _is_record)
            kept = [line for line in records if line.get("step", 0) <= step]
            write_atomically(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            if damaged:
                notes.append(_passed_over(self.folder / name, damaged))
        for note in notes:
            self.event("damaged", note, step=step)

    def close(self) -> None:
        """Write what still waits, and say so where that is not possible."""
        self._drop_tensorboard()
        left = sum(len(lines) for name, lines in self._waiting.items() if not self._write_waiting(name))
        if self._stale:
            self.update()
        if left or self._stale:
            parts = [f"{left} lines of its records"] * bool(left) + ["its last status"] * self._stale
            self._tell(f"{' and '.join(parts)} could not be written in {self.folder}: there was no room to the end")

    def _drop_tensorboard(self) -> None:
        """Close TensorBoard's file; where there is room, the next scalar starts another."""
        writer, self._tensorboard = self._tensorboard, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this process trains the run; what a process that is gone left half written goes.

        Raises:
            RunError: another process is training it.
        """
        with alone(self.folder, RunError(f"{self.folder} is being trained by another process: wait until it ends, or start a run of another name")):
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what a process that was killed left unfinished: files, and incidents without a report."""
        for place in ("", "checkpoints/", "checkpoints/*/", "samples/", "gradients/", "incidents/*/"):
            for file in self.folder.glob(f"{place}.*.tmp"):
                with contextlib.suppress(OSError):
                    file.unlink()
        incidents = (folder for folder in self.folder.glob("incidents/*/") if folder.name.isdigit())
        half = sorted(folder for folder in incidents if not (folder / "report.json").is_file())
        for folder in half:
            shutil.rmtree(folder, ignore_errors=True)
        if half:
            names = ", ".join(folder.name for folder in half)
            self.event("damaged", f"incidents that a killed process had not finished were removed: {names}")

    @property
    def tensorboard(self):
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a writer needs it

            self._tensorboard = SummaryWriter(str(self.folder / "tb"), purge_step=self._purge_step)
        return self._tensorboard

    def _append(self, name: str, record: dict[str, Any]) -> bool:
        """Append a line; whether it, and all that waited before it, are in the file."""
        self._waiting.setdefault(name, []).append(dumps(record) + "\n")
        there = self._write_waiting(name)
        if there:  # there is room: for whatever else waits too
            for other in self._waiting:
                self._write_waiting(other)
            if self._stale:
                self.update()
        return there

    def _write_waiting(self, name: str) -> bool:
        lines = self._waiting[name]
        if not lines:
            return True
        data = "".join(lines).encode()
        try:
            with open(self.folder / name, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)  # half a line would spoil the next one
                    raise
        except OSError as error:
            self._warn(error)
            return False
        lines.clear()
        return True

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._tell(f"a record could not be written in {self.folder} ({error}); the run goes on, records wait in memory for room")

    def _tell(self, message: str) -> None:
        print(f"{self.name}: {message}", file=sys.stderr, flush=True)

    # -- reading -----------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return self.folder.name

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds.

        Raises:
            RunError: it is missing or damaged.
        """
        file = self.folder / "config.json"
        try:
            found = read_json(file)
        except (OSError, ValueError) as error:
            raise RunError(f"the run's settings cannot be read: {reason(error)}") from None
        settings = found.get("settings") if isinstance(found, dict) else None
        known = [k for k in Settings.model_fields if k in settings] if isinstance(settings, dict) else []
        numbers = [settings[k] for k in known if isinstance(Settings.model_fields[k].default, (int, float))]
        if not known or None in numbers or not all(map(_is_number, numbers)):
            raise RunError(f"the run's settings cannot be read: {file} is damaged: it holds no settings")
        return found

    def settings(self) -> Settings:
        """The settings the run was made with.

        Raises:
            RunError: they are damaged, or another version's.
        """
        try:
            return Settings(**self.config()["settings"])
        except ValueError as error:
            file = self.folder / "config.json"
            raise RunError(f"{file} holds settings that this version lacks: {reason(error)}") from None

    def status(self) -> dict[str, Any]:
        file = self.folder / "status.json"
        try:
            found = read_json(file)
        except (OSError, ValueError):
            found = None
        numbers = ("step", "steps", "epoch", "epochs", "skipped_steps", "rewinds")
        if not (
            isinstance(found, dict)
            and isinstance(found.get("state", ""), str)
            and all(_is_number(found.get(name)) for name in numbers)
            and all(_are_scores(found.get(name)) for name in ("best", "metrics"))
        ):
            fix = "put {} into it, and resume=true goes on from the checkpoints beside it"
            raise RunError(f"{file} is damaged or missing: {fix}")
        return found

    def steps(self) -> list[dict[str, Any]]:
        return self._lines("step", loss=None, losses={}, grad_norm=None, lr=None)

    def epochs(self) -> list[dict[str, Any]]:
        return self._lines("epoch", step=0, train_loss=None, losses={}, seconds=0.0)

    def _lines(self, kind: str, **blank: Any) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``; what one lacks is blank."""
        lines = read_lines(self.folder / "metrics.jsonl")
        return [{**blank, **line} for line in lines if line["kind"] == kind]

    def validations(self) -> list[dict[str, Any]]:
        """The epochs that were validated: every ``validate_every``-th and the last."""
        return [line for line in self.epochs() if line.get("metrics")]

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "events.jsonl")

    def summary(self) -> str:
        """How the run stands, what it reached and where its figures lie, a few lines."""
        status = self.status()
        metrics = status.get("metrics") or {}
        error = f" ({status['last_error']})" if status.get("last_error") else ""
        lines = [f"{'run':20} {self.name}: {status.get('state', 'unknown')}{error}"]
        lines += [f"{name:20} {value:.3f}" for name, value in metrics.items() if isinstance(value, float)]
        if "iou" in metrics:
            shown = ("none" if value is None else f"{value:.3f}" for value in metrics["iou"])
            lines.append(f"{'IoU of each class':20} " + ", ".join(f"{c} {v}" for c, v in zip(("background", "target", "non-target"), shown)))
        lines.append(f"{'skipped steps':20} {status.get('skipped_steps', 0)} of {status.get('step', 0)}")
        lines += [f"{name:20} {self.folder / name}" for name in ("checkpoints", "figures")]
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = self.status().get("state") if (self.folder / "status.json").is_file() else "new"
        return f"Run({self.name}: {state})"


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
    try:
        def ask(*arguments: str) -> str:
            return subprocess.run(
                ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()

        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def status_files(root: Path) -> list[Path]:
    """``status.json`` of every run under a folder, the one that changed last at the end. A chain of runs, which has one too, is none."""
    runs = (file for file in root.glob("*/status.json") if not (file.parent / "progressive.json").is_file())
    return sorted(runs, key=lambda file: file.stat().st_mtime)


def latest(output_dir: str = "outputs") -> Run:
    """The run whose status changed last."""
    root = absolute(output_dir)
    found = status_files(root)
    if not found:
        raise RunError(f"there is no run under {root} yet: `make train` makes one")
    return Run(found[-1].parent)
