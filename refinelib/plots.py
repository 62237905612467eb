"""Figures of a run, drawn from its folder on disk.

Every function takes a :class:`~refinelib.runs.Run`, a run's name or its folder, and returns a figure
that shows itself at the end of a notebook cell. A run that is still going is drawn so far; a value
that was not finite is a gap in its line and a cross at the panel's upper edge.
"""

from __future__ import annotations

import io
import math
import os
from typing import Any, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as _Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .runs import Run

# Okabe & Ito, "Color Universal Design", 2008.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"

#: One colour a class, by label.
CLASSES = {"background": GREY, "target": BLUE, "other people": ORANGE}
#: One colour a loss.
LOSSES = {
    "total": BLACK,
    "ce": BLUE,
    "dice": ORANGE,
    "active_contour": GREEN,
    "boundary_aware": SKY,
    "contour": PURPLE,
    "distance": VERMILLION,
}
LOSS_NAMES = {
    "ce": "cross-entropy",
    "dice": "Dice",
    "active_contour": "active contour",
    "boundary_aware": "boundary-aware",
}
#: One colour a validation metric.
METRICS = {"target_iou": BLUE, "boundary_iou": GREEN, "miou": BLACK}
METRIC_NAMES = {"target_iou": "target IoU", "boundary_iou": "Boundary IoU", "miou": "mIoU"}
#: One colour a kind of wrong pixel.
ERRORS = {"missed": VERMILLION, "too much": SKY, "other people or background": YELLOW}
#: Gradient norms to look out for.
NORM_LINES = {10: (GREEN, "10: usual"), 50: (ORANGE, "50: high"), 100: (VERMILLION, "100: unstable")}

WIDTH = 10.0  # inches, a notebook's
DPI = 100


class Figure(_Figure):
    """A matplotlib figure that a notebook shows once, without pyplot's list of open figures."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def save(run: Run | str | os.PathLike, figure: _Figure, name: str) -> _Figure:
    """Write ``figures/<name>.png`` in the run's folder and return the figure, to be shown."""
    folder = _open(run).folder / "figures"
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.png"
    figure.savefig(temporary, dpi=DPI)
    os.replace(temporary, folder / f"{name}.png")
    return figure


# -- curves ----------------------------------------------------------------------------------------
def losses(run: Run | str | os.PathLike) -> Figure:
    """Total loss by step and by epoch above, each component (before its weight) in a panel of its own below."""
    run = _open(run)
    steps = run.steps()
    names = list(dict.fromkeys(name for line in steps for name in line["losses"]))
    rows = math.ceil(len(names) / 3)
    figure = _figure(run, "losses", height=2.9 + 2.0 * max(rows, 1))
    grid = figure.add_gridspec(1 + max(rows, 1), 3, height_ratios=[1.35, *[1] * max(rows, 1)])
    _total(figure.add_subplot(grid[0, :]), run)
    weights = _settings(run)
    for i, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + i // 3, i % 3])
        weight = weights.get(f"{name}_weight")
        values = [line["losses"].get(name) for line in steps]
        _line(axes, [line["step"] for line in steps], values, color=LOSSES.get(name, GREY))
        _loss_scale(axes, values)
        title = LOSS_NAMES.get(name, name) + ("" if weight is None else f"   (weight {weight:g})")
        _dress(axes, title, "step" if i + 3 >= len(names) else "", "loss" if i % 3 == 0 else "")
    return figure


def gradient_norm(run: Run | str | os.PathLike) -> Figure:
    """L2 norm of the gradient before clipping: mean and largest of each window of steps, against 10, 50 and 100."""
    run = _open(run)
    figure = _figure(run, "gradient norm", height=4.2)
    _gradient_norm(figure.add_subplot(), run)
    return figure


def learning_rate(run: Run | str | os.PathLike) -> Figure:
    """Learning rate by step; under fp16 the loss scale below it."""
    run = _open(run)
    scaled = _settings(run).get("amp") == "fp16"
    figure = _figure(run, "learning rate and loss scale" if scaled else "learning rate", height=5.4 if scaled else 3.4)
    top, *below = np.atleast_1d(figure.subplots(1 + scaled, 1, sharex=True))
    _learning_rate(top, run)
    for axes in below:
        top.set_xlabel("")
        steps = run.steps()
        values = [line.get("loss_scale") for line in steps]
        _line(axes, [line["step"] for line in steps], values, color=GREEN, drawstyle="steps-post")
        _dress(axes, "fp16 loss scale", "step", "factor")
        axes.set_yscale("log", base=2)
    return figure


