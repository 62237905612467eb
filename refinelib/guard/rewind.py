"""When skipping is not enough: restore an earlier state; a few times, then stop.

A *snapshot* holds everything a step may change. It is *stable* once a whole window of losses after it was
healthy. Several are kept, and each rewind that follows another without a stable snapshot between them goes
further back.

After a loss that stays high, or a damaged state (not finite, or weights that moved further than the learning
rates allow), the same steps are repeated: a fault that does not recur has then changed nothing.
Where it does recur, and after too many skips in a row, training continues with the data after the
trouble, at a lower learning rate.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refinelib.guard.guard import Guard
from refinelib.guard.measure import ran_out
from refinelib.guard.monitor import WINDOW, LossMonitor, Reports, Row
from refinelib.guard.optimizer import PlainState

#: Steps between snapshots, at least; between the newest one and a checkpoint, at least.
SNAPSHOT_EVERY, CHECKPOINT_AFTER = 50, 16
#: Stable snapshots kept, and the age in steps from which the second oldest takes the place of the oldest.
GENERATIONS, OLD = 3, 400
#: Applied steps with a lower learning rate after a rewind past the data: half at the first, a quarter at the
#: second, ...
SLOW_STEPS = 200
#: Gives what a run's log knows of the steps so far.
Log = Callable[[], dict[str, Any]]
#: What a rewind leaves alone: counts of the run, and the loss scale, which an older state knows nothing of.
_NOT_RESTORED = ("skipped", "scale", "headroom_peak", "good_in_a_row", "capture_enabled")
#: What of a rewinder a checkpoint holds as it is.
_KEPT = ("rewinds", "slowed", "known", "target", "skips", "seen", "steps", "reasons")


class DivergedError(RuntimeError):
    """Skipping and rewinding did not help; the message says what happened and what to try."""


@dataclass(eq=False)
class Snapshot:
    """A copy, on the device, of everything that a step may change. Never written to after it was taken.

    Attributes:
        step: number of the last step before it.
        tensors: see :meth:`~refinelib.guard.guard.Guard.tensors`.
        memory: of the guard.
        host: what the host knew of the steps up to it; none while their reports are still on the device.
        plain: of the optimizer and the scheduler; none: not known.
        stable: whether a healthy window of losses followed it.
        used: whether a rewind went here.
    """

    step: int
    tensors: dict[str, Tensor]
    memory: Tensor
    host: dict[str, Any] | None = None
    plain: PlainState | None = None
    stable: bool = False
    used: bool = False

    @classmethod
    @torch.no_grad()
    def take(cls, step: int, guard: Guard) -> "Snapshot":
        """Copy the state after step number ``step``."""
        tensors = {name: x.clone() for name, x in guard.tensors().items()}
        return cls(step, tensors, guard.memory.clone(), plain=PlainState(guard.optimizer, guard.scheduler))

    @torch.no_grad()
    def restore(self, guard: Guard) -> None:
        """Give the guard's model, average and optimizer this state, but for rates and a scheduler's place.

        Moments that did not exist are removed; those of Adam become 0.
        """
        if self.plain is not None:
            self.plain.restore(guard.optimizer)
        for name, tensor in guard.tensors().items():
            if name in self.tensors:
                tensor.copy_(self.tensors[name])
            elif name.startswith("optimizer."):
                tensor.zero_()
        guard.memory.copy_(self.memory)

    def state_dict(self) -> dict[str, Any]:
        """What a file keeps of it."""
        return {"step": self.step, "tensors": self.tensors, "memory": self.memory, "host": self.host}


class Rewinder:
    """Decides from the steps' reports when a run has diverged, and restores an earlier state.

    A loop gives it every report (:meth:`update`), and the state goes back where that is needed; the loop goes
    on with its next batch. A loop that can take the same steps again reads the reports by itself
    (:meth:`see`, :meth:`maybe_snapshot`, :meth:`rewind`).

    Where the data goes on, the schedule goes on too: a scheduler keeps its place, and the groups their rates,
    momentum and betas; the lower learning rate is a factor on top. Where steps are repeated, all of these go
    back with them.

    A loop that changes weights of Adam or AdamW by itself (a critic's weight clipping, say) sets
    ``guard.reach = math.inf``, or such a change counts as damage.

    Args:
        guard: of the run.
        max_skips: skips in a row that are too many. Overflows above the floor of the loss scale
            do not count: the scale halves at each, so there can be only so many.
        max_rewinds: how often the run may go back.
        log: gives what the run's log knows of the steps whose rows were seen; kept with each snapshot.
        advice: what to try, for the message of :class:`DivergedError`.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> guard = Guard(model, torch.optim.Adam(model.parameters(), lr=0.1))
        >>> rewinder = Rewinder(guard, max_skips=3)
        >>> for x in [1.0] * 4 + [math.nan] * 3:
        ...     guard.zero_grad()
        ...     guard.backward(model(torch.tensor([[x]])).square().mean())
        ...     message = rewinder.update(guard.step())
        >>> message[:54]
        'step 7: 3 steps in a row were skipped; restored the st'
    """

    def __init__(
        self, guard: Guard, *, max_skips: int = 20, max_rewinds: int = 3, log: Log = dict, advice: str = ""
    ) -> None:
        self.guard, self.log, self.advice = guard, log, advice
        self.max_skips, self.max_rewinds = max_skips, max_rewinds
        self.reports, self.taken = Reports(0, len(guard.names)), 0  # of a loop that calls update
        self.snapshots: list[Snapshot] = []  # the oldest first; only the last may be not stable
        self.monitor = LossMonitor()
        self.steps: list[int] = []  # of the losses in the window
        self.target = 0  # step of the snapshot that the last rewind went to
        #: Up to this step trouble is not new: a rewind there does not take the same steps again.
        self.known = 0
        self.seen = 0  # number of the last step whose row was seen
        self.skips, self.rewinds, self.slowed = 0, 0, 0
        self.reasons: list[str] = []

    # -- snapshots -----------------------------------------------------------------------------------
    def start(self, step: int) -> None:
        """Begin after step number ``step``. Without snapshots, this state is the first to go back to.

        Raises:
            DivergedError: it is not finite.
        """
        self.seen = step
        if self.guard.damage():
            raise self._diverged(f"the run would start with what is not finite: {self.damage()}")
        if not self.snapshots:
            self._take(step)
            self.snapshots[0].stable = True

    def maybe_snapshot(self, step: int, *, after: int = SNAPSHOT_EVERY) -> None:
        """Take a snapshot if the newest is stable and ``after`` steps old.

        The state is checked then, and every ``WINDOW`` steps after the newest snapshot.
        """
        newest = self.snapshots[-1]
        age = step - newest.step
        due = newest.stable and age >= after
        if due or age % WINDOW == 0:
            self.check()
        if due:
            try:
                self._take(step)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                del self.snapshots[:-1]  # the newest stable one is worth more than another

    def check(self) -> None:
        """Have the guard check the state, and how far its weights are from the newest snapshot's."""
        newest = self.snapshots[-1]
        try:
            self.guard.check_state((newest.tensors, newest.memory))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            self.guard.check_state()  # the differences need as much memory as the weights

    def _take(self, step: int) -> None:
        self.snapshots.append(Snapshot.take(step, self.guard))
        if self.seen == step:
            self._complete()

    def _complete(self) -> None:
        """Add what the host knows, now that the rows up to the newest snapshot were seen."""
        host = {"monitor": self.monitor.state_dict(), "steps": list(self.steps), "skips": self.skips}
        self.snapshots[-1].host = {**host, "log": self.log()}

    def _promote(self, before: int) -> None:
        """The newest snapshot becomes stable if it was taken before the healthy window; older ones go."""
        newest = self.snapshots[-1]
        if newest.stable or newest.step > before:
            return
        newest.stable = True
        if len(self.snapshots) > GENERATIONS:
            del self.snapshots[0 if newest.step - self.snapshots[1].step >= OLD else -2]

    # -- reports -------------------------------------------------------------------------------------
    def update(self, report: Tensor) -> str | None:
        """Take in a step's report as :meth:`Guard.step` gave it; restore an earlier state if that is needed.

        Reports are read late and in bundles, without host-device synchronisation; snapshots are taken and the
        state is checked now and then. The first call's state is the first to go back to.

        Returns:
            What was done, in a sentence, where the state went back; none where it did not.

        Raises:
            DivergedError: it went back as often as it may.
        """
        self.taken += 1
        self.reports.add(report, self.taken)
        if not self.snapshots:
            self.start(self.taken)
        for row in self.reports.read(wait=False):
            reason = self.see(row)
            if reason is not None:
                self.reports.forget()
                return self.rewind(reason, self.taken, again=False)[0]
        self.maybe_snapshot(self.taken)
        return None

    def see(self, row: Row) -> str | None:
        """Take in one row, in order, which the log has; why the run has to go back, if it has to."""
        if row.report["incident"]:  # the steps after it are repeated
            self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.step <= row.step]
        reason = self._judge(row.step, row.report)
        self.seen = row.step
        if self.snapshots and self.snapshots[-1].step == row.step:
            self._complete()
        return reason

    def _judge(self, step: int, report: dict[str, float]) -> str | None:
        if report["damaged"]:
            return self.damage()
        if report["updates_suspended"]:  # the rows after an incident are never seen
            return "updates were suspended though no incident was under way"
        if report["skipped"]:
            overflow = report["bad_grad"] and not report["bad_loss"]
            searching = self.guard.scaled and overflow and report["loss_scale"] > self.guard.scale_floor
            self.skips += not searching
            too_many = self.skips >= self.max_skips
            return f"{self.skips} steps in a row were skipped" if too_many else None
        self.skips = 0
        self.steps = [*self.steps, step][-WINDOW:]
        healthy, reason = self.monitor.add(report["loss"])
        if healthy:
            self._promote(self.steps[0] - 1)
        return reason

    def damage(self) -> str:
        """What is wrong with a damaged state."""
        if names := self.guard.damage():
            what = f"{len(self.guard.tensors())} tensors of the training state are not finite"
        else:  # the newest snapshot may be the damaged state itself
            moved = (self.guard.moved((s.tensors, s.memory)) for s in reversed(self.snapshots))
            names = next(filter(None, moved), ["none"])
            what = f"{len(self.guard.names)} parameters moved further than the learning rates allow"
        return f"{len(names)} of {what}, first {names[0]}"

    def rewind(self, reason: str, step: int, *, again: bool = True) -> tuple[str, Snapshot | None]:
        """Restore an earlier state.

        Args:
            reason: why.
            step: number of the last step taken.
            again: whether the loop can take the same steps again.

        Returns:
            What was done, in a sentence; the snapshot after which steps are to be repeated, none where the
            data goes on.

        Raises:
            DivergedError: it went back as often as it may, or there is no finite state to go back to.
        """
        self.reasons.append(f"step {step}: {reason}")
        if self.rewinds >= self.max_rewinds:
            before = "; ".join(self.reasons[:-1]) or "none was allowed"
            raise self._diverged(f"{self.reasons[-1]}, after {self.rewinds} rewinds ({before})")
        self.rewinds += 1
        skipping = self.skips >= self.max_skips
        now = {name: float(self.guard.state[name]) for name in (*_NOT_RESTORED, "applied")}
        if step <= self.known:  # the same trouble: further back than the last time
            while len(self.snapshots) > 1 and self.snapshots[-1].step >= self.target:
                self.snapshots.pop()
        snapshot = self._restore(step - self.skips if skipping else 0)
        host = snapshot.host
        again = again and step > self.known and not skipping
        self.known, self.target, snapshot.used = step + WINDOW, snapshot.step, True
        went = f"step {step}: {reason}; restored the state after step {snapshot.step}"
        which = f"(rewind {self.rewinds} of {self.max_rewinds})"
        if again and host is not None:
            if snapshot.plain is not None:
                snapshot.plain.restore_schedule(self.guard.optimizer, self.guard.scheduler)
            self.monitor.load_state_dict(host["monitor"])
            self.steps, self.skips, self.seen = list(host["steps"]), host["skips"], snapshot.step
            then = "repeats the steps after it: a fault that does not recur has changed nothing"
            return f"{went}, {then} {which}", snapshot
        self._go_past(now)
        self.monitor.restart(host["monitor"] if host else self.monitor.state_dict())
        self.skips, self.steps = 0, []
        then = f"goes on with the data after step {step} and {0.5**self.slowed:g} of the learning rate"
        return f"{went}, {then} for {SLOW_STEPS} steps {which}", None

    def _go_past(self, now: dict[str, float]) -> None:
        """Keep the run's own counts and place in the schedule, at a lower rate."""
        state = self.guard.state
        if int(state["applied"]) < getattr(self.guard.schedule, "warmup_steps", 0):
            del now["applied"]  # a warm-up is done again; elsewhere the schedule ends where the data does
        for name, value in now.items():
            if math.isfinite(value):
                state[name].fill_(value)
        self.slowed += 1
        self.guard.slow_down(0.5**self.slowed, SLOW_STEPS)

    def _restore(self, before: int) -> Snapshot:
        """Restore the newest snapshot to be trusted.

        An older one where a rewind went there already and no later one became stable.

        Args:
            before: a snapshot that is not stable will do if it is of before this step: no loss up to there
                was bad.

        Raises:
            DivergedError: none of them is finite.
        """

        def trusted(snapshot: Snapshot) -> bool:
            return not snapshot.used and (snapshot.stable or snapshot.step < before)

        while len(self.snapshots) > 1 and not trusted(self.snapshots[-1]):
            self.snapshots.pop()
        while self.snapshots:
            self.snapshots[-1].restore(self.guard)
            for name in ("damaged", "updates_suspended"):
                self.guard.state[name].fill_(0)
            if not self.guard.damage():
                return self.snapshots[-1]
            self.snapshots.pop()
        raise self._diverged(f"{self.reasons[-1]}, and no state to go back to is finite")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(f"diverged: {what}. {self.advice}".strip())

    # -- kept in a checkpoint --------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All but the snapshots' tensors, which have files of their own."""
        own = {name: copy.copy(getattr(self, name)) for name in _KEPT}
        snapshots = [[s.step, s.stable, s.used] for s in self.snapshots]
        return {**own, "monitor": self.monitor.state_dict(), "snapshots": snapshots}

    def load_state_dict(self, saved: dict[str, Any], snapshots: Iterable[Snapshot]) -> None:
        """Continue from :meth:`state_dict`, with those of its snapshots that could be read."""
        vars(self).update({name: copy.copy(saved[name]) for name in _KEPT if name in saved})
        self.monitor.load_state_dict(saved.get("monitor", {}))
        flags = {step: (stable, used) for step, stable, used in saved.get("snapshots", [])}
        self.snapshots = list(snapshots)
        for snapshot in self.snapshots:
            snapshot.stable, snapshot.used = flags[snapshot.step]
