"""One function a loss, and the one class that sums them.

Every function takes ``log_probs`` (float ``[B, 3, H, W]``, natural logarithms that sum to one
probability a pixel) or a head's output, and the targets; returns float32 ``[B]``, one cost a sample,
which does not depend on the rest of the batch; is 0 (or nearly) for a perfect prediction; and has a
gradient of bounded size, given as a bound on the L1 norm with respect to the logits or outputs of
one sample. All of them compute in float32 whatever comes in.

A loss is added by one line: ``LOSSES.add(name, LossTerm(function), Option(f"{name}_weight", ...))``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from refinelib.modeling import BACKGROUND, IGNORED, TARGET, geometry
from refinelib.modeling.geometry import edge_strength, scaled_sdf, to_float32
from refinelib.modeling.output import MaskOutput, hierarchical_log_probs, mask_probs
from refinelib.modeling.roi import centre_window
from refinelib.registry import LOSSES, Option


class Targets(NamedTuple):
    """What the losses need to know of a batch's labels, computed once.

    Attributes:
        labels: int64 ``[B, H, W]``.
        masks: bool ``[B, 2, H, W]``: any person, this person.
        signed: float32 ``[B, 2, H, W]``: signed distance to the outline of each, pixels.
        unknown: float32 ``[B, 1, H, W]``: distance to the edge of the nearest ignored pixels (0.5 beside
            them, -0.5 in them), beyond which an outline may hide; None: no pixel is ignored.
    """

    labels: Tensor
    masks: Tensor
    signed: Tensor
    unknown: Tensor | None = None

    def within_known(self, chosen: Tensor, reach: float) -> Tensor:
        """Of ``chosen`` pixels (bool ``[B, 2, H, W]``), those of known distance, clipped at ``reach``."""
        if self.unknown is None:
            return chosen
        return chosen & (self.signed.abs().clamp(max=reach) < self.unknown)


def targets_of(labels: Tensor, *, ignores: bool = False) -> Targets:
    """Masks and signed distances of a batch of label maps.

    Args:
        labels: int64 ``[B, H, W]``: 0 background, 1 target, 2 non-target, and with ``ignores`` also
            ``IGNORED``, which counts as background.
        ignores: whether pixels may be ignored.

    Example:
        >>> targets_of(torch.tensor([[[0, 1, 2]]])).signed[0, :, 0].tolist()
        [[-0.5, 0.5, 1.5], [-0.5, 0.5, -0.5]]
    """
    ignored = labels == IGNORED
    if ignores:
        labels = labels.masked_fill(ignored, BACKGROUND)
    masks = torch.stack([labels != BACKGROUND, labels == TARGET], dim=1)
    unknown = -geometry.signed_distance(ignored[:, None]) if ignores else None
    return Targets(labels, masks, geometry.signed_distance(masks), unknown)


class Prediction(NamedTuple):
    """What a loss is computed from.

    Attributes:
        log_probs: float32 ``[B, 3, H, W]``: of background, target, non-target.
        output: what the model returned; it has the head that the loss ``requires``.
    """

    log_probs: Tensor
    output: Any  # a MaskOutput, maybe with further heads


@dataclass(frozen=True)
class LossTerm:
    """A loss as :data:`~refinelib.registry.LOSSES` holds it; its weight is the setting ``<name>_weight``.

    Attributes:
        function: ``f(prediction, targets, **options)`` to float32 ``[B]``; see the top of this file. The
            options are the settings registered with it, but for the weight and the switch.
        switch: name of the setting that turns it on; None: it is always on.
        capped: whether the setting ``refinement_loss_cap`` holds for it.
        requires: attribute of the model's output that it needs; None: the logits alone.
    """

    function: Callable[..., Tensor]
    switch: str | None = None
    capped: bool = True
    requires: str | None = None


def cross_entropy(log_probs: Tensor, labels: Tensor, *, pixel_weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the true class, optionally weighted by pixel.

    Weights are divided by their sum, so they move attention between pixels and never the loss's
    size. Gradient: at most 2 in L1 norm a sample (1 for each of the two branch logits).

    Args:
        log_probs: float ``[B, 3, H, W]``.
        labels: int64 ``[B, H, W]``.
        pixel_weights: float ``[B, H, W]``, not negative, not all 0; none: all equal.

    Returns:
        float32 ``[B]``.

    Example:
        >>> cross_entropy(torch.full((1, 3, 2, 2), 1 / 3).log(), torch.ones(1, 2, 2, dtype=torch.int64))
        tensor([1.0986])
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

    Returns:
        float32 ``[B]``.

    Example:
        >>> dice(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).log(), torch.zeros(1, 1, 1, dtype=torch.int64))
        tensor([0.])
    """
    probs = to_float32(log_probs).exp().flatten(2)
    classes = torch.arange(probs.shape[1], device=labels.device).view(1, -1, 1)
    truth = (labels.flatten(1)[:, None] == classes).to(probs.dtype)
    size = truth.sum(-1)
    cost = 1 - (2 * (probs * truth).sum(-1) + smooth) / (probs.sum(-1) + size + smooth)
    present = (size > 0).to(probs.dtype)
    return (cost * present).sum(-1) / present.sum(-1)


