"""Draw the README's picture: masks of a photograph, and two runs with the same NaN.

    python gallery/picture.py --run best --without best-off --image photo.jpg --box 103,220,325,639

The photograph's licence has to allow derived work (gallery/README.md names it). Loss curves are trained here.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import refinelib
from refinelib.plots import style
from refinelib.plots.masks import overlay
from studies import guards

STEPS, AT = 200, 60


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="with refinement: name, folder or file of weights")
    parser.add_argument("--without", required=True, help="the same without refinement")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--box", required=True, help="x0,y0,x1,y1 in pixels")
    parser.add_argument("--out", type=Path, default=Path("docs/picture.png"))
    options = parser.parse_args()
    image = np.array(Image.open(options.image).convert("RGB"))
    box = [float(x) for x in options.box.split(",")]
    figure = style.new_figure("", 3.4)
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 2.2])
    x0, y0, x1, y1 = (round(x) for x in box)
    margin = round(0.08 * (y1 - y0))
    window = slice(max(0, y0 - margin), y1 + margin), slice(max(0, x0 - margin), x1 + margin)
    titles = {None: "photograph", options.without: "without refinement", options.run: "with refinement"}
    for place, (run, title) in zip(axes, titles.items(), strict=False):
        shown = image
        if run is not None:
            masks = refinelib.load(run, device="cpu").predict(image, [box])
            shown = overlay(image, masks)
        place.imshow(shown[window])
        place.set_axis_off()
        place.set_title(title, fontsize=10)
    wide = {"plain": 5.0, "guard": 1.5}  # the same line until one of them ends
    for name, title, color in (
        ("plain", "plain PyTorch: NaN from here on", style.ORANGE),
        ("guard", "refinelib: skips the step", style.BLUE),
    ):
        course = guards.run(name, "loss", steps=STEPS, at=AT)
        values = np.array(course.losses)
        mean = [np.nanmean(values[max(0, at - 4) : at + 1]) for at in np.flatnonzero(np.isfinite(values))]
        steps = np.flatnonzero(np.isfinite(values)) + 1
        axes[3].plot(steps, mean, color=color, linewidth=wide[name], label=title)
        if name == "plain":
            axes[3].plot(steps[-1], mean[-1], "X", color=style.VERMILLION, markersize=11, zorder=5)
    axes[3].axvline(AT, color=style.GREY, linestyle=":")
    style.style_axes(axes[3], "training loss", "step")
    style.legend(axes[3])
    figure.savefig(options.out, dpi=110)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
