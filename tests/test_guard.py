"""The guarded step: exact when it skips, right when it does not."""

import copy
import math

import pytest
import torch
from torch import nn

from refinelib.guard import REPORT, Guard
from refinelib.optim import WarmupCosine, build_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()


def make(kind="adamw", scaled=False, ema=0.9, clip=1.0, **keywords):
    torch.manual_seed(0)
    model = Net()
    average = copy.deepcopy(model).requires_grad_(False) if ema else None
    optimizer = build_optimizer(model.named_parameters(), kind=kind, lr=1e-2, weight_decay=0.1)
    schedule = WarmupCosine(lr=1e-2, min_lr=1e-4, warmup_steps=3, total_steps=20)
    return model, Guard(model, optimizer, schedule, grad_clip=clip, average=average, ema_decay=ema, scaled=scaled, **keywords)


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
        reports.append(dict(zip(REPORT, guard.step(loss.detach()).tolist())))
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


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("name", POISONS)
def test_a_skipped_step_leaves_what_a_run_without_it_leaves(kind, name):
    data = batches()
    model, guard = make(kind)
    reports = run(model, guard, data, {3: POISONS[name]})
    clean, clean_guard = make(kind)
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
    groups = [{"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1}, {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0}]
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
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_scaled_steps_equal_unscaled_ones():
    """A power of two as loss scale changes nothing but the exponent."""
    results = []
    for scaled in (False, True):
        model, guard = make(scaled=scaled, scale_init=1024.0)
        reports = run(model, guard, batches())
        results.append((reports, [p.detach().clone() for p in model.parameters()]))
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for a, b in zip(results[0][0], results[1][0]):
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


def test_a_bad_loss_does_not_touch_the_scale():
    model, guard = make(scaled=True, scale_init=16.0)
    scales = [r["loss_scale"] for r in run(model, guard, batches(), {2: POISONS["nan loss, finite gradient"]})]
    assert scales == [16.0] * 6


def test_schedule_counts_applied_steps_and_matches_its_formula():
    schedule = WarmupCosine(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=14)
    rates = [schedule(torch.tensor(i)).item() for i in range(16)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0) and rates[13] == pytest.approx(0.1) and rates[15] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 5 / 9))
    assert rates[9] == pytest.approx(middle)
    model, guard = make()
    lrs = [r["lr"] for r in run(model, guard, batches(), {1: grad(math.nan)})]
    assert lrs[1] == lrs[2]


def test_schedule_without_warmup():
    schedule = WarmupCosine(lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=1)
    assert schedule(torch.tensor(0)).item() == 1.0


def test_moving_average_follows_its_formula():
    model, guard = make(ema=0.75)
    start = [p.detach().clone() for p in guard.averages]
    run(model, guard, batches(1))
    for average, before, now in zip(guard.averages, start, model.parameters()):
        torch.testing.assert_close(average, 0.75 * before + 0.25 * now)


def test_state_survives_a_checkpoint():
    data = batches()
    model, guard = make()
    run(model, guard, data[:3])
    saved, weights, averages = copy.deepcopy(guard.state_dict()), copy.deepcopy(model.state_dict()), [a.clone() for a in guard.averages]
    run(model, guard, data[3:])
    again, again_guard = make()
    again.load_state_dict(weights)
    for average, value in zip(again_guard.averages, averages):
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
    optimizer = build_optimizer(model.named_parameters(), kind="adamw", lr=1e-2, weight_decay=0.1)
    schedule = WarmupCosine(lr=1e-2, min_lr=1e-4, warmup_steps=3, total_steps=20)
    guard = Guard(model, optimizer, schedule, grad_clip=1.0, average=copy.deepcopy(model), ema_decay=0.9, scaled=True)
    data = batches().cuda()
    for x in data[:2]:
        guard.zero_grad()
        loss = model(x)
        guard.scale(loss).backward()
        guard.step(loss.detach())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in data[2:]:
            guard.zero_grad()
            loss = model(x)
            guard.scale(loss).backward()
            guard.step(loss.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
