"""What went wrong in a step: the first operation, module, parameter, loss term and sample not finite.

The step is replayed on the same weights and batch: once plainly, to see that it is the same step (bit for
bit, or within rounding where the run was compiled), and once with every operation watched. No training step
pays for that.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from refinelib.guard.faults import Injector
from refinelib.guard.measure import measured, root_sizes, unscaled, widest

#: Operations that hand out memory as it is: what they return means nothing yet.
_UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.resize")
#: Kernels whose logarithms of sums, of three dimensions, are padded with memory as it is. All else has four.
_ATTENTION = "aten._scaled_dot_product"
#: Relative distance from the recorded loss and gradient norms that rounding explains: half precision, another
#: order.
ROUNDING = 0.02
#: Gradient norms from here on are called too large: their squares overflow float32.
LARGE = 1e19
#: Samples that are taken alone, at most.
MOST_SAMPLES = 256


@dataclass
class Finding:
    """The outcome, in words (``sentence``) and as data; empty where nothing was found.

    Attributes:
        sentence: all of it in words.
        phase: ``weights``, ``input``, ``forward``, ``loss``, ``backward``, ``gradient``, ``large``,
            ``overflow`` (by the loss scale alone) or ``none``.
        module: name as in ``model.named_modules()``; ``loss`` outside of the model.
        operation: such as ``aten.convolution``.
        node: in the backward pass, the autograd node, such as ``SqrtBackward0``.
        terms: loss terms whose value or gradient is not finite.
        places: of the samples in the step's batch.
        samples: descriptions of these.
        parameters: those whose gradient is not finite, nearest the loss first.
        planted: faults of the setting ``inject``.
        loss: of the replayed step.
        same_step: whether it is bit for bit the recorded loss and gradient norms; none: nothing was recorded.
        apart: relative distance from these; none: nothing was recorded, or other values were finite.
    """

    sentence: str = ""
    phase: str = "none"
    module: str = ""
    operation: str = ""
    node: str = ""
    terms: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)
    loss: float = 0.0
    same_step: bool | None = None
    apart: float | None = None

    @property
    def alike(self) -> bool:
        """Whether it is the recorded step, bit for bit or within rounding."""
        return self.apart is not None and self.apart <= ROUNDING

    @property
    def kind(self) -> str:
        """Findings of one kind have the same cause: they began at the same place."""
        parts = sorted({name.partition(".")[0] for name in self.parameters})
        return f"{self.phase} {self.module} {self.operation} {','.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, as plain values."""
        return asdict(self)


@dataclass
class Step:
    """Everything that a step is made of, to replay it.

    Attributes:
        model: in the mode it was in.
        loss: gives the total and anything else, for the model's output and the labels.
        per_sample: gives each loss term's cost by sample, ``[B]`` by name, for the same; none: each sample is
            taken alone.
        batches: micro-batches: images float32 ``[B, ...]``, labels ``[B, ...]``; of one, anything else too.
        samples: describe each sample, as plain values.
        forward: the model's output for images, as training computes it (in its precision, say).
        injector: of planted faults.
        number: of the step.
        scale: loss scale.
        recorded: the loss that the run had, and the norm of each parameter's gradient; none: not known.
        describe: a sample in words.
    """

    model: nn.Module
    loss: nn.Module
    per_sample: Callable[[Any, Tensor], Mapping[str, Tensor]] | None
    batches: Sequence[tuple[Any, Any]]
    samples: Sequence[dict[str, Any]]
    forward: Callable[[Tensor], Any]
    injector: Injector
    number: int
    scale: float = 1.0
    recorded: Sequence[float] | None = None
    describe: Callable[[dict[str, Any]], str] = str

    def micro_batches(self) -> list[tuple[Any, Any]]:
        """The micro-batches with the planted faults in them."""
        return [self.injector.batch(*batch) for batch in self.batches]

    def total(self, output: Any, labels: Any) -> Tensor:
        """What a micro-batch adds to the step's loss, by its share of the samples."""
        loss = self.injector.loss(self.loss(output, labels)[0])
        if len(self.batches) > 1:
            loss = loss * (len(labels) / sum(len(labels) for _, labels in self.batches))
        return loss

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Have the step's faults planted; afterwards clear gradients, restore buffers and random state."""
        held = [*self.model.buffers(), *self.loss.buffers()]
        buffers = [(buffer, buffer.clone()) for buffer in held]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        self.injector.replaying = True
        self.injector.start(self.number)
        try:
            with torch.random.fork_rng(devices=list(devices)):
                yield
        finally:
            self.injector.replaying = False
            self.model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


