"""The guarded step: exact when it skips, right when it does not."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.measure import FLOAT16_MAX, HEADROOM, ORDINARY_OVERFLOWS, searches_scale
from refinelib.guard.optimizer import WarmupCosine, build_optimizer


class Net(nn.Module):
    """A small network, without or with running statistics in it."""

    def __init__(self, running=False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 1)
        self.middle = nn.BatchNorm1d(5) if running else nn.Identity()

    def forward(self, x):
        return self.second(torch.tanh(self.middle(self.first(x)))).square().mean()


def make(kind="adamw", scaled=False, ema=0.9, clip=1.0, fused=True, running=False, **keywords):
    torch.manual_seed(0)
    model = Net(running)
    average = copy.deepcopy(model).requires_grad_(False) if ema else None
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = build_optimizer(model.parameters(), kind=kind, lr=1e-2, weight_decay=0.1, fused=fused)
    schedule = WarmupCosine(lr=1e-2, min_lr=1e-4, warmup_steps=3, total_steps=20)
    return model, Guard(
        model, optimizer, schedule, grad_clip=clip, average=average, ema_decay=ema, scaled=scaled, **keywords
    )


def batches(count=6):
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1))


def run(model, guard, data, poison=None):
    reports = []
    for index, x in enumerate(data):
        guard.zero_grad()
        loss = model(x)
        guard.scale(loss).backward()
        if poison and index in poison:
            loss = poison[index](model, loss)
        reports.append(dict(zip(REPORT, guard.step(loss.detach()).tolist(), strict=False)))
    return reports


def everything(model, guard, position=True):
    """Every tensor a step may move, by name."""
    found = {f"model.{k}": v for k, v in model.state_dict().items()}
    found |= {f"average.{i}": v for i, v in enumerate(guard.averages)}
    for i, p in enumerate(guard.parameters):
        found |= {f"optimizer.{i}.{k}": v for k, v in guard.optimizer.state[p].items()}
    found |= {f"guard.{k}": v for k, v in guard.state.items() if k != "skipped"}
    return {k: v.detach().clone() for k, v in found.items()}


def grad(value):
    def spoil(model, loss):
        model.second.weight.grad[0, 2] = value
        return loss

    return spoil


POISONS = {
    "nan gradient": grad(math.nan),
    "inf gradient": grad(math.inf),
    "-inf gradient": grad(-math.inf),
    "nan loss, finite gradient": lambda model, loss: loss * math.nan,
    "inf loss, finite gradient": lambda model, loss: loss + math.inf,
}


@pytest.mark.parametrize("name", POISONS)
def test_a_skipped_step_leaves_what_a_run_without_it_leaves(name):
    data = batches()
    model, guard = make()
    reports = run(model, guard, data, {3: POISONS[name]})
    clean, clean_guard = make()
    run(clean, clean_guard, torch.cat([data[:3], data[4:]]))
    ours, theirs = everything(model, guard), everything(clean, clean_guard)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert [r["skipped"] for r in reports] == [0, 0, 0, 1, 0, 0]
    assert reports[3]["bad_grad" if "gradient" in name and "loss" not in name else "bad_loss"] == 1
    assert int(guard.state["skipped"]) == 1


def test_finite_gradients_whose_norm_overflows_are_applied():
    model, guard = make()
    (report,) = run(model, guard, batches(1), {0: grad(3e30)})
    assert report["skipped"] == 0
    assert math.isfinite(report["grad_norm"]) and report["grad_norm"] >= 3e30
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_clipping_and_updates_equal_plain_torch():
    data = batches()
    model, guard = make("adamw", ema=0, clip=0.05)
    reports = run(model, guard, data)
    torch.manual_seed(0)
    plain = Net()
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step, x in enumerate(data):
        optimizer.zero_grad()
        plain(x).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert reports[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.05  # else nothing is clipped here
        for group in optimizer.param_groups:
            group["lr"] = reports[step]["lr"]
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_scaled_steps_equal_unscaled_ones():
    """A power of two as loss scale changes nothing but the exponent."""
    results = []
    for scaled in (False, True):
        model, guard = make(scaled=scaled, scale_init=1024.0)
        reports = run(model, guard, batches())
        results.append((reports, [p.detach().clone() for p in model.parameters()]))
    for a, b in zip(results[0][1], results[1][1], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for a, b in zip(results[0][0], results[1][0], strict=False):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_loss_scale_halves_to_its_floor_and_recovers():
    model, guard = make(scaled=True, scale_init=16.0, scale_floor=2.0, growth_interval=3)
    data = batches(20)
    scales = [r["loss_scale"] for r in run(model, guard, data, {i: grad(math.inf) for i in range(8)})]
    assert scales[:9] == [16, 8, 4, 2, 2, 2, 2, 2, 2]
    assert scales[9:16] == [2, 2, 4, 4, 4, 8, 8]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_loss_scale_backs_off_before_it_overflows():
    """A step is lost to every overflow that was waited for; none is where the gradient was watched."""
    model, guard = make(scaled=True, scale_init=2.0**24, growth_interval=2)
    reports = run(model, guard, batches(30))
    assert sum(r["skipped"] for r in reports) == 0
    largest = [r["grad_max"] * r["loss_scale"] for r in reports]
    assert largest[0] > 65504 / 4  # it had to back off
    assert max(largest[12:]) <= 65504 / 2 and min(r["loss_scale"] for r in reports[12:]) > 1


@pytest.mark.parametrize(
    ("changes", "searches"),
    [
        ({}, True),
        ({"scale": 2.0}, False),  # it is at its floor
        ({"good_in_a_row": 1.0}, False),  # a good step has shown that there is room
        ({"good_in_a_row": 1.0, "headroom_peak": FLOAT16_MAX / HEADROOM * 1.01}, True),
        ({"good_in_a_row": 1.0, "headroom_peak": FLOAT16_MAX / HEADROOM * 0.99}, False),
        ({"skips_in_a_row": ORDINARY_OVERFLOWS - 1.0}, True),
        ({"skips_in_a_row": float(ORDINARY_OVERFLOWS)}, False),
    ],
)
def test_an_overflow_finds_the_scale_unless_there_was_room_or_it_is_one_of_many(changes, searches):
    state = {"scale": 4.0, "good_in_a_row": 0.0, "headroom_peak": 0.0, "skips_in_a_row": 0.0, **changes}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
    assert bool(searches_scale(tensors, 2.0)) == searches


def test_a_bad_loss_does_not_touch_the_scale():
    model, guard = make(scaled=True, scale_init=16.0)
    scales = [
        r["loss_scale"] for r in run(model, guard, batches(), {2: POISONS["nan loss, finite gradient"]})
    ]
    assert scales == [16.0] * 6


def test_schedule_counts_applied_steps_and_matches_its_formula():
    schedule = WarmupCosine(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=14)
    rates = [schedule(torch.tensor(i)).item() for i in range(16)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert (
        rates[4] == pytest.approx(1.0) and rates[13] == pytest.approx(0.1) and rates[15] == pytest.approx(0.1)
    )
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 5 / 9))
    assert rates[9] == pytest.approx(middle)
    model, guard = make()
    lrs = [r["lr"] for r in run(model, guard, batches(), {1: grad(math.nan)})]
    assert lrs[1] == lrs[2]


def test_schedule_without_warmup():
    schedule = WarmupCosine(lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=1)
    assert schedule(torch.tensor(0)).item() == 1.0


def test_moving_average_follows_its_formula():
    """Decay of at most (1 + n) / (10 + n) after n applied steps, whatever was skipped between them."""
    model, guard = make(ema=0.25)
    expected = [p.detach().clone() for p in guard.averages]
    data, applied, decays = batches(8), 0, []
    for step, batch in enumerate(data):
        (report,) = run(model, guard, [batch], {0: grad(math.nan)} if step == 1 else {})
        if report["skipped"]:
            continue
        decays.append(min(0.25, (1 + applied) / (10 + applied)))
        expected = [
            decays[-1] * before + (1 - decays[-1]) * now.detach()
            for before, now in zip(expected, model.parameters(), strict=False)
        ]
        applied += 1
    assert applied == 7 and decays[0] == 0.1 and decays[1] < decays[2] == decays[-1] == 0.25
    for average, by_hand in zip(guard.averages, expected, strict=False):
        torch.testing.assert_close(average, by_hand)


def test_state_survives_a_checkpoint():
    data = batches()
    model, guard = make()
    run(model, guard, data[:3])
    saved, weights, averages = (
        copy.deepcopy(guard.state_dict()),
        copy.deepcopy(model.state_dict()),
        [a.clone() for a in guard.averages],
    )
    run(model, guard, data[3:])
    again, again_guard = make()
    again.load_state_dict(weights)
    for average, value in zip(again_guard.averages, averages, strict=False):
        average.copy_(value)
    again_guard.load_state_dict(saved)
    run(again, again_guard, data[3:])
    ours, theirs = everything(model, guard), everything(again, again_guard)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_reads_nothing_back():
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = build_optimizer(model.parameters(), kind="adamw", lr=1e-2, weight_decay=0.1)
    schedule = WarmupCosine(lr=1e-2, min_lr=1e-4, warmup_steps=3, total_steps=20)
    guard = Guard(
        model, optimizer, schedule, grad_clip=1.0, average=copy.deepcopy(model), ema_decay=0.9, scaled=True
    )
    data = batches().cuda()
    for x in data[:2]:
        guard.zero_grad()
        loss = model(x)
        guard.scale(loss).backward()
        guard.step(loss.detach())
    since = {name: x.clone() for name, x in guard.tensors().items()}, guard.memory.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in data[2:]:
            guard.zero_grad()
            loss = model(x)
            guard.scale(loss).backward()
            guard.step(loss.detach())
            guard.check_state(since)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not guard.state["damaged"]


# -- exact skips on every path -----------------------------------------------------------------------
def micro_run(model, guard, steps, bad=None):
    """Steps of two micro-batches, float ``[steps, 2, 4, 6]``; ``bad`` changes a step's second one."""
    reports = []
    for index, halves in enumerate(steps):
        guard.zero_grad()
        total = 0.0
        for half, x in enumerate(halves):
            loss = model(bad[index](x) if bad and index in bad and half else x) / len(halves)
            guard.scale(loss).backward()
            total = total + loss.detach()
        reports.append(dict(zip(REPORT, guard.step(total).tolist(), strict=False)))
    return reports


