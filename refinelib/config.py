"""One validated settings object: every setting of a run with its range, its unit and its default.

Where a value comes from, later wins::

    defaults  <-  params/<recipe>.yaml  <-  overrides (papermill -p, keywords)  <-  REFINELIB_SMOKE

Each setting has one role, from which lists of settings are derived (:func:`names_with_role`):

========= ==================================================================================
run       where a run lies, what it leaves behind, what it computes on; changes nothing learnt
data      which samples are trained on and how they are made
model     the network
training  losses, optimizer, schedule, what to do when a step goes wrong
inference how a finished model's masks are decided; no training step uses it
========= ==================================================================================

Losses, refinements and data sets bring their settings with them (:mod:`refinelib.registry`).
"""

import contextlib
import difflib
import functools
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from refinelib.files import PathLike, parse_yaml, read_yaml, retold, shipped, shown
from refinelib.registry import DATASETS, LOSSES, REFINEMENTS, Option, limits_in_words

ROLES = ("run", "data", "model", "training", "inference")
#: Asks for smoke size; folder of all runs, and of those of smoke size, if no other is given.
SMOKE_VARIABLE, RUNS_DIR, SMOKE_DIR = "REFINELIB_SMOKE", "outputs", "outputs/smoke"
#: Longer names under which two recipes are known.
RECIPE_ALIASES = {
    "rgb_hierarchical_unet_v2_attention_r64m64_refined": "refined",
    "rgb_hierarchical_unet_v2_attention_r64m64_refined_stable": "stable",
}


class SettingsError(ValueError):
    """A setting is wrong; the message says which, why, and what would be right."""


def project_root() -> Path:
    """The folder in which a relative path such as ``outputs`` starts.

    It is the checkout that the package is imported from (``pip install -e .``), else the working directory.
    """
    return Path.cwd() if shipped() == Path(__file__).resolve().parent else shipped()


def absolute(value: PathLike) -> Path:
    """Absolute form of a path; a relative one starts at the project's root.

    Raises:
        SettingsError: it starts with ``~`` and the name of nobody.
    """
    try:
        return project_root() / Path(value).expanduser()
    except RuntimeError:
        raise SettingsError(f"{shown(str(value))} is no path: there is no user of that name") from None


def existing(value: PathLike) -> Path:
    """A path as it is given, where something is there; else its :func:`absolute` form."""
    path = Path(os.path.expanduser(value))
    return path if os.path.exists(path) else absolute(value)


# -- the settings ------------------------------------------------------------------------------------
class _Values(pydantic.BaseModel):
    """Values as papermill, YAML or a command line bring them, read as their fields mean them."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, coerce_numbers_to_str=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, str):
            value = value.strip()
            if value.lower() in ("none", "null", "") and type(None) in get_args(annotation):
                return None
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            value = "on" if value else "off"  # YAML 1.1 reads these words as truth values
            if value not in _choices(annotation):
                raise ValueError("it must not be a truth value")
        if info.field_name == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|None", str(value)):
            raise ValueError("give auto, cpu, mps, cuda, or one GPU by its number, such as cuda:1")
        if str in (annotation, *get_args(annotation)):
            _say_if_number(str(info.field_name), value)
        return value


def _say_if_number(name: str, value: Any) -> None:
    """Warn of a text that arrives as a number, as papermill and YAML make one of 007 and 1e5."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        keeps = f"papermill's -r {name} VALUE, or quotes in a recipe, keep a text such as 007 as it is"
        warnings.warn(f"{name} arrived as a number and is read as {shown(value)}: {keeps}", stacklevel=2)


def _setting(role: str, default: Any, description: str, **limits: Any) -> Any:
    return pydantic.Field(default, description=description, json_schema_extra={"role": role}, **limits)


_run, _data, _model, _train, _infer = (functools.partial(_setting, role) for role in ROLES)
Side = Annotated[int, pydantic.Field(ge=16, le=512)]

V = TypeVar("V", bound=_Values)


