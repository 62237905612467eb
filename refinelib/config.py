"""One validated settings object: every knob of a run, its range, its unit, its default.

This module imports neither torch nor the rest of the package, so that a wrong
name, type or range stops a notebook in its first second.

Where a setting comes from, later wins::

    defaults below  <-  params/<recipe>.yaml  <-  overrides (papermill -p, keywords)  <-  REFINELIB_SMOKE
"""

from __future__ import annotations

import difflib
import math
import os
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, Mapping

from pydantic_core import PydanticCustomError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from refinelib.files import parse_yaml, read_yaml, reason, shown
from refinelib.guard import faults

SMOKE_VARIABLE = "REFINELIB_SMOKE"

#: The names under which two recipes are known elsewhere.
RECIPE_ALIASES = {
    "rgb_hierarchical_unet_v2_attention_r64m64_refined": "refined",
    "rgb_hierarchical_unet_v2_attention_r64m64_refined_stable": "stable",
}


#: Settings that say where a run lies and what it leaves, not what it does.
WHERE = frozenset({
    "run", "resume", "output_dir", "store_dir", "data_dir", "allow_images_outside", "train_annotations", "train_images", "val_annotations", "val_images", "workers",
    "log_every", "save_every", "probe_every", "validate_every",
})  # fmt: skip


#: Settings that say how a finished model's masks are drawn; no training step knows of them.
DRAWING = frozenset({"flip_test", "target_decision_weight", "nontarget_decision_weight"})


class SettingsError(ValueError):
    """A setting is wrong; the message says which, why, and what would be right."""


def project_root() -> Path:
    """The folder that holds ``params/`` and ``outputs/``, whatever the working directory is.

    It is the checkout the package was installed from (``pip install -e .``); where the package
    was installed without its checkout, the working directory.
    """
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "params").is_dir() else Path.cwd()


def absolute(value: str | os.PathLike) -> Path:
    """Absolute form of a path: a relative one starts at the project's root, wherever it is said."""
    path = Path(value).expanduser()
    return path if path.is_absolute() else project_root() / path


def _size(description: str, default: int = 64) -> Any:
    return Field(default=(default, default), description=description)


