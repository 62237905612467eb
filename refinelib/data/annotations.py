"""The persons of a COCO instances file, in whatever dress a tool wrote it."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refinelib.data import sources
from refinelib.data.segmentation import whole
from refinelib.data.sources import DataError
from refinelib.files import shown

CROWD = "crowd annotation"
MARKED = "annotation marked to be ignored"
NEW_ID = "annotation whose id is missing, no number, or another's: numbered from -1 downwards"
NO_FIELD = "annotation that lacks a field"
NO_IMAGE = "annotation of an image that is not listed"
NO_CATEGORY = "annotation of a category that is not listed"
NO_ENTRY = "image entry that lacks a field"
CROWD_KEPT = "annotation marked crowd, read as one person"
#: From this share of the persons on, ``crowd: auto`` takes the mark for a tool's habit. COCO has 2 %.
CROWD_SHARE = 0.9
#: Bytes of the largest annotation file that is read; COCO's own largest has half a GB.
MOST_BYTES = 2 << 30

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
        sizes = f"{size / 1e9:.0f} GB, more than {MOST_BYTES / 1e9:.0f} GB"
        raise DataError(f"{file} has {sizes}: leave only persons in it")
    try:
        content = _parsed(file.read_bytes())
    except (OSError, MemoryError) as error:
        raise DataError(f"{file} cannot be read: {str(error) or 'it does not fit into the memory'}") from None
    except (ValueError, RecursionError) as error:
        rule = "it must be one JSON object, not packed; it may be cut short"
        raise DataError(f"{file} is not valid JSON ({error}): {rule}") from None
    parts = ("images", "annotations", "categories")
    content = content if isinstance(content, dict) else {}
    if missing := [part for part in parts if not isinstance(content.get(part), list)]:
        lists = ", ".join(missing)
        raise DataError(f"{file} lacks the list {lists}: a COCO instances file has {', '.join(parts)}")
    return {part: content[part] for part in parts}


def _parsed(text: bytes) -> Any:
    """JSON in UTF-8, 16 or 32, with or without a byte order mark, or in Latin-1."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and "annotations" in found:
            raise ValueError("a list stands in it twice, of which JSON keeps the last")
        return found

    twice = text.count(b'"annotations"') > 1 or text.count(b'"images"') > 1  # else the hook takes its time
    hook = distinct if twice else None
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
        if key is not None and titles[key] != title:
            both = f"{title!r} and {titles[key]!r}"
            raise DataError(f"{name} has two categories of id {key}, {both}: give each an id of its own")
    categories = _numbers((one.get("id") for one in listed), people, "category_id")
    names = {part.strip().casefold() for part in category.split(",")}
    chosen = {key for key, title in called if title in names and key is not None}
    if not chosen:
        known = ", ".join(sorted(shown(one.get("name")) for one in listed)[:10]).replace("'", "") or "none"
        rule = "set category to the one of the persons"
        raise DataError(f"{name} has no category {category!r}; its categories are {known}: {rule}")
    images = _entries(content["images"], name, people)
    found: list[tuple[dict[str, Any], int, bool]] = []
    for number, one in enumerate(content["annotations"]):
        if not isinstance(one, dict):
            people.left_out.append((NO_FIELD, f"entry {number} of the annotations is {shown(one)}", None))
            continue
        image, what = images.get(_key(one.get("image_id"))), f"annotation {shown(one.get('id', number))}"
        kinds = one.get("category_id")
        kinds = [_key(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]
        kind = next((key for key in kinds if key in chosen), None)
        if kind is None and any(key in categories for key in kinds):
            continue  # somebody or something else
        if missing := {"category_id", "image_id"} - set(one):
            people.left_out.append((NO_FIELD, f"{what} lacks {', '.join(sorted(missing))}", image))
        elif kind is None:
            people.left_out.append((NO_CATEGORY, f"{what}, category {shown(one['category_id'])}", image))
        elif image is None:
            people.left_out.append((NO_IMAGE, f"{what}, image {shown(one['image_id'])}", None))
        else:
            is_crowd = _is_set(one.get("iscrowd")) or _is_set(one.get("is_crowd"))
            found.append(({**one, "category_id": categories[kind]}, image, is_crowd))
    _sort(found, people, crowd)
    return people


def _sort(found: list[tuple[dict[str, Any], int, bool]], people: People, crowd: str) -> None:
    """Persons, and regions of which nobody knows who is where."""
    crowds = sum(is_crowd for *_, is_crowd in found)
    keep = crowd == "keep" or (crowd == "auto" and crowds >= CROWD_SHARE * len(found))
    taken, free = set[int](), itertools.count(-1, -1)
    for one, image, is_crowd in found:
        what = f"annotation {shown(one.get('id'))}"
        if _is_set(one.get("ignore")):
            people.left_out.append((MARKED, what, image))
        elif is_crowd and not keep:
            rule = f"one of {crowds} of {len(found)}; set crowd to keep if each is a single person"
            people.left_out.append((CROWD, f"{what}, {rule}", image))
        elif "segmentation" not in one:
            people.left_out.append((NO_FIELD, f"{what} lacks segmentation", image))
        else:
            if is_crowd:
                rule = f"{crowds} of {len(found)} are marked; set crowd to skip if they are regions"
                people.notes.append((CROWD_KEPT, f"{what}: {rule}"))
            one["id"] = whole(one.get("id"))
            if one["id"] is None or one["id"] in taken:
                people.notes.append((NEW_ID, what))
                one["id"] = next(number for number in free if number not in taken)  # results are kept by it
            taken.add(one["id"])
            people.persons.setdefault(image, []).append(one)
            continue
        people.regions.setdefault(image, []).append(one)


def _entries(listed: list[Any], name: str, people: People) -> dict[Any, int]:
    """Numbers of the images by their ids; the entries go to ``people``."""
    usable = []
    for position, entry in enumerate(listed):
        file = _name(entry)
        if file is None or _key(entry.get("id")) is None:
            needs = "an id and a file_name are needed"
            example = f"entry {position} of the images: {needs}, and it is {shown(entry)}"
            people.left_out.append((NO_ENTRY, example, None))
            continue
        sides = (whole(entry.get(side)) or 0 for side in ("height", "width"))
        height, width = (side if 0 < side < 2**31 else None for side in sides)
        size = {"height": height, "width": width} if height and width else {"height": None, "width": None}
        usable.append((entry["id"], {"file_name": file, **size}))
    numbers = _numbers((raw for raw, _ in usable), people, "image_id")
    for raw, entry in usable:
        other = people.images.setdefault(numbers[_key(raw)], entry)
        other |= {side: other[side] or entry[side] for side in ("height", "width")}
        if other != entry | {side: entry[side] or other[side] for side in ("height", "width")}:
            both = " and ".join(sources.printable(one["file_name"]) for one in (other, entry))
            rule = "give each image an id of its own (files put together need new ones)"
            raise DataError(f"{name} has two images of id {shown(raw)}, {both}: {rule}")
    return numbers


def _name(entry: Any) -> str | None:
    """The name of an entry's file; LVIS gives a URL in its place."""
    names = [entry.get(key) for key in ("file_name", "coco_url")] if isinstance(entry, dict) else []
    return next((one for one in names if isinstance(one, str)), None)


def _is_set(mark: Any) -> bool:
    return mark is True or whole(mark) not in (None, 0) or str(mark).strip().lower() in ("true", "yes")


def _key(raw: Any) -> int | str | None:
    """An id in the form in which ids are compared; None: it is none."""
    number = whole(raw)
    large = type(raw) is int and number is None
    return str(raw) if large or (number is None and isinstance(raw, str)) else number


def _numbers(ids: Any, people: People, kind: str) -> dict[Any, int]:
    """A whole number for each id, by its key."""
    written = {key: raw for raw in ids if (key := _key(raw)) is not None}
    taken = {key for key in written if isinstance(key, int)}
    free = (number for number in itertools.count(1) if number not in taken)
    numbers = {key: key if isinstance(key, int) else next(free) for key in written}
    texts = [(numbers[key], raw) for key, raw in written.items() if type(raw) is not float]
    people.as_written[kind] = {number: raw for number, raw in texts if raw != number}
    return numbers
