"""Widgets of the notebooks: a live panel, sliders, and boxes drawn by hand.

Everything is drawn by the functions that draw the static figures. Where nobody watches (papermill,
nbval) no widget is made, so an executed notebook holds no widget state.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from refinelib.gradients.record import read
from refinelib.plots.curves import curves
from refinelib.plots.gradients import module_norms
from refinelib.plots.masks import Pixels, boxes_figure, sample_epochs, sample_grid
from refinelib.plots.style import Figure, RunLike, opened
from refinelib.runs import Run, RunError


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
    from IPython.display import display

    panels: list[Any] = []

    def on_epoch(run: Run) -> None:
        figures = [curves(run), sample_grid(run, kinds=("fixed",), per_kind=samples)]
        for panel, figure in zip(panels, figures, strict=False):
            panel.update(figure)
        if not panels:
            panels.extend(display(one, display_id=True) for one in figures)  # type: ignore[no-untyped-call]  # IPython

    return on_epoch


def epoch_slider(run: RunLike, *, kinds: Sequence[str] = ("fixed",), per_kind: int = 6) -> Any:
    """Masks of the same validation ROIs, with a slider over the epochs on disk; ``None`` without epochs."""
    run = opened(run)
    if not interactive() or not (epochs := sample_epochs(run)):
        return None
    from ipywidgets import SelectionSlider

    slider = SelectionSlider(options=epochs, value=epochs[-1], description="epoch", continuous_update=False)
    return _above_figure(slider, lambda epoch: sample_grid(run, epoch, kinds, per_kind))


def layer_picker(run: RunLike) -> Any:
    """Gradient norms of the layers of one module, picked from a list; ``None`` without gradients."""
    run = opened(run)
    if not interactive() or not any((run.folder / "gradients").glob("*.npz")):
        return None
    from ipywidgets import Dropdown

    found = read(run)
    options = [("all modules", "modules"), *((name, f"{name}.") for name in found.modules)]
    picker = Dropdown(options=options, description="layers")
    return _above_figure(picker, lambda layers: module_norms(run, found, layers))


def _above_figure(control: Any, draw: Callable[[Any], Figure]) -> Any:
    """A control above the figure it decides on; a change of its value replaces the picture."""
    from ipywidgets import HTML, Image, Layout, VBox

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
    """Boxes of an image, to be added and taken away by hand.

    In JupyterLab it shows itself at the end of a cell with two sliders (columns and rows that the next box
    spans), *add* and *remove last*; where nobody watches it shows the picture with the boxes it has.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        boxes: xyxy in pixels, to begin with.

    Attributes:
        boxes: list of ``[x0, y0, x1, y1]``; read it in the next cell.
    """

    def __init__(self, pixels: Pixels, boxes: Iterable[Iterable[float]] = ()) -> None:
        self.pixels, self.boxes = pixels, [[float(side) for side in box] for box in boxes]
        self._widget: Any = None

    def add(self, *_: object) -> None:
        """Keep the box that the sliders span, unless it has no area."""
        (x0, x1), (y0, y1) = self.columns.value, self.rows.value
        self.boxes += [[float(x0), float(y0), float(x1), float(y1)]] if x1 > x0 and y1 > y0 else []
        self._redraw()

    def remove_last(self, *_: object) -> None:
        """Take the box away that was added last."""
        self.boxes = self.boxes[:-1]
        self._redraw()

    def figure(self, *drafts: list[float]) -> Figure:
        """The image with its boxes, numbered from 0, and drafts."""
        labels = [*map(str, range(len(self.boxes))), *("next" for _ in drafts)]
        return boxes_figure(self.pixels, [*self.boxes, *drafts], labels)

    def widget(self) -> Any:
        """The widget: made on first use, the same one afterwards."""
        if self._widget is None:
            import ipywidgets as w

            def slider(name: str, size: int) -> Any:
                made = w.IntRangeSlider(value=(size // 4, 3 * size // 4), max=size, description=name)
                made.observe(self._redraw, names="value")
                return made

            height, width = self.pixels.shape[:2]
            self.columns, self.rows = slider("columns", width), slider("rows", height)
            self.add_button, self.remove_button = (w.Button(description=x) for x in ("add", "remove last"))
            self.preview, self.text = w.Image(format="png"), w.HTML()
            self.add_button.on_click(self.add)
            self.remove_button.on_click(self.remove_last)
            buttons = w.HBox([self.add_button, self.remove_button])
            self._widget = w.VBox([self.columns, self.rows, buttons, self.preview, self.text])
            self._redraw()
        return self._widget

    def _redraw(self, *_: object) -> None:
        (x0, x1), (y0, y1) = self.columns.value, self.rows.value
        self.preview.value = self.figure([x0, y0, x1, y1])._repr_png_()
        shown = "; ".join(", ".join(f"{side:g}" for side in box) for box in self.boxes)
        self.text.value = f"boxes: {shown}" if self.boxes else "no box yet: move the sliders, then add"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget() if interactive() else self.figure())  # type: ignore[no-untyped-call]  # IPython
