"""The guard with models of any kind, several optimizers, accumulation: a skipped step is exact."""

import copy
import math

import pytest
import torch
from test_any_loop import Lookup, Net, assert_exact, assert_same, build, data, state
from torch import nn

from refinelib.guard import Guard, Rewinder, diagnose
from refinelib.guard.guard import REPORT

NAN, INF = math.nan, math.inf


# -- models ------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Parameters of unusual shape and type; ``shift`` has a gradient in some steps only."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale, self.none = nn.Parameter(torch.ones((), dtype=dtype)), nn.Parameter(torch.ones(0, 3))
        self.shift = nn.Parameter(torch.zeros(3))
        self.turn = nn.Parameter(torch.tensor([1 + 2j, 0.5, -1j])) if dtype == torch.complex64 else None
        self.wide = nn.Parameter(torch.ones(3, dtype=dtype if dtype != torch.complex64 else torch.float64))

    def forward(self, x):
        x = x * self.wide + (self.shift if x[0, 0] > 0 else 0)
        x = x * self.turn.abs().float() if self.turn is not None else x
        return (x * self.scale.real - 1).square().mean().float() + self.none.sum()


def tied():
    model = Net()
    model.again = model.first
    return model


def frozen():
    model = Net()
    model.first.requires_grad_(False)
    return model


def last_channels():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