def active_contour(log_probs: Tensor, targets: Targets, *, smoothness: float = 0.1) -> Tensor:
    """Active contour without edges: misplaced area, plus the contour's length beyond the true one's.

    Region and length terms of Chen et al., "Learning Active Contour Models for Medical Image
    Segmentation", CVPR 2019, eq. 5-7, for the masks of any person and of this person, averaged
    over pixels. The length is smooth (see :func:`~refinelib.modeling.geometry.edge_strength`) and
    has the true mask's own length taken off, a constant that makes a perfect mask cost 0; with
    smoothness below 0.29 no mask costs less. Gradient: at most ``0.5 + 2 smoothness`` in L1 norm a
    sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        targets: of the same batch.
        smoothness: weight of the length term.

    Returns:
        float32 ``[B]``.

    Example:
        >>> targets = targets_of(torch.ones(1, 2, 2, dtype=torch.int64))
        >>> active_contour(hierarchical_log_probs(torch.zeros(1, 2, 2, 2)), targets)  # (0.5 + 0.75) / 2
        tensor([0.6250])
    """
    probs, masks = mask_probs(log_probs), targets.masks
    region = torch.where(masks, 1 - probs, probs).mean(dim=(-3, -2, -1))
    excess = edge_strength(probs) - edge_strength(masks.to(probs.dtype))
    return region + smoothness * excess.mean(dim=(-3, -2, -1))


def boundary_aware(
    log_probs: Tensor, targets: Targets, *, boundary_weight: float = 5.0, sigma: float = 2.0
) -> Tensor:
    """Cross-entropy with weight ``1 + w exp(-d^2 / (2 sigma^2))``, d the distance to the true outline.

    The weight map of Ronneberger et al., U-Net, 2015, eq. 2, with one distance, divided by its sum.
    Gradient: at most 2 in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        targets: of the same batch.
        boundary_weight: w, extra weight of a pixel on the outline.
        sigma: pixels.

    Returns:
        float32 ``[B]``.

    Example:
        >>> log_probs = torch.full((1, 3, 1, 2), 1 / 3).log()
        >>> boundary_aware(log_probs, targets_of(torch.tensor([[[0, 1]]])))
        tensor([1.0986])
    """
    distance = targets.signed.abs().amin(dim=1)
    weights = 1 + boundary_weight * torch.exp(-distance.square() / (2 * sigma * sigma))
    return cross_entropy(log_probs, targets.labels, pixel_weights=weights)


