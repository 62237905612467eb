"""A safe training step: check the loss and the gradients, then update everything or nothing.

The decision is a tensor on the device. PyTorch's fused optimizers take it as ``found_inf`` (float32, 0.0 or
1.0) and return early, so a step needs no host-device synchronisation. Everything else that a step changes
(moving average, buffers, schedule, loss scale, statistics) depends on the same tensor. A skipped step leaves
all of it bit for bit unchanged.

    gradients -> norms -> decision -> optimizer, average, buffers, scale, statistics: all or nothing
                                   -> report: one row, which the host reads later
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Columns of a step's report, before the norm of each parameter. ``incident``: updates are suspended from the
#: next step on, until :meth:`Guard.resume_updates`; ``updates_suspended``: this step was void because of
#: that. ``damaged``: a weight, moment, average or buffer was not finite at the last
#: :meth:`Guard.check_state`, or a weight had moved too far; nothing is updated until the state is restored.
REPORT = (
    *("loss", "grad_norm", "grad_max", "lr", "loss_scale", "bad_loss", "bad_grad", "skipped"),
    *("spike_loss", "spike_grad", "incident", "updates_suspended", "damaged"),
)

FLOAT16_MAX = 65504.0
#: The loss scale keeps the largest gradient this many times below float16's largest number.
HEADROOM = 4.0
#: While the loss scale is searched for, an overflow is an incident only after this many in a row.
ORDINARY_OVERFLOWS = 3
#: A spike is this many times the mean in the first steps, while there is no spread to go by.
EARLY_SPIKE, EARLY_STEPS = 10.0, 8
#: Later a spike is at least the first and at most the second: spikes in the first steps widen the spread.
LEAST_SPIKE, MOST_SPIKE = 1.5, 100.0
#: Steps over which the statistics of spikes look back.
WINDOW = 100
#: What CUDA and its libraries say when they run out of the memory that they take without PyTorch.
_OUT_OF_MEMORY = re.compile("CUDA error: out of memory|(CUBLAS_STATUS|CUDNN_STATUS|DEVICE)_ALLOC")


State = dict[str, Tensor]


class WarmupCosine:
    """Linear warm-up over steps, then a cosine down to ``min_lr`` (Loshchilov & Hutter, SGDR, 2017, eq. 5).

    Args:
        lr: peak rate.
        min_lr: rate at the last step.
        warmup_steps: steps of warm-up; the first step has ``lr / warmup_steps``.
        total_steps: steps of the whole run.

    Example:
        >>> schedule = WarmupCosine(lr=1.0, min_lr=0.0, warmup_steps=2, total_steps=4)
        >>> [float(schedule(torch.tensor(step))) for step in range(4)]
        [0.5, 1.0, 1.0, 0.0]
    """

    def __init__(self, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> None:
        self.lr, self.min_lr = lr, min_lr
        self.warmup_steps = warmup_steps
        self.total_steps = max(total_steps, warmup_steps + 1)

    def __call__(self, step: Tensor) -> Tensor:
        """Rate of step number ``step`` (from 0), float32.

        Args:
            step: a tensor, so that the rate stays on its device.
        """
        done = step.to(torch.float32)
        rise = self.lr * (done + 1) / max(self.warmup_steps, 1)
        along = (done - self.warmup_steps) / max(self.total_steps - 1 - self.warmup_steps, 1)
        half = 0.5 * (1 + torch.cos(math.pi * along.clamp(0.0, 1.0)))
        return torch.where(done < self.warmup_steps, rise, self.min_lr + (self.lr - self.min_lr) * half)


class StepDecision(NamedTuple):
    """What happens to one step; tensors on the device.

    Attributes:
        skip: bool; nothing may change.
        divisor: of the gradients, float32; loss scale and clipping in one.
        lr: learning rate, float32.
        ema_weight: of the new weights in their moving average, float32.
        report: float32 ``[len(REPORT)]``.
        norms: float32 ``[parameters]``.
        memory: the guard's memory after the step, float64.
    """

    skip: Tensor
    divisor: Tensor
    lr: Tensor
    ema_weight: Tensor
    report: Tensor
    norms: Tensor
    memory: Tensor


class Guard:
    """Owns the optimizer's step, the loss scale, the schedule's position and the moving average.

    A spike is a loss or gradient norm far above its past, see :func:`compare_with_past`. Skipped values never
    enter the statistics.

    Args:
        model: whose parameters are trained. Buffers that a forward pass changes (BatchNorm's) are restored
            when the step is skipped.
        optimizer: best a fused one (``fused=True``, tensor ``lr``), which skips on the device. For any other
            the host reads the decision once a step.
        schedule: learning rate by number of applied steps; that of every parameter group.
        grad_clip: largest L2 norm of the gradient after clipping.
        average: model that holds the moving average of the weights; none: no average.
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

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = build_optimizer(model.named_parameters(), kind="adamw", lr=0.01, weight_decay=0.0)
        >>> schedule = WarmupCosine(lr=0.01, min_lr=0.0, warmup_steps=0, total_steps=10)
        >>> guard = Guard(model, optimizer, schedule, grad_clip=1.0)
        >>> before = model.weight.detach().clone()
        >>> guard.zero_grad()
        >>> loss = model(torch.tensor([[1.0, float("nan")]])).mean()
        >>> guard.scale(loss).backward()
        >>> report = dict(zip(REPORT, guard.step(loss.detach()).tolist()))
        >>> report["skipped"], torch.equal(model.weight, before)
        (1.0, True)
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
        on_spike: str = "note",
        spike_sigma: float = 6.0,
        losses: Iterable[nn.Module] = (),
    ) -> None:
        self.model, self.average = model, average
        self.optimizer, self.schedule = optimizer, schedule
        #: Says how far weights may move, even if the schedule in use is changed.
        self.planned = copy.copy(schedule)
        self.reach = max(furthest_update(group) for group in optimizer.param_groups)
        self.grad_clip, self.ema_decay = grad_clip, ema_decay
        self.scaled, self.scale_floor, self.growth_interval = scaled, scale_floor, growth_interval
        self.on_spike, self.spike_sigma = on_spike, spike_sigma
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.averages = list(average.parameters()) if average is not None else []
        #: Weights and their averages as whole blocks: one kernel moves all of them.
        self.blocks = list(zip(flatten(model), flatten(average), strict=True)) if average is not None else []
        self.buffers = [b for module in (model, *losses) for b in _persistent_buffers(module)]
        self.kept: list[Tensor] = []
        #: Whether the optimizer takes ``found_inf`` and skips by itself.
        self.fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        device = self.parameters[0].device
        self.root_sizes = torch.tensor([math.sqrt(p.numel()) for p in self.parameters], device=device)
        self.uncompile()

        names = ["applied", "skipped", "skips_in_a_row", "scale", "headroom_peak", "good_in_a_row"]
        names += ["lr_factor", "lr_factor_until"]  # the latter in applied steps
        # of log loss and log gradient norm: means, mean absolute deviations, number of values
        names += ["loss_center", "norm_center", "loss_spread", "norm_spread", "seen"]
        # rate_sum: of the planned learning rates of the steps that led to these weights
        names += ["capture_enabled", "updates_suspended", "damaged", "rate_sum"]
        #: All that the guard remembers, in one tensor, so that one copy renews it; float64 counts exactly.
        self.memory = torch.zeros(len(names), dtype=torch.float64, device=device)
        #: The same by name, as views.
        self.state = dict(zip(names, self.memory, strict=True))
        self.state["scale"].fill_(scale_init if scaled else 1.0)
        self.state["lr_factor"].fill_(1.0)

    # -- a step, in the order of its calls -----------------------------------------------------------
    def zero_grad(self) -> None:
        """Start a step: clear the gradients and copy the buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        self.kept = [buffer.clone() for buffer in self.buffers]

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss * self.state["scale"].float() if self.scaled else loss

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Apply the accumulated gradients, or change nothing where they or the loss are not finite.

        Args:
            loss: the step's unscaled loss, scalar.

        Returns:
            float32 ``[len(REPORT) + parameters]`` on the device: the columns of ``REPORT``, then the L2 norm
            of each parameter's gradient, unscaled and before clipping.
        """
        decision: StepDecision = self._decide(loss, *self.measure())
        self._update_weights(decision)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(decision.skip, kept, buffer))
        for weights, averages in self.blocks:
            self._update_average(averages, weights, decision.ema_weight.to(weights.dtype), decision.skip)
        self.memory.copy_(decision.memory)
        return torch.cat([decision.report, decision.norms])

    def compile(self) -> None:
        """Compile the many small operations of a decision into one kernel."""
        self._decide = torch.compile(self.decide, dynamic=False)
        self._update_average = torch.compile(_update_average, dynamic=False)

    def uncompile(self) -> None:
        """Undo :meth:`compile`."""
        self._decide, self._update_average = self.decide, _update_average

    def measure(self) -> tuple[Tensor, Tensor]:
        """See :func:`measured`; the gradients are still scaled."""
        return measured(self.parameters)

    def decide(self, loss: Tensor, norms: Tensor, largest: Tensor) -> StepDecision:
        """Decide what happens to a step; changes nothing.

        Args:
            loss: scalar, unscaled.
            norms: float32 ``[parameters]``, from :meth:`measure`.
            largest: float32 ``[parameters]``, from :meth:`measure`.
        """
        state = dict(zip(self.state, self.memory.unbind(), strict=True))
        scale, applied, seen = state["scale"].float(), state["applied"], state["seen"]
        suspended, damaged = state["updates_suspended"] != 0, state["damaged"] != 0
        norms, largest = unscaled(norms.double(), largest.double(), scale, self.root_sizes)
        norm, peak = norms.square().sum().sqrt(), largest.amax()

        values = torch.stack([loss.double(), norm])
        center = torch.stack([state["loss_center"], state["norm_center"]])
        spread = torch.stack([state["loss_spread"], state["norm_spread"]])
        sigma = spread * math.sqrt(math.pi / 2)  # of a normal distribution with that mean absolute deviation
        limit = (self.spike_sigma * sigma).clamp(math.log(LEAST_SPIKE), math.log(MOST_SPIKE))
        limit = torch.where(seen < EARLY_STEPS, math.log(EARLY_SPIKE), limit)
        spike, center, spread = compare_with_past(values, center, spread, seen, limit=limit, window=WINDOW)

        clip = torch.full_like(norm, self.grad_clip)
        if self.on_spike == "clip":
            usual = torch.minimum(clip, state["norm_center"].exp())
            clip = torch.where(spike.any(), usual, clip)
        divisor = (scale / (clip / norm.clamp(min=1e-12)).clamp(max=1.0)).float()
        lr_factor = torch.where(applied < state["lr_factor_until"], state["lr_factor"], 1.0)
        lr = self.schedule(applied) * lr_factor.float()

        bad_loss = ~torch.isfinite(loss)
        # A gradient can be finite and yet too large to be measured or clipped in float32: dividing by
        # infinity would turn it into zeros, and infinity times zero into NaN in every weight.
        bad_grad = ~(torch.isfinite(largest).all() & torch.isfinite(norm.float()) & torch.isfinite(divisor))
        bad = bad_loss | bad_grad | ~torch.isfinite(lr)
        spike = spike & ~bad
        skip = bad | suspended | damaged
        if self.on_spike == "skip":
            skip = skip | spike.any()
        incident = (state["capture_enabled"] != 0) & bad & ~suspended & ~damaged
        overflow = bad_grad & ~bad_loss
        if self.scaled:
            incident = incident & ~(overflow & self._searches_scale(state))

        flags = (bad_loss, bad_grad, skip & ~suspended, *spike, incident, suspended, damaged)
        report = torch.stack([x.float() for x in (loss, norm, peak, lr, scale, *flags)])

        # The memory after the step, for each of three outcomes. A step that is void because updates are
        # suspended changes nothing: the host will take the steps after the incident again.
        after = state | {"updates_suspended": incident.double()}
        if self.scaled:
            after |= self._next_scale(state, skip, overflow, (report[2] * scale).double())
        if_skipped = after | {"skipped": state["skipped"] + 1, "skips_in_a_row": state["skips_in_a_row"] + 1}
        if_applied = after | {
            **{"applied": applied + 1, "seen": seen + 1, "skips_in_a_row": torch.zeros_like(applied)},
            **{"loss_center": center[0], "norm_center": center[1]},
            **{"loss_spread": spread[0], "norm_spread": spread[1]},
            **{"rate_sum": state["rate_sum"] + self.planned(applied)},
        }
        if_suspended = state | {"updates_suspended": torch.ones_like(applied)}
        outcomes = (if_suspended, if_skipped, if_applied)
        void, skipped, taken = (torch.stack(list(outcome.values())) for outcome in outcomes)
        memory = torch.where(suspended, void, torch.where(skip, skipped, taken))

        decay = ((1.0 + applied) / (10.0 + applied)).clamp(max=self.ema_decay)
        ema_weight = torch.where(skip, 0.0, 1.0 - decay).float()
        return StepDecision(skip, divisor, lr, ema_weight, report, norms.float(), memory)

    def _searches_scale(self, state: State) -> Tensor:
        """Whether an overflow of float16 is how its loss scale is found.

        It is not where good steps have shown that there is room, nor after several overflows in a row.
        """
        room = (state["good_in_a_row"] > 0) & (state["headroom_peak"] * HEADROOM <= FLOAT16_MAX)
        above_floor = state["scale"].float() > self.scale_floor
        return above_floor & ~room & (state["skips_in_a_row"] < ORDINARY_OVERFLOWS)

    def _next_scale(self, state: State, skip: Tensor, overflow: Tensor, largest: Tensor) -> State:
        """The loss scale's next value: back before float16 overflows, and up only where there is room.

        An overflow halves it, down to the floor; a bad loss is no overflow. It also halves when the largest
        scaled gradient has come within ``HEADROOM`` of float16's largest number: waiting for the overflow
        would cost a step. It doubles after ``growth_interval`` good steps, if their largest gradient leaves
        room for it.
        """
        good = state["good_in_a_row"]
        good = torch.where(skip, torch.where(overflow, 0.0, good), good + 1)
        peak = torch.where(skip, state["headroom_peak"], torch.maximum(state["headroom_peak"], largest))
        near = peak * HEADROOM > FLOAT16_MAX
        grown = (good >= self.growth_interval) & ~near
        roomy = grown & (2 * HEADROOM * peak < FLOAT16_MAX)
        factor = torch.where(overflow | near, 0.5, torch.where(roomy, 2.0, 1.0))
        return {
            "scale": (state["scale"] * factor).clamp(self.scale_floor, 2.0**24),
            "headroom_peak": torch.where(grown | near | overflow, 0.0, peak),
            "good_in_a_row": torch.where(grown | near, 0.0, good),
        }

    def _update_weights(self, decision: StepDecision) -> None:
        """The optimizer's step, where the decision allows one."""
        groups = self.optimizer.param_groups
        if self.fused:
            for group in groups:
                group["lr"].copy_(decision.lr)
            # The fused step divides by grad_scale, so unscaling and clipping cost no pass of their own.
            self.optimizer.grad_scale = torch.where(decision.skip, 1.0, decision.divisor)  # type: ignore[attr-defined]
            # The kernel reads it.
            self.optimizer.found_inf = decision.skip.to(torch.float32)  # type: ignore[attr-defined]
        elif bool(decision.skip):  # the one synchronisation of a step, for an optimizer that cannot skip
            return
        else:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], decision.divisor)
            for group in groups:
                group["lr"] = float(decision.lr)
        self.optimizer.step()

    # -- the state as a whole ------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """All that a step may change but the guard's memory: weights, buffers, average, moments."""
        found = {f"model.{name}": x for name, x in self.model.state_dict(keep_vars=True).items()}
        if self.average is not None:
            found |= {f"average.{name}": x for name, x in self.average.state_dict(keep_vars=True).items()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = self.optimizer.state.get(parameter, {})  # the optimizer makes them in its first step
            found |= {f"optimizer.{name}.{key}": x for key, x in moments.items() if isinstance(x, Tensor)}
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def _largest(self) -> tuple[list[str], Tensor]:
        """Names of all that a step may change, and the largest magnitude in each, float64."""
        alike: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name, x in self.tensors().items():
            if x.is_floating_point() and x.numel():  # one kernel takes tensors of one type on one device
                alike.setdefault((x.dtype, x.device), {})[name] = x
        norms = [torch.stack(torch._foreach_norm(list(some.values()), math.inf)) for some in alike.values()]
        names = [name for some in alike.values() for name in some] + [f"guard.{name}" for name in self.state]
        return names, torch.cat([*(x.to(self.memory) for x in norms), self.memory.abs()])

    @torch.no_grad()
    def _too_far(self, tensors: Mapping[str, Tensor], memory: Tensor) -> Tensor:
        """Which parameters moved further from an earlier state than the steps since can move them, bool."""
        past = dict(zip(self.state, memory.unbind(), strict=True))
        rates, steps = (self.state[name] - past[name] for name in ("rate_sum", "applied"))
        then = [tensors[f"model.{name}"] for name in self.names]
        apart = torch._foreach_sub(self.parameters, then)
        moved, size = (torch.stack(torch._foreach_norm(x, math.inf)).double() for x in (apart, then))
        decayed = rates * max(group["weight_decay"] for group in self.optimizer.param_groups)
        rounded = steps * torch.finfo(then[0].dtype).eps
        return torch.gt(moved, (self.reach * rates + size * (decayed + rounded)) * (1 + decayed))

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
        self.state["lr_factor"].fill_(factor)
        self.state["lr_factor_until"].copy_(self.state["applied"] + steps)

    def state_dict(self) -> dict[str, Any]:
        """The guard's memory by name and the optimizer's state."""
        optimizer = self.optimizer.state_dict()
        # The rate follows from the schedule; the one in the groups was made for the last step.
        groups = [{**group, "lr": float(self.schedule.lr)} for group in optimizer["param_groups"]]
        return {"state": dict(self.state), "optimizer": {**optimizer, "param_groups": groups}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. How the optimizer steps stays as it is on this device."""
        for name in saved["state"].keys() & self.state.keys():
            self.state[name].copy_(saved["state"][name])
        self.state["damaged"].fill_(0)
        own = [dict(group) for group in self.optimizer.param_groups]
        ways = [{k: g[k] for k in ("capturable", "fused", "foreach") if k in g} for g in own]
        groups = [{**g, **way} for g, way in zip(saved["optimizer"]["param_groups"], ways, strict=True)]
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        for group, before in zip(self.optimizer.param_groups, own, strict=True):
            if isinstance(before["lr"], Tensor):  # the very tensor that the fused kernel reads
                group["lr"] = before["lr"].copy_(torch.as_tensor(group["lr"]))


def furthest_update(group: Mapping[str, Any]) -> float:
    """The furthest that a step of Adam or AdamW moves a weight, in learning rates, for any gradients.

    With ``m`` and ``v`` as sums over the past, the Cauchy-Schwarz inequality bounds ``m / sqrt(v)`` by
    ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``. Weight decay and rounding come on top.

    Args:
        group: a parameter group of the optimizer; without ``betas`` there is no bound.

    Example:
        >>> round(furthest_update({"betas": (0.9, 0.999)}), 1)
        7.3
    """
    b1, b2 = group.get("betas", (1.0, 1.0))
    past = (1 - b2) * (1 - b1**2 / b2)
    return 1.003 * (1 - b1) / math.sqrt(past) if past > 0 else math.inf  # 1.003: moments are float32


@torch.no_grad()
def flatten(module: nn.Module) -> list[Tensor]:
    """Lay a module's parameters side by side in memory; shapes, strides and values stay.

    Returns:
        A 1-d block for each dtype. Two modules of the same build have their parameters at the same places.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> (block,) = flatten(layer)
        >>> block.fill_(1.0).shape, layer.bias.tolist()  # each parameter starts at a multiple of 64 elements
        (torch.Size([128]), [1.0, 1.0])
    """
    blocks = []
    parameters = list(module.parameters())
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        some = [p for p in parameters if p.dtype == dtype]
        sizes = [-(-p.numel() // 64) * 64 for p in some]  # kernels read whole lines of memory
        block = torch.zeros(sum(sizes), dtype=dtype, device=some[0].device)
        for p, piece in zip(some, torch.split(block, sizes), strict=True):
            place = piece.as_strided(p.shape, p.stride())  # parameters are dense, in whatever order
            place.copy_(p)
            p.data = place
        blocks.append(block)
    return blocks


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: str,
    lr: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Adam or AdamW with tensor learning rates; only kernels and matrices are decayed.

    Args:
        parameters: ``model.named_parameters()``.
        kind: ``adamw`` (Loshchilov & Hutter, 2019) or ``adam`` (decay as an L2 penalty).
        lr: learning rate before the schedule sets it.
        weight_decay: of kernels and matrices.
        fused: one kernel that can skip by itself, on the device. Without it the guard reads its decision
            back.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    device = trained[0].device

    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        some = [p for p in trained if (p.ndim >= 2) == decayed]
        # A fused kernel reads its rate on the device; the others take a number.
        rate = torch.tensor(lr, dtype=torch.float32, device=device) if fused else lr
        groups.append({"params": some, "weight_decay": decayed * weight_decay, "lr": rate})
    cls = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    # Capturable: its step count lies on the device, so that a step can be part of a CUDA graph.
    return cls(groups, lr=lr, fused=fused, capturable=fused and device.type == "cuda")


def compare_with_past(
    value: Tensor, center: Tensor, spread: Tensor, seen: Tensor, *, limit: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the logarithm of a value with its past, and take it in.

    A value moves the statistics no further than the limit that makes it unusual (Huber, Robust Estimation of
    a Location Parameter, 1964, eq. 2.7), so one spike cannot hide the next.

    Args:
        value: float64, of any shape.
        center: running mean of the logarithm, of the same shape.
        spread: running mean absolute deviation, of the same shape.
        seen: number of values so far.
        limit: deviation of the logarithm from which a value is unusual; the first value never is.
        window: values over which the statistics look back.

    Returns:
        Whether the value is unusually large (bool); the new center; the new spread.

    Example:
        >>> import torch
        >>> past = torch.tensor(0.0), torch.tensor(0.1), torch.tensor(50.0)
        >>> unusual, *_ = compare_with_past(torch.tensor(9.0), *past, limit=torch.tensor(1.0), window=100)
        >>> bool(unusual)
        True
    """
    limit = torch.where(seen == 0, math.inf, limit)
    deviation = value.clamp(min=torch.finfo(torch.float32).tiny).log() - center
    moved = torch.maximum(torch.minimum(deviation, limit), -limit)
    new_center = center + (1.0 / (seen + 1)).clamp(min=1.0 / window) * moved
    widened = spread + (1.0 / seen.clamp(min=1)).clamp(min=1.0 / window) * (moved.abs() - spread)
    return deviation > limit, new_center, torch.where(seen == 0, spread, widened)


def _update_average(average: Tensor, weights: Tensor, ema_weight: Tensor, skip: Tensor) -> None:
    """Move ``average`` towards ``weights``. An ``ema_weight`` of 0 is no skip, as 0 times NaN is NaN."""
    average.copy_(torch.where(skip, average, average.lerp(weights, ema_weight)))


def _persistent_buffers(module: nn.Module) -> list[Tensor]:
    """Buffers that a checkpoint holds: state. The others are constants."""
    held = module.state_dict(keep_vars=True)
    return [buffer for name, buffer in module.named_buffers() if name in held]


def measured(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L2 norm and largest magnitude of each parameter's gradient, float32 ``[parameters]`` each."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norms, largest = (torch.stack(torch._foreach_norm(grads, kind)).float() for kind in (2, math.inf))
    return norms, largest


def unscaled(
    norms: Tensor, largest: Tensor, scale: Tensor | float, root_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Norms and largest magnitudes of the gradients without their loss scale.

    Args:
        norms: ``[parameters]``, from :func:`measured`, best in float64.
        largest: ``[parameters]``, likewise.
        scale: the loss scale.
        root_sizes: square roots of the parameters' numbers of elements, ``[parameters]``.
    """
    norms, largest = norms / scale, largest / scale
    # Squares of finite gradients above 1e19 overflow float32: the norm is then bounded by the largest
    # element.
    return torch.where(torch.isfinite(norms), norms, largest * root_sizes), largest


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out. The device is as it was, and a smaller batch can be tried.

    PyTorch's allocator raises ``OutOfMemoryError``. CUDA, cuBLAS and cuDNN, which allocate by themselves, end
    in another ``RuntimeError``.
    """
    cuda = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    return cuda or isinstance(error, torch.OutOfMemoryError)
