"""What pyproject.toml cannot say: a wheel holds ``params/`` and ``notebooks/`` in the package."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies them as the wheel is built.

    As packages with a folder of their own they would make an editable install an import hook, which comes
    after the working folder: a script beside the clone would import the clone's folder, not the package.
    """

    def run(self) -> None:
        """Build, then copy; an editable install needs no copies."""
        super().run()
        for folder in () if self.editable_mode else ("params", "notebooks"):
            inside = Path(self.build_lib) / "refinelib" / folder
            inside.mkdir(parents=True, exist_ok=True)
            for file in (*Path(folder).glob("*.yaml"), *Path(folder).glob("*.ipynb")):
                shutil.copy(file, inside)


setup(
    package_dir={"": "."},  # an editable install then is a line in a .pth file
    packages=find_packages(include=["refinelib*", "studies"]),
    package_data={"refinelib": ["py.typed"]},
    cmdclass={"build_py": BuildWithRecipes},
)
