"""Distances, contours and edges of masks, by batched tensor operations.

Masks are boolean ``[..., H, W]``; distances are in pixels between pixel centres unless said
otherwise. Everything here runs on the tensor's own device and reads nothing back from it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: Smoothing of an edge's length, in probability per pixel: below it the length is quadratic.
EDGE_EPS = 1e-2

# Rows of the second pass are taken so many elements at a time, which bounds its memory at 256 MB.
_CHUNK_ELEMENTS = 2**26


def edt(mask: Tensor) -> Tensor:
    """Exact Euclidean distance from every pixel to the nearest ``True`` one.

    Two separable passes: the distance along each row, then for each column the lower envelope of
    the parabolas it leaves, by direct minimum (Felzenszwalb & Huttenlocher, "Distance Transforms
    of Sampled Functions", 2012, eq. 2 and section 2.1; the direct minimum costs H more operations a
    pixel than their envelope and has no data-dependent step). All squared distances are whole
    numbers below 2**24 for sides under 2,900, hence exact in float32.

    Args:
        mask: bool ``[..., H, W]``.

    Returns:
        float32 ``[..., H, W]``, 0 on ``True``. Where a mask has no ``True`` pixel at all, the
        diagonal ``sqrt(H^2 + W^2)``, which is larger than any distance that can occur.

    Example:
        >>> edt(torch.tensor([[True, False, False]]))
        tensor([[0., 1., 2.]])
    """
    height, width = mask.shape[-2:]
    flat = mask.reshape(-1, height, width)
    column = torch.arange(width, device=mask.device, dtype=torch.float32)
    far = float(4 * (height + width))
    last = torch.where(flat, column, -far).cummax(dim=-1).values
    following = torch.where(flat, column, far + width).flip(-1).cummin(dim=-1).values.flip(-1)
    along_row = torch.minimum(column - last, following - column).square()

    row = torch.arange(height, device=mask.device, dtype=torch.float32)
    apart = (row[:, None] - row[None, :]).square()
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, flat.shape[0] * height * width))
    chunks = [(rows[..., None] + along_row[:, None]).amin(dim=-2) for rows in apart.split(rows_at_once)]
    squared = torch.cat(chunks, dim=-2).clamp(max=float(height * height + width * width))
    return squared.sqrt().reshape(mask.shape)


def signed_distance(mask: Tensor) -> Tensor:
    """Distance in pixels to the mask's outline: positive inside, negative outside.

    The outline runs between pixels, so the two pixels beside it have +0.5 and -0.5, on either side
    alike. An empty mask is minus the diagonal everywhere, a full one plus the diagonal: the edge of
    the image is no outline.

    Args:
        mask: bool ``[..., H, W]``.

    Returns:
        float32 ``[..., H, W]``.

    Example:
        >>> signed_distance(torch.tensor([[False, True, True]]))
        tensor([[-0.5000,  0.5000,  1.5000]])
    """
    outside, inside = edt(torch.stack([mask, ~mask])).unbind(0)
    return torch.where(mask, inside - 0.5, 0.5 - outside)


def scaled_sdf(signed: Tensor, *, clip: float = 8.0) -> Tensor:
    """Signed distance clipped at ``clip`` and scaled to -1..1; its slope is at most ``1 / clip``.

    Args:
        signed: float of any shape, pixels.
        clip: pixels.

    Example:
        >>> scaled_sdf(torch.tensor([-20.0, 2.0]))
        tensor([-1.0000,  0.2500])
    """
    return (signed / clip).clamp(-1.0, 1.0)


def contour_band(signed: Tensor, *, radius: float = 1.0) -> Tensor:
    """Pixels within ``radius`` of the outline, on both sides of it alike.

    Args:
        signed: float ``[..., H, W]``, from :func:`signed_distance`.
        radius: pixels; 1 takes the one pixel on either side.

    Returns:
        bool ``[..., H, W]``; all ``False`` for an empty or a full mask.

    Example:
        >>> contour_band(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        tensor([False,  True,  True, False])
    """
    return signed.abs() < radius


def edge_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along y and x, per pixel; 0 in the last row and the last column.

    Linear; a pixel enters two differences of either kind, each with weight 1 or -1.

    Args:
        x: float ``[..., H, W]``.

    Returns:
        ``(dy, dx)``, both ``[..., H, W]``.

    Example:
        >>> edge_vectors(torch.tensor([[0.0, 1.0], [3.0, 3.0]]))
        (tensor([[3., 2.],
                [0., 0.]]), tensor([[1., 0.],
                [0., 0.]]))
    """
    dy = F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    dx = F.pad(x[..., :, 1:] - x[..., :, :-1], (0, 1, 0, 0))
    return dy, dx


def edge_strength(x: Tensor, *, eps: float = EDGE_EPS) -> Tensor:
    """Smooth gradient magnitude ``sqrt(dx^2 + dy^2 + eps^2) - eps``.

    ``sqrt(dx^2 + dy^2)`` has no derivative at 0, where backward makes 0/0 of it; one flat pixel
    is then enough to turn every gradient into NaN. Here the derivative with respect to a
    difference is ``d / sqrt(d^2 + eps^2)``: 0 on flat ground and never above 1 in size, so the
    gradient with respect to a pixel of ``x``, which enters at most 3 magnitudes, is below 4.
    Computed in float32 or wider whatever comes in (a squared logit difference overflows float16).

    Args:
        x: float ``[..., H, W]``.
        eps: change per pixel below which the magnitude is quadratic.

    Returns:
        float32 (float64 for float64) ``[..., H, W]``, 0 on flat ground.

    Example:
        >>> edge_strength(torch.tensor([[0.0, 0.0, 1.0]]))
        tensor([[0.0000, 0.9900, 0.0000]])
    """
    dy, dx = edge_vectors(to_float32(x))
    return (dy.square() + dx.square() + eps * eps).sqrt() - eps


def to_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is wider: what sums and squares are taken in.

    Example:
        >>> to_float32(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()
