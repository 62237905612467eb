"""How good are the masks, and what is each part worth? Train variants of a recipe over seeds, and compare.

    python bench/quality.py --data-dir COCO --pennfudan PENNFUDAN --variants on,off --seeds 0,1,2

Runs are shared out over the GPUs there are, ``--parallel`` at a time on each. The first run of a shape
compiles its step. Prints the lines of every run and a JSON line a finished run, flushed, then two tables:
mean over seeds and their spread at the end of training, and each variant against the first, seed by seed.
Runs stay in ``--output-dir`` with their table, for notebooks/results.ipynb (intervals, sizes, pictures).
``--evaluations DIR --images IMAGES --annotations JSON`` saves what it needs of them; ``--keep FILE`` packs
their results, without weights.

bench/quality.md holds the outcome.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from children import end_with_me

from refinelib import resolve
from refinelib.config import SettingsError, absolute
from refinelib.plots.style import table as markdown
from refinelib.workflows import batch
from studies.results import REFINEMENT_OFF

#: ``nontarget_pooled`` is of all crops' pixels together; ``nontarget_iou`` is a mean over crops.
FIGURES = ("target_iou", "boundary_iou", "miou", "nontarget_iou", "nontarget_pooled")
#: Target IoU that a plain ResNet-34 U-Net reaches in 60 epochs of the same data.
EARLY = 0.66

#: What each variant changes in the recipe.
VARIANTS = {
    "on": {},
    "off": REFINEMENT_OFF,
    "no boundary refinement": {"use_boundary_refinement": False},
    "no progressive upsampling": {"use_progressive_upsampling": False},
    "no contour detection": {"use_contour_detection": False},
    "no distance transform": {"use_distance_transform": False},
    "no active contour loss": {"use_active_contour_loss": False},
    "no boundary-aware loss": {"use_boundary_aware_loss": False},
    "sub-pixel for progressive": {"use_progressive_upsampling": False, "use_subpixel_conv": True},
    "no context": {"context": 0.0, "loss_context": 0.0},
    "half the box around": {"context": 0.5},
    "augment full": {"augment": "full"},
    "augment flip": {"augment": "flip"},
    "no moving average": {"ema_decay": 0.0},
    "coarse as fine": {"coarse_width": 1.0, "coarse_depth": 1},
    "likeliest class": {"target_decision_weight": 1.0, "nontarget_decision_weight": 1.0},
    "width 0.25": {"width": 0.25},
    "width 1": {"width": 1.0},
}


def figures(metrics: dict) -> dict[str, float | None]:
    """The ``FIGURES`` of one validation, or of a group of its people."""
    return {name: metrics["iou"][2] if name == "nontarget_pooled" else metrics[name] for name in FIGURES}


def run_name(variant: str, seed: int) -> str:
    """Name of a variant's run."""
    return f"{variant.replace(' ', '-')}-{seed}"


def job(variant: str, seed: int, settings: dict) -> batch.Job:
    """A run of a variant; raises SettingsError."""
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"seed": seed, "run": run_name(variant, seed)}
    return batch.Job(given["run"], resolve(**given), given)


def figures_of(outcome: batch.Outcome) -> dict:
    """What a finished run reached, and how long it took: epochs without their validations.

    ``first_step`` is what the first epoch took longer than the middle one: compilation.
    """
    epochs = outcome.run.epochs()
    metrics, seconds = epochs[-1]["metrics"], [line["seconds"] for line in epochs]
    parts = {**metrics["by_size"], **metrics["by_tercile"]}
    compilation = seconds[0] - statistics.median(seconds)
    early = [line["epoch"] for line in epochs if (line["metrics"].get("target_iou") or 0) >= EARLY]
    return {
        "run": outcome.job.name,
        "done": True,
        "folder": str(outcome.run.folder),
        **figures(metrics),
        "groups": {group: figures(part) for group, part in parts.items() if part["rois"]},
        "skipped": outcome.run.status()["skipped_steps"],
        "first_step": round(compilation, 1),
        "training": round(sum(seconds) - compilation, 1),
        "early": round(sum(seconds[: early[0]]) - compilation, 1) if early else None,
        "seconds": round(outcome.seconds, 1),
    }


