"""Pack a finished run as a release: its weights and settings in one file, and a card that describes them.

    python bench/release.py RUN [--name best] [--report DIR/report.json] [--licence TEXT] [--out FOLDER]

``NAME.pt`` is a checkpoint of the weights alone (the moving average, where the run has one);
``NAME.json`` is its card: data, licence, figures, date, command, SHA-256 of the file. Both go to
``$REFINELIB_ZOO``, else to ``outputs/zoo``, where ``refinelib.load(NAME)`` finds them. Of each path in the
settings only the last part is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from refinelib import checkpoints
from refinelib.config import Settings, SettingsError
from refinelib.files import dumps, file_digest, read_json, write_atomically
from refinelib.launch import overrides
from refinelib.runs import Run

LICENCE = "MIT, as refinelib; the data keep their own licence"
#: Settings that say nothing to others.
OWN = ("output_dir", "run", "resume", "workers", "device", "gpus", "init_from")
DATA = ("data", "data_dir", "train_annotations", "val_annotations", "add_pennfudan", "max_images", "category")


def short(value: Any) -> Any:
    """The last part of a path; anything else as it is."""
    path = isinstance(value, str) and ("/" in value or "\\" in value)
    return Path(value.replace("\\", "/")).name if path else value


def command(settings: Settings, typed: list[str]) -> str:
    """What trains such a run; what was typed, where the recipe is not at hand."""
    with contextlib.suppress(SettingsError):
        typed = ["python", "-m", "refinelib", "train", "-f", settings.recipe, *overrides(settings)]
    return shlex.join(map(short, typed))


def pack(run: Run, *, name: str, licence: str = LICENCE, report: str | None = None, out: Path) -> Path:
    """Write a release; returns the file of the weights, with the card beside it.

    Raises:
        ValueError: the run did not end as ok, the report cannot be read or is of other weights, or there is
            a release of this name.
        CheckpointError: it has no whole checkpoint.
    """
    if Path(name).name != name:
        raise ValueError(f"--name {name} is a path: give a name, and the folder with --out")
    if (state := run.status().get("state")) != "ok":
        raise ValueError(f"{run.folder} is {state}: a release is made of a run that ended as ok")
    weights = out / f"{name}.pt"
    if weights.exists():
        raise ValueError(f"there is a release {weights}: take it away, or give another --name")
    packed, config = checkpoints.find(run.folder), run.config()
    saved = checkpoints.load(packed, needs=("model", "average", "settings", "mean_coverage", "position"))
    values = {key: value for key, value in saved["settings"].items() if key not in OWN}
    epoch, settings = saved["position"]["epoch"], Settings(**{key: short(values[key]) for key in values})
    measured = {line["epoch"]: line["metrics"] for line in run.validations()}.get(epoch, {})
    figures = measured if report is None else read_json(report)
    if not isinstance(figures, dict):
        raise ValueError(f"{report} is no report: give the report.json that refinelib evaluate --save writes")
    if report is not None and Path(str(figures.get("checkpoint"))).name != packed.name:
        raise ValueError(
            f"{report} is not of {packed}, whose weights are packed: refinelib evaluate {run.folder}"
        )
    card = {
        "name": name,
        "licence": licence,
        "data": {key: value for key in DATA if (value := getattr(settings, key)) is not None},
        "content": config.get("data"),
        "rois": run.status().get("rois"),
        "epoch": epoch,
        "figures": {
            k: v for k, v in figures.items() if isinstance(v, (int, float)) or k in ("iou", "intervals")
        },
        "figures_of": "the run's validation data" if report is None else short(report),
        "trained": config["started"],
        "packed": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(Settings(**values), config["command"]),
        **{key: config[key] for key in ("device", "versions", "git_commit")},
    }
    out.mkdir(parents=True, exist_ok=True)
    content = {"model": saved["average"] or saved["model"], "average": None, "card": card}
    content |= {"settings": settings.model_dump(mode="json"), "mean_coverage": saved["mean_coverage"]}
    checkpoints.save(weights, content)
    card |= {"sha256": file_digest(weights)}
    write_atomically(weights.with_suffix(".json"), dumps(card, indent=2) + "\n")
    return weights


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pack a finished run as a release.")
    parser.add_argument("run", nargs="?", default="best", help="a run's name or folder")
    parser.add_argument("--name", help="of the release; default: the run's")
    parser.add_argument("--report", help="report.json of `refinelib evaluate --save`, for the figures")
    parser.add_argument("--licence", default=LICENCE, help="of the weights, in words")
    parser.add_argument("--out", type=Path, default=checkpoints.zoo(), help="folder for both files")
    given = vars(parser.parse_args(arguments))
    try:
        run = Run.open(given.pop("run"))
        weights = pack(run, **{**given, "name": given["name"] or run.name})
    except (ValueError, RuntimeError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    size = weights.stat().st_size / 1e6
    print(f"{weights} ({size:.1f} MB) and its card {weights.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
