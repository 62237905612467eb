"""The guard and the rewinder in plain loops: rewinds, any order of calls, what is imported, diagnoses."""

import copy
import math
import subprocess
import sys
import threading

import pytest
import torch
from test_any_loop import assert_same, build, data, state, steps
from torch import nn

from refinelib.guard import DivergedError, Guard, Rewinder, diagnose

NAN, INF = math.nan, math.inf


# -- rewinds -----------------------------------------------------------------------------------------
def loop(guard, rewinder, batches, damage=None):
    """Steps of a plain loop; ``damage`` holds functions by the place after which they are called."""
    messages = []
    for place, x in enumerate(batches):
        guard.zero_grad()
        guard.backward(guard.model(x))
        messages.append(rewinder.update(guard.step()))
        if damage and place in damage:
            damage[place]()
    return [message for message in messages if message]


@pytest.mark.parametrize("what", ["weight", "moment", "buffer"])
@pytest.mark.parametrize("optimizer", ["momentum fused", "adam fused", "adafactor", "lion", "nadam"])
def test_a_state_damaged_from_outside_goes_back_and_training_goes_on(optimizer, what):
    guard = build(optimizer, "one cycle")
    rewinder = Rewinder(guard)

    def damage():
        moments = [x for x in guard.optimizer.state[guard.parameters[0]].values() if torch.is_tensor(x)]
        tensors = {"weight": guard.parameters[0], "moment": moments[-1]}
        tensors["buffer"] = guard.model.norm.running_var
        tensors[what].data.fill_(NAN)

    guard.scheduler.total_steps = 10**4
    messages = loop(guard, rewinder, data(200), {70: damage})
    assert len(messages) == 1 and rewinder.rewinds == 1 and guard.damage() == []
    assert int(guard.state["applied"]) > 100


def test_a_rewind_past_the_data_keeps_the_place_in_the_schedule():
    """At half the rate for a while; the rates in the groups are the scheduler's own."""
    guard = build("sgd", "step")
    rewinder = Rewinder(guard)
    loop(guard, rewinder, data(3))
    weights = guard.parameters[0].detach().clone()
    place = guard.scheduler.last_epoch
    rewinder.rewind("asked for", 3, again=False)
    assert guard.scheduler.last_epoch == place == 3
    assert guard.optimizer.param_groups[0]["lr"] == 1e-3 / 2
    before = guard.parameters[0].detach().clone()
    rates = [group["lr"] for group in guard.optimizer.param_groups]
    (report,) = steps(guard, data(1, 1))
    assert guard.optimizer.param_groups[0]["lr"] == rates[0] / 2  # the scheduler's next place
    moved = (guard.parameters[0] - before).norm()
    assert report["lr"] == pytest.approx(1e-3 / 4, rel=1e-6) and rates[0] == 1e-3 / 2
    assert float(moved) == pytest.approx(1e-3 / 4 * float(guard.parameters[0].grad.norm()), rel=1e-3)
    assert not torch.equal(before, weights)


REPEATED = ["lion", "sparse adam", "momentum", "rprop", "asgd", "nadam", "adam fused"]


@pytest.mark.parametrize("optimizer", REPEATED)
def test_steps_that_are_repeated_after_a_rewind_are_the_same_steps(optimizer):
    """Step counts that are Python numbers, moments that did not exist yet, and the scheduler go back."""
    guard = build(optimizer, "step")
    rewinder = Rewinder(guard)
    rewinder.start(0)
    steps(guard, data())
    after = state(guard)
    _, snapshot = rewinder.rewind("asked for", 6)
    assert snapshot is not None and guard.scheduler.last_epoch == 0
    steps(guard, data())
    assert_same(after, state(guard))


def test_it_goes_back_only_so_often():
    guard = build("sgd")
    rewinder = Rewinder(guard, max_skips=4, max_rewinds=2)
    loop(guard, rewinder, data(5))
    with pytest.raises(DivergedError, match="4 steps in a row were skipped, after 2 rewinds"):
        loop(guard, rewinder, [x * NAN for x in data(20)])
    assert rewinder.rewinds == 2 and guard.damage() == []


