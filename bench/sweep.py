"""A generated sweep of faults: any bit pattern, in any tensor of a step, at any time, in any configuration.

    python bench/sweep.py [--draws 20000] [--whole 600] [--workers N] [--seed S] [--device cuda [--compiled]]
    python bench/sweep.py --only '{"place": "exp_avg_sq", ...}'     # one draw again, as a failure prints it

A fault is value x place x time x configuration, drawn by Hypothesis. A draw goes through the loop of a
trainer that is kept alive for its configuration (``Trainer.fit``, from a known state through a few steps to
the end of epoch and run, but for validation and files); ``--whole`` draws go through ``refinelib.train`` and
are resumed. Checked:

    finite     weights, moments, average, buffers, guard's memory are finite at the end, or the run not ok
    exact      a skipped step moved nothing: these and the guard's statistics are bit for bit what they were
    record     every skipped step and every restored state is an event, or ends the run with a reason
    disk       nothing that is not finite goes into a checkpoint or the file of a snapshot
    report     the report of an applied step is finite
    continued  once the fault is over a step is applied, unless the run has ended
    restored   a rewind restores its snapshot bit for bit, and that is finite
    again      where steps are taken again they end, bit for bit, as without the fault (on a CPU)
    ended      a single faulty step does not end the run
    raised     nothing but DivergedError ends a run
    resumed    a whole run that is ok or interrupted can be resumed

Prints counts by place, value and time as tables and as one JSON line; then one failure of each kind, shrunk,
as a JSON line. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import struct
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from children import end_with_me
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from refinelib import build, checkpoints
from refinelib.config import Settings, resolve
from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.rewind import DivergedError
from refinelib.runs import Run
from refinelib.state import StepLog
from refinelib.trainer import Trainer, train

Fault = dict[str, Any]  # plain JSON
Outcome = dict[str, Any]  # plain JSON: where, state, kind, wrong, events

#: What takes a trainer of its own.
KEY = {
    "amp": ("off", "bf16", "fp16"), "optimizer": ("adamw", "adam"), "fused": (True, False),
    "accumulate": (1, 2), "ema": (True, False), "buffers": (True, False),
}  # fmt: skip
#: What may change between its draws, but for the first where a CUDA graph holds it. Incidents are slow.
LIVE = {"on_spike": ("clip", "skip", "note"), "incidents": (0,) * 23 + (2,)}
#: Places within a step (``flow``: gradient of an activation; ``loss``: a factor of it; ``total``: its value;
#: ``measured``: what the guard measures), and between steps (``memory``: the guard's; ``rate``: of learning).
IN_STEP = ("input", "label", "activation", "flow", "gradient", "term", "loss", "total", "measured")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
IN_STATE = ("parameter", *MOMENTS, "average", "buffer", "memory", "rate")
#: The state a draw starts from, steps (from 0) in or before which the fault comes, and how many there are.
#: ``begin``: before the run's first snapshot; ``after``, ``early``: after the last step, before the epoch's
#: end; ``stop``: before an interruption's checkpoint.
TIMES = {
    "begin": ("fresh", (), 2), "first": ("fresh", (0,), 2), "middle": ("warm", (0,), 2),
    "last": ("warm", (0,), 1), "twice": ("warm", (0, 1), 3), "every": ("warm", (0, 2), 4),
    "always": ("warm", range(99), 5), "after": ("warm", (), 1), "early": ("fresh", (), 1),
    "stop": ("warm", (0,), 2),
}  # fmt: skip
SELDOM = ("twice", "every", "always", "begin", "early")
OFTEN = ("middle", "last", "after") * 3 + ("first", "stop") * 2 + SELDOM
ONCE, TAKEN_AGAIN = ("first", "middle", "last", "stop"), ("first", "middle", "last", "after", "early")
GOES_ON = ("begin", "first", "middle", "twice", "every")
WARM = 9  # steps behind the warm state: from then on spikes are judged by their spread
PATIENCE = 24  # clean steps within which one has to be applied: a search for the loss scale, a rewind
#: What a skipped step may change in the guard's memory: counts of skips, and the loss scale by its own rule.
RULED, RULED_SCALED = (
    {"skipped", "skips_in_a_row", "updates_suspended"},
    {"scale", "headroom_peak", "good_in_a_row"},
)
ON_RECORD = {"skip", "spike", "incident", "rewind"}
LARGE = (math.nan, math.inf, 3e38, *(10.0**power for power in range(19, 39)))
POWERS = (0.0, *(10.0**power for power in range(-45, 39)))


# -- what is drawn -------------------------------------------------------------------------------------
def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def keys(*, full: bool) -> list[Fault]:
    """Configurations, the quick ones several times: all, or a quarter in which every two values meet."""

    def chosen(optimizer: str, fused: bool, accumulate: int, ema: bool, buffers: bool, **_: Any) -> bool:
        adam = optimizer == "adam"
        return (accumulate == 2) == (adam ^ fused ^ ema) and buffers == (adam ^ ema)

    def often(amp: str, accumulate: int, **_: Any) -> int:
        return (1 + (amp == "off")) * (1 + (accumulate == 1))

    found = [dict(zip(KEY, values, strict=False)) for values in itertools.product(*KEY.values())]
    return [key for key in found if full or chosen(**key) for _ in range(often(**key))]


@st.composite
def faults(
    draw, keys: list[Fault], places: Sequence[str] = IN_STEP + IN_STATE, times: Sequence[str] = OFTEN
) -> Fault:
    """``pick`` (of a place's tensors) and ``element`` count modulo what there is; no element: all of them."""
    fault = dict(draw(st.sampled_from(keys)))
    fault |= {name: draw(st.sampled_from(values)) for name, values in LIVE.items() if name not in fault}
    place = draw(st.sampled_from(places))
    fault["place"] = "parameter" if place == "average" and not fault["ema"] else place
    fault["time"] = draw(st.sampled_from([when for when in times if possible(fault["place"], when)]))
    fault["pick"] = draw(st.integers(0, 2**16))
    fault["element"] = draw(st.none() | st.integers(0, 2**20))
    exponent, fraction = st.integers(1, 254) | st.integers(246, 254), st.integers(1, 2**23 - 1)
    bits = draw(
        st.integers(0, 2**32 - 1)
        | st.sampled_from(POWERS).map(bits_of)
        | st.sampled_from(LARGE).map(bits_of)
        | st.tuples(exponent, fraction).map(lambda pair: pair[0] << 23 | pair[1])
        | (st.just(0) | fraction).map(lambda payload: 0x7F800000 | payload)  # infinity, and every NaN
    )
    fault["value"] = f"{bits ^ draw(st.booleans()) << 31:08x}"
    fault["snapshot"] = draw(st.booleans())  # one after each step
    return fault


def possible(place: str, when: str) -> bool:
    """Within a step there has to be one; before the first there are no moments."""
    if place in IN_STEP:
        return bool(TIMES[when][1])
    return when != "begin" or place not in MOMENTS


def value_class(fault: Fault) -> str:
    value = abs(struct.unpack(">f", bytes.fromhex(fault["value"]))[0])
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    bounds = {"0": 0.0, "subnormal": 1.1754943e-38, "to 1e-19": 1e-19, "to 1e4": 1e4, "to 1e19": 1e19}
    return next((name for name, bound in bounds.items() if value <= bound), "above 1e19")


# -- how it is planted ---------------------------------------------------------------------------------
def number(fault: Fault) -> Tensor:
    """The fault's value, float32 of these very bits; a class for labels."""
    bits = int(fault["value"], 16)
    if fault["place"] == "label":
        return torch.tensor(float(bits % 3))
    return torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)


