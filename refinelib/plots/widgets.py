"""What moves in a notebook, where somebody watches: a live panel during training, sliders and pickers afterwards.

Everything is drawn from the run folder, by the same functions that draw the static figures. Where nobody watches (papermill,
nbval) each returns ``None`` before a widget is made, so an executed notebook holds no widget state.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Sequence

from matplotlib.figure import Figure

from refinelib.plots import curves as plots
from refinelib.plots.gradients import module_norms
from refinelib.plots.masks import sample_epochs, sample_grid, thresholded
from refinelib.progress import interactive
from refinelib.runs import Run, RunError
from refinelib.gradients.read import read


def live_panel(*, samples: int = 4) -> Callable[[Run], None] | None:
    """A panel for ``refinelib.train(settings, on_epoch=live_panel())``: losses, gradient norm and masks, in place.

    It is a displayed figure that is replaced, no widget: what is on the page when the notebook is saved is a picture and stays one.

    Args:
        samples: fixed validation ROIs shown, at most.
    """
    if not interactive():
        return None
    from IPython.display import display

    panels: list[Any] = []

    def on_epoch(run: Run) -> None:
        figures = [plots.live(run), sample_grid(run, kinds=("fixed",), per_kind=samples)]
        if not panels:
            panels.extend(display(figure, display_id=True) for figure in figures)
        else:
            for panel, figure in zip(panels, figures):
                panel.update(figure)

    return on_epoch


def epoch_slider(run: Run | str | os.PathLike, *, kinds: Sequence[str] = ("fixed",), per_kind: int = 6):
    """Masks of the same validation ROIs, with a slider over the epochs on disk; ``None`` where nobody watches or nothing is there."""
    run, epochs = plots.opened(run), sample_epochs(run) if interactive() else []
    if not epochs:
        return None
    from ipywidgets import SelectionSlider

    slider = SelectionSlider(options=epochs, value=epochs[-1], description="epoch", continuous_update=False)
    return _shown(slider, lambda epoch: sample_grid(run, epoch, kinds=kinds, per_kind=per_kind))


def threshold_slider(run: Run | str | os.PathLike, epoch: int | None = None):
    """Where a person begins: a slider for the probability at which a pixel is taken for one; ``None`` where nobody watches."""
    run = plots.opened(run)
    if not interactive() or not sample_epochs(run):
        return None
    from ipywidgets import FloatSlider

    slider = FloatSlider(value=0.5, min=0.05, max=0.95, step=0.05, description="threshold", continuous_update=False)
    return _shown(slider, lambda threshold: thresholded(run, threshold, epoch))


def layer_picker(run: Run | str | os.PathLike):
    """Gradient norms of the layers of one module, picked from a list; ``None`` where nobody watches or no gradients are there."""
    run = plots.opened(run)
    try:
        modules = read(run).modules if interactive() else []
    except RunError:
        modules = []
    if not modules:
        return None
    from ipywidgets import Dropdown

    picker = Dropdown(options=[("all modules", "modules"), *((name, f"{name}.") for name in modules)], description="layers")
    return _shown(picker, lambda layers: module_norms(run, layers))


def _shown(control: Any, draw: Callable[[Any], Figure]):
    """A control above the figure it decides on, as a picture that is replaced when the control's value changes."""
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
