"""What `pip install .` gives: both packages, the command line, the minis and the records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from signlattice import io
from signlattice.data.corpus import PACKAGES
from signlattice.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what an installation puts into site-packages."""
    # built from a copy: setuptools leaves a folder behind that a later build would take files from
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("src", "models", "results"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source)]
    subprocess.run(command, check=True, cwd=source)
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the installed packages, in a folder that knows nothing of the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_installation_loads_a_mini_and_a_record_from_any_folder(installed: Path) -> None:
    code = """
import signlattice, signlattice_paper
from signlattice import load_model
from signlattice.io import PROJECT
from signlattice_paper import records
print(signlattice.__file__)
print(PROJECT)
print(load_model("olmoe-mini").head_dim)
print(len(records.every()))
"""
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    module, project, head_dim, n_records = done.stdout.split()
    assert Path(module).is_relative_to(installed) and Path(project).is_relative_to(installed)
    assert int(head_dim) == 64
    assert int(n_records) == len(list((ROOT / "results").glob("*/*.json")))


@pytest.mark.slow
def test_installation_runs_the_command_line(installed: Path) -> None:
    codec = installed / "signlattice" / "home" / "models" / "olmoe-mini" / "lattice.safetensors"
    assert run(installed, "-m", "signlattice", "--version").stdout.startswith("signlattice ")
    done = run(installed, "-m", "signlattice", "inspect", str(codec), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"]


@pytest.mark.slow
def test_installation_is_typed_and_declares_its_commands(installed: Path) -> None:
    assert (installed / "signlattice" / "py.typed").is_file()
    assert (installed / "signlattice_paper" / "py.typed").is_file()
    (folder,) = installed.glob("*.dist-info")
    commands = {point.name: point for point in PathDistribution(folder).entry_points}
    assert commands["signlattice"].group == "console_scripts"


@pytest.mark.slow
def test_installation_says_that_claims_need_a_checkout(installed: Path) -> None:
    code = "from signlattice_paper.claims import load_claims; print(len(load_claims()))"
    done = run(installed, "-c", code)
    assert "claims.yml is not in" in done.stderr and "set SIGNLATTICE_HOME" in done.stderr
    done = run(installed, "-c", code, SIGNLATTICE_HOME=str(ROOT))
    assert done.returncode == 0 and int(done.stdout) > 30


def test_project_folder_is_the_checkout_or_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(io.HOME_VARIABLE, raising=False)
    assert io.project_folder() == ROOT
    monkeypatch.setenv(io.HOME_VARIABLE, str(tmp_path))
    assert io.project_folder() == tmp_path
    monkeypatch.setenv(io.HOME_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="SIGNLATTICE_HOME='.*none' is no folder"):
        io.project_folder()


def test_extra_corpus_pins_the_releases_that_were_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {f"{package.name}=={package.version}" for package in PACKAGES}
    assert set(project["optional-dependencies"]["corpus"]) == pins
