"""ROI sampling: exact area filter in, linear interpolation out.

Coordinates: pixel ``i`` covers ``[i, i + 1)``; boxes are ``xyxy`` floats in that frame and may
reach outside the image. Both directions are separable, ``out = Wy @ in @ Wx^T``. All products
run in float64: neither autocast nor a reduced matmul precision (TF32) can blur them.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from refinelib.modeling import IGNORED

#: Height and width.
Size = tuple[int, int]
#: Elements of a float64 temporary that one product may hold (128 MB).
_CHUNK = 1 << 24


def crop_rois(
    image: Tensor, boxes: Tensor, size: Size, fill: float | Sequence[float] | Tensor = 0.0
) -> Tensor:
    """Average of the image over each cell of a grid laid on each box.

    Output cell ``i`` of ``n`` along a side ``[a, b]`` has its centre at ``a + (i + 1/2)(b - a)/n``
    and looks through a window of width ``max((b - a)/n, 1 pixel)`` around it. The weight of pixel
    ``j`` is the window's overlap with ``[j, j + 1)`` over the width: the exact area average where
    the box shrinks, linear interpolation between pixel centres where it grows. Weight that falls
    outside the image goes to ``fill``.

    Args:
        image: ``[C, H, W]``, any real dtype.
        boxes: ``[N, 4]`` xyxy in pixels, of positive area.
        size: ``(h, w)`` of the output.
        fill: value outside the image, one number or one a channel.

    Returns:
        ``[N, C, h, w]`` float32 on the image's device, differentiable in ``image``.

    Raises:
        ValueError: shapes that do not fit; a box that is not finite or has no area.

    Example:
        >>> crop_rois(torch.arange(8.0).view(1, 2, 4), torch.tensor([[0.0, 0.0, 4.0, 2.0]]), (1, 2))
        tensor([[[[2.5000, 4.5000]]]])
    """
    if image.dim() != 3:
        raise ValueError(f"the image must be [C, H, W], not {list(image.shape)}")
    outside = torch.as_tensor(fill, dtype=torch.float64, device=image.device).reshape(-1, 1, 1)
    if len(outside) not in (1, len(image)):
        rule = f"fill must be one number or one for each of {len(image)} channels"
        raise ValueError(f"{rule}, not {len(outside)}")
    crops = [_crop(image, box, size, outside) for box in checked_boxes(boxes).tolist()]
    return torch.stack(crops) if crops else torch.zeros(0, len(image), *size, device=image.device)


def paste_patches(grids: Tensor, boxes: Tensor, image_size: Size) -> Iterator[tuple[int, int, Tensor]]:
    """Each ROI grid laid back into its image, the inverse of :func:`crop_rois`: the part inside, one by one.

    Linear interpolation between the grid's cell centres (held constant beyond the outermost) at
    every pixel whose centre lies in the box; where a cell is smaller than a pixel, the average
    over the pixel.

    Args:
        grids: ``[N, ..., h, w]`` real values, such as probabilities.
        boxes: ``[N, 4]`` xyxy, the region each whole grid covers.
        image_size: ``(H, W)``.

    Yields:
        ``(top, left, patch)``: ``patch`` is ``[..., h', w']`` float32 and belongs at rows ``top`` and columns
        ``left`` onwards; it has no rows or columns where the box lies outside the image.

    Raises:
        ValueError: shapes that do not fit; a box that is not finite or has no area.

    Example:
        >>> list(paste_patches(torch.ones(1, 2, 2), torch.tensor([[1.0, 1.0, 3.0, 2.0]]), (4, 4)))
        [(1, 1, tensor([[1., 1.]]))]
    """
    if grids.dim() < 3 or len(grids) != len(boxes):
        shapes = f"{list(grids.shape)}, {list(boxes.shape)}"
        raise ValueError(f"give [N, ..., h, w] grids and [N, 4] boxes, not {shapes}")
    for grid, (x0, y0, x1, y1) in zip(grids, checked_boxes(boxes).tolist(), strict=True):
        top, rows = _paste_weights(y0, y1, grid.shape[-2], image_size[0])
        left, columns = _paste_weights(x0, x1, grid.shape[-1], image_size[1])
        yield top, left, (rows.to(grid.device) @ grid.double() @ columns.to(grid.device).T).float()


def canvas_size(size: Size, context: float) -> Size:
    """``(H, W)`` of the canvas that shows a box of ``size`` pixels with ``context`` around it.

    Each side is the multiple of 8 nearest to ``side * (1 + context)``, at least ``side``; the
    side itself without context. An odd side cannot lie in the middle of a multiple of 8: it gets
    the nearest odd canvas. The box covers exactly the middle ``size`` pixels
    (:func:`centre_window`) of the region ``expand_boxes(boxes, canvas / size)``.

    Example:
        >>> canvas_size((64, 128), 0.25)
        (80, 160)
    """
    return _canvas_side(size[0], context), _canvas_side(size[1], context)


def mask_canvas_size(mask_size: Size, roi_size: Size, canvas: Size) -> Size:
    """``(H, W)`` of the mask's canvas: the region of the input's canvas, at the mask's resolution.

    Raises:
        ValueError: that is no whole number of mask pixels with the box in its exact middle.

    Example:
        >>> mask_canvas_size((128, 128), (64, 64), (80, 80))
        (160, 160)
    """
    sides = []
    for mask, roi, whole in zip(mask_size, roi_size, canvas, strict=True):
        side, rest = divmod(mask * whole, roi)
        if rest or (side - mask) % 2:
            why = f"a mask of {mask} px over a box of {roi} px has no whole canvas beside the input's {whole}"
            raise ValueError(f"{why} px: take mask_size = roi_size, or twice it, or context = 0")
        sides.append(side)
    return sides[0], sides[1]


def expand_boxes(boxes: Tensor, factor_hw: tuple[float, float]) -> Tensor:
    """``[N, 4]`` xyxy boxes scaled about their centres by ``(factor of height, factor of width)``.

    Example:
        >>> expand_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), (1.5, 2.0))
        tensor([[ 0., 10., 40., 70.]])
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    factor = boxes.new_tensor([factor_hw[1], factor_hw[0]])
    centre, half = (low + high) / 2, (high - low) / 2 * factor
    return torch.cat([centre - half, centre + half], dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of xyxy boxes ``[N, 4]`` and ``[N, 4]`` pair by pair, ``[N]``.

    Example:
        >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area, other = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b))
    return overlap / (area + other - overlap)


