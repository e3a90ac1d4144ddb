"""Tables as Markdown: rows in, a table that Jupyter and the book both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from IPython.display import Markdown

from .errors import InputError
from .records import Row


def table(
    rows: Sequence[Row], columns: Mapping[str, str], formats: Mapping[str, str] | None = None
) -> Markdown:
    """Rows of a record as a table.

    ``columns`` maps a row's key to its heading, in order; ``formats`` maps a key to a format
    specification such as ``".4f"``. Text is aligned left, numbers right; None shows as a dash.
    Raises ``InputError`` if a row lacks a column.
    """
    formats = formats or {}
    if not rows:
        raise InputError("a table of no rows: run the lab whose record should hold them")
    for row in rows:
        if missing := [key for key in columns if key not in row]:
            raise InputError(f"a row lacks the column {missing[0]!r}; it has {', '.join(row)}")
    marks = ["---" if isinstance(rows[0][key], str) else "---:" for key in columns]
    lines = [_line(columns.values()), _line(marks)]
    lines += [_line(_cell(row[key], formats.get(key, "")) for key in columns) for row in rows]
    return Markdown("\n".join(lines))


def select(rows: Sequence[Row], **wanted) -> list[Row]:
    """The rows whose values equal the wanted ones; a tuple allows any of its members.

    Raises ``InputError`` if none is left, since an empty selection is a misspelt one.
    """
    found = [row for row in rows if all(_allowed(row[key], value) for key, value in wanted.items())]
    if not found:
        raise InputError(f"no row has {wanted}")
    return found


def _allowed(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _cell(value: object, format_spec: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, "" if isinstance(value, str) else format_spec)


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
