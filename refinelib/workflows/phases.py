"""Progressive training: plan the phases, run them one after the other, accept or reject each.

A phase sequence is a folder ``outputs/<name>/`` with ``progressive.json`` (phases, runs, acceptance checks),
``status.json`` (the state and the last error) and one run folder a phase. Both files are replaced before and
after each phase, each in one step. The same call therefore continues a sequence that was killed: accepted
phases are kept, and the phase that was interrupted resumes from its checkpoint.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refinelib import checkpoints
from refinelib.config import Settings, SettingsError, absolute, names_with_role, plain_values, resolve
from refinelib.data import open_splits
from refinelib.files import dumps, exclusive, numbered, owner, read_json, was_killed, write_atomically
from refinelib.metrics import predict
from refinelib.runs import Run, RunError, is_free
from refinelib.trainer import train
from refinelib.workflows.checks import Check

#: What each phase adds to the one before.
ADDS = {
    "phase1": "boundary refinement, boundary-aware loss",
    "phase2": "active contour loss",
    "phase3": "contour detection",
    "phase4": "distance transform",
    "finetune": "progressive upsampling, smaller steps",
}
STATE = "progressive.json"
State = dict[str, Any]
SCORES = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU"}
NOT_BEGUN = {"state": "waiting", "run": None, "acceptance": None, "after": None, "settings": None}
#: Largest fraction of a phase's steps that the guard may have skipped.
MAX_SKIPPED = 0.05
#: Noise of the loss, as a fraction of it, above which a phase is too short to tell whether its loss falls.
MAX_NOISE = 0.05


class PhaseError(RuntimeError):
    """A phase failed or was rejected; the message says which and why."""


# -- plan ------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """What to train; made by :func:`plan`."""

    folder: Path
    settings: dict[str, Settings]  # by phase, in order
    init_from: str | None
    margin: float


def plan(
    *,
    phases: Any = None,
    phase: Any = None,
    init_from: str | None = None,
    name: str | None = None,
    margin: float = 0.02,
    **given: Any,
) -> Plan:
    """Check what is to be trained, before any work.

    A sequence of this name that exists is continued; it is never overwritten.

    Args:
        phases: which, in order, such as ``[1, 2, "finetune"]`` or ``"1,2"``; none: 1 to 4, then fine-tuning.
        phase: one alone, in place of ``phases``; all but the first then need ``init_from``.
        init_from: run or checkpoint whose weights the first phase starts from; none: from scratch.
        name: of the folder under ``output_dir``; none: ``progressive``, or ``phase3-alone``.
        margin: by how much target IoU and Boundary IoU may fall in a phase.
        **given: settings of all phases by name.

    Raises:
        SettingsError: the message says what is wrong.
    """
    if phase is not None and phases is not None:
        raise SettingsError("phase is one phase alone and phases a list of them: give one of the two")
    for key in ("recipe", "run", "resume"):
        if (value := given.get(key)) is not None:
            hint = "progressive training sets it itself; choose phases, phase and name"
            raise SettingsError(f"{key} = {value!r}: {hint}")
    text = str(phases if phase is None else phase).lower().replace("fine-tuning", "finetune")
    words = [word for word in re.findall(r"\w+", text) if word != "none"]
    names = [f"phase{word}" if word.isdigit() else word for word in words] or list(ADDS)
    if unknown := [word for word, name in zip(words, names, strict=False) if name not in ADDS]:
        raise SettingsError(f"there is no phase {unknown[0]}: give 1, 2, 3, 4 or finetune")
    if len(set(names)) < len(names):
        raise SettingsError(f"phases = {', '.join(names)}: each phase once")
    init_from = None if str(init_from).lower() in ("none", "") else str(init_from)
    if phase is not None and names[0] != "phase1" and init_from is None:
        hint = f"give init_from, such as -p init_from outputs/progressive/phase{list(ADDS).index(names[0])}"
        raise SettingsError(f"{names[0]} alone starts from the phase before: {hint}")
    if not 0 <= float(margin) <= 1:
        raise SettingsError(f"margin = {margin!r}: give an IoU from 0 to 1, such as 0.02")
    name = str(name or (f"{names[0]}-alone" if phase is not None else "progressive"))
    root = resolve(names[0], **given, init_from="none", run=name).output_dir  # refuses what is no name
    given["store_dir"] = given.get("store_dir") or f"{root}/stores"  # shared by all sequences
    given |= {"init_from": "none", "output_dir": f"{root}/{name}"}
    settings = {one: resolve(one, **given, run=one) for one in names}
    made = Plan(absolute(root) / name, settings, init_from, float(margin))
    if (made.folder / STATE).is_file() and (difference := _difference(made)):
        begun = f"the phase sequence in {made.folder} was begun differently: {difference}"
        raise SettingsError(f"{begun}; give another name, or continue it with the same settings")
    return made


def from_notebook(namespace: Mapping[str, Any]) -> Plan:
    """The plan that a notebook's parameter cells give; see :func:`refinelib.config.from_notebook`."""
    return plan(**plain_values(namespace))


