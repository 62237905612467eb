"""Persons of data sets in other formats than COCO's, as sources.

Those of YOLO and LabelMe are handed to :class:`CocoPeople` as COCO content; masks, those of Penn-Fudan among
them, are read as they are.
"""

import hashlib
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinelib.data import sources
from refinelib.data.annotations import Content, whole
from refinelib.data.coco import CocoPeople, files_in
from refinelib.data.sources import DataError, InstancesBuilder, Mask, Masks, Scene, SceneError, persons_in
from refinelib.files import JSON, PathLike, read_json, read_yaml, retold, shown

DAMAGED = "annotation file that cannot be read"
NO_PICTURE = "labels without image"
STRAY_MASK = "mask without image"
#: Endings of the files that are taken for images.
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
#: Of a pixel of a mask with a palette: nobody knows who is there.
VOID = 255
#: Bytes of the largest LabelMe file that is read: it may hold its image, too.
MOST_BYTES = 32 << 20
Points = NDArray[np.float64]
#: Name of an image in the image folder, (h, w) if known, and its persons: COCO's annotations but for the ids.
Found = tuple[str, tuple[Any, Any], list[dict[str, Any]]]


class _Files(CocoPeople, ABC):
    """Turns files into COCO content, and counts those that it cannot."""

    #: Names of the categories by number.
    kinds: dict[Any, Any]

    def read(self) -> Content:
        """The split's files as a COCO file would have them.

        Raises:
            DataError: no image has annotations.
        """
        lost, content = InstancesBuilder(), Content(images=[], annotations=[])
        self._unread: list[str] = []
        for paths in self._labelled():
            try:
                name, (height, width), persons = self._read(*paths)
            except (OSError, ValueError) as error:
                lost.skip(getattr(error, "reason", DAMAGED), str(error))
                if (file := getattr(error, "file", None)) is not None:
                    self._unread.append(os.path.relpath(file, self.images))
                continue
            image, first = len(content["images"]) + 1, len(content["annotations"]) + 1
            content["images"].append({"id": image, "file_name": name, "height": height, "width": width})
            numbered = enumerate(persons, first)
            content["annotations"] += [{"id": n, "image_id": image, **one} for n, one in numbered]
        if not content["images"]:
            lost.instances(f"the split {self.split} of {self.annotations}", "no image has annotations")
        content["left_out"] = [(one, lost.examples[one], None) for one in lost.skipped.elements()]
        return {**content, "categories": [{"id": kind, "name": name} for kind, name in self.kinds.items()]}

    def names(self) -> list[str]:
        """The images, also those that could not be read."""
        return [*super().names(), *self._unread]

    def fingerprint(self) -> str:
        """Of the places, of the names, sizes and times of the label files, and of the options."""
        paths = [self.annotations] * self.annotations.is_file() + [*itertools.chain(*self._labelled())]
        stamps = [(file.name, sources.file_stamp(file)[:2]) for file in paths]
        parts = [super().fingerprint(), self.split, stamps]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _stamp(self) -> list[Any]:
        return [str(self.annotations.resolve())]

    @abstractmethod
    def _labelled(self) -> Iterator[tuple[Path, ...]]:
        """Each file that persons are read from, and the images that it is known to belong to."""

    @abstractmethod
    def _read(self, file: Path, *images: Path) -> Found:
        """One image; ``OSError`` or ``ValueError`` where it or its labels are damaged."""


