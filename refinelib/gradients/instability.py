"""Which module left its usual gradient level, since when, by how much, and which loss term was behind it.

Plain arrays and sentences, from what gradients.py reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refinelib.gradients.read import Gradients

#: Steps whose median is a module's usual level; at least so many are needed to have one.
WINDOW, LEAST = 50, 5
#: A module leaves its level where its norm is so many times that level, and beyond so many standard deviations of its logarithm.
RISE, SIGMAS = 10.0, 5.0
#: Steps between two episodes; closer ones are one.
GAP = 5


@dataclass(frozen=True)
class Episode:
    """Steps in which a module was far from its usual level."""

    module: str
    parameter: str  # which rose most in it
    first: int  # step
    last: int  # step
    count: int  # steps in it that were far off
    epoch: int
    norm: float  # largest norm of the module; not finite where it was not
    usual: float  # the module's level before
    others: tuple[str, ...]  # modules that rose with it
    arrived: bool  # whether the gradient was already large where it left the module, or only inside
    everywhere: bool  # whether no module is after this one in line: the loss may be at fault
    open: bool  # whether it lasts to the end of the record
    loss_factor: float  # total loss over the weighted sum of its terms; 1 unless the sum itself was spoilt
    term: str | None  # loss term with the largest share in the module's gradient at the epoch's end
    share: float
    risen: str | None  # loss term that was furthest above its usual value at the first step
    risen_by: float

    @property
    def times(self) -> float:
        """How many times its usual level; infinite where it was not finite."""
        return self.norm / self.usual if np.isfinite(self.norm) and self.usual > 0 else np.inf


def levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Usual level and spread of positive series, from the steps before each that were usual themselves.

    Args:
        values: float ``[n, S]``, norms; zeros and what is not finite count for nothing.

    Returns:
        Base-10 logarithms, float64 ``[n, S]`` each: the median of the last ``WINDOW`` usual steps (of the first ones, where fewer than
        ``LEAST`` come before; nan where there are too few at all) and 1.4826 times their median deviation.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values.astype(np.float64))
    logs[~np.isfinite(logs)] = np.nan
    count, chunk = len(logs), max(1, len(logs) // 4000)
    level, spread = np.full_like(logs, np.nan), np.full_like(logs, np.nan)
    usual: list[int] = []
    for start in range(0, count, chunk):
        here = slice(start, start + chunk)
        before = usual[-WINDOW:] if len(usual) >= LEAST else list(range(min(count, 4 * LEAST)))
        known = logs[before]
        if len(before) >= LEAST:
            enough = np.isfinite(known).sum(axis=0) >= LEAST
            middle = np.full(known.shape[1], np.nan)
            middle[enough] = np.nanmedian(known[:, enough], axis=0)
            level[here] = middle
            spread[here][:, enough] = 1.4826 * np.nanmedian(np.abs(known - middle)[:, enough], axis=0)
        off = np.isnan(logs[here]).all(axis=1) | (logs[here] - level[here] > _limits(spread[here])).any(axis=1)
        usual += [start + int(i) for i in np.flatnonzero(~off)]
    return level, spread


def episodes(found: Gradients) -> list[Episode]:
    """Every stretch of steps in which a module left its usual level, the worst first.

    Which module: a gradient that is amplified on its way back is large in every module that comes before the
    culprit. So the culprit is the last module in line whose *biases* have risen: a bias's gradient is the sum of what
    arrives, whatever the module's input was, while a weight's also grows with its input. Where the arriving gradient
    has not risen with the module's own, the fault is inside: then it is the module that rose most.
    """
    groups = found.select()
    norms = np.stack([found.of(places) for places in groups.values()], axis=1)
    arriving = np.stack([found.of(_biases(found, places)) for places in groups.values()], axis=1)
    level, spread = levels(norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        rise, bias_rise = (np.log10(x) - y for x, y in ((norms, level), (arriving, levels(arriving)[0])))
    # A finite bias has not risen beyond measure; one that is not finite has.
    rise, bias_rise = (np.where(np.isfinite(x), y, np.inf) for x, y in ((norms, rise), (arriving, bias_rise)))
    off = ~np.isfinite(norms) | (rise > _limits(spread))
    result = []
    for rows in _stretches(np.flatnonzero(off.any(axis=1))):
        result.append(_episode(found, rows, norms, level, rise, bias_rise))
    return sorted(result, key=lambda episode: (-episode.times, episode.first))


def verdict(found: Gradients) -> str:
    """Which module caused instability, since when, how large, which loss term dominates: a few sentences of Markdown."""
    seen = episodes(found)
    if not seen:
        if len(found.steps) < LEAST:
            return f"**{len(found.steps)} steps are too few** to tell a usual level from an unusual one: at least {LEAST} are needed."
        norms = np.stack([found.of(places) for places in found.select().values()], axis=1)
        rise = np.nan_to_num(np.log10(np.maximum(norms, 1e-38)) - levels(norms)[0], nan=-np.inf)
        row, module = np.unravel_index(rise.argmax(), rise.shape)
        return (
            f"**No module left its usual level** in {len(found.steps)} recorded steps. The largest rise was that of "
            f"`{found.modules[module]}` at step {found.steps[row]}, {10 ** rise[row, module]:.3g} times its level."
        )
    worst, *rest = seen
    text = [_told(worst)]
    if rest:
        other = ", ".join(f"`{e.module}` at step {e.first} ({_times(e)})" for e in rest[:5])
        text.append(f"Smaller ones, or later: {other}{f' and {len(rest) - 5} more' if len(rest) > 5 else ''}.")
    return "\n\n".join(text)


# -- helpers ---------------------------------------------------------------------------------------
def _limits(spread: np.ndarray) -> np.ndarray:
    return np.maximum(np.log10(RISE), SIGMAS * np.nan_to_num(spread))


def _biases(found: Gradients, places: np.ndarray) -> np.ndarray:
    biases = np.array([i for i in places if found.names[i].endswith("bias")], dtype=int)
    return biases if len(biases) else places


def _stretches(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.flatnonzero(np.diff(rows) > GAP) + 1) if len(rows) else []


def _episode(found: Gradients, rows: np.ndarray, norms: np.ndarray, level: np.ndarray, rise: np.ndarray, bias_rise: np.ndarray) -> Episode:
    at = rows[0]
    total, biases = np.nan_to_num(rise[at], nan=-np.inf, posinf=1e3), np.nan_to_num(bias_rise[at], nan=-np.inf, posinf=1e3)
    arrived = biases.max() >= max(np.log10(RISE), total.max() - 1.0)
    risen = biases if arrived else total
    among = np.flatnonzero(risen >= max(np.log10(RISE), risen.max() - 1.0)) if arrived else np.array([risen.argmax()])
    module = int(among[-1])
    places = np.flatnonzero(found.module_of == module)
    before = slice(max(0, at - WINDOW), at) if at >= LEAST else slice(0, 4 * LEAST)
    with np.errstate(divide="ignore", invalid="ignore"):
        usual = np.nan_to_num(np.log10(_median(found.norms[before][:, places])), neginf=-38.0)
        own = np.log10(found.norms[at, places].astype(np.float64)) - usual
        own[~np.isfinite(found.norms[at, places])] = np.inf
        jump = found.components[at] / _median(found.components[before])
        factor = found.loss[at] / float((found.components[at] * found.term_weights).sum())
    here = norms[rows, module]
    epoch = int(found.epochs[at])
    shares = found.shares(epoch)[:, module] if epoch in found.looks else np.full(len(found.terms), np.nan)
    told, grown = np.isfinite(shares).any(), np.isfinite(jump) & (jump > 0)
    off = (rise[at] > np.log10(RISE)) & (np.arange(rise.shape[1]) != module)
    return Episode(
        module=found.modules[module],
        parameter=found.names[places[int(own.argmax())]],
        first=int(found.steps[at]),
        last=int(found.steps[rows[-1]]),
        count=len(rows),
        epoch=epoch,
        norm=float(here.max()) if np.isfinite(here).all() else float("nan"),
        usual=float(10 ** level[at, module]),
        others=tuple(found.modules[i] for i in np.flatnonzero(off)),
        arrived=bool(arrived),
        everywhere=bool(arrived and module == len(found.modules) - 1),
        open=bool(len(found.steps) - 1 - rows[-1] < GAP and len(rows) > GAP),
        loss_factor=float(factor),
        term=found.terms[int(np.nanargmax(shares))] if told else None,
        share=float(np.nanmax(shares)) if told else float("nan"),
        risen=found.terms[int(np.where(grown, jump, 0).argmax())] if grown.any() else None,
        risen_by=float(np.where(grown, jump, 0).max()),
    )


def _median(values: np.ndarray) -> np.ndarray:
    """Median down the first axis of what is finite; nan where nothing is."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    some = np.isfinite(values).any(axis=0)
    result = np.full(values.shape[1], np.nan)
    result[some] = np.nanmedian(values[:, some], axis=0)
    return result


