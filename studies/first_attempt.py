"""The first attempt's formulations, kept to show what they do; for rootcause.ipynb and its tests only.

Do not use anything here. Each piece says what it did, why it fails, and what we do instead. Nothing in it
plants a NaN: :func:`attempt` trains our model on real crops, and what goes wrong goes wrong by itself.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as PyTorch's documentation writes it
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode

from refinelib.build import autocast, build_device, build_guard, build_loss, build_model
from refinelib.config import Settings
from refinelib.data import make_source
from refinelib.data.augment import normalise
from refinelib.data.store_build import usable_cores
from refinelib.guard.guard import REPORT
from refinelib.guard.optimizer import WarmupCosine
from refinelib.modeling.layers import Head
from refinelib.modeling.losses import MaskLoss
from refinelib.modeling.refinements import BoundaryRefinement, bounded
from refinelib.modeling.roi import crop_rois, labels_from_coverage

#: What was wrong, each a switch of :func:`attempt`.
FAULTS = ("sampler", "edges", "scale", "guard", "settings")
#: What was tried against it, each by itself; settings it changes, where that is all it was.
REMEDIES: dict[str, dict[str, Any]] = {
    "smaller learning rate": dict(lr=5e-6, min_lr=1e-6),
    "warm-up that is read": {},
    "fewer modules": dict(
        use_progressive_upsampling=False,
        use_contour_detection=False,
        use_distance_transform=False,
        use_active_contour_loss=False,
    ),
    "no mixed precision": dict(amp="off"),
    "clamps": {},
}


# -- 1: the sampler --------------------------------------------------------------------------------
def one_bin_crop(image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Did: sampled the box (xyxy) of an image ``[C, H, W]`` at ``size`` positions, float32 ``[C, h, w]``.

    Fails: the positions run over one output bin of the box, ``x0 + (0..1 + 0.5) * bin``, where they should
    run over all of it. They are also scaled for corner-aligned sampling and sampled without, a shift of
    half a pixel. Instead: :func:`~refinelib.modeling.roi.crop_rois`, tested on ramps and against exact
    areas.
    """
    places = []
    for low, high, cells, pixels in zip(
        box[:2].tolist(), box[2:].tolist(), reversed(size), reversed(image.shape[1:]), strict=False
    ):
        at = low + (torch.linspace(0, 1, cells, dtype=torch.float64) + 0.5) * (high - low) / cells
        places.append(at / (pixels - 1) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1)
    return F.grid_sample(image[None].double(), grid[None], align_corners=False)[0].float()


@dataclass(frozen=True)
class Crops:
    """The same people through both samplers."""

    one_bin: Tensor  # float32 [N, 3, h, w], normalised
    whole: Tensor  # float32 [N, 3, h, w], normalised
    labels: Tensor  # int64 [N, h, w]


def crop_people(settings: Settings, split: str) -> Crops:
    """The people of a split's first ``max_images`` images, cut by both samplers."""
    source = make_source(settings, split)
    people = source.instances(settings.max_images)
    crops, scene, anyone, shown = [], None, None, None
    for index, slot, box in zip(
        people.image_index, people.slots, torch.from_numpy(people.boxes), strict=False
    ):
        if index != shown:
            scene, shown = source.scene(int(index)), index
            anyone = scene.masks.any(0)
        image, mine = torch.from_numpy(scene.image).permute(2, 0, 1), scene.masks[slot]
        layers = torch.from_numpy(np.stack([mine, anyone & ~mine]))
        covered = crop_rois(layers, box[None], settings.mask_size)[0].mul(255).round().to(torch.uint8)
        whole = crop_rois(image, box[None], settings.roi_size)[0]
        labels = labels_from_coverage(covered.permute(1, 2, 0))
        crops.append((one_bin_crop(image, box, settings.roi_size), whole, labels))
    one_bin, whole, labels = (torch.stack(x) for x in zip(*crops, strict=False))
    return Crops(normalise(one_bin), normalise(whole), labels)