class Control:
    """What a tap does in the next step; tensors, so that compiled and captured steps obey too."""

    def __init__(self, device: torch.device) -> None:
        self.on = torch.zeros((), dtype=torch.bool, device=device)
        self.value = torch.zeros((), device=device)
        self.element = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, fault: Fault) -> None:
        self.value.copy_(number(fault))
        self.element.fill_(-1 if fault["element"] is None else fault["element"])


#: Name of a place, and what installs a control there and returns it with what removes it.
Tap = tuple[str, Callable[[], tuple[Control, Callable[[], None]]]]


def spoilt(x: Tensor, control: Control) -> Tensor:
    """``x`` with one element or all replaced while the control is on; gradients flow through the rest."""
    places = torch.arange(x.numel(), device=x.device).view(x.shape)
    mark = control.on & ((control.element < 0) | (places == control.element % x.numel()))
    return torch.where(mark, control.value.to(x.dtype), x)


class _Flow(torch.autograd.Function):
    """Spoils the gradient alone."""

    @staticmethod
    def forward(ctx, x: Tensor, control: Control) -> Tensor:
        ctx.control = control
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return spoilt(gradient, ctx.control), None


class _Value(torch.autograd.Function):
    """Spoils the value alone."""

    @staticmethod
    def forward(ctx, x: Tensor, control: Control) -> Tensor:
        return spoilt(x, control)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def behind(owner: Any, name: str, change: Callable[[Any], Any]) -> Callable[[], None]:
    """Apply ``change`` to what a method returns; what is returned here ends that."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments: change(real(*arguments)))
    return lambda: delattr(owner, name)


def behind_module(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """The same for the first tensor of a module's output, in steps alone."""

    def hook(module, inputs, output):
        if not torch.is_grad_enabled():
            return None
        if isinstance(output, Tensor):
            return change(output)
        return type(output)([change(output[0]), *output[1:]])

    return module.register_forward_hook(hook).remove


