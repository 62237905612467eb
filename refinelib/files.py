"""Files beside a checkpoint: written in one step, and read within a stated memory whatever they hold.

For content that is damaged every reader raises ValueError, in a sentence that names the file; for a file that
cannot be opened OSError. Nothing of the package is imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping

import yaml

#: Largest file that is read, by format; the worst content takes 30 times that in memory, in YAML 1000 times.
JSON, YAML = 4 << 20, 64 << 10
#: Largest line of a records file, and largest piece that is read of a zip at once: its list of members, say.
LINE, PIECE = 1 << 20, 4 << 20
#: Bytes that the arrays of an .npz may take together.
ARRAYS = 256 << 20
#: Values in a YAML text, where each alias counts as what it stands for.
VALUES = 100_000


# -- writing ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, which takes the place of ``path`` once it is whole and on disk.

    A reader, or a crash, finds the old content or the new one, never half.

    Args:
        path: to replace; its folder is there.
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text)


# -- what a sentence shows ---------------------------------------------------------------------------
def shown(value: Any, length: int = 80) -> str:
    """A value as a sentence shows it: its ``repr``, cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes; lists in lists in lists
        return f"a huge {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def reason(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line, cut."""
    if getattr(error, "problem_mark", None) is not None:  # PyYAML's own text is five lines
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    text = " ".join(str(error)[: 10 * length].split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."


# -- text ------------------------------------------------------------------------------------------
def read_json(path: str | os.PathLike, *, limit: int = JSON) -> Any:
    """What a JSON file holds.

    Args:
        limit: bytes; a longer file is refused.
    """
    try:
        return parse_json(_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from None


def parse_json(text: str | bytes) -> Any:
    """Strict JSON, of numbers that a float holds.

    Raises:
        ValueError, RecursionError: it is something else.
    """
    return json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_refuse)


def read_lines(path: Path, fits: Callable[[dict], bool] = bool) -> tuple[list[dict[str, Any]], list[int]]:
    """Objects of a JSON-lines file that may still be growing, and the numbers of the lines that hold none.

    Args:
        fits: whether an object is what the file should hold; any that is not empty, if not given.

    A last line without an end is still being written: where it is no object yet, it is not counted.
    """
    records, damaged, number, begun = [], [], 0, False
    if not path.is_file():
        return records, damaged
    with open(path, "rb") as file:
        while piece := file.readline(LINE):
            rest, begun = begun, not piece.endswith(b"\n")
            if rest:  # of a line that is too long, and counted
                continue
            number += 1
            try:
                record = parse_json(piece.decode())
                if not (isinstance(record, dict) and fits(record)):
                    raise ValueError
                records.append(record)
            except (ValueError, RecursionError):
                if not begun or len(piece) == LINE:
                    damaged.append(number)
    return records, damaged


def read_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file holds."""
    try:
        return parse_yaml(_text(path, YAML))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {reason(error)}") from None


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: it is no YAML, too long or too deep, or its aliases repeat more than ``VALUES`` values.
    """
    if len(text) > YAML:
        raise ValueError(f"it has {len(text)} characters, more than {YAML}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # Aliases and merge keys of aliases double with every line: counted before any value is made.
        if node is not None and _expanded(node, {}) > VALUES:
            raise ValueError(f"its aliases repeat more than {VALUES} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # PyYAML turns a wrong tag into nearly anything
        raise ValueError(reason(error)) from None


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Values under a node, each alias counted as what it stands for; without end where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        if isinstance(node, yaml.ScalarNode):
            children = []
            if node.tag.endswith((":int", ":float")) and len(node.value) > 100:
                raise ValueError(f"it has a number of {len(node.value)} characters")
        else:
            children = [one for item in node.value for one in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def _text(path: str | os.PathLike, limit: int) -> str:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(f"there is no file {path}")
    if (size := os.path.getsize(path)) > limit:
        raise ValueError(f"it has {size} bytes, more than {limit}")
    return Path(path).read_bytes().decode("utf-8")


def _whole(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _real(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError("it has a number that no float holds")
    return value


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


# -- arrays ------------------------------------------------------------------------------------------
class _Pieces(io.FileIO):
    """A file that is read in pieces of a limited size, whatever size its content claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > PIECE:
            raise zipfile.BadZipFile(f"it claims a part of {size} bytes")
        return super().read(PIECE if size is None or size < 0 else size)


@contextlib.contextmanager
def opened_zip(path: str | os.PathLike) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """A zip and the file it is in, open; its list of members takes at most some 50 MiB."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    with _Pieces(path) as file, zipfile.ZipFile(file) as archive:
        yield file, archive


def read_npz(
    path: str | os.PathLike, shapes: Mapping[str, str] | None = None, *, budget: int = ARRAYS
) -> dict[str, Any]:
    """The arrays of an ``.npz``.

    Args:
        shapes: what must be in it, see :func:`check_arrays`.
        budget: bytes that all arrays may take together; no more is ever asked for.
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


def check_arrays(arrays: Mapping[str, Any], shapes: Mapping[str, str]) -> None:
    """Refuse arrays of another kind or shape than they should have.

    Args:
        shapes: by name, kinds as of ``dtype.kind``, then a letter or digit an axis: ``{"norms": "f nP"}``. Axes
            of one letter are equally long; a digit is the length; none is empty. A name with ``?`` may lack.

    Raises:
        ValueError: names the first that does not fit.
    """
    lengths = {digit: int(digit) for digit in "123456789"}
    for key, spec in shapes.items():
        name, (kinds, axes) = key.rstrip("?"), spec.split(" ")
        if name not in arrays and key != name:
            continue
        if name not in arrays:
            raise ValueError(f"it lacks {name}")
        array = arrays[name]
        fits = array.dtype.kind in kinds and array.ndim == len(axes) and array.size > 0
        if not fits or any(lengths.setdefault(axis, n) != n for axis, n in zip(axes, array.shape)):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {axes!r} of kind {kinds!r}")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    from numpy.lib import format as npy  # settings are read before NumPy is

    # The other ways to pack take as much memory as they like.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in another way than NumPy packs")
    with archive.open(member) as file:
        header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = header(file)
    # NumPy makes room for what the header claims before it reads.
    if kind.hasobject or math.prod(shape) * max(1, kind.itemsize) > member.file_size:
        raise ValueError(f"{member.filename} claims {list(shape)} of {kind} in {member.file_size} bytes")
    with archive.open(member) as file:
        return npy.read_array(file, allow_pickle=False)


def by_epoch(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """``epoch_0001.npz`` and so on of a folder by epoch, in order; and names of what only begins so."""
    found, others = {}, []
    for file in folder.glob("epoch_*.npz"):
        match = re.fullmatch(r"epoch_([0-9]{4,9})\.npz", file.name)
        if match and file.is_file() and file.name == f"epoch_{int(match[1]):04d}.npz":
            found[int(match[1])] = file
        else:
            others.append(file.name)
    return dict(sorted(found.items())), sorted(others)
