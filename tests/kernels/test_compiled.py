"""What is compiled for the processor, kept for the next process."""

from __future__ import annotations

from pathlib import Path

import numba
import pytest

from signlattice.kernels import compiled as kept
from signlattice.kernels.compiled import compiled, entry


def times(factor: int):
    """An entry that calls a compiled function, which its closure holds."""

    @compiled
    def inner(x):
        return factor * x

    @entry(factor)
    def outer(x):
        return inner(x) + 1

    return outer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_entry_is_compiled_once_for_each_of_what_it_is_made_of(folder: Path) -> None:
    for factor in (2, 3):
        first, again = times(factor), times(factor)
        assert first(5) == again(5) == factor * 5 + 1
        assert sum(first.stats.cache_misses.values()) == 1
        assert sum(again.stats.cache_hits.values()) == 1


def test_entry_is_compiled_anew_where_a_source_has_changed(folder, monkeypatch) -> None:
    times(2)(5)
    monkeypatch.setattr(kept, "_sources", lambda: "another")
    changed = times(2)
    changed(5)
    assert sum(changed.stats.cache_misses.values()) == 1


def test_entry_works_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(kept, "_EntryCache", refuse)
    assert times(2)(5) == 11