# -- 2: the edges ----------------------------------------------------------------------------------
def bare_edges(probs: Tensor) -> Tensor:
    """Did: edge magnitude ``sqrt(dx^2 + dy^2)`` in its own precision, one row and column less.

    Fails: backward divides by the magnitude, 0/0 wherever three neighbours are equal. In half precision
    there are only some 10,000 different probabilities, and neighbours are equal all the time. Instead:
    :func:`~refinelib.modeling.geometry.edge_strength`, in float32 with a smooth foot.
    """
    here = probs[..., :-1, :-1]
    dx, dy = probs[..., :-1, 1:] - here, probs[..., 1:, :-1] - here
    return torch.sqrt(dx * dx + dy * dy)


def network_probs(logits: Tensor) -> Tensor:
    """Mask probabilities in the precision that the network computes in: half, under autocast."""
    kind = logits.device.type
    return torch.sigmoid(
        logits.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else logits
    )


class BatchGate(BoundaryRefinement):
    """Did: gated the boundary refinement by bare edges, scaled by the batch's least and largest.

    Fails: passes the NaN of :func:`bare_edges` on to every weight before it; one sample changes another's
    mask. Instead: :class:`~refinelib.modeling.refinements.BoundaryRefinement`, each pixel by itself and no
    gradient through the gate.
    """

    def forward(self, logits: Tensor, features: Tensor, image: Tensor) -> Tensor:
        """Return new logits float32 ``[B, 2, H, W]``."""
        probs = network_probs(logits)
        edges = F.pad(bare_edges(probs), (0, 1, 0, 1), mode="replicate").float().mean(dim=1, keepdim=True)
        gate = (edges - edges.min()) / (edges.max() - edges.min() + 1e-6)
        inputs = torch.cat([features, image.to(features.dtype), probs.to(features.dtype)], dim=1)
        return logits + self.blend * gate * bounded(self.edge_conv(self.trunk(inputs)))