class Settings(BaseModel):
    """Every setting of a training run. Frozen: what is saved is what ran."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    # -- the run ---------------------------------------------------------------------------------
    recipe: str = Field("demo", description="name of a file in params/ (without .yaml) or a path to one")
    run: str | None = Field(None, description="name of the run's folder under outputs/; none: the recipe's name", pattern=r"^[A-Za-z0-9._-]+$")
    output_dir: str = Field("outputs", description="folder of all runs; relative paths start at the project's root")
    seed: int = Field(0, ge=0, lt=2**31, description="seeds weights, data order and augmentation")
    resume: bool = Field(False, description="go on with the newest run of this name from its newest whole checkpoint")
    init_from: str | None = Field(None, description="start from the weights of this run (name or folder) or checkpoint file")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    deterministic: bool = Field(False, description="bitwise repeatable on CUDA too, slower there (the CPU always is)")

    # -- data ------------------------------------------------------------------------------------
    data: Literal["synthetic", "coco", "pennfudan"] = Field("synthetic", description="where people come from")
    data_dir: str | None = Field(None, description="folder of the data set in its published layout; a relative path starts at the project's root")
    train_annotations: str | None = Field(None, description="COCO JSON to train on, where it is not data_dir/annotations/instances_train2017*.json")
    train_images: str | None = Field(None, description="folder of its images, where it is not data_dir/images/train2017 or data_dir/train2017")
    val_annotations: str | None = Field(None, description="COCO JSON to validate on, where it is not data_dir/annotations/instances_val2017*.json")
    val_images: str | None = Field(None, description="folder of its images, where it is not data_dir/images/val2017 or data_dir/val2017")
    allow_images_outside: bool = Field(False, description="read images that a COCO file names outside its image folder (an absolute file_name, or one that climbs out with ..), too")
    add_pennfudan: str | None = Field(None, description="folder of Penn-Fudan (PNGImages, PedMasks), whose own training people join those of data; max_images counts them last")
    store_dir: str | None = Field(None, description="folder of the decoded crops (a store built elsewhere serves with no images at hand); none: output_dir/stores")
    max_images: int | None = Field(None, ge=1, description="use only the first so many images of each split")
    workers: int | None = Field(None, ge=1, le=256, description="processes that build the store; none: one a core")
    roi_size: tuple[int, int] = _size("input pixels across the person's box, one number or [height, width], 16 to 512")
    mask_size: tuple[int, int] = _size("mask pixels across the person's box, one number or [height, width], 16 to 512")
    context: float = Field(0.0, ge=0.0, le=2.0, description="how much of the box's size is added around it; 0: the box itself, 0.5: half again as much")
    augment: Literal["off", "flip", "full", "strong"] = Field("flip", description="full: flip, affine, colour; strong: more of these, people pasted in front and behind, boxes drawn anew around what is then seen; on the device, whole batches at once")

    # -- model -----------------------------------------------------------------------------------
    width: float = Field(1.0, ge=0.0625, le=2.0, description="channels relative to the full model: 1.0 has 24 M parameters, 0.125 trains on a laptop")
    coarse_width: float = Field(1.0, ge=0.25, le=4.0, description="channels of the two coarsest scales relative to those that width gives")
    coarse_depth: int = Field(1, ge=1, le=8, description="residual blocks of each scale below full resolution")
    use_boundary_refinement: bool = Field(True, description="residual on the mask, gated by edge strength")
    use_progressive_upsampling: bool = Field(True, description="coarse-to-fine resize-convolution decoder")
    use_subpixel_conv: bool = Field(False, description="sub-pixel (pixel shuffle) decoder, the alternative to progressive upsampling")
    use_contour_detection: bool = Field(True, description="contour head, fused into the mask")
    use_distance_transform: bool = Field(True, description="signed distance head, fused into the mask")
    blend_init: float = Field(0.1, gt=0.0, le=1.0, description="blending weight of each refinement at the start (learned)")
    edge_gain_init: float = Field(1.0, gt=0.0, le=10.0, description="initial gain of the edge convolution that writes the boundary residual")
    distance_threshold_init: float = Field(0.5, gt=0.0, lt=1.0, description="level of the distance map, scaled to 0..1, taken as the mask's edge at the start (learned)")

    # -- losses ----------------------------------------------------------------------------------
    ce_weight: float = Field(1.0, ge=0.0, le=100.0, description="weight of the cross-entropy over three classes")
    dice_weight: float = Field(1.0, ge=0.0, le=100.0, description="weight of the Dice loss over the classes present")
    use_active_contour_loss: bool = Field(True, description="region and length term of the mask's own contour")
    use_boundary_aware_loss: bool = Field(True, description="cross-entropy weighted towards the true boundary")
    active_contour_weight: float = Field(0.1, ge=0.0, le=100.0, description="weight of the active contour loss")
    active_contour_smoothness: float = Field(0.1, ge=0.0, le=10.0, description="weight of the length term inside the active contour loss")
    boundary_aware_weight: float = Field(0.1, ge=0.0, le=100.0, description="weight of the boundary-aware loss")
    boundary_weight: float = Field(5.0, ge=0.0, le=100.0, description="extra weight of a pixel on the boundary against one far from it, inside the boundary-aware loss")
    contour_weight: float = Field(0.1, ge=0.0, le=100.0, description="weight of the contour loss (with use_contour_detection)")
    distance_weight: float = Field(0.1, ge=0.0, le=100.0, description="weight of the distance loss (with use_distance_transform)")
    refinement_loss_cap: float | None = Field(None, gt=0.0, le=1e6, description="cap on the value of each refinement loss, before its weight; keeps the gradient's direction; none: no cap")

    # -- optimisation ----------------------------------------------------------------------------
    epochs: int = Field(100, ge=1, le=100_000, description="passes over the training people")
    batch_size: int = Field(2, ge=1, le=65_536, description="ROIs a micro-batch")
    accumulate: int = Field(1, ge=1, le=4096, description="micro-batches whose mean makes one optimizer step")
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="adam: weight decay enters as an L2 penalty")
    lr: float = Field(5e-5, gt=0.0, le=1.0, description="peak learning rate")
    min_lr: float = Field(1e-6, ge=0.0, le=1.0, description="learning rate at the end of the cosine; at most lr")
    warmup_epochs: float = Field(5.0, ge=0.0, le=100_000.0, description="epochs of linear warm-up, counted in steps; at most half the run is used for it")
    weight_decay: float = Field(1e-3, ge=0.0, le=1.0, description="decay of matrices and kernels; norms, biases and scalars have none")
    grad_clip: float = Field(5.0, gt=0.0, le=1e6, description="largest L2 norm of the whole gradient after clipping")
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0, description="decay of the weights' moving average that is validated and delivered; 0: off")
    amp: Literal["auto", "off", "bf16", "fp16"] = Field("auto", description="mixed precision; auto: bf16 on GPUs that have it, off elsewhere")
    loss_scale_init: float = Field(65536.0, ge=1.0, le=2.0**24, description="fp16 loss scale at the start")
    loss_scale_floor: float = Field(1.0, gt=0.0, le=2.0**24, description="fp16 loss scale never falls below this; at most loss_scale_init")

    compile: Literal["auto", "on", "off"] = Field("auto", description="compile model and loss; auto: on CUDA, in runs long enough to gain by it, beside the training where no kernels are kept; on: at once, and wait")
    cuda_graphs: bool = Field(True, description="on CUDA, record a step once and replay it: one launch in place of thousands")
    fused_optimizer: bool = Field(True, description="one kernel that can skip a step on the device; false: plain kernels and one read of the host a step")

    # -- when a step goes wrong --------------------------------------------------------------------
    on_spike: Literal["skip", "clip", "note"] = Field("clip", description="what to do with a loss or gradient norm far above its past: skip the step, clip its gradient to the usual norm, or only note it")
    spike_sigma: float = Field(6.0, ge=2.0, le=100.0, description="standard deviations (of the logarithm) above its past that make a spike")
    max_consecutive_skips: int = Field(20, ge=2, le=10_000, description="skips in a row after which the run goes back to its last good state")
    max_rewinds: int = Field(3, ge=0, le=100, description="how often a run may go back before it stops as diverged")
    max_incidents: int = Field(5, ge=0, le=1000, description="incidents kept for replay, each with a copy of the weights")
    inject: str | None = Field(None, description="planted faults, such as grad:nan@12:boundary; see refinelib/guard/faults.py")

    # -- validation and prediction ---------------------------------------------------------------
    validate_every: int = Field(1, ge=1, description="epochs between validations (the last epoch always is)")
    flip_test: bool = Field(False, description="average the probabilities of each crop and of its mirror image; twice the time")
    target_decision_weight: float = Field(1.0, ge=0.1, le=10.0, description="probabilities of the target are multiplied by this before the likeliest class is drawn; 1: the fewest wrong pixels")
    nontarget_decision_weight: float = Field(1.0, ge=0.1, le=10.0, description="the same for other people: what is rare needs less than even odds for the best IoU")

    # -- what the run leaves ---------------------------------------------------------------------
    log_every: int = Field(20, ge=1, description="steps between lines in metrics.jsonl and TensorBoard")
    save_every: int = Field(1, ge=1, description="epochs between checkpoints (the last epoch and every best one are always kept)")
    probe_every: int = Field(1, ge=0, description="epochs between files of gradient norms by layer, which gradients.ipynb reads; 0: none")
    smoke: bool = Field(False, description=f"shrink everything to test size; the environment variable {SMOKE_VARIABLE} set to 1 does so too")

    # -- validation ------------------------------------------------------------------------------
    @field_validator("roi_size", "mask_size", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        pair = (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("give one whole number or [height, width]")
        for side in pair:
            if isinstance(side, bool) or not isinstance(side, (int, float)) or not 16 <= side <= 512 or int(side) != side:
                raise ValueError("each side is a whole number from 16 to 512")
        return tuple(int(side) for side in pair)

    @field_validator("inject")
    @classmethod
    def _readable_faults(cls, value: str | None) -> str | None:
        faults.parse(value or "")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        def refuse(message: str) -> None:
            raise PydanticCustomError("together", "{message}", {"message": message})

        if self.min_lr > self.lr:
            refuse(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}: give a min_lr of at most {self.lr:g}")
        if self.loss_scale_floor > self.loss_scale_init:
            refuse(f"loss_scale_floor = {self.loss_scale_floor:g} is above loss_scale_init = {self.loss_scale_init:g}")
        if self.use_subpixel_conv and self.use_progressive_upsampling:
            refuse("use_subpixel_conv is the alternative to use_progressive_upsampling: switch one of them off")
        if self.data != "synthetic" and not (self.data_dir or self.store_dir or self.train_annotations):
            refuse(f"data = {self.data} needs data_dir, the folder of the data set, or store_dir, a store built before")
        if self.data == "synthetic":
            paths = [name for name in ("data_dir", "train_annotations", "train_images", "val_annotations", "val_images") if getattr(self, name)]
            if paths:
                refuse(f"{paths[0]} is given, and data = synthetic draws its own people: give data = coco or pennfudan too, or leave {paths[0]} out")
        if self.add_pennfudan and self.data == "pennfudan":
            refuse("data = pennfudan has Penn-Fudan's people already: leave add_pennfudan out")
        if self.ce_weight == 0 and self.dice_weight == 0:
            refuse("ce_weight and dice_weight are both 0: nothing would teach the mask; give one of them a weight")
        if self.resume and self.init_from:
            refuse("resume goes on with a run and init_from starts a new one from its weights: give one of them")
        return self

    @property
    def decision_weights(self) -> tuple[float, float, float]:
        """Of background, target and non-target: see :func:`refinelib.metrics.scoring.predict_probs`."""
        return (1.0, self.target_decision_weight, self.nontarget_decision_weight)

    # -- paths -----------------------------------------------------------------------------------
    def path(self, value: str) -> Path:
        """Absolute form of a path in the settings: relative ones start at the project's root."""
        return absolute(value)

    @property
    def run_name(self) -> str:
        return self.run or Path(self.recipe).stem