def centre_window(x: Tensor, size: Size) -> Tensor:
    """The middle ``size = (h, w)`` of ``[..., H, W]``, a view: on a canvas, the person's box.

    Raises:
        ValueError: the window is larger than ``x`` or cannot lie exactly in its middle.

    Example:
        >>> centre_window(torch.arange(16).view(4, 4), (2, 2))
        tensor([[ 5,  6],
                [ 9, 10]])
    """
    (height, width), (h, w) = x.shape[-2:], size
    if h > height or w > width or (height - h) % 2 or (width - w) % 2:
        raise ValueError(f"a window of {h}x{w} has no exact place in the middle of {height}x{width}")
    top, left = (height - h) // 2, (width - w) // 2
    return x[..., top : top + h, left : left + w]


def labels_from_coverage(coverage: Tensor) -> Tensor:
    """Labels of cells from the area that target and non-target cover.

    Args:
        coverage: ``[..., 2]`` uint8, or whole numbers of another type, in 255ths of the cell: covered by this
            person; by other people and not by this one. ``[..., 3]``: also ignored.

    Returns:
        ``[...]`` int64: argmax of (the rest, target, non-target, ignored), the earlier one where equal;
        0 background, 1 target, 2 non-target, ``IGNORED`` (255).

    Example:
        >>> labels_from_coverage(torch.tensor([[0, 0], [255, 0], [100, 155]], dtype=torch.uint8))
        tensor([0, 1, 2])
        >>> labels_from_coverage(torch.tensor([[0, 0, 200], [100, 0, 90]]))
        tensor([255,   1])
    """
    target, other, *ignored = coverage.to(torch.int16).unbind(-1)
    rest = 255 - target - other - sum(ignored)
    is_target = (target > rest) & (target >= other)
    is_other = other > torch.maximum(rest, target)
    labels = is_other.to(torch.int64).mul_(2).add_(is_target)
    if ignored:
        covered = torch.maximum(rest, torch.maximum(target, other))
        labels = torch.where(ignored[0] > covered, IGNORED, labels)
    return labels


