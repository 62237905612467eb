"""Decoded ROIs on disk, memory-mapped: opened at once, read at random.

A store is a folder that travels as it is::

    store.json     what made it, its sizes, who was left out and why
    index.npz      a column a property, a row a ROI
    images.u8      uint8 [N, Hc, Wc, 3]
    coverage.u8    uint8 [N, Hm, Wm, 2]: in 255ths of the cell, covered by this person; by
                   other people and not by this one
"""

from __future__ import annotations

import hashlib
import math
import warnings
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from refinelib import files
from refinelib.data.errors import DataError
from refinelib.data.sources import COLUMNS, counted

#: Of the folder's layout and of what is in it: a store of another version is not read.
FORMAT = 1
#: Bytes of the largest ``store.json`` that is read; ``index.npz`` has ``files.ARRAYS``, for 5 million ROIs.
MOST_INFO = 8 << 20
#: Kind and axes of each column in ``index.npz``, see :func:`refinelib.files.check_arrays`.
_SHAPES = {"image_index": "i n", "image_ids": "i n", "annotation_ids": "i n", "boxes": "f n4", "areas": "f n",
           "image_sizes": "i n2", "mean_coverage": "f hw2"}


class Store:
    """ROIs of one split. ``Store.open(folder)`` makes one; ROI ``i`` is row ``i`` of everything.

    Attributes:
        images: uint8 ``[N, Hc, Wc, 3]``, mapped from disk, read-only.
        coverage: uint8 ``[N, Hm, Wm, 2]``, mapped from disk, read-only.
        image_index: int32 ``[N]``, place of the image among the source's images.
        image_ids, annotation_ids: int64 ``[N]``, the data set's own.
        boxes: float32 ``[N, 4]`` xyxy in pixels of the image (the person's box, without context).
        areas: float32 ``[N]``, pixels of the person's mask.
        image_sizes: int32 ``[N, 2]``, (height, width).
        roi_size, mask_size: (h, w) of the box; canvas, mask_canvas: of the whole crop.
        skipped: how many were left out, by reason. examples: the first of each, in words.
        info: all of ``store.json``.
    """

    def __init__(
        self, folder: Path, info: dict[str, Any], columns: dict[str, np.ndarray], mean: np.ndarray | None
    ) -> None:
        self.folder, self.info, self._mean = folder, info, mean
        self.source, self.split = info["source"], info["split"]
        self.roi_size, self.mask_size = tuple(info["roi_size"]), tuple(info["mask_size"])
        self.canvas, self.mask_canvas = tuple(info["canvas"]), tuple(info["mask_canvas"])
        self.skipped: dict[str, int] = info["skipped"]
        self.examples: dict[str, str] = info["examples"]
        self.image_index, self.image_ids = columns["image_index"], columns["image_ids"]
        self.annotation_ids, self.boxes = columns["annotation_ids"], columns["boxes"]
        self.areas, self.image_sizes = columns["areas"], columns["image_sizes"]
        self.max_images: int | None = info["max_images"]
        count = len(self.boxes)
        self.images = np.memmap(folder / "images.u8", np.uint8, "r", shape=(count, *self.canvas, 3))
        self.coverage = np.memmap(folder / "coverage.u8", np.uint8, "r", shape=(count, *self.mask_canvas, 2))

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Open a store, wherever it was built; no image and no annotation is needed.

        Raises:
            DataError: no store there, one of another format, or one that was cut short.
        """
        folder = Path(folder)
        info = read_info(folder)
        try:
            index = files.read_npz(folder / "index.npz", _SHAPES)
        except (OSError, ValueError) as error:
            raise _broken(folder, f"index.npz cannot be read ({error})") from None
        count, mean = info["rois"], index["mean_coverage"]
        rows = {"images.u8": (*info["canvas"], 3), "coverage.u8": (*info["mask_canvas"], 2)}
        for name, shape in rows.items():
            file, wanted = folder / name, count * math.prod(shape)
            found = file.stat().st_size if file.is_file() else 0
            if found != wanted:
                raise _broken(folder, f"{name} has {found} of {wanted} bytes")
        if len(index["boxes"]) != count or list(mean.shape[:2]) != info["mask_canvas"]:
            raise _broken(folder, f"index.npz does not have {count} rows, or a mean of another size")
        kept = {name: dtype for name, dtype in COLUMNS.items() if name != "slots"}
        columns = {name: index[name].astype(dtype, copy=False) for name, dtype in kept.items()}
        return cls(folder, info, columns, mean)

    def __len__(self) -> int:
        return len(self.boxes)

    def __reduce__(self):  # maps the files again in another process, instead of sending their content
        return _reopen, (self.folder, self.max_images)

    def gather(self, indices: Tensor | np.ndarray | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of some ROIs on the CPU: images uint8 ``[n, Hc, Wc, 3]``, coverage uint8 ``[n, Hm, Wm, 2]``.

        Raises:
            IndexError: an index outside 0..N-1.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.folder} has the ROIs 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}")
        return torch.from_numpy(self._plain[0][rows]), torch.from_numpy(self._plain[1][rows])

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """The whole store as two CPU tensors on the mapped files, for one copy to a device.

        Nothing is read until it is used. The files are mapped read-only: writing into these
        tensors ends the process.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writ.*")
            return torch.from_numpy(self._plain[0]), torch.from_numpy(self._plain[1])

    def mean_coverage(self) -> np.ndarray:
        """Average coverage float32 ``[Hm, Wm, 2]`` in 0..1: the mask that looks at no image."""
        if self._mean is None:
            total = np.zeros(self._plain[1].shape[1:], np.int64)
            for row in range(0, len(self), 4096):
                total += self._plain[1][row : row + 4096].sum(0, dtype=np.int64)
            self._mean = (total / (255 * max(1, len(self)))).astype(np.float32)
        return self._mean

    def first_images(self, count: int | None) -> "Store":
        """The ROIs of the source's first ``count`` images, as if built with ``max_images=count``.

        ``skipped`` and ``examples`` stay those of the whole store.

        Raises:
            DataError: none of these images has a ROI.
        """
        if count is None or (self.max_images is not None and count >= self.max_images):
            return self
        rois = int(np.searchsorted(self.image_index, count))  # ROIs are in the order of their images
        if rois == 0:
            raise DataError(f"none of the first {count} images of {self.folder} has a ROI: give a larger max_images")
        info = {**self.info, "max_images": count, "rois": rois}
        columns = {name: getattr(self, name)[:rois] for name in COLUMNS if name != "slots"}
        return Store(self.folder, info, columns, self._mean if rois == len(self) else None)

    def instance(self, roi: int) -> dict[str, Any]:
        """Who ROI ``roi`` is, as plain values: its data set, that one's ids, and the box."""
        return {
            "roi": int(roi),
            "source": self._source_of(roi),
            "image_id": int(self.image_ids[roi]),
            "annotation_id": int(self.annotation_ids[roi]),
            "box": [round(float(side), 2) for side in self.boxes[roi]],
        }

    @cached_property
    def identity(self) -> str:
        """Of its people, in their order: the same wherever data and store lie."""
        columns = (self.annotation_ids, self.image_ids, self.boxes)
        return hashlib.sha256(b"".join(np.ascontiguousarray(column).tobytes() for column in columns)).hexdigest()[:16]

    def _source_of(self, roi: int) -> str:
        """The data set that a ROI is from, where several are joined (in a store of before, the name of all)."""
        mine = [name for name, start in self.info.get("starts", {}).items() if start <= self.image_index[roi]]
        return mine[-1] if mine else self.source

    def summary(self) -> str:
        """One line: what it is, how many ROIs, who was left out and why."""
        images = len(np.unique(self.image_index))
        size = f"{self.roi_size[0]}x{self.roi_size[1]}"
        if self.canvas != self.roi_size:
            size += f", {self.canvas[0]}x{self.canvas[1]} with context,"
        line = f"{self.source} {self.split}: {len(self)} ROIs of {size} from {images} images"
        return f"{line}; left out: {counted(self.skipped)}" if self.skipped else line

    @cached_property
    def _plain(self) -> tuple[np.ndarray, np.ndarray]:
        # Indexing a np.memmap costs more than indexing the plain array beneath it.
        return np.asarray(self.images), np.asarray(self.coverage)


