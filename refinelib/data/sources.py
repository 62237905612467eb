"""What a source of persons gives: an index of ROIs, and images with masks.

A source lists its ROIs before any image is decoded (``instances``), and decodes one image with the mask of
every person at a time (``scene``).
"""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from refinelib.files import PathLike

Mask = NDArray[np.bool_]
#: Kind, such as ``TURNED``, and example.
Note = tuple[str, str]

#: A person whose box has a side under this many pixels is no ROI, but still a non-target for the others.
MIN_SIDE = 16
#: The largest so many persons of an image are ROIs.
MAX_INSTANCES = 10
#: Bytes of decoded masks that a scene keeps.
MASK_BYTES = 256 << 20
#: Pixels of an image that are converted to RGB at a time.
_BAND = 1 << 24
#: EXIF tag of the orientation: 1 is upright, 2 to 4 are mirrored or half turned, 5 to 8 a quarter.
_ORIENTATION = 0x0112

NO_AREA = "box of no area"
OUTSIDE = "box outside the image"
SMALL = f"box with a side under {MIN_SIDE} px"
CROWDED = f"person beyond the {MAX_INSTANCES} largest of an image"
NO_MASK = "annotation without mask"
MISSING = "missing image"
UNREADABLE = "unreadable image"
OTHER_SIZE = "image of another size than its annotation"
TURNED = "image turned upright by its EXIF orientation, since only so it has the size of its annotation"
TWICE = "image file that two entries name"
NOT_TURNED = "image whose EXIF orientation was not applied"


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong, where, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 3000))


class SceneError(DataError):
    """One image cannot be used; a build counts it and goes on.

    Args:
        reason: under which it is counted, such as ``MISSING``.
        message: what is wrong with it.
        file: the file at fault, where another file of that name would help.
    """

    def __init__(self, reason: str, message: str, file: Path | None = None) -> None:
        super().__init__(printable(message))
        self.reason, self.file = reason, file


def printable(text: object, limit: int = 1000) -> str:
    r"""Text for any terminal and file: other characters as escapes, without the middle of a long one.

    Example:
        >>> printable("a\0b"), printable("x" * 99, limit=4)
        ('a\\x00b', 'xx ... xx')
    """
    words = str(text)
    if len(words) > limit:
        words = f"{words[: limit // 2]} ... {words[-(limit // 2) :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class Masks:
    """Masks of an image's persons, decoded when used: ``masks[slot]`` and ``masks.any(0)``, bool ``[H, W]``.

    At most ``MASK_BYTES`` of decoded masks are kept; the others are decoded again for every use.

    Args:
        count: number of persons.
        size: (h, w) of the image.
        decode: from a person's slot to its mask; None stands for an empty mask.

    Example:
        >>> masks = Masks(3, (2, 2), lambda slot: np.eye(2, dtype=bool) if slot else None)
        >>> masks[0].sum(), masks.any(0).sum()
        (np.int64(0), np.int64(2))
    """

    def __init__(self, count: int, size: tuple[int, int], decode: Callable[[int], Mask | None]) -> None:
        self._count, self._size, self._decode = count, size, decode
        self._kept: dict[int, Mask] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, slot: int) -> Mask:
        if not 0 <= slot < self._count:
            raise IndexError(f"there is no mask {slot}: they are 0 to {self._count - 1}")
        if slot in self._kept:
            return self._kept[slot]
        decoded = self._decode(slot)
        mask = np.zeros(self._size, bool) if decoded is None else np.ascontiguousarray(decoded)
        if (len(self._kept) + 1) * mask.nbytes <= MASK_BYTES:
            self._kept[slot] = mask
        return mask

    def any(self, axis: int) -> Mask:
        """Pixels of any person; ``axis`` is 0, as for an array ``[P, H, W]``."""
        assert axis == 0
        union = np.zeros(self._size, bool)
        for slot in range(self._count):
            union |= self[slot]
        return union