class _Total(nn.Module):
    """The loss of any model: of its output and the target, or in its output."""

    def __init__(self, criterion: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Any, target: Any) -> tuple[Tensor, None]:
        if self.criterion is not None:
            return self.criterion(output, target), None
        if isinstance(output, Tensor):
            return output, None
        return output["loss"] if isinstance(output, Mapping) else output[0], None


def diagnose(
    model: nn.Module, criterion: Callable[..., Tensor] | None, batch: Any, *, scale: float = 1.0
) -> Finding:
    """Take a step's forward and backward pass again and say where it first was not finite.

    Give it the weights and the batch of the step, in the same ``torch.autocast``. A compiled model is run
    uncompiled. Gradients are cleared; weights, buffers and random state stay.

    Args:
        model: any module, in the mode that it trains in.
        criterion: the loss of output and target; none: the model's output is the loss, or holds it first or
            as ``loss``.
        batch: input and target, ``criterion(model(input), target)``; without a criterion what the model
            takes: a mapping of keywords, a tuple of arguments, or a tensor.
        scale: loss scale.

    Returns:
        Phase, module, operation, parameters; ``places`` of the samples that are not finite alone, where the
        batch is the first dimension of all its tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Softplus())
        >>> _ = nn.init.ones_(model[0].weight)
        >>> likelihood = lambda rate, seen: (rate - seen * rate.log()).mean()
        >>> found = diagnose(model, likelihood, (torch.tensor([[0.0], [-200.0]]), torch.ones(2, 1)))
        >>> found.phase, found.operation, found.places
        ('loss', 'aten.log', [1])
    """
    model = getattr(model, "_orig_mod", model)
    inputs, target = (batch, None) if criterion is None else batch

    def forward(given: Any) -> Any:
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, (tuple, list)) else model(given)

    injector = Injector(None, model)
    return examine(Step(model, _Total(criterion), None, [(inputs, target)], [], forward, injector, 0, scale))


def examine(step: Step) -> Finding:
    """Replay the step and say where it first was not finite.

    Gradients are cleared afterwards; buffers (running statistics) and random state are restored.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> class Mean(nn.Module):
        ...     def forward(self, output, labels):
        ...         return output.mean(), None
        >>> batch = torch.ones(1, 2), torch.zeros(1)
        >>> injector = Injector("activation:nan@7:1", model)
        >>> terms = lambda output, labels: {"mean": output.mean(1)}
        >>> step = Step(model, Mean(), terms, [batch], [], model, injector, 7)
        >>> finding = examine(step)
        >>> finding.phase, finding.module, finding.places
        ('forward', '1', [0])
    """
    finding = Finding(planted=step.injector.planted(step.number))
    with step.replaying():
        finding.loss, norms = take(step)
        if step.recorded is not None:
            finding.same_step, finding.apart = _compare(step.recorded, [finding.loss, *norms.values()])
        finding.parameters = [name for name, norm in norms.items() if not math.isfinite(norm)][::-1]
        broken = [name for name, p in step.model.named_parameters() if not bool(p.isfinite().all())]
        if broken:
            finding.phase, finding.module, finding.parameters = "weights", _owner(broken[0]), broken
        elif _overflows(step, finding):
            finding.phase = "overflow"
        else:
            rows = _watch(step, finding)
            _find_terms_and_places(step, finding)
            finding.places = finding.places or rows
            if finding.phase == "none" and math.hypot(*norms.values()) > LARGE:
                finding.phase, finding.module = "large", _owner(max(norms, key=norms.__getitem__))
    finding.samples = [step.samples[place] for place in finding.places if place < len(step.samples)]
    finding.sentence = _sentence(step, finding, len(norms))
    return finding


def take(step: Step) -> tuple[float, dict[str, float]]:
    """Loss and unscaled gradient norms of the step by parameter, computed as training computes them."""
    step.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for images, labels in step.micro_batches():
        loss = step.total(step.forward(images), labels)
        (loss * step.scale).backward()
        total = total + loss.detach().cpu()
    step.injector.after_backward()
    trained = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
    # float64 keeps a gradient that is finite but large apart from one that is not
    norms, largest = (x.to(widest(x.device)) for x in measured([*trained.values()]))
    found = unscaled(norms, largest, step.scale, root_sizes([*trained.values()]))[0].tolist()
    return float(total), dict(zip(trained, found, strict=True))