class YoloPeople(_Files):
    """Persons of a data set in YOLO's segmentation format.

    ``data.yaml`` has ``path`` (else its own folder), ``names``, and by split the folders of its images, such
    as ``images/train``. The labels of ``images/train/1.jpg`` are the lines of ``labels/train/1.txt``: the
    number of a class, and corners ``x y x y ...`` of a polygon in fractions of the upright image. A box in
    place of a polygon is counted as a person without mask; an image without labels has no persons.

    Args:
        data: the folder of ``data.yaml``, or a file like it.
        split: ``train``, ``val``, or another that the file has.
        **options: of :class:`CocoPeople`.

    Raises:
        DataError: the file cannot be read, or a folder is missing.
    """

    name = "yolo"

    def __init__(self, data: PathLike, split: str = "val", **options: Any) -> None:
        file = Path(os.path.expanduser(data))
        file = file if os.path.isfile(file) else file / "data.yaml"
        with retold(DataError, "", "; give its folder, or a file like it"):
            content = read_yaml(file)
        content = content if isinstance(content, dict) else {}
        names, root, places = content.get("names"), content.get("path") or ".", content.get(split)
        names = dict(enumerate(names)) if isinstance(names, list) else names
        if "kpt_shape" in content:
            raise DataError(f"{file} has kpt_shape: its labels are poses, and masks are needed")
        places = places if isinstance(places, list) else [places]
        if not isinstance(names, dict) or not places or {*map(type, (root, *places))} != {str}:
            rule = f"a list or a mapping from numbers; {split}, its folder of images in the folder path"
            raise DataError(f"{file} must have names, {rule}")
        self._pairs = [_folders(file, root, place) for place in places]
        self.kinds = {whole(number): name for number, name in names.items()}
        images = os.path.commonpath([images for images, _ in self._pairs])
        super().__init__(file, images, split, **{"exif": "apply", **options})  # YOLO turns images upright

    def _labelled(self) -> Iterator[tuple[Path, ...]]:
        for folder, labels in self._pairs:
            owners = defaultdict[Path, list[Path]](list)
            for image in listed(folder, IMAGES):
                owners[image.relative_to(folder).with_suffix("")].append(image)
            for text in listed(labels, (".txt",)):
                yield text, *owners[text.relative_to(labels).with_suffix("")]

    def _read(self, file: Path, *images: Path) -> Found:
        if not images:
            raise SceneError(NO_PICTURE, f"there is no image of {file}")
        if len(images) > 1:
            both = " and ".join(image.name for image in images)
            raise SceneError(sources.TWICE, f"{file} has the labels of {both}: give each image its own")
        size = sources.image_size(images[0], upright=True)
        if not os.path.isfile(file) or os.path.getsize(file) > JSON:  # reading a FIFO would wait
            raise SceneError(DAMAGED, f"{file} must be a text file of at most {JSON} bytes")
        text = file.read_bytes().decode("utf-8-sig", "replace")
        lines = [(f"line {n} of {file.name}", line.split()) for n, line in enumerate(text.splitlines(), 1)]
        persons = [self._person(words, size, where) for where, words in lines if words]
        return os.path.relpath(images[0], self.images), size, persons

    def _person(self, words: list[str], size: tuple[int, int], where: str) -> dict[str, Any]:
        """A line's annotation; words stand in the place of a class or a mask that it lacks."""
        try:
            kind, *values = map(float, words)
        except ValueError:
            kind, values = np.nan, []
        if kind not in self.kinds:
            return {"category_id": f"{where}, {' '.join(words)}"}
        one = {"category_id": int(kind), "segmentation": f"{where}, not x y x y x y ... in 0 to 1,"}
        if all(-0.01 <= value <= 1.01 for value in values) and len(values) > 3 and len(values) % 2 == 0:
            points = np.reshape(values, (-1, 2)) * size[::-1]
            if len(points) > 2:
                return one | _mask([points])
            box = [*(points[0] - points[1] / 2).tolist(), *points[1].tolist()]
            one |= {"bbox": box, "segmentation": f"{where}, a box,"}
        return one


