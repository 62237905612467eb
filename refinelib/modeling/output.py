"""What the model returns, and the class probabilities that follow from it."""

from collections import namedtuple
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from refinelib.modeling import NON_TARGET, TARGET
from refinelib.modeling.geometry import to_float32


class MaskOutput(NamedTuple):
    """What the model returns; all float32, on the mask's canvas ``H x W``.

    Attributes:
        logits: ``[B, 2, H, W]``: person against background, target against non-target.
        contour_logits: ``[B, 2, H, W]``: contour of any person, of this person; None without that head.
        distance: ``[B, 2, H, W]``, -1..1: scaled signed distance of the same two; None without that head.

    Example:
        >>> MaskOutput(torch.zeros(1, 2, 4, 4)).log_probs().exp()[0, :, 0, 0].tolist()
        [0.5, 0.25, 0.25]
    """

    logits: Tensor
    contour_logits: Tensor | None = None
    distance: Tensor | None = None

    def log_probs(self) -> Tensor:
        """float32 ``[B, 3, H, W]``: background, target, non-target."""
        return hierarchical_log_probs(self.logits)


def output_type(heads: Iterable[str]) -> Any:
    """:class:`MaskOutput`, with a further field for every head that it has none for.

    Example:
        >>> output_type(["distance"]) is MaskOutput, output_type(["depth"])._fields
        (True, ('logits', 'contour_logits', 'distance', 'depth'))
    """
    return _output_type(tuple(head for head in heads if head not in MaskOutput._fields))


@cache
def _output_type(further: tuple[str, ...]) -> Any:
    if not further:
        return MaskOutput
    fields = [*MaskOutput._fields, *further]
    base = namedtuple("MaskOutput", fields, defaults=[None] * (len(fields) - 1))  # type: ignore[misc]  # made of data
    return type("MaskOutput", (base,), {"__slots__": (), "log_probs": MaskOutput.log_probs})


def hierarchical_log_probs(logits: Tensor) -> Tensor:
    """Class log-probabilities as exact products of the two branches.

    ``P(bg) = s(-a)``, ``P(target) = s(a) s(b)``, ``P(non-target) = s(a) s(-b)`` with the logistic
    function ``s``, ``a`` the logit of person against background and ``b`` of target against
    non-target. In logarithms these are sums, finite for any finite logit.

    Args:
        logits: float ``[B, 2, H, W]``: a, b.

    Returns:
        float32 ``[B, 3, H, W]``.

    Example:
        >>> hierarchical_log_probs(torch.full((1, 2, 1, 1), 1e4)).flatten().tolist()
        [-10000.0, 0.0, -10000.0]
    """
    a, b = to_float32(logits).unbind(1)
    person = F.logsigmoid(a)
    return torch.stack([F.logsigmoid(-a), person + F.logsigmoid(b), person + F.logsigmoid(-b)], dim=1)


def mask_probs(log_probs: Tensor) -> Tensor:
    """Probability of any person and of this person.

    Args:
        log_probs: float ``[B, 3, H, W]``.

    Returns:
        float32 ``[B, 2, H, W]``.

    Example:
        >>> mask_probs(hierarchical_log_probs(torch.zeros(1, 2, 1, 1))).flatten().tolist()
        [0.5, 0.25]
    """
    probs = to_float32(log_probs).exp()
    return torch.stack([probs[:, TARGET] + probs[:, NON_TARGET], probs[:, TARGET]], dim=1)
