"""Plants the faults that the setting ``inject`` asks for (faults.py says how they are written) into a run's steps."""

from __future__ import annotations

import math
import os
import signal

import torch
from torch import Tensor, nn

from refinelib.config import SettingsError
from refinelib.guard.faults import Fault, parse

#: What a bad element becomes; the largest float16 where 1e30 does not fit.
NUMBERS = {"nan": math.nan, "inf": math.inf, "overflow": 1e30, "huge": torch.finfo(torch.float32).max}
SPIKE = 1000.0


class Injector:
    """Plants the faults of a run into its steps.

    Whether a fault is due is a tensor on the device, so that planted steps run through the very kernels (compiled, captured) that all
    others do. What is not due changes no bit.

    Args:
        text: the setting ``inject``; empty: none.
        model: whose modules and parameters ``WHERE`` names.

    Raises:
        SettingsError: a fault whose ``WHERE`` is nowhere in the model.
    """

    def __init__(self, text: str | None, model: nn.Module) -> None:
        self.faults = [fault for fault in parse(text or "") if fault.what != "file"]
        self.parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        self.flags = [torch.tensor(False, device=device) for _ in self.faults]
        self.replaying = False  # a step that is looked at again is not killed again
        # A list of modules is never called itself: a fault in it would never come.
        names = {"activation": [n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)], "grad": list(self.parameters)}
        for fault, flag in zip(self.faults, self.flags):
            known = names.get(fault.what, [])
            if fault.where and not any(name.startswith(fault.where) for name in known):
                tops = sorted({name.split(".")[0] for name in known})
                raise SettingsError(f"inject = {fault.what}:...:{fault.where}: no such place in the model; there are {', '.join(tops) or 'none for ' + fault.what}")
            if fault.what == "activation":
                name = min((n for n in known if n.startswith(fault.where)), key=len)
                model.get_submodule(name).register_forward_hook(lambda module, inputs, output, fault=fault, flag=flag: _activation(output, fault, flag))

    def planted(self, step: int) -> list[str]:
        """The faults that this step has, as they are written."""
        return [str(fault) for fault in self.faults if fault.what != "kill" and fault.due(step)]

    def start(self, step: int) -> None:
        """Called before step number ``step``; sets what is due."""
        for fault, flag in zip(self.faults, self.flags):
            due = fault.due(step)
            if fault.what == "kill" and due and not self.replaying:
                os.kill(os.getpid(), signal.SIGKILL)
            flag.fill_(due)

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Called with each micro-batch."""
        for fault, flag in self._of("input"):
            images = _spoil(images, fault.value, flag)
        for _, flag in self._of("label"):
            labels = torch.where(flag, (labels + 1) % 3, labels)
        return images, labels

    def loss(self, loss: Tensor) -> Tensor:
        """Called with each micro-batch's loss before its backward."""
        for fault, flag in self._of("loss"):
            loss = loss * torch.ones_like(loss).masked_fill(flag, SPIKE if fault.value == "spike" else NUMBERS[fault.value])
        return loss

    def after_backward(self) -> None:
        """Called when a step's gradients are complete."""
        for fault, flag in self._of("grad"):
            name = next(name for name in self.parameters if name.startswith(fault.where))
            gradient = self.parameters[name].grad
            gradient.copy_(_spoil(gradient, fault.value, flag))  # in place: a fused optimizer minds the strides

    def _of(self, what: str) -> list[tuple[Fault, Tensor]]:
        return [(fault, flag) for fault, flag in zip(self.faults, self.flags) if fault.what == what]


def _activation(output, fault: Fault, flag: Tensor):
    # Only while training: validation runs at no step of its own.
    if not torch.is_grad_enabled():
        return None
    if isinstance(output, Tensor):
        return _spoil(output, fault.value, flag)
    return type(output)([_spoil(output[0], fault.value, flag), *output[1:]])


def _spoil(x: Tensor, value: str, flag: Tensor) -> Tensor:
    """``x`` with one element turned bad, or all of it a thousand times larger, where ``flag`` is set; gradients flow through the rest."""
    if value == "spike":
        return x * torch.ones((), dtype=x.dtype, device=x.device).masked_fill(flag, SPIKE)
    mark = torch.zeros_like(x, dtype=torch.bool)
    mark[(0,) * x.ndim] = True
    return x.masked_fill(mark & flag, _number(value, x.dtype))


def _number(value: str, dtype: torch.dtype) -> float:
    return min(NUMBERS[value], torch.finfo(dtype).max) if value in ("overflow", "huge") else NUMBERS[value]
