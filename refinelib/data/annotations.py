"""The persons of a COCO instances file, in whatever dress a tool wrote it."""

import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refinelib.data.sources import DataError, Mask
from refinelib.files import shown

CROWD = "crowd annotation"
MARKED = "annotation marked to be ignored"
NEW_ID = "annotation whose id is missing, no number, or another's: numbered from -1 downwards"
NO_ANNOTATION = "entry of the annotations that is no object"
NO_IMAGE = "annotation of an image that is not listed"
NO_CATEGORY = "annotation of a category that is not listed"
NO_ENTRY = "image entry that lacks a field"
CROWD_KEPT = "annotation marked crowd, read as one person"
#: From this share of the persons on, ``crowd: auto`` takes the mark for a tool's habit. COCO has 2 %.
CROWD_SHARE = 0.9
#: Bytes of the largest annotation file that is read; COCO's own largest has half a GB.
MOST_BYTES = 2 << 30
#: Pixels along the outlines of one person's polygons, at most: pycocotools takes up to 200 bytes for each.
MOST_OUTLINE = 1 << 20
#: Pixels of the largest image of which a mask is decoded.
MOST_PIXELS = 1 << 28
_WHOLE = re.compile(r"(0|-?[1-9][0-9]{0,18})(\.0{1,9})?")

Content = dict[str, list[Any]]


