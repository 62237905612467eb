"""Shared by all tests: one torch thread, the real data beside the project, small data sets made by hand."""

from __future__ import annotations

import functools
import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; tests interrupt runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
STARTED = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="skip, and count, the tests that would start later")


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        pytest.skip(f"no time left: {seconds:g} s are over")


#: Real data lies beside the project, never in it.
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def real_folder(name: str) -> Path:
    """A folder of real data; the test that asks is skipped, and says why, where it is absent."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data: there is no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """The folder of COCO persons, in COCO's layout."""
    return real_folder("coco_person")


@pytest.fixture(scope="session")
def real_pennfudan() -> Path:
    """The folder of Penn-Fudan, in its published layout."""
    return real_folder("PennFudanPed")


class CocoFiles:
    """Writes a small COCO data set by hand: ``image``, ``person``, then ``source``.

    ``content`` is the JSON as it will be written, to be spoilt at will.
    """

    def __init__(self, folder: Path) -> None:
        self.annotations, self.images = folder / "instances.json", folder / "images"
        self.images.mkdir(parents=True)
        categories = [{"id": 7, "name": "dog"}, {"id": 1, "name": "person"}]
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}

    def image(
        self,
        pixels: np.ndarray | Image.Image | tuple[int, int] = (80, 100),
        name: str | None = None,
        **save: Any,
    ) -> int:
        """Lists and saves an image: uint8 [H, W, 3], a PIL image, or (h, w) of noise. Returns its id."""
        number = len(self.content["images"]) + 1
        name = name or f"{number:03}.jpg"
        if isinstance(pixels, tuple):
            pixels = np.random.default_rng(number).integers(0, 256, (*pixels, 3), dtype=np.uint8)
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(self.images / name, **save)
        entry = {"id": number, "file_name": name, "height": picture.height, "width": picture.width}
        self.content["images"].append(entry)
        return number

    def person(
        self, image: int, box: tuple[float, float, float, float], segmentation: Any = None, **fields: Any
    ) -> int:
        """Annotates a person by an xyxy box; the mask is the box unless given. Returns its id."""
        x0, y0, x1, y1 = box
        number = 100 + len(self.content["annotations"])
        area = (x1 - x0) * (y1 - y0)
        outline = [[x0, y0, x1, y0, x1, y1, x0, y1]] if segmentation is None else segmentation
        entry = {
            "id": number,
            "image_id": image,
            "category_id": 1,
            "iscrowd": 0,
            "area": area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": outline,
            **fields,
        }
        self.content["annotations"].append(entry)
        return number

    def source(self, split: str = "val"):
        """Writes the JSON as it is now."""
        from refinelib.data import CocoPeople

        self.annotations.write_text(json.dumps(self.content))
        return CocoPeople(self.annotations, self.images, split)

    def truncate(self, image: int, share: float = 0.5) -> None:
        """Cuts an image file short."""
        file = self.images / self.content["images"][image - 1]["file_name"]
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])


@pytest.fixture
def coco_files(tmp_path: Path) -> CocoFiles:
    """An empty COCO data set in ``tmp_path/coco``."""
    return CocoFiles(tmp_path / "coco")


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> str:
    """A folder for the decoded crops of all tiny runs."""
    return str(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def tiny(tmp_path, stores):
    """Makes settings of a run that takes a second, in ``tmp_path``."""
    from refinelib.config import resolve

    def settings(recipe="demo", **keywords):
        defaults = dict(
            output_dir=str(tmp_path), store_dir=stores, max_images=6, width=0.0625, roi_size=32, mask_size=32,
            epochs=2, batch_size=3, log_every=2, device="cpu",
            probe_every=0,  # statistics of gradients take as long as the steps
        )  # fmt: skip
        return resolve(recipe, **{**defaults, **keywords})

    return settings


@contextmanager
def shallow_models():
    from helpers import bench

    from refinelib import build
    from refinelib.metrics import predict

    small = functools.partial(bench("sweep").small_model, buffers=False)
    with pytest.MonkeyPatch.context() as patch:
        for module in (build, predict):
            patch.setattr(module, "build_model", small)
        yield


@pytest.fixture(scope="module")
def shallow():
    """Models with every kind of module but fewer of each: a step takes a third of its time.

    In this process alone: what is trained here is not resumed or loaded by another one.
    """
    with shallow_models():
        yield


@pytest.fixture
def shallow_here():
    """The same for one test."""
    with shallow_models():
        yield


@contextmanager
def half_convolutions():
    from helpers import bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", torch.nn.functional.conv2d)  # put back afterwards
        bench("sweep").half_convolutions()
        yield


@pytest.fixture(scope="module")
def half():
    """Float16 convolutions at a bearable speed: a CPU takes 30 times as long for their gradients."""
    with half_convolutions():
        yield


@pytest.fixture
def half_here():
    """The same for one test."""
    with half_convolutions():
        yield
