"""When skipping is not enough: restore an earlier state; a few times, then stop.

A *snapshot* holds everything a step may change. It is *stable* once a whole window of losses after it was judged healthy.
Several generations are kept, and each rewind that follows another without a stable snapshot between them goes further back.

A rewind for a loss that stays high, or for a state that is not finite, takes the same steps again: a fault that does not
come again has then changed nothing. Where it does come again, and after too many skips in a row, the rewind goes on with the
data after the trouble, at a lower learning rate.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Callable, Iterable, NamedTuple

import torch
from torch import Tensor

from refinelib.guard.oom import ran_out
from refinelib.guard.guard import Guard
from refinelib.steplog import Row

#: Steps between snapshots, at least; between the newest one and a checkpoint, at least.
SNAPSHOT_EVERY, CHECKPOINT_AFTER = 50, 16
#: Stable snapshots kept, and the age in steps from which the second oldest takes the place of the oldest.
GENERATIONS, OLD = 3, 400
#: Applied steps whose losses are judged together, and between two judgements.
WINDOW, STRIDE = 64, 16
#: The loss has diverged when the median of a window, or of its last ``STRIDE`` losses, is above the reference by this factor ...
WINDOW_FACTOR, STRIDE_FACTOR = 1.3, 2.5
#: ... and by this many standard errors of such a median. A window is healthy at half of that.
SIGMA = 6.0
#: A jump: a window's median above that of the window before it, by this factor and so many standard errors of the difference.
#: It is no more than a reason to take the steps again once: training itself may jump.
JUMP_FACTOR, JUMP_SIGMA = 1.1, 5.0
#: Windows that make the reference: the median of their medians, the lowest so far.
REFERENCE = 3
#: Before the first whole window the loss has diverged when the median of the last ``STRIDE`` losses is above the very first
#: by the first factor and so many standard deviations of them, and all but the lowest of them by the second factor.
EARLY_FACTOR, EARLY_LEAST, EARLY_SIGMA = 3.0, 2.0, 1.5
#: Applied steps with a lower learning rate after a rewind past the data: half at the first, a quarter at the second, and so on.
SLOW_STEPS = 200
#: What a rewind leaves alone: counts of the run, and the loss scale, which an older state knows nothing of.
_NOT_RESTORED = ("skipped", "scale", "headroom_peak", "good_in_a_row", "capture_enabled")


class DivergedError(RuntimeError):
    """The run could not be saved by skipping and rewinding; the message says what happened and what to try."""


class Reference(NamedTuple):
    """The level that losses are compared with, in natural logarithms."""

    center: float
    spread: float  # standard deviation of one loss


class LossMonitor:
    """Tells from the losses of applied steps whether training is healthy, and whether it has diverged.

    Medians of logarithms are compared: one outlier moves them little, and a rise is a factor whatever the loss's scale.
    The standard error of a median of ``n`` is ``1.2533 sigma / sqrt(n)`` (normal distribution); sigma comes from the
    median absolute deviation.
    """

    def __init__(self) -> None:
        self.first: float | None = None  # loss of the very first step, before any update
        self.window: list[float] = []
        self.since = 0  # losses since the last judgement
        self.medians: list[float] = []  # of the last healthy windows that do not overlap
        self.fresh = 0  # losses since the last of these
        self.lowest: Reference | None = None

    def jump(self) -> str | None:
        """Whether the last window lies well above the window before it."""
        before, after = self.window[-2 * WINDOW : -WINDOW], self.window[-WINDOW:]
        if self.since or len(before) < WINDOW or self.lowest is None:
            return None
        median, level = statistics.median(after), statistics.median(before)
        # The median before is as uncertain as the one after: half the losses for the same standard error.
        if median - level <= self._limit(WINDOW / 2, JUMP_FACTOR, JUMP_SIGMA):
            return None
        return _too_high(median, level, "what it was before")

    def _limit(self, count: float, factor: float, sigma: float = SIGMA) -> float:
        """By how much the median of so many losses may lie above the reference, in natural logarithms."""
        return max(math.log(factor), sigma * 1.2533 * self.lowest.spread / math.sqrt(count))

    def add(self, loss: float) -> tuple[bool, str | None]:
        """Take in the loss of an applied step.

        Returns:
            whether the last ``WINDOW`` losses were judged just now and are healthy; why training has diverged, if it has.
        """
        log = math.log(max(loss, 1e-12))
        self.first = log if self.first is None else self.first
        self.window = [*self.window, log][-2 * WINDOW :]
        self.since, self.fresh = self.since + 1, self.fresh + 1
        if self.since < STRIDE:
            return False, None
        self.since = 0
        return self.judge()

    def judge(self) -> tuple[bool, str | None]:
        """Judge the losses there are; see :meth:`add`."""
        recent, window = self.window[-STRIDE:], self.window[-WINDOW:]
        whole = len(window) == WINDOW
        if self.lowest is None:
            start, median = self.first, statistics.median(recent)
            apart = median - start > EARLY_SIGMA * _spread(recent) and sorted(recent)[1] - start > math.log(EARLY_LEAST)
            if apart and median - start > math.log(EARLY_FACTOR):
                return False, _too_high(median, start, "what it began with")
            if whole:
                self._refer()
            return whole and statistics.median(window) <= start, None
        healthy = whole
        for losses, factor in ((recent, STRIDE_FACTOR), (window, WINDOW_FACTOR))[: 1 + whole]:
            median, limit = statistics.median(losses), self._limit(len(losses), factor)
            if median - self.lowest.center > limit:
                return False, _too_high(median, self.lowest.center, "its best")
            healthy = healthy and median - self.lowest.center <= limit / 2
        if healthy and self.fresh >= WINDOW:
            self._refer()
        return healthy, None

    def judge_end(self) -> str | None:
        """Why a run that is over has diverged, if it has: its last losses are judged, however few came since the last judgement."""
        for losses in (self.window[-STRIDE // 4 :], self.window[-STRIDE:]):
            if self.lowest is not None and len(losses) >= STRIDE // 4:
                median = statistics.median(losses)
                if median - self.lowest.center > self._limit(len(losses), WINDOW_FACTOR):
                    return _too_high(median, self.lowest.center, "its best")
        return None

    def _refer(self) -> None:
        """Take a healthy window into the reference."""
        window = self.window[-WINDOW:]
        median = statistics.median(window)
        self.medians, self.fresh = [*self.medians, median][-REFERENCE:], 0
        center = statistics.median(self.medians)
        if self.lowest is None or center < self.lowest.center:
            self.lowest = Reference(center, _spread(window))

    def first_and_last(self) -> tuple[float, float]:
        """The loss at the start, and now: the median of the last window, or the reference where a rewind has emptied it."""
        last = self.window[-WINDOW:] or self.medians or [self.first]
        return math.exp(self.first), math.exp(statistics.median(last))

    def restart(self, saved: dict[str, Any]) -> None:
        """Go on from the reference of an earlier state, with no losses yet."""
        first = self.first
        self.load_state_dict(saved)
        self.first, self.window, self.since, self.fresh = saved["first"] or first, [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        lowest = None if self.lowest is None else list(self.lowest)
        return {
            "first": self.first, "window": list(self.window), "since": self.since, "fresh": self.fresh,
            "medians": list(self.medians), "lowest": lowest,
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.first, self.window, self.medians = saved["first"], list(saved["window"]), list(saved["medians"])
        self.since, self.fresh = saved["since"], saved["fresh"]
        self.lowest = None if saved["lowest"] is None else Reference(*saved["lowest"])


class Snapshot:
    """A copy, on the device, of everything that a step may change. Never written to after it was taken.

    Args:
        step: number of the last step before it.
        tensors, memory: of the guard, see :meth:`~refinelib.guard.guard.Guard.tensors`.
        host: what the host knew of the steps up to it; none while their reports are still on the device.
    """

    def __init__(self, step: int, tensors: dict[str, Tensor], memory: Tensor, host: dict[str, Any] | None = None) -> None:
        self.step, self.tensors, self.memory, self.host = step, tensors, memory, host
        self.stable = False
        self.used = False  # whether a rewind went here

    @classmethod
    @torch.no_grad()
    def take(cls, step: int, guard: Guard) -> "Snapshot":
        """Copy the state after step number ``step``."""
        live = guard.tensors()
        copies = {name: torch.empty_like(tensor) for name, tensor in live.items()}
        for kind in {tensor.dtype for tensor in live.values()}:  # one kernel for hundreds of tensors takes one type at a time
            names = [name for name, tensor in live.items() if tensor.dtype == kind]
            torch._foreach_copy_([copies[name] for name in names], [live[name] for name in names])
        return cls(step, copies, guard.memory.clone())

    @torch.no_grad()
    def restore(self, guard: Guard) -> None:
        """Give the guard's model, average and optimizer this state; moments that did not exist then become 0."""
        for name, tensor in guard.tensors().items():
            if name in self.tensors:
                tensor.copy_(self.tensors[name])
            else:
                tensor.zero_()
        guard.memory.copy_(self.memory)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tensors": self.tensors, "memory": self.memory, "host": self.host}