def contour_head(contour_logits: Tensor, targets: Targets, *, radius: float = 1.0) -> Tensor:
    """Balanced cross-entropy of a contour head against the band around the true outline.

    Contour and other pixels count half each however few the former are (Xie & Tu, HED, 2015,
    eq. 2); where there is no contour, the others count alone. Takes logits: a sigmoid before it
    would make a perfect contour cost 0.68. Gradient: at most 1 in L1 norm a sample.

    Args:
        contour_logits: float ``[B, 2, H, W]``: contour of any person, of this person.
        targets: of the same batch.
        radius: of the band, pixels.

    Returns:
        float32 ``[B]``.

    Example:
        >>> contour_head(torch.zeros(1, 2, 1, 4), targets_of(torch.tensor([[[0, 0, 1, 1]]])))
        tensor([0.6931])
    """
    logits = to_float32(contour_logits)
    band = geometry.contour_band(targets.signed, radius=radius)
    cost = F.softplus(torch.where(band, -logits, logits))
    halves = []
    for side in (band, ~band):
        chosen = targets.within_known(side, radius)
        count = chosen.sum(dim=(-2, -1))
        mean = (cost * chosen).sum(dim=(-2, -1)) / count.clamp(min=1)
        halves.append((mean, (count > 0).to(cost.dtype)))
    weight = (halves[0][1] + halves[1][1]).clamp(min=1)  # both may be unknown
    return ((halves[0][0] + halves[1][0]) / weight).mean(dim=-1)


def contour_mask(log_probs: Tensor, targets: Targets, *, level: float = 0.05) -> Tensor:
    """How far the mask's edges are from the true ones, as vectors, in 0..2.

    ``|p - y|^2 / (|p|^2 + |y|^2 + 1)`` in the Sobolev norm ``|f|^2 = sum |grad f|^2 + level f^2``:
    0 when the edges agree, about 1 when they lie elsewhere, 2 when they point the wrong way. A
    contour compared without its direction cannot tell a mask turned inside out from a perfect one;
    without the level, an empty and a full mask would cost the same. This lets the contour supervise
    the mask itself. Gradient: at most ``16 sqrt(pixels)`` in L1 norm a sample, and smaller by the
    root of the contour's length where there is one.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        targets: of the same batch.
        level: weight of the values beside their differences.

    Returns:
        float32 ``[B]``.

    Example:
        >>> targets = targets_of(torch.ones(1, 2, 2, dtype=torch.int64))
        >>> contour_mask(hierarchical_log_probs(torch.full((1, 2, 2, 2), 20.0)), targets) < 1e-6
        tensor([True])
    """
    probs = mask_probs(log_probs)
    masks = targets.masks.to(probs.dtype)

    def energy(x: Tensor) -> Tensor:
        dy, dx = geometry.edge_vectors(x)
        return (dy.square() + dx.square() + level * x.square()).sum(dim=(-2, -1))

    return (energy(probs - masks) / (energy(probs) + energy(masks) + 1)).mean(dim=-1)


def distance_head(distance: Tensor, targets: Targets, *, clip: float = 8.0, beta: float = 0.1) -> Tensor:
    """Huber loss of a distance head against the clipped, scaled signed distance.

    Gradient: at most 1 in L1 norm a sample.

    Args:
        distance: float ``[B, 2, H, W]`` in -1..1, for any person and this person.
        targets: of the same batch.
        clip: distance that is scaled to 1, pixels.
        beta: below this error the cost is quadratic.

    Returns:
        float32 ``[B]``.

    Example:
        >>> targets = targets_of(torch.tensor([[[0, 1]]]))  # both pixels 0.5 from the outline
        >>> distance_head(targets.signed / 8, targets)
        tensor([0.])
    """
    target = scaled_sdf(targets.signed, clip=clip)
    cost = F.smooth_l1_loss(to_float32(distance), target, beta=beta, reduction="none")
    if targets.unknown is not None:
        cost = cost * targets.within_known(torch.ones_like(targets.masks), clip)
    return cost.mean(dim=(-3, -2, -1))


