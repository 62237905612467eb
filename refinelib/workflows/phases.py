"""Progressive training: phases one after the other, each from the weights of the one before, a gate after each.

A chain is a folder ``outputs/<name>/`` with ``progressive.json`` (phases, runs, gates' decisions), ``status.json`` (how it stands, in
a sentence) and one ordinary run folder a phase. Both files are replaced in one step before and after anything that takes
time, so that a chain that was killed is taken up where it stopped: what has passed its gate is kept, the phase it stopped in
resumes from its checkpoint.
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from refinelib.config import Settings, absolute
from refinelib.locking import alone
from refinelib.workflows.gates import judge
from refinelib.workflows.phase_plan import ADDS, Plan, read_state
from refinelib.runs import Run, RunError, dumps, write_atomically


class PhaseError(RuntimeError):
    """A phase broke off or did not pass its gate; the message says which and why."""


def advance(plan: Plan, on_epoch: Callable[[Run], None] | None = None) -> Path:
    """Train what is left of a chain, phase by phase, until all have passed or one has not.

    A phase that breaks off or is held at its gate ends the chain; ``progressive.json`` and ``status.json`` say so, and :func:`conclude`
    raises it, so that a notebook can first draw what there is.

    Args:
        plan: the phases and their settings.
        on_epoch: called with the run after each epoch of each phase, such as ``widgets.live_panel()``.

    Returns:
        the chain's folder.

    Raises:
        RunError: another process is at this chain.
        KeyboardInterrupt: after the state is on disk.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _alone(plan.folder):
        state = _taken_up(plan)
        before, source = state["before"], plan.init_from
        for name in plan.settings:
            entry = next(item for item in state["phases"] if item["phase"] == name)
            if entry["state"] == "passed":
                print(f"{name}: passed before, kept", flush=True)
            elif not _one(plan, state, entry, before, source, on_epoch):
                return plan.folder
            before, source = entry["after"], str(plan.folder / entry["run"])
        _write(plan.folder, state, state="ok", last_error=None, phase=None)
    return plan.folder


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """The state of a chain on disk.

    Raises:
        RunError: there is none, or it is damaged.
    """
    for place in (Path(folder).expanduser(), absolute("outputs") / folder, absolute(folder)):
        if (place / "progressive.json").is_file():
            return read_state(place / "progressive.json") | {"folder": str(place)}
    raise RunError(f"there is no chain of phases in {folder}: give a folder that holds progressive.json")


def conclude(folder: str | os.PathLike) -> str:
    """How a chain stands, a line a phase.

    Raises:
        PhaseError: it did not get through; the message is the sentence in ``status.json``.
    """
    state = read(folder)
    if state["state"] != "ok":
        raise PhaseError(state.get("last_error") or f"the chain in {folder} is {state['state']}: run it again to go on")
    lines = [f"{entry['phase']:10} {entry['state']:10} {entry['run']}" for entry in state["phases"]]
    return "\n".join([*lines, f"{len(lines)} of {len(lines)} phases passed their gates"])


