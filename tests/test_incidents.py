"""Incidents: found where they were planted, kept whole, replayed bit for bit and layer by layer."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import refinelib
import refinelib.trainer as loop
from refinelib.__main__ import main
from refinelib.build import build_loss, build_model
from refinelib.config import resolve
from refinelib.guard.diagnose import Step, examine
from refinelib.guard.faults import Injector
from refinelib.incidents import FORMAT, IncidentError, find, layers, load, read_report, replay
from refinelib.plots import incidents as draw
from refinelib.runs import Run, dumps
from refinelib.trainer import train

pytestmark = pytest.mark.usefixtures("shallow", "half")

#: Fault: what is found: phase, module; first place not finite forward and from the loss back; samples.
FAULTS = {
    "activation:nan@3:contour.trunk": ("forward", "contour.trunk", "contour.trunk", "boundary", [0, 2]),
    "activation:inf@3:attention.0.squeeze": ("forward", "attention.0", "attention.0.squeeze", None, [0]),
    "input:nan@3": ("input", "", "input", None, [0, 2]),
    "loss:inf@3": ("loss", "loss", "loss", "boundary", []),
    "grad:nan@3:stem": ("gradient", "stem", None, None, []),
}
GRADIENT = "grad:nan@3:stem"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stores):
    """A run with an incident in its third step for each fault."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for at, fault in enumerate(FAULTS):
        settings = resolve(
            "demo", output_dir=str(root), store_dir=stores, max_images=6, width=0.0625, roi_size=32,
            mask_size=32, epochs=1, batch_size=2, accumulate=2, context=0.5, device="cpu", run=f"run{at}",
            inject=fault, amp="off", probe_every=0,
        )  # fmt: skip
        made[fault] = train(settings)
    return made


@pytest.fixture
def folder(runs, tmp_path):
    """A copy of an incident's folder, to be changed at will."""
    return Path(shutil.copytree(runs[GRADIENT].folder / "incidents" / "000003", tmp_path / "incident"))


def rewrite(folder, **changes):
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(dumps(report | changes))


# -- found -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_replay_is_the_same_step_and_names_what_was_planted(runs, fault):
    phase, module, _, _, places = FAULTS[fault]
    run = runs[fault]
    (folder,) = (run.folder / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    finding = replay(folder)
    assert f"refinelib replay {folder}" in run.summary()
    assert finding.same_step and finding.phase == phase and finding.module.startswith(module)
    assert finding.places == places and finding.samples == [report["people"][place] for place in places]
    assert finding.planted == [fault] and f"planted by inject: {fault}" in finding.sentence
    (event,) = [event for event in run.events() if event["kind"] == "incident"]
    for recorded in (report["finding"], event):
        assert {name: recorded[name] for name in ("phase", "module", "places", "terms", "parameters")} == {
            name: getattr(finding, name) for name in ("phase", "module", "places", "terms", "parameters")
        }
    for file in ("batch.pt", "state.pt"):
        assert torch.load(folder / file, weights_only=True)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_replay_is_the_same_step_in_half_precision(tiny, amp):
    run = train(tiny(inject="activation:nan@2:contour.trunk", amp=amp, epochs=1, batch_size=2))
    finding = replay(run.folder / "incidents" / "000002")
    assert finding.same_step and finding.module.startswith("contour.trunk")


@pytest.mark.parametrize(
    ("factor", "alike", "words"),
    [
        (1.0, True, ""),
        (1.001, True, "the same step within rounding, 0.001 apart (compiled kernels"),
        (1.1, False, "it was not the same step (compiled kernels"),
        (None, False, "it was not the same step"),  # the norms that were recorded are others, all finite
    ],
)
def test_a_step_taken_by_other_kernels_is_the_same_but_for_rounding(folder, factor, alike, words):
    report = read_report(folder)
    norms = report["gradient_norms"]
    changed = {name: 1.0 if factor is None else norm and norm * factor for name, norm in norms.items()}
    loss = report["recorded"]["loss"] * (factor or 1.0)
    rewrite(folder, gradient_norms=changed, recorded=report["recorded"] | {"loss": loss})
    finding = replay(folder)
    assert (finding.same_step, finding.alike) == (factor == 1, alike) and words in finding.sentence
    assert finding.apart == (factor and pytest.approx(1 - 1 / factor, abs=1e-6))


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
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, logits, image):
        flat = (image[:, :1, :1, 1:2] - image[:, :1, :1, :1]).square()  # 0 where two pixels are equal
        return logits + (flat * self.weight.square()).sqrt()


def step_of(model, images, labels, samples=()):
    loss = build_loss(resolve("demo"))
    injector = Injector("", model)
    return Step(model, loss, loss.per_sample, [(images, labels)], list(samples), model, injector, 7)