@dataclass(frozen=True)
class Scene:
    """One image and the masks of all its persons, also of those that are no ROI.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        masks: bool ``[P, H, W]``.
        ignored: bool ``[H, W]``, where nobody knows who is there; None: nowhere. Masks go before it.
        notes: what is unusual about the image, and an example of it.
    """

    image: NDArray[np.uint8]
    masks: Mask | Masks
    ignored: Mask | None = None
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Instances:
    """The ROIs of a source as columns, one row a ROI, ROIs of an image side by side.

    Attributes:
        image_index: int32 ``[N]``, argument of ``scene``.
        slots: int32 ``[N]``, the person's place in the scene's masks.
        image_ids: int64 ``[N]``, the data set's own.
        annotation_ids: int64 ``[N]``, the data set's own.
        boxes: float32 ``[N, 4]``, xyxy in pixels.
        areas: float32 ``[N]``, pixels of the mask.
        image_sizes: int32 ``[N, 2]``, (h, w).
        images: number of images with a ROI.
        skipped: number of persons and images left out, by reason.
        notes: number of things found unusual, in what is used, by kind.
        examples: the first of each reason and kind, in words.
        starts: where several data sets are joined, the first ``image_index`` of each, by its name.
    """

    image_index: NDArray[np.int32]
    slots: NDArray[np.int32]
    image_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    boxes: NDArray[np.float32]
    areas: NDArray[np.float32]
    image_sizes: NDArray[np.int32]
    images: int
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_index)


#: Columns of :class:`Instances` and their types.
COLUMNS = {"image_index": "i4", "slots": "i4", "image_ids": "i8", "annotation_ids": "i8"}
COLUMNS |= {"boxes": "f4", "areas": "f4", "image_sizes": "i4"}


class Source(Protocol):
    """A data set's split.

    One that reads files is a :class:`FileSource` too.

    Attributes:
        name: of the data set, as ``settings.data`` has it.
        split: ``train``, ``val``, or another name.
    """

    name: str
    split: str

    def __len__(self) -> int:
        """Number of images with at least one ROI, readable or not."""

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images, without decoding images."""

    def scene(self, index: int) -> Scene:
        """Decode one image and its masks. Raises ``SceneError`` for an image that cannot be used."""

    def fingerprint(self) -> str:
        """A text that changes with what the data are; cheap, whatever the size of the data set."""


@runtime_checkable
class FileSource(Source, Protocol):
    """A source that reads files: a store is built again when one of them is another than it was."""

    def names(self) -> Iterable[str]:
        """The names of the files that the scenes are read from."""

    def locate(self, name: str) -> Path | None:
        """The file that a name means now; None: none, or several."""


class Tally:
    """Counts what was left out and what is unusual about the rest, with the first example of each.

    Args:
        *parts: whose counts to begin with.

    Example:
        >>> tally = Tally()
        >>> tally.skip("missing image", "there is no 1.png")
        >>> tally.skipped, tally.examples
        (Counter({'missing image': 1}), {'missing image': 'there is no 1.png'})
    """

    def __init__(self, *parts: "Instances | Tally") -> None:
        self.skipped, self.notes, self.examples = Counter[str](), Counter[str](), dict[str, str]()
        for part in parts:
            self.skipped.update(part.skipped)
            self.notes.update(part.notes)
            self.examples = {**part.examples, **self.examples}

    def skip(self, reason: str, example: str) -> None:
        """Count a person or an image that is left out."""
        self.skipped[reason] += 1
        self.examples[reason] = self.examples.get(reason) or printable(example)

    def note(self, kind: str, example: str) -> None:
        """Count something unusual about what is used."""
        self.notes[kind] += 1
        self.examples[kind] = self.examples.get(kind) or printable(example)


class InstancesBuilder(Tally):
    """Collects ROIs image by image and turns them into compact columns.

    Example:
        >>> builder = InstancesBuilder()
        >>> builder.add("image 7", 7, (50, 60), [3, 4], [[0, 0, 20, 40], [0, 0, 9, 9]], [800, 81])
        True
        >>> found = builder.instances("the data set")
        >>> found.boxes.tolist(), found.skipped
        ([[0.0, 0.0, 20.0, 40.0]], {'box with a side under 16 px': 1})
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[tuple[object, ...]] = []
        self.images = 0

    def add(
        self, where: str, image_id: int, size: tuple[int, ...], ids: Sequence[int], boxes: Any, areas: Any
    ) -> bool:
        """Keep the ROIs among an image's persons.

        Args:
            where: names the image in examples.
            image_id: the data set's own.
            size: (h, w) of the image.
            ids: ``[P]``, the data set's annotation ids, in the order of the scene's masks.
            boxes: ``[P, 4]``, xyxy.
            areas: ``[P]``, pixels.

        Returns:
            Whether the image has a ROI; without one it takes no ``image_index``.
        """
        corners = np.asarray(boxes, np.float64).reshape(-1, 4)
        kept = []
        for i, box in enumerate(corners.tolist()):
            x0, y0, x1, y1 = box
            reason = wrong_box(box, size) or (SMALL if min(x1 - x0, y1 - y0) < MIN_SIDE else None)
            if reason:
                at = f"box {x0:g}, {y0:g}, {x1:g}, {y1:g} (xyxy), image {size[1]}x{size[0]}"
                self.skip(reason, f"{where}, annotation {ids[i]}, {at}")
            else:
                kept.append(i)
        largest = set(sorted(kept, key=lambda i: -areas[i])[:MAX_INSTANCES])
        for i in kept:
            if i in largest:
                self._rows.append((self.images, i, image_id, ids[i], corners[i], areas[i], size))
            else:
                self.skip(CROWDED, f"{where}, annotation {ids[i]}")
        self.images += bool(kept)
        return bool(kept)

    def instances(self, data: str, otherwise: str = "it is empty") -> Instances:
        """All ROIs so far.

        Args:
            data: names the data in the message.
            otherwise: why there is no ROI where nothing was left out.

        Raises:
            DataError: there is none.
        """
        if not self._rows:
            reasons = counted(self.skipped, self.examples) or otherwise
            raise DataError(f"{data} has no person that can be used: {reasons}")
        values = zip(COLUMNS.items(), zip(*self._rows, strict=True), strict=True)
        columns: Any = {name: np.array(column, kind) for (name, kind), column in values}
        counts: Any = {"skipped": dict(self.skipped), "notes": dict(self.notes), "examples": self.examples}
        return Instances(**columns, images=self.images, **counts)


