"""A run's gradient norms by parameter and step, written while it trains and read back.

The norms come from the steps' own reports, so they cost nothing. The statistics of an epoch (weights,
updates, histograms, the share of each loss term) read the optimizer's state and run one training batch
forward and, term by term, backward through ``torch.autograd.grad``. No ``.grad``, moment, weight or random
state is touched: a run is bit for bit the same with and without the probe.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinelib.build import forward
from refinelib.files import by_epoch, read_npz, replacing
from refinelib.guard.diagnose import gradients
from refinelib.guard.guard import REPORT
from refinelib.guard.measure import sizes
from refinelib.runs import Run, RunError
from refinelib.step import Say, Stepper

Arrays = dict[str, NDArray[Any]]

#: Steps kept in a file, at most: every k-th, those that were skipped and those that stand out.
ROWS = 2000
#: Edges of the histograms: powers of ten of a magnitude, four bins a decade.
EDGES = np.linspace(-12.0, 4.0, 65)
#: ROIs of the batch whose gradient is divided by loss term, at most.
BATCH = 4
#: What a file holds, as :func:`refinelib.files.check_arrays` takes it: of the model, of each step and of the
#: whole epoch; P, M, T, n as in Gradients, E edges, C counts.
MODEL = {"names": "U P", "modules": "U M", "module_of": "iu P", "terms": "U T", "term_weights": "f T"}
BY_STEP = {"steps": "iu n", "skipped": "b n", "loss": "f n", "components": "f nT", "norms": "f nP"}
STATISTICS = {
    **{"weight_norms": "f P", "update_ratios": "f P", "term_norms": "f TP", "edges": "f E"},
    **{"weight_counts": "iu MC", "gradient_counts": "iu MC"},
}


# -- written while the run trains ------------------------------------------------------------------------
class Probe:
    """Collects a run's gradient norms and writes ``gradients/epoch_0001.npz`` and so on.

    A file holds the arrays of :class:`Gradients` for the steps since the last file; the statistics where the
    epoch was seen whole.

    Args:
        folder: where files go; made with the first of them.
        stepper: takes the run's steps. Its loader's first micro-batch of its first epoch gives the statistics
            of each epoch.
        every: epochs between files; 0: the probe does nothing.
        say: called with a sentence about an earlier file that is passed over.
    """

    def __init__(self, folder: Path, stepper: Stepper, *, every: int, say: Say) -> None:
        self.stepper, self.guard, self.loss = stepper, stepper.guard, stepper.loss
        self.folder, self.every, self.say = folder, every, say
        tops = [name.split(".")[0] for name in self.guard.names]
        self.modules = list(dict.fromkeys(tops))
        self.module_of = np.array([self.modules.index(top) for top in tops])
        self.steps, self.reports = list[int](), list[NDArray[np.float32]]()

    def add(self, steps: list[int], reports: NDArray[Any]) -> None:
        """Take the reports of some steps: float ``[n, T + len(REPORT) + P]``, loss components first."""
        if self.every:
            self.steps += steps
            self.reports += list(reports.astype(np.float32))

    def rewind(self, step: int) -> None:
        """Drop what was collected of the steps after this one: they are repeated."""
        kept = sum(each <= step for each in self.steps)
        del self.steps[kept:], self.reports[kept:]

    def end_epoch(self, epoch: int, *, whole: bool = True) -> Path | None:
        """Write what there is, after every so many epochs and after the last step of an interrupted one.

        Args:
            epoch: counted from 1.
            whole: False: the run stops inside this epoch. Only the norms so far are kept, and a resumed run
                adds to them.

        Raises:
            OSError: it cannot be written; the norms wait for the next file.
        """
        if not self.every or not self.steps or (whole and epoch % self.every):
            return None
        terms = self.loss.names
        rows = np.stack(self.reports)
        components, reports, norms = np.split(rows, [len(terms), len(terms) + len(REPORT)], axis=1)
        columns = dict(zip(REPORT, reports.T, strict=True))
        weights = np.array([self.loss.weights[name] for name in terms], dtype=np.float32)
        lists = {"names": self.guard.names, "modules": self.modules, "terms": terms, "steps": self.steps}
        content = {name: np.array(values) for name, values in lists.items()}
        content |= {"module_of": self.module_of, "term_weights": weights, "components": components}
        content |= {"loss": columns["loss"], "skipped": columns["skipped"] > 0, "norms": norms}
        if whole:
            content |= self.epoch_statistics(float(columns["grad_norm"][-1]))
        file = self.folder / f"epoch_{epoch:04d}.npz"
        self.folder.mkdir(exist_ok=True)
        for number, later in by_epoch(self.folder).items():
            if number > epoch:  # from before a resume that took the run back
                later.unlink(missing_ok=True)
        if file.is_file():
            earlier = self._earlier(file, content)
            content |= {name: np.concatenate([earlier[name], content[name]]) for name in BY_STEP}
        with replacing(file, "wb") as half:
            np.savez_compressed(half, allow_pickle=False, **_thinned(content))
        self.steps, self.reports = [], []
        return file

    def epoch_statistics(self, grad_norm: float) -> Arrays:
        """Weights, updates, histograms and loss terms as they stand.

        Args:
            grad_norm: L2 norm of the last step's gradient. The guard clipped it in place, and it is shown as
                it was.
        """
        parameters = self.guard.parameters
        with torch.no_grad():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            factor = grad_norm / sizes(grads)[0].norm()
            factor = factor.where(factor.isfinite(), 1.0)
            found = {
                "weight_norms": sizes(parameters)[0],
                "update_ratios": update_sizes(self.guard.optimizer, parameters),
                "weight_counts": self._counts(parameters),
                "gradient_counts": self._counts([grad * factor for grad in grads]),
                "term_norms": self._terms(),
            }
        return {"edges": EDGES, **{name: x.cpu().numpy() for name, x in found.items()}}

    def _counts(self, tensors: Sequence[Tensor]) -> Tensor:
        """Elements by magnitude, int64 ``[M, len(EDGES) + 1]``."""
        edges = torch.tensor(EDGES, dtype=torch.float32, device=tensors[0].device)
        rows = []
        for module in range(len(self.modules)):
            own = [x.flatten() for x, of in zip(tensors, self.module_of, strict=True) if of == module]
            size = torch.cat(own).float().abs().log10().nan_to_num(torch.inf, torch.inf, -torch.inf)
            # Sorting is exact and repeatable on every device; counting by atomic additions is not.
            below = torch.searchsorted(size.sort().values, edges)
            rows.append(below.diff(prepend=below.new_zeros(1), append=below.new_tensor([len(size)])))
        return torch.stack(rows)

    def _terms(self) -> Tensor:
        """L2 norm of each weighted loss term's gradient by parameter, float32 ``[T, P]``, unscaled."""
        guard, device, rows = self.guard, self.guard.parameters[0].device, []
        batch = self.stepper.loader.batch(self.stepper.loader.plan(0), 0)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            output = forward(self.stepper.settings, self.stepper.model, batch.images[:BATCH])
            with torch.autocast(device.type, enabled=False):
                costs = self.loss.per_sample(output, batch.labels[:BATCH])
            for name, cost in costs.items():
                term = guard.scale(self.loss.weights[name] * cost.mean())
                rows.append(sizes(gradients(term, guard.parameters))[0] / guard.state["scale"].float())
        return torch.stack(rows)

    def _earlier(self, file: Path, content: Arrays) -> Arrays:
        """The steps that a run interrupted in this epoch left in ``file``."""
        first = content["steps"].min()
        try:
            old = read_file(file, like=content)
        except (OSError, ValueError) as error:
            self.say(f"the gradients before step {first} are lost: {error}")
            return {name: content[name][:0] for name in BY_STEP}
        return {name: old[name][old["steps"] < first] for name in BY_STEP}


