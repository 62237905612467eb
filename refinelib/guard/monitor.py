"""Watches the steps' reports: readable events, and whether the loss has diverged."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.measure import compare_with_past

#: Gradient norms above the first are noted, above the second warned of.
HIGH_NORM, UNSTABLE_NORM = 50.0, 100.0
#: A loss component is unusual at so many times its mean and so many standard deviations (of logarithms) above
#: it.
UNUSUAL_FACTOR, UNUSUAL_SIGMA = 5.0, 6.0
#: Steps before a component can be unusual, and steps that its mean looks back.
UNUSUAL_AFTER, UNUSUAL_WINDOW = 30, 200
#: Steps whose reports travel together on CUDA. The host learns of a step after at most twice as many.
BUNDLE = 16
#: Samples of a batch that an event names, at most.
NAMED_SAMPLES = 16


class Row(NamedTuple):
    """One step's report on the host.

    Attributes:
        step: its number, from 1.
        epoch: from 1.
        components: float64 ``[losses]``, before their weights.
        report: by the names in :data:`~refinelib.guard.guard.REPORT`.
        norms: float64 ``[parameters]``, gradient norms.
        stop: whether a rank was asked to stop; of several processes only.
        bad_ranks: those whose own gradient or loss was not finite or too large; of several processes only.
    """

    step: int
    epoch: int
    components: np.ndarray[Any, Any]
    report: dict[str, float]
    norms: np.ndarray[Any, Any]
    stop: bool = False
    bad_ranks: tuple[int, ...] = ()


class Reports:
    """Reads the steps' reports back from the device, late and in bundles.

    Args:
        losses: number of the loss components that lead each report.
        parameters: number of the gradient norms that end it.
    """

    def __init__(self, losses: int, parameters: int) -> None:
        self.cuts = np.cumsum([losses, len(REPORT), parameters, 1])
        self.pending: list[tuple[Tensor, tuple[int, int]]] = []  # reports on the device; step and epoch
        self.travelling: tuple[Tensor, Any, tuple[Any, ...]] | None = None

    def add(self, report: Tensor, step: int, epoch: int = 0) -> None:
        """Take a step's report, which may still be computed on the device."""
        self.pending.append((report, (step, epoch)))

    def read(self, *, wait: bool) -> list[Row]:
        """The rows that have arrived; with ``wait`` all there are.

        On a CPU that is every step's at once. From CUDA they travel in bundles while the next one is
        computed, without host-device synchronisation.
        """
        at_once = wait or any(not report.is_cuda for report, _ in self.pending)
        if not at_once and len(self.pending) < BUNDLE:
            return []
        rows = self._arrived()
        if self.pending:
            reports, places = zip(*self.pending, strict=True)
            together = torch.stack(reports).to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if reports[0].is_cuda else None
            self.travelling, self.pending = (together, event, places), []
        return rows + self._arrived() if at_once else rows

    def _arrived(self) -> list[Row]:
        if self.travelling is None:
            return []
        (reports, event, places), self.travelling = self.travelling, None
        if event is not None:
            event.synchronize()
        return [*map(self._row, places, reports.numpy().astype(np.float64))]

    def _row(self, place: tuple[int, int], values: np.ndarray[Any, Any]) -> Row:
        components, report, norms, stop, bad = np.split(values, self.cuts)
        told = bool(stop.any()), tuple(np.flatnonzero(bad).tolist())  # nothing where one process trains
        return Row(*place, components, dict(zip(REPORT, report.tolist(), strict=True)), norms, *told)

    def forget(self) -> None:
        """Drop what has not been read yet: steps that are taken again."""
        self.pending, self.travelling = [], None


