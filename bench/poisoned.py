"""A run with 5 % of its steps poisoned against a clean one: same data, same seeds, same quality?

    python bench/poisoned.py [--seeds 3] [--share 5] [-p NAME VALUE ...]

Trains the recipe `demo` (synthetic people, a model for a laptop) for each seed, clean and poisoned with NaN and Inf in loss, gradient,
activation and input. One JSON line a run, then one with means, spread and the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

SCORES = ("target_iou", "boundary_iou", "miou")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=5.0, help="per cent of the steps")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of both runs")
    options = parser.parse_args()
    part = options.share / 5
    faults = f"grad:nan@{2 * part}%:person;loss:inf@{part}%;activation:nan@{part}%:contour;input:inf@{part}%"
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            dict(dict(options.p), output_dir=folder, seed=seed, run=f"{name}-{seed}", **({"inject": faults} if name == "poisoned" else {}))
            for seed in range(options.seeds)
            for name in ("clean", "poisoned")
        ]
        _run({**jobs[0], "run": "store", "smoke": True})  # imports and stores are there for all
        if options.workers == 1:
            runs = list(map(_run, jobs))
        else:
            with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
                runs = list(pool.map(_run, jobs))
    for run in runs:
        print(json.dumps(run), flush=True)
    poisoned = [r for r in runs if r["run"].startswith("poisoned")]
    summary = {"poisoned_steps": round(sum(r["skipped"] for r in poisoned) / sum(r["steps"] for r in poisoned), 4)}
    for score in SCORES:
        clean, poisoned = ([r[score] for r in runs if r["run"].startswith(name)] for name in ("clean", "poisoned"))
        gaps = [b - a for a, b in zip(clean, poisoned)]
        summary[score] = dict(clean=_mean(clean), poisoned=_mean(poisoned), difference=_mean(gaps), spread=round(statistics.stdev(gaps), 4),
                              seeds_apart=round(statistics.stdev(clean), 4))  # fmt: skip
    print(json.dumps(summary), flush=True)
    return 0


def _run(job: dict) -> dict:
    from refinelib import resolve, train

    status = train(resolve("demo", **job)).status()
    return {"run": job["run"], "state": status["state"], "steps": status["steps"], "skipped": status["skipped_steps"], "rewinds": status["rewinds"],
            **{score: round(status["metrics"][score], 4) for score in SCORES}}  # fmt: skip


def _mean(values: list[float]) -> float:
    return round(statistics.fmean(values), 4)


if __name__ == "__main__":
    sys.exit(main())
