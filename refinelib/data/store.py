"""Decoded ROIs on disk, memory-mapped: opened at once, read at random.

A store is a folder that can be copied to another machine; the images are not needed there::

    store.json     what made it, its sizes, what was left out and why
    index.npz      a column a property, a row a ROI
    images.u8      uint8 [N, Hc, Wc, 3]
    coverage.u8    uint8 [N, Hm, Wm, 2]: area fractions of a cell in 255ths, covered by this
                   person; by other persons and not by this one. A third one, where there is any:
                   ignored, since nobody knows who is there
    files.npz      the files that it was made from, their sizes and times
"""

import hashlib
import re
import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from refinelib import files
from refinelib.data.sources import COLUMNS, DataError, counted

#: Of the folder's layout and content. Format 1 knew two channels and no files.
FORMAT = 2
#: Bytes of the largest ``store.json`` that is read.
MOST_INFO = 8 << 20
#: Kind and axes of each column in ``index.npz``, see :func:`refinelib.files.check_arrays`.
_SHAPES = {"image_index": "i n", "image_ids": "i n", "annotation_ids": "i n", "boxes": "f n4", "areas": "f n"}
_SHAPES |= {"image_sizes": "i n2", "mean_coverage": "f hw2"}
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Size = tuple[Side, Side]


class StoreInfo(BaseModel):
    """The content of ``store.json``."""

    format: int = FORMAT
    source: str
    split: str
    rois: Count = 0
    roi_size: Size
    mask_size: Size
    canvas: Size
    mask_canvas: Size
    max_images: Count | None = None
    skipped: dict[str, int] = {}
    examples: dict[str, str] = {}
    channels: Annotated[int, Field(ge=2, le=3)] = 2
    ignored: float = 0.0
    notes: dict[str, int] = {}
    starts: dict[str, int] = {}
    fingerprint: str = ""
    seconds: float = 0.0


