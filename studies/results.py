"""Runs compared: over seeds, over images, with refinement and without."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refinelib.config import Settings, SettingsError, absolute, names_with_role
from refinelib.data import CocoPeople, Source, SyntheticPeople
from refinelib.files import read_json, read_npz
from refinelib.metrics.evaluate import ARRAYS, REST, Evaluation, measure
from refinelib.metrics.predict import load
from refinelib.metrics.segmentation import (
    ImageBootstrap,
    coco_groups,
    iou_from_confusion,
    metrics_device,
    tercile_groups,
)
from refinelib.registry import LOSSES, METRICS, REFINEMENTS
from refinelib.workflows import examples
from studies.box_jitter import SIGMAS, jitter_curve

#: Settings that take all refinement away: the switches of refinements and of losses.
REFINEMENT_OFF = {
    option.name: False
    for option in (*REFINEMENTS.options(), *LOSSES.options())
    if option.name.startswith("use_")
}
#: Bytes of the largest JSON file of an evaluation that is read; COCO's 5000 val images make some 15 MB.
MOST_JSON = 256 << 20
#: Keys of reports that were written under other names, and the names.
RENAMED = {"blind": "mean_mask", "grid": "resolution_bound", "by_third": "by_tercile"}
#: Settings that make no variant of a run, beside those of where it lies.
_NO_VARIANT = {"seed", "fused_optimizer"}


def title(key: str) -> str:
    """Title of a column of an evaluation's rows, with its unit."""
    if key == "miou":
        return "mIoU"
    metric = METRICS[key.removeprefix("image_")]
    place = ", in the image" if key.startswith("image_") and not metric.needs_image else ""
    return metric.title + (f", {metric.unit}" if metric.unit else "") + place


class Result(NamedTuple):
    """One run, scored."""

    name: str
    settings: Settings
    evaluation: Evaluation


class Estimate(NamedTuple):
    """A mean over runs with its spread over them and its interval over images; None: does not apply."""

    mean: float
    spread: float | None  # standard deviation over runs (n - 1); none for a single run
    interval: tuple[float, float] | None  # 95 %, bootstrap over images, of the mean over runs

    def __str__(self) -> str:
        return self.text("")

    def text(self, sign: str) -> str:
        """``mean ± spread [interval]``; ``sign`` is ``+`` for a difference."""
        spread = "" if self.spread is None else f" ± {self.spread:.3f}"
        ends = (
            "" if self.interval is None else f" [{self.interval[0]:{sign}.3f}, {self.interval[1]:{sign}.3f}]"
        )
        return f"{self.mean:{sign}.3f}{spread}{ends}"


def tiny_pair(output_dir: str = "outputs") -> tuple[list[str], list[str]]:
    """Folders of two tiny runs, with and without refinement; they are trained where they are missing."""
    pair = {"tiny-refined": {}, "tiny-plain": REFINEMENT_OFF}
    find = functools.partial(examples.find, output_dir=output_dir, fits=examples.has_weights)
    refined, plain = ([str(find(name=name, **changes).folder)] for name, changes in pair.items())
    return refined, plain


def source_of(
    images: str | None = None,
    annotations: str | None = None,
    *,
    synthetic_images: int = 60,
    allow_images_outside: bool = False,
) -> Source:
    """Annotated images: a COCO file's, or synthetic people where none is given.

    Args:
        images: folder of the COCO file's images.
        annotations: COCO file.
        synthetic_images: number of images with synthetic people.
        allow_images_outside: read images that the file names outside their folder, too.

    Raises:
        DataError: a file or folder is missing.
        SettingsError: one of the two was given without the other.
    """
    if (images is None) != (annotations is None):
        raise SettingsError(
            "images and annotations belong together: give both, or neither for synthetic people"
        )
    if images is None:
        return SyntheticPeople(synthetic_images, split="val")
    return CocoPeople(annotations, images, split="val", allow_outside=allow_images_outside)


def hidden_images(source: Source, licences: str | int | list[int] | None = None) -> list[int]:
    """Ids of the images of a COCO file whose ``license`` is none of these numbers; none given: no image.

    Args:
        source: of :func:`source_of`.
        licences: numbers, one number, or a text with commas.
    """
    if not licences or not isinstance(source, CocoPeople):
        return []
    given = (
        licences
        if isinstance(licences, Sequence) and not isinstance(licences, str)
        else str(licences).split(",")
    )
    shown = {int(one) for one in given}
    return [image["id"] for image in source.read()["images"] if image.get("license") not in shown]


