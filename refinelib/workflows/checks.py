"""Is everything wired right? Small checks that pass, or say what is wrong and where to look.

A check never raises for what it finds; it returns a :class:`Check`. ``notebooks/debug.ipynb`` runs them all
and keeps what they found in ``checks.json`` of the run's folder.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from refinelib.build import autocast, build_device, build_guard, build_loss, build_model, precision
from refinelib.config import Settings
from refinelib.data import open_splits
from refinelib.data.augment import normalise
from refinelib.data.loader import Batch, BatchLoader
from refinelib.files import dumps, reason, write_atomically
from refinelib.guard.guard import Guard
from refinelib.metrics import predict
from refinelib.modeling import NON_TARGET, TARGET
from refinelib.plots.masks import read_samples
from refinelib.runs import Run
from refinelib.trainer import train

PACKAGE = Path(__file__).resolve().parents[1]
#: A batch is overfitted at this target IoU and this fraction of the first loss.
OVERFIT_IOU, OVERFIT_LOSS = 0.95, 0.1
#: How a check trains on its one batch, whatever the recipe: fast, without decay.
FAST = {
    "epochs": 1,
    "warmup_epochs": 0.05,
    "weight_decay": 0.0,
    "grad_clip": 5.0,
    "accumulate": 1,
    "ema_decay": 0.0,
}

P = ParamSpec("P")
#: What is wrong (empty: nothing), what is right, and the numbers behind it.
Found = tuple[str, str, dict[str, Any]]


class CheckError(RuntimeError):
    """A check failed; the message says which and where to look."""


class Check(NamedTuple):
    """What one check found.

    Attributes:
        name: of the check.
        passed: whether nothing is wrong.
        sentence: what was found, and if something is wrong where to look.
        figures: the numbers behind it, plain values that JSON holds.
    """

    name: str
    passed: bool
    sentence: str
    figures: dict[str, Any]

    def __repr__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.sentence}"


def check(name: str) -> Callable[[Callable[P, Found]], Callable[P, Check]]:
    """Make a check of a function; an error that it raises is what is wrong."""

    def decorate(function: Callable[P, Found]) -> Callable[P, Check]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Check:
            try:
                wrong, right, figures = function(*args, **kwargs)
            except Exception as error:  # whatever breaks is what the check is there to find
                figures = {"folder": str(error.run.folder)} if hasattr(error, "run") else {}
                return Check(name, False, f"{type(error).__name__}: {reason(error)}{place(error)}", figures)
            return Check(name, not wrong, wrong or right, figures)

        return checked

    return decorate


def place(error: BaseException) -> str:
    """Innermost line of the package that an error passed: `` (modeling/unet.py, line 9, in forward)``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if not own:
        return ""
    file = Path(own[-1].filename).relative_to(PACKAGE).as_posix()
    return f" ({file}, line {own[-1].lineno}, in {own[-1].name})"


# -- the checks ------------------------------------------------------------------------------------
class Parts(NamedTuple):
    """Model, loss and one batch without augmentation, built as a run builds them."""

    settings: Settings
    model: Any  # HierarchicalUNet, or a module that wraps it
    loss: Any  # MaskLoss
    batch: Batch


def parts(settings: Settings) -> Parts:
    """Model, loss and first batch of a run with these settings, on its device."""
    device = build_device(settings)
    torch.manual_seed(settings.seed)
    store, _ = open_splits(settings)
    model: Any = build_model(settings)
    model = model.to(device, memory_format=torch.channels_last)
    loader = BatchLoader(store, device=device, batch_size=settings.batch_size, seed=settings.seed)
    return Parts(settings, model, build_loss(settings).to(device), loader.batch(loader.plan(0), 0))


@check("shapes and types")
def shapes(parts: Parts) -> Found:
    """One batch through model and loss: sizes, types and ranges of what goes in and comes out.

    Figures:
        ``stages``: name, shape and type of what each module returns, in order; ``loss``: of a new model.
    """
    figures: dict[str, Any] = {"stages": []}
    wrong = next(_shape_problems(parts, figures), "")
    right = f"{len(parts.batch.images)} crops in, float32 masks out, whatever else is in the batch"
    return wrong, f"{right}; the first loss is {figures.get('loss', math.nan):.2f}", figures


