"""Checkpoints: complete, written in one step, with a checksum of what is inside.

A checkpoint is one file that ``torch.load(file, weights_only=True)`` opens: a dictionary of plain values and
tensors. Its ``checksum`` is the SHA-256 of all of them in a fixed order, which tells a whole file from one
that was cut short or changed.
"""

import hashlib
import io
import json
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from refinelib.config import absolute, existing
from refinelib.files import PathLike, file_digest, opened_zip, read_json, reason, replacing, retold, shown
from refinelib.registry import REFINEMENTS
from refinelib.runs import Run, RunError

#: Version of the content; others are refused. 4: attention is made of matrix products.
FORMAT = 4


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the file, what is wrong with it and what to do."""


# -- writing -----------------------------------------------------------------------------------------
def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically: a crash leaves the old file or the new one.

    Args:
        path: file to replace.
        content: nested dictionaries and lists of tensors and plain values.
    """
    _write(path, to_cpu(content))


def _write(path: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, "checksum": checksum(content), **content}
    with replacing(path, "wb") as file:
        torch.save(content, file)


class Writer:
    """Writes checkpoints in the background, one after the other, while training continues.

    ``save`` copies the content before it returns, so that later steps do not change it. A write that fails (a
    full disk) leaves the old file; its content waits for the next ``save`` or ``flush`` to be tried again.

    Attributes:
        failing: what is wrong with each file whose newest content is not on disk, in a sentence.
        problems: what failed, in sentences, for the caller to take out; a file that fails again and again is
            named once.
    """

    def __init__(self) -> None:
        self.failing: dict[Path, str] = {}
        self._waiting: dict[Path, dict[str, Any]] = {}  # the newest content of each file that is not on disk
        self.problems: list[str] = []
        self._worker = ThreadPoolExecutor(1, "checkpoints")  # the interpreter waits for it before it ends

    def save(self, path: Path, content: dict[str, Any], *, copy: bool = True) -> None:
        """Have ``content`` written to ``path``; it replaces an older one that still waits.

        Args:
            path: file to replace.
            content: see :func:`save`.
            copy: false: it is a copy on the CPU already, which nobody changes.
        """
        content = to_cpu(content) if copy else content
        self._waiting.pop(path, None)
        self._waiting[path] = content  # at the end: files are written in the order of their saving
        self._worker.submit(self._write_waiting)

    def flush(self) -> None:
        """Wait until everything is on disk, or has failed once more."""
        self._worker.submit(self._write_waiting).result()

    close = flush

    def _write_waiting(self) -> None:
        for path in list(self._waiting):
            content = self._waiting.pop(path, None)
            if content is None:  # save is just replacing it, with a call of its own
                continue
            try:
                _write(path, content)
            except Exception as error:  # torch.save turns a full disk into a RuntimeError
                self._waiting.setdefault(path, content)  # unless a newer one came
                old = "the one before it stays" if path.exists() else "there is none before it"
                message = f"the checkpoint {path.name} could not be written ({reason(error)}); {old}"
                if path not in self.failing:
                    self.problems.append(message)
                self.failing[path] = message
                continue
            if self.failing.pop(path, None) is not None:
                self.problems.append(f"the checkpoint {path.name} could be written after all")


