"""The sweep of drawn faults: its share of the suite, what it stands on, and that each property can fail."""

import json

import pytest
import torch
from helpers import bench

from refinelib import state as training
from refinelib.guard import guard as guards
from refinelib.guard import measure
from refinelib.guard.guard import REPORT, Guard
from refinelib.guard.monitor import StepMonitor
from refinelib.guard.rewind import Rewinder, Snapshot

sweep = bench("sweep")
#: The suite's share, the same every time; ``python bench/sweep.py --draws 20000 --seed S`` draws others.
SAMPLE, DRAWS, PARTS, WHOLE = 200, 2000, 4, 40
PLAIN = {"amp": "off", "optimizer": "adamw", "fused": True, "accumulate": 1, "ema": True, "buffers": True}


pytestmark = pytest.mark.usefixtures("half")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def rig(folder):
    return sweep.Rig(PLAIN, folder)


def fault(**changes):
    drawn = {"on_spike": "clip", "incidents": 0, "place": "gradient", "time": "middle", "pick": 3}
    return {**PLAIN, **drawn, "element": None, "value": "7fc00000", "snapshot": True, **changes}


def complaints(swept):
    """One failure of each kind, as a draw that can be played again."""
    kinds = {kind: swept.shrunk(found[0]) for kind, found in sweep.kinds_of(swept.failures).items()}
    return "\n".join(f"{kind}: {f['wrong']}\n--only '{json.dumps(f['draw'])}'" for kind, f in kinds.items())


@pytest.fixture(scope="module")
def rigs():
    """Of all configurations, for the tests that break nothing."""
    return {}


def drawn(folder, rigs, count, number, keys):
    swept = sweep.Sweep(folder)
    swept.rigs = rigs
    swept.sweep(count, number, sweep.faults(keys))
    assert not swept.failures, complaints(swept)
    assert sum(n for (what, *_), n in swept.counts.items() if what == "place") == count
    came = {(place, outcome) for what, place, outcome in swept.counts if what == "place"}
    assert {place for place, _ in came} == {*sweep.IN_STEP, *sweep.IN_STATE}
    return tuple({place for place, outcome in came if outcome == ended} for ended in ("skipped", "rewound"))