def with_nan(x):
    return x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("kind", "fused"), [("adamw", True), ("adamw", False), ("adam", True), ("adam", False), ("sgd", False)]
)
def test_a_bad_micro_batch_leaves_what_a_run_without_its_step_leaves(kind, fused, scaled):
    """On every optimizer's path, in accumulation, running statistics included."""
    steps = torch.randn(6, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    keywords = dict(fused=fused, running=True, scaled=scaled, scale_init=1024.0)
    model, guard = make(kind, **keywords)
    assert guard.fused == fused
    reports = micro_run(
        model, guard, steps, {0: with_nan, 3: with_nan}
    )  # the first step too, before there are moments
    assert (
        [r["skipped"] for r in reports] == [1, 0, 0, 1, 0, 0]
        and reports[3]["bad_loss"]
        and reports[3]["bad_grad"]
    )
    clean, clean_guard = make(kind, **keywords)
    micro_run(clean, clean_guard, torch.stack([steps[1], steps[2], steps[4], steps[5]]))
    ours, theirs = everything(model, guard), everything(clean, clean_guard)
    assert (
        ours.keys() == theirs.keys()
        and {"model.middle.running_mean", "model.middle.running_var", "model.middle.num_batches_tracked"}
        <= ours.keys()
    )
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert int(model.middle.num_batches_tracked) == 8  # two micro-batches in each of four steps


@pytest.mark.parametrize(("kind", "fused"), [("adamw", True), ("adamw", False), ("sgd", False)])
def test_after_an_incident_nothing_moves_until_the_host_has_looked(kind, fused):
    data = batches(8)
    model, guard = make(kind, fused=fused, running=True)
    guard.resume_updates(capture_enabled=True)
    first = run(model, guard, data[:3], {2: grad(math.nan)})
    assert [(r["incident"], r["updates_suspended"], r["skipped"]) for r in first] == [
        (0, 0, 0),
        (0, 0, 0),
        (1, 0, 1),
    ]
    before = everything(model, guard)
    held = run(model, guard, data[3:6], {1: grad(math.nan)})  # good ones and a bad one
    assert [(r["incident"], r["updates_suspended"], r["skipped"]) for r in held] == [(0, 1, 0)] * 3
    for key, value in everything(model, guard).items():
        assert torch.equal(before[key], value), key
    assert int(guard.state["skipped"]) == 1
    guard.resume_updates(capture_enabled=False)
    after = run(model, guard, data[3:6], {2: grad(math.nan)})
    assert [(r["incident"], r["updates_suspended"], r["skipped"]) for r in after] == [
        (0, 0, 0),
        (0, 0, 0),
        (0, 0, 1),
    ]  # not armed: skipped, no more
    clean, clean_guard = make(kind, fused=fused, running=True)
    run(clean, clean_guard, torch.stack([data[0], data[1], data[3], data[4]]))
    ours, theirs = everything(model, guard), everything(clean, clean_guard)
    for key in ours.keys() - {"guard.skips_in_a_row"}:
        assert torch.equal(ours[key], theirs[key]), key


# -- spikes --------------------------------------------------------------------------------------------
def push(guard, losses, norms=None):
    """Steps with given losses and gradient norms, without a network; their reports."""
    reports = []
    parameters = guard.parameters
    even = 1 / math.sqrt(sum(p.numel() for p in parameters))
    for loss, norm in zip(losses, norms if norms is not None else [0.5] * len(losses), strict=False):
        guard.zero_grad()
        for p in parameters:
            p.grad = torch.full_like(p, float(norm) * even)
        reports.append(dict(zip(REPORT, guard.step(torch.tensor(float(loss))).tolist(), strict=False)))
    return reports


def memory_of_spikes(guard):
    return {
        name: value.clone()
        for name, value in guard.state.items()
        if "center" in name or "spread" in name or name == "seen"
    }


def noise(count, *, sigma=0.1, seed=0):
    return torch.exp(sigma * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def spiked(reports):
    return [i for i, r in enumerate(reports) if r["spike_loss"] or r["spike_grad"]]


def test_spikes_are_seen_from_the_second_step_on():
    for factor, found in ((9.5, []), (10.5, [1])):
        _, guard = make()
        assert spiked(push(guard, [2.0, 2.0 * factor])) == found
        _, guard = make()
        reports = push(guard, [2.0, 2.0], [0.5, 0.5 * factor])
        assert (
            spiked(reports) == found
            and reports[1]["spike_grad"] == len(found)
            and not reports[1]["spike_loss"]
        )
    _, guard = make()
    assert spiked(push(guard, [2.0, 2e-5, 1e-9])) == []  # a fall is none


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_after_the_first_steps_a_spike_is_a_matter_of_deviations(sigma):
    _, guard = make(spike_sigma=6.0)
    assert spiked(push(guard, noise(300, sigma=sigma), noise(300, sigma=sigma, seed=1))) == []
    kept = guard.state_dict()["state"]
    for deviations, found in ((4.5, []), (8.0, [0])):
        _, other = make(spike_sigma=6.0)
        for name, value in kept.items():
            other.state[name].copy_(value)
        assert spiked(push(other, [math.exp(deviations * sigma)], [1.0])) == found, deviations


def test_a_spike_is_noted_clipped_or_skipped():
    """By what plain gradient descent makes of it: all of the gradient, no more than usual of it, nothing."""
    moved = {}
    for on_spike in ("note", "clip", "skip"):
        _, guard = make("sgd", clip=1e6, ema=0, on_spike=on_spike)
        for group in guard.optimizer.param_groups:
            group.update(momentum=0.0, weight_decay=0.0)
        push(guard, [1.0] * 60, noise(60))
        before = [p.detach().clone() for p in guard.parameters]
        (report,) = push(guard, [1.0], [200.0])
        assert (
            report["spike_grad"] == 1
            and report["spike_loss"] == 0
            and report["skipped"] == (on_spike == "skip")
            and report["bad_grad"] == 0
        )
        assert report["grad_norm"] == pytest.approx(200.0, rel=1e-4)  # as it was, before clipping
        steps = torch.cat([(p - b).flatten() for p, b in zip(guard.parameters, before, strict=False)])
        moved[on_spike] = float(steps.norm()) / report["lr"]
    assert moved["skip"] == 0.0
    assert moved["note"] == pytest.approx(200.0, rel=1e-2) and moved["clip"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("on_spike", ["note", "clip", "skip"])
def test_what_is_skipped_never_enters_the_statistics(on_spike):
    _, guard = make(on_spike=on_spike)
    push(guard, noise(30), noise(30, seed=1))
    before = memory_of_spikes(guard)
    bad = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (math.nan, math.nan)] + (
        [(1e4, 1.0), (1.0, 1e4)] if on_spike == "skip" else []
    )
    reports = push(guard, *zip(*bad, strict=False))
    assert all(r["skipped"] for r in reports)
    assert not any(r["spike_loss"] or r["spike_grad"] for r in reports[:5])  # not finite is no spike
    for name, value in memory_of_spikes(guard).items():
        assert torch.equal(before[name], value), name
    assert float(before["seen"]) == 30


@pytest.mark.parametrize("on_spike", ["note", "clip", "skip"])
@pytest.mark.parametrize("clean", [2, 5, 100])
def test_a_spike_cannot_hide_the_next(on_spike, clean):
    _, guard = make(on_spike=on_spike)
    push(guard, noise(clean), noise(clean, seed=1))
    reports = push(guard, [1000.0] * 3, [1000.0] * 3)
    assert [r["spike_loss"] and r["spike_grad"] for r in reports] == [1, 1, 1]
    reports = push(guard, [*noise(5), 1000.0], [1.0] * 6)
    assert spiked(reports) == [5]


@pytest.mark.parametrize("on_spike", ["note", "clip"])
def test_a_lasting_shift_of_level_is_learned(on_spike):
    """A new loss term, say, or a larger crop: three times the gradient for good is no endless spike."""
    _, guard = make(on_spike=on_spike)
    push(guard, noise(200), noise(200, seed=1))
    reports = push(guard, noise(400, seed=2), [3 * norm for norm in noise(400, seed=3)])
    found = spiked(reports)
    assert found[:3] == [0, 1, 2] and len(found) <= 40 and max(found) < 60
    assert spiked(push(guard, [1.0], [100.0])) == [0]  # and a spike is one still


@pytest.mark.parametrize(
    "on_spike", ["clip", *(pytest.param(other, marks=pytest.mark.slow) for other in ("note", "skip"))]
)
def test_an_ordinary_noisy_run_has_hardly_any_spikes(on_spike):
    """2000 steps, the logarithms with tails of Student's t (4 degrees of freedom), the loss falling."""
    rates = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        normal, square = (
            torch.randn(2, 2000, generator=generator),
            torch.randn(2, 2000, 4, generator=generator).square().mean(-1),
        )
        tails = 0.2 * normal / square.sqrt()
        falling = 2.0 * torch.exp(-torch.arange(2000) / 500) + 0.3
        _, guard = make(on_spike=on_spike)
        found = spiked(push(guard, (falling * tails[0].exp()).tolist(), tails[1].exp().tolist()))
        rates.append(len(found) / 2000)
    assert max(rates) < 0.005, rates
    print(f"false alarms, {on_spike}: {', '.join(f'{rate:.2%}' for rate in rates)}")


def test_how_it_steps_is_the_devices_affair_not_the_checkpoints():
    """A checkpoint of a CPU says nothing of CUDA graphs; a GPU that continues from it can still capture."""
    _, guard = make()
    saved = copy.deepcopy(guard.state_dict())
    for group in saved["optimizer"]["param_groups"]:
        group.update(capturable=True, foreach=True, weight_decay=0.125)
    before = [
        (group["capturable"], group["fused"], group["foreach"]) for group in guard.optimizer.param_groups
    ]
    guard.load_state_dict(saved)
    assert [
        (group["capturable"], group["fused"], group["foreach"]) for group in guard.optimizer.param_groups
    ] == before
    assert guard.optimizer.param_groups[0]["weight_decay"] == 0.125


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["adam", "adamw", "sgd"]),
    seed=st.integers(0, 2**20),
    before=st.integers(0, 40),
    steps=st.integers(1, 80),
    growth=st.floats(0.5, 2.0),
    sparse=st.floats(0.0, 1.0),
    size=st.floats(0.01, 1e4),
    slowed=st.sampled_from([1.0, 0.5, 1e-4]),
    resumed=st.booleans(),
)
def test_no_gradients_move_a_weight_further_than_the_bound_and_a_damage_does(
    kind, seed, before, steps, growth, sparse, size, slowed, resumed
):
    """Growing, shrinking, rare, not finite; slowed down; loaded into a new guard in between."""
    model, guard = make(kind, clip=1e30, ema=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.first.weight.mul_(size)
    for step in range(before + steps):
        if step == before:
            since = {name: x.clone() for name, x in guard.tensors().items()}, guard.memory.clone()
            guard.slow_down(slowed, 20)
        if step == before + steps // 2 and resumed:
            saved = copy.deepcopy((model.state_dict(), guard.state_dict()))
            model, guard = make(kind, clip=1e30, ema=0.0)
            model.load_state_dict(saved[0])
            guard.load_state_dict(saved[1])
        for p in guard.parameters:
            p.grad = growth ** min(step, 60) * (torch.rand(p.shape, generator=generator) < sparse).float()
        guard.step(torch.tensor(math.nan if step % 7 == 6 else 1.0))
    guard.check_state(since)
    assert not guard.state["damaged"] and guard.moved(since) == []
    rates = float(guard.state["rate_sum"] - since[1][list(guard.state).index("rate_sum")])
    with torch.no_grad():
        model.second.bias.add_(2 * 7.3 * rates + 1e-3)
    guard.check_state(since)
    found = [] if kind == "sgd" else ["second.bias"]  # SGD's update has no bound
    assert bool(guard.state["damaged"]) == bool(found) and guard.moved(since) == found


@given(st.lists(st.floats(0.5, 1.5, width=32), min_size=5, max_size=60), st.sampled_from([-1.0, 1.0]))
@settings(max_examples=25, deadline=None)
def test_the_size_of_a_loss_is_a_running_mean_of_its_magnitude(values, sign):
    model, guard = make()
    mean, seen = 0.0, 0
    for value in values:
        guard.zero_grad()
        loss = model(batches(1)[0])
        guard.scale(loss * 1e-3).backward()
        guard.step(torch.tensor(sign * value))
        mean, seen = mean + (value - mean) / (seen + 1), seen + 1
    # A value far from the mean counts less; of as many as these none is forgotten.
    assert min(values) <= float(guard.state["loss_size"]) <= max(values)
    assert float(guard.state["loss_size"]) == pytest.approx(mean, rel=0.3)
