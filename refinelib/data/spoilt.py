"""A source some of whose image files are bad, as the setting ``inject`` asks for."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Sequence

from PIL import Image

from refinelib.data.sources import Instances, Scene, Source, decode_image
from refinelib.guard.faults import Fault


class CorruptedImages:
    """``source`` as it is, but for the images that the faults ``file:truncated@N`` and ``file:missing@N`` name (from 1).

    The bad file is a real one, cut in half, and goes through the reader that all files go through.
    """

    def __init__(self, source: Source, faults: Sequence[Fault]) -> None:
        self.source, self.name, self.split = source, source.name, source.split
        self.bad = {fault.step - 1: fault.value for fault in faults}

    def __len__(self) -> int:
        return len(self.source)

    def instances(self, max_images: int | None = None) -> Instances:
        return self.source.instances(max_images)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} but for {sorted(self.bad.items())}"

    def scene(self, index: int) -> Scene:
        scene = self.source.scene(index)
        if index not in self.bad:
            return scene
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"image {index + 1} of {self.name} {self.split}.jpg"
            if self.bad[index] == "truncated":
                buffer = io.BytesIO()
                Image.fromarray(scene.image).save(buffer, "JPEG")
                file.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            return Scene(decode_image(file), scene.masks)
