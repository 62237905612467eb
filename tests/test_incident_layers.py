"""A step measured layer by layer: in order, complete, where it broke; and the notebook's figures of it."""

import math
import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from refinelib.incidents import IncidentError, find, layers, load
from refinelib.plots import incidents as draw
from refinelib.trainer import train

#: Fault, first place not finite forward, first place not finite from the loss back, whether a sample is to blame.
FAULTS = {
    "activation:nan@3:contour": ("contour", "boundary", True),
    "activation:inf@3:person.ups": ("person.ups.0", "boundary", True),
    "input:nan@3": ("input", None, True),
    "loss:inf@3": ("loss", "boundary", False),
    "grad:nan@3:stem": (None, None, False),
}


@pytest.fixture(scope="module")
def incidents(tmp_path_factory, stores):
    """A folder of an incident for each fault, of real runs."""
    from refinelib.config import resolve

    root = tmp_path_factory.mktemp("incidents")
    made = {}
    for number, fault in enumerate(FAULTS):
        settings = resolve(
            "demo", output_dir=str(root), store_dir=stores, max_images=6, width=0.0625, roi_size=32, mask_size=32, epochs=1, batch_size=2,
            accumulate=2, context=0.5, device="cpu", run=f"run{number}", inject=fault,
        )  # fmt: skip
        made[fault] = train(settings).folder / "incidents" / "000003"
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_place_that_is_not_finite_is_where_the_fault_was_planted(incidents, fault):
    forward, backward, _ = FAULTS[fault]
    report, _, step = load(incidents[fault], device="cpu")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    found = layers(step)
    assert (found.first_bad and found.first_bad.name) == forward
    if backward is not None:
        assert found.first_bad_gradient.name == backward
    # the recorded step itself: its gradient norms, bit for bit
    recorded = [math.nan if value is None else value for value in report["gradient_norms"].values()]
    now = [value if math.isfinite(value) else math.nan for value in found.parameters.values()]
    np.testing.assert_array_equal(np.float32(recorded), np.float32(now))
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    assert not any(module._forward_hooks for name, module in step.model.named_modules() if not name.startswith(("contour", "person.ups.0")))


def test_every_layer_is_there_once_in_the_order_of_the_forward_pass(incidents):
    _, _, step = load(incidents["grad:nan@3:stem"], device="cpu")
    found = layers(step)
    names = [layer.name for layer in found.forward]
    assert len(set(names)) == len(names)
    assert (names[0], names[1], names[-1]) == ("input", "stem.0.0", "loss")
    parts = list(dict.fromkeys(layer.part for layer in found.forward))
    assert parts == ["input", "stem", "shared", "person", "person_head", "gate", "merge", "attention", "target", "target_head",
                     "progressive", "contour", "distance", "boundary", "loss"]  # fmt: skip
    leaves = {name for name, module in step.model.named_modules() if not list(module.children())}
    assert leaves <= set(names), leaves - set(names)
    assert "stem" not in names and "stem.0" not in names  # they hand on what their last part gave
    assert [name for name in names if name.startswith("loss: ")] == [f"loss: {name}" for name in step.loss.names]


def test_magnitudes_and_gradients_are_those_of_a_plain_step(incidents):
    """By hand, without hooks: the largest output of a layer, and the norm of the loss's gradient at the mask's logits."""
    _, _, step = load(incidents["grad:nan@3:stem"], device="cpu")
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


@pytest.mark.parametrize("fault", FAULTS)
def test_figures_and_tables(incidents, fault, tmp_path):
    folder = incidents[fault]
    report, _, step = load(folder, device="cpu")
    found = layers(step)
    by_layer = [make(report, found) for make in (draw.activations, draw.gradients, draw.parameter_gradients)]
    for figure in (draw.pictures(folder, report), *by_layer):
        assert isinstance(figure, Figure)
        draw.save(figure, folder, "figure")
    assert (folder / "figures" / "figure.png").stat().st_size > 5000
    title = draw.parameter_gradients(report, found).axes[0].get_title(loc="left")
    assert title.endswith("are the same bit for bit")
    report["gradient_norms"]["stem.0.1.weight"] = 0.5
    assert "not the same" in draw.parameter_gradients(report, found).axes[0].get_title(loc="left")
    blamed = FAULTS[fault][2]
    bold = [line for line in draw.people_table(report).splitlines() if line.startswith("| **")]
    assert len(bold) == len(report["finding"]["places"]) and bool(bold) == blamed
    assert all(str(report["people"][place]["annotation_id"]) in line for place, line in zip(report["finding"]["places"], bold))
    assert ("**nan**" in draw.losses_table(report) or "**inf**" in draw.losses_table(report)) == (fault != "grad:nan@3:stem")


def test_the_newest_incident_of_the_run_that_last_had_one(incidents, tmp_path):
    folders = list(incidents.values())
    root = folders[0].parents[2]
    for age, folder in enumerate(folders):
        os.utime(folder.parents[1] / "status.json", (1e9 + age, 1e9 + age))
    assert find(output_dir=str(root)) == folders[-1]
    os.utime(folders[1].parents[1] / "status.json", (2e9, 2e9))
    assert find(output_dir=str(root)) == folders[1]
    assert find(folders[2]) == folders[2]
    assert find(output_dir=str(tmp_path)) is None
    with pytest.raises(IncidentError, match="no report.json"):
        find(tmp_path)
    with pytest.raises(IncidentError, match="no report.json"):
        find(tmp_path / "nowhere")


def test_a_pixel_that_is_not_finite_is_shown_in_its_colour():
    image = np.zeros((3, 4, 4), np.float32)
    image[1, 2, 3] = np.nan
    picture = draw._picture(image)
    assert picture[2, 3].tolist() == [0xD5, 0x5E, 0x00] and picture[0, 0].tolist() != [0xD5, 0x5E, 0x00]
    assert picture[0, 0].tolist() == [123, 116, 103]  # 0 is the mean colour
