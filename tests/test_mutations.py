"""Old mistakes, put back one at a time: the contract's tests must notice each."""

import os
import shutil
import sys

import pytest

from refinelib.config import project_root

#: File, line, what replaces it, tests to run, the one that must fail.
MUTATIONS = {
    "an unprotected square root": (
        "geometry.py",
        "(dy.square() + dx.square() + eps * eps).sqrt() - eps",
        "(dy.square() + dx.square()).sqrt()",
        "edge_strength",
        "test_edge_strength_has_a_gradient_everywhere",
    ),
    "a normalisation over the batch": (
        "refinements.py",
        "        undecided = 4 * probs",
        "        edges = edges / edges.max()\n        undecided = 4 * probs",
        "refinement_of_a_sample",
        "test_refinement_of_a_sample_does_not_depend_on_the_batch[boundary",
    ),
    "a sigmoid too many": (
        "losses.py",
        "    logits = to_float32(contour_logits)\n",
        "    logits = torch.sigmoid(to_float32(contour_logits))\n",
        "perfect_costs_nothing and contour",
        "test_perfect_costs_nothing_and_worse_costs_more[contour",
    ),
    "an absent class in Dice": (
        "losses.py",
        "    present = (size > 0).to(probs.dtype)\n",
        "    present = torch.ones_like(size)\n",
        "absent_class",
        "test_an_absent_class_neither_costs_nor_pulls_in_dice",
    ),
    "a clamp in place of a cap": (
        "losses.py",
        "    return cost * (cap / cost.detach().clamp(min=cap))",
        "    return cost.clamp(max=cap)",
        "cap_holds",
        "test_cap_holds_the_value_and_keeps_the_gradients_direction",
    ),
    "a value read back from the device": (
        "losses.py",
        "    size = truth.sum(-1)\n",
        "    size = truth.sum(-1)\n    if size.sum().item() == 0:\n        return size\n",
        "read_back and dice",
        "test_nothing_is_read_back[dice]",
    ),
    "a one-sided contour": (
        "geometry.py",
        "    return signed.abs() < radius",
        "    return (signed > 0) & (signed < radius)",
        "symmetric",
        "test_signed_distance_and_band_are_symmetric",
    ),
}


def run_contract(folder, chosen):
    """Exit status and report of contract tests of a copy of the package, in a child that has torch."""
    child = os.fork()
    if child == 0:
        out = os.open(folder / "report.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 (until the child ends)
        here = (str(project_root() / "refinelib"), str(project_root() / "tests"))
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(here):
                del sys.modules[name]
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.chdir(folder)
        file = str(folder / "tests" / "modeling" / "test_contract.py")
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--rootdir",
            str(folder),
            "-c",
            "/dev/null",
        ]
        status = pytest.main([*options, file, "-k", chosen])
        sys.stdout.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder / "report.txt").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_notices(name, tmp_path):
    file, right, wrong, chosen, expected = MUTATIONS[name]
    for folder in ("refinelib", "tests", "params"):
        shutil.copytree(
            project_root() / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    target = tmp_path / "refinelib" / "modeling" / file
    source = target.read_text()
    assert source.count(right) == 1, "the line to change has moved: write it here as it is"
    target.write_text(source.replace(right, wrong))
    status, report = run_contract(tmp_path, chosen)
    failed = [line for line in report.splitlines() if line.startswith("FAILED")]
    assert status == 1 and any(expected in line for line in failed), (status, report[-2000:])
