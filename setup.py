"""What pyproject.toml cannot say: the minis and the records are installed with the package."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithData(build_py):
    """Copy ``models/`` and ``results/`` to ``signlattice/home/``, where `signlattice.io` looks."""

    def run(self) -> None:
        """Build the packages, then add the data."""
        super().run()
        if self.editable_mode:
            return  # an editable installation reads those of the checkout
        for name in ("models", "results"):
            copytree(
                ROOT / name, Path(self.build_lib, "signlattice/home", name), dirs_exist_ok=True
            )


setup(cmdclass={"build_py": BuildWithData})
