"""Optimizers and schedules: what a guard steps, how far a step moves a weight, what is kept on the host."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Rate = Callable[[Tensor], Tensor]
Schedule = LRScheduler | Rate | None
#: What schedulers change in the groups of an optimizer. A rewind whose data goes on leaves it as it is.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "max_momentum", "base_momentum", "betas")


class WarmupCosine:
    """Linear warm-up over steps, then a cosine down to ``min_lr`` (Loshchilov & Hutter, SGDR, 2017, eq. 5).

    Args:
        lr: peak rate.
        min_lr: rate at the last step.
        warmup_steps: steps of warm-up; the first step has ``lr / warmup_steps``.
        total_steps: steps of the whole run.

    Example:
        >>> schedule = WarmupCosine(lr=1.0, min_lr=0.0, warmup_steps=2, total_steps=4)
        >>> [float(schedule(torch.tensor(step))) for step in range(4)]
        [0.5, 1.0, 1.0, 0.0]
    """

    def __init__(self, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> None:
        self.lr, self.min_lr = lr, min_lr
        self.warmup_steps = warmup_steps
        self.total_steps = max(total_steps, warmup_steps + 1)

    def __call__(self, step: Tensor) -> Tensor:
        """Rate of step number ``step`` (from 0), float32.

        Args:
            step: a tensor, so that the rate stays on its device.
        """
        done = step.to(torch.float32)
        rise = self.lr * (done + 1) / max(self.warmup_steps, 1)
        along = (done - self.warmup_steps) / max(self.total_steps - 1 - self.warmup_steps, 1)
        half = 0.5 * (1 + torch.cos(math.pi * along.clamp(0.0, 1.0)))
        return torch.where(done < self.warmup_steps, rise, self.min_lr + (self.lr - self.min_lr) * half)


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, kind: str, lr: float, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam or AdamW; only kernels and matrices are decayed.

    Args:
        parameters: ``model.parameters()``.
        kind: ``adamw`` (Loshchilov & Hutter, 2019) or ``adam`` (decay as an L2 penalty).
        lr: learning rate before the schedule sets it.
        weight_decay: of kernels and matrices.
        fused: one kernel that can skip by itself, on the device. Without it the guard reads its decision
            back.
    """
    own = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in own if (p.ndim >= 2) == decayed], "weight_decay": decayed * weight_decay}
        for decayed in (True, False)
    ]
    cls = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    # Capturable: its step count lies on the device, so that a step can be part of a CUDA graph.
    return cls(groups, lr=lr, fused=fused, capturable=fused and own[0].device.type == "cuda")


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[str], list[Tensor]]:
    """Names and parameters that an optimizer holds: the model's in its order, then others.

    Raises:
        ValueError: see :class:`~refinelib.guard.guard.Guard`.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS calls the loss several times a step: take an optimizer of one gradient")
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    own = model.named_parameters()
    named = {name.removeprefix("_orig_mod."): p for name, p in own if id(p) in held}  # of a compiled model
    inside = {id(p) for p in named.values()}
    for place, group in enumerate(optimizer.param_groups):
        named |= {f"group {place}.{at}": p for at, p in enumerate(group["params"]) if id(p) not in inside}
    devices = {str(p.device) for p in named.values()}
    if len(devices) != 1:
        where = " and ".join(sorted(devices)) or "nothing"
        raise ValueError(f"the optimizer holds parameters on {where}: a guard needs them on one device")
    return list(named), list(named.values())


def usable(schedule: Schedule, optimizer: torch.optim.Optimizer) -> tuple[LRScheduler | None, Rate | None]:
    """A schedule that a guard can use: as a scheduler, or as a function of the number of applied steps.

    Raises:
        ValueError: it takes more than the number of steps, or it moves another optimizer's rates.
    """
    if isinstance(schedule, LRScheduler) and not isinstance(schedule, ReduceLROnPlateau):
        if schedule.optimizer is not optimizer:
            raise ValueError("the scheduler is of another optimizer than the guard")
        return schedule, None
    if isinstance(schedule, LRScheduler) or not (schedule is None or callable(schedule)):
        name = type(schedule).__name__
        raise ValueError(f"{name} is not stepped after each step: call it in the loop, without schedule=")
    return None, schedule


def reach(optimizer: torch.optim.Optimizer) -> float:
    """The furthest that a step moves a weight, in learning rates; infinite where that is not known.

    It is known for Adam and AdamW in float32 and float64, with betas that no scheduler cycles.
    """
    groups = optimizer.param_groups
    types = {p.dtype for group in groups for p in group["params"]}
    known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    known = known and types <= {torch.float32, torch.float64}
    if not known or any("max_momentum" in group for group in groups):
        return math.inf
    return max(furthest_update(group) for group in groups)


def furthest_update(group: Mapping[str, Any]) -> float:
    """The furthest that a step of Adam or AdamW moves a weight, in learning rates, for any gradients.

    With ``m`` and ``v`` as sums over the past, the Cauchy-Schwarz inequality bounds ``m / sqrt(v)`` by
    ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``. Weight decay and rounding come on top.

    Args:
        group: a parameter group of the optimizer; without ``betas`` there is no bound.

    Example:
        >>> round(furthest_update({"betas": (0.9, 0.999)}), 1)
        7.3
    """
    b1, b2 = group.get("betas", (1.0, 1.0))
    past = (1 - b2) * (1 - b1**2 / b2)
    return 1.003 * (1 - b1) / math.sqrt(past) if past > 0 else math.inf  # 1.003: moments are float32


def update_sizes(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """Length of Adam's last update of each parameter over the parameter's own, float32 ``[P]``.

    ``lr |m / (sqrt(v) + eps)| / |w|`` with the bias-corrected moments m and v (Kingma & Ba, 2015, algorithm
    1), without weight decay. About 1e-3 is usual: well above it the weights are rewritten, well below they
    stand still. nan where no update was made yet and where the weight is 0.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    sizes = []
    for p in parameters:
        state, group = optimizer.state.get(p, {}), groups[id(p)]
        size = torch.full((), torch.nan, device=p.device)
        if "exp_avg" in state:
            (beta1, beta2), steps = group["betas"], state["step"].to(p.device)
            mean = state["exp_avg"] / (1 - beta1**steps)
            spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt()
            ratio = group["lr"] * (mean / (spread + group["eps"])).norm() / p.norm()
            size = torch.where(p.norm() > 0, ratio, size)
        sizes.append(size.float())
    return torch.stack(sizes)


