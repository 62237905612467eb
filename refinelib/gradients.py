"""A run's gradient norms by parameter and step: written while it trains, read back, and judged.

The norms come from the steps' own reports, so they cost nothing. The statistics of an epoch (weights,
updates, histograms, the share of each loss term) read the optimizer's state and run one training batch
forward and, term by term, backward through ``torch.autograd.grad``. No ``.grad``, moment, weight or random
state is touched: a run is bit for bit the same with and without the probe.
"""

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
from refinelib.files import PathLike, by_epoch, read_npz, replacing
from refinelib.guard.diagnose import gradients_of
from refinelib.guard.guard import REPORT
from refinelib.guard.measure import sizes
from refinelib.guard.optimizer import update_sizes
from refinelib.runs import Run, RunError
from refinelib.step import Say, Stepper

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

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
STATISTICS = {"weight_norms": "f P", "update_ratios": "f P", "term_norms": "f TP", "edges": "f E"}
STATISTICS |= {"weight_counts": "iu MC", "gradient_counts": "iu MC"}

#: Steps whose median is a module's usual level; at least so many are needed to have one.
WINDOW, LEAST = 50, 5
#: A module leaves its level at so many times it, and beyond so many standard deviations of its logarithm.
RISE, SIGMAS = 10.0, 5.0
#: Steps between two episodes; closer ones are one.
GAP = 5


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
        cuts = np.cumsum([len(terms), len(REPORT)])
        components, reports, norms = np.split(np.stack(self.reports), cuts, axis=1)
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
            content = self._with_earlier(file, content)
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
            factor = (grad_norm / sizes(grads)[0].norm()).nan_to_num(1.0, 1.0, 1.0)
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
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            output = forward(self.stepper.settings, self.stepper.model, batch.images[:BATCH])
            with torch.autocast(device.type, enabled=False):
                costs = self.loss.per_sample(output, batch.labels[:BATCH])
            for name, cost in costs.items():
                term = guard.scale(self.loss.weights[name] * cost.mean())
                rows.append(sizes(gradients_of(term, guard.parameters))[0] / guard.state["scale"].float())
        return torch.stack(rows)

    def _with_earlier(self, file: Path, content: Arrays) -> Arrays:
        """The content with the steps before it that a run interrupted in this epoch left in ``file``."""
        first = content["steps"].min()
        try:
            old = read_file(file, like=content)
        except (OSError, ValueError) as error:
            self.say(f"the gradients before step {first} are lost: {error}")
            return content
        earlier = old["steps"] < first
        return content | {name: np.concatenate([old[name][earlier], content[name]]) for name in BY_STEP}


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
            :func:`~refinelib.guard.optimizer.update_sizes`), ``weight_counts`` and ``gradient_counts`` int64
            ``[M, 66]`` (elements by magnitude between ``edges``, the first column below them, zeros included,
            the last above them or not finite) and ``term_norms`` float32 ``[T, P]`` (of each weighted loss
            term's gradient).
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
                give = f"give modules, all, or beginnings such as {', '.join(self.modules)}"
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


def read(run: Run | PathLike) -> Gradients:
    """All that a run's probe has written so far; a damaged file is passed over, with a warning.

    So is one of another model than the first.

    Raises:
        RunError: it has written nothing that can be read.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    pieces, damaged = dict[int, Arrays](), list[str]()
    for epoch, file in files(run).items():
        try:
            pieces[epoch] = read_file(file, like=next(iter(pieces.values()), None))
        except (OSError, ValueError) as error:
            damaged.append(str(error))
    if not pieces:
        why = "no epoch is over yet, or it was trained with probe_every = 0; train with probe_every = 1"
        raise RunError(f"{run.folder} holds no gradients: {'; '.join(damaged) or why}")
    if damaged:
        warnings.warn(f"gradients were passed over ({len(damaged)}): {'; '.join(damaged)}", stacklevel=2)
    rows = {name: np.concatenate([p[name] for p in pieces.values()]) for name in BY_STEP}
    rows["epochs"] = np.repeat(list(pieces), [len(p["steps"]) for p in pieces.values()])
    order = np.argsort(rows["steps"], kind="stable")
    content: dict[str, Any] = {name: values[order] for name, values in rows.items()}
    of_model = {name: next(iter(pieces.values()))[name] for name in MODEL}
    content |= {name: x.tolist() if x.dtype.kind == "U" else x for name, x in of_model.items()}
    return Gradients(**content, epoch_statistics={e: p for e, p in pieces.items() if "edges" in p})


# -- judged: which module left its usual level, since when, by how much, and which loss was behind it ----
@dataclass(frozen=True)
class Episode:
    """Steps in which a module was far from its usual level.

    Attributes:
        module: the culprit, see :func:`episodes`.
        parameter: which rose most in it.
        first: step.
        last: step.
        count: steps in it that were far off.
        epoch: of the first step.
        norm: largest norm of the module; not finite where it was not.
        usual: the module's level before.
        others: modules that rose with it.
        arrived: whether the gradient was already large where it left the module, or only inside.
        at_loss: whether no module is after this one: the loss may be at fault.
        open: whether it lasts to the end of the record.
        loss_factor: total loss over the weighted sum of its terms; 1 unless the sum itself was corrupted.
        term: loss term with the largest share in the module's gradient at the epoch's end.
        share: this share.
    """

    module: str
    parameter: str
    first: int
    last: int
    count: int
    epoch: int
    norm: float
    usual: float
    others: tuple[str, ...]
    arrived: bool
    at_loss: bool
    open: bool
    loss_factor: float
    term: str | None
    share: float

    @property
    def times(self) -> float:
        """How many times its usual level; infinite where it was not finite."""
        return self.norm / self.usual if np.isfinite(self.norm) and self.usual > 0 else np.inf


def levels(values: NDArray[Any]) -> tuple[Floats, Floats]:
    """Usual level and spread of positive series, from the steps before each that were usual themselves.

    Args:
        values: float ``[n, S]``, norms; zeros and what is not finite count for nothing.

    Returns:
        Base-10 logarithms, float64 ``[n, S]`` each: the median of the last ``WINDOW`` usual steps (of the
        first ones, where fewer than ``LEAST`` come before; nan where there are too few at all) and 1.4826
        times their median deviation.
    """
    logs = _log10(values)
    logs[~np.isfinite(logs)] = np.nan
    count = len(logs)
    level, spread = np.full_like(logs, np.nan), np.full_like(logs, np.nan)
    usual: list[int] = []
    for rows in np.array_split(np.arange(count), min(count, 4000)):
        known = logs[usual[-WINDOW:] if len(usual) >= LEAST else range(min(count, 4 * LEAST))]
        enough = np.isfinite(known).sum(axis=0) >= LEAST
        middle = np.nanmedian(known[:, enough], axis=0)
        deviation = np.nanmedian(np.abs(known[:, enough] - middle), axis=0)
        level[np.ix_(rows, enough)], spread[np.ix_(rows, enough)] = middle, 1.4826 * deviation
        off = np.isnan(logs[rows]).all(axis=1) | _far(logs[rows] - level[rows], spread[rows]).any(axis=1)
        usual += rows[~off].tolist()
    return level, spread


def episodes(found: Gradients) -> list[Episode]:
    """Every stretch of steps in which a module left its usual level, the worst first.

    Which module: a gradient that is amplified on its way back is large in every module that comes before the
    culprit. So the culprit is the last module in line whose *biases* have risen: a bias's gradient is the sum
    of what arrives, whatever the module's input was, while a weight's also grows with its input. Where the
    arriving gradient has not risen with the module's own, the fault is inside: then it is the module that
    rose most.
    """
    groups = list(found.select().values())
    is_bias = np.array([name.endswith("bias") for name in found.names])
    biases = [places[is_bias[places]] if is_bias[places].any() else places for places in groups]
    norms, arriving = (np.stack([found.of(places) for places in some], axis=1) for some in (groups, biases))
    level, spread = levels(norms)
    rise = np.where(np.isfinite(norms), _log10(norms) - level, np.inf)
    bias_rise = np.where(np.isfinite(arriving), _log10(arriving) - levels(arriving)[0], np.inf)
    rows = np.flatnonzero(_far(rise, spread).any(axis=1))
    result = []
    for stretch in np.split(rows, np.flatnonzero(np.diff(rows) > GAP) + 1) if len(rows) else []:
        at, end = int(stretch[0]), int(stretch[-1])
        module, arrived = _culprit(rise[at], bias_rise[at])
        name, (parameter, *why) = found.modules[module], _causes(found, at, module)
        span = int(found.steps[at]), int(found.steps[end]), len(stretch), int(found.epochs[at])
        size = float(norms[stretch, module].max()), float(10 ** level[at, module])
        rising = np.flatnonzero(rise[at] > np.log10(RISE))
        others = tuple(found.modules[other] for other in rising if other != module)
        at_loss = arrived and name == found.modules[-1]
        lasts = len(found.steps) - 1 - end < GAP < len(stretch)
        result.append(Episode(name, parameter, *span, *size, others, arrived, at_loss, lasts, *why))
    return sorted(result, key=lambda episode: (-episode.times, episode.first))


def _culprit(rise: Floats, bias_rise: Floats) -> tuple[int, bool]:
    """The module at fault, and whether the gradient was large where it left the module."""
    rise, bias_rise = (np.nan_to_num(x, nan=-np.inf, posinf=1e3) for x in (rise, bias_rise))
    least, largest = np.log10(RISE), bias_rise.max()
    if largest < max(least, rise.max() - 1.0):
        return int(rise.argmax()), False
    return int(np.flatnonzero(bias_rise >= max(least, largest - 1.0))[-1]), True


def _causes(found: Gradients, at: int, module: int) -> tuple[Any, ...]:
    """What of an :class:`Episode` says why: parameter, loss factor, loss term and its share."""
    places = np.flatnonzero(found.module_of == module)
    before = slice(max(0, at - WINDOW), at) if at >= LEAST else slice(0, 4 * LEAST)
    norms, past = found.norms[at, places], found.norms[before][:, places]
    usual = np.median(np.where(np.isfinite(past), past, 0.0), axis=0)
    own = np.where(np.isfinite(norms), norms / np.maximum(usual, 1e-38), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = found.loss[at] / float((found.components[at] * found.term_weights).sum())
    epoch, shares = int(found.epochs[at]), np.zeros(len(found.terms))
    if epoch in found.epoch_statistics:
        shares = np.nan_to_num(found.shares(epoch)[:, module])
    term = found.terms[int(shares.argmax())] if shares.any() else None
    return found.names[places[int(own.argmax())]], float(factor), term, float(shares.max())


def verdict(found: Gradients) -> str:
    """Which module caused instability, since when, how large, which loss term dominates: Markdown."""
    if len(found.steps) < LEAST:
        return f"**{len(found.steps)} steps are too few** for a usual level: at least {LEAST} are needed."
    seen = episodes(found)
    if not seen:
        norms = np.stack([found.of(places) for places in found.select().values()], axis=1)
        rise = np.nan_to_num(_log10(norms) - levels(norms)[0], nan=-np.inf)
        row, module = np.unravel_index(rise.argmax(), rise.shape)
        text = f"**No module left its usual level** in {len(found.steps)} recorded steps. "
        text += f"The largest rise was that of `{found.modules[module]}` at step {found.steps[row]}, "
        return text + f"{10 ** rise[row, module]:.3g} times its level."
    text = _sentences(seen[0])
    if rest := seen[1:]:
        others = ", ".join(f"`{e.module}` at step {e.first} ({_times(e)})" for e in rest[:5])
        text += f"\n\nSmaller ones, or later: {others}{f' and {len(rest) - 5} more' * (len(rest) > 5)}."
    return text


def _sentences(e: Episode) -> str:
    lasting = f"for {e.count} steps up to {e.last}" if e.count > 1 else "for 1 step"
    span = f"since step {e.first} (epoch {e.epoch}), {'and still so at the end' if e.open else lasting}"
    norm = f"{e.norm:.3g}" if np.isfinite(e.norm) else "not finite"
    size = f"{norm} against a usual {e.usual:.3g}, {_times(e)}"
    if not np.isclose(e.loss_factor, 1.0, rtol=1e-2):  # nor where it is not finite
        text = f"**The loss itself is where it starts**, {span}: the total was {rounded(e.loss_factor)} "
        text += "times the weighted sum of its terms, and every gradient with it. "
        if not np.isfinite(e.loss_factor):
            text = f"**The loss was not finite**, {span}, so no gradient was: norms do not show whose output "
            text += "corrupted it, an incident's replay can. "
        return f"{text}Gradient norm of `{e.module}`: {size}."
    text = f"**`{e.module}` is where it starts**, {span}. Its gradient norm was {size}; "
    text += f"most of the rise is in `{e.parameter}`. "
    if e.at_loss:
        text += "It is the last module before the loss: its output, or the batch itself, drove the loss."
    elif e.arrived:
        text += "The modules after it kept their level, so its output is what amplified the gradient."
    else:
        text += "What arrived at its biases was as usual, so the rise is in its own weights' gradients."
    if e.others:
        text += f" With it rose {', '.join(f'`{name}`' for name in e.others)}."
    if e.term is not None:
        text += f" At the end of that epoch, {e.share:.0%} of its gradient came from the `{e.term}` loss."
    return text


def _times(e: Episode) -> str:
    return f"{rounded(e.times)} times its level" if np.isfinite(e.times) else "beyond any level"


def rounded(value: float) -> str:
    """Three digits, without an exponent where a number is large: 2,170 rather than 2.17e+03."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"


def _far(rise: Floats, spread: Floats) -> NDArray[np.bool_]:
    """Whether a rise of base-10 logarithms is beyond the usual."""
    return rise > np.maximum(np.log10(RISE), SIGMAS * np.nan_to_num(spread))


def _log10(values: NDArray[Any]) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values.astype(np.float64))
