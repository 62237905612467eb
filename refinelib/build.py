"""From settings to the objects that use them: the one place where a setting's name meets its object."""

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refinelib import checkpoints
from refinelib.config import Settings, checked
from refinelib.data import Store
from refinelib.data.loader import BatchLoader
from refinelib.guard.faults import Injector
from refinelib.guard.guard import Guard
from refinelib.guard.optimizer import WarmupCosine, build_optimizer
from refinelib.modeling.losses import MaskLoss
from refinelib.modeling.roi import canvas_size, mask_canvas_size
from refinelib.modeling.unet import HierarchicalUNet
from refinelib.registry import LOSSES, REFINEMENTS


class StepParts(NamedTuple):
    """What a training step is made of."""

    model: HierarchicalUNet
    average: HierarchicalUNet | None  # moving average of the weights, where the run has one
    loss: MaskLoss
    guard: Guard
    injector: Injector
    loader: BatchLoader


def build_step(
    settings: Settings, store: Store, device: torch.device, *, steps_per_epoch: int | None = None
) -> StepParts:
    """The parts of a run's steps, on the device.

    Args:
        settings: of the run.
        store: of the training ROIs.
        device: of model and batches.
        steps_per_epoch: of the schedule; none: as many as the store gives.
    """
    model = initial_model(settings, device)
    average = copy.deepcopy(model).requires_grad_(False) if settings.ema_decay else None
    options = settings.pick("batch_size", "accumulate", "seed")
    loader = BatchLoader(store, device=device, mode=settings.augment, **options)
    guard = build_guard(settings, model, average, steps_per_epoch=steps_per_epoch or loader.steps_per_epoch)
    loss = build_loss(settings, ignores=store.ignores).to(device)
    injector = Injector(settings.inject, model)
    return StepParts(model, average, loss, guard, injector, loader)


def initial_model(settings: Settings, device: torch.device) -> HierarchicalUNet:
    """A run's model before its first step: fresh, or with the weights that ``init_from`` names.

    Raises:
        CheckpointError: there are none, or they do not fit.
    """
    model = fresh_model(settings, device)
    if settings.init_from:
        source = checkpoints.find(settings.init_from, output_dir=settings.output_dir)
        saved = checkpoints.load(source, needs=("model", "average", "settings"))
        weights = saved["average"] or saved["model"]
        checkpoints.check_weights(model, {**saved, "model": weights}, source)
        model.load_state_dict(weights, strict=False)
    return model


def fresh_model(settings: Settings, device: torch.device) -> HierarchicalUNet:
    """:func:`build_model`'s model on a device, in the memory format that convolutions are fast in."""
    # mypy does not know the memory format's overload.
    model: HierarchicalUNet = build_model(settings)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_model(settings: Settings) -> HierarchicalUNet:
    """The model a run trains, with fresh weights from the global random state."""
    canvas, masks = canvas_size(settings.roi_size, settings.context), mask_canvas(settings, settings.context)
    own = settings.pick("width", "coarse_width", "coarse_depth", "roi_size", "conv_gain", "blend_init")
    refinements = settings.pick(*(option.name for option in REFINEMENTS.options()))
    return HierarchicalUNet(canvas=canvas, mask_canvas=masks, **own, **refinements)


def forward(settings: Settings, model: nn.Module, images: Tensor) -> Any:
    """A model's output for normalised crops (float ``[B, 3, H, W]``), in the run's precision."""
    with autocast(settings, images.device):
        return model(images.contiguous(memory_format=torch.channels_last))


def build_loss(settings: Settings, *, ignores: bool = False) -> MaskLoss:
    """The weighted sum of the losses that are switched on; ``ignores``: labels may be ignored."""
    weights = {
        name: getattr(settings, f"{name}_weight")
        for name, term in LOSSES.items()
        if term.switch is None or getattr(settings, term.switch)
    }
    options = settings.pick(*(option.name for option in LOSSES.options()))
    window = None if settings.loss_context is None else mask_canvas(settings, settings.loss_context)
    return MaskLoss(weights, options, cap=settings.refinement_loss_cap, ignores=ignores, window=window)


def mask_canvas(settings: Settings, context: float) -> tuple[int, int]:
    """Mask pixels ``(h, w)`` of the box with so much context around it."""
    canvas = canvas_size(settings.roi_size, context)
    return mask_canvas_size(settings.mask_size, settings.roi_size, canvas)


def build_guard(
    settings: Settings, model: nn.Module, average: nn.Module | None, *, steps_per_epoch: int
) -> Guard:
    """Optimizer, schedule and guard of a run."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    schedule = WarmupCosine(warmup_steps=warmup, total_steps=total, **settings.pick("lr", "min_lr"))
    optimizer = build_optimizer(
        model.parameters(),
        kind=settings.optimizer,
        fused=settings.fused_optimizer,
        **settings.pick("lr", "weight_decay"),
    )
    return Guard(
        model,
        optimizer,
        schedule,
        average=average,
        scaled=settings.amp == "fp16",
        scale_init=settings.loss_scale_init,
        scale_floor=settings.loss_scale_floor,
        **settings.pick("grad_clip", "ema_decay", "on_spike", "spike_sigma"),
    )


def build_device(settings: Settings) -> torch.device:
    """The device a run uses.

    Raises:
        ValueError: a device was asked for that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = checked(device=settings.device) or "auto"  # a caller may have given none
    name = ("cuda" if count else "cpu") if name == "auto" else name
    device, rule = torch.device(name), "set device to auto or cpu"
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"{count} of them, numbered from 0" if count else "no CUDA device"
        raise ValueError(f"device = {name}, and PyTorch sees {there} here: {rule}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device = {name}, and PyTorch sees no GPU of Apple's here: {rule}")
    return device


def set_determinism(settings: Settings) -> None:
    """Have kernels chosen that give the same bits every time, where the settings ask for it."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = not settings.deterministic


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's random generators."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def device_name(device: torch.device) -> str:
    """The GPU's name on CUDA, else the kind of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_auto(settings: Settings, device: torch.device) -> Settings:
    """The settings with what ``auto`` means on this device in its place."""
    return settings.model_copy(update={"amp": precision(settings, device)})


def precision(settings: Settings, device: torch.device) -> str:
    """``off``, ``bf16`` or ``fp16``: what ``amp`` means on a device."""
    if settings.amp != "auto":
        return settings.amp
    if device.type != "cuda":
        return "off"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Mixed precision as the settings ask for it."""
    amp = precision(settings, device)
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=amp != "off")
