"""ROI sampling: exact area filter in, linear interpolation out.

Coordinates: pixel ``i`` covers ``[i, i + 1)``; boxes are ``xyxy`` floats in that frame and may
reach outside the image. Both directions are separable, ``out = Wy @ in @ Wx^T``. All products
run in float64: neither autocast nor a reduced matmul precision (TF32) can blur them.
"""

from __future__ import annotations

import math
from typing import Iterator, Sequence

import torch
from torch import Tensor

#: Elements of a float64 temporary that one product may hold (128 MB).
_CHUNK = 1 << 24


def crop_rois(
    images: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    batch_index: Tensor | None = None,
    fill: float | Sequence[float] | Tensor = 0.0,
) -> Tensor:
    """Average of the image over each cell of a grid laid on each box.

    Output cell ``i`` of ``n`` along a side ``[a, b]`` has its centre at ``a + (i + 1/2)(b - a)/n``
    and looks through a window of width ``max((b - a)/n, 1 pixel)`` around it. The weight of pixel
    ``j`` is the window's overlap with ``[j, j + 1)`` over the width: the exact area average where
    the box shrinks, linear interpolation between pixel centres where it grows. Weight that falls
    outside the image goes to ``fill``.

    Args:
        images: ``[C, H, W]`` or ``[B, C, H, W]``, any real dtype.
        boxes: ``[N, 4]`` xyxy in pixels, of positive area.
        size: ``(h, w)`` of the output.
        batch_index: ``[N]`` integers, the image of each box. None: all boxes lie in the one
            image, or box ``i`` in image ``i`` where there are ``N`` images.
        fill: value outside the image, one number or one a channel.

    Returns:
        ``[N, C, h, w]`` float32 on the images' device, differentiable in ``images``.

    Raises:
        ValueError: shapes that do not fit; on the CPU and for a single image also a box that is
            not finite or has no area and an index outside the batch (on a GPU with several
            images these are not read back).
    """
    images = images[None] if images.dim() == 3 else images
    if images.dim() != 4:
        raise ValueError(f"images must be [C, H, W] or [B, C, H, W], not {list(images.shape)}")
    batch, channels, height, width = images.shape
    boxes = _boxes(boxes, images.device, check=batch == 1)
    count = len(boxes)
    if batch_index is None:
        if batch not in (1, count):
            raise ValueError(f"{count} boxes in {batch} images: give batch_index, the image of each box")
        index = None
    else:
        index = batch_index.to(images.device, torch.int64)
        if index.shape != (count,):
            raise ValueError(f"batch_index must be [{count}], one a box, not {list(index.shape)}")
        readable = images.device.type == "cpu" or batch == 1
        if readable and count and not (0 <= int(index.min()) and int(index.max()) < batch):
            found = f"{int(index.min())}..{int(index.max())}"
            raise ValueError(f"batch_index must lie in 0..{batch - 1}, and holds {found}")
    outside = torch.as_tensor(fill, dtype=torch.float64, device=images.device).reshape(-1, 1, 1)
    if outside.shape[0] not in (1, channels):
        raise ValueError(f"fill must be one number or one for each of {channels} channels, not {outside.shape[0]}")
    if count == 0:
        return torch.zeros(0, channels, *size, device=images.device)
    if batch == 1:
        return torch.stack([_crop_one(images[0], box, size, outside) for box in boxes.cpu()])
    return _crop_many(images, boxes, size, index, outside)


