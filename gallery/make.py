"""Executed copies of all notebooks, small and clean, for readers on the web: ``make gallery``.

What is run here is CPU size and takes some minutes in all. A copy executed elsewhere, such as on a GPU, is
only cleaned: ``python gallery/make.py --take rootcause=FILE --device "one H200"``. Photographs whose licence
allows no derived work are not shown (``results.ipynb -p licences``).
"""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from refinelib.config import project_root, resolve
from studies.results import REFINEMENT_OFF

HERE = Path(__file__).resolve().parent
NOTEBOOKS = project_root() / "notebooks"
PICTURE_BYTES = 160_000
#: Scale and quality of a photograph, tried in this order until a picture is small enough.
STEPS = [(1, 85), (1, 70), (1, 55), (0.8, 55), (0.65, 50), (0.5, 45), (0.35, 30)]
BEGIN, END = "<!-- made by gallery/make.py -->", "<!-- end -->"

#: Further runs that other notebooks look at: without refinement, and one that a fault destroys.
SIZE = {"epochs": 6, "max_images": 120, "roi_size": 32, "mask_size": 32, "lr": 4e-3}
BESIDE = {
    "demo-plain": SIZE | REFINEMENT_OFF,
    "demo-broken": SIZE | {"max_consecutive_skips": 5, "max_rewinds": 1, "inject": "loss:nan@40:always"},
}
#: What is executed here, in this order, with which parameters. The others are taken from a GPU.
HERE_MADE: dict[str, dict[str, Any]] = {
    "train": SIZE,
    "debug": {},
    "incident": {},
    "guard": {},
    "predict": {"run": "demo"},
    "results": {"runs": "demo", "baseline_runs": "demo-plain", "max_images": 30},
    "compare": {"runs": "demo,demo-plain,demo-broken"},
    "gradients": {"run": "demo"},
    "progressive": {
        "phases": "1,2,3",
        "epochs": 2,
        "max_images": 60,
        "width": 0.125,
        "batch_size": 8,
        "lr": 2e-3,
    },
    "rootcause": {},
}
FROM_A_GPU = ("gradients", "progressive", "results", "rootcause")


