"""The probe: true numbers, small files, and a run that does not notice it."""

import numpy as np
import pytest
import torch

from refinelib import checkpoints, resolve
from refinelib import gradients as probe
from refinelib.build import forward
from refinelib.guard.guard import REPORT
from refinelib.runs import Run
from refinelib.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def settings(recipe="demo", **keywords):
        defaults = dict(
            output_dir=str(folder), max_images=6, width=0.0625, roi_size=32, mask_size=32,
            epochs=2, batch_size=3, log_every=2, device="cpu", augment="full",
        )  # fmt: skip
        return resolve(recipe, **{**defaults, **keywords})

    return settings


def read(run: Run, epoch: int) -> dict[str, np.ndarray]:
    with np.load(run.folder / "gradients" / f"epoch_{epoch:04d}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def trained(settings, steps: int = 3) -> tuple[Trainer, torch.Tensor]:
    """A trainer after some steps of its first epoch, and the last one's report."""
    trainer = Trainer(settings, Run.start(settings))
    plan = trainer.loader.plan(0)
    for at in range(steps):
        report = trainer.train_step(plan, at % trainer.loader.steps_per_epoch)
    trainer.run.close()
    trainer.probe.add([steps], report[None].numpy())
    return trainer, report[len(trainer.loss.names) :]


@pytest.mark.parametrize("amp", ["off", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_is_bitwise_the_same_with_the_probe_on_and_off(tiny, amp):
    on, off = (train(tiny(amp=amp, probe_every=every, ema_decay=0.9)) for every in (1, 0))
    assert len(list((on.folder / "gradients").iterdir())) == 2 and not (off.folder / "gradients").exists()
    first, second = (checkpoints.load(run.folder / "checkpoints" / "last.pt") for run in (on, off))
    for part in ("model", "average", "guard", "random", "best", "log"):
        assert checkpoints.checksum(first[part]) == checkpoints.checksum(second[part]), part
    losses = [[(line["step"], line["loss"], line["losses"]) for line in run.steps()] for run in (on, off)]
    assert losses[0] == losses[1]
    assert [line["metrics"] for line in on.epochs()] == [line["metrics"] for line in off.epochs()]


def test_a_look_leaves_gradients_optimizer_weights_and_random_state_as_they_were(tiny):
    trainer, report = trained(tiny(probe_every=1))

    def state():
        grads = [p.grad.clone() for p in trainer.guard.parameters]
        return checkpoints.checksum(
            [grads, trainer.model.state_dict(), trainer.guard.state_dict(), torch.get_rng_state()]
        )

    before = state()
    assert trainer.probe.end_epoch(1).is_file()
    assert state() == before
    assert all(module.training for module in trainer.model.modules())


def test_norms_are_those_of_the_steps(tiny):
    run = train(tiny(log_every=1))
    first, second = read(run, 1), read(run, 2)
    steps = np.concatenate([first["steps"], second["steps"]])
    assert steps.tolist() == [line["step"] for line in run.steps()]
    norms = np.concatenate([first["norms"], second["norms"]]).astype(np.float64)
    np.testing.assert_allclose(
        np.sqrt((norms**2).sum(1)), [line["grad_norm"] for line in run.steps()], rtol=2e-3
    )
    assert first["names"][first["module_of"] == list(first["modules"]).index("boundary")][0].startswith(
        "boundary."
    )
    assert not first["skipped"].any()
    weighted = (first["components"] * first["term_weights"]).sum(1)
    np.testing.assert_allclose(first["loss"], weighted, rtol=1e-5)
    assert first["terms"].tolist() == list(run.steps()[0]["losses"])


def test_the_look_holds_true_numbers(tiny):
    trainer, report = trained(tiny(grad_clip=0.1, probe_every=1))
    weights, lr = [p.detach().clone() for p in trainer.guard.parameters], float(report[REPORT.index("lr")])
    with np.load(trainer.probe.end_epoch(1)) as file:
        look = {name: file[name] for name in file.files}
    np.testing.assert_allclose(look["weight_norms"], [float(w.norm()) for w in weights], rtol=1e-5)
    # The update as the optimizer makes it: without decay, a step with these moments moves weights that far.
    for place in (0, len(weights) // 2, len(weights) - 1):
        p = trainer.guard.parameters[place]
        state = trainer.guard.optimizer.state[p]
        steps, m, v = float(state["step"]), state["exp_avg"].double(), state["exp_avg_sq"].double()
        update = lr * (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
        expected = float(update.norm() / p.detach().double().norm())
        assert look["update_ratios"][place] == pytest.approx(expected, rel=1e-3)
    # Every element is in one bin, and the clipped gradients are shown as long as they were before.
    for name, shown in (
        ("weight_counts", weights),
        ("gradient_counts", [p.grad for p in trainer.guard.parameters]),
    ):
        assert look[name].sum() == sum(x.numel() for x in shown)
        assert look[name].shape == (len(look["modules"]), len(look["edges"]) + 1)
    factor = float(report[REPORT.index("grad_norm")]) / 0.1
    assert factor > 2
    everything = torch.cat([p.grad.flatten() for p in trainer.guard.parameters]) * factor
    above = int((everything.abs() >= 1e-3).sum())
    assert look["gradient_counts"][:, 1 + list(look["edges"]).index(-3.0) :].sum() == pytest.approx(
        above, abs=3
    )


def test_terms_add_up_to_the_gradient_of_the_whole_loss(tiny):
    """The terms' gradients add up to the total's: so with one term only its norm is the total's."""
    trainer, report = trained(
        tiny(
            use_active_contour_loss=False,
            use_boundary_aware_loss=False,
            contour_weight=0,
            distance_weight=0,
            dice_weight=0,
        )
    )
    batch = trainer.loader.batch(trainer.loader.plan(0), 0)
    trainer.guard.zero_grad()
    trainer.loss(forward(trainer.settings, trainer.model, batch.images), batch.labels)[0].backward()
    expected = [0.0 if p.grad is None else float(p.grad.norm()) for p in trainer.guard.parameters]
    found = trainer.probe._terms()
    assert found.shape == (1, len(expected))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-9)


def test_a_heavier_term_has_a_heavier_share(tiny):
    light, heavy = (trained(tiny(distance_weight=weight), steps=1)[0] for weight in (0.1, 10.0))
    row = light.loss.names.index("distance")
    a, b = (trainer.probe._terms()[row] for trainer in (light, heavy))
    assert float(b.norm() / a.norm()) == pytest.approx(
        100, rel=0.5
    )  # weights differ by one step of the optimizer
    distance = [name.startswith("distance.") for name in light.guard.names]
    contour = [name.startswith("contour.head") for name in light.guard.names]
    assert a[contour].max() < 1e-3 * a[distance].max()  # it reaches the contour head through the mask alone


def test_a_planted_nan_is_in_its_row_and_nowhere_else(tiny):
    run = train(tiny(inject="grad:nan@2:boundary", epochs=1))
    found = read(run, 1)
    assert found["skipped"].tolist() == [step == 2 for step in found["steps"].tolist()]
    bad = ~np.isfinite(found["norms"])
    assert {found["names"][p].split(".")[0] for p in np.flatnonzero(bad.any(0))} == {
        "boundary"
    } and bad.sum() == 1


def test_files_come_every_so_many_epochs_and_leave_out_no_step(tiny):
    run = train(tiny(probe_every=2, epochs=5))
    assert sorted(file.name for file in (run.folder / "gradients").iterdir()) == [
        "epoch_0002.npz",
        "epoch_0004.npz",
    ]
    per_epoch = run.status()["step"] // 5
    assert read(run, 4)["steps"].tolist() == list(range(2 * per_epoch + 1, 4 * per_epoch + 1))


def test_an_interrupted_run_keeps_its_rows_and_a_resumed_one_adds_to_them(tiny, monkeypatch):
    import os
    import signal

    real, calls = Trainer.train_step, []

    def stop_at_two(self, plan, at):
        calls.append(at)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, plan, at)

    monkeypatch.setattr(Trainer, "train_step", stop_at_two)
    settings = tiny(run="stopped", batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    monkeypatch.undo()
    run = Run(settings.path(settings.output_dir) / "stopped")
    assert read(run, 1)["steps"].tolist() == [1, 2] and "weight_norms" not in read(run, 1)
    train(settings.model_copy(update={"resume": True}))
    per_epoch = run.status()["step"] // 2
    assert read(run, 1)["steps"].tolist() == list(range(1, per_epoch + 1)) and "weight_norms" in read(run, 1)


CORRUPTED = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "another": None,
}


@pytest.mark.parametrize("what", CORRUPTED)
def test_a_damaged_file_is_reported_and_rewritten(tiny, what):
    """What a run interrupted in an epoch left there; a resumed run ends that epoch."""
    trainer, _ = trained(tiny(probe_every=1))
    told = []
    trainer.probe.say = told.append
    file = trainer.probe.end_epoch(1, whole=False)
    if what == "another":
        with np.load(file) as old:
            content = {name: old[name] for name in old.files}
        np.savez_compressed(file, **content | {"norms": content["norms"][:, 1:]})
    else:
        file.write_bytes(CORRUPTED[what](file.read_bytes()))
    (file.parent / "epoch_x.npz").touch()
    report = torch.zeros(1, len(trainer.loss.names) + len(REPORT) + len(trainer.guard.names)).numpy()
    trainer.probe.add([9], report)
    assert trainer.probe.end_epoch(1, whole=False) == file
    (sentence,) = told
    assert "the gradients before step 9 are lost: " in sentence and "epoch_0001.npz is damaged: " in sentence
    with np.load(file) as found:
        assert found["steps"].tolist() == [9]
    (file.parent / "epoch_x.npz").unlink()


def test_what_is_written_is_on_disk_before_it_takes_the_old_ones_place(tiny, monkeypatch):
    from refinelib import files

    trainer, _ = trained(tiny(probe_every=1))
    order, real = [], files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: order.append("fsync"))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append(b.name), real(a, b)))
    trainer.probe.end_epoch(1)
    trainer.evaluate_epoch(0, final=True)
    assert [name for name in order if name != "status.json"] == ["fsync", "epoch_0001.npz"] * 2


def test_thousands_of_steps_stay_small_and_keep_what_stands_out(tmp_path):
    random = np.random.default_rng(0)
    norms = np.exp(random.normal(size=(9000, 179))).astype(np.float32)
    norms[4321, 170] *= 1e4
    skipped = np.zeros(9000, dtype=bool)
    skipped[[5, 7000]] = True
    norms[5] = np.nan
    other = dict(loss=norms[:, 0], components=norms[:, :6])
    kept = probe._thinned({"steps": np.arange(1, 9001), "skipped": skipped, "norms": norms, **other})
    assert 1000 <= len(kept["steps"]) <= probe.ROWS and (np.diff(kept["steps"]) > 0).all()
    assert {6, 4322, 7001} <= set(kept["steps"].tolist())
    np.savez_compressed(tmp_path / "file.npz", **kept)
    assert (tmp_path / "file.npz").stat().st_size < 2.0e6
    everywhere = probe._thinned({"steps": np.arange(1, 9001), "skipped": ~skipped, "norms": norms, **other})
    assert len(everywhere["steps"]) <= probe.ROWS  # a run that skips nearly every step
