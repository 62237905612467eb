"""What progressive training is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from refinelib.config import Settings, SettingsError, absolute, names_with_role, resolve
from refinelib.files import parse_yaml, read_json, shown
from refinelib.runs import RunError

#: What each phase adds to the one before.
ADDS = {
    "phase1": "boundary refinement, boundary-aware loss",
    "phase2": "active contour loss",
    "phase3": "contour detection",
    "phase4": "distance transform",
    "finetune": "progressive upsampling, smaller steps",
}


class Plan(NamedTuple):
    """What a chain is to do; made by :func:`plan`."""

    folder: Path
    settings: dict[str, Settings]  # by phase, in order
    init_from: str | None
    margin: float
    retry: bool


def plan(
    *,
    phases: Any = None,
    phase: Any = None,
    init_from: str | None = None,
    name: str | None = None,
    margin: float = 0.02,
    retry: bool = False,
    per_phase: Any = None,
    **given: Any,
) -> Plan:
    """Check what a chain is asked to do, without torch and in no time.

    Args:
        phases: which, in order, such as ``[1, 2, "finetune"]`` or ``"1,2"``; none: 1 to 4, then fine-tuning.
        phase: one alone, in place of ``phases``; all but the first then need ``init_from``.
        init_from: run or checkpoint whose weights the first phase starts from; none: from scratch.
        name: of the chain's folder under ``output_dir``; none: ``progressive``, or ``phase3-alone``.
        margin: by how much target IoU and Boundary IoU may be lower after a phase.
            A chain that is there is gone on with; one that is finished and was made with other settings
            stays as it is, and the next number is appended.
        retry: train a phase that did not pass its gate again; the old run is kept.
        per_phase: settings of one phase, such as ``{"phase3": {"epochs": 40}}``, or the same as YAML text.
        **given: settings of all phases by name.

    Raises:
        SettingsError: a sentence for what is wrong.
    """
    for own in ("recipe", "run", "resume"):
        if given.get(own) is not None:
            raise SettingsError(f"{own} = {given[own]!r}: progressive training sets it itself; choose with phases, phase and name")
    if phase is not None and phases is not None:
        raise SettingsError("phase is one phase alone and phases a list of them: give one of the two")
    init_from = None if str(init_from).lower() in ("none", "") else str(init_from)
    names = [_phase(phase)] if phase is not None else [_phase(item) for item in _listed(phases)] or list(ADDS)
    if phase is not None and names[0] != "phase1" and init_from is None:
        raise SettingsError(
            f"{names[0]} alone starts from the phase before: give init_from, such as -p init_from "
            f"outputs/phase{_before(names[0])}"
        )
    if len(set(names)) < len(names):
        raise SettingsError(f"phases = {', '.join(names)}: each phase once")
    if not 0 <= float(margin) <= 1:
        raise SettingsError(f"margin = {margin!r}: give an IoU from 0 to 1, such as 0.02")
    name = str(name or (f"{names[0]}-alone" if phase is not None else "progressive"))
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise SettingsError(f"name = {name!r}: use letters, digits, dot, dash and underscore only")
    own = _by_phase(per_phase, names)
    root = resolve(names[0], **given, init_from="none").output_dir
    folder, following = _folders(absolute(root), name)
    given["store_dir"] = given.get("store_dir") or f"{root}/stores"  # one for all chains
    place = {"init_from": "none", "output_dir": f"{root}/{folder}"}
    settings = {item: resolve(item, **{**given, **own.get(item, {}), **place, "run": item}) for item in names}
    made = Plan(absolute(root) / folder, settings, init_from, float(margin), bool(retry))
    if not _finished_otherwise(made):
        return made
    settings = {item: value.model_copy(update={"output_dir": f"{root}/{following}"}) for item, value in settings.items()}
    return made._replace(folder=absolute(root) / following, settings=settings)


def from_notebook(namespace: Mapping[str, Any]) -> Plan:
    """The plan that a notebook's parameter cells left in its name space; see :func:`refinelib.config.from_notebook`."""
    plain = (bool, int, float, str, list, tuple, dict)
    ours = {"In", "Out"}
    names = [n for n, value in namespace.items() if not n.startswith("_") and n not in ours and type(value) in plain]
    return plan(**{name: namespace[name] for name in names})


