"""Which file of a folder an annotation file means by a name."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from refinelib.data.sources import MISSING, SceneError

ELSEWHERE = "image outside the image folder, refused without allow_images_outside"
SEVERAL = "image name that fits several files"
Parts = tuple[str, ...]


class ImageFolder:
    """Finds images by the names in an annotation file.

    A name fits a file where one of the two paths, from the last part on, is the end of the other: the name
    ``train2017/1.jpg`` fits ``train2017/1.jpg`` and ``1.jpg`` in the folder, and ``1.jpg`` fits
    ``camera/1.jpg``. The longest common end wins. Backslashes separate parts; of a URL the path counts. Where
    no file fits as written, ``%20``, upper and lower case, and the normal form of Unicode may differ.

    Args:
        folder: of the images.
        allow_outside: take names that are absolute or climb out of the folder with ``..``, too. The author
            of the annotations can then have any picture of this machine read.
    """

    def __init__(self, folder: Path, allow_outside: bool = False) -> None:
        self.folder, self.allow_outside, self._above = folder, allow_outside, folder.absolute().parts

    def find(self, name: str) -> Path:
        """The file that is meant. Only names are looked at: links may lead anywhere.

        Raises:
            SceneError: there is none, there are several, or the name leads out of the folder.
        """
        parts = name_parts(name)
        depths = itertools.accumulate(-1 if part == ".." else 1 for part in parts)
        anchored = "://" not in name and bool(PureWindowsPath(name).anchor)
        outside = anchored or min(depths, default=0) < 0
        if outside and not self.allow_outside:
            rule = "name the file in that folder, or set allow_images_outside to true"
            leads = f"the file_name {name!r} leads out of the image folder {self.folder}"
            raise SceneError(ELSEWHERE, f"{leads}: {rule}")
        file = self.folder / name if anchored else self.folder.joinpath(*parts)
        if outside or os.path.exists(file):
            return file
        fitting = self._fitting(parts)
        if len(fitting) > 1:
            both = " and ".join(str(self.folder.joinpath(*one)) for one in fitting[:2])
            raise SceneError(SEVERAL, f"{name!r} may be {both}: write more of the path into file_name")
        if not fitting:
            raise SceneError(MISSING, f"there is no image file {file}", file)
        return self.folder.joinpath(*fitting[0])

    def _fitting(self, parts: Parts) -> list[Parts]:
        """The files that share the longest end with a name; of these, the whole name, or as written."""
        wanted, ends = tuple(map(plain, parts)), dict[Parts, tuple[int, bool, int]]()
        alike = self._files.get(wanted[-1:], [])
        if len(wanted) > 1:  # then two parts must agree, unless the file lies in the folder itself
            alike = self._files.get(("", *wanted[-1:]), []) + self._files.get(wanted[-2:], [])
        for file in alike:
            path = (*self._above, *file)
            end = common_end(tuple(map(plain, path)), wanted)
            if end >= min(len(file), len(wanted)):
                ends[file] = end, len(file) == len(wanted), common_end(path, parts)
        return [file for file, end in ends.items() if end == max(ends.values())]

    @cached_property
    def _files(self) -> dict[Parts, list[Parts]]:
        """Files in the folder, as parts of their paths in it, by the plain form of the last one and two."""
        found: dict[Parts, list[Parts]] = {}
        for file in files_in(self.folder):
            parts = file.relative_to(self.folder).parts
            for end in (parts[-1:], parts[-2:] if len(parts) > 1 else ("", *parts)):
                found.setdefault(tuple(map(plain, end)), []).append(parts)
        return found


def files_in(folder: Path) -> Iterator[Path]:
    """Files and folders in a folder and the folders in it, links followed; not what tools leave there.

    Left out are hidden files and folders, leftovers (:func:`is_leftover`), and runs and stores of this
    package, which may lie among the data.

    Example:
        >>> [*files_in(Path("nowhere"))]
        []
    """
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        if {"store.json", "images.u8"} <= {*names} or {"status.json", "config.json"} <= {*names}:
            folders.clear()
            continue
        new: dict[str, str] = {}
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(place, name)), name)):
            if not name.startswith(".") and (real := os.path.realpath(os.path.join(place, name))) not in seen:
                new.setdefault(real, name)
        folders[:] = new.values()
        seen.update(new)
        yield from (Path(place, name) for name in sorted(names + folders) if not is_leftover(name))


def is_leftover(name: str) -> bool:
    """Whether a file's name is one that macOS or Windows leaves beside people's files.

    Example:
        >>> is_leftover("._1.png"), is_leftover("Thumbs.db"), is_leftover("1.png")
        (True, True, False)
    """
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def name_parts(name: str) -> Parts:
    r"""The parts of a path or URL, separated by ``/`` or a backslash.

    Example:
        >>> name_parts("http://host/val/1.jpg?x=2"), name_parts("val\\\\1.jpg")
        (('val', '1.jpg'), ('val', '1.jpg'))
    """
    if "://" in name:
        path = name.partition("://")[2].partition("/")[2]
        name = unquote(path.partition("?")[0].partition("#")[0]).lstrip("/")
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def plain(part: str) -> str:
    """A part of a path in the form in which it is compared where nothing fits as written.

    Example:
        >>> plain("My%20Image.JPG")
        'my image.jpg'
    """
    return unicodedata.normalize("NFC", unquote(part)).casefold()


def plain_parts(name: str) -> Parts:
    """The parts of a path or URL in the form in which they are compared.

    Example:
        >>> plain_parts("Val/My%20Image.JPG")
        ('val', 'my image.jpg')
    """
    return tuple(map(plain, name_parts(name)))


def common_end(a: Parts, b: Parts) -> int:
    """How many parts two paths share, from the last one on.

    Example:
        >>> common_end(("cam1", "x.png"), ("cam2", "x.png"))
        1
    """
    return len(os.path.commonprefix([a[::-1], b[::-1]]))