def test_a_gradient_born_in_the_backward_pass_is_traced_to_module_operation_and_sample(tiny):
    model = Bare(build_model(tiny()))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1, :, 0, :2] = 0.25
    labels = torch.randint(0, 3, (3, 32, 32), generator=torch.Generator().manual_seed(1))
    step = step_of(model, images, labels, [{"id": 100 + i} for i in range(3)])
    finding = examine(step)
    assert (finding.phase, finding.module) == ("backward", "root")
    assert "Sqrt" in finding.node or "div" in finding.operation
    assert finding.places == [1] and "{'id': 101}" in finding.sentence
    assert finding.parameters[0] == "root.weight" and finding.planted == []
    images[1, :, 0, 1] = 3.0
    healthy = examine(step)
    assert healthy.phase == "none" and healthy.parameters == [] and healthy.places == []


def test_weights_that_are_not_finite_are_named(tiny):
    model = build_model(tiny())
    with torch.no_grad():
        model.merge.weight[0, 0] = torch.nan
    finding = examine(step_of(model, torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64)))
    assert (finding.phase, finding.module) == (
        "weights",
        "merge",
    ) and "weights themselves" in finding.sentence


class WithStatistics(nn.Module):
    """Batch norm and dropout around a model."""

    def __init__(self, model):
        super().__init__()
        self.norm, self.drop, self.model = nn.BatchNorm2d(3), nn.Dropout(0.2), model

    def forward(self, x):
        return self.model(self.drop(self.norm(x)))


