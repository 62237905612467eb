"""Drawn people: the same everywhere, masks and boxes agree, and they are a source as the others are."""

import inspect
import pickle

import numpy as np
import pytest

from refinelib.data.coco import CocoPeople
from refinelib.data.formats import PennFudanPeople
from refinelib.data.sources import COLUMNS, MAX_INSTANCES, MIN_SIDE, DataError, Instances, Scene
from refinelib.data.synthetic import SyntheticPeople

N = 60


@pytest.fixture(scope="module")
def source():
    return SyntheticPeople(N)


@pytest.fixture(scope="module")
def scenes(source):
    return [source.scene(i) for i in range(N)]


def same(a: Scene, b: Scene) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)


def rows(people: Instances, keep=slice(None)) -> list[list]:
    return [getattr(people, name)[keep].tolist() for name in COLUMNS]


def test_any_process_draws_the_same_in_any_order(source, scenes):
    fresh = SyntheticPeople(3 * N)
    assert same(fresh.scene(N - 1), scenes[N - 1]) and same(fresh.scene(2), scenes[2])
    assert same(pickle.loads(pickle.dumps(SyntheticPeople(N))).scene(5), scenes[5])
    source.instances()
    travelled = pickle.loads(pickle.dumps(source))
    assert rows(travelled.instances()) == rows(source.instances()) and same(travelled.scene(7), scenes[7])


@pytest.mark.parametrize("other", [{"split": "val"}, {"seed": 3}])
def test_splits_and_seeds_differ(source, scenes, other):
    different = SyntheticPeople(N, **other)
    assert not any(same(different.scene(i), scene) for i, scene in enumerate(scenes[:8]))
    assert not np.array_equal(different.instances(8).boxes, source.instances(8).boxes)
    assert different.fingerprint() != source.fingerprint()


def test_fingerprint(source):
    assert source.fingerprint() == SyntheticPeople(N).fingerprint()
    assert source.fingerprint() != SyntheticPeople(N + 1).fingerprint()


def test_images_of_a_scene(scenes):
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert scene.masks.dtype == bool and scene.masks.shape[1:] == (height, width)
        assert 1 <= len(scene.masks) <= 4
        assert 170 < height < 230 and 170 < width < 230
        assert scene.image.std() > 5


def test_masks_are_disjoint_and_nobody_is_invisible(scenes):
    for scene in scenes:
        assert scene.masks.sum(0).max() == 1
        assert scene.masks.any((1, 2)).all()


def test_people_agree_with_scenes(source, scenes):
    people = source.instances()
    for row in range(len(people)):
        masks = scenes[people.image_index[row]].masks
        mask = masks[people.slots[row]]
        y, x = np.nonzero(mask)
        assert people.boxes[row].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert people.areas[row] == mask.sum()
        assert tuple(people.image_sizes[row]) == mask.shape
    small = sum(len(s.masks) for s in scenes) - len(people)
    assert small == sum(people.skipped.values())


def test_every_image_has_a_roi(source):
    people = source.instances()
    assert people.images == len(source) == N
    assert np.unique(people.image_index).tolist() == list(range(N))
    assert (np.diff(people.image_index) >= 0).all()
    assert len(set(people.annotation_ids.tolist())) == len(people)
    assert ((people.boxes[:, 2:] - people.boxes[:, :2]).min(1) >= MIN_SIDE).all()
    assert np.bincount(people.image_index).max() <= MAX_INSTANCES


def test_fewer_images_are_the_first(source):
    everybody, few = source.instances(), source.instances(7)
    assert few.images == 7
    assert rows(few) == rows(everybody, everybody.image_index < 7) == rows(SyntheticPeople(7).instances())
    assert source.instances(10 * N).images == N


def test_scenes_are_as_varied_as_promised(source, scenes):
    """Several persons, touching and cut ones, small and large ones, bright and dark images."""
    people = source.instances()
    crowds = [len(s.masks) for s in scenes]
    assert set(crowds) == {1, 2, 3, 4}
    touching = 0
    for scene in scenes:
        owner = (scene.masks * np.arange(1, len(scene.masks) + 1)[:, None, None]).sum(0)
        left, right = owner[:, :-1], owner[:, 1:]
        touching += bool(((left > 0) & (right > 0) & (left != right)).any())
    assert touching > N / 10
    heights = people.boxes[:, 3] - people.boxes[:, 1]
    assert heights.max() < 200 and heights.min() < 60 and heights.max() > 120
    assert ((people.boxes[:, 2:] == people.image_sizes[:, ::-1]) | (people.boxes[:, :2] == 0)).any()
    means = [s.image.mean() for s in scenes]
    assert max(means) - min(means) > 60


def test_colour_alone_does_not_tell_people_from_the_rest(scenes):
    """The best table of the image's own 4x4x4 colours, fitted on the answer, is far from the mask."""
    overlaps = []
    for scene in scenes:
        person = scene.masks.any(0).ravel()
        bins = (scene.image.reshape(-1, 3) // 64 @ [16, 4, 1]).astype(int)
        share = np.bincount(bins, person, 64) / np.maximum(np.bincount(bins, minlength=64), 1)
        guess = share[bins] > 0.5
        overlaps.append((guess & person).sum() / (guess | person).sum())
    assert np.mean(overlaps) < 0.45


def test_a_source_as_the_others(source):
    for other in (CocoPeople, PennFudanPeople):
        for method in ("__len__", "instances", "scene", "fingerprint"):
            assert inspect.signature(getattr(SyntheticPeople, method)) == inspect.signature(
                getattr(other, method)
            )
    assert source.name == "synthetic" and source.split == "train"
    people = source.instances()
    assert isinstance(people, Instances) and isinstance(source.scene(0), Scene)
    assert all(getattr(people, name).dtype == dtype for name, dtype in COLUMNS.items())


def test_what_cannot_be_drawn():
    with pytest.raises(DataError, match="at least 1 image"):
        SyntheticPeople(0)
    with pytest.raises(DataError, match="seed of 0 or more"):
        SyntheticPeople(4, seed=-1)
    for index in (-1, 4):
        with pytest.raises(IndexError, match="0 to 3"):
            SyntheticPeople(4).scene(index)