def distance_mask(log_probs: Tensor, targets: Targets, *, clip: float = 8.0) -> Tensor:
    """Misplaced probability, weighted by its distance from the true outline.

    The boundary loss of Kervadec et al., MIDL 2019, eq. 5, with the clipped signed distance and
    without the constant that makes a perfect mask negative. Lets the distance supervise the mask
    itself. Gradient: at most 0.5 in L1 norm a sample.

    Args:
        log_probs: float ``[B, 3, H, W]``.
        targets: of the same batch.
        clip: distance that is scaled to 1, pixels.

    Returns:
        float32 ``[B]``.

    Example:
        >>> targets = targets_of(torch.tensor([[[0, 1]]]))  # both pixels 0.5 from the outline
        >>> distance_mask(hierarchical_log_probs(torch.zeros(1, 2, 1, 2)), targets)  # 0.5 * 0.5 / 8
        tensor([0.0312])
    """
    probs = mask_probs(log_probs)
    wrong = torch.where(targets.masks, 1 - probs, probs)
    return (wrong * scaled_sdf(targets.signed, clip=clip).abs()).mean(dim=(-3, -2, -1))


def capped(cost: Tensor, cap: float | None) -> Tensor:
    """``cost`` with its value held at ``cap``, its gradient's direction kept.

    Above the cap the gradient is scaled by ``cap / cost``; ``clamp`` would make it 0 there and the
    loss could never come down. NaN stays NaN and infinity becomes NaN, for the guard to see.

    Args:
        cost: float of any shape.
        cap: largest value; None: no cap.

    Example:
        >>> capped(torch.tensor([0.5, 30.0]), 10.0)
        tensor([ 0.5000, 10.0000])
    """
    if cap is None:
        return cost
    return cost * (cap / cost.detach().clamp(min=cap))


class MaskLoss(nn.Module):
    """The weighted sum of the losses of :data:`~refinelib.registry.LOSSES` that have a weight.

    ``forward`` returns the total (float32 scalar, mean over the batch) and the components before
    their weights (``names`` gives their order) as a detached float32 ``[len(names)]``.

    Attributes:
        names: of the losses that have a weight, in the order of the components.
        caps: the value at which a loss is held, by name; without those that have no cap.

    Gradient: with respect to one sample's logits and heads, at most the sum of each loss's bound times
    its weight in L1 norm, divided by the batch size; a cap only lowers it.

    Args:
        weights: of each loss by name; what is not in it, or has weight 0, is not computed.
        options: of the losses, by the settings' names; for what is not in it the function's default holds.
        cap: on the cost of one sample of each loss that is ``capped``, before its weight; None: no cap.
        ignores: whether labels may be ``IGNORED``. Such a pixel counts as predicted rightly; a contour or
            distance that one may hide is not learnt.
        window: ``(h, w)`` in the middle of the crop, in mask pixels: what lies outside counts in no loss, and
            the image there is context alone; None: all of the crop counts.

    Raises:
        KeyError: a weight of a loss, or an option, that nobody registered; the message has the known names.

    Example:
        >>> loss = MaskLoss({"ce": 1.0, "dice": 0.5})
        >>> total, parts = loss(MaskOutput(torch.zeros(1, 2, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.int64))
        >>> loss.names, parts, total
        (('ce', 'dice'), tensor([0.6931, 0.3200]), tensor(0.8531))
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Mapping[str, Any] | None = None,
        *,
        cap: float | None = None,
        ignores: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.terms: dict[str, LossTerm] = {name: LOSSES[name] for name, weight in weights.items() if weight}
        self.names, self.cap, self.ignores = tuple(self.terms), cap, ignores
        self.weights = {name: weights[name] for name in self.names}
        self.caps = {name: cap for name, term in self.terms.items() if term.capped and cap is not None}
        self.options, known = dict(options or {}), [option.name for option in LOSSES.options()]
        if unknown := self.options.keys() - known:
            raise KeyError(f"no loss has the option {unknown.pop()!r}; there are {', '.join(known)}")
        self.keywords: dict[str, dict[str, Any]] = {}
        for name, term in self.terms.items():
            own = {option.name for option in LOSSES.options(name)} - {f"{name}_weight", term.switch}
            self.keywords[name] = {key: value for key, value in self.options.items() if key in own}

    def per_sample(self, output: MaskOutput, labels: Tensor) -> dict[str, Tensor]:
        """Each component's cost a sample, before weights and after caps: float32 ``[B]`` by name.

        Args:
            output: what the model returns.
            labels: int64 ``[B, H, W]``; where ``ignores`` is set, also ``IGNORED``.

        Raises:
            ValueError: a loss needs a head that the model does not have.
        """
        if self.window is not None:
            labels = centre_window(labels, self.window)
            kind: Any = type(output)
            output = kind(*(x if x is None else centre_window(x, self.window) for x in output))
        targets, logits = targets_of(labels, ignores=self.ignores), output.logits
        if self.ignores:  # as if predicted rightly, and without gradient
            logits = logits.masked_fill((labels == IGNORED)[:, None], -30.0)
        prediction = Prediction(hierarchical_log_probs(logits), output)
        costs = {}
        for name, term in self.terms.items():
            if term.requires is not None and getattr(output, term.requires, None) is None:
                raise ValueError(f"the {name} loss needs {term.requires}, and the model has no such head")
            cost = term.function(prediction, targets, **self.keywords[name])
            costs[name] = capped(cost, self.caps.get(name))
        return costs

    def forward(self, output: MaskOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Total and components; see the class."""
        with torch.autocast(labels.device.type, enabled=False):
            means = {name: cost.mean() for name, cost in self.per_sample(output, labels).items()}
            first, *others = (self.weights[name] * mean for name, mean in means.items())
            total = sum(others, first)
        return total, torch.stack([mean.detach() for mean in means.values()])


