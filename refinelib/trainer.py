"""The training loop, top to bottom.

    settings -> run folder -> stores -> model, loss, guard -> [ batch -> loss -> guard ] ... -> run folder

The run folder holds everything that notebooks and commands read.
"""

import contextlib
import functools
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from refinelib import launch, ranks
from refinelib.build import autocast, initial_model
from refinelib.checkpoints import CheckpointError
from refinelib.config import Settings
from refinelib.data.arrays import sources_of
from refinelib.data.loader import Plan
from refinelib.files import owner
from refinelib.guard import faults
from refinelib.guard.diagnose import Finding
from refinelib.guard.monitor import WINDOW, Row
from refinelib.guard.rewind import CHECKPOINT_AFTER, SNAPSHOT_EVERY, DivergedError
from refinelib.incidents import capture
from refinelib.metrics.predict import predict_probs, score, write_samples
from refinelib.runs import Run
from refinelib.state import ADVICE, TrainingState

#: A run is not called trained if its loss did not fall and its target IoU fell by more than this.
WORSE = 0.01
#: Metrics that are told of each epoch, and kept of the best.
SCORES = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU", "miou": "mIoU"}


def train(settings: Settings, *, data: Any = None, on_epoch: Callable[[Run], None] | None = None) -> Run:
    """Train as the settings say; under ``torchrun`` on several processes (:mod:`~refinelib.ranks`).

    Args:
        settings: from :func:`refinelib.resolve`.
        data: images and masks in memory, in place of the data set that the settings name: arrays
            ``(images, masks)``, a list or a torch data set of ``(image, mask)``
            (:class:`~refinelib.data.ArrayPeople`), or two of them as a tuple, train and val. Of a single one
            ``seed`` chooses about every fifth item for val (:func:`~refinelib.data.arrays.sources_of`). To
            resume, give the same data.
        on_epoch: called with the run after each epoch's records are on disk (a live panel, say), and once
            more when the run has ended, however it did.

    Returns:
        The finished run.

    Raises:
        SettingsError: the faults to plant cannot be read, or the settings exclude ``data``.
        DataError: the data cannot be used.
        CheckpointError: ``init_from`` names no checkpoint.
        DivergedError: skipping steps and rewinding did not help; the best checkpoint stays.
        KeyboardInterrupt: it was interrupted, after a checkpoint of the very step that was reached.
        Exception: whatever else stopped the run, after ``status.json`` says so in one line.

    Example:
        >>> import tempfile, numpy, refinelib
        >>> images, ids = numpy.zeros((8, 40, 40, 3), "uint8"), numpy.zeros((8, 40, 40), "uint8")
        >>> ids[:, 4:36, 10:30], images[:, 4:36, 10:30] = 1, 200  # one person in each image
        >>> tiny = {"width": 0.0625, "roi_size": 32, "mask_size": 32, "epochs": 1, "device": "cpu"}
        >>> settings = refinelib.resolve("demo", output_dir=tempfile.mkdtemp(), **tiny)
        >>> run = refinelib.train(settings, data=(images, ids))  # doctest: +ELLIPSIS
        arrays train: ... ROIs of 32x32 from ... images
        ...
        >>> refinelib.load(run.folder, device="cpu").predict(images[0], [10, 4, 30, 36]).shape
        (1, 40, 40)
    """
    settings, sources = sources_of(data, settings)
    launch.refuse_wrong_values(settings)  # before a folder is made
    if settings.gpus > 1 and not ranks.launched():
        return launch.launch(settings, on_epoch)
    with launch.Interruption() as interruption, ranks.joined(settings.device, settings.rank_timeout) as watch:
        launch.refuse_processes(settings, ranks.count())
        settings, run = _start(settings, watch)
        with run.exclusive():
            watch.report = lambda sentence: run.update(state="failed", last_error=sentence)
            before = run.status() if settings.resume else None
            fresh = {"epoch": 0, "step": 0, "skipped_steps": 0, "rewinds": 0, "best": None, "metrics": None}
            first = owner(ranks.launched()) | ({} if settings.resume else fresh)
            run.update(state="running", last_error=None, **first)
            trainer = None
            try:
                trainer = Trainer(settings, run, sources)
                trainer.fit(interruption, on_epoch)
            except BaseException as error:
                unchanged = trainer is None or isinstance(error, CheckpointError)  # no step was taken
                cause = RuntimeError(told) if (told := watch.cause(error)) else error
                again = before if unchanged and not isinstance(error, KeyboardInterrupt) else None
                run.update(**(again or _last_status(run, cause)))
                cause.run = run  # type: ignore[attr-defined]  # a notebook shows what there is
                if cause is not error:
                    raise cause from error
                raise
            finally:
                if trainer is not None:
                    # The ranks cannot part while a graph holds their collectives.
                    trainer.stepper.graph = None
                run.close()
                launch.show_end(run, on_epoch)
    return run


