"""Every public name has an example in its docstring, and the example runs; the book shows both."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import signlattice

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in signlattice.__all__ if name != "__version__"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", NAMES)
def test_signlattice_public_name_has_an_example_that_runs(name: str) -> None:
    docstring = getattr(signlattice, name).__doc__
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, 0)
    assert example.examples, f"{name} has no example in its docstring"
    output: list[str] = []
    failures, _ = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=output.append)
    assert not failures, "".join(output)


def test_api_reference_shows_each_public_name_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "book" / "api").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"auto\w+:: signlattice\.(\w+)", page)]
    assert sorted(shown) == sorted(NAMES)
