"""The ROI sampler: a ramp gives back the box's coordinates, averages are exact, pasting is the inverse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinelib.modeling import roi
from refinelib.modeling.roi import (
    box_iou,
    canvas_size,
    centre_window,
    crop_rois,
    expand_boxes,
    labels_from_coverage,
    mask_canvas_size,
    paste_patches,
)

BOXES = {
    "square, shrunk": (100, 20, 500, 420),
    "square, its own size": (100, 20, 164, 84),
    "square, enlarged": (300, 200, 310, 210),
    "wide": (13, 100, 613, 150),
    "tall": (250, 5, 290, 465),
    "fractional": (100.37, 20.81, 301.92, 260.06),
    "fractional, enlarged": (77.7, 91.3, 98.2, 111.9),
    "wide and enlarged, tall and shrunk": (40.5, 3.25, 60.25, 470.75),
}
SIZES = [(64, 64), (48, 96), (33, 17)]


def ramp(height, width, dtype=torch.float32):
    """[2, H, W]: the x and the y of each pixel's centre."""
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).to(dtype)


def own_coordinates(box, size):
    """x [w] and y [h] of the cells' centres, and how far a ramp of whole pixels may lie from them.

    A window of width w that begins and ends inside a pixel sees a stair in place of a slope: the
    integral of the difference is at most 1/8, so the average is off by at most 1/(8w).
    """
    x0, y0, x1, y1 = box
    (h, w), tolerance = size, []
    for start, length, cells in ((x0, x1 - x0, w), (y0, y1 - y0, h)):
        step = length / cells
        whole = float(start).is_integer() and float(step).is_integer()  # windows of whole pixels
        tolerance.append(1e-3 if step <= 1 or whole else 0.125 / step + 1e-3)
    return x0 + (np.arange(w) + 0.5) * (x1 - x0) / w, y0 + (np.arange(h) + 0.5) * (y1 - y0) / h, tolerance


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
def test_a_ramp_gives_back_the_boxs_own_coordinates(box, size):
    out = crop_rois(ramp(480, 640), torch.tensor([box]), size)
    assert out.shape == (1, 2, *size) and out.dtype == torch.float32
    x, y, (tx, ty) = own_coordinates(box, size)
    assert np.abs(out[0, 0].numpy() - x).max() <= tx
    assert np.abs(out[0, 1].numpy() - y[:, None]).max() <= ty


# -- exact averages ----------------------------------------------------------------------------------
def reference(image, box, size, fill):
    """Area averages by differences of the summed image, in float64 numpy: another way to the same number.

    ``image`` [C, H, W], set in a wide frame of ``fill``.
    """
    x0, y0, x1, y1 = box
    margin = int(max(0, -x0, -y0, x1 - image.shape[2], y1 - image.shape[1])) + 3

    def averages(rows, start, stop, cells):
        step = (stop - start) / cells
        centre, half = start + (np.arange(cells) + 0.5) * step, max(step, 1.0) / 2
        edges = np.arange(rows.shape[-1] + 1) - margin
        summed = np.concatenate([np.zeros((*rows.shape[:-1], 1)), rows.cumsum(-1)], -1)
        lines = summed.reshape(-1, summed.shape[-1])
        flat = [
            np.interp(centre + half, edges, line) - np.interp(centre - half, edges, line) for line in lines
        ]
        return np.reshape(flat, (*rows.shape[:-1], cells)) / (2 * half)

    out = []
    for channel, outside in zip(image, fill, strict=False):
        framed = np.pad(channel, margin, constant_values=outside)
        out.append(averages(averages(framed, x0, x1, size[1]).T, y0, y1, size[0]).T)
    return np.stack(out)


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, shape))