def taps(trainer: Trainer) -> dict[str, list[Tap]]:
    """Where a fault can be planted within a step, by place."""
    injector, loss, guard = trainer.injector, trainer.loss, trainer.guard
    modules = [(n, m) for n, m in trainer.model.named_modules() if n and not isinstance(m, nn.ModuleList)]
    parameters = list(zip(guard.names, guard.parameters, strict=False))

    def tap(install: Callable[[Control], Callable[[], None]]):
        control = Control(trainer.device)
        return lambda: (control, install(control))

    def one_of_two(owner: Any, name: str, at: int):
        def change(both, c):
            return tuple(spoilt(x, c) if place == at else x for place, x in enumerate(both))

        return tap(lambda c: behind(owner, name, lambda both: change(both, c)))

    def activation(m: nn.Module):
        return tap(lambda c: behind_module(m, lambda x: spoilt(x, c)))

    def flow(m: nn.Module):
        return tap(lambda c: behind_module(m, lambda x: _Flow.apply(x, c) if x.requires_grad else x))

    def gradient(p: Tensor):
        return tap(lambda c: behind(injector, "after_backward", lambda _: p.grad.copy_(spoilt(p.grad, c))))

    def term(n: str):
        return tap(lambda c: behind(loss, "per_sample", lambda costs: {**costs, n: spoilt(costs[n], c)}))

    factor = tap(lambda c: behind(injector, "loss", lambda x: x * spoilt(torch.ones_like(x), c)))
    value = tap(lambda c: behind(injector, "loss", lambda x: _Value.apply(x, c)))
    return {
        "input": [("images", one_of_two(injector, "batch", 0))],
        "label": [("labels", one_of_two(injector, "batch", 1))],
        "activation": [(n, activation(m)) for n, m in modules],
        "flow": [(n, flow(m)) for n, m in modules],
        "gradient": [(n, gradient(p)) for n, p in parameters],
        "term": [(n, term(n)) for n in loss.names],
        "loss": [("factor", factor)],
        "total": [("value", value)],
        "measured": [(n, one_of_two(guard, "measure", at)) for at, n in enumerate(("norms", "largest"))],
    }


def held(trainer: Trainer) -> dict[str, list[tuple[str, Any]]]:
    """What there is between steps, by place: a name, and a tensor or the group that has a plain rate."""
    guard, named = trainer.guard, list(zip(trainer.guard.names, trainer.guard.parameters, strict=False))
    models = {"model": trainer.model, "average": trainer.average or nn.Module()}
    buffers = [(f"{which}.{n}", b) for which, model in models.items() for n, b in model.named_buffers()]
    moments = {n: guard.optimizer.state[p] for n, p in named if p in guard.optimizer.state}
    return {
        "parameter": named,
        **{kind: [(n, found[kind]) for n, found in moments.items()] for kind in MOMENTS},
        "average": list(zip(guard.names, guard.averages, strict=False)),
        "buffer": [(n, b) for n, b in buffers if b.is_floating_point()],
        "memory": list(guard.state.items()),
        "rate": [("lr", g["lr"] if isinstance(g["lr"], Tensor) else g) for g in guard.optimizer.param_groups],
    }


def dense(x: Tensor) -> Tensor:
    """The elements as they lie in memory, whatever the strides."""
    assert torch.ops.aten.is_non_overlapping_and_dense(x)
    return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())


@torch.no_grad()
def write(target: Any, fault: Fault) -> None:
    if isinstance(target, dict):
        target["lr"] = float(number(fault))
        return
    flat = dense(target)
    place = flat if fault["element"] is None else flat[fault["element"] % len(flat)]
    place.copy_(number(fault).to(flat.device, flat.dtype))


# -- what is looked at ---------------------------------------------------------------------------------
class Moving:
    """What a step may move: flat views of the live tensors, by type and name."""

    def __init__(self, guard: Guard) -> None:
        self.guard, tensors = guard, guard.tensors()
        kinds = {x.dtype for x in tensors.values()}
        self.parts = {kind: {n: dense(x) for n, x in tensors.items() if x.dtype == kind} for kind in kinds}

    def copy(self) -> dict[torch.dtype, Tensor]:
        return {kind: torch.cat(list(part.values())) for kind, part in self.parts.items()}

    @torch.no_grad()
    def restore(self, copied: dict[torch.dtype, Tensor]) -> None:
        for kind, part in self.parts.items():
            pieces = copied[kind].split([len(x) for x in part.values()])
            torch._foreach_copy_(list(part.values()), list(pieces))

    def moved(self, before: dict[torch.dtype, Tensor]) -> list[str]:
        """Names of the tensors that differ in any bit from a copy; a NaN is a NaN."""
        names = []
        for kind, new in self.copy().items():
            old, part = before[kind], self.parts[kind]
            differs = (old.view(torch.uint8) != new.view(torch.uint8)).view(len(old), -1).any(1)
            differs &= ~(old.isnan() & new.isnan())
            if bool(differs.any()):
                pieces = differs.split([len(x) for x in part.values()])
                names += [name for name, piece in zip(part, pieces, strict=False) if bool(piece.any())]
        return names

    def damage(self) -> list[str]:
        """Names of what is not finite, the guard's memory included."""
        if all(bool(x.isfinite().all()) for x in (*self.copy().values(), self.guard.memory)):
            return []
        tensors = {n: x for part in self.parts.values() for n, x in part.items()}
        tensors |= {f"memory.{n}": x for n, x in self.guard.state.items()}
        return [name for name, x in tensors.items() if not bool(x.isfinite().all())]