def table(folder: str | os.PathLike) -> str:
    """What each phase added, as a Markdown table; in brackets the change from the phase before."""
    state = read(folder)
    lines = ["| phase | adds | epochs | target IoU | Boundary IoU | mIoU | loss, first to last epoch | skipped steps | minutes | gate |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    before = state["before"]
    for entry in state["phases"]:
        run = Run(Path(state["folder"]) / entry["run"]) if entry["run"] else None
        epochs = run.epochs() if run else []
        status = run.status() if run and (run.folder / "status.json").is_file() else {}
        after = entry["after"] or status.get("best") or {}
        scores = " | ".join(_change(after.get(key), (before or {}).get(key)) for key in ("target_iou", "boundary_iou", "miou"))
        losses = [f"{line['train_loss']:.3f}" if line["train_loss"] is not None else "not finite" for line in epochs]
        minutes = sum(line["seconds"] for line in epochs) / 60
        lines.append(
            f"| {entry['phase']} | {ADDS[entry['phase']]} | {len(epochs) or ''} | {scores} | {' to '.join(losses[:1] + losses[1:][-1:])} | "
            f"{status.get('skipped_steps', '')} | {f'{minutes:.1f}' if epochs else ''} | {_gate_word(entry)} |"
        )
        before = entry["after"] or before
    return "\n".join(lines)


# -- one phase -------------------------------------------------------------------------------------
def _one(plan: Plan, state: dict, entry: dict, before: dict | None, source: str | None, on_epoch: Callable[[Run], None] | None) -> bool:
    """Train one phase, or what is left of it, and judge it; False: it broke off or was held."""
    from refinelib import checkpoints  # torch
    from refinelib.trainer import train

    name, settings = entry["phase"], plan.settings[entry["phase"]]
    run = Run(plan.folder / entry["run"]) if entry["run"] else None
    there = run is not None and (run.folder / "status.json").is_file()
    if not (there and run.status()["state"] == "ok"):
        resume = there and any((run.folder / "checkpoints").glob("*.pt"))
        if not resume:
            entry["run"] = _free(plan.folder, name)
        entry.update(state="running", settings=settings.model_dump(mode="json"), gate=None, after=None)
        _write(plan.folder, state, state="running", phase=name, last_error=None)
        from_what = f"{entry['run']} resumes from its checkpoint" if resume else f"starts from {source or 'scratch'}"
        print(f"{name} ({ADDS[name]}): {from_what}", flush=True)
        try:
            if source is not None:  # outside the chain, it may be meant by a name under outputs/
                source = str(checkpoints.find(source, output_dir=str(plan.folder.parent)))
                if before is None:
                    before = state["before"] = _starting_score(settings, source)
            given = {"run": entry["run"], "resume": resume, "init_from": None if resume else source}
            run = train(settings.model_copy(update=given), on_epoch=on_epoch)
        except KeyboardInterrupt:
            entry["state"] = "interrupted"
            _write(plan.folder, state, state="interrupted", last_error=f"{name} was interrupted; run the chain again to go on")
            raise
        except Exception as error:  # on record in the run's own status too
            entry["state"] = "failed"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            _write(plan.folder, state, state="failed", last_error=f"{name} broke off, {reason}")
            print(f"{name}: broke off, {reason}", flush=True)
            return False
    decisions = judge(run, before, margin=plan.margin)
    held = [decision for decision in decisions if not decision.passed]
    entry.update(state="held" if held else "passed", gate=[decision._asdict() for decision in decisions], margin=plan.margin)
    entry["after"] = run.status().get("best")
    for decision in decisions:
        print(f"{name}: {'passed' if decision.passed else 'HELD':7} {decision.name}: {decision.sentence}", flush=True)
    sentence = "; ".join(f"{decision.name}: {decision.sentence}" for decision in held)
    sentence = f"{name} did not pass its gate, {sentence}. Its run is {run.folder.name}; set retry to train it again" if held else None
    _write(plan.folder, state, state="failed" if held else "running", last_error=sentence)
    return not held


def _starting_score(settings: Settings, source: str) -> dict[str, Any]:
    """Scores of the weights that a phase starts from, its own new modules untrained, on its validation people."""
    import torch

    from refinelib import checkpoints
    from refinelib.build import autocast, build_device, build_model
    from refinelib.data import open_splits
    from refinelib.metrics.scoring import predict_probs, score
    from refinelib.trainer import load_weights

    device = build_device(settings)
    _, store = open_splits(settings)
    torch.manual_seed(settings.seed)
    model = build_model(settings).to(device, memory_format=torch.channels_last).eval()
    saved = checkpoints.load(source)
    load_weights(model, {**saved, "model": saved["average"] or saved["model"]}, source)
    with autocast(settings, device):
        predict = functools.partial(predict_probs, model, flip=settings.flip_test, weights=settings.decision_weights)
        found = score(predict, store, device=device, mask_size=settings.mask_size).compute()
    return {key: found[key] for key in ("target_iou", "boundary_iou", "miou")}


# -- state on disk ---------------------------------------------------------------------------------
def _write(folder: Path, state: dict[str, Any], /, **changes: Any) -> None:
    state.update(changes, updated=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    write_atomically(folder / "progressive.json", dumps(state, indent=1))
    done = [entry["phase"] for entry in state["phases"] if entry["state"] == "passed"]
    short = {key: state.get(key) for key in ("state", "last_error", "phase", "updated")} | {"passed": done}
    write_atomically(folder / "status.json", dumps(short, indent=1))


def _taken_up(plan: Plan) -> dict[str, Any]:
    """The chain's state: what is on disk, with the phases that are new to it."""
    fresh = [{"phase": name, "state": "waiting", "run": None, "gate": None, "after": None, "settings": None} for name in plan.settings]
    if not (plan.folder / "progressive.json").is_file():
        start = {"name": plan.folder.name, "state": "running", "last_error": None}
        return {**start, "init_from": plan.init_from, "before": None, "phases": fresh}
    state = read(plan.folder)
    del state["folder"]
    state["phases"] += fresh[len(state["phases"]) :]
    for entry in state["phases"]:
        if entry["state"] == "held" and plan.retry:
            entry.update(state="waiting", run=None, gate=None, after=None)
    return state


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a chain at a time, where there are locks."""
    with alone(folder, RunError(f"another process is training the phases in {folder}: wait for it, or give another name")):
        yield


# -- helpers ---------------------------------------------------------------------------------------
def _free(folder: Path, name: str) -> str:
    number = 1
    while (folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"


def _change(value: float | None, before: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ({value - before:+.3f})" if before is not None else "")


def _gate_word(entry: dict[str, Any]) -> str:
    held = [decision["name"] for decision in entry["gate"] or [] if not decision["passed"]]
    return f"held: {', '.join(held)}" if held else entry["state"]