class BareLoss(MaskLoss):
    """Did: our losses, the contour's length from bare edges; with ``clamps`` each is cut at 10.

    Fails: as :func:`bare_edges`; ``clamp(max=10)`` lets NaN through and has no gradient above 10.
    Instead: :func:`~refinelib.modeling.losses.active_contour` and :func:`~refinelib.modeling.losses.capped`.
    """

    def __init__(self, whole: MaskLoss, *, clamps: bool) -> None:
        super().__init__(whole.weights, {**whole.options, "active_contour_smoothness": 0.0})
        self.length_weight, self.clamps = whole.options["active_contour_smoothness"], clamps

    def per_sample(self, output, labels: Tensor) -> dict[str, Tensor]:
        """Each loss, float32 ``[B]`` by name."""
        costs = super().per_sample(output, labels)
        if "active_contour" in costs:
            costs["active_contour"] = costs["active_contour"] + self.length_weight * self.length
        return {name: cost.clamp(max=10.0) for name, cost in costs.items()} if self.clamps else costs

    def forward(self, output, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Total and components, as our losses return them."""
        edges = bare_edges(network_probs(output.logits))  # before autocast is switched off for the rest
        self.length = (edges.clamp(max=10.0) if self.clamps else edges).float().mean(dim=(-3, -2, -1))
        return super().forward(output, labels)


def use_bare_edges(model: nn.Module) -> None:
    """Put the first gate and PyTorch's own initialisation of the last layers into our model."""
    if model.boundary is not None:
        model.boundary.__class__ = BatchGate  # the same layers and weights, another gate
    for layer in model.modules():
        if isinstance(layer, Head):
            layer.reset_parameters()


# -- 3 and 4: the loss scale and the guard ---------------------------------------------------------
def half_guard(loss: Tensor, parameters: list[Tensor], *, clip: float, mixed: bool) -> tuple[bool, float]:
    """Did: clipped, and said whether to take the step and what gradient norm to log.

    Fails: under mixed precision it looks at nothing and logs 0. Elsewhere it looks for NaN, not Inf; and
    clipping by an infinite norm multiplies Inf by 0, which is NaN. Instead:
    :class:`~refinelib.guard.guard.Guard`, one path for every precision, which decides before it clips.
    """
    if mixed:
        clip_grad_norm_(parameters, clip)
        return True, 0.0
    if bool(loss.isnan()) or any(bool(p.grad.isnan().any()) for p in parameters):
        return False, 0.0
    return True, float(clip_grad_norm_(parameters, clip))


def whole_guard(loss: Tensor, parameters: list[Tensor], *, clip: float) -> tuple[bool, float]:
    """Ours in their loop: finite or nothing, on every path."""
    norm = gradient_norm(parameters)
    if not (math.isfinite(norm) and bool(loss.isfinite())):
        return False, norm
    clip_grad_norm_(parameters, clip)
    return True, norm


def gradient_norm(parameters: list[Tensor], scale: float = 1.0) -> float:
    """L2 norm of all gradients over ``scale``, in float64: finite where they all are."""
    norm = float(torch.stack(torch._foreach_norm([p.grad.double() for p in parameters])).norm())
    return norm / scale if scale else math.nan


class FirstLoop:
    """Did: ``torch.amp.GradScaler`` as it comes, then the optimizer; ``floor`` and ``guarded`` are ours.

    Fails: every skipped step halves the scale and nothing holds it. From 2^-128 down its inverse is
    infinite in float32. The scaler looks at gradients before it multiplies them with that: the first
    healthy step writes Inf and NaN into the weights. Instead: :class:`~refinelib.guard.guard.Guard` holds
    the scale at ``loss_scale_floor`` and divides.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        schedule: WarmupCosine,
        *,
        floor: float = 0.0,
        guarded: bool = False,
    ) -> None:
        self.parameters = list(model.parameters())
        rates = dict(lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer = torch.optim.AdamW(self.parameters, **rates, foreach=True)
        kind, mixed = self.parameters[0].device.type, settings.amp == "fp16"
        self.scaler = torch.amp.GradScaler(kind, init_scale=settings.loss_scale_init, enabled=mixed)
        self.schedule, self.clip, self.floor, self.guarded, self.count = (
            schedule,
            settings.grad_clip,
            floor,
            guarded,
            0,
        )

    def step(self, loss: Tensor) -> dict[str, Any]:
        """Backward and update; what there is to know of it."""
        scale, mixed = self.scaler.get_scale(), self.scaler.is_enabled()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        parameters = [p for p in self.parameters if p.grad is not None]
        finite, norm = math.isfinite(gradient_norm(parameters)), gradient_norm(parameters, scale)
        lr = float(self.schedule(torch.tensor(self.count)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        judge = whole_guard if self.guarded else half_guard
        take, reported = judge(
            loss.detach(), parameters, clip=self.clip, **({} if self.guarded else {"mixed": mixed})
        )
        if take:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if mixed and self.scaler.get_scale() < self.floor:
            self.scaler.update(self.floor)
        skipped = not take or (mixed and not finite)
        self.count += not skipped
        return dict(grad_norm=norm, reported=reported, loss_scale=scale, skipped=skipped, lr=lr)


class OurLoop:
    """The guard as the trainer uses it, with what :class:`FirstLoop` tells of a step."""

    def __init__(self, model: nn.Module, settings: Settings, *, steps: int) -> None:
        self.guard = build_guard(
            settings, model, None, steps_per_epoch=max(1, round(steps / settings.epochs))
        )

    def step(self, loss: Tensor) -> dict[str, Any]:
        """Backward and update; the same record as that of :class:`FirstLoop`."""
        scale = float(self.guard.state["scale"])
        self.guard.zero_grad()
        self.guard.scale(loss).backward()
        norm = gradient_norm(self.guard.parameters, scale)
        report = dict(zip(REPORT, self.guard.step(loss.detach()).tolist(), strict=False))
        told = dict(reported=report["grad_norm"], skipped=bool(report["skipped"]), lr=report["lr"])
        return dict(told, grad_norm=norm, loss_scale=scale)


def guard_trial(settings: Settings, spoil: str, *, mixed: bool, ours: bool) -> dict[str, Any]:
    """One step of a one-layer network with a planted fault, to see who notices.

    Args:
        settings: of the step.
        mixed: in mixed precision.
        ours: with our guard.
        spoil: ``NaN`` or ``Inf``, then ``loss`` (the gradient stays finite) or ``gradient``; or ``tiny
            scale``, a
            healthy step at a loss scale of 2^-130.

    Returns:
        ``skipped``, ``reported`` (the norm that was logged) and ``finite`` (the weights after the step).
    """
    amp, scale = "fp16" if mixed else "off", 2.0**-130 if spoil == "tiny scale" else settings.loss_scale_init
    settings, device = (
        settings.model_copy(update=dict(amp=amp, loss_scale_init=scale)),
        build_device(settings),
    )
    torch.manual_seed(settings.seed)
    model = nn.Linear(4, 2).to(device)
    loop = (
        OurLoop(model, settings, steps=1) if ours else FirstLoop(model, settings, first_build(settings, 1)[1])
    )
    loss = model(torch.ones(3, 4, device=device)).square().mean()
    value, _, place = spoil.partition(" ")
    if place == "gradient":
        first = torch.tensor([0], device=device)
        model.weight.register_hook(lambda gradient: gradient.index_fill(1, first, float(value)))
    record = loop.step(loss + float(value) if place == "loss" else loss)
    return {**record, "finite": all(bool(p.isfinite().all()) for p in model.parameters())}


# -- 5: settings that did not reach the run --------------------------------------------------------
class LoweredLoss(MaskLoss):
    """Did: lowered the refinement losses to 0.01 here, after the first NaN.

    Fails: :func:`first_build` names every weight, so a default is never used, and its schedule reads no
    warm-up. Instead: ``build.py`` is the one place where a setting meets its object, and a test changes
    each and looks for it.
    """

    def __init__(
        self,
        *,
        active_contour_weight: float = 0.01,
        boundary_aware_weight: float = 0.01,
        contour_weight: float = 0.01,
        distance_weight: float = 0.01,
    ) -> None:
        super().__init__({
            "ce": 1.0,
            "dice": 1.0,
            "active_contour": active_contour_weight,
            "boundary_aware": boundary_aware_weight,
            "contour": contour_weight,
            "distance": distance_weight,
        })  # fmt: skip


def first_build(settings: Settings, steps: int) -> tuple[MaskLoss, WarmupCosine]:
    """Did: built loss and schedule; the weights are written out, the warm-up is left out."""
    loss = LoweredLoss(
        active_contour_weight=0.1, boundary_aware_weight=0.1, contour_weight=0.1, distance_weight=0.1
    )
    return loss, WarmupCosine(lr=settings.lr, min_lr=settings.min_lr, warmup_steps=0, total_steps=steps)


# -- all together ----------------------------------------------------------------------------------
class HalfLayers(TorchFunctionMode):
    """float16 convolutions and matrix products on a CPU as on a GPU: float16 in and out, sums in float32.

    PyTorch's own take ten times as long on a CPU without float16 arithmetic.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            func in (F.conv2d, F.linear)
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.float16
        ):
            args = [x.half().float() if isinstance(x, Tensor) else x for x in args]
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Attempt:
    """A run: a record a step, and its target IoU from each person's own crop and from another's.

    Where both are alike, the network does not look. NaN: its masks are NaN.
    """

    steps: list[dict[str, Any]]
    target_iou: float
    swapped_iou: float