class Attack:
    """A fault on its way into a trainer's loop, and what is looked at on the way.

    Args:
        trainer: whose loop is about to begin.
        fault: drawn.
        due: numbers of the steps in which, or before which, it comes.
        moving: of the trainer, where its optimizer has made all its moments.
    """

    def __init__(
        self, trainer: Trainer, fault: Fault, due: Sequence[int], moving: Moving | None = None
    ) -> None:
        self.trainer, self.fault, self.due, self.moving = trainer, fault, due, moving
        self.between, self.struck = fault["place"] in IN_STATE, set()
        self.wrong: list[str] = []
        self.where, self.skipped, self.first, self.applied = "nowhere", 0, 0, False

    @contextlib.contextmanager
    def under_way(self, interruption: Any, tapped: dict[str, list[Tap]] | None = None) -> Iterator[None]:
        """While the loop runs; ``tapped``: the trainer's taps, where they are known."""
        self.interruption, trainer = interruption, self.trainer
        with contextlib.ExitStack() as stack:
            for name, method in {"train_step": self.train_step, "end_epoch": self.end_epoch}.items():
                mine = functools.partial(method, getattr(trainer, name))
                stack.enter_context(patch.object(trainer, name, mine))
            stack.callback(behind(trainer.rewinder, "rewind", self.restored))
            if not self.between:
                found = (tapped or taps(trainer))[self.fault["place"]]
                self.where, install = found[self.fault["pick"] % len(found)]
                self.control, remove = install()
                self.control.set(self.fault)
                stack.callback(remove)
                stack.callback(self.strike, False)
            if self.fault["time"] == "begin":
                self.strike(True)
            yield

    def strike(self, due: bool) -> None:
        if not self.between:
            self.control.on.fill_(due)
        elif due and (found := held(self.trainer)[self.fault["place"]]):  # there may be no moments yet
            self.where, target = found[self.fault["pick"] % len(found)]
            write(target, self.fault)

    def train_step(self, real: Callable[..., Tensor], plan: Any, at: int) -> Tensor:
        """In place of the trainer's: the fault comes, and what the step did is looked at."""
        number, when = self.trainer.step + 1, self.fault["time"]
        due = number in self.due and (when == "always" or number not in self.struck)  # it may be taken again
        self.struck |= {number} if due else set()
        stopping = due and when == "stop"
        if not self.between or due and not stopping:
            self.strike(due)
        moving, memory = self.moving or Moving(self.trainer.guard), self.trainer.guard.memory.clone()
        before = moving.copy()
        report = real(plan, at)
        self.judge(report, number, lambda: moving.moved(before), memory)
        if stopping:
            self.interruption.requested = True
            if self.between:
                self.strike(True)
        return report

    def judge(self, report: Tensor, number: int, moved: Callable[[], list[str]], memory: Tensor) -> None:
        """Did a step what it reports? ``moved`` names what it moved, ``memory`` is the guard's before."""
        guard, row = (
            self.trainer.guard,
            dict(zip(REPORT, report[len(self.trainer.loss.names) :].tolist(), strict=False)),
        )
        if not (row["skipped"] or row["updates_suspended"]):
            bad = [name for name, x in row.items() if not math.isfinite(x)]
            bad = bad or ["norms"] * (not bool(report.isfinite().all()))
            self.complain("report", "applied, and not finite are", bad)
            self.applied |= number > max(self.due, default=0)
            return
        ruled = RULED | (RULED_SCALED if guard.scaled else set())
        same = (memory == guard.memory) | (memory.isnan() & guard.memory.isnan())
        others = [
            f"memory.{n}"
            for n, x in zip(guard.state, same.tolist(), strict=False)
            if not x and n not in ruled
        ]
        self.complain("exact", "skipped, and moved", moved() + others)
        if row["skipped"]:
            self.skipped += 1
            self.first = self.first or number

    def end_epoch(self, real: Callable[..., Any], epoch: int, started: float) -> Any:
        """In place of the trainer's: the fault comes, where it comes after the last step."""
        last = {"early": 0, "after": self.trainer.settings.epochs - 1}.get(self.fault["time"])
        if epoch == last and not self.struck:
            self.struck.add(epoch)
            self.strike(True)
        return real(epoch, started)

    def restored(self, result: Any) -> Any:
        """Behind every rewind: the state is the snapshot's."""
        wanted, live = self.trainer.rewinder.snapshots[-1].tensors, self.trainer.guard.tensors()
        apart = [n for n, x in live.items() if not torch.equal(x, wanted.get(n, torch.zeros_like(x)))]
        self.complain("restored", "not the snapshot's, or not finite are", apart)
        return result

    def complain(self, code: str, what: str, names: list[str]) -> None:
        if names:
            self.wrong.append(f"{code}: {what} {len(names)}, first {names[0]}")

    def outcome(self, error: BaseException | None, events: list[dict[str, Any]], rewinds: int) -> Outcome:
        """What came of it, and what was wrong, also of what has to hold however the run ended."""
        fault, single = self.fault, not self.between and self.fault["time"] in ONCE
        ends = {type(None): "ok", KeyboardInterrupt: "interrupted", DivergedError: "diverged"}
        state = ends.get(type(error), "failed")
        ended = state in ("diverged", "failed")
        if state == "failed" and (fault["place"] != "step" or fault["fused"]):  # plain Adam: beta ** step
            self.wrong.append(f"raised: {type(error).__name__}: {error}".splitlines()[0][:200])
        if state == "diverged" and single:
            self.wrong.append(f"ended: by a single step: {str(error)[:100]}")
        if not ended:
            moving = self.moving or Moving(self.trainer.guard)
            self.complain("finite", f"the run is {state}, and not finite are", moving.damage())
            said = {e["kind"] for e in events if e["kind"] == "rewind" or e.get("step") == self.first}
            restored = sum(event["kind"] == "rewind" for event in events)
            if self.skipped and not said & ON_RECORD or restored != rewinds:
                self.wrong.append(f"record: {self.skipped} skipped; {rewinds} restored, {restored} on record")
        kind = "not ok" if ended else "rewound" if rewinds else "skipped" if self.skipped else "applied"
        messages = [event["message"] for event in events] + [str(error)] * ended
        return {"where": self.where, "state": state, "kind": kind, "wrong": self.wrong, "events": messages}


