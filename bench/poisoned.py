"""A run with 5 % of its steps poisoned against a clean one: same data, same seeds, same quality?

    python bench/poisoned.py [--seeds 3] [--share 5] [-p NAME VALUE ...]

Trains the recipe `demo` (synthetic persons, a model for a laptop) for each seed, clean and poisoned with NaN
and Inf in loss, gradient, activation and input. Prints one JSON line a run, then one with the means and
differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from children import end_with_me

SCORES = ("target_iou", "boundary_iou", "miou")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=5.0, help="per cent of the steps")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of both runs"
    )
    options = parser.parse_args()
    part = options.share / 5
    faults = f"grad:nan@{2 * part}%:person;loss:inf@{part}%;activation:nan@{part}%:contour;input:inf@{part}%"
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"clean": {}, "poisoned": {"inject": faults}}
        jobs = [
            {**dict(options.p), "output_dir": folder, "seed": seed, "run": f"{name}-{seed}", **planted}
            for seed in range(options.seeds)
            for name, planted in kinds.items()
        ]
        _run({**jobs[0], "run": "store", "smoke": True})  # imports and stores are there for all
        if options.workers == 1:
            runs = list(map(_run, jobs))
        else:
            with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
                runs = list(pool.map(_run, jobs))
    for run in runs:
        print(json.dumps(run), flush=True)
    clean, poisoned = ([r for r in runs if r["run"].startswith(name)] for name in kinds)
    share = sum(r["skipped"] for r in poisoned) / sum(r["steps"] for r in poisoned)
    summary = {"poisoned_steps": round(share, 4)}
    for score in SCORES:
        before, after = ([r[score] for r in some] for some in (clean, poisoned))
        gaps = [b - a for a, b in zip(before, after, strict=True)]
        means = {"clean": _mean(before), "poisoned": _mean(after), "difference": _mean(gaps)}
        summary[score] = {**means, "spread": _spread(gaps), "seeds_apart": _spread(before)}
    print(json.dumps(summary), flush=True)
    return 0


def _run(job: dict) -> dict:
    from refinelib import resolve, train

    status = train(resolve("demo", **job)).status()
    scores = {score: round(status["metrics"][score], 4) for score in SCORES}
    counts = {"steps": status["steps"], "skipped": status["skipped_steps"], "rewinds": status["rewinds"]}
    return {"run": job["run"], "state": status["state"], **counts, **scores}


def _mean(values: list[float]) -> float:
    return round(statistics.fmean(values), 4)


def _spread(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


if __name__ == "__main__":
    end_with_me()
    sys.exit(main())
