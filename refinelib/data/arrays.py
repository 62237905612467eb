"""Persons that are in memory: numpy arrays, lists, or a PyTorch data set of images and masks."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import StackDataset
from tqdm import tqdm

from refinelib import ranks
from refinelib.config import Settings, SettingsError
from refinelib.data import sources
from refinelib.data.formats import VOID, split_of
from refinelib.data.sources import DataError, IndexedSource, InstancesBuilder, Masks, Scene, SceneError
from refinelib.files import reason

NO_IMAGE = "item without a usable image"
BAD_MASK = "item without a usable mask"
BAD_BOXES = "item whose boxes do not fit its masks"
#: What images, masks, boxes, an item and a data set have to be, for messages.
RULES = {
    NO_IMAGE: "give uint8 in 0 to 255, [H, W, 3] or [H, W], a tensor [3, H, W], or a PIL image",
    BAD_MASK: "give instance ids [H, W] from 1 to 65535, 0 for background and 255 for ignored; "
    "or true and false for each person, [N, H, W]",
    BAD_BOXES: "give a row of x0, y0, x1, y1 in pixels for each person, or None",
}
ITEM_RULE = "give (image, mask) or (image, mask, boxes)"
DATA_RULE = "give (images, masks), (images, masks, boxes), items, a torch Dataset, or (train, val)"
#: Step from one item's annotation ids to the next's.
IDS = 1 << 16


def sources_of(data: Any, settings: Settings) -> tuple[Settings, dict[str, "ArrayPeople"]]:
    """The splits of data in memory, and the settings of a run on them; see :class:`ArrayPeople`.

    Args:
        data: a tuple of two data sets, train and val; or one, of which ``seed`` chooses about every fifth
            item for val: item ``n``, if the SHA-1 of ``SEED-n`` is a multiple of 5. None: no data in memory.
        settings: of the run.

    Raises:
        DataError: no such data.
        SettingsError: the settings name another data set, or several processes.

    Example:
        >>> pixels, ids = np.zeros((10, 40, 60, 3), np.uint8), np.ones((10, 40, 60), np.uint8)
        >>> settings, splits = sources_of((pixels, ids), Settings(seed=1))
        >>> settings.data, len(splits["train"]), len(splits["val"])
        ('arrays', 7, 3)
    """
    if data is None:
        return settings, {}
    if settings.data not in ("synthetic", "arrays"):
        raise SettingsError(f"data = {settings.data} in the settings, and data in memory: leave one out")
    if settings.gpus > 1 and not ranks.launched():
        alone = f"gpus = {settings.gpus}: data in memory cannot be given to the processes that this starts"
        raise SettingsError(f"{alone}: leave gpus at 1, or start your own script with torchrun")
    if isinstance(data, tuple) and len(data) == 2 and not _is_column(data[0]):
        found = {split: ArrayPeople(part, split) for split, part in zip(("train", "val"), data, strict=True)}
    else:
        items, chosen = _items(data), dict[str, list[int]](train=[], val=[])
        for number in range(len(items)):
            chosen[split_of(Path(f"{settings.seed}-{number}"))].append(number)
        if empty := [split for split, numbers in chosen.items() if not numbers]:
            few = f"seed {settings.seed} chooses none of the {len(items)} items for {empty[0]}"
            raise DataError(f"{few}: give (train, val), two data sets")
        found = {split: ArrayPeople(data, split, numbers) for split, numbers in chosen.items()}
    return settings.model_copy(update={"data": "arrays"}), found


class ArrayPeople(IndexedSource):
    """Persons of data in memory.

    A data set is ``(images, masks)`` or ``(images, masks, boxes)``, arrays or lists with an entry for each
    image; or a list or a map-style PyTorch data set of items ``(image, mask)`` or ``(image, mask, boxes)``.

    - An image is uint8 ``[H, W, 3]`` in RGB or ``[H, W]``, a uint8 tensor ``[3, H, W]``, or a PIL image.
    - A mask has instance ids ``[H, W]``, 0 for background and 255 for ignored; or is ``[N, H, W]``, true or
      false for each person.
    - Boxes are ``[N, 4]`` in pixels: x0, y0, x1, y1, in the order of the masks or of the ids. None, or
      none given: those of the masks.

    A bad item, such as one whose mask has another size than its image, is left out and counted under a
    reason. The items are read twice in this process, and must be the same both times.

    Args:
        data: the data set.
        split: name for reports and for the store's folder.
        numbers: of the items to take; None: all.

    Raises:
        DataError: no such data set.

    Example:
        >>> ids = np.zeros((40, 60), np.uint8)
        >>> ids[5:35, 10:30], ids[5:35, 35:55] = 1, 2
        >>> people = ArrayPeople([(np.zeros((40, 60, 3), np.uint8), ids), (np.zeros((40, 60)), ids)])
        >>> found = people.instances()
        >>> found.boxes.tolist(), found.skipped
        ([[10.0, 5.0, 30.0, 35.0], [35.0, 5.0, 55.0, 35.0]], {'item without a usable image': 1})
    """

    name = "arrays"
    workers = 1  #: What a user's object holds, such as an open file, may not serve in another process.

    def __init__(self, data: Any, split: str = "train", numbers: Sequence[int] | None = None) -> None:
        super().__init__(split)
        self._items = _items(data)
        self._numbers = range(len(self._items)) if numbers is None else numbers

    def _listed(self, builder: InstancesBuilder) -> tuple[Iterable[int], str, str]:
        return self._numbers, f"the split {self.split} of the data in memory", "it is empty"

    def _add(self, image: int, builder: InstancesBuilder) -> tuple[int, str] | None:
        digest, persons = self._read_once[image]
        if isinstance(persons, SceneError):
            raise persons
        return (image, digest) if builder.add(f"item {image}", image, *persons) else None

    @cached_property
    def _read_once(self) -> dict[int, Any]:
        """Of each item a digest, and the further arguments of :meth:`InstancesBuilder.add`, or its error."""
        found = dict[int, Any]()
        how: Any = {"desc": f"{self.name} {self.split}: reading", "delay": 2, "disable": None}
        for number in tqdm(self._numbers, unit=" items", **how):
            try:
                digest, scene, *persons = self._read(number)
                found[number] = digest, (scene.image.shape[:2], *persons)
            except SceneError as error:
                found[number] = str(error), error
        return found

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons.

        Raises:
            DataError: the item is another than it was when it was first read.
        """
        number, digest = self._entry(index)
        with suppress(SceneError):
            now, scene, *_ = self._read(number)
            if now == digest:
                return scene
        other = f"item {number} of the {self.split} data is another than when it was first read"
        raise DataError(f"{other}: give data whose items stay the same, without random transforms")

    def fingerprint(self) -> str:
        """SHA-256 of what the items hold, in their order."""
        text = "".join(f"{number} {digest}\n" for number, (digest, _) in self._read_once.items())
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def _read(self, number: int) -> tuple[str, Scene, list[int], Any, Any]:
        """An item: a digest of what it holds, the scene, and the persons' ids, boxes and areas.

        Raises:
            SceneError: it cannot be used.
            DataError: it is no item at all.
        """
        where = f"item {number} of the {self.split} data"
        try:
            found = self._items[number]
        except OSError as error:
            raise SceneError(sources.UNREADABLE, f"{where} cannot be read: {error}") from None
        except Exception as error:  # the user's own code
            what = f"{where} cannot be read ({type(error).__name__}: {reason(error)})"
            raise DataError(f"{what}: {DATA_RULE}") from error
        if not isinstance(found, (tuple, list)) or len(found) not in (2, 3):
            raise DataError(f"{where} is {_kind(found)}: {ITEM_RULE}")
        image = _converted(found[0], _image, NO_IMAGE, where)
        mask = _converted(found[1], _mask, BAD_MASK, where)
        if mask.shape[-2:] != image.shape[:2]:
            sizes = "{1}x{0} pixels, its mask {3}x{2}".format(*image.shape[:2], *mask.shape[-2:])
            raise SceneError(sources.OTHER_SIZE, f"{where}: the image has {sizes}")
        given = [_converted(boxes, _boxes, BAD_BOXES, where) for boxes in found[2:] if boxes is not None]
        content = hashlib.sha256()
        for part in (image, mask, *given):
            content.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        void = np.asarray(mask == VOID) if mask.ndim == 2 else np.zeros(0, bool)
        if mask.ndim == 2:
            owner = np.where(void, 0, mask)
            ids, areas, boxes = sources.persons_in(owner)
            persons = ids > 0
            masks: Any = Masks(len(ids), mask.shape, lambda slot: owner == ids[slot])
        else:
            persons = np.asarray(mask.any((1, 2)))
            ids, masks = np.flatnonzero(persons) + 1, mask[persons]
            areas, boxes = masks.sum((1, 2)), [sources.box_of(one) for one in masks]
        if not len(ids):
            raise SceneError(sources.NO_MASK, f"{where} has no person in its mask")
        if given and len(given[0]) != len(persons):
            counts = f"{len(given[0])} boxes, {len(persons)} persons"
            raise SceneError(BAD_BOXES, f"{where}: {counts}: {RULES[BAD_BOXES]}")
        scene = Scene(image, masks, void if void.any() else None)
        own = (number * IDS + ids.astype(np.int64)).tolist()
        return content.hexdigest(), scene, own, given[0][persons] if given else boxes, areas