MODELS = {
    "batch norm without momentum": lambda: Net(momentum=None),
    "frozen parameters": frozen,
    "tied weights": tied,
    "sparse and dense": lambda: Lookup(dense=True),
    "a sparse gradient without rows": lambda: Lookup(dense=True, empty=True),
    "float64": lambda: Net().double(),
    "bfloat16": lambda: Net().bfloat16(),
    "scalar, empty, rarely used": Odd,
    "complex": lambda: Odd(torch.complex64),
    "mixed types": lambda: Odd(torch.bfloat16),
    "channels last": last_channels,
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_skipped_step_is_exact_with_every_model(name, average):
    def make():
        torch.manual_seed(0)
        model = MODELS[name]()
        average_model = copy.deepcopy(model).requires_grad_(False) if average else None
        kind = torch.optim.Adagrad if "spars" in name else torch.optim.AdamW
        guard = Guard(model, kind(model.parameters(), lr=1e-2), average=average_model, ema_decay=0.9)
        guard.check_state()
        return guard

    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    batches = [x.to(dtype) for x in data(shape=(2, 3, 5, 5) if name == "channels last" else (4, 3))]
    assert_exact(
        make, (1, 4), batches=batches, forward=lambda guard: lambda x: guard.model(x).square().mean()
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_rewound(name):
    """Healthy steps move no weight too far, and NaN in a weight is undone."""
    torch.manual_seed(0)
    model = MODELS[name]()
    kind = torch.optim.Adagrad if "spars" in name else torch.optim.AdamW
    guard = Guard(model, kind(model.parameters(), lr=1e-2))
    rewinder, dtype = Rewinder(guard), next(model.parameters()).dtype
    dtype = dtype if dtype in (torch.float64, torch.bfloat16) and name != "mixed types" else torch.float32
    messages = []
    for place, x in enumerate(data(140, shape=(2, 3, 5, 5) if name == "channels last" else (4, 3))):
        guard.zero_grad()
        guard.backward(model(x.to(dtype)).square().mean())
        messages.append(rewinder.update(guard.step()))
        if place == 60:
            guard.parameters[-1].data.fill_(NAN)
    assert sum(map(bool, messages)) == 1 and guard.damage() == [], messages


def test_parameters_frozen_and_unfrozen_in_the_course_of_training():
    def forward(guard):
        calls = []

        def forward(x):
            guard.model.first.requires_grad_(bool(calls) and not bool(torch.isnan(x).any()))
            calls.append(1)
            return guard.model(x)

        return forward

    for optimizer in ("adam fused", "adagrad fused", "momentum", "radam"):
        assert_exact(lambda optimizer=optimizer: build(optimizer), (2,), "nan in the input", forward=forward)


def test_parameters_that_only_one_of_model_and_optimizer_holds():
    def make():
        torch.manual_seed(0)
        model = Net()
        outside = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([*model.first.parameters(), outside], lr=1e-2, fused=True)
        return Guard(model, optimizer)

    def forward(guard):
        return lambda x: guard.model(x * guard.parameters[-1])

    guard = assert_exact(make, (1,), "one inf gradient", forward=forward)
    assert guard.names == ["first.weight", "first.bias", "group 0.2"]
    rewinder = Rewinder(guard)
    for x in data(70):
        rewinder.update(guard_step(guard, forward(guard), x))
    guard.parameters[-1].data.fill_(NAN)
    messages = [rewinder.update(guard_step(guard, forward(guard), x)) for x in data(70, 1)]
    assert "first group 0.2" in "".join(filter(None, messages)) or sum(map(bool, messages)) == 1
    assert guard.parameters[-1].isfinite().all()


def guard_step(guard, forward, *inputs):
    """A step with the loss ``forward(*inputs)``."""
    guard.zero_grad()
    guard.backward(forward(*inputs))
    return guard.step()


def test_two_optimizers_have_a_guard_each():
    """A bad step of the critic leaves the generator's state alone, and its own as it was."""

    def run(bad, batches):
        torch.manual_seed(0)
        generator, critic = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))

        def apart(x, factor):
            return critic(generator(x).detach() * factor).mean() - critic(x).mean()

        ours = Guard(generator, torch.optim.Adam(generator.parameters(), fused=True), losses=[critic])
        theirs = Guard(critic, torch.optim.RMSprop(critic.parameters()), losses=[generator])
        for place, x in enumerate(batches):
            if bad != ("left out", place):
                factor = NAN if bad == ("nan", place) else 1.0
                guard_step(theirs, apart, x, factor)
            guard_step(ours, lambda x: -critic(generator(x)).mean(), x)
        return [state(guard) for guard in (ours, theirs)]

    for ours, theirs in zip(run(("nan", 2), data()), run(("left out", 2), data()), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_second_of_three_micro_batches_is_bad(scaled):
    """Emulated overflow: float16 gradients where the loss is scaled."""

    def run(places):
        guard = build("adamw fused", scaled=scaled, scale_init=64.0)
        for place, micro in enumerate(data(shape=(3, 4, 3))):
            if place not in places:
                continue
            guard.zero_grad()
            for part, x in enumerate(micro):
                guard.backward(guard.model(x * (NAN if place == 2 and part == 1 else 1)) / 3)
                if scaled and place == 3 and part == 1 and 4 in places:
                    guard.parameters[0].grad.fill_(INF)
            guard.step()
        return guard

    bad = {2, 3} if scaled else {2}
    ours, theirs = run(range(6)), run(sorted(set(range(6)) - bad))
    if scaled:
        assert float(ours.state["scale"]) == 32.0
    for a, b in zip(ours.tensors().values(), theirs.tensors().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_compiled_model_is_guarded_rewound_and_diagnosed():
    torch.manual_seed(0)
    model = torch.compile(Net())
    guard = Guard(model, torch.optim.AdamW(model.parameters(), fused=True))
    rewinder = Rewinder(guard)
    skipped = 0
    for place, x in enumerate(data(140)):
        report = guard_step(guard, model, x * (NAN if place == 3 else 1))
        skipped += bool(report[REPORT.index("skipped")]) and place < 60
        rewinder.update(report)
        if place == 60:
            guard.parameters[0].data.fill_(NAN)
    assert skipped == 1 and rewinder.rewinds == 1 and guard.damage() == []
    model.last.weight.data.fill_(3e38)
    found = diagnose(model, None, (data(1)[0],))
    assert (found.phase, found.module) == ("forward", "last")
