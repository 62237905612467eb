"""Incidents: found where they were planted, kept whole, replayed bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import refinelib
import refinelib.trainer as loop
from refinelib.guard.diagnose import Step, examine
from refinelib.guard.faults import Injector
from refinelib.incidents import FORMAT, IncidentError, find, load, replay
from refinelib.files import dumps
from refinelib.runs import Run
from refinelib.trainer import train


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_replay_is_the_same_step_and_names_the_module(tiny, amp):
    run = train(tiny(inject="activation:nan@5:contour.trunk", amp=amp, epochs=2))
    (folder,) = (run.folder / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    finding = replay(folder)
    assert finding.same_step and finding.phase == "forward" and finding.module.startswith("contour.trunk")
    assert finding.places == [0] and finding.samples == [report["people"][0]] and finding.samples[0]["source"] == "synthetic"
    assert json.loads(dumps(finding.as_dict())) | {"nonfinite": 0} == report["finding"] | {"nonfinite": 0} == {"nonfinite": 0} | {k: v for k, v in run.events()[1].items() if k in report["finding"]}
    assert set(finding.terms) == set(report["losses"])
    for file in ("batch.pt", "state.pt"):
        assert torch.load(folder / file, weights_only=True)


@pytest.mark.parametrize(("factor", "alike", "words"), [(1.0, True, ""), (1.001, True, "the same step but for rounding, 0.001 apart (compiled kernels"), (1.1, False, "it was not the same step (compiled kernels")])
def test_a_step_taken_by_other_kernels_is_the_same_but_for_rounding(tiny, factor, alike, words):
    run = train(tiny(inject="grad:nan@5:stem", epochs=2))
    (folder,) = (run.folder / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    report["recorded"]["loss"] *= factor
    report["gradient_norms"] = {name: None if norm is None else norm * factor for name, norm in report["gradient_norms"].items()}
    (folder / "report.json").write_text(dumps(report))
    finding = replay(folder)
    assert (finding.same_step, finding.alike) == (factor == 1, alike) and words in finding.sentence
    assert finding.apart == pytest.approx(1 - 1 / factor, abs=1e-6) and finding.phase == "gradient"


def test_other_finite_norms_are_another_step(tiny):
    run = train(tiny(inject="grad:nan@5:stem", epochs=2))
    (folder,) = (run.folder / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    report["gradient_norms"] = dict.fromkeys(report["gradient_norms"], 1.0)
    (folder / "report.json").write_text(dumps(report))
    finding = replay(folder)
    assert not finding.alike and finding.apart is None and "it was not the same step" in finding.sentence


def test_each_kind_is_kept_once_and_the_trajectory_is_that_of_a_run_that_keeps_none(tiny):
    faults = "grad:nan@3:stem;grad:nan@4:stem;input:inf@6;loss:nan@8"
    kept = train(tiny(run="kept", inject=faults, epochs=4, batch_size=2))
    plain = train(tiny(run="plain", inject=faults, epochs=4, batch_size=2, max_incidents=0))
    assert sorted(p.name for p in (kept.folder / "incidents").iterdir()) == ["000003", "000006", "000008"]
    assert not list((plain.folder / "incidents").iterdir())
    names = [json.loads((p / "report.json").read_text())["finding"]["phase"] for p in sorted((kept.folder / "incidents").iterdir())]
    assert names == ["gradient", "input", "loss"]
    a, b = (torch.load(r.folder / "checkpoints" / "last.pt", weights_only=True)["model"] for r in (kept, plain))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["loss"] for line in kept.steps()] == [line["loss"] for line in plain.steps()]


def test_no_more_than_asked_for_are_kept(tiny):
    faults = ";".join(f"grad:nan@{2 * i}:{part}" for i, part in enumerate(("stem", "shared", "person", "target"), 1))
    run = train(tiny(inject=faults, epochs=4, batch_size=2, max_incidents=2))
    assert len(list((run.folder / "incidents").iterdir())) == 2 and run.status()["skipped_steps"] == 4


class Bare(nn.Module):
    """A planted cause, not a planted NaN: a square root without protection."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.root = Root()

    def forward(self, image):
        output = self.model(image)
        return output._replace(logits=self.root(output.logits, image))