@dataclass
class People:
    """The persons in the images of an annotation file.

    Images and categories have whole numbers: their ids, where these are whole numbers in any dress, else
    numbers of their own.

    Attributes:
        images: entries by number, with ``file_name``, ``height`` and ``width`` (pixels; None: not given).
        persons: annotations by the image's number, with ``id``, ``category_id``, ``bbox``, ``segmentation``,
            ``area`` as the file has them, but for the ids.
        regions: likewise crowds and persons without a mask, for which pixels are ignored.
        left_out: reason, example and image (None: not known) of each annotation and entry that is not used.
        notes: what was found unusual, and an example.
        as_written: by ``image_id`` and ``category_id``, ids by number, where these differ.
    """

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    persons: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    regions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: list[tuple[str, str, int | None]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    as_written: dict[str, dict[int, Any]] = field(default_factory=dict)


def read_annotations(file: Path) -> Content:
    """The content of a COCO instances file, with its three lists.

    Raises:
        DataError: it cannot be read, is no JSON, takes too much memory, or lacks a list.
    """
    size = os.path.getsize(file) if os.path.isfile(file) else 0
    if os.path.exists(file) and not os.path.isfile(file):  # reading a FIFO would wait for its writer
        raise DataError(f"{file} is no regular file: give an annotation file in JSON")
    if size > MOST_BYTES:
        raise DataError(f"{file} has {size >> 30} GB, more than {MOST_BYTES >> 30} GB: leave only persons")
    try:
        content = _parsed(file.read_bytes())
    except (OSError, MemoryError) as error:
        raise DataError(f"{file} cannot be read: {str(error) or 'it does not fit into the memory'}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error}): it may be packed or cut short") from None
    parts = ("images", "annotations", "categories")
    content = content if isinstance(content, dict) else {}
    if missing := [part for part in parts if not isinstance(content.get(part), list)]:
        raise DataError(f"{file} lacks the list {', '.join(missing)}: COCO's have {', '.join(parts)}")
    return {part: content[part] for part in parts}


def _parsed(text: bytes) -> Any:
    """JSON in UTF-8, 16 or 32, with or without a byte order mark, or in Latin-1."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and "annotations" in found:
            raise ValueError("a list stands in it twice, of which JSON keeps the last")
        return found

    # The hook takes its time.
    hook = distinct if text.count(b'"annotations"') > 1 or text.count(b'"images"') > 1 else None
    try:
        return json.loads(text, object_pairs_hook=hook)
    except UnicodeDecodeError:
        return json.loads(text.decode("latin-1"), object_pairs_hook=hook)


def read_people(content: Content, name: str, *, category: str = "person", crowd: str = "auto") -> People:
    """The persons of a file's content.

    Args:
        content: as :func:`read_annotations` gives it; ``left_out`` is taken over.
        name: of the file, for messages.
        category: names of the categories of persons, separated by commas, in any case.
        crowd: what ``iscrowd: 1`` means: ``skip``: a region of several people, no person; ``keep``: nothing;
            ``auto``: nothing, where 90 % of the persons or more have it, as some tools write them.

    Raises:
        DataError: no category has that name; two images have one id.

    Example:
        >>> polygon = {"image_id": 7.0, "category_id": "1", "segmentation": [1, 1, 9, 1, 9, 9]}
        >>> content = {"images": [{"id": "7", "file_name": "a.png"}], "annotations": [polygon]}
        >>> content["categories"] = [{"id": 1, "name": "person"}]
        >>> people = read_people(content, "people.json")
        >>> len(people.persons[7]), people.as_written["image_id"]
        (1, {7: '7'})
    """
    people = People(left_out=[*content.get("left_out", [])])
    if crowd not in ("auto", "skip", "keep"):
        raise DataError(f"crowd = {crowd!r}: give auto, skip or keep")
    listed = [one for one in content["categories"] if isinstance(one, dict)]
    called = [(_key(one.get("id")), str(one.get("name")).strip().casefold()) for one in listed]
    titles = dict(called)
    for key, title in called:
        if key is not None and (other := titles[key]) != title:
            raise DataError(f"{name}: two categories of id {key}, {title!r} and {other!r}: give each an id")
    categories = _numbers((one.get("id") for one in listed), people, "category_id")
    names = {part.strip().casefold() for part in category.split(",")}
    chosen = {key for key, title in called if title in names and key is not None}
    if not chosen:
        known = ", ".join(sorted(shown(one.get("name")) for one in listed)[:10]).replace("'", "") or "none"
        raise DataError(f"{name}: no category {category!r}; its categories are {known}: set category to one")
    images = _entries(content["images"], name, people)
    found: list[tuple[dict[str, Any], int]] = []
    for number, one in enumerate(content["annotations"]):
        if not isinstance(one, dict):
            what = f"entry {number} of the annotations is {shown(one)}"
            people.left_out.append((NO_ANNOTATION, what, None))
            continue
        image, what = images.get(_key(one.get("image_id"))), f"annotation {shown(one.get('id', number))}"
        category_id = one.get("category_id")
        kinds = [_key(kind) for kind in (category_id if isinstance(category_id, list) else [category_id])]
        kind = next((key for key in kinds if key in chosen), None)
        if kind is None and any(key in categories for key in kinds):
            continue  # somebody or something else
        if kind is None:
            people.left_out.append((NO_CATEGORY, f"{what}, category {shown(category_id)}", image))
        elif image is None:
            people.left_out.append((NO_IMAGE, f"{what}, image {shown(one.get('image_id'))}", None))
        else:
            is_crowd = _is_set(one.get("iscrowd")) or _is_set(one.get("is_crowd"))
            found.append(({**one, "category_id": categories[kind], "iscrowd": is_crowd}, image))
    _sort(found, people, crowd)
    return people


def _sort(found: list[tuple[dict[str, Any], int]], people: People, crowd: str) -> None:
    """Persons, and regions of which nobody knows who is where."""
    crowds = sum(one["iscrowd"] for one, _ in found)
    keep = crowd == "keep" or (crowd == "auto" and crowds >= CROWD_SHARE * len(found))
    taken, free = set[int](), itertools.count(-1, -1)
    for one, image in found:
        what = f"annotation {shown(one.get('id'))}"
        marked = f"{what}, one of {crowds} of {len(found)}; set crowd to"
        ignored = _is_set(one.get("ignore"))
        if ignored or (one["iscrowd"] and not keep):
            crowded = (CROWD, f"{marked} keep if each is a single person", image)
            people.left_out.append((MARKED, what, image) if ignored else crowded)
            people.regions.setdefault(image, []).append(one)
            continue
        if one["iscrowd"]:
            people.notes.append((CROWD_KEPT, f"{marked} skip if they are regions"))
        one["id"] = whole(one.get("id"))
        if one["id"] is None or one["id"] in taken:
            people.notes.append((NEW_ID, what))
            one["id"] = next(number for number in free if number not in taken)  # results are kept by it
        taken.add(one["id"])
        people.persons.setdefault(image, []).append(one)


def _entries(listed: list[Any], name: str, people: People) -> dict[Any, int]:
    """Numbers of the images by their ids; the entries go to ``people``."""
    numbers = _numbers((one.get("id") for one in listed if isinstance(one, dict)), people, "image_id")
    for position, entry in enumerate(listed):
        file = _name(entry)
        number = None if file is None else numbers.get(_key(entry.get("id")))
        if number is None:
            example = f"entry {position} of the images, {shown(entry)}: an id and a file_name are needed"
            people.left_out.append((NO_ENTRY, example, None))
            continue
        sides = (whole(entry.get(side)) or 0 for side in ("height", "width"))
        height, width = (side if 0 < side < 2**31 else None for side in sides)
        size = {"height": height, "width": width} if height and width else {"height": None, "width": None}
        found = {"file_name": file, **size}
        if (other := people.images.setdefault(number, found)) != found:
            both = f"{other['file_name']} and {file}: give each image an id of its own"
            raise DataError(f"{name} has two images of id {shown(entry['id'])}, {both}")
    return {key: number for key, number in numbers.items() if number in people.images}


def _name(entry: Any) -> str | None:
    """The name of an entry's file; LVIS gives a URL in its place."""
    names = [entry.get(key) for key in ("file_name", "coco_url")] if isinstance(entry, dict) else []
    return next((one for one in names if isinstance(one, str)), None)


def _is_set(mark: Any) -> bool:
    return mark is True or whole(mark) not in (None, 0) or str(mark).strip().lower() in ("true", "yes")


def _key(raw: Any) -> int | str | None:
    """An id in the form in which ids are compared; None: it is none."""
    number = whole(raw)
    return raw if number is None and isinstance(raw, str) else number


def _numbers(ids: Any, people: People, kind: str) -> dict[Any, int]:
    """A whole number for each id, by its key."""
    written = {key: raw for raw in ids if (key := _key(raw)) is not None}
    taken = {key for key in written if isinstance(key, int)}
    free = (number for number in itertools.count(1) if number not in taken)
    numbers = {key: key if isinstance(key, int) else next(free) for key in written}
    people.as_written[kind] = {numbers[key]: raw for key, raw in written.items() if raw != numbers[key]}
    return numbers


# -- masks ----------------------------------------------------------------------------------------------
def whole(value: Any) -> int | None:
    """A whole number of under 64 bits in any dress (``1``, ``1.0``, ``"1"``); None: it is none.

    Texts that number things in another way (``"007"``, ``"1_2"``, ``"1e2"``) are none.

    Example:
        >>> whole("7"), whole(7.0), whole("7.5"), whole(True), whole("007")
        (7, 7, None, None, None)
    """
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value.partition(".")[0])
    number = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if number and abs(value) < 2**63 else None