def _difference(made: Plan) -> str:
    """How the plan differs from what was begun, in what a step depends on; empty: not at all."""
    state = read(made.folder)
    then, now = [entry["phase"] for entry in state["phases"]], list(made.settings)
    if any(a != b for a, b in zip(then, now, strict=False)):
        return f"phases were {', '.join(then)} and are {', '.join(now)}"
    free = names_with_role("run") | {"init_from"}
    for entry in (entry for entry in state["phases"][: len(now)] if _has_begun(made, entry)):
        if state["init_from"] != made.init_from:
            return f"init_from was {state['init_from']} and is {made.init_from}"
        new = made.settings[entry["phase"]].model_dump(mode="json")
        for key, old in entry["settings"].items():
            if key in new and key not in free and new[key] != old:
                return f"in {entry['phase']}, {key} was {old} and is {new[key]}"
    return ""


def _has_begun(made: Plan, entry: State) -> bool:
    """Whether a phase's run took a step; one that failed before may be started with other settings."""
    return entry["settings"] is not None and not is_free(made.folder / entry["run"])


# -- run -------------------------------------------------------------------------------------------
def run(made: Plan, on_epoch: Callable[[Run], None] | None = None) -> Path:
    """Train the phases that are left, until all are accepted or one is not.

    A phase that fails or is rejected ends the sequence. Both files say so, and :func:`raise_if_failed` raises
    it: a notebook can draw its figures first.

    Args:
        made: phases and their settings.
        on_epoch: called with the run after each epoch of each phase, such as ``widgets.live_panel()``.

    Returns:
        the sequence's folder.

    Raises:
        RunError: another process trains this sequence.
        KeyboardInterrupt: after both files are written.
    """
    made.folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process is training the phases in {made.folder}: wait for it, or give another name"
    with exclusive(made.folder, RunError(busy)):
        state: State = {"name": made.folder.name, "init_from": made.init_from, "before": None}
        state |= read(made.folder) if (made.folder / STATE).is_file() else {"phases": []}
        fresh = [{"phase": name, **NOT_BEGUN} for name in made.settings]
        state["phases"] += fresh[len(state["phases"]) :]
        if not any(_has_begun(made, entry) for entry in state["phases"]):
            state |= {"init_from": made.init_from, "before": None}
        source = made.init_from
        for number, entry in enumerate(state["phases"][: len(made.settings)]):
            name = entry["phase"]
            try:
                if entry["state"] != "passed":
                    trained = _train(made, state, entry, source, on_epoch)
                    before = state["phases"][number - 1]["after"] if number else state["before"]
                    checks = accept(trained, before, margin=made.margin)
                    entry.update(acceptance=[check._asdict() for check in checks], margin=made.margin)
                    entry["after"] = trained.status().get("best")
                    print(*(f"{name}: {check}" for check in checks), sep="\n")
                    if failed := [f"{check.name}: {check.sentence}" for check in checks if not check.passed]:
                        hint = "raise margin to accept it, or train the phase alone with other settings"
                        raise PhaseError(f"{'; '.join(failed)}. Its run is {trained.folder.name}; {hint}")
                    entry["state"] = "passed"
                print(f"{name}: accepted", flush=True)
            except (KeyboardInterrupt, Exception) as error:  # the run's own status has it too
                word = {KeyboardInterrupt: "interrupted", PhaseError: "rejected"}.get(type(error), "failed")
                kind = "" if word == "rejected" else f"{type(error).__name__}: "
                reason, entry["state"] = f"{name} {word}, {kind}{error}".splitlines()[0], word
                _write(made.folder, state, state="failed" if word == "rejected" else word, last_error=reason)
                print(reason, flush=True)
                if word == "interrupted":
                    raise
                return made.folder
            source = str(made.folder / entry["run"])
        _write(made.folder, state, state="ok", last_error=None, phase=None)
    return made.folder