def describe(made: Plan) -> str:
    """Where a chain lies and what each phase will do, a line each."""
    lines = [str(made.folder)]
    for name, settings in made.settings.items():
        what = f"{settings.epochs} epochs, {settings.batch_size} a step, lr {settings.lr:g}, width {settings.width:g}"
        lines.append(f"{name:10} {what}   + {ADDS[name]}")
    return "\n".join(lines)


def read_state(file: Path) -> dict[str, Any]:
    """What a chain's ``progressive.json`` says.

    Raises:
        RunError: it is damaged, or something else.
    """
    try:
        state = read_json(file)
    except (OSError, ValueError):
        state = None
    needed = {"phase", "state", "run", "gate", "after", "settings"}
    if not (
        isinstance(state, dict)
        and isinstance(state.get("state"), str)
        and "init_from" in state
        and isinstance(state.get("phases"), list)
        and all(isinstance(entry, dict) and needed <= entry.keys() for entry in state["phases"])
    ):
        raise RunError(
            f"{file} is damaged: what the chain has decided cannot be read from it. Its runs are whole beside it: give the chain another name, "
            "or go on from one of them with phase and init_from"
        )
    return state


def _finished_otherwise(made: Plan) -> bool:
    """Whether a finished chain with other settings lies in the plan's folder.

    Raises:
        SettingsError: what lies there was begun with other settings, and is not finished.
    """
    file = made.folder / "progressive.json"
    if not file.is_file():
        return False
    state = read_state(file)
    differs = _differences(made, state)
    if differs and state["state"] != "ok":
        raise SettingsError(f"the chain in {made.folder} was begun differently: {differs}; go on as it was begun, or give another name")
    return bool(differs)


def _differences(made: Plan, state: dict[str, Any]) -> str:
    then, now = [entry["phase"] for entry in state["phases"]], list(made.settings)
    if any(a != b for a, b in zip(then, now)):
        return f"phases were {', '.join(then)} and are {', '.join(now)}"
    begun = [e for e in state["phases"] if e["settings"] and e["phase"] in made.settings and not (made.retry and e["state"] == "held")]
    if begun and state["init_from"] != made.init_from:
        return f"init_from was {state['init_from']} and is {made.init_from}"
    for entry in begun:
        old, new = entry["settings"], made.settings[entry["phase"]].model_dump(mode="json")
        free = names_with_role("run") | {"add_pennfudan", "init_from"}  # none of them changes what a step does
        changed = [f"{k} was {old[k]} and is {new[k]}" for k in old if k in new and k not in free and old[k] != new[k]]
        if changed:
            return f"in {entry['phase']}, {', '.join(changed)}"
    return ""


# -- helpers ---------------------------------------------------------------------------------------
def _phase(item: Any) -> str:
    word = str(item).strip().strip("'\"").lower().replace("fine-tuning", "finetune")
    name = f"phase{word}" if word.isdigit() else word
    if name not in ADDS:
        raise SettingsError(f"there is no phase {item!r}: give 1, 2, 3, 4 or finetune")
    return name


def _listed(phases: Any) -> list:
    if isinstance(phases, str):
        return [item for item in re.split(r"[,\s]+", phases.strip("[]() ")) if item and item.lower() != "none"]
    return list(phases) if isinstance(phases, (list, tuple)) else [] if phases is None else [phases]


def _before(name: str) -> int:
    return list(ADDS).index(name)


def _by_phase(per_phase: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    if isinstance(per_phase, str):
        try:
            per_phase = parse_yaml(per_phase)
        except ValueError as error:
            raise SettingsError(f"per_phase = {shown(per_phase)} is not valid YAML: {error}") from None
    if not per_phase:
        return {}
    if not isinstance(per_phase, Mapping) or not all(isinstance(value, Mapping) for value in per_phase.values()):
        raise SettingsError(f"per_phase = {shown(per_phase)}: write {{phase3: {{epochs: 40}}}}")
    found = {_phase(key): dict(value) for key, value in per_phase.items()}
    missing = [name for name in found if name not in names]
    if missing:
        raise SettingsError(f"per_phase has settings of {missing[0]}, which is none of the phases to train ({', '.join(names)})")
    return found


def _folders(root: Path, name: str) -> tuple[str, str]:
    """The newest folder of a chain's name (``name``, ``name-2``, ...), and the one after it."""
    number = 1
    while (root / f"{name}-{number + 1}" / "progressive.json").is_file():
        number += 1
    return name if number == 1 else f"{name}-{number}", f"{name}-{number + 1}"
