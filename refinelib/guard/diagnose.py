"""What went wrong in a step: the first operation, module, parameter, loss term and person that was not finite.

The step is taken again on the same weights and batch, once plainly (to see that it is the same step: bit for bit, or but for rounding where the
run's kernels were compiled) and once with every operation watched. No training step ever pays for that.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, ContextManager, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from refinelib.guard.guard import measured, unscaled
from refinelib.guard.inject import Injector
from refinelib.modeling.losses import MaskLoss

#: Operations that hand out memory as it lies: what they return means nothing yet.
_UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.resize")

#: Relative distance of loss and gradient norms from the recorded ones that rounding explains: half precision, summed in another order.
ROUNDING = 0.02
#: Gradient norms from here on are called too large: their squares overflow float32.
LARGE = 1e19


@dataclass
class Finding:
    """The outcome, in words (``sentence``) and as data; empty where nothing was found."""

    sentence: str = ""
    phase: str = "none"  # weights, input, forward, loss, backward, gradient, large, overflow (by the loss scale alone), none
    module: str = ""  # name of the module, as in model.named_modules(); "loss" outside of it
    operation: str = ""  # such as aten.convolution
    node: str = ""  # in the backward pass, the autograd node, such as SqrtBackward0
    terms: list[str] = field(default_factory=list)  # loss terms whose value or gradient is not finite
    places: list[int] = field(default_factory=list)  # of the samples in the step's batch
    samples: list[dict[str, Any]] = field(default_factory=list)  # who they are
    parameters: list[str] = field(default_factory=list)  # with a gradient that is not finite, nearest the loss first
    planted: list[str] = field(default_factory=list)  # by the setting inject
    loss: float = 0.0
    same_step: bool | None = None  # bit for bit the recorded loss and gradient norms
    apart: float | None = None  # how far from those, over their length; None: nothing was recorded, or others were finite

    @property
    def alike(self) -> bool:
        """The recorded step, bit for bit or but for rounding."""
        return self.apart is not None and self.apart <= ROUNDING  # 0 where it is the same bit for bit

    @property
    def kind(self) -> str:
        """What makes it the same trouble as another: where it began."""
        return f"{self.phase} {self.module} {self.operation} {','.join(sorted({name.partition('.')[0] for name in self.parameters}))}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Step:
    """Everything that a step is made of, to take it again.

    ``batches`` are its micro-batches (images float32 ``[B, 3, H, W]``, labels int64 ``[B, H, W]``); ``people`` says who each sample is;
    ``autocast`` makes the precision's context; ``scale`` is the loss scale; ``recorded`` is what the run had: its loss and the norm of each parameter's gradient.
    """

    model: nn.Module
    loss: MaskLoss
    batches: Sequence[tuple[Tensor, Tensor]]
    people: Sequence[dict[str, Any]]
    autocast: Callable[[], ContextManager]
    injector: Injector
    number: int
    scale: float = 1.0
    recorded: tuple[float, Sequence[float]] | None = None


def examine(step: Step) -> Finding:
    """Take the step again and say where it first was not finite. Gradients are cleared afterwards; buffers (running
    statistics) and random state are what they were.

    The model has to be in the mode it was in.
    """
    step.injector.replaying = True
    step.injector.start(step.number)
    finding = Finding(planted=step.injector.planted(step.number))
    with preserved(step.model, step.loss):
        _examine(step, finding)
    return finding


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore the modules' buffers and the random state afterwards."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, old in zip(buffers, kept):
                    buffer.copy_(old)


def _examine(step: Step, finding: Finding) -> None:
    """:func:`examine` into ``finding``."""
    try:
        finding.loss, norms = take(step)
        if step.recorded is not None:
            finding.same_step, finding.apart = _compared(step.recorded, (finding.loss, norms))
        names = [name for name, p in step.model.named_parameters() if p.requires_grad]
        finding.parameters = [name for name, norm in zip(names, norms) if not _finite(norm)][::-1]
        broken = [name for name, p in step.model.named_parameters() if not bool(p.isfinite().all())]
        if broken:
            finding.phase, finding.module, finding.parameters = "weights", _owner(broken[0]), broken
        elif _overflows(step, finding):
            finding.phase = "overflow"
        else:
            rows = _watched(step, finding)
            _terms_and_places(step, finding)
            finding.places = finding.places or rows
            if finding.phase == "none" and math.hypot(*norms) > LARGE:
                finding.phase, finding.module = "large", _owner(names[max(range(len(norms)), key=norms.__getitem__)])
        finding.samples = [step.people[place] for place in finding.places if place < len(step.people)]
        finding.sentence = _sentence(finding, len(names), step.number)
    finally:
        step.injector.replaying = False
        step.model.zero_grad(set_to_none=True)


def _overflows(step: Step, finding: Finding) -> bool:
    """Whether it is the loss scale that makes the gradients overflow: without it they are finite."""
    if step.scale == 1 or not _finite(finding.loss) or not finding.parameters:
        return False
    _, norms = take(dataclasses.replace(step, scale=1.0))
    return all(map(_finite, norms))


def take(step: Step) -> tuple[float, list[float]]:
    """Loss and unscaled gradient norms of the step, computed as training computes them."""
    step.model.zero_grad(set_to_none=True)
    total, share = 0.0, 1.0 / len(step.batches)
    for images, labels in step.batches:
        loss = _forward(step, images, labels)
        (loss * share * step.scale).backward()
        total = total + loss.detach() * share
    step.injector.after_backward()
    trained = [p for p in step.model.parameters() if p.requires_grad]
    sizes = torch.tensor([p.numel() for p in trained], device=trained[0].device).sqrt()
    # float64: a gradient that is finite but large is told from one that is not
    norms, _ = unscaled(*(x.double() for x in measured(trained)), step.scale, sizes)
    return float(total), norms.tolist()


def _forward(step: Step, images: Tensor, labels: Tensor) -> Tensor:
    images, labels = step.injector.batch(images, labels)
    with step.autocast():
        output = step.model(images.contiguous(memory_format=torch.channels_last))
    return step.injector.loss(step.loss(output, labels)[0])


class _FirstBad(TorchDispatchMode):
    """Notes the first operation that makes something not finite out of what is, and for which samples of ``batch``."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where, self.found = where, None
        self.backward, self.batch, self.rows = False, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.found is None and not str(func).startswith(_UNINITIALISED):
            if not all(_all_finite(x) for x in tensors(out)) and all(_all_finite(x) for x in tensors((args, kwargs or {}))):
                node = torch._C._current_autograd_node() if self.backward else None
                self.found = (str(func).rsplit(".", 1)[0], self.where(), node.name() if node is not None else "", self.backward)
                if not self.backward and not self.found[0].endswith("_to_copy"):  # that may be the weights, cast
                    self.rows = _bad_rows(tensors(out), self.batch)
        return out