def score_runs(
    runs: Iterable[str | os.PathLike],
    source: Source,
    *,
    output_dir: str = "outputs",
    device: str = "auto",
    jitter: bool | Iterable[float] = False,
    **options: Any,
) -> list[Result]:
    """Score each run on the same images, a line each.

    Args:
        runs: names, folders or checkpoint files; or folders that ``python -m refinelib evaluate --save``
            wrote, which are taken as
            they are: scored on another machine, say.
        source: of scenes.
        output_dir: where runs are looked for by name.
        device: ``auto``, ``cpu`` or ``cuda``.
        jitter: also measure box jitter of :data:`studies.box_jitter.SIGMAS`, or of the shares given; the
            report has
            the curve as ``jitter``.
        **options: of :func:`refinelib.metrics.evaluate.measure`, such as ``max_images``.

    Raises:
        CheckpointError: there is no such run, or it has no whole checkpoint; before any is scored.
        ValueError: a saved evaluation is not whole, or is of other people.
    """
    # Each is opened before anything is scored, so that a wrong name shows at once.
    opened = [_saved(run) or load(run, device=device, output_dir=output_dir) for run in runs]
    _refuse_other_people(
        [one for one in opened if isinstance(one, Evaluation)], source, options.get("max_images")
    )
    results = []
    for one in opened:
        found = one if isinstance(one, Evaluation) else measure(one, source=source, **options)
        if jitter is not False and not isinstance(one, Evaluation):
            where = dict(
                device=metrics_device(one.device),
                max_images=options.get("max_images"),
                only=found.people["annotation_id"],
            )
            sigmas = SIGMAS if jitter is True else jitter
            found.report["jitter"] = jitter_curve(one.located, source, sigmas=sigmas, **where)
        result = Result(found.name, found.settings, found)
        reached = ", ".join(
            f"{title(key)} {shown(found.report[key])}" for key in ("target_iou", "boundary_iou", "miou")
        )
        print(
            f"{result.name} (recipe {result.settings.recipe}, seed {result.settings.seed}): {reached}",
            flush=True,
        )
        results.append(result)
    return results


def _saved(folder: str | os.PathLike) -> Evaluation | None:
    """The evaluation that was saved there; none where the folder is something else.

    Raises:
        ValueError: it is not whole.
    """
    folder = absolute(folder)
    return read_evaluation(folder) if (folder / ARRAYS).is_file() else None


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """What :meth:`Evaluation.save` wrote, without the run, its weights or the images.

    Raises:
        ValueError: the folder holds no evaluation, or one that is not whole.
    """
    folder = Path(folder).expanduser()
    try:
        arrays = read_npz(folder / ARRAYS, {"confusion": "iu n33"})
        confusion = arrays.pop("confusion")
        people = {key.removeprefix("people."): column for key, column in arrays.items()}
        names = (REST, "report.json", "coco_results.json")
        rest, report, results = (read_json(folder / name, limit=MOST_JSON) for name in names)
        masks = {int(key): mask for key, mask in rest["masks"].items()}
        if any(column.shape != confusion.shape[:1] for column in people.values()):
            raise ValueError("its columns have different lengths")
        if max((math.prod(mask["size"]) for mask in masks.values()), default=0) >= 2**28:
            raise ValueError("a mask in it is larger than any image")
        settings = Settings(**rest["settings"])
        return Evaluation(_renamed(report), people, results, masks, confusion, rest["name"], settings)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        again = f"make it again with `python -m refinelib evaluate RUN --save {folder}`"
        raise ValueError(f"{folder} holds no whole evaluation ({error}): {again}") from None


def _renamed(report: Any) -> Any:
    """A report with today's keys."""
    if isinstance(report, dict):
        return {RENAMED.get(key, key): _renamed(value) for key, value in report.items()}
    return report


def _refuse_other_people(saved: Sequence[Evaluation], source: Source, max_images: int | None) -> None:
    """Raises ValueError where an evaluation is of people that the source does not have."""
    known = set(source.instances(max_images).annotation_ids.tolist()) if saved else set()
    for one in saved:
        mine = set(one.people["annotation_id"].tolist())
        if not mine <= known:
            raise ValueError(
                f"{one.name} was scored on other images ({len(mine - known)} of its {len(mine)} people are "
                "not among these): give the images it was scored on"
            )


