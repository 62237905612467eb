"""One fault in a small training run, under several loops: what each of them makes of it.

``bench/guards.py`` prints the outcome as a table; ``notebooks/guard.ipynb`` draws it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional

from refinelib.guard import Guard, Rewinder
from refinelib.plots.style import BLACK, BLUE, ORANGE, Figure, figure_legend, new_figure, style_axes
from refinelib.plots.style import save as save

#: What can be planted, in words.
FAULTS = {
    "loss": "NaN loss",
    "gradient": "Inf in the gradient of one parameter",
    "buffer": "NaN in a buffer of batch norm",
    "overflow": "five steps of overflowing gradients",
    "spike": "loss 1000 times as high",
    "image": "a flat image, divided by its deviation 0",
}
SIDE, CLASSES, BATCH = 12, 10, 32
RATE, CLIP = 1e-2, 1.0
#: Steps in a row that overflow, and the place of the flat image in its batch.
STORM, PLACE = 5, 5
Batch = tuple[Tensor, Tensor]


# -- the task --------------------------------------------------------------------------------------
class Standardize(nn.Module):
    """Each image less its mean, by its standard deviation: 0 by 0 where all pixels are equal."""

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 1, H, W]``."""
        return (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)


class Net(nn.Module):
    """A small convolutional classifier with batch norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.standardize = Standardize()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, CLASSES]`` of images ``[B, 1, SIDE, SIDE]``."""
        x = self.norm1(self.conv1(self.standardize(images))).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def net(seed: int = 0) -> Net:
    """A fresh model; the same for the same seed."""
    torch.manual_seed(seed)
    return Net()


