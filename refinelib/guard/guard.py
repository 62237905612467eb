"""What makes a step safe: judge loss and gradients, then update everything or nothing.

One path for every precision and optimizer. The judgement is a tensor (``found_inf``, float32,
exactly 0.0 or 1.0) that PyTorch's fused optimizers take on the device and return early on, so
nothing is read back. All else that a step moves (moving average, buffers, schedule, loss scale, statistics)
hangs on the same tensor. A skipped step leaves all of it bit for bit as it was.

    gradients -> norms, once -> judgement -> optimizer, average, buffers, scale, statistics: all or nothing
                                         -> report: one row, which the host reads later
"""

from __future__ import annotations

import math
from typing import Iterable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from refinelib.guard.optim import WarmupCosine, flatten

#: Columns of a step's report, before the per-parameter norms. ``froze``: an incident, the guard stands still from the next
#: step on; ``frozen``: this step was void because of that. ``damaged``: a weight, moment, average or buffer was not finite
#: when :meth:`Guard.check_state` last looked; nothing is updated until the state is restored.
REPORT = (
    "loss", "grad_norm", "grad_max", "lr", "loss_scale", "bad_loss", "bad_grad", "skipped", "spike_loss", "spike_grad", "incident", "updates_suspended", "damaged",
)  # fmt: skip

FLOAT16_MAX = 65504.0
#: The loss scale keeps the largest gradient this many times below float16's largest number.
HEADROOM = 4.0
#: While the loss scale is searched for, an overflow is no incident before it has come this many times in a row.
ORDINARY_OVERFLOWS = 3
#: A spike in the first steps, while there is no spread to go by, is this many times the usual.
EARLY_SPIKE, EARLY_STEPS = 10.0, 8
#: Later it is never less than the first and never more than the second: spikes in the first steps widen the spread.
LEAST_SPIKE, MOST_SPIKE = 1.5, 100.0
#: Steps over which the statistics of spikes look back.
WINDOW = 100


class StepDecision(NamedTuple):
    """What is thought of one step; tensors on the device."""

    skip: Tensor  # bool: nothing may move
    divisor: Tensor  # of the gradients: loss scale and clipping in one
    lr: Tensor
    share: Tensor  # of the new weights in their moving average
    report: Tensor  # float32 [len(REPORT)]
    norms: Tensor  # float32 [parameters]
    memory: Tensor  # what the guard's memory becomes


