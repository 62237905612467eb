"""A safe training step for any model: check the loss and the gradients, then update everything or nothing.

    guard = Guard(model, optimizer, grad_clip=1.0)
    for x, y in loader:
        guard.zero_grad()
        guard.backward(criterion(model(x), y))  # once a micro-batch
        report = guard.step()

The decision is a tensor on the device. PyTorch's fused optimizers take it as ``found_inf`` (float32, 0.0 or
1.0) and return early, so a step needs no host-device synchronisation. Everything else that a step changes
(moving average, buffers, schedule, loss scale, statistics) depends on the same tensor. A skipped step leaves
all of it bit for bit unchanged.

    gradients -> norms -> decision -> optimizer, average, buffers, scale, statistics: all or nothing
                                   -> report: one row, which the host reads later
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from refinelib.guard import measure
from refinelib.guard.measure import compare_with_past, measured, persistent_buffers, plain, sizes, unscaled
from refinelib.guard.optimizer import Schedule, divide, flatten, makes_momentum, reach, trained, usable

#: Columns of a step's report, before the norm of each parameter. ``incident``: updates are suspended from the
#: next step on, until :meth:`Guard.resume_updates`; ``updates_suspended``: this step was void because of
#: that. ``damaged``: a weight, moment, average or buffer was not finite at the last
#: :meth:`Guard.check_state`, or a weight had moved too far; nothing is updated until the state is restored.
REPORT = (
    *("loss", "grad_norm", "grad_max", "lr", "loss_scale", "bad_loss", "bad_grad", "skipped"),
    *("spike_loss", "spike_grad", "incident", "updates_suspended", "damaged"),
)

#: A spike is this many times the mean in the first steps, while there is no spread to go by.
EARLY_SPIKE, EARLY_STEPS = 10.0, 8
#: Later a spike is at least the first and at most the second: spikes in the first steps widen the spread.
LEAST_SPIKE, MOST_SPIKE = 1.5, 100.0
#: Steps over which the statistics of spikes look back.
WINDOW = 100


class StepDecision(NamedTuple):
    """What happens to one step; tensors on the device.

    Attributes:
        skip: bool; nothing may change.
        divisor: of the gradients, float32; loss scale and clipping in one.
        lr: learning rate, float32; the largest of the groups' where each keeps its own.
        lr_factor: what a rewind multiplies the rates by, float32.
        ema_weight: of the new weights in their moving average, float32.
        report: float32 ``[len(REPORT)]``.
        norms: float32 ``[parameters]``.
        memory: the guard's memory after the step, float64 (:func:`~refinelib.guard.measure.widest`).
    """

    skip: Tensor
    divisor: Tensor
    lr: Tensor
    lr_factor: Tensor
    ema_weight: Tensor
    report: Tensor
    norms: Tensor
    memory: Tensor


class Guard:
    """Takes the steps of an optimizer, all or nothing; keeps the loss scale and a moving average.

    A spike is a loss or gradient norm far above its past
    (:func:`~refinelib.guard.measure.compare_with_past`). Skipped values never enter the statistics. A loss
    may have any sign and scale: once one was 0 or less, differences are compared in place of ratios.

    A step that is skipped moves nothing: weights, the optimizer's state, buffers, the average, the schedule.
    Several optimizers have a guard each. Under ``DistributedDataParallel`` every process decides by the mean
    loss of all of them.

    Args:
        model: whose parameters are trained. Buffers that a forward pass changes (BatchNorm's) are restored
            when the step is skipped.
        optimizer: any but ``LBFGS``. Fused ones of PyTorch (``fused=True``) skip on the device. For any other
            the host reads the decision once a step; so it does in the first steps of SGD with momentum.
        schedule: none: the rates are those in the optimizer's groups, and the loop may change them. A
            scheduler of ``torch.optim.lr_scheduler``: it is stepped after each step that was applied, and
            only then, which is one host read a step. A function of the number of applied steps, on the
            device, such as :class:`~refinelib.guard.optimizer.WarmupCosine`: the rate of every group, without
            a host read.
        grad_clip: largest L2 norm of the gradient after clipping; none: not clipped.
        average: model that holds the moving average of the weights; none: no average. Its buffers stay:
            ``torch.optim.swa_utils.update_bn`` renews those of batch norm.
        ema_decay: its decay; after ``n`` steps at most ``(1 + n) / (10 + n)``, so that fresh weights soon
            count little.
        scaled: whether the loss is scaled (fp16).
        scale_init: loss scale at the start.
        scale_floor: least loss scale. Without it some 150 skips in a row would make the inverse infinite, and
            the next good step would write that into every weight.
        growth_interval: good steps in a row after which the scale doubles.
        on_spike: ``skip`` the step; ``clip`` its gradient to the usual norm; ``note`` it in the report only.
        spike_sigma: standard deviations above the mean that make a spike.
        losses: further modules whose buffers a step may change (running class weights, say).

    Raises:
        ValueError: the optimizer calls the loss by itself (``LBFGS``), holds nothing, or holds parameters on
            several devices.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> guard = Guard(model, optimizer, grad_clip=1.0)
        >>> before = model.weight.detach().clone()
        >>> guard.zero_grad()
        >>> guard.backward(model(torch.tensor([[1.0, float("nan")]])).mean())
        >>> found = guard.read(guard.step())
        >>> found["skipped"], found["parameters"], torch.equal(model.weight, before)
        (True, ['weight'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule = None,
        *,
        grad_clip: float | None = None,
        average: nn.Module | None = None,
        ema_decay: float = 0.0,
        scaled: bool = False,
        scale_init: float = 65536.0,
        scale_floor: float = 1.0,
        growth_interval: int = 2000,
        on_spike: str = "note",
        spike_sigma: float = 6.0,
        losses: Iterable[nn.Module] = (),
    ) -> None:
        self.model, self.average, self.optimizer = model, average, optimizer
        self.names, self.parameters = trained(model, optimizer)
        device = self.parameters[0].device
        #: ``schedule`` is the rate of every group by the number of applied steps; none: each has its own.
        self.scheduler, self.schedule = usable(schedule, optimizer)
        #: Says how far weights may move, even if the schedule in use is changed.
        self.planned = copy.copy(self.schedule)
        #: The furthest that a step moves a weight, in learning rates; infinite: how far is not checked.
        self.reach = reach(optimizer)
        self.grad_clip, self.ema_decay = math.inf if grad_clip is None else grad_clip, ema_decay
        self.scaled, self.scale_floor, self.growth_interval = scaled, scale_floor, growth_interval
        self.on_spike, self.spike_sigma = on_spike, spike_sigma
        self.squares = not isinstance(optimizer, torch.optim.SGD)  # whether it may square the gradient
        self.averages = list(average.parameters()) if average is not None else []
        #: Weights and their averages as whole blocks: one kernel moves all of them.
        self.blocks = list(zip(flatten(model), flatten(average), strict=True)) if average is not None else []
        self.buffers = [b for module in (model, *losses) for b in persistent_buffers(module)]
        self.kept: list[Tensor] | None = None  # copies of these; none: no step was begun
        #: How often batch norm has written its statistics: up to the last step, and to the start of this one.
        self.batch_norms = measure.batch_norms(model)
        self.written = self.written_at_start = measure.writes(self.batch_norms)
        self.total: Tensor | None = None  # the step's loss so far
        self.slowed = False  # whether a rewind has ever slowed down
        #: Whether the optimizer takes ``found_inf`` and skips by itself.
        self.fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        if self.fused and self.schedule is not None:  # the kernel reads the schedule's rate on the device
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
        self.root_sizes = measure.root_sizes(self.parameters)
        self.uncompile()

        names = ["applied", "skipped", "skips_in_a_row", "scale", "headroom_peak", "good_in_a_row"]
        names += ["lr_factor", "lr_factor_until"]  # the latter in applied steps
        # of log loss and log gradient norm: means, mean absolute deviations, number of values
        names += ["loss_center", "norm_center", "loss_spread", "norm_spread", "seen"]
        # of the loss itself: mean, mean absolute deviation, mean magnitude; whether one was 0 or less
        names += ["loss_mean", "loss_deviation", "loss_size", "signed"]
        # rate_sum: of the planned learning rates of the steps that led to these weights
        names += ["capture_enabled", "updates_suspended", "damaged", "rate_sum"]
        #: All that the guard remembers, in one tensor, so that one copy renews it; float64 counts exactly.
        self.memory = torch.zeros(len(names), dtype=measure.widest(device), device=device)
        #: The same by name, as views.
        self.state = dict(zip(names, self.memory, strict=True))
        self.state["scale"].fill_(scale_init if scaled else 1.0)
        self.state["lr_factor"].fill_(1.0)

    # -- a step, in the order of its calls -----------------------------------------------------------
    def zero_grad(self) -> None:
        """Start a step: clear the gradients, copy the buffers; undo an unfinished step's writes to them."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, kept in zip(self.buffers, self.kept or [], strict=False):
            buffer.copy_(kept)
        self.kept, self.total = [buffer.clone() for buffer in self.buffers], None
        self.written_at_start = measure.writes(self.batch_norms)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss * self.state["scale"].float() if self.scaled else loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss, a scalar; the step's loss is the sum of these."""
        torch.autograd.backward(self.scale(loss))
        self.total = loss.detach() if self.total is None else self.total + loss.detach()

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Tensor:
        """Apply the accumulated gradients, or change nothing where they or the loss are not finite.

        Args:
            loss: the step's unscaled loss, scalar, the same on every process; none: what :meth:`backward` was
                called with.

        Returns:
            float32 ``[len(REPORT) + parameters]`` on the device: the columns of ``REPORT``, then the L2 norm
            of each parameter's gradient, unscaled and before clipping. :meth:`read` gives them names.

        Raises:
            RuntimeError: no step was started, a model with batch norm was called before :meth:`zero_grad`, or
                the optimizer has got other parameters since.
        """
        own = self.total if loss is None else loss
        if own is None or (self.kept is None and (self.buffers or self.total is not None)):
            raise RuntimeError("a step has three calls: guard.zero_grad(), .backward(loss) and .step()")
        now = measure.writes(self.batch_norms)
        if now == self.written_at_start != self.written and len(now) == len(self.written):
            raise RuntimeError("batch norm belongs to the step: call guard.zero_grad() before the model")
        if sum(len(group["params"]) for group in self.optimizer.param_groups) != len(self.parameters):
            raise RuntimeError("the optimizer has got other parameters: make a new Guard for it")
        if self.kept:
            own = torch.where(measure.ruined(self.kept, self.buffers), math.nan, own)
        loss = measure.mean_of_processes(own) if loss is None else own
        decision: StepDecision = self._decide(loss.reshape(()), *self.measure(), self._rate())
        self._update_weights(decision)
        for buffer, kept in zip(self.buffers, self.kept or [], strict=True):
            buffer.copy_(torch.where(decision.skip, kept, buffer))
        for weights, averages in self.blocks:
            self._update_average(averages, weights, decision.ema_weight.to(weights.dtype), decision.skip)
        self.memory.copy_(decision.memory)
        self.kept = self.total = None
        self.written = measure.writes(self.batch_norms)
        return torch.cat([decision.report, decision.norms])

    def read(self, report: Tensor) -> dict[str, Any]:
        """A step's report on the host, by name; waits for the device.

        Returns:
            The columns of ``REPORT``, those that are yes or no as bool; ``parameters``, the names of those
            whose gradient was not finite, in the model's order.
        """
        values = report.tolist()
        numbers = dict(zip(REPORT, values, strict=False))
        norms = zip(self.names, values[len(REPORT) :], strict=True)
        flags = {name: bool(numbers[name]) for name in REPORT[REPORT.index("bad_loss") :]}
        return {**numbers, **flags, "parameters": [name for name, norm in norms if not math.isfinite(norm)]}

    def compile(self) -> None:
        """Compile the many small operations of a decision into one kernel."""
        self._decide = torch.compile(self.decide, dynamic=False)
        self._update_average = torch.compile(_update_average, dynamic=False)

    def uncompile(self) -> None:
        """Undo :meth:`compile`."""
        self._decide, self._update_average = self.decide, _update_average

    def _rate(self) -> Tensor | None:
        """The largest rate of the groups, float32; none where a schedule gives it."""
        if self.schedule is not None:
            return None
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        numbers = [torch.as_tensor(0.0 if rate is None else rate).to(self.memory) for rate in rates]
        return torch.stack(numbers).amax().float()

    def measure(self) -> tuple[Tensor, Tensor]:
        """See :func:`measured`; the gradients are still scaled."""
        return measured(self.parameters)

    def decide(
        self, loss: Tensor, norms: Tensor, largest: Tensor, rate: Tensor | None = None
    ) -> StepDecision:
        """Decide what happens to a step; changes nothing.

        Args:
            loss: scalar, unscaled.
            norms: float32 ``[parameters]``, from :meth:`measure`.
            largest: float32 ``[parameters]``, from :meth:`measure`.
            rate: learning rate where there is no schedule, float32.
        """
        state = dict(zip(self.state, self.memory.unbind(), strict=True))
        scale, applied, seen = state["scale"].float(), state["applied"], state["seen"]
        wide, suspended, damaged = self.memory.dtype, state["updates_suspended"] != 0, state["damaged"] != 0
        norms, largest = unscaled(norms.to(wide), largest.to(wide), scale, self.root_sizes)
        norm, peak = norms.square().sum().sqrt(), largest.amax()
        norm = torch.where(norm > 0, norm, peak)  # squares of gradients below 1e-23 are 0 in float32

        logs = torch.stack([loss.to(wide), norm]).clamp(min=torch.finfo(torch.float32).tiny).log()
        values = torch.cat([logs, loss.to(wide).view(1)])
        names = ("loss_center", "norm_center", "loss_mean"), ("loss_spread", "norm_spread", "loss_deviation")
        center, spread = (torch.stack([state[name] for name in some]) for some in names)
        sigma = spread * math.sqrt(math.pi / 2)  # of a normal distribution with that mean absolute deviation

        # Ratios have logarithms as distances, differences the loss's size.
        def above(factor: float) -> Tensor:
            ratio = torch.full_like(norm, math.log(factor))
            return torch.stack([ratio, ratio, (factor - 1) * state["loss_size"]])

        limit = (self.spike_sigma * sigma).clamp(above(LEAST_SPIKE), above(MOST_SPIKE))
        limit = torch.where(seen < EARLY_STEPS, above(EARLY_SPIKE), limit)
        limit = torch.where(limit > 0, limit, math.inf)  # all losses were exactly 0: they tell of no size
        unusual, center, spread = compare_with_past(values, center, spread, seen, limit=limit, window=WINDOW)
        signed = (state["signed"] != 0) | (loss <= 0)
        spike = torch.stack([torch.where(signed, unusual[2], unusual[0]), unusual[1]])
        # No further than the mean moved: an outlier changes it little.
        near = torch.minimum(values[2].abs(), center[2].abs() + limit[2])
        size = state["loss_size"] + (1 / (seen + 1)).clamp(min=1 / WINDOW) * (near - state["loss_size"])
        unknown = state["loss_size"] == 0
        size = torch.where(unknown, values[2].abs(), size)
        deviation = torch.where(unknown & (seen > 0), values[2].abs(), spread[2])

        clip = torch.full_like(norm, self.grad_clip)
        if self.on_spike == "clip":
            usual = torch.minimum(clip, state["norm_center"].exp())
            clip = torch.where(spike.any(), usual, clip)
        divisor = (scale / (clip / norm.clamp(min=1e-300)).clamp(max=1.0)).float()
        lr_factor = torch.where(applied < state["lr_factor_until"], state["lr_factor"], 1.0)
        planned = rate
        if self.schedule is not None and self.planned is not None:
            rate, planned = self.schedule(applied), self.planned(applied)
        assert rate is not None and planned is not None  # there is one or the other
        lr = rate * lr_factor.float()

        bad_loss = ~torch.isfinite(loss)
        # A gradient can be finite and yet too large to be measured or clipped in float32: dividing by
        # infinity would turn it into zeros, and infinity times zero into NaN in every weight.
        bad_grad = ~(torch.isfinite(largest).all() & torch.isfinite(norm.float()) & torch.isfinite(divisor))
        if self.squares:
            bad_grad = bad_grad | ~torch.isfinite((norm * scale / divisor).square().float())
        bad = bad_loss | bad_grad | ~torch.isfinite(lr)
        spike = spike & ~bad
        skip = bad | suspended | damaged
        if self.on_spike == "skip":
            skip = skip | spike.any()
        incident = (state["capture_enabled"] != 0) & bad & ~suspended & ~damaged
        overflow = bad_grad & ~bad_loss
        if self.scaled:
            incident = incident & ~(overflow & measure.searches_scale(state, self.scale_floor))

        flags = (bad_loss, bad_grad, skip & ~suspended, *spike, incident, suspended, damaged)
        report = torch.stack([x.float() for x in (loss, norm, peak, lr, scale, *flags)])

        # The memory after the step, for each of three outcomes. A step that is void because updates are
        # suspended changes nothing: the host will take the steps after the incident again.
        after = state | {"updates_suspended": incident.to(wide)}
        if self.scaled:
            largest_scaled, limits = (report[2] * scale).to(wide), (self.scale_floor, self.growth_interval)
            after |= measure.next_scale(state, skip, overflow, largest_scaled, *limits)
        if_skipped = after | {"skipped": state["skipped"] + 1, "skips_in_a_row": state["skips_in_a_row"] + 1}
        learnt = {"loss_center": center[0], "norm_center": center[1], "seen": seen + 1}
        learnt |= {"loss_spread": spread[0], "norm_spread": spread[1], "signed": signed.to(wide)}
        learnt |= {"loss_mean": center[2], "loss_deviation": deviation, "loss_size": size}
        # A gradient of exactly 0 (a hinge loss that is met) says nothing of the usual one.
        learnt = {name: torch.where(peak > 0, value, state[name]) for name, value in learnt.items()}
        if_applied = after | learnt | {"applied": applied + 1, "rate_sum": state["rate_sum"] + planned}
        if_applied["skips_in_a_row"] = torch.zeros_like(applied)
        if_suspended = state | {"updates_suspended": torch.ones_like(applied)}
        outcomes = (if_suspended, if_skipped, if_applied)
        void, skipped, taken = (torch.stack(list(outcome.values())) for outcome in outcomes)
        memory = torch.where(suspended, void, torch.where(skip, skipped, taken))

        decay = ((1.0 + applied) / (10.0 + applied)).clamp(max=self.ema_decay)
        ema_weight = torch.where(skip, 0.0, 1.0 - decay).float()
        return StepDecision(skip, divisor, lr, lr_factor, ema_weight, report, norms.float(), memory)

    def _update_weights(self, decision: StepDecision) -> None:
        """The optimizer's step, where the decision allows one."""
        groups, on_device = self.optimizer.param_groups, self.fused and not makes_momentum(self.optimizer)
        if on_device:
            # The fused step divides by grad_scale, so unscaling and clipping cost no pass of their own.
            self.optimizer.grad_scale = torch.where(decision.skip, 1.0, decision.divisor)  # type: ignore[attr-defined]
            # The kernel reads it.
            self.optimizer.found_inf = decision.skip.to(torch.float32)  # type: ignore[attr-defined]
        else:
            if bool(decision.skip):  # the one synchronisation of a step, for an optimizer that cannot skip
                return
            if self.fused:
                self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]
            divide(self.parameters, decision.divisor)
        own = [group.get("lr") for group in groups]
        for group, rate in zip(groups, own, strict=True):
            if self.schedule is not None:  # in place: the kernel reads this very tensor
                group["lr"] = rate.copy_(decision.lr) if isinstance(rate, Tensor) else float(decision.lr)
            elif self.slowed and rate is not None:
                factor = decision.lr_factor.float()
                group["lr"] = rate * (factor if isinstance(rate, Tensor) else float(factor))
        self.optimizer.step()
        if self.schedule is None and self.slowed:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate
        if self.scheduler is not None and not (on_device and bool(decision.skip)):
            self.scheduler.step()

    # -- the state as a whole ------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """All that a step may change but the guard's memory: weights, buffers, average, moments."""
        whole = self.model.state_dict(keep_vars=True)
        held = {name.removeprefix("_orig_mod."): x for name, x in whole.items()}  # of a compiled model
        held |= dict(zip(self.names, self.parameters, strict=True))  # some may lie outside of the model
        found = {f"model.{name}": x for name, x in held.items()}
        inside = {id(x) for x in held.values()}
        found |= {f"buffer.{at}": x for at, x in enumerate(self.buffers) if id(x) not in inside}  # of losses
        if self.average is not None:
            found |= {f"average.{name}": x for name, x in self.average.state_dict(keep_vars=True).items()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = self.optimizer.state.get(parameter, {})  # the optimizer makes them in its first step
            found |= {f"optimizer.{name}.{key}": x for key, x in moments.items()}
        return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def _largest(self) -> tuple[list[str], Tensor]:
        """Names of all that a step may change, and the largest magnitude in each."""
        alike: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name, x in self.tensors().items():
            if (x.is_floating_point() or x.is_complex()) and x.numel():
                x = plain(x)  # one kernel takes tensors of one type on one device
                alike.setdefault((x.dtype, x.device), {})[name] = x
        norms = [torch.stack(torch._foreach_norm(list(some.values()), math.inf)) for some in alike.values()]
        names = [name for some in alike.values() for name in some] + [f"guard.{name}" for name in self.state]
        return names, torch.cat([*(x.to(self.memory) for x in norms), self.memory.abs()])

    @torch.no_grad()
    def _too_far(self, tensors: Mapping[str, Tensor], memory: Tensor) -> Tensor:
        """Which parameters moved further from an earlier state than the steps since can move them, bool."""
        farthest = max(self.reach, reach(self.optimizer))  # a scheduler may change the betas
        if math.isinf(farthest):
            return torch.zeros(len(self.names), dtype=torch.bool, device=self.memory.device)
        past = dict(zip(self.state, memory.unbind(), strict=True))
        rates, steps = (self.state[name] - past[name] for name in ("rate_sum", "applied"))
        then = [tensors[f"model.{name}"] for name in self.names]
        apart = torch._foreach_sub(self.parameters, then)
        moved, size = (sizes(x)[1].to(self.memory) for x in (apart, then))
        decayed = rates * max(group["weight_decay"] for group in self.optimizer.param_groups)
        rounded = steps * torch.finfo(then[0].dtype).eps
        return torch.gt(moved, (farthest * rates + size * (decayed + rounded)) * (1 + decayed))

    def check_state(self, since: tuple[Mapping[str, Tensor], Tensor] | None = None) -> None:
        """Suspend all updates if the training state is damaged; the next report says so.

        It is damaged if anything that a step may change is not finite, or if a weight has moved further than
        the optimizer can have moved it at learning rates up to the schedule's. Reads nothing back from the
        device: there is no host-device synchronisation.

        Args:
            since: :meth:`tensors` and :attr:`memory` of an earlier state to measure the movement from.
        """
        bad = ~torch.isfinite(self._largest()[1]).all()
        self.state["damaged"].copy_(bad if since is None else bad | self._too_far(*since).any())

    def moved(self, since: tuple[Mapping[str, Tensor], Tensor]) -> list[str]:
        """Names of the weights that have moved too far, see :meth:`check_state`; waits for the device."""
        return [name for name, far in zip(self.names, self._too_far(*since).tolist(), strict=True) if far]

    def damage(self) -> list[str]:
        """Names of what is not finite now; waits for the device."""
        names, largest = self._largest()
        finite = torch.isfinite(largest).tolist()
        return [name for name, good in zip(names, finite, strict=True) if not good]

    def resume_updates(self, *, capture_enabled: bool) -> None:
        """Continue after an incident.

        Args:
            capture_enabled: whether the next incident suspends the updates again, so that it can be captured.
        """
        self.state["updates_suspended"].fill_(0)
        self.state["capture_enabled"].fill_(int(capture_enabled))

    def slow_down(self, factor: float, steps: int) -> None:
        """Multiply the learning rate by ``factor`` for the next ``steps`` applied steps."""
        self.slowed = True
        self.state["lr_factor"].fill_(factor)
        self.state["lr_factor_until"].copy_(self.state["applied"] + steps)

    def state_dict(self) -> dict[str, Any]:
        """The guard's memory by name, the optimizer's state, and the scheduler's if there is one."""
        optimizer = self.optimizer.state_dict()
        # The rate follows from the schedule; the one in the groups was made for the last step.
        peak = getattr(self.schedule, "lr", None)
        groups = [g if peak is None else g | {"lr": float(peak)} for g in optimizer["param_groups"]]
        own = {"schedule": self.scheduler.state_dict()} if self.scheduler is not None else {}
        return {"state": dict(self.state), "optimizer": optimizer | {"param_groups": groups}, **own}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. How the optimizer steps stays as it is on this device."""
        for name in saved["state"].keys() & self.state.keys():
            self.state[name].copy_(saved["state"][name])
        self.state["damaged"].fill_(0)
        self.slowed = float(self.state["lr_factor"]) != 1.0
        own = [dict(group) for group in self.optimizer.param_groups]
        ways = [{k: g[k] for k in ("capturable", "fused", "foreach") if k in g} for g in own]
        groups = [{**g, **way} for g, way in zip(saved["optimizer"]["param_groups"], ways, strict=True)]
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        for group, before in zip(self.optimizer.param_groups, own, strict=True):
            if isinstance(before.get("lr"), Tensor):  # the very tensor that the fused kernel reads
                group["lr"] = before["lr"].copy_(torch.as_tensor(group["lr"]))
            elif isinstance(group.get("lr"), Tensor):
                group["lr"] = float(group["lr"])
        if self.scheduler is not None and "schedule" in saved:
            self.scheduler.load_state_dict(saved["schedule"])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a guard cannot be copied: make a Guard for the copies, and load its state_dict()")


def _update_average(average: Tensor, weights: Tensor, ema_weight: Tensor, skip: Tensor) -> None:
    """Move ``average`` towards ``weights``. An ``ema_weight`` of 0 is no skip, as 0 times NaN is NaN."""
    average.copy_(torch.where(skip, average, average.lerp(weights, ema_weight)))