def _active_contour(
    prediction: Prediction, targets: Targets, *, active_contour_smoothness: float = 0.1
) -> Tensor:
    return active_contour(prediction.log_probs, targets, smoothness=active_contour_smoothness)


def _boundary_aware(prediction: Prediction, targets: Targets, *, boundary_weight: float = 5.0) -> Tensor:
    return boundary_aware(prediction.log_probs, targets, boundary_weight=boundary_weight)


def _contour(prediction: Prediction, targets: Targets) -> Tensor:
    """The head's own cost, and that of the mask's edges: the head alone would not teach the mask."""
    cost = contour_head(prediction.output.contour_logits, targets)
    return cost + contour_mask(prediction.log_probs, targets)


def _distance(prediction: Prediction, targets: Targets) -> Tensor:
    """The head's own cost, and that of the mask's misplaced pixels."""
    return distance_head(prediction.output.distance, targets) + distance_mask(prediction.log_probs, targets)


def _weight(name: str, default: float, description: str, most: float = 100.0) -> Option:
    return Option(name, default, description, {"ge": 0.0, "le": most})


LOSSES.add(
    "ce",
    LossTerm(lambda prediction, targets: cross_entropy(prediction.log_probs, targets.labels), capped=False),
    _weight("ce_weight", 1.0, "weight of the cross-entropy over three classes"),
)
LOSSES.add(
    "dice",
    LossTerm(lambda prediction, targets: dice(prediction.log_probs, targets.labels), capped=False),
    _weight("dice_weight", 1.0, "weight of the Dice loss over the classes present"),
)
LOSSES.add(
    "active_contour",
    LossTerm(_active_contour, switch="use_active_contour_loss"),
    Option("use_active_contour_loss", True, "region and length term of the mask's own contour"),
    _weight("active_contour_weight", 0.1, "weight of the active contour loss"),
    _weight(
        "active_contour_smoothness", 0.1, "weight of the length term inside the active contour loss", 10.0
    ),
)
_BOUNDARY = "extra weight of a pixel on the boundary against one far from it, inside the boundary-aware loss"
LOSSES.add(
    "boundary_aware",
    LossTerm(_boundary_aware, switch="use_boundary_aware_loss"),
    Option("use_boundary_aware_loss", True, "cross-entropy weighted towards the true boundary"),
    _weight("boundary_aware_weight", 0.1, "weight of the boundary-aware loss"),
    _weight("boundary_weight", 5.0, _BOUNDARY),
)
LOSSES.add(
    "contour",
    LossTerm(_contour, switch="use_contour_detection", requires="contour_logits"),
    _weight("contour_weight", 0.1, "weight of the contour loss (with use_contour_detection)"),
)
LOSSES.add(
    "distance",
    LossTerm(_distance, switch="use_distance_transform", requires="distance"),
    _weight("distance_weight", 0.1, "weight of the distance loss (with use_distance_transform)"),
)
