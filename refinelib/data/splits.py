"""From settings to the stores of training and validation people."""

from __future__ import annotations

from pathlib import Path

from refinelib.guard import faults
from refinelib.config import Settings
from refinelib.data.store_build import open_store, sampling
from refinelib.data.coco import CocoPeople, coco_paths
from refinelib.data.errors import DataError
from refinelib.data.joined import JoinedSources
from refinelib.data.pennfudan import PennFudanPeople
from refinelib.data.sources import Source
from refinelib.data.spoilt import CorruptedImages
from refinelib.data.store import Store, read_info
from refinelib.data.synthetic import SyntheticPeople

#: Images of the synthetic splits: the same people in every run, whatever its seed.
SYNTHETIC = {"train": 240, "val": 60}


def open_splits(settings: Settings, *, progress: bool = True) -> tuple[Store, Store]:
    """The train and the val store that the settings ask for, built where they don't exist yet.

    Stores lie in ``store_dir``, else in ``output_dir/stores``. Where the images are not at hand
    (no ``data_dir``, or not on this machine) a store in ``store_dir`` of the same data, split
    and sizes serves in their place.

    Raises:
        DataError: neither the data nor a store of it is there, or it cannot be used.
    """
    return open_split(settings, "train", progress=progress), open_split(settings, "val", progress=progress)


def open_split(settings: Settings, split: str, *, progress: bool = True) -> Store:
    """One of ``open_splits``: ``train`` or ``val``."""
    root = settings.path(settings.store_dir or f"{settings.output_dir}/stores")
    spoilt = [fault for fault in faults.parse(settings.inject or "") if fault.what == "file" and split == "train"]
    try:
        source = make_source(settings, split)
        source = CorruptedImages(source, spoilt) if spoilt else source
    except DataError as missing:
        travelled = find_store(root, settings, split) if settings.store_dir else None
        if travelled is None:
            if settings.store_dir:
                raise DataError(f"{missing}; and {root} holds no store {_wanted(settings, split)}") from None
            raise
        if progress:
            print(f"images are not at hand, using the store {travelled.folder}: {travelled.summary()}", flush=True)
        return travelled
    return open_store(
        source,
        roi_size=settings.roi_size,
        mask_size=settings.mask_size,
        context=settings.context,
        root=root,
        workers=settings.workers,
        max_images=settings.max_images,
        progress=progress,
    )


def make_source(settings: Settings, split: str) -> Source:
    """The source of scenes of a split, as the settings say; reads no pixel and parses no file.

    Raises:
        DataError: a file or folder is missing.
    """
    own = _own_source(settings, split)
    if settings.add_pennfudan and split == "train":
        return JoinedSources([own, PennFudanPeople(settings.path(settings.add_pennfudan), split)], split)
    return own


def source_name(settings: Settings, split: str) -> str:
    """What the stores of a split say they were made from."""
    return f"{settings.data}+pennfudan" if settings.add_pennfudan and split == "train" else settings.data


def _own_source(settings: Settings, split: str) -> Source:
    if settings.data == "synthetic":
        return SyntheticPeople(SYNTHETIC[split], split=split)
    data_dir = settings.path(settings.data_dir) if settings.data_dir else None
    if settings.data == "pennfudan":
        if data_dir is None:
            raise DataError("data = pennfudan needs data_dir, the folder that holds PNGImages and PedMasks")
        return PennFudanPeople(data_dir, split)
    given = {
        "train": (settings.train_annotations, settings.train_images),
        "val": (settings.val_annotations, settings.val_images),
    }
    annotations, images = (settings.path(path) if path else None for path in given[split])
    paths = coco_paths(split, data_dir, annotations, images)
    return CocoPeople(*paths, split, allow_outside=settings.allow_images_outside)


def find_store(root: Path, settings: Settings, split: str) -> Store | None:
    """The store in ``root`` that fits the settings without a look at the data; None: there is none.

    ``root`` may be the store's own folder. A store of more images than ``max_images`` serves with
    its first ones.

    Raises:
        DataError: stores of different data fit, or the one that fits is damaged.
    """
    sizes = sampling(settings.roi_size, settings.mask_size, settings.context)
    fitting, unreadable = {}, []
    for file in sorted([*root.glob("*/store.json"), *root.glob("store.json")]):
        try:
            info = read_info(file.parent)
        except DataError as error:
            if file.parent.name.startswith(f"{source_name(settings, split)}-{split}-"):
                unreadable.append(error)
            continue
        same = (info["source"], info["split"]) == (source_name(settings, split), split)
        same = same and all(info[name] == size for name, size in sizes.items())
        limit = info["max_images"]
        if same and (limit is None or (settings.max_images is not None and limit >= settings.max_images)):
            fitting.setdefault(info.get("fingerprint"), []).append(file.parent)
    if len(fitting) > 1:
        names = ", ".join(folder.name for folders in fitting.values() for folder in folders)
        raise DataError(
            f"{root} holds stores of different data, and each is one {_wanted(settings, split)}: {names}; "
            f"leave one there or give data_dir"
        )
    if not fitting:
        if unreadable:
            raise unreadable[0]
        return None
    (folders,) = fitting.values()
    return Store.open(folders[0]).first_images(settings.max_images)


def _wanted(settings: Settings, split: str) -> str:
    (h, w), (mh, mw) = settings.roi_size, settings.mask_size
    limit = "" if settings.max_images is None else f", at least {settings.max_images} images"
    return f"of {source_name(settings, split)} {split} with roi_size {h}x{w}, mask_size {mh}x{mw}, context {settings.context:g}{limit}"
