"""Reads the steps' reports back from the device, late and in bundles, and writes the log."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refinelib.guard.guard import REPORT, Guard
from refinelib.modeling.losses import MaskLoss
from refinelib.gradients.probe import Probe
from refinelib.runs import Run
from refinelib.guard.watch import StepMonitor

#: Steps whose reports travel together on CUDA. The host learns of a step after at most twice as many.
BUNDLE = 16


class Row(NamedTuple):
    """One step's report on the host."""

    step: int
    epoch: int
    components: np.ndarray  # float64 [losses], before their weights
    report: dict[str, float]  # by the names in REPORT
    norms: np.ndarray  # float64 [parameters]


class StepLog:
    """Turns reports into rows, and rows into lines of ``metrics.jsonl`` and ``events.jsonl``.

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
        self.monitor = StepMonitor(run, losses=loss.names, parameters=guard.names, cap=loss.cap, scale_floor=floor, on_spike=guard.on_spike)
        self.pending: list[tuple[Tensor, int, int]] = []  # reports on the device, step, epoch
        self.travelling: tuple[Tensor, Any, list[tuple[int, int]]] | None = None
        self.line_rows: list[Row] = []
        self.epoch_rows: list[np.ndarray] = []
        self.skipped = 0
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave what happened since the last line (validation, checkpoints) out of the next line's speed."""
        self.started = time.perf_counter()

    # -- from the device ---------------------------------------------------------------------------
    def add(self, report: Tensor, step: int, epoch: int) -> None:
        self.pending.append((report, step, epoch))

    def read(self, *, wait: bool) -> list[Row]:
        """The rows that have arrived; with ``wait`` all there are.

        On a CPU that is every step's at once. From CUDA they travel in bundles while the next one is computed, so
        that nothing ever waits for the device.
        """
        if not self.pending and self.travelling is None:
            return []
        if self.pending and self.pending[0][0].device.type == "cpu":
            rows = self._rows(torch.stack([report for report, _, _ in self.pending]), [key for _, *key in self.pending])
            self.pending = []
            return rows
        rows = []
        if wait or len(self.pending) >= BUNDLE:
            rows += self._arrived()
            if self.pending:
                there = torch.stack([report for report, _, _ in self.pending])
                here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
                here.copy_(there, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self.travelling = here, event, [key for _, *key in self.pending]
                self.pending = []
            if wait:
                rows += self._arrived()
        return rows

    def forget(self) -> None:
        """Drop what has not been read yet: steps that are taken again."""
        self.pending, self.travelling = [], None

    def _arrived(self) -> list[Row]:
        if self.travelling is None:
            return []
        here, event, keys = self.travelling
        event.synchronize()
        self.travelling = None
        return self._rows(here, keys)

    def _rows(self, reports: Tensor, keys: list) -> list[Row]:
        first, norms = len(self.names), len(self.names) + len(REPORT)
        values = reports.numpy().astype(np.float64)
        return [Row(*key, v[:first], dict(zip(REPORT, v[first:norms].tolist())), v[norms:]) for key, v in zip(keys, values)]

    # -- into the log ------------------------------------------------------------------------------
    def record(self, row: Row) -> None:
        """Take a row into the epoch's means, the events and, with enough of them, a line."""
        self.monitor.step(row.step, row.epoch, row.report, row.components.tolist(), row.norms.tolist())
        self.skipped += int(row.report["skipped"])
        self.line_rows.append(row)
        self.epoch_rows.append(np.concatenate([row.components, list(row.report.values())]))
        if len(self.line_rows) >= self.every or row.step == 1:
            self.write_line()

    def write_line(self) -> None:
        """One line of ``metrics.jsonl`` for the rows since the last one."""
        if not self.line_rows:
            return
        rows, self.line_rows = self.line_rows, []
        if self.probe is not None:
            self.probe.add([row.step for row in rows], np.stack([[*row.components, *row.report.values(), *row.norms] for row in rows]))
        columns = {name: np.array([row.report[name] for row in rows]) for name in REPORT}
        components = np.stack([row.components for row in rows])
        good = columns["skipped"] == 0
        self.run.metrics(
            {
                "kind": "step",
                "step": rows[-1].step,
                "epoch": rows[-1].epoch,
                "loss": _mean(columns["loss"], good),
                "losses": {name: _mean(components[:, i], good) for i, name in enumerate(self.names)},
                "grad_norm": _mean(columns["grad_norm"], good),
                "grad_norm_max": float(columns["grad_norm"][good].max()) if good.any() else float(columns["grad_norm"][-1]),
                "lr": float(columns["lr"][-1]),
                "loss_scale": float(columns["loss_scale"][-1]),
                "skipped": self.skipped,
                "steps_per_second": round(len(rows) / (time.perf_counter() - self.started), 3),
            }
        )
        self.started = time.perf_counter()

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Means over the epoch's applied steps; the gradient norm's median."""
        self.write_line()
        self.monitor.end_epoch(epoch)
        rows = np.stack(self.epoch_rows)
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
        """What the epoch's means so far are made of."""
        rows = np.stack(self.epoch_rows) if self.epoch_rows else np.zeros((0, len(self.names) + len(REPORT)))
        return {"rows": torch.from_numpy(rows), "skipped": self.skipped}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.epoch_rows, self.skipped = list(saved["rows"].numpy()), saved["skipped"]
        self.line_rows = []


def _mean(values: np.ndarray, good: np.ndarray) -> float:
    return float(values[good].mean()) if good.any() else float(values[-1])
