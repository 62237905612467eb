"""How long does each notebook take, in smoke size, under papermill, under nbval and in JupyterLab?

    REFINELIB_SMOKE=1 python bench/notebooks.py [NAME ...] [--write]

One at a time, each with an empty folder of runs, so that it makes what it needs. JupyterLab's times are
those that ``make browser`` left in outputs/browser/times.jsonl (there two notebooks run side by side).
``--write``: into bench/notebooks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from children import end_with_me

from refinelib.config import SMOKE_VARIABLE, project_root

NOTEBOOKS = project_root() / "notebooks"
TIMES = project_root() / "outputs" / "browser" / "times.jsonl"
LIMIT = 600  # seconds a notebook


def timed(*command: object) -> tuple[float, float]:
    """Wall time and processor time of the command and all it started, in seconds.

    Raises:
        SystemExit: it fails; with the end of what it said.
    """
    environment = {**os.environ, SMOKE_VARIABLE: "1"}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def both(name: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Wall and processor seconds of a notebook under papermill and nbval; its runs go into ``folder``."""
    quiet = ("--kernel", "python3", "--no-progress-bar", "--log-level", "WARNING")
    source, ready = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb"
    papermill = timed(
        "papermill", source, folder / "executed.ipynb", *quiet, "-p", "output_dir", folder / "papermill"
    )
    timed(
        "papermill", source, ready, *quiet, "--prepare-only", "-p", "output_dir", folder / "nbval"
    )  # nbval takes no parameters
    nbval = timed(
        "pytest", "-q", "--nbval-lax", f"--nbval-cell-timeout={LIMIT}", "-p", "no:cacheprovider", ready
    )
    return {"papermill": papermill, "nbval": nbval}


def lab() -> dict[str, dict]:
    """The last time of each notebook in JupyterLab; empty where the browser test has not run."""
    lines = TIMES.read_text().splitlines() if TIMES.is_file() else []
    return {line["notebook"]: line for line in map(json.loads, lines)}


def table(times: dict[str, dict[str, tuple[float, float]]], browser: dict[str, dict]) -> str:
    """Markdown, seconds; JupyterLab's three columns are empty for what was not run there."""
    there = ("open_s", "run_s", "widgets_s")
    heads = [
        "notebook",
        "papermill",
        "its CPU time",
        "nbval",
        "its CPU time",
        "JupyterLab: open",
        "run all",
        "move each widget",
    ]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    numbers = [
        [*times[name]["papermill"], *times[name]["nbval"], *(browser.get(name, {}).get(key) for key in there)]
        for name in times
    ]
    for name, line in zip(times, numbers, strict=True):
        rows.append([f"`{name}`", *("" if value is None else f"{value:.1f}" for value in line)])
    sums = [sum(value for value in column if value is not None) for column in zip(*numbers, strict=True)]
    rows.append(["all", *(f"{value:.0f}" for value in sums)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")), metavar="NAME"
    )
    parser.add_argument("--write", action="store_true", help="write the table into bench/notebooks.md")
    given = parser.parse_args()
    times = {}
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            times[name] = both(name, Path(folder))
        print(
            f"{name}: "
            + ", ".join(f"{key} {wall:.1f} s (CPU {cpu:.1f} s)" for key, (wall, cpu) in times[name].items()),
            flush=True,
        )
    found = table(times, lab())
    print(found)
    if given.write:
        when, cores = datetime.date.today().isoformat(), len(os.sched_getaffinity(0))
        threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
        about = (
            f"{when}, {cores} CPU cores, OMP_NUM_THREADS {threads}, load at the end {os.getloadavg()[0]:.1f}"
        )
        note = (
            "Seconds of wall time, kernel start included, each with an empty folder of runs. CPU time is\n"
            "what an idle machine needs. In JupyterLab two notebooks ran side by side;\n"
            "the columns are its wall time, and the widgets' includes waiting for pictures."
        )
        command = "    make browser && REFINELIB_SMOKE=1 python bench/notebooks.py --write"
        text = f"# How long the notebooks take\n\nSmoke size; {about}.\n\n{command}\n\n{found}\n\n{note}\n"
        (project_root() / "bench" / "notebooks.md").write_text(text)


if __name__ == "__main__":
    end_with_me()
    main()
