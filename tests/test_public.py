"""The package's docstring is a map of what can be imported: complete, and true."""

import importlib
import pydoc
import re

import refinelib


def named():
    """Every name in the map: of the package itself, and of its modules."""
    module = None
    for line in refinelib.__doc__.splitlines():
        if head := re.match(r"- ``refinelib\.(\w+)``", line):
            module = head[1]
        for name in re.findall(r"``([\w.]+)(?:\([^`]*\))?``", line):
            yield ("" if name.startswith("refinelib") else module or ""), name.removeprefix("refinelib.")


def test_every_name_in_the_map_can_be_imported():
    names = [*named()]
    assert len(names) > 30
    for module, name in names:
        if name in ("refinelib", "refinelib.data"):
            continue
        *path, last = f"{module}.{name}".strip(".").split(".")
        owner = importlib.import_module(".".join(["refinelib", *path]))
        assert hasattr(owner, last) or importlib.import_module(f"{owner.__name__}.{last}"), (module, name)


def test_the_map_has_every_public_name():
    mapped = {name.split("(")[0] for _, name in named()}
    assert set(refinelib.__all__) - mapped == set()
    assert refinelib.__all__ == sorted(set(refinelib.__all__))
    for name in refinelib.__all__:
        assert getattr(refinelib, name) is not None


def test_help_names_model_losses_guard_and_data():
    text = pydoc.plain(pydoc.render_doc(refinelib))
    for name in ("HierarchicalUNet", "MaskLoss", "Guard", "Rewinder", "ArrayPeople", "build_model", "train"):
        assert name in text