def resolve(recipe: str | None = None, /, **overrides: Any) -> Settings:
    """The settings of a recipe with overrides on top, validated.

    Args:
        recipe: name of a file in ``params/`` or a path to a YAML file; none: the one among the
            overrides, else ``demo``.
        **overrides: settings by name. Strings are read as a command line or YAML would mean them
            (``"5e-6"``, ``"false"``, ``"none"``).

    Raises:
        SettingsError: a sentence for every wrong name, type or range, with the nearest right name.
    """
    recipe = recipe or overrides.pop("recipe", None) or Settings.model_fields["recipe"].default
    overrides.pop("recipe", None)
    recipe = RECIPE_ALIASES.get(str(recipe), str(recipe))
    from_file = load_recipe(recipe)
    from_file.pop("recipe", None)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    values = {**from_file, **overrides, "recipe": recipe}
    if "lr" in overrides and overrides.get("min_lr", from_file.get("min_lr")) == from_file.get("min_lr"):
        # A peak set below the recipe's own least rate means a small rate throughout, not a mistake.
        values["min_lr"] = _least(values)
    settings = _validated(values)
    if settings.smoke or _flag(os.environ.get(SMOKE_VARIABLE, "")):
        settings = _validated({**settings.model_dump(), **_smoke(settings)})
    return settings


