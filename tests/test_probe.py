"""The probe: its kinds yield inputs, and what is wrong is counted and told."""

from __future__ import annotations

import itertools

import pytest

import probe
from command_lines import told
from edges import wrong
from signlattice.errors import InputError


@pytest.mark.parametrize("kind", probe.KINDS)
def test_probe_finds_nothing_wrong_with_the_first_inputs_of_a_kind(kind, tmp_path):
    first = list(itertools.islice(kind(tmp_path), 6))
    assert len({name for name, _ in first}) == 6
    assert [fault for _, fault in first if fault is not None] == []


def test_main_counts_what_is_wrong_and_returns_1(monkeypatch, capsys):
    def numbers(work):
        yield "1", None
        yield "2", "it is even"

    monkeypatch.setattr(probe, "KINDS", (numbers,))
    monkeypatch.setattr("sys.argv", ["probe"])
    assert probe.main() == 1
    out = capsys.readouterr().out
    assert "numbers: 2: it is even\n" in out and out.split()[-3:] == ["numbers", "2", "1"]


def raises(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("attempt", "fault"),
    [
        (lambda: 1, None),
        (lambda: raises(InputError("x=1: use 2")), None),
        (lambda: raises(InputError("two\nlines")), "no line of text"),
        (lambda: raises(InputError("")), "no line of text"),
        (lambda: raises(KeyError("x")), "KeyError"),
    ],
)
def test_wrong_is_what_neither_works_nor_is_told_in_a_line(attempt, fault):
    found = wrong(attempt)
    assert found is None if fault is None else found.startswith(fault)


@pytest.mark.parametrize("line", [("inspect", "\x1b[31m"), ("inspect", "é\0"), ("estimate", "\t")])
def test_main_writes_out_what_a_terminal_would_obey(line):
    assert told(line) is None