class Settings(_Values):
    """Every setting of a training run. Frozen: what is saved is what ran.

    Making one gives an instance of a subclass that also has the settings of all registered parts.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A registered part's setting."""

    # -- the run
    recipe: str = _run("demo", "name of a file in params/ (without .yaml) or a path to one")
    run: str | None = _run(None, "name of the run's folder; none: the recipe's", pattern=r"^(?-u)\w[\w.-]*$")
    output_dir: str = _run(RUNS_DIR, "folder of all runs; a relative path starts at the project's root")
    store_dir: str | None = _run(None, "folder of the prepared crops; none: output_dir/stores")
    resume: bool = _run(False, "continue the newest run of this name from its newest whole checkpoint")
    device: str = _run("auto", "auto, cpu, mps, cuda, or one GPU as cuda:1; auto: CUDA where there is one")
    gpus: int = _run(1, "GPUs of this host that train the run together; on a CPU, processes", ge=1, le=64)
    workers: int | None = _run(None, "processes that build the store; none: one a core", ge=1, le=256)
    compile: Literal["auto", "on", "off"] = _run("auto", "compile the step; auto: in long runs on CUDA")
    cuda_graphs: bool = _run(True, "on CUDA, capture a step as a CUDA graph and replay it")
    validate_every: int = _run(1, "epochs between validations (the last epoch always is)", ge=1)
    log_every: int = _run(20, "steps between lines in metrics.jsonl and TensorBoard", ge=1)
    save_every: int = _run(1, "epochs between checkpoints (the last and every best one are kept)", ge=1)
    probe_every: int = _run(1, "epochs between files of gradient norms by layer; 0: none", ge=0)
    max_incidents: int = _run(5, "incidents kept for replay, each with a copy of the weights", ge=0, le=1000)
    inject: str | None = _run(None, "planted faults, as grad:nan@12:boundary; see guard/faults.py")
    rank_timeout: float = _run(60.0, "seconds after which a silent process of several ends the run", ge=5.0)
    smoke: bool = _run(False, f"shrink everything to test size; {SMOKE_VARIABLE} set to 1 does so too")

    # -- data
    data: str = _data("synthetic", "the data set: synthetic, coco, pennfudan, masks, yolo, labelme")
    add_pennfudan: str | None = _data(None, "folder of Penn-Fudan, whose training images are added")
    max_images: int | None = _data(None, "use only the first so many images of each split", ge=1)
    roi_size: tuple[Side, Side] = _data((64, 64), "input pixels of a crop, [height, width], each 16 to 512")
    mask_size: tuple[Side, Side] = _data((64, 64), "mask pixels of a crop, [height, width], each 16 to 512")
    context: float = _data(0.0, "margin added around the box, in box sizes", ge=0.0, le=2.0)
    augment: Literal["off", "flip", "full", "strong"] = _data(
        "flip", "full: flip, affine, colour; strong: more of these, copy-paste, re-fitted boxes"
    )

    # -- model
    width: float = _model(1.0, "channels relative to the full model of 24 M parameters", ge=0.0625, le=2.0)
    coarse_width: float = _model(1.0, "extra factor on the two coarsest scales' channels", ge=0.25, le=4.0)
    coarse_depth: int = _model(1, "residual blocks of each scale below full resolution", ge=1, le=8)
    conv_gain: float = _model(1.0, "first scale of normalised weights; divides gradients", ge=0.01, le=100.0)
    blend_init: float = _model(0.1, "first blending weight of each refinement (learned)", gt=0.0, le=1.0)

    # -- training
    seed: int = _train(0, "seeds weights, data order and augmentation", ge=0, lt=2**31)
    deterministic: bool = _train(False, "bitwise repeatable on CUDA too, slower (the CPU always is)")
    init_from: str | None = _train(None, "start from the weights of this run or checkpoint file")
    epochs: int = _train(100, "passes over the training set", ge=1, le=100_000)
    batch_size: int = _train(2, "ROIs in a micro-batch", ge=1, le=65_536)
    accumulate: int = _train(1, "micro-batches averaged into one optimizer step", ge=1, le=4096)
    optimizer: Literal["adamw", "adam"] = _train("adamw", "adam: weight decay enters as an L2 penalty")
    lr: float = _train(5e-5, "peak learning rate", gt=0.0, le=1.0)
    min_lr: float = _train(1e-6, "learning rate at the end of the cosine; at most lr", ge=0.0, le=1.0)
    warmup_epochs: float = _train(5.0, "epochs of linear warm-up, at most half of all", ge=0.0, le=1e5)
    weight_decay: float = _train(1e-3, "decay of matrices and kernels, not of biases", ge=0.0, le=1.0)
    grad_clip: float = _train(5.0, "largest L2 norm of the gradient after clipping", gt=0.0, le=1e6)
    ema_decay: float = _train(0.0, "decay of the moving average of the weights; 0: none", ge=0.0, lt=1.0)
    amp: Literal["auto", "off", "bf16", "fp16"] = _train("auto", "precision; auto: bf16 where it is fast")
    loss_scale_init: float = _train(65536.0, "fp16 loss scale at the start", ge=1.0, le=2.0**24)
    loss_scale_floor: float = _train(1.0, "lowest fp16 loss scale", gt=0.0, le=2.0**24)
    fused_optimizer: bool = _train(True, "skip a step on the device; false: one host read a step")
    loss_context: float | None = _train(
        None, "margin up to which losses count, in box sizes; none: all of the crop", ge=0.0, le=2.0
    )
    refinement_loss_cap: float | None = _train(None, "cap on a refinement loss; none: no cap", gt=0, le=1e6)
    on_spike: Literal["skip", "clip", "note"] = _train("clip", "what to do with a spike of loss or gradient")
    spike_sigma: float = _train(6.0, "deviations above the running mean log that are a spike", ge=2, le=100)
    max_consecutive_skips: int = _train(20, "skips in a row after which the run rewinds", ge=2, le=10_000)
    max_rewinds: int = _train(3, "rewinds after which the run stops as diverged", ge=0, le=100)

    # -- inference
    flip_test: bool = _infer(False, "average each crop's probabilities with its mirror image's")
    refit_box: bool = _infer(False, "replace a box that its first mask does not fit, then predict again")
    target_decision_weight: float = _infer(1.0, "factor on the target's probability", ge=0.1, le=10.0)
    nontarget_decision_weight: float = _infer(1.0, "factor on other people's probability", ge=0.1, le=10.0)

    def __new__(cls, **_: Any) -> "Settings":
        """An instance of the class that has the registered parts' settings as well."""
        return super().__new__(settings_class() if cls is Settings else cls)

    def __reduce__(self) -> Any:
        return functools.partial(Settings, **self.model_dump()), ()

    @pydantic.field_validator("roi_size", "mask_size", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        value = parse_yaml(value) if isinstance(value, str) else value
        pair = (value, value) if isinstance(value, (int, float)) else value
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("give one whole number or [height, width]")
        return pair

    @pydantic.field_validator("data")
    @classmethod
    def _known_data_set(cls, value: str) -> str:
        if value not in DATASETS:
            raise ValueError(f"give one of {', '.join(DATASETS)}{_nearest(value, DATASETS)}")
        return value

    @pydantic.model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        own = list(DATASETS.options(self.data))
        found = [o.name for o in DATASETS.options() if o not in own and getattr(self, o.name) != o.default]
        others = [*dict.fromkeys(found)]  # several data sets share one
        places = [option.name for option in own if option.default is None]
        nowhere = places and not (self.store_dir or any(self.pick(*places).values()))
        both = self.use_subpixel_conv and self.use_progressive_upsampling
        untaught = self.ce_weight == self.dice_weight == 0
        wrong = {
            f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}": self.min_lr > self.lr,
            "loss_scale_floor is above loss_scale_init": self.loss_scale_floor > self.loss_scale_init,
            "use_subpixel_conv is the alternative to use_progressive_upsampling: switch one off": both,
            f"data = {self.data} needs {' or '.join(places[:2])}, or store_dir, a built store": nowhere,
            f"data = {self.data} does not use {', '.join(others)}: leave it out or give another data": others,
            "data = pennfudan: leave add_pennfudan out": self.data == "pennfudan" and self.add_pennfudan,
            "loss_context is above context, where the crop ends": (self.loss_context or 0) > self.context,
            "ce_weight and dice_weight are 0: nothing would teach the mask": untaught,
            "resume and init_from exclude each other: give one of them": self.resume and self.init_from,
        }
        if messages := [message for message, found in wrong.items() if found]:
            raise ValueError(messages[0])
        return self

    @property
    def decision_weights(self) -> tuple[float, float, float]:
        """Factors on the probabilities of background, target and non-target before the class is taken."""
        return (1.0, self.target_decision_weight, self.nontarget_decision_weight)

    @property
    def run_name(self) -> str:
        """Name of the run's folder, to which a number may be added."""
        return self.run or Path(self.recipe).stem

    def path(self, value: str) -> Path:
        """Absolute form of a path in the settings."""
        return absolute(value)

    def pick(self, *names: str) -> dict[str, Any]:
        """Settings by name, as keyword arguments of what has parameters of these names."""
        return {name: getattr(self, name) for name in names}