def _is_column(value: Any) -> bool:
    """Whether these are images, rather than items."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, (np.ndarray, Tensor, Image.Image))


def _items(data: Any) -> Any:
    """A data set as items by number.

    Raises:
        DataError: it is no such data set.
    """
    if isinstance(data, tuple) and data and _is_column(data[0]):
        columns = data[:2] + tuple(column for column in data[2:] if column is not None)
        sizes = [len(column) if hasattr(column, "__len__") else -1 for column in columns]
        if len(data) not in (2, 3) or len({*sizes}) > 1:
            raise DataError(f"images, masks and boxes have {sizes} entries: give one of each for each image")
        if getattr(data[1], "ndim", 3) < 3:
            raise DataError("the masks are one mask: give [N, H, W], or a list of (image, mask)")
        return StackDataset(*columns)
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(f"the data are {_kind(data)}, without a length or items by number: {DATA_RULE}")
    return data


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" {list(value.shape)}" if hasattr(value, "shape") else "")


def as_array(value: Any) -> NDArray[Any]:
    """What a user gives as an array; of lists, in whatever depth, one array of all.

    Example:
        >>> as_array([torch.tensor([1, 2]), (3, 4)]).tolist()
        [[1, 2], [3, 4]]
    """
    if isinstance(value, (list, tuple)):
        return np.array([as_array(one) for one in value])
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy lacks
    return np.asarray(value)


def _converted(value: Any, convert: Callable[[Any], NDArray[Any]], kind: str, where: str) -> NDArray[Any]:
    """What a user gives, in the form in which it is used; ``kind`` says why the item is left out if not."""
    try:
        return convert(value)
    except Exception as error:  # whatever a user's value raises
        raise SceneError(kind, f"{where}: {reason(error)}: {RULES[kind]}") from None


def _image(value: Any) -> NDArray[np.uint8]:
    """An image that a user gives as uint8 ``[H, W, 3]``."""
    pixels = as_array(sources.as_rgb(value) if isinstance(value, Image.Image) else value)
    found = f"{pixels.dtype} {list(pixels.shape)}"
    if isinstance(value, Tensor) and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"the image is {found}")
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")


def _mask(value: Any) -> NDArray[Any]:
    """A mask that a user gives as ids, uint16 ``[H, W]``, or as bool ``[N, H, W]``."""
    mask = as_array(value)
    if mask.dtype.kind not in "biuf" or mask.ndim not in (2, 3):
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}")
    stack = mask.ndim == 3
    wrong = (mask != 0) & (mask != 1) if stack else ~((mask >= 0) & (mask < IDS) & (mask == np.floor(mask)))
    if wrong.any():
        raise ValueError(f"the mask has the value {mask[wrong][0]:g}")
    return mask.astype(bool if stack else np.uint16)


def _boxes(value: Any) -> NDArray[np.float64]:
    """Boxes that a user gives, as float64 ``[N, 4]``, xyxy."""
    boxes = as_array(value)
    if boxes.shape[1:] != (4,) and boxes.size:
        raise ValueError(f"the boxes are {_kind(value)}")
    return boxes.astype(np.float64).reshape(-1, 4)