def _shape_problems(parts: Parts, figures: dict[str, Any]) -> Iterator[str]:
    settings, model, loss, (images, labels, _) = parts

    def note(name: str, *given: Any) -> None:
        x = given[-1] if isinstance(given[-1], Tensor) else given[-1][0]
        stage = [name, list(x.shape), str(x.dtype).removeprefix("torch.")]
        figures["stages"] += [stage] if name not in [known[0] for known in figures["stages"]] else []

    def differs(name: str, x: Tensor, *wanted: Any) -> Iterator[str]:
        if [*x.shape, x.dtype] != [*wanted]:
            yield f"{name} is {x.dtype} {list(x.shape)}, not {wanted[-1]} {list(wanted[:-1])}"

    note("crops", images)
    note("labels", labels)
    yield from differs("the batch of crops", images, settings.batch_size, 3, *model.canvas, torch.float32)
    low, high = float(images.min()), float(images.max())
    if not -3 <= low <= high <= 3 or float(images.std((-2, -1)).max()) < 1e-3:
        yield f"the crops run from {low:.2f} to {high:.2f}, no pictures within -3 to 3: see data/augment.py"
    yield from differs("the batch of labels", labels, settings.batch_size, *model.mask_canvas, torch.int64)
    found = set(labels.flatten().tolist())
    if TARGET not in found or not found <= {0, TARGET, NON_TARGET}:
        yield f"the labels are {found}, not 0, 1, 2 with a target (1): see modeling/roi.py"
    hooks = [
        layer.register_forward_hook(functools.partial(note, name)) for name, layer in model.named_children()
    ]
    try:
        with torch.no_grad(), autocast(settings, images.device):
            output = model(images)
            single, pair = model(images[:1]), model(torch.cat([images[:1], images[:1].flip(-1)]))
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in output._asdict().items():
        if value is not None:
            yield from differs(name, value, len(images), 2, *model.mask_canvas, torch.float32)
            if not bool(value.isfinite().all()):
                yield f"{name} of a new model is not finite: see the module that returns it"
    figures["loss"] = float(loss(output, labels)[0])
    if not math.isfinite(figures["loss"]):
        yield f"the loss of a new model is {figures['loss']}: see modeling/losses.py"
    change = float((single.logits - pair.logits[:1]).abs().max() / single.logits.abs().max().clamp(min=1e-6))
    if change > (1e-3 if precision(settings, images.device) == "off" else 5e-2):
        yield f"a crop's logits change by {change:.1%} with its batch: look for a statistic over the batch"


@check("a gradient in every parameter")
def gradients(parts: Parts, *, steps: int = 4) -> Found:
    """Every parameter gets a gradient that is finite and not 0 within the first steps on the one batch.

    One step is too few: layers behind a convolution that starts at 0 have no gradient before it has moved.

    Figures:
        ``norms``: largest L2 norm of the gradient by parameter, none if it had none.
    """
    named = dict(parts.model.named_parameters())
    norms: dict[str, float | None] = dict.fromkeys(named)
    broken = False
    guard = _fast_guard(parts, steps, 1e-3)
    with closing(_train(parts, guard, steps)) as training:
        for _ in training:
            for name, parameter in named.items():
                if parameter.grad is not None:
                    norm = float(parameter.grad.float().norm() / guard.scale(torch.ones(())))
                    norms[name] = norm if math.isnan(norm) else max(norms[name] or 0.0, norm)
            lacking = [name for name, p in named.items() if p.requires_grad and p.grad is None]
            broken = bool(lacking) or not all(math.isfinite(norm or 0) for norm in norms.values())
            if broken:  # no step is possible, and layers behind a 0 are not to blame
                break
    kinds = {
        "are frozen (requires_grad is False)": [name for name, p in named.items() if not p.requires_grad],
        "have no gradient at all (they are not between image and loss)": lacking,
        "have a gradient that is not finite": [n for n, v in norms.items() if not math.isfinite(v or 0)],
        f"have a gradient of exactly 0 in {steps} steps": [
            n for n, v in norms.items() if v == 0 and not broken
        ],
    }
    found = [
        f"{len(n)} of {len(norms)} parameters {kind}: {', '.join(n[:3])}" for kind, n in kinds.items() if n
    ]
    known = [norm for norm in norms.values() if norm]
    right = f"all {len(norms)} have one, of norm {min(known, default=0):.1e} to {max(known, default=0):.1e}"
    return "; ".join(found), right, {"norms": norms}


