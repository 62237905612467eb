"""Gradients read, judged and drawn: a planted instability is named, a healthy run is not blamed."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from helpers import papermill, read
from PIL import Image

from refinelib import gradients, resolve
from refinelib.config import project_root
from refinelib.plots import gradients as gradient_plots
from refinelib.runs import Run, RunError
from refinelib.trainer import train

pytestmark = pytest.mark.usefixtures("shallow")

FIGURES = ("heat", "module_norms", "updates", "distributions", "term_shares")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 36 steps by planted fault; each is trained once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(inject: str | None = None, **keywords) -> Run:
        key = (inject, *keywords.items())
        if key not in made:
            small = dict(
                max_images=24,
                width=0.0625,
                roi_size=32,
                mask_size=32,
                epochs=2,
                batch_size=3,
                device="cpu",
                seed=2,
            )
            made[key] = train(
                resolve(
                    "demo",
                    output_dir=str(folder),
                    run=f"run{len(made)}",
                    inject=inject,
                    **{**small, **keywords},
                )
            )
        return made[key]

    return run


def judged(run: Run):
    found = gradients.read(run)
    return gradients.episodes(found), gradients.verdict(found)


@pytest.mark.parametrize(
    "inject, module, inside",
    [
        pytest.param("grad:spike@20:boundary.trunk", "boundary", True, marks=pytest.mark.slow),
        pytest.param("grad:nan@20:contour", "contour", True, marks=pytest.mark.slow),
        pytest.param("activation:spike@20:boundary", "boundary", False, marks=pytest.mark.slow),
        pytest.param("activation:spike@20:distance", "distance", False, marks=pytest.mark.slow),
        ("activation:spike@20:contour", "contour", False),
        pytest.param("activation:spike@20:person", "person", False, marks=pytest.mark.slow),
    ],
)
def test_a_planted_instability_is_named_with_its_step_and_size(runs, inject, module, inside):
    (worst, *_), words = judged(runs(inject))
    assert (worst.module, worst.first, worst.arrived) == (module, 20, not inside)
    assert worst.parameter.startswith(module) and worst.count == 1 and not worst.open
    assert worst.times > 50 and (inside or len(worst.others) >= 3)
    assert (
        words.startswith(f"**`{module}` is where it starts**, since step 20 (epoch ")
        and f"`{worst.term}` loss" in words
    )
    assert worst.term in ("ce", "dice") and 0 < worst.share < 1


def test_the_norm_told_is_the_one_on_record(runs):
    run = runs("grad:spike@20:boundary.trunk")
    (worst, *_), _ = judged(run)
    found = gradients.read(run)
    mine = found.module_of == found.modules.index("boundary")
    row = found.steps.tolist().index(20)
    assert worst.norm == pytest.approx(float(np.sqrt((found.norms[row, mine].astype(float) ** 2).sum())))
    usual = np.median(np.sqrt((found.norms[:row][:, mine].astype(float) ** 2).sum(1)))
    assert worst.usual == pytest.approx(usual, rel=1e-6)
    assert worst.epoch == found.epochs[row] == -(-20 // (len(found.steps) // 2))


def test_one_that_stays_is_told_to_last(runs):
    (worst, *_), words = judged(runs("grad:spike@15:distance.head:always"))
    assert worst.module == "distance" and 15 <= worst.first <= 17 and worst.open and worst.count >= 10
    assert "still so at the end" in words


def test_a_healthy_run_is_not_blamed(runs):
    seen, words = judged(runs())
    assert seen == [] and words.startswith("**No module left its usual level**")
    assert gradient_plots.episodes_table(seen) == "No module left its usual level."


@pytest.mark.slow
def test_a_spoilt_loss_is_not_laid_on_a_module(runs):
    assert judged(runs("loss:spike@20"))[1].startswith(
        "**The loss itself is where it starts**, since step 20"
    )
    assert judged(runs("activation:nan@20:target"))[1].startswith(
        "**The loss was not finite**, since step 20"
    )


def test_the_dominating_term_is_named(runs):
    (worst, *_), words = judged(runs("grad:spike@20:distance.head", distance_weight=50.0))
    assert worst.term == "distance" and worst.share > 0.8 and "came from the `distance` loss" in words


def test_shares_add_up(runs):
    found = gradients.read(runs())
    for epoch in found.epoch_statistics:
        np.testing.assert_allclose(found.shares(epoch).sum(axis=0), 1.0, rtol=1e-6)
    everything = found.of(np.arange(len(found.names)))
    np.testing.assert_allclose(
        everything**2, sum(found.of(p) ** 2 for p in found.select().values()), rtol=1e-6
    )


def test_layers_are_chosen_by_how_they_begin(runs):
    found = gradients.read(runs())
    assert list(found.select("modules")) == found.modules
    assert set(found.select("boundary, contour.fuse")) >= {
        "boundary.blend",
        "boundary.edge_conv",
        "contour.fuse.1",
    }
    assert all(
        name.startswith(("boundary", "contour.fuse")) for name in found.select(["boundary", "contour.fuse"])
    )
    assert sum(map(len, found.select("all").values())) == len(found.names)
    with pytest.raises(
        ValueError, match=r"no layer begins with 'bundary'; give modules, all, or beginnings such as stem"
    ):
        found.select("bundary")


def test_levels_follow_a_drift_and_are_not_moved_by_an_outburst():
    random = np.random.default_rng(0)
    values = np.exp(random.normal(0, 0.2, (300, 2)))
    values[:, 0] *= np.geomspace(1, 100, 300)
    values[150:200, 1] *= 1e4
    values[10, 0] = np.nan
    level, spread = gradients.levels(values)
    assert np.isfinite(level).all() and (spread < 0.5).all()
    assert abs(level[290, 0] - np.log10(values[240:290, 0]).mean()) < 0.1
    assert abs(level[199, 1]) < 0.1  # still what it was before
    few = gradients.levels(values[:3])[0]
    assert np.isnan(few).all()


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "inject",
    [
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in (None, "activation:spike@20:contour")),
        "grad:nan@20:contour",
    ],
)
def test_every_figure_is_whole(runs, inject):
    run = runs(inject)
    for name in FIGURES:
        for layers in ((), ("boundary,contour",)) if name in ("heat", "module_norms", "updates") else ((),):
            figure = getattr(gradient_plots, name)(run, gradients.read(run), *layers)
            picture = pixels(figure)
            frame = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
            assert all((side == 255).all() for side in frame), f"{name}: something touches the figure's edge"
            title = figure._suptitle.get_window_extent()
            assert title.x1 <= figure.bbox.x1
            assert not any(
                text.get_text() == "nothing recorded yet" for axes in figure.axes for text in axes.texts
            )
            for axes in figure.axes:
                head = axes._left_title
                assert head.get_window_extent().y1 <= title.y0 or not head.get_text(), name


def test_the_heat_map_shows_the_spike_in_its_column_and_the_loss_of_finiteness_in_black(runs):
    run = runs("grad:nan@20:contour")
    above, below = (
        axes for axes in gradient_plots.heat(run, gradients.read(run)).axes if axes.get_title(loc="left")
    )
    found = gradients.read(run)
    lost = np.ma.filled(np.ma.masked_invalid(above.collections[0].get_array()), np.nan)
    lost = np.isnan(lost).reshape(len(found.modules), -1)
    assert lost.sum() == 1 and lost[found.modules.index("contour"), 19]
    assert [line.get_xdata().tolist() for line in above.lines if line.get_gid() == "skips"] == [[20]]
    run = runs("grad:spike@20:boundary.trunk")
    found = gradients.read(run)
    times = gradient_plots.heat(run, found).axes[1].collections[0].get_array()
    row, column = np.unravel_index(times.argmax(), (len(found.modules), len(found.steps)))
    assert (found.modules[row], column) == ("boundary", 19)
    colors = gradient_plots.heat(run, found).axes[1].collections[0].norm
    assert colors.vmax == pytest.approx(times.max(), rel=1e-6) and colors.vmin == 1 / colors.vmax


def test_a_run_without_gradients_says_so(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "running"}')
    with pytest.raises(RunError, match="probe_every = 0"):
        gradients.read(folder)
    with pytest.raises(RunError, match="there is no run"):
        gradients.read(tmp_path / "nowhere")


def test_damaged_files_are_passed_over_and_named_where_nothing_is_left(runs, tmp_path):
    folder = shutil.copytree(runs().folder, tmp_path / "copy")
    first, second = sorted((folder / "gradients").iterdir())
    (folder / "gradients" / "epoch_x.npz").write_text("hello")
    everything, data = gradients.read(folder), second.read_bytes()
    for content in (data[: len(data) // 2], b"", b"hello"):
        second.write_bytes(content)
        with pytest.warns(
            UserWarning, match=r"gradients were passed over \(1\): .*epoch_0002.npz is damaged"
        ):
            found = gradients.read(folder)
        assert len(found.steps) == len(everything.steps) // 2 and list(found.epoch_statistics) == [1]
    with np.load(first) as opened:
        content = {name: opened[name] for name in opened.files}
    for wrong in (
        {"norms": content["norms"][:, 1:]}, {"steps": content["steps"].astype(str)},
        {"module_of": content["module_of"] + 1}, {"edges": content["edges"][1:]},
        {"module_of": content["module_of"] - 1}, {"loss": np.array(1.0)},
    ):  # fmt: skip
        np.savez(first, **content | wrong)
        with pytest.raises(
            RunError, match="holds no gradients: .*epoch_0001.npz is damaged.*epoch_0002.npz is damaged"
        ):
            gradients.read(folder)


def execute(tmp_path, *arguments) -> dict:
    """What each cell of the executed notebook shows last, by the cell's id."""
    done = papermill("gradients.ipynb", tmp_path / "out.ipynb", *arguments, cwd=project_root() / "notebooks")
    assert done.returncode == 0, done.stderr
    notebook = read(tmp_path / "out.ipynb")
    assert (
        "widgets" not in notebook.metadata
        and not next(cell for cell in notebook.cells if cell.id == "picker").outputs
    )
    return {
        cell.id: cell.outputs[-1].get("data", cell.outputs[-1])
        for cell in notebook.cells
        if cell.get("outputs")
    }


@pytest.mark.slow
def test_the_notebook_names_the_planted_module(runs, tmp_path):
    run = runs("activation:spike@20:contour")
    shown = execute(tmp_path, "-p", "run", run.folder, "-p", "layers", "contour,distance")
    assert shown["answer"]["text/markdown"].startswith("**`contour` is where it starts**, since step 20")
    assert "| contour | 20 |" in shown["episodes"]["text/markdown"]
    names = {"gradient_heat", "gradient_norms", "update_ratios", "distributions", "term_shares"}
    assert names <= {file.stem for file in (run.folder / "figures").glob("*.png")}
    assert sum("image/png" in data for data in shown.values()) == len(names)