_Count = Annotated[int, Field(ge=1)]
_Size = Annotated[list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=2, max_length=2)]


class _Info(BaseModel):
    """What is read of a ``store.json``, and its types."""

    model_config = ConfigDict(strict=True)

    source: str
    split: str
    rois: _Count
    roi_size: _Size
    mask_size: _Size
    canvas: _Size
    mask_canvas: _Size
    max_images: _Count | None
    skipped: dict[str, int]
    examples: dict[str, str]
    unread: dict[Any, list[int] | None] = {}  # names of files, which need not be Unicode
    starts: dict[str, int] = {}
    fingerprint: str = ""


def read_info(folder: Path) -> dict[str, Any]:
    """The content of a store's ``store.json``.

    Raises:
        DataError: none there, not readable, or of another format version.
    """
    file = folder / "store.json"
    if not file.is_file():
        parts = "store.json, index.npz, images.u8 and coverage.u8"
        raise DataError(f"there is no store in {folder}: a store is a folder with {parts}")
    try:
        info = files.read_json(file, limit=MOST_INFO)
        version = info["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _broken(folder, f"store.json cannot be read ({error})") from None
    if version != FORMAT:
        raise DataError(
            f"the store {folder} has format {files.shown(version)}, this version reads format {FORMAT}: "
            f"delete the folder, and it is built again from the images"
        )
    lacking = {name for name, field in _Info.model_fields.items() if field.is_required()} - set(info)
    if lacking:
        raise _broken(folder, f"store.json lacks {', '.join(sorted(lacking))}")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        raise _broken(folder, f"store.json has no usable {error.errors()[0]['loc'][0]}") from None
    return info


def _reopen(folder: Path, max_images: int | None) -> Store:
    return Store.open(folder).first_images(max_images)


def _broken(folder: Path, what: str) -> DataError:
    return DataError(
        f"the store {folder} is damaged: {what}; "
        f"copy it again, or delete the folder, and it is built again from the images"
    )
