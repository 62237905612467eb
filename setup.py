"""What pyproject.toml cannot say: once installed, ``params/`` and ``notebooks/`` lie in the package."""

from setuptools import find_packages, setup

INSIDE = {"params": "*.yaml", "notebooks": "*.ipynb"}

setup(
    packages=[*find_packages(include=["refinelib*", "studies"]), *(f"refinelib.{name}" for name in INSIDE)],
    package_dir={f"refinelib.{name}": name for name in INSIDE},
    package_data={"refinelib": ["py.typed"]} | {f"refinelib.{name}": [kind] for name, kind in INSIDE.items()},
)