def checked_boxes(boxes: Tensor) -> Tensor:
    """``[N, 4]`` xyxy boxes as float64 on the CPU, each finite and of positive area.

    Raises:
        ValueError: they are not; the message has the first that is not.

    Example:
        >>> checked_boxes(torch.tensor([[0, 0, 2, 1]]))
        tensor([[0., 0., 2., 1.]], dtype=torch.float64)
    """
    boxes = torch.as_tensor(boxes)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4]: x0, y0, x1, y1 in a row, and are {list(boxes.shape)}")
    boxes = boxes.to("cpu", torch.float64)
    good = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not good.all():
        first = int((~good).nonzero()[0])
        rule = "give x0, y0, x1, y1 in pixels, x0 < x1, y0 < y1"
        raise ValueError(f"box {first} is {boxes[first].tolist()}: {rule}")
    return boxes


# -- helpers ---------------------------------------------------------------------------------------
def _weights(start: float, stop: float, cells: int, first: int, pixels: int) -> Tensor:
    """``[cells, pixels]`` float64: part of each cell's window in pixels first, first + 1, ..."""
    step = (stop - start) / cells
    centre = start + (torch.arange(cells, dtype=torch.float64)[:, None] + 0.5) * step
    width = max(step, 1.0)
    edge = torch.arange(first, first + pixels, dtype=torch.float64)
    overlap = torch.minimum(centre + width / 2, edge + 1) - torch.maximum(centre - width / 2, edge)
    return overlap.clamp(min=0.0) / width


def _support(start: float, stop: float, cells: int, pixels: int) -> tuple[int, Tensor]:
    """First pixel that the windows of a side can see, and the weights from there on."""
    step = (stop - start) / cells
    reach = max(0.0, 1.0 - step) / 2  # windows of an enlarged box look past its edges
    first = min(max(math.floor(start - reach), 0), pixels)
    last = min(max(math.ceil(stop + reach), first), pixels)
    return first, _weights(start, stop, cells, first, last - first)


def _crop(image: Tensor, box: list[float], size: Size, outside: Tensor) -> Tensor:
    """One box, in bands of rows: memory does not grow with the image."""
    channels, height, width = image.shape
    x0, y0, x1, y1 = box
    left, wx = _support(x0, x1, size[1], width)
    top, wy = _support(y0, y1, size[0], height)
    wx, wy = wx.to(image.device), wy.to(image.device)
    seen = image[:, top : top + wy.shape[1], left : left + wx.shape[1]]
    out = torch.zeros(channels, *size, dtype=torch.float64, device=image.device)
    band = max(1, _CHUNK // max(1, channels * wx.shape[1]))
    for weights, rows in zip(wy.split(band, dim=1), seen.split(band, dim=1), strict=True):
        out = out + weights @ (rows.double() @ wx.T)
    return (out + outside * (1 - wy.sum(1)[:, None] * wx.sum(1))).float()


def _paste_weights(start: float, stop: float, cells: int, pixels: int) -> tuple[int, Tensor]:
    """First pixel whose centre lies in ``[start, stop)`` and ``[pixels, cells]`` float64 weights."""
    first = min(max(math.ceil(start - 0.5), 0), pixels)
    last = min(max(math.ceil(stop - 0.5), first), pixels)
    scale = cells / (stop - start)
    # The pixels are the cells here: a window one pixel wide, at least one grid cell, on the grid.
    weights = _weights((first - start) * scale, (last - start) * scale, max(1, last - first), 0, cells)
    weights = weights[: last - first]
    return first, weights / weights.sum(1, keepdim=True)


def _canvas_side(side: int, context: float) -> int:
    if context == 0:
        return side
    wanted = side * (1 + context)
    if side % 2:
        return side + 2 * math.floor((wanted - side) / 2 + 0.5)
    return max(side, 8 * math.floor(wanted / 8 + 0.5))
