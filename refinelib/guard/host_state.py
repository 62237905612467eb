"""What an optimizer and its scheduler keep on the host: plain numbers, rates, the place in a schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

#: What schedulers change in the groups of an optimizer. A rewind whose data goes on leaves it as it is.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "max_momentum", "base_momentum", "betas")


def check_schedule(
    schedule: LRScheduler | Callable[[Tensor], Tensor] | None, optimizer: torch.optim.Optimizer
) -> None:
    """See that a guard can use it.

    Raises:
        ValueError: it takes more than the number of steps, or it moves another optimizer's rates.
    """
    if isinstance(schedule, ReduceLROnPlateau) or not (
        schedule is None or isinstance(schedule, LRScheduler) or callable(schedule)
    ):
        name = type(schedule).__name__
        raise ValueError(f"{name} is not stepped after each step: call it in the loop, without schedule=")
    if isinstance(schedule, LRScheduler) and schedule.optimizer is not optimizer:
        raise ValueError("the scheduler is of another optimizer than the guard")


def makes_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step makes SGD's momentum; a fused one would leave it as memory happens to be."""
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    groups = [group for group in optimizer.param_groups if group["momentum"]]
    held = (optimizer.state[p].get("momentum_buffer") for group in groups for p in group["params"])
    return any(buffer is None for buffer in held)


class PlainState:
    """What an optimizer and its scheduler keep beside tensors: step counts, rates, places in a schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        #: Of each parameter; none where the optimizer had no state of it yet.
        self.state = [_plain(optimizer.state[p]) if p in optimizer.state else None for p in held]
        self.groups = [_plain(group) for group in optimizer.param_groups]
        self.scheduler = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer its state back, but not what schedulers change."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for p, before in zip(held, self.state, strict=True):
            if before is not None:
                optimizer.state[p].update(copy.deepcopy(before))
            elif type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
                optimizer.state.pop(p, None)  # Adam begins with zeros, and a CUDA graph needs its tensors
        for group, values in zip(optimizer.param_groups, self.groups, strict=True):
            group.update({key: x for key, x in values.items() if key not in _SCHEDULED})

    def restore_schedule(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> None:
        """Give the groups their rates back, and the scheduler its place."""
        for group, values in zip(optimizer.param_groups, self.groups, strict=True):
            group.update({key: x for key, x in values.items() if key in _SCHEDULED})
        if scheduler is not None and self.scheduler is not None:
            scheduler.load_state_dict(copy.deepcopy(self.scheduler))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    some = {key: x for key, x in values.items() if not isinstance(x, Tensor) and key != "params"}
    return copy.deepcopy(some)