def ious(run: Run | str | os.PathLike) -> Figure:
    """Validation by epoch: target IoU, Boundary IoU and mIoU on the left, the IoU of each class on the right."""
    run = _open(run)
    figure = _figure(run, "validation", height=4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    _ious(left, run)
    epochs = run.epochs()
    x = [line["epoch"] for line in epochs]
    for label, (name, color) in enumerate(CLASSES.items()):
        values = [(line["metrics"].get("iou") or [None] * 3)[label] for line in epochs]
        style = dict(marker="o", linestyle="--" if name == "other people" else "-")
        _line(right, x, values, color=color, label=name, crosses=False, **style)
    _dress(right, "IoU of each class, pixels of all ROIs pooled", "epoch", "", whole=True)
    _legend(right)
    return figure


def overview(run: Run | str | os.PathLike) -> Figure:
    """Loss, gradient norm, learning rate and IoUs on one page."""
    run = _open(run)
    figure = _figure(run, "overview", height=7.0)
    (a, b), (c, d) = figure.subplots(2, 2)
    _total(a, run)
    _gradient_norm(b, run)
    _learning_rate(c, run)
    _ious(d, run)
    return figure


# -- pictures --------------------------------------------------------------------------------------
def sample_grid(
    run: Run | str | os.PathLike,
    epoch: int | None = None,
    *,
    kinds: Sequence[str] = ("worst", "median", "best"),
    per_kind: int = 4,
) -> Figure:
    """Image, truth, prediction and error of validation ROIs.

    Args:
        epoch: counted from 1, as in the log; none: the last one that was validated.
        kinds: of ``worst``, ``median``, ``best`` (of that epoch) and ``fixed`` (the same ROIs in every epoch).
        per_kind: ROIs of each kind, at most; two stand side by side.

    Raises:
        ValueError: there are no samples of that epoch.
    """
    run = _open(run)
    found = sorted((run.folder / "samples").glob("epoch_*.npz"))
    files = {int(file.stem.rpartition("_")[2]): file for file in found}
    if epoch is not None and epoch not in files:
        known = ", ".join(map(str, files)) or "none yet"
        raise ValueError(f"{run.folder / 'samples'} holds no masks of epoch {epoch}; there are {known}")
    if not files:
        return _empty(run, "samples", "no epoch has been validated yet")
    epoch = epoch or max(files)
    with np.load(files[epoch], allow_pickle=False) as file:
        samples = {name: file[name] for name in file.files}
    groups = {kind: np.flatnonzero(samples["kind"] == kind)[:per_kind] for kind in kinds}
    groups = {kind: rois for kind, rois in groups.items() if len(rois)}
    if not groups:
        return _empty(run, f"samples of epoch {epoch}", "no validation ROI has a target")
    aspect = samples["image"].shape[1] / samples["image"].shape[2]
    # All in inches, from the top: a layout engine would make room for the long titles beside the tiles.
    edge, gap, middle, line = 0.08, 0.08, 0.3, 0.16
    width = (WIDTH - 2 * edge - 6 * gap - middle) / 8
    depths = [math.ceil(len(rois) / 2) for rois in groups.values()]
    height = 0.35 + sum(depths) * (aspect * width + 2 * line) + 0.1 * len(depths) + line + 0.35
    figure = _figure(run, f"samples of epoch {epoch}", height=height, layout=None)
    top = 0.35 + line
    for (kind, rois), depth in zip(groups.items(), depths):
        for i, roi in enumerate(rois):
            first = i < 2 and top < 1
            y = top + (i // 2) * (aspect * width + 2 * line) + 1.4 * line
            x = edge + (i % 2) * (4 * width + 3 * gap + middle)
            low, extent = 1 - (y + aspect * width) / height, (width / WIDTH, aspect * width / height)
            tiles = [figure.add_axes(((x + j * (width + gap)) / WIDTH, low, *extent)) for j in range(4)]
            _sample(tiles, *(samples[name][roi] for name in ("image", "labels", "probs")), samples["mask_size"])
            title = rf"$\bf{{{kind}}}$  target IoU {samples['target_iou'][roi]:.2f}, image {samples['image_id'][roi]}"
            heads = [title + "\nimage", "truth", "prediction", "error"] if first else [title, "", "", ""]
            for axes, head in zip(tiles, heads):
                axes.set_title(head, loc="left", fontsize=9, pad=3)
        top += depth * (aspect * width + 2 * line) + 0.1
    _key(figure, CLASSES | ERRORS, loc="lower center", bbox_to_anchor=(0.5, 0.05 / height))
    return figure


def rois(store: Any, count: int = 8) -> Figure:
    """Crops of a store (:class:`refinelib.data.Store`) and their labels, spread evenly over it."""
    from .roi import labels_from_coverage  # torch: only this figure needs it

    chosen = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
    images, coverage = store.gather(chosen)
    aspect = images.shape[1] / images.shape[2]
    figure = Figure(figsize=(WIDTH, 0.85 + 2 * aspect * WIDTH / len(chosen)), layout="constrained")
    title = f"{len(chosen)} of {len(store)} {store.split} ROIs and their labels"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    tiles = figure.subplots(2, len(chosen), squeeze=False)
    for (above, below), image, labels in zip(tiles.T, images.numpy(), labels_from_coverage(coverage).numpy()):
        for axes, picture in ((above, image), (below, _class_picture(labels))):
            _tile(axes, picture, _window(labels.shape, store.mask_size), aspect)
    _key(figure, CLASSES, loc="outside lower center")
    return figure


# -- words -----------------------------------------------------------------------------------------
def metrics_table(run: Run | str | os.PathLike) -> str:
    """Last and best validation as a Markdown table."""
    epochs = [line for line in _open(run).epochs() if line.get("metrics")]
    if not epochs:
        return "No epoch has been validated yet."
    last, best = epochs[-1], max(epochs, key=lambda line: line["metrics"].get("target_iou") or -1.0)
    rows = [
        ("target IoU", "mean over ROIs: overlap with this person", "target_iou"),
        ("Boundary IoU", "the same within a thin band along the outline", "boundary_iou"),
        ("mIoU", "mean of the three classes' IoU, pixels pooled", "miou"),
        ("boundary F, 2 px", "share of the outline that is hit within 2 px", "boundary_f1_2px"),
        ("surface distance, px", "mean distance between the outlines; less is better", "surface_distance"),
        ("95 % Hausdorff distance, px", "distance that 95 % of the outline stays below; less is better", "hd95"),
    ]
    lines = [f"| | last (epoch {last['epoch']}) | best (epoch {best['epoch']}) | what it says |"]
    lines.append("| --- | --- | --- | --- |")
    for name, meaning, key in rows:
        found = [line["metrics"].get(key) for line in (last, best)]
        if any(value is not None for value in found):
            shown = " | ".join("" if value is None else f"{value:.3f}" for value in found)
            lines.append(f"| {name} | {shown} | {meaning} |")
    return "\n".join(lines)


# -- panels ----------------------------------------------------------------------------------------
def _total(axes: Axes, run: Run) -> None:
    steps, epochs = run.steps(), run.epochs()
    values = [line["loss"] for line in steps]
    style = dict(linewidth=1.0, alpha=0.55, label="by window of steps")
    _line(axes, [line["step"] for line in steps], values, color=LOSSES["total"], **style)
    ends = [0, *(line["step"] for line in epochs)]
    middles = [(start + end) / 2 for start, end in zip(ends, ends[1:])]
    means = [line["train_loss"] for line in epochs]
    _line(axes, middles, means, color=LOSSES["total"], marker="o", linewidth=1.8, label="by epoch")
    _loss_scale(axes, values)
    _skips(axes, run)
    _dress(axes, "total training loss", "step", "loss")
    _legend(axes)


def _gradient_norm(axes: Axes, run: Run) -> None:
    steps = run.steps()
    x, mean = [line["step"] for line in steps], [line["grad_norm"] for line in steps]
    largest = [line.get("grad_norm_max") for line in steps]
    axes.set_yscale("log")
    _line(axes, x, largest, color=PURPLE, linewidth=1.0, marker="v", label="largest")
    _line(axes, x, mean, color=BLACK, linewidth=1.6, label="mean")
    positive = [value for value in (*mean, *largest) if value]
    axes.set_ylim(min([0.5, *(0.5 * value for value in positive)]), max([250.0, *(2.5 * value for value in positive)]))
    for level, (color, name) in NORM_LINES.items():
        axes.axhline(level, color=color, linewidth=1.2, linestyle="--", zorder=1, gid="limit")
        place = dict(xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right", va="bottom")
        axes.annotate(name, (0.995, level), (0, 1), **place, fontsize=8, color="#333333")
    clip = _settings(run).get("grad_clip")
    if clip:
        axes.axhline(clip, color=GREY, linewidth=1.0, linestyle=":", zorder=1, gid="limit", label=f"clip, {clip:g}")
    _skips(axes, run)
    _dress(axes, "gradient norm before clipping, by window of steps", "step", "L2 norm")
    _legend(axes)


def _learning_rate(axes: Axes, run: Run) -> None:
    steps = run.steps()
    _line(axes, [line["step"] for line in steps], [line["lr"] for line in steps], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _dress(axes, "learning rate", "step", "learning rate")


def _ious(axes: Axes, run: Run) -> None:
    epochs = run.epochs()
    x = [line["epoch"] for line in epochs]
    for name, color in METRICS.items():
        style = "--" if name == "miou" else "-"
        values = [line["metrics"].get(name) for line in epochs]
        _line(axes, x, values, color=color, marker="o", linestyle=style, label=METRIC_NAMES[name], crosses=False)
    scored = [(line["metrics"].get("target_iou"), epoch) for line, epoch in zip(epochs, x)]
    scored = [(value, epoch) for value, epoch in scored if value is not None]
    if scored:
        value, epoch = max(scored, key=lambda pair: pair[0])  # the first of equals, as the trainer keeps it
        axes.plot([epoch], [value], "*", markersize=15, color=BLUE, markeredgecolor="white", zorder=5)
        place = dict(textcoords="offset points", fontsize=8, ha="right" if epoch > 1 else "left")
        axes.annotate(f"best {value:.3f}", (epoch, value), (6, -18 if value > 0.9 else 9), **place)
    axes.set_ylim(0, 1)
    _dress(axes, "IoU on the validation people", "epoch", "IoU, 0 to 1", whole=True)
    _legend(axes)


def _sample(tiles: Iterable[Axes], image: np.ndarray, labels: np.ndarray, probs: np.ndarray, size: np.ndarray) -> None:
    predicted = probs.astype(np.float32).argmax(0)
    error = _error_picture(image, labels, predicted)
    for axes, picture in zip(tiles, (image, _class_picture(labels), _class_picture(predicted), error)):
        _tile(axes, picture, _window(labels.shape, size), image.shape[0] / image.shape[1])


def _tile(axes: Axes, picture: np.ndarray, window: tuple[float, float, float, float], aspect: float) -> None:
    """One picture over the unit square, with the box's outline where the crop is larger than the box."""
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect=aspect, interpolation="nearest")
    axes.set_axis_off()
    if window[2:] != (1.0, 1.0):
        left, top, width, height = window
        for style in (dict(edgecolor="white", linewidth=1.8), dict(edgecolor="black", linewidth=0.8, linestyle="--")):
            axes.add_patch(Rectangle((left, top), width, height, fill=False, **style))


def _window(canvas: Sequence[int], size: Sequence[int]) -> tuple[float, float, float, float]:
    height, width = (inner / outer for inner, outer in zip(size, canvas))
    return (1 - width) / 2, (1 - height) / 2, width, height


def _class_picture(labels: np.ndarray) -> np.ndarray:
    return ListedColormap(list(CLASSES.values()))(labels.astype(int), bytes=True)[..., :3]


def _error_picture(image: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The image in pale grey, wrong pixels in colour."""
    rows, columns = (np.arange(side) * whole // side for side, whole in zip(labels.shape, image.shape[:2]))
    grey = image[rows][:, columns].mean(-1, keepdims=True) * 0.35 + 160
    picture = np.broadcast_to(grey, (*labels.shape, 3)).astype(np.uint8)
    truth, found = labels == 1, predicted == 1
    for name, where in zip(ERRORS, (truth & ~found, found & ~truth, (labels != predicted) & ~truth & ~found)):
        picture[where] = [int(ERRORS[name][i : i + 2], 16) for i in (1, 3, 5)]
    return picture


# -- drawing ---------------------------------------------------------------------------------------
def _figure(run: Run, what: str, *, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure that says above what it shows, of which run, and how that run stands."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    if layout:
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    status = run.status()
    state, done, planned = status.get("state", "unknown"), status.get("epoch", 0), status.get("epochs")
    skipped = f", {status['skipped_steps']} steps skipped" if status.get("skipped_steps") else ""
    text = f"{run.name}: {what}   [{state}, epoch {done} of {planned or '?'}{skipped}]"
    color = BLACK if state in ("ok", "running") else VERMILLION
    place = {} if layout else dict(y=1 - 0.05 / height, va="top")  # a layout engine finds the height itself
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color, **place)
    return figure


def _empty(run: Run, what: str, message: str) -> Figure:
    figure = _figure(run, what, height=1.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", fontsize=11)
    return figure


def _line(
    axes: Axes, x: Sequence[float], values: Sequence[float | None], *, color: str, crosses: bool = True, **style: Any
) -> None:
    """A line with gaps where a value is none, and with ``crosses`` a cross at the upper edge there."""
    y = np.array([math.nan if value is None else value for value in values], dtype=float)
    alone = np.isfinite(y) & ~np.isfinite(np.r_[math.nan, y[:-1]]) & ~np.isfinite(np.r_[y[1:], math.nan])
    if "marker" not in style and alone.any():
        style["marker"], style["markevery"] = "o", np.flatnonzero(alone).tolist()
    crowded = len(x) > 40
    axes.plot(x, y, color=color, **{"linewidth": 1.5, "markersize": 2.5 if crowded else 4.5, **style})
    lost = [place for place, value in zip(x, y) if not math.isfinite(value)]
    if lost and crosses:
        place = dict(transform=axes.get_xaxis_transform(), clip_on=False, label="_", gid="nonfinite")
        axes.plot(lost, [0.96] * len(lost), "x", color=BLACK, markersize=3.5 if crowded else 6, **place)


def _skips(axes: Axes, run: Run) -> None:
    events = run.events()
    steps = [event["step"] for event in events if event["kind"] == "skip" and "step" in event]
    # Repeats within an epoch are told in one line, at the last of them.
    again = [event for event in events if event["kind"] == "again" and event.get("of") == "skip"]
    count = len(steps) + sum(event["count"] - 1 for event in again)
    steps += [event["step"] for event in again]
    if steps:
        place = dict(transform=axes.get_xaxis_transform(), label=f"skipped, {count}", gid="skips")
        axes.plot(steps, [0.025] * len(steps), "^", color=VERMILLION, markersize=5, **place)


def _loss_scale(axes: Axes, values: Sequence[float | None]) -> None:
    """Logarithmic where the values span more than a factor of 10."""
    finite = [value for value in values if value is not None]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")


def _dress(axes: Axes, title: str, x: str, y: str, *, whole: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if whole:  # few epochs: room at both ends for their dots
        axes.margins(x=0.06)
    if not any(line.get_gid() is None and len(line.get_xdata()) for line in axes.lines):
        place = dict(ha="center", va="center", transform=axes.transAxes)
        axes.text(0.5, 0.5, "nothing recorded yet", **place, fontsize=9, color="#555555")


def _legend(axes: Axes) -> None:
    """Between title and panel, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    if any(line.get_gid() == "nonfinite" for line in axes.lines):
        handles, labels = [*handles, Line2D([], [], color=BLACK, marker="x", linestyle="")], [*labels, "not finite"]
    if handles:
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=10, pad=20)
        place = dict(loc="lower left", bbox_to_anchor=(-0.01, 0.985), borderaxespad=0.1, ncols=len(handles))
        spacing = dict(handlelength=1.5, columnspacing=1.1, handletextpad=0.5)
        axes.legend(handles, labels, **place, **spacing, fontsize=8, frameon=False)


def _key(figure: Figure, colors: dict[str, str], **place: Any) -> None:
    entries = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in colors.items()]
    figure.legend(handles=entries, ncols=len(entries), fontsize=9, frameon=False, **place)


# -- reading ---------------------------------------------------------------------------------------
def _open(run: Run | str | os.PathLike) -> Run:
    return run if isinstance(run, Run) else Run.open(run)


def _settings(run: Run) -> dict[str, Any]:
    """The settings as recorded, as plain values; empty in the first moments of a run."""
    try:
        return run.config()["settings"]
    except (OSError, ValueError, KeyError):
        return {}