def paste_rois(grids: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Each ROI grid laid back into its own image: the inverse of ``crop_rois``.

    Linear interpolation between the grid's cell centres (held constant beyond the outermost) at
    every pixel whose centre lies in the box; where a cell is smaller than a pixel, the average
    over the pixel. 0 outside the box.

    Args:
        grids: ``[N, h, w]`` real values, such as probabilities.
        boxes: ``[N, 4]`` xyxy, the region each whole grid covers.
        image_size: ``(H, W)``.

    Returns:
        ``[N, H, W]`` float32. ``paste_patches`` does the same without N full images in memory.

    Raises:
        ValueError: as ``crop_rois``.
    """
    pasted = torch.zeros(len(grids), *image_size, device=grids.device)
    for canvas, (top, left, patch) in zip(pasted, paste_patches(grids, boxes, image_size)):
        canvas[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return pasted


def paste_patches(grids: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """``paste_rois`` one ROI at a time: yields ``(top, left, patch)``, the part inside the image.

    ``patch`` is ``[h', w']`` float32 and belongs at rows ``top`` and columns ``left`` onwards;
    it has no rows or columns where the box lies outside the image.
    """
    if grids.dim() != 3 or len(grids) != len(boxes):
        raise ValueError(f"give [N, h, w] grids and [N, 4] boxes, not {list(grids.shape)} and {list(boxes.shape)}")
    for grid, box in zip(grids, _boxes(boxes, torch.device("cpu"), check=True)):
        x0, y0, x1, y1 = box.tolist()
        top, rows = _paste_weights(y0, y1, grid.shape[0], image_size[0])
        left, columns = _paste_weights(x0, x1, grid.shape[1], image_size[1])
        yield top, left, (rows.to(grid.device) @ grid.double() @ columns.to(grid.device).T).float()


def canvas_size(size: tuple[int, int], context: float) -> tuple[int, int]:
    """``(H, W)`` of the canvas that shows a box of ``size`` pixels with ``context`` around it.

    Each side is the multiple of 8 nearest to ``side * (1 + context)``, at least ``side``; the
    side itself without context. An odd side cannot lie in the middle of a multiple of 8: it gets
    the nearest odd canvas. The box covers exactly the middle ``size`` pixels
    (``centre_window``) of the region ``expand_boxes(boxes, canvas / size)``.
    """
    return _canvas_side(size[0], context), _canvas_side(size[1], context)


def mask_canvas_size(mask_size: tuple[int, int], roi_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """``(H, W)`` of the mask's canvas: the region of the input's canvas, at the mask's resolution.

    Raises:
        ValueError: that is no whole number of mask pixels with the box in its exact middle.
    """
    sides = []
    for mask, roi, whole in zip(mask_size, roi_size, canvas):
        side, rest = divmod(mask * whole, roi)
        if rest or (side - mask) % 2:
            raise ValueError(
                f"a mask of {mask} px over a box of {roi} px has no whole canvas beside the input's {whole} px: "
                f"take mask_size = roi_size, or twice it, or context = 0"
            )
        sides.append(side)
    return sides[0], sides[1]


def expand_boxes(boxes: Tensor, factor_hw: tuple[float, float]) -> Tensor:
    """``[N, 4]`` xyxy boxes scaled about their centres by ``(factor of height, factor of width)``."""
    low, high = boxes[..., :2], boxes[..., 2:]
    factor = boxes.new_tensor([factor_hw[1], factor_hw[0]])
    centre, half = (low + high) / 2, (high - low) / 2 * factor
    return torch.cat([centre - half, centre + half], dim=-1)


def centre_window(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle ``size = (h, w)`` of ``[..., H, W]``, a view: on a canvas, the person's box.

    Raises:
        ValueError: the window is larger than ``x`` or cannot lie exactly in its middle.
    """
    (height, width), (h, w) = x.shape[-2:], size
    if h > height or w > width or (height - h) % 2 or (width - w) % 2:
        raise ValueError(f"a window of {h}x{w} has no exact place in the middle of {height}x{width}")
    top, left = (height - h) // 2, (width - w) // 2
    return x[..., top : top + h, left : left + w]


def labels_from_coverage(coverage: Tensor) -> Tensor:
    """Labels of cells from what covers them.

    Args:
        coverage: ``[..., 2]`` uint8, or whole numbers of another type, in 255ths of the cell: covered by this person; by other
            people and not by this one.

    Returns:
        ``[...]`` int64: argmax of (the rest, target, non-target), the earlier one where equal;
        0 background, 1 target, 2 non-target.
    """
    target, other = coverage.to(torch.int16).unbind(-1)
    rest = 255 - target - other
    is_target = (target > rest) & (target >= other)
    is_other = other > torch.maximum(rest, target)
    return is_other.to(torch.int64).mul_(2).add_(is_target)


# -- helpers ---------------------------------------------------------------------------------------
def _boxes(boxes: Tensor, device: torch.device, check: bool) -> Tensor:
    boxes = torch.as_tensor(boxes)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4] xyxy, not {list(boxes.shape)}")
    if (check or boxes.device.type == "cpu") and len(boxes):
        good = boxes.isfinite().all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if not bool(good.all()):
            first = int((~good).nonzero()[0])
            raise ValueError(f"box {first} = {boxes[first].tolist()} has no area: give finite x0 < x1, y0 < y1")
    return boxes.to(device, torch.float64)


