"""Masks of one image as pictures and files."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from refinelib.metrics.boundary import contour
from refinelib.metrics.coco_ap import CocoResults
from refinelib.metrics.evaluate import checked_folder
from refinelib.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, YELLOW, Figure
from refinelib.workflows.predict_inputs import Inputs
from refinelib.runs import dumps, write_atomically

#: Colours of persons, in order, over and over.
PEOPLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, YELLOW)


def overlay(pixels: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The image with each mask tinted in its person's colour and outlined, uint8 ``[H, W, 3]``.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        masks: bool ``[N, H, W]``.
    """
    import torch

    picture = pixels.astype(np.float32)
    for number, mask in enumerate(masks):
        colour = 255 * np.array(to_rgb(PEOPLE[number % len(PEOPLE)]), dtype=np.float32)
        picture[mask] = 0.5 * picture[mask] + 0.5 * colour
        picture[contour(torch.from_numpy(mask)).numpy()] = colour
    return picture.round().astype(np.uint8)


def figure(inputs: Inputs, masks: np.ndarray, scores: np.ndarray) -> Figure:
    """The overlay with each box, its number and its score."""
    height, width = inputs.pixels.shape[:2]
    shown = Figure(figsize=(WIDTH, min(7.5, 0.4 + WIDTH * height / width)), layout="constrained")
    axes = shown.add_subplot()
    axes.imshow(overlay(inputs.pixels, masks))
    for number, ((x0, y0, x1, y1), score) in enumerate(zip(inputs.boxes, scores)):
        colour = PEOPLE[number % len(PEOPLE)]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2, linestyle="--"))
        ink = "black" if colour in (ORANGE, SKY, YELLOW) else "white"
        style = dict(fontsize=9, color=ink, bbox=dict(facecolor=colour, edgecolor="none", pad=1.5), va="bottom")
        axes.text(max(0.0, x0), max(12.0, y0), f"{number}: {score:.2f}", **style)
    axes.set_title(f"{inputs.name}: person and mean probability inside the mask", loc="left", fontsize=10)
    axes.set_xlabel("column, pixels", fontsize=9)
    axes.set_ylabel("row, pixels", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return shown


def save_masks(folder: str | os.PathLike, inputs: Inputs, masks: np.ndarray, scores: np.ndarray) -> list[Path]:
    """Write one PNG a person (0 and 255), the overlay as PNG, and all masks as COCO results.

    Args:
        folder: made where absent; files of the same image in it are replaced.
        inputs: image and boxes.
        masks: bool ``[N, H, W]``.
        scores: float ``[N]``.

    Returns:
        the files: masks, overlay, JSON.

    Raises:
        ValueError: the folder's name is a file's.
    """
    folder = checked_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, coco = [], CocoResults()
    for number, (mask, score) in enumerate(zip(masks, scores)):
        files.append(folder / f"{inputs.name}_person{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(files[-1])
        coco.add(inputs.image_id, inputs.category_id, mask, float(score))
    for stale in folder.glob(f"{glob.escape(inputs.name)}_person*.png"):  # of a time with more boxes
        if stale not in files and stale.stem.removeprefix(f"{inputs.name}_person").isdigit():
            stale.unlink()
    files.append(folder / f"{inputs.name}_overlay.png")
    Image.fromarray(overlay(inputs.pixels, masks)).save(files[-1])
    files.append(folder / f"{inputs.name}_coco.json")
    write_atomically(files[-1], "[\n" + ",\n".join(dumps(entry) for entry in coco.entries) + "\n]\n")
    return files