class Rewinder:
    """Decides from the rows when a run has diverged, and restores an earlier state.

    Args:
        guard: of the run.
        max_consecutive_skips: skips in a row that are too many. Overflows above the floor of the loss scale do not count:
            the scale halves at each, so there can be only so many.
        max_rewinds: how often the run may go back.
        log: gives what the run's log knows of the steps whose rows were seen; kept with each snapshot.
    """

    def __init__(
        self, guard: Guard, *, max_consecutive_skips: int, max_rewinds: int, log: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self.guard, self.log = guard, log
        self.max_consecutive_skips, self.max_rewinds = max_consecutive_skips, max_rewinds
        self.snapshots: list[Snapshot] = []  # the oldest first; only the last may be not stable
        self.monitor = LossMonitor()
        self.steps: list[int] = []  # of the losses in the window
        self.target = 0  # step of the snapshot that the last rewind went to
        self.known = 0  # up to this step trouble is no longer new: a rewind there does not take the same steps again
        self.seen = 0  # number of the last step whose row was seen
        self.skips, self.rewinds, self.slowed = 0, 0, 0
        self.reasons: list[str] = []

    # -- snapshots -----------------------------------------------------------------------------------
    def start(self, step: int) -> None:
        """The state that the run starts with, or resumes with where its snapshots are lost, is the first to go back to.

        Raises:
            DivergedError: it is not finite.
        """
        self.seen = step
        if self.guard.damage():
            raise DivergedError(diverged(f"the run would start with what is not finite: {self.damage()}"))
        if not self.snapshots:
            self._take(step)
            self.snapshots[0].stable = True

    def maybe_snapshot(self, step: int, *, after: int = SNAPSHOT_EVERY) -> None:
        """Take a snapshot if the newest is stable and ``after`` steps old, and look whether the state is finite."""
        newest = self.snapshots[-1]
        if newest.stable and step - newest.step >= after:
            self.guard.check_state()
            try:
                self._take(step)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                del self.snapshots[:-1]  # the newest stable one is worth more than another

    def _take(self, step: int) -> None:
        self.snapshots.append(Snapshot.take(step, self.guard))
        if self.seen == step:
            self._complete()

    def _complete(self) -> None:
        """Add what the host knows, now that the rows up to the newest snapshot were seen."""
        self.snapshots[-1].host = {
            "monitor": self.monitor.state_dict(), "steps": list(self.steps), "skips": self.skips, "log": self.log(),
        }  # fmt: skip

    def _promote(self, before: int) -> None:
        """The newest snapshot becomes stable if it was taken before the healthy window; then keep so many generations."""
        newest = self.snapshots[-1]
        if newest.stable or newest.step > before:
            return
        newest.stable = True
        if len(self.snapshots) > GENERATIONS:
            del self.snapshots[0 if newest.step - self.snapshots[1].step >= OLD else -2]

    # -- rows ----------------------------------------------------------------------------------------
    def update(self, row: Row) -> str | None:
        """Take in one row, in order, which the log has; why the run has to go back, if it has to."""
        reason = self._judge(row)
        self.seen = row.step
        if self.snapshots and self.snapshots[-1].step == row.step:
            self._complete()
        return reason

    def _judge(self, row: Row) -> str | None:
        report = row.report
        if report["damaged"]:
            return self.damage()
        if report["updates_suspended"]:  # the rows after an incident are never seen
            return "updates were suspended though no incident was under way"
        if report["skipped"]:
            overflow = report["bad_grad"] and not report["bad_loss"]
            searching = self.guard.scaled and overflow and report["loss_scale"] > self.guard.scale_floor
            self.skips += not searching
            if self.skips >= self.max_consecutive_skips:
                return f"{self.skips} steps in a row were skipped"
            return None
        self.skips = 0
        self.steps = [*self.steps, row.step][-WINDOW:]
        healthy, reason = self.monitor.add(report["loss"])
        jump = self.monitor.jump() if row.step > self.known and reason is None else None
        if healthy and jump is None:
            self._promote(self.steps[0] - 1)
        return reason or jump

    def damage(self) -> str:
        """What is wrong with a state that is not finite."""
        names = self.guard.damage()
        return f"{len(names)} of {len(self.guard.tensors())} tensors of the training state are not finite, first {', '.join(names[:1])}"

    def rewind(self, reason: str, step: int) -> tuple[str, Snapshot | None]:
        """Restore an earlier state.

        Args:
            reason: why.
            step: number of the last step taken.

        Returns:
            what was done, in a sentence; the snapshot whose steps are to be taken again, none where the data goes on.

        Raises:
            DivergedError: it went back as often as it may, or there is no finite state to go back to.
        """
        self.reasons.append(f"step {step}: {reason}")
        if self.rewinds >= self.max_rewinds:
            raise DivergedError(self._paragraph())
        self.rewinds += 1
        skipping = self.skips >= self.max_consecutive_skips
        now = {name: float(self.guard.state[name]) for name in (*_NOT_RESTORED, "applied")}
        if step <= self.known:  # the same trouble: further back than the last time
            while len(self.snapshots) > 1 and self.snapshots[-1].step >= self.target:
                self.snapshots.pop()
        snapshot = self._restore(step - self.skips if skipping else 0)
        again = step > self.known and not skipping and snapshot.host is not None
        self.known, self.target, snapshot.used = step + WINDOW, snapshot.step, True
        went = f"step {step}: {reason}; restored the state after step {snapshot.step}"
        which = f"(rewind {self.rewinds} of {self.max_rewinds})"
        if again:
            self.monitor.load_state_dict(snapshot.host["monitor"])
            self.steps, self.skips, self.seen = list(snapshot.host["steps"]), snapshot.host["skips"], snapshot.step
            return f"{went}, takes the steps after it again: a fault that does not come again has changed nothing {which}", snapshot
        self._go_past(now)
        self.monitor.restart(snapshot.host["monitor"] if snapshot.host else self.monitor.state_dict())
        self.skips, self.steps = 0, []
        factor = 0.5**self.slowed
        return f"{went}, goes on with the data after step {step} and {factor:g} of the learning rate for {SLOW_STEPS} steps {which}", None

    def _go_past(self, now: dict[str, float]) -> None:
        """Keep the run's own counts, go on with its schedule, more slowly."""
        state = self.guard.state
        if int(state["applied"]) < self.guard.schedule.warmup_steps:
            del now["applied"]  # a warm-up is done again; elsewhere the schedule ends where the data does
        for name, value in now.items():
            if math.isfinite(value):
                state[name].fill_(value)
        self.slowed += 1
        self.guard.slow_down(0.5**self.slowed, SLOW_STEPS)

    def _restore(self, before: int) -> Snapshot:
        """Restore the newest snapshot to be trusted; an older one where a rewind went there before and no later one became stable.

        Args:
            before: one that is not stable will do if it is of before this step: the losses up to there were not bad.

        Raises:
            DivergedError: none of them is finite.
        """
        while len(self.snapshots) > 1 and (self.snapshots[-1].used or not (self.snapshots[-1].stable or self.snapshots[-1].step < before)):
            self.snapshots.pop()
        while self.snapshots:
            self.snapshots[-1].restore(self.guard)
            self.guard.state["damaged"].fill_(0)
            self.guard.state["updates_suspended"].fill_(0)
            if not self.guard.damage():
                return self.snapshots[-1]
            self.snapshots.pop()
        raise DivergedError(diverged(f"{self.reasons[-1]}, and no state to go back to is finite"))

    def _paragraph(self) -> str:
        return diverged(f"{self.reasons[-1]}, after {self.rewinds} rewinds ({'; '.join(self.reasons[:-1]) or 'none was allowed'})")

    # -- kept in a checkpoint --------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All but the snapshots' tensors, which have files of their own."""
        return {
            "rewinds": self.rewinds, "slowed": self.slowed, "known": self.known, "target": self.target,
            "skips": self.skips, "seen": self.seen, "steps": list(self.steps), "reasons": list(self.reasons),
            "monitor": self.monitor.state_dict(), "snapshots": [[s.step, s.stable, s.used] for s in self.snapshots],
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any], snapshots: Iterable[Snapshot]) -> None:
        """Take up what :meth:`state_dict` gave, with those of its snapshots that could be read."""
        self.rewinds, self.skips, self.reasons = saved["rewinds"], saved["skips"], list(saved["reasons"])
        if "monitor" in saved:  # checkpoints of before 2026-11-27 have other statistics: they start afresh
            self.monitor.load_state_dict(saved["monitor"])
            self.steps, self.seen = list(saved["steps"]), saved["seen"]
            self.slowed, self.known, self.target = saved["slowed"], saved["known"], saved["target"]
        flags = {step: (stable, used) for step, stable, used in saved.get("snapshots", [])}
        self.snapshots = list(snapshots)
        for snapshot in self.snapshots:
            snapshot.stable, snapshot.used = flags[snapshot.step]


def diverged(what: str) -> str:
    """What happened, and what to try."""
    return (
        f"diverged: {what}. "
        "checkpoints/best.pt, where an epoch was validated, is what it was at its best. The folders in incidents/ hold the batches that hurt: "
        "`python -m refinelib replay INCIDENT` names the module, the loss term and the people. Then try a tenth of the learning "
        "rate, or the recipe `rescue`; if the skips were spikes, on_spike = clip; if the loss scale was at its floor, amp = bf16; if one loss term is named, its weight at 0"
    )


def _spread(values: list[float]) -> float:
    """Standard deviation by the median absolute deviation, for a normal distribution."""
    median = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - median) for value in values)


def _too_high(median: float, reference: float, what: str) -> str:
    rise = math.exp(median - reference)
    return f"the loss stays at {math.exp(median):.3g}, {rise:.2g} times {what} ({math.exp(reference):.3g})"
