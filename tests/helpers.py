"""What several test files use: runs made by hand, notebooks run headless, benches loaded by path."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from refinelib import checkpoints, resolve
from refinelib.config import project_root
from refinelib.files import dumps
from refinelib.runs import Run


def final_weights(run):
    return checkpoints.load(run.folder / "checkpoints" / "last.pt")["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@functools.cache
def bench(name):
    """A file of bench/, by its path: bench is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", project_root() / "bench" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the compiler looks it up there
    spec.loader.exec_module(module)
    return module


def read(path: Path):
    import nbformat  # not on machines that only train

    return nbformat.read(path, as_version=4)


def papermill(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """The literal command line, in smoke size, with one thread: tests run side by side."""
    environment = {**os.environ, "REFINELIB_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "papermill", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


NAMES = ("ce", "dice", "active_contour", "boundary_aware", "contour", "distance")


def make_run(
    folder: Path,
    *,
    epochs: int = 3,
    per_epoch: int = 60,
    state: str = "ok",
    bad_from: int | None = None,
    skips: tuple[int, ...] = (),
    canvas: tuple[int, int] = (32, 32),
    size: tuple[int, int] = (32, 32),
    **settings,
) -> Run:
    """A run folder as the trainer writes it, with known numbers in it."""
    random = np.random.default_rng(0)
    (folder / "samples").mkdir(parents=True)
    chosen = resolve(**{"output_dir": str(folder.parent), **settings})
    (folder / "config.json").write_text(dumps({"settings": chosen.model_dump(mode="json")}))
    total = epochs * per_epoch
    lines = []
    for step in range(10, total + 1, 10):
        lost = bad_from is not None and step >= bad_from
        level = math.nan if lost else 1 + 20 * math.exp(-step / 30)
        parts = {name: 2.0**-i * level for i, name in enumerate(NAMES)}
        norm = math.inf if lost else 5 * math.exp(3 * random.random())
        common = {"step": step, "losses": parts, "grad_norm": norm, "grad_norm_max": norm * 3}
        line = {"kind": "step", "epoch": (step - 1) // per_epoch + 1, "loss": sum(parts.values()), **common}
        scale = 2.0 ** (16 - len([s for s in skips if s < step]))
        lines.append(
            {**line, "lr": 1e-5 * math.sin(math.pi * step / total), "loss_scale": scale, "skipped": 0}
        )
        if step % per_epoch == 0:
            e = step // per_epoch
            scores = {"target_iou": 0.9 - 0.5 / e, "miou": 0.5, "iou": [0.8, 0.7, None]}
            scores["boundary_iou"] = math.nan if lost else 0.6 - 0.5 / e
            lines.append(
                {"kind": "epoch", "epoch": e, "train_loss": sum(parts.values()), "metrics": scores, **common}
            )
            write_samples(folder, e, canvas, size)
    (folder / "metrics.jsonl").write_text("".join(dumps(line) + "\n" for line in lines))
    events = [{"kind": "skip", "step": step, "epoch": 0, "message": f"step {step} skipped"} for step in skips]
    (folder / "events.jsonl").write_text("".join(dumps(event) + "\n" for event in events))
    status = {"state": state, "epoch": epochs, "epochs": epochs, "step": total, "skipped_steps": len(skips)}
    (folder / "status.json").write_text(json.dumps(status))
    return Run(folder)


def write_samples(
    folder: Path, epoch: int, canvas: tuple[int, int], size: tuple[int, int], count: int = 12
) -> None:
    random = np.random.default_rng(epoch)
    y, x = np.mgrid[: canvas[0], : canvas[1]] / np.array(canvas)[:, None, None]
    labels = np.where((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1, 1, np.where(x > 0.8, 2, 0))
    probs = np.stack([np.roll(labels, 2, axis=1) == value for value in range(3)]).astype(np.float16)
    np.savez_compressed(
        folder / "samples" / f"epoch_{epoch:04d}.npz",
        image=random.integers(0, 255, (count, *canvas, 3), dtype=np.uint8),
        labels=np.repeat(labels[None], count, 0).astype(np.uint8),
        probs=np.repeat(probs[None], count, 0),
        target_iou=np.linspace(0, 1, count, dtype=np.float32),
        roi=np.arange(count),
        image_id=np.arange(count) + 397133,
        annotation_id=np.arange(count),
        kind=np.array((["worst", "median", "best"] * count)[:count]),
        mask_size=np.array(size),
    )