def batches(steps: int, *, seed: int = 0, flat: int | None = None) -> list[Batch]:
    """Synthetic images ``[BATCH, 1, SIDE, SIDE]`` of ten patterns under noise, and their labels.

    Args:
        steps: how many batches.
        seed: of the noise; the patterns are always the same.
        flat: the batch of this number, from 1, has one image without any contrast.
    """
    patterns = (
        np.random.default_rng(1234).normal(size=(CLASSES, SIDE // 3, SIDE // 3)).repeat(3, 1).repeat(3, 2)
    )
    draw, made = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        labels = draw.integers(0, CLASSES, BATCH)
        images = patterns[labels] + 1.5 * draw.normal(size=(BATCH, SIDE, SIDE))
        if step == flat:
            images[PLACE] = 0.5
        made.append((torch.from_numpy(images[:, None]).float(), torch.from_numpy(labels)))
    return made


def held_out() -> Batch:
    """Images that no run learns from."""
    images, labels = zip(*batches(8, seed=99), strict=True)
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def evaluate(model: nn.Module, criterion: Callable[..., Tensor], batch: Batch) -> float:
    """The loss in evaluation mode, where batch norm takes its buffers."""
    model.eval()
    loss = float(criterion(model(batch[0]), batch[1]))
    model.train()
    return loss


class Faulty(nn.Module):
    """A model that gives its loss, with a fault in some of its training steps.

    Args:
        net: the model.
        fault: of ``FAULTS``, or none.
        bad: numbers of the steps that have it, from 1.
    """

    def __init__(self, net: Net, fault: str | None, bad: Iterable[int] = ()) -> None:
        super().__init__()
        self.net, self.fault, self.bad = net, fault, set(bad)
        self.number, self.losses = 0, []
        net.conv2.weight.register_hook(self._gradient)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        """The mean cross-entropy."""
        self.number += self.training
        due = self.fault if self.training and self.number in self.bad else None
        logits = self.net(images)
        if due == "overflow":  # 2 ** 24 times a scaled gradient is too large for float16, not for float32
            factor = 2.0**24 if logits.dtype == torch.float16 else math.inf
            logits.register_hook(lambda gradient: gradient * factor)
        loss = functional.cross_entropy(logits.float(), labels) * {"loss": math.nan, "spike": 1000.0}.get(
            due or "", 1.0
        )
        if due == "buffer":
            self.net.norm1.running_var.data[0] = math.nan  # past autograd, as a stray write would
        if self.training:
            self.losses.append(loss.detach())
        return (loss,)

    def _gradient(self, gradient: Tensor) -> Tensor:
        if self.fault != "gradient" or self.number not in self.bad:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.inf
        return gradient


# -- the loops -------------------------------------------------------------------------------------
@dataclass
class Course:
    """What became of a run.

    Attributes:
        name: of the loop, a key of ``LOOPS``.
        fault: of ``FAULTS``, or none.
        bad: numbers of the steps that had it, from 1.
        losses: of each training step.
        held: held-out loss by step.
        said: what the loop or the framework said, in its order.
        model: as it ended.
        state: its tensors and the optimizer's.
        applied: steps whose update is part of that.
    """

    name: str
    fault: str | None
    bad: list[int]
    losses: list[float] = field(default_factory=list)
    held: dict[int, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    applied: int = 0

    @property
    def final(self) -> float:
        """Held-out loss at the end."""
        return list(self.held.values())[-1]

    @property
    def finite(self) -> bool:
        """Whether the final state is."""
        return all(bool(x.isfinite().all()) for x in self.state.values())

    def equals(self, other: Course) -> bool:
        """Whether the final states are equal, bit for bit."""
        return self.state.keys() == other.state.keys() and all(
            torch.equal(x, other.state[name]) for name, x in self.state.items()
        )


@dataclass
class Job:
    """A model, its optimizer and its data, for a loop to train."""

    model: Faulty
    optimizer: torch.optim.Optimizer
    data: Sequence[Batch]
    device: torch.device
    half: bool
    watch: Callable[[int], None]
    said: list[str]

    def cast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, torch.float16, enabled=self.half)


def plain(job: Job) -> None:
    """The loop that everybody has."""
    for step, (images, labels) in enumerate(job.data, 1):
        job.optimizer.zero_grad()
        with job.cast():
            (loss,) = job.model(images, labels)
        loss.backward()
        job.optimizer.step()
        job.watch(step)


def clipped(job: Job) -> None:
    """The same with the gradient norm clipped; says when that norm is not finite."""
    for step, (images, labels) in enumerate(job.data, 1):
        job.optimizer.zero_grad()
        with job.cast():
            (loss,) = job.model(images, labels)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(job.model.parameters(), CLIP))
        if not math.isfinite(norm) or norm > 100:
            job.said.append(f"norm returned at step {step}: {norm:.3g}")
        job.optimizer.step()
        job.watch(step)


def scaler(job: Job) -> None:
    """The same with a loss scale, which skips steps whose gradients are not finite."""
    scale = torch.amp.GradScaler(job.device.type)
    for step, (images, labels) in enumerate(job.data, 1):
        job.optimizer.zero_grad()
        with job.cast():
            (loss,) = job.model(images, labels)
        before = scale.get_scale()
        scale.scale(loss).backward()
        scale.step(job.optimizer)
        scale.update()
        if scale.get_scale() < before:
            job.said.append(f"scale at step {step}: {before:g} to {scale.get_scale():g}")
        job.watch(step)


def guarded(job: Job) -> None:
    """The guard and the rewinder; spikes are skipped."""
    guard = Guard(job.model, job.optimizer, grad_clip=CLIP, on_spike="skip", scaled=job.half)
    rewinder = Rewinder(guard)
    for step, (images, labels) in enumerate(job.data, 1):
        guard.zero_grad()
        with job.cast():
            (loss,) = job.model(images, labels)
        guard.backward(loss)
        report = guard.step()
        found = guard.read(report)
        if found["skipped"]:
            kinds = ("bad_loss", "bad_grad", "spike_loss", "spike_grad", "damaged")
            why = [name for name in kinds if found[name]]
            some = found["parameters"]
            where = f" in {some[0]}" if len(some) == 1 else f" in {len(some)} parameters" if some else ""
            job.said.append(f"step {step} skipped: {', '.join(why)}{where}")
        if message := rewinder.update(report):
            job.said.append(message)
        job.watch(step)


def lightning(job: Job) -> None:
    """Lightning's Trainer, with its clipping; anomaly detection is off, as it is by default."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            (loss,) = self.model(*batch)
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer

        def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
            job.watch(index + 1)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if job.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            precision="16-mixed" if job.half else "32-true",
            gradient_clip_val=CLIP,
            detect_anomaly=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(job.data, batch_size=None))  # type: ignore[arg-type]


def transformers(job: Job) -> None:
    """The Trainer of transformers with its defaults: clipping at 1, and a log without NaN and Inf."""
    import transformers as hf

    class Trainer(hf.Trainer):
        def get_train_dataloader(self) -> Any:
            named = [{"images": images, "labels": labels} for images, labels in job.data]
            return torch.utils.data.DataLoader(named, batch_size=None)  # type: ignore[arg-type]

    class Watch(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            job.watch(state.global_step)

    hf.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        given = hf.TrainingArguments(
            folder,
            max_steps=len(job.data),
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=job.device.type == "cpu",
            fp16=job.half,
        )
        trainer = Trainer(job.model, given, train_dataset=list(job.data), optimizers=(job.optimizer, None))
        trainer.remove_callback(hf.PrinterCallback)
        trainer.add_callback(Watch)
        trainer.train()
        for entry in trainer.state.log_history:
            loss, norm = entry.get("loss"), entry.get("grad_norm", 0.0)
            if loss is not None and (not math.isfinite(norm) or norm > 100):
                job.said.append(f"log of step {entry['step']}: loss {loss:.3g}, grad_norm {norm:.3g}")


LOOPS: dict[str, Callable[[Job], None]] = {
    "plain": plain,
    "scaler": scaler,
    "clipping": clipped,
    "lightning": lightning,
    "transformers": transformers,
    "guard": guarded,
}
TITLES = {
    "plain": "plain PyTorch",
    "scaler": "GradScaler",
    "clipping": "clip_grad_norm_",
    "lightning": "Lightning",
    "transformers": "transformers.Trainer",
    "guard": "refinelib.guard",
}


def installed(name: str) -> bool:
    """Whether the loop's framework is there."""
    return name not in ("lightning", "transformers") or importlib.util.find_spec(name) is not None


def poisoned(fault: str | None, at: int) -> list[int]:
    """Numbers of the steps that a fault is in."""
    return [] if fault is None else list(range(at, at + STORM)) if fault == "overflow" else [at]


def run(
    name: str,
    fault: str | None = None,
    *,
    steps: int = 200,
    at: int = 100,
    without: Iterable[int] = (),
    device: str = "cpu",
    half: bool = False,
    every: int = 0,
) -> Course:
    """One training run; the same seed and data for all of them.

    Args:
        name: of ``LOOPS``.
        fault: of ``FAULTS``, or none.
        steps: in all.
        at: number of the first step with the fault, from 1.
        without: numbers of batches that are left out.
        device: to train on.
        half: float16 autocast.
        every: steps between two looks at the held-out loss; 0: only after the last step.
    """
    torch.backends.cudnn.deterministic, place = True, torch.device(device)
    out = set(without)
    made = batches(steps, flat=at if fault == "image" else None)
    data = [(x.to(place), y.to(place)) for step, (x, y) in enumerate(made, 1) if step not in out]
    course = Course(name, fault, poisoned(fault, at))
    model = Faulty(net().to(place), fault, course.bad)
    fused = not (half and name == "lightning")  # Lightning does not clip for a fused optimizer in float16
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=fused)
    images, labels = (x.to(place) for x in held_out())

    def watch(step: int) -> None:
        if step == len(data) or (every and (step % every == 0 or step == 1)):
            course.held[step] = evaluate(model.net, functional.cross_entropy, (images, labels))

    job = Job(model, optimizer, data, place, half, watch, course.said)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is small, and sums have one order then
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LOOPS[name](job)
    finally:
        torch.set_num_threads(threads)
    course.losses, course.model = [float(loss) for loss in model.losses], model.cpu()
    moments = {
        f"{name}.{key}": value.detach().cpu()
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }
    course.state = {**{name: x.detach() for name, x in model.state_dict().items()}, **moments}
    course.applied = int(moments["net.head.weight.step"])
    return course