# -- cleaning --------------------------------------------------------------------------------------
def small_picture(data: bytes, limit: int = PICTURE_BYTES) -> tuple[str, bytes]:
    """A picture's kind and content, of at most ``limit`` bytes.

    A drawing becomes a PNG with a palette. What does not fit so has photographs in it, and becomes a JPEG.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    if file.tell() <= limit:
        return "image/png", file.getvalue()
    for scale, quality in STEPS:
        size = tuple(round(side * scale) for side in picture.size)
        shown, file = picture.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        shown.save(file, "JPEG", quality=quality, optimize=True, subsampling=0)
        if file.tell() <= limit:
            break
    return "image/jpeg", file.getvalue()


def replacements(parameters: dict[str, Any]) -> list[tuple[str, str]]:
    """Folders of the executing machine and what a reader sees in their place, longest first."""
    found = {str(project_root()) + "/": "", str(project_root()): ".", str(Path.home()): "~"}
    for name, value in parameters.items():
        if isinstance(value, str) and value.startswith("/"):
            if name == "output_dir":
                found[value] = "outputs"
            elif name in ("run", "incident"):
                found[str(Path(value).parent)] = "outputs"
            else:
                found[value] = "~/" + Path(value).name.lstrip(".")
    return sorted(found.items(), key=lambda item: -len(item[0]))


def clean(notebook, parameters: dict[str, Any], seconds: float, device: str, date: str):
    """The notebook with its outputs, and nothing of the machine and of the tools that executed it."""
    pairs = replacements(parameters)

    def plain(text: str) -> str:
        for old, new in pairs:  # whole names only: /root is not in outputs/rootcause
            text = re.sub(
                rf"(?<![\w.~-]){re.escape(old)}" + ("" if old.endswith("/") else r"(?![\w.-]*\w)"),
                lambda _, new=new: new,
                text,
            )
        return text

    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", "injected-parameters")]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"
            lines = [line for line in cell.source.splitlines() if not line.startswith("output_dir = ")]
            cell.source = plain("\n".join(lines)).strip()
        if cell.cell_type == "code":
            cell.outputs = _joined([_output(item, plain) for item in cell.outputs])
    given = {name: value for name, value in parameters.items() if name != "output_dir"}
    options = [f"-p {name} {shlex.quote(plain(str(value)))}" for name, value in given.items()]
    made = {"date": date, "device": device, "seconds": round(seconds), "parameters": " ".join(options)}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"gallery": made, "kernelspec": kernel, "language_info": {"name": "python"}}
    )
    return notebook


def _output(item, plain):
    """One output without widgets, with small pictures and no folder of the machine; None: nothing is left."""
    if item.output_type == "stream":
        item.text = plain(item.text)
        return item
    if "data" in item:
        for kind in list(item.data):
            if "widget" in kind or kind == "application/javascript":
                del item.data[kind]
            elif kind in ("image/png", "image/jpeg"):
                kind, small = small_picture(base64.b64decode(item.data.pop(kind)))
                item.data[kind] = base64.b64encode(small).decode()
            elif isinstance(item.data[kind], str):
                item.data[kind] = plain(item.data[kind])
        if {"image/png", "image/jpeg", "text/markdown"} & set(item.data):
            item.data.pop("text/plain", None)  # <Figure size ...>
        if set(item.data) <= {"text/plain"} and "VBox(" in item.data.get("text/plain", "VBox("):
            return None
        item.metadata = nbformat.from_dict({})
    return item


def _joined(outputs: list) -> list:
    """Neighbouring pieces of one stream as one."""
    kept: list = []
    for item in (item for item in outputs if item is not None):
        if kept and item.output_type == "stream" == kept[-1].output_type and item.name == kept[-1].name:
            kept[-1].text += item.text
        else:
            kept.append(item)
    return kept


# -- making ----------------------------------------------------------------------------------------
def execute(names: list[str], device: str, work: Path) -> None:
    """Execute these notebooks into ``gallery/``, with their outputs in ``work``; runs there are reused."""
    import papermill

    from refinelib.trainer import train

    work.mkdir(parents=True, exist_ok=True)
    where = str(work.resolve() / "outputs")
    if (
        {"predict", "results", "compare", "gradients"} & set(names)
        and "train" not in names
        and not (work / "outputs" / "demo").exists()
    ):
        train(resolve("demo", output_dir=where, **SIZE))
    for name in names:
        if name in ("results", "compare"):
            _train_beside(where)
        parameters = {**HERE_MADE[name], "output_dir": where}
        started, executed = time.perf_counter(), work / f"{name}.ipynb"
        papermill.execute_notebook(
            str(NOTEBOOKS / f"{name}.ipynb"),
            str(executed),
            parameters,
            kernel_name="python3",
            progress_bar=False,
        )
        store(name, executed, parameters, time.perf_counter() - started, device)


def _train_beside(where: str) -> None:
    from refinelib.trainer import train

    for name, settings in BESIDE.items():
        if (Path(where) / name).exists():
            continue
        try:
            train(resolve("demo", run=name, output_dir=where, **settings))
        except Exception as error:
            if not hasattr(error, "run"):
                raise  # a run that diverges is what one of them is for; nothing else is


def store(
    name: str, executed: Path, parameters: dict[str, Any], seconds: float, device: str, date: str = ""
) -> None:
    """Clean an executed notebook into ``gallery/<name>.ipynb``."""
    date = date or datetime.date.today().isoformat()
    notebook = clean(nbformat.read(executed, as_version=4), parameters, seconds, device, date)
    nbformat.validate(notebook)
    nbformat.write(notebook, HERE / f"{name}.ipynb")
    print(f"{name}: {seconds:.0f} s, {(HERE / f'{name}.ipynb').stat().st_size / 1e3:.0f} kB")


def take(name: str, file: Path, device: str) -> None:
    """Clean a notebook that papermill executed elsewhere into ``gallery/``."""
    record = nbformat.read(file, as_version=4).metadata.papermill
    store(name, file, dict(record.parameters), record.duration, device, record.start_time[:10])


def is_current(name: str) -> bool:
    """Whether the copy's cells, but for the parameters given, are those of the notebook now."""
    copy, now = (nbformat.read(folder / f"{name}.ipynb", as_version=4).cells for folder in (HERE, NOTEBOOKS))
    return [c.source for c in copy if c.id != "injected-parameters"] == [c.source for c in now]


def write_table() -> None:
    """Put into gallery/README.md what was made when, where and how."""
    rows = ["| copy | made | on | took | with |", "| --- | --- | --- | --- | --- |"]
    for file in sorted(HERE.glob("*.ipynb")):
        made = nbformat.read(file, as_version=4).metadata.gallery
        age = "" if is_current(file.stem) else ", from cells older than the notebook's now"
        given = f"`{made.parameters}`" if made.parameters else "defaults"
        rows.append(
            f"| [{file.stem}]({file.name}) | {made.date}{age} | {made.device} | {made.seconds} s | {given} |"
        )
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + "\n".join([BEGIN, *rows, END]) + rest.split(END)[1])


def main() -> int:
    """Make what is named, or all that this machine can; then the table in gallery/README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = [name for name in HERE_MADE if name not in FROM_A_GPU]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(HERE_MADE)}; none: {', '.join(default)}")
    parser.add_argument(
        "--take", action="append", default=[], metavar="NAME=FILE", help="a copy that was executed elsewhere"
    )
    parser.add_argument(
        "--device", default=f"{os.cpu_count()} CPU cores", help="words for the machine it was executed on"
    )
    parser.add_argument(
        "--work",
        metavar="FOLDER",
        help="keep the runs here, and use again those that lie here; none: a temporary folder",
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the table of gallery/README.md again"
    )
    options = parser.parse_args()
    taken = dict(item.split("=", 1) for item in options.take)
    if wrong := [name for name in [*options.names, *taken] if name not in HERE_MADE]:
        parser.error(f"there is no notebook {', '.join(wrong)}: give some of {', '.join(HERE_MADE)}")
    for name, file in taken.items():
        take(name, Path(file), options.device)
    names = options.names or ([] if taken or options.table else default)
    if names:
        with tempfile.TemporaryDirectory() as work:
            execute([name for name in HERE_MADE if name in names], options.device, Path(options.work or work))
    write_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