class Root(nn.Module):
    def forward(self, logits, image):
        flat = (image[:, :1, :1, 1:2] - image[:, :1, :1, :1]).square()  # 0 where two pixels are equal
        return logits + (flat * self.weight.square()).sqrt() if hasattr(self, "weight") else logits


def test_a_gradient_born_in_the_backward_pass_is_traced_to_module_operation_and_sample(tiny):
    from refinelib.build import build_loss, build_model

    settings = tiny()
    model = Bare(build_model(settings))
    model.root.weight = nn.Parameter(torch.ones(()))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1, :, 0, :2] = 0.25
    labels = torch.randint(0, 3, (3, 32, 32), generator=torch.Generator().manual_seed(1))
    people = [dict(source="mine", image_id=10 + i, annotation_id=100 + i) for i in range(3)]
    loss = build_loss(settings)
    step = Step(
        model, loss, loss.per_sample, [(images, labels)], people, model, Injector("", model), 7
    )
    finding = examine(step)
    assert (finding.phase, finding.module) == ("backward", "root")
    assert "Sqrt" in finding.node or "div" in finding.operation
    assert finding.places == [1] and "'annotation_id': 101" in finding.sentence
    assert finding.parameters[0] == "root.weight" and finding.planted == []
    images[1, :, 0, 1] = 3.0
    healthy = examine(step)
    assert healthy.phase == "none" and healthy.parameters == [] and healthy.places == []


def test_weights_that_are_not_finite_are_told_as_such(tiny):
    from refinelib.build import build_loss, build_model

    settings = tiny()
    model = build_model(settings)
    with torch.no_grad():
        model.merge.weight[0, 0] = torch.nan
    batch = torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64)
    finding = examine(Step(model, build_loss(settings), dict, [batch], [], model, Injector("", model), 1))
    assert (finding.phase, finding.module) == ("weights", "merge") and "weights themselves" in finding.sentence


