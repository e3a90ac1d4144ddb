"""The pretrained model of the book, Gemma 3 270M: its records, and the tables that pages share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from signlattice.errors import InputError
from signlattice_paper import records
from signlattice_paper.records import Row, RunRecord
from signlattice_paper.tables import select

MODEL = "gemma-3-270m"

SHOWN = {
    "int4, no window": "4 bits, no window",
    "int4": "4 bits",
    "int2": "2 bits",
    "rotation, V int4": "rotation, V 4",
    "lattice, V int4": "ours, V 4",
    "long lattice, V int4": "ours, long windows, V 4",
    "lattice, V int2": "ours, V 2",
    "lattice, V int4, all layers": "ours, all layers, V 4",
}
"""Caches of the summary, in its order, and what it calls them."""


def fingerprint(results: Path = records.RESULTS) -> RunRecord:
    """Read the record of β. Raises ``InputError`` if it is missing."""
    return records.read("fingerprint", MODEL, results)


def lengths(results: Path = records.RESULTS) -> RunRecord:
    """Read the record of caches at several lengths. Raises ``InputError`` if it is missing."""
    return records.read("lengths", MODEL, results)


def peers(results: Path = records.RESULTS) -> RunRecord:
    """Read the record of others' codes. Raises ``InputError`` if it is missing."""
    return records.read("peers", MODEL, results)


def full_layers(record: RunRecord) -> list[int]:
    """List the layers that attend to all tokens."""
    return [row["index"] for row in record.table("layers") if row["window"] is None]


def mean_beta(
    record: RunRecord,
    rotation: str,
    centering: str,
    *,
    column: str = "beta",
    text: str = "wiki",
    layers: Sequence[int] | None = None,
) -> float:
    """Average a column of the table "beta" over ``layers``, those that see all tokens unless given.

    Raises ``InputError`` if there is no such row.
    """
    wanted = full_layers(record) if layers is None else layers
    rows = select(record.table("beta"), rotation=rotation, centering=centering, text=text)
    found = [row[column] for row in rows if row["layer"] in wanted]
    if not found:
        raise InputError(f"no β was measured in layers {list(wanted)}")
    return fmean(found)


def cache_row(record: RunRecord, name: str, tokens: int) -> Row:
    """Return what was measured of a cache at a length. Raises ``InputError`` if nothing was."""
    found = _by_name(record).get((name, tokens))
    if found is None:
        raise InputError(f"no cache {name!r} was judged at {tokens} tokens in {record.model}")
    return found


def summary(record: RunRecord) -> list[Row]:
    """Return a row for each cache that people would choose between: bits, loss and KL by length."""
    judged = _by_name(record)
    rows: list[Row] = []
    for name, words in SHOWN.items():
        row: Row = {"cache": words}
        for tokens in (each["tokens"] for each in record.table("exact")):
            found = judged.get((name, tokens), {})
            for column in ("effective_bits", "gap", "kl", "top1"):
                row[f"{column}_{tokens}"] = found.get(column)
        rows.append(row)
    return rows


def code_rows(lengths: RunRecord, peers: RunRecord) -> list[Row]:
    """Return a row for each published code and two of ours at the length of ``peers``, by KL."""
    columns = ("key_bits", "value_bits", "effective_bits", "gap", "kl")
    tokens = peers.config["context"]
    judged = {
        f"{row['name']}{', centred' if row['centred'] else ''}": row for row in peers.table("peers")
    }
    for bits in (4, 2):
        judged[f"ours, V {bits}"] = cache_row(lengths, f"lattice, V int{bits}", tokens)
    rows = [{"name": name} | {key: row[key] for key in columns} for name, row in judged.items()]
    return sorted(rows, key=lambda row: row["kl"])


def _by_name(record: RunRecord) -> dict[tuple[object, object], Row]:
    return {(row["name"], row["tokens"]): row for row in record.table("caches")}


def readme_table(record: RunRecord) -> str:
    """Write the summary as Markdown: for each length bits, per cent of perplexity lost, and KL."""
    lengths = [row["tokens"] for row in record.table("exact")]
    heads = [f"{n:,} tokens: bits | lost, % | KL" for n in lengths]
    lines = [f"| cache | {' | '.join(heads)} |", "|---|" + "---:|" * 3 * len(lengths)]
    for row in summary(record):
        cells = [str(row["cache"])]
        for n in lengths:
            for column, digits in (("effective_bits", 1), ("gap", 1), ("kl", 3)):
                value = row[f"{column}_{n}"]
                cells.append("–" if value is None else f"{value:z.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
