"""Faults on demand: what happens if this loss, gradient, activation or input goes bad at that step?

A fault is written ``WHAT:VALUE@WHEN[:WHERE][:always]``, several with ``;`` between them::

    grad:nan@12:boundary       NaN in the gradient of the first parameter named "boundary...", at step 12
    activation:inf@3:person    Inf in the output of the module "person" at step 3
    loss:nan@5:always          every loss from step 5 on
    input:nan@5%               NaN in the images of one step in twenty, scattered
    input:overflow@7           a huge value in the images of step 7
    label:swap@7               every label of step 7 turned to another class
    kill@20                    SIGKILL at step 20
    file:truncated@3           the third training image is cut short (or ``missing``)

``VALUE`` is ``nan``, ``inf``, ``overflow`` (finite, but its square is not), ``huge`` (the largest finite
number, whose norm is not finite) or ``spike`` (a thousand times what it was). Steps count from 1, as in the
log.
"""

import functools
import hashlib
import math
import os
import re
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What an element becomes; the largest float16 where 1e30 does not fit.
NUMBERS = {"nan": math.nan, "inf": math.inf, "overflow": 1e30, "huge": torch.finfo(torch.float32).max}
SPIKE = 1000.0
#: The values that each fault can have.
VALUES = {
    **dict.fromkeys(("loss", "grad", "activation", "input"), (*NUMBERS, "spike")),
    **{"label": ("swap",), "kill": ("",), "file": ("truncated", "missing")},
}
_FORM = re.compile(r"(\w+)(?::(\w+))?@(?:(\d+)|(\d+(?:\.\d+)?)%)(?::(?!always$)([\w.]+))?(:always)?")
_HOW = (
    "write WHAT:VALUE@WHEN[:WHERE][:always], such as grad:nan@12:boundary, activation:inf@3:person, "
    "loss:nan@5:always, input:nan@5%, label:swap@7, file:truncated@3 or kill@20; WHAT is one of "
    f"{', '.join(VALUES)}, VALUE nan, inf, overflow, huge or spike"
)


class Fault(NamedTuple):
    """One planted fault.

    Attributes:
        what: a key of ``VALUES``.
        value: one of its values.
        step: number of the step, from 1; 0 where the fault comes by chance.
        share: share of the steps, where it does.
        where: beginning of a module's or parameter's name.
        always: whether it comes in all later steps too.
    """

    what: str
    value: str
    step: int
    share: float
    where: str
    always: bool

    def due(self, step: int) -> bool:
        """Whether the step has this fault; the same in every run and after every resume."""
        if self.share:
            # A real hash: checksums of numbers that follow on one another are a pattern, never two due in a
            # row.
            text = f"{self.what}:{self.value}:{self.where}@{step}"
            chance = hashlib.blake2b(text.encode(), digest_size=4).digest()
            return int.from_bytes(chance, "big") < self.share * 2**32
        return step == self.step or (self.always and step > self.step)

    def __str__(self) -> str:
        when = f"{100 * self.share:g}%" if self.share else str(self.step)
        head = ":".join(filter(None, (self.what, self.value)))
        return ":".join(filter(None, (f"{head}@{when}", self.where, "always" * self.always)))


def parse(text: str) -> list[Fault]:
    """The faults of a setting ``inject``.

    Raises:
        ValueError: a fault that cannot be read; the sentence shows how one is written.

    Example:
        >>> [str(fault) for fault in parse("grad:nan@12:boundary; kill@20")]
        ['grad:nan@12:boundary', 'kill@20']
    """
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def beyond(text: str | None, steps: int) -> list[Fault]:
    """The faults that never come in a run of so many steps.

    Example:
        >>> [str(fault) for fault in beyond("grad:nan@12; loss:nan@99; input:nan@5%; file:missing@99", 20)]
        ['loss:nan@99']
    """
    return [fault for fault in parse(text or "") if fault.what != "file" and fault.step > steps]


def _parse_one(text: str) -> Fault:
    match = _FORM.fullmatch(text)
    what, value, step, percent, where, always = match.groups("") if match else [""] * 6
    share = float(percent or 0) / 100
    by_chance_alone = not always and what not in ("kill", "file")
    comes = 0 < share <= 1 and by_chance_alone if percent else int(step or 0) > 0
    placed = bool(where) or what != "activation"
    if not (value in VALUES.get(what, ()) and comes and placed):
        raise ValueError(_HOW)
    return Fault(what, value, int(step or 0), share, where, bool(always))


