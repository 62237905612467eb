"""Settings: what is accepted, what is refused, and in which words."""

import contextlib
import copy
import pickle
import subprocess
import sys
import types
from typing import get_args

import pytest

from refinelib import config
from refinelib.config import Settings, SettingsError, checked, from_notebook, resolve
from refinelib.launch import overrides
from refinelib.registry import DATASETS, LOSSES, REFINEMENTS, Option, Registry


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("lr", "5e-6", 5e-6),  # a YAML file's 5e-6 is a text
        ("lr", 1, 1.0),
        ("lr", None, 1e-5),  # none in a notebook: as the recipe says
        ("use_contour_detection", "false", False),  # papermill -p flag false
        ("deterministic", " True ", True),
        ("amp", False, "off"),  # YAML 1.1 reads `off` as false
        ("compile", True, "on"),
        ("run", 20261122, "20261122"),  # papermill makes a number of it
        ("epochs", "7", 7),
        ("epochs", 7.0, 7),
        ("roi_size", 48, (48, 48)),
        ("roi_size", "48", (48, 48)),
        ("roi_size", "[64, 48]", (64, 48)),
        ("mask_size", [32, 64], (32, 64)),
        ("refinement_loss_cap", "none", None),
        ("refinement_loss_cap", 3, 3.0),
        ("max_images", "null", None),
        ("contour_weight", "0.5", 0.5),  # a registered loss's
    ],
)
def test_accepts_what_papermill_and_yaml_bring(name, given, value):
    found = getattr(resolve("refined", **{name: given}), name)
    assert found == value and type(found) is type(value)


HUGE, LONG = 10**5000, "x" * 10**6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 1e-3}, ["no setting 'learning_rate'", "'lr'"]),
        ({"use_contour_detect": True}, ["'use_contour_detection'"]),
        ({"epohcs": 3}, ["'epochs'"]),
        ({"epochs": "x", "lr": "y"}, ["epochs = 'x'", "lr = 'y'"]),  # every wrong one is named
        ({"lr": "nan"}, ["lr", "finite"]),
        ({"lr": float("inf")}, ["lr", "finite"]),
        ({"lr": 0}, ["lr = 0", "greater than 0"]),
        ({"epochs": 2.5}, ["epochs = 2.5", "whole number"]),
        ({"epochs": True}, ["truth value"]),
        ({"use_contour_detection": "maybe"}, ["true or false"]),
        ({"use_contour_detection": 2}, ["use_contour_detection"]),
        ({"amp": "fp61"}, ["'off', 'bf16' or 'fp16'"]),
        ({"data": "cocoo"}, ["synthetic, coco, pennfudan", "'coco'"]),
        ({"roi_size": 8}, ["16 to 512"]),
        ({"roi_size": [64]}, ["[height, width]"]),
        ({"roi_size": ["a", "b"]}, ["16 to 512"]),
        ({"roi_size": "[64, null]"}, ["16 to 512"]),
        ({"roi_size": "[64, 48"}, ["roi_size"]),
        ({"roi_size": float("inf")}, ["roi_size"]),
        ({"run": "../elsewhere"}, ["it must match pattern", "letters, digits"]),
        ({"run": "/" * 10**6}, ["it must match pattern", "letters, digits"]),
        ({"min_lr": 1e-2}, ["min_lr", "above lr"]),
        ({"data": "coco"}, ["needs data_dir"]),
        ({"data_dir": "/somewhere"}, ["data = synthetic does not use data_dir"]),
        ({"use_subpixel_conv": True}, ["alternative"]),
        ({"resume": True, "init_from": "x"}, ["one of them"]),
        ({"ce_weight": 0, "dice_weight": 0}, ["nothing would teach"]),
        ({"loss_scale_floor": 1e6, "loss_scale_init": 4.0}, ["loss_scale_floor"]),
        ({"recipe": 5}, ["there is no recipe '5'"]),
        ({"recipe": "stabel"}, ["did you mean 'stable'"]),
        ({"lerning_rate": 1e-3}, ["did you mean 'lr'"]),
        ({"recipe": "~nobody-at-all/a.yaml"}, ["no user"]),
        ({"recipe": "\0.yaml"}, ["no recipe"]),
        *[({name: LONG}, [name]) for name in ("lr", "amp", "use_contour_detection", "recipe")],
        *[({name: value}, [name]) for name in ("lr", "epochs") for value in (HUGE, "7" * 5000)],
        ({LONG: 1}, ["no setting"]),
        ({"max_images": [HUGE]}, ["max_images"]),
        ({"roi_size": "[" * 50_000}, ["roi_size"]),
        ({f"no_{i}": i for i in range(10_000)}, ["and 9990 more"]),
    ],
    ids=lambda value: None if isinstance(value, list) else ", ".join(value)[:40],
)
def test_refuses_in_a_sentence(given, words):
    with pytest.raises(SettingsError) as caught:
        resolve(**{"recipe": "original", **given})
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "pydantic" not in message and "\n" not in message and len(message) < 1500