def random_boxes(count, height, width, seed=0):
    """Inside, across and far outside the image; slivers and giants."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(-0.6, 1.1, (count, 2)) * (width, height)
    side = np.exp(rng.uniform(math.log(0.3), math.log(2.0), (count, 2))) * rng.choice([2, 20, 60], (count, 2))
    return torch.from_numpy(np.concatenate([low, low + side], 1))


FILL = (123.5, 0.0, -40.0)


@pytest.mark.parametrize("chunk", [None, 500], ids=["at once", "in bands"])
@pytest.mark.parametrize("size", [(16, 16), (7, 24)], ids=str)
def test_exact_area_average(size, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(roi, "_CHUNK", chunk)
    image, boxes = noise(3, 40, 56), random_boxes(40, 40, 56)
    many = crop_rois(image, boxes, size, fill=FILL)
    for crop, box in zip(many, boxes, strict=True):
        assert np.abs(crop.numpy() - reference(image.numpy(), box.tolist(), size, FILL)).max() < 1e-4, box
        assert torch.equal(crop_rois(image, box[None], size, fill=torch.tensor(FILL))[0], crop)
    whole = image.round().to(torch.uint8)
    assert torch.equal(crop_rois(whole, boxes, size), crop_rois(whole.double(), boxes, size))


def test_outside_the_image_is_fill():
    image = torch.full((3, 20, 30), 200.0)
    far = crop_rois(image, torch.tensor([[40.0, 5, 50, 15], [-1e30, -1e30, -1e29, -1e29]]), (4, 4), fill=FILL)
    assert torch.equal(far, torch.tensor(FILL)[None, :, None, None].expand(2, 3, 4, 4))
    half = crop_rois(image, torch.tensor([[25.0, 0, 35, 20]]), (2, 4), fill=FILL)  # the edge is in cell 1..2
    assert torch.allclose(half[0, 0], torch.tensor([200, 200, 123.5, 123.5]).expand(2, 4))
    quarter = crop_rois(image, torch.tensor([[-1.0, -1, 1, 1]]), (1, 1), fill=100)[0, 0]
    assert quarter.item() == 125


def test_a_giant_box_is_finite():
    out = crop_rois(noise(3, 20, 30), torch.tensor([[-1e30, -1e30, 1e30, 1e30]]), (4, 4), fill=7)
    assert torch.allclose(out, torch.full_like(out, 7))


def test_no_lower_precision_under_autocast():
    image, boxes = noise(3, 50, 50).float(), torch.tensor([[3.3, 4, 40, 44], [1, 1, 9, 9.5]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = crop_rois(image, boxes, (16, 16))
    assert torch.equal(out, crop_rois(image, boxes, (16, 16))) and out.dtype == torch.float32


def test_gradient_is_the_weight():
    image = noise(1, 12, 12).requires_grad_()
    crop_rois(image, torch.tensor([[2.0, 2, 10, 6]]), (2, 4)).sum().backward()
    want = torch.zeros(1, 12, 12, dtype=torch.float64)
    want[:, 2:6, 2:10] = 8 / 32
    assert torch.allclose(image.grad, want)


def test_no_box_at_all():
    assert crop_rois(noise(3, 9, 9), torch.zeros(0, 4), (5, 6)).shape == (0, 3, 5, 6)


@pytest.mark.parametrize(
    "box",
    [(3, 3, 3, 9), (9, 3, 3, 9), (0, 0, math.nan, 5), (0, 0, math.inf, 5)],
    ids=["no width", "turned", "nan", "inf"],
)
def test_boxes_without_area_are_refused(box):
    boxes = torch.tensor([(1.0, 1, 5, 5), box])
    for use in (
        lambda: crop_rois(noise(1, 9, 9), boxes, (4, 4)),
        lambda: paste_rois(noise(2, 4, 4), boxes, (9, 9)),
    ):
        with pytest.raises(ValueError, match=r"box 1 is .*: give x0, y0, x1, y1 in pixels, x0 < x1"):
            use()


def test_shapes_that_do_not_fit_are_refused():
    image, boxes = noise(3, 9, 9), torch.tensor([[1.0, 1, 5, 5]] * 3)
    with pytest.raises(ValueError, match=r"\[C, H, W\], not \[9, 9\]"):
        crop_rois(image[0], boxes, (4, 4))
    with pytest.raises(ValueError, match=r"boxes must be \[N, 4\]"):
        crop_rois(image, boxes[0], (4, 4))
    with pytest.raises(ValueError, match="each of 3 channels, not 2"):
        crop_rois(image, boxes, (4, 4), fill=(1, 2))
    with pytest.raises(ValueError, match=r"\[N, ..., h, w\] grids"):
        list(paste_patches(torch.zeros(2, 4, 4), boxes, (9, 9)))


def paste_rois(grids, boxes, image_size):
    """Whole images [N, H, W] from their patches."""
    pasted = torch.zeros(len(grids), *image_size)
    for canvas, (top, left, patch) in zip(pasted, paste_patches(grids, boxes, image_size), strict=True):
        canvas[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return pasted


# -- pasting back --------------------------------------------------------------------------------------
PASTED = [
    (20, 30, 84, 94),
    (20.4, 30.7, 50.2, 61.9),
    (5, 3, 150, 110),
    (60, 40, 67, 52),
    (-30, -20, 40, 50),
    (100.5, 90.25, 190, 140),
]


@pytest.mark.parametrize("box", PASTED, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (24, 56)], ids=str)
def test_a_cropped_ramp_is_pasted_where_it_was(box, size):
    """Inside the outermost cell centres a slope comes back exactly; a half-pixel shift would show."""
    height, width = 120, 160
    frame = 200  # a wide border, so that the crop of a box across the edge is a ramp too
    image = ramp(height + 2 * frame, width + 2 * frame) - frame
    boxes = torch.tensor([box], dtype=torch.float64)
    grids = crop_rois(image, boxes + frame, size)[0]
    pasted = paste_rois(grids, boxes.expand(2, 4), (height, width))
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for axis, (at, low, high, cells) in enumerate(
        ((x, box[0], box[2], size[1]), (y, box[1], box[3], size[0]))
    ):
        step = (high - low) / cells
        # Where pixels average several cells they need them all; a shrinking crop has stairs of its own.
        inner = (at > low + max(step, 1) / 2 + 0.5) & (at < high - max(step, 1) / 2 - 0.5)
        other = ((y > box[1]) & (y < box[3])) if axis == 0 else ((x > box[0]) & (x < box[2]))
        got = (
            pasted[axis].numpy().T[inner][:, other].T
            if axis == 0
            else pasted[axis].numpy()[inner][:, other].T
        )
        assert got.size
        assert np.abs(got - at[inner]).max() < (0.126 / step if step > 1 else 1e-4 + 0.126 * step)


def test_pixels_whose_centre_is_in_the_box():
    boxes = torch.tensor([[2.5, 1.4, 6.5, 3.6], [-4, -4, 3.2, 2.2], [50, 50, 60, 60]])
    pasted = paste_rois(torch.full((3, 8, 8), 0.75), boxes, (6, 9))
    want = torch.zeros(3, 6, 9)
    want[0, 1:4, 2:6] = 0.75  # centres 2.5 .. 5.5 and 1.5 .. 3.5
    want[1, :2, :3] = 0.75
    assert torch.allclose(pasted, want)


def test_at_its_own_resolution_pasting_is_exact():
    image = noise(1, 40, 50).float()
    box = torch.tensor([[7.0, 9, 39, 33]])
    crop = crop_rois(image, box, (24, 32))[0]
    pasted = paste_rois(crop, box, (40, 50))[0]
    assert torch.allclose(pasted[9:33, 7:39], image[0, 9:33, 7:39], atol=1e-4)
    assert torch.allclose(crop_rois(pasted[None], box, (24, 32))[0, 0], crop[0], atol=1e-4)
    pasted[9:33, 7:39] = 0
    assert not pasted.any()


def test_cells_smaller_than_a_pixel_are_averaged():
    grid = noise(1, 32, 64).float()
    pasted = paste_rois(grid, torch.tensor([[1.0, 2, 17, 10]]), (12, 20))[0]
    assert torch.allclose(pasted[2:10, 1:17], grid.reshape(8, 4, 16, 4).mean((1, 3)), atol=1e-3)


def test_between_cell_centres_pasting_is_linear_and_beyond_them_constant():
    row = torch.tensor([10.0, 20.0, 40.0])
    pasted = paste_rois(row.expand(1, 3, 3), torch.tensor([[0.0, 0, 12, 12]]), (12, 12))[0, 5]
    assert torch.allclose(pasted, torch.from_numpy(np.interp(np.arange(12) + 0.5, [2, 6, 10], row)).float())


def test_patches_are_the_parts_inside_the_image():
    boxes, grids = random_boxes(20, 30, 40, seed=3), noise(20, 9, 7, seed=4).float()
    whole = paste_rois(grids, boxes, (30, 40))
    for canvas, (top, left, patch) in zip(whole, paste_patches(grids, boxes, (30, 40)), strict=False):
        h, w = patch.shape
        assert top >= 0 and left >= 0 and top + h <= 30 and left + w <= 40 and patch.dtype == torch.float32
        assert torch.equal(canvas[top : top + h, left : left + w], patch)
        assert canvas.count_nonzero() == patch.count_nonzero()


# -- canvas and window -----------------------------------------------------------------------------------
def test_known_canvases():
    assert canvas_size((64, 64), 0.0) == (64, 64)
    assert canvas_size((64, 64), 0.5) == (96, 96)
    assert canvas_size((64, 128), 0.25) == (80, 160)
    assert canvas_size((50, 33), 0.0) == (50, 33)
    assert canvas_size((32, 33), 0.5) == (48, 49)


@settings(max_examples=200, deadline=None)
@given(side=st.integers(16, 512), context=st.floats(0, 2))
def test_canvas_arithmetic(side, context):
    canvas, _ = canvas_size((side, 64), context)
    wanted = side * (1 + context)
    assert canvas >= side and (canvas - side) % 2 == 0
    if context == 0:
        assert canvas == side
    elif side % 2:
        assert abs(canvas - wanted) <= 1
    else:
        assert canvas == side or canvas % 8 == 0
        assert abs(canvas - wanted) <= 4 or canvas == side
    # What the sentence of mask_canvas_size advises always works.
    assert mask_canvas_size((side, 64), (side, 64), (canvas, 64)) == (canvas, 64)
    assert mask_canvas_size((2 * side, 64), (side, 64), (canvas, 64)) == (2 * canvas, 64)
    assert mask_canvas_size((56, 28), (side, 64), (side, 64)) == (56, 28)


@settings(max_examples=30, deadline=None)
@given(
    side=st.tuples(st.integers(16, 40), st.integers(16, 40)), context=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_the_middle_of_a_canvas_is_the_box(side, context, seed):
    image, boxes = noise(2, 50, 60, seed=seed), random_boxes(3, 50, 60, seed=seed)
    canvas = canvas_size(side, context)
    wider = expand_boxes(boxes, (canvas[0] / side[0], canvas[1] / side[1]))
    whole = crop_rois(image, wider, canvas, fill=9)
    assert torch.allclose(centre_window(whole, side), crop_rois(image, boxes, side, fill=9), atol=1e-3)


def test_expanded_boxes():
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    assert expand_boxes(boxes, (1.5, 2.0)).tolist() == [[0, 10, 40, 70]]
    assert torch.equal(expand_boxes(boxes, (1.0, 1.0)), boxes)


def test_mask_canvas():
    assert mask_canvas_size((64, 64), (64, 64), (96, 96)) == (96, 96)
    assert mask_canvas_size((28, 128), (64, 64), (96, 96)) == (42, 192)
    for mask, roi_side, canvas in ((33, 64, 96), (20, 64, 72), (18, 64, 96)):
        told = f"a mask of {mask} px over a box of {roi_side} px has no whole canvas"
        with pytest.raises(ValueError, match=told) as error:
            mask_canvas_size((64, mask), (64, roi_side), (64, canvas))
        assert "take mask_size = roi_size, or twice it, or context = 0" in str(error.value)


def test_window():
    x = torch.arange(2 * 10 * 12).reshape(2, 10, 12)
    window = centre_window(x, (4, 6))
    assert torch.equal(window, x[:, 3:7, 3:9]) and window.data_ptr() == x[:, 3:, 3:].data_ptr()
    assert centre_window(x, (10, 12)).shape == x.shape
    for size in ((5, 6), (4, 5), (12, 12), (10, 14)):
        with pytest.raises(ValueError, match=f"a window of {size[0]}x{size[1]} has no exact place"):
            centre_window(x, size)


def test_labels_are_the_largest_share_the_earlier_where_equal():
    t, o = np.mgrid[:256, :256]
    possible = t + o <= 256  # 256: two halves, each rounded up
    want = np.stack([255 - t - o, t, o]).argmax(0)
    got = labels_from_coverage(torch.from_numpy(np.stack([t, o], -1).astype(np.uint8)))
    assert got.dtype == torch.int64 and got.shape == (256, 256)
    assert np.array_equal(got.numpy()[possible], want[possible])


def test_box_iou_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4]])
    b = torch.tensor([[5.0, 0, 15, 10], [6, 6, 8, 8]])
    assert box_iou(a, b).tolist() == pytest.approx([50 / 150, 0])
