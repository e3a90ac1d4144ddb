from __future__ import annotations

import pytest

from signlattice.errors import InputError
from signlattice.tables import select, table

ROWS = [
    {"name": "a", "value": 0.12345, "fitted": True},
    {"name": "b", "value": None, "fitted": False},
]


def test_a_table_shows_each_row_in_its_format():
    shown = table(ROWS, {"name": "code", "value": "β", "fitted": "τ"}, {"value": ".3f"}).data
    assert shown.splitlines() == [
        "| code | β | τ |",
        "| --- | ---: | ---: |",
        "| a | 0.123 | yes |",
        "| b | – | no |",
    ]


def test_select_takes_one_value_or_any_of_several():
    assert select(ROWS, name="b") == [ROWS[1]]
    assert select(ROWS, name=("a", "b"), fitted=True) == [ROWS[0]]


def test_an_empty_selection_and_a_missing_column_are_told():
    with pytest.raises(InputError, match="no row has {'name': 'c'}"):
        select(ROWS, name="c")
    with pytest.raises(InputError, match="lacks the column 'gap'; it has name, value, fitted"):
        table(ROWS, {"gap": "gap"})
    with pytest.raises(InputError, match="no rows"):
        table([], {"name": "code"})
