"""One function a loss, and the one class that sums them.

Every function takes ``log_probs`` (float ``[B, 3, H, W]``, natural logarithms that sum to one
probability a pixel) or a head's output, and the truth; returns float32 ``[B]``, one cost a sample,
which does not depend on the rest of the batch; is 0 (or nearly) for a perfect prediction; and has a
gradient of bounded size, given as a bound on the L1 norm with respect to the logits or outputs of
one sample. All of them compute in float32 whatever comes in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinelib.modeling.geometry import EDGE_EPS, contour_band, edge_strength, edge_vectors, scaled_sdf, signed_distance, to_float32

BACKGROUND, TARGET, NON_TARGET = 0, 1, 2


class Targets(NamedTuple):
    """What the losses need to know of a batch's labels, computed once."""

    labels: Tensor  # int64 [B, H, W]
    masks: Tensor  # bool [B, 2, H, W]: any person, this person
    signed: Tensor  # float32 [B, 2, H, W]: signed distance to the outline of each, pixels


def targets_of(labels: Tensor) -> Targets:
    """Masks and signed distances of a batch of label maps (int64 ``[B, H, W]``)."""
    masks = torch.stack([labels != BACKGROUND, labels == TARGET], dim=1)
    return Targets(labels, masks, signed_distance(masks))


def hierarchical_log_probs(logits: Tensor) -> Tensor:
    """Class log-probabilities as exact products of the two branches.

    ``P(bg) = s(-a)``, ``P(target) = s(a) s(b)``, ``P(non-target) = s(a) s(-b)`` with the logistic
    function ``s``, ``a`` the logit of person against background and ``b`` of target against
    non-target. In logarithms these are sums, finite for any finite logit.

    Args:
        logits: float ``[B, 2, H, W]``: a, b.

    Returns:
        float32 ``[B, 3, H, W]``.
    """
    a, b = to_float32(logits).unbind(1)
    person = F.logsigmoid(a)
    return torch.stack([F.logsigmoid(-a), person + F.logsigmoid(b), person + F.logsigmoid(-b)], dim=1)


def mask_probs(log_probs: Tensor) -> Tensor:
    """Probability of any person and of this person, float32 ``[B, 2, H, W]``."""
    probs = to_float32(log_probs).exp()
    return torch.stack([probs[:, TARGET] + probs[:, NON_TARGET], probs[:, TARGET]], dim=1)