def test_a_loss_that_stays_a_hundred_times_as_high_is_a_reason_to_go_back():
    guard = build("sgd")
    rewinder = Rewinder(guard, max_rewinds=1)
    assert loop(guard, rewinder, data(150)) == []
    messages = loop(guard, rewinder, data(40, 1), {0: lambda: guard.model.last.bias.data.fill_(30.0)})
    assert len(messages) == 1 and "the loss stays at" in messages[0]
    assert float(guard.model.last.bias) < 2


# -- the order of calls ------------------------------------------------------------------------------
def test_calls_in_another_order_are_refused():
    guard = build()
    (x,) = data(1)
    with pytest.raises(RuntimeError, match="a step has three calls"):  # no zero_grad
        guard.backward(guard.model(x))
        guard.step()
    guard.zero_grad()
    with pytest.raises(RuntimeError, match="a step has three calls"):  # no backward
        guard.step()
    steps(guard, [x])
    with pytest.raises(RuntimeError, match="a step has three calls"):  # two steps in a row
        guard.step()
    loss = guard.model(x)
    guard.zero_grad()
    guard.backward(loss)
    with pytest.raises(RuntimeError, match="call guard.zero_grad.. before the model"):
        guard.step()
    with pytest.raises(RuntimeError, match="does not require grad"):
        guard.backward(torch.ones(()))


def test_what_lies_between_the_calls_changes_nothing():
    """Two calls of zero_grad, a validation, a backward of half the loss twice, an exception in a step."""
    plain, other = build(), build()
    steps(plain, data())
    for place, x in enumerate(data()):
        other.zero_grad()
        if place == 3:
            with pytest.raises(KeyError):
                other.backward(
                    (other.model.last.weight * NAN).sum() + other.model(x * NAN)
                )  # statistics, too
                raise KeyError
        other.zero_grad()
        loss = other.model(x)
        other.backward(loss)
        other.model.eval()(x * NAN)
        other.model.train()
        other.step()
    assert_same(state(plain), state(other))
    twice = build()
    twice.zero_grad()
    twice.backward(twice.model(data(1)[0]))
    gradient = twice.parameters[0].grad.clone()
    twice.backward(twice.model(data(1)[0]))
    torch.testing.assert_close(twice.parameters[0].grad, 2 * gradient)


@pytest.mark.parametrize("change", [lambda x: x.view(1), lambda x: x.half(), lambda x: x.double()])
def test_losses_of_another_shape_or_type(change):
    guard = build()
    reports = steps(guard, data(), {2}, forward=lambda x: change(guard.model(x)))
    assert [report["skipped"] for report in reports] == [False, False, True, False, False, False]


def test_the_guard_imports_no_other_part_of_the_package():
    code = "import sys, refinelib.guard; print([m for m in sys.modules if m.startswith('refinelib')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    apart = {name for name in eval(found) if not name.startswith("refinelib.guard")}
    assert apart == {"refinelib"}
    light = "import sys, refinelib; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# -- diagnoses ---------------------------------------------------------------------------------------
class Keywords(nn.Module):
    """Takes keywords, and gives a dictionary with the loss."""

    def __init__(self):
        super().__init__()
        self.table, self.last, self.drop = nn.Embedding(5, 4), nn.Linear(4, 1), nn.Dropout(0.5)

    def forward(self, rows, weights):
        return {"scores": rows, "loss": (self.drop(self.last(self.table(rows)))[:, 0] * weights).log().mean()}