@functools.lru_cache(maxsize=8)
def _class_with(options: tuple[Option, ...]) -> type[Settings]:
    found: dict[str, Any] = {}
    for option in options:
        if option.name in {*Settings.model_fields, *found}:
            raise ValueError(f"there is another setting {option.name!r} already: give yours another name")
        kind: Any = str | None if option.default is None else type(option.default)
        limits = dict(option.limits)
        if "choices" in limits:
            kind = Literal[limits.pop("choices")]
        found[option.name] = kind, _setting(option.role, option.default, option.description, **limits)
    return pydantic.create_model("Settings", __base__=Settings, __module__=__name__, **found)


def settings_class() -> type[Settings]:
    """The class of all settings: those of :class:`Settings` and those of the registered parts."""
    options = (option for parts in (REFINEMENTS, LOSSES, DATASETS) for option in parts.options())
    return _class_with(tuple(dict.fromkeys(options)))


def fields() -> dict[str, FieldInfo]:
    """Every setting by name, grouped by role."""
    found = settings_class().model_fields
    return dict(sorted(found.items(), key=lambda item: ROLES.index(_role(item[1]))))


def names_with_role(*roles: str) -> frozenset[str]:
    """Names of the settings of these roles: ``run``, ``data``, ``model``, ``training``, ``inference``."""
    return frozenset(name for name, field in fields().items() if _role(field) in roles)


