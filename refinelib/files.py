"""Side files: written in one step, and read within a stated memory whatever they hold.

For damaged content every reader raises ValueError, in a sentence that names the file; for a file that cannot
be opened OSError. Nothing of the package is imported.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

#: Largest file that is read, by format, in bytes; the worst content takes 30 times that in memory.
JSON, YAML = 4 << 20, 64 << 10
#: Largest line of a records file, and largest part of a zip that is read at once, in bytes.
LINE, PIECE = 1 << 20, 4 << 20
#: Bytes that the arrays of an .npz may take together.
ARRAYS = 256 << 20
PathLike = str | os.PathLike[str]
Causes = type[Exception] | tuple[type[Exception], ...]
#: What reading a damaged file raises, where its content is used as well.
DAMAGE = (OSError, ValueError, TypeError, KeyError)


# -- the package's own -------------------------------------------------------------------------------
def shipped() -> Path:
    """The folder of the package's own ``params/`` and ``notebooks/``: the installed package, or its checkout.

    Example:
        >>> (shipped() / "params" / "demo.yaml").is_file()
        True
    """
    package = Path(__file__).resolve().parent
    return package if (package / "params").is_dir() else package.parent


# -- writing -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, which replaces ``path`` once it is whole and on disk.

    A reader, or a crash, finds the old content or the new one, never half.

    Args:
        path: file to replace; its folder exists.
        mode: ``w`` for UTF-8 text, ``wb`` for bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(name: str) -> Iterator[str]:
    """Names to choose the first free one from: the name, then with ``-2``, ``-3`` and so on after it.

    Example:
        >>> names = numbered("best")
        >>> next(names), next(names)
        ('best', 'best-2')
    """
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text)


def append_whole(file: Path, data: bytes) -> None:
    """Append all of ``data`` or nothing: half a line would damage the next one.

    Raises:
        OSError: it does not fit on the disk, or cannot be written.
    """
    with open(file, "ab", buffering=0) as out:
        end = out.seek(0, os.SEEK_END)
        if out.write(data) != len(data):
            out.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def exclusive(folder: Path, refusal: Exception) -> Iterator[None]:
    """Hold an exclusive lock on a folder, the file ``.lock`` in it; it ends with the process.

    Where no lock can be made, as in a folder that cannot be written to, there is none.

    Raises:
        refusal: another process holds it.
    """
    with contextlib.ExitStack() as held:
        try:
            # :func:`is_locked` in another process holds it for a moment.
            held.enter_context(FileLock(folder / ".lock", timeout=0.5))
        except Timeout:
            raise refusal from None
        except (OSError, NotImplementedError):
            pass  # this file system has no locks, or the folder cannot be written to
        yield


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the lock of :func:`exclusive`; none where there is no lock to be tried."""
    try:
        if not (folder / ".lock").is_file():
            return None
        with FileLock(folder / ".lock", blocking=False):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None


def was_killed(folder: Path, status: dict[str, Any]) -> bool:
    """Whether a status says ``running`` though no process works in its folder any more.

    Only the host that the status names can tell, by the folder's lock. While a launcher (``torchrun``) lives,
    it may start its processes again: the lock is free until they take it.

    Args:
        folder: of a run or of a phase sequence.
        status: its state and its :func:`owner`.
    """
    here = status.get("state") == "running" and status.get("host") == platform.node()
    if not here or is_locked(folder) is not False:
        return False
    try:
        os.kill(status["launcher"], 0)
    except (ProcessLookupError, OverflowError, TypeError, KeyError):
        return True
    except PermissionError:  # another user's process
        pass
    return False


def owner(launched: bool = False) -> dict[str, Any]:
    """What :func:`was_killed` needs: this host, and if ``launched`` the process that started this one."""
    return {"host": platform.node(), "launcher": os.getppid() if launched and os.name == "posix" else None}