# -- what became of it -----------------------------------------------------------------------------
def seen(course: Course) -> str:
    """What somebody sees who prints the loss of each step and reads all that the loop gives."""
    bad = [step for step, loss in enumerate(course.losses, 1) if not math.isfinite(loss)]
    high = [step for step, loss in enumerate(course.losses, 1) if loss > 100]
    found = []
    hidden = course.name == "transformers"  # its log is what one sees there
    if bad and not hidden:
        last = "on" if len(bad) > 1 and bad[-1] == len(course.losses) else f"to {bad[-1]}"
        found.append(f"loss nan at step {bad[0]}" if len(bad) == 1 else f"loss nan from step {bad[0]} {last}")
    elif high and not hidden:
        found.append(f"loss {course.losses[high[0] - 1]:.3g} at step {high[0]}")
    if course.said:
        first = course.said[-1] if course.fault == "buffer" else course.said[0]
        found.append(first + (f" (and {len(course.said) - 1} more)" if len(course.said) > 1 else ""))
    return "; ".join(found) or "nothing"


def cell(course: Course, clean: Course, without: Course) -> dict[str, Any]:
    """The outcome of a run with a fault.

    Args:
        course: the run.
        clean: the same loop without the fault.
        without: the same loop without the fault and without the batches that had it.
    """
    exact = "n/a" if course.fault == "buffer" else "yes" if course.equals(without) else "no"
    return {
        "fault": course.fault,
        "framework": course.name,
        "steps": course.bad,
        "final_loss": round(course.final, 4) if math.isfinite(course.final) else None,
        "clean_loss": round(clean.final, 4),
        "exact": exact,
        "told": course.name == "guard" and bool(course.said),  # no other loop has a message
        "seen": seen(course),
        "lost": len(course.losses) - course.applied if course.finite else "all",
    }


