"""The training loop, top to bottom.

    settings -> run folder -> stores -> model, loss, guard -> [ batch -> loss -> guard ] ... -> run folder

Everything that a later look needs is in the run folder; nothing here knows of a notebook.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

from refinelib import checkpoints
from refinelib.build import autocast, build_device, build_model, build_step, resolve_auto
from refinelib.config import Settings, names_with_role
from refinelib.data import open_splits
from refinelib.incidents import capture
from refinelib.gradients.record import Probe
from refinelib.progress import Progress
from refinelib.guard.monitor import WINDOW, Row
from refinelib.guard.rewind import CHECKPOINT_AFTER, SNAPSHOT_EVERY, DivergedError, Rewinder, Snapshot, diverged
from refinelib.runs import Interruption, Run
from refinelib.samples import write_samples
from refinelib.metrics.predict import predict_probs, score
from refinelib.steplog import StepLog
from refinelib.step import Stepper


#: Target IoU by which the last masks may be worse than those of the untrained weights before a run is not called trained.
WORSE = 0.01


def train(settings: Settings, *, on_epoch: Callable[[Run], None] | None = None) -> Run:
    """Train as the settings say and return the finished (or interrupted) run.

    Args:
        settings: from :func:`refinelib.resolve`.
        on_epoch: called with the run after each epoch's records are on disk (a live panel, say).

    Raises:
        Whatever stopped the run, after ``status.json`` says so in one line. ``KeyboardInterrupt``
        comes after a checkpoint of the very step that was reached. :class:`~refinelib.guard.rewind.DivergedError` when
        skipping and going back did not help; the best checkpoint stays.
    """
    with Interruption() as interruption:
        run = Run.start(settings)
        with run.exclusive():
            return _train(settings, run, on_epoch, interruption)


def _train(settings: Settings, run: Run, on_epoch, interruption: Interruption) -> Run:
    before = run.status() if settings.resume else None
    fresh = {} if settings.resume else dict(epoch=0, step=0, skipped_steps=0, rewinds=0, best=None, metrics=None)
    run.update(state="running", last_error=None, **fresh)
    trainer = None
    try:
        trainer = Trainer(settings, run)
        trainer.fit(interruption, on_epoch)
    except KeyboardInterrupt:
        kept = any((run.folder / "checkpoints").glob("*.pt"))
        run.update(state="interrupted", last_error="interrupted; " + ("go on with resume=true" if kept else "before there was a checkpoint"))
        raise
    except DivergedError as error:
        run.update(state="diverged", last_error=str(error))
        error.run = run
        raise
    except BaseException as error:
        refused = isinstance(error, checkpoints.CheckpointError)
        if before is not None and (refused or trainer is None):  # before its first step: the run is still what it was
            run.update(**before)
        else:
            run.update(state="failed", last_error=str(error) if refused else f"{type(error).__name__}: {error}".splitlines()[0])
        error.run = run  # a notebook shows what there is, and fails with the error in its last cell
        raise
    finally:
        run.close()
    return run


class Trainer:
    """A run's live objects and the loop over them."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self.settings, self.run = settings, run
        self.device = build_device(settings)
        _seed_everything(settings)
        run.record_settings(settings, _device_name(self.device))

        self.train_store, self.val_store = open_splits(settings)
        parts = self.parts = build_step(settings, self.train_store, self.device, prepare=self.start_from if settings.init_from else None)
        self.model, self.average, self.loss, self.guard, self.injector, self.loader = parts
        self.rewinder = Rewinder(
            self.guard, max_consecutive_skips=settings.max_consecutive_skips, max_rewinds=settings.max_rewinds,
            log=lambda: self.log.state_dict(),
        )  # fmt: skip
        self.incidents: list[str] = []  # kinds that were kept
        self.repeats = 0  # looks at a kind already known
        self.guard.resume_updates(capture_enabled=settings.max_incidents > 0)
        self.step = 0  # steps tried: the position in the data
        self.stepper = Stepper(
            settings,
            parts,
            device=self.device,
            steps=settings.epochs * self.loader.steps_per_epoch,
            say=lambda message: run.event("speed", message, step=self.step),
        )
        self.writer = checkpoints.Writer()
        self.probe = Probe(
            run.folder / "gradients", self.parts, self.forward, every=settings.probe_every,
            say=lambda message: run.event("damaged", message, step=self.step),
        )  # fmt: skip
        self.log = StepLog(run, self.loss, self.guard, every=settings.log_every, probe=self.probe)
        self.best: dict[str, Any] | None = None
        self.last_metrics: dict[str, Any] = {}
        self.kept_snapshots: set[Path] = set()  # files that the last checkpoint needs
        self.mean_coverage = torch.as_tensor(self.train_store.mean_coverage())

    @property
    def delivered(self) -> nn.Module:
        """The model that is validated and used: the moving average where there is one."""
        return self.average if self.average is not None else self.model

    # -- the loop ----------------------------------------------------------------------------------
    def fit(self, interruption: Interruption, on_epoch: Callable[[Run], None] | None) -> None:
        settings, per_epoch = self.settings, self.loader.steps_per_epoch
        if settings.resume:
            self.restore()
        total = settings.epochs * per_epoch
        self.run.update(epochs=settings.epochs, steps=total, step=self.step, rois=len(self.train_store))
        self.rewinder.start(self.step)
        interruption.deferred = True
        with contextlib.closing(self.writer), contextlib.closing(self.stepper), Progress(total, self.run.name, "steps", done=self.step, every=30.0) as bar:
            while self.step < total:
                epoch = self.step // per_epoch
                started, end = time.perf_counter(), (epoch + 1) * per_epoch
                plan = self.loader.plan(epoch)
                self.log.monitor.batch_instances = functools.partial(self.people, plan)
                self.model.train()
                self.log.restart_clock()
                while end - per_epoch <= self.step < end:
                    report = self.train_step(plan, self.step % per_epoch)
                    self.step += 1
                    self.log.add(report, self.step, epoch + 1)
                    self.oversee(plan, wait=self.step == end)  # may go back, to an earlier epoch too
                    if self.step < end:  # the state at an epoch's end is kept with its checkpoint
                        self.rewinder.maybe_snapshot(self.step)
                    bar.reach(self.step)
                    if interruption.requested and self.step < end:
                        self.stop(plan)
                if self.step != end or not self.end_epoch(epoch, started):
                    continue
                bar.note(self.epoch_line(epoch, time.perf_counter() - started))
                if on_epoch is not None:
                    on_epoch(self.run)
                if interruption.requested and epoch + 1 < settings.epochs:
                    self.stop(plan)
        self.report_writes(final=True)
        self.raise_unless_trained()
        shutil.rmtree(self.snapshot_file(0).parent, ignore_errors=True)  # nothing goes back to these any more
        self.run.update(state="ok")

    def raise_unless_trained(self) -> None:
        """The end of a run whose every step was finite may yet be no trained model.

        Raises:
            DivergedError: less than half of the steps were applied; or the loss is no lower than at the start and the masks
                are worse than those of the weights that the run began with.
        """
        applied = self.step - self.log.skipped
        if 2 * applied < self.step or not applied:
            raise DivergedError(diverged(f"{applied or 'none'} of {self.step} steps were applied, the others were skipped"))
        if applied < WINDOW:
            return
        first, last = self.rewinder.monitor.first_and_last()
        if last < first:
            return
        score, untrained = _merit(self.last_metrics), _merit(self.untrained_metrics())
        if score < untrained - WORSE:
            raise DivergedError(
                diverged(f"the loss is {last:.3g} and began at {first:.3g}, the target IoU is {score:.3f} and was {untrained:.3f} before training")
            )

    def untrained_metrics(self) -> dict[str, Any]:
        """Metrics of the weights that the run began with."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            model = build_model(self.settings).to(self.device, memory_format=torch.channels_last)
        if self.settings.init_from:
            self.start_from(model)
        return score(functools.partial(self.predict, model=model.eval()), self.val_store, device=self.device, mask_size=self.settings.mask_size).compute()

    def ensure_healthy(self, epoch: int, *, last: bool = False) -> bool:
        """Go back if the state, which is about to be kept, is not finite, or at the run's end has a loss that is too high.

        Returns:
            whether ``step`` is what it was.
        """
        step = self.step
        self.guard.check_state()
        if self.guard.state["damaged"]:
            self.rewind(self.rewinder.damage(), epoch)
        elif last and (reason := self.rewinder.monitor.judge_end()):
            self.rewind(reason, epoch)
        return self.step == step

    def stop(self, plan) -> None:
        """Keep the very step that was reached, and leave."""
        self.oversee(plan, wait=True)
        self.ensure_healthy(self.step // self.loader.steps_per_epoch + 1)
        epochs_done = self.step // self.loader.steps_per_epoch  # it may have gone back
        self.log.monitor.end_epoch(epochs_done + 1)
        self.save("last.pt")
        self.report_writes(final=True)
        with self.worth_less("gradients"):
            self.probe.end_epoch(epochs_done + 1, whole=False)
        self.run.update(step=self.step, epoch=epochs_done, skipped_steps=self.log.skipped)
        raise KeyboardInterrupt

    # -- when a step goes wrong --------------------------------------------------------------------
    def oversee(self, plan, *, wait: bool) -> None:
        """Take in the reports that have arrived: log them, keep incidents, go back when the run is lost.

        With ``wait``, all of them. Afterwards ``step`` may be smaller: after an incident the guard lets nothing through
        until the host has looked at the weights the step met, and the steps in between are taken again.
        """
        rows = self.log.read(wait=wait)
        while rows:
            row = rows.pop(0)
            self.log.record(row)
            if row.report["incident"]:
                self.keep_incident(plan, row)
                self.log.forget()
                self.step, rows = row.step, []
            reason = self.rewinder.update(row)
            if reason is not None:
                for late in (*rows, *self.log.read(wait=True)):  # steps taken before this one was read
                    if not late.report["updates_suspended"]:
                        self.log.record(late)
                    if late.report["incident"]:  # those after it were not taken
                        self.keep_incident(plan, late)
                        self.step = late.step
                self.rewind(reason, row.epoch)
                return

    def people(self, plan, step: int) -> list[dict[str, Any]]:
        """Who was in step number ``step`` (from 1) of the planned epoch."""
        return [self.train_store.instance(roi) for roi in plan.rois[(step - 1) % self.loader.steps_per_epoch].flatten().tolist()]

    def keep_incident(self, plan, row: Row) -> None:
        """Look at a step that went wrong, with the weights it met, and keep what is new; then go on."""
        at = (row.step - 1) % self.loader.steps_per_epoch
        batches = [self.loader.batch(plan, at, micro) for micro in range(self.settings.accumulate)]
        folder = self.run.folder / "incidents" / f"{row.step:06d}"
        gradients = [p.grad for p in self.guard.parameters]  # a captured step writes to these very tensors, and never says so again
        try:
            finding = capture(
                folder,
                row,
                settings=resolve_auto(self.settings, self.device),  # taken again elsewhere, it is the same step
                parts=self.parts,
                batches=[(batch.images, batch.labels) for batch in batches],
                samples=self.people(plan, row.step),
                random=_random_state(self.device),
                known=self.incidents,
            )
        except (OSError, RuntimeError) as error:  # no room on the disk or the device: training is worth more than the record of it
            self.run.event("incident", f"step {row.step}: the incident could not be kept ({error})", step=row.step, epoch=row.epoch)
            self.repeats += 1
        else:
            if finding.phase == "overflow":  # how the loss scale is found
                pass
            elif finding.kind in self.incidents:
                self.repeats += 1
            else:
                self.incidents.append(finding.kind)
                self.run.event(
                    "incident", f"{finding.sentence}; kept in incidents/{folder.name}", step=row.step, epoch=row.epoch,
                    folder=f"incidents/{folder.name}", **finding.as_dict(),
                )  # fmt: skip
            if finding.phase not in ("overflow", "none"):
                self.guard.state["scale"].fill_(row.report["loss_scale"])  # halving it does not help
            if finding.phase == "weights":
                self.guard.check_state()
        finally:
            for p, gradient in zip(self.guard.parameters, gradients):
                p.grad = gradient
        self.guard.resume_updates(capture_enabled=self.looks_for_more)

    @property
    def looks_for_more(self) -> bool:
        """Whether another incident would be kept."""
        return len(self.incidents) < self.settings.max_incidents and self.repeats < self.settings.max_incidents

    def rewind(self, reason: str, epoch: int) -> bool:
        """Restore an earlier state, or end the run. Whether the steps after it are taken again: ``step`` is then the snapshot's."""
        try:
            message, snapshot = self.rewinder.rewind(reason, self.step)
        except DivergedError:
            self.writer.flush()
            self.report_writes()
            self.run.update(step=self.step, epoch=epoch - 1, skipped_steps=self.log.skipped)
            with self.worth_less("gradients"):
                self.probe.end_epoch(epoch, whole=False)
            raise
        self.run.event("rewind", message, step=self.step, epoch=epoch)
        self.run.update(rewinds=self.rewinder.rewinds)
        self.guard.resume_updates(capture_enabled=self.looks_for_more)
        if snapshot is None:
            return False
        self.step = snapshot.step
        self.log.forget()
        self.log.load_state_dict(snapshot.host["log"])
        self.probe.rewind(self.step)
        self.run.rewind_records(self.step, self.step // self.loader.steps_per_epoch, events=False)
        return True

    @contextlib.contextmanager
    def worth_less(self, what: str):
        """For files that are worth less than the training: where there is no room for one, say so and go on."""
        try:
            yield
        except OSError as error:
            epoch = self.step // self.loader.steps_per_epoch
            self.run.event("disk", f"the {what} of epoch {epoch} could not be written ({error})", step=self.step)

    def report_writes(self, *, final: bool = False) -> None:
        """Say which checkpoints could not be written.

        Raises:
            OSError: with ``final``, when the newest of a file is among them.
        """
        if final:
            self.writer.flush()
        for message in self.writer.problems():
            self.run.event("checkpoint", message, step=self.step)
        if final and self.writer.failing:
            raise OSError(f"{'; '.join(self.writer.failing.values())}: make room in {self.run.folder} and go on with resume=true")

    def train_step(self, plan, at: int) -> Tensor:
        """Forward, backward and guarded update of one step; its report, still on the device."""
        return self.stepper.step(plan, at, self.step + 1)

    def forward(self, images: Tensor):
        """The trained model's output for normalised crops, in the run's precision."""
        with autocast(self.settings, self.device):
            return self.model(images.contiguous(memory_format=torch.channels_last))

    def end_epoch(self, epoch: int, started: float) -> bool:
        """Validate, record, keep; or go back, and return False where the epoch's steps are to be taken again."""
        settings = self.settings
        last = epoch + 1 == settings.epochs
        if not self.ensure_healthy(epoch + 1, last=last):
            return False
        self.last_summary = summary = self.log.end_epoch(epoch + 1)
        with self.worth_less("gradients"):
            self.probe.end_epoch(epoch + 1)
        seconds = time.perf_counter() - started  # the reports were read back, so the device is done
        validated = last or (epoch + 1) % settings.validate_every == 0
        metrics = self.look_at_people(epoch, final=last) if validated else {}
        best = validated and (self.best is None or _merit(metrics) > _merit(self.best))
        if best:
            self.best = {"epoch": epoch + 1, "step": self.step, **{name: metrics[name] for name in ("target_iou", "boundary_iou", "miou")}}
        self.last_metrics = metrics
        self.run.metrics({"kind": "epoch", "epoch": epoch + 1, "step": self.step, **summary, "metrics": metrics, "seconds": round(seconds, 3)})
        self.report_writes()
        kept = (epoch + 1) % settings.save_every == 0 or last
        self.rewinder.maybe_snapshot(self.step, after=CHECKPOINT_AFTER if kept else SNAPSHOT_EVERY)
        self.save(*["best.pt"] * bool(best), *["last.pt"] * kept)
        scored = dict(best=self.best, metrics=metrics) if validated else {}
        self.run.update(epoch=epoch + 1, step=self.step, skipped_steps=self.log.skipped, **scored)
        return True

    def look_at_people(self, epoch: int, *, final: bool) -> dict[str, Any]:
        """Metrics on the validation people, and some of their masks for whoever looks at the run."""
        found = self.validate(final=final)
        with self.worth_less("samples"):
            write_samples(
                self.run.folder / "samples" / f"epoch_{epoch + 1:04d}.npz",
                self.val_store,
                self.predict,
                found.per_roi()["target_iou"],
                device=self.device,
                mask_size=self.settings.mask_size,
            )
        return found.compute()

    def epoch_line(self, epoch: int, seconds: float) -> str:
        """One line about the epoch just ended."""
        metrics, summary = self.last_metrics, self.last_summary

        def shown(name: str) -> str:
            return "none" if metrics[name] is None else f"{metrics[name]:.3f}"

        names = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU", "miou": "mIoU"}
        scores = "".join(f"{words} {shown(name)}  " for name, words in names.items()) if metrics else ""
        return (
            f"epoch {epoch + 1:>4}/{self.settings.epochs}  loss {summary['train_loss']:.4f}  gradient norm {summary['grad_norm']:.3g}  "
            f"{scores}skipped {self.log.skipped}  {seconds:.1f} s"
        )

    def predict(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Class probabilities of normalised crops in the run's precision, by the delivered model or another."""
        with autocast(self.settings, self.device):
            return predict_probs(model or self.delivered, images, flip=self.settings.flip_test, weights=self.settings.decision_weights)

    def validate(self, *, final: bool = False):
        """Metrics of the delivered model on the validation people."""
        self.delivered.eval()
        found = score(self.predict, self.val_store, device=self.device, mask_size=self.settings.mask_size, full=final)
        self.model.train()
        return found

    # -- what it leaves ----------------------------------------------------------------------------
    def save(self, *names: str) -> None:
        """Have a complete checkpoint written under each name, and before it the snapshots that a rewind would need.

        A snapshot has a file of its own, written once. Those that neither the checkpoint on disk nor this one needs go.
        """
        if not names:
            return
        self.log.write_line()
        folder, content = self.run.folder / "checkpoints", checkpoints.to_cpu(self.state_dict())
        needed = {self.snapshot_file(snapshot.step): snapshot for snapshot in self.rewinder.snapshots}
        for file, snapshot in needed.items():
            if file not in self.kept_snapshots:
                file.parent.mkdir(exist_ok=True)
                self.writer.save(file, snapshot.state_dict(), copy=True)
        for name in names:
            self.writer.save(folder / name, content, copy=False)
        for file in set(self.snapshot_files()) - self.kept_snapshots - needed.keys():
            file.unlink(missing_ok=True)
        self.kept_snapshots = set(needed)

    def snapshot_file(self, step: int) -> Path:
        return self.run.folder / "checkpoints" / "snapshots" / f"{step:08d}.pt"

    def snapshot_files(self) -> list[Path]:
        return sorted((self.run.folder / "checkpoints" / "snapshots").glob("*.pt"))

    def load_snapshots(self, saved: dict[str, Any]) -> list[Snapshot]:
        """The snapshots of a checkpoint that are whole; an event says which are not. Those of later steps are deleted."""
        found, live = [], self.guard.tensors()
        if not self.snapshot_file(0).parent.is_dir():  # the run had ended, and goes on with more epochs
            return []
        for file in self.snapshot_files():
            if not file.stem.isdigit() or int(file.stem) > saved["position"]["step"]:
                file.unlink()
        for step, *_ in saved["recovery"].get("snapshots", []):
            file = self.snapshot_file(step)
            try:
                content = checkpoints.load(file, needs=("tensors", "memory", "host"))
                tensors = content["tensors"]
                fits = all(name in live and live[name].shape == x.shape for name, x in tensors.items() if not name.startswith("optimizer."))
                if not fits or not tensors or checkpoints.nonfinite({**tensors, "memory": content["memory"]}):
                    raise checkpoints.CheckpointError(f"{file} is not of this run")
                tensors = {name: x.to(self.device) for name, x in tensors.items()}
                found.append(Snapshot(step, tensors, content["memory"].to(self.device), content["host"]))
                self.kept_snapshots.add(file)
            except (checkpoints.CheckpointError, KeyError, TypeError, AttributeError) as error:
                self.run.event("checkpoint", f"a snapshot cannot be used, a rewind will not go there: {error}", step=saved["position"]["step"])
        return found

    def start_from(self, model: nn.Module) -> None:
        """Give a fresh model the weights that ``init_from`` names."""
        source = checkpoints.find(self.settings.init_from, output_dir=self.settings.output_dir)
        saved = checkpoints.load(source, needs=("model", "average", "settings"))
        load_weights(model, {**saved, "model": saved["average"] or saved["model"]}, str(source))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "guard": self.guard.state_dict(),
            "position": {"step": self.step, "epoch": self.step // self.loader.steps_per_epoch, "steps_per_epoch": self.loader.steps_per_epoch},
            "log": self.log.state_dict(),
            "recovery": {**self.rewinder.state_dict(), "incidents": list(self.incidents), "repeats": self.repeats},
            "random": _random_state(self.device),
            "best": self.best,
            "settings": self.settings.model_dump(mode="json"),
            "mean_coverage": self.mean_coverage,
            "people": self.train_store.identity,
        }

    def restore(self) -> None:
        """Take up the newest whole checkpoint of the run, and say what was wrong with the others."""
        path, saved, problems = checkpoints.newest_whole(self.run.folder / "checkpoints", check=self.check)
        step, epoch = saved["position"]["step"], saved["position"]["epoch"]
        load_weights(self.model, saved, str(path))
        if self.average is not None:
            self.average.load_state_dict(saved["average"] or saved["model"])
        self.guard.load_state_dict(saved["guard"])
        self.log.load_state_dict(saved["log"])
        self.incidents, self.repeats = list(saved["recovery"]["incidents"]), saved["recovery"]["repeats"]
        self.guard.resume_updates(capture_enabled=self.looks_for_more)  # by the max_incidents of now
        _restore_random(saved["random"], self.device)
        self.step, self.best = step, saved["best"]
        self.run.rewind_records(step, epoch)
        for problem in problems:
            self.run.event("checkpoint", problem, step=step)
        self.rewinder.load_state_dict(saved["recovery"], self.load_snapshots(saved))
        self.run.event("resume", f"resumed from {path.name} at step {step}", step=step)
        validations = self.run.validations()
        self.last_metrics = validations[-1]["metrics"] if validations else {}
        self.run.update(epoch=epoch, step=step, skipped_steps=self.log.skipped, best=self.best, metrics=self.last_metrics or None)
        if path.name != "last.pt":  # it is now the last
            self.rewinder.start(step)
            self.save("last.pt")

    def check(self, path: Path, saved: dict[str, Any]) -> None:
        """Whether this run can go on from a checkpoint.

        Raises:
            CheckpointError: it has other settings, data or sizes, or is not finite; the message names it.
        """
        refuse_other_settings(self.settings, saved["settings"])
        if saved["position"]["steps_per_epoch"] != self.loader.steps_per_epoch:
            raise checkpoints.CheckpointError(
                f"{path} was made with {saved['position']['steps_per_epoch']} steps an epoch, this run has {self.loader.steps_per_epoch}: "
                "resume with the data, batch_size and accumulate that it was started with"
            )
        if saved.get("people") not in (None, self.train_store.identity):
            raise checkpoints.CheckpointError(
                f"{path} was made with other people than the {len(self.train_store)} that this run has: resume with the data that it was started with, "
                "or start a new run from these weights with init_from"
            )
        check_weights(self.model, saved, str(path))
        guard = saved["guard"]
        broken = checkpoints.nonfinite({"average": saved["average"], "optimizer": guard["optimizer"]["state"], "guard": guard["state"]})
        if broken:
            raise checkpoints.CheckpointError(f"{path} holds values that are not finite (first {broken[0]}): start from another checkpoint")


#: Settings that a resumed run may have changed: none of them changes what is learnt, or how (``epochs`` stretches what is left of the rate's way down).
_FREE_TO_CHANGE = {"add_pennfudan", "epochs", "init_from", "max_rewinds"}


def refuse_other_settings(settings: Settings, then: dict[str, Any]) -> None:
    """A run that resumed with another learning rate, optimizer or precision would be neither the old one nor the new.

    Raises:
        CheckpointError: names each setting that differs.
    """
    now = settings.model_dump(mode="json")
    free = names_with_role("run", "inference") | _FREE_TO_CHANGE
    changed = [f"{k} was {then[k]}, is {now[k]}" for k in then if k in now and k not in free and then[k] != now[k]]
    if changed:
        raise checkpoints.CheckpointError(
            f"resume goes on with the settings it was started with, and {'; '.join(changed)}: leave that as it was, "
            "or start a new run from these weights with init_from"
        )


def check_weights(model: nn.Module, saved: dict[str, Any], source: str) -> None:
    """Whether a checkpoint's weights fit a model.

    Raises:
        CheckpointError: shapes differ, or one of the two lacks a part that is no refinement; something in it is not finite.
    """
    weights = saved["model"]
    refinements = ("progressive.", "subpixel.", "contour.", "distance.", "boundary.")
    own = model.state_dict()
    apart = [name for name in own.keys() ^ weights.keys() if not name.startswith(refinements)]
    apart += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if apart:
        sizes = ", ".join(f"{name} {saved['settings'].get(name, 1):g}" for name in ("width", "coarse_width", "coarse_depth"))
        raise checkpoints.CheckpointError(f"the weights in {source} do not fit this model (first {min(apart)}): use the sizes it was trained with, {sizes}")
    broken = [name for name in own if name in weights and not bool(weights[name].isfinite().all())]
    if broken:
        raise checkpoints.CheckpointError(f"the weights in {source} are not finite (first {broken[0]}): start from another checkpoint")


def load_weights(model: nn.Module, saved: dict[str, Any], source: str) -> None:
    """Weights of a checkpoint into a model; what only one of them has is left as it is where it is a refinement.

    Raises:
        CheckpointError: see :func:`check_weights`.
    """
    check_weights(model, saved, source)
    own, weights = model.state_dict(), saved["model"]
    model.load_state_dict({**own, **{name: value for name, value in weights.items() if name in own}})


def _merit(metrics: dict[str, Any]) -> float:
    """What the best checkpoint is the best by: target IoU; below all of them where nobody is a target."""
    return -1.0 if metrics["target_iou"] is None else metrics["target_iou"]


def _seed_everything(settings: Settings) -> None:
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS refuses
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = not settings.deterministic


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
