"""A run's gradients, read from its folder: norms by parameter and step, and what the probe saw at each epoch's end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from refinelib.runs import Run, RunError

_LOOK = ("weight_norms", "update_ratios", "weight_counts", "gradient_counts", "term_norms", "edges")
_BY_STEP = ("steps", "epochs", "skipped", "loss", "components", "norms")


@dataclass(frozen=True)
class Gradients:
    """The files of a run's ``gradients/`` as one; see :class:`refinelib.probe.Probe` for the arrays."""

    names: list[str]  # [P] parameters
    modules: list[str]  # [M] parts of the model, in the order they are used
    module_of: np.ndarray  # int64 [P]
    terms: list[str]  # [T] loss terms
    term_weights: np.ndarray  # float32 [T]
    steps: np.ndarray  # int64 [n], rising
    epochs: np.ndarray  # int64 [n]: epoch of the file a step is in
    skipped: np.ndarray  # bool [n]
    loss: np.ndarray  # float32 [n]
    components: np.ndarray  # float32 [n, T]
    norms: np.ndarray  # float32 [n, P]
    looks: dict[int, dict[str, np.ndarray]]  # the closer look by epoch

    def select(self, layers: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Rows to show and the parameters (places) in each.

        Args:
            layers: none or ``modules``: one row a module; ``all``: one row a layer; else names or beginnings of names
                (a list, or a text with commas), and one row a layer that begins so.

        Raises:
            ValueError: no parameter begins so; the sentence names what there is.
        """
        if layers in (None, "modules", [], ()):
            return {module: np.flatnonzero(self.module_of == i) for i, module in enumerate(self.modules)}
        wanted = [word.strip() for word in layers.split(",")] if isinstance(layers, str) else list(layers)
        chosen = [i for i, name in enumerate(self.names) if wanted == ["all"] or any(name.startswith(word) for word in wanted)]
        unknown = [word for word in wanted if word != "all" and not any(name.startswith(word) for name in self.names)]
        if unknown:
            known = ", ".join(self.modules)
            raise ValueError(f"layers: no layer begins with {unknown[0]!r}; give modules, all, or beginnings such as {known}")
        rows: dict[str, list[int]] = {}
        for i in chosen:
            layer, _, kind = self.names[i].rpartition(".")
            rows.setdefault(layer if kind in ("weight", "bias") else self.names[i], []).append(i)
        return {name: np.array(places) for name, places in rows.items()}

    def of(self, places: np.ndarray) -> np.ndarray:
        """L2 norm of the gradient of some parameters together by step, float64 ``[n]``."""
        return np.sqrt((self.norms[:, places].astype(np.float64) ** 2).sum(axis=1))

    def shares(self, epoch: int) -> np.ndarray:
        """Share of each loss term in each module's gradient, float64 ``[T, M]``: its gradient's norm over the sum of all terms' norms."""
        norms = self.looks[epoch]["term_norms"].astype(np.float64) ** 2
        by_module = np.sqrt(np.stack([norms[:, self.module_of == i].sum(axis=1) for i in range(len(self.modules))], axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return by_module / by_module.sum(axis=0)


def files(run: Run) -> list[Path]:
    """What a run's probe has written so far, a file an epoch, the oldest first."""
    return sorted((run.folder / "gradients").glob("epoch_*.npz"))


def read(run: Run | str | os.PathLike) -> Gradients:
    """All that a run's probe has written so far.

    Raises:
        RunError: it has written nothing.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    written = files(run)
    if not written:
        why = "no epoch is over yet, or it was trained with probe_every = 0; train with probe_every = 1"
        raise RunError(f"{run.folder} holds no gradients: {why}")
    pieces, looks = [], {}
    for file in written:
        with np.load(file, allow_pickle=False) as opened:
            piece = {name: opened[name] for name in opened.files}
        if pieces and piece["names"].tolist() != pieces[0]["names"].tolist():
            raise RunError(f"{file} is of another model than {written[0].name}: its parameters have other names")
        epoch = int(file.stem.rpartition("_")[2])
        piece["epochs"] = np.full(len(piece["steps"]), epoch)
        pieces.append(piece)
        if "term_norms" in piece:
            looks[epoch] = {name: piece[name] for name in _LOOK}
    order = np.argsort(np.concatenate([piece["steps"] for piece in pieces]), kind="stable")
    rows = {name: np.concatenate([piece[name] for piece in pieces])[order] for name in _BY_STEP}
    first = pieces[0]
    return Gradients(
        *(first[name].tolist() for name in ("names", "modules")), first["module_of"], first["terms"].tolist(), first["term_weights"],
        looks=looks, **rows,
    )  # fmt: skip
