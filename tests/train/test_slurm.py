"""The script for Slurm: its syntax, and that torchrun and the package know its options."""

import os
import shlex
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser

from refinelib.config import project_root, resolve

SCRIPT = project_root() / "examples" / "slurm.sh"


def commands(folder: Path, *arguments: str) -> list[list[str]]:
    """What the script starts, with stand-ins for Slurm's own commands that print their arguments."""
    for name, text in {"scontrol": "echo node1; echo node2", "srun": 'printf "%q " "$@"'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "DATA_DIR": "/coco"}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_script_starts_what_torchrun_and_the_package_understand(tmp_path):
    ((program, *options),) = commands(tmp_path, "-p", "resume", "true")
    assert program == "torchrun"
    read = get_args_parser().parse_args(options)
    assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint) == ("2", "4", "node1:29500")
    assert read.module and read.training_script == "refinelib"
    train, flag, recipe, *pairs = read.training_script_args
    assert (train, flag) == ("train", "-f") and pairs[::3] == ["-p"] * 3
    settings = resolve(str(project_root() / recipe), **dict(zip(pairs[1::3], pairs[2::3], strict=True)))
    assert settings.resume and settings.data_dir == "/coco"
    assert settings.batch_size >= 8  # of all processes of both hosts
