"""From settings to the stores of the train and the val split; the data sets by name."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refinelib.config import Settings
from refinelib.data import sources
from refinelib.data.coco import CocoPeople, coco_paths
from refinelib.data.formats import LabelmePeople, MaskPeople, PennFudanPeople, YoloPeople
from refinelib.data.sources import COLUMNS, DataError, FileSource, Instances, Scene, Source, Tally
from refinelib.data.store import Store, read_info
from refinelib.data.store_build import open_store, store_sizes
from refinelib.data.synthetic import SyntheticPeople
from refinelib.guard import faults
from refinelib.registry import DATASETS, Option

#: Images of the synthetic splits: the same in every run, whatever its seed.
SYNTHETIC = {"train": 240, "val": 60}


def open_splits(
    settings: Settings, given: Mapping[str, Source] = {}, *, progress: bool = True
) -> tuple[Store, Store]:
    """The train and the val store that the settings ask for, built where they don't exist yet.

    Stores lie in ``store_dir``, else in ``output_dir/stores``. Where the images are not at hand (no
    ``data_dir``, or not on this machine) a store in ``store_dir`` of the same data, split and sizes is used
    instead.

    Args:
        settings: of the run.
        given: source of each split, in place of the one that the settings name.
        progress: see :func:`open_store`.

    Raises:
        DataError: neither the data nor a store of it is there, or it cannot be used.
    """
    train, val = (open_split(settings, split, given, progress=progress) for split in ("train", "val"))
    return train, val


def open_split(
    settings: Settings, split: str, given: Mapping[str, Source] = {}, *, progress: bool = True
) -> Store:
    """One of :func:`open_splits`: ``train`` or ``val``."""
    root = settings.path(settings.store_dir or f"{settings.output_dir}/stores")
    try:
        source = make_source(settings, split, given.get(split))
    except DataError as missing:
        found = find_store(root, settings, split) if settings.store_dir else None
        if found is None:
            lacks = f"; and {root} holds no store {_wanted(settings, split)}" if settings.store_dir else ""
            raise DataError(f"{missing}{lacks}") from None
        if progress:
            print(f"images are not at hand, using the store {found.folder}: {found.summary()}", flush=True)
        return found
    options = settings.pick("roi_size", "mask_size", "context", "workers", "max_images")
    return open_store(source, root=root, progress=progress, **options)


def make_source(settings: Settings, split: str, given: Source | None = None) -> Source:
    """The source of a split, as the settings say; reads no pixel and parses no file.

    One that is ``given`` takes the place of the data set that the settings name.

    Raises:
        DataError: a file or folder is missing.
    """
    first: Source = given or DATASETS[settings.data](settings, split)
    added = settings.add_pennfudan if split == "train" else None
    others = [PennFudanPeople(settings.path(added), split)] if added else []
    planted = faults.parse(settings.inject or "") if split == "train" else []
    corrupted = {fault.step - 1: fault.value for fault in planted if fault.what == "file"}
    return JoinedSources([first, *others], split, corrupted) if others or corrupted else first


def find_store(root: Path, settings: Settings, split: str) -> Store | None:
    """The store in ``root`` that fits the settings without a look at the data; None: there is none.

    ``root`` may be the store's own folder. A store of more images than ``max_images`` serves with its first
    ones.

    Raises:
        DataError: stores of different data fit, or the one that fits is damaged.
    """
    sizes = store_sizes(settings.roi_size, settings.mask_size, settings.context)
    wanted = {"source": _name(settings, split), "split": split, **sizes}
    fitting: dict[str, Path] = {}
    unreadable = None
    for file in sorted([*root.glob("[!.]*/store.json"), *root.glob("store.json")]):
        try:
            info = read_info(file.parent)
        except DataError as error:
            if file.parent.name.startswith(f"{wanted['source']}-{split}-"):
                unreadable = error
            continue
        enough = info.max_images is None or (settings.max_images or info.max_images + 1) <= info.max_images
        if enough and all(getattr(info, name) == value for name, value in wanted.items()):
            fitting.setdefault(info.fingerprint, file.parent)
    if len(fitting) > 1:
        names = ", ".join(folder.name for folder in fitting.values())
        several = f"stores of different data, and each is one {_wanted(settings, split)}"
        raise DataError(f"{root} holds {several}: {names}; leave one there or give data_dir")
    if not fitting and unreadable:
        raise unreadable
    found = next(iter(fitting.values()), None)
    return None if found is None else Store.open(found, settings.max_images)


def _name(settings: Settings, split: str) -> str:
    """The source's name in the stores of a split."""
    return f"{settings.data}+pennfudan" if settings.add_pennfudan and split == "train" else settings.data


