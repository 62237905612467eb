"""Every layer of one step: how large its output was, how much of it was not finite, and the same of its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor

from refinelib.guard.diagnose import Step, take, tensors


@dataclass
class Layer:
    """One place in the forward pass; the step's micro-batches taken together."""

    name: str  # as in model.named_modules(), or "input", "loss: ce" (before its weight), "loss"
    part: str  # the name's first word: the part of the model it belongs to
    largest: float = 0.0  # largest finite magnitude of the output
    nonfinite: float = 0.0  # share of the output's elements, 0..1
    gradient: float | None = None  # L2 norm of the finite part of the loss's gradient by the output, unscaled; none: none came
    gradient_nonfinite: float = 0.0  # share of that gradient's elements, 0..1
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0], repr=False)  # bad and all elements, of output and gradient


@dataclass
class Layers:
    """A step from its input to its loss, and what came back to the parameters."""

    forward: list[Layer]  # in the order in which they were done
    parameters: dict[str, float]  # unscaled L2 norm of each gradient, in the order of the model
    loss: float

    @property
    def first_bad(self) -> Layer | None:
        """The first place, in forward order, whose output is not finite."""
        return next((layer for layer in self.forward if layer.nonfinite), None)

    @property
    def first_bad_gradient(self) -> Layer | None:
        """The first place the backward pass came to, from the loss on, where the gradient is not finite."""
        return next((layer for layer in reversed(self.forward) if layer.gradient_nonfinite), None)


def layers(step: Step) -> Layers:
    """Take the step again and measure it at every layer. Gradients are cleared afterwards, nothing else moves.

    A module that only hands on what its last part gave (a ``Sequential``, say) is left out: it would tell the same twice.
    """
    found: dict[str, Layer] = {}
    handed: list[Tensor] = []  # what the modules of this micro-batch returned; held, so that no two are mistaken for one

    def measure(name: str, output: Any) -> None:
        given = [x for x in tensors(output) if x.is_floating_point()]
        if not given or all(any(x is other for other in handed) for x in given):
            return
        handed.extend(given)
        layer = found.setdefault(name, Layer(name, name.partition(".")[0].partition(":")[0]))
        for x in given:
            _output(layer, x.detach())
            if x.requires_grad:
                x.register_hook(lambda gradient, layer=layer: _gradient(layer, gradient, step.scale))

    def after_loss(module, inputs, output) -> None:
        for name, value in zip(step.loss.names, output[1]):
            measure(f"loss: {name}", value)

    def start(module, inputs) -> None:
        handed.clear()
        measure("input", inputs)

    def of(name: str) -> Callable:
        return lambda module, inputs, output: measure(name, output)

    handles = [step.model.register_forward_pre_hook(start), step.loss.register_forward_hook(after_loss)]
    # Registered after the planted faults' own, these see what a fault made of an output.
    handles += [module.register_forward_hook(of(name)) for name, module in step.model.named_modules() if name]
    step.injector.replaying = True
    step.injector.start(step.number)
    try:
        loss, norms = take(step)
    finally:
        step.injector.replaying = False
        step.model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    bad = not math.isfinite(loss)
    found["loss"] = Layer("loss", "loss", 0.0 if bad else abs(loss), float(bad), counts=[int(bad), 1, 0, 0])
    names = [name for name, p in step.model.named_parameters() if p.requires_grad]
    return Layers(list(found.values()), dict(zip(names, norms)), loss)


def _output(layer: Layer, x: Tensor) -> None:
    layer.largest = max(layer.largest, float(_finite_part(x).abs().amax()) if x.numel() else 0.0)
    layer.counts[0] += int((~x.isfinite()).sum())
    layer.counts[1] += x.numel()
    layer.nonfinite = layer.counts[0] / max(1, layer.counts[1])


def _gradient(layer: Layer, x: Tensor, scale: float) -> None:
    layer.gradient = math.hypot(layer.gradient or 0.0, float(_finite_part(x).norm()) / scale)
    layer.counts[2] += int((~x.isfinite()).sum())
    layer.counts[3] += x.numel()
    layer.gradient_nonfinite = layer.counts[2] / max(1, layer.counts[3])


def _finite_part(x: Tensor) -> Tensor:
    # float64: squares of finite float32 may overflow
    return torch.where(x.isfinite(), x, 0.0).double()