class Guard:
    """Owns the optimizer's step, the loss scale, the schedule's position and the moving average.

    Spikes are judged on the logarithms of loss and gradient norm, against their running mean and mean absolute
    deviation. Values that were skipped never enter these, and no value enters further from the mean than the limit
    that makes it a spike (Huber, Robust Estimation of a Location Parameter, 1964, eq. 2.7), so a spike cannot
    hide the next one.

    Args:
        model: whose parameters are trained. Buffers that a forward pass moves (BatchNorm's) are put back when
            the step is skipped.
        optimizer: best one whose kernel is fused (``fused=True``, tensor ``lr``): it skips on the device. Before any
            other the judgement is read back, once a step.
        schedule: learning rate by number of applied steps.
        grad_clip: largest L2 norm of the gradient after clipping.
        average: model that holds the moving average of the weights; none: no average.
        ema_decay: its decay; after ``n`` steps at most ``(1 + n) / (10 + n)``, as a start from fresh weights would weigh for long otherwise.
        scaled: whether the loss is scaled (fp16).
        scale_init, scale_floor: loss scale at the start, and its least value: without a floor some
            150 skips in a row make its inverse infinite, and the next healthy step writes that into
            every weight.
        growth_interval: good steps in a row after which the scale doubles.
        on_spike: ``skip`` the step; ``clip`` its gradient to the usual norm; ``note`` it in the report only.
        spike_sigma: how many standard deviations above the mean make a spike.
        losses: modules beside the model whose buffers a step may move (running class weights, say).
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
        self.optimizer = optimizer
        self.schedule = schedule
        self.grad_clip = grad_clip
        self.ema_decay = ema_decay
        self.scaled = scaled
        self.scale_floor = scale_floor
        self.growth_interval = growth_interval
        self.on_spike, self.spike_sigma = on_spike, spike_sigma
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = list(average.parameters()) if average is not None else []
        #: Weights and their averages as whole blocks: one kernel moves all of them.
        self.blocks = list(zip(flatten(model), flatten(average))) if average is not None else []
        self.buffers = [b for module in (model, *losses) for b in _persistent_buffers(module)]
        self.kept: list[Tensor] = []
        self.think = self.decide
        self.update_average = _update_average
        #: Whether the optimizer takes ``found_inf`` and skips by itself.
        self.fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        device = self.parameters[0].device
        self.root_sizes = torch.tensor([math.sqrt(p.numel()) for p in self.parameters], device=device)

        start = {
            "applied": 0, "skipped": 0, "skips_in_a_row": 0, "scale": scale_init if scaled else 1.0, "headroom_peak": 0.0, "good_in_a_row": 0,
            "lr_factor": 1.0, "lr_factor_until": 0,  # the latter in applied steps
            "loss_center": 0.0, "norm_center": 0.0,  # means of log loss and log gradient norm
            "loss_spread": 0.0, "norm_spread": 0.0, "seen": 0,  # mean absolute deviations from these, and how many values
            "capture_enabled": 0, "updates_suspended": 0, "damaged": 0,
        }  # fmt: skip
        #: All that the guard remembers, in one tensor, so that one copy renews it; float64 counts exactly.
        self.memory = torch.tensor(list(start.values()), dtype=torch.float64, device=device)
        #: The same by name, as views.
        self.state = {name: self.memory[place] for place, name in enumerate(start)}

    # -- a step, in the order of its calls -----------------------------------------------------------
    def zero_grad(self) -> None:
        """Start a step: no gradients, and buffers kept as they are now."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.buffers:
            self.kept = [buffer.clone() for buffer in self.buffers]

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss * self.state["scale"].float() if self.scaled else loss

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Apply the accumulated gradients, or nothing at all where they or the loss are not finite.

        Args:
            loss: the step's unscaled loss, scalar.

        Returns:
            float32 ``[len(REPORT) + parameters]`` on the device: the columns of ``REPORT``, then
            the L2 norm of each parameter's gradient, unscaled and before clipping.
        """
        found = self.think(loss, *self.measure())
        self._apply(found)
        self._follow(found)
        self.memory.copy_(found.memory)
        return torch.cat([found.report, found.norms])

    def compile(self) -> None:
        """Make one kernel of the many small operations of a judgement."""
        self.think = torch.compile(self.decide, dynamic=False)
        self.update_average = torch.compile(_update_average, dynamic=False)

    def uncompile(self) -> None:
        self.think, self.update_average = self.decide, _update_average

    def measure(self) -> tuple[Tensor, Tensor]:
        """L2 norm and largest magnitude of each parameter's gradient as it stands (still scaled), float32 ``[parameters]``."""
        return measured(self.parameters)

    def decide(self, loss: Tensor, norms: Tensor, largest: Tensor) -> StepDecision:
        """What to do with a step; changes nothing.

        Args:
            loss: scalar, unscaled.
            norms, largest: from :meth:`measure`.
        """
        state = dict(zip(self.state, self.memory.unbind()))
        scale, frozen, armed = state["scale"].float(), state["updates_suspended"] != 0, state["capture_enabled"] != 0
        damaged = state["damaged"] != 0
        norms, largest = unscaled(norms.double(), largest.double(), scale, self.root_sizes)
        total = norms.square().sum().sqrt()

        loss_spike, loss_statistics = self._spike(state, "loss", loss)
        norm_spike, norm_statistics = self._spike(state, "norm", total)
        longest = torch.full_like(total, self.grad_clip)
        if self.on_spike == "clip":
            usual = torch.minimum(longest, state["norm_center"].exp())
            longest = torch.where(loss_spike | norm_spike, usual, longest)
        divisor = (scale / (longest / total.clamp(min=1e-12)).clamp(max=1.0)).float()
        # A gradient can be finite and yet too large to be measured or clipped in float32: dividing by infinity
        # would turn it into zeros, and infinity times zero into NaN in every weight.
        bad_loss = ~torch.isfinite(loss)
        bad_grad = ~(torch.isfinite(largest).all() & torch.isfinite(total.float()) & torch.isfinite(divisor))
        slow = torch.where(state["applied"] < state["lr_factor_until"], state["lr_factor"], 1.0).float()
        lr = self.schedule(state["applied"]) * slow
        bad = bad_loss | bad_grad | ~torch.isfinite(lr)
        spike = (loss_spike | norm_spike) & ~bad
        skip = bad | frozen | damaged
        if self.on_spike == "skip":
            skip = skip | spike

        froze = armed & bad & ~frozen & ~damaged
        if self.scaled:  # float16 that overflows is how its scale is found; where good steps left room it is no overflow
            room = (state["good_in_a_row"] > 0) & (state["headroom_peak"] * HEADROOM <= FLOAT16_MAX)
            searching = ~room & (state["skips_in_a_row"] < ORDINARY_OVERFLOWS)
            froze = froze & ~(bad_grad & ~bad_loss & (scale > self.scale_floor) & searching)
        flags = (bad_loss, bad_grad, skip & ~frozen, loss_spike & ~bad, norm_spike & ~bad, froze, frozen, damaged)
        report = torch.stack([x.float() for x in (loss, total, largest.amax(), lr, scale, *flags)])

        new = {"applied": state["applied"] + 1, "seen": state["seen"] + 1, **loss_statistics, **norm_statistics}
        new = {name: torch.where(skip, state[name], value) for name, value in new.items()}
        new |= {"skipped": state["skipped"] + skip.double(), "skips_in_a_row": torch.where(skip, state["skips_in_a_row"] + 1, 0.0)}
        if self.scaled:
            new |= self._rescaled(state, skip, overflow=bad_grad & ~bad_loss, largest=(report[2] * scale).double())
        # A frozen guard stands still: the host will come back to the step after the one that froze it.
        new = {name: torch.where(frozen, state[name], value) for name, value in new.items()}
        new["updates_suspended"] = (frozen | froze).double()
        memory = torch.stack([new.get(name, value) for name, value in state.items()])
        # As many steps as there were so far are averaged, up to what the decay means: the first ones know nothing yet.
        applied = state["applied"]
        share = torch.where(skip, 0.0, 1.0 - ((1.0 + applied) / (10.0 + applied)).clamp(max=self.ema_decay)).float()
        return StepDecision(skip, divisor, lr, share, report, norms.float(), memory)

    # -- the state as a whole ------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step may change but the guard's own memory, by name: weights, buffers, average, moments."""
        found = {f"model.{name}": value for name, value in self.model.state_dict(keep_vars=True).items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.state_dict(keep_vars=True).items()}
        for name, parameter in zip(self.names, self.parameters):  # the optimizer makes its state in its first step
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)}
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def _largest(self) -> tuple[list[str], Tensor]:
        """Names of all that a step may change, and the largest magnitude in each, float64."""
        tensors = {name: x for name, x in self.tensors().items() if x.is_floating_point() and x.numel()}
        alike: dict[tuple, list[str]] = {}  # one kernel takes one type on one device: plain optimizers count steps on the CPU
        for name, x in tensors.items():
            alike.setdefault((x.dtype, x.device), []).append(name)
        norms = [torch.stack(torch._foreach_norm([tensors[name] for name in names], math.inf)) for names in alike.values()]
        names = [name for some in alike.values() for name in some] + [f"guard.{name}" for name in self.state]
        return names, torch.cat([*(x.to(self.memory) for x in norms), self.memory.abs()])

    def check_state(self) -> None:
        """Suspend all updates if anything that a step may change is not finite; the next report says so. No host-device
        synchronisation."""
        self.state["damaged"].copy_(~torch.isfinite(self._largest()[1]).all())

    def damage(self) -> list[str]:
        """Names of what is not finite now; waits for the device."""
        names, largest = self._largest()
        return [name for name, good in zip(names, torch.isfinite(largest).tolist()) if not good]

    def resume_updates(self, *, capture_enabled: bool) -> None:
        """Go on after an incident, ready to freeze at the next one or not."""
        self.state["updates_suspended"].fill_(0)
        self.state["capture_enabled"].fill_(int(capture_enabled))

    def slow_down(self, factor: float, steps: int) -> None:
        """Multiply the learning rate by ``factor`` for the next ``steps`` applied steps."""
        self.state["lr_factor"].fill_(factor)
        self.state["lr_factor_until"].copy_(self.state["applied"] + steps)

    # -- its parts -----------------------------------------------------------------------------------
    def _apply(self, found: StepDecision) -> None:
        """The optimizer's step, where the judgement allows one."""
        if self.fused:
            for group in self.optimizer.param_groups:
                group["lr"].copy_(found.lr)
            # The fused step divides by grad_scale, so unscaling and clipping cost no pass of their own.
            self.optimizer.grad_scale = torch.where(found.skip, 1.0, found.divisor)
            self.optimizer.found_inf = found.skip.to(torch.float32)
            self.optimizer.step()
            return
        if bool(found.skip):  # the one read of the host in a step, where the optimizer cannot skip by itself
            return
        grads = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(grads, found.divisor)
        for group in self.optimizer.param_groups:
            group["lr"] = float(found.lr)
        self.optimizer.step()

    def _follow(self, found: StepDecision) -> None:
        """Moving average of the weights and buffers; a skipped step changes neither."""
        for buffer, kept in zip(self.buffers, self.kept):
            buffer.copy_(torch.where(found.skip, kept, buffer))
        for weights, averages in self.blocks:
            self.update_average(averages, weights, found.share.to(weights.dtype), found.skip)

    def _spike(self, state: dict[str, Tensor], name: str, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Whether loss or gradient norm stands out, and its statistics with it taken in."""
        center, spread, seen = state[f"{name}_center"], state[f"{name}_spread"], state["seen"]
        sigma = spread * math.sqrt(math.pi / 2)  # of a normal distribution with that mean absolute deviation
        limit = torch.where(seen < EARLY_STEPS, math.log(EARLY_SPIKE), (self.spike_sigma * sigma).clamp(math.log(LEAST_SPIKE), math.log(MOST_SPIKE)))
        limit = torch.where(seen == 0, math.inf, limit)
        off = value.double().clamp(min=torch.finfo(torch.float32).tiny).log() - center
        moved = torch.maximum(torch.minimum(off, limit), -limit)
        weight = (1.0 / (seen + 1)).clamp(min=1.0 / WINDOW)
        widened = spread + (1.0 / seen.clamp(min=1)).clamp(min=1.0 / WINDOW) * (moved.abs() - spread)
        return off > limit, {f"{name}_center": center + weight * moved, f"{name}_spread": torch.where(seen == 0, spread, widened)}

    def _rescaled(self, state: dict[str, Tensor], skip: Tensor, *, overflow: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """The loss scale's next value: back before float16 overflows, and up only where there is room.

        An overflow halves it, down to the floor; a bad loss is no overflow. It also halves when the
        largest scaled gradient has come within ``HEADROOM`` of float16's largest number: waiting for the
        overflow would cost a step. It doubles after ``growth_interval`` good steps, if the largest
        gradient of those steps leaves room for it.
        """
        good = torch.where(skip, torch.where(overflow, 0.0, state["good_in_a_row"]), state["good_in_a_row"] + 1)
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

    # -- kept and taken up again -----------------------------------------------------------------------
    def state_dict(self) -> dict:
        optimizer = self.optimizer.state_dict()
        # The rate follows from the schedule; what stands in the groups was made for the last step.
        groups = [{**group, "lr": float(self.schedule.lr)} for group in optimizer["param_groups"]]
        return {"state": dict(self.state), "optimizer": {**optimizer, "param_groups": groups}}

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved["state"].items():
            if name in self.state:
                self.state[name].copy_(value)
        self.state["damaged"].fill_(0)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        # How it steps is this device's affair, not that of the one it was saved on.
        ways = [{name: group[name] for name in ("capturable", "fused", "foreach") if name in group} for group in self.optimizer.param_groups]
        groups = [{**group, **way} for group, way in zip(saved["optimizer"]["param_groups"], ways)]
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        for group, rate in zip(self.optimizer.param_groups, rates):
            if isinstance(rate, Tensor):  # the very tensor that the fused kernel reads
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))


def _update_average(average: Tensor, weights: Tensor, share: Tensor, skip: Tensor) -> None:
    """Move ``average`` by ``share`` towards ``weights``; a share of 0 would not do for a skip, 0 times NaN is NaN."""
    average.copy_(torch.where(skip, average, average.lerp(weights, share)))


def _persistent_buffers(module: nn.Module) -> list[Tensor]:
    """Buffers that a checkpoint holds: state. The others are constants."""
    held = module.state_dict(keep_vars=True)
    return [buffer for name, buffer in module.named_buffers() if name in held]


def measured(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L2 norm and largest magnitude of each parameter's gradient as it stands, float32 ``[parameters]``."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    return tuple(torch.stack(torch._foreach_norm(grads, kind)).float() for kind in (2, math.inf))


def unscaled(norms: Tensor, largest: Tensor, scale: Tensor | float, root_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the gradients without their loss scale; ``root_sizes`` are the roots of their numbers of elements."""
    norms, largest = norms / scale, largest / scale
    # Squares of finite gradients above 1e19 overflow float32: the norm is then bounded by the largest element, in float64.
    return torch.where(torch.isfinite(norms), norms, largest * root_sizes), largest