@check("one batch overfitted")
def overfit(parts: Parts, *, steps: int = 120, lr: float = 3e-3) -> Found:
    """The model trained on the one batch alone, with the run's losses and guard.

    Passes with a target IoU of at least ``OVERFIT_IOU`` and at most ``OVERFIT_LOSS`` of the first loss.

    Args:
        parts: of the run; the model gets its weights back.
        steps: how many.
        lr: peak learning rate, falling to a twentieth.

    Figures:
        ``loss``, ``target_iou``: by step; ``skipped``: steps that the guard skipped; ``enough``: both limits.
    """
    costs, ious, truth = [], [], parts.batch.labels == TARGET
    guard = _fast_guard(parts, steps, lr)
    for cost, output in _train(parts, guard, steps):
        found = output.log_probs().argmax(1) == TARGET
        iou = (truth & found).sum((1, 2)) / (truth | found).sum((1, 2)).clamp(min=1)
        costs.append(float(cost))
        ious.append(float(iou[truth.any(-1).any(-1)].mean()))
    skipped = int(guard.state["skipped"])
    figures = {"loss": costs, "target_iou": ious, "enough": [OVERFIT_IOU, OVERFIT_LOSS], "skipped": skipped}
    first, last, wrong = costs[0], costs[-1], ""
    if skipped > steps // 20:
        wrong = f"; {skipped} steps were skipped: train with this recipe and read events.jsonl"
    elif not first - last > 0.01 * first:
        wrong = "; nothing is learned: see the learning rate and the optimizer's parameters (build.py)"
    elif ious[-1] < OVERFIT_IOU:
        wrong = "; it learns too little: try more steps, then see whether labels and crops belong together"
    elif last > OVERFIT_LOSS * first:
        wrong = f"; the loss stays above {OVERFIT_LOSS:.0%} of its start: see which loss term stays high"
    right = (
        f"loss {first:.2f} to {last:.3f}, target IoU {ious[-1]:.3f} in {steps} steps at learning rate {lr:g}"
    )
    return wrong and right + wrong, right, figures


def _fast_guard(parts: Parts, steps: int, lr: float) -> Guard:
    settings = parts.settings.model_copy(update=FAST | {"lr": lr, "min_lr": lr / 20})
    return build_guard(settings, parts.model, None, steps_per_epoch=steps)


def _train(parts: Parts, guard: Guard, steps: int) -> Generator[tuple[Tensor, Any], None, None]:
    """Train on the one batch; gives loss and output after each backward pass, before the step.

    It trains the model itself, for a copy would lack its hooks, and gives it its weights back.
    """
    settings, model, loss, (images, labels, _) = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        for _ in range(steps):
            guard.zero_grad()
            with autocast(settings, images.device):
                output = model(images)
            cost, _ = loss(output, labels)
            torch.autograd.backward(guard.scale(cost))
            yield cost.detach(), output
            guard.step(cost.detach())
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)


@check("one whole tiny run")
def whole_run(settings: Settings) -> Found:
    """``refinelib.train`` from start to end; its checkpoint gives the masks that the run recorded.

    Figures:
        ``folder``: the run's; ``apart``: largest difference of a probability.
    """
    run = train(settings)
    status, losses = run.status(), [line["train_loss"] for line in run.epochs()]
    _, recorded = read_samples(run, settings.epochs) or (0, {})
    predictor = predict.load(run.folder / "checkpoints" / "last.pt", device=settings.device)
    images = torch.from_numpy(recorded["image"]).permute(0, 3, 1, 2).to(predictor.device)
    probs = predictor.roi_probs(normalise(images)).cpu()
    apart = float((probs - torch.from_numpy(recorded["probs"]).float()).abs().max())
    epochs = f"{len(losses)} of {settings.epochs} epochs"
    course = f"the run is {status['state']} after {epochs}, {status['step']} steps"
    wrong = ""
    if status["state"] != "ok" or len(losses) != settings.epochs or None in losses or status["skipped_steps"]:
        wrong = f"{course}, {status['skipped_steps']} steps were skipped: read events.jsonl in {run.folder}"
    elif apart > (2e-3 if precision(settings, predictor.device) == "off" else 2e-2):
        wrong = f"the checkpoint's masks differ from the run's by {apart:.3f}: see checkpoints.py"
    right = (
        f"{course}, loss {losses[0] or 0:.2f} to {losses[-1] or 0:.2f}; its checkpoint gives the same masks"
    )
    return wrong, right, {"folder": str(run.folder), "apart": apart}


# -- their record ----------------------------------------------------------------------------------
def record(results: Sequence[Check]) -> Path:
    """Write ``checks.json`` into the tiny run's folder, and a failure into its ``status.json``.

    Returns:
        the folder.

    Raises:
        CheckError: the tiny run left no folder.
    """
    folders = [found.figures["folder"] for found in results if "folder" in found.figures]
    if not folders:
        raise CheckError(f"the tiny run left no folder; {_failures(results)}")
    run = Run(Path(folders[0]))
    write_atomically(
        run.folder / "checks.json", dumps({"checks": [found._asdict() for found in results]}, indent=1)
    )
    if failures := _failures(results):
        run.update(**run.status() | {"state": "failed", "last_error": failures})
    return run.folder


def raise_if_failed(results: Sequence[Check]) -> None:
    """Raise CheckError unless all checks passed; the message names each that failed."""
    if failures := _failures(results):
        raise CheckError(failures)


def _failures(results: Sequence[Check]) -> str:
    failed = [f"{found.name}: {found.sentence}" for found in results if not found.passed]
    return f"{len(failed)} of {len(results)} checks failed: {'; '.join(failed)}" if failed else ""
