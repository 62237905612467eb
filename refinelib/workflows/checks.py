"""Is everything wired right? Small checks that pass, or say what is wrong and where to look.

A check never raises for what it finds; it returns a :class:`Check`. ``notebooks/debug.ipynb`` runs them all
and keeps what they found in ``checks.json`` of the run's folder.
"""

import functools
import math
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refinelib.build import autocast, build_device, build_guard, build_loss, fresh_model, precision
from refinelib.config import Settings
from refinelib.data import Source, open_splits, open_store
from refinelib.data.augment import normalise
from refinelib.data.loader import Batch, BatchLoader
from refinelib.files import dumps, reason, write_atomically
from refinelib.guard.guard import Guard
from refinelib.metrics import predict
from refinelib.modeling import IGNORED, NON_TARGET, TARGET
from refinelib.plots import masks, style
from refinelib.runs import Run
from refinelib.trainer import train

PACKAGE = Path(__file__).resolve().parents[1]
#: A batch is overfitted at this target IoU and this fraction of the first loss.
OVERFIT_IOU, OVERFIT_LOSS = 0.95, 0.1
#: How a check trains on its one batch, whatever the recipe: fast, without decay.
FAST = {"epochs": 1, "warmup_epochs": 0.05, "weight_decay": 0.0, "grad_clip": 5.0, "accumulate": 1}
#: Pixels of the crops in the picture of a data set.
CROP = (128, 128)


class CheckError(RuntimeError):
    """Something is wrong; the message says what and where to look."""


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
    figures: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.sentence}"


def check(name: str) -> Callable[[Callable[..., str]], Callable[..., Check]]:
    """Make a check of a function that returns what is right; an error that it raises is what is wrong.

    The function's first argument is an empty dict for the numbers, which are kept whatever it finds.
    """

    def decorate(function: Callable[..., str]) -> Callable[..., Check]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Check:
            figures: dict[str, Any] = {}
            try:
                return Check(name, True, function(figures, *args, **kwargs), figures)
            except CheckError as wrong:
                return Check(name, False, str(wrong), figures)
            except Exception as error:  # whatever breaks is what the check is there to find
                figures |= {"folder": str(error.run.folder)} if hasattr(error, "run") else {}
                return Check(name, False, f"{type(error).__name__}: {reason(error)}{place(error)}", figures)

        return checked

    return decorate