def _bad_rows(outputs: Iterator[Tensor], batch: int) -> list[int]:
    """Samples of a batch whose part of an output is not finite, where its first dimension is the batch."""
    found = [x for x in outputs if x.is_floating_point() and x.ndim and len(x) == batch]
    return (~found[0].detach().flatten(1).isfinite().all(1)).nonzero().flatten().tolist() if found and found[0].ndim > 1 else []


def _watched(step: Step, finding: Finding) -> list[int]:
    """Run the step with every operation watched; phase, module, operation and node into ``finding``.

    Returns:
        samples for which the first operation that was not finite in the forward pass was not.
    """
    batches = [step.injector.batch(*batch) for batch in step.batches]
    if not all(bool(images.isfinite().all()) for images, _ in batches):
        finding.phase = "input"
        return []
    places, handles = [""], []

    def enter(name):
        return lambda module, inputs: places.append(name)

    def leave(module, inputs, output):
        places.pop()
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=names[module]: places.__setitem__(0, name))

    names = {module: name for name, module in step.model.named_modules() if name}
    for module, name in names.items():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    mode = _FirstBad(lambda: places[-1] or "loss")
    step.model.zero_grad(set_to_none=True)
    try:
        before = 0
        with mode:
            for images, labels in batches:
                places[:], mode.backward, mode.batch = [""], False, len(images)
                with step.autocast():
                    places.append("model")
                    output = step.model(images.contiguous(memory_format=torch.channels_last))
                    places.pop()
                loss = step.injector.loss(step.loss(output, labels)[0]) / len(step.batches)
                places[:], mode.backward = ["loss"], True
                (loss * step.scale).backward()
                if mode.found:
                    break
                before += len(images)
    finally:
        for handle in handles:
            handle.remove()
    if mode.found:
        finding.operation, finding.module, finding.node, backward = mode.found
        finding.phase = "backward" if backward else "loss" if finding.module == "loss" else "forward"
    elif finding.parameters:  # finite everywhere, and yet a gradient is not: it was written there
        finding.phase, finding.module = "gradient", _owner(finding.parameters[0])
    return [before + row for row in mode.rows]


