"""Which module left its usual gradient level, since when, by how much, and which loss term was behind it.

Plain arrays and sentences, from what :mod:`refinelib.gradients.record` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinelib.gradients.record import Gradients

Floats = NDArray[np.float64]

#: Steps whose median is a module's usual level; at least so many are needed to have one.
WINDOW, LEAST = 50, 5
#: A module leaves its level at so many times it, and beyond so many standard deviations of its logarithm.
RISE, SIGMAS = 10.0, 5.0
#: Steps between two episodes; closer ones are one.
GAP = 5


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
        rising = zip(found.modules, rise[at] > np.log10(RISE), strict=True)
        others = tuple(other for other, rose in rising if rose and other != name)
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
    worst, *rest = seen
    text = _sentences(worst)
    if rest:
        others = ", ".join(f"`{e.module}` at step {e.first} ({_times(e)})" for e in rest[:5])
        text += f"\n\nSmaller ones, or later: {others}{f' and {len(rest) - 5} more' * (len(rest) > 5)}."
    return text


def _sentences(e: Episode) -> str:
    lasting = f"for {e.count} steps up to {e.last}" if e.count > 1 else "for 1 step"
    span = f"since step {e.first} (epoch {e.epoch}), {'and still so at the end' if e.open else lasting}"
    norm = f"{e.norm:.3g}" if np.isfinite(e.norm) else "not finite"
    size = f"{norm} against a usual {e.usual:.3g}, {_times(e)}"
    if not np.isfinite(e.loss_factor):
        text = f"**The loss was not finite**, {span}, so no gradient was: norms do not show whose output "
        return f"{text}corrupted it, an incident's replay can. Gradient norm of `{e.module}`: {size}."
    if not np.isclose(e.loss_factor, 1.0, rtol=1e-2):
        text = f"**The loss itself is where it starts**, {span}: the total was {rounded(e.loss_factor)} "
        text += "times the weighted sum of its terms, and every gradient with it. "
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