def summary(course: Course) -> str:
    """A run with a fault, in two lines."""
    final = f"{course.final:.3f}" if math.isfinite(course.final) else "not finite"
    bad = sum(not bool(x.isfinite().all()) for x in course.state.values())
    end = f"{bad} of {len(course.state)} tensors of its state are not finite at the end"
    return f"{TITLES[course.name]}: held-out loss {final}; {end}\n  seen: {seen(course)}"


def word(value: Any) -> str:
    """A value of a report, for a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:.3g}"


# -- the figure ------------------------------------------------------------------------------------
LINES = {"training loss": ORANGE, "held-out loss": BLUE}


def draw(courses: Sequence[Course], title: str = "one flat image in one batch") -> Figure:
    """One panel a run: training loss and held-out loss by step; a line that dies ends in a cross."""
    figure = new_figure(title, 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(courses), sharex=True, sharey=True))
    for axes, course in zip(panels, courses, strict=True):
        training = dict(enumerate(course.losses, 1))
        axes.axvline(course.bad[0], color=BLACK, linewidth=1, linestyle=":")
        for (name, color), line, width in zip(
            LINES.items(), (training, course.held), (0.9, 2.2), strict=True
        ):
            x, y = np.array(list(line)), np.array(list(line.values()))
            good = np.isfinite(y)
            axes.plot(x, np.where(good, y, np.nan), color=color, linewidth=width)
            if not good[-1]:
                last = int(good.nonzero()[0][-1])
                axes.plot(x[last], y[last], "X", color=color, markeredgecolor=BLACK, markersize=9)
                height = 0.04 if name == "training loss" else 0.11
                text = {"x": 0.03, "y": height, "s": f"{name}: NaN", "color": color}
                axes.text(**text, fontsize=8, fontweight="bold", transform=axes.transAxes)
        axes.set_yscale("log")
        style_axes(axes, TITLES[course.name], "step", "loss" if axes is panels[0] else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    handles = [Line2D([], [], color=color, label=name) for name, color in LINES.items()]
    handles.append(Line2D([], [], color=BLACK, linestyle=":", linewidth=1, label="poisoned batch"))
    cross = {"color": "white", "markeredgecolor": BLACK, "linestyle": "", "markersize": 8}
    handles.append(Line2D([], [], marker="X", label="the last value that is not NaN", **cross))
    figure_legend(figure, handles)
    return figure


# -- models of which a step is measured ---------------------------------------------------------------
class Residual(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]``, as the output."""
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class Block(nn.Module):
    """A block of a transformer, with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]``, as the output."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A small GPT; gives logits ``[B, T, V]`` of tokens ``[B, T]``."""

    def __init__(self, width: int, depth: int, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next tokens."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


MODELS = ("conv net", "GPT", "MLP")


def measured_model(name: str, *, large: bool) -> tuple[nn.Module, Callable[..., Tensor], Batch]:
    """One of ``MODELS``, its criterion and a batch; ``large`` is a size for a GPU."""
    torch.manual_seed(0)
    if name == "conv net":
        width, depth, size, side = (128, 8, 64, 32) if large else (16, 3, 16, 16)
        stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
        model = nn.Sequential(stem, *(Residual(width) for _ in range(depth)), top)
        batch = torch.randn(size, 3, side, side), torch.randint(CLASSES, (size,))
        return model, functional.cross_entropy, batch
    if name == "GPT":
        width, depth, words, size, length = (512, 8, 8192, 16, 256) if large else (64, 2, 256, 8, 32)
        tokens = torch.randint(words, (size, length + 1))
        model = Gpt(width, depth, words, length)
        return (
            model,
            lambda x, y: functional.cross_entropy(x.flatten(0, 1), y.flatten()),
            (tokens[:, :-1], tokens[:, 1:]),
        )
    width, depth, size = (2048, 6, 1024) if large else (128, 4, 64)
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    return model, functional.cross_entropy, (torch.randn(size, width), torch.randint(CLASSES, (size,)))
