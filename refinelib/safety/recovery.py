"""When skipping is not enough: back to the last good state, past the data that hurt, more slowly; a few times, then stop.

A *snapshot* is everything a step moves. It is taken every so many steps and counts as *good* once enough clean steps
have followed it: a state that was about to go wrong when it was taken is no place to go back to.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from refinelib.safety.guard import Guard
from refinelib.steplog import Row

#: Steps between snapshots, and clean steps after one before it is good.
SNAPSHOT_EVERY, CLEAN_STEPS = 50, 20
#: The loss is lost when its median over this many steps is this many times the lowest such median before ...
LOSS_WINDOW, LOSS_FACTOR = 64, 2.0
#: ... and this many of its own deviations above it.
LOSS_SIGMA = 6.0
#: Applied steps with a lower learning rate after a rewind: half at the first, a quarter at the second, and so on.
SLOW_STEPS = 200


class DivergedError(RuntimeError):
    """The run went back to its last good state as often as it may and did not recover; the message says what to try."""


class Snapshot:
    """A copy, on the device, of everything that a step moves; made once, then written over.

    Args:
        model: parameters and buffers.
        guard: its optimizer's state, the moving average and its own state.
    """

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self.model, self.guard = model, guard
        self.step = 0
        self.copies: list[Tensor] = []

    def _live(self) -> list[Tensor]:
        kept = [*self.model.state_dict(keep_vars=True).values(), *self.guard.averages, self.guard.memory]
        # The optimizer makes its state in its first step.
        moments = [
            value
            for parameter in self.guard.parameters
            for _, value in sorted(self.guard.optimizer.state.get(parameter, {}).items())
            if isinstance(value, Tensor)
        ]
        return [tensor.detach() for tensor in (*kept, *moments)]

    @torch.no_grad()
    def take(self, step: int) -> "Snapshot":
        """Copy the state after step number ``step``."""
        live = self._live()
        if len(self.copies) != len(live):
            self.copies = [torch.empty_like(tensor) for tensor in live]
        for kind in {tensor.dtype for tensor in live}:  # one kernel for hundreds of tensors takes one type at a time
            pairs = [(copy, tensor) for copy, tensor in zip(self.copies, live) if tensor.dtype == kind]
            torch._foreach_copy_(*map(list, zip(*pairs)))
        self.step = step
        return self

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the live state what it was; moments that did not exist then are 0, as they would have been."""
        live = self._live()
        for tensor, copy in zip(live, self.copies):
            tensor.copy_(copy)
        for tensor in live[len(self.copies) :]:
            tensor.zero_()


class Recovery:
    """Decides from the rows when a run is lost, and takes it back.

    Args:
        model, guard: of the run.
        max_consecutive_skips: skips in a row that make a run lost.
        max_rewinds: how often it may go back.
    """

    def __init__(self, model: nn.Module, guard: Guard, *, max_consecutive_skips: int, max_rewinds: int) -> None:
        self.guard = guard
        self.max_consecutive_skips, self.max_rewinds = max_consecutive_skips, max_rewinds
        self.good, self.candidate = Snapshot(model, guard), Snapshot(model, guard)
        self.waiting = False  # whether the candidate has yet to prove itself
        self.clean = 0
        self.skips, self.rewinds = 0, 0
        self.window: list[float] = []  # log losses of the last applied steps
        self.lowest: tuple[float, float] | None = None  # least median so far, with its spread
        self.reasons: list[str] = []

    def start(self, step: int) -> None:
        """The state that the run starts or resumes with is the first to go back to."""
        self.good.take(step)
        self.waiting = False

    def offer(self, step: int) -> None:
        """After each step: take a snapshot, if it is time for one."""
        if not self.waiting and step - max(self.good.step, self.candidate.step) >= SNAPSHOT_EVERY:
            self.candidate.take(step)
            self.waiting, self.clean = True, 0

    def spoilt(self) -> None:
        """Something went wrong around the candidate: it is not promoted."""
        self.waiting = False

    def look(self, row: Row) -> str | None:
        """Take in one row, in order; why the run is lost, if it is."""
        skipped = bool(row.report["skipped"])
        clean = not skipped and not row.report["spike_loss"] and not row.report["spike_grad"]
        if self.waiting and row.step > self.candidate.step:
            self.clean += 1
            if not clean:
                self.spoilt()
            elif self.clean >= CLEAN_STEPS:
                self.good, self.candidate, self.waiting = self.candidate, self.good, False
        self.skips = self.skips + 1 if skipped else 0
        if self.skips >= self.max_consecutive_skips:
            return f"{self.skips} steps in a row were skipped"
        return None if skipped else self._lost(row.report["loss"])

    def _lost(self, loss: float) -> str | None:
        self.window.append(math.log(max(loss, 1e-12)))
        if len(self.window) < LOSS_WINDOW:
            return None
        median = statistics.median(self.window)
        spread = statistics.median(abs(value - median) for value in self.window)
        self.window = self.window[LOSS_WINDOW // 2 :]  # judged every half window
        if self.lowest is None or median < self.lowest[0]:
            self.lowest = median, spread
        before, usual = self.lowest
        if median - before > max(math.log(LOSS_FACTOR), LOSS_SIGMA * 1.4826 * usual):
            return f"the loss stays at {math.exp(median):.3g}, {math.exp(median - before):.2g} times its best ({math.exp(before):.3g})"
        return None

    def rewind(self, reason: str, step: int) -> str:
        """Go back to the last good state; the data goes on from where it is. What was done, in a sentence.

        Raises:
            DivergedError: it went back as often as it may.
        """
        self.reasons.append(f"step {step}: {reason}")
        if self.rewinds >= self.max_rewinds:
            raise DivergedError(self._paragraph())
        self.rewinds += 1
        skipped, armed = self.guard.state["skipped"].clone(), self.guard.state["armed"].clone()
        self.good.put_back()
        self.guard.state["skipped"].copy_(skipped)  # a count of the run, not of the state
        self.guard.thaw(armed=bool(armed))
        factor = 0.5**self.rewinds
        self.guard.slow_down(factor, SLOW_STEPS)
        self.skips, self.window, self.waiting = 0, [], False
        return (
            f"step {step}: {reason}; went back to the state after step {self.good.step}, goes on with the data after step {step} "
            f"and {factor:g} of the learning rate for {SLOW_STEPS} steps (rewind {self.rewinds} of {self.max_rewinds})"
        )

    def _paragraph(self) -> str:
        return (
            f"diverged: {self.reasons[-1]}, after {self.rewinds} rewinds ({'; '.join(self.reasons[:-1]) or 'none was allowed'}). "
            "checkpoints/best.pt, where an epoch was validated, is what it was at its best. The folders in incidents/ hold the batches that hurt: "
            "`python -m refinelib replay INCIDENT` names the module, the loss term and the people. Then try a tenth of the learning "
            "rate, or the recipe `rescue`; if the skips were spikes, on_spike = clip; if the loss scale was at its floor, amp = bf16; if one loss term is named, its weight at 0"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rewinds": self.rewinds, "skips": self.skips, "window": list(self.window),
            "lowest": list(self.lowest) if self.lowest else None, "reasons": list(self.reasons),
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.rewinds, self.skips = saved["rewinds"], saved["skips"]
        self.window, self.reasons = list(saved["window"]), list(saved["reasons"])
        self.lowest = tuple(saved["lowest"]) if saved["lowest"] else None
