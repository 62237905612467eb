"""What a source of people gives: an index of ROIs, and scenes.

A source knows its people before any pixel is decoded (``people``) and decodes one image with
everybody's mask at a time (``scene``). ``SyntheticPeople``, ``CocoPeople`` and
``PennFudanPeople`` are sources.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable, Iterator, Protocol

import numpy as np
from PIL import Image, ImageOps

from refinelib.data.errors import SceneError, printable

#: A person whose box has a side under this many pixels is no ROI (but still other people).
MIN_SIDE = 16
#: The largest so many people of an image are ROIs.
MAX_PEOPLE = 10
#: Bytes of decoded masks that a process keeps at a time; those beyond are decoded again when they are used.
MASK_BYTES = 256 << 20
#: Pixels of an image that are converted to RGB at a time.
_BAND = 1 << 24

NO_AREA = "box of no area"
OUTSIDE = "box outside the image"
SMALL = f"box with a side under {MIN_SIDE} px"
CROWDED = f"person beyond the {MAX_PEOPLE} largest of an image"
NO_MASK = "annotation without mask"
MISSING = "missing image"
UNREADABLE = "unreadable image"
OTHER_SIZE = "image of another size than its annotation"


class Masks:
    """Masks of an image's persons, decoded when used: ``masks[slot]`` and ``masks.any(0)``, bool [H, W].

    All objects of a process together keep at most ``MASK_BYTES``.

    Args:
        count: number of persons.
        size: (h, w) of the image.
        decode: from a person's slot to its mask; None: an empty one.
    """

    _held = 0

    def __init__(self, count: int, size: tuple[int, int], decode: Callable[[int], np.ndarray | None]) -> None:
        self._kept: dict[int | None, np.ndarray] = {}
        self._count, self._size, self._decode = count, size, decode

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, slot: int) -> np.ndarray:
        if not 0 <= slot < self._count:
            raise IndexError(f"there is no mask {slot}: they are 0 to {self._count - 1}")
        return self._once(slot, self._mask)

    def any(self, axis: int) -> np.ndarray:
        """Where anybody is; ``axis`` is 0, as for an array [P, H, W]."""
        if axis != 0:
            raise ValueError(f"masks are united over persons, axis 0, not {axis}")
        return self._once(None, self._union)

    def _mask(self, slot: int) -> np.ndarray:
        mask = self._decode(slot)
        return np.zeros(self._size, bool) if mask is None else np.ascontiguousarray(mask)

    def _union(self, _: None) -> np.ndarray:
        anyone = np.zeros(self._size, bool)
        for mask in self:
            anyone |= mask
        return anyone

    def _once(self, key: int | None, make: Callable) -> np.ndarray:
        made = self._kept.get(key)
        if made is None:
            made = make(key)
            if Masks._held + made.nbytes <= MASK_BYTES:
                self._kept[key] = made
                Masks._held += made.nbytes
        return made

    def __del__(self) -> None:
        type(self)._held -= sum(mask.nbytes for mask in self._kept.values())


@dataclass(frozen=True)
class Scene:
    """One image: ``image`` uint8 [H, W, 3]; ``masks`` bool [P, H, W], one a person, small ones too."""

    image: np.ndarray
    masks: np.ndarray | Masks


@dataclass(frozen=True)
class Instances:
    """The ROIs of a source as columns, one row a ROI, ROIs of an image side by side.

    ``image_index`` int32: argument of ``scene``; ``slots`` int32: the person's place in its
    ``masks``; ``image_ids``, ``annotation_ids`` int64: the data set's own; ``boxes`` float32
    [N, 4] xyxy; ``areas`` float32: pixels of the mask; ``image_sizes`` int32 [N, 2]: (h, w).
    ``images``: number of images with a ROI. ``skipped``: who was left out, by reason. ``starts``: where several
    data sets are joined, the first ``image_index`` of each, by its name.
    """

    image_index: np.ndarray
    slots: np.ndarray
    image_ids: np.ndarray
    annotation_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    image_sizes: np.ndarray
    images: int
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_index)


class Source(Protocol):
    """Where people come from."""

    name: str  # of the data set: synthetic, coco, pennfudan
    split: str

    def __len__(self) -> int:
        """Number of images with at least one ROI, readable or not."""

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images, without decoding images."""

    def scene(self, index: int) -> Scene:
        """Decode one image and its masks. Raises ``SceneError`` for an image that cannot be used."""

    def fingerprint(self) -> str:
        """Changes when the data may have; cheap, whatever the size of the data set."""


COLUMNS = {"image_index": np.int32, "slots": np.int32, "image_ids": np.int64, "annotation_ids": np.int64,
           "boxes": np.float32, "areas": np.float32, "image_sizes": np.int32}
