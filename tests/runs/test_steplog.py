"""The log of steps: lines of means over the applied steps, the same after a resume."""

import numpy as np
import pytest
import torch
from torch import nn

from refinelib.build import build_guard, build_loss
from refinelib.config import resolve
from refinelib.guard.guard import REPORT
from refinelib.runs import Run
from refinelib.state import StepLog


@pytest.fixture
def log(tmp_path):
    settings = resolve("demo", output_dir=str(tmp_path))
    guard = build_guard(settings, nn.Linear(2, 2), None, steps_per_epoch=10)
    return StepLog(Run.start(settings), build_loss(settings), guard, every=3)


def report(log, **values):
    found = dict.fromkeys(REPORT, 0.0) | {"lr": 0.1, "loss_scale": 1.0} | values
    return torch.tensor([found["loss"]] * len(log.names) + [found[name] for name in REPORT] + [1.0, 2.0])


def take(log, reports):
    for step, values in enumerate(reports, 1):
        log.reports.add(report(log, **values), step, 1)
    for row in log.reports.read(wait=False):  # on a CPU all of them
        log.record(row)


def test_lines_and_epochs_are_of_the_applied_steps(log):
    steps = [(2.0, 1.0, 0), (float("nan"), 9.0, 1), (4.0, 3.0, 0), (6.0, 8.0, 0)]
    take(log, [{"loss": loss, "grad_norm": norm, "skipped": skipped} for loss, norm, skipped in steps])
    found = log.end_epoch(1)
    assert found["train_loss"] == 4 and found["losses"]["ce"] == 4 and found["skipped"] == 1
    assert found["grad_norm"] == 3 and found["grad_norm_max"] == 8  # the median, and the largest
    lines = log.run.steps()
    assert [line["step"] for line in lines] == [1, 4]  # the first step, then every third
    assert [line["loss"] for line in lines] == [2, 5] and [line["grad_norm"] for line in lines] == [1, 5.5]
    assert lines[-1]["skipped"] == 1 and lines[-1]["lr"] == pytest.approx(0.1)


def test_an_epoch_without_an_applied_step_shows_the_last(log):
    take(log, [{"loss": loss, "skipped": 1} for loss in (1.0, 2.0)])
    assert log.end_epoch(1)["train_loss"] == 2


def test_the_means_go_on_after_a_resume(log):
    take(log, [{"loss": loss} for loss in (1.0, 2.0, 6.0)])
    saved = log.state_dict()
    log.epoch_rows, log.skipped = [], 7
    log.load_state_dict(saved)
    assert log.skipped == 0 and log.end_epoch(1)["train_loss"] == 3
    assert log.state_dict()["rows"].shape == (0, len(log.names) + len(REPORT))


def test_a_probe_takes_whole_rows_and_unread_steps_can_be_dropped(log):
    taken = []
    log.take = lambda *line: taken.append(line)
    take(log, [{"loss": 5.0}])
    ((steps, reports),) = taken
    assert steps == [1] and reports.shape == (1, len(log.names) + len(REPORT) + 2)
    assert reports.dtype == np.float64 and reports[0, -2:].tolist() == [1, 2]
    log.reports.add(report(log), 2, 1)
    log.reports.forget()
    assert log.reports.read(wait=True) == []
