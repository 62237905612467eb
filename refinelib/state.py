"""A run's live objects, its log of steps, and its whole state: put into checkpoints and restored exactly."""

import contextlib
import functools
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from refinelib import checkpoints, ranks
from refinelib.build import build_device, build_step, device_name, random_state, set_determinism
from refinelib.checkpoints import CheckpointError
from refinelib.config import Settings
from refinelib.data import Source, open_splits
from refinelib.gradients import Probe
from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.monitor import Reports, Row, StepMonitor
from refinelib.guard.rewind import Rewinder, Snapshot
from refinelib.modeling.losses import MaskLoss
from refinelib.runs import Run, changed_settings
from refinelib.step import Stepper

#: What to try where a run has diverged.
ADVICE = (
    "checkpoints/best.pt, where an epoch was validated, is what it was at its best. "
    "The folders in incidents/ hold the bad batches: `python -m refinelib replay INCIDENT` names "
    "the module, the loss term and the samples. Then try a tenth of the learning rate, or the recipe "
    "`rescue`; if the skips were spikes, on_spike = clip; if the loss scale was at its floor, amp = "
    "bf16; if one loss term is named, its weight at 0"
)
NEW_RUN = "start a new run from these weights with init_from"


#: Reports of some steps on the host, each a row.
Rows = NDArray[np.float64]
Take = Callable[[list[int], Rows], None]


