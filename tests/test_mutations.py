"""Old mistakes, put back one at a time: the contract's tests must notice each."""

import os
import shutil
import subprocess
import sys

import pytest

from refinelib.config import project_root

MUTATIONS = {
    "an unprotected square root": (
        "modeling/geometry.py", "(dy.square() + dx.square() + eps * eps).sqrt() - eps", "(dy.square() + dx.square()).sqrt()",
        "edge_strength or (bounded_gradient and active_contour)", "test_edge_strength_has_a_gradient_everywhere",
    ),
    "a normalisation over the batch": (
        "modeling/refinements.py", "        undecided = 4 * probs", "        edges = (edges - edges.min()) / (edges.max() - edges.min() + 1e-6)\n        undecided = 4 * probs",
        "depend_on_the_batch", "test_refinement_of_a_sample_does_not_depend_on_the_batch[BoundaryRefinement",
    ),
    "a sigmoid too many": (
        "modeling/losses.py", "    logits = to_float32(contour_logits)\n", "    logits = torch.sigmoid(to_float32(contour_logits))\n",
        "perfect_costs_nothing", "test_perfect_costs_nothing_and_worse_costs_more[contour_head]",
    ),
    "an absent class in Dice": (
        "modeling/losses.py", "    present = (size > 0).to(probs.dtype)\n", "    present = torch.ones_like(size)\n",
        "perfect_costs_nothing or absent_class", "test_an_absent_class_neither_costs_nor_pulls_in_dice",
    ),
    "a clamp in place of a cap": (
        "modeling/losses.py", "    return cost * (cap / cost.detach().clamp(min=cap))", "    return cost.clamp(max=cap)",
        "cap_holds", "test_cap_holds_the_value_and_keeps_the_gradients_direction",
    ),
    "a value read back from the device": (
        "modeling/losses.py", "    size = truth.sum(-1)\n", "    size = truth.sum(-1)\n    if size.sum().item() == 0:\n        return size\n",
        "read_back and dice", "test_nothing_is_read_back[dice]",
    ),
    "a one-sided contour": (
        "modeling/geometry.py", "    return signed.abs() < radius", "    return (signed > 0) & (signed < radius)",
        "symmetric", "test_signed_distance_and_band_are_symmetric",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_notices(name, tmp_path):
    file, right, wrong, chosen, expected = MUTATIONS[name]
    for folder in ("refinelib", "tests", "params"):
        shutil.copytree(project_root() / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "refinelib" / file
    source = target.read_text()
    assert source.count(right) == 1, "the line to spoil has moved: say where it is now"
    target.write_text(source.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", chosen]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any(expected in line for line in failed), (failed, done.stdout[-2000:])