def _role(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["role"]) if isinstance(extra, dict) else "training"


# -- from a recipe and overrides -----------------------------------------------------------------------
def resolve(recipe: str | None = None, /, **overrides: Any) -> Settings:
    """The settings of a recipe with overrides on top, validated.

    Args:
        recipe: name of a file in ``params/`` or a path to a YAML file; none: the one among the
            overrides, else ``demo``.
        **overrides: settings by name. Texts are read as a command line or YAML would mean them
            (``"5e-6"``, ``"false"``, ``"none"``); None means "as the recipe says".

    Raises:
        SettingsError: a sentence for every wrong name, type or range, with the nearest right name.
    """
    base = overrides.pop("base", None)  # papermill -f gives all of a recipe's lines, this one too
    recipe = recipe or overrides.get("recipe") or base or Settings.model_fields["recipe"].default
    _say_if_number("recipe", recipe)
    recipe = RECIPE_ALIASES.get(str(recipe), str(recipe))
    overrides = {name: value for name, value in overrides.items() if value is not None}
    values = {**load_recipe(recipe), **overrides, "recipe": recipe}
    if "lr" in overrides and "min_lr" not in overrides:
        # A peak below the recipe's lowest rate means that rate throughout. Validation refuses other texts.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            lowest = values.get("min_lr", Settings.model_fields["min_lr"].default)
            values["min_lr"] = min(float(lowest), float(values["lr"]))
    values |= {"smoke": smoke} if (smoke := os.environ.get(SMOKE_VARIABLE)) else {}
    settings = read_values(settings_class(), values)
    return settings.model_copy(update=_smoke(settings)) if settings.smoke else settings


