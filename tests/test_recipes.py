"""Every recipe loads, holds the values it promises, and each value reaches the object that uses it."""

import pytest
import torch
import yaml

from refinelib import build
from refinelib.config import project_root, recipe_names, resolve
from refinelib.data.loader import BatchLoader
from refinelib.guard.guard import Guard
from refinelib.modeling.roi import canvas_size
from refinelib.runs import Run

TABLE = {
    "lr": (5e-5, 1e-5, 5e-6),
    "warmup_epochs": (5, 10, 15),
    "grad_clip": (5.0, 1.0, 0.5),
    "weight_decay": (1e-3, 1e-4, 1e-5),
    "min_lr": (1e-6, 1e-7, 1e-8),
    "amp": ("fp16", "fp16", "off"),
    "blend_init": (0.1, 0.01, 0.01),
    "active_contour_smoothness": (0.1, 0.01, 0.01),
    "boundary_weight": (5.0, 2.0, 2.0),
    "distance_threshold_init": (0.5, 0.3, 0.3),
    "edge_gain_init": (1.0, 0.1, 0.1),
    "active_contour_weight": (0.1, 0.01, 0.01),
    "boundary_aware_weight": (0.1, 0.01, 0.01),
    "contour_weight": (0.1, 0.01, 0.01),
    "distance_weight": (0.1, 0.01, 0.01),
    "refinement_loss_cap": (None, 10.0, 10.0),
}
SWITCHES = (
    "use_boundary_refinement", "use_progressive_upsampling", "use_subpixel_conv", "use_contour_detection",
    "use_distance_transform", "use_active_contour_loss", "use_boundary_aware_loss",
)  # fmt: skip
ON = {
    "original": "1101111", "refined": "1101111", "stable": "1000001", "phase1": "1000001", "phase2": "1000011",
    "phase3": "1001011", "phase4": "1001111", "finetune": "1101111",
}  # fmt: skip


@pytest.mark.parametrize("column, recipe", [(0, "original"), (1, "refined"), (2, "stable")])
def test_the_three_recipes_hold_the_table(column, recipe):
    settings = resolve(recipe)
    assert {name: getattr(settings, name) for name in TABLE} == {name: values[column] for name, values in TABLE.items()}
    assert (settings.batch_size, settings.epochs, settings.roi_size, settings.mask_size) == (2, 100, (64, 64), (64, 64))


@pytest.mark.parametrize("recipe, flags", ON.items())
def test_modules_of_each_recipe(recipe, flags):
    settings = resolve(recipe)
    assert "".join(str(int(getattr(settings, name))) for name in SWITCHES) == flags


def test_relations_between_recipes():
    def body(name):
        return {k: v for k, v in resolve(name).model_dump().items() if k not in ("recipe", *SWITCHES)}

    stable = body("stable")
    assert body("phase1") == body("phase2") == body("phase3") == body("phase4") == stable
    assert body("finetune") == {**stable, "lr": 1e-6, "init_from": "phase4"}
    debug, rescue = resolve("debug"), resolve("rescue")
    assert (debug.epochs, debug.batch_size) == (2, 1) and debug.max_images <= 8
    assert (rescue.lr, rescue.batch_size, rescue.optimizer) == (1e-6, 4, "adam")


@pytest.mark.parametrize("known, recipe", [
    ("rgb_hierarchical_unet_v2_attention_r64m64_refined", "refined"),
    ("rgb_hierarchical_unet_v2_attention_r64m64_refined_stable", "stable"),
])  # fmt: skip
def test_names_known_elsewhere(known, recipe):
    assert resolve(known) == resolve(recipe)
    assert known in (project_root() / "params" / f"{recipe}.yaml").read_text()