def cross_entropy(log_probs: Tensor, labels: Tensor, *, pixel_weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the true class, optionally weighted by pixel.

    Weights are divided by their sum, so they move attention between pixels and never the loss's
    size. Gradient: at most 2 in L1 norm a sample (1 for each of the two branch logits).

    Args:
        log_probs: float ``[B, 3, H, W]``.
        labels: int64 ``[B, H, W]``.
        pixel_weights: float ``[B, H, W]``, not negative, not all 0; none: all equal.
    """
    surprise = -to_float32(log_probs).gather(1, labels[:, None]).squeeze(1)
    if pixel_weights is None:
        return surprise.mean(dim=(-2, -1))
    return (surprise * pixel_weights).sum(dim=(-2, -1)) / pixel_weights.sum(dim=(-2, -1))


def dice(log_probs: Tensor, labels: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss over the classes a sample holds; absent classes are left out.

    ``1 - (2 sum(p y) + s) / (sum p + sum y + s)`` (Milletari et al., V-Net, 2016, with linear
    denominators), averaged over present classes. An absent class would cost 1 with no useful
    gradient; what is wrongly given to it is missed by the classes that are there. Gradient: at
    most 4 in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        labels: int64 ``[B, H, W]``.
        smooth: s, pixels.
    """
    probs = to_float32(log_probs).exp().flatten(2)
    classes = torch.arange(probs.shape[1], device=labels.device).view(1, -1, 1)
    truth = (labels.flatten(1)[:, None] == classes).to(probs.dtype)
    size = truth.sum(-1)
    cost = 1 - (2 * (probs * truth).sum(-1) + smooth) / (probs.sum(-1) + size + smooth)
    present = (size > 0).to(probs.dtype)
    return (cost * present).sum(-1) / present.sum(-1)


def active_contour(log_probs: Tensor, truth: Targets, *, smoothness: float = 0.1, eps: float = EDGE_EPS) -> Tensor:
    """Active contour without edges: misplaced area, plus the length of the contour beyond the true one's.

    Region and length terms of Chen et al., "Learning Active Contour Models for Medical Image
    Segmentation", CVPR 2019, eq. 5-7, for the masks of any person and of this person, averaged
    over pixels. The length is smooth (see :func:`~refinelib.modeling.geometry.edge_strength`) and has the
    true mask's own length taken off, a constant that makes a perfect mask cost 0; with smoothness
    below 0.29 no mask costs less. Gradient: at most ``0.5 + 2 smoothness`` in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        truth: of the same batch.
        smoothness: weight of the length term.
        eps: smoothing of the length, probability per pixel.
    """
    probs, masks = mask_probs(log_probs), truth.masks
    region = torch.where(masks, 1 - probs, probs).mean(dim=(-3, -2, -1))
    excess = edge_strength(probs, eps=eps) - edge_strength(masks.to(probs.dtype), eps=eps)
    return region + smoothness * excess.mean(dim=(-3, -2, -1))


def boundary_aware(log_probs: Tensor, truth: Targets, *, boundary_weight: float = 5.0, sigma: float = 2.0) -> Tensor:
    """Cross-entropy with weight ``1 + w exp(-d^2 / (2 sigma^2))``, d the distance to the true outline.

    The weight map of Ronneberger et al., U-Net, 2015, eq. 2, with one distance, divided by its sum.
    Gradient: at most 2 in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        truth: of the same batch.
        boundary_weight: w, extra weight of a pixel on the outline.
        sigma: pixels.
    """
    distance = truth.signed.abs().amin(dim=1)
    weights = 1 + boundary_weight * torch.exp(-distance.square() / (2 * sigma * sigma))
    return cross_entropy(log_probs, truth.labels, pixel_weights=weights)


def contour_head(contour_logits: Tensor, truth: Targets, *, radius: float = 1.0) -> Tensor:
    """Balanced cross-entropy of a contour head against the band around the true outline.

    Contour and other pixels count half each however few the former are (Xie & Tu, HED, 2015,
    eq. 2); where there is no contour, the others count alone. Takes logits: a sigmoid before it
    would make a perfect contour cost 0.68. Gradient: at most 1 in L1 norm a sample.

    Args:
        contour_logits: float ``[B, 2, H, W]``: contour of any person, of this person.
        truth: of the same batch.
        radius: of the band, pixels.
    """
    logits = to_float32(contour_logits)
    band = contour_band(truth.signed, radius=radius)
    cost = F.softplus(torch.where(band, -logits, logits))
    halves = []
    for chosen in (band, ~band):
        count = chosen.sum(dim=(-2, -1))
        mean = (cost * chosen).sum(dim=(-2, -1)) / count.clamp(min=1)
        halves.append((mean, (count > 0).to(cost.dtype)))
    weight = halves[0][1] + halves[1][1]
    return ((halves[0][0] + halves[1][0]) / weight).mean(dim=-1)


def contour_mask(log_probs: Tensor, truth: Targets, *, level: float = 0.05) -> Tensor:
    """How far the delivered mask's edges are from the true ones, as vectors, in 0..2.

    ``|p - y|^2 / (|p|^2 + |y|^2 + 1)`` in the Sobolev norm ``|f|^2 = sum |grad f|^2 + level f^2``:
    0 when the edges agree, about 1 when they lie elsewhere, 2 when they point the wrong way. A
    contour compared without its direction cannot tell a mask turned inside out from a perfect one;
    without the level, none or all of the crop would be one and the same. This lets the contour
    supervise the mask itself. Gradient: at most ``16 sqrt(pixels)`` in L1 norm a sample, and
    smaller by the root of the contour's length where there is one.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        truth: of the same batch.
        level: weight of the values beside their differences.
    """
    probs = mask_probs(log_probs)
    masks = truth.masks.to(probs.dtype)

    def energy(x: Tensor) -> Tensor:
        dy, dx = edge_vectors(x)
        return (dy.square() + dx.square() + level * x.square()).sum(dim=(-2, -1))

    return (energy(probs - masks) / (energy(probs) + energy(masks) + 1)).mean(dim=-1)


def distance_head(distance: Tensor, truth: Targets, *, clip: float = 8.0, beta: float = 0.1) -> Tensor:
    """Huber loss of a distance head against the clipped, scaled signed distance.

    Gradient: at most 1 in L1 norm a sample.

    Args:
        distance: float ``[B, 2, H, W]`` in -1..1, for any person and this person.
        truth: of the same batch.
        clip: distance that is scaled to 1, pixels.
        beta: below this error the cost is quadratic.
    """
    target = scaled_sdf(truth.signed, clip=clip)
    return F.smooth_l1_loss(to_float32(distance), target, beta=beta, reduction="none").mean(dim=(-3, -2, -1))


def distance_mask(log_probs: Tensor, truth: Targets, *, clip: float = 8.0) -> Tensor:
    """Misplaced probability, weighted by its distance from the true outline.

    The boundary loss of Kervadec et al., MIDL 2019, eq. 5, with the clipped signed distance and
    without the constant that makes a perfect mask negative. Lets the distance supervise the mask
    itself. Gradient: at most 0.5 in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        truth: of the same batch.
        clip: distance that is scaled to 1, pixels.
    """
    probs = mask_probs(log_probs)
    wrong = torch.where(truth.masks, 1 - probs, probs)
    return (wrong * scaled_sdf(truth.signed, clip=clip).abs()).mean(dim=(-3, -2, -1))


def capped(cost: Tensor, cap: float | None) -> Tensor:
    """``cost`` with its value held at ``cap``, its gradient's direction kept.

    Above the cap the gradient is scaled by ``cap / cost``; ``clamp`` would make it 0 there and the
    loss could never come down. NaN stays NaN and infinity becomes NaN, for the guard to see.
    """
    if cap is None:
        return cost
    return cost * (cap / cost.detach().clamp(min=cap))


class MaskLoss(nn.Module):
    """Cross-entropy + Dice, plus each refinement loss that is switched on, weighted and capped.

    ``forward`` returns the total (float32 scalar, mean over the batch) and the components before
    their weights (``names`` gives their order) as a detached float32 ``[len(names)]``.

    Gradient: with respect to one sample's logits and heads, at most the sum of each loss's bound times
    its weight in L1 norm, divided by the batch size; a cap only lowers it.
    """

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        active_contour_weight: float = 0.0,
        active_contour_smoothness: float = 0.1,
        boundary_aware_weight: float = 0.0,
        boundary_weight: float = 5.0,
        contour_weight: float = 0.0,
        distance_weight: float = 0.0,
        distance_clip: float = 8.0,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        weights = {
            "ce": ce_weight,
            "dice": dice_weight,
            "active_contour": active_contour_weight,
            "boundary_aware": boundary_aware_weight,
            "contour": contour_weight,
            "distance": distance_weight,
        }
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.active_contour_smoothness = active_contour_smoothness
        self.boundary_weight = boundary_weight
        self.distance_clip = distance_clip
        self.cap = cap

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def per_sample(self, output, labels: Tensor) -> dict[str, Tensor]:
        """Each component's cost a sample, before weights and after caps: float32 ``[B]`` by name.

        Args:
            output: what the model returns (``logits``, ``contour_logits``, ``distance``).
            labels: int64 ``[B, H, W]``.
        """
        log_probs = hierarchical_log_probs(output.logits)
        truth = targets_of(labels)
        costs = {}
        for name in self.weights:
            if name == "ce":
                cost = cross_entropy(log_probs, labels)
            elif name == "dice":
                cost = dice(log_probs, labels)
            elif name == "active_contour":
                cost = active_contour(log_probs, truth, smoothness=self.active_contour_smoothness)
            elif name == "boundary_aware":
                cost = boundary_aware(log_probs, truth, boundary_weight=self.boundary_weight)
            elif name == "contour":
                cost = contour_head(output.contour_logits, truth) + contour_mask(log_probs, truth)
            else:
                cost = distance_head(output.distance, truth, clip=self.distance_clip)
                cost = cost + distance_mask(log_probs, truth, clip=self.distance_clip)
            costs[name] = cost if name in ("ce", "dice") else capped(cost, self.cap)
        return costs

    def forward(self, output, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(labels.device.type, enabled=False):
            means = {name: cost.mean() for name, cost in self.per_sample(output, labels).items()}
            total = sum(self.weights[name] * mean for name, mean in means.items())
        return total, torch.stack([mean.detach() for mean in means.values()])
