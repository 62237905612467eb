"""The gate between two phases of training: finite, no worse than before, loss falling. Read from the run's folder."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from refinelib.runs import Run

#: Largest share of a phase's steps that the guard may have skipped.
SKIPPED_SHARE = 0.05
#: Noise of the loss, as a share of it, above which a phase is too short to tell whether its loss falls.
TOO_NOISY = 0.05
SCORES = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU"}


class Decision(NamedTuple):
    """One question asked at a gate, and the answer."""

    name: str
    passed: bool
    sentence: str


def judge(run: Run, before: dict[str, Any] | None, *, margin: float) -> list[Decision]:
    """The three decisions about a phase that has run.

    Args:
        run: of the phase.
        before: ``target_iou`` and ``boundary_iou`` of what it started from; none: it started from scratch.
        margin: by how much either may be lower afterwards.
    """
    return [finite(run), no_worse(run.status().get("best"), before, margin=margin), falling(run, scratch=before is None)]


def finite(run: Run) -> Decision:
    """The run ended well, its losses and every weight of its checkpoints are finite, and few steps were skipped."""
    from refinelib import checkpoints  # torch, which a wrong parameter should not have to wait for

    def say(passed: bool, sentence: str) -> Decision:
        return Decision("finite", passed, sentence)

    status = run.status()
    if status["state"] != "ok":
        return say(False, f"the run is {status['state']}: {status.get('last_error') or 'no reason is on record'}")
    skipped, steps = status["skipped_steps"], status["step"]
    if skipped > SKIPPED_SHARE * steps:
        return say(False, f"{skipped} of {steps} steps were skipped, more than {SKIPPED_SHARE:.0%}: events.jsonl says what was not finite")
    lost = [line["epoch"] for line in run.epochs() if line["train_loss"] is None]
    if lost:
        return say(False, f"the loss of epoch {lost[0]} is not finite")
    for file in sorted((run.folder / "checkpoints").glob("*.pt")):
        saved = checkpoints.load(file)
        for part in ("model", "average"):
            bad = [name for name, value in (saved[part] or {}).items() if not bool(value.isfinite().all())]
            if bad:
                return say(False, f"{len(bad)} weights in {file.name} are not finite, first {bad[0]}")
    return say(True, f"every loss and weight is; {skipped} of {steps} steps were skipped")


def no_worse(after: dict[str, Any] | None, before: dict[str, Any] | None, *, margin: float) -> Decision:
    """Each score of the best epoch is at most ``margin`` below what came before."""
    lost, told = [], []
    for key, name in SCORES.items():
        old, new = (scores.get(key) if scores else None for scores in (before, after))
        if new is None:
            lost.append(name)
            told.append(f"{name} was never measured")
        elif old is None:
            told.append(f"{name} {new:.3f}")
        else:
            told.append(f"{name} {old:.3f} to {new:.3f}")
            if new < old - margin:
                lost.append(name)
    told = ", ".join(told)
    if lost:
        return Decision("no worse than before", False, f"{told}: {' and '.join(lost)} fell by more than {margin:g}")
    if before is None:
        return Decision("no worse than before", True, f"nothing came before; {told}")
    return Decision("no worse than before", True, f"{told} (at most {margin:g} lower)")


def falling(run: Run, *, scratch: bool) -> Decision:
    """The loss at the end against the loss at the start, and both against its noise.

    Start and end are the first and last quarter of the recorded windows of steps. Noise is three standard
    errors of their difference. A rise above the noise is refused. A loss that stands still within it is refused
    from scratch, where it means that nothing is learned, unless the noise is above ``TOO_NOISY``; a phase that starts from
    trained weights may stand still.
    """
    recorded = [line["loss"] for line in run.steps()]
    losses = [loss for loss in recorded if loss is not None]

    def say(passed: bool, sentence: str) -> Decision:
        return Decision("loss falling", passed, sentence)

    if len(losses) < len(recorded) / 2:
        return say(False, f"{len(recorded) - len(losses)} of {len(recorded)} recorded losses are not finite")
    if len(losses) < 4:
        return say(not scratch, f"only {len(losses)} losses are on record, too few to tell: set log_every lower or epochs higher")
    quarter = max(2, len(losses) // 4)
    start, end = losses[:quarter], losses[-quarter:]
    first, last = statistics.fmean(start), statistics.fmean(end)
    noise = 3 * math.sqrt((statistics.variance(start) + statistics.variance(end)) / quarter)
    told = f"{first:.3f} to {last:.3f}, noise {noise:.3f}"
    if last > first + noise:
        return say(False, f"the loss rose, {told}: try a smaller lr")
    if last < first - noise:
        return say(True, f"the loss fell, {told}")
    if noise > TOO_NOISY * first:
        return say(True, f"{told}: too few steps to tell, and no rise")
    if scratch:
        return say(False, f"the loss stands still, {told}: nothing is learned; try more epochs or a larger lr, and notebooks/debug.ipynb")
    return say(True, f"the loss stands still, {told}, as it may from trained weights")
