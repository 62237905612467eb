"""``python -m refinelib``: train recipes in a row, score, summarise or replay from the shell."""

from __future__ import annotations

import argparse
import contextlib
import sys

from refinelib.files import dumps
from refinelib.runs import Run, latest

DEVICES = ["auto", "cpu", "cuda"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m refinelib", description="Boundary-refined person masks.")
    commands = parser.add_subparsers(dest="command", required=True)
    switch = argparse.BooleanOptionalAction  # where it is not given, the run's own setting holds

    score = commands.add_parser("evaluate", help="score a run on annotated images; prints one JSON object")
    score.set_defaults(execute=_evaluate)
    score.add_argument("run", help="a run's name or folder, or a checkpoint file")
    score.add_argument("--images", help="folder of the images")
    score.add_argument("--annotations", help="COCO JSON of the people in them")
    score.add_argument("--pennfudan", help="in place of both, Penn-Fudan's folder (its validation images)")
    score.add_argument("--device", default="auto", choices=DEVICES)
    score.add_argument("--max-images", type=int, help="score only the first so many images")
    score.add_argument("--flip", action=switch, help="average with the mirror image, or not")
    score.add_argument("--allow-images-outside", action=switch, help="images outside the folder, too, or not")
    score.add_argument("--category", help="names of the persons' categories in the JSON, by commas")
    score.add_argument("--crowd", choices=["auto", "skip", "keep"], help="what iscrowd means")
    score.add_argument("--exif", choices=["ignore", "apply"], help="orientation of image files")
    score.add_argument("--save", metavar="DIR", help="write report.json, people.csv, coco_results.json there")
    score.add_argument("--output-dir", default="outputs", help="where runs are looked for by name")

    summary = commands.add_parser("summary", help="print a run's metrics and where its figures lie")
    summary.set_defaults(execute=_summary)
    summary.add_argument("run", help="a run's name or folder, or `latest`")

    again = commands.add_parser("replay", help="replay an incident; prints one JSON object")
    again.set_defaults(execute=_replay)
    again.add_argument("incident", help="an incident's folder, outputs/<run>/incidents/<step>")
    again.add_argument("--device", default="auto", choices=DEVICES)

    pair = ("NAME", "VALUE")
    one = commands.add_parser("train", help="train a recipe in this process; returns 0 if the run ends as ok")
    one.set_defaults(execute=_train)
    one.add_argument("-f", dest="recipe", metavar="RECIPE", help="name of a file in params/, or a path")
    one.add_argument("-p", nargs=2, action="append", default=[], metavar=pair, help="a setting")

    batch = commands.add_parser("run", help="train recipes in a row, through notebooks/train.ipynb")
    batch.set_defaults(execute=_run)
    batch.add_argument("recipes", nargs="+", metavar="RECIPE", help="names of files in params/, or paths")
    batch.add_argument("--epochs", type=int, help="passes over the training set, for all of them")
    batch.add_argument("--batch-size", type=int, help="ROIs in a micro-batch, for all of them")
    batch.add_argument("--debug", action="store_true", help="a few images, two epochs, a small model")
    batch.add_argument("-p", nargs=2, action="append", default=[], metavar=pair, help="a setting")

    look = commands.add_parser("check-data", help="read a data set once and say what training would use")
    look.set_defaults(execute=_check_data)
    look.add_argument("--annotations", help="COCO JSON of the people in the images")
    look.add_argument("--images", help="folder of the images")
    look.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=pair, help="a setting, as for train"
    )
    look.add_argument("--out", default="outputs/check-data", help="folder for a picture of each split")

    options = parser.parse_args(arguments)
    try:
        return int(options.execute(options))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2


def _evaluate(options: argparse.Namespace) -> int:
    from refinelib.metrics.evaluate import checked_folder, measure
    from refinelib.metrics.predict import load

    if options.save:
        checked_folder(options.save)  # before the work, not after it
    predictor = load(options.run, device=options.device, output_dir=options.output_dir, flip=options.flip)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the one JSON object
        places, reading = ("images", "annotations", "pennfudan"), ("category", "crowd", "exif")
        names = (*places, "max_images", "allow_images_outside", *reading)
        chosen = {name: getattr(options, name) for name in names}
        found = measure(predictor, **chosen, progress=sys.stderr.isatty())
    print(dumps(found.report, indent=2), flush=True)  # first: it is worth more than the files
    if options.save:
        for file in found.save(options.save):
            print(f"wrote {file}", file=sys.stderr)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from refinelib.incidents import replay

    finding = replay(options.incident, device=options.device)
    print(dumps(finding.as_dict(), indent=2))
    print(finding.sentence, file=sys.stderr)
    return 0


def _summary(options: argparse.Namespace) -> int:
    run = latest() if options.run == "latest" else Run.open(options.run)
    print(run.summary())
    return 0 if run.status()["state"] in ("ok", "running") else 1


def _train(options: argparse.Namespace) -> int:
    from refinelib.config import resolve
    from refinelib.trainer import train

    try:
        print(train(resolve(options.recipe, **dict(options.p))).summary())
    except KeyboardInterrupt:
        print("train: interrupted; the same command with -p resume true goes on", file=sys.stderr)
        return 130
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from refinelib.config import resolve
    from refinelib.data import make_source
    from refinelib.metrics.evaluate import checked_folder
    from refinelib.workflows.check_data import check_data

    given, splits = dict(options.p), ["train", "val"]
    if options.annotations or options.images:
        if not (options.annotations and options.images) or given.get("data", "coco") != "coco":
            raise ValueError("give --annotations and --images, of COCO's kind, or settings with -p, not both")
        places = {"val_annotations": options.annotations, "val_images": options.images}
        given, splits = {**given, "data": "coco", **places}, ["val"]
    settings, folder = resolve("original", **given), checked_folder(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        picture = folder / f"{split}.png"
        source, progress = make_source(settings, split), sys.stderr.isatty()
        print(check_data(source, picture, max_images=settings.max_images, progress=progress))
        print(f"picture: {picture}", flush=True)
    return 0


def _run(options: argparse.Namespace) -> int:
    from refinelib.workflows.batch import run, table

    given = {"epochs": options.epochs, "batch_size": options.batch_size}
    overrides = {name: value for name, value in given.items() if value is not None} | dict(options.p)
    outcomes = run(options.recipes, overrides, debug=options.debug)
    print("\n" + table(outcomes))
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
