"""Persons as ROIs: sources of images with masks, and the store they are decoded into once."""

from refinelib.data.coco import CocoPeople, coco_paths, decode_segmentation
from refinelib.data.pennfudan import PennFudanPeople
from refinelib.data.sources import DataError, Instances, Scene, SceneError, Source, decode_image
from refinelib.data.splits import make_source, open_split, open_splits
from refinelib.data.store import Store
from refinelib.data.store_build import open_store
from refinelib.data.synthetic import SyntheticPeople

__all__ = [
    "CocoPeople",
    "DataError",
    "Instances",
    "PennFudanPeople",
    "Scene",
    "SceneError",
    "Source",
    "Store",
    "SyntheticPeople",
    "coco_paths",
    "decode_image",
    "decode_segmentation",
    "make_source",
    "open_split",
    "open_splits",
    "open_store",
]
