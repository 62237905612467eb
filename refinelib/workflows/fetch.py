"""Fetch a data set from its authors' server: resumable, verified, unpacked.

A file that is not whole has the name ``.NAME.part``. The same command continues it, and does nothing where
everything is there.
"""

import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from refinelib.files import file_digest, reason, write_atomically

PENNFUDAN, COCO = "https://www.cis.upenn.edu/~jshi/ped_html", "http://images.cocodataset.org"
PENNFUDAN_ZIP, COCO_ZIP = "PennFudanPed.zip", "annotations/annotations_trainval2017.zip"
#: The MD5 that COCO's server gives for the annotations. Penn-Fudan publishes none: its zip's own CRCs count.
COCO_MD5 = "f4bbac642086de4f52a3fdda2de5fa2c"
#: Images in Penn-Fudan, each with a mask.
PENNFUDAN_IMAGES = 170
#: Attempts that bring no byte before a server is given up; seconds between them, and until one is broken off.
ATTEMPTS, PAUSE, TIMEOUT = 4, 2.0, 30.0
#: Bytes read at a time, and images fetched at a time.
PIECE, AT_ONCE = 1 << 18, 8
AGAIN = "the same command continues"
Entry = dict[str, Any]


class FetchError(RuntimeError):
    """The server cannot be reached, or the disk not be written to; the message says what is kept."""


class FileError(FetchError):
    """One file is not there or damaged; others may be whole."""


# -- one file ------------------------------------------------------------------------------------------
def download(url: str, file: Path, *, check: Callable[[Path], str], progress: bool = False) -> None:
    """Fetch a file, unless it is there; go on from what an interrupted call left.

    Args:
        url: of the file.
        file: to write; it has its name only once it is whole and checked.
        check: what is wrong with the whole file, in words; nothing: ``""``.
        progress: show a bar.

    Raises:
        FileError: the server refuses this file, or ``check`` found something; what was fetched is deleted.
        FetchError: the server cannot be reached, or breaks off again and again; what was fetched is kept.
    """
    if file.is_file():
        return
    part, attempts = file.with_name(f".{file.name}.part"), 0
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        before = _size(part)
        try:
            _go_on(url, part, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)  # of the server's answer
            if code == 416:  # nothing comes after what is there: the check says whether it is whole
                break
            if code < 500 and code != 429:
                raise FileError(f"{url}: the server refuses it ({reason(error)})") from None
            attempts = 0 if _size(part) > before else attempts + 1
            if attempts >= ATTEMPTS:
                kept = f"{_size(part)} bytes of it are kept, and {AGAIN}"
                inner = getattr(error, "reason", None)  # urllib wraps what happened
                why = reason(inner if isinstance(inner, OSError) else error)
                raise FetchError(f"{url} cannot be fetched ({why}): {kept}") from None
            time.sleep(PAUSE)
    if wrong := check(part):
        part.unlink()
        raise FileError(f"{url} came damaged, {wrong}: it was deleted, and the same command fetches it again")
    os.replace(part, file)