def _wanted(settings: Settings, split: str) -> str:
    roi, mask = ("x".join(map(str, size)) for size in (settings.roi_size, settings.mask_size))
    limit = "" if settings.max_images is None else f", at least {settings.max_images} images"
    sizes = f"roi_size {roi}, mask_size {mask}, context {settings.context:g}"
    return f"of {_name(settings, split)} {split} with {sizes}{limit}"


class JoinedSources:
    """The images of all ``parts``, one data set after the other; ``max_images`` counts from the first.

    Images and persons keep the ids of their own data sets, so one id may be there twice; the store knows the
    data set of each.

    Args:
        parts: the data sets.
        split: ``train`` or ``val``.
        corrupted: images whose files the setting ``inject`` makes bad, ``truncated`` or ``missing``. The bad
            file is a real one, cut in half, and goes through the reader that all files go through.
    """

    def __init__(self, parts: Sequence[Source], split: str, corrupted: Mapping[int, Any] = {}) -> None:
        self.parts, self.split, self.corrupted = list(parts), split, corrupted
        self.name = "+".join(part.name for part in parts)
        self.workers = next((one for part in parts if (one := getattr(part, "workers", None))), None)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def instances(self, max_images: int | None = None) -> Instances:
        """Every ROI of the first ``max_images`` images."""
        parts: list[Instances] = []
        starts = [0]
        for source in self.parts:
            if max_images is None or starts[-1] < max_images:
                parts.append(source.instances(None if max_images is None else max_images - starts[-1]))
                starts.append(starts[-1] + parts[-1].images)
        columns: Any = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        columns["image_index"] += np.repeat(np.array(starts[:-1], np.int32), [len(part) for part in parts])
        by_name = dict(zip([source.name for source in self.parts], starts[:-1], strict=False))
        tally = Tally(*parts)
        for index in (index for index in self.corrupted if index >= starts[-1]):
            tally.note("planted fault beyond the last image", f"image {index + 1} of {starts[-1]}")
        return Instances(**columns, images=starts[-1], starts=by_name, **vars(tally))

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        place = index
        for source in self.parts:
            if place < len(source):
                scene = source.scene(place)
                return self._corrupt(index, scene) if index in self.corrupted else scene
            place -= len(source)
        raise IndexError(f"{self.name} {self.split} has {len(self)} images")

    def _corrupt(self, index: int, scene: Scene) -> Scene:
        """The scene with the image that a bad file holds; raises what a reader raises."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"image {index + 1} of {self.name} {self.split}.jpg"
            if self.corrupted[index] == "truncated":
                Image.fromarray(scene.image).save(file)
                os.truncate(file, file.stat().st_size // 2)
            return Scene(sources.decode_image(file), scene.masks, scene.ignored, scene.notes)

    def names(self) -> list[str]:
        """Those of all parts, with the part's number before each."""
        parts = [(i, one.names()) for i, one in enumerate(self.parts) if isinstance(one, FileSource)]
        return [f"{i}:{name}" for i, names in parts for name in names]

    def locate(self, name: str) -> Path | None:
        """The file that a name of a part means."""
        part, _, name = name.partition(":")
        source = self.parts[int(part)]
        assert isinstance(source, FileSource)
        return source.locate(name)

    def fingerprint(self) -> str:
        """Of all parts, and of the corrupted images."""
        bad = f" but for {sorted(self.corrupted.items())}" if self.corrupted else ""
        return "; ".join(source.fingerprint() for source in self.parts) + bad


# -- the data sets by name -----------------------------------------------------------------------------
def _data_dir(settings: Settings, holds: str) -> Path:
    if not settings.data_dir:
        raise DataError(f"data = {settings.data} needs data_dir, {holds}")
    return settings.path(settings.data_dir)


def _pennfudan(settings: Settings, split: str) -> Source:
    return PennFudanPeople(_data_dir(settings, "the folder that holds PNGImages and PedMasks"), split)