def _terms_and_places(step: Step, finding: Finding) -> None:
    """Which loss terms and which samples are not finite, in value or in gradient."""
    offset = 0
    for images, labels in step.batches:
        images, labels = step.injector.batch(images, labels)
        images = images.detach().requires_grad_()
        with step.autocast():
            output = step.model(images.contiguous(memory_format=torch.channels_last))
        leaves = type(output)(*(None if x is None else x.detach().requires_grad_() for x in output))
        given = [x for x in leaves if x is not None]
        bad = ~images.detach().flatten(1).isfinite().all(1)
        for x in given:
            bad |= ~x.detach().flatten(1).isfinite().all(1)
        with torch.autocast(labels.device.type, enabled=False):
            for name, cost in step.loss.per_sample(leaves, labels).items():
                wrong = ~cost.detach().isfinite()
                for gradient in torch.autograd.grad(cost.sum(), given, retain_graph=True, allow_unused=True):
                    if gradient is not None:
                        wrong |= ~gradient.flatten(1).isfinite().all(1)
                bad |= wrong
                if bool(wrong.any()):
                    finding.terms += [name] if name not in finding.terms else []
        if not bool(bad.any()) and finding.phase == "backward":  # born inside the model: samples don't meet there
            loss = step.loss(output, labels)[0]
            (gradient,) = torch.autograd.grad(loss * step.scale, images, allow_unused=True)
            if gradient is not None:
                bad |= ~gradient.flatten(1).isfinite().all(1)
        finding.places += [offset + place for place in bad.nonzero().flatten().tolist()]
        offset += len(images)


def _sentence(finding: Finding, parameters: int, number: int) -> str:
    """The finding in words."""
    where = {
        "weights": f"the weights themselves are not finite, first {', '.join(finding.parameters[:1])}",
        "input": "the images themselves are not finite",
        "forward": f"the output of {finding.operation} in module {finding.module} is the first that is not finite",
        "loss": f"{finding.operation} in the loss gives the first value that is not finite",
        "backward": f"the gradient of {finding.node or finding.operation} ({finding.operation}) at {finding.module} is the first that is not finite",
        "gradient": f"every operation was finite, and the gradient of {', '.join(finding.parameters[:1])} is not: it was changed afterwards",
        "large": f"every value is finite, and the gradient is too large for float32 to measure and clip, most of it in {finding.module}",
        "overflow": "the gradients overflow by the loss scale alone: without it they are finite",
        "none": "everything was finite when the step was taken again",
    }[finding.phase]
    parts = [f"step {number}: {where}"]
    if finding.terms and finding.phase not in ("weights", "gradient"):
        parts.append(f"loss terms that are not finite: {', '.join(finding.terms)}")
    if finding.parameters and finding.phase != "weights":
        more = f" and {len(finding.parameters) - 1} more of {parameters}" if len(finding.parameters) > 1 else f" of {parameters}"
        parts.append(f"parameters without a finite gradient: {finding.parameters[0]}{more}")
    if finding.samples:
        parts.append("people: " + ", ".join(_who(person) for person in finding.samples[:4]) + (" ..." if len(finding.samples) > 4 else ""))
    if finding.planted:
        parts.append(f"planted by inject: {', '.join(finding.planted)}")
    if finding.same_step is False:
        causes = "compiled kernels, another device, version or thread count, or kernels that are not deterministic"
        parts.append(f"it was the same step but for rounding, {finding.apart:.1g} apart ({causes})" if finding.alike else f"it was not the same step ({causes})")
    return "; ".join(parts)


def _who(person: dict[str, Any]) -> str:
    return f"annotation {person['annotation_id']} in image {person['image_id']} of {person['source']}"


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _compared(recorded: tuple[float, Sequence[float]], now: tuple[float, Sequence[float]]) -> tuple[bool, float | None]:
    """Whether both are equal bit for bit, NaN equal to NaN; and their relative distance, None where one is finite and the other is not."""
    ours, theirs = (torch.tensor([loss, *norms], dtype=torch.float32) for loss, norms in (now, recorded))
    same = torch.equal(ours.nan_to_num(nan=-1.0), theirs.nan_to_num(nan=-1.0))
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return same, None
    ours, theirs = ours[finite].double(), theirs[finite].double()
    distance, length = float((ours - theirs).norm()), float(theirs.norm())
    return same, distance / length if length else float(distance > 0)


def _finite(value: float) -> bool:
    return value - value == 0


def _all_finite(x: Tensor) -> bool:
    return not x.is_floating_point() or x.numel() == 0 or bool(torch.isfinite(x.detach()).all())


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
