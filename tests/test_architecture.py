"""What linters do not see: names of modules, and the pins of requirements.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import signlattice

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKED = (ROOT / "requirements.txt").read_text(encoding="utf-8")
TORCH = (ROOT / "requirements-torch.txt").read_text(encoding="utf-8")
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", LOCKED + TORCH, re.MULTILINE)
}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "core"}


def test_module_names_say_what_they_hold() -> None:
    names = {path: set(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    assert [path for path, parts in names.items() if parts & EMPTY_NAMES] == []
    assert [path for path in SOURCES if re.search(r"_?v\d+$", path.stem)] == [], "the old is in git"


def test_signlattice_public_names_are_those_of_the_lazy_imports() -> None:
    assert set(signlattice.__all__) == {*signlattice._EXPORTS, "__version__"}
    for name in signlattice.__all__:
        assert getattr(signlattice, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'keys'"):
        _ = signlattice.keys


def test_requirements_are_pinned_and_without_an_address() -> None:
    assert [name for name, version in PINS.items() if not re.fullmatch(r"[\w.]+", version)] == []
    assert "://" not in LOCKED + TORCH and "--index" not in LOCKED + TORCH


def test_requirements_are_locked_by_hash_but_for_torch() -> None:
    entries = re.findall(r"^[\w.-]+==(?:.*\\\n)*.*$", LOCKED, re.MULTILINE)
    assert len(entries) == len(PINS) - 2
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert set(re.findall(r"^(\w+)==", TORCH, re.MULTILINE)) == {"torch", "triton"}


def test_requirements_pin_what_the_project_declares() -> None:
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    declared = {re.match(r"[\w-]+", each).group() for each in [*PROJECT["dependencies"], *extras]}
    names = {name.lower().replace("_", "-") for name in declared} - {"signlattice"}
    assert names - set(PINS) == set()


def test_requirements_pin_the_corpus_to_the_text_that_was_read() -> None:
    from signlattice.data.corpus import PACKAGES

    for package in PACKAGES:
        assert PINS.get(package.name.lower()) == package.version, package.name
