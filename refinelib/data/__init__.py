"""Persons as ROIs: sources of images with masks, and the store they are decoded into once."""

from refinelib.data.annotations import decode_segmentation
from refinelib.data.arrays import ArrayPeople
from refinelib.data.coco import CocoPeople, coco_paths
from refinelib.data.formats import PennFudanPeople
from refinelib.data.sources import DataError, SceneError, Source, decode_image
from refinelib.data.splits import make_source, open_split, open_splits
from refinelib.data.store import Store
from refinelib.data.store_build import open_store
from refinelib.data.synthetic import SyntheticPeople

__all__ = ["ArrayPeople", "CocoPeople", "DataError", "PennFudanPeople", "SceneError", "Source", "Store"]
__all__ += ["SyntheticPeople", "coco_paths", "decode_image", "decode_segmentation", "make_source"]
__all__ += ["open_split", "open_splits", "open_store"]