# -- a trainer for many draws --------------------------------------------------------------------------
class Records(Run):
    """A run whose records stay in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept: list[dict[str, Any]] = []
        for name in ("incidents", "checkpoints"):
            (folder / name).mkdir(parents=True)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        self.kept.append({"kind": kind, "message": message, **fields})

    def nothing(self, *_: Any, **__: Any) -> None: ...

    update = metrics = record_settings = rewind_records = nothing


class Disk:
    """In the place of the checkpoints' writer: looks at what would be written."""

    failing: dict[Path, str] = {}
    problems: list[str] = []

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.seen: Any = None

    def save(self, path: Path, content: dict[str, Any], *, copy: bool = True) -> None:
        if content is not self.seen:  # the same under two names
            self.bad += [f"{path.name}: {name}" for name in nonfinite(content)]
        self.seen = content

    def flush(self) -> None: ...

    def close(self) -> None: ...


NO_STATE = ("log", "best", "settings", "random")


def nonfinite(content: Any) -> list[str]:
    """Names of a checkpoint's numbers that are not finite, but for what its log and metrics say of steps."""
    numbers, left = {}, [((), content)]
    while left:
        name, value = left.pop()
        if isinstance(value, float) or isinstance(value, Tensor) and value.is_floating_point():
            numbers[name] = torch.as_tensor(value).cpu()
        elif isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*name, key), x) for key, x in items if key not in NO_STATE]
    kinds = {x.dtype for x in numbers.values()}
    together = [torch.cat([x.reshape(-1) for x in numbers.values() if x.dtype == kind]) for kind in kinds]
    if all(bool(x.isfinite().all()) for x in together):
        return []
    return [".".join(map(str, name)) for name, x in numbers.items() if not bool(x.isfinite().all())]


def small_model(settings: Settings, *, buffers: bool, real: Callable = build.build_model) -> nn.Module:
    """The model with every kind of module but fewer of each. ``buffers``: running statistics too."""
    model = real(settings)
    model.shared = model.shared[:1]
    if model.progressive is not None:
        model.progressive.steps = model.progressive.steps[:1]
    for unet, depth in ((model.person, 1), (model.target, 2)):
        unet.downs = nn.ModuleList(scale[:1] for scale in unet.downs[:depth])
        unet.ups = nn.ModuleList(scale[:1] for scale in unet.ups[:depth])
    model.person.attention, model.target.attention = nn.Sequential(), model.target.attention[:1]
    if buffers:
        model.stem.append(nn.BatchNorm2d(model.merge.out_channels))
    return model


def settings_of(fault: Fault, folder: str, **changes: Any) -> Settings:
    drawn = dict(
        amp=fault["amp"], optimizer=fault["optimizer"], fused_optimizer=fault["fused"],
        accumulate=fault["accumulate"], ema_decay=0.9 if fault["ema"] else 0.0,
        on_spike=fault.get("on_spike", "clip"), max_incidents=fault.get("incidents", 0),
        max_images=4 * fault["accumulate"],
    )  # fmt: skip
    fixed = dict(
        run="sweep", output_dir=folder, store_dir=f"{folder}/stores", batch_size=2, width=0.0625, roi_size=16,
        mask_size=16, epochs=1, lr=1e-3, warmup_epochs=0, loss_scale_init=1024.0, max_consecutive_skips=2,
        max_rewinds=1, log_every=1000, probe_every=0, validate_every=1000, compile="off",
    )  # fmt: skip
    return resolve("demo", **{**drawn, **fixed, **changes})


