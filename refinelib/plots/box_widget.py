"""Draw boxes on an image by hand, with nothing but ipywidgets: two sliders, two buttons and a picture."""

from __future__ import annotations

import io
from typing import Any, Iterable

import numpy as np
from PIL import Image, ImageDraw

from refinelib.plots.style import BLUE, ORANGE
from refinelib.progress import interactive

#: The picture is shown no wider and no higher than this, in pixels; a small one up to three times its size.
LARGEST = 720


class BoxPicker:
    """Boxes of an image, to be added and taken away by hand.

    In JupyterLab it shows itself at the end of a cell with two sliders (columns and rows that the next box
    spans), *add* and *remove last*; where nobody watches (papermill) it shows the picture with the boxes it has.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        boxes: xyxy in pixels, to begin with.

    Attributes:
        boxes: list of ``[x0, y0, x1, y1]`` as they are now; read it in the next cell.
    """

    def __init__(self, pixels: np.ndarray, boxes: Iterable[Iterable[float]] = ()) -> None:
        self.boxes = [[float(side) for side in box] for box in boxes]
        height, width = pixels.shape[:2]
        self._scale = min(3.0, LARGEST / max(height, width))
        size = max(1, round(width * self._scale)), max(1, round(height * self._scale))
        self._picture = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        self._size = height, width
        self._widget: Any = None

    def draft(self) -> list[float]:
        """The box that the sliders span now; the middle of the image before there are any."""
        height, width = self._size
        if self._widget is None:
            return [width / 4, height / 4, 3 * width / 4, 3 * height / 4]
        (x0, x1), (y0, y1) = self.columns.value, self.rows.value
        return [float(x0), float(y0), float(x1), float(y1)]

    def add(self, *_: Any) -> None:
        """Keep the draft as a box, unless it has no area."""
        x0, y0, x1, y1 = self.draft()
        if x1 > x0 and y1 > y0:
            self.boxes.append([x0, y0, x1, y1])
        self._redraw()

    def remove_last(self, *_: Any) -> None:
        """Take the box away that was added last."""
        self.boxes = self.boxes[:-1]
        self._redraw()

    def png(self, *, draft: bool = False) -> bytes:
        """The picture with its boxes, numbered from 0; the draft is thin and orange."""
        picture = self._picture.copy()
        pen = ImageDraw.Draw(picture)
        for number, box in enumerate(self.boxes):
            corners = [side * self._scale for side in box]
            pen.rectangle(corners, outline="white", width=4)
            pen.rectangle(corners, outline=BLUE, width=2)
            at = max(2.0, corners[0] + 4), max(2.0, corners[1] + 2)
            pen.text(at, str(number), fill="white", stroke_width=2, stroke_fill=BLUE, font_size=16)
        if draft:
            pen.rectangle([side * self._scale for side in self.draft()], outline=ORANGE, width=1)
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        return buffer.getvalue()

    def widget(self) -> Any:
        """The widget: made on first use, the same one afterwards."""
        if self._widget is None:
            import ipywidgets as w  # a headless run needs none of it

            height, width = self._size
            wide, short = w.Layout(width=f"{max(320, self._picture.width)}px"), w.Layout(width="140px")
            x0, y0, x1, y1 = (round(side) for side in self.draft())
            self.columns = w.IntRangeSlider(value=(x0, x1), min=0, max=width, description="columns", layout=wide)
            self.rows = w.IntRangeSlider(value=(y0, y1), min=0, max=height, description="rows", layout=wide)
            self.add_button = w.Button(description="add", icon="plus", layout=short)
            self.remove_button = w.Button(description="remove last", icon="minus", layout=short)
            self.preview, self.text = w.Image(format="png"), w.HTML()
            for slider in (self.columns, self.rows):
                slider.observe(self._redraw, names="value")
            self.add_button.on_click(self.add)
            self.remove_button.on_click(self.remove_last)
            buttons = w.HBox([self.add_button, self.remove_button])
            self._widget = w.VBox([self.columns, self.rows, buttons, self.preview, self.text])
            self._redraw()
        return self._widget

    def _redraw(self, *_: Any) -> None:
        if self._widget is not None:
            self.preview.value = self.png(draft=True)
            shown = "; ".join(", ".join(f"{side:g}" for side in box) for box in self.boxes)
            self.text.value = f"{len(self.boxes)} boxes: {shown}" if self.boxes else "no box yet: move the sliders, then add"

    def _ipython_display_(self) -> None:
        from IPython.display import Image as Shown, display

        display(self.widget() if interactive() else Shown(self.png()))
