"""Incidents: a step that went wrong, kept whole, so that it can be examined later and elsewhere.

    outputs/<run>/incidents/<step>/
        report.json   what was recorded of the step, which samples were in it, what was found; strict JSON
        batch.pt      the micro-batches as the model got them, before any planted fault
        state.pt      weights, loss scale and random states right before the step

All three open without this package; the two ``.pt`` with ``torch.load(file, weights_only=True)``.
"""

import contextlib
import functools
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from refinelib import build, checkpoints
from refinelib.config import Settings, absolute, existing
from refinelib.files import PathLike, dumps, read_json, retold, write_atomically
from refinelib.guard.diagnose import Finding, Step, examine, take, tensors
from refinelib.guard.faults import Injector
from refinelib.guard.monitor import Row
from refinelib.modeling import IGNORED
from refinelib.modeling.losses import MaskLoss
from refinelib.runs import DEBUG_DIR, Run, find_runs, places
from refinelib.step import Stepper

#: Of the folder's layout, and of the weights in it: an incident goes with the checkpoints of its time.
FORMAT = 10 * checkpoints.FORMAT + 2
_NEEDED = (
    *("format", "step", "epoch", "finding", "recorded", "losses", "gradient_norms"),
    *("people", "device", "torch", "threads", "settings"),
)

Batches = Sequence[tuple[Tensor, Tensor]]
Samples = Sequence[dict[str, Any]]


class IncidentError(RuntimeError):
    """The folder holds no incident that can be replayed; the message says what is missing."""