class IndexedSource(ABC):
    """A source that lists its ROIs image by image when they are first asked for, and keeps the list."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._indexed: dict[int | None, Instances] = {}
        self._entries: list[Any] = []

    def __len__(self) -> int:
        return self.instances().images

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images.

        Raises:
            DataError: the data cannot be read, or have no person that can be used.
        """
        if max_images not in self._indexed:
            builder, entries = InstancesBuilder(), list[Any]()
            images, data, otherwise = self._listed(builder)
            for image in images:
                if max_images is not None and builder.images >= max_images:
                    break
                try:
                    if (entry := self._add(image, builder)) is not None:
                        entries.append(entry)
                except SceneError as error:
                    builder.skip(error.reason, str(error))
            self._indexed[max_images] = builder.instances(data, otherwise)
            self._entries = max(self._entries, entries, key=len)  # a shorter list begins a longer one
        return self._indexed[max_images]

    @abstractmethod
    def _listed(self, builder: InstancesBuilder) -> tuple[Iterable[Any], str, str]:
        """The images, and both arguments of :meth:`InstancesBuilder.instances`."""

    @abstractmethod
    def _add(self, image: Any, builder: InstancesBuilder) -> Any:
        """Add an image; returns what its scene is made from, None where it has no ROI."""

    def _entry(self, index: int) -> Any:
        """What :meth:`_add` returned for image ``index``."""
        if index >= len(self._entries):
            self.instances()
        return self._entries[index]


def counted(skipped: Mapping[str, int], examples: Mapping[str, str] = {}) -> str:
    """What was left out, in one line, with an example of up to three reasons.

    Example:
        >>> counted({"missing image": 2, "crowd annotation": 1}, {"missing image": "there is no 1.png"})
        'crowd annotation (1), missing image (2); such as missing image: there is no 1.png'
    """
    line = ", ".join(f"{reason} ({count})" for reason, count in sorted(skipped.items()))
    some = [f"{reason}: {examples[reason]}" for reason in skipped if reason in examples][:3]
    return "; such as ".join([line, "; ".join(some)]) if some else line


def existing_folder(folder: PathLike, what: str = "folder", rule: str = "") -> Path:
    """A folder, ``~`` expanded.

    Raises:
        DataError: it does not exist; the message has ``rule``.
    """
    place = Path(os.path.expanduser(folder))
    if not os.path.isdir(place):
        raise DataError(f"there is no {what} {place}{rule and f': {rule}'}")
    return place


def file_stamp(file: Path | None) -> tuple[int, int, int]:
    """Size, time of the content and time of the entry of a file; -1 where there is none.

    Example:
        >>> file_stamp(Path("nowhere"))
        (-1, -1, -1)
    """
    try:
        found = os.stat(file or "")
    except (OSError, ValueError):
        return -1, -1, -1
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Smallest box (xyxy) around the true pixels of bool ``[H, W]``, of which there must be one.

    Example:
        >>> box_of(np.array([[0, 0, 0], [0, 1, 1]], bool))
        (1, 1, 3, 2)
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def wrong_box(box: Sequence[float], size: Sequence[int] | None) -> str | None:
    """Why a box (xyxy) in an image of ``size`` (h, w; None: any) cannot be used; None: it can.

    Example:
        >>> wrong_box((0, 0, 9, 9), (20, 10)), wrong_box((10, 0, 19, 9), (20, 10))
        (None, 'box outside the image')
    """
    x0, y0, x1, y1 = box
    if not (-1e38 < x0 < x1 < 1e38 and -1e38 < y0 < y1 < 1e38):  # stored as float32
        return NO_AREA
    outside = size is not None and (min(x1, size[1]) <= max(x0, 0) or min(y1, size[0]) <= max(y0, 0))
    return OUTSIDE if outside else None