def _train(made: Plan, state: State, entry: State, source: str | None, on_epoch: Any) -> Run:
    """Train what is left of one phase."""
    name, settings = entry["phase"], made.settings[entry["phase"]]
    begun = made.folder / (entry["run"] or name)
    if entry["run"] and (begun / "status.json").is_file() and Run(begun).status()["state"] == "ok":
        return Run(begun)
    resume = bool(entry["run"]) and Run(begun).has_checkpoint
    if not resume:
        entry["run"] = next(folder for folder in numbered(name) if is_free(made.folder / folder))
    entry.update(NOT_BEGUN, state="running", run=entry["run"], settings=settings.model_dump(mode="json"))
    _write(made.folder, state, state="running", phase=name, last_error=None, **owner())
    start = f"{entry['run']} resumes from its checkpoint" if resume else f"starts from {source or 'scratch'}"
    print(f"{name} ({ADDS[name]}): {start}", flush=True)
    if source is not None:
        source = str(checkpoints.find(source, output_dir=str(made.folder.parent)))
        if made.init_from is not None and state["before"] is None:
            # The source's own scores may be of other images: measure it as this phase is measured.
            predictor = predict.load(source, device=settings.device)
            size = {key: getattr(predictor.settings, key) for key in ("roi_size", "mask_size", "context")}
            _, store = open_splits(settings.model_copy(update=size))
            where = {"device": predictor.device, "mask_size": size["mask_size"]}
            found = predict.score(predictor.roi_probs, store, **where).compute()
            state["before"] = {key: found[key] for key in SCORES}
    changes = {"run": entry["run"], "resume": resume, "init_from": None if resume else source}
    return train(settings.model_copy(update=changes), on_epoch=on_epoch)


# -- accept ----------------------------------------------------------------------------------------
def accept(trained: Run, before: dict[str, Any] | None, *, margin: float) -> list[Check]:
    """The acceptance checks of a trained phase: finite, no worse, loss falling.

    Args:
        trained: run of the phase.
        before: ``target_iou`` and ``boundary_iou`` of the weights it started from; none: from scratch.
        margin: by how much either may fall.
    """
    scores = no_worse(trained.status().get("best") or {}, before or {}, margin=margin)
    falling = loss_falling([line["loss"] for line in trained.steps()], scratch=before is None)
    return [finite(trained), scores, falling]


def finite(trained: Run) -> Check:
    """The run ended well, losses and weights of its checkpoints are finite, few steps were skipped."""
    status, wrong = trained.status(), []
    skipped = f"{status['skipped_steps']} of {status['step']} steps were skipped"
    if status["state"] != "ok":
        wrong.append(f"the run is {status['state']}: {status.get('last_error') or 'it recorded no error'}")
    if status["skipped_steps"] > MAX_SKIPPED * status["step"]:
        wrong.append(f"{skipped}, more than {MAX_SKIPPED:.0%}; events.jsonl says why")
    lost = [line["epoch"] for line in trained.epochs() if line["train_loss"] is None]
    wrong += [f"the loss of epoch {epoch} is not finite" for epoch in lost]
    for file in sorted((trained.folder / "checkpoints").glob("*.pt")):
        saved = checkpoints.load(file)
        broken = [name for part in ("model", "average") for name in checkpoints.nonfinite(saved[part])]
        wrong += [f"{name} in {file.name} is not finite" for name in broken]
    return Check("finite", not wrong, [*wrong, f"every loss and weight is; {skipped}"][0])


def no_worse(after: dict[str, Any], before: dict[str, Any], *, margin: float) -> Check:
    """Target IoU and Boundary IoU of the best epoch are at most ``margin`` below the scores before."""
    fell, shown = [], []
    for key, name in SCORES.items():
        old, new = before.get(key), after.get(key)
        fell += [name] if new is None or (old is not None and new < old - margin) else []
        change = " to ".join(f"{value:.3f}" for value in (old, new) if value is not None)
        shown.append(f"{name} {change}" if new is not None else f"{name} was never measured")
    limit = f"fell by more than {margin:g}: {' and '.join(fell)}" if fell else f"at most {margin:g} lower"
    return Check("no worse than before", not fell, f"{', '.join(shown)} ({limit})")