def test_the_command_prints_one_json_object(tiny):
    run = train(tiny(inject="grad:inf@3:boundary", epochs=1))
    (folder,) = (run.folder / "incidents").iterdir()
    done = subprocess.run([sys.executable, "-m", "refinelib", "replay", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_step"] and found["parameters"][0].startswith("boundary.") and found["sentence"] in done.stderr


def test_what_cannot_be_replayed_is_refused_in_a_sentence(tiny, tmp_path):
    with pytest.raises(IncidentError, match="no report.json"):
        refinelib.replay(tmp_path)
    run = train(tiny(inject="grad:inf@3:boundary", epochs=1))
    with pytest.raises(IncidentError, match="such as .*000003"):
        replay(run.folder)
    (folder,) = (run.folder / "incidents").iterdir()
    state = folder / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:500])
    with pytest.raises(IncidentError, match="state.pt is not a whole"):
        replay(folder)
    report = json.loads((folder / "report.json").read_text())
    for wrong, words in (({"format": 9}, "has format 9"), ({"settings": {"unheard_of": 1}}, "left by another version")):
        state.write_bytes(whole)
        (folder / "report.json").write_text(json.dumps({**report, **wrong}))
        with pytest.raises(IncidentError, match=words):
            replay(folder)
    (folder / "report.json").write_text(json.dumps({**report, "format": FORMAT - 1}))  # of an older version: passed over, unless it is asked for
    assert find(output_dir=str(run.folder.parent)) is None
    with pytest.raises(IncidentError, match="use the version that wrote it"):
        find(folder)
    (folder / "report.json").write_text(json.dumps(report))
    assert find(output_dir=str(run.folder.parent)) == folder
    (folder / "report.json").write_text("{}")
    with pytest.raises(IncidentError, match="lacks format, step"):
        replay(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(IncidentError, match="cannot be read"):
        load(folder)


def test_a_disk_without_room_costs_the_incident_and_not_the_run(tiny, monkeypatch):
    from refinelib import incidents

    monkeypatch.setattr(incidents.checkpoints, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run = train(tiny(inject="grad:nan@3:stem", epochs=1))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 1
    assert any(e["kind"] == "incident" and "No space left" in e["message"] for e in Run.open(run.folder).events())
    assert not list((run.folder / "incidents").iterdir())  # and no half one


def test_a_look_at_an_incident_leaves_the_gradients_where_they_were(tiny, monkeypatch):
    """A step that was recorded as a graph writes to these tensors and never hands them to the parameters again."""
    kept = []
    real = loop.Trainer.keep_incident

    def watched(trainer, plan, row):
        before = [p.grad for p in trainer.guard.parameters]
        real(trainer, plan, row)
        kept.append(all(p.grad is gradient for p, gradient in zip(trainer.guard.parameters, before)) and before[0] is not None)

    monkeypatch.setattr(loop.Trainer, "keep_incident", watched)
    train(tiny(inject="grad:nan@2:boundary", epochs=1, batch_size=2))
    assert kept == [True]


@pytest.mark.parametrize(("then", "now", "armed"), [(1, 5, 1), (5, 0, 0)])
def test_a_resumed_run_keeps_as_many_incidents_as_it_now_may(tiny, then, now, armed):
    train(tiny(run="again", inject="grad:nan@2:boundary", epochs=1, batch_size=2, max_incidents=then))
    settings = tiny(run="again", inject="", epochs=2, batch_size=2, max_incidents=now, resume=True)
    trainer = loop.Trainer(settings, Run.start(settings))
    trainer.restore()
    assert int(trainer.guard.state["capture_enabled"]) == armed


def test_an_infinite_activation_that_leaves_finite_outputs_names_its_person(tiny):
    """A gate squashes it: no output and no loss term shows it, the gradient does."""
    run = train(tiny(inject="activation:inf@3:attention.0.squeeze", epochs=1, batch_size=3))
    (incident,) = [event for event in run.events() if event["kind"] == "incident"]
    assert incident["module"].startswith("attention.0") and incident["places"] == [0]


class WithStatistics(nn.Module):
    """Batch norm and dropout around a model."""

    def __init__(self, model):
        super().__init__()
        self.norm, self.drop, self.model = nn.BatchNorm2d(3), nn.Dropout(0.2), model

    def forward(self, x):
        return self.model(self.drop(self.norm(x)))


def test_a_look_at_an_incident_leaves_running_statistics_and_random_state(tiny):
    run = train(tiny(inject="grad:nan@3:boundary", epochs=1))
    _, _, step = load(run.folder / "incidents" / "000003")
    step.model = step.forward = WithStatistics(step.model).train()
    before = [*(b.clone() for b in step.model.buffers()), torch.get_rng_state()]
    examine(step)
    after = [*step.model.buffers(), torch.get_rng_state()]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


def test_a_persons_gradient_that_is_not_finite_is_no_overflow_of_the_loss_scale(tiny):
    """fp16: named at its first step, and the scale stays; the scale alone, where it is too high, is no incident."""
    run = train(tiny(amp="fp16", epochs=6, batch_size=3, loss_scale_init=1024.0, inject="grad:nan@15:stem"))
    (incident,) = [event for event in run.events() if event["kind"] == "incident"]
    assert incident["step"] == 15 and "stem" in incident["message"]
    assert run.steps()[-1]["loss_scale"] >= 1024.0
    searching = train(tiny(run="search", amp="fp16", epochs=8, batch_size=3, loss_scale_init=2.0**24, max_consecutive_skips=5))
    assert searching.status()["state"] == "ok" and searching.status()["rewinds"] == 0
    assert not [event for event in searching.events() if event["kind"] == "incident"]
