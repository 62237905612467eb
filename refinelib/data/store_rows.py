"""Turns one image into the rows of its ROIs: crops and coverage."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refinelib.data.augment import MEAN
from refinelib.data.errors import SceneError
from refinelib.data.sources import NO_MASK, UNREADABLE, Instances, Source
from refinelib.modeling.roi import centre_window, crop_rois, expand_boxes


@dataclass
class Written:
    """What became of some images.

    ``empty``: rows that hold no ROI; ``reasons``: why, counted; ``examples``: the first of each reason; ``unread``: files
    that could not be used, as :func:`stamp` saw them;
    ``coverage``: int64 [Hm, Wm, 2], sum of the coverage of all other rows.
    """

    coverage: np.ndarray
    empty: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unread: dict[str, list[int] | None] = field(default_factory=dict)

    def skip(self, rows: range | list[int], reason: str, example: str) -> None:
        self.empty.extend(rows)
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)

    def add(self, other: "Written") -> "Written":
        """``other`` comes after what is here already."""
        self.coverage += other.coverage
        self.empty.extend(other.empty)
        self.reasons.update(other.reasons)
        self.examples = {**other.examples, **self.examples}
        self.unread.update(other.unread)
        return self


def stamp(file: str | Path) -> list[int] | None:
    """Size and time of a file; None: there is none. Another one means another file."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # ValueError: no file can have that name
        return None
    return [found.st_size, found.st_mtime_ns]


class RowWriter:
    """Writes an image's ROIs into their rows of ``images.u8`` and ``coverage.u8``; one in each process.

    Args:
        source: of scenes. people: its ROIs; ROI ``i`` is row ``i``.
        folder: holds both files, of full length.
        info: sizes, as ``store.json`` has them.
    """

    def __init__(self, source: Source, people: Instances, folder: Path, info: dict[str, Any]) -> None:
        self.source, self.people = source, people
        self.roi_size, self.mask_size = tuple(info["roi_size"]), tuple(info["mask_size"])
        self.canvas, self.mask_canvas = tuple(info["canvas"]), tuple(info["mask_canvas"])
        self.starts = np.searchsorted(people.image_index, np.arange(people.images + 1))
        self.files = [open(folder / name, "r+b", buffering=0) for name in ("images.u8", "coverage.u8")]

    def write(self, some: range) -> Written:
        """All ROIs of some images.

        Raises:
            OSError: the files cannot be written. An image that cannot be used is counted.
        """
        done = Written(np.zeros((*self.mask_canvas, 2), np.int64))
        for index in some:
            rows = range(self.starts[index], self.starts[index + 1])
            try:
                images, coverage, has_mask = self._crops(index, rows)
            except SceneError as error:
                done.skip(rows, error.reason, str(error))
                if error.file is not None and len(str(error.file)) < 1000:  # what is noted must stay small
                    done.unread[str(error.file)] = stamp(error.file)
                continue
            for row in np.asarray(rows)[~has_mask].tolist():
                done.skip([row], NO_MASK, f"annotation {self.people.annotation_ids[row]} has no mask inside its box")
            done.coverage += coverage[has_mask].sum(0, dtype=np.int64)
            for file, block in zip(self.files, (images, coverage)):
                file.seek(rows.start * block[0].nbytes)
                if file.write(block.tobytes()) != block.nbytes:
                    raise OSError("the disk is full")
        return done

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _crops(self, index: int, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            scene = self.source.scene(index)
        except OSError as error:  # a name too long, a folder that may not be read, a disk that fails
            raise SceneError(UNREADABLE, f"image {index} of {self.source.name} cannot be read: {error}") from None
        boxes = torch.from_numpy(self.people.boxes[rows.start : rows.stop]).double()

        def region(canvas: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
            return expand_boxes(boxes, (canvas[0] / size[0], canvas[1] / size[1]))

        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        crops = crop_rois(pixels, region(self.canvas, self.roi_size), self.canvas, fill=MEAN)
        images = crops.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        anyone = scene.masks.any(0)
        covers = []
        slots = self.people.slots[rows.start : rows.stop]
        for slot, box in zip(slots, region(self.mask_canvas, self.mask_size)):
            mine = scene.masks[slot]
            layers = torch.from_numpy(np.stack([mine, anyone & ~mine]))
            covers.append(crop_rois(layers, box[None], self.mask_canvas)[0])
        stacked = torch.stack(covers).mul(255).round().to(torch.uint8)
        has_mask = (centre_window(stacked[:, 0], self.mask_size) > 0).flatten(1).any(1).numpy()
        return images, stacked.permute(0, 2, 3, 1).contiguous().numpy(), has_mask
