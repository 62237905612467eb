"""Tables that compare runs, in Markdown, and their files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from refinelib.plots.style import table
from studies.results import Estimate, Result, by_settings, difference, estimate, shown, size_groups, title


def runs_table(
    groups: dict[str, Sequence[Result]],
    keys: Iterable[str] = ("target_iou", "boundary_iou", "miou", "nontarget_iou"),
) -> str:
    """A row a group of runs (mean ± spread over runs [95 % interval over images]), then two baselines."""
    keys = list(keys)
    rows = [
        [name, len(runs), *(estimate(runs, key) for key in keys)] for name, runs in groups.items() if runs
    ]
    report = next(iter(groups.values()))[0].evaluation.report
    inside = {key: key.removeprefix("image_") for key in keys}
    yardsticks = {
        "mean-mask baseline": (report["mean_mask"], report["image"]["mean_mask"]),
        "resolution upper bound": (report["resolution_bound"],) * 2,
    }
    for name, (on_roi, in_image) in yardsticks.items():
        values = [(in_image if key.startswith("image_") else on_roi).get(inside[key]) for key in keys]
        rows.append([f"*{name}*", "", *(shown(value) for value in values)])
    return table(rows, ["", "runs", *(title(key) for key in keys)])


def every_run_table(groups: dict[str, Sequence[Result]]) -> str:
    """A row a run: its metrics on the ROIs; below, in the image and by pycocotools."""
    keys = (
        "target_iou",
        "boundary_iou",
        "miou",
        "nontarget_iou",
        "boundary_f1_1px",
        "boundary_f1_2px",
        "hd95",
        "surface_distance",
    )
    on_roi, in_image = [], []
    for group, runs in groups.items():
        for run in runs:
            report = run.evaluation.report
            on_roi.append([run.name, group, run.settings.seed, *(shown(report[key]) for key in keys)])
            scores = (shown(report["coco"][key]) for key in ("AP", "AP50", "AP75"))
            in_image.append(
                [run.name, group, run.settings.seed, shown(report["image"]["boundary_iou_image"]), *scores]
            )
    who = ["run", "group", "seed"]
    above = table(on_roi, [*who, *(title(key) for key in keys)])
    return above + "\n\n" + table(in_image, [*who, title("image_boundary_iou_image"), "AP", "AP50", "AP75"])


def paired_table(
    on: Sequence[Result],
    off: Sequence[Result],
    keys: Iterable[str] = ("target_iou", "boundary_iou", "boundary_f1_1px", "miou"),
) -> str:
    """What ``on`` gains over ``off``, by size: difference ± spread [95 % interval over images, paired].

    Bold where the interval leaves out 0.
    """
    keys = list(keys)
    rows = []
    for name, inside in size_groups([*on, *off]).items():
        cells = [_gain(difference(on, off, key, inside)) for key in keys]
        rows.append([name, int(inside.sum()), *cells])
    return table(rows, ["people", "number", *(title(key) for key in keys)])


def ablation_table(
    results: Iterable[Result], keys: Iterable[str] = ("target_iou", "boundary_iou", "boundary_f1_1px", "miou")
) -> str:
    """What the first variant gains over every other, the most Boundary IoU first; see :func:`paired_table`.

    Only seeds that both kinds have are compared, if there are any: seeds differ by more than most parts are
    worth.

    Args:
        results: runs scored on the same people; those that differ in their seed only are one variant.
        keys: of the metrics.
    """
    keys = list(keys)
    (_, whole), *others = by_settings(results).items()
    pairs = {name: _of_shared_seeds(whole, runs) for name, runs in others}
    gains = {
        name: {key: difference(*pair, key) for key in dict.fromkeys([*keys, "boundary_iou"])}
        for name, pair in pairs.items()
    }
    order = sorted(
        gains,
        key=lambda name: -1.0 if (lost := gains[name]["boundary_iou"]) is None else lost.mean,
        reverse=True,
    )
    rows = [
        [
            name,
            ", ".join(map(str, sorted(_seeds(pairs[name][1])))),
            *(_gain(gains[name][key]) for key in keys),
        ]
        for name in order
    ]
    return table(rows, [f"{whole[0].name} less the same with", "seeds", *(title(key) for key in keys)])


def _seeds(runs: Sequence[Result]) -> set[int]:
    return {run.settings.seed for run in runs}


def _of_shared_seeds(*kinds: Sequence[Result]) -> list[Sequence[Result]]:
    """Of each kind the runs whose seed all of them have; all runs where they share none."""
    shared = set.intersection(*map(_seeds, kinds))
    return [[run for run in runs if run.settings.seed in shared] if shared else runs for runs in kinds]


def _gain(gain: Estimate | None) -> str:
    """A difference; bold where its interval leaves out 0."""
    if gain is None:
        return "none"
    sure = gain.interval is not None and gain.interval[0] * gain.interval[1] > 0
    return f"**{gain.text('+')}**" if sure else gain.text("+")


def save_all(groups: dict[str, Sequence[Result]], folder: str | os.PathLike) -> list[Path]:
    """Write each run's report, rows and COCO results into a folder of its name; returns the folders."""
    folders = []
    for runs in groups.values():
        for run in runs:
            run.evaluation.save(Path(folder) / run.name)
            folders.append(Path(folder) / run.name)
    return folders