def _go_on(url: str, part: Path, progress: bool) -> None:
    """Append what is missing, or begin again where the server cannot go on from a place.

    Raises:
        OSError, http.client.HTTPException: it broke off.
    """
    have = _size(part)
    headers = {"User-Agent": "refinelib"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
        start = int(begins[1]) if answer.status == 206 and begins else 0
        if start not in (0, have):
            raise ConnectionError("the server sends another part than the one asked for")
        length = getattr(answer, "length", None)  # what is left to read, where the server says it
        how = {"total": length and start + length, "initial": start, "desc": part.name[1:-5]}
        with (
            open(part, "ab" if start else "wb") as out,
            tqdm.wrapattr(out, "write", **how, disable=not progress) as counted,
        ):
            shutil.copyfileobj(answer, counted, PIECE)
        if missing := getattr(answer, "length", None):
            total = _size(part) + missing
            raise ConnectionError(f"the connection broke off at {_size(part)} of {total} bytes")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _wrong_md5(part: Path) -> str:
    found = file_digest(part, "md5")
    return "" if found == COCO_MD5 else f"its MD5 is {found} and should be {COCO_MD5}"


def _wrong_zip(part: Path) -> str:
    """What is wrong with a zip, by the CRC of each of its members."""
    try:
        with zipfile.ZipFile(part) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        return f"it is no whole zip ({reason(error)})"
    return f"the CRC of {bad} in it is wrong" if bad else ""


# -- the data sets -------------------------------------------------------------------------------------
def pennfudan(folder: Path, *, mirror: str = PENNFUDAN, progress: bool = False) -> str:
    """Fetch Penn-Fudan's pedestrians into ``folder/PennFudanPed``.

    Args:
        folder: made if needed.
        mirror: address of the folder that holds the zip.
        progress: show a bar.

    Returns:
        What is there now, in a few lines.

    Raises:
        FetchError: see :func:`download`; or the zip holds another set.
    """
    place, archive = folder / "PennFudanPed", folder / PENNFUDAN_ZIP
    lines = [f"{PENNFUDAN_IMAGES} images with masks are in {place}"]
    lines += [f"train on them with -p data pennfudan -p data_dir {place}"]
    if _pairs(place.glob("*/*")) < PENNFUDAN_IMAGES:
        download(f"{mirror}/{PENNFUDAN_ZIP}", archive, check=_wrong_zip, progress=progress)
        digest = file_digest(archive)
        lines.insert(0, f"SHA-256 of {PENNFUDAN_ZIP}: {digest} (none is published; its CRCs are right)")
        with zipfile.ZipFile(archive) as content:
            names = [name for name in content.namelist() if name.startswith(f"{place.name}/")]
            if (found := _pairs(map(Path, names))) != PENNFUDAN_IMAGES:
                what = f"{archive} holds {found} images with masks, not {PENNFUDAN_IMAGES}"
                raise FetchError(f"{what}: it is not Penn-Fudan's: delete it, and give another mirror")
            content.extractall(folder, names)
        archive.unlink()
    return "\n".join(lines)


def _pairs(files: Iterable[Path]) -> int:
    """Images of Penn-Fudan's layout that have a mask."""
    known = {(file.parent.name, file.name) for file in files}
    images = [name.removesuffix(".png") for folder, name in known if folder == "PNGImages"]
    return sum(("PedMasks", f"{name}_mask.png") in known for name in images)


def coco_person(
    folder: Path,
    split: str = "val",
    *,
    max_images: int | None = None,
    mirror: str = COCO,
    progress: bool = False,
) -> str:
    """Fetch the images of COCO 2017 that show people, one by one, and an annotation file of these people.

    Args:
        folder: made if needed; it gets COCO's layout.
        split: ``val`` or ``train``.
        max_images: only the first so many images, by their ids.
        mirror: address that stands for COCO's server.
        progress: show bars.

    Returns:
        What is there now, in a few lines.

    Raises:
        FetchError: see :func:`download`; or some images could not be fetched, the others are kept.
        ValueError: ``max_images`` is below 1.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images = {max_images}: give at least 1, or leave it out for all")
    archive, places = folder / Path(COCO_ZIP).name, folder / "images" / f"{split}2017"
    download(f"{mirror}/{COCO_ZIP}", archive, check=_wrong_md5, progress=progress)
    content = people_of(_annotations(archive, f"annotations/instances_{split}2017.json"), max_images)
    images = {places / Path(one["file_name"]).name: one for one in content["images"]}
    missing = [file for file in images if not file.is_file()]
    print(f"{len(images) - len(missing)} of {len(images)} images with people are there", flush=True)
    lost = _fetch_all(missing, images, mirror, progress)
    kept = [one for file, one in images.items() if file.is_file()]
    ids = {one["id"] for one in kept}
    annotations = [one for one in content["annotations"] if one["image_id"] in ids]
    target = folder / "annotations" / f"instances_{split}2017_person.json"
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, json.dumps({**content, "images": kept, "annotations": annotations}))
    told = f"{len(kept)} images, {len(annotations)} annotations of people: {target}"
    if lost:
        first = f"{len(lost)} of {len(images)} images could not be fetched, the first: {lost[0]}"
        raise FetchError(f"{first}. {told}; {AGAIN}")
    return f"{told}\nuse them with -p data coco -p data_dir {folder}"


def people_of(content: Entry, max_images: int | None = None) -> Entry:
    """The part of a COCO instances file that is about people.

    Args:
        content: of the file.
        max_images: only the first so many images, by their ids.

    Returns:
        Images that show at least one person who is no crowd, and all annotations of persons in them.

    Example:
        >>> one = {"image_id": 7, "category_id": 1, "iscrowd": 0}
        >>> content = {"images": [{"id": 8}, {"id": 7}], "categories": [{"id": 1, "name": "person"}]}
        >>> people_of({**content, "annotations": [one, {**one, "category_id": 2}, {**one, "image_id": 8,
        ...     "iscrowd": 1}]}) == {**content, "images": [{"id": 7}], "annotations": [one]}
        True
    """
    categories = [one for one in content["categories"] if one["name"] == "person"]
    kinds = {one["id"] for one in categories}
    people = [one for one in content["annotations"] if one["category_id"] in kinds]
    shown = Counter(one["image_id"] for one in people if not one["iscrowd"])
    images = sorted((one for one in content["images"] if one["id"] in shown), key=lambda one: one["id"])
    ids = {one["id"] for one in images[:max_images]}
    people = [one for one in people if one["image_id"] in ids]
    return {**content, "images": images[:max_images], "annotations": people, "categories": categories}


def _annotations(archive: Path, member: str) -> Entry:
    try:
        with zipfile.ZipFile(archive) as content:
            return dict(json.loads(content.read(member)))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise FetchError(f"{archive} is damaged ({reason(error)}): delete it, and {AGAIN}") from None


def _fetch_all(files: list[Path], images: dict[Path, Entry], mirror: str, progress: bool) -> list[FileError]:
    """Fetch images side by side; gives what is wrong with those that could not be fetched."""
    lost = list[FileError]()

    def fetch(file: Path) -> None:
        entry = images[file]
        size, url = (entry["width"], entry["height"]), mirror + urlsplit(entry["coco_url"]).path
        try:
            download(url, file, check=lambda part: _wrong_image(part, size))
        except FileError as error:
            lost.append(error)

    pool, there = ThreadPoolExecutor(AT_ONCE), len(images) - len(files)
    try:
        futures = [pool.submit(fetch, file) for file in files]
        ended = as_completed(futures)
        for future in tqdm(ended, "images", len(images), initial=there, disable=not progress):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, or where the server is gone
    return lost


def _wrong_image(part: Path, size: tuple[int, int]) -> str:
    try:
        with Image.open(part) as image:
            image.load()
            return "" if image.size == size else f"it has {image.size[0]} x {image.size[1]} pixels"
    except (OSError, ValueError, SyntaxError) as error:
        return f"it is no whole image ({reason(error)})"