class LabelmePeople(_Files):
    """Persons of a folder of LabelMe's JSON files.

    Polygons of one label and ``group_id`` in an image are one person. Other shapes, rectangles among them,
    are counted as persons without mask.

    Args:
        annotations: folder of the JSON files, also in folders in it.
        images: folder that holds the images, also in folders in it; ``imagePath`` counts from the JSON file,
            and where nothing is there, from this folder.
        split: name for reports and for the store's folder.
        part: the files to take, by :func:`split_of`: ``train``, ``val`` or ``all``.
        **options: of :class:`CocoPeople`.

    Raises:
        DataError: a folder is missing.
    """

    name = "labelme"

    def __init__(
        self, annotations: PathLike, images: PathLike, split: str, part: str = "all", **options: Any
    ) -> None:
        super().__init__(annotations, images, split, **{"exif": "apply", **options})  # LabelMe shows them so
        self.part, self.kinds, self._numbers = part, {}, dict[str, int]()

    def _existing(self, annotations: PathLike, images: PathLike) -> tuple[Path, Path]:
        rule = f"give data_dir, or {self.split}_annotations and {self.split}_images"
        return sources.existing_folder(annotations, rule=rule), sources.existing_folder(images, rule=rule)

    def _labelled(self) -> Iterator[tuple[Path, ...]]:
        files = listed(self.annotations, (".json",))
        return ((file,) for file in files if self.part in ("all", split_of(file)))

    def _read(self, file: Path, *images: Path) -> Found:
        content = read_json(file, limit=MOST_BYTES)
        content = content if isinstance(content, dict) else {}
        shapes, path = content.get("shapes"), content.get("imagePath")
        if not isinstance(shapes, list) or not isinstance(path, str):
            raise SceneError(DAMAGED, f"{file} lacks shapes or imagePath, which LabelMe writes")
        written = PureWindowsPath(path)  # takes / and \ for separators, whatever the system
        name = os.path.relpath(file.parent / written.as_posix(), self.images)
        try:
            if not os.path.isfile(self.images / name):  # elsewhere: the folders that both have must agree
                own = file.parent.relative_to(self.annotations).joinpath(*written.parts)
                own = Path(*written.parts[1:]) if written.anchor else own
                name = "/".join(part for part in Path(os.path.normpath(own)).parts if part != "..")
            self.folder.find(name)
        except SceneError as error:
            inside = f": save the one inside {file} (imageData) there" if content.get("imageData") else ""
            raise SceneError(error.reason, f"{error}{inside}", error.file) from None
        persons, groups = list[dict[str, Any]](), dict[tuple[int, Any], list[Points]]()
        for place, shape in enumerate(shapes, 1):
            label = shape.get("label") if isinstance(shape, dict) else None
            if not isinstance(label, str):
                persons.append({"category_id": f"shape {place} of {file.name}, without label"})
                continue
            kind = self._numbers.setdefault(label, len(self._numbers) + 1)
            self.kinds[kind], group, form = label, shape.get("group_id"), shape.get("shape_type") or "polygon"
            points = _points(shape)
            if form == "polygon" and points is not None and len(points) > 2:
                groups.setdefault((kind, place if group is None else shown(group)), []).append(points)
            else:
                what = f"shape {place} of {file.name}, a {form},"
                box = {} if points is None else {"bbox": _mask([points])["bbox"]}
                persons.append({"category_id": kind, "segmentation": what, **box})
        persons += [{"category_id": kind, **_mask(outlines)} for (kind, _), outlines in groups.items()]
        return name, (content.get("imageHeight"), content.get("imageWidth")), persons


