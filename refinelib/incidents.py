"""Incidents: a step that went wrong, kept whole, so that it can be looked at later and elsewhere.

    outputs/<run>/incidents/<step>/
        report.json   what was recorded of the step, who was in it, what was found; strict JSON
        batch.pt      the micro-batches as the model got them, before any planted fault
        state.pt      weights, loss scale and random states right before the step

All three open without this package; the two ``.pt`` with ``torch.load(file, weights_only=True)``.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any, Collection, Sequence

import torch
from torch import Tensor, nn

from refinelib import checkpoints
from refinelib.build import autocast, build_device, build_loss, build_model
from refinelib.config import Settings, absolute
from refinelib.files import read_json
from refinelib.guard.diagnose import Finding, Step, examine
from refinelib.guard.inject import Injector
from refinelib.modeling.losses import MaskLoss
from refinelib.runs import dumps, write_atomically
from refinelib.steplog import Row


#: Of the folder's layout, and of the weights in it: an incident goes with the checkpoints of its time.
FORMAT = 10 * checkpoints.FORMAT + 2
_NEEDED = ("format", "step", "epoch", "finding", "recorded", "losses", "gradient_norms", "people", "device", "torch", "threads", "settings")


class IncidentError(RuntimeError):
    """The folder holds no incident that can be replayed; the message says what is missing."""


def capture(
    folder: Path,
    row: Row,
    *,
    settings: Settings,
    model: nn.Module,
    loss: MaskLoss,
    injector: Injector,
    batches: Sequence[tuple[Tensor, Tensor]],
    people: Sequence[dict[str, Any]],
    names: Sequence[str],
    random: dict[str, Tensor],
    device: torch.device,
    known: Collection[str] = (),
) -> Finding:
    """Examine the step that ``row`` reports and keep it in ``folder``, unless it is of a ``known`` kind.

    Args:
        folder: made here.
        row: of the skipped step, whose weights the model still has.
        batches, people: see :class:`~refinelib.guard.diagnose.Step`.
        names: of the parameters, in the order of ``row.norms``.
        random: states of the random generators.
        known: kinds (``Finding.kind``) that were kept before.

    Raises:
        OSError: no room on the disk.
    """
    scale = row.report["loss_scale"]
    recorded = (row.report["loss"], row.norms.tolist())
    finding = examine(
        Step(model, loss, batches, people, functools.partial(autocast, settings, device), injector, row.step, scale, recorded)
    )
    if finding.kind in known:
        return finding
    report = {
        "format": FORMAT,
        "step": row.step,
        "epoch": row.epoch,
        "finding": finding.as_dict(),
        "recorded": row.report,
        "losses": dict(zip(loss.names, row.components.tolist())),
        "gradient_norms": dict(zip(names, row.norms.tolist())),
        "people": list(people),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "state": "state.pt",
        "settings": settings.model_dump(mode="json"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        checkpoints.save(folder / "batch.pt", {"images": [x for x, _ in batches], "labels": [y for _, y in batches]})
        state = {"model": model.state_dict(), "scale": scale, "random": random, "training": model.training}
        checkpoints.save(folder / "state.pt", state)
        write_atomically(folder / "report.json", dumps(report, indent=1))  # last: a folder with a report is whole
    except (OSError, RuntimeError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return finding


def replay(incident: str | os.PathLike, *, device: str = "auto") -> Finding:
    """Take the step of an incident again and say what was not finite first, where, and whose picture did it.

    Args:
        incident: an incident's folder, ``outputs/<run>/incidents/<step>``.
        device: ``auto``, ``cpu`` or ``cuda``; any will do, and bit for bit it is the same step on the one it happened on
            (on CUDA with ``deterministic``), unless the run was compiled: replaying takes plain kernels (``Finding.apart``).

    Raises:
        IncidentError: no incident there, or a part of it is missing or damaged.

    The process is left as the run had its own: threads (on a CPU), determinism, random state.
    """
    report, settings, step = load(incident, device=device)
    return examine(step)


def load(incident: str | os.PathLike, *, device: str = "auto") -> tuple[dict[str, Any], Settings, Step]:
    """An incident's report, its settings, and its step ready to be taken again.

    Raises:
        IncidentError: see :func:`replay`.
    """
    folder = Path(incident)
    report = read_report(folder)
    try:
        batch = checkpoints.load(folder / "batch.pt", needs=("images", "labels"))
        state = checkpoints.load(folder / "state.pt", needs=("model", "scale", "random", "training"))
    except checkpoints.CheckpointError as error:
        raise IncidentError(f"the incident {folder} cannot be replayed: {error}") from None
    try:
        settings = Settings(**report["settings"]).model_copy(update={"device": device})
    except ValueError as error:
        raise IncidentError(f"the incident {folder} was left by another version, whose settings this one does not have: {error}") from None
    target = build_device(settings)
    if target.type == "cpu" and report["device"] == "cpu":
        torch.set_num_threads(report["threads"])  # the order of sums depends on it
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.set_rng_state(state["random"]["torch"])
    model = build_model(settings).to(target, memory_format=torch.channels_last)
    model.load_state_dict(state["model"])
    model.train(state["training"])
    batches = [(x.to(target), y.to(target)) for x, y in zip(batch["images"], batch["labels"])]
    norms = [_number(report, "gradient_norms", name) for name in report["gradient_norms"]]
    recorded = (_number(report, "recorded", "loss"), norms)
    step = Step(
        model, build_loss(settings).to(target), batches, report["people"], functools.partial(autocast, settings, target),
        Injector(settings.inject, model), report["step"], state["scale"], recorded,
    )  # fmt: skip
    return report, settings, step


def find(incident: str | os.PathLike | None = None, *, output_dir: str = "outputs") -> Path | None:
    """The folder of an incident; without one given, the newest of the run under ``output_dir`` that last had one (none: no run has).

    What another version left is passed over, unless it is given.

    Raises:
        IncidentError: the folder given holds none.
    """
    if incident is not None:
        folder = next((path for path in (Path(incident).expanduser(), absolute(incident)) if path.is_dir()), Path(incident))
        read_report(folder)
        return folder
    root = absolute(output_dir)
    runs = [file for pattern in ("*/status.json", "smoke/*/status.json") for file in root.glob(pattern)]
    for status in sorted(runs, key=lambda file: file.stat().st_mtime, reverse=True):
        folders = sorted((file.parent for file in status.parent.glob("incidents/*/report.json")), reverse=True)
        found = next((folder for folder in folders if _readable(folder)), None)
        if found is not None:
            return found
    return None


def _readable(folder: Path) -> bool:
    try:
        read_report(folder)
    except IncidentError:
        return False
    return True


def read_report(folder: Path) -> dict[str, Any]:
    """The content of an incident's ``report.json``.

    Raises:
        IncidentError: there is none, or it cannot be read.
    """
    file = Path(folder) / "report.json"
    if not file.is_file():
        near = sorted(str(path.parent) for path in Path(folder).glob("**/report.json"))
        such = f"such as {near[0]}" if near else "outputs/<run>/incidents/<step>"
        raise IncidentError(f"{folder} holds no report.json: give an incident's folder, {such}")
    try:
        report = read_json(file)
    except (OSError, ValueError) as error:
        raise IncidentError(f"{file} cannot be read: {error}") from None
    lacking = [name for name in _NEEDED if not isinstance(report, dict) or name not in report]
    if lacking:
        raise IncidentError(f"{file} is no incident's report: it lacks {', '.join(lacking)}")
    if report["format"] != FORMAT:
        raise IncidentError(f"{file} has format {report['format']}, this version reads format {FORMAT}: use the version that wrote it")
    return report


def _number(report: dict[str, Any], *path: str) -> float:
    """A recorded number; strict JSON keeps one that was not finite by name."""
    section, name = path
    value = report[section][name]
    return float(report.get("nonfinite", {}).get(f"{section}.{name}", "nan")) if value is None else value