def _compare(recorded: Sequence[float], now: Sequence[float]) -> tuple[bool, float | None]:
    """Whether both are equal bit for bit, NaN equal to NaN; and their relative distance."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite there
        theirs, ours = (np.array(x, np.float32).astype(np.float64) for x in (recorded, now))
    same, finite = np.array_equal(theirs, ours, equal_nan=True), np.isfinite(theirs)
    if not np.array_equal(finite, np.isfinite(ours)):
        return same, None
    distance, length = np.linalg.norm(ours[finite] - theirs[finite]), np.linalg.norm(theirs[finite])
    return same, float(distance / length if length else distance > 0)


def _overflows(step: Step, finding: Finding) -> bool:
    """Whether it is the loss scale that makes the gradients overflow: without it they are finite."""
    if step.scale == 1 or not math.isfinite(finding.loss) or not finding.parameters:
        return False
    _, norms = take(replace(step, scale=1.0))
    return all(map(math.isfinite, norms.values()))


class _FirstNonFinite(TorchDispatchMode):
    """Writes the first operation that makes something not finite out of what is finite into ``found``."""

    found: Finding
    modules: list[str] = []  # that are being run, the innermost last
    backward = False
    batch = 0
    strict = False  # whether it is not known that the batch is the first dimension everywhere
    rows: list[int] = []  # samples for which it was not finite

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = self.found
        if found.operation or str(func).startswith(_UNINITIALISED):
            return out
        taken: Any = (args, kwargs)
        given = out
        if str(func).startswith(_ATTENTION):
            taken, given = ([x for x in tensors(values) if x.ndim == 4] for values in (taken, given))
        if not _finite(given) and _finite(taken):
            found.operation, found.module = str(func).rsplit(".", 1)[0], self.modules[-1]
            found.phase = "loss" if found.module == "loss" else "forward"
            if self.backward:
                found.phase, node = "backward", torch._C._current_autograd_node()
                found.node = node.name() if node is not None else ""
            elif not found.operation.endswith("_to_copy"):  # that may be the weights, cast
                parts = [x for x in tensors(out) if x.ndim > 1 and len(x) == self.batch]
                # Of two dimensions as long as the batch either may be it.
                parts = [x for x in parts if not self.strict or x.shape.count(self.batch) == 1]
                self.rows = _not_finite(*parts[:1]) if parts else []
        return out


def _watch(step: Step, finding: Finding) -> list[int]:
    """Run the step with every operation watched; phase, module, operation and node into ``finding``.

    Returns:
        Samples for which the first operation of the forward pass that was not finite was not.
    """
    batches = step.micro_batches()
    if not all(_finite(batch) for batch in batches):
        finding.phase = "input"
        return []
    mode = _FirstNonFinite()  # type: ignore[no-untyped-call]  # torch's __init__
    mode.found, mode.strict = finding, step.per_sample is None
    names = {module: name for name, module in step.model.named_modules() if name}
    owners: dict[int, Tensor] = {}  # by identity; kept, so that it stays theirs

    def own(values: Any, module: str) -> None:
        """What comes after the gradients of these is the module's backward pass, the innermost one's."""
        for tensor in tensors(values):
            if tensor.requires_grad and id(tensor) not in owners:
                owners[id(tensor)] = tensor
                handle = tensor.register_hook(lambda gradient: mode.modules.__setitem__(0, module))
                watched.callback(handle.remove)

    def enter(module: nn.Module, inputs: Any, keywords: Any) -> None:
        own((inputs, keywords), mode.modules[-1])
        mode.modules.append(names[module])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        mode.modules.pop()
        own(output, names[module])

    step.model.zero_grad(set_to_none=True)
    before = 0
    with ExitStack() as watched:
        for module in names:
            watched.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            watched.enter_context(module.register_forward_hook(leave))
        watched.enter_context(mode)
        for images, labels in batches:
            size = _samples((images, labels))
            mode.modules, mode.backward, mode.batch = ["loss", "model"], False, size
            output = step.forward(images)
            own(output, "model")
            mode.modules = ["loss"]
            loss = step.total(output, labels)
            mode.backward = True
            (loss * step.scale).backward()
            if finding.operation:
                break
            before += size
    if finding.parameters and not finding.operation:  # all was finite but a gradient: it was written there
        finding.phase, finding.module = "gradient", _owner(finding.parameters[0])
    return [before + row for row in mode.rows]


def _find_terms_and_places(step: Step, finding: Finding) -> None:
    """Which loss terms and which samples are not finite, in value or in gradient."""
    if step.per_sample is None:
        finding.places = _places(step)
        return
    offset = 0
    for images, labels in step.micro_batches():
        images = images.detach().requires_grad_()
        output = step.forward(images)
        alone = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), output)
        leaves = [x for x in tree_leaves(alone) if isinstance(x, Tensor)]
        bad = set(_not_finite(images, *leaves))
        with torch.autocast(labels.device.type, enabled=False):
            for name, cost in step.per_sample(alone, labels).items():
                wrong = _not_finite(cost, *gradients_of(cost.sum(), leaves))
                bad |= set(wrong)
                if wrong and name not in finding.terms:
                    finding.terms.append(name)
        if not bad and finding.phase == "backward":  # inside the model, where samples do not meet
            loss = step.loss(output, labels)[0] * step.scale
            bad = set(_not_finite(*gradients_of(loss, [images])))
        finding.places += [offset + place for place in sorted(bad)]
        offset += len(images)


def _places(step: Step) -> list[int]:
    """The samples whose loss or gradient is not finite when each is taken alone; none where that fails."""
    (batch,) = step.batches
    bad, trained = [], [p for p in step.model.parameters() if p.requires_grad]
    for place in range(min(_samples(batch), MOST_SAMPLES)):
        inputs, target = tree_map_only(Tensor, lambda x: x[place : place + 1], batch)  # noqa: B023
        try:
            loss = step.total(step.forward(inputs), target) * step.scale
            fine = _finite((loss, gradients_of(loss, trained)))
        except (RuntimeError, ValueError):  # batch norm cannot take one sample, say
            return []
        if not fine:
            bad.append(place)
    return bad


def _samples(batch: Any) -> int:
    """The length that all tensors of a batch have in common, 0 where there is none."""
    sizes = {len(x) if x.ndim else 0 for x in tree_leaves(batch) if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def gradients_of(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss by some tensors, 0 where it does not depend on one; the graph stays."""
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


