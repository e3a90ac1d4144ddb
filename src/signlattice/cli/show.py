"""How results look: aligned tables for people, plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | int | float | None


def facts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines of a name and a fact each, names in a column of their own."""
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {fact}".rstrip() for name, fact in pairs]


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return lines of a table.

    ``columns`` maps a row's key to its heading and its format, in order.

    Text is aligned left, numbers right; what a row lacks, or has as None, shows as a dash.
    """
    cells = [[heading for heading, _ in columns.values()]]
    left = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    cells += [[_cell(row.get(key), fmt) for key, (_, fmt) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            f"{cell:<{width}}" if to_left else f"{cell:>{width}}"
            for cell, width, to_left in zip(line, widths, left)
        ).rstrip()
        for line in cells
    ]


def span(values: Sequence[float], fmt: str = ".3f") -> str:
    """Format the least and the greatest of some numbers."""
    low, high = format(min(values), fmt), format(max(values), fmt)
    return low if low == high else f"{low}–{high}"


def size(n_bytes: float) -> str:
    """Format bytes in the largest unit that leaves a number above one."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.3g} {unit}" if unit != "bytes" else f"{n_bytes:.0f} bytes"
        n_bytes /= 1000
    raise AssertionError


def visible(text: str, keep: str = "") -> str:
    """Escape what a terminal would act on, or not show: control characters and their like."""
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def plain(value: Any) -> Any:
    """Convert a value for JSON: arrays to lists, and numbers that are not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cell(value: Cell, fmt: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, fmt)