class Store:
    """ROIs of one split. ``Store.open(folder)`` makes one; ROI ``i`` is row ``i`` of everything.

    Attributes:
        images: uint8 ``[N, Hc, Wc, 3]``, mapped from disk, read-only.
        coverage: uint8 ``[N, Hm, Wm, C]``, mapped from disk, read-only.
        image_index: int32 ``[N]``, place of the image among the source's images.
        image_ids: int64 ``[N]``, the data set's own; ``annotation_ids`` likewise.
        boxes: float32 ``[N, 4]`` xyxy in pixels of the image (the person's box, without context).
        areas: float32 ``[N]``, pixels of the person's mask.
        image_sizes: int32 ``[N, 2]``, (height, width).
        roi_size: (h, w) of the box in ``images``; ``mask_size`` in ``coverage``.
        canvas: (h, w) of the whole crop in ``images``; ``mask_canvas`` in ``coverage``.
        skipped: how many persons and images were left out, by reason.
        examples: the first of each reason, in words.
        ignores: whether pixels are ignored: ``C`` is 3, else 2.
        info: all of ``store.json``.
    """

    image_index: NDArray[np.int32]
    image_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    boxes: NDArray[np.float32]
    areas: NDArray[np.float32]
    image_sizes: NDArray[np.int32]

    def __init__(
        self, folder: Path, info: StoreInfo, columns: dict[str, Any], mean: NDArray[np.float32] | None
    ) -> None:
        self.folder, self.info, self._mean = folder, info, mean
        self.source, self.split, self.max_images = info.source, info.split, info.max_images
        self.roi_size, self.mask_size = info.roi_size, info.mask_size
        self.canvas, self.mask_canvas = info.canvas, info.mask_canvas
        self.skipped, self.examples, self.ignores = info.skipped, info.examples, info.channels == 3
        for name, column in columns.items():
            setattr(self, name, column)
        self.images = np.memmap(folder / "images.u8", np.uint8, "r", shape=(info.rois, *info.canvas, 3))
        shape = (info.rois, *info.mask_canvas, info.channels)
        self.coverage = np.memmap(folder / "coverage.u8", np.uint8, "r", shape=shape)
        # Indexing a np.memmap costs more than indexing the plain array beneath it.
        self._plain = np.asarray(self.images), np.asarray(self.coverage)

    @classmethod
    def open(cls, folder: str | Path, max_images: int | None = None) -> "Store":
        """Open a store, wherever it was built; no image and no annotation is needed.

        Args:
            folder: of the store.
            max_images: see :meth:`first_images`.

        Raises:
            DataError: no store there, one of another format, or one that was cut short.
        """
        folder = Path(folder)
        info = read_info(folder)
        with files.retold(partial(_damaged, folder), "index.npz cannot be read: "):
            index = files.read_npz(folder / "index.npz", _SHAPES)
        rows = {"images.u8": (*info.canvas, 3), "coverage.u8": (*info.mask_canvas, info.channels)}
        for name, shape in rows.items():
            wanted = info.rois * int(np.prod(shape))
            found = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if found != wanted:
                raise _damaged(folder, f"{name} has {found} of {wanted} bytes")
        mean = index["mean_coverage"]
        if len(index["boxes"]) != info.rois or mean.shape[:2] != info.mask_canvas:
            raise _damaged(folder, f"index.npz does not have {info.rois} rows, or a mean of another size")
        columns = {name: index[name].astype(COLUMNS[name], copy=False) for name in COLUMNS if name in _SHAPES}
        return cls(folder, info, columns, mean).first_images(max_images)

    def __len__(self) -> int:
        return self.info.rois

    def __reduce__(self) -> Any:  # another process maps the files again instead of getting their content
        return Store.open, (self.folder, self.max_images)

    def gather(self, indices: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        """Copies of some ROIs on the CPU: images uint8 ``[n, Hc, Wc, 3]``, coverage uint8 ``[n, Hm, Wm, C]``.

        Raises:
            IndexError: an index outside 0..N-1.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            found = f"{rows.min()} to {rows.max()}"
            raise IndexError(f"{self.folder} has the ROIs 0 to {len(self) - 1}, not {found}")
        return torch.from_numpy(self._plain[0][rows]), torch.from_numpy(self._plain[1][rows])

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """The whole store as two CPU tensors on the mapped files, for one copy to a device.

        Nothing is read until it is used. The files are mapped read-only: writing into these tensors ends the
        process.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writ.*")
            return torch.from_numpy(self._plain[0]), torch.from_numpy(self._plain[1])

    def mean_coverage(self) -> NDArray[np.float32]:
        """Mean of the coverage, float32 ``[Hm, Wm, 2]`` in 0..1: the mask that looks at no image."""
        if self._mean is None:
            total = np.zeros((*self.mask_canvas, 2), np.int64)
            for row in range(0, len(self), 4096):
                total += self._plain[1][row : row + 4096, ..., :2].sum(0, dtype=np.int64)
            self._mean = (total / (255 * len(self))).astype(np.float32)
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
            raise DataError(f"none of the first {count} images of {self.folder} has a ROI: raise max_images")
        info = self.info.model_copy(update={"max_images": count, "rois": rois})
        columns = {name: getattr(self, name)[:rois] for name in COLUMNS if name in _SHAPES}
        return Store(self.folder, info, columns, self._mean if rois == len(self) else None)

    def instance(self, roi: int) -> dict[str, Any]:
        """Which person ROI ``roi`` is, as plain values: its data set, that one's ids, and the box."""
        index = self.image_index[roi]
        sources = [name for name, start in self.info.starts.items() if start <= index] or [self.source]
        ids = {"image_id": int(self.image_ids[roi]), "annotation_id": int(self.annotation_ids[roi])}
        box = [round(float(side), 2) for side in self.boxes[roi]]
        return {"roi": int(roi), "source": sources[-1], **ids, "box": box}

    @cached_property
    def identity(self) -> str:
        """Hash of its persons in their order: the same wherever data and store lie."""
        columns = (self.annotation_ids, self.image_ids, self.boxes)
        content = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
        return hashlib.sha256(content + self.content.encode()).hexdigest()[:16]

    @property
    def content(self) -> str:
        """Hash of images and masks, where the data were in memory; empty for data on disk."""
        return "".join(re.findall("sha256:[0-9a-f]{64}", self.info.fingerprint))

    def summary(self) -> str:
        """One line: what it is, how many ROIs, what was left out and why."""
        size = "{}x{}".format(*self.roi_size)
        if self.canvas != self.roi_size:
            size += ", {}x{} with context,".format(*self.canvas)
        images = len(np.unique(self.image_index))
        parts = [f"{self.source} {self.split}: {len(self)} ROIs of {size} from {images} images"]
        parts += [f"left out: {counted(self.skipped)}"] if self.skipped else []
        parts += [f"noted: {counted(self.info.notes)}"] if self.info.notes else []
        parts += [f"{self.info.ignored:.2%} of all cells ignored"] if self.ignores else []
        return "; ".join(parts)


def read_info(folder: Path) -> StoreInfo:
    """The content of a store's ``store.json``.

    Raises:
        DataError: none there, not readable, or of another format version.
    """
    file = folder / "store.json"
    if not file.is_file():
        raise DataError(f"there is no store in {folder}: a store is a folder with store.json and its arrays")
    with files.retold(partial(_damaged, folder), "store.json cannot be read: ", causes=files.DAMAGE):
        content = files.read_json(file, limit=MOST_INFO)
        version = content["format"]
    if version not in (1, FORMAT):
        rule = f"this version reads format {FORMAT}: delete the folder, and it is built again from the images"
        raise DataError(f"the store {folder} has format {files.shown(version)}, {rule}")
    try:
        return StoreInfo.model_validate(content)
    except ValidationError as error:
        names = sorted({str(problem["loc"][0]) for problem in error.errors()})
        raise _damaged(folder, f"store.json has no usable {', '.join(names)}") from None


def _damaged(folder: Path, what: str) -> DataError:
    rule = "copy it again, or delete the folder, and it is built again from the images"
    return DataError(f"the store {folder} is damaged: {what}; {rule}")
