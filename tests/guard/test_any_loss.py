"""Losses of any sign and size: what is healthy, what is a spike, what has diverged."""

import itertools
import math

import pytest
import torch
from test_any_loop import build

from refinelib.guard.monitor import LossMonitor


# -- losses ------------------------------------------------------------------------------------------------
def losses(kind, count=400, seed=0):
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    along = torch.arange(count) / count
    return {
        "positive": (0.1 * noise).exp() * (0.3 + 2 * (-5 * along).exp()),
        "signed": noise,
        "swinging": torch.sin(along * 40) + 0.1 * noise,
        "swinging slowly": torch.sin(along * 10) + 0.1 * noise,
        "constant": torch.ones(count),
        "zero": torch.zeros(count),
        "zero, then not": (along > 0.5) * noise.abs(),
        "critic": 10 - 1010 * along + 20 * noise * along,
        "tiny": 1e-30 * (0.2 * noise).exp(),
        "enormous": 1e30 * (0.2 * noise).exp(),
    }[kind].tolist()


LOSSES = ["positive", "signed", "swinging", "swinging slowly", "constant", "zero", "zero, then not"]
LOSSES += ["critic", "tiny", "enormous"]
#: The others under ``slow``.
QUICK = [("positive", "clip"), ("signed", "note")]
QUICK += [(kind, "skip") for kind in ("swinging", "critic", "zero, then not", "enormous")]


def push(guard, values, norms=None):
    """Steps with given losses and gradients, without a network."""
    reports = []
    for place, value in enumerate(values):
        guard.zero_grad()
        for p in guard.parameters:
            p.grad = torch.full_like(p, norms[place] if norms else 0.1)
        reports.append(guard.read(guard.step(torch.tensor(value))))
    return reports


@pytest.mark.parametrize(
    ("kind", "on_spike"),
    [
        pytest.param(kind, way, marks=() if (kind, way) in QUICK else pytest.mark.slow)
        for kind, way in itertools.product(LOSSES, ("skip", "clip", "note"))
    ],
)
def test_healthy_losses_of_any_kind_are_no_spikes_and_a_spike_is_one(kind, on_spike):
    for seed in range(2):
        guard = build("sgd", on_spike=on_spike)
        values = losses(kind, seed=seed)
        reports = push(guard, values)
        touched = sum(report["spike_loss"] or report["skipped"] for report in reports)
        assert touched <= 0.03 * len(values), touched
        size = sum(map(abs, values)) / len(values)
        (report,) = push(guard, [1000 * size])
        assert (report["spike_loss"], report["skipped"]) == (size > 0, size > 0 and on_spike == "skip")


@pytest.mark.parametrize("on_spike", ["skip", "clip"])
def test_gradients_of_zero_say_nothing_of_the_usual_ones(on_spike):
    """A hinge loss that is met in most batches: those in which it is not are no spikes."""
    guard = build("sgd", on_spike=on_spike)
    broken = [place % 4 == 3 for place in range(200)]
    values = [x + 0.5 if b else 0.0 for x, b in zip(losses("positive", 200), broken, strict=True)]
    reports = push(guard, values, [float(b) for b in broken])
    assert sum(r["spike_loss"] or r["spike_grad"] or r["skipped"] for r in reports) == 0
    assert push(guard, [1.0], [1000.0])[0]["spike_grad"]


@pytest.mark.parametrize("optimizer", ["adam fused", "adamw amsgrad", "adagrad", "sgd"])
def test_a_gradient_whose_square_overflows_makes_no_second_moment_infinite(optimizer):
    """It is skipped unless it is clipped; SGD, which takes no square, applies it."""
    for clip in (None, 1.0):
        guard = build(optimizer, grad_clip=clip)
        (report,) = push(guard, [1.0], [1e25])
        assert report["skipped"] == (clip is None and optimizer != "sgd") and guard.damage() == []


def test_tiny_gradients_are_measured_and_clipped():
    guard = build("sgd", on_spike="clip")
    push(guard, losses("positive", 60), [1e-30] * 60)
    (report,) = push(guard, [0.3], [1e-27])
    assert report["spike_grad"] and report["grad_norm"] == pytest.approx(1e-27, rel=1e-3)
    assert float(guard.parameters[0].grad.max()) == pytest.approx(1e-30, rel=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_healthy_losses_of_any_kind_have_not_diverged_and_a_hundred_times_have(kind):
    for seed in range(5):
        monitor, values = LossMonitor(), losses(kind, 800, seed)
        assert [reason for reason in map(lambda x: monitor.add(x)[1], values) if reason] == []
        size = 100 * (sum(map(abs, values)) / len(values) or 1.0)
        found = [monitor.add(size * (1 + 0.1 * math.sin(k)))[1] for k in range(64)]
        assert any(found), kind
