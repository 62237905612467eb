"""Several sources as one: their images one after the other."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Sequence

import numpy as np

from refinelib.data.sources import COLUMNS, Instances, Scene, Source


class JoinedSources:
    """The people of all ``sources``, in their order; ``max_images`` counts from the first.

    The name says which these are, as in ``coco+pennfudan``. Images and persons keep the ids of their own data sets, so one id
    may be there twice; the store knows whose it is.
    """

    def __init__(self, sources: Sequence[Source], split: str) -> None:
        self.sources, self.split = list(sources), split
        self.name = "+".join(source.name for source in sources)

    def __len__(self) -> int:
        return sum(self._lengths)

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(source) for source in self.sources]  # some count by reading every mask

    def instances(self, max_images: int | None = None) -> Instances:
        parts: list[Instances] = []
        for source in self.sources:
            left = None if max_images is None else max_images - sum(part.images for part in parts)
            if left is None or left > 0:
                parts.append(source.instances(left))
        before = np.cumsum([0, *(part.images for part in parts)])
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        columns["image_index"] = np.concatenate([part.image_index + start for part, start in zip(parts, before)]).astype(COLUMNS["image_index"])
        examples = {reason: example for part in reversed(parts) for reason, example in part.examples.items()}
        skipped = dict(sum((Counter(part.skipped) for part in parts), Counter()))
        starts = {source.name: int(start) for source, start in zip(self.sources, before[: len(parts)])}
        return Instances(**columns, images=int(before[-1]), skipped=skipped, examples=examples, starts=starts)

    def scene(self, index: int) -> Scene:
        for source, length in zip(self.sources, self._lengths):
            if index < length:
                return source.scene(index)
            index -= length
        raise IndexError(f"{self.name} {self.split} has {len(self)} images")

    def fingerprint(self) -> str:
        return "; ".join(source.fingerprint() for source in self.sources)