class Injector:
    """Plants faults into the steps of a training loop.

    Whether a fault is due is a tensor on the device, so that planted steps run through the same kernels
    (compiled, captured) as all others. Without a due fault, results are bit-identical.

    Args:
        text: see :func:`parse`; empty or none: no faults.
        model: whose modules and parameters ``WHERE`` names.
        classes: number of classes that a label can have.

    Raises:
        ValueError: a fault cannot be read, or its ``WHERE`` is nowhere in the model.

    Example:
        >>> injector = Injector("loss:nan@2", nn.Linear(2, 1))
        >>> for step in (1, 2):
        ...     injector.start(step)
        ...     print(injector.loss(torch.tensor(0.5)))
        tensor(0.5000)
        tensor(nan)
    """

    def __init__(self, text: str | None, model: nn.Module, *, classes: int = 3) -> None:
        self.parameters, self.classes = dict(model.named_parameters()), classes
        due = torch.tensor(False, device=next(model.parameters()).device)
        #: Each fault and, on the device, whether it is due.
        self.faults = [(fault, due.clone()) for fault in parse(text or "") if fault.what != "file"]
        self.replaying = False  # a step that is replayed is not killed again
        # A list of modules is never called itself: a fault in it would never come.
        modules = {n: m for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)}
        places: dict[str, list[str]] = {"activation": list(modules), "grad": list(self.parameters)}
        for fault, flag in self.faults:
            known = places.get(fault.what, [])
            named = [name for name in known if name.startswith(fault.where)]
            if fault.where and not named:
                tops = ", ".join(sorted({name.split(".")[0] for name in known}))
                place = f"inject = {fault.what}:...:{fault.where}: no such place in the model"
                raise ValueError(f"{place}; there are {tops or f'none for {fault.what}'}")
            if fault.what == "activation":
                hook = functools.partial(_corrupt_output, value=fault.value, flag=flag)
                modules[min(named, key=len)].register_forward_hook(hook)

    def planted(self, step: int) -> list[str]:
        """The faults that this step has, as they are written."""
        return [str(fault) for fault, _ in self.faults if fault.what != "kill" and fault.due(step)]

    def start(self, step: int) -> None:
        """Set what is due; called before step number ``step``."""
        for fault, flag in self.faults:
            due = fault.due(step)
            if fault.what == "kill" and due and not self.replaying:
                os.kill(os.getpid(), signal.SIGKILL)
            flag.fill_(due)

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Called with each micro-batch: float images, integer labels."""
        for fault, flag in self._of("input"):
            images = _corrupt(images, fault.value, flag)
        for _, flag in self._of("label"):
            labels = torch.where(flag, (labels + 1) % self.classes, labels)
        return images, labels

    def loss(self, loss: Tensor) -> Tensor:
        """Called with each micro-batch's loss before its backward."""
        for fault, flag in self._of("loss"):
            factor = SPIKE if fault.value == "spike" else NUMBERS[fault.value]
            loss = loss * torch.ones_like(loss).masked_fill(flag, factor)
        return loss

    def after_backward(self) -> None:
        """Called when a step's gradients are complete."""
        for fault, flag in self._of("grad"):
            gradient = next(p for name, p in self.parameters.items() if name.startswith(fault.where)).grad
            assert gradient is not None
            # In place: fused optimizers need its strides.
            gradient.copy_(_corrupt(gradient, fault.value, flag))

    def _of(self, what: str) -> Iterator[tuple[Fault, Tensor]]:
        return ((fault, flag) for fault, flag in self.faults if fault.what == what)


def _corrupt_output(module: nn.Module, inputs: Any, output: Any, *, value: str, flag: Tensor) -> Any:
    """A forward hook: a module's output with its first tensor corrupted."""
    if not torch.is_grad_enabled():  # validation runs at no step of its own
        return None
    if isinstance(output, Tensor):
        return _corrupt(output, value, flag)
    return type(output)([_corrupt(output[0], value, flag), *output[1:]])


def _corrupt(x: Tensor, value: str, flag: Tensor) -> Tensor:
    """``x`` with its first element replaced, or all of it a thousand times larger, where ``flag`` is set."""
    if value == "spike":
        return x * torch.ones((), dtype=x.dtype, device=x.device).masked_fill(flag, SPIKE)
    number = NUMBERS[value]
    if math.isfinite(number):
        number = min(number, torch.finfo(x.dtype).max)
    first = torch.zeros_like(x, dtype=torch.bool)
    first[(0,) * x.ndim].fill_(True)  # an assignment would copy from the host, which no graph captures
    return x.masked_fill(first & flag, number)
