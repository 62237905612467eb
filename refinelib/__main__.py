"""The command ``refinelib``: fetch data, train, score, predict, export, replay."""

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refinelib.files import dumps, shipped
from refinelib.runs import Run, latest

#: What a command that was interrupted says besides.
_AGAIN = {"train": "; the same command with -p resume true goes on", "fetch": "; the same command continues"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # A box that begins left of its image, -5,0,40,60: argparse takes it for an option unless it has a blank.
    given = [f" {one}" if re.match(r"-[\d.]\S*,", one) else one for one in given]
    options = vars(command_line().parse_args(given))
    command, execute = options.pop("command"), options.pop("execute")
    try:
        status = int(execute(**options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{command}: interrupted{_AGAIN.get(command, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 141
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="refinelib", description="Boundary-refined person masks.")
    commands = parser.add_subparsers(dest="command", required=True)
    switch = argparse.BooleanOptionalAction  # where it is not given, the run's own setting holds
    model, device, reading, settings = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    model.add_argument("run", help="a run's name or folder, or a checkpoint file")
    model.add_argument("--flip", action=switch, help="average with the mirror image, or not")
    model.add_argument("--output-dir", default="outputs", help="where runs are looked for by name")
    boxed = argparse.ArgumentParser(add_help=False)
    boxed.add_argument(
        "--refit", action=switch, help="replace a box that its first mask does not fit, or not"
    )
    device.add_argument("--device", default="auto", help="auto, cpu, mps, cuda, or one GPU as cuda:1")
    reading.add_argument("--annotations", help="COCO JSON of the people in the images")
    reading.add_argument("--category", help="names of the persons' categories in it; default: the run's")
    reading.add_argument("--exif", choices=["ignore", "apply"], help="how to turn images; default: the run's")
    listed = "`papermill --help-notebook notebooks/train.ipynb` lists them with their ranges"
    given: dict[str, Any] = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    settings.add_argument(
        "-p", dest="given", **given, help=f"a setting; {listed}; `run` takes values by commas"
    )

    def command(name: str, execute: Callable[..., int], *parents: Any) -> Callable[..., Any]:
        made = commands.add_parser(name, help=execute.__doc__, description=execute.__doc__, parents=parents)
        made.set_defaults(execute=execute)
        return made.add_argument

    add = command("evaluate", _evaluate, model, boxed, device, reading)
    add("--images", help="folder of the images")
    add("--pennfudan", help="in place of both, Penn-Fudan's folder (its validation images)")
    add("--max-images", type=int, help="score only the first so many images")
    add("--allow-images-outside", action=switch, help="images outside the folder, too, or not")
    add("--crowd", choices=["auto", "skip", "keep"], help="what iscrowd means")
    files = "report.json, people.csv, coco_results.json, for programs evaluation.npz, evaluation.json"
    add("--save", metavar="DIR", help=f"write there {files}")

    add = command("export", _export, model)
    add("--format", required=True, help="onnx, pt2, torchscript or safetensors")
    add("--out", metavar="FILE", help="file to write; default: beside the checkpoint")

    add = command("summary", _summary)
    add("run", help="a run's name or folder, or `latest`")

    add = command("replay", _replay, device)
    add("incident", help="an incident's folder, outputs/<run>/incidents/<step>")

    add = command("train", _train, settings)
    add("-f", dest="recipe", metavar="RECIPE", help="name of a file in params/, or a path")

    add = command("run", _run, settings)
    add("recipes", nargs="+", metavar="RECIPE", help="names of files in params/, or paths")
    add("--epochs", type=int, help="passes over the training set, for all of them")
    add("--batch-size", type=int, help="ROIs in a micro-batch, for all of them")
    add("--debug", action="store_true", help="a few images, two epochs, a small model")
    add("--seeds", dest="seed", metavar="SEEDS", help="by commas: a run for each")
    add("--jobs", type=int, help="runs at a time; default: one a GPU, one where there is none")
    add("--notebook", action=switch, default=True, help="through the notebook, or without it")

    add = command("check-data", _check_data, settings)
    add("--annotations", help="COCO JSON of the people in the images")
    add("--images", help="folder of the images")
    add("--out", default="outputs/check-data", help="folder for a picture of each split")

    add = command("predict", _predict, model, boxed, device, reading)
    add("path", help="an image, or a folder of images")
    add(
        "--boxes", nargs="+", default=[], metavar="X0,Y0,X1,Y1", help="in pixels; else those of --annotations"
    )
    add("--out", required=True, metavar="DIR", help="a folder for each image, coco_results.json")
    add("--overlays", action="store_true", help="also the image with its masks in colour")
    add("--overwrite", action="store_true", help="replace earlier predictions in DIR")

    command("doctor", _doctor, settings)

    add = command("fetch", _fetch)
    add("data", choices=["pennfudan", "coco-person"], help="coco-person: COCO's images of people")
    add("folder", metavar="DIR", help="folder to write into")
    add("--split", choices=["val", "train"], help="of COCO; default: val")
    add("--max-images", type=int, help="only the first so many images of COCO")
    add("--mirror", metavar="URL", help="address of a copy, in place of the authors' server")

    add = command("notebooks", _notebooks)
    add("folder", metavar="DIR", help="folder for them; nothing in it is overwritten")
    return parser


def _evaluate(save: str | None, **options: Any) -> int:
    """Score a run on annotated images; prints one JSON object."""
    from refinelib.metrics.evaluate import checked_folder, measure

    if save:
        checked_folder(save)  # before the work, not after it
    run, predictor = options["run"], _loaded(options)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the one JSON object
        print(f"{run} is scored on {predictor.device}, some images a second on a CPU", flush=True)
        found = measure(predictor, **options, progress=sys.stderr.isatty())
    print(dumps(found.report, indent=2), flush=True)  # first: it is worth more than the files
    for name in ("target_iou", "boundary_iou", "miou"):
        ends = found.report["intervals"][name] or ()
        value, *interval = (x if x is None else round(x, 3) for x in (found.report[name], *ends))
        print(f"{name}: {value}, 95 % interval {interval or 'unknown'}", file=sys.stderr)
    for file in found.save(save) if save else ():
        print(f"wrote {file}", file=sys.stderr)
    return 0


def _predict(path: str, out: str, overwrite: bool, **options: Any) -> int:
    """Write the masks of an image or a folder of images."""
    from refinelib.workflows.predict_io import check, predict_images

    image, folder = Path(path).expanduser(), Path(out).expanduser()
    check(image, folder, options["boxes"], options["annotations"], overwrite)
    predictor = _loaded(options)
    print(predict_images(predictor, image, folder, **options, progress=sys.stderr.isatty()))
    return 0


def _loaded(options: dict[str, Any]) -> Any:
    """The predictor that a command's options name; what is left of them is for the command."""
    from refinelib.metrics.predict import load

    names = ("device", "flip", "refit", "output_dir")
    return load(options.pop("run"), **{name: options.pop(name) for name in names})


def _doctor(given: list[list[str]]) -> int:
    """Say what this machine has for training, and what to fix."""
    from refinelib.workflows.doctor import examine

    fixes = 0
    for found in examine(dict(given)):
        print(found, flush=True)
        fixes += bool(found.fix)
    return 1 if fixes else 0


def _fetch(data: str, folder: str, split: str | None, max_images: int | None, mirror: str | None) -> int:
    """Fetch a data set; the same command goes on after an interruption."""
    from refinelib.metrics.evaluate import checked_folder
    from refinelib.workflows import fetch

    if mirror and not re.match(r"(https?|file|ftp)://", mirror):
        raise ValueError(f"--mirror {mirror} is no address: give one such as https://host/folder")
    place, how = checked_folder(folder), dict[str, Any](progress=sys.stderr.isatty())
    how |= {"mirror": mirror.rstrip("/")} if mirror else {}
    if data == "coco-person":
        print(fetch.coco_person(place, split or "val", max_images=max_images, **how))
    elif split or max_images is not None:
        raise ValueError("Penn-Fudan is fetched whole: leave --split and --max-images out")
    else:
        print(fetch.pennfudan(place, **how))
    return 0


def _export(**options: Any) -> int:
    """Write a run's model as one file for another runtime."""
    from refinelib.export import export

    print(export(**options).sentence)
    return 0


def _replay(incident: str, device: str) -> int:
    """Replay an incident; prints one JSON object."""
    from refinelib.incidents import replay

    finding = replay(incident, device=device)
    print(dumps(finding.as_dict(), indent=2))
    print(finding.sentence, file=sys.stderr)
    return 0


def _summary(run: str) -> int:
    """Print a run's metrics and where its figures lie."""
    found = latest() if run == "latest" else Run.open(run)
    print(found.summary())
    return 0 if found.status()["state"] in ("ok", "running") else 1


def _train(recipe: str | None, given: list[list[str]]) -> int:
    """Train a recipe in this process; returns 0 if the run ends as ok."""
    from refinelib.config import resolve
    from refinelib.launch import Follower
    from refinelib.trainer import train

    run = train(resolve(recipe, **dict(given)))
    if not isinstance(run, Follower):  # of several processes one prints it
        print(run.summary())
    return 0


def _check_data(annotations: str | None, images: str | None, given: list[list[str]], out: str) -> int:
    """Read a data set once and say what training would use."""
    from refinelib.config import resolve
    from refinelib.data import make_source
    from refinelib.metrics.evaluate import checked_folder
    from refinelib.workflows.checks import check_data

    overrides, splits = dict(given), ["train", "val"]
    if annotations or images:
        if not (annotations and images) or overrides.get("data", "coco") != "coco":
            raise ValueError("give --annotations and --images, of COCO's kind, or settings with -p, not both")
        overrides |= {"data": "coco", "val_annotations": annotations, "val_images": images}
        splits = ["val"]
    settings, folder = resolve("original", **overrides), checked_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        picture = folder / f"{split}.png"
        source, progress = make_source(settings, split), sys.stderr.isatty()
        print(check_data(source, picture, max_images=settings.max_images, progress=progress))
        print(f"picture: {picture}", flush=True)
    return 0


def _notebooks(folder: str) -> int:
    """Copy the notebooks into a folder, to change and run there."""
    from refinelib.metrics.evaluate import checked_folder

    target, notebooks = checked_folder(folder), sorted((shipped() / "notebooks").glob("*.ipynb"))
    if there := [file.name for file in notebooks if (target / file.name).exists()]:
        raise ValueError(f"{target} already holds {', '.join(there)}: give another folder, or move them away")
    target.mkdir(parents=True, exist_ok=True)
    for file in notebooks:
        print(f"wrote {shutil.copyfile(file, target / file.name)}")
    print(f"open them: jupyter lab --notebook-dir={target}")
    return 0


def _run(
    recipes: list[str], given: list[list[str]], debug: bool, jobs: int | None, notebook: bool, **others: Any
) -> int:
    """Train recipes x values x seeds, through notebooks/train.ipynb."""
    from refinelib.workflows import batch

    overrides = dict(given) | {name: value for name, value in others.items() if value is not None}
    plan = batch.plan(recipes, overrides, debug=debug)
    outcomes = batch.train(plan, at_once=jobs, command=None if notebook else batch.REFINELIB)
    print("\n" + batch.table(outcomes))
    if len(outcomes) > 1:
        print(f"\ncompare them: {batch.compare_command(batch.save(outcomes))}")
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
