"""Train on images and masks that are in memory, and predict: `python examples/arrays.py` takes seconds."""

from __future__ import annotations

import numpy as np

import refinelib


def main(**overrides):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 90, (40, 96, 128, 3), dtype=np.uint8)
    masks = np.zeros((40, 96, 128), np.uint8)  # 0 background, 1, 2, ... persons, 255 ignored
    for image, mask in zip(images, masks, strict=True):
        left, top = rng.integers(4, 30, 2)
        mask[top : top + 60, left : left + 24] = 1
        mask[top + 5 : top + 60, left + 40 : left + 60] = 2
        image[mask > 0] += 120

    small = {"width": 0.0625, "roi_size": 32, "mask_size": 32, "epochs": 3, "run": "arrays"}
    settings = refinelib.resolve("demo", **{**small, **overrides})
    run = refinelib.train(settings, data=(images, masks))  # or (train, val), or a torch Dataset
    box = [left, top, left + 24, top + 60]  # of the last image's first person
    found = refinelib.load(run.folder).predict(images[-1], box)
    print(f"{found.sum()} pixels were found, {(masks[-1] == 1).sum()} are the person's")
    return run


if __name__ == "__main__":
    main()