def _told(e: Episode) -> str:
    span = f"since step {e.first} (epoch {e.epoch})"
    many = f"{e.count} steps up to {e.last}" if e.count > 1 else "1 step"
    span += ", and still so at the end" if e.open else f", for {many}"
    if not np.isclose(e.loss_factor, 1.0, rtol=1e-2):
        if np.isfinite(e.loss_factor):
            what = f"**The loss itself is where it starts**, {span}: the total was {rounded(e.loss_factor)} times the weighted sum "
            what += "of its terms, and every gradient with it."
        else:
            what = f"**The loss was not finite**, {span}, so no gradient was: "
            what += "norms cannot tell whose output spoilt it, an incident's replay can."
        return f"{what} Gradient norm of `{e.module}`: {_size(e)}, {_times(e)}."
    size = f"Its gradient norm was {_size(e)}, {_times(e)}; most of the rise is in `{e.parameter}`."
    parts = [f"**`{e.module}` is where it starts**, {span}. {size}"]
    if e.everywhere:
        parts.append("It is the last module before the loss: what it wrote into the mask, or the batch itself, drove the loss.")
    elif e.arrived:
        parts.append("The modules after it in line kept their level, so what it put out is what amplified the gradient.")
    else:
        parts.append("What arrived at its biases was as usual, so the rise is inside the module, in its own weights' gradients.")
    if e.others:
        parts.append(f"With it rose {', '.join(f'`{name}`' for name in e.others)}.")
    if e.term is not None:
        parts.append(f"At the end of that epoch, {e.share:.0%} of this module's gradient came from the `{e.term}` loss, the largest share.")
    if e.risen is not None and e.risen_by > 2:
        parts.append(f"At that step the `{e.risen}` loss was {e.risen_by:.3g} times its usual value, more than any other term.")
    return " ".join(parts)


def _size(e: Episode) -> str:
    return f"{e.norm:.3g} against a usual {e.usual:.3g}" if np.isfinite(e.norm) else f"not finite against a usual {e.usual:.3g}"


def _times(e: Episode) -> str:
    return f"{rounded(e.times)} times its level" if np.isfinite(e.times) else "beyond any level"


def rounded(value: float) -> str:
    """Three digits, without an exponent where a number is large: 2,170 rather than 2.17e+03."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
