"""Figures and tables of rootcause.ipynb, from plain records; knows nothing of what made them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from refinelib.plots.masks import class_picture
from refinelib.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Figure,
    new_figure,
    style_axes,
    table,
)
from refinelib.plots.style import save as save

Record = Mapping[str, Any]
#: Colours of the two sides, and of the runs with a remedy.
FIRST, OURS = VERMILLION, BLUE
SERIES = (VERMILLION, ORANGE, PURPLE, SKY, GREEN, BLACK, BLUE)
#: Below this scale 1 / scale is infinite in float32.
SMALLEST = 2.0**-128


# -- figures ---------------------------------------------------------------------------------------
def sampler(
    people: Sequence[tuple[np.ndarray, Sequence[float], np.ndarray, np.ndarray, np.ndarray]],
) -> Figure:
    """One row a person: the image with the box and what was sampled, both crops, the labels.

    Args:
        people: image uint8 [H, W, 3], box xyxy, crop of one bin and of the box uint8 [h, w, 3], labels [h,
            w].
    """
    figure = new_figure("what the sampler saw of the box", 0.5 + 2.35 * len(people))
    tiles = figure.subplots(len(people), 4, squeeze=False, width_ratios=[1.5, 1, 1, 1])
    for row, (image, box, one_bin, whole, labels) in zip(tiles, people, strict=False):
        (x0, y0, x1, y1), (h, w) = box, labels.shape
        for axes, picture in zip(row, (image, one_bin, whole, class_picture(labels)), strict=False):
            aspect = "equal" if picture is image else (y1 - y0) / (x1 - x0) * w / h
            axes.imshow(picture, interpolation="nearest", aspect=aspect)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=SKY, linewidth=2))
        side = (x1 - x0) / w, (y1 - y0) / h
        corner = x0 + side[0] / 2, y0 + side[1] / 2
        row[0].add_patch(Rectangle(corner, *side, facecolor=VERMILLION, edgecolor=VERMILLION, linewidth=2))
        arrow = dict(arrowstyle="->", color=VERMILLION, linewidth=1.8)
        row[0].annotate("", corner, (x0 + 0.33 * (x1 - x0), y0 + 0.22 * (y1 - y0)), arrowprops=arrow)
    heads = ("image, box (blue), what was sampled (red)", "first attempt's crop", "ours", "labels of the box")
    for axes, head in zip(tiles[0], heads, strict=False):
        axes.set_title(head, loc="left", fontsize=9)
    return figure


def nan_share(table: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of batches whose edge map's gradient is not finite: ``{series: {precision: share}}``."""
    figure = new_figure("batches that make the edge map's gradient NaN", 3.4)
    axes = figure.subplots()
    colors = dict(zip(table, (VERMILLION, ORANGE, BLUE, SKY), strict=False))
    width = 0.8 / len(table)
    for i, (name, shares) in enumerate(table.items()):
        at = np.arange(len(shares)) + (i - (len(table) - 1) / 2) * width
        axes.bar(at, list(shares.values()), width * 0.92, color=colors[name], label=name)
        for x, share in zip(at, shares.values(), strict=False):
            axes.annotate(
                f"{share:.0%}", (x, share), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    style_axes(axes, "", "precision of the network", "share of batches")
    axes.xaxis.grid(False)
    axes.legend(fontsize=8, frameon=False, ncols=len(table), loc="lower left", bbox_to_anchor=(-0.01, 1.0))
    return figure


def scale_fall(records: Sequence[Record]) -> Figure:
    """The loss scale by step, its inverse below, and the step that made the weights not finite."""
    figure = new_figure("the loss scale's way down, and its inverse", 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(records) + 1)
    scales = np.array([record["loss_scale"] for record in records])
    with np.errstate(divide="ignore", over="ignore"):
        inverses = (1 / scales).astype(np.float32)  # float32, as the scaler has it
    healthy = np.array([not record["skipped"] for record in records])
    shown = np.where(scales > 0, scales, 2.0**-151)  # 0 has no place on the axis: under the last number
    above.plot(steps, shown, color=BLACK, linewidth=1.2, drawstyle="steps-post", zorder=1)
    for which, color, name in (
        (~healthy, ORANGE, "skipped: NaN gradient"),
        (healthy, GREEN, "healthy: taken"),
    ):
        above.plot(
            steps[which], shown[which], "o", color=color, markersize=2.5, label=f"{name} ({which.sum()})"
        )
    finite = np.isfinite(inverses)
    below.plot(steps[finite], inverses[finite], color=BLACK, linewidth=1.5)
    below.plot(steps[~finite], np.full((~finite).sum(), 2.0**142), "x", color=VERMILLION, markersize=4)
    below.axhline(2.0**128, color=GREY, linestyle="--", linewidth=1)
    above.axhline(SMALLEST, color=GREY, linestyle="--", linewidth=1)
    place = dict(textcoords="offset points", fontsize=8)
    above.annotate("2⁻¹²⁸: from here down the inverse is infinite", (1, SMALLEST), (2, 4), **place)
    below.annotate("infinite in float32", (1, 2.0**136), (2, 0), **place)
    if not records[-1]["finite"]:
        label = f"step {steps[-1]} writes Inf or NaN into the weights"
        for axes, y in ((above, shown[-1]), (below, 2.0**142)):
            axes.plot(steps[-1:], [y], "*", color=VERMILLION, markersize=15, label=label)
    style_axes(above, "fp16 loss scale", "", "factor")
    style_axes(below, "its inverse, by which gradients are multiplied after the check", "step", "factor")
    _powers(above, -151, 20, zero=True)
    _powers(below, -20, 150)
    above.legend(fontsize=8, frameon=False, loc="upper right")
    below.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def together(first: Sequence[Record], ours: Sequence[Record]) -> Figure:
    """Both runs by step: loss, loss scale, parameter tensors with NaN, steps skipped so far."""
    figure = new_figure(f"the same recipe for {len(ours)} steps: first attempt and ours", 6.6)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    for records, color, name in ((first, FIRST, "first attempt"), (ours, OURS, "ours")):
        steps = np.arange(1, len(records) + 1)
        losses = np.array([record["loss"] for record in records])
        panels[0].plot(steps, losses, color=color, linewidth=0.7, alpha=0.35)
        panels[0].plot(steps, _smooth(losses), color=color, linewidth=2, label=name)
        lost = steps[~np.isfinite(losses)]
        if len(lost):
            place = dict(transform=panels[0].get_xaxis_transform(), clip_on=False, label="NaN")
            panels[0].plot(lost, np.full(len(lost), 0.97), "x", color=color, markersize=4, **place)
        scales = [max(record["loss_scale"], 2.0**-151) for record in records]
        broken = [record["nan_tensors"] for record in records]
        skips = np.cumsum([record["skipped"] for record in records])
        for axes, values in zip(panels[1:], (scales, broken, skips), strict=False):
            axes.plot(steps, values, color=color, linewidth=2, drawstyle="steps-post")
    panels[1].axhline(SMALLEST, color=GREY, linestyle="--", linewidth=1)
    titles = (
        "training loss, and its mean of 25 steps",
        "fp16 loss scale (dashed: its inverse turns infinite)",
        "parameter tensors with NaN",
        "steps skipped so far",
    )
    for axes, title, unit in zip(panels, titles, ("loss", "factor", "tensors", "steps"), strict=False):
        style_axes(axes, title, "step" if axes in panels[2:] else "", unit)
    _powers(panels[1], -151, 20, zero=True)
    for axes in panels[2:]:
        axes.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    place = dict(loc="upper right", bbox_to_anchor=(0.995, 1.005), ncols=len(labels))  # beside the title
    figure.legend(handles, labels, fontsize=9, frameon=False, **place)
    return figure


def remedies(runs: Mapping[str, Sequence[Record]]) -> Figure:
    """Loss scale by step of each run, and the share of its steps that were skipped; a cross is death."""
    most = max(map(len, runs.values()))
    figure = new_figure(f"each old remedy by itself, with all faults, in {most} steps", 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    for i, (_name, records) in enumerate(runs.items()):
        steps = np.arange(1, len(records) + 1)
        scales = np.array([max(record["loss_scale"], 2.0**-151) for record in records])
        end = died(records)
        # The first is drawn broad, so that a run that is exactly like it does not hide it.
        width, alpha, size = (5, 0.6, 13) if i == 0 else (1.6, 1, 8)
        left.plot(
            steps[:end], scales[:end], color=SERIES[i], linewidth=width, alpha=alpha, drawstyle="steps-post"
        )
        if end is not None:
            left.plot(
                [end], scales[end - 1 : end], "X", color=SERIES[i], markersize=size, markeredgecolor="white"
            )
        share = skipped_share(records)
        right.barh(i, share, color=SERIES[i], height=0.7)
        right.plot(
            [0], [i], "s", color=SERIES[i], clip_on=False
        )  # the key to the lines, also where no bar is
        place = dict(textcoords="offset points", va="center", fontsize=8)
        right.annotate(f"{share:.0%}, {fate(records)}", (share, i), (7, 0), **place)
    left.axhline(SMALLEST, color=GREY, linestyle="--", linewidth=1)
    style_axes(left, "loss scale (cross: NaN in the weights; flat at 1: no fp16)", "step", "factor")
    _powers(left, -151, 20, zero=True)
    right.set_yticks(range(len(runs)), list(runs))
    right.invert_yaxis()
    right.set_xlim(0, 1.45)
    style_axes(right, "steps skipped while alive", "share of steps", "")
    right.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.yaxis.grid(False)
    return figure


# -- what a run's records say ----------------------------------------------------------------------
def died(records: Sequence[Record]) -> int | None:
    """The step, from 1, that left NaN in the weights; none: they stayed finite."""
    return next((i for i, record in enumerate(records, 1) if record["nan_tensors"]), None)


def living(records: Sequence[Record]) -> Sequence[Record]:
    """The records up to death."""
    return records[: died(records)]


def skipped_share(records: Sequence[Record]) -> float:
    """Share of the steps up to death that were skipped."""
    return statistics.fmean(bool(record["skipped"]) for record in living(records))


def contrast(records: Sequence[Record]) -> float:
    """Mean standard deviation inside a crop."""
    return statistics.fmean(record["contrast"] for record in records)


def nan_gradients(records: Sequence[Record]) -> float:
    """Share of steps, while the weights were finite, whose gradient was not."""
    return statistics.fmean(not math.isfinite(record["grad_norm"]) for record in living(records))


def least_scale(records: Sequence[Record]) -> float:
    """The least loss scale up to death."""
    return min(record["loss_scale"] for record in living(records))


def true_norms(records: Sequence[Record]) -> float:
    """Share of the steps with a finite gradient (and one at all) whose logged norm is the true one."""
    known = [(r["reported"], r["grad_norm"]) for r in living(records) if 0 < r["grad_norm"] < math.inf]
    return statistics.fmean(math.isclose(*pair, rel_tol=1e-2) for pair in known) if known else 0.0


def first_rate(records: Sequence[Record]) -> float:
    """Learning rate of the first step, as a share of the largest."""
    return records[0]["lr"] / max(record["lr"] for record in records)


class Cause(NamedTuple):
    """A cause, how a run shows it, and when a remedy counts as having helped against it."""

    symptom: str
    how: str
    measure: Callable[[Sequence[Record]], float]
    shown: Callable[[float], str]
    cured: Callable[[float, float], bool]  # value, ours
    instead: str


CAUSES = {
    "1. one-bin sampler": Cause(
        "learns nothing beyond an average mask",
        "standard deviation inside a crop",
        contrast,
        "{:.2f}".format,
        lambda value, ours: value > 0.8 * ours,
        "`roi.crop_rois`: exact area average over the whole box",
    ),
    "2. sqrt at 0": Cause(
        "NaN gradients",
        "steps whose gradient is not finite",
        nan_gradients,
        "{:.0%}".format,
        lambda value, ours: value < 0.02,
        "`geometry.edge_strength`: smooth at 0, float32; no gradient through the gate",
    ),
    "3. scale without floor": Cause(
        "the scale falls to 0, then every weight is NaN",
        "least loss scale while alive",
        least_scale,
        "{:.1e}".format,
        lambda value, ours: value >= 1,
        "`guard.Guard`: a floor, and a decision on what is applied",
    ),
    "4. half guard": Cause(
        "a logged gradient norm of 0; nobody warns",
        "healthy steps whose logged norm is the true one",
        true_norms,
        "{:.0%}".format,
        lambda value, ours: value > 0.99,
        "`guard.Guard`: one path for every precision, NaN and Inf, decided before clipping",
    ),
    "5. settings that reach nothing": Cause(
        "changes change nothing",
        "first learning rate, share of the peak",
        first_rate,
        "{:.0%}".format,
        lambda value, ours: value < 0.5,
        "`build.py`: one place where settings meet objects, each tested",
    ),
}


# -- tables ----------------------------------------------------------------------------------------
def fate(records: Sequence[Record]) -> str:
    """What became of a run, in a word."""
    end = died(records)
    return f"NaN at step {end}" if end else "stands still" if skipped_share(records) > 0.5 else "alive"


def parts_table(records: Sequence[Record], tensors: int) -> str:
    """The run in three parts, as its log would have told it."""
    rows = []
    for part, places in enumerate(np.array_split(np.arange(len(records)), 3), 1):
        some = [records[i] for i in places]
        loss, norm = (statistics.fmean(record[name] for record in some) for name in ("loss", "reported"))
        last = some[-1]
        found = f"{last['nan_tensors']} of {tensors}"
        rows.append([part, f"{loss:.3f}", f"{norm:.3g}", f"{last['loss_scale']:.1e}", found])
    head = [
        "part of the run",
        "train loss",
        "logged gradient norm",
        "loss scale after it",
        "parameter tensors with NaN",
    ]
    return table(rows, head)


def runs_table(runs: Mapping[str, Any], *, masks: bool = True) -> str:
    """One row a run: its fate, every cause's measure, and with ``masks`` what its masks are worth.

    Args:
        masks: add the columns of target IoU.
        runs: by name; each has ``steps``, its records, ``target_iou`` and ``swapped_iou``.
    """
    head = ["run", "fate", "steps skipped", *(cause.how for cause in CAUSES.values())]
    head += ["target IoU", "the same from another person's crop"] if masks else []
    rows = []
    for name, run in runs.items():
        records = run.steps
        measures = [cause.shown(cause.measure(records)) for cause in CAUSES.values()]
        rows.append([name, fate(records), f"{skipped_share(records):.0%}", *measures])
        if masks:
            rows[-1] += [
                "NaN" if math.isnan(iou) else f"{iou:.3f}" for iou in (run.target_iou, run.swapped_iou)
            ]
    return table(rows, head)


def closing_table(
    first: Sequence[Record], ours: Sequence[Record], treated: Mapping[str, Sequence[Record]]
) -> str:
    """Cause, symptom, measurement, what we do, and which remedies helped, all from the runs."""
    rows = []
    for name, cause in CAUSES.items():
        before, after = cause.measure(first), cause.measure(ours)
        helped = [remedy for remedy, records in treated.items() if cause.cured(cause.measure(records), after)]
        measured = cause.how, cause.shown(before), cause.shown(after), ", ".join(helped) or "none"
        rows.append([name, cause.symptom, *measured, cause.instead])
    head = [
        "cause",
        "symptom",
        "how we measured it",
        "first attempt",
        "ours",
        "old remedies that helped",
        "what we do instead",
    ]
    return table(rows, head)


# -- helpers ---------------------------------------------------------------------------------------
def _powers(axes: Axes, low: int, high: int, *, zero: bool = False) -> None:
    """A logarithmic axis over powers of two; with ``zero`` its foot stands for 0."""
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0 ** (low - 6), 2.0**high)
    ticks = [2.0**power for power in range(-128, 129, 32) if low < power < high]
    axes.yaxis.set_major_locator(FixedLocator(([2.0**low] if zero else []) + ticks))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def name(y: float, _: object) -> str:
        return "0" if zero and y == 2.0**low else "2" + str(round(math.log2(y))).translate(superscript)

    axes.yaxis.set_major_formatter(FuncFormatter(name))


def _smooth(values: np.ndarray, window: int = 25) -> np.ndarray:
    """Mean of the last ``window`` values; NaN from the first value on that is not finite."""
    sums = np.cumsum(np.where(np.isfinite(values), values, np.nan))
    shifted = np.r_[np.zeros(min(window, len(sums))), sums[:-window]]
    return (sums - shifted) / np.minimum(np.arange(1, len(values) + 1), window)
