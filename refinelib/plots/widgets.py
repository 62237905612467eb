"""Widgets of the notebooks: a live panel, sliders, and boxes drawn by hand.

Everything is drawn by the functions that draw the static figures. Where nobody watches (papermill,
nbval) no widget is made, so an executed notebook holds no widget state.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from IPython import display
from ipywidgets import HTML, Dropdown, Image, Layout, SelectionSlider, VBox
from jupyter_bbox_widget import BBoxWidget
from PIL.Image import fromarray

from refinelib.files import by_epoch
from refinelib.gradients import read
from refinelib.plots.curves import curves
from refinelib.plots.gradients import module_norms
from refinelib.plots.masks import Pixels, boxes_figure, sample_grid
from refinelib.plots.style import Figure, RunLike, opened
from refinelib.runs import Run, RunError

_SIDES = ("x", "y", "width", "height")
#: The picture as wide as its place; no list of classes below it, as there is one only.
_BOXES_CSS = """
.refinelib-boxes .image-measure, .refinelib-boxes .image-measure img { width: 100%; }
.refinelib-boxes .classes { display: none; }
"""


def interactive() -> bool:
    """Whether somebody watches: a terminal, or a kernel of a Jupyter server (papermill starts its own)."""
    return sys.stderr.isatty() or ("ipykernel" in sys.modules and "JPY_SESSION_NAME" in os.environ)


def live_panel(*, samples: int = 4) -> Callable[[Run], None] | None:
    """A panel for ``refinelib.train(settings, on_epoch=live_panel())``: curves and masks, in place.

    It is two displayed figures that are replaced, no widget: a saved notebook holds pictures.

    Args:
        samples: fixed validation ROIs shown, at most.
    """
    if not interactive():
        return None
    panels: list[Any] = []

    def on_epoch(run: Run) -> None:
        figures = [curves(run), sample_grid(run, kinds=("fixed",), per_kind=samples)]
        for panel, figure in zip(panels, figures, strict=False):
            panel.update(figure)
        if not panels:
            panels.extend(display.display(one, display_id=True) for one in figures)  # type: ignore[no-untyped-call]

    return on_epoch


def epoch_slider(run: RunLike, *, kinds: Sequence[str] = ("fixed",), per_kind: int = 6) -> Any:
    """Masks of the same validation ROIs, with a slider over the epochs on disk; ``None`` without epochs."""
    run = opened(run)
    if not interactive() or not (epochs := [*by_epoch(run.folder / "samples")]):
        return None
    slider = SelectionSlider(options=epochs, value=epochs[-1], description="epoch", continuous_update=False)
    return _above_figure(slider, lambda epoch: sample_grid(run, epoch, kinds, per_kind))


def layer_picker(run: RunLike) -> Any:
    """Gradient norms of the layers of one module, picked from a list; ``None`` without gradients."""
    run = opened(run)
    if not interactive() or not any((run.folder / "gradients").glob("*.npz")):
        return None
    found = read(run)
    options = [("all modules", "modules"), *((name, f"{name}.") for name in found.modules)]
    picker = Dropdown(options=options, description="layers")
    return _above_figure(picker, lambda layers: module_norms(run, found, layers))


def _above_figure(control: Any, draw: Callable[[Any], Figure]) -> Any:
    """A control above the figure it decides on; a change of its value replaces the picture."""
    picture, note = Image(format="png", layout=Layout(max_width="100%")), HTML()

    def redraw(*_: object) -> None:
        try:
            picture.value, note.value = draw(control.value)._repr_png_(), ""
        except (ValueError, RunError, OSError) as error:  # a run that goes on may replace what was there
            note.value = str(error)

    control.observe(redraw, names="value")
    redraw()
    return VBox([control, picture, note])


class BoxPicker:
    """Boxes of an image, drawn, moved and removed with the mouse.

    In JupyterLab it shows itself at the end of a cell, no higher than the window; where nobody watches it
    shows the picture with the boxes that it was given.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        boxes: xyxy in pixels, to begin with.

    Example:
        >>> BoxPicker(np.zeros((40, 60, 3), np.uint8), [[1, 2, 30, 35]]).boxes
        [[1.0, 2.0, 30.0, 35.0]]
    """

    def __init__(self, pixels: Pixels, boxes: Iterable[Iterable[float]] = ()) -> None:
        self.pixels, self._given = pixels, [[float(side) for side in box] for box in boxes]
        self._widget: Any = None

    @property
    def boxes(self) -> list[list[float]]:
        """``[x0, y0, x1, y1]`` of each box inside the image; read it in the next cell."""
        if self._widget is None:
            return self._given
        height, width = self.pixels.shape[:2]
        ends = []
        for box in self._widget.bboxes:
            x, y, w, h = (box[key] for key in _SIDES)
            ends.append(np.clip([x, y, x + w, y + h], 0.0, [width, height] * 2).round(6).tolist())
        same = {tuple(np.round(box, 6)): box for box in self._given}  # to the last bit what was given
        return [same.get(tuple(box), box) for box in ends if box[2] > box[0] and box[3] > box[1]]

    def widget(self) -> Any:
        """The widget: made on first use, the same one afterwards."""
        if self._widget is None:
            height, width = self.pixels.shape[:2]
            fits = Layout(width=f"min(100%, {65 * width / height:.1f}vh)")
            rows = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in self._given]
            drawn = [{**dict(zip(_SIDES, row, strict=True)), "label": ""} for row in rows]
            made = BBoxWidget(bboxes=drawn, classes=[""], hide_buttons=True, layout=fits)
            fromarray(self.pixels).save(content := io.BytesIO(), "JPEG", quality=90)
            made.image_bytes = content.getvalue()
            made.add_class("refinelib-boxes")
            made._css += _BOXES_CSS
            self._widget = made
        return self._widget

    def figure(self) -> Figure:
        """The image with its boxes, numbered from 0."""
        return boxes_figure(self.pixels, self.boxes, [str(number) for number in range(len(self.boxes))])

    def _ipython_display_(self) -> None:
        display.display(self.widget() if interactive() else self.figure())  # type: ignore[no-untyped-call]