def test_nobodys_home_is_no_path():
    with pytest.raises(SettingsError, match="there is no user of that name"):
        config.absolute("~nobody-at-all/outputs")


# -- recipes -----------------------------------------------------------------------------------------
def test_recipe_from_a_path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 5e-6\namp: off\ncompile: on\n")
    settings = resolve(str(file))
    assert (settings.lr, settings.amp, settings.compile, settings.run_name) == (5e-6, "off", "on", "mine")
    file.write_text("- a list\n")
    with pytest.raises(SettingsError, match="one `name: value` a line"):
        resolve(str(file))
    file.write_bytes(b"recipe: caf\xe9\n")  # another encoding
    with pytest.raises(SettingsError, match="mine.yaml is not valid YAML"):
        resolve(str(file))


@pytest.mark.parametrize("place", [{"data_dir": "there"}, {"store_dir": "stores"}])
def test_options_make_the_same_settings_of_a_recipe_that_leaves_the_place_of_its_data_open(tmp_path, place):
    file = tmp_path / "mine.yaml"
    file.write_text("base: laptop\ndata: coco\nlr: 3e-4\n")
    settings = resolve(str(file), **place, lr=1e-3, roi_size=32)
    words = overrides(settings)
    given = dict(zip(words[1::3], words[2::3], strict=True))
    assert resolve(str(file), **given) == settings and "width" not in given
    assert overrides(resolve("demo")) == []


