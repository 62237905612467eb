"""A fault on one of two processes: both skip the step, bit for bit, and the log names fault and process."""

import pytest
from helpers import bench


@pytest.mark.slow
@pytest.mark.parametrize(
    "amp", ["off", "bf16"]
)  # float16 takes a CPU minutes; two GPUs have it in bench/safety.md
def test_every_fault_on_one_rank_is_survived_exact_and_attributed(amp, tmp_path):
    matrix = bench("fault_matrix")
    cells = matrix.launched("cpu", amp, "adamw, 2 ranks", str(tmp_path))
    assert [cell["kind"] for cell in cells] == list(matrix.KINDS)
    assert not [cell for cell in cells if not matrix.good(cell)]
    assert sum(cell["skipped"] for cell in cells) >= sum(bool(skips) for skips in matrix.KINDS.values())
    apart = {**cells[0], "alike": False}
    assert "**not alike**" in matrix.table([apart], "CPU")