def from_notebook(namespace: Mapping[str, Any]) -> Settings:
    """The settings that a notebook's parameter cells left in its name space.

    A name that is no setting, as after ``papermill -p learning_rate 1e-3``, is refused with the nearest right
    one; a variable of the notebook's own needs a leading underscore.

    Args:
        namespace: the notebook's ``globals()``, before it made any variable of its own.
    """
    return resolve(**plain_values(namespace))


def plain_values(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values (number, text, bool, list) under public names of a notebook's name space."""
    plain, history = (bool, int, float, str, list, tuple, dict), ("In", "Out")  # IPython's own
    public = {name: value for name, value in namespace.items() if not name.startswith("_")}
    return {n: v for n, v in public.items() if isinstance(v, plain) and n not in history}


def load_recipe(recipe: str, *, derived: tuple[str, ...] = ()) -> dict[str, Any]:
    """The raw mapping in a recipe of ``params/`` by its name, or in the YAML file at that path.

    A recipe with ``base: NAME`` has that recipe's values under its own.

    Args:
        recipe: name or path.
        derived: recipes whose base is looked for, for a circle among them to be refused.

    Raises:
        SettingsError: there is no such recipe, it is no mapping, or it is its own base.
    """
    file = recipe_files().get(recipe)
    if recipe.endswith((".yaml", ".yml")):
        file = existing(recipe)
    if file is None or not os.path.isfile(file):
        known = recipe_names()
        nearest = _nearest(recipe, [*known, *RECIPE_ALIASES])
        raise SettingsError(f"there is no recipe {shown(recipe)}{nearest}; there are {', '.join(known)}")
    with retold(SettingsError, ""):
        content = read_yaml(file)
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must hold one `name: value` a line, and holds {type(content).__name__}")
    values = {str(name): value for name, value in content.items()}
    if (base := values.pop("base", None)) is None:
        return values
    if base in (*derived, recipe):
        raise SettingsError(f"base: {base} in {file} leads back to itself: name another recipe")
    return {**load_recipe(str(base), derived=(*derived, recipe)), **values}


def recipe_names() -> list[str]:
    """Names of all recipes in ``params/``, the package's and those of the working folder."""
    return sorted(recipe_files())


def recipe_files() -> dict[str, Path]:
    """Recipes by name; one in ``params/`` of the project's root comes before the package's of that name."""
    folders = (shipped() / "params", project_root() / "params")
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def _smoke(settings: Settings) -> dict[str, Any]:
    """What smoke size changes: everything that costs time, nothing that chooses what runs."""
    most = {"width": 0.0625, "epochs": 2, "batch_size": 4, "max_images": 8}
    values: dict[str, Any] = {name: min(getattr(settings, name) or size, size) for name, size in most.items()}
    for name in ("roi_size", "mask_size"):
        values[name] = tuple(min(side, 32) for side in getattr(settings, name))
    values["output_dir"] = SMOKE_DIR if settings.output_dir == RUNS_DIR else settings.output_dir
    return {**values, "smoke": True, "log_every": 1}


# -- parameters of notebooks that make no run ------------------------------------------------------------
class _Parameters(_Values):
    """Parameters that belong to no run's settings."""

    run: str | None = None
    runs: list[str] | str | None = None
    image: str | None = None
    images: str | None = None
    annotations: str | None = None
    flip: bool | None = None
    refit: bool | None = None
    jitter: bool | None = None
    max_images: int | None = pydantic.Field(None, ge=1)
    device: str | None = None
    smoke: bool = _run(False, f"{SMOKE_VARIABLE} asks for smoke size")


def checked(**values: Any) -> Any:
    """Values of a notebook's parameters in their order, read as their names mean them; one value by itself.

    Raises:
        SettingsError: a sentence with the name, what it is and what would be right.
    """
    read = read_values(_Parameters, values)
    found = [getattr(read, name) for name in values]
    return found[0] if len(found) == 1 else found


# -- tables ----------------------------------------------------------------------------------------------
def describe(settings: Settings, *, every: bool = False) -> str:
    """A table of the settings, a paragraph each: those that differ from the defaults, or all of them.

    Lines have 100 characters, the width of a notebook beside JupyterLab's file list.

    Args:
        settings: of a run.
        every: also those at their defaults; a star marks those that differ.

    Example:
        >>> print(describe(Settings(lr=1e-3)).splitlines()[0])
        lr                         0.001           peak learning rate; above 0, at most 1
    """
    told = {n: f for n, f in fields().items() if every or getattr(settings, n) != f.default}
    lines = []
    for name, field in told.items():
        value = getattr(settings, name)
        text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        text = "x".join(map(str, value)) if isinstance(value, tuple) else text
        line = f"{('  ' if value == field.default else '* ') * every}{name:26} {text:15} {_meaning(field)}"
        lines.append(textwrap.fill(line, 100, subsequent_indent=" " * 43, break_long_words=False))
    left = f"{len(fields()) - len(told)} more at their defaults: print(describe(settings, every=True))"
    return "\n".join([*lines, *[left] * (not every)])


def parameters_cell() -> str:
    """Source of the tagged parameters cell of ``train.ipynb``: every setting, its type, its meaning."""
    lines = ["# none: as the recipe says. Set any of them here or with papermill -p NAME VALUE."]
    for name, field in fields().items():
        default = field.default if name == "recipe" else None
        lines.append(f"{name}: {_type_name(field.annotation)} = {default!r}  # {_meaning(field)}")
    lines.append("base: str = None  # recipe whose values lie under these, as papermill -f brings it")
    return "\n".join(lines)


def _meaning(field: FieldInfo) -> str:
    parts = ", ".join(_choices(field.annotation)), field.description, limits_in_words(field.metadata)
    return "; ".join(filter(None, parts))


def _choices(annotation: Any) -> tuple[str, ...]:
    found = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return get_args(found[0]) if found else ()


def _type_name(annotation: Any) -> str:
    """A field's type as the parameters cell writes it; papermill knows no choices and no unions."""
    if type(None) in get_args(annotation):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    origin = get_origin(annotation)
    return "str" if origin is Literal else "list" if origin is tuple else str(annotation.__name__)


# -- messages --------------------------------------------------------------------------------------------
def read_values(model: type[V], values: Mapping[str, Any]) -> V:
    """Validate; every wrong name and value becomes a sentence.

    Raises:
        SettingsError: with the first ten sentences, and the number of the others.
    """
    names, found = model.model_fields, dict[Any, Any]()
    try:
        return model(**{name: x for name, x in values.items() if x is not None or name not in names})
    except pydantic.ValidationError as error:
        for problem in error.errors():  # the first of each name
            found.setdefault(problem["loc"][:1], problem)
    sentences = [_sentence(names, problem) for problem in list(found.values())[:10]]
    raise SettingsError("; ".join([*sentences, *[f"and {len(found) - 10} more"] * (len(found) > 10)]))


#: Our words for pydantic's.
_WORDS = {"Value error, ": "", "Input should be": "it must be", "String should": "it must"}
_WORDS |= {"a valid integer": "a whole number", "a valid boolean": "true or false"}


def _sentence(names: Mapping[str, FieldInfo], problem: Mapping[str, Any]) -> str:
    rule = str(problem["msg"])
    for word, ours in _WORDS.items():
        rule = rule.replace(word, ours)
    if not problem["loc"]:  # of several settings
        return rule
    name = problem["loc"][0]
    if name not in names:
        return f"there is no setting {shown(name)}{_nearest(name, names)}"
    meaning = _meaning(names[name])
    return f"{name} = {shown(problem['input'])}: {rule}{f' ({meaning})' if meaning else ''}"


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word[:100].lower(), [*names, "learning_rate"], n=1, cutoff=0.6)
    match = "lr" if near == ["learning_rate"] else "".join(near)  # far from it letter by letter
    return f"; did you mean {match!r}?" if match else ""