def from_notebook(namespace: Mapping[str, Any]) -> Settings:
    """The settings that a notebook's parameter cells left in its name space.

    Every plain value (number, string, bool, list, none) under a public name is taken for a
    setting; none means "as the recipe says". A name that is no setting, which is what papermill
    leaves after ``-p learning_rate 1e-3``, is refused with the nearest right one.

    Args:
        namespace: the notebook's ``globals()``, before it made any variable of its own.
    """
    plain = (bool, int, float, str, list, tuple, dict)
    ours = {"In", "Out"}  # IPython keeps its history under these
    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in ours and isinstance(value, plain)
    }
    try:
        return resolve(**given)
    except SettingsError as error:
        if "there is no setting" in str(error):
            raise SettingsError(f"{error} (a variable of your own? restart the kernel, or name it with a leading underscore)") from None
        raise


def load_recipe(recipe: str) -> dict[str, Any]:
    """The raw mapping in ``params/<recipe>.yaml`` (or in the YAML file at that path)."""
    folder = project_root() / "params"
    if recipe.endswith((".yaml", ".yml")):
        file = Path(os.path.expanduser(recipe))
        file = file if file.is_absolute() or os.path.exists(file) else project_root() / file
    else:
        file = folder / f"{recipe}.yaml"
    if not os.path.isfile(file):  # a name that is too long is none either
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        nearest = _nearest(recipe, [*known, *RECIPE_ALIASES])
        raise SettingsError(f"there is no recipe {shown(recipe)}{nearest}; there are {', '.join(known)}")
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must hold one `name: value` a line, and holds {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def recipe_names() -> list[str]:
    """Names of all recipes in ``params/``."""
    return sorted(p.stem for p in (project_root() / "params").glob("*.yaml"))


def describe(settings: Settings) -> str:
    """A plain table of the resolved settings, a paragraph each; those that differ from the defaults are starred."""
    lines = []
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        star = "*" if value != field.default else " "
        start = f"{star} {name:26} {_shown(value):15} "  # lines of 100 characters: a notebook beside JupyterLab's file list shows no more
        if len(start) > 45:
            lines.append(start.rstrip())
            start = ""
        lines += textwrap.wrap(field.description, 100, initial_indent=start.ljust(45), subsequent_indent=" " * 45)
    return "\n".join(lines)


def parameters_cell() -> str:
    """Source of the tagged parameters cell of ``train.ipynb``: every setting, its type, its meaning."""
    lines = ["# none: as the recipe says. Set any of them here or with papermill -p NAME VALUE."]
    for name, field in Settings.model_fields.items():
        default = repr(field.default) if name == "recipe" else "None"
        lines.append(f"{name}: {_type_name(field.annotation)} = {default}  # {field.description}")
    return "\n".join(lines)


# -- helpers ---------------------------------------------------------------------------------------
def _smoke(settings: Settings) -> dict[str, Any]:
    """What smoke size changes: everything that costs time, nothing that chooses what runs."""
    epochs = min(settings.epochs, 2)
    return dict(
        smoke=True,
        width=min(settings.width, 0.0625),
        epochs=epochs,
        warmup_epochs=min(settings.warmup_epochs, epochs / 2),
        batch_size=min(settings.batch_size, 4),
        max_images=min(settings.max_images or 8, 8),
        roi_size=tuple(min(side, 32) for side in settings.roi_size),
        mask_size=tuple(min(side, 32) for side in settings.mask_size),
        log_every=1,
        output_dir="outputs/smoke" if settings.output_dir == "outputs" else settings.output_dir,
    )


def _validated(values: Mapping[str, Any]) -> Settings:
    fields = Settings.model_fields
    unknown = [name for name in values if name not in fields]
    if unknown:
        wrong = [f"there is no setting {shown(name)}{_nearest(name, fields)}" for name in unknown[:10]]
        raise SettingsError("; ".join([*wrong, *[f"and {len(unknown) - 10} more"] * (len(unknown) > 10)]))
    plain = {name: _read(name, value, fields[name].annotation) for name, value in values.items() if value is not None}
    # An explicit "none" is a value of its own; a Python None means the default.
    plain = {name: None if value is _NONE else value for name, value in plain.items()}
    try:
        return Settings(**plain)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(problem) for problem in error.errors())) from None