def update_sizes(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """Length of Adam's last update of each parameter over the parameter's own, float32 ``[P]``.

    ``lr |m / (sqrt(v) + eps)| / |w|`` with the bias-corrected moments m and v (Kingma & Ba, 2015, algorithm
    1), without weight decay. About 1e-3 is usual: well above it the weights are rewritten, well below they
    stand still. nan where no update was made yet and where the weight is 0.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    sizes = []
    for p in parameters:
        state, group = optimizer.state.get(p, {}), groups[id(p)]
        size = torch.full((), torch.nan, device=p.device)
        if "exp_avg" in state:
            (beta1, beta2), steps = group["betas"], state["step"].to(p.device)
            mean = state["exp_avg"] / (1 - beta1**steps)
            spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt()
            ratio = group["lr"] * (mean / (spread + group["eps"])).norm() / p.norm()
            size = torch.where(p.norm() > 0, ratio, size)
        sizes.append(size.float())
    return torch.stack(sizes)


def _thinned(content: Arrays, rows: int = ROWS) -> Arrays:
    """At most about ``rows`` steps: every k-th, those that stand out and those that were skipped."""
    count = len(content["steps"])
    if count <= rows:
        return content
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.log(content["norms"])
        usual = np.nanmedian(np.where(np.isfinite(size), size, np.nan), axis=0)
        rise = np.nan_to_num(size - usual, nan=-np.inf, neginf=-np.inf).max(axis=1)
    lost = np.flatnonzero(content["skipped"])
    lost = lost[:: max(1, -(-len(lost) // (rows // 4)))]
    kept = np.arange(0, count, -(-count // (rows // 2))), np.argsort(rise)[-(rows // 4) :], lost
    keep = np.unique(np.concatenate(kept))
    return content | {name: content[name][keep] for name in BY_STEP}


# -- read back -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gradients:
    """The files of a run's ``gradients/`` as one.

    Attributes:
        names: ``[P]`` parameters.
        modules: ``[M]`` parts of the model, in the order they are used.
        module_of: int64 ``[P]``.
        terms: ``[T]`` loss terms.
        term_weights: float32 ``[T]``.
        steps: int64 ``[n]``, rising.
        epochs: int64 ``[n]``, epoch of the file a step is in.
        skipped: bool ``[n]``.
        loss: float32 ``[n]``.
        components: float32 ``[n, T]``, before their weights.
        norms: float32 ``[n, P]``, L2, unscaled, before clipping.
        epoch_statistics: by epoch: ``weight_norms`` and ``update_ratios`` float32 ``[P]`` (see
            :func:`update_sizes`), ``weight_counts`` and ``gradient_counts`` int64 ``[M, 66]`` (elements by
            magnitude between ``edges``, the first column below them, zeros included, the last above them or
            not finite) and ``term_norms`` float32 ``[T, P]`` (of each weighted loss term's gradient).
    """

    names: list[str]
    modules: list[str]
    module_of: NDArray[np.int64]
    terms: list[str]
    term_weights: NDArray[np.float32]
    steps: NDArray[np.int64]
    epochs: NDArray[np.int64]
    skipped: NDArray[np.bool_]
    loss: NDArray[np.float32]
    components: NDArray[np.float32]
    norms: NDArray[np.float32]
    epoch_statistics: dict[int, Arrays]

    def select(self, layers: str | Sequence[str] | None = None) -> dict[str, NDArray[np.int64]]:
        """Rows to show and the parameters (places) in each.

        Args:
            layers: none or ``modules``: one row a module; ``all``: one row a layer; else names or beginnings
                of names (a list, or a text with commas), and one row a layer that begins so.

        Raises:
            ValueError: no parameter begins so; the sentence names what there is.
        """
        wanted = layers.split(",") if isinstance(layers, str) else list(layers or ["modules"])
        wanted = [word.strip() for word in wanted]
        if wanted == ["modules"]:
            return {name: np.flatnonzero(self.module_of == i) for i, name in enumerate(self.modules)}
        begin = ("",) if wanted == ["all"] else tuple(wanted)
        for word in begin:
            if not any(name.startswith(word) for name in self.names):
                known = ", ".join(self.modules)
                give = f"give modules, all, or beginnings such as {known}"
                raise ValueError(f"layers: no layer begins with {word!r}; {give}")
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            if name.startswith(begin):
                layer, _, kind = name.rpartition(".")
                rows.setdefault(layer if kind in ("weight", "bias") else name, []).append(i)
        return {name: np.array(places) for name, places in rows.items()}

    def of(self, places: NDArray[np.int64]) -> Any:
        """L2 norm of the gradient of some parameters together by step, float64 ``[n]``."""
        return np.linalg.norm(self.norms[:, places].astype(np.float64), axis=1)

    def shares(self, epoch: int) -> Any:
        """Share of each loss term in each module's gradient norm, float64 ``[T, M]``."""
        squares = self.epoch_statistics[epoch]["term_norms"].astype(np.float64) ** 2
        norms = np.sqrt([squares[:, places].sum(axis=1) for places in self.select().values()]).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return norms / norms.sum(axis=0)


def files(run: Run) -> dict[int, Path]:
    """What a run's probe has written so far, by epoch, the first first."""
    return by_epoch(run.folder / "gradients")


def read_file(file: Path, *, like: Arrays | None = None) -> Arrays:
    """What the probe wrote at the end of one epoch.

    Raises:
        ValueError: it is damaged, or of another model than ``like``.
    """
    found = read_npz(file, MODEL | BY_STEP | {f"{name}?": shape for name, shape in STATISTICS.items()})
    there = STATISTICS.keys() & found.keys()
    whole = there == STATISTICS.keys() and len(found["edges"]) + 1 == found["weight_counts"].shape[1]
    if (there and not whole) or not set(found["module_of"].tolist()) <= set(range(len(found["modules"]))):
        raise ValueError(f"{file} is damaged: its arrays do not go together")
    if like and any(found[name].tolist() != like[name].tolist() for name in ("names", "terms")):
        raise ValueError(f"{file} is of another model")
    return found


def read(run: Run | str | os.PathLike[str]) -> Gradients:
    """All that a run's probe has written so far; a damaged file is passed over, with a warning.

    So is one of another model than the first.

    Raises:
        RunError: it has written nothing that can be read.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    pieces, damaged, first = dict[int, Arrays](), list[str](), Arrays()
    for epoch, file in files(run).items():
        try:
            piece = read_file(file, like=first)
        except (OSError, ValueError) as error:
            damaged.append(str(error))
            continue
        pieces[epoch] = piece | {"epochs": np.full(len(piece["steps"]), epoch)}
        first = first or piece
    if not pieces:
        why = "no epoch is over yet, or it was trained with probe_every = 0; train with probe_every = 1"
        raise RunError(f"{run.folder} holds no gradients: {'; '.join(damaged) or why}")
    if damaged:
        warnings.warn(f"gradients were passed over ({len(damaged)}): {'; '.join(damaged)}", stacklevel=2)
    rows = {name: np.concatenate([p[name] for p in pieces.values()]) for name in (*BY_STEP, "epochs")}
    order = np.argsort(rows["steps"], kind="stable")
    content: dict[str, Any] = {name: values[order] for name, values in rows.items()}
    content |= {
        name: first[name].tolist() if first[name].dtype.kind == "U" else first[name] for name in MODEL
    }
    return Gradients(**content, epoch_statistics={e: p for e, p in pieces.items() if "edges" in p})