def place(error: BaseException) -> str:
    """Innermost line of the package that an error passed: `` (modeling/unet.py, line 9, in forward)``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (file := Path(frame.filename)).is_relative_to(PACKAGE):
            return f" ({file.relative_to(PACKAGE).as_posix()}, line {frame.lineno}, in {frame.name})"
    return ""


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
    model = fresh_model(settings, device)
    loader = BatchLoader(store, device=device, batch_size=settings.batch_size, seed=settings.seed)
    loss = build_loss(settings, ignores=store.ignores).to(device)
    return Parts(settings, model, loss, loader.batch(loader.plan(0), 0))


@check("shapes and types")
def shapes(figures: dict[str, Any], parts: Parts) -> str:
    """One batch through model and loss: sizes, types and ranges of what goes in and comes out.

    Figures:
        ``loss``: of a new model.
    """
    settings, model, loss, (images, labels, _) = parts

    def must_be(name: str, x: Tensor, *form: Any) -> None:
        if [*x.shape, x.dtype] != [*form]:
            raise CheckError(f"{name} is {x.dtype} {list(x.shape)}, not {form[-1]} {list(form[:-1])}")

    must_be("the batch of crops", images, settings.batch_size, 3, *model.canvas, torch.float32)
    must_be("the batch of labels", labels, settings.batch_size, *model.mask_canvas, torch.int64)
    low, high = float(images.min()), float(images.max())
    if not -3 <= low <= high <= 3:
        raise CheckError(f"crops run from {low:.2f} to {high:.2f}, outside -3 to 3: see data/augment.py")
    if (contrast := float(images.std((-2, -1)).max())) < 1e-3:
        flat = f"every crop is of one flat colour, its values vary by {contrast:.1g} at most"
        raise CheckError(f"{flat}: look at the images of the data set, then at data/augment.py")
    found = set(labels.flatten().tolist())
    if TARGET not in found or not found <= {0, TARGET, NON_TARGET, IGNORED}:
        raise CheckError(f"the labels are {found}, not 0, 1, 2 with a target (1): see modeling/roi.py")
    with torch.no_grad(), autocast(settings, images.device):
        output = model(images)
        single, pair = model(images[:1]), model(torch.cat([images[:1], images[:1].flip(-1)]))
    for name, x in output._asdict().items():
        if x is not None:
            must_be(name, x, len(images), 2, *model.mask_canvas, torch.float32)
            if not bool(x.isfinite().all()):
                raise CheckError(f"{name} of a new model is not finite: see the module that returns it")
    figures["loss"] = float(loss(output, labels)[0])
    if not math.isfinite(figures["loss"]):
        raise CheckError(f"the loss of a new model is {figures['loss']}: see modeling/losses.py")
    change = float((single.logits - pair.logits[:1]).abs().max() / single.logits.abs().max().clamp(min=1e-6))
    if change > (1e-3 if precision(settings, images.device) == "off" else 5e-2):
        raise CheckError(f"a crop's logits change by {change:.1%} with its batch: look for a batch statistic")
    return f"{len(images)} crops in, float32 masks out; the first loss is {figures['loss']:.2f}"


@check("a gradient in every parameter")
def gradients(figures: dict[str, Any], parts: Parts, *, steps: int = 4) -> str:
    """Every parameter gets a gradient that is finite and not 0 within the first steps on the one batch.

    One step is too few: layers behind a convolution that starts at 0 have no gradient before it has moved.

    Figures:
        ``norms``: largest L2 norm of the gradient by parameter, none if it had none.
    """
    named = dict(parts.model.named_parameters())
    norms: dict[str, float | None] = figures.setdefault("norms", dict.fromkeys(named))
    with closing(_train(parts, steps, 1e-3)) as training:
        for guard, _, _ in training:
            for name, parameter in named.items():
                if parameter.grad is not None:
                    norm = float(parameter.grad.float().norm() / guard.scale(torch.ones(())))
                    norms[name] = norm if math.isnan(norm) else max(norms[name] or 0.0, norm)
            lost = [name for name, norm in norms.items() if not math.isfinite(norm or 0)]
            lacking = [name for name, p in named.items() if p.requires_grad and p.grad is None]
            if lost or lacking:  # no step is possible, and layers behind a 0 are not to blame
                break
    zero = [name for name, norm in norms.items() if norm == 0 and not (lost or lacking)]
    kinds = {
        "are frozen (requires_grad is False)": [name for name, p in named.items() if not p.requires_grad],
        "have no gradient at all (they are not between image and loss)": lacking,
        "have a gradient that is not finite": lost,
        f"have a gradient of exactly 0 in {steps} steps": zero,
    }
    wrong = {f"of {len(norms)} parameters {kind}": names for kind, names in kinds.items() if names}
    if wrong:
        raise CheckError("; ".join(f"{len(x)} {kind}: {', '.join(x[:3])}" for kind, x in wrong.items()))
    known = [norm or 0.0 for norm in norms.values()]
    return f"all {len(norms)} have one, of norm {min(known):.1e} to {max(known):.1e}"


@check("one batch overfitted")
def overfit(figures: dict[str, Any], parts: Parts, *, steps: int = 120, lr: float = 3e-3) -> str:
    """The model trained on the one batch alone, with the run's losses and guard.

    Passes with a target IoU of at least ``OVERFIT_IOU`` and at most ``OVERFIT_LOSS`` of the first loss.

    Args:
        figures: see below.
        parts: of the run; the model gets its weights back.
        steps: how many.
        lr: peak learning rate, falling to a twentieth.

    Figures:
        ``loss``, ``target_iou``: by step; ``skipped``: steps that the guard skipped; ``enough``: both limits.
    """
    costs, ious, truth = [], [], parts.batch.labels == TARGET
    for guard, cost, output in _train(parts, steps, lr):  # noqa: B007 (its count is read after the last step)
        found = output.log_probs().argmax(1) == TARGET
        iou = (truth & found).sum((1, 2)) / (truth | found).sum((1, 2)).clamp(min=1)
        costs.append(float(cost))
        ious.append(float(iou[truth.any(-1).any(-1)].mean()))
    skipped, first, last = int(guard.state["skipped"]), costs[0], costs[-1]
    figures |= {"loss": costs, "target_iou": ious, "enough": [OVERFIT_IOU, OVERFIT_LOSS], "skipped": skipped}
    course = f"loss {first:.2f} to {last:.3f}, target IoU {ious[-1]:.3f} in {steps} steps at lr {lr:g}"
    if skipped > steps // 20:
        hint = f"{skipped} steps were skipped: train with this recipe and read events.jsonl"
    elif not first - last > 0.01 * first:
        hint = "nothing is learned: see the learning rate and the optimizer's parameters (build.py)"
    elif ious[-1] < OVERFIT_IOU:
        hint = "it learns too little: try more steps, then see whether labels and crops belong together"
    elif last > OVERFIT_LOSS * first:
        hint = f"the loss stays above {OVERFIT_LOSS:.0%} of its start: see which loss term stays high"
    else:
        return course
    raise CheckError(f"{course}; {hint}")


def _train(parts: Parts, steps: int, lr: float) -> Generator[tuple[Guard, Tensor, Any], None, None]:
    """Train on the one batch; gives guard, loss and output after each backward pass, before the step.

    It trains the model itself, for a copy would lack its hooks, and gives it its weights back. As in a run, a
    step that overflows by the fp16 loss scale halves the scale; it is taken again, not given and not counted.
    """
    settings, model, loss, (images, labels, _) = parts
    fast = settings.model_copy(update=FAST | {"ema_decay": 0.0, "lr": lr, "min_lr": lr / 20})
    guard = build_guard(fast, model, None, steps_per_epoch=steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        for _ in range(steps):
            while True:
                guard.zero_grad()
                with autocast(settings, images.device):
                    output = model(images)
                cost, _ = loss(output, labels)
                guard.backward(cost)
                if not _overflows(guard, cost):
                    break
                guard.step()
                guard.state["skipped"] -= 1
            yield guard, cost.detach(), output
            guard.step()
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)


def _overflows(guard: Guard, cost: Tensor) -> bool:
    """Whether a gradient is not finite, the loss is, and a lower fp16 loss scale may help."""
    lowest = not guard.scaled or float(guard.state["scale"]) <= guard.scale_floor
    gradients = [p.grad for p in guard.parameters if p.grad is not None]
    return not lowest and bool(cost.isfinite()) and not all(bool(g.isfinite().all()) for g in gradients)


@check("one whole tiny run")
def whole_run(figures: dict[str, Any], settings: Settings) -> str:
    """``refinelib.train`` from start to end; its checkpoint gives the masks that the run recorded.

    Figures:
        ``folder``: the run's; ``apart``: largest difference of a probability.
    """
    run = train(settings)
    figures["folder"] = str(run.folder)
    status, losses = run.status(), [line["train_loss"] for line in run.epochs()]
    bad = [event for event in run.events() if event["kind"] == "incident" or event.get("skipped")]
    # Under fp16 an overflow that is no incident is how the loss scale is found.
    skipped = status["skipped_steps"] if bad or settings.amp != "fp16" else 0
    epochs = f"{len(losses)} of {settings.epochs} epochs"
    course = f"the run is {status['state']} after {epochs}, {status['step']} steps"
    if status["state"] != "ok" or len(losses) != settings.epochs or None in losses or skipped:
        raise CheckError(f"{course}, {skipped} steps were skipped: read events.jsonl in {run.folder}")
    _, recorded = masks.read_samples(run, settings.epochs) or (0, {})
    predictor = predict.load(run.folder / "checkpoints" / "last.pt", device=settings.device)
    images = torch.from_numpy(recorded["image"]).permute(0, 3, 1, 2).to(predictor.device)
    probs = predictor.roi_probs(normalise(images)).cpu()
    figures["apart"] = float((probs - torch.from_numpy(recorded["probs"]).float()).abs().max())
    if figures["apart"] > (2e-3 if precision(settings, predictor.device) == "off" else 2e-2):
        differ = f"the checkpoint's masks differ from the run's by {figures['apart']:.3f}"
        raise CheckError(f"{differ}: see checkpoints.py")
    return f"{course}, loss {losses[0]:.2f} to {losses[-1]:.2f}; its checkpoint gives the same masks"


# -- their record ----------------------------------------------------------------------------------
def record(results: Sequence[Check]) -> Path:
    """Write ``checks.json`` into the tiny run's folder, and a failure into its ``status.json``.

    Returns:
        the folder.

    Raises:
        CheckError: the tiny run left no folder.
    """
    failures = _failures(results)
    folder = next((found.figures["folder"] for found in results if "folder" in found.figures), None)
    if folder is None:
        raise CheckError(f"the tiny run left no folder; {failures}")
    run = Run(Path(folder))
    write_atomically(run.folder / "checks.json", dumps({"checks": [x._asdict() for x in results]}, indent=1))
    if failures:
        run.update(**run.status() | {"state": "failed", "last_error": failures})
    return run.folder


def raise_if_failed(results: Sequence[Check]) -> None:
    """Raise CheckError unless all checks passed; the message names each that failed."""
    if failures := _failures(results):
        raise CheckError(failures)


def _failures(results: Sequence[Check]) -> str:
    failed = [f"{found.name}: {found.sentence}" for found in results if not found.passed]
    return f"{len(failed)} of {len(results)} checks failed: {'; '.join(failed)}" if failed else ""


# -- a data set ------------------------------------------------------------------------------------
def check_data(source: Source, picture: Path, *, max_images: int | None = None, progress: bool = True) -> str:
    """Decode every image and mask as training would, report, and draw a few persons.

    Args:
        source: of images and masks.
        picture: file to write, a PNG: crops, the person's mask on them, and the labels.
        max_images: read only the first so many images.
        progress: show a bar.

    Returns:
        What is used, then a line for each reason for which something is left out or worth a note: how often,
        and an example.

    Raises:
        DataError: nothing can be used.

    Example:
        >>> from refinelib.data import SyntheticPeople
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(check_data(SyntheticPeople(3), Path(folder, "people.png"), progress=False))
        synthetic train: 6 persons in 3 images are used
    """
    how: Any = {"roi_size": CROP, "mask_size": CROP, "context": 0.0, "max_images": max_images}
    with tempfile.TemporaryDirectory() as root:
        store = open_store(source, root=root, progress=progress, **how)
        masks.rois(store, overlays=True).savefig(picture, dpi=style.DPI)
        images = len(np.unique(store.image_index))
        lines = [f"{store.source} {store.split}: {len(store)} persons in {images} images are used"]
        for title, counts in (("left out", store.skipped), ("noted", store.info.notes)):
            lines += [f"{title}: {n} x {name}: {store.examples[name]}" for name, n in counts.items()]
        if store.ignores:
            lines.append(f"ignored: {store.info.ignored:.2%} of the pixels in the persons' boxes")
        del store  # its files are mapped, and Windows deletes no mapped file
    return "\n".join(lines)