assert set(COLUMNS) < {f.name for f in fields(Instances)}


class InstancesBuilder:
    """Collects ROIs image by image and turns them into compact columns."""

    def __init__(self) -> None:
        self._rows: dict[str, list] = {name: [] for name in COLUMNS}
        self.images = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = printable(example)

    def add(self, image_id: int, size: tuple[int, int], annotation_ids: list[int], slots: list[int],
            boxes: np.ndarray, areas: np.ndarray, where: str) -> bool:
        """Keep the ROIs among an image's people; False where there is none, and no image is used up."""
        kept = []
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        with np.errstate(over="ignore"):  # they are stored as float32
            finite = np.isfinite(boxes.astype(np.float32)).all(1)
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            person = f"{where}, annotation {annotation_ids[i]}, box {x0:g}, {y0:g}, {x1:g}, {y1:g} (xyxy)"
            if not (finite[i] and x1 > x0 and y1 > y0):
                self.skip(NO_AREA, person)
            elif min(x1, size[1]) <= max(x0, 0) or min(y1, size[0]) <= max(y0, 0):
                self.skip(OUTSIDE, f"{person}, image {size[1]}x{size[0]}")
            elif min(x1 - x0, y1 - y0) < MIN_SIDE:
                self.skip(SMALL, person)
            else:
                kept.append(i)
        largest = sorted(kept, key=lambda i: -areas[i])[:MAX_PEOPLE]
        for i in sorted(set(kept) - set(largest)):
            self.skip(CROWDED, f"{where}, annotation {annotation_ids[i]}")
        for i in sorted(largest):
            values = (self.images, slots[i], image_id, annotation_ids[i], boxes[i], areas[i], size)
            for column, value in zip(self._rows.values(), values):
                column.append(value)
        self.images += bool(largest)
        return bool(largest)

    def instances(self) -> Instances:
        shapes = {"boxes": (-1, 4), "image_sizes": (-1, 2)}
        columns = {
            name: np.asarray(self._rows[name], dtype).reshape(shapes.get(name, -1)) for name, dtype in COLUMNS.items()
        }
        return Instances(**columns, images=self.images, skipped=dict(self.skipped), examples=dict(self.examples))


def counted(skipped: dict[str, int]) -> str:
    """Who was left out, in one line."""
    return ", ".join(f"{reason} ({count})" for reason, count in sorted(skipped.items()))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy of the smallest box around the true pixels of bool [H, W], of which there must be one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def as_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode but float as uint8 [H, W, 3].

    Raises:
        ValueError: its pixels are floats: from black to white may be 0 to 1, 0 to 255 or anything.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no agreed range: save it with 8 or 16 bits")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND // max(1, image.width))  # all at once, a large image would be in memory five times
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
            grey = np.asarray(band).astype(np.float64) / 257
            band = Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8))
        elif band.mode == "P" and "transparency" in band.info:
            band = band.convert("RGBA")
        pixels[top : top + rows] = band if band.mode == "RGB" else band.convert("RGB")
    return pixels


@contextmanager
def opened(file: Path, what: str = "image") -> Iterator[Image.Image]:
    """An image file, for reading its pixels.

    Raises:
        SceneError: it is missing or no regular file, or it cannot be decoded; also where the caller finds so.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a FIFO waits for its writer, for ever
            told = f"{file} is no regular file: put the {what} there or take it out"
            raise SceneError(UNREADABLE, told, file)
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise SceneError(MISSING, f"there is no {what} file {file}", file) from None
    except SceneError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, its own...
        why = str(error) or type(error).__name__
        told = f"{file} cannot be decoded ({why}): fetch it again or take it out"
        raise SceneError(UNREADABLE, told, file) from None


def decode_image(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as uint8 [H, W, 3], in the frame its annotations are in.

    COCO annotates the pixels as stored, so an EXIF orientation is not applied; where the stored
    size differs from ``size`` and the upright one agrees, the annotations were made on the
    upright image and it is. Greyscale, palette, CMYK, 16-bit and transparent images become RGB.

    Args:
        size: ``(h, w)`` that the annotation says; None: whatever the file has.

    Raises:
        SceneError: missing, unreadable or truncated file, or another size.
    """
    with opened(file) as image:
        if size is not None and (image.height, image.width) != tuple(size):
            # Only a picture that lies on its side is decoded to turn it.
            upright = ImageOps.exif_transpose(image) if (image.width, image.height) == tuple(size) else image
            if (upright.height, upright.width) != tuple(size):
                found, wanted = f"{image.width}x{image.height}", f"{size[1]}x{size[0]}"
                raise SceneError(OTHER_SIZE, f"{file} has {found} pixels, its annotation says {wanted}", file)
            image = upright
        return as_rgb(image)
