"""Plants the faults that the setting ``inject`` asks for (faults.py says how they are written) into a run's steps."""

from __future__ import annotations

import math
import os
import signal

import torch
from torch import Tensor, nn

from .config import SettingsError
from .faults import Fault, parse

#: What a bad element becomes; the largest float16 where 1e30 does not fit.
NUMBERS = {"nan": math.nan, "inf": math.inf, "overflow": 1e30}
SPIKE = 1000.0


class Injector:
    """Plants the faults of a run into its steps.

    Args:
        text: the setting ``inject``; empty: none.
        model: whose modules and parameters ``WHERE`` names.

    Raises:
        SettingsError: a fault whose ``WHERE`` is nowhere in the model.
    """

    def __init__(self, text: str | None, model: nn.Module) -> None:
        self.faults = parse(text or "")
        self.step = 0
        self.replaying = False  # a step that is looked at again is not killed again
        names = {"activation": [n for n, _ in model.named_modules() if n], "grad": [n for n, _ in model.named_parameters()]}
        self.parameters = dict(model.named_parameters())
        for fault in self.faults:
            known = names.get(fault.what, [])
            if fault.where and not any(name.startswith(fault.where) for name in known):
                tops = sorted({name.split(".")[0] for name in known})
                raise SettingsError(f"inject = {fault.what}:...:{fault.where}: no such place in the model; there are {', '.join(tops) or 'none for ' + fault.what}")
            if fault.what == "activation":
                name = min((n for n in known if n.startswith(fault.where)), key=len)
                model.get_submodule(name).register_forward_hook(lambda module, inputs, output, fault=fault: self._activation(fault, output))

    def planted(self, step: int) -> list[str]:
        """The faults that this step has, as they are written."""
        return [str(fault) for fault in self.faults if fault.what not in ("kill", "file") and fault.due(step)]

    def _due(self, *whats: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.what in whats and fault.due(self.step)]

    def before(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Called with each micro-batch of step number ``step``."""
        self.step = step
        if self._due("kill") and not self.replaying:
            os.kill(os.getpid(), signal.SIGKILL)
        for fault in self._due("input"):
            images = _spoil(images, fault.value)
        for _ in self._due("label"):
            labels = (labels + 1) % 3
        return images, labels

    def loss(self, loss: Tensor) -> Tensor:
        """Called with each micro-batch's loss before its backward."""
        for fault in self._due("loss"):
            loss = loss * SPIKE if fault.value == "spike" else loss * NUMBERS[fault.value]
        return loss

    def after_backward(self) -> None:
        """Called when a step's gradients are complete."""
        for fault in self._due("grad"):
            name = next(name for name in self.parameters if name.startswith(fault.where))
            parameter = self.parameters[name]
            parameter.grad = _spoil(parameter.grad, fault.value)

    def _activation(self, fault: Fault, output):
        # Only while training: validation runs at no step of its own.
        if not fault.due(self.step) or not torch.is_grad_enabled():
            return None
        if isinstance(output, Tensor):
            return _spoil(output, fault.value)
        return type(output)([_spoil(output[0], fault.value), *output[1:]])


def _spoil(x: Tensor, value: str) -> Tensor:
    """``x`` with one element turned bad, or all of it a thousand times larger; gradients flow through the rest."""
    if value == "spike":
        return x * SPIKE
    mark = torch.zeros_like(x, dtype=torch.bool)
    mark[(0,) * x.ndim] = True
    return torch.where(mark, torch.full((), _number(value, x.dtype), dtype=x.dtype, device=x.device), x)


def _number(value: str, dtype: torch.dtype) -> float:
    return min(NUMBERS[value], torch.finfo(dtype).max) if value == "overflow" else NUMBERS[value]
