"""What makes a step safe: judge loss and gradients, then update everything or nothing.

One path for every precision and optimizer. The judgement is a tensor (``found_inf``, float32,
exactly 0.0 or 1.0) that PyTorch's fused optimizers take on the device and return early on, so
nothing is read back. All else that a step moves (moving average, schedule, loss scale) hangs on the
same tensor. A skipped step leaves parameters, moments and step counts bit for bit as they were.
"""

from __future__ import annotations

import math
from typing import Iterable

import torch
from torch import Tensor, nn

#: Columns of a step's report, before the loss components and the per-parameter norms.
REPORT = ("loss", "grad_norm", "grad_max", "lr", "loss_scale", "bad_loss", "bad_grad", "skipped")


FLOAT16_MAX = 65504.0
#: The loss scale keeps the largest gradient this many times below float16's largest number.
HEADROOM = 4.0


class WarmupCosine:
    """Linear warm-up over steps, then a cosine down to ``min_lr`` (Loshchilov & Hutter, SGDR, 2017, eq. 5).

    Args:
        lr: peak rate.
        min_lr: rate at the last step.
        warmup_steps: steps of warm-up; the first step has ``lr / warmup_steps``.
        total_steps: steps of the whole run.
    """

    def __init__(self, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> None:
        self.lr, self.min_lr = lr, min_lr
        self.warmup_steps = warmup_steps
        self.total_steps = max(total_steps, warmup_steps + 1)

    def __call__(self, step: Tensor) -> Tensor:
        """Rate of step number ``step`` (from 0; a tensor, so that it stays on its device), float32."""
        done = step.to(torch.float32)
        rise = self.lr * (done + 1) / max(self.warmup_steps, 1)
        along = (done - self.warmup_steps) / max(self.total_steps - 1 - self.warmup_steps, 1)
        fall = self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + torch.cos(math.pi * along.clamp(0.0, 1.0)))
        return torch.where(done < self.warmup_steps, rise, fall)


