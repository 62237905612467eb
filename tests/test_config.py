"""Settings: what is accepted, what is refused, and in which words."""

import subprocess
import sys

import pytest

from refinelib import config
from refinelib.config import SettingsError, from_notebook, resolve


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("lr", "5e-6", 5e-6),  # a YAML file's 5e-6 is a string
        ("lr", 1, 1.0),
        ("use_contour_detection", "false", False),  # papermill -p flag false
        ("use_contour_detection", "False", False),
        ("deterministic", "true", True),
        ("amp", False, "off"),  # YAML 1.1 reads `off` as false
        ("epochs", "7", 7),
        ("epochs", "1e1", 10),
        ("roi_size", 48, (48, 48)),
        ("roi_size", "48", (48, 48)),
        ("roi_size", "[64, 48]", (64, 48)),
        ("mask_size", [32, 64], (32, 64)),
        ("refinement_loss_cap", "none", None),
        ("refinement_loss_cap", 3, 3.0),
        ("max_images", "none", None),
        ("lr", None, 1e-5),  # none in a notebook: as the recipe says
    ],
)
def test_accepts_what_papermill_and_yaml_bring(name, given, value):
    assert getattr(resolve("refined", **{name: given}), name) == value


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 1e-3}, ["no setting 'learning_rate'", "'lr'"]),
        ({"use_contour_detect": True}, ["'use_contour_detection'"]),
        ({"epohcs": 3}, ["'epochs'"]),
        ({"lr": "nan"}, ["lr", "finite"]),
        ({"lr": float("inf")}, ["lr", "finite"]),
        ({"lr": 0}, ["lr = 0", "above 0"]),
        ({"lr": 2.0}, ["at most 1"]),
        ({"epochs": 2.5}, ["epochs = 2.5", "whole number"]),
        ({"epochs": "ten"}, ["epochs = 'ten'", "whole number"]),
        ({"epochs": True}, ["truth value"]),
        ({"use_contour_detection": "maybe"}, ["true or false"]),
        ({"use_contour_detection": 2}, ["use_contour_detection"]),
        ({"amp": "fp61"}, ["off, bf16, fp16", "'fp16'"]),
        ({"roi_size": 8}, ["16 to 512"]),
        ({"roi_size": [64]}, ["[height, width]"]),
        ({"roi_size": ["a", "b"]}, ["16 to 512"]),
        ({"roi_size": "[64, 48"}, ["roi_size"]),
        ({"run": "../elsewhere"}, ["letters, digits"]),
        ({"min_lr": 1e-2}, ["min_lr", "above lr"]),
        ({"data": "coco"}, ["data_dir"]),
        ({"use_subpixel_conv": True}, ["alternative"]),
        ({"resume": True, "init_from": "x"}, ["one of them"]),
        ({"ce_weight": 0, "dice_weight": 0}, ["nothing would teach"]),
        ({"loss_scale_floor": 1e6, "loss_scale_init": 4.0}, ["loss_scale_floor"]),
    ],
)
def test_refuses_in_a_sentence(given, words):
    with pytest.raises(SettingsError) as caught:
        resolve("original", **given)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "pydantic" not in message and "\n" not in message


def test_every_wrong_setting_is_told_at_once():
    with pytest.raises(SettingsError) as caught:
        resolve("original", epochs="x", lr="y")
    assert "epochs" in str(caught.value) and "lr" in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'stable'"):
        resolve("stabel")


def test_recipe_from_a_path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 5e-6\namp: off\n")
    settings = resolve(str(file))
    assert (settings.lr, settings.amp, settings.run_name) == (5e-6, "off", "mine")
    file.write_text("- a list\n")
    with pytest.raises(SettingsError, match="one `name: value` a line"):
        resolve(str(file))


def test_a_small_lr_brings_the_recipes_min_lr_down_but_not_an_explicit_one():
    assert resolve("demo", lr="5e-6").min_lr == 5e-6
    with pytest.raises(SettingsError, match="min_lr"):
        resolve("demo", lr=5e-6, min_lr=1e-4)