class StepMonitor:
    """Reports an event the first time something happens, and once an epoch how often it came again.

    Args:
        event: called with the event's kind, a sentence, and fields (``step``, ``epoch``, ...).
        guard: which makes the reports.
        losses: names of the loss components.
        caps: values at which loss components are held, by name.
    """

    def __init__(
        self, event: Callable[..., object], guard: Guard, *, losses: Sequence[str], caps: Mapping[str, float]
    ) -> None:
        self.event, self.guard, self.losses, self.caps = event, guard, losses, caps
        self.floor = guard.scale_floor if guard.scaled else -math.inf
        #: Describes the samples in a step's batch, as plain values; set by the training loop.
        self.batch_instances: Callable[[int], list[dict[str, Any]]] = lambda step: []
        #: First step, last step, count and largest value of each kind of event in this epoch.
        self.seen: dict[tuple[str, str], tuple[int, int, int, float]] = {}
        self.center, self.spread = torch.zeros(2, len(losses), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def update(self, row: Row) -> None:
        """Take in one step."""
        report = row.report
        if report["skipped"] and (report["bad_loss"] or report["bad_grad"]):
            self._skip(row)
            return
        self._gradient(row)
        if report["loss_scale"] <= self.floor:
            self._once(row, "scale_floor", "loss_scale", f"the loss scale is at its floor {self.floor:g}")
        times = (row.components / self.center.exp().numpy()).tolist()
        values, unusual = row.components.tolist(), self._unusual(row.components)
        for name, value, factor, bad in zip(self.losses, values, times, unusual, strict=True):
            if bad:
                text = f"the {name} loss is {value:.3g}, {factor:.3g} times its usual value"
                self._once(row, "unusual", name, text, value)
            if value >= 0.999 * self.caps.get(name, math.inf):
                self._once(row, "capped", name, f"the {name} loss is at its cap {self.caps[name]:g}", value)

    def end_epoch(self, epoch: int) -> None:
        """Report what came again since its first event, and start the next epoch."""
        for (kind, subject), (first, last, count, worst) in self.seen.items():
            if count > 1:
                text = f"epoch {epoch}: {kind} ({subject}) in {count} steps, {first} to {last}"
                text += f", at worst {worst:.3g}" if math.isfinite(worst) else ""
                self.event("again", text, step=last, epoch=epoch, first_step=first, count=count, of=kind)
        self.seen.clear()

    def _unusual(self, components: np.ndarray[Any, Any]) -> list[bool]:
        """Which components are far above their past; takes them in."""
        values = torch.from_numpy(components).double().clamp(min=1e-12).log()
        # 1.2533: a normal distribution's standard deviation over its mean absolute deviation
        limit = (UNUSUAL_SIGMA * 1.2533 * self.spread).clamp(min=math.log(UNUSUAL_FACTOR))
        past = self.center, self.spread, self.count
        compared = compare_with_past(values, *past, limit=limit, window=UNUSUAL_WINDOW)
        unusual, self.center, self.spread = compared
        self.count = self.count + 1
        return (unusual & (self.count > UNUSUAL_AFTER)).tolist()

    def _skip(self, row: Row) -> None:
        report = row.report
        terms = [name for name, x in zip(self.losses, row.components, strict=True) if not math.isfinite(x)]
        bad = [name for name, x in zip(self.guard.names, row.norms, strict=True) if not math.isfinite(x)]
        subject = "the loss" if report["bad_loss"] else "the gradient"
        text = f"skipped: {subject} was not finite"
        if not report["bad_loss"] and math.isfinite(report["grad_max"]):
            text = f"skipped: {subject} was finite but too large to clip in float32"
            text += f" (largest element {report['grad_max']:.3g})"
        if terms:
            subject += f" of {', '.join(terms)}"
            text += f" (terms: {', '.join(terms)})"
        if bad:
            text += f" in {len(bad)} of {len(row.norms)} parameters, first {bad[0]}"
            if report["loss_scale"] <= self.floor and not report["bad_loss"]:
                # The module nearest the loss; those before it only inherit.
                text += f", with the loss scale at its floor {self.floor:g}: "
                text += f"float16 overflows in {bad[-1].partition('.')[0]} by itself"
        more: dict[str, Any] = {"terms": terms, "parameters": bad[:8], "loss_scale": report["loss_scale"]}
        if row.bad_ranks:
            text += f"; on rank {', '.join(map(str, row.bad_ranks))}"
            more["ranks"] = list(row.bad_ranks)
        self._once(row, "skip", subject, text, **more)

    def _gradient(self, row: Row) -> None:
        """Spikes of loss and gradient norm, and gradient norms that are high in themselves."""
        report, norm = row.report, row.report["grad_norm"]
        largest = self.guard.names[int(row.norms.argmax())]
        ways = {"clip": "clipped to the usual norm", "note": "applied as it is"}
        skipped = bool(report["skipped"])
        done = "skipped" if skipped else ways.get(self.guard.on_spike, "")
        if report["spike_loss"]:
            text = f"the loss {report['loss']:.3g} is far above its past; {done}"
            self._once(row, "spike", "loss", text, report["loss"], skipped=skipped)
        if report["spike_grad"]:
            text = f"the gradient norm {norm:.3g} is far above its past, most of it in {largest}; {done}"
            self._once(row, "spike", "gradient", text, norm, parameter=largest, skipped=skipped)
        if norm > HIGH_NORM:
            kind, limit = ("unstable", UNSTABLE_NORM) if norm > UNSTABLE_NORM else ("high", HIGH_NORM)
            text = f"gradient norm {norm:.3g} is {kind} (above {limit:g}), most of it in {largest}"
            self._once(row, kind, "gradient", text, norm)

    def _once(self, row: Row, kind: str, what: str, text: str, size: float = math.nan, **fields: Any) -> None:
        first, _, count, worst = self.seen.get((kind, what), (row.step, row.step, 0, size))
        self.seen[kind, what] = first, row.step, count + 1, max(worst, size)
        if count == 0:
            if kind in ("skip", "unusual"):  # the record calls the samples people
                fields["people"] = self.batch_instances(row.step)[:NAMED_SAMPLES]
            text = f"step {row.step}{'' if kind == 'skip' else ':'} {text}"
            self.event(kind, text, step=row.step, epoch=row.epoch, **fields)


# -- divergence --------------------------------------------------------------------------------------
#: Applied steps whose losses are judged together, and between two judgements.
WINDOW, STRIDE = 64, 16
#: The loss has diverged when the median of a window, or of its last ``STRIDE`` losses, is above the reference
#: by this factor ...
WINDOW_FACTOR, STRIDE_FACTOR = 1.3, 2.5
#: ... and by this many standard errors of such a median. A window is healthy at half of that.
SIGMA = 6.0
#: Windows that make the reference: the median of their medians, the lowest so far.
REFERENCE = 3
#: Before the first whole window the loss has diverged when the median of the last ``STRIDE`` losses is above
#: the very first by the first factor and so many standard deviations of them, and all but the lowest of them
#: by the second factor.
EARLY_FACTOR, EARLY_LEAST, EARLY_SIGMA = 3.0, 2.0, 1.5
#: Once a loss was 0 or less, a rise by a factor counts as this many mean magnitudes of the loss times the
#: factor: a loss that swings around 0 rises by 3 of them in each swing.
SIGNED = 3.0


class LossMonitor:
    """Tells from the losses of applied steps whether training is healthy, and whether it has diverged.

    Medians of logarithms are compared: one outlier moves them little, and a rise is a factor whatever the
    loss's scale. Once a loss was 0 or less, differences are compared with the mean magnitude of the losses up
    to then, or of a later healthy window where that is larger.
    The standard error of a median of ``n`` is ``1.2533 sigma / sqrt(n)`` (normal distribution); sigma comes
    from the median absolute deviation.
    """

    def __init__(self) -> None:
        self.first: float | None = None  # loss of the very first step, before any update
        self.window: list[float] = []
        self.since = 0  # losses since the last judgement
        self.medians: list[float] = []  # of the last healthy windows that do not overlap
        self.fresh = 0  # losses since the last of these
        #: The level that losses are compared with, and the standard deviation of one loss.
        self.lowest: list[float] | None = None
        self.size: float | None = None  # magnitude of a loss that has been 0 or less

    def add(self, loss: float) -> tuple[bool, str | None]:
        """Take in the loss of an applied step.

        Returns:
            Whether the last ``WINDOW`` losses were judged just now and are healthy; why training has
            diverged, if it has.
        """
        self.first = loss if self.first is None else self.first
        self.window = [*self.window, loss][-WINDOW:]
        if loss <= 0 and self.size is None:  # what was learnt of logarithms is of no use any more
            self.size = statistics.fmean(map(abs, [self.first, *self.window])) or 1.0
            self.lowest, self.medians, self.fresh = None, [], 0
        self.since, self.fresh = self.since + 1, self.fresh + 1
        if self.since < STRIDE:
            return False, None
        self.since = 0
        return self.judge()

    def level(self, loss: float) -> float:
        """Where a loss lies on the scale of comparison."""
        least = 1e-12 * (self.first or 1.0)  # numerically none of the first loss is left
        return math.log(max(loss, least)) if self.size is None else loss

    def loss(self, level: float) -> float:
        """The loss that lies there."""
        return math.exp(level) if self.size is None else level

    def above(self, factor: float) -> float:
        """The distance on that scale to so many times a loss."""
        return math.log(factor) if self.size is None else SIGNED * factor * self.size

    def judge(self) -> tuple[bool, str | None]:
        """Judge the losses there are; see :meth:`add`."""
        window = [self.level(loss) for loss in self.window]
        recent, whole = window[-STRIDE:], len(window) == WINDOW
        if self.lowest is None:
            assert self.first is not None
            start, median = self.level(self.first), statistics.median(recent)
            self._enlarge(self.window[: max(STRIDE, len(window) - STRIDE)])
            apart = median - start > EARLY_SIGMA * _spread(recent)
            apart = apart and sorted(recent)[1] - start > self.above(EARLY_LEAST)
            if apart and median - start > self.above(EARLY_FACTOR):
                return False, self._too_high(recent, start, "what it began with")
            if whole:
                self._refer(window)
            return whole and (statistics.median(window) <= start or self.size is not None), None
        healthy = whole
        for losses, factor in ((recent, STRIDE_FACTOR), (window, WINDOW_FACTOR))[: 1 + whole]:
            rise, limit = self._rise(losses, factor)
            if rise > limit:
                return False, self._too_high(losses, self.lowest[0], "its best")
            healthy = healthy and rise <= limit / 2
        if healthy:
            self._enlarge(self.window)
            if self.fresh >= WINDOW:
                self._refer(window)
        return healthy, None

    def _enlarge(self, losses: list[float]) -> None:
        """Take in the magnitude of healthy losses, where they may have any sign."""
        if self.size is not None and losses:
            self.size = max(self.size, statistics.fmean(map(abs, losses)))

    def judge_end(self) -> str | None:
        """Why a run that is over has diverged, if it has; judges its last losses, however few are new."""
        window = [self.level(loss) for loss in self.window]
        for losses in (window[-STRIDE // 4 :], window[-STRIDE:]):
            if self.lowest is not None and len(losses) >= STRIDE // 4:
                rise, limit = self._rise(losses, WINDOW_FACTOR)
                if rise > limit:
                    return self._too_high(losses, self.lowest[0], "its best")
        return None

    def _rise(self, losses: list[float], factor: float) -> tuple[float, float]:
        """How far the median of some losses is above the reference, and how far it may be."""
        assert self.lowest is not None
        center, spread = self.lowest
        error = SIGMA * 1.2533 * spread / math.sqrt(len(losses))
        return statistics.median(losses) - center, max(self.above(factor), error)

    def _refer(self, window: list[float]) -> None:
        """Take the levels of a healthy window into the reference."""
        self.medians, self.fresh = [*self.medians, statistics.median(window)][-REFERENCE:], 0
        center = statistics.median(self.medians)
        if self.lowest is None or center < self.lowest[0]:
            self.lowest = [center, _spread(window)]

    def _too_high(self, losses: list[float], reference: float, what: str) -> str:
        now, then = self.loss(statistics.median(losses)), self.loss(reference)
        return f"the loss stays at {now:.3g}, above {what} ({then:.3g})"

    def first_and_last(self) -> tuple[float, float]:
        """The loss at the start, and now.

        Now is the median of the last window, or the reference where a rewind has emptied it.
        """
        assert self.first is not None
        if self.window or not self.medians:
            return self.first, statistics.median(self.window or [self.first])
        return self.first, self.loss(statistics.median(self.medians))

    def restart(self, saved: dict[str, Any]) -> None:
        """Go on from the reference of an earlier state, with no losses yet."""
        first = self.first
        self.load_state_dict(saved)
        self.first, self.window, self.since, self.fresh = self.first or first, [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What it knows, as plain values."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; from the one of another version start afresh."""
        if saved.keys() == vars(self).keys():
            vars(self).update(copy.deepcopy(saved))


def _spread(values: list[float]) -> float:
    """Standard deviation by the median absolute deviation, for a normal distribution."""
    median = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - median) for value in values)