def attempt(
    settings: Settings,
    learn: Crops,
    judge: Crops,
    *,
    steps: int,
    faults: Collection[str] = FAULTS,
    remedy: str | None = None,
    seed: int | None = None,
) -> Attempt:
    """Train ``steps`` steps with some of the faults and one of the remedies; without faults, it is ours.

    ``seed`` takes the place of the settings' own.

    A record holds loss, grad_norm (true, unscaled), reported (the norm that was logged), loss_scale,
    skipped, lr, nan_tensors (parameter tensors with NaN after the step) and contrast (standard deviation
    inside a crop). A run whose weights are NaN is given ten more steps.
    """
    changes = dict(REMEDIES[remedy]) if remedy else {}
    settings = settings.model_copy(update=changes | ({} if seed is None else {"seed": seed}))
    device = build_device(settings)
    torch.manual_seed(settings.seed)
    model, criterion = build_model(settings).to(device), build_loss(settings)
    if "edges" in faults:
        use_bare_edges(model)
        criterion = BareLoss(criterion, clamps=remedy == "clamps")
    loop: FirstLoop | OurLoop = OurLoop(model, settings, steps=steps)
    if "settings" in faults and remedy != "warm-up that is read":
        loop.guard.schedule = first_build(settings, steps)[1]
    if {"scale", "guard"} & set(faults):
        floor = 0.0 if "scale" in faults else settings.loss_scale_floor
        loop = FirstLoop(model, settings, loop.guard.schedule, floor=floor, guarded="guard" not in faults)
    images, labels = (
        x.to(device) for x in (learn.one_bin if "sampler" in faults else learn.whole, learn.labels)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = range(math.ceil(steps * settings.batch_size / len(labels)))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in rounds])
    records: list[dict[str, Any]] = []
    for rois in order[: steps * settings.batch_size].view(steps, -1):
        with half_layers(device), autocast(settings, device):
            loss, _ = criterion(model(images[rois.to(device)]), labels[rois.to(device)])
        record = loop.step(loss)
        broken = int(torch.stack(torch._foreach_norm(list(model.parameters()))).isnan().sum())
        contrast = float(images[rois.to(device)].std(dim=(-2, -1)).mean())
        records.append(dict(record, loss=loss.item(), nan_tensors=broken, contrast=contrast))
        if len(records) > 10 and records[-11]["nan_tensors"]:
            break
    shown = judge.one_bin if "sampler" in faults else judge.whole
    ious = (target_iou(model, settings, images, judge.labels) for images in (shown, shown.roll(1, 0)))
    return Attempt(records, *ious)