_NONE = object()


def _read(name: str, value: Any, annotation: Any) -> Any:
    """One value as papermill, YAML or a keyword brought it, as the type its field means.

    papermill passes ``-p flag false`` as the string "false" and a YAML file's ``5e-6`` arrives as
    a string (YAML 1.1 wants ``5.0e-6``); YAML also reads ``amp: off`` as the boolean false.
    """
    options = _options(annotation)
    text_only = options <= {str, type(None)} or any(typing.get_origin(option) is Literal for option in options)
    if isinstance(value, str):
        word = value.strip()
        if word.lower() in ("none", "null", "") and type(None) in options:
            return _NONE
        if text_only:
            return word
        if bool in options:
            return _flag(word, name)
        if word.startswith("["):
            try:
                return parse_yaml(word)
            except ValueError:
                return word
        try:
            number = float(word)
        except ValueError:
            return word
        return int(number) if math.isfinite(number) and number == int(number) else number
    if options <= {str, type(None)} and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # papermill makes a number of -p run 20261122
    if isinstance(value, bool) and bool not in options:
        word = "on" if value else "off"  # as YAML 1.1 reads them
        if word in _choices(annotation):
            return word
        raise SettingsError(f"{name} = {value}: give {_article(_type_name(annotation))}, not a truth value")
    if bool in options and value in (0, 1):
        return bool(value)
    return value


