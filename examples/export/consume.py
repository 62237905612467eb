"""The mask of one person from a photograph and a box, without refinelib and PyTorch.

    refinelib export demo --format onnx --out person.onnx
    python examples/export/consume.py person.onnx photo.jpg 10 20 110 220 mask.png

It needs onnxruntime, numpy and pillow; what it knows of the model it reads from the file. The box is x0, y0,
x1, y1 in pixels. The photograph's EXIF orientation is not applied.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def overlaps(start, stop, cells, pixels):
    """[cells, pixels]: how much of each cell, or of one pixel's width about its centre, is in each pixel."""
    step = (stop - start) / max(cells, 1)
    centre, half = start + (np.arange(cells)[:, None] + 0.5) * step, max(step, 1) / 2
    left = np.arange(pixels)
    return (np.minimum(centre + half, left + 1) - np.maximum(centre - half, left)).clip(0) / (2 * half)


def inside(start, stop, cells, pixels):
    """The pixels with their centre between start and stop; [pixels, cells]: what each takes of each cell."""
    first, last = np.ceil(np.clip([start, stop], 0, pixels) - 0.5).astype(int)
    ends = (np.array([first, last]) - start) * cells / (stop - start)
    weights = overlaps(*ends, last - first, cells)
    return slice(first, last), weights / weights.sum(1, keepdims=True)


def mask_of(session, pixels, box):
    """uint8 [H, W, 3] and x0, y0, x1, y1 to bool [H, W]."""
    about = json.loads(session.get_modelmeta().custom_metadata_map["refinelib.json"])
    mean, std = (np.array(about[name])[:, None, None] for name in ("mean", "std"))
    low, high = np.array(box).reshape(2, 2)[:, ::-1]  # y, x
    margin = (high - low) * (np.array(about["region"]) - 1) / 2
    rows, columns = map(overlaps, low - margin, high + margin, about["images"][2:], pixels.shape)
    outside = 1 - rows.sum(1)[:, None] * columns.sum(1)
    crop = np.round(rows @ pixels.transpose(2, 0, 1) @ columns.T + mean * outside)
    images = ((crop - mean) / std)[None].astype(np.float32)
    (probs,) = session.run(["probs"], {"images": images})[0]
    (top, rows), (left, columns) = map(inside, low, high, probs.shape[1:], pixels.shape)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[top, left] = (rows @ probs @ columns.T).argmax(0) == about["classes"].index("target")
    return mask


if __name__ == "__main__":
    model, photograph, *box, target = sys.argv[1:]
    pixels = np.asarray(Image.open(photograph).convert("RGB"))
    mask = mask_of(onnxruntime.InferenceSession(model), pixels, [float(side) for side in box])
    Image.fromarray(mask).save(target)
