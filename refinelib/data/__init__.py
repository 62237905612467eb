"""Instances as ROIs: sources of scenes, and the store they are decoded into once."""

from refinelib.data.store_build import open_store
from refinelib.data.coco import CocoPeople, coco_paths, decode_segmentation
from refinelib.data.errors import DataError, SceneError
from refinelib.data.pennfudan import PennFudanPeople
from refinelib.data.sources import Instances, Scene, Source, decode_image
from refinelib.data.splits import make_source, open_split, open_splits
from refinelib.data.store import Store
from refinelib.data.synthetic import SyntheticPeople

__all__ = [
    "CocoPeople",
    "DataError",
    "PennFudanPeople",
    "Instances",
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