def observed(settings, tmp_path) -> dict:
    """Where each setting can be seen after everything is built from the settings."""
    device = torch.device("cpu")
    model, loss = build.build_model(settings), build.build_loss(settings)
    average = build.build_model(settings) if settings.ema_decay else None
    guard: Guard = build.build_guard(settings, model, average, steps_per_epoch=10)
    loader = BatchLoader(_Blank(settings), device=device, batch_size=settings.batch_size, accumulate=settings.accumulate, mode=settings.augment, seed=settings.seed)
    run = Run.start(settings.model_copy(update={"output_dir": str(tmp_path)}))
    decays = sorted(group["weight_decay"] for group in guard.optimizer.param_groups)
    cast = build.autocast(settings, device)
    heads = [m for m in (model.progressive, model.subpixel, model.contour, model.distance, model.boundary) if m is not None]
    gain = model.boundary.edge_conv.weight.std().item() * (9 * model.boundary.edge_conv.in_channels) ** 0.5 if model.boundary else None
    close = lambda a, b: pytest.approx(b, rel=0.1) == a  # noqa: E731  the gain is a standard deviation of random weights
    return {
        "lr": guard.schedule.lr, "min_lr": guard.schedule.min_lr,
        "warmup_epochs": guard.schedule.warmup_steps / 10 if settings.warmup_epochs * 2 <= settings.epochs else settings.warmup_epochs,
        "epochs": guard.schedule.total_steps / 10,
        "weight_decay": decays[1], "grad_clip": guard.grad_clip,
        "optimizer": type(guard.optimizer).__name__.lower(),
        "amp": settings.amp if settings.amp == "auto" and not cast._enabled else "off" if not cast._enabled else {torch.float16: "fp16", torch.bfloat16: "bf16"}[cast.fast_dtype],
        "ema_decay": guard.ema_decay, "batch_size": loader.plan(0).rois.shape[2], "accumulate": loader.plan(0).rois.shape[1],
        "augment": loader.mode, "recipe": run.name, "width": model.person_head.in_channels / 256,
        "coarse_width": model.target.downs[1][0][0].out_channels / (160 * settings.width), "coarse_depth": len(model.target.downs[0]) - 1,
        "roi_size": tuple(round(2 * (side - 1) / (at.max() - at.min()).item()) for side, at in zip(model.canvas, model.coordinates[0])),
        "mask_size": tuple(m * r // c for m, r, c in zip(model.mask_canvas, settings.roi_size, model.canvas)),
        "context": model.canvas[0] / settings.roi_size[0] - 1,
        "use_boundary_refinement": model.boundary is not None, "use_progressive_upsampling": model.progressive is not None,
        "use_subpixel_conv": model.subpixel is not None, "use_contour_detection": model.contour is not None,
        "use_distance_transform": model.distance is not None,
        "use_active_contour_loss": "active_contour" in loss.weights, "use_boundary_aware_loss": "boundary_aware" in loss.weights,
        "active_contour_weight": loss.weights.get("active_contour", settings.active_contour_weight),
        "boundary_aware_weight": loss.weights.get("boundary_aware", settings.boundary_aware_weight),
        "contour_weight": loss.weights.get("contour", settings.contour_weight),
        "distance_weight": loss.weights.get("distance", settings.distance_weight),
        "active_contour_smoothness": loss.active_contour_smoothness, "boundary_weight": loss.boundary_weight,
        "refinement_loss_cap": loss.cap,
        "blend_init": pytest.approx(heads[0].blend.item()) == settings.blend_init and settings.blend_init,
        "edge_gain_init": settings.edge_gain_init if gain is None or close(settings.edge_gain_init, gain) else gain,
        "distance_threshold_init": round(model.distance.threshold.item(), 6) if model.distance else settings.distance_threshold_init,
        "data": settings.data, "max_images": settings.max_images, "init_from": settings.init_from,  # seen in test_train.py
        "target_decision_weight": settings.decision_weights[1], "nontarget_decision_weight": settings.decision_weights[2],  # seen in test_predict.py
        "flip_test": settings.flip_test, "validate_every": settings.validate_every, "save_every": settings.save_every, "probe_every": settings.probe_every,
    }  # fmt: skip


class _Blank:
    """As much of a store as a plan needs."""

    def __init__(self, settings):
        self.count = 10 * settings.batch_size * settings.accumulate
        self.roi_size, self.canvas = settings.roi_size, canvas_size(settings.roi_size, settings.context)

    def __len__(self):
        return self.count


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_value_reaches_the_object_that_uses_it(recipe, tmp_path):
    torch.manual_seed(0)
    raw = yaml.safe_load((project_root() / "params" / f"{recipe}.yaml").read_text())
    settings = resolve(recipe)
    seen = observed(settings, tmp_path)
    for name in raw:
        wanted = getattr(settings, name)
        assert seen[name] == wanted, f"{recipe}: {name} is {wanted} in the settings and {seen[name]} where it is used"


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_says_what_it_is_for(recipe):
    first = (project_root() / "params" / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30


def test_changing_any_modelled_value_changes_what_is_seen(tmp_path):
    """`observed` itself is not blind: another value gives another observation."""
    base = resolve("original", width=0.0625)
    changes = {
        "lr": 1e-3, "min_lr": 1e-9, "warmup_epochs": 2, "epochs": 50, "weight_decay": 0.5, "grad_clip": 9.0, "optimizer": "adam", "amp": "bf16",
        "ema_decay": 0.5, "batch_size": 3, "accumulate": 2, "augment": "full", "width": 0.125, "coarse_width": 2.0, "coarse_depth": 2, "roi_size": 32, "mask_size": 32,
        "blend_init": 0.2, "edge_gain_init": 0.3, "distance_threshold_init": 0.4, "active_contour_weight": 0.7,
        "boundary_aware_weight": 0.7, "contour_weight": 0.7, "distance_weight": 0.7, "active_contour_smoothness": 0.7,
        "boundary_weight": 7.0, "refinement_loss_cap": 7.0,
        **{name: False for name in SWITCHES if name != "use_subpixel_conv"},
    }  # fmt: skip
    before = observed(base, tmp_path)
    for name, value in changes.items():
        after = observed(resolve("original", **{"width": 0.0625, name: value}), tmp_path)
        assert before[name] != after[name], name