def _start(settings: Settings, watch: ranks.Watch) -> tuple[Settings, Run]:
    """The run's folder, the same on every rank; a job that its launcher started again resumes by itself."""
    run = None
    if ranks.rank() == 0:
        begun = os.environ.get(launch.FOLDER) or (watch.job_value("folder") if ranks.restarts() else None)
        run = Run.open(begun) if begun else Run.start(settings)
        watch.job_value("folder", str(run.folder))
        if ranks.restarts() and run.status()["state"] == "diverged":  # so it would be again
            raise DivergedError(run.status()["last_error"])
        if ranks.restarts() and run.has_checkpoint:
            settings = settings.model_copy(update={"resume": True})
    resume, folder = ranks.tell((settings.resume, run and run.folder))
    return settings.model_copy(update={"resume": resume}), run or launch.Follower(folder)


class Trainer(TrainingState):
    """The loop over a run's steps and epochs."""

    # -- the loop ----------------------------------------------------------------------------------
    def fit(self, interruption: launch.Interruption, on_epoch: Callable[[Run], None] | None) -> None:
        """Train to the end of the last epoch."""
        settings, per_epoch = self.settings, self.loader.steps_per_epoch
        if settings.resume:
            self.restore()
        total = settings.epochs * per_epoch
        self.run.update(epochs=settings.epochs, steps=total, step=self.step, rois=len(self.train_store))
        since = f", from step {self.step + 1} on" if self.step else ""
        self.tell(f"{self.run.folder}: {settings.epochs} epochs of {per_epoch} steps{since}")
        for fault in faults.beyond(settings.inject, total):
            self.say("inject", f"the planted fault {fault} never comes: the run has {total} steps")
        self.rewinder.start(self.step)
        interruption.deferred = True
        # Only a terminal shows the bar: below a panel in a notebook, its old states would stay.
        silent = None if self.leads and "ipykernel" not in sys.modules else True
        progress = tqdm(total=total, initial=self.step, desc=self.run.name, unit=" steps", disable=silent)
        with contextlib.closing(self.writer), progress as bar:
            while self.step < total:
                epoch = self.step // per_epoch
                started, end = time.perf_counter(), (epoch + 1) * per_epoch
                plan = self.loader.plan(epoch)
                self.log.monitor.batch_instances = functools.partial(self.batch_instances, plan)
                if self.stopping(interruption):
                    self.stop(plan)
                self.model.train()
                self.log.started = time.perf_counter()
                while end - per_epoch <= self.step < end and not self.stopping(interruption):
                    report = self.train_step(plan, self.step % per_epoch)
                    self.step += 1
                    self.log.reports.add(report, self.step, epoch + 1)
                    self.process_reports(plan, wait=self.step == end)  # may set self.step back
                    if self.step < end:  # at an epoch's end the checkpoint comes with a snapshot
                        self.rewinder.maybe_snapshot(self.step)
                    bar.update(self.step - bar.n)
                if self.step != end or not self.end_epoch(epoch, started):
                    continue  # interrupted; or a rewind: some of the epoch's steps are taken again
                self.tell(self.epoch_line(epoch, time.perf_counter() - started), bar.write)
                if self.leads and on_epoch is not None:
                    on_epoch(self.run)
        self.report_writes(final=True)
        self.raise_unless_trained()
        if self.leads:
            shutil.rmtree(self.snapshot_file(0).parent, ignore_errors=True)
        self.run.update(state="ok")

    def stopping(self, interruption: launch.Interruption) -> bool:
        """Whether to stop before the next step: all ranks at the same one, whichever of them was asked."""
        if ranks.count() == 1:
            return bool(interruption.requested)
        if interruption.requested:
            self.stepper.stop.fill_(1.0)
        return self.stop_requested

    def train_step(self, plan: Plan, at: int) -> Tensor:
        """Forward, backward and guarded update of one step; its report, still on the device."""
        return self.stepper.step(plan, at, self.step + 1)

    def process_reports(self, plan: Plan, *, wait: bool) -> None:
        """Log the reports that have arrived (with ``wait``: all), keep incidents, rewind a lost run.

        Afterwards ``step`` may be smaller. After an incident the guard suspends updates until the host has
        examined the weights before that step; the steps in between are taken again.
        """
        rows = self.log.reports.read(wait=wait)
        self.stop_requested |= any(row.stop for row in rows)
        for place, row in enumerate(rows):
            self.log.record(row)
            incident = bool(row.report["incident"])
            if incident:
                self.keep_incident(plan, row)
                self.log.reports.forget()
            reason = self.rewinder.see(row)
            if reason is not None:
                # Steps that were taken before this report was read; none after an incident.
                for late in [] if incident else [*rows[place + 1 :], *self.log.reports.read(wait=True)]:
                    if not late.report["updates_suspended"]:
                        self.log.record(late)
                    if late.report["incident"]:
                        self.keep_incident(plan, late)
                self.rewind(reason, row.epoch)
            if incident or reason is not None:
                return

    def end_epoch(self, epoch: int, started: float) -> bool:
        """Validate, record and keep the state; false where a rewind takes some of the steps again."""
        settings = self.settings
        last = epoch + 1 == settings.epochs
        if not self.ensure_healthy(epoch + 1, last=last):
            return False
        self.last_summary = summary = self.log.end_epoch(epoch + 1)
        self.join_messages()
        with self.best_effort("gradients"):
            self.probe.end_epoch(epoch + 1)
        seconds = time.perf_counter() - started  # the reports were read back, so the device is done
        validated = last or (epoch + 1) % settings.validate_every == 0
        self.last_metrics = metrics = self.evaluate_epoch(epoch, final=last) if validated else {}
        is_best = validated and (self.best is None or selection_score(metrics) > selection_score(self.best))
        if is_best:
            self.best = {"epoch": epoch + 1, "step": self.step, **{name: metrics[name] for name in SCORES}}
        line = {"kind": "epoch", "epoch": epoch + 1, "step": self.step, **summary, "metrics": metrics}
        self.run.metrics({**line, "seconds": round(seconds, 3)})
        self.report_writes()
        keep = (epoch + 1) % settings.save_every == 0 or last
        self.rewinder.maybe_snapshot(self.step, after=CHECKPOINT_AFTER if keep else SNAPSHOT_EVERY)
        self.save(*["best.pt"] * is_best, *["last.pt"] * keep)
        shown = {"best": self.best, "metrics": metrics} if validated else {}
        self.run.update(epoch=epoch + 1, step=self.step, skipped_steps=self.log.skipped, **shown)
        return True

    def join_messages(self) -> None:
        """Record what slowed other ranks down than this one."""
        first, *others = ranks.gathered(self.slowed)
        for rank, messages in enumerate(others, 1):
            for message in dict.fromkeys(messages):
                if message not in first:
                    self.say("speed", f"rank {rank}: {message}")
        self.slowed.clear()

    def stop(self, plan: Plan) -> None:
        """Keep the very step that was reached, and leave."""
        self.process_reports(plan, wait=True)
        self.ensure_healthy(self.step // self.loader.steps_per_epoch + 1)
        epoch = self.step // self.loader.steps_per_epoch + 1
        self.log.monitor.end_epoch(epoch)
        self.save("last.pt")
        self.leave(epoch, final=True)
        raise KeyboardInterrupt

    def leave(self, epoch: int, *, final: bool = False) -> None:
        """Write the records of an epoch (from 1) that does not come to its end; see :meth:`report_writes`."""
        self.report_writes(final=final)
        with self.best_effort("gradients"):
            self.probe.end_epoch(epoch, whole=False)
        self.run.update(step=self.step, epoch=epoch - 1, skipped_steps=self.log.skipped)

    # -- when a step goes wrong --------------------------------------------------------------------
    def keep_incident(self, plan: Plan, row: Row) -> None:
        """Examine a step that went wrong, with the weights before it; keep what is new; go on after it.

        Of several ranks the first whose own gradients were bad does it, for all of them.
        """
        examiner = row.bad_ranks[0] if row.bad_ranks else 0
        finding = ranks.tell(self.examine(plan, row) if ranks.rank() == examiner else None, examiner)
        if isinstance(finding, str):  # why there is none
            self.say("incident", finding, step=row.step, epoch=row.epoch)
            self.repeats += 1
        else:
            if finding.kind in self.incidents:
                self.repeats += finding.phase != "overflow"
            elif finding.phase != "overflow":  # an overflow is how the loss scale is found
                self.incidents.append(finding.kind)
                folder = f"incidents/{row.step:06d}"
                fields = {"step": row.step, "folder": folder, **finding.as_dict()}
                self.say("incident", f"{finding.sentence}; kept in {folder}", epoch=row.epoch, **fields)
            if finding.phase not in ("overflow", "none"):
                self.guard.state["scale"].fill_(row.report["loss_scale"])  # halving it does not help
            if finding.phase == "weights":
                self.guard.check_state()
        self.guard.resume_updates(capture_enabled=self.wants_incidents)
        self.step = row.step

    def examine(self, plan: Plan, row: Row) -> Finding | str:
        """What was wrong with a step, or why that cannot be said."""
        at = (row.step - 1) % self.loader.steps_per_epoch
        shares = itertools.product(range(self.settings.accumulate), range(ranks.count()))
        taken = [self.loader.batch(plan, at, micro, rank) for micro, rank in shares]
        batches, samples = [(x.images, x.labels) for x in taken], self.batch_instances(plan, row.step)
        folder = self.run.folder / "incidents" / f"{row.step:06d}"
        gradients = [p.grad for p in self.guard.parameters]  # a captured step writes to these very tensors
        try:
            known = self.incidents
            return capture(folder, row, self.stepper, batches=batches, samples=samples, known=known)
        except (OSError, RuntimeError) as error:  # no room on the disk or the device
            return f"step {row.step}: the incident could not be kept ({error})"
        finally:
            for p, gradient in zip(self.guard.parameters, gradients, strict=True):
                p.grad = gradient

    def batch_instances(self, plan: Plan, step: int) -> list[dict[str, Any]]:
        """The instances in step number ``step`` (from 1) of the planned epoch."""
        rois = plan.rois[(step - 1) % self.loader.steps_per_epoch].flatten().tolist()
        return [self.train_store.instance(roi) for roi in rois]

    def ensure_healthy(self, epoch: int, *, last: bool = False) -> bool:
        """Rewind if the state is damaged, or at the run's end if the loss is too high.

        Returns:
            Whether ``step`` is unchanged.
        """
        step = self.step
        self.rewinder.check()
        if self.guard.state["damaged"]:
            self.rewind(self.rewinder.damage(), epoch)
        elif last and (reason := self.rewinder.monitor.judge_end()):
            self.rewind(reason, epoch)
        return self.step == step

    def rewind(self, reason: str, epoch: int) -> None:
        """Restore an earlier state, or end the run; ``step`` is the snapshot's if steps are taken again."""
        try:
            message, snapshot = self.rewinder.rewind(reason, self.step)
        except DivergedError:
            self.writer.flush()
            self.leave(epoch)
            raise
        self.say("rewind", message, epoch=epoch)
        self.run.update(rewinds=self.rewinder.rewinds)
        self.guard.resume_updates(capture_enabled=self.wants_incidents)
        if snapshot is not None and snapshot.host is not None:
            self.step = snapshot.step
            self.log.reports.forget()
            self.log.load_state_dict(snapshot.host["log"])
            self.probe.rewind(self.step)
            self.run.rewind_records(self.step, self.step // self.loader.steps_per_epoch, events=False)

    def raise_unless_trained(self) -> None:
        """Refuse to call a run trained that learnt nothing, although every step was finite.

        Raises:
            DivergedError: less than half of the steps were applied, or the last epoch had no finite loss, or
                the loss is no lower than at the start and the masks are worse than with the first weights.
        """
        applied, epoch = self.step - self.log.skipped, self.last_summary
        # One step without a finite loss tells nothing of an epoch.
        lost_epoch = epoch.get("skipped", 0) > 1 and not math.isfinite(epoch["train_loss"])
        if 2 * applied < self.step or not applied or lost_epoch:
            what = f"{applied or 'none'} of {self.step} steps were applied, the others were skipped"
            what += ", all those of the last epoch among them" * lost_epoch
            raise DivergedError(f"diverged: {what}. {ADVICE}")
        if applied < WINDOW:
            return
        first, last = self.rewinder.monitor.first_and_last()
        if last < first:
            return
        now, untrained = selection_score(self.last_metrics), selection_score(self.untrained_metrics())
        if now < untrained - WORSE:
            loss = f"the loss is {last:.3g} and began at {first:.3g}"
            iou = f"the target IoU is {now:.3f} and was {untrained:.3f} before training"
            raise DivergedError(f"diverged: {loss}, {iou}. {ADVICE}")

    # -- validation --------------------------------------------------------------------------------
    def validate(
        self, model: nn.Module, *, full: bool = False, samples: Path | None = None
    ) -> dict[str, Any]:
        """Metrics of a model on the validation ROIs, in the run's precision.

        Args:
            model: its mode is that of training afterwards.
            full: the costly metrics too.
            samples: a file to keep some of the masks in.
        """
        settings = self.settings

        def predict(images: Tensor) -> Tensor:
            with autocast(settings, self.device):
                flip, weights = settings.flip_test, settings.decision_weights
                return predict_probs(model, images, flip=flip, weights=weights)

        model.eval()
        where: Any = {"device": self.device, "mask_size": settings.mask_size}
        found = score(predict, self.val_store, full=full, **where)
        if samples is not None and self.leads:
            with self.best_effort("samples"):
                write_samples(samples, self.val_store, predict, found.per_roi()["target_iou"], **where)
        model.train()
        return found.compute()

    def evaluate_epoch(self, epoch: int, *, final: bool) -> dict[str, Any]:
        """Metrics of the moving average where there is one, else of the model."""
        samples = self.run.folder / "samples" / f"epoch_{epoch + 1:04d}.npz"
        return self.validate(self.average or self.model, full=final, samples=samples)

    def untrained_metrics(self) -> dict[str, Any]:
        """Metrics of the weights that the run began with."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            model = initial_model(self.settings, self.device)
        return self.validate(model)

    def epoch_line(self, epoch: int, seconds: float) -> str:
        """One line about the epoch just ended."""
        metrics, losses = self.last_metrics, "loss {train_loss:.4f}  gradient norm {grad_norm:.3g}"
        parts = [f"epoch {epoch + 1:>4}/{self.settings.epochs}", losses.format(**self.last_summary)]
        for name, title in SCORES.items() if metrics else ():
            parts += [f"{title} {'none' if metrics[name] is None else f'{metrics[name]:.3f}'}"]
        return "  ".join([*parts, f"skipped {self.log.skipped}", f"{seconds:.1f} s"])


def selection_score(metrics: dict[str, Any]) -> float:
    """The score that selects the best checkpoint: target IoU; -1 where there is no target."""
    return -1.0 if metrics["target_iou"] is None else float(metrics["target_iou"])


def _last_status(run: Run, error: BaseException) -> dict[str, str]:
    """What ``status.json`` says of a run that an exception ended."""
    if isinstance(error, KeyboardInterrupt):
        how = "go on with resume=true" if run.has_checkpoint else "before there was a checkpoint"
        return {"state": "interrupted", "last_error": f"interrupted; {how}"}
    if isinstance(error, DivergedError):
        return {"state": "diverged", "last_error": str(error)}
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"state": "failed", "last_error": str(error) if isinstance(error, CheckpointError) else line}
