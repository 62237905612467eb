"""Sphinx: the reference is made from the docstrings, the notebooks are those of gallery/; see `make docs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import refinelib  # noqa: E402  # of this checkout

project, author, copyright = "refinelib", "The refinelib authors", "2026, the refinelib authors"
version = release = refinelib.__version__
root_doc = "docs/index"
# Pages lie where they are read on the web as well, so that one link serves both.
include_patterns = ["docs/**.md", "docs/api/**", "bench/*.md", "gallery/*", "examples/**.md", "C*.md"]
exclude_patterns = ["**.py"]

extensions = ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
apidoc_modules = [
    {
        "path": "../refinelib",
        "destination": "docs/api",
        "exclude_patterns": ["**/__main__.py"],
        "separate_modules": True,
        "module_first": True,
        "include_private": False,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
# What a package exports is described where it is defined; matplotlib gives each figure class a `set`.
autodoc_default_options = {"ignore-module-all": True, "exclude-members": "set"}
napoleon_use_ivar = True
autodoc_typehints = "description"
myst_heading_anchors = 3
nb_execution_mode = "off"
html_theme = "furo"
html_title = f"refinelib {release}"


def show_as_written(app, what, name, obj, options, lines) -> None:
    """An indented block in a module's docstring is a drawing or code."""
    for at in reversed(range(2, len(lines) if what == "module" else 0)):
        before = lines[at - 2]
        if lines[at].startswith("    ") and not (
            lines[at - 1] or before.startswith("    ") or before.endswith("::")
        ):
            lines[at:at] = ["::", ""]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", show_as_written, priority=400)