def run_all(
    jobs: Sequence[batch.Job],
    *,
    parallel: int,
    command: Sequence[str] = batch.REFINELIB,
    judge: list[str] | None = None,
) -> dict[str, dict]:
    """Train every job in a process of its own; :func:`figures_of` those that finished, by name.

    Args:
        jobs: in the order they are started in.
        parallel: runs at a time on each GPU.
        command: as :func:`refinelib.workflows.batch.train` takes it.
        judge: arguments of ``python -m refinelib evaluate`` for the last weights of every run, in which
            ``{run}`` is its folder's name.
    """
    finished = {}

    def ended(outcome: batch.Outcome, environment: dict[str, str]) -> None:
        name = outcome.job.name
        if outcome.state != "ok":
            print(json.dumps({"run": name, outcome.state: outcome.error}), flush=True)
            return
        finished[name] = figures_of(outcome)
        print(json.dumps(finished[name]), flush=True)
        if judge is not None:
            folder = outcome.run.folder
            words = [
                str(folder / "checkpoints" / "last.pt"),
                *(part.replace("{run}", folder.name) for part in judge),
            ]
            line = [*batch.REFINELIB, "evaluate", *words]
            judged = subprocess.run(line, env=environment, capture_output=True, text=True)
            if judged.returncode:
                print(
                    json.dumps({"run": name, "not judged": judged.stderr.strip().splitlines()[-1:]}),
                    flush=True,
                )

    outcomes = batch.train(
        jobs, at_once=parallel * max(1, torch.cuda.device_count()), command=command, ended=ended
    )
    print(f"table of the runs: {batch.save(outcomes)}")
    return finished


def table(finished: dict[str, dict], variants: list[str], seeds: list[int]) -> str:
    """Means over seeds, then each variant against the first, seed by seed, in Markdown."""
    runs: dict[str, dict] = {variant: {} for variant in variants}
    for variant, seed in itertools.product(variants, seeds):
        if run_name(variant, seed) in finished:
            runs[variant][seed] = finished[run_name(variant, seed)]
    lines = [["variant", "seeds", *FIGURES, "training, s", "to 0.66, s", "skipped"]]
    for variant, mine in runs.items():
        cells = [_spread([run[name] for run in mine.values()]) for name in (*FIGURES, "training", "early")]
        lines.append([variant, len(mine), *cells, sum(run["skipped"] for run in mine.values())])
    gains = [[f"{variants[0]} less ..., points", "people", "seeds", *FIGURES]]
    for variant in variants[1:]:
        pairs = [
            (runs[variants[0]][seed], run) for seed, run in runs[variant].items() if seed in runs[variants[0]]
        ]
        for group in ("all", *(pairs[0][0]["groups"] if pairs else ())):
            sides = [[run if group == "all" else run["groups"][group] for run in pair] for pair in pairs]
            cells = [
                _spread(
                    [None if None in (a[name], b[name]) else 100 * (a[name] - b[name]) for a, b in sides],
                    digits=1,
                )
                for name in FIGURES
            ]
            gains.append([variant, group, len(pairs), *cells])
    return "\n\n".join(markdown(rows, head) for head, *rows in (lines, gains) if rows)


def _spread(values: list[float | None], digits: int = 3) -> str:
    """Mean (least to most) of those that there are."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.mean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def pack(file: Path, finished: dict[str, dict]) -> None:
    """What the runs reached, without their weights: records, settings, samples."""
    with tarfile.open(file, "w:gz") as archive:
        for record in finished.values():
            folder = Path(record["folder"])
            for path in sorted(folder.rglob("*")):
                if (
                    path.is_file()
                    and path.suffix != ".pt"
                    and "tb" not in path.parts
                    and "gradients" not in path.parts
                ):
                    archive.add(path, arcname=path.relative_to(folder.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--data-dir", help="folder of COCO persons")
    parser.add_argument("--store-dir", help="folder of stores built before, where the images are not at hand")
    parser.add_argument("--pennfudan", help="folder of Penn-Fudan, whose training people join")
    parser.add_argument("--output-dir", default="outputs/quality")
    parser.add_argument("--variants", default="on,off", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time on each GPU")
    parser.add_argument(
        "--evaluations",
        type=Path,
        help="a folder for evaluations of the last weights, which notebooks/results.ipynb takes as runs",
    )
    parser.add_argument("--images", help="for these, the folder of images")
    parser.add_argument("--annotations", help="and the COCO JSON of the people in them")
    parser.add_argument("--keep", type=Path, help="a .tar.gz for what the runs reached, without weights")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of all runs"
    )
    options = parser.parse_args()
    variants, seeds = options.variants.split(","), [int(seed) for seed in options.seeds.split(",")]
    if options.evaluations and not (options.images and options.annotations):
        parser.error("--evaluations needs --images and --annotations: the people to judge by")
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        parser.error(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    common = {
        "recipe": options.recipe,
        "data": "coco",
        "data_dir": options.data_dir,
        "store_dir": options.store_dir,
        "add_pennfudan": options.pennfudan,
    }
    common |= {"output_dir": str(absolute(options.output_dir)), **dict(options.p)}
    try:
        jobs = [job(variant, seed, {**common, **VARIANTS[variant]}) for seed in seeds for variant in variants]
    except SettingsError as error:  # before anything is trained
        parser.error(str(error))
    judge = None
    if options.evaluations:
        judge = [
            "--images",
            options.images,
            "--annotations",
            options.annotations,
            "--save",
            str(absolute(options.evaluations) / "{run}"),
        ]
    finished = run_all(jobs, parallel=options.parallel, judge=judge)
    print("\n" + table(finished, variants, seeds))
    if options.keep:
        pack(options.keep, finished)


if __name__ == "__main__":
    end_with_me()
    main()