def test_a_replay_leaves_running_statistics_and_random_state(folder):
    _, _, step = load(folder)
    step.model = step.forward = WithStatistics(step.model).train()
    before = [*(b.clone() for b in step.model.buffers()), torch.get_rng_state()]
    for take in (examine, layers):
        take(step)
        after = [*step.model.buffers(), torch.get_rng_state()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert all(p.grad is None for p in step.model.parameters())


# -- kept ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_each_kind_is_kept_once_and_the_trajectory_is_that_of_a_run_that_keeps_none(tiny):
    faults = "grad:nan@3:stem;grad:nan@4:stem;input:inf@6;loss:nan@8"
    kept = train(tiny(run="kept", inject=faults, epochs=4, batch_size=2))
    plain = train(tiny(run="plain", inject=faults, epochs=4, batch_size=2, max_incidents=0))
    folders = sorted((kept.folder / "incidents").iterdir())
    assert [folder.name for folder in folders] == ["000003", "000006", "000008"]
    assert not list((plain.folder / "incidents").iterdir())
    assert [read_report(folder)["finding"]["phase"] for folder in folders] == ["gradient", "input", "loss"]
    a, b = (
        torch.load(r.folder / "checkpoints" / "last.pt", weights_only=True)["model"] for r in (kept, plain)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["loss"] for line in kept.steps()] == [line["loss"] for line in plain.steps()]


def test_no_more_than_asked_for_are_kept(tiny):
    faults = ";".join(f"grad:nan@{2 * i}:{part}" for i, part in enumerate(("stem", "shared", "person"), 1))
    run = train(tiny(inject=faults, epochs=3, batch_size=2, max_incidents=2))
    assert len(list((run.folder / "incidents").iterdir())) == 2 and run.status()["skipped_steps"] == 3


def test_a_disk_without_room_costs_the_incident_and_not_the_run(tiny, monkeypatch):
    from refinelib import incidents

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(incidents.checkpoints, "save", full)
    run = train(tiny(inject="grad:nan@3:stem", epochs=1))
    assert run.status()["state"] == "ok" and run.status()["skipped_steps"] == 1
    assert any(e["kind"] == "incident" and "No space left" in e["message"] for e in run.events())
    assert not list((run.folder / "incidents").iterdir())  # and no half one


def test_capture_leaves_the_gradients_where_they_were(tiny, monkeypatch):
    """A captured step writes to these tensors and never hands them to the parameters again."""
    kept = []
    real = loop.Trainer.keep_incident

    def watched(trainer, plan, row):
        before = [p.grad for p in trainer.guard.parameters]
        real(trainer, plan, row)
        kept.append(
            all(p.grad is x for p, x in zip(trainer.guard.parameters, before, strict=True))
            and before[0] is not None
        )

    monkeypatch.setattr(loop.Trainer, "keep_incident", watched)
    train(tiny(inject="grad:nan@2:boundary", epochs=1, batch_size=2))
    assert kept == [True]


@pytest.mark.parametrize(("then", "now", "enabled"), [(1, 5, 1), (5, 0, 0)])
def test_a_resumed_run_keeps_as_many_incidents_as_it_now_may(tiny, then, now, enabled):
    train(tiny(run="again", inject="grad:nan@2:boundary", epochs=1, batch_size=2, max_incidents=then))
    settings = tiny(run="again", inject="", epochs=2, batch_size=2, max_incidents=now, resume=True)
    trainer = loop.Trainer(settings, Run.start(settings))
    trainer.restore()
    assert int(trainer.guard.state["capture_enabled"]) == enabled


def test_a_gradient_that_is_not_finite_is_no_overflow_of_the_loss_scale(tiny):
    """fp16: named at its first step, and the scale stays; a scale that is too high is no incident."""
    small = {"amp": "fp16", "batch_size": 3}
    run = train(tiny(**small, epochs=3, loss_scale_init=1024.0, inject="grad:nan@9:stem"))
    (incident,) = [event for event in run.events() if event["kind"] == "incident"]
    assert incident["step"] == 9 and "stem" in incident["message"]
    assert run.steps()[-1]["loss_scale"] >= 1024.0
    searching = train(tiny(**small, run="search", epochs=4, loss_scale_init=2.0**24, max_consecutive_skips=5))
    assert searching.status()["state"] == "ok" and searching.status()["rewinds"] == 0
    assert not [event for event in searching.events() if event["kind"] == "incident"]


# -- read ------------------------------------------------------------------------------------------------
def test_the_command_prints_one_json_object(folder, capsys):
    assert main(["replay", str(folder)]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["same_step"] and found["parameters"][0].startswith("stem.")
    assert found["sentence"] in shown.err


def test_what_cannot_be_replayed_is_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(IncidentError, match="no report.json"):
        refinelib.replay(tmp_path / "nowhere")
    with pytest.raises(IncidentError, match="such as .*incident"):
        replay(tmp_path)
    state, report = folder / "state.pt", read_report(folder)
    whole = state.read_bytes()
    state.write_bytes(whole[:500])
    with pytest.raises(IncidentError, match="state.pt is not a whole"):
        replay(folder)
    state.write_bytes(whole)
    for wrong, words in (
        (report | {"format": 9}, "has format 9"),
        (report | {"settings": {"unheard_of": 1}}, "left by another version"),
        ({}, "lacks format, step"),
        (None, "cannot be read"),
    ):
        (folder / "report.json").write_text("{" if wrong is None else json.dumps(wrong))
        with pytest.raises(IncidentError, match=words):
            load(folder)


def test_the_newest_incident_of_the_run_that_last_had_one(runs, tmp_path):
    folders = [run.folder / "incidents" / "000003" for run in runs.values()]
    root = str(folders[0].parents[2])
    for age, folder in enumerate(folders):
        os.utime(folder.parents[1] / "status.json", (1e9 + age, 1e9 + age))
    assert find(output_dir=root) == folders[-1]
    os.utime(folders[1].parents[1] / "status.json", (2e9, 2e9))
    assert find(output_dir=root) == folders[1] and find(folders[2]) == folders[2]
    assert find(output_dir=str(tmp_path)) is None
    with pytest.raises(IncidentError, match="no report.json"):
        find(tmp_path)
    for folder in folders:
        assert find(run=folder.parents[1]) == find(run=folder.parents[1].name, output_dir=root) == folder
    (tmp_path / "healthy").mkdir()
    (tmp_path / "healthy" / "status.json").write_text('{"state": "ok"}')
    with pytest.raises(IncidentError, match="healthy has no incident"):
        find(run=tmp_path / "healthy")


def test_an_incident_of_an_older_version_is_passed_over_unless_it_is_asked_for(folder, tmp_path):
    run = tmp_path / "outputs" / "run"
    shutil.copytree(folder, run / "incidents" / "000003")
    (run / "status.json").write_text('{"state": "ok"}')
    assert find(output_dir=str(run.parent)) == run / "incidents" / "000003"
    for apart in ("debug-runs", "smoke"):
        shutil.copytree(run, run.parent / apart / "run")
        assert find(output_dir=str(run.parent)) == run / "incidents" / "000003", (
            "a newer one that is no result"
        )
    rewrite(run / "incidents" / "000003", format=FORMAT - 1)
    assert find(output_dir=str(run.parent)).is_relative_to(run.parent / "debug-runs")
    for apart in ("debug-runs", "smoke"):
        shutil.rmtree(run.parent / apart)
    assert find(output_dir=str(run.parent)) is None
    with pytest.raises(IncidentError, match="use the version that wrote it"):
        find(run / "incidents" / "000003")


# -- layer by layer --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_layer_that_is_not_finite_is_where_the_fault_was_planted(runs, fault):
    _, _, forward, backward, _ = FAULTS[fault]
    report, _, step = load(runs[fault].folder / "incidents" / "000003", device="cpu")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in step.model.modules())
    found = layers(step)
    assert (found.first_bad and found.first_bad.name) == forward
    if backward is not None:
        assert found.first_bad_gradient.name == backward
    # the recorded step itself: its gradient norms, bit for bit
    recorded = [math.nan if value is None else value for value in report["gradient_norms"].values()]
    now = [value if math.isfinite(value) else math.nan for value in found.parameters.values()]
    np.testing.assert_array_equal(np.float32(recorded), np.float32(now))
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    assert sum(len(module._forward_hooks) for module in step.model.modules()) == hooks


def test_every_layer_is_there_once_in_the_order_of_the_forward_pass(folder):
    _, _, step = load(folder, device="cpu")
    names = [layer.name for layer in layers(step).forward]
    assert len(set(names)) == len(names)
    assert (names[0], names[1], names[-1]) == ("input", "stem.0.0", "loss")
    modules = step.model.named_modules()  # a sequence without modules hands on what it gets
    leaves = {
        name for name, module in modules if not [*module.children()] and not isinstance(module, nn.Sequential)
    }
    assert leaves <= set(names), leaves - set(names)
    assert "stem" not in names and "stem.0" not in names  # they hand on what their last part gave
    terms = [name for name in names if name.startswith("loss: ")]
    assert terms == [f"loss: {name}" for name in step.loss.names]


def test_magnitudes_and_gradients_are_those_of_a_plain_step(folder):
    """By hand, without hooks: a layer's largest output, and the norm of the loss's gradient at the logits."""
    _, _, step = load(folder, device="cpu")
    found = {layer.name: layer for layer in layers(step).forward}
    largest, squares, total = 0.0, 0.0, 0.0
    for images, labels in step.batches:
        with torch.no_grad():
            place = step.model.coordinates.expand(len(images), -1, -1, -1)
            largest = max(largest, step.model.stem(torch.cat([images, place], 1)).abs().max().item())
        output = step.model(images)
        loss = step.loss(output, labels)[0] / len(step.batches)
        squares += torch.autograd.grad(loss, output.logits)[0].double().square().sum().item()
        total += loss.item()
    assert found["stem.1.2"].largest == pytest.approx(largest, rel=1e-5)
    assert found["boundary"].gradient == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert found["loss"].largest == pytest.approx(total, rel=1e-6)
    assert found["loss: ce"].gradient is None  # recorded values, nothing flows back through them


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault, marks=[] if fault in (GRADIENT, "activation:nan@3:contour.trunk") else pytest.mark.slow
        )
        for fault in FAULTS
    ],
)
def test_figures_and_tables(runs, fault, recwarn):
    folder = runs[fault].folder / "incidents" / "000003"
    report, _, step = load(folder, device="cpu")
    found = layers(step)
    by_layer = [make(report, found) for make in (draw.activations, draw.gradients, draw.parameter_gradients)]
    for figure in (draw.pictures(folder, report), *by_layer):
        assert isinstance(figure, Figure) and figure._repr_png_()
    assert not [told for told in recwarn if "log-scaled" in str(told.message)]
    for figure in by_layer:  # each name of a part has room of its own
        names = [text for text in figure.axes[-1].texts if text.get_rotation() == 90]
        ends = [name.get_window_extent() for name in names]
        assert len(ends) > 5 and all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(ends))
    title = draw.parameter_gradients(report, found).axes[0].get_title(loc="left")
    assert title.endswith("are the same bit for bit")
    report["gradient_norms"]["stem.0.1.weight"] = 0.5
    assert "not the same" in draw.parameter_gradients(report, found).axes[0].get_title(loc="left")
    bold = [line for line in draw.people_table(report).splitlines() if line.startswith("| **")]
    places = report["finding"]["places"]
    assert len(bold) == len(places) == len(FAULTS[fault][4])
    assert all(
        str(report["people"][at]["annotation_id"]) in line for at, line in zip(places, bold, strict=True)
    )
    shown = draw.losses_table(report)
    assert ("**nan**" in shown or "**inf**" in shown) == (fault not in (GRADIENT, list(FAULTS)[1]))


def test_a_pixel_that_is_not_finite_is_shown_in_its_colour():
    image = np.zeros((3, 4, 4), np.float32)
    image[1, 2, 3] = np.nan
    picture = draw._picture(image)
    assert picture[2, 3].tolist() == [0xD5, 0x5E, 0x00] and picture[0, 0].tolist() != [0xD5, 0x5E, 0x00]
    assert picture[0, 0].tolist() == [123, 116, 103]  # 0 is the mean colour