def test_hundreds_of_faults_are_survived_exact_and_on_record(folder, rigs):
    """In every second configuration: each value of each setting comes, and all of these under ``slow``."""
    keys = sweep.keys(full=False)
    some = [key for at, key in enumerate(dict.fromkeys(map(str, keys))) if (at + at // 8) % 2 == 0]
    keys = [key for key in keys if str(key) in some]
    assert all({key[name] for key in keys} == set(values) for name, values in sweep.KEY.items())
    skipped, rewound = drawn(folder, rigs, SAMPLE, 0, keys)
    assert skipped >= {"input", "activation", "flow", "gradient", "term", "loss", "total"}
    assert rewound >= {"parameter", "exp_avg", "exp_avg_sq", "average", "memory"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_faults_are_survived_exact_and_on_record(folder, rigs, part):
    skipped, rewound = drawn(folder, rigs, DRAWS // PARTS, part, sweep.keys(full=False))
    assert skipped >= {"input", "activation", "flow", "gradient", "term", "loss", "total", "measured"}
    assert rewound >= {"parameter", "exp_avg", "exp_avg_sq", "average", "memory"}
    assert part or rewound >= {"step", "buffer"}  # these are rarer


@pytest.mark.slow
def test_whole_runs_with_a_fault_leave_finite_checkpoints_that_can_be_resumed(folder):
    swept = sweep.Sweep(folder)
    drawn = sweep.faults(sweep.keys(full=False)).map(lambda each: {**each, "whole": True})
    swept.sweep(WHOLE, 0, drawn)
    assert not swept.failures, complaints(swept)


# -- what it stands on ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(sweep.keys(full=False)[-1], id="fp16", marks=pytest.mark.slow),
    ],
)
def test_a_restored_state_is_exact_whatever_was_drawn_before(folder, key):
    """The same steps give the same bits after draws that end in every way, and those of a new trainer."""

    def bits(rig, base):
        rig.restore(base)
        rig.loop(sweep.WARM)
        return [x.clone() for x in (*rig.moving.copy().values(), rig.trainer.guard.memory)]

    rig = sweep.Rig(key, folder)
    state, memory, _ = rig.bases["warm"]
    before = {"fresh": [*state.values(), memory], "warm": bits(rig, "warm")}
    kinds = set()
    values = {"gradient": "7fc00000", "parameter": "7f149f2d", "exp_avg_sq": "ff800000", "buffer": "7fc00000"}
    for place, value in {**values, "memory": "7f800000", "rate": "7fc00000"}.items():
        for when in ("first", "always", "after", "stop"):
            if sweep.possible(place, when):
                drawn = fault(place=place, time=when, value=value, incidents=2 * (when == "first"))
                kinds.add(rig.play({**drawn, "on_spike": "skip", **key})["state"])
    assert kinds >= {"ok", "interrupted", "diverged"}
    for base, wanted in before.items():
        assert all(map(torch.equal, wanted, bits(rig, base))), base
    other, memory, _ = sweep.Rig(key, folder).bases["warm"]
    assert all(map(torch.equal, before["fresh"], (*other.values(), memory)))


@pytest.mark.parametrize("place", sweep.IN_STEP)
def test_a_fault_within_a_step_arrives(rig, place):
    """NaN makes the step a skipped one; but as a label it is a class, and a norm is replaced by its bound."""
    for element in (None, 7):
        played = rig.play(fault(place=place, pick=0, element=element))
        assert played["kind"] == ("applied" if place in ("label", "measured") else "skipped")
        assert not played["wrong"]


@pytest.mark.parametrize("place", sweep.IN_STATE)
def test_a_fault_between_steps_arrives(rig, place):
    rig.restore("warm")
    attack = sweep.Attack(rig.trainer, fault(place=place, pick=0, element=7), [])
    name, target = sweep.held(rig.trainer)[place][0]
    before = target.clone()
    attack.strike(False)
    assert torch.equal(target, before)
    attack.strike(True)
    assert attack.where == name and int(target.isnan().sum()) == 1
    rig.restore("warm")
    assert torch.equal(target, before)


def test_values_are_the_bits_that_were_drawn():
    for bits in ("7fc00001", "ff812345", "80000001", "00000000", "7f7fffff", "ff800000"):
        assert f"{sweep.number(fault(value=bits)).view(torch.int32).item() & 0xFFFFFFFF:08x}" == bits
    classes = {"7fc00001": "nan", "ff800000": "inf", "80000000": "0", "80000001": "subnormal"}
    assert all(sweep.value_class(fault(value=bits)) == name for bits, name in classes.items())


def test_the_same_draws_every_time():
    drawn = []
    for _ in range(2):
        swept = sweep.Sweep("")
        swept.play = lambda each: drawn.append(each) or {"kind": "applied", "wrong": []}
        swept.sweep(60, 7, sweep.faults(sweep.keys(full=True)))
    assert drawn[:60] == drawn[60:] and len({json.dumps(each) for each in drawn}) == 60


# -- that it can fail ----------------------------------------------------------------------------------
def decide_in_float32(self, loss, norms, largest, rate=None, decide=Guard.decide):
    """In float32, and whether norm and clipping are finite is not checked."""
    found, scale = decide(self, loss, norms, largest, rate), self.state["scale"].float()
    norms, largest = measure.unscaled(norms, largest, scale, self.root_sizes)
    peak = norms.amax()
    total = peak * (norms / peak.clamp(min=torch.finfo(norms.dtype).tiny)).square().sum().sqrt()
    clip = (torch.full_like(total, self.grad_clip) / total.clamp(min=1e-12)).clamp(max=1.0)
    bad = ~torch.isfinite(loss) | ~torch.isfinite(largest).all()
    skip = bad | (self.state["updates_suspended"] != 0) | (self.state["damaged"] != 0)
    report = found.report.clone()
    report[REPORT.index("grad_norm")], report[REPORT.index("skipped")] = total, skip.float()
    return found._replace(skip=skip, divisor=scale / clip, report=report)


def decide_without_forgiveness(self, loss, norms, largest, rate=None, decide=Guard.decide):
    found = decide(self, loss, norms, largest, rate)
    skip, report = found.skip | (self.state["skipped"] > 0), found.report.clone()
    report[REPORT.index("skipped")] = skip.float()
    return found._replace(skip=skip, report=report)


def without_memory(self, guard):
    for name, tensor in guard.tensors().items():
        tensor.copy_(self.tensors[name])


def without_moments(self, guard):
    for name, tensor in guard.tensors().items():
        if name in self.tensors and not name.startswith("optimizer."):
            tensor.copy_(self.tensors[name])
    guard.memory.copy_(self.memory)


def rewinder_with(**changes):
    return lambda guard, **given: Rewinder(guard, **{**given, **changes})


def fails(*_):
    raise ZeroDivisionError


def nothing(*_, **__):
    return None


def ungated_average(average, weights, ema_weight, skip):
    average.lerp_(weights, ema_weight)


LASTING = rewinder_with(max_skips=10**6)
HASTY = rewinder_with(max_skips=1, max_rewinds=0)
FLOAT32, FORGIVES_NOTHING = (
    (Guard, "decide", decide_in_float32),
    (Guard, "decide", decide_without_forgiveness),
)
BLIND = (Guard, "check_state", nothing)
#: What is broken on purpose, where faults are drawn and when, and the properties that have to fail.
MUTATIONS = {
    "a norm that overflows": ([FLOAT32], "gradient", "middle", "report"),
    "a guard that does not check": ([FLOAT32, BLIND], "gradient", "last", "report finite disk"),
    "an average times zero": ([(guards, "_update_average", ungated_average)], "parameter", "middle", "exact"),
    "buffers not restored": ([(guards, "persistent_buffers", lambda _: [])], "gradient", "middle", "exact"),
    "a state that is not checked": ([BLIND], "exp_avg average step", "after stop", "finite disk"),
    "a log that says nothing": ([(StepMonitor, "_once", nothing)], "gradient term", "middle last", "record"),
    "moments not restored": ([(Snapshot, "restore", without_moments)], "exp_avg step", "middle", "restored"),
    "statistics not restored": ([(Snapshot, "restore", without_memory)], "exp_avg step", "middle", "again"),
    "a guard that forgives nothing": (
        [FORGIVES_NOTHING, (training, "Rewinder", LASTING)], "term", "middle", "continued exact",
    ),
    "a run that ends at once": ([(training, "Rewinder", HASTY)], "term", "middle", "ended"),
    "a log that cannot bear NaN": ([(StepMonitor, "_skip", fails)], "input", "last", "raised"),
}  # fmt: skip


#: Two that break what is decided and what is told; the others under ``slow``.
QUICK = ("a norm that overflows", "a log that says nothing")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MUTATIONS]
)
def test_it_notices(monkeypatch, folder, name):
    changes, places, times, properties = MUTATIONS[name]
    for owner, attribute, wrong in changes:
        monkeypatch.setattr(owner, attribute, wrong)
    swept = sweep.Sweep(folder)
    key = {**PLAIN, "incidents": 0, "on_spike": "clip"}
    drawn = sweep.faults([key], places=places.split(), times=times.split())
    found: set[str] = set()
    for part in range(16):
        if found >= set(properties.split()):
            break
        swept.sweep(4, part, drawn)
        found = {code for failure in swept.failures for code in sweep.codes_of(failure)}
    assert found >= set(properties.split()), (swept.counts, swept.failures[:3])
    small = swept.shrunk(next(iter(sweep.kinds_of(swept.failures).values()))[0])
    assert swept.play(json.loads(json.dumps(small["draw"])))["wrong"] == small["wrong"]  # as --only plays it


def test_it_notices_in_whole_runs(monkeypatch, folder):
    monkeypatch.setattr(Guard, "check_state", nothing)
    played = sweep.whole(fault(place="average", time="after"), folder)
    assert sweep.codes_of(played) == {"finite", "disk", "resumed"}, played