def test_notebook_name_space():
    import types

    class Widget: ...

    space = {"recipe": "stable", "lr": 1e-4, "epochs": None, "_hidden": 3, "In": [], "Out": {}, "sys": sys, "f": lambda: 0, "w": Widget(), "m": types.ModuleType("m")}
    settings = from_notebook(space)
    assert (settings.recipe, settings.lr, settings.epochs) == ("stable", 1e-4, 100)
    with pytest.raises(SettingsError, match="'batch_size'"):
        from_notebook({**space, "batchsize": 4})


def test_parameters_cell_sets_nothing_by_itself():
    space = {}
    exec(config.parameters_cell(), {}, space)
    assert from_notebook(space) == resolve("demo")
    assert set(space) - {"__annotations__"} == set(config.Settings.model_fields)


def test_smoke_variable_shrinks_and_is_recorded(monkeypatch):
    monkeypatch.setenv(config.SMOKE_VARIABLE, "1")
    small = resolve("original", width=1.0)
    assert small.smoke and small.width < 0.1 and small.epochs <= 2 and small.max_images <= 8
    assert small.lr == 5e-5 and small.amp == "fp16" and small.use_distance_transform  # what runs is not changed
    monkeypatch.setenv(config.SMOKE_VARIABLE, "0")
    assert not resolve("original").smoke
    monkeypatch.setenv(config.SMOKE_VARIABLE, "perhaps")
    with pytest.raises(SettingsError, match=config.SMOKE_VARIABLE):
        resolve("original")


def test_settings_are_frozen_and_survive_json():
    settings = resolve("stable", roi_size=[64, 48])
    with pytest.raises(Exception, match="frozen"):
        settings.lr = 1.0
    assert config.Settings(**settings.model_dump(mode="json")) == settings


def test_a_wrong_name_is_refused_before_torch_is_imported():
    code = (
        "import sys, refinelib\n"
        "try: refinelib.resolve('demo', learning_rate=1)\n"
        "except refinelib.SettingsError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'lr'" in done.stdout


def test_yaml_reads_on_as_true_and_the_run_reads_it_as_on(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("compile: on\namp: off\n")
    settings = resolve(str(file))
    assert (settings.compile, settings.amp) == ("on", "off")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "synthetic", "data_dir": "/somewhere"}, "data = synthetic draws its own people"),
        ({"roi_size": float("inf")}, "whole number from 16 to 512"),
        ({"roi_size": "[64, null]"}, "whole number from 16 to 512"),
        ({"recipe": 5}, "there is no recipe '5'"),
    ],
)
def test_odd_values_are_answered_in_a_sentence(given, words):
    with pytest.raises(SettingsError, match=words):
        resolve(**given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: " + "[" * 20_000, "nested too deep"),
        ("lr: " + "7" * 5000, "a number of 5000"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
            "aliases",
        ),
        ("# " + "x" * 2_000_000, "more than"),
        ("lr: [1, 2", "in line"),
    ],
)
def test_a_hostile_recipe_is_refused_in_a_sentence(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match="mine.yaml is not valid YAML") as caught:
        resolve(str(file))
    assert words in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


LONG = "x" * 10_000_000


@pytest.mark.parametrize(
    "given",
    [
        {"lr": LONG}, {"amp": LONG}, {"run": "/" * 10**7}, {"use_contour_detection": LONG},
        {"roi_size": "[" + LONG}, {"roi_size": [LONG]}, {"inject": LONG},
        {LONG: 1}, {"recipe": LONG}, {"recipe": LONG + ".yaml"}, {"recipe": "\0.yaml"},
        {"recipe": "~" + "x" * 50 + "/a.yaml"}, {"lr": 10**5000}, {"epochs": 10**5000},
        {"epochs": "7" * 5000}, {f"no_{i}": i for i in range(10_000)}, {"roi_size": "[" * 50_000},
        {"max_images": [10**5000]},
    ],
    ids=range(18),
)  # fmt: skip
def test_a_long_value_is_cut_in_the_sentence(given):
    with pytest.raises(SettingsError) as caught:
        resolve(**given)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"recipe: caf\xe9\n")
    with pytest.raises(SettingsError, match="mine.yaml is not valid YAML"):
        resolve(str(file))