def _sentence(step: Step, finding: Finding, parameters: int) -> str:
    """The finding in words."""
    module, operation, parameter = finding.module, finding.operation, "".join(finding.parameters[:1])
    node = f"{finding.node or operation} ({operation})"
    where = {
        "weights": f"the weights themselves are not finite, first {parameter}",
        "input": "the input itself is not finite",
        "forward": f"the output of {operation} in module {module} is the first that is not finite",
        "loss": f"{operation} in the loss gives the first value that is not finite",
        "backward": f"the gradient of {node} at {module} is the first that is not finite",
        "gradient": f"all was finite, but not the gradient of {parameter}: it was changed afterwards",
        "large": f"all is finite, but the gradient is too large to clip in float32, most of it in {module}",
        "overflow": "the gradients overflow by the loss scale alone: without it they are finite",
        "none": "everything was finite when the step was replayed",
    }[finding.phase]
    parts = [f"step {step.number}: {where}" if step.number else where]
    if finding.terms and finding.phase not in ("weights", "gradient"):
        parts.append(f"loss terms that are not finite: {', '.join(finding.terms)}")
    if finding.parameters and finding.phase != "weights":
        more = f" and {len(finding.parameters) - 1} more" if len(finding.parameters) > 1 else ""
        parts.append(f"parameters without a finite gradient: {parameter}{more} of {parameters}")
    if finding.samples:
        more = " ..." if len(finding.samples) > 4 else ""
        parts.append(f"samples: {', '.join(map(step.describe, finding.samples[:4]))}{more}")
    elif finding.places:
        more = " ..." if len(finding.places) > 8 else ""
        parts.append(f"samples of the batch: {', '.join(map(str, finding.places[:8]))}{more}")
    if finding.planted:
        parts.append(f"planted by inject: {', '.join(finding.planted)}")
    if finding.same_step is False:
        causes = "compiled kernels, another device, version or thread count, or random kernels"
        within = f"the same step within rounding, {finding.apart:.1g} apart" if finding.alike else ""
        parts.append(f"it was {within or 'not the same step'} ({causes})")
    return "; ".join(parts)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()]


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(x.detach()).all()) for x in tensors(value))


def _not_finite(*values: Tensor) -> list[int]:
    """Samples for which any of some ``[B, ...]`` is not finite."""
    bad = [~x.detach().reshape(len(x), -1).isfinite().all(1) for x in values]
    return [int(place) for place in torch.stack(bad).any(0).nonzero()]
