"""Persons as ROIs: sources of images with masks, and the store they are decoded into once."""

from refinelib.data.annotations import decode_segmentation as decode_segmentation
from refinelib.data.arrays import ArrayPeople as ArrayPeople
from refinelib.data.coco import CocoPeople as CocoPeople
from refinelib.data.coco import coco_paths as coco_paths
from refinelib.data.formats import PennFudanPeople as PennFudanPeople
from refinelib.data.sources import DataError as DataError
from refinelib.data.sources import SceneError as SceneError
from refinelib.data.sources import Source as Source
from refinelib.data.sources import decode_image as decode_image
from refinelib.data.splits import make_source as make_source
from refinelib.data.splits import open_split as open_split
from refinelib.data.splits import open_splits as open_splits
from refinelib.data.store import Store as Store
from refinelib.data.store_build import open_store as open_store
from refinelib.data.synthetic import SyntheticPeople as SyntheticPeople
