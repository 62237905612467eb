"""Figures of runs in every state: finished, going on, diverged, one epoch old, empty."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from helpers import make_run
from PIL import Image

from refinelib.plots import curves as plots
from refinelib.plots import style
from refinelib.registry import LOSSES, METRICS
from refinelib.runs import Run

FIGURES = [*((name,) for name in plots.PANELS), ("losses", "scores"), ()]


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    return make_run(tmp_path / "finished")


SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in ("one epoch", "no config")]


@pytest.fixture(params=["finished", "diverged", "first steps", "nothing yet", *SELDOM])
def any_run(request, tmp_path: Path) -> Run:
    run = make_run(
        tmp_path / "run",
        epochs=1 if request.param == "one epoch" else 3,
        bad_from=70 if request.param == "diverged" else None,
        skips=tuple(range(69, 180, 3)) if request.param == "diverged" else (),
        amp="fp16" if request.param == "diverged" else "off",
    )
    if request.param in ("first steps", "nothing yet", "no config"):
        kept = 1 if request.param == "first steps" else 0
        lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run.folder / "metrics.jsonl").write_text(
            "".join(lines[:kept]) + lines[kept][:20]
        )  # a line half written
        for file in (run.folder / "samples").iterdir():
            file.unlink()
        (run.folder / "status.json").write_text(json.dumps({"state": "running", "epoch": 0, "step": 0}))
    if request.param == "no config":
        (run.folder / "config.json").unlink()
        (run.folder / "metrics.jsonl").unlink()
        (run.folder / "events.jsonl").unlink()
    return run


def test_every_figure_of_every_run_is_whole_and_no_legend_hides_a_line(any_run: Run):
    figures = {panels: plots.curves(any_run, *panels) for panels in FIGURES}
    for name, figure in (figures | {"samples": plots.sample_grid(any_run)}).items():
        picture = pixels(figure)
        assert picture.shape[1] == style.WIDTH * style.DPI, name
        frame = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
        assert all((side == 255).all() for side in frame), f"{name}: something touches the figure's edge"
        assert (picture < 255).any()
        title = figure._suptitle.get_window_extent()
        assert title.x1 <= figure.bbox.x1
        for axes in figure.axes:
            heads = [text.get_window_extent() for text in (axes.title, axes._left_title) if text.get_text()]
            assert all(head.y1 <= title.y0 for head in heads), f"{name}: titles overlap"
            if (legend := axes.get_legend()) is not None and legend.get_texts():
                box, panel = legend.get_window_extent(), axes.get_window_extent()
                assert box.y0 >= panel.y1 - 4 and box.x1 <= panel.x1 + 20, (name, axes.get_title(loc="left"))
                assert all(head.y0 >= box.y1 - 4 for head in heads), f"{name}: the legend hides a title"


def test_lines_hold_the_recorded_numbers(finished: Run):
    (axes,) = plots.curves(finished, "losses").axes
    steps, settings = finished.steps(), finished.settings()
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["total"].get_ydata().tolist() == [step["loss"] for step in steps]
    assert lines["total by epoch"].get_xdata().tolist() == [30.0, 90.0, 150.0]  # the middle of each epoch
    for name in LOSSES:
        line, weight = lines[style.words(name)], getattr(settings, f"{name}_weight")
        assert line.get_xdata().tolist() == [step["step"] for step in steps]
        assert line.get_ydata() == pytest.approx([step["losses"][name] * weight for step in steps])
        assert line.get_color() == style.loss_color(name)
    assert len({style.loss_color(name) for name in LOSSES}) == len(LOSSES)


def test_a_loss_and_a_metric_that_are_registered_are_drawn(finished: Run, request):
    LOSSES.add("roughness", object())
    METRICS.add(
        "smoothness", type("Metric", (), {"title": "smoothness", "unit": "", "higher_is_better": True})
    )
    request.addfinalizer(lambda: (LOSSES.remove("roughness"), METRICS.remove("smoothness")))
    file = finished.folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        record["losses"]["roughness"] = 0.5
        record.get("metrics", {})["smoothness"] = 0.25
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "roughness" in [line.get_label() for line in plots.curves(finished, "losses").axes[0].lines]
    assert style.loss_color("roughness") not in {style.loss_color(name) for name in list(LOSSES)[:-1]}
    lines = {line.get_label(): line for line in plots.curves(finished, "scores").axes[0].lines}
    assert lines["smoothness"].get_ydata().tolist() == [0.25] * 3
    assert "| smoothness | 0.250 | 0.250 |" in plots.metrics_table(finished)


def test_gradient_norm_has_a_log_axis_with_its_three_lines(finished: Run):
    (axes,) = plots.curves(finished, "gradient norm").axes
    assert axes.get_yscale() == "log"
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_gid() == "limit"]
    assert levels == [10, 50, 100, finished.settings().grad_clip]
    low, high = axes.get_ylim()
    assert low < min(record["grad_norm"] for record in finished.steps())
    assert high > max(record["grad_norm_max"] for record in finished.steps())


def test_skipped_steps_and_lost_values_are_marked(tmp_path: Path):
    run = make_run(tmp_path / "diverged", bad_from=70, skips=(69, 70, 76))
    (axes,) = plots.curves(run, "gradient norm").axes
    marks = {
        line.get_gid(): line.get_xdata() for line in axes.lines if line.get_gid() in ("skips", "nonfinite")
    }
    assert list(marks["skips"]) == [69, 70, 76]  # counted as in metrics.jsonl, from 1
    assert list(marks["nonfinite"]) == list(range(70, 181, 10))
    assert {"skipped", "not finite"} <= {text.get_text() for text in axes.get_legend().get_texts()}


@pytest.mark.parametrize("low, high", [(0.6, 1.8), (0.9, 1.1), (3, 14), (0.1, 1e6)])
def test_a_log_axis_has_two_ticks_at_least(low, high):
    axes = style.new_figure("", 3.0).subplots()
    axes.set_yscale("log")
    style.draw_line(axes, [1, 2], [low, high], style.BLUE)
    style.style_axes(axes, "a panel")
    bottom, top = axes.get_ylim()
    assert sum(bottom <= tick <= top for tick in axes.get_yticks()) >= 2


def test_a_panel_without_a_finite_value_says_so(recwarn):
    """Among others of zeros, which have no place on a logarithmic axis."""
    for values, text in (([None, None], "no finite value"), ([0.0, 0.0], ""), ([], "nothing recorded yet")):
        figure = style.new_figure("", 3.0)
        axes = figure.subplots()
        axes.set_yscale("log", nonpositive="mask")
        style.draw_line(axes, range(len(values)), values, style.BLUE)
        style.style_axes(axes, "a panel")
        assert [shown.get_text() for shown in axes.texts] == [text] * bool(text)
        pixels(figure)
    assert not [str(told.message) for told in recwarn if "log-scaled" in str(told.message)]


def test_epochs_count_from_one_and_the_best_is_marked(finished: Run):
    (left,) = plots.curves(finished, "scores").axes
    assert left.lines[0].get_xdata().tolist() == [1, 2, 3]
    star = next(line for line in left.lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([3], [pytest.approx(0.9 - 0.5 / 3)])


def test_loss_scale_is_shown_under_fp16_only(tmp_path: Path):
    assert len(plots.curves(make_run(tmp_path / "a", amp="fp16"), "learning rate").axes) == 2
    assert len(plots.curves(make_run(tmp_path / "b", amp="off"), "learning rate").axes) == 1


def test_samples_show_truth_prediction_and_error_in_the_class_colours(finished: Run):
    figure = plots.sample_grid(finished, 2)
    assert "epoch 2" in figure.get_suptitle()
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 4 * 12
    with np.load(finished.folder / "samples" / "epoch_0002.npz") as file:
        labels, predicted = file["labels"][0], file["probs"][0].argmax(0)
        assert (shown[0] == file["image"][0]).all()
    colors = style.CLASSES | style.ERRORS
    rgb = {
        name: tuple(round(255 * x) for x in matplotlib.colors.to_rgb(color)) for name, color in colors.items()
    }
    for value, name in enumerate(("background", "target", "other people")):
        assert (shown[1][labels == value] == rgb[name]).all() and (
            shown[2][predicted == value] == rgb[name]
        ).all()
    missed, extra = (labels == 1) & (predicted != 1), (labels != 1) & (predicted == 1)
    assert missed.any() and extra.any()
    assert (shown[3][missed] == rgb["missed"]).all() and (shown[3][extra] == rgb["too much"]).all()
    agreed = shown[3][labels == predicted]
    assert (agreed == agreed[:, :1]).all()  # grey


@pytest.mark.parametrize("canvas, size, boxed", [((32, 32), (32, 32), False), ((48, 24), (32, 16), True)])
def test_the_box_is_outlined_where_the_crop_is_larger(tmp_path: Path, canvas, size, boxed):
    figure = plots.sample_grid(make_run(tmp_path / "run", epochs=1, canvas=canvas, size=size))
    outlines = [patch.get_bbox().bounds for axes in figure.axes for patch in axes.patches]
    assert len(outlines) == boxed * 4 * 12
    assert all(bounds == pytest.approx((1 / 6, 1 / 6, 2 / 3, 2 / 3)) for bounds in outlines)


def test_what_lies_beyond_the_losses_is_not_shown(tmp_path: Path):
    around = {"context": 0.5, "loss_context": 0.25, "roi_size": 32, "mask_size": 32}
    run = make_run(tmp_path / "run", epochs=1, canvas=(48, 48), size=(32, 32), **around)
    figure = plots.sample_grid(run)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    with np.load(run.folder / "samples" / "epoch_0001.npz") as file:
        assert (shown[0] == file["image"][0][4:-4, 4:-4]).all() and shown[1].shape == (40, 40, 3)
    boxes = [patch.get_bbox().bounds for axes in figure.axes for patch in axes.patches]
    assert boxes[0] == pytest.approx((0.1, 0.1, 0.8, 0.8))


def test_an_epoch_without_samples_is_refused_with_those_there_are(finished: Run):
    with pytest.raises(ValueError, match=r"no masks of epoch 9; there are 1, 2, 3"):
        plots.sample_grid(finished, 9)


def test_save_writes_the_figure_into_the_run_and_returns_it(finished: Run):
    figure = plots.curves(finished, "scores")
    assert plots.save(finished, figure, "ious") is figure
    assert [file.name for file in (finished.folder / "figures").iterdir()] == ["ious.png"]
    assert (
        np.asarray(Image.open(finished.folder / "figures" / "ious.png").convert("RGB")) == pixels(figure)
    ).all()


def test_a_run_is_found_by_folder_too(finished: Run):
    assert "finished" in plots.curves(str(finished.folder)).get_suptitle()


def test_table_names_last_and_best_epoch(finished: Run):
    table = plots.metrics_table(finished)
    assert (
        "last (epoch 3)" in table and "best (epoch 3)" in table and "| target IoU | 0.733 | 0.733 |" in table
    )


def test_no_pyplot_is_loaded():
    """Figures in pyplot's list show twice in a notebook and are never freed."""
    for file in Path(plots.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pyplot" not in ast.unparse(node), file
