"""Checkpoints: complete, written in one step, with a checksum of what is inside.

A checkpoint is one file that ``torch.load(file, weights_only=True)`` opens: a dictionary of plain
values and tensors. Its ``checksum`` is the SHA-256 of all of them in a fixed order, so that a file
that was cut short or changed is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refinelib.config import absolute

#: 3: the model has self-attention; 4: that and channel attention are made of matrix products, and weights of before are not read.
FORMAT = 4


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the file, what is wrong with it and what to do."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically: a crash leaves the old file or the new one.

    Args:
        path: file to replace.
        content: nested dictionaries and lists of tensors and plain values.
    """
    _write(path, to_cpu(content))


def _write(path: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, "checksum": checksum(content), **content}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Writer:
    """Writes checkpoints in the background, one after the other; training goes on meanwhile.

    ``save`` copies the content before it returns, so that later steps don't touch it. A write that fails (a full
    disk) leaves the old file, and its content waits for the next ``save`` or ``flush`` to be tried again.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, dict[str, Any]] = {}  # the newest content of each file that is not written yet
        self._failed: dict[Path, dict[str, Any]] = {}  # content that could not be written
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []
        #: What is wrong with each file whose newest content is not on disk, in a sentence.
        self.failing: dict[Path, str] = {}

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Have ``content`` written to ``path``; where an older one still waits, the newer takes its place."""
        content = to_cpu(content)
        with self._wake:
            self._waiting = {**self._failed, **self._waiting, path: content}
            self._failed = {}
            self._start()

    def flush(self) -> None:
        """Wait until everything is on disk, or has failed once more."""
        self._join()
        with self._wake:
            self._waiting, self._failed = self._failed, {}
            if self._waiting:
                self._start()
        self._join()

    def close(self) -> None:
        """Wait for what is being written, whatever ended the run."""
        self.flush()

    def problems(self) -> list[str]:
        """What failed since the last call, in sentences; a file that goes on failing is told of once."""
        with self._wake:
            found, self._problems = self._problems, []
        return found

    def _start(self) -> None:
        if self._thread is None:
            # Not a daemon: the interpreter waits for a checkpoint that is being written.
            self._thread = threading.Thread(target=self._run, name="checkpoints")
            self._thread.start()

    def _join(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._waiting:
                    self._thread = None
                    return
                path = next(iter(self._waiting))
                content = self._waiting.pop(path)
            try:
                _write(path, content)
            except Exception as error:  # torch.save turns a full disk into a RuntimeError; a thread that dies would lose all that follow
                reason = (str(error) or type(error).__name__).splitlines()[0]
                old = "the one before it stays" if path.exists() else "there is none before it"
                with self._wake:
                    self._failed[path] = content
                    if path not in self.failing:
                        self._problems.append(f"the checkpoint {path.name} could not be written ({reason}); {old}")
                    self.failing[path] = f"the checkpoint {path.name} could not be written ({reason}); {old}"
            else:
                with self._wake:
                    self._failed.pop(path, None)
                    if self.failing.pop(path, None) is not None and path not in self._waiting:
                        self._problems.append(f"the checkpoint {path.name} could be written after all")


def load(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, verified.

    Raises:
        CheckpointError: missing, cut short, changed, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise CheckpointError(f"{path} is not a whole checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise CheckpointError(f"{path} was not written by refinelib: it has no checksum")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads format {FORMAT}: use the version that wrote it")
    expected = content.pop("checksum")
    content.pop("format")
    if checksum(content) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return content


def readable(path: str | os.PathLike) -> bool:
    """Whether :func:`load` takes a file: it is whole, and of this version."""
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def newest_whole(folder: Path, names: tuple[str, ...] = ("last.pt", "best.pt")) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of the latest step that is whole, and what was wrong with the others.

    Args:
        folder: a run's ``checkpoints/``.
        names: files to consider.

    Returns:
        path, content, and one sentence for each file that could not be used.

    Raises:
        CheckpointError: none of them is whole.
    """
    whole, problems = [], []
    for name in names:
        if not (folder / name).exists():
            continue
        try:
            content = load(folder / name)
            whole.append((content["position"]["step"], folder / name, content))
        except CheckpointError as error:
            problems.append(str(error))
    if not whole:
        raise CheckpointError(f"no whole checkpoint in {folder}" + (": " + "; ".join(problems) if problems else " (none was written yet)"))
    _, path, content = max(whole, key=lambda item: item[0])
    return path, content, problems


def find(source: str | os.PathLike, *, output_dir: str = "outputs") -> Path:
    """The checkpoint file meant by a run's name, a run's folder or a file's own path.

    Of a run, the best one, else the last.
    """
    from refinelib.runs import Run, RunError

    for path in (Path(source).expanduser(), absolute(source)):
        if path.is_file():
            return path
    try:
        folder = Run.open(source, output_dir=output_dir).folder / "checkpoints"
    except RunError as error:
        raise CheckpointError(str(error)) from None
    for name in ("best.pt", "last.pt"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no checkpoint yet")


def checksum(content: Any) -> str:
    """SHA-256 of nested plain values and tensors, in a fixed order."""
    digest = hashlib.sha256()
    _feed(content, digest)
    return digest.hexdigest()


def _feed(value: Any, digest) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _feed(value[key], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(item, digest)
    else:
        digest.update(json.dumps(value).encode())


def to_cpu(value: Any) -> Any:
    """A copy that later training steps do not touch."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(item) for item in value]
    return value