def usable(segmentation: Any, height: int, width: int) -> tuple[Any, list[Any]]:
    """What of a segmentation may hold a mask, at a glance, and its polygons that may not.

    Whether they cover anything shows when they are decoded. A polygon is left out that has an odd length or
    under three points, or a corner that is not finite or far outside the image.

    Args:
        segmentation: a polygon ``[x, y, x, y, ...]`` or ``[[x, y], ...]``, a list of such, or run lengths.
        height: of the image, pixels.
        width: likewise.

    Returns:
        a list of polygons of six numbers or more, or run lengths of this image's size, or None.

    Example:
        >>> usable([0, 0, 9, 0, 9, 9], 10, 10)
        ([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]], [])
        >>> usable([[[0, 0], [9, 0], [9, 9]], [5, 5, 6]], 10, 10)
        ([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]], [[5, 5, 6]])
    """
    if isinstance(segmentation, list):
        lengths = {len(part) if isinstance(part, list) else None for part in segmentation}
        points = len(segmentation) > 2 and lengths == {2}
        one = points or not any(isinstance(part, (list, dict)) for part in segmentation)
        parts, reach = [segmentation] if one and segmentation else segmentation, 2 * max(height, width)
        found = [_polygon(part, reach) for part in parts]
        bad = [part for part, polygon in zip(parts, found, strict=True) if polygon is None]
        return [polygon for polygon in found if polygon] or None, bad
    run_lengths = segmentation if isinstance(segmentation, dict) else {}
    sides, counts = run_lengths.get("size"), run_lengths.get("counts")
    if isinstance(counts, list) and {*map(type, counts)} != {int}:
        counts = [whole(count) for count in counts]
    same_size = isinstance(sides, list) and [*map(whole, sides)] == [height, width]
    given = isinstance(counts, str) or (isinstance(counts, list) and None not in counts)
    return {"size": [height, width], "counts": counts} if same_size and counts and given else None, []


def _polygon(part: Any, reach: float) -> list[float] | None:
    """A polygon as a plain list of numbers; None: it is none, or one that pycocotools cannot draw."""
    try:
        corners = np.array(part, np.float64)
    except (TypeError, ValueError, OverflowError):  # uneven rows, words, numbers beyond any
        return None
    if not (corners.ndim == 1 or corners.shape[1:] == (2,)) or corners.size < 6 or corners.size % 2:
        return None
    near = -reach <= corners.min() and corners.max() <= 2 * reach  # neither with nan
    return corners.ravel().tolist() if near else None


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask | None:
    """A COCO segmentation (polygons, RLE, compressed RLE) as bool ``[height, width]``; None: no mask in it.

    pycocotools draws the polygons, unless they have millions of pixels of outline. Run lengths are checked
    and decoded here: pycocotools does not check them, and damaged ones make it read uninitialised memory or
    end the process.

    Example:
        >>> decode_segmentation({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2).tolist()
        [[False, True], [True, False]]
    """
    segmentation, _ = usable(segmentation, height, width)
    if height * width > MOST_PIXELS:
        return None
    if isinstance(segmentation, list):
        if _outline(segmentation) > MOST_OUTLINE:
            return None
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        segmentation["counts"] = segmentation["counts"].decode()
    counts = segmentation and segmentation["counts"]
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if counts is None or min(counts) < 0 or sum(counts) != height * width:
        return None
    # Column by column, beginning with background.
    mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    return mask if mask.any() else None


def _outline(polygons: list[list[float]]) -> float:
    """Pixels along all edges, at least one an edge; the number of edges, where that is too many already."""
    points = sum(map(len, polygons)) / 2
    if points > MOST_OUTLINE:
        return points
    closed = (np.reshape([*one, *one[:2]], (-1, 2)) for one in polygons)
    return float(sum(np.abs(np.diff(corners, axis=0)).max(1).clip(1).sum() for corners in closed))


def _decompressed(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form: 5 bits a character, the lowest first, and a flag for more.

    From the fourth on, a number is the difference from the one two places before it (cocoapi,
    ``common/maskApi.c``, ``rleFrString``).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of this number; its highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return None if shift else counts