def _weights(start: Tensor, stop: Tensor, cells: int, first: int, pixels: int) -> Tensor:
    """``[N, cells, pixels]`` float64: share of each cell's window in pixels first, first + 1, ..."""
    step = ((stop - start) / cells)[:, None, None]
    at = torch.arange(cells, dtype=torch.float64, device=start.device)[:, None]
    centre = start[:, None, None] + (at + 0.5) * step
    width = step.clamp(min=1.0)
    edge = torch.arange(first, first + pixels, dtype=torch.float64, device=start.device)
    overlap = torch.minimum(centre + width / 2, edge + 1) - torch.maximum(centre - width / 2, edge)
    return overlap.clamp(min=0.0) / width


def _support(start: float, stop: float, cells: int, pixels: int) -> tuple[int, int]:
    """First pixel and number of pixels that the windows of a side can see."""
    step = (stop - start) / cells
    reach = max(0.0, 1.0 - step) / 2  # windows of an enlarged box look past its edges
    first = min(max(math.floor(start - reach), 0), pixels)
    last = min(max(math.ceil(stop + reach), first), pixels)
    return first, last - first


def _crop_one(image: Tensor, box: Tensor, size: tuple[int, int], outside: Tensor) -> Tensor:
    """One box of one image, in bands of rows: memory does not grow with the image."""
    channels, height, width = image.shape
    x0, y0, x1, y1 = box.tolist()
    left, columns = _support(x0, x1, size[1], width)
    top, rows = _support(y0, y1, size[0], height)
    box = box.to(image.device)[None]
    wx = _weights(box[:, 0], box[:, 2], size[1], left, columns)[0]
    wy = _weights(box[:, 1], box[:, 3], size[0], top, rows)[0]
    out = torch.zeros(channels, *size, dtype=torch.float64, device=image.device)
    band = max(1, _CHUNK // max(1, channels * columns))
    for row in range(0, rows, band):
        part = image[:, top + row : min(top + row + band, top + rows), left : left + columns].double()
        out = out + wy[:, row : row + band] @ (part @ wx.T)
    return (out + outside * (1 - wy.sum(1)[:, None] * wx.sum(1))).float()


def _crop_many(images: Tensor, boxes: Tensor, size: tuple[int, int], index: Tensor | None, outside: Tensor) -> Tensor:
    """Boxes in several images, without reading anything back from the device."""
    _, channels, height, width = images.shape
    chunk = max(1, _CHUNK // max(1, channels * height * width))
    out = []
    for at in range(0, len(boxes), chunk):
        some = boxes[at : at + chunk]
        wx = _weights(some[:, 0], some[:, 2], size[1], 0, width)[:, None]
        wy = _weights(some[:, 1], some[:, 3], size[0], 0, height)[:, None]
        seen = images[at : at + chunk] if index is None else images[index[at : at + chunk]]
        inside = wy.sum(3)[..., None] * wx.sum(3)[..., None, :]
        out.append((wy @ (seen.double() @ wx.mT) + outside * (1 - inside)).float())
    return torch.cat(out)


def _paste_weights(start: float, stop: float, cells: int, pixels: int) -> tuple[int, Tensor]:
    """First pixel whose centre lies in ``[start, stop)`` and ``[pixels, cells]`` float64 weights."""
    first = min(max(math.ceil(start - 0.5), 0), pixels)
    last = min(max(math.ceil(stop - 0.5), first), pixels)
    scale = cells / (stop - start)
    # The pixels are the cells here: a window one pixel wide, at least one grid cell, on the grid.
    edges = torch.tensor([[first, last]], dtype=torch.float64).sub(start).mul(scale)
    weights = _weights(edges[:, 0], edges[:, 1], max(1, last - first), 0, cells)[0, : last - first]
    return first, weights / weights.sum(1, keepdim=True)


def _canvas_side(side: int, context: float) -> int:
    if context == 0:
        return side
    wanted = side * (1 + context)
    if side % 2:
        return side + 2 * math.floor((wanted - side) / 2 + 0.5)
    return max(side, 8 * math.floor(wanted / 8 + 0.5))