def persons_in(owner: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], list[tuple[int, ...]]]:
    """Ids of the persons in a mask of ids ``[H, W]``, 0 for nobody; their pixels; their boxes (xyxy).

    Example:
        >>> persons_in(np.array([[0, 0, 0], [0, 7, 7]]))
        (array([7]), array([2]), [(1, 1, 3, 2)])
    """
    ids, areas = np.unique(owner[owner > 0], return_counts=True)
    places = ndimage.find_objects(owner)  # one pass: a damaged mask may hold thousands of ids
    found = (places[number - 1] for number in ids)
    return ids, areas, [(x.start, y.start, x.stop, y.stop) for y, x in found]


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image of any mode but float as uint8 ``[H, W, 3]``.

    Raises:
        ValueError: its pixels are floats: from black to white may be 0 to 1, 0 to 255 or anything.

    Example:
        >>> as_rgb(Image.new("L", (2, 1), 9)).tolist()
        [[[9, 9, 9], [9, 9, 9]]]
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no agreed range: save it with 8 or 16 bits")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND // max(1, image.width))  # in one piece, a large image would be in memory five times
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
            grey = np.asarray(band).astype(np.float64) / 257
            band = Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8))
        elif band.mode == "P" and "transparency" in band.info:
            band = band.convert("RGBA")
        pixels[top : top + rows] = np.asarray(band.convert("RGB"))
    return pixels


@contextmanager
def opened(file: Path, what: str = "image") -> Iterator[Image.Image]:
    """An image file, for reading its pixels.

    Raises:
        SceneError: it is missing or no regular file, or the block cannot decode it.
    """
    try:
        if os.path.exists(file) and not os.path.isfile(file):  # opening a FIFO would wait for its writer
            rule = f"put the {what} there or take it out"
            raise SceneError(UNREADABLE, f"{file} is no regular file: {rule}", file)
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise SceneError(MISSING, f"there is no {what} file {file}", file) from None
    except SceneError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, its own...
        what = f"{file} cannot be decoded ({str(error) or type(error).__name__})"
        raise SceneError(UNREADABLE, f"{what}: fetch it again or take it out", file) from None


def decode_image(
    file: Path, size: tuple[int, int] | None = None, *, upright: bool = False, notes: list[Note] | None = None
) -> NDArray[np.uint8]:
    """An image file as uint8 ``[H, W, 3]``, in the frame its annotations are in.

    COCO annotates the pixels as stored, so an EXIF orientation is not applied. Where the stored size differs
    from ``size`` and the upright one agrees, the annotations were made on the upright image, and the
    orientation is applied; that of a TIFF always is. Greyscale, palette, CMYK, 16-bit and transparent images
    become RGB.

    Args:
        file: to read.
        size: ``(h, w)`` that the annotation says; None: any.
        upright: apply the orientation in any case.
        notes: takes what is said of an image with an orientation.

    Raises:
        SceneError: missing, unreadable or truncated file, or another size.
    """
    with opened(file) as image:
        picture, stored = image, (image.height, image.width)
        wanted = stored if size is None else size
        if (upright or wanted != stored) and wanted in (stored, stored[::-1]):  # else turning cannot help
            picture = ImageOps.exif_transpose(image)
        if size is not None and (picture.height, picture.width) != tuple(size):
            found, said = f"{picture.width}x{picture.height}", f"{size[1]}x{size[0]}"
            raise SceneError(OTHER_SIZE, f"{file} has {found} pixels, its annotation says {said}", file)
        pixels = as_rgb(picture)
        orientation = image.getexif().get(_ORIENTATION, 1)  # now: a PNG may have it behind the pixels
    if notes is not None and orientation in range(2, 9) and not upright:
        kind = NOT_TURNED if picture is image else TURNED
        rule = "set exif to apply if all people were annotated on the upright image"
        notes.append((kind, f"{file}, orientation {orientation}: {rule}"))
    return pixels


def image_size(file: Path, upright: bool = False) -> tuple[int, int]:
    """``(h, w)`` of an image file, or of the image turned upright.

    Raises:
        SceneError: missing or unreadable file.
    """
    with opened(file) as image:
        turned = upright and image.getexif().get(_ORIENTATION, 1) in range(5, 9)
        return image.size if turned else (image.height, image.width)