def loss_falling(recorded: list[float | None], *, scratch: bool) -> Check:
    """The loss at the end against the loss at the start, and both against its noise.

    Start and end are the first and last quarter of the recorded windows of steps. The noise is three standard
    errors of their difference. A rise above the noise fails. From scratch a constant loss fails too,
    unless the noise is above ``MAX_NOISE``; from trained weights it passes.
    """
    losses = [loss for loss in recorded if loss is not None]
    if len(losses) < len(recorded) / 2:
        passed, found = False, f"{len(recorded) - len(losses)} of {len(recorded)} losses are not finite"
    elif len(losses) < 4:
        passed = not scratch
        found = f"only {len(losses)} losses are recorded, too few to tell: lower log_every"
    else:
        quarter = max(2, len(losses) // 4)
        start, end = losses[:quarter], losses[-quarter:]
        first, last = statistics.fmean(start), statistics.fmean(end)
        noise = 3 * ((statistics.variance(start) + statistics.variance(end)) / quarter) ** 0.5
        rose, fell, noisy = last > first + noise, last < first - noise, noise > MAX_NOISE * first
        word = "rose" if rose else "fell" if fell else "is within its noise" if noisy else "is constant"
        passed = fell or (not rose and (noisy or not scratch))
        found = f"the loss {word}, {first:.3f} to {last:.3f}, noise {noise:.3f}"
        if not passed:
            found += ": try a smaller lr" if rose else ": try notebooks/debug.ipynb or a larger lr"
    return Check("loss falling", passed, found)


# -- state -----------------------------------------------------------------------------------------
def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a phase sequence on disk, and under ``folder`` where it is.

    Raises:
        RunError: there is none, or it is damaged.
    """
    places = (Path(folder).expanduser(), absolute("outputs") / folder, absolute(folder))
    place = next((path for path in places if (path / STATE).is_file()), None)
    if place is None:
        raise RunError(f"there is no phase sequence in {folder}: give a folder that holds {STATE}")
    try:
        state = dict(read_json(place / STATE))
        for entry in state["phases"]:
            if "gate" in entry:  # files of November 2026
                entry["acceptance"] = entry.pop("gate")
                entry["state"] = "rejected" if entry["state"] == "held" else entry["state"]
            if not {"phase", *NOT_BEGUN} <= entry.keys():
                raise ValueError("an entry lacks a field")
        if was_killed(place, state):
            error = f"{state['phase']} was killed: run it again to continue"
            state |= {"state": "killed", "last_error": error}
            for entry in state["phases"]:
                entry["state"] = "killed" if entry["state"] == "running" else entry["state"]
        return {**state, "state": str(state["state"]), "init_from": state["init_from"], "folder": str(place)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        hint = "its runs are whole: give the sequence another name, or start from one of them with init_from"
        raise RunError(f"{place / STATE} is damaged, {hint}") from None


def _write(folder: Path, state: State, /, **changes: Any) -> None:
    state.update(changes, updated=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    state.pop("folder", None)
    write_atomically(folder / STATE, dumps(state, indent=1))
    status = {key: state.get(key) for key in ("state", "last_error", "phase", "updated", *owner())}
    status["passed"] = [entry["phase"] for entry in state["phases"] if entry["state"] == "passed"]
    write_atomically(folder / "status.json", dumps(status, indent=1))


def raise_if_failed(folder: str | os.PathLike[str]) -> str:
    """The phases and their runs, a line each.

    Raises:
        PhaseError: not all phases were accepted; the message is ``last_error`` of ``status.json``.
    """
    state = read(folder)
    if state["state"] != "ok":
        raise PhaseError(state.get("last_error") or f"{folder} is {state['state']}: run it again to continue")
    lines = [f"{entry['phase']:10} {entry['state']:10} {entry['run']}" for entry in state["phases"]]
    return "\n".join([*lines, f"{len(lines)} of {len(lines)} phases accepted"])


def runs(folder: str | os.PathLike[str]) -> list[Run]:
    """The run of each phase that has begun, in order."""
    state = read(folder)
    found = [Run(Path(state["folder"]) / entry["run"]) for entry in state["phases"] if entry["run"]]
    return [run for run in found if (run.folder / "status.json").is_file()]