class MaskPeople(sources.IndexedSource):
    """Persons whose numbers are the pixel values of masks: the image ``NAME.jpg`` has the mask ``NAME.png``.

    Masks have 1, 8 or 16 bits or a palette, and 0 where there is nobody; with a palette, 255 is ignored, as
    in PASCAL VOC. Boxes are taken from them. Folders are searched with the folders in them; one folder may
    hold both images and masks.

    Args:
        images: folder of images.
        masks: folder of masks.
        split: name for reports and for the store's folder.
        part: the images to take, by :func:`split_of`: ``train``, ``val`` or ``all``.
        exif: ``ignore``: masks were made of the pixels as stored; ``apply``: of the image turned upright.

    Raises:
        DataError: a folder is missing.
    """

    name = "masks"
    rule = "data_dir must hold images and masks, or give train_images and train_annotations, and those of val"
    suffixes: tuple[str, ...] = IMAGES
    #: Of a mask's name, after that of its image; and the step from one image's annotation ids to the next's.
    ending, ids = ".png", 1 << 16

    def __init__(
        self, images: PathLike, masks: PathLike, split: str = "train", part: str = "all", exif: str = "ignore"
    ) -> None:
        super().__init__(split)
        self.part, self.exif = part, exif
        self.images = sources.existing_folder(images, rule=self.rule)
        self.masks = sources.existing_folder(masks, rule=self.rule)

    def _listed(self, builder: InstancesBuilder) -> tuple[Iterable[Any], str, str]:
        """By name."""
        for mask in self._strays:
            builder.skip(STRAY_MASK, f"there is no image of the mask {mask} in {self.images}")
        owners = defaultdict[Path, list[str]](list)
        for _, image, mask in self._files:
            owners[mask].append(image.name)
        empty = f"no {' or '.join(self.suffixes)} file in {self.images}"
        images = [(*one, owners[one[-1]]) for one in self._files]
        return images, f"the split {self.split} of {self.images.parent}", empty

    def _add(self, image: tuple[int, Path, Path, list[str]], builder: InstancesBuilder) -> Any:
        """Reads the mask, not the image; returns both files."""
        number, file, mask, owners = image
        if len(owners) > 1:
            raise SceneError(sources.TWICE, f"{mask} is of {' and '.join(owners)}: give each its own")
        owner, _, ids, areas, boxes = _read_mask(mask)
        # An annotation id names the image and the person in it.
        numbers = [number * self.ids + int(i) for i in ids]
        has_roi = builder.add(file.name, number, owner.shape, numbers, boxes, areas)
        return (file, mask) if has_roi else None

    def scene(self, index: int) -> Scene:
        """Image ``index`` of ``instances()`` and the masks of all its persons."""
        file, mask = self._entry(index)
        owner, void, ids, *_ = _read_mask(mask)
        size, upright, notes = owner.shape, self.exif == "apply", list[sources.Note]()
        image = sources.decode_image(file, size, upright=upright, notes=notes)
        return Scene(image, Masks(len(ids), size, lambda slot: owner == ids[slot]), void, notes)

    def names(self) -> list[str]:
        """All images and masks of the split."""
        return [str(file) for _, *both in self._files for file in both]

    def locate(self, name: str) -> Path | None:
        """The file of that name."""
        return Path(name)

    def fingerprint(self) -> str:
        """Of the folders, the names of all images and masks of the split, and how they are read."""
        parts = [self.split, self.part, self.exif, *self.names(), *map(str, self._strays)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _mask_of(self) -> dict[Path, Path]:
        """The mask of each image, of all splits."""
        images = listed(self.images, self.suffixes)
        names = [image.relative_to(self.images).with_name(image.stem + self.ending) for image in images]
        masks = [self.masks / name for name in names]
        among = {*masks}  # those that lie among the images are none
        return {image: mask for image, mask in zip(images, masks, strict=True) if image not in among}

    @cached_property
    def _files(self) -> list[tuple[int, Path, Path]]:
        """Images of the split, each with its number among all images, and their masks."""
        pairs = enumerate(self._mask_of.items(), 1)
        return [(number, *pair) for number, pair in pairs if self._takes(pair[0])]

    @cached_property
    def _strays(self) -> list[Path]:
        """Masks of the split that no image has."""
        return sorted(filter(self._takes, {*listed(self.masks, (".png",))} - {*self._mask_of.values()}))

    def _takes(self, file: Path) -> bool:
        return self.part in ("all", split_of(file))


class PennFudanPeople(MaskPeople):
    """Persons of the Penn-Fudan pedestrian set in its published layout.

    The set has no split of its own: :func:`split_of` tells it by an image's name.

    Args:
        folder: holds ``PNGImages`` and ``PedMasks``.
        split: ``train``, ``val`` or ``all``.

    Raises:
        DataError: a folder is missing.
    """

    name = "pennfudan"
    rule = "data_dir (or add_pennfudan) must hold PNGImages and PedMasks, as PennFudanPed does"
    suffixes = (".png",)
    ending, ids = "_mask.png", 1000

    def __init__(self, folder: PathLike, split: str = "train") -> None:
        if split not in ("train", "val", "all"):
            raise DataError(f"Penn-Fudan has no split {split!r}: give train, val or all")
        super().__init__(Path(folder, "PNGImages"), Path(folder, "PedMasks"), split, part=split)


def listed(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with these endings in a folder and the folders in it, sorted; see :func:`files_in`.

    Example:
        >>> listed(Path("nowhere"), (".png",))
        []
    """
    return sorted(file for file in files_in(folder) if file.suffix.lower() in suffixes)


def split_of(file: Path) -> str:
    """The split of an image in a set that has none: ``val`` where its name's SHA-1 is a multiple of 5.

    That is about every fifth, whatever other images are there.

    Example:
        >>> split_of(Path("FudanPed00001.png"))
        'train'
    """
    return "train" if int(hashlib.sha1(os.fsencode(file.stem)).hexdigest(), 16) % 5 else "val"


def _read_mask(file: Path) -> tuple[NDArray[np.uint16], Mask | None, Any, Any, Any]:
    """Id of each pixel ``[H, W]``, where it is void, and what :func:`persons_in` says of it."""
    with sources.opened(file, "mask") as image:
        image.load()
        owner, palette = np.array(image), image.mode == "P"
    numbers = owner.dtype.kind in "bu" or ((owner % 1 == 0) & (owner >= 0) & (owner < 2**16)).all()
    if owner.ndim != 2 or not numbers:
        rule = "must have one value a pixel, the person's number, from 1 to 65535 and 0 elsewhere"
        raise SceneError(sources.UNREADABLE, f"{file} {rule}")
    void = (owner == VOID) & palette
    owner = np.where(void, 0, owner).astype(np.uint16)
    if not owner.any():
        raise SceneError(sources.NO_MASK, f"{file} has no person in it")
    return owner, void if void.any() else None, *persons_in(owner)


def _mask(polygons: list[Points]) -> dict[str, Any]:
    """COCO's segmentation, box and area of polygons ``[N, 2]``."""
    corners = np.concatenate(polygons)
    areas = [abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in (one.T for one in polygons)]
    one = {"bbox": [*corners.min(0).tolist(), *np.ptp(corners, axis=0).tolist()], "area": float(sum(areas))}
    return {**one, "segmentation": [polygon.ravel().tolist() for polygon in polygons]}


def _points(shape: dict[str, Any]) -> Points | None:
    """Points ``[N, 2]`` of a LabelMe shape, two or more; None: they are damaged."""
    try:
        points = np.array(shape.get("points"), np.float64)
    except (TypeError, ValueError):
        return None
    pairs = points.ndim == 2 and points.shape[1] == 2 and len(points) > 1
    return points if pairs and bool((np.abs(points) < 1e6).all()) else None


def _folders(file: Path, root: str, place: str) -> tuple[Path, Path]:
    """Folders of a split's images and labels, as ``file`` names them or as they lie beside it."""
    place = place.replace("\\", "/")
    names = place, place.removeprefix("../")  # Roboflow writes ../train/images for train/images
    tried = [Path(os.path.abspath(top / name)) for top in (file.parent / root, file.parent) for name in names]
    images = next((folder for folder in tried if os.path.isdir(folder)), tried[0])
    before, found, after = f"{images}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    labels = Path(before, "labels", after) if found else images
    rule = f"correct {place} or path in {file}, and have labels/ beside images/"
    sources.existing_folder(images, "image folder", rule)
    return images, sources.existing_folder(labels, "label folder", rule)
