"""Claims: what the paper says, and what came of it. Read from ``claims.yml``, shown in chapters.

The paper's numbers enter the book here and nowhere else; what was measured enters from records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from IPython.display import Markdown

from signlattice.errors import InputError, IntegrityError
from signlattice.io import PROJECT, display_path, require_checkout
from signlattice_paper.records import Metric, RunRecord
from signlattice_paper.tables import anchor, prose, provenance

CLAIMS = PROJECT / "claims.yml"
RECORD = re.compile(r"results/[\w.-]+/[\w.-]+\.json")

VERDICTS = (
    "holds",
    "holds with correction",
    "false",
    "two quantities",  # one name for two things
    "contradicts itself",  # another statement of the paper says otherwise
    "definition",  # nothing to refute; kept to be compared with
    "unstated",  # what the claim needs to be meaningful is not said
    "misleading",
    "not reproduced",  # tried here, with another outcome
    "not checkable",  # the data it rests on could not be had
    "open",  # not yet tried here
)
ARGUED = ("definition", "unstated", "misleading", "not checkable")
"""Verdicts that rest on the paper's own words, so that a claim can be settled by argument."""

STATUSES = ("settled", "open")
SECTIONS = ("title", "abstract", "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9")
CHAPTERS = ("intro", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    ``statement`` and ``finding`` are in our words, ``quote`` is the paper's where the wording
    matters. ``paper_value`` is its number or numbers, a tuple or a dictionary by name.
    ``check`` is a test, ``tests/….py`` or ``tests/….py::name``; ``record`` is a file in
    ``results/``; ``chapter`` is the chapter's first word (``s3``). A claim is ``settled`` when the
    check or the record that supports its verdict is there; until then it is ``open``.
    """

    id: str
    number: int
    section: str
    statement: str
    quote: str | None
    paper_value: float | tuple[float, ...] | Mapping[str, Any] | None
    verdict: str
    finding: str
    check: str | None
    record: str | None
    chapter: str
    status: str

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every number the paper states in this claim: those of its value and of its quote."""
        quoted = re.findall(r"\d*\.?\d+", self.quote or "")
        return tuple(_numbers(self.paper_value)) + tuple(float(number) for number in quoted)


def load_claims(path: Path = CLAIMS) -> dict[str, Claim]:
    """All claims by id, in the order of the file.

    Raises ``InputError`` if the file is missing, and ``IntegrityError``, naming the claim, if one
    has an unknown or a missing field, a number or id twice, an unknown section, verdict, status or
    chapter, a check that is not in the tests, or is settled without support.
    """
    path = Path(path)
    entries = read_entries(path, "claims")
    claims: dict[str, Claim] = {}
    for place, entry in enumerate(entries, start=1):
        try:
            claim = _claim(entry)
            _validate(claim, path.parent)
            if claim.id in claims:
                raise InputError("its id is taken by an earlier claim")
            if any(claim.number == other.number for other in claims.values()):
                raise InputError(f"its number {claim.number} is taken by an earlier claim")
        except InputError as error:
            name = entry.get("id") if isinstance(entry, dict) else None
            raise IntegrityError(f"{display_path(path)}, claim {name or place}: {error}") from None
        claims[claim.id] = claim
    return claims


def read_entries(path: Path, name: str) -> list[Any]:
    """Return the entries of a YAML file that lists ``name``, none of them checked yet.

    Raises ``InputError`` if it cannot be read, ``IntegrityError`` if it is not YAML or no list.
    """
    try:
        entries = yaml.safe_load(require_checkout(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the {name} {display_path(path)} ({error.strerror})"
        ) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise IntegrityError(f"{display_path(path)} is not YAML: look at line {line}") from None
    if not isinstance(entries, list) or not entries:
        raise IntegrityError(f"{display_path(path)} must be a list of {name}")
    return entries


GROUPS = {
    "holds": ("holds", "holds with correction", "definition"),
    "does not hold": ("false", "contradicts itself", "two quantities", "misleading"),
    "was tried here, with another outcome": ("not reproduced",),
    "cannot be told": ("unstated", "not checkable", "open"),
}
"""Verdicts by what they mean for whoever wants to rely on a claim; each is in one group."""


def grouped(claims: Iterable[Claim], group: str) -> list[Claim]:
    """Claims of one group of verdicts, in the group's order and then by number.

    Raises ``InputError`` if there is no such group.
    """
    if group not in GROUPS:
        raise InputError(f"unknown group {group!r}; choose one of {', '.join(GROUPS)}")
    order = GROUPS[group]
    found = [claim for claim in claims if claim.verdict in order]
    return sorted(found, key=lambda claim: (order.index(claim.verdict), claim.number))


def ledger(claims: Sequence[Claim], ours: Mapping[str, str] | None = None) -> Markdown:
    """Claims as a list that a narrow screen can show, each with its verdict and its sources.

    ``ours`` holds, by the id of a claim, what is measured or computed here in place of the paper's
    value.
    """
    ours = ours or {}
    return Markdown("\n\n".join(_entry(claim, ours.get(claim.id)) for claim in claims))


def value_table(claims: Sequence[Claim], ours: Mapping[str, str]) -> Markdown:
    """Return the paper's value beside ours, for the claims that have both."""
    lines = ["| # | claim | paper | here |", "|---:|---|---|---|"]
    for claim in claims:
        if claim.id in ours:
            lines.append(
                f"| {_number(claim)} | {claim.statement} | {_paper_value(claim.paper_value)} "
                f"| {ours[claim.id]} |"
            )
    return Markdown("\n".join(lines))


def claim_box(claim: Claim) -> Markdown:
    """Return what the paper says, to open a section of a chapter with."""
    lines = [f"**Claim {claim.number}** (paper, {claim.section}). {claim.statement}"]
    if claim.quote:
        lines.append(f"In the paper's words: “{claim.quote}”")
    return Markdown(_quoted(lines))


def verdict_box(claim: Claim) -> Markdown:
    """Return the verdict with its test and record, to close the section with."""
    place = f'<span id="verdict-{claim.number}"></span>'
    lines = [f"{place}**Verdict on claim {claim.number}: {claim.verdict}.** {claim.finding}"]
    if sources := _sources(claim):
        lines.append(f"Checked by {' and '.join(sources)}.")
    if claim.status == "open":
        lines.append("This verdict is provisional: its check is still to come.")
    return Markdown(_quoted(lines))


def comparison(
    rows: Sequence[tuple[str, float | str | None, Metric | float | str | None]],
    digits: int = 4,
    record: RunRecord | Sequence[RunRecord] | None = None,
) -> Markdown:
    """Return the table *paper | measured here*: rows of quantity, paper's value, our value.

    A `Metric` is shown with its interval or standard deviation; None is shown as a dash.
    ``record`` is where our values come from, None if the page itself computes them.
    """
    lines = ["| quantity | paper | measured here |", "|---|---:|---:|"]
    for quantity, paper, ours in rows:
        lines.append(f"| {quantity} | {_shown(paper, digits)} | {_shown(ours, digits)} |")
    return Markdown("\n".join([*lines, *provenance(record)]))


def verdict_table(claims: Sequence[Claim]) -> Markdown:
    """Claims in one table: number, section, statement, verdict."""
    lines = ["| # | section | claim | verdict |", "|---:|---|---|---|"]
    for claim in claims:
        lines.append(
            f"| {_number(claim)} | {claim.section} | {claim.statement} "
            f"| {claim.verdict}{_mark(claim)} |"
        )
    return Markdown("\n".join(lines))


def _entry(claim: Claim, ours: str | None) -> str:
    """One claim of the ledger, as an item of a list."""
    place = f'<span id="ledger-{claim.number}"></span>'
    lines = [f"- {place}**Claim {claim.number}.** {claim.statement}"]
    values = [
        f"{who}: {value}"
        for who, value in (("Paper", _paper_value(claim.paper_value)), ("ours", ours))
        if value
    ]
    if values:
        lines.append(f"{'; '.join(values)}.")
    lines.append(f"*{claim.verdict.capitalize()}*{_mark(claim)}: {claim.finding}")
    links = [f"paper, {claim.section}", *_chapter_link(claim), *_sources(claim, "test", "record")]
    lines.append(f"<small>{' · '.join(links)}</small>")
    return "\n\n  ".join(lines)


def _number(claim: Claim) -> str:
    """Return a claim's number, linked to its entry in the ledger."""
    return f"[{claim.number}](/book/verdicts.ipynb#ledger-{claim.number})"


def _mark(claim: Claim) -> str:
    return "" if claim.status == "settled" else " (provisional)"


def _chapter_link(claim: Claim) -> list[str]:
    """Link to the verdict in the chapter that discusses a claim, once that chapter is there."""
    found = sorted((PROJECT / "book").glob(f"{claim.chapter}_*.ipynb"))
    name = claim.chapter.upper()
    return [f"[chapter {name}](/book/{path.name}#verdict-{claim.number})" for path in found[:1]]


def _sources(claim: Claim, test: str | None = None, record: str | None = None) -> list[str]:
    """Links to the test and to how the record was made; by their paths, or in the words given."""
    links = []
    if claim.check:
        links.append(f"[{test or f'`{claim.check}`'}](/{claim.check.partition('::')[0]})")
    if claim.record:
        _, lab, file = claim.record.split("/")
        place = anchor(lab, file.removesuffix(".json"))
        links.append(f"[{record or f'`{claim.record}`'}](#{place})")
    return links


def _paper_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {_paper_value(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ("–" if len(value) == 2 else ", ").join(_paper_value(child) for child in value)
    return prose(str(value))


def _shown(value: Metric | float | str | None, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if not isinstance(value, Metric):
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    text = f"{value.value:.{digits}f}"
    if value.low is not None:
        return f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return text if value.std is None else f"{text} ± {value.std:.{digits}f}"


def _quoted(lines: Sequence[str]) -> str:
    return "\n>\n".join(f"> {line}" for line in lines)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for child in value.values() for number in _numbers(child)]
    if isinstance(value, (list, tuple)):
        return [number for child in value for number in _numbers(child)]
    return [float(value)] if isinstance(value, (int, float)) else []


def _claim(entry: Any) -> Claim:
    """One entry of the file as a `Claim`; raises ``InputError`` on fields that are not its own."""
    if not isinstance(entry, dict):
        raise InputError("an entry must be a dictionary")
    names = {field.name for field in fields(Claim)}
    if surplus := sorted(set(entry) - names):
        raise InputError(f"unknown field {surplus[0]!r}; the fields are {', '.join(sorted(names))}")
    if missing := sorted(names - set(entry)):
        raise InputError(f"no field {missing[0]!r}")
    for name in ("id", "section", "statement", "verdict", "finding", "chapter", "status"):
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise InputError(f"{name} is {entry[name]!r}: use text")
    known: dict[str, Any] = {k: prose(v) if isinstance(v, str) else v for k, v in entry.items()}
    if isinstance(known["paper_value"], list):
        known["paper_value"] = tuple(known["paper_value"])
    return Claim(**known)


def _validate(claim: Claim, root: Path) -> None:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim.id):
        raise InputError("an id is words of a-z and 0-9 joined by '-'")
    for name, known in (
        ("section", SECTIONS),
        ("verdict", VERDICTS),
        ("chapter", CHAPTERS),
        ("status", STATUSES),
    ):
        if (value := getattr(claim, name)) not in known:
            raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if claim.check is not None:
        _validate_check(claim.check, root)
    elif claim.record is None and claim.status == "settled" and claim.verdict not in ARGUED:
        raise InputError("it is settled without a check or a record: name one, or leave it open")
    if claim.record is not None and not RECORD.fullmatch(claim.record):
        raise InputError(f"record {claim.record!r}: use results/<lab>/<model>.json")


def _validate_check(check: str, root: Path) -> None:
    file, _, test = check.partition("::")
    if not file.startswith("tests/") or not file.endswith(".py"):
        raise InputError(f"check {check!r}: use tests/….py or tests/….py::name")
    try:
        source = (root / file).read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"its check {file} does not exist") from None
    if test and not re.search(rf"^\s*def {re.escape(test)}\(", source, re.MULTILINE):
        raise InputError(f"its check {file} has no test {test!r}")