def attempts(
    settings: Settings, learn: Crops, judge: Crops, jobs: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, Attempt]]:
    """Several of :func:`attempt`, ``{name: keywords}``, in order; on a CPU side by side, a core each.

    In smoke size a new process would take longer than its run.
    """
    if settings.smoke or build_device(settings).type != "cpu":
        yield from ((name, attempt(settings, learn, judge, **job)) for name, job in jobs.items())
        return
    # Bytes, not tensors: those would travel through shared memory, of which a container has little.
    parcels = [pickle.dumps((settings, learn, judge, job)) for job in jobs.values()]
    with ProcessPoolExecutor(
        min(usable_cores(), len(jobs), 4), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        yield from zip(jobs, pool.map(_attempt, parcels), strict=False)


def _attempt(parcel: bytes) -> Attempt:
    torch.set_num_threads(1)  # so small a network gains nothing from a second
    settings, learn, judge, job = pickle.loads(parcel)
    return attempt(settings, learn, judge, **job)


def half_layers(device: torch.device):
    """The context in which layers of a CPU compute in half precision."""
    return HalfLayers() if device.type == "cpu" else nullcontext()


@torch.no_grad()
def target_iou(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> float:
    """Mean IoU of the target over crops that have one; NaN where the masks are."""
    device, found = build_device(settings), []
    for x, y in zip(images.split(8), labels.split(8), strict=False):
        with half_layers(device), autocast(settings, device):
            probs = model(x.to(device)).log_probs()
        if bool(probs.isnan().any()):
            return math.nan
        mine, truth = probs.argmax(dim=1).cpu() == 1, y == 1
        both, either = ((mine & truth).sum((1, 2)), (mine | truth).sum((1, 2)))
        found.append((both / either)[truth.any(2).any(1)])
    return float(torch.cat(found).mean())