def _coco(settings: Settings, split: str) -> Source:
    given = settings.data_dir, getattr(settings, f"{split}_annotations"), getattr(settings, f"{split}_images")
    paths = coco_paths(split, *(settings.path(place) if place else None for place in given))
    return CocoPeople(*paths, split, **coco_options(settings))


def coco_options(settings: Settings, *names: str) -> dict[str, Any]:
    """The settings that say how a COCO file is read, all or ``names``, as arguments of the source."""
    chosen = settings.pick(*(names or ("category", "crowd", "exif")))
    return {"allow_outside": settings.allow_images_outside, **chosen}


def _yolo(settings: Settings, split: str) -> Source:
    folder = _data_dir(settings, "the folder of data.yaml, or that file")
    return YoloPeople(folder, split, **coco_options(settings, "category"))


def _labelme(settings: Settings, split: str) -> Source:
    files, images, part = _places(settings, split)
    return LabelmePeople(files, images, split, part, **coco_options(settings, "category"))


def _masks(settings: Settings, split: str) -> Source:
    masks, images, part = _places(settings, split, "masks", "images")
    return MaskPeople(images, masks, split, part, exif=settings.exif)


def _arrays(settings: Settings, split: str) -> Source:
    raise DataError("data = arrays are in a program's memory: call refinelib.train(settings, data=...)")


def _places(settings: Settings, split: str, files: str = "", images: str = "") -> tuple[Path, Path, str]:
    """Folders of a split's annotations and images, and the part to take; see :func:`formats.split_of`."""
    own = [getattr(settings, f"{split}_{what}") for what in ("annotations", "images")]
    if not settings.data_dir and not all(own):
        places = f"{split}_annotations and {split}_images"
        raise DataError(f"data = {settings.data} needs two folders: give data_dir, or {places}")
    root = settings.path(settings.data_dir or "")
    place, part = (settings.path(own[0]), "all") if own[0] else _split_folder(root, files, split)
    pictures = _split_folder(root, images, split)[0] if images else root  # LabelMe's may lie above the JSON
    return place, settings.path(own[1]) if own[1] else pictures, part


def _split_folder(root: Path, what: str, split: str) -> tuple[Path, str]:
    """All of ``root/SPLIT/what`` or ``root/what/SPLIT``, where one is there; else a part of ``root/what``."""
    for pattern in ("{0}/{1}", "{1}/{0}"):
        places = {one: root / pattern.format(one, what or ".") for one in ("train", "val")}
        if any(place.is_dir() for place in places.values()):
            return places[split], "all"
    return root / what, split


_FOLDER = Option("data_dir", None, "folder of the data set in its published layout", role="run")
_PLACES = {
    "train_annotations": "COCO JSON, folder of masks or of LabelMe files to train on",
    "train_images": "folder of its images",
    "val_annotations": "the same to validate on",
    "val_images": "folder of its images",
}
_WHERE = [
    Option(name, None, f"{text}, where it is not in data_dir", role="run") for name, text in _PLACES.items()
]
_OUTSIDE = "also read images that a COCO file names outside its image folder"
_READ = (
    Option("allow_images_outside", False, _OUTSIDE, role="run"),
    Option("category", "person", "names of the categories that are persons, by commas", role="data"),
)
_CROWD = "iscrowd: skip: a region, ignored; keep: one person; auto: keep where nearly all persons have it"
_MARKS = Option("crowd", "auto", _CROWD, {"choices": ("auto", "skip", "keep")}, role="data")
_EXIF = "orientation of image files; ignore: people were annotated on the pixels as stored"
_TURN = Option("exif", "ignore", _EXIF, {"choices": ("ignore", "apply")}, role="data")
DATASETS.add("synthetic", lambda settings, split: SyntheticPeople(SYNTHETIC[split], split))
DATASETS.add("pennfudan", _pennfudan, _FOLDER)
DATASETS.add("coco", _coco, _FOLDER, *_WHERE, *_READ, _MARKS, _TURN)
DATASETS.add("yolo", _yolo, _FOLDER, *_READ)
DATASETS.add("labelme", _labelme, _FOLDER, *_WHERE, *_READ)
DATASETS.add("masks", _masks, _FOLDER, *_WHERE, _TURN)
DATASETS.add("arrays", _arrays)