# -- messages ----------------------------------------------------------------------------------------
def shown(value: Any, length: int = 80) -> str:
    """A value as a message shows it: its ``repr``, cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes; lists nested too deep
        return f"a huge {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def reason(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line, cut."""
    mark = getattr(error, "problem_mark", None)  # PyYAML's own text is five lines
    if mark is not None:
        return f"{getattr(error, 'problem', 'wrong')} in line {mark.line + 1}"
    text = " ".join(str(error)[: 10 * length].split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."


@contextlib.contextmanager
def retold(
    kind: Callable[[str], Exception], before: str, after: str = "", *, causes: Causes = (OSError, ValueError)
) -> Iterator[None]:
    """Turns some errors, those of reading a damaged file, into another one, in words before and after theirs.

    Raises:
        kind: in place of the ``causes``.
    """
    try:
        yield
    except causes as error:
        raise kind(f"{before}{reason(error, 1000)}{after}") from None


# -- bytes -------------------------------------------------------------------------------------------
def file_digest(path: PathLike, kind: str = "sha256") -> str:
    """A file's checksum in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


# -- text --------------------------------------------------------------------------------------------
def _text(path: PathLike, limit: int) -> str:
    if not os.path.isfile(path):  # reading a pipe would wait
        raise FileNotFoundError(f"there is no file {path}")
    if (size := os.path.getsize(path)) > limit:
        raise ValueError(f"it has {size} bytes, more than {limit}")
    return Path(path).read_bytes().decode("utf-8")


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number that no float holds")
    return int(text) if text.lstrip("-").isdigit() else value


def parse_json(text: str | bytes) -> Any:
    """Strict JSON, of numbers that a float holds.

    Raises:
        ValueError, RecursionError: it is something else.
    """
    return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)


def strict(value: Any, found: dict[str, str], at: str = "") -> Any:
    """``value`` as strict JSON: what is not finite becomes null; ``found[path]`` says what it was."""
    if isinstance(value, float) and not math.isfinite(value):
        found[at] = str(value)
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
    return json.dumps({**clean, "nonfinite": found} if found else clean, indent=indent, allow_nan=False)


def read_json(path: PathLike, *, limit: int = JSON) -> Any:
    """What a JSON file of at most ``limit`` bytes holds."""
    try:
        return parse_json(_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from None


def read_lines(path: Path, fits: Callable[[Any], bool] = bool) -> tuple[list[dict[str, Any]], list[int]]:
    """Objects of a JSON-lines file that may still be growing, and the numbers of the lines that hold none.

    A last line without an end is still being written: it is not counted as damaged.

    Args:
        path: the file; one that does not exist has no lines.
        fits: whether an object is what the file should hold; the default takes any that is not empty.
    """
    records: list[dict[str, Any]] = []
    damaged: list[int] = []
    number, continued = 0, False
    with open(path, "rb") if path.is_file() else io.BytesIO() as file:
        while piece := file.readline(LINE):
            rest, continued = continued, not piece.endswith(b"\n")
            if rest:  # of a line that is too long and was counted
                continue
            number += 1
            record = None
            with contextlib.suppress(ValueError, RecursionError):
                record = parse_json(piece)
            if isinstance(record, dict) and fits(record):
                records.append(record)
            elif not continued or len(piece) == LINE:
                damaged.append(number)
    return records, damaged


# -- records of a run ---------------------------------------------------------------------------------
#: Names of numbers, of numbers by name, and of those that are tables, in the status and in a line of records.
_NUMBERS = {"loss", "train_loss", "grad_norm", "grad_norm_max", "lr", "loss_scale", "skipped", "seconds"}
_NUMBERS |= {"step", "steps", "epoch", "epochs", "skipped_steps", "rewinds"}
_SCORES = ("losses", "metrics", "best")
_TABLES = {"by_size", "by_third", "by_tercile", "intervals"}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file that may be growing; other lines are skipped, with a warning."""
    records, damaged = read_lines(path, is_record)
    if damaged:
        warnings.warn(skipped_lines(path, damaged), stacklevel=2)
    return records


def skipped_lines(path: Path, damaged: list[int]) -> str:
    """What to tell of lines that hold no record."""
    return f"{path}: lines without a record were passed over ({len(damaged)}, the first is line {damaged[0]})"


def is_record(record: dict[str, Any]) -> bool:
    """Whether a line has the types that its readers rely on."""
    kind, counts = record.get("kind"), [record.get(name, 0) for name in ("step", "epoch", "count")]
    if not isinstance(kind, str) or not all(type(count) is int and count >= 0 for count in counts):
        return False
    return kind not in ("step", "epoch") or (kind in record and are_numbers(record))


def are_numbers(found: dict[str, Any]) -> bool:
    """Whether numbers, and numbers by name, are such as the axis of a plot holds, or none."""
    numbers = [value for name, value in found.items() if name in _NUMBERS]
    for scores in (found.get(name) or {} for name in _SCORES):
        three = scores.get("iou") or [None] * 3 if isinstance(scores, dict) else ()
        if not isinstance(three, list) or len(three) != 3:
            return False
        numbers += three + [value for name, value in scores.items() if name not in {*_TABLES, "iou"}]
    return all(x is None or (isinstance(x, (int, float)) and abs(x) < 1e100) for x in numbers)


# -- YAML --------------------------------------------------------------------------------------------
def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text without aliases, which could stand for any number of values.

    Raises:
        ValueError: it is no YAML, nested too deep, or has aliases.
    """
    if max(map(text.count, "[{")) > 1000:  # nested, PyYAML would look at them for half a minute
        raise ValueError("it is nested too deep, or has over 1000 lists or mappings")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases (*name): write the values out")
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML turns a wrong tag into nearly anything
        raise ValueError(reason(error)) from None


def read_yaml(path: PathLike) -> Any:
    """What a YAML file holds."""
    try:
        return parse_yaml(_text(path, YAML))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {reason(error)}") from None


# -- arrays ------------------------------------------------------------------------------------------
class _Pieces(io.FileIO):
    """A file that is read in pieces of a limited size, whatever size its content claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > PIECE:
            raise zipfile.BadZipFile(f"it claims a part of {size} bytes")
        return super().read(PIECE if size is None or size < 0 else size)


@contextlib.contextmanager
def opened_zip(path: PathLike) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """A zip and the file it is in, open; its list of members takes at most some 50 MiB."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    with _Pieces(path) as file, zipfile.ZipFile(file) as archive:
        yield file, archive


def read_npz(
    path: PathLike, shapes: Mapping[str, str] | None = None, *, budget: int = ARRAYS
) -> dict[str, Any]:
    """The arrays of an ``.npz``.

    Args:
        path: the file.
        shapes: what must be in it, see :func:`check_arrays`.
        budget: bytes that all arrays may take together; no more is ever allocated.
    """
    try:
        with opened_zip(path) as (_, archive):
            members = archive.infolist()
            if (claimed := sum(member.file_size for member in members)) > budget:
                raise ValueError(f"its arrays take {claimed} bytes, more than {budget}")
            arrays = {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
        check_arrays(arrays, shapes or {})
        return arrays
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise nearly anything
        raise ValueError(f"{path} is damaged: {reason(error)}") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    import numpy as np
    from numpy.lib import format as npy

    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may take any memory
        raise ValueError(f"{member.filename} is packed in another way than NumPy packs")
    with archive.open(member) as file:
        header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, by_column, kind = header(file)
        # NumPy's own reader allocates what the header claims before it reads.
        content = bytearray(file.read(member.file_size))
    np.frombuffer(content, kind)  # refuses objects, and elements that take no bytes
    return np.ndarray(shape, kind, content, order="F" if by_column else "C")


def check_arrays(arrays: Mapping[str, Any], shapes: Mapping[str, str]) -> None:
    """Refuse arrays of another kind or shape than they should have.

    Args:
        arrays: by name.
        shapes: by name, kinds as of ``dtype.kind``, then a letter or digit an axis: ``{"norms": "f nP"}``.
            Axes of one letter are equally long; a digit is the length; none is empty. A name with ``?`` may
            lack.

    Raises:
        ValueError: names the first that does not fit.
    """
    lengths = {digit: int(digit) for digit in "123456789"}
    for key, spec in shapes.items():
        name, (kinds, axes) = key.rstrip("?"), spec.split(" ")
        if name not in arrays:
            if key == name:
                raise ValueError(f"it lacks {name}")
            continue
        array = arrays[name]
        fits = array.dtype.kind in kinds and array.ndim == len(axes) and array.size > 0
        if not fits or any(lengths.setdefault(a, n) != n for a, n in zip(axes, array.shape, strict=True)):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {axes!r} of kind {kinds!r}")


def by_epoch(folder: Path) -> dict[int, Path]:
    """Files ``epoch_0001.npz`` and so on of a folder by epoch, in order; other files are passed over."""
    found = {}
    for file in folder.glob("epoch_*.npz"):
        match = re.fullmatch(r"epoch_(0[0-9]{3}|[1-9][0-9]{3,8})\.npz", file.name)
        if match and file.is_file():
            found[int(match[1])] = file
    return dict(sorted(found.items()))