def test_a_recipe_has_the_values_of_its_base_under_its_own(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: laptop\nlr: 3e-4\nwidth: 0.25\n")
    second.write_text(f"base: {first}\nwidth: 0.5\n")
    changed = {"recipe": str(second), "lr": 3e-4, "width": 0.5}
    assert resolve(str(second), data="synthetic") == resolve("laptop", data="synthetic").model_copy(
        update=changed
    )
    # papermill -f gives all lines of a recipe, and nothing of its base
    assert resolve(base="fast", lr=3e-4) == resolve("fast", lr=3e-4)
    assert resolve(base="best", **config.load_recipe("fast")) == resolve("fast")
    first.write_text(f"base: {second}\n")
    with pytest.raises(SettingsError, match="second.yaml in .*first.yaml leads back to itself"):
        resolve(str(second))
    first.write_text("base: lapptop\n")
    with pytest.raises(SettingsError, match="there is no recipe 'lapptop'; did you mean 'laptop'"):
        resolve(str(second))


def test_a_small_lr_brings_the_recipes_min_lr_down_but_not_an_explicit_one():
    assert resolve("demo", lr="5e-6").min_lr == 5e-6
    with pytest.raises(SettingsError, match="min_lr"):
        resolve("demo", lr=5e-6, min_lr=1e-4)


def test_smoke_variable_shrinks_and_is_recorded(monkeypatch):
    monkeypatch.setenv(config.SMOKE_VARIABLE, "1")
    small = resolve("original", width=1.0)
    assert small.smoke and small.width < 0.1 and small.epochs <= 2 and small.max_images <= 8
    assert (
        small.lr == 5e-5 and small.amp == "fp16" and small.use_distance_transform
    )  # what runs is not changed
    monkeypatch.setenv(config.SMOKE_VARIABLE, "0")
    assert not resolve("original").smoke
    monkeypatch.setenv(config.SMOKE_VARIABLE, "perhaps")
    with pytest.raises(SettingsError, match=config.SMOKE_VARIABLE):
        resolve("original")


def test_settings_are_frozen_and_survive_json_and_pickle():
    settings = resolve("stable", roi_size=[64, 48])
    with pytest.raises(ValueError, match="frozen"):
        settings.lr = 1.0
    assert Settings(**settings.model_dump(mode="json")) == settings
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings


# -- notebooks ---------------------------------------------------------------------------------------
def test_notebook_name_space():
    class Widget: ...

    given = {"recipe": "stable", "lr": 1e-4, "epochs": None}
    others = {"_hidden": 3, "In": [], "Out": {}, "f": lambda: 0, "w": Widget(), "m": types.ModuleType("m")}
    settings = from_notebook(given | others)
    assert (settings.recipe, settings.lr, settings.epochs) == ("stable", 1e-4, 100)
    with pytest.raises(SettingsError, match="'batch_size'"):
        from_notebook({**given, "batchsize": 4})


def test_parameters_cell_sets_nothing_by_itself():
    space = {}
    exec(config.parameters_cell(), {}, space)
    assert from_notebook(space) == resolve("demo")
    assert set(space) - {"__annotations__"} == {*config.fields(), "base"}


def test_the_parameters_cell_has_the_range_or_the_choices_of_every_setting():
    lines = {line.split(":")[0]: line for line in config.parameters_cell().splitlines()[1:]}
    for name, field in config.fields().items():
        given = [
            value
            for limit in field.metadata
            for value in (getattr(limit, of, None) for of in ("ge", "gt", "le", "lt"))
            if value is not None
        ]
        kinds = {field.annotation, *get_args(field.annotation)}
        assert given or not kinds & {int, float}, f"{name} has no limits"
        for value in given:
            assert f" {value:.10g}" in lines[name].split("  # ")[1], lines[name]
        for choice in config._choices(field.annotation):
            assert choice in lines[name], lines[name]
    assert "letters, digits" in lines["run"] and "cuda:1" in lines["device"]
    assert config.describe(resolve(), every=True).count("0.1 to 10") == 2  # the table too


@pytest.mark.parametrize("given", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_a_kind_or_one_gpu(given):
    assert resolve(device=given).device == checked(device=given) == given


@pytest.mark.parametrize("given", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA:1 "])
def test_another_device_is_refused_in_a_sentence(given):
    for read in (resolve, checked):
        with pytest.raises(SettingsError, match="give auto, cpu, mps, cuda, or one GPU by its number"):
            read(device=given)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"run": 7}, "run arrived as a number and is read as 7: papermill's -r run VALUE, or quotes"),
        ({"run": 1e5}, "run arrived as a number and is read as 100000.0"),
        ({"recipe": 7}, "recipe arrived as a number and is read as 7"),
        ({"recipe": "demo", "store_dir": 12}, "store_dir arrived as a number and is read as 12"),
    ],
)
def test_a_text_that_arrives_as_a_number_is_said(given, sentence):
    with pytest.warns(UserWarning, match=sentence), contextlib.suppress(SettingsError):
        resolve(**given)


def test_a_text_that_arrives_as_one_is_kept(recwarn):
    assert resolve(run="007").run == "007" and checked(run="1e5") == "1e5"
    assert resolve(run="none", lr="5e-6", epochs=3, amp=False, roi_size=48).run is None
    assert not recwarn.list


