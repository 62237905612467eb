"""Faults on demand: what would happen if this loss, gradient, activation or input went bad at that step?

A fault is written ``WHAT:VALUE@STEP[:WHERE][:always]``, several with ``;`` between them::

    grad:nan@12:boundary       NaN in the gradient of the first parameter whose name starts with "boundary", at step 12
    activation:inf@3:person    Inf in the output of the module "person" at step 3
    loss:nan@5:always          every loss from step 5 on
    input:overflow@7           a huge value in the crops of step 7
    label:swap@7               every label of step 7 turned to another class
    kill@20                    SIGKILL at step 20

``VALUE`` is ``nan``, ``inf``, ``overflow`` (finite, but its square is not) or ``spike`` (a thousand times what it was).
Steps count from 1, as in the log. Nothing here runs in a run without the setting ``inject``.
"""

from __future__ import annotations

import math
import os
import re
import signal
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import SettingsError

WHATS = ("loss", "grad", "activation", "input", "label", "kill")
VALUES = {"nan": math.nan, "inf": math.inf, "overflow": 1e30, "spike": None, "swap": None}
SPIKE = 1000.0


class Fault(NamedTuple):
    """One planted fault."""

    what: str
    value: str
    step: int
    where: str
    always: bool

    def due(self, step: int) -> bool:
        return step == self.step or (self.always and step > self.step)


def parse(text: str) -> list[Fault]:
    """The faults of a setting ``inject``.

    Raises:
        SettingsError: a fault that cannot be read; the sentence shows how one is written.
    """
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = re.fullmatch(r"(\w+)(?::(\w+))?@(\d+)((?::[\w.]+)*)", part)
        what, value, step, rest = match.groups() if match else ("", None, "0", "")
        words = [word for word in rest.split(":") if word]
        always = "always" in words
        where = [word for word in words if word != "always"]
        good = what in WHATS and int(step) >= 1 and len(where) <= 1 and (what == "kill") == (value is None)
        good = good and (value is None or (value == "swap" if what == "label" else value in VALUES and value != "swap"))
        good = good and (what != "activation" or where)
        if not good:
            raise SettingsError(
                f"inject = {part!r}: write WHAT:VALUE@STEP[:WHERE][:always], such as grad:nan@12:boundary, activation:inf@3:person, "
                f"loss:nan@5:always, input:spike@7, label:swap@7 or kill@20; WHAT is one of {', '.join(WHATS)}, VALUE nan, inf, overflow or spike"
            )
        faults.append(Fault(what, value or "", int(step), where[0] if where else "", always))
    return faults


class Injector:
    """Plants the faults of a run into its steps.

    Args:
        text: the setting ``inject``; empty: none.
        model: whose modules and parameters ``WHERE`` names.

    Raises:
        SettingsError: a fault that cannot be read, or whose ``WHERE`` is nowhere in the model.
    """

    def __init__(self, text: str | None, model: nn.Module) -> None:
        self.faults = parse(text or "")
        self.step = 0
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

    def _due(self, *whats: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.what in whats and fault.due(self.step)]

    def before(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Called with each micro-batch of step number ``step``."""
        self.step = step
        if self._due("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        for fault in self._due("input"):
            images = _spoil(images, fault.value)
        for _ in self._due("label"):
            labels = (labels + 1) % 3
        return images, labels

    def loss(self, loss: Tensor) -> Tensor:
        """Called with each micro-batch's loss before its backward."""
        for fault in self._due("loss"):
            loss = loss * SPIKE if fault.value == "spike" else loss * VALUES[fault.value]
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
    return torch.where(mark, torch.full((), VALUES[value], dtype=x.dtype, device=x.device), x)
