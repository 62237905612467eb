"""How long does each notebook take, in smoke size, under papermill, under nbval and in JupyterLab?

    REFINELIB_SMOKE=1 python bench/notebooks.py [NAME ...] [--write]

One at a time, each with an empty folder of runs, so that it makes what it needs. JupyterLab's times are those that
``make browser`` left in outputs/browser/times.jsonl (there two notebooks run side by side). ``--write``: into bench/notebooks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from refinelib.config import SMOKE_VARIABLE, project_root

NOTEBOOKS = project_root() / "notebooks"
TIMES = project_root() / "outputs" / "browser" / "times.jsonl"
LIMIT = 600  # seconds a notebook


def timed(*command: object) -> float:
    """Wall time of a command in seconds.

    Raises:
        SystemExit: it fails; with the end of what it said.
    """
    environment = {**os.environ, SMOKE_VARIABLE: "1"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *map(str, command)], env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.monotonic() - began


def both(name: str, folder: Path) -> dict[str, float]:
    """Seconds of one notebook under papermill and under nbval; its runs go into ``folder``."""
    quiet = ("--kernel", "python3", "--no-progress-bar", "--log-level", "WARNING")
    source, ready = NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb"
    papermill = timed("papermill", source, folder / "executed.ipynb", *quiet, "-p", "output_dir", folder / "papermill")
    timed("papermill", source, ready, *quiet, "--prepare-only", "-p", "output_dir", folder / "nbval")  # nbval takes no parameters
    nbval = timed("pytest", "-q", "--nbval-lax", f"--nbval-cell-timeout={LIMIT}", "-p", "no:cacheprovider", ready)
    return {"papermill": papermill, "nbval": nbval}


def lab() -> dict[str, dict]:
    """The last time of each notebook in JupyterLab; empty where the browser test has not run."""
    lines = TIMES.read_text().splitlines() if TIMES.is_file() else []
    return {line["notebook"]: line for line in map(json.loads, lines)}


def table(times: dict[str, dict[str, float]], browser: dict[str, dict]) -> str:
    """Markdown, seconds; JupyterLab's three columns are empty for what was not run there."""
    rows = ["| notebook | papermill | nbval | JupyterLab: open | run all | move each widget |", "| --- | --: | --: | --: | --: | --: |"]
    for name, seconds in times.items():
        there = browser.get(name, {})
        cells = [f"{there[key]:.1f}" if key in there else "" for key in ("open_s", "run_s", "widgets_s")]
        rows.append(f"| `{name}` | {seconds['papermill']:.1f} | {seconds['nbval']:.1f} | {' | '.join(cells)} |")
    sums = [f"{sum(seconds[key] for seconds in times.values()):.0f}" for key in ("papermill", "nbval")]
    sums += [f"{sum(browser[name][key] for name in times if name in browser):.0f}" for key in ("open_s", "run_s", "widgets_s")]
    return "\n".join([*rows, f"| all | {' | '.join(sums)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="write the table into bench/notebooks.md")
    given = parser.parse_args()
    times = {}
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            times[name] = both(name, Path(folder))
        print(f"{name}: " + ", ".join(f"{key} {value:.1f} s" for key, value in times[name].items()), flush=True)
    found = table(times, lab())
    print(found)
    if given.write:
        when, cores = datetime.date.today().isoformat(), len(os.sched_getaffinity(0))
        threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
        about = f"{when}, {cores} CPU cores, OMP_NUM_THREADS {threads}, load at the end {os.getloadavg()[0]:.1f}"
        note = "Seconds of wall time, kernel start included, each with an empty folder of runs. In JupyterLab two notebooks ran side by side."
        command = "    make browser && REFINELIB_SMOKE=1 python bench/notebooks.py --write"
        text = f"# How long the notebooks take\n\nSmoke size; {about}.\n\n{command}\n\n{found}\n\n{note}\n"
        (project_root() / "bench" / "notebooks.md").write_text(text)


if __name__ == "__main__":
    main()
