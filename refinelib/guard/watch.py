"""Turns what steps report into few, readable events: skips, spikes, high gradients, a scale at its floor, losses out of their range or at their cap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

from refinelib.runs import Run

#: Gradient norms above the first are noted, above the second warned of.
HIGH_NORM, UNSTABLE_NORM = 50.0, 100.0
#: A loss component is out of its range at so many times its usual value, and so many of its own deviations (of logarithms) above it.
UNUSUAL_FACTOR, UNUSUAL_SIGMA = 5.0, 6.0
#: Steps that make a usual value, and steps it looks back.
UNUSUAL_AFTER, UNUSUAL_WINDOW = 30, 200


@dataclass
class _Seen:
    """One kind of event since it was last written down."""

    first: int
    last: int
    count: int
    worst: float


class _Range:
    """Running mean and mean absolute deviation of a component's logarithm; a value out of range moves them no further than the range's edge."""

    def __init__(self) -> None:
        self.center, self.spread, self.count = 0.0, 0.0, 0

    def unusual(self, value: float) -> bool:
        """Whether ``value`` is far above what came before; takes it in."""
        log = math.log(max(value, 1e-12))
        limit = max(math.log(UNUSUAL_FACTOR), UNUSUAL_SIGMA * 1.2533 * self.spread)
        off = log - self.center if self.count else 0.0
        moved = min(max(off, -limit), limit)
        self.count += 1
        weight = max(1 / self.count, 1 / UNUSUAL_WINDOW)
        self.center = log if self.count == 1 else self.center + weight * moved
        self.spread += weight * (abs(moved) - self.spread)
        return self.count > UNUSUAL_AFTER and off > limit


class StepMonitor:
    """Writes an event the first time something happens, and once an epoch how often it came again.

    Args:
        run: whose ``events.jsonl`` is written.
        losses: names of the loss components.
        parameters: names of the parameters.
        cap: value at which refinement losses are held; none: no cap.
        scale_floor: least loss scale; none: no scale is in use.
        on_spike: what the guard does with a spike, see :class:`~refinelib.guard.guard.Guard`.
    """

    def __init__(self, run: Run, *, losses: Sequence[str], parameters: Sequence[str], cap: float | None, scale_floor: float | None, on_spike: str = "note") -> None:
        self.run, self.losses, self.parameters, self.cap, self.scale_floor = run, losses, parameters, cap, scale_floor
        self.on_spike = on_spike
        self.usual = {name: _Range() for name in losses}
        #: Who was in a step's batch, as plain values; set by whoever knows.
        self.batch_instances: Callable[[int], list[dict[str, Any]]] = lambda step: []
        self.seen: dict[tuple[str, str], _Seen] = {}

    def step(self, step: int, epoch: int, report: Mapping[str, float], components: Sequence[float], norms: Sequence[float]) -> None:
        """Judge one step: its report by column, its loss components, its per-parameter gradient norms."""
        if report["skipped"] and (report["bad_loss"] or report["bad_grad"]):
            self._skip(step, epoch, report, components, norms)
            return
        self._spike(step, epoch, report, norms)
        norm = report["grad_norm"]
        if norm > HIGH_NORM:
            kind, word = ("unstable", "unstable") if norm > UNSTABLE_NORM else ("high", "high")
            largest = max(range(len(norms)), key=norms.__getitem__)
            self._once(
                kind, "gradient", step, epoch, norm,
                f"step {step}: gradient norm {norm:.3g} is {word} (above {UNSTABLE_NORM if kind == 'unstable' else HIGH_NORM:g}), most of it in {self.parameters[largest]}",
            )  # fmt: skip
        if self.scale_floor is not None and report["loss_scale"] <= self.scale_floor:
            self._once("scale_floor", "loss_scale", step, epoch, norm, f"step {step}: the loss scale is at its floor {self.scale_floor:g}")
        for name, value in zip(self.losses, components):
            center = self.usual[name].center
            if self.usual[name].unusual(value):
                self._once(
                    "unusual", name, step, epoch, value,
                    f"step {step}: the {name} loss is {value:.3g}, {value / math.exp(center):.3g} times its usual value", **self._people(step),
                )  # fmt: skip
            if self.cap is not None and name not in ("ce", "dice") and value >= 0.999 * self.cap:
                self._once("capped", name, step, epoch, value, f"step {step}: the {name} loss is at its cap {self.cap:g}")

    def end_epoch(self, epoch: int) -> None:
        """Write down what came again since it was first told, and start afresh."""
        for (kind, subject), seen in self.seen.items():
            if seen.count > 1:
                worst = f", at worst {seen.worst:.3g}" if math.isfinite(seen.worst) else ""
                self.run.event(
                    "again", f"epoch {epoch}: {kind} ({subject}) in {seen.count} steps, {seen.first} to {seen.last}{worst}",
                    step=seen.last, epoch=epoch, first_step=seen.first, count=seen.count, of=kind,
                )  # fmt: skip
        self.seen.clear()

    def _skip(self, step: int, epoch: int, report: Mapping[str, float], components: Sequence[float], norms: Sequence[float]) -> None:
        terms = [name for name, value in zip(self.losses, components) if not math.isfinite(value)]
        bad = [name for name, norm in zip(self.parameters, norms) if not math.isfinite(norm)]
        what = "the loss" if report["bad_loss"] else "the gradient"
        wrong = "not finite"
        if not report["bad_loss"] and math.isfinite(report["grad_max"]):
            wrong = f"finite but too large to clip in float32 (largest element {report['grad_max']:.3g})"
        place = "".join(sorted({name.partition(".")[0] for name in bad}, key=[n.partition(".")[0] for n in self.parameters].index)[-1:])
        detail = f" (terms: {', '.join(terms)})" if terms else ""
        if bad:
            detail += f" in {len(bad)} of {len(norms)} parameters, first {bad[0]}"
        if self.scale_floor is not None and report["loss_scale"] <= self.scale_floor and not report["bad_loss"]:
            detail += f", with the loss scale at its floor {self.scale_floor:g}: float16 overflows in {place} by itself"
        self._once(
            "skip", f"{what}{' of ' + ', '.join(terms) if terms else ''}", step, epoch, math.nan,
            f"step {step} skipped: {what} was {wrong}{detail}",
            terms=terms, parameters=bad[:8], loss_scale=report["loss_scale"], **self._people(step),
        )  # fmt: skip

    def _people(self, step: int) -> dict[str, Any]:
        """Who was in the batch, for the record; of a large one the first."""
        return {"people": self.batch_instances(step)[:16]}

    def _spike(self, step: int, epoch: int, report: Mapping[str, float], norms: Sequence[float]) -> None:
        done = "skipped" if report["skipped"] else {"clip": "clipped to the usual norm", "note": "applied as it is"}.get(self.on_spike, "")
        if report["spike_loss"]:
            self._once("spike", "loss", step, epoch, report["loss"], f"step {step}: the loss {report['loss']:.3g} is far above its past; {done}", skipped=bool(report["skipped"]))
        if report["spike_grad"]:
            largest = self.parameters[max(range(len(norms)), key=norms.__getitem__)]
            self._once(
                "spike", "gradient", step, epoch, report["grad_norm"],
                f"step {step}: the gradient norm {report['grad_norm']:.3g} is far above its past, most of it in {largest}; {done}", parameter=largest, skipped=bool(report["skipped"]),
            )  # fmt: skip

    def _once(self, kind: str, subject: str, step: int, epoch: int, size: float, message: str, **fields: Any) -> None:
        seen = self.seen.get((kind, subject))
        if seen is None:
            self.seen[kind, subject] = _Seen(step, step, 1, size)
            self.run.event(kind, message, step=step, epoch=epoch, **fields)
        else:
            seen.last, seen.count = step, seen.count + 1
            seen.worst = max(seen.worst, size)