def capture(
    folder: Path, row: Row, stepper: Stepper, *, batches: Batches, samples: Samples, known: Collection[str]
) -> Finding:
    """Examine the step that ``row`` reports and keep it in ``folder``, unless it is of a ``known`` kind.

    Args:
        folder: made here.
        row: of the skipped step, whose weights the model still has.
        stepper: took the step.
        batches: see :class:`~refinelib.guard.diagnose.Step`.
        samples: likewise.
        known: kinds (``Finding.kind``) that were kept already.

    Raises:
        OSError: no room on the disk.
    """
    model, loss, settings = stepper.model, stepper.loss, stepper.settings
    scale, recorded = row.report["loss_scale"], [row.report["loss"], *row.norms.tolist()]
    given = {"batches": batches, "samples": samples, "number": row.step, "scale": scale, "recorded": recorded}
    random = build.random_state(stepper.device)
    finding = examine(_step(settings, model, loss, stepper.injector, **given))
    if finding.kind in known:
        return finding
    report = {
        **{"format": FORMAT, "step": row.step, "epoch": row.epoch},
        **{"finding": finding.as_dict(), "recorded": row.report, "people": list(samples)},
        "losses": dict(zip(loss.names, row.components.tolist(), strict=True)),
        "gradient_norms": dict(zip(stepper.guard.names, row.norms.tolist(), strict=True)),
        "device": build.device_name(stepper.device),
        **{"torch": torch.__version__, "threads": torch.get_num_threads()},
        **{"state": "state.pt", "settings": settings.model_dump(mode="json")},
    }
    state = {"model": model.state_dict(), "scale": scale, "random": random, "training": model.training}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        images, labels = zip(*batches, strict=True)
        checkpoints.save(folder / "batch.pt", {"images": list(images), "labels": list(labels)})
        checkpoints.save(folder / "state.pt", state)
        # Last: a folder with a report is whole.
        write_atomically(folder / "report.json", dumps(report, indent=1))
    except (OSError, RuntimeError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return finding


def replay(incident: PathLike, *, device: str = "auto") -> Finding:
    """Replay an incident's step and say what was not finite first, where, and for which sample.

    The process keeps what the run had: threads (on a CPU), determinism, random state.

    Args:
        incident: an incident's folder, ``outputs/<run>/incidents/<step>``.
        device: see the setting of that name. On the one where it happened it is the same step bit for bit
            (on CUDA with ``deterministic``), unless the run was compiled: a replay is not
            (``Finding.apart``).

    Raises:
        IncidentError: no incident there, or a part of it is missing or damaged.
    """
    return examine(load(incident, device=device)[2])


def load(incident: PathLike, *, device: str = "auto") -> tuple[dict[str, Any], Settings, Step]:
    """An incident's report, its settings, and its step ready to be replayed.

    Raises:
        IncidentError: see :func:`replay`.
    """
    folder = Path(incident)
    report = read_report(folder)
    wrong = f"the incident {folder} cannot be replayed: "
    with retold(IncidentError, wrong, causes=checkpoints.CheckpointError):
        batch = checkpoints.load(folder / "batch.pt", needs=("images", "labels"))
        state = checkpoints.load(folder / "state.pt", needs=("model", "scale", "random", "training"))
    with retold(IncidentError, f"{wrong}it was left by another version, whose settings this one lacks: "):
        settings = Settings(**report["settings"]).model_copy(update={"device": device})
    target = build.build_device(settings)
    if target.type == "cpu" and report["device"] == "cpu":
        torch.set_num_threads(report["threads"])  # the order of sums depends on it
    build.set_determinism(settings)
    torch.set_rng_state(state["random"]["torch"])
    model = build.fresh_model(settings, target)
    model.load_state_dict(state["model"])
    model.train(state["training"])
    batches = [(x.to(target), y.to(target)) for x, y in zip(batch["images"], batch["labels"], strict=True)]
    recorded = [number(report, "recorded", "loss"), *gradient_norms(report)]
    ignores = any(bool((labels == IGNORED).any()) for _, labels in batches)
    loss, injector = build.build_loss(settings, ignores=ignores).to(target), Injector(settings.inject, model)
    given = {"batches": batches, "samples": report["people"], "recorded": recorded}
    given |= {"number": report["step"], "scale": state["scale"]}
    return report, settings, _step(settings, model, loss, injector, **given)


def _step(settings: Settings, model: nn.Module, loss: MaskLoss, injector: Injector, **given: Any) -> Step:
    def describe(sample: dict[str, Any]) -> str:
        return f"annotation {sample['annotation_id']} in image {sample['image_id']} of {sample['source']}"

    given |= {"forward": functools.partial(build.forward, settings, model), "injector": injector}
    return Step(model, loss, loss.per_sample, describe=describe, **given)


def find(
    incident: PathLike | None = None, run: PathLike | None = None, *, output_dir: str = "outputs"
) -> Path | None:
    """The folder of an incident; without one given, the newest of a run, or of the run that last had one.

    Debug runs and smoke runs come after the others. What another version left is passed over, unless it is
    given.

    Raises:
        IncidentError: the folder given holds none, or the run given.
        RunError: there is no such run.
    """
    if incident is not None:
        folder = existing(incident)
        read_report(folder)
        return folder
    root = absolute(output_dir)
    folders = dict.fromkeys([*places(output_dir), root / DEBUG_DIR, root / "smoke"])
    given = None if run is None else Run.open(run, output_dir=output_dir)
    for one in [given] if given else (one for folder in folders for one in reversed(find_runs(folder))):
        for report in sorted(one.folder.glob("incidents/*/report.json"), reverse=True):
            with contextlib.suppress(IncidentError):
                read_report(report.parent)
                return report.parent
    if given:
        why = "none of its steps was skipped, or none was recorded"
        raise IncidentError(f"{given.folder} has no incident: {why}")
    return None


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
    with retold(IncidentError, f"{file} cannot be read: "):
        report: dict[str, Any] = read_json(file)
    lacking = [name for name in _NEEDED if not isinstance(report, dict) or name not in report]
    if lacking:
        raise IncidentError(f"{file} is no incident's report: it lacks {', '.join(lacking)}")
    if report["format"] != FORMAT:
        formats = f"{file} has format {report['format']}, this version reads format {FORMAT}"
        raise IncidentError(f"{formats}: use the version that wrote it")
    return report


def number(report: dict[str, Any], section: str, name: str) -> float:
    """A recorded number; strict JSON keeps one that was not finite by name."""
    value = report[section][name]
    return float(report.get("nonfinite", {}).get(f"{section}.{name}", "nan") if value is None else value)


def gradient_norms(report: dict[str, Any]) -> list[float]:
    """The recorded L2 norm of each parameter's gradient."""
    return [number(report, "gradient_norms", name) for name in report["gradient_norms"]]


# -- layer by layer --------------------------------------------------------------------------------------
@dataclass
class Layer:
    """One place in the forward pass; the step's micro-batches taken together.

    Attributes:
        name: as in ``model.named_modules()``, or ``input``, ``loss: ce`` (before its weight), ``loss``.
        largest: largest finite magnitude of the output.
        nonfinite: share of the output's elements that is not finite, 0..1.
        gradient: L2 norm of the finite part of the loss's gradient by the output, unscaled; none: none came.
        gradient_nonfinite: share of that gradient's elements that is not finite, 0..1.
    """

    name: str
    largest: float = 0.0
    nonfinite: float = 0.0
    gradient: float | None = None
    gradient_nonfinite: float = 0.0


@dataclass
class Layers:
    """A step from its input to its loss, and the gradients of the parameters.

    Attributes:
        forward: in the order of the forward pass.
        parameters: unscaled L2 norm of each gradient, in the order of the model.
        loss: of the step.
    """

    forward: list[Layer]
    parameters: dict[str, float]
    loss: float

    @property
    def first_bad(self) -> Layer | None:
        """The first place, in forward order, whose output is not finite."""
        return next((layer for layer in self.forward if layer.nonfinite), None)

    @property
    def first_bad_gradient(self) -> Layer | None:
        """The first place of the backward pass, from the loss on, where the gradient is not finite."""
        return next((layer for layer in reversed(self.forward) if layer.gradient_nonfinite), None)


def layers(step: Step) -> Layers:
    """Replay the step and measure it at every layer.

    A module that only hands on what its last part gave (a ``Sequential``, say) is left out.
    """
    found: dict[str, Layer] = {}
    seen: list[Tensor] = []  # outputs of this micro-batch; held, so that no two are mistaken for one

    def on_gradient(layer: Layer, size: int, gradient: Tensor) -> None:
        finite = gradient.isfinite()
        # float64: squares of finite float32 may overflow
        norm = float(torch.where(finite, gradient, 0.0).double().norm()) / step.scale
        layer.gradient = math.hypot(layer.gradient or 0.0, norm)
        layer.gradient_nonfinite += int((~finite).sum()) / size

    def measure(name: str, output: Any) -> None:
        given = tensors(output)
        if all(any(x is other for other in seen) for x in given):
            return
        seen.extend(given)
        layer = found.setdefault(name, Layer(name))
        size = sum(x.numel() for x in given) * len(step.batches)
        for x in given:
            finite = x.isfinite()
            layer.largest = max(layer.largest, float(torch.where(finite, x, 0.0).detach().abs().amax()))
            layer.nonfinite += int((~finite).sum()) / size
            if x.requires_grad:
                x.register_hook(functools.partial(on_gradient, layer, size))

    def on_start(module: nn.Module, inputs: Any) -> None:
        seen.clear()
        measure("input", inputs)

    def on_loss(module: nn.Module, inputs: Any, output: Any) -> None:
        for name, value in zip(cast(MaskLoss, step.loss).names, output[1], strict=True):
            measure(f"loss: {name}", value)

    names = {module: name for name, module in step.model.named_modules() if name}
    with contextlib.ExitStack() as watched:
        # Registered after the planted faults' own, these see what a fault made of an output.
        watched.enter_context(step.model.register_forward_pre_hook(on_start))
        watched.enter_context(step.loss.register_forward_hook(on_loss))
        for module in names:
            hook = module.register_forward_hook(lambda own, inputs, output: measure(names[own], output))
            watched.enter_context(hook)
        watched.enter_context(step.replaying())
        loss, norms = take(step)
    found["loss"] = Layer("loss", abs(loss)) if math.isfinite(loss) else Layer("loss", nonfinite=1.0)
    return Layers(list(found.values()), norms, loss)
