"""How fast exported models are on a CPU beside PyTorch, and how exact.

    python bench/export.py [--recipes demo,original] [--batches 1,8] [--rounds 7] [-p width 0.5]

Each recipe's model, with random weights, is exported to each format whose packages are installed. Then eager
PyTorch and the files compute the same crops in turns, on one thread; every round gives the ratio of each to
eager PyTorch in that round. Times are processor time of the process, so that other work on the machine counts
little. One JSON line a recipe, batch and runtime: milliseconds a ROI, and the ratio's median, least and most
(above 1 is faster than eager PyTorch).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import speed
import torch
from speed import say
from torch import Tensor

from refinelib import checkpoints, export, load
from refinelib.build import build_model
from refinelib.config import Settings, resolve
from refinelib.metrics.predict import CropModel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="demo,original")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    say(**speed.told_of(torch.device("cpu")))
    for recipe in options.recipes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            models = exported(resolve(recipe, **dict(options.p)), Path(folder), recipe)
            for batch in map(int, options.batches.split(",")):
                for line in measured(models, batch, options.rounds):
                    say(recipe=recipe, batch=batch, **line)
    return 0


def exported(settings: Settings, folder: Path, recipe: str) -> tuple[dict[str, CropModel], tuple[int, ...]]:
    """Eager PyTorch and every file by name; height and width of a crop."""
    torch.manual_seed(0)
    model = build_model(settings)
    for weight in model.parameters():  # away from the start, where refinements change little
        weight.data += 0.02 * torch.randn_like(weight)
    content = {"model": model.state_dict(), "average": None, "mean_coverage": torch.zeros(8, 8, 2)}
    checkpoints.save(folder / "model.pt", {**content, "settings": settings.model_dump(mode="json")})
    predictor = load(folder / "model.pt", device="cpu")
    size, canvas = settings.mask_size, predictor.model.canvas
    eager = export.CropProbs(predictor.model, size, predictor.flip, predictor.weights)
    models: dict[str, CropModel] = {"eager": eager.eval()}
    for name in ("pt2", "torchscript", "onnx"):
        started = time.process_time()
        try:
            written = export.export(folder / "model.pt", name)
        except export.ExportError as error:
            say(recipe=recipe, runtime=name, left_out=str(error))
            continue
        seconds, size_mb = time.process_time() - started, written.path.stat().st_size / 2**20
        facts = dict(seconds=round(seconds, 1), mb=round(size_mb, 1), difference=written.difference)
        say(recipe=recipe, runtime=name, **facts)
        models[name] = on_one_thread(written.path)
    return models, canvas


def on_one_thread(file: Path) -> CropModel:
    if file.suffix != ".onnx":
        return export.opened(file)[0]  # torch has one thread already
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probs"], {"images": images.numpy()})[0])


def measured(
    models: tuple[dict[str, CropModel], tuple[int, ...]], batch: int, rounds: int, least: float = 0.5
) -> list[dict]:
    """Times of all runtimes, one after the other in each round; the first two rounds warm up."""
    by_name, canvas = models
    images = torch.randn(batch, 3, *canvas)
    times: dict[str, list[float]] = {name: [] for name in by_name}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for name, model in by_name.items():
                times[name].append(seconds_of(model, images, least))
    lines = []
    for name, found in times.items():
        ratios = [eager / own for eager, own in zip(times["eager"][2:], found[2:], strict=True)]
        facts = dict(median=statistics.median(ratios), least=min(ratios), most=max(ratios))
        ms = round(1000 * statistics.median(found[2:]) / batch, 2)
        lines.append(dict(runtime=name, ms_a_roi=ms, **{k: round(v, 3) for k, v in facts.items()}))
    return lines


def seconds_of(model: Callable[[Tensor], Tensor], images: Tensor, least: float) -> float:
    """Processor seconds of one call, from as many as take ``least`` seconds."""
    started, count = time.process_time(), 0
    while not count or time.process_time() - started < least:
        model(images)
        count += 1
    return (time.process_time() - started) / count


if __name__ == "__main__":
    raise SystemExit(main())