def few(found: list[Tap]) -> list[Tap]:
    return found[:: -(-len(found) // 6)]


def built_in(name: str, install: Callable[[], tuple[Control, Callable[[], None]]]) -> Tap:
    """The same tap, installed for good."""
    control, _ = install()
    return name, lambda: (control, lambda: None)


class Rig:
    """A trainer of one configuration, and the states its draws start from: before its first step, and warm.

    Args:
        key: the configuration.
        folder: for stores and incidents.
        device: it trains on; on CUDA steps are captured.
        compiled: compile the steps. Captured or compiled, they have their taps built in, a few of each place.
    """

    def __init__(self, key: Fault, folder: str, *, device: str = "cpu", compiled: bool = False) -> None:
        compile_ = "on" if compiled else "off"
        long = settings_of(key, folder, device=device, compile=compile_, epochs=1000)  # for the schedule
        self.settings = long.model_copy(update={"epochs": 1})
        self.run = Records(Path(tempfile.mkdtemp(dir=folder)))
        with patch.object(build, "build_model", functools.partial(small_model, buffers=key["buffers"])):
            self.trainer = trainer = Trainer(long, self.run)
        trainer.settings = self.settings
        trainer.evaluate_epoch = lambda epoch, final: dict(target_iou=0.0, boundary_iou=0.0, miou=0.0)
        trainer.writer, self.taps = Disk(), taps(trainer)
        if device == "cuda" or compiled:
            self.taps = {place: [built_in(*tap) for tap in few(found)] for place, found in self.taps.items()}
        guard, recovery = trainer.guard, trainer.rewinder
        self.rates = [float(group["lr"]) for group in guard.optimizer.param_groups]
        tensors = {name: x.clone() for name, x in guard.tensors().items()}
        fresh = guard.memory.clone(), recovery.state_dict()
        self.loop(WARM)
        assert not compiled or trainer.stepper.compiled, self.run.kept
        assert device != "cuda" or trainer.stepper.graph is not None or not guard.fused, self.run.kept
        self.moving = Moving(guard)
        warm = self.moving.copy(), guard.memory.clone(), recovery.state_dict()
        for name, x in guard.tensors().items():  # moments, which the first step makes
            tensors.setdefault(name, torch.zeros_like(x))
        parts = self.moving.parts.items()
        at_first = {kind: torch.cat([dense(tensors[name]) for name in part]) for kind, part in parts}
        self.bases = {"fresh": (at_first, *fresh), "warm": warm}
        known = {x.data_ptr() for x in guard.tensors().values()}
        self.constants = [(b, b.clone()) for _, b in held(trainer)["buffer"] if b.data_ptr() not in known]
        self.snapshots: dict[str, Any] = {}
        for base in self.bases:
            self.restore(base)
            recovery.start(trainer.step)
            self.snapshots[base] = recovery.snapshots[0]
        self.clean: dict[str, Any] = {}  # what steps without a fault leave, by time

    def loop(self, steps: int, interruption: Any = None) -> None:
        """The trainer's own loop: an epoch that ends after so many more steps, and the end of the run."""
        self.trainer.loader.steps_per_epoch = self.trainer.step + steps
        self.trainer.fit(interruption or types.SimpleNamespace(requested=False), None)

    @torch.no_grad()
    def restore(self, base: str, *, on_spike: str = "clip", incidents: int = 0) -> None:
        """Make all that a draw may change what it was."""
        trainer, guard = self.trainer, self.trainer.guard
        state, memory, known = self.bases[base]
        self.moving.restore(state)
        for constant, was in self.constants:
            constant.copy_(was)
        guard.memory.copy_(memory)
        for group, rate in zip(guard.optimizer.param_groups, self.rates, strict=False):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        guard.on_spike = on_spike
        guard.resume_updates(capture_enabled=incidents > 0)
        trainer.settings = self.settings.model_copy(update={"max_incidents": incidents})
        trainer.incidents, trainer.repeats, trainer.best = [], 0, None
        trainer.step = WARM if base == "warm" else 0
        trainer.kept_snapshots = {trainer.snapshot_file(trainer.step)}  # the first is what was restored here
        trainer.rewinder.load_state_dict(copy.deepcopy({**known, "snapshots": []}), [])
        if first := self.snapshots.get(base):
            first.used, trainer.rewinder.snapshots = False, [first]
        trainer.log, trainer.writer = StepLog(self.run, trainer.loss, guard, every=10**6), Disk()
        self.run.kept.clear()

    def play(self, fault: Fault) -> Outcome:
        """Take the steps of a draw; what came of it, and what was wrong."""
        base, due, steps = TIMES[fault["time"]]
        trainer, recovery, error = self.trainer, self.trainer.rewinder, None
        interruption = types.SimpleNamespace(requested=False)
        self.restore(base, on_spike=fault["on_spike"], incidents=fault["incidents"])
        attack = Attack(trainer, fault, [trainer.step + 1 + at for at in due], self.moving)
        take = recovery.maybe_snapshot if fault["snapshot"] else lambda step, after: None
        with contextlib.ExitStack() as stack:
            often = patch.object(recovery, "maybe_snapshot", lambda step, **_: take(step, after=1))
            stack.enter_context(often)
            if fault["time"] == "begin":
                recovery.snapshots = []
            else:  # its snapshot is there, and to look whether it is finite takes as long as half a step
                stack.enter_context(patch.object(recovery, "start", lambda step: None))
            stack.enter_context(attack.under_way(interruption, self.taps))
            try:
                self.loop(steps, interruption)
                self._until_applied(attack)
            except (Exception, KeyboardInterrupt) as caught:
                error = caught
        outcome = attack.outcome(error, self.run.kept, recovery.rewinds)
        attack.complain("disk", "not finite are", trainer.writer.bad)
        if outcome["kind"] == "rewound" and attack.between and not recovery.slowed:
            self._as_if_nothing(fault, attack)
        return outcome

    def _until_applied(self, attack: Attack) -> None:
        """Steps after the fault until one is applied."""
        with patch.object(self.trainer, "raise_unless_trained", lambda: None):  # so few prove nothing
            for _ in range(PATIENCE):
                if attack.applied or attack.fault["time"] not in GOES_ON:
                    return
                self.loop(1)
        attack.wrong.append(f"continued: none of {PATIENCE} steps was applied")

    def _as_if_nothing(self, fault: Fault, attack: Attack) -> None:
        """Steps that were taken again leave what they leave without the fault."""
        left, when = self.moving.copy(), fault["time"]
        if self.trainer.device.type != "cpu" or when not in TAKEN_AGAIN:
            return
        if when not in self.clean:
            self.restore(TIMES[when][0])
            self.loop(TIMES[when][2])
            self.clean[when] = self.moving.copy()
        self.moving.restore(left)
        attack.complain("again", "not as without the fault are", self.moving.moved(self.clean[when]))


# -- whole runs ----------------------------------------------------------------------------------------
def whole(fault: Fault, folder: str, device: str = "cpu") -> Outcome:
    """``refinelib.train`` with the fault in it, and resumed; what came of it, and what was wrong."""
    settings, attacks, error = settings_of(fault, folder, device=device, epochs=2), [], None

    def fit(trainer: Trainer, interruption: Any, on_epoch: Any, real: Callable = Trainer.fit) -> None:
        total = 2 * trainer.loader.steps_per_epoch
        due = {
            "first": [1], "middle": [total // 2], "last": [total], "twice": [2, 3], "every": range(2, 99, 2),
            "always": range(2, 99), "stop": [total // 2 + 1],
        }  # fmt: skip
        attacks.append(Attack(trainer, fault, due.get(fault["time"], [])))
        with attacks[0].under_way(interruption):
            real(trainer, interruption, on_epoch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        model = functools.partial(small_model, buffers=fault["buffers"])
        stack.enter_context(patch.object(build, "build_model", model))
        with patch.object(Trainer, "fit", fit):
            try:
                train(settings)
            except (Exception, KeyboardInterrupt) as caught:
                error = caught
        (attack,) = attacks
        run = attack.trainer.run
        status = run.status()
        outcome = attack.outcome(error, run.events(), status["rewinds"])
        if status["state"] != outcome["state"]:
            attack.wrong.append(f"record: the run is {outcome['state']}, its status {status['state']}")
        for file in sorted((run.folder / "checkpoints").glob("**/*.pt")):
            attack.complain("disk", f"{file.name}: not finite are", nonfinite(checkpoints.load(file)))
        if outcome["kind"] != "not ok":
            try:
                train(settings.model_copy(update={"run": run.folder.name, "resume": True}))
            except Exception as caught:
                attack.wrong.append(f"resumed: {type(caught).__name__}: {caught}".splitlines()[0][:300])
    return outcome


# -- the sweep -----------------------------------------------------------------------------------------
class Sweep:
    """Rigs by configuration, and the counts of what came of their draws."""

    def __init__(self, folder: str, *, device: str = "cpu", compiled: bool = False) -> None:
        self.folder, self.device, self.compiled = folder, device, compiled
        self.built_in = device == "cuda" or compiled
        self.rigs: dict[str, Rig] = {}
        self.counts: Counter = Counter()
        self.failures: list[dict[str, Any]] = []

    def play(self, fault: Fault) -> Outcome:
        if fault.get("whole"):
            return whole(fault, self.folder, self.device)
        key = {name: fault[name] for name in (*KEY, *["on_spike"] * self.built_in)}
        if str(key) not in self.rigs:
            if self.built_in:
                self.rigs.clear()  # one graph's memory at a time
            self.rigs[str(key)] = Rig(key, self.folder, device=self.device, compiled=self.compiled)
        return self.rigs[str(key)].play(fault)

    def add(self, fault: Fault) -> None:
        outcome = self.play(fault)
        kind = "whole, " * bool(fault.get("whole")) + outcome["kind"]
        rows = {"place": fault["place"], "value": value_class(fault), "time": fault["time"]}
        self.counts.update((what, row, kind) for what, row in rows.items())
        if outcome["wrong"]:
            self.failures.append({"draw": fault, **outcome})

    def sweep(self, count: int, number: int, strategy: st.SearchStrategy[Fault]) -> None:
        """So many draws. None raises: a failure must not keep the others from being drawn."""
        drawn: set[str] = set()
        always = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        profile = settings(phases=[Phase.generate], max_examples=min(count, 1000), **always)

        @settings(profile)
        @given(strategy)
        def body(fault: Fault) -> None:
            # Hypothesis likes to vary what it drew before: another element alone is not worth a draw.
            kind = json.dumps([x for name, x in fault.items() if name not in ("pick", "element", "snapshot")])
            if kind in drawn or len(drawn) >= count:
                return
            drawn.add(kind)
            try:
                self.add(fault)
            except Exception as error:  # of the sweep itself; did it leave, Hypothesis would draw it again
                wrong = [f"sweep: {type(error).__name__}: {error}"]
                self.failures.append({"draw": fault, "where": "nowhere", "state": "unknown", "wrong": wrong})

        for part in itertools.count():  # Hypothesis stops early where much has been drawn
            before = len(drawn)
            seed(1000 * part + number)(body)()
            if len(drawn) in (before, count):
                break

    def shrunk(self, failure: dict[str, Any]) -> dict[str, Any]:
        """A failure with everything simpler that keeps one of its properties violated."""
        codes, best = codes_of(failure), failure
        simpler = {
            "time": ("middle", "last", "after"), "value": ("7fc00000", "7f800000", "00000000", "3f800000"),
            "element": (0, None), "pick": (0,), "snapshot": (False,), "incidents": (0,),
            "on_spike": ("clip",), **{name: values[:1] for name, values in KEY.items()},
        }  # fmt: skip
        for name, values in simpler.items():
            for value in values:
                if value == best["draw"][name]:
                    break
                draw = {**best["draw"], name: value}
                if not possible(draw["place"], draw["time"]):
                    continue
                outcome = self.play(draw)
                if codes & codes_of(outcome):
                    best = {"draw": draw, **outcome}
                    break
        return best


def codes_of(outcome: dict[str, Any]) -> set[str]:
    """The properties that are violated."""
    return {wrong.partition(":")[0] for wrong in outcome["wrong"]}


def kinds_of(failures: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Failures by property and place."""
    found: dict[str, list[dict[str, Any]]] = {}
    for failure in failures:
        kind = f"{failure['wrong'][0].partition(':')[0]} {failure['draw']['place']}"
        found.setdefault(kind, []).append(failure)
    return found


def table(counts: Counter) -> str:
    """Counts by place, value and time, a column an outcome."""
    columns, lines = sorted({column for *_, column in counts}), []
    values = sorted({row for what, row, _ in counts if what == "value"})
    for what, rows in {"place": IN_STEP + IN_STATE, "value": values, "time": TIMES}.items():
        cells = [[what, *columns], ["---"] * (len(columns) + 1)]
        cells += [[row, *(counts[what, row, column] for column in columns)] for row in rows]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in cells] + [""]
    return "\n".join(lines)


def half_convolutions() -> None:
    """A float16 convolution's gradient takes 30 times float32's on a CPU: compute in that, and round."""
    real = functional.conv2d

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, *how):
            ctx.save_for_backward(x, weight)
            ctx.how, ctx.biased = how, bias is not None
            return real(x.float(), weight.float(), None if bias is None else bias.float(), *how).half()

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            *spread, groups = ctx.how
            spread = ([v, v] if isinstance(v, int) else v for v in spread)
            sizes, mask = [len(weight)] if ctx.biased else None, [ctx.needs_input_grad[0], True, ctx.biased]
            wide = (gradient.float(), x.float(), weight.float())
            found = torch.ops.aten.convolution_backward(*wide, sizes, *spread, False, [0, 0], groups, mask)
            return (*(None if g is None else g.half() for g in found), None, None, None, None)

    def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        if input.is_cuda or not half:
            return real(input, weight, bias, stride, padding, dilation, groups)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.half()
            return Half.apply(input.half(), weight.half(), bias, stride, padding, dilation, groups)

    functional.conv2d = conv2d


@contextlib.contextmanager
def quiet_folder() -> Iterator[str]:
    """A folder for a while, in which runs print nothing."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as name, contextlib.redirect_stdout(io.StringIO()):
        yield name


def share(worker: int, options: argparse.Namespace) -> dict[str, Any]:
    """One worker's part of a sweep."""
    torch.set_num_threads(1)
    started, number, workers = time.perf_counter(), 1000 * options.seed + worker, options.workers
    count, wholes, chosen = options.draws // workers, options.whole // workers, keys(full=not options.quarter)
    with quiet_folder() as folder:
        sweep = Sweep(folder, device=options.device, compiled=options.compiled)
        if sweep.built_in:  # a trainer takes longer than its draws: one by one. No graph without fused
            chosen = [key for place, key in enumerate(chosen) if key["fused"] and key not in chosen[:place]]
            chosen = [{**key, "on_spike": how} for key, how in zip(chosen, itertools.cycle(LIVE["on_spike"]))]
            chosen = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
            chosen = chosen[:1] if options.compiled else chosen[::workers]  # compiling takes minutes
            for place, key in enumerate(chosen):
                sweep.sweep(-(-count // len(chosen)), 100 * number + place, faults([key]))
        else:
            half_convolutions()
            sweep.sweep(count, number, faults(chosen))
        if wholes:
            sweep.sweep(wholes, number, faults(chosen).map(lambda fault: {**fault, "whole": True}))
        seconds = round(time.perf_counter() - started, 1)
        shrunk = {kind: sweep.shrunk(found[0]) for kind, found in kinds_of(sweep.failures).items()}
    return {"counts": sweep.counts, "failures": sweep.failures, "shrunk": shrunk, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--whole", type=int, default=0, help="draws of whole runs, beside these")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compiled", action="store_true", help="one configuration a worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quarter", action="store_true", help="of the configurations, as in the suite")
    parser.add_argument("--only", help="one draw again: its JSON")
    options = parser.parse_args()
    if options.only:
        return again(json.loads(options.only), options.device, options.compiled)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(share, range(options.workers), itertools.repeat(options)))
    counts = sum((part["counts"] for part in parts), Counter())
    failures = [failure for part in parts for failure in part["failures"]]
    print(table(counts))
    summary = {
        "draws": sum(n for (what, *_), n in counts.items() if what == "place"),
        "failures": len(failures),
        "seconds": max(part["seconds"] for part in parts),
        "kinds": {kind: len(found) for kind, found in kinds_of(failures).items()},
        "outcomes": [[*key, n] for key, n in sorted(counts.items())],
    }
    print(json.dumps(summary))
    for kind, failure in {kind: f for part in parts for kind, f in part["shrunk"].items()}.items():
        print(f"{kind}, {failure['where']}, run {failure['state']}: {'; '.join(failure['wrong'])}")
        print(f"--only '{json.dumps(failure['draw'])}'")
    return 1 if failures else 0


def again(fault: Fault, device: str, compiled: bool) -> int:
    """Play one draw and print what came of it."""
    torch.set_num_threads(1)
    if device == "cpu" and not compiled:
        half_convolutions()
    with quiet_folder() as folder:
        outcome = Sweep(folder, device=device, compiled=compiled).play(fault)
    print(json.dumps(outcome))
    return 1 if outcome["wrong"] else 0


if __name__ == "__main__":
    end_with_me()
    sys.exit(main())
