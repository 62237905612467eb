"""What the guard steps: learning rate schedule and optimizer."""

from __future__ import annotations

import math
from typing import Iterable

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def flatten(module: nn.Module) -> list[Tensor]:
    """Lay a module's parameters side by side in memory, one block a dtype; shapes, strides and values stay.

    Returns:
        The blocks, 1-d. Two modules of the same build have their parameters at the same places.
    """
    blocks = []
    parameters = list(module.parameters())
    for kind in dict.fromkeys(p.dtype for p in parameters):
        some = [p for p in parameters if p.dtype == kind]
        starts, total = [], 0
        for p in some:
            starts.append(total)
            total += -(-p.numel() // 64) * 64  # kernels take whole lines of memory
        block = torch.zeros(total, dtype=kind, device=some[0].device)
        for p, start in zip(some, starts):
            place = block.as_strided(p.shape, p.stride(), start)  # parameters are dense, in whatever order
            place.copy_(p)
            p.data = place
        blocks.append(block)
    return blocks


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, kind: str, lr: float, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam or AdamW with tensor learning rates; only kernels and matrices are decayed.

    Args:
        parameters: ``model.named_parameters()``.
        kind: ``adamw`` (Loshchilov & Hutter, 2019) or ``adam`` (decay as an L2 penalty).
        lr, weight_decay: as named.
        fused: one kernel that can skip by itself, on the device; else a chain of plain ones, before which the
            guard has to read its judgement back.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    # A fused kernel reads its rate on the device; the plain ones take a number.
    rate = torch.tensor(lr, dtype=torch.float32, device=trained[0].device) if fused else lr
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["lr"] = rate.clone() if fused else rate
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    # Capturable: its step count lies on the device, so that a step can be part of a CUDA graph.
    return cls(groups, lr=rate, fused=fused, capturable=fused and trained[0].device.type == "cuda")
