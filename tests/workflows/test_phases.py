"""Progressive training: the plan, the gates, and real chains in smoke size, one of them killed in phase 3."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import refinelib.trainer as loop
from refinelib import checkpoints
from refinelib.config import SettingsError, project_root
from refinelib.plots import phases as phases_plots
from refinelib.runs import Run, RunError, dumps
from refinelib.workflows import gates, phases
from refinelib.workflows.phase_plan import ADDS, from_notebook, plan


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def tiny(tmp_path, stores):
    def made(**keywords):
        small = dict(output_dir=str(tmp_path), store_dir=stores, smoke=True, max_images=4, epochs=2, device="cpu")
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


def test_each_phase_has_its_own_recipe_and_what_is_given_for_it(tiny, tmp_path):
    made = tiny(epochs=1, lr=1e-5, per_phase="{3: {lr: 2e-5}, finetune: {epochs: 2}}")
    assert {name: settings.recipe for name, settings in made.settings.items()} == {name: name for name in ADDS}
    assert [settings.lr for settings in made.settings.values()] == [1e-5, 1e-5, 2e-5, 1e-5, 1e-5]
    assert [settings.epochs for settings in made.settings.values()] == [1, 1, 1, 1, 2]
    assert {settings.init_from for settings in made.settings.values()} == {None}
    assert made.folder == tmp_path / "progressive" and tiny(phase=3, init_from="x").folder == tmp_path / "phase3-alone"


@pytest.mark.parametrize(
    "given, sentence",
    [
        (dict(phases=[5]), "there is no phase 5: give 1, 2, 3, 4 or finetune"),
        (dict(phases=[1, 1]), "each phase once"),
        (dict(phase=3), "phase3 alone starts from the phase before: give init_from, such as -p init_from outputs/phase2"),
        (dict(phase=3, phases=[3]), "give one of the two"),
        (dict(learning_rate=1), "did you mean 'lr'?"),
        (dict(margin=-1), "margin = -1: give an IoU from 0 to 1"),
        (dict(recipe="stable"), "recipe = 'stable': progressive training sets it itself"),
        (dict(name="a/b"), "letters, digits"),
        (dict(per_phase={"phase9": {}}), "no phase 'phase9'"),
        (dict(phases=[1], per_phase={2: {"lr": 1}}), "none of the phases to train"),
        (dict(per_phase="phase3"), "write {phase3: {epochs: 40}}"),
        (dict(per_phase={3: {"epochs": 0}}), "epochs = 0"),
    ],
)
def test_what_is_wrong_is_said(tiny, given, sentence):
    with pytest.raises(SettingsError) as caught:
        tiny(**given)
    assert sentence in str(caught.value)


def test_a_notebook_name_space_makes_a_plan_without_torch(tmp_path):
    code = (
        "import sys; from refinelib.workflows.phase_plan import from_notebook, describe\n"
        f"phases, phase, name, margin, lr, output_dir, _x, In = None, None, 'mine', 0.1, 1e-5, {str(tmp_path)!r}, 3, []\n"
        "made = from_notebook(globals()); print(describe(made)); assert 'torch' not in sys.modules and made.margin == 0.1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "lr 1e-05" in done.stdout, done.stderr
    with pytest.raises(SettingsError, match="did you mean 'lr'"):
        from_notebook({"learning_rate": 3})


# -- the gates -------------------------------------------------------------------------------------
class Recorded:
    """A run folder with the records that a gate reads."""

    def __init__(self, folder: Path, losses: list, **status) -> None:
        (folder / "checkpoints").mkdir(parents=True)
        self.run = Run(folder)
        self.run.update(**{"state": "ok", "skipped_steps": 0, "step": len(losses), "best": {"target_iou": 0.5, "boundary_iou": 0.2}, **status})
        lines = [{"kind": "step", "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        half = len(losses) // 2
        lines += [{"kind": "epoch", "epoch": e, "step": s, "train_loss": losses[s - 1]} for e, s in ((1, half), (2, len(losses)))]
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
        (wave(2.0, 2.0), True, False, "stands still"),
        (wave(2.0, 2.0), False, True, "stands still"),
        (wave(2.0, 2.0, noise=0.4), True, True, "too few steps to tell"),
        ([2.0, 1.9], True, False, "too few to tell"),
    ],
)
def test_the_loss_must_fall(tmp_path, losses, scratch, passed, words):
    decision = gates.falling(Recorded(tmp_path / "run", losses).run, scratch=scratch)
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
    named = [None if pair is None else dict(zip(("target_iou", "boundary_iou"), pair)) for pair in (after, before)]
    decision = gates.no_worse(*named, margin=0.02)
    assert decision.passed is passed, decision
    assert passed or "fell by more than 0.02" in decision.sentence


def test_everything_must_be_finite(tmp_path):
    good = Recorded(tmp_path / "good", wave(2, 1))
    good.weights(1.0)
    assert gates.finite(good.run).passed
    good.weights(float("nan"))
    assert "1 weights in last.pt are not finite, first stem.weight" in gates.finite(good.run).sentence
    for name, losses, status, words in (
        ("lost", [*wave(2, 1), float("inf")], {}, "the loss of epoch 2"),
        ("skipped", wave(2, 1), {"skipped_steps": 3}, "3 of 40 steps were skipped"),
        ("diverged", wave(2, 1), {"state": "diverged", "last_error": "too many spikes"}, "diverged: too many spikes"),
    ):
        decision = gates.finite(Recorded(tmp_path / name, losses, **status).run)
        assert not decision.passed and words in decision.sentence, decision


# -- chains ----------------------------------------------------------------------------------------
KILLED = "import sys, json; from refinelib.workflows import phases; from refinelib.workflows.phase_plan import plan; phases.advance(plan(**json.loads(sys.argv[1])))"


def test_killed_in_phase_3_the_chain_goes_on_where_it_was(tmp_path, stores, tiny):
    given = dict(output_dir=str(tmp_path), store_dir=stores, smoke=True, max_images=4, epochs=2, device="cpu")
    spoilt = {**given, "per_phase": {"phase3": {"inject": "kill@6"}}}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(spoilt)], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "progressive"
    assert state_of(folder) == {"phase1": "passed", "phase2": "passed", "phase3": "running", "phase4": "waiting", "finetune": "waiting"}
    killed = Run(folder / "phase3")
    per_epoch = killed.status()["steps"] // 2
    assert killed.status()["state"] == "running" and per_epoch < 6, "killed after the first epoch's checkpoint"
    before = {name: (folder / name / "metrics.jsonl").read_bytes() for name in ("phase1", "phase2")}

    assert phases.advance(tiny()) == folder
    assert set(state_of(folder).values()) == {"passed"}
    assert before == {name: (folder / name / "metrics.jsonl").read_bytes() for name in before}, "phases 1 and 2 are kept"
    assert {path.name for path in folder.glob("phase*")} == {"phase1", "phase2", "phase3", "phase4"}
    resumed = Run(folder / "phase3")
    assert any(event["kind"] == "resume" and event["step"] == per_epoch for event in resumed.events())
    assert [line["epoch"] for line in resumed.epochs()] == [1, 2]
    for name, earlier in (("phase2", "phase1"), ("phase3", "phase2"), ("phase4", "phase3"), ("finetune", "phase4")):
        assert Path(Run(folder / name).settings().init_from) == folder / earlier / "checkpoints" / "best.pt"

    whole = phases.advance(tiny(name="whole"))  # one that was never killed ends with the very same weights
    a, b = (checkpoints.load(f / "finetune" / "checkpoints" / "last.pt")["model"] for f in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)

    assert json.loads((folder / "status.json").read_text())["state"] == "ok"
    assert "5 of 5 phases passed" in phases.conclude(folder)
    table = phases.table(folder).splitlines()
    assert len(table) == 7 and all("passed" in line for line in table[2:]) and "(+" in table[3]
    assert "5 of 5 phases passed" in phases_plots.all_phases(folder)._suptitle.get_text()
    assert len(phases_plots.masks(folder, count=2).axes) == 2 * 7


def test_a_phase_held_at_its_gate_stops_the_chain_and_can_be_tried_again(tiny, monkeypatch):
    """A score that collapses: validation is made to tell a worse one in phase 2."""
    real = loop.Trainer.validate

    def worse(self, **keywords):
        found = real(self, **keywords)
        compute = found.compute
        iou = 0.1 if self.run.name == "phase2" else 0.5
        found.compute = lambda: {**compute(), "target_iou": iou, "boundary_iou": iou}
        return found

    monkeypatch.setattr(loop.Trainer, "validate", worse)
    folder = phases.advance(tiny(phases="1,2,3"))
    assert state_of(folder) == {"phase1": "passed", "phase2": "held", "phase3": "waiting"}
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and status["passed"] == ["phase1"]
    assert "phase2 did not pass its gate" in status["last_error"] and "0.500 to 0.100" in status["last_error"]
    with pytest.raises(phases.PhaseError, match="phase2 did not pass its gate, no worse than before"):
        phases.conclude(folder)
    assert "held: no worse than before" in phases.table(folder)
    assert "failed, 1 of 3" in phases_plots.all_phases(folder)._suptitle.get_text()

    phases.advance(tiny(phases="1,2,3"))  # the same again trains nothing and says the same
    assert state_of(folder)["phase2"] == "held" and not (folder / "phase2-2").exists()
    with pytest.raises(SettingsError, match="in phase2, lr was 5e-06 and is 1e-05"):
        tiny(phases="1,2,3", per_phase={"phase2": {"lr": 1e-5}})
    phases.advance(tiny(phases="1,2,3", retry=True, per_phase={"phase2": {"lr": 1e-5}}))
    assert set(state_of(folder).values()) == {"passed"} and (folder / "phase2").is_dir()
    assert Run(folder / "phase2-2").settings().lr == 1e-5
    assert Path(Run(folder / "phase3").settings().init_from).parts[-3] == "phase2-2"


def test_a_gate_that_is_made_wider_lets_the_same_run_through(tiny, monkeypatch):
    monkeypatch.setattr(gates, "falling", lambda run, scratch: gates.Decision("loss falling", True, ""))
    folder = phases.advance(tiny(phases="1"))
    state = phases.read(folder)
    state["phases"][0]["after"] = {"target_iou": 1.0, "boundary_iou": 1.0, "miou": 1.0}
    (folder / "progressive.json").write_text(json.dumps(state))
    phases.advance(tiny(phases="1,2"))
    assert state_of(folder)["phase2"] == "held"
    records = (folder / "phase2" / "metrics.jsonl").read_bytes()
    phases.advance(tiny(phases="1,2", margin=1.0))
    assert state_of(folder)["phase2"] == "passed" and (folder / "phase2" / "metrics.jsonl").read_bytes() == records


def test_a_phase_that_breaks_off_is_told_and_taken_up(tiny, monkeypatch):
    real = loop.Trainer.end_epoch

    def full(self, epoch, started):
        real(self, epoch, started)
        if self.run.name == "phase2":
            raise OSError("No space left on device")

    monkeypatch.setattr(loop.Trainer, "end_epoch", full)
    folder = phases.advance(tiny(phases="1,2"))
    assert state_of(folder) == {"phase1": "passed", "phase2": "failed"}
    with pytest.raises(phases.PhaseError, match="phase2 broke off, OSError: No space left on device"):
        phases.conclude(folder)
    monkeypatch.undo()
    phases.advance(tiny(phases="1,2"))
    assert state_of(folder) == {"phase1": "passed", "phase2": "passed"}
    assert any(event["kind"] == "resume" for event in Run(folder / "phase2").events())


def test_one_phase_alone_starts_from_a_run_anywhere(tiny, tmp_path):
    phases.advance(tiny(phases="1,2", name="first"))
    folder = phases.advance(tiny(phase=3, init_from="first/phase2"))
    assert folder == tmp_path / "phase3-alone" and state_of(folder) == {"phase3": "passed"}
    state = phases.read(folder)
    wanted = Run(tmp_path / "first" / "phase2").status()["best"]
    assert state["before"]["target_iou"] == pytest.approx(wanted["target_iou"], abs=0.02)
    assert Path(Run(folder / "phase3").settings().init_from) == tmp_path / "first" / "phase2" / "checkpoints" / "best.pt"
    nowhere = phases.advance(tiny(phase=4, init_from="nowhere"))
    with pytest.raises(phases.PhaseError, match="phase4 broke off, CheckpointError: there is no run 'nowhere'"):
        phases.conclude(nowhere)


def test_a_finished_chain_is_shown_and_another_gets_the_next_number(tiny, tmp_path):
    first = phases.advance(tiny(phases="1"))
    assert phases.advance(tiny(phases="1")) == first  # nothing to do
    other = phases.advance(tiny(phases="1", seed=1))
    assert (first.name, other.name) == ("progressive", "progressive-2")
    assert Run(first / "phase1").settings().seed == 0 and Run(other / "phase1").settings().seed == 1
    longer = phases.advance(tiny(phases="1,2", seed=1))
    assert longer == other and state_of(other) == {"phase1": "passed", "phase2": "passed"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "ok"}'])
def test_a_damaged_record_of_a_chain_is_said_in_a_sentence(tiny, content):
    folder = tiny(phases=1).folder
    folder.mkdir(parents=True)
    (folder / "progressive.json").write_text(content)
    for ask in (lambda: phases.read(folder), lambda: tiny(phases=1)):
        with pytest.raises(RunError, match="progressive.json is damaged.*give the chain another name"):
            ask()


def test_two_processes_do_not_train_one_chain(tiny):
    made = tiny(phases="1")
    made.folder.mkdir()
    with phases._alone(made.folder), pytest.raises(RunError, match="another process is training the phases"):
        phases.advance(made)


def test_the_notebook_draws_what_there_is_and_fails_in_its_last_cell(tmp_path):
    """Every loss of phase 1 is NaN: held at the gate, the figures drawn all the same."""
    where = ("-p", "output_dir", tmp_path, "-p", "inject", "loss:nan@1:always", "-p", "max_images", 3, "-p", "phases", "1,2")
    command = [sys.executable, "-m", "papermill", "notebooks/progressive.ipynb", tmp_path / "out.ipynb", *where]
    environment = {**os.environ, "REFINELIB_SMOKE": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=project_root(), env=environment, timeout=200)
    assert done.returncode != 0
    assert re.search(r"none of \d+ steps were applied", done.stderr), done.stderr
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    failed = [cell.id for cell in cells if any(item.output_type == "error" for item in cell.get("outputs", []))]
    assert failed == [cells[-1].id] == ["verdict"]
    assert {file.stem for file in (tmp_path / "progressive" / "figures").iterdir()} == {"all_phases", "masks"}
    status = json.loads((tmp_path / "progressive" / "status.json").read_text())
    assert status["state"] == "failed" and "phase1 broke off" in status["last_error"]
