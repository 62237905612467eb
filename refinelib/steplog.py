"""Reads the steps' reports back from the device, late and in bundles, and writes the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.monitor import Reports as DeviceReports
from refinelib.guard.monitor import Row, StepMonitor
from refinelib.modeling.losses import MaskLoss
from refinelib.runs import Run

#: Reports of some steps on the host, a row a step.
Reports = NDArray[np.float64]
Take = Callable[[list[int], Reports], None]


class StepLog:
    """Turns reports into rows, and rows into lines of ``metrics.jsonl`` and ``events.jsonl``.

    Args:
        run: where lines go.
        loss: whose components lead each report.
        guard: which makes the reports.
        every: steps between lines.
        take: takes each line's steps and their reports, ``[steps, losses + REPORT + parameters]``.
    """

    def __init__(
        self, run: Run, loss: MaskLoss, guard: Guard, *, every: int, take: Take = lambda steps, reports: None
    ) -> None:
        self.run, self.names, self.every, self.take = run, loss.names, every, take
        self.monitor = StepMonitor(run.event, guard, losses=loss.names, caps=loss.caps)
        self.reports = DeviceReports()
        self.line_rows: list[Row] = []
        self.epoch_rows: list[Reports] = []  # components and report of each step
        self.skipped = 0
        #: When the next line's first step began: validation and checkpoints do not slow it down.
        self.started = time.perf_counter()

    # -- from the device
    def add(self, report: Tensor, step: int, epoch: int) -> None:
        """Take a step's report, which may still be computed on the device."""
        self.reports.add(report, (step, epoch))

    def read(self, *, wait: bool) -> list[Row]:
        """The rows that have arrived, with ``wait`` all there are: :meth:`Reports.read`."""
        cuts = np.cumsum([len(self.names), len(REPORT), len(self.monitor.guard.names), 1])
        rows = []
        for (step, epoch), values in self.reports.read(wait=wait):
            losses, report, norms, stop, bad = np.split(values, cuts)
            named = dict(zip(REPORT, report.tolist(), strict=True))
            told = bool(stop.any()), tuple(np.flatnonzero(bad).tolist())  # nothing where one process trains
            rows.append(Row(step, epoch, losses, named, norms, *told))
        return rows

    # -- into the log
    def record(self, row: Row) -> None:
        """Take a row into the epoch's means, the events and, with enough of them, a line."""
        self.monitor.update(row)
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
        reports = np.stack([[*row.components, *row.report.values(), *row.norms] for row in rows])
        self.take([row.step for row in rows], reports)
        line = {"kind": "step", "step": rows[-1].step, "epoch": rows[-1].epoch, **self._summary(reports)}
        speed = float(f"{len(rows) / (time.perf_counter() - self.started):.4g}")
        self.run.metrics({**line, "skipped": self.skipped, "steps_per_second": speed})
        self.started = time.perf_counter()

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Means over the epoch's applied steps; the gradient norm's median."""
        self.write_line()
        self.monitor.end_epoch(epoch)
        rows, self.epoch_rows = np.stack(self.epoch_rows), []
        found = self._summary(rows, np.median)
        skipped = int(rows[:, len(self.names) + REPORT.index("skipped")].sum())
        return {"train_loss": found.pop("loss"), **found, "skipped": skipped}

    def _summary(self, reports: Reports, typical: Callable[[Reports], Any] = np.mean) -> dict[str, Any]:
        """Means over the applied steps of reports ``[steps, losses + REPORT...]``; else the last step's."""
        columns = dict(zip(REPORT, reports[:, len(self.names) :].T, strict=False))
        applied = columns["skipped"] == 0
        applied[-1] |= not applied.any()
        norms = columns["grad_norm"][applied]
        return {
            "loss": float(columns["loss"][applied].mean()),
            "losses": dict(zip(self.names, reports[applied].mean(axis=0).tolist(), strict=False)),
            "grad_norm": float(typical(norms)),
            "grad_norm_max": float(norms.max()),
            "lr": float(columns["lr"][-1]),
            "loss_scale": float(columns["loss_scale"][-1]),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's means so far are made of."""
        rows = np.reshape(self.epoch_rows, (-1, len(self.names) + len(REPORT)))
        return {"rows": torch.from_numpy(rows), "skipped": self.skipped}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a state."""
        self.epoch_rows, self.skipped = list(saved["rows"].numpy()), saved["skipped"]
        self.line_rows = []
