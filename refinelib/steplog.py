"""Collects the steps' reports on the device and reads them back once every so many steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .guard import REPORT, Guard
from .losses import MaskLoss
from .probe import Probe
from .runs import Run
from .watch import Watch


class StepLog:
    """Turns reports into lines of ``metrics.jsonl`` and ``events.jsonl``.

    Args:
        run: where lines go.
        loss: whose components lead each report.
        guard: which makes the reports.
        every: steps between lines.
        probe: also takes the reports; none: nobody does.
    """

    def __init__(self, run: Run, loss: MaskLoss, guard: Guard, *, every: int, probe: Probe | None = None) -> None:
        self.run, self.names, self.every, self.probe = run, loss.names, every, probe
        floor = guard.scale_floor if guard.scaled else None
        self.watch = Watch(run, losses=loss.names, parameters=guard.names, cap=loss.cap, scale_floor=floor)
        self.pending: list[tuple[Tensor, int, int]] = []
        self.epoch_rows: list[np.ndarray] = []
        self.skipped = 0
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave what happened since the last line (validation, checkpoints) out of the next line's speed."""
        self.started = time.perf_counter()

    def add(self, report: Tensor, step: int, epoch: int) -> None:
        self.pending.append((report, step, epoch))
        if len(self.pending) >= self.every or step == 1:
            self.flush()

    def flush(self) -> None:
        """Read the pending reports, write one line of them and one event for each that was skipped."""
        if not self.pending:
            return
        rows = torch.stack([report for report, _, _ in self.pending]).cpu().numpy().astype(np.float64)
        components, columns = rows[:, : len(self.names)], dict(zip(REPORT, rows[:, len(self.names) :].T))
        first_norm = len(self.names) + len(REPORT)
        for (_, step, epoch), row in zip(self.pending, rows.tolist()):
            report = dict(zip(REPORT, row[len(self.names) : first_norm]))
            self.watch.step(step, epoch, report, row[: len(self.names)], row[first_norm:])
        self.skipped += int(columns["skipped"].sum())
        good = columns["skipped"] == 0
        _, step, epoch = self.pending[-1]
        self.run.metrics(
            {
                "kind": "step",
                "step": step,
                "epoch": epoch,
                "loss": _mean(columns["loss"], good),
                "losses": {name: _mean(components[:, i], good) for i, name in enumerate(self.names)},
                "grad_norm": _mean(columns["grad_norm"], good),
                "grad_norm_max": float(columns["grad_norm"][good].max()) if good.any() else float(columns["grad_norm"][-1]),
                "lr": float(columns["lr"][-1]),
                "loss_scale": float(columns["loss_scale"][-1]),
                "skipped": self.skipped,
                "steps_per_second": round(len(self.pending) / (time.perf_counter() - self.started), 3),
            }
        )
        self.started = time.perf_counter()
        self.epoch_rows.append(rows[:, : len(self.names) + len(REPORT)])
        if self.probe is not None:
            self.probe.add([step for _, step, _ in self.pending], rows)
        self.pending = []

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Means over the epoch's applied steps; the gradient norm's median."""
        self.flush()
        self.watch.end_epoch(epoch)
        rows = np.concatenate(self.epoch_rows)
        self.epoch_rows = []
        columns = dict(zip(REPORT, rows[:, len(self.names) :].T))
        good = columns["skipped"] == 0
        return {
            "train_loss": _mean(columns["loss"], good),
            "losses": {name: _mean(rows[:, i], good) for i, name in enumerate(self.names)},
            "grad_norm": float(statistics.median(columns["grad_norm"][good])) if good.any() else float("nan"),
            "grad_norm_max": float(columns["grad_norm"][good].max()) if good.any() else float("nan"),
            "lr": float(columns["lr"][-1]),
            "loss_scale": float(columns["loss_scale"][-1]),
            "skipped": int(columns["skipped"].sum()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's means so far are made of; the pending reports are read back for it."""
        self.flush()
        rows = np.concatenate(self.epoch_rows) if self.epoch_rows else np.zeros((0, len(self.names) + len(REPORT)))
        return {"rows": torch.from_numpy(rows), "skipped": self.skipped}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.epoch_rows, self.skipped = [saved["rows"].numpy()], saved["skipped"]


def _mean(values: np.ndarray, good: np.ndarray) -> float:
    return float(values[good].mean()) if good.any() else float(values[-1])
