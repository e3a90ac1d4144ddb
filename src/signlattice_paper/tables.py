"""Tables as Markdown: rows in, a table that Jupyter and the book both show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from IPython.display import Markdown

from signlattice.errors import InputError
from signlattice.io import PROJECT, display_path
from signlattice_paper.records import Row, RunRecord, read, records_path


def table(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    formats: Mapping[str, str] | None = None,
    record: RunRecord | Sequence[RunRecord] | None = None,
) -> Markdown:
    """Rows of a record as a table, with a line below that says how they were made.

    ``columns`` maps a row's key to its heading, in order; ``formats`` maps a key to a format
    specification such as ``".4f"``. Text is aligned left, numbers right; None shows as a dash.
    ``record`` is where the numbers come from, None if the page itself computes them.
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
    return Markdown("\n".join([*lines, *provenance(record)]))


def recorded(
    lab: str,
    model: str,
    name: str,
    columns: Mapping[str, str],
    formats: Mapping[str, str] | None = None,
) -> Markdown:
    """Show a table of a lab's record; while that lab has not run, say so and how to run it.

    For what a page keeps a place for. Raises as `table` does, and as a record's ``table`` does if
    it has none of that name.
    """
    path = records_path(lab, model)
    if not path.exists():
        command = _command(lab, model)
        return Markdown(
            f"**Not run.** There is no record `{display_path(path)}` yet; `{command}` makes it, "
            "and the next run of this page shows its table here."
        )
    record = read(lab, model)
    return table(record.table(name), columns, formats, record)


def prose(text: str) -> str:
    """Write a string of a record or a claim as one line without HTML; Markdown in it stays.

    A space after ``<`` does what an entity would, in code and in mathematics, too.
    """
    return re.sub(r"<(?=[A-Za-z/!?])", "< ", re.sub(r"\s*\n\s*", " ", text))


def provenance(record: RunRecord | Sequence[RunRecord] | None) -> list[str]:
    """Lines of Markdown that say how numbers were made; none if no record made them.

    Each record is linked to its file, to its entry on the page *reproduce* (an anchor that only
    the built book knows) and to its lab. The paths begin at the project's root, so that they hold
    in a chapter and in a lab, in the book and in a Jupyter that was started there.
    """
    if record is None:
        return []
    records = [record] if isinstance(record, RunRecord) else list(record)
    sources = "; ".join(_source(each) for each in records)
    return ["", f"<small>How these numbers were made: {sources}.</small>"]


def origins(records: Sequence[RunRecord]) -> Markdown:
    """Say where records came from: for each an item with its run, its machine and its command.

    Each marks its place, which `provenance` links to.
    """
    return Markdown("\n".join(_origin(record) for record in records))


def anchor(lab: str, model: str) -> str:
    """Name of the place on the page *reproduce* that tells of a record."""
    return f"record-{_name(lab)}-{_name(model)}"


def _name(text: str) -> str:
    """Write the name of a lab or a model as a word of a path, whatever a record says."""
    return re.sub(r"[^\w.@/+-]", "-", text)


def stamp(record: RunRecord) -> str:
    """When a record's run began, to the minute."""
    return prose(f"{record.started[:16].replace('T', ' ')} UTC")


_COMMANDS = {
    "bench_kernels": "make bench",
    "bench_solvers": "make bench",
    "run_times": "make book TIMES=1",
}


def _command(lab: str, model: str) -> str:
    return _COMMANDS.get(lab, f"make lab LAB={_name(lab)} MODEL={_name(model)}")


def _origin(record: RunRecord) -> str:
    path, lab = _paths(record)
    name = _name(record.lab).replace("_", " ")
    page = f"[{name}](/{lab})" if (PROJECT / lab).exists() else name
    command = _command(record.lab, record.model)
    source = f"commit `{_name(record.commit[:10])}`" if record.commit else "no commit"
    if record.dirty:
        source += ", with changes to it"
    packages = ("python", "torch", "transformers")
    versions = ", ".join(
        f"{p} {_name(record.versions[p])}" for p in packages if p in record.versions
    )
    facts = (
        f"[`{path}`](/{path})",
        stamp(record),
        f"{record.seconds / 60:.1f} min",
        prose(record.device),
        source,
        versions,
        f"`{command}`",
    )
    place = f'<span id="{anchor(record.lab, record.model)}"></span>'
    return f"- {place}**{page}** on {_name(record.model)}: {' · '.join(facts)}"


def _paths(record: RunRecord) -> tuple[str, str]:
    """Return a record's file and the notebook of its lab, from the project's root."""
    lab, model = _name(record.lab), _name(record.model)
    return f"results/{lab}/{model}.json", f"book/lab/{lab}.ipynb"


def _source(record: RunRecord) -> str:
    path, lab = _paths(record)
    links = [f"record [{path}](/{path}) of {stamp(record)}"]
    links.append(f"[when and where](#{anchor(record.lab, record.model)})")
    if (PROJECT / lab).exists():
        links.append(f"[lab](/{lab})")
    return " · ".join(links)


def select(rows: Sequence[Row], **wanted) -> list[Row]:
    """Return the rows whose values equal the wanted ones; a tuple allows any of its members.

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
    return prose(value) if isinstance(value, str) else format(value, format_spec)


def _line(cells) -> str:
    escaped = (re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells)
    return "| " + " | ".join(escaped) + " |"