class Turned(nn.Module):
    """The batch is the second dimension."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(x / x.abs().sum(-1, keepdim=True))


def unchanged(model, *arguments):
    """Diagnose, and see that nothing else changed."""
    before = copy.deepcopy([*model.state_dict().values()]), torch.get_rng_state()
    needed = [p.requires_grad for p in model.parameters()]
    found = diagnose(model, *arguments)
    for a, b in zip(before[0], model.state_dict().values(), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert torch.equal(before[1], torch.get_rng_state()) and found.sentence
    assert [p.requires_grad for p in model.parameters()] == needed
    return found


def test_a_diagnosis_names_module_operation_parameter_and_samples():
    torch.manual_seed(0)
    x, y = torch.rand(6, 3) + 0.1, torch.rand(6, 1)
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1))
    mlp[0].bias.requires_grad_(False)
    root = lambda output, target: (output.square().sum(1) * target[:, 0]).sqrt().mean()  # noqa: E731
    y[4] = 0
    found = unchanged(mlp, root, (x, y))
    assert (found.phase, found.node, found.places) == ("backward", "SqrtBackward0", [4])
    assert found.parameters[0] == "2.bias"
    mlp[2].weight.data.fill_(3e38)
    found = unchanged(mlp, nn.functional.mse_loss, (x, y))
    assert (found.phase, found.module, found.operation) == ("forward", "2", "aten.addmm")
    images = torch.rand(4, 3, 5, 5)
    images[2] *= 3e38
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 1))
    conv[0].weight.data.fill_(1.0)
    found = unchanged(conv, nn.functional.mse_loss, (images, torch.rand(4, 1)))
    assert (found.phase, found.module, found.operation) == ("forward", "0", "aten.convolution")
    assert found.places == [2]
    lookup = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(2, 1))
    lookup[0].weight.data[3] = INF
    found = unchanged(lookup, nn.functional.mse_loss, (torch.tensor([[1], [3]]), torch.rand(2, 1)))
    assert (found.phase, found.module, found.parameters) == ("weights", "0", ["0.weight"])
    found = unchanged(Keywords(), None, {"rows": torch.tensor([0, 1, 2]), "weights": torch.ones(3)})
    assert found.phase in ("forward", "backward") and found.module in ("model", "drop", "last")
    found = unchanged(mlp, nn.functional.mse_loss, (x * NAN, y))
    assert found.phase in ("input", "forward")


class Between(nn.Module):
    """Its own code before its parts, between or after them may give a gradient that is not finite."""

    def __init__(self, place):
        super().__init__()
        self.first, self.last, self.place = nn.Linear(3, 3), nn.Linear(3, 3), place

    def own(self, x, place):
        return (x * 0).abs().sqrt() + x if place == self.place else x.clone()

    def forward(self, x):
        x = self.first(self.own(x + 0 * self.last.bias, "before"))
        return self.own(self.last(self.own(x, "between")), "after")


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_gradient_of_a_modules_own_code_is_that_modules(place, inner):
    model = nn.Sequential(nn.Linear(3, 3), Between(place)) if inner else Between(place)
    found = unchanged(model, nn.functional.mse_loss, (torch.rand(4, 3), torch.rand(4, 3)))
    assert (found.phase, found.node) == ("backward", "SqrtBackward0")
    assert found.module == ("1" if inner else "model")


def test_where_the_batch_is_not_the_first_dimension_no_samples_are_named():
    each = lambda output, target: (output[..., 0] - target).square().mean()  # noqa: E731
    mean = lambda output, target: (output.mean(0)[:, 0] - target).mean()  # noqa: E731
    model = Turned()
    x = torch.rand(5, 2, 3)
    x[1, 1] = 0
    found = unchanged(model, each, (x, torch.rand(5, 2)))
    assert (found.module, found.operation) == ("model", "aten.div")
    found = unchanged(model, mean, (x, torch.rand(2)))
    assert (found.module, found.operation, found.places) == ("model", "aten.div", [])


def test_an_inner_dimension_as_long_as_the_batch_is_not_taken_for_it():
    """Batch norm takes no single sample; the layer before it has the batch second."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned, self.norm = Turned(), nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.turned(x.transpose(0, 1)).transpose(0, 1).mean(1))

    x = torch.rand(4, 4, 3)
    x[1, 2] = 0
    found = unchanged(Inner(), nn.functional.mse_loss, (x, torch.rand(4, 1)))
    assert (found.module, found.operation) == ("turned", "aten.div") and found.places in ([], [1])


def test_a_step_that_ruins_a_buffer_is_skipped():
    """Loss and gradient are finite, but the square of an input in the running variance is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    guard = Guard(model, torch.optim.Adam(model.parameters()))
    x = torch.randn(8, 4)
    x[0] = 1e25
    guard.zero_grad()
    guard.backward(model(x).square().mean())
    assert guard.read(guard.step())["skipped"]
    assert all(bool(b.isfinite().all()) for b in model.buffers())


def test_a_forward_pass_in_another_thread_is_a_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    guard, losses = Guard(model, torch.optim.Adam(model.parameters())), []
    for _ in range(2):
        guard.zero_grad()
        thread = threading.Thread(target=lambda: losses.append(model(torch.randn(8, 4)).square().mean()))
        thread.start()
        thread.join()
        guard.backward(losses.pop())
        assert not guard.read(guard.step())["skipped"]