def _least(values: Mapping[str, Any]) -> Any:
    """The recipe's ``min_lr``, or ``lr`` where that is lower; whatever is no number is left for validation."""
    least = values.get("min_lr", Settings.model_fields["min_lr"].default)
    try:
        return min(float(least), float(values["lr"])) if float(values["lr"]) > 0 else least
    except (TypeError, ValueError, OverflowError):
        return least


def _flag(word: str, name: str = SMOKE_VARIABLE) -> bool:
    lowered = word.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise SettingsError(f"{name} = {shown(word)}: give true or false")


def _options(annotation: Any) -> set:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set(typing.get_args(annotation))
    return {annotation}


def _choices(annotation: Any) -> tuple:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _type_name(annotation: Any) -> str:
    """How a field's type is written in a parameters cell and in a sentence.

    papermill shows the text of the annotation, so a set of choices is written as ``str``.
    """
    names = []
    for option in typing.get_args(annotation) if len(_options(annotation)) > 1 else (annotation,):
        if option is type(None):
            continue
        if typing.get_origin(option) is Literal:
            names.append("str")
        elif typing.get_origin(option) is tuple:
            names.append("list")
        else:
            names.append(option.__name__)
    return names[0]


def _sentence(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "together":
        return str(problem["ctx"]["message"])
    name = str(problem["loc"][0])
    field = Settings.model_fields.get(name)
    value, context = problem.get("input"), problem.get("ctx", {})
    kind = problem["type"]
    if kind == "literal_error":
        choices = _choices(field.annotation)
        rule = f"give one of {', '.join(choices)}{_nearest(str(value), choices)}"
    elif kind == "finite_number":
        rule = "give a finite number"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        (key, bound), = ((k, v) for k, v in context.items() if k in words)
        rule = f"it must be {words[key]} {bound:g}"
    elif kind == "value_error":
        rule = reason(context.get("error", problem["msg"]), 600)
    elif kind == "string_pattern_mismatch":
        rule = "use letters, digits, dot, dash and underscore only"
    else:
        rule = f"give {_article(_type_name(field.annotation))}" if field else problem["msg"]
    meaning = f" ({field.description})" if field else ""
    return f"{name} = {shown(value)}: {rule}{meaning}"


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a number or a pair"}.get(kind, kind)


#: Names from elsewhere that are far from ours letter by letter.
_SYNONYMS = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "minimum_lr": "min_lr",
    "bs": "batch_size",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "precision": "amp",
    "mixed_precision": "amp",
    "name": "run",
    "run_name": "run",
    "dataset": "data",
    "dataset_dir": "data_dir",
    "gradient_clip": "grad_clip",
    "max_grad_norm": "grad_clip",
    "gradient_accumulation_steps": "accumulate",
}


def _nearest(word: str, names: Any) -> str:
    word = word[:100].lower()
    known = _SYNONYMS.get(word)
    match = [known] if known in names else difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return "none" if value is None else str(value)