def to_cpu(value: Any) -> Any:
    """A copy that later training steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def checksum(content: Any) -> str:
    """SHA-256 of nested plain values and tensors, in a fixed order."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f"{key!r}:".encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}]".encode())
            for item in value:
                feed(item)
        else:
            digest.update(json.dumps(value).encode())

    feed(content)
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------
def load(path: PathLike, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, verified.

    Whatever the file holds, this takes no more memory than twice its size and 300 MiB.

    Args:
        path: the file.
        needs: parts that must be in it.

    Raises:
        CheckpointError: missing, cut short, changed, of another format, or not what :func:`save` writes.
    """
    try:
        with opened_zip(path) as (file, archive):
            size = os.fstat(file.fileno()).st_size
            ours = _claims_fit(file, archive, size)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True) if ours else None
            if not ours or not _is_plain(content, [size]):
                raise ValueError("it is not as refinelib writes one")
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason(error)})") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise CheckpointError(f"{path} was not written by refinelib: it has no checksum")
    form, expected = content.pop("format", None), content.pop("checksum")
    if type(form) is not int or form != FORMAT:
        why = f"this version reads format {FORMAT}: use the version that wrote it"
        raise CheckpointError(f"{path} has format {shown(form)}, {why}")
    if checksum(content) != str(expected):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    if missing := sorted(set(needs) - content.keys()):
        raise CheckpointError(f"{path} is not the checkpoint that is needed: it lacks {', '.join(missing)}")
    for name, fits in _PARTS.items():
        if name in content and not fits(content[name]):
            raise CheckpointError(f"{path} is no checkpoint of this version: {name}: {shown(content[name])}")
    return content


# -- what a file may hold ----------------------------------------------------------------------------
#: Bytes a value of each type of storage that a file may name, and what it may name to be called.
_KINDS = {1: "Byte Char Bool", 2: "Half BFloat16 Short", 4: "Float Int", 8: "Double Long"}
_STORAGES = {f"torch {kind}Storage": size for size, kinds in _KINDS.items() for kind in kinds.split()}
_CALLED = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict")
_PROTOCOL_2 = {ord(operation.code) for operation in pickletools.opcodes if operation.proto <= 2}
#: Largest pickle of names and plain values, and deepest nesting; the largest model has a tenth and a fifth.
_PICKLE, _DEPTH = 2 << 20, 32


class _Claims(pickle._Unpickler):
    """Reads a pickle without torch: a type of storage is a number here, and what is called gives None.

    Raises:
        Exception: it names anything else, calls a type, or a storage has not the size of its member.
    """

    # As torch.save writes them; a later protocol makes a bytearray of as many bytes as the file claims.
    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code in _PROTOCOL_2}
    sizes: dict[str, int]  # of the members

    def find_class(self, module: str, name: str) -> Any:
        """Bytes a value, or what may be called."""
        kind = f"{module} {name}"
        return (lambda *_: None) if kind in _CALLED else _STORAGES[kind]

    def persistent_load(self, pid: Any) -> None:
        """What ``torch.save`` says of a storage: a word, type, member, device, number of values."""
        _, kind, member, _, count = pid
        if self.sizes.get(f"data/{member}") != count * kind:
            raise ValueError(f"the storage {member} has another size than it claims")


def _claims_fit(file: IO[bytes], archive: zipfile.ZipFile, size: int) -> bool:
    """Whether a file holds our types only and takes no more memory than its size, before torch opens it.

    ``torch.save`` writes a zip whose members are not compressed: a pickle, and the bytes of each tensor. So
    all sizes are known before: the members' add up to the file's, and the pickle claims the members'.
    """
    file.seek(0)
    members = archive.infolist()
    root = members[0].filename.partition("/")[0] + "/"  # torch looks there, whatever the capitals
    sizes = {member.filename.removeprefix(root): member.file_size for member in members}
    stored = [member for member in members if member.compress_type == zipfile.ZIP_STORED]
    plain = [m for m in stored if m.filename == m.orig_filename and m.compress_size == m.file_size]
    inside = len(plain) == len(members) and all(m.filename.startswith(root) for m in members)
    inside &= len({name.lower() for name in sizes}) == len(members)
    fits = sum(sizes.values()) <= size and sizes["data.pkl"] <= _PICKLE
    # Without the zip's mark in front, torch would read the file as one of before 2020.
    if not inside or not fits or file.read(4) != b"PK\x03\x04":
        return False
    claims = _Claims(io.BytesIO(archive.read(root + "data.pkl")))
    claims.sizes = sizes
    claims.load()
    return True


def _is_plain(value: Any, room: list[int], depth: int = 0) -> bool:
    """Whether this is what :func:`save` writes.

    Args:
        value: part of a file's content.
        room: bytes that are left of the file's; a value takes one, a tensor those of its elements. So a part
            that stands in many places, or in itself, is not visited for ever.
        depth: of the nesting.
    """
    size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
    room[0] -= 1 + size
    if room[0] < 0:
        return False
    if isinstance(value, Tensor):
        return size <= value.untyped_storage().nbytes()
    if type(value) in (dict, list, tuple):
        keys, parts = (value.keys(), value.values()) if type(value) is dict else ((), value)
        fits = depth <= _DEPTH and all(type(key) in (str, int) for key in keys)
        return fits and all(_is_plain(part, room, depth + 1) for part in parts)
    return value is None or type(value) in (str, int, float, bool)


def _named(value: Any, kind: type) -> bool:
    """Whether this is values of one type by name."""
    return isinstance(value, dict) and all(type(k) is str and isinstance(v, kind) for k, v in value.items())


#: Whether a part is what callers take it for; of a run's checkpoint, and of an incident's two files.
_PARTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "random"), lambda part: _named(part, Tensor)),
    "average": lambda part: part is None or _named(part, Tensor),
    "position": lambda part: _named(part, int) and min(part.values(), default=0) >= 0,
    **dict.fromkeys(("guard", "log", "recovery", "settings"), lambda part: isinstance(part, dict)),
    "best": lambda part: part is None or isinstance(part, dict),
    "mean_coverage": lambda part: isinstance(part, Tensor),
    **dict.fromkeys(("images", "labels"), lambda part: type(part) is list and {*map(type, part)} <= {Tensor}),
}


def newest_whole(
    folder: Path, *, check: Callable[[Path, dict[str, Any]], None] = lambda path, content: None
) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of the latest step that is whole, and what was wrong with the others.

    Args:
        folder: a run's ``checkpoints/``.
        check: called with path and content; raises CheckpointError for one that cannot be resumed from.

    Returns:
        Path, content, and one sentence for each file that could not be used.

    Raises:
        CheckpointError: none of them can be used.
    """
    usable, problems = [], []
    for file in (folder / "last.pt", folder / "best.pt"):
        if file.exists():
            try:
                content = load(file)
                check(file, content)
                usable.append((content["position"]["step"], file, content))
            except CheckpointError as error:
                problems.append(str(error))
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                problems.append(f"{file} is not a run's checkpoint ({type(error).__name__}: {error})")
    if not usable:
        wrong = "; ".join(problems) or "none was written yet, so start it without resume"
        raise CheckpointError(f"no usable checkpoint in {folder}: {wrong}")
    return *max(usable, key=lambda item: item[0])[1:], problems


def nonfinite(content: Any, name: str = "") -> list[str]:
    """Names of the tensors in nested dictionaries that hold a value that is not finite."""
    if isinstance(content, Tensor):
        return [] if bool(content.isfinite().all()) else [name]
    items = content.items() if isinstance(content, dict) else ()
    return [found for key, value in items for found in nonfinite(value, f"{name}.{key}".lstrip("."))]


def check_weights(model: nn.Module, saved: dict[str, Any], source: Path) -> None:
    """Whether a checkpoint's weights fit a model; one of the two may lack refinements.

    Raises:
        CheckpointError: other shapes or parts, or weights that are not finite.
    """
    weights, own = saved["model"], model.state_dict()
    optional = tuple(f"{refinement.attribute}." for refinement in REFINEMENTS.values())
    apart = [name for name in own.keys() ^ weights.keys() if not name.startswith(optional)]
    apart += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if apart:
        wrong = f"the weights in {source} do not fit this model (first {min(apart)})"
        names = ("width", "coarse_width", "coarse_depth")
        sizes = ", ".join(f"{name} {saved['settings'].get(name, 1):g}" for name in names)
        raise CheckpointError(f"{wrong}: use the sizes it was trained with, {sizes}")
    refuse_nonfinite(source, {name: x for name, x in weights.items() if name in own})


def refuse_nonfinite(source: Path, values: dict[str, Any]) -> None:
    """Refuse tensors that are not finite.

    Raises:
        CheckpointError: names the first.
    """
    if broken := nonfinite(values):
        wrong = f"{source} holds values that are not finite (first {broken[0]})"
        raise CheckpointError(f"{wrong}: start from another checkpoint")


def zoo() -> Path:
    """The folder of release files, trained weights by name: ``$REFINELIB_ZOO``, else ``outputs/zoo``."""
    return absolute(os.environ.get("REFINELIB_ZOO") or "outputs/zoo")


def find(source: PathLike, *, output_dir: str = "outputs") -> Path:
    """The checkpoint file meant by a run's name, a run's folder, a release's name or a file's own path.

    Of a run, the best one, else the last. A release is looked for in :func:`zoo`, where no run has its name.

    Raises:
        CheckpointError: there is none, or it is a release file that its card does not describe.
    """
    released = zoo() / f"{source}.pt"
    if (file := existing(source)).is_file():
        return _described(file)
    try:
        run = Run.open(source, output_dir=output_dir)
        for file in (run.folder / "checkpoints" / name for name in ("best.pt", "last.pt")):
            if file.is_file():
                return file
        raise RunError(f"{run.folder} holds no checkpoint: the run is {run.status().get('state', 'unknown')}")
    except RunError as error:
        if released.is_file():
            return _described(released)
        rule = "`make release` packs a run as one, or copy it there with its card"
        raise CheckpointError(f"{error}; and there is no release {released}: {rule}") from None


def _described(path: Path) -> Path:
    """A checkpoint file, if it is the one that the card beside it describes, where there is a card.

    Raises:
        CheckpointError: it has another SHA-256, or the card is damaged.
    """
    card = path.with_suffix(".json")
    if not card.exists():
        return path
    with retold(CheckpointError, f"the card {card} cannot be read (", "): copy it again"):
        content = read_json(card)
    said = content.get("sha256") if isinstance(content, dict) else None  # another program's, else
    if said is not None and said != (found := file_digest(path)):
        wrong = f"{path} has the SHA-256 {found}, its card {card.name} says {shown(said)}"
        raise CheckpointError(f"{wrong}: copy both files again")
    return path