@torch.no_grad()
def flatten(module: nn.Module) -> list[Tensor]:
    """Lay a module's parameters side by side in memory; shapes, strides and values stay.

    Returns:
        A 1-d block for each dtype. Two modules of the same build have their parameters at the same places.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> (block,) = flatten(layer)
        >>> block.fill_(1.0).shape, layer.bias.tolist()  # each parameter starts at a multiple of 64 elements
        (torch.Size([128]), [1.0, 1.0])
    """
    blocks = []
    parameters = list(module.parameters())
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        some = [p for p in parameters if p.dtype == dtype]
        sizes = [-(-p.numel() // 64) * 64 for p in some]  # kernels read whole lines of memory
        block = torch.zeros(sum(sizes), dtype=dtype, device=some[0].device)
        for p, piece in zip(some, torch.split(block, sizes), strict=True):
            place = piece.as_strided(p.shape, p.stride())  # parameters are dense, in whatever order
            place.copy_(p)
            p.data = place
        blocks.append(block)
    return blocks


def divide(parameters: Sequence[Tensor], divisor: Tensor) -> None:
    """Divide the gradients that there are, dense and sparse."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_div_([x._values() if x.is_sparse else x for x in gradients], divisor)


# -- what is kept on the host --------------------------------------------------------------------------
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
        #: By parameter; none where the optimizer had no state of it yet.
        self.state = {p: _plain(optimizer.state[p]) if p in optimizer.state else None for p in held}
        self.groups = [_plain(group) for group in optimizer.param_groups]
        self.scheduler = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer its state back, but not what schedulers change."""
        for p, before in self.state.items():
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
    kept = {key: x for key, x in values.items() if not isinstance(x, Tensor) and key != "params"}
    return copy.deepcopy(kept)
