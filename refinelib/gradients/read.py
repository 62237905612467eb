"""A run's gradients, read from its folder: norms by parameter and step, and what the probe saw at each epoch's end."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from refinelib.files import by_epoch, read_npz
from refinelib.runs import Run, RunError

_LOOK = ("weight_norms", "update_ratios", "weight_counts", "gradient_counts", "term_norms", "edges")
#: What a file holds, as :func:`refinelib.files.check_arrays` takes it; P, M, T, n as below, E edges, C counts.
_SHAPES = {
    "names": "U P", "modules": "U M", "module_of": "iu P", "terms": "U T", "term_weights": "f T",
    "steps": "iu n", "skipped": "b n", "loss": "f n", "components": "f nT", "norms": "f nP",
    "weight_norms?": "f P", "update_ratios?": "f P", "weight_counts?": "iu MC", "gradient_counts?": "iu MC",
    "term_norms?": "f TP", "edges?": "f E",
}  # fmt: skip
_BY_STEP = ("steps", "epochs", "skipped", "loss", "components", "norms")


@dataclass(frozen=True)
class Gradients:
    """The files of a run's ``gradients/`` as one; see :class:`refinelib.gradients.probe.Probe` for the arrays."""

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


def files(run: Run) -> dict[int, Path]:
    """What a run's probe has written so far, by epoch, the first first."""
    return by_epoch(run.folder / "gradients")


def read_file(file: Path) -> dict[str, np.ndarray]:
    """What the probe wrote at the end of one epoch.

    Raises:
        ValueError: it is damaged, or something else.
    """
    found = read_npz(file, _SHAPES)
    look = [name for name in _LOOK if name in found]
    whole = not look or len(look) == len(_LOOK) and len(found["edges"]) + 1 == found["weight_counts"].shape[1]
    if not whole or not set(found["module_of"].tolist()) <= set(range(len(found["modules"]))):
        raise ValueError(f"{file} is damaged: its arrays do not go together")
    return found


def read(run: Run | str | os.PathLike) -> Gradients:
    """All that a run's probe has written so far; a damaged file is passed over, with a warning.

    Raises:
        RunError: it has written nothing that can be read.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    pieces, looks, damaged = [], {}, []
    for epoch, file in files(run).items():
        try:
            piece = read_file(file)
        except (OSError, ValueError) as error:
            damaged.append(str(error))
            continue
        if pieces and piece["names"].tolist() != pieces[0]["names"].tolist():
            raise RunError(f"{file} is of another model than the first file: its parameters have other names")
        piece["epochs"] = np.full(len(piece["steps"]), epoch)
        pieces.append(piece)
        if _LOOK[0] in piece:
            looks[epoch] = {name: piece[name] for name in _LOOK}
    if not pieces:
        why = "no epoch is over yet, or it was trained with probe_every = 0; train with probe_every = 1"
        raise RunError(f"{run.folder} holds no gradients: {'; '.join(damaged) or why}")
    if damaged:
        warnings.warn(f"gradients were passed over ({len(damaged)}): {'; '.join(damaged)}", stacklevel=2)
    order = np.argsort(np.concatenate([piece["steps"] for piece in pieces]), kind="stable")
    rows = {name: np.concatenate([piece[name] for piece in pieces])[order] for name in _BY_STEP}
    first = pieces[0]
    return Gradients(
        *(first[name].tolist() for name in ("names", "modules")), first["module_of"], first["terms"].tolist(), first["term_weights"],
        looks=looks, **rows,
    )  # fmt: skip
