"""Every recipe loads, holds the values it promises, and each value reaches the object that uses it."""

import pytest
import torch

from refinelib import build
from refinelib.config import load_recipe, project_root, recipe_names, resolve
from refinelib.data.loader import BatchLoader
from refinelib.guard.guard import Guard
from refinelib.modeling.roi import canvas_size
from refinelib.registry import LOSSES, REFINEMENTS
from refinelib.runs import Run

TABLE = {
    "lr": (5e-5, 1e-5, 5e-6),
    "warmup_epochs": (5, 10, 15),
    "grad_clip": (5.0, 1.0, 0.5),
    "weight_decay": (1e-3, 1e-4, 1e-5),
    "min_lr": (1e-6, 1e-7, 5e-6),  # documented for stable: 1e-8; at a constant rate its masks are better
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
    "original": "1101111", "refined": "1101111", "stable": "1000001", "phase1": "1000001",
    "phase2": "1000011", "phase3": "1001011", "phase4": "1001111", "finetune": "1101111",
}  # fmt: skip


@pytest.mark.parametrize("column, recipe", [(0, "original"), (1, "refined"), (2, "stable")])
def test_the_three_recipes_hold_the_table(column, recipe):
    settings = resolve(recipe)
    assert {name: getattr(settings, name) for name in TABLE} == {
        name: values[column] for name, values in TABLE.items()
    }
    assert (settings.batch_size, settings.epochs, settings.roi_size, settings.mask_size) == (
        2,
        100,
        (64, 64),
        (64, 64),
    )


@pytest.mark.parametrize("recipe, flags", ON.items())
def test_modules_of_each_recipe(recipe, flags):
    settings = resolve(recipe)
    assert "".join(str(int(getattr(settings, name))) for name in SWITCHES) == flags


def test_relations_between_recipes():
    def body(name):
        return {k: v for k, v in resolve(name).model_dump().items() if k not in ("recipe", *SWITCHES)}

    stable = body("stable")
    later = {**stable, "epochs": 5, "validate_every": 1}
    assert body("phase1") == stable and body("phase2") == body("phase3") == body("phase4") == later
    assert body("finetune") == {**later, "lr": 1e-6, "min_lr": 1e-6, "init_from": "phase4"}
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


#: Settings of recipes that are seen in tests of the run, not in what is built: tests/train, tests/metrics.
ELSEWHERE = {
    "data", "max_images", "init_from", "flip_test", "refit_box", "target_decision_weight",
    "nontarget_decision_weight", "validate_every", "save_every", "probe_every",
}  # fmt: skip


