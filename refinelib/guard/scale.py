"""The loss scale of float16: its next value, and whether an overflow is how it is found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0
#: The loss scale keeps the largest gradient this many times below float16's largest number.
HEADROOM = 4.0
#: While the loss scale is searched for, an overflow is an incident only after this many in a row.
ORDINARY_OVERFLOWS = 3


def searches_scale(state: Mapping[str, Tensor], floor: float) -> Tensor:
    """Whether an overflow of float16 is how its loss scale is found.

    It is not where good steps have shown that there is room, nor after several overflows in a row.

    Args:
        state: of the guard, by name.
        floor: least loss scale.
    """
    room = (state["good_in_a_row"] > 0) & (state["headroom_peak"] * HEADROOM <= FLOAT16_MAX)
    above_floor = state["scale"].float() > floor
    return above_floor & ~room & (state["skips_in_a_row"] < ORDINARY_OVERFLOWS)


def next_scale(
    state: Mapping[str, Tensor], skip: Tensor, overflow: Tensor, largest: Tensor, floor: float, interval: int
) -> dict[str, Tensor]:
    """The loss scale's next value: back before float16 overflows, and up only where there is room.

    An overflow halves it, down to the floor; a bad loss is no overflow. It also halves when the largest
    scaled gradient has come within ``HEADROOM`` of float16's largest number: waiting for the overflow
    would cost a step. It doubles after ``interval`` good steps, if their largest gradient leaves room for it.

    Args:
        state: of the guard, by name.
        skip: whether the step is skipped, bool.
        overflow: whether the gradient is not finite though the loss is, bool.
        largest: magnitude in the scaled gradient, float64.
        floor: least loss scale.
        interval: good steps in a row after which the scale doubles.
    """
    good = state["good_in_a_row"]
    good = torch.where(skip, torch.where(overflow, 0.0, good), good + 1)
    peak = torch.where(skip, state["headroom_peak"], torch.maximum(state["headroom_peak"], largest))
    near = peak * HEADROOM > FLOAT16_MAX
    grown = (good >= interval) & ~near
    roomy = grown & (2 * HEADROOM * peak < FLOAT16_MAX)
    factor = torch.where(overflow | near, 0.5, torch.where(roomy, 2.0, 1.0))
    return {
        "scale": (state["scale"] * factor).clamp(floor, 2.0**24),
        "headroom_peak": torch.where(grown | near | overflow, 0.0, peak),
        "good_in_a_row": torch.where(grown | near, 0.0, good),
    }
