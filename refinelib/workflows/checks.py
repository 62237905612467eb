"""Is everything wired right? Small checks that say passed, or what is wrong and where to look.

Each takes the :class:`Parts` of a run, never raises for what it finds, and returns a :class:`~refinelib.workflows.verdicts.Check`.
``notebooks/debug.ipynb`` runs them one after the other and keeps what they found in the run's folder (verdicts.py).
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from refinelib.metrics import predict
from refinelib.data.augment import normalise
from refinelib.build import autocast, build_device, build_guard, build_loss, build_model, precision
from refinelib.config import Settings
from refinelib.data import open_splits
from refinelib.data.loader import Batch, BatchLoader
from refinelib.plots.masks import read_samples
from refinelib.modeling import NON_TARGET, TARGET
from refinelib.trainer import train
from refinelib.workflows.verdicts import Check, told

#: An overfitted batch is one with at least this target IoU and at most this share of the loss it began with.
OVERFIT_IOU, OVERFIT_LOSS = 0.95, 0.1
#: How a check trains on its one batch, whatever the recipe: fast, without decay.
_FAST = dict(lr=1e-3, min_lr=1e-3, epochs=1, warmup_epochs=0.05, weight_decay=0.0, grad_clip=5.0, accumulate=1, ema_decay=0.0)


class Parts(NamedTuple):
    """What a run is made of, built as a run builds it, and one batch of its people without augmentation."""

    settings: Settings
    model: nn.Module
    loss: nn.Module
    batch: Batch


def parts(settings: Settings) -> Parts:
    """Model, loss and first batch of a run with these settings, on its device."""
    device = build_device(settings)
    torch.manual_seed(settings.seed)
    store, _ = open_splits(settings)
    model = build_model(settings).to(device, memory_format=torch.channels_last)
    loader = BatchLoader(store, device=device, batch_size=settings.batch_size, mode="off", seed=settings.seed)
    return Parts(settings, model, build_loss(settings).to(device), loader.batch(loader.plan(0), 0))


@told("shapes and types")
def shapes(parts: Parts) -> Check:
    """One batch through model and loss: sizes, types and ranges of what goes in and comes out.

    Figures:
        ``stages``: name, shape and type of what each module on the way returns.
    """
    settings, model, loss, (images, labels, _) = parts
    stages = [["crops", list(images.shape), _type(images)], ["labels", list(labels.shape), _type(labels)]]
    if wrong := _wrong_batch(parts):
        return wrong, "", {"stages": stages}
    hooks = [
        module.register_forward_hook(functools.partial(_note, stages, name)) for name, module in model.named_children()
    ]
    try:
        with torch.no_grad(), autocast(settings, images.device):
            output = model(images)
            alone, accompanied = model(images[:1]), model(torch.cat([images[:1], images[:1].flip(-1)]))
    finally:
        for hook in hooks:
            hook.remove()
    figures: dict[str, Any] = {"stages": stages}
    if wrong := _wrong_output(parts, output):
        return wrong, "", figures
    total, components = loss(output, labels)
    figures |= {"loss": float(total), "losses": dict(zip(loss.names, components.tolist()))}
    sums = output.log_probs().exp().sum(1)
    apart = float((alone.logits - accompanied.logits[:1]).abs().max() / alone.logits.abs().max().clamp(min=1e-6))
    if total.shape != () or total.dtype != torch.float32 or len(components) != len(loss.names):
        wrong = f"the loss is {_type(total)} {list(total.shape)} and must be one float32 number: look at losses.MaskLoss"
    elif not bool(torch.isfinite(total)):
        bad = [name for name, value in figures["losses"].items() if not np.isfinite(value)]
        wrong = f"the loss of a fresh model is {float(total)} ({', '.join(bad)} not finite): look at that function in losses.py"
    elif float((sums - 1).abs().max()) > 1e-4:
        wrong = "the three class probabilities do not sum to 1: look at losses.hierarchical_log_probs"
    elif apart > (1e-3 if precision(settings, images.device) == "off" else 5e-2):
        wrong = (
            f"a crop's logits differ by {apart:.1%} when others are in its batch: look for a statistic over the batch "
            "in model.py or refine.py"
        )
    size = "x".join(map(str, output.logits.shape[-2:]))
    good = f"{len(images)} crops in, masks of {size} out in float32, whoever else is in the batch; the first loss is {float(total):.2f}"
    return wrong, good, figures


@told("a gradient in every parameter")
def gradients(parts: Parts, *, steps: int = 4) -> Check:
    """Every parameter is trained, and in the first few steps each gets a gradient that is finite and not 0.

    The first step alone would not do: what lies behind a convolution that starts at 0 has no gradient before that has moved.

    Args:
        parts: of the run; the model itself is left as it is.
        steps: how many, on the one batch.

    Figures:
        ``norms``: largest L2 norm of the gradient by parameter, none where there was none.
    """
    settings, model, loss, (images, labels, _) = parts
    named = dict(model.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    guard = build_guard(settings.model_copy(update=_FAST), model, None, steps_per_epoch=steps)
    norms: dict[str, float | None] = dict.fromkeys(named)
    with _restored(model):
        for _ in range(steps):
            guard.zero_grad()
            with autocast(settings, images.device):
                output = model(images)
            cost, _ = loss(output, labels)
            cost.backward()
            for name, p in named.items():
                if p.grad is not None:
                    norms[name] = max(norms[name] or 0.0, float(p.grad.float().norm()), key=lambda x: (x != x, x))  # NaN stays
            without = [name for name, p in named.items() if p.requires_grad and p.grad is None]
            broken = without or not all(np.isfinite(value) for value in norms.values() if value is not None)
            if broken:  # no step can be made of it, so nothing is known of what the first one leaves at 0
                break
            guard.step(cost.detach())
    kinds = {
        "frozen (requires_grad is False)": frozen,
        "off the way from image to loss (no gradient at all)": without,
        "with a gradient that is not finite": [n for n, v in norms.items() if v is not None and not np.isfinite(v)],
        f"with a gradient of exactly 0 in all of {steps} steps": [n for n, v in norms.items() if v == 0 and not broken],
    }
    wrong = "; ".join(f"{len(names)} of {len(norms)} parameters {kind}: {_some(names)}" for kind, names in kinds.items() if names)
    if wrong:
        wrong += "; look at how that module is built and used in model.py, and at the loss that should reach it"
    known = [value for value in norms.values() if value]
    good = f"all {len(norms)} parameters have one, of norm {min(known, default=0):.1e} to {max(known, default=0):.1e}"
    return wrong, good, {"norms": norms}


@told("one batch learned by heart")
def overfit(parts: Parts, *, steps: int = 120, lr: float = 3e-3) -> Check:
    """The model trained on the one batch alone until it knows it by heart, with the run's own losses and guard.

    Passes with a target IoU of at least ``OVERFIT_IOU`` and at most ``OVERFIT_LOSS`` of the first loss. The model gets its weights back.

    Args:
        parts: of the run.
        steps: how many.
        lr: peak learning rate, falling to a twentieth.

    Figures:
        ``loss``, ``target_iou``: by step; ``skipped``: steps that the guard skipped.
    """
    settings, model, loss, (images, labels, _) = parts
    settings = settings.model_copy(update=_FAST | dict(lr=lr, min_lr=lr / 20))
    guard = build_guard(settings, model, None, steps_per_epoch=steps)
    costs, ious = [], []
    with _restored(model):
        for _ in range(steps):
            guard.zero_grad()
            with autocast(settings, images.device):
                output = model(images)
            cost, _ = loss(output, labels)
            guard.scale(cost).backward()
            guard.step(cost.detach())
            costs.append(cost.detach())
            ious.append(_target_iou(output.log_probs().detach().argmax(1), labels))
    costs, ious = torch.stack(costs).tolist(), torch.stack(ious).tolist()
    skipped = int(guard.state["skipped"])
    figures = {"loss": costs, "target_iou": ious, "skipped": skipped, "lr": lr, "enough": [OVERFIT_IOU, OVERFIT_LOSS]}
    first, last, iou = costs[0], costs[-1], ious[-1]
    reached = f"loss {first:.2f} to {last:.3f} and target IoU {iou:.3f} in {steps} steps at learning rate {lr:g}"
    wrong = ""
    if skipped > steps // 20:
        wrong = (
            f"{reached}; {skipped} steps were skipped, their loss or gradient not being finite: train with this recipe "
            "and read events.jsonl"
        )
    elif not first - last > 0.01 * first:
        wrong = f"{reached}: nothing is learned; look at the learning rate and at which parameters the optimizer holds (build.build_guard)"
    elif iou < OVERFIT_IOU:
        wrong = (
            f"{reached}: it learns and does not get there (target IoU {OVERFIT_IOU:g}); try more steps, then see "
            "whether crops and labels belong together (plots.rois)"
        )
    elif last > OVERFIT_LOSS * first:
        wrong = (
            f"{reached}: the mask is right and the loss does not follow (at most {OVERFIT_LOSS:.0%} of its start): "
            "look at which component stays high"
        )
    return wrong, reached, figures


@told("one whole tiny run")
def whole_run(settings: Settings) -> Check:
    """``refinelib.train`` from start to end, and its checkpoint gives the very masks that the run wrote down.

    Figures:
        ``folder``: the run's; ``epochs``; ``skipped``; ``apart``: largest difference of a probability.
    """
    run = train(settings)
    status, epochs = run.status(), run.epochs()
    _, saved = read_samples(run, settings.epochs)
    predictor = predict.load(run.folder / "checkpoints" / "last.pt", device=settings.device)
    images = torch.from_numpy(saved["image"]).permute(0, 3, 1, 2).to(predictor.device)
    again = predictor.roi_probs(normalise(images)).cpu()
    apart = float((again - torch.from_numpy(saved["probs"].astype(np.float32))).abs().max())
    figures = {"folder": str(run.folder), "epochs": len(epochs), "skipped": status["skipped_steps"], "apart": apart}
    losses = [line["train_loss"] for line in epochs]
    wrong = ""
    if status["state"] != "ok" or len(epochs) != settings.epochs:
        wrong = (
            f"the run is {status['state']} after {len(epochs)} of {settings.epochs} epochs "
            f"({status.get('last_error')}): read its events.jsonl"
        )
    elif None in losses or status["skipped_steps"]:
        wrong = f"{status['skipped_steps']} of {status['step']} steps were skipped: events.jsonl in {run.folder} says what was not finite"
    elif apart > (2e-3 if precision(settings, predictor.device) == "off" else 2e-2):
        wrong = (
            f"loaded again, the checkpoint's masks differ by up to {apart:.3f} from those of the run: look at "
            "checkpoints.py and predict.load"
        )
    good = (
        f"{len(epochs)} epochs, {status['step']} steps, none skipped, loss {losses[0] or 0:.2f} to "
        f"{losses[-1] or 0:.2f}; loaded again, the checkpoint gives the same masks"
    )
    return wrong, good, figures


# -- helpers ---------------------------------------------------------------------------------------
@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Train the model itself, hooks and all, and give it its weights back; a copy would leave hooks behind."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)


def _wrong_batch(parts: Parts) -> str:
    images, labels, _ = parts.batch
    wanted = (parts.settings.batch_size, 3, *parts.model.canvas)
    if tuple(images.shape) != wanted or images.dtype != torch.float32:
        return f"the crops are {_type(images)} {list(images.shape)} and should be float32 {list(wanted)}: look at data.loader.BatchLoader.batch"
    if not bool(torch.isfinite(images).all()) or float(images.abs().max()) > 3 or bool((images.std((-2, -1)) < 1e-3).all()):
        return (
            f"the crops run from {float(images.min()):.2f} to {float(images.max()):.2f} and should be pictures within "
            "-3 to 3: look at augment.normalise and roi.crop_rois"
        )
    if tuple(labels.shape) != (wanted[0], *parts.model.mask_canvas) or labels.dtype != torch.int64:
        return (
            f"the labels are {_type(labels)} {list(labels.shape)} and should be int64 "
            f"{[wanted[0], *parts.model.mask_canvas]}: look at roi.labels_from_coverage"
        )
    if int(labels.min()) < 0 or int(labels.max()) > NON_TARGET or not bool((labels == TARGET).any()):
        return (
            f"the labels run from {int(labels.min())} to {int(labels.max())} and should be 0, 1, 2 with a target (1) "
            "among them: look at roi.labels_from_coverage"
        )
    return ""


def _wrong_output(parts: Parts, output: Any) -> str:
    settings, model, _, (images, _, _) = parts
    wanted = (len(images), 2, *model.mask_canvas)
    heads = {"contour_logits": settings.use_contour_detection, "distance": settings.use_distance_transform}
    for name, on in {"logits": True, **heads}.items():
        found = getattr(output, name)
        if (found is not None) != on:
            return (
                f"{name} is {'there' if found is not None else 'missing'} and the settings have it "
                f"{'on' if on else 'off'}: look at build.build_model"
            )
        if on and (tuple(found.shape) != wanted or found.dtype != torch.float32):
            return f"{name} is {_type(found)} {list(found.shape)} and should be float32 {list(wanted)}: look at HierarchicalUNet.forward"
        if on and not bool(torch.isfinite(found).all()):
            return f"{name} of a fresh model is not finite: look at the module that writes it"
    if output.distance is not None and float(output.distance.abs().max()) > 1:
        return f"distance reaches {float(output.distance.abs().max()):.2f} and should lie within -1 to 1: look at refine.DistanceTransform"
    return ""


def _note(stages: list, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    first = output if isinstance(output, Tensor) else output[0]
    if name not in {stage[0] for stage in stages}:
        stages.append([name, list(first.shape), _type(first)])


def _target_iou(predicted: Tensor, labels: Tensor) -> Tensor:
    truth, found = labels == TARGET, predicted == TARGET
    return ((truth & found).sum((1, 2)) / (truth | found).sum((1, 2)).clamp(min=1))[truth.any(-1).any(-1)].mean()


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