def by_settings(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Runs by variant: those that differ in the seed only; named by what differs from the first run."""
    groups: list[list[Result]] = []
    for result in results:
        mine = next((group for group in groups if not _changes(group[0], result)), None)
        if mine is None:
            groups.append([result])
        else:
            mine.append(result)
    named: dict[str, list[Result]] = {}
    for group in groups:
        changes = _changes(groups[0][0], group[0])
        named[_title(group[0], changes)] = group
    return named


def shown(value: float | None) -> str:
    """Three decimals; nothing for none."""
    return "" if value is None else f"{value:.3f}"


# -- figures of several runs -----------------------------------------------------------------------
def estimate(results: Sequence[Result], key: str, inside: np.ndarray | None = None) -> Estimate | None:
    """A metric of runs that were scored on the same people, ``inside`` (bool ``[N]``) or all.

    Raises:
        ValueError: the runs were scored on different people.
    """
    images = _images(results)
    return _estimate(_stack(results, key), images, key, inside)


def difference(
    on: Sequence[Result], off: Sequence[Result], key: str, inside: np.ndarray | None = None
) -> Estimate | None:
    """``on`` less ``off``, paired over images; the spread is that of independent runs' difference.

    Args:
        on: runs with it.
        off: runs without, scored on the same people.
        key: of the rows.
        inside: bool ``[N]``, limits it to these people.
    """
    people = _images([*on, *off])
    first, second = _stack(on, key), _stack(off, key)
    if inside is not None:
        first, second, people = first[inside], second[inside], people[inside]
    if not len(people):
        return None
    draw = ImageBootstrap(people)
    if key == "miou":
        counts = torch.cat([first, second], dim=1)

        def lead(sums: Tensor) -> Tensor:
            each = _miou(sums)
            return each[:, : len(on)].mean(-1) - each[:, len(on) :].mean(-1)

        mean, interval = float(lead(counts.sum(0, keepdim=True))), draw.pooled(counts, lead)
    else:
        gain = first.mean(1) - second.mean(1)
        mean, interval = float(gain.nanmean()), draw.mean(gain)
    if np.isnan(mean):
        return None
    spreads = [_spread(_by_run(values, key)) for values in (first, second)]
    spread = None if None in spreads else float(np.hypot(*spreads))
    return Estimate(mean, spread, interval)


def size_groups(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """Membership in groups of size, bool ``[N]`` by title: all, COCO's groups, terciles of the people."""
    areas = torch.as_tensor(results[0].evaluation.people["area"].astype(float))
    groups = {"all": np.ones(len(areas), dtype=bool)}
    groups |= {f"{name} (COCO)": inside.numpy() for name, (inside, _) in coco_groups(areas).items()}
    return groups | {f"{name} tercile": inside.numpy() for name, (inside, _) in tercile_groups(areas).items()}


# -- helpers ---------------------------------------------------------------------------------------
def _changes(first: Result, second: Result) -> dict[str, Any]:
    """Settings that decide what is learned, and differ."""
    then, now = first.settings.model_dump(), second.settings.model_dump()
    return {
        name: now[name]
        for name in now
        if name not in _NO_VARIANT | names_with_role("run") and now[name] != then[name]
    }


def _title(first: Result, changes: dict[str, Any]) -> str:
    """What sets a variant apart, in words; "refinement off" where nothing of it is left."""
    if not changes:
        return f"as {first.name}"
    off = [name for name in REFINEMENT_OFF if name in changes and not changes[name]]
    if off and not any(getattr(first.settings, name) for name in REFINEMENT_OFF):
        changes = {"refinement": "off", **{name: value for name, value in changes.items() if name not in off}}
    return "; ".join(f"{name} = {value}" for name, value in changes.items())


def _stack(results: Sequence[Result], key: str) -> Tensor:
    """``[N, runs]`` of a figure, or ``[N, runs, 3, 3]`` of pixel counts for mIoU."""
    if key == "miou":
        return torch.stack([torch.as_tensor(run.evaluation.confusion).double() for run in results], dim=1)
    return torch.stack([torch.as_tensor(run.evaluation.people[key]).double() for run in results], dim=1)


def _images(results: Sequence[Result]) -> np.ndarray:
    """The image of each person, once it is sure that all runs were scored on the same people."""
    if not results:
        raise ValueError("no run to compare: give at least one")
    first = results[0]
    for run in results[1:]:
        if not np.array_equal(
            run.evaluation.people["annotation_id"], first.evaluation.people["annotation_id"]
        ):
            raise ValueError(
                f"{run.name} and {first.name} were scored on different people: score both on the same images"
            )
    return first.evaluation.people["image_id"]


def _estimate(values: Tensor, images: np.ndarray, key: str, inside: np.ndarray | None) -> Estimate | None:
    if inside is not None:
        values, images = values[inside], images[inside]
    if not len(images):
        return None
    each = _by_run(values, key)
    if each.isnan().any():
        return None
    draw = ImageBootstrap(images)
    if key == "miou":
        interval = draw.pooled(values, lambda sums: _miou(sums).mean(-1))
    else:
        interval = draw.mean(values.mean(1))
    return Estimate(float(each.mean()), _spread(each), interval)


def _miou(counts: Tensor) -> Tensor:
    """Mean IoU over the classes that the truth holds, ``[...]`` from ``[..., 3, 3]``.

    Where a few people are compared the truth may hold nobody else; a run that sees some all the same would be
    averaged over three classes and another over two.
    """
    return iou_from_confusion(counts).where(counts.sum(-1) > 0, torch.nan).nanmean(-1)


def _by_run(values: Tensor, key: str) -> Tensor:
    return _miou(values.sum(0)) if key == "miou" else values.nanmean(0)


def _spread(each: Tensor) -> float | None:
    return float(each.std()) if len(each) > 1 else None