def test_parameters_that_belong_to_no_run():
    assert checked(flip="false", jitter="True", max_images=3, device="cpu", run=7) == [
        False,
        True,
        3,
        "cpu",
        "7",
    ]
    assert checked(flip=None, max_images="none", image="none") == [None, None, None]
    assert checked(runs=["a", "b"]) == ["a", "b"]
    for wrong in ({"flip": "maybe"}, {"max_images": 0}, {"max_images": True}, {"device": "tpu"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            checked(**wrong)


def test_a_wrong_name_stops_a_notebook_within_seconds_and_before_any_work():
    """The registries need torch; the training loop, the notebooks' tools and the figures are not imported."""
    code = (
        "import sys, refinelib\n"
        "try: refinelib.resolve('demo', learning_rate=1)\n"
        "except refinelib.SettingsError as error: print(error)\n"
        "late = {'refinelib.trainer', 'refinelib.workflows', 'matplotlib', 'tensorboard'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'lr'" in done.stdout


# -- roles and registered parts ------------------------------------------------------------------------
def test_every_setting_has_one_role_and_tables_are_grouped_by_it():
    roles = [config.names_with_role(role) for role in config.ROLES]
    assert sum(map(len, roles)) == len(config.fields()) and set().union(*roles) == set(config.fields())
    assert {"output_dir", "data_dir", "log_every"} <= roles[0] and {"flip_test"} < roles[-1]
    assert config.names_with_role("run", "inference") == roles[0] | roles[-1]
    order = [name for name in config.fields()]
    assert sorted(order, key=lambda name: [name in role for role in roles].index(True)) == order
    described = config.describe(resolve("best"), every=True)
    assert "* batch_size                 32" in described and "  accumulate                 1" in described
    assert max(map(len, described.splitlines())) <= 100


def test_settings_at_their_defaults_are_counted_and_not_listed():
    lines = config.describe(resolve("best")).splitlines()
    names = [line.split()[0] for line in lines if line[0] != " "]
    assert "batch_size" in names and "accumulate" not in names and len(lines) < 40  # a screen
    differ = {
        name for name, field in config.fields().items() if getattr(resolve("best"), name) != field.default
    }
    assert set(names[:-1]) == differ
    assert lines[-1].startswith(f"{len(config.fields()) - len(differ)} more at their defaults")


@pytest.mark.parametrize("registry", [LOSSES, REFINEMENTS, DATASETS], ids=lambda registry: registry.kind)
def test_a_parts_settings_are_settings(registry):
    option = Option("sharpness", 0.5, "how sharp", {"ge": 0.0, "le": 1.0}, role="model")
    registry.add("mine", object(), option, Option("sharp_file", None, "where it lies", role="run"))
    try:
        settings = Settings(
            sharpness="0.25", **({"data": "mine", "sharp_file": "x"} if registry is DATASETS else {})
        )
        assert settings.sharpness == 0.25 == settings.model_dump()["sharpness"]
        assert (
            "sharpness" in config.names_with_role("model") and "sharpness: float" in config.parameters_cell()
        )
        with pytest.raises(SettingsError, match="sharpness = 2: it must be less than or equal to 1"):
            resolve("demo", sharpness=2)
        with pytest.raises(ValueError, match="already"):
            registry.add("mine", object())
        registry.add("other", object(), Option("sharpness", 1.5, "another"))
        with pytest.raises(ValueError, match="another setting 'sharpness' already"):
            resolve("demo")
    finally:
        for name in {"mine", "other"} & set(registry):
            registry.remove(name)
    with pytest.raises(SettingsError, match="no setting 'sharpness'"):
        resolve("demo", sharpness=1)


def test_an_unknown_part_is_named_with_the_known_ones():
    registry = Registry("greeting")
    registry.add("hello", 1)
    with pytest.raises(KeyError, match="there is no greeting 'bye'; there are hello"):
        registry["bye"]
