"""The two benches that must come out whole, in small: hard kills, and the matrix of faults."""

import importlib.util
import random

import pytest

from refinelib.config import project_root


def bench(name):
    """A file of bench/, by its path: bench is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", project_root() / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_four_hard_kills_lose_nothing(tmp_path, capfd):
    outcome = bench("kill").attack(tmp_path, 4, random.Random(1), epochs=8)
    assert outcome["kills"] == 4 and outcome["equal"] and outcome["damaged_checkpoints"] == 0, outcome
    (run,) = [file.parents[1] for file in tmp_path.glob("hurt*/checkpoints/last.pt")]
    assert not list(run.glob("**/.*.tmp"))


def test_a_comparison_of_killed_runs_can_fail(tmp_path):
    """Epochs that differ in anything but how long they took are told apart."""
    kill = bench("kill")
    assert kill._plain({"epoch": 1, "train_loss": 2.0, "seconds": 1.0}) == kill._plain({"epoch": 1, "train_loss": 2.0, "seconds": 9.0})
    assert kill._plain({"epoch": 1, "train_loss": 2.0}) != kill._plain({"epoch": 1, "train_loss": 2.0000001})
    assert not kill._whole(tmp_path / "nowhere.pt")


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    matrix = bench("fault_matrix")
    return matrix, matrix.column("cpu", "off", "adamw", str(tmp_path_factory.mktemp("matrix")))


def test_every_fault_in_full_precision_is_survived_exact_and_attributed(column):
    matrix, cells = column
    assert [cell["kind"] for cell in cells] == list(matrix.KINDS)
    wrong = [cell for cell in cells if not (cell["survived"] and cell["exact"] and cell["attribution"])]
    assert not wrong
    assert sum(cell["skipped"] for cell in cells) >= sum(bool(skips) for skips in matrix.KINDS.values())
    text = matrix.table(cells, "CPU")
    assert f"{len(cells)} of {len(cells)} cells good" in text and "**not" not in text


def test_the_matrix_notices_what_is_wrong(column):
    """A step that was called skipped and moved something; one that names another place; one that left NaN."""
    matrix, cells = column
    text = matrix.table([{**cells[0], "exact": False}, *cells[1:]], "CPU")
    assert f"{len(cells) - 1} of {len(cells)}" in text and "**not exact**" in text
    skip = dict(kind="skip", message="step 3 skipped", parameters=["stem.0.0.weight"])
    assert matrix.attributed("grad:nan:stem", True, [skip]) and not matrix.attributed("grad:nan:boundary", True, [skip])
    assert not matrix.attributed("grad:nan:stem", True, [])
