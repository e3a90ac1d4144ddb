"""The paper's four models side by side: what it cites, what our minis have, and the full size.

A full-size column says "not run" until somebody with the weights has run the lab; its record is
then read like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from IPython.display import Markdown

from signlattice.errors import InputError
from signlattice.models.minis import PAPER_MODELS
from signlattice_paper import records
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select, table

LAB = "architectures"

PAIRS = {model.name: model.mini for model in PAPER_MODELS}
"""The paper's models, and the minis of the same architectures."""

NOT_RUN = "not run"


@dataclass(frozen=True)
class Pair:
    """A model of the paper, the record of its mini, and its own if there is one."""

    name: str
    mini: RunRecord
    full: RunRecord | None


def pairs(results: Path = records.RESULTS) -> tuple[Pair, ...]:
    """List the four in the paper's order. Raises ``InputError`` if a mini's record is missing."""
    return tuple(
        Pair(name, records.read(LAB, mini, results), _full(name, results))
        for name, mini in PAIRS.items()
    )


def minis(results: Path = records.RESULTS) -> dict[str, RunRecord]:
    """Return the records of the four minis, by the mini's name."""
    return {pair.mini.model: pair.mini for pair in pairs(results)}


def others(results: Path = records.RESULTS) -> tuple[RunRecord, ...]:
    """Return records of the lab on models that are neither minis nor the paper's."""
    known = {*PAIRS, *PAIRS.values()}
    found = records.every(results)
    return tuple(one for one in found if one.lab == LAB and one.model not in known)


def beside(
    quantities: Mapping[str, tuple[str, str, Mapping[str, object]]],
    cited: Mapping[str, Mapping[str, str]] | None = None,
    digits: int = 3,
    results: Path = records.RESULTS,
) -> Markdown:
    """Return a table of quantities: a row per model and quantity, cited | mini | full size.

    Args:
        quantities: for each label (table, column, what selects its row).
        cited: per label and model what the paper says; "not stated" where it says nothing.
        digits: decimals of the measured values.

    Raises:
        InputError: if a mini's record is missing or has no such row.
    """
    four, rows = pairs(results), []
    for label, (name, column, where) in quantities.items():
        for pair in four:
            told = (cited or {}).get(label, {})
            rows.append(
                {
                    "quantity": label,
                    "model": pair.name,
                    "cited": told.get(pair.name, "not stated"),
                    "mini": value(pair.mini, name, column, where, digits),
                    "full": NOT_RUN
                    if pair.full is None
                    else value(pair.full, name, column, where, digits),
                }
            )
    heads = {
        "quantity": "quantity",
        "model": "model",
        "cited": "paper, cited",
        "mini": "our mini",
        "full": "full size",
    }
    if len(quantities) == 1:
        del heads["quantity"]
    sources = [pair.mini for pair in four] + [pair.full for pair in four if pair.full]
    return table(rows, heads, record=sources)


def value(
    record: RunRecord, name: str, column: str, where: Mapping[str, object], digits: int = 3
) -> str:
    """One number of a record's table as text; a dash where it is none.

    Raises ``InputError`` if no row or several rows are selected.
    """
    rows = select(record.table(name), **where)
    if len(rows) != 1:
        raise InputError(
            f"{len(rows)} rows of {name!r} of {record.model} have {dict(where)}: name one"
        )
    found = rows[0][column]
    if found is None:
        return "–"
    return f"{found:z.{digits}f}" if isinstance(found, float) else str(found)


def _full(name: str, results: Path) -> RunRecord | None:
    if not records.records_path(LAB, name, results).is_file():
        return None
    return records.read(LAB, name, results)