class Guard:
    """Owns the optimizer's step, the loss scale, the schedule's position and the moving average.

    Args:
        model: whose parameters are trained.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` built with ``fused=True`` and a tensor ``lr``.
        schedule: learning rate by number of applied steps.
        grad_clip: largest L2 norm of the gradient after clipping.
        average: model that holds the moving average of the weights; none: no average.
        ema_decay: its decay.
        scaled: whether the loss is scaled (fp16).
        scale_init, scale_floor: loss scale at the start, and its least value: without a floor some
            150 skips in a row make its inverse infinite, and the next healthy step writes that into
            every weight.
        growth_interval: good steps in a row after which the scale doubles.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: WarmupCosine,
        *,
        grad_clip: float,
        average: nn.Module | None = None,
        ema_decay: float = 0.0,
        scaled: bool = False,
        scale_init: float = 65536.0,
        scale_floor: float = 1.0,
        growth_interval: int = 2000,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.grad_clip = grad_clip
        self.ema_decay = ema_decay
        self.scaled = scaled
        self.scale_floor = scale_floor
        self.growth_interval = growth_interval
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = list(average.parameters()) if average is not None else []
        device = self.parameters[0].device
        self.root_sizes = torch.tensor([math.sqrt(p.numel()) for p in self.parameters], device=device)
        self.state = {
            "applied": torch.zeros((), dtype=torch.int64, device=device),
            "skipped": torch.zeros((), dtype=torch.int64, device=device),
            "scale": torch.tensor(scale_init if scaled else 1.0, dtype=torch.float32, device=device),
            "headroom_peak": torch.zeros((), dtype=torch.float32, device=device),
            "good_in_a_row": torch.zeros((), dtype=torch.int64, device=device),
        }

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss * self.state["scale"] if self.scaled else loss

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Apply the accumulated gradients, or nothing at all where they or the loss are not finite.

        Args:
            loss: the step's unscaled loss, scalar.

        Returns:
            float32 ``[len(REPORT) + parameters]`` on the device: the columns of ``REPORT``, then
            the L2 norm of each parameter's gradient, unscaled and before clipping.
        """
        state = self.state
        grads = [p.grad for p in self.parameters]
        scale = state["scale"]
        norms = torch.stack(torch._foreach_norm(grads, 2)) / scale
        largest = torch.stack(torch._foreach_norm(grads, math.inf)) / scale
        bad_loss, bad_grad = ~torch.isfinite(loss), ~torch.isfinite(largest).all()
        # Squares of finite gradients above 1e19 overflow: the norm is then bounded by the largest element.
        norms = torch.where(torch.isfinite(norms), norms, largest * self.root_sizes)
        peak = norms.amax()
        total = peak * (norms / peak.clamp(min=torch.finfo(norms.dtype).tiny)).square().sum().sqrt()

        skip = bad_loss | bad_grad
        lr = self.schedule(state["applied"])
        for group in self.optimizer.param_groups:
            group["lr"].copy_(lr)
        clip = (self.grad_clip / total.clamp(min=1e-12)).clamp(max=1.0)
        # The fused step divides by grad_scale, so unscaling and clipping cost no pass of their own.
        self.optimizer.grad_scale = torch.where(skip, 1.0, scale / clip)
        self.optimizer.found_inf = skip.to(torch.float32)
        self.optimizer.step()
        self._follow(skip)
        flags = (x.float() for x in (bad_loss, bad_grad, skip))
        report = torch.stack([loss.float(), total, largest.amax(), lr, scale.clone(), *flags])

        applied = (~skip).to(torch.int64)
        state["applied"] += applied
        state["skipped"] += 1 - applied
        if self.scaled:
            self._rescale(skip, overflow=bad_grad & ~bad_loss, largest=report[2] * scale)
        return torch.cat([report, norms])

    def _follow(self, skip: Tensor) -> None:
        """Moving average of the weights; a skipped step weighs exactly nothing (weights are always finite)."""
        if not self.averages:
            return
        weight = torch.where(skip, 0.0, 1.0 - self.ema_decay).to(torch.float32)
        moved = torch._foreach_sub(self.parameters, self.averages)
        torch._foreach_mul_(moved, weight)
        torch._foreach_add_(self.averages, moved)

    def _rescale(self, skip: Tensor, *, overflow: Tensor, largest: Tensor) -> None:
        """Move the loss scale: back before float16 overflows, and up only where there is room.

        An overflow halves it, down to the floor; a bad loss is no overflow. It also halves when the
        largest scaled gradient has come within ``HEADROOM`` of float16's largest number: waiting for the
        overflow would cost a step. It doubles after ``growth_interval`` good steps, if the largest
        gradient of those steps leaves room for it.
        """
        state = self.state
        good = torch.where(skip, torch.where(overflow, 0, state["good_in_a_row"]), state["good_in_a_row"] + 1)
        peak = torch.where(skip, state["headroom_peak"], torch.maximum(state["headroom_peak"], largest))
        near = peak * HEADROOM > FLOAT16_MAX
        grown = (good >= self.growth_interval) & ~near
        roomy = grown & (2 * HEADROOM * peak < FLOAT16_MAX)
        factor = torch.where(overflow | near, 0.5, torch.where(roomy, 2.0, 1.0))
        state["scale"].copy_((state["scale"] * factor).clamp(self.scale_floor, 2.0**24))
        state["headroom_peak"].copy_(torch.where(grown | near | overflow, 0.0, peak))
        state["good_in_a_row"].copy_(torch.where(grown | near, 0, good))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"state": dict(self.state), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved["state"].items():
            self.state[name].copy_(value)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate.copy_(group["lr"])


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, kind: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Fused Adam or AdamW with tensor learning rates; only kernels and matrices are decayed.

    Args:
        parameters: ``model.named_parameters()``.
        kind: ``adamw`` (Loshchilov & Hutter, 2019) or ``adam`` (decay as an L2 penalty).
        lr, weight_decay: as named.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    device = trained[0].device
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32, device=device)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    return cls(groups, lr=torch.tensor(lr, dtype=torch.float32, device=device), fused=True)
