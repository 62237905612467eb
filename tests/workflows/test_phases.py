"""Progressive training: the plan, the acceptance checks, real sequences in smoke size, one of them killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refinelib.trainer as loop
from refinelib import checkpoints
from refinelib.config import SettingsError
from refinelib.files import dumps, exclusive
from refinelib.runs import Run, RunError
from refinelib.workflows import checks, phases
from refinelib.workflows.phases import ADDS, from_notebook, plan


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def tiny(tmp_path, stores):
    def made(**keywords):
        small = dict(
            output_dir=str(tmp_path), store_dir=stores, smoke=True, max_images=4, epochs=2, device="cpu"
        )
        return plan(**{**small, **keywords})

    return made


def state_of(folder: Path) -> dict[str, str]:
    return {entry["phase"]: entry["state"] for entry in phases.read(folder)["phases"]}


# -- the plan --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, wanted",
    [
        (None, ["phase1", "phase2", "phase3", "phase4", "finetune"]),
        ([1, 2, "finetune"], ["phase1", "phase2", "finetune"]),
        ("1, 2,fine-tuning", ["phase1", "phase2", "finetune"]),
        ("[2]", ["phase2"]),
        (3, ["phase3"]),
    ],
)
def test_phases_as_people_write_them(tiny, given, wanted):
    assert list(tiny(phases=given).settings) == wanted


def test_each_phase_has_its_own_recipe_and_what_is_given_for_all(tiny, tmp_path):
    made = tiny(epochs=1, lr=1e-5)
    assert {name: settings.recipe for name, settings in made.settings.items()} == {
        name: name for name in ADDS
    }
    assert {(settings.lr, settings.epochs) for settings in made.settings.values()} == {(1e-5, 1)}
    assert {settings.init_from for settings in made.settings.values()} == {None}
    assert (
        made.folder == tmp_path / "progressive"
        and tiny(phase=3, init_from="x").folder == tmp_path / "phase3-alone"
    )


@pytest.mark.parametrize(
    "given, sentence",
    [
        (dict(phases=[5]), "there is no phase 5: give 1, 2, 3, 4 or finetune"),
        (dict(phases=[1, 1]), "each phase once"),
        (
            dict(phase=3),
            "phase3 alone starts from the phase before: give init_from, such as "
            "-p init_from outputs/progressive/phase2",
        ),
        (dict(phase=3, phases=[3]), "give one of the two"),
        (dict(learning_rate=1), "did you mean 'lr'?"),
        (dict(margin=-1), "margin = -1: give an IoU from 0 to 1"),
        (dict(recipe="stable"), "recipe = 'stable': progressive training sets it itself"),
        (dict(name="a/b"), "letters, digits"),
        (dict(phases="9"), "no phase 9"),
        (dict(epochs=0), "epochs = 0"),
    ],
)
def test_what_is_wrong_is_said(tiny, given, sentence):
    with pytest.raises(SettingsError) as caught:
        tiny(**given)
    assert sentence in str(caught.value)


def test_a_notebook_name_space_makes_a_plan(tmp_path):
    given = dict(phases=None, name="mine", margin=0.1, lr=1e-5, output_dir=str(tmp_path), _x=3, In=[])
    made = from_notebook(given)
    assert made.margin == 0.1 and made.folder == tmp_path / "mine" and made.settings["phase1"].lr == 1e-5
    with pytest.raises(SettingsError, match="did you mean 'lr'"):
        from_notebook({"learning_rate": 3})


# -- the acceptance checks -------------------------------------------------------------------------
class Recorded:
    """A run folder with the records that acceptance reads."""

    def __init__(self, folder: Path, losses: list, **status) -> None:
        (folder / "checkpoints").mkdir(parents=True)
        self.run = Run(folder)
        self.run.update(
            **{
                "state": "ok",
                "skipped_steps": 0,
                "step": len(losses),
                "best": {"target_iou": 0.5, "boundary_iou": 0.2},
                **status,
            }
        )
        lines = [{"kind": "step", "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        half = len(losses) // 2
        lines += [
            {"kind": "epoch", "epoch": e, "step": s, "train_loss": losses[s - 1]}
            for e, s in ((1, half), (2, len(losses)))
        ]
        (folder / "metrics.jsonl").write_text("".join(dumps(line) + "\n" for line in lines))

    def weights(self, value: float) -> None:
        content = {"model": {"stem.weight": torch.tensor([1.0, value])}, "average": None}
        checkpoints.save(self.run.folder / "checkpoints" / "last.pt", content)


def wave(start: float, end: float, count: int = 40, noise: float = 0.02) -> list[float]:
    return [start + (end - start) * i / (count - 1) + noise * (-1) ** i for i in range(count)]


@pytest.mark.parametrize(
    "losses, scratch, passed, words",
    [
        (wave(2.0, 1.0), True, True, "the loss fell"),
        (wave(1.0, 2.0), True, False, "the loss rose"),
        (wave(1.0, 1.3), False, False, "the loss rose"),
        (wave(2.0, 2.0), True, False, "is constant"),
        (wave(2.0, 2.0), False, True, "is constant"),
        (wave(2.0, 2.0, noise=0.4), True, True, "within its noise"),
        ([2.0, 1.9], True, False, "too few to tell"),
    ],
)
def test_the_loss_must_fall(losses, scratch, passed, words):
    decision = phases.loss_falling(losses, scratch=scratch)
    assert decision.passed is passed and words in decision.sentence, decision


@pytest.mark.parametrize(
    "before, after, passed",
    [
        (None, (0.1, 0.1), True),
        ((0.5, 0.2), (0.6, 0.3), True),
        ((0.5, 0.2), (0.481, 0.181), True),
        ((0.5, 0.2), (0.47, 0.3), False),
        ((0.5, 0.2), (0.6, 0.17), False),
        ((0.5, 0.2), None, False),
    ],
)
def test_scores_must_not_fall_below_the_margin(before, after, passed):
    named = [dict(zip(("target_iou", "boundary_iou"), pair or (), strict=False)) for pair in (after, before)]
    decision = phases.no_worse(*named, margin=0.02)
    assert decision.passed is passed, decision
    assert passed or "fell by more than 0.02" in decision.sentence


def test_everything_must_be_finite(tmp_path):
    def finite(recorded: Recorded) -> checks.Check:
        return phases.accept(recorded.run, None, margin=0)[0]

    good = Recorded(tmp_path / "good", wave(2, 1))
    good.weights(1.0)
    assert finite(good).passed
    good.weights(float("nan"))
    assert finite(good).sentence == "stem.weight in last.pt is not finite"
    for name, losses, status, words in (
        ("lost", [*wave(2, 1), float("inf")], {}, "the loss of epoch 2"),
        ("skipped", wave(2, 1), {"skipped_steps": 3}, "3 of 40 steps were skipped"),
        (
            "diverged",
            wave(2, 1),
            {"state": "diverged", "last_error": "too many spikes"},
            "diverged: too many spikes",
        ),
    ):
        decision = finite(Recorded(tmp_path / name, losses, **status))
        assert not decision.passed and words in decision.sentence, decision


# -- sequences -------------------------------------------------------------------------------------
KILLED = """
import json, sys
from refinelib.workflows import phases
made = phases.plan(**json.loads(sys.argv[1]))
made.settings["phase2"] = made.settings["phase2"].model_copy(update={"inject": "kill@9"})
phases.run(made)
"""


@pytest.mark.slow
def test_a_killed_sequence_continues_where_it_was(tmp_path, stores, tiny):
    given = dict(output_dir=str(tmp_path), store_dir=stores, smoke=True, max_images=4, epochs=2, device="cpu")
    killing = {**given, "phases": "1,2,3"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, json.dumps(killing)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "progressive"
    assert state_of(folder) == {"phase1": "passed", "phase2": "killed", "phase3": "waiting"}
    with pytest.raises(phases.PhaseError, match="phase2 was killed: run it again to continue"):
        phases.raise_if_failed(folder)
    assert Run(folder).status()["state"] == "killed"
    killed = Run(folder / "phase2")
    per_epoch = killed.status()["steps"] // 2
    assert killed.status()["state"] == "killed" and per_epoch < 9, "killed after the first epoch's checkpoint"
    before = (folder / "phase1" / "metrics.jsonl").read_bytes()

    assert phases.run(tiny(phases="1,2,3")) == folder
    assert set(state_of(folder).values()) == {"passed"}
    assert (folder / "phase1" / "metrics.jsonl").read_bytes() == before, "phase 1 is kept"
    assert {path.name for path in folder.glob("phase*")} == {"phase1", "phase2", "phase3"}
    resumed = Run(folder / "phase2")
    assert any(event["kind"] == "resume" and event["step"] == per_epoch for event in resumed.events())
    assert [line["epoch"] for line in resumed.epochs()] == [1, 2]
    for name, earlier in (("phase2", "phase1"), ("phase3", "phase2")):
        assert Path(Run(folder / name).settings().init_from) == folder / earlier / "checkpoints" / "best.pt"

    whole = phases.run(tiny(phases="1,2,3", name="whole"))  # never killed: the same weights at the end
    a, b = (checkpoints.load(f / "phase3" / "checkpoints" / "last.pt")["model"] for f in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)

    assert json.loads((folder / "status.json").read_text())["state"] == "ok"
    assert "3 of 3 phases accepted" in phases.raise_if_failed(folder)
    assert [run.name for run in phases.runs(folder)] == ["phase1", "phase2", "phase3"]


@pytest.mark.slow
def test_a_rejected_phase_ends_the_sequence_until_the_margin_is_wider(tiny, monkeypatch):
    """A score that collapses: validation is made to give a worse one in phase 2."""
    real = loop.Trainer.validate

    def worse(self, model, **keywords):
        iou = 0.1 if self.run.name.startswith("phase2") else 0.5
        return {**real(self, model, **keywords), "target_iou": iou, "boundary_iou": iou}

    monkeypatch.setattr(loop.Trainer, "validate", worse)
    folder = phases.run(tiny(phases="1,2,3", epochs=1))
    assert state_of(folder) == {"phase1": "passed", "phase2": "rejected", "phase3": "waiting"}
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and status["passed"] == ["phase1"]
    assert "phase2 rejected" in status["last_error"] and "0.500 to 0.100" in status["last_error"]
    with pytest.raises(phases.PhaseError, match="phase2 rejected, no worse than before"):
        phases.raise_if_failed(folder)

    records = (folder / "phase2" / "metrics.jsonl").read_bytes()
    phases.run(tiny(phases="1,2,3", epochs=1))  # the same again trains nothing and says the same
    assert state_of(folder)["phase2"] == "rejected" and not (folder / "phase2-2").exists()
    with pytest.raises(SettingsError, match="in phase1, lr was 5e-06 and is 1e-05"):
        tiny(phases="1,2,3", epochs=1, lr=1e-5)
    phases.run(tiny(phases="1,2,3", epochs=1, margin=1.0))
    assert set(state_of(folder).values()) == {"passed"}, "a wider margin accepts the same run"
    assert (folder / "phase2" / "metrics.jsonl").read_bytes() == records


def test_a_phase_that_fails_is_recorded_and_resumed(tiny, monkeypatch):
    real = loop.Trainer.end_epoch

    def full(self, epoch, started):
        real(self, epoch, started)
        if self.run.name == "phase2":
            raise OSError("No space left on device")

    monkeypatch.setattr(loop.Trainer, "end_epoch", full)
    folder = phases.run(tiny(phases="1,2"))
    assert state_of(folder) == {"phase1": "passed", "phase2": "failed"}
    with pytest.raises(phases.PhaseError, match="phase2 failed, OSError: No space left on device"):
        phases.raise_if_failed(folder)
    monkeypatch.undo()
    phases.run(tiny(phases="1,2"))
    assert state_of(folder) == {"phase1": "passed", "phase2": "passed"}
    assert any(event["kind"] == "resume" for event in Run(folder / "phase2").events())


@pytest.mark.slow
def test_one_phase_alone_starts_from_a_run_anywhere(tiny, tmp_path):
    phases.run(tiny(phases="1", name="first", epochs=1))
    folder = phases.run(tiny(phase=2, init_from="first/phase1", epochs=1))
    assert folder == tmp_path / "phase2-alone" and state_of(folder) == {"phase2": "passed"}
    state = phases.read(folder)
    wanted = Run(tmp_path / "first" / "phase1").status()["best"]
    assert state["before"]["target_iou"] == pytest.approx(wanted["target_iou"], abs=0.02)
    start = Path(Run(folder / "phase2").settings().init_from)
    assert start == tmp_path / "first" / "phase1" / "checkpoints" / "best.pt"
    nowhere = phases.run(tiny(phase=4, init_from="nowhere"))
    with pytest.raises(phases.PhaseError, match="phase4 failed, CheckpointError: there is no run 'nowhere'"):
        phases.raise_if_failed(nowhere)


@pytest.mark.slow
def test_a_first_phase_that_failed_before_a_step_starts_again_as_it_was_meant(tiny, tmp_path):
    nowhere = phases.run(tiny(phase=2, init_from="first/phase1", epochs=1))
    with pytest.raises(phases.PhaseError, match="did you mean .*earlier/phase1"):
        (tmp_path / "earlier" / "phase1").mkdir(parents=True)
        (tmp_path / "earlier" / "phase1" / "status.json").write_text("{}")
        phases.raise_if_failed(phases.run(tiny(phase=2, init_from="first/phase1", epochs=1)))
    first = loop.train(tiny(phase=1, epochs=1).settings["phase1"])
    folder = phases.run(tiny(phase=2, init_from=str(first.folder), epochs=1, lr=1e-4))
    assert folder == nowhere and "1 of 1 phases accepted" in phases.raise_if_failed(folder)
    assert (folder / "phase2").is_dir() and not (folder / "phase2-2").exists()
    assert phases.read(folder)["init_from"] == str(first.folder)


def test_a_finished_sequence_is_continued_and_never_overwritten(tiny):
    first = phases.run(tiny(phases="1", epochs=1))
    assert phases.run(tiny(phases="1", epochs=1)) == first  # nothing to do
    assert tiny(phases="1,2", epochs=1).folder == first, "more phases continue it"
    with pytest.raises(SettingsError, match="in phase1, seed was 0 and is 1; give another name"):
        tiny(phases="1", seed=1, epochs=1)


def test_a_state_of_november_2026_opens(tiny):
    folder = tiny(phases=1).folder
    folder.mkdir(parents=True)
    entry = {
        "phase": "phase1",
        "state": "held",
        "run": "phase1",
        "after": None,
        "settings": {"lr": 1.0},
        "margin": 0.02,
    }
    entry["gate"] = [{"name": "finite", "passed": False, "sentence": "the loss of epoch 1 is not finite"}]
    state = {"name": "progressive", "state": "failed", "init_from": None, "before": None, "phases": [entry]}
    (folder / "progressive.json").write_text(json.dumps(state))
    assert state_of(folder) == {"phase1": "rejected"} and phases.runs(folder) == []
    assert phases.read(folder)["phases"][0]["acceptance"][0]["name"] == "finite"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"state": "ok"}', '{"state": "ok", "init_from": 1, "phases": [{}]}']
)
def test_a_damaged_state_is_named(tiny, content):
    folder = tiny(phases=1).folder
    folder.mkdir(parents=True)
    (folder / "progressive.json").write_text(content)
    for ask in (lambda: phases.read(folder), lambda: tiny(phases=1)):
        with pytest.raises(RunError, match="progressive.json is damaged.*give the sequence another name"):
            ask()


def test_two_processes_do_not_train_one_sequence(tiny):
    made = tiny(phases="1")
    made.folder.mkdir()
    with (
        exclusive(made.folder, RunError("")),
        pytest.raises(RunError, match="another process is training the phases"),
    ):
        phases.run(made)