def observed(settings, tmp_path) -> dict:
    """Values of settings, read from what is built from the settings; of parts that are off there are none."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model, loss = build.build_model(settings), build.build_loss(settings)
    average = build.build_model(settings) if settings.ema_decay else None
    guard: Guard = build.build_guard(settings, model, average, steps_per_epoch=10)
    loader = BatchLoader(
        _Blank(settings),
        device=device,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        mode=settings.augment,
        seed=settings.seed,
    )
    schedule, plan, cast = guard.schedule, loader.plan(0), build.autocast(settings, device)
    first = model.stem[0][0].weight.detach()
    bound = first.abs().max() * first[0].numel() ** 0.5  # weights are uniform, +-1 / sqrt(inputs)
    spans = [(at.max() - at.min()).item() for at in model.coordinates[0]]
    seen = {
        "recipe": Run.start(settings.model_copy(update={"output_dir": str(tmp_path)})).name,
        "lr": schedule.lr,
        "min_lr": schedule.min_lr,
        "epochs": schedule.total_steps / 10,
        "weight_decay": max(group["weight_decay"] for group in guard.optimizer.param_groups),
        "grad_clip": guard.grad_clip,
        "optimizer": type(guard.optimizer).__name__.lower(),
        "ema_decay": guard.ema_decay,
        "batch_size": plan.rois.shape[2],
        "accumulate": plan.rois.shape[1],
        "augment": loader.mode,
        "width": model.person_head.in_channels / 256,
        "coarse_width": model.target.downs[1][0][0].out_channels / (160 * settings.width),
        "coarse_depth": len(model.target.downs[0]) - 1,
        "conv_gain": float(f"{bound:.1g}"),
        "roi_size": tuple(
            round(2 * (side - 1) / span) for side, span in zip(model.canvas, spans, strict=True)
        ),
        "mask_size": tuple(
            m * r // c for m, r, c in zip(model.mask_canvas, settings.roi_size, model.canvas, strict=True)
        ),
        "context": model.canvas[0] / settings.roi_size[0] - 1,
        "refinement_loss_cap": loss.cap,
        "loss_context": loss.window and loss.window[0] / settings.mask_size[0] - 1,
    }
    if schedule.warmup_steps * 2 < schedule.total_steps:
        seen["warmup_epochs"] = schedule.warmup_steps / 10
    kinds = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if settings.amp != "auto":
        seen["amp"] = kinds[cast.fast_dtype] if cast._enabled else "off"
    for part in REFINEMENTS.values():
        module = getattr(model, part.attribute)
        seen[part.switch] = module is not None
        if module is not None:
            seen["blend_init"] = round(module.blend.item(), 6)
    for name, term in LOSSES.items():
        if term.switch and term.switch.endswith("_loss"):
            seen[term.switch] = name in loss.weights
        if name in loss.weights:
            seen |= {f"{name}_weight": loss.weights[name], **loss.keywords[name]}
    if model.distance is not None:
        seen["distance_threshold_init"] = round(model.distance.threshold.item(), 6)
    if model.boundary is not None:
        edge = model.boundary.edge_conv  # the gain is the standard deviation of random weights
        gain = edge.weight.std().item() * (9 * edge.in_channels) ** 0.5
        seen["edge_gain_init"] = pytest.approx(gain, rel=0.1)
    return seen


class _Blank:
    """As much of a store as a plan needs."""

    def __init__(self, settings):
        self.count = 10 * settings.batch_size * settings.accumulate
        self.roi_size, self.canvas = settings.roi_size, canvas_size(settings.roi_size, settings.context)

    def __len__(self):
        return self.count


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_value_reaches_the_object_that_uses_it(recipe, tmp_path):
    raw, settings = load_recipe(recipe), resolve(recipe)
    seen = observed(settings, tmp_path)
    for name in raw.keys() & seen.keys():
        wanted = getattr(settings, name)
        assert seen[name] == wanted, f"{name} is {wanted} in the settings and {seen[name]} where it is used"
    off = [name for name, term in LOSSES.items() if term.switch and not getattr(settings, term.switch)]
    unused = {option.name for name in off for option in LOSSES.options(name)}
    unused |= {"edge_gain_init"} if not settings.use_boundary_refinement else set()
    unused |= {"distance_threshold_init"} if not settings.use_distance_transform else set()
    assert raw.keys() - seen.keys() <= ELSEWHERE | unused | {"warmup_epochs", "amp"}


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_says_what_it_is_for(recipe):
    first = (project_root() / "params" / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30


def test_changing_any_modelled_value_changes_what_is_seen(tmp_path):
    """`observed` itself is not blind: another value gives another observation."""
    base = resolve("original", width=0.0625)
    changes = {
        "lr": 1e-3, "min_lr": 1e-9, "warmup_epochs": 2, "epochs": 50, "weight_decay": 0.5, "grad_clip": 9.0,
        "optimizer": "adam", "amp": "bf16", "ema_decay": 0.5, "batch_size": 3, "accumulate": 2,
        "augment": "full", "width": 0.125, "coarse_width": 2.0, "coarse_depth": 2, "roi_size": 32,
        "mask_size": 32, "conv_gain": 3.0, "blend_init": 0.2, "loss_context": 0.0,
        "edge_gain_init": 0.3, "distance_threshold_init": 0.4,
        "active_contour_weight": 0.7, "boundary_aware_weight": 0.7, "contour_weight": 0.7,
        "distance_weight": 0.7, "active_contour_smoothness": 0.7, "boundary_weight": 7.0,
        "refinement_loss_cap": 7.0, **{name: False for name in SWITCHES if name != "use_subpixel_conv"},
    }  # fmt: skip
    before = observed(base, tmp_path)
    for name, value in changes.items():
        after = observed(resolve("original", **{"width": 0.0625, name: value}), tmp_path)
        assert before[name] != after[name], name