class StepLog:
    """Turns the rows of reports (``reports``) into lines of ``metrics.jsonl`` and ``events.jsonl``.

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
        self.reports = Reports(len(loss.names), len(guard.names))
        self.line_rows: list[Row] = []
        self.epoch_rows: list[Rows] = []  # components and report of each step
        self.skipped = 0
        #: When the next line's first step began: validation and checkpoints do not slow it down.
        self.started = time.perf_counter()

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

    def _summary(self, reports: Rows, typical: Callable[[Rows], Any] = np.mean) -> dict[str, Any]:
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


class TrainingState:
    """A run's live objects: data, model, guard, records; new, or restored from a checkpoint.

    Args:
        settings: of the run.
        run: its folder.
        sources: of each split, where the data are in memory.
    """

    def __init__(self, settings: Settings, run: Run, sources: Mapping[str, Source] = {}) -> None:
        self.settings, self.run = settings, run
        self.slowed: list[str] = []  # messages of this rank since they were last joined with the others'
        self.device = build_device(settings)
        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        set_determinism(settings)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # graphs and compiled kernels use the current one
        data = {split: source.fingerprint() for split, source in sources.items()}
        run.record_settings(settings, device_name(self.device), **({"data": data} if data else {}))

        self.leads = ranks.rank() == 0  # writes the run's files
        with ranks.one_a_host_first():
            self.train_store, self.val_store = open_splits(settings, given=sources, progress=self.leads)
        # What the run is trained on; of data in memory, what it is validated on too.
        self.people = self.train_store.identity + self.val_store.content
        self.parts = build_step(settings, self.train_store, self.device)
        self.model, self.average, self.loss, self.guard, self.injector, self.loader = self.parts
        steps = settings.epochs * self.loader.steps_per_epoch
        speed, damaged = (functools.partial(self.say, kind) for kind in ("speed", "damaged"))
        self.stepper = Stepper(settings, self.parts, device=self.device, steps=steps, say=speed)
        limits = {"max_skips": settings.max_consecutive_skips, "max_rewinds": settings.max_rewinds}
        self.rewinder = Rewinder(self.guard, log=lambda: self.log.state_dict(), advice=ADVICE, **limits)
        every, folder = settings.probe_every if self.leads else 0, run.folder / "gradients"
        self.probe = Probe(folder, self.stepper, every=every, say=damaged)
        self.log = StepLog(run, self.loss, self.guard, every=settings.log_every, take=self.probe.add)
        self.writer = checkpoints.Writer()

        self.step = 0  # steps tried: the position in the data
        self.best: dict[str, Any] | None = None
        self.last_metrics: dict[str, Any] = {}
        self.last_summary: dict[str, Any] = {}  # of the last epoch that this process trained
        self.incidents: list[str] = []  # kinds that were kept
        self.repeats = 0  # incidents of a kind that was kept before
        self.stop_requested = False  # of any rank
        self.kept_snapshots: set[Path] = set()  # files that the last checkpoint needs
        self.written_snapshots = weakref.WeakSet[Snapshot]()
        self.mean_coverage = torch.as_tensor(self.train_store.mean_coverage())
        self.guard.resume_updates(capture_enabled=self.wants_incidents)

    @property
    def wants_incidents(self) -> bool:
        """Whether another incident would be kept."""
        return max(len(self.incidents), self.repeats) < self.settings.max_incidents

    # -- messages ----------------------------------------------------------------------------------
    def say(self, kind: str, message: str, **fields: Any) -> None:
        """Record an event, at the present step if no other is given; some kinds are printed too."""
        self.run.event(kind, message, **{"step": self.step, **fields})
        self.slowed += [message] * (kind == "speed")
        if kind in ("speed", "inject", "resume"):
            self.tell(f"{self.run.name}: {message}")

    def tell(self, text: str, write: Callable[[str], object] = print) -> None:
        """Print a line, from one rank; where nobody reads any more the run goes on."""
        if self.leads:
            with contextlib.suppress(BrokenPipeError):
                write(text)
                sys.stdout.flush()

    @contextlib.contextmanager
    def best_effort(self, what: str) -> Iterator[None]:
        """For files that training can do without: a disk error becomes an event."""
        try:
            yield
        except OSError as error:
            epoch = self.step // self.loader.steps_per_epoch
            self.say("disk", f"the {what} of epoch {epoch} could not be written ({error})")

    def report_writes(self, *, final: bool = False) -> None:
        """Say which checkpoints could not be written.

        Raises:
            OSError: with ``final``, when the newest of a file is among them.
        """
        if final:
            self.writer.flush()
        while self.writer.problems:
            self.say("checkpoint", self.writer.problems.pop(0))
        if final and self.writer.failing:
            problems = "; ".join(self.writer.failing.values())
            raise OSError(f"{problems}: make room in {self.run.folder} and go on with resume=true")

    # -- checkpoints -------------------------------------------------------------------------------
    def save(self, *names: str) -> None:
        """Have a checkpoint written under each name, and before it the snapshots that a rewind would need.

        Each snapshot has a file of its own, written once. Files that neither the checkpoint on disk nor this
        one needs are deleted.
        """
        if not names:
            return
        self.log.write_line()
        if not self.leads:
            return
        folder, content = self.run.folder / "checkpoints", checkpoints.to_cpu(self.state_dict())
        needed = {self.snapshot_file(snapshot.step): snapshot for snapshot in self.rewinder.snapshots}
        for file, snapshot in needed.items():
            if snapshot not in self.written_snapshots:  # its file may hold one of before a rewind
                self.written_snapshots.add(snapshot)
                file.parent.mkdir(exist_ok=True)
                self.writer.save(file, snapshot.state_dict())
        for name in names:
            self.writer.save(folder / name, content, copy=False)
        for file in set(self.snapshot_file(0).parent.glob("*.pt")) - self.kept_snapshots - needed.keys():
            file.unlink(missing_ok=True)
        self.kept_snapshots = set(needed)

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        per_epoch, rewinder = self.loader.steps_per_epoch, self.rewinder.state_dict()
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "guard": self.guard.state_dict(),
            "position": {"step": self.step, "epoch": self.step // per_epoch, "steps_per_epoch": per_epoch},
            "log": self.log.state_dict(),
            "recovery": {**rewinder, "incidents": list(self.incidents), "repeats": self.repeats},
            "random": random_state(self.device),
            "best": self.best,
            "settings": self.settings.model_dump(mode="json"),
            "mean_coverage": self.mean_coverage,
            "people": self.people,
        }

    def restore(self) -> None:
        """Continue from the newest whole checkpoint of the run, and say what was wrong with the others."""
        path, saved, problems = checkpoints.newest_whole(self.run.folder / "checkpoints", check=self.check)
        step, epoch = saved["position"]["step"], saved["position"]["epoch"]
        self.model.load_state_dict(saved["model"], strict=False)  # it fits but for refinements: check
        if self.average is not None:
            self.average.load_state_dict(saved["average"] or saved["model"])
        self.guard.load_state_dict(saved["guard"])
        self.log.load_state_dict(saved["log"])
        self.incidents, self.repeats = list(saved["recovery"]["incidents"]), saved["recovery"]["repeats"]
        self.guard.resume_updates(capture_enabled=self.wants_incidents)
        torch.set_rng_state(saved["random"]["torch"])
        if self.device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
        self.step, self.best = step, saved["best"]
        self.run.rewind_records(step, epoch)
        for problem in problems:
            self.say("checkpoint", problem)
        self.rewinder.load_state_dict(saved["recovery"], self.load_snapshots(saved))
        then, now = saved["settings"]["epochs"], self.settings.epochs
        changed = f"; it ends after {now} epochs, and was to end after {then}" if now != then else ""
        self.say("resume", f"resumed from {path.name} at step {step}{changed}")
        validations = self.run.validations()
        self.last_metrics = validations[-1]["metrics"] if validations else {}
        shown = {"best": self.best, "metrics": self.last_metrics or None}
        self.run.update(epoch=epoch, step=step, skipped_steps=self.log.skipped, **shown)
        if path.name != "last.pt":  # it is now the last
            self.rewinder.start(step)
            self.save("last.pt")

    def snapshot_file(self, step: int) -> Path:
        """The file of the snapshot after ``step``."""
        return self.run.folder / "checkpoints" / "snapshots" / f"{step:08d}.pt"

    def load_snapshots(self, saved: dict[str, Any]) -> list[Snapshot]:
        """The usable snapshots of a checkpoint; an event names the others."""
        found, shapes = [], {name: x.shape for name, x in self.guard.tensors().items()}
        if not self.snapshot_file(0).parent.is_dir():  # the run had ended, and goes on with more epochs
            return []
        for number, *_ in saved["recovery"].get("snapshots", []):
            file = self.snapshot_file(number)
            try:
                content = checkpoints.load(file, needs=("tensors", "memory", "host"))
                tensors, memory = content["tensors"], content["memory"]
                weights = {name: x.shape for name, x in tensors.items() if not name.startswith("optimizer.")}
                same = weights.items() <= shapes.items() and memory.shape == self.guard.memory.shape
                if not weights or not same or checkpoints.nonfinite({**tensors, "memory": memory}):
                    raise CheckpointError(f"{file} is not of this run")
                tensors = {name: x.to(self.device) for name, x in tensors.items()}
                found.append(Snapshot(number, tensors, memory.to(self.guard.memory), content["host"]))
                self.written_snapshots.add(found[-1])
                self.kept_snapshots.add(file)
            except (CheckpointError, KeyError, TypeError, AttributeError) as error:
                self.say("checkpoint", f"a snapshot cannot be used, a rewind will not go there: {error}")
        return found

    def check(self, path: Path, saved: dict[str, Any]) -> None:
        """Whether this run can go on from a checkpoint.

        Raises:
            CheckpointError: it has other settings, data or sizes, or is not finite; the message names it.
        """
        if changed := changed_settings(self.settings, saved["settings"]):
            wrong = f"resume goes on with the settings it was started with, and {'; '.join(changed)}"
            raise CheckpointError(f"{wrong}: leave that as it was, or {NEW_RUN}")
        then, now = saved["position"]["steps_per_epoch"], self.loader.steps_per_epoch
        if then != now:
            wrong = f"{path} was made with {then} steps an epoch, this run has {now}"
            raise CheckpointError(f"{wrong}: resume with the data, batch_size and accumulate of its start")
        if saved.get("people") not in (None, self.people):
            wrong = f"{path} was made with other people than the {len(self.train_store)} that this run has"
            raise CheckpointError(f"{wrong}: resume with the data of its start, or {NEW_RUN}")
        checkpoints.check_weights(self.model, saved, path)
        guard = {"optimizer": saved["guard"]["optimizer"]["state"], "guard": saved["guard"]["state"]}
        checkpoints.refuse_nonfinite(path, {"average": saved["average"], **guard})
