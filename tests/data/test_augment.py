"""Augmentation: image and mask move together, and only as drawn."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import interpolate

from refinelib.data import augment, open_split
from refinelib.data.loader import BatchLoader


def disc(size, count=4):
    """A white disc on black, as crops and as coverage of another resolution."""

    def draw(height, width):
        rows, columns = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
        )
        return (((rows - 0.4) / 0.3) ** 2 + ((columns - 0.6) / 0.2) ** 2 < 1).float() * 255

    image = draw(64, 64)[None, :, :, None].expand(count, -1, -1, 3).to(torch.uint8)
    cover = (
        torch.stack([draw(*size), torch.zeros(size)], dim=-1)[None].expand(count, -1, -1, -1).to(torch.uint8)
    )
    return image, cover


def table(mode, count=4, seed=0):
    return augment.draw(count, mode=mode, generator=torch.Generator().manual_seed(seed))


def test_off_changes_nothing():
    image, cover = disc((64, 64))
    pixels, fractions = augment.apply(image, cover, table("off"), mode="off")
    assert torch.equal(fractions, cover.permute(0, 3, 1, 2).float())
    torch.testing.assert_close(pixels, augment.normalise(image.permute(0, 3, 1, 2)))


def test_flip_takes_image_and_mask_along_and_about_half_of_all():
    image, cover = disc((64, 64), count=64)
    drawn = table("flip", 64)
    flipped = drawn[:, augment.FLIP].bool()
    assert 16 < flipped.sum() < 48
    pixels, fractions = augment.apply(image, cover, drawn, mode="flip")
    plain = augment.apply(image, cover, drawn, mode="off")
    for now, then in zip((pixels, fractions), plain, strict=False):
        assert torch.equal(now[flipped], then[flipped].flip(-1)) and torch.equal(
            now[~flipped], then[~flipped]
        )


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (64, 32), (96, 64)])
def test_warped_mask_stays_on_the_warped_image(size):
    image, cover = disc(size, count=16)
    drawn = table("full", 16)
    drawn[:, [augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION]] = 1.0
    drawn[:, augment.ANGLE] = torch.linspace(-0.5, 0.5, 16)
    pixels, fractions = augment.apply(image, cover, drawn, mode="full")
    mean, std = augment.MEAN[0], augment.STD[0]
    seen = (pixels[:, :1] * std + mean) / 255
    mask = interpolate(
        fractions.sum(dim=1, keepdim=True) / 255, size=(64, 64), mode="bilinear", align_corners=False
    )
    apart = (seen - mask).abs().sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    assert apart.max() < 0.15, apart.max()  # blur of the coarser edge only
    assert (seen[0] - seen[-1]).abs().mean() > 0.01  # and it did move


def test_draw_depends_on_the_seed_alone_and_stays_in_range():
    assert torch.equal(table("full", 100), table("full", 100)) and not torch.equal(
        table("full", 100), table("full", 100, seed=1)
    )
    drawn = table("full", 1000)
    assert (
        drawn[:, augment.ANGLE].abs().max() <= 0.1746
        and drawn[:, augment.SCALE].min() > 0.86
        and drawn[:, augment.SCALE].max() < 1.16
    )
    assert drawn[:, augment.BRIGHTNESS].min() >= 0.7 and drawn[:, augment.BRIGHTNESS].max() <= 1.3
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    (
        augment.draw(10, mode="off", generator=generators[0]),
        augment.draw(10, mode="full", generator=generators[1]),
    )
    assert torch.equal(*(torch.rand(3, generator=g) for g in generators))  # a mode changes no later draw


def test_nothing_comes_from_the_host():
    """A step is captured as a CUDA graph, in which nothing may be copied from the host."""
    image, cover = disc((64, 64))
    graph = make_fx(lambda *given: augment.apply(*given, mode="strong", window=(0.5, 0.5)))(
        image, cover, table("strong")
    )
    held = [
        getattr(graph, node.target).flatten().tolist() for node in graph.graph.nodes if node.op == "get_attr"
    ]
    assert held == [pytest.approx(augment.MEAN), pytest.approx(augment.STD)]


@pytest.mark.parametrize("mode", ["off", "flip", "full", "strong"])
def test_compiled_it_holds_no_constant_and_gives_the_same(mode, monkeypatch):
    image, cover = (
        torch.randint(0, high, (4, 32, 32, last), dtype=torch.uint8) for high, last in ((256, 3), (128, 2))
    )
    plain = augment.apply(image, cover, table(mode), mode=mode, window=(0.5, 0.5))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    graph = make_fx(lambda *given: augment.apply(*given, mode=mode, window=(0.5, 0.5)))(
        image, cover, table(mode)
    )
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
    for mine, its in zip(graph(image, cover, table(mode)), plain, strict=False):
        torch.testing.assert_close(mine, its)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["off", "flip", "full", "strong"])
def test_compiled_batches_are_the_plain_ones_but_for_rounding(tiny, mode):
    settings = tiny(device="cuda", augment=mode)
    loader = BatchLoader(open_split(settings, "train"), device=torch.device("cuda"), batch_size=16, mode=mode)
    inputs = loader.inputs(loader.plan(0), 0)
    images, labels = loader.make(*inputs)
    loader.compile()
    for _ in range(2):
        mine, its = loader.make(*inputs)
        torch.testing.assert_close(mine, images, rtol=0, atol=2e-3)
        assert (its != labels).float().mean() < 1e-3
    loader.uncompile()
    assert torch.equal(loader.make(*inputs)[0], images)


# -- strong ----------------------------------------------------------------------------------------
def two_people(count=8):
    """Black crops with somebody of one shade in the middle: who is where shows in the pixels."""
    image = torch.zeros(count, 64, 64, 3, dtype=torch.uint8)
    cover = torch.zeros(count, 64, 64, 2, dtype=torch.uint8)
    cover[:, 16:48, 24:40, 0] = 255
    image[:, 16:48, 24:40] = (100 + 10 * torch.arange(count))[:, None, None, None].to(torch.uint8)
    return image, cover


def pasting(drawn, what, x=0.0, y=0.0):
    """A table that pastes and otherwise only re-fits the box."""
    drawn = augment.draw(len(drawn), mode="off", generator=torch.Generator())
    drawn[:, augment.PASTE] = what
    drawn[:, augment.PASTE_X], drawn[:, augment.PASTE_Y] = x, y
    return drawn


#: What the box of :func:`two_people` takes of the crop.
WINDOW = (0.5, 0.25)


def seen(pixels):
    return pixels[:, 0] * augment.STD[0] + augment.MEAN[0]


@pytest.mark.parametrize("size", [64, 32])
def test_somebody_in_front_hides_part_of_the_target_and_is_a_non_target(size):
    image, cover = two_people()
    cover = cover[:, :: 64 // size, :: 64 // size]
    drawn = pasting(torch.zeros(8), augment.IN_FRONT, x=0.25)  # 8 of the target's 16 columns are hidden
    pixels, fractions = augment.apply(image, cover, drawn, mode="strong", window=WINDOW)
    target, other = (fractions / 255 * (64 / size) ** 2).unbind(1)
    # The visible rest fills the re-fitted box, columns 24 to 40, twice as wide as before.
    rest = other.sum(dim=(1, 2))
    torch.testing.assert_close(target.sum(dim=(1, 2)), torch.full((8,), 32 * 16.0), atol=12.0, rtol=0)
    torch.testing.assert_close(rest, torch.full((8,), 32 * 24.0), atol=12.0, rtol=0)  # up to the crop's edge
    neighbour = (100 + 10 * torch.arange(8.0)).roll(1)
    torch.testing.assert_close(
        seen(pixels)[:, 32, 48], neighbour, atol=0.01, rtol=0
    )  # where both stood, the one in front is seen
    torch.testing.assert_close(seen(pixels)[:, 32, 32], 100 + 10 * torch.arange(8.0), atol=0.01, rtol=0)


def test_somebody_behind_hides_nothing_of_the_target():
    image, cover = two_people()
    pixels, fractions = augment.apply(
        image, cover, pasting(torch.zeros(8), augment.BEHIND, x=0.25), mode="strong", window=WINDOW
    )
    target, other = (fractions.sum(dim=(2, 3)) / 255).unbind(1)
    torch.testing.assert_close(target, torch.full((8,), 32 * 16.0))
    torch.testing.assert_close(other, torch.full((8,), 32 * 8.0))
    torch.testing.assert_close(seen(pixels)[:, 32, 36], 100 + 10 * torch.arange(8.0), atol=0.01, rtol=0)


def test_nobody_hides_more_than_half_of_the_target():
    image, cover = two_people()
    pixels, fractions = augment.apply(
        image, cover, pasting(torch.zeros(8), augment.IN_FRONT), mode="strong", window=WINDOW
    )  # exactly on top
    torch.testing.assert_close(
        fractions, cover.permute(0, 3, 1, 2).float(), atol=0.1, rtol=0
    )  # a resampled edge is off by a rounding
    torch.testing.assert_close(seen(pixels)[:, 32, 32], 100 + 10 * torch.arange(8.0), atol=0.01, rtol=0)


def test_strong_fractions_never_exceed_the_cell_and_about_half_get_company():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 256, (64, 32, 32), generator=generator)
    cover = torch.stack([target, 255 - target], dim=-1).to(torch.uint8)
    drawn = table("strong", 64)
    assert 16 < (drawn[:, augment.PASTE] != augment.NOBODY).sum() < 48
    pixels, fractions = augment.apply(image, cover, drawn, mode="strong")
    assert pixels.isfinite().all() and fractions.min() >= -1e-3 and fractions.sum(dim=1).max() <= 255 + 1e-2


def test_nobody_is_his_own_neighbour():
    image, cover = two_people(1)
    pixels, fractions = augment.apply(
        image, cover, pasting(torch.zeros(1), augment.BEHIND, x=0.5), mode="strong"
    )
    assert fractions[:, 1].sum() == 0


def test_more_columns_leave_the_first_ones_as_they_were():
    first = torch.rand(50, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(table("flip", 50, seed=3)[:, augment.FLIP], (first[:, augment.FLIP] < 0.5).float())


# -- the re-fitted box -------------------------------------------------------------------------------
def unjittered(count, seed=0):
    drawn = table("strong", count, seed)
    drawn[:, [augment.SCALE, augment.ASPECT]], drawn[:, [augment.SHIFT_X, augment.SHIFT_Y]] = 1.0, 0.0
    return drawn


def bounds(target):
    """Edges of the part of the target that bounds it: ``[B, 4]`` (top, bottom, left, right)."""
    there = target >= augment.BOUNDING
    ends = []
    for lines in (there.any(dim=2), there.any(dim=1)):
        places = torch.arange(lines.shape[1])
        ends += [torch.where(lines, places, 999).amin(dim=1), torch.where(lines, places + 1, -1).amax(dim=1)]
    return torch.stack(ends, dim=-1)


@pytest.mark.parametrize("size", [(96, 96), (48, 48), (72, 96)])
def test_a_turned_persons_box_is_re_fitted(size):
    """Whatever was turned, slanted, mirrored or hidden: the target ends where the window ends, to a cell."""
    image, cover = disc(size, count=32)
    cover[..., 1] = 0
    drawn = unjittered(32)
    drawn[:, augment.PASTE] = augment.NOBODY
    drawn[:, augment.ANGLE] = torch.linspace(-0.5, 0.5, 32)
    # The disc's box is not in the middle of this crop: it is found and brought there.
    _, fractions = augment.apply(image, cover, drawn, mode="strong", window=(0.5, 0.5))
    height, width = size
    wanted = torch.tensor([0.25 * height, 0.75 * height, 0.25 * width, 0.75 * width])
    assert (bounds(fractions[:, 0]) - wanted).abs().max() <= 1.5


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (48, 96)])
def test_a_slant_is_in_pixels_whatever_the_shape(size):
    """A straight upright line leans by 0.2 pixels across a pixel down."""
    height, width = size
    image = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    image[:, :, width // 2 - 1 : width // 2 + 1] = 255
    drawn = augment.draw(1, mode="off", generator=torch.Generator())
    drawn[:, augment.SHEAR] = 0.2
    pixels, _ = augment.apply(image, torch.zeros(1, height, width, 2, dtype=torch.uint8), drawn, mode="full")
    weight = seen(pixels)[0].clamp(min=0)
    columns = (weight * torch.arange(width)).sum(dim=1) / weight.sum(dim=1)
    lean = (columns[height // 2 + 8] - columns[height // 2 - 8]) / 16
    assert abs(lean) == pytest.approx(0.2, abs=0.01)


def test_a_box_that_fits_is_left_alone():
    image, cover = two_people()
    drawn = augment.draw(8, mode="off", generator=torch.Generator())
    pixels, fractions = augment.apply(image, cover, drawn, mode="strong", window=WINDOW)
    torch.testing.assert_close(fractions, cover.permute(0, 3, 1, 2).float(), atol=0.1, rtol=0)
    torch.testing.assert_close(seen(pixels), image[..., 0].float(), atol=0.1, rtol=0)
    pixels, fractions = augment.apply(image, torch.zeros_like(cover), drawn, mode="strong", window=WINDOW)
    torch.testing.assert_close(seen(pixels), image[..., 0].float(), atol=0.1, rtol=0)  # and without a target
    assert not fractions.any()


@pytest.mark.parametrize("mode", ["full", "strong"])
def test_the_mirror_image_of_the_target_is_somebody_else(mode):
    image, cover = two_people(4)
    image, cover = image.roll(22, 2), cover.roll(22, 2)  # at the right edge
    drawn = augment.draw(4, mode="off", generator=torch.Generator())
    if mode == "full":  # where the box is not re-fitted
        drawn[:, augment.SHIFT_X] = 0.5  # a quarter of the crop: beyond the edge
    pixels, fractions = augment.apply(image, cover, drawn, mode=mode, window=WINDOW)
    person = fractions.sum(dim=1)
    torch.testing.assert_close(person, 255.0 * (seen(pixels) > 50), atol=1.0, rtol=0)
    assert (fractions[:, 0].sum(dim=(1, 2)) > 0).all() and (fractions[:, 1].sum(dim=(1, 2)) > 0).all()
    assert ((fractions[:, 0] > 1) & (fractions[:, 1] > 1)).sum() == 0


def test_most_boxes_are_good_and_some_are_bad():
    drawn = table("strong", 4000)
    amounts = augment.AMOUNTS["strong"]
    for column, most in ((augment.SHIFT_X, 2 * amounts.shift), (augment.SHIFT_Y, 2 * amounts.shift)):
        off = drawn[:, column].abs()
        assert off.max() <= most and off.quantile(0.5) < most / 8 and off.quantile(0.97) > most / 2
    off = drawn[:, augment.SCALE].log().abs() / torch.tensor(1 + amounts.scale).log()
    assert off.max() <= 1.0001 and off.quantile(0.5) < 1 / 8 and off.quantile(0.97) > 1 / 2
