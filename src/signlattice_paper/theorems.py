"""Theorems: which claims each bears on, where it is discussed, and which test checks it.

Read from ``theorems.yml``. Statements and proofs are on the book's page *theorems*, which shows the
boxes and the tables made here; verdicts are those of ``claims.yml`` and are written nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from IPython.display import Markdown

from signlattice.errors import InputError, IntegrityError
from signlattice.io import PROJECT, display_path
from signlattice_paper.claims import CHAPTERS, Claim, read_entries

THEOREMS = PROJECT / "theorems.yml"
TESTS = "tests/equations"
ORIGINS = ("paper", "ours")
PROVED = "proved"
"""The verdict on a theorem of our own: its proof is on the page."""


@dataclass(frozen=True)
class Theorem:
    """One theorem, and what it is tied to.

    ``name`` is the paper's for its formal proof, None for ours. ``part`` is the page's part that it
    stands in; ``says`` and ``use`` are a sentence each. ``claims`` are claims it bears on;
    ``chapters`` are first words of chapters (``s3``); ``tests`` are files in tests/equations.
    """

    id: str
    origin: str
    name: str | None
    part: str
    title: str
    says: str
    use: str
    claims: tuple[Claim, ...]
    chapters: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Return the first claim's verdict if the theorem is the paper's; ours are proved."""
        return self.claims[0].verdict if self.origin == "paper" else PROVED

    @property
    def target(self) -> str:
        """Name of the theorem's section on the page."""
        return f"theorems-{self.id}"


def load_theorems(claims: Mapping[str, Claim], path: Path = THEOREMS) -> dict[str, Theorem]:
    """All theorems by id, in the order of the file.

    Raises ``InputError`` if the file is missing, and ``IntegrityError``, naming the theorem, if one
    has an unknown or a missing field, an id twice, an unknown claim, chapter or origin, a test that
    does not exist, or is the paper's and has no name or no claim.
    """
    path = Path(path)
    entries = read_entries(path, "theorems")
    theorems: dict[str, Theorem] = {}
    for place, entry in enumerate(entries, start=1):
        try:
            theorem = _theorem(entry, claims, path.parent)
            if theorem.id in theorems:
                raise InputError("its id is taken by an earlier theorem")
        except InputError as error:
            name = entry.get("id") if isinstance(entry, dict) else None
            raise IntegrityError(
                f"{display_path(path)}, theorem {name or place}: {error}"
            ) from None
        theorems[theorem.id] = theorem
    return theorems


def theorem_box(theorem: Theorem) -> Markdown:
    """Verdict, tests, claims and chapters of one theorem, to close its section with."""
    name = f"`{theorem.name}`: " if theorem.name else ""
    parts = [
        f"**{name}{theorem.verdict}.**",
        f"Checked by {_joined(_test(test) for test in theorem.tests)}.",
        f"Bears on {_joined(_claim(claim, 'claim ') for claim in theorem.claims)}.",
        f"Discussed in {_joined(_chapter(chapter) for chapter in theorem.chapters)}.",
    ]
    return Markdown("> " + " ".join(parts))


def theorem_tables(theorems: Iterable[Theorem]) -> Markdown:
    """Tabulate what each theorem says, what it is for and its tests: a table for each part."""
    lines: list[str] = []
    for part, members in itertools.groupby(theorems, key=lambda theorem: theorem.part):
        lines += ["", f"**{part}**", "", "| theorem | says | use | tests |", "|---" * 4 + "|"]
        for theorem in members:
            name = f"{theorem.name.replace('_', '_<wbr>')}: " if theorem.name else ""
            cells = (
                f"[{theorem.title}](#{theorem.target})<br><small>{name}{theorem.verdict}</small>",
                theorem.says,
                theorem.use,
                ", ".join(_test(test) for test in theorem.tests),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines[1:]))


def _joined(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


# Paths begin at the project's root, so that they hold in the book and in a Jupyter started there.


def _test(file: str) -> str:
    return f"[{Path(file).stem.removeprefix('test_').replace('_', ' ')}](/{TESTS}/{file})"


def _claim(claim: Claim, word: str = "") -> str:
    return f"[{word}{claim.number}](/book/verdicts.ipynb#ledger-{claim.number})"


def _chapter(chapter: str) -> str:
    found = sorted((PROJECT / "book").glob(f"{chapter}_*.ipynb"))
    return f"[{chapter.upper()}](/book/{found[0].name})" if found else chapter.upper()


def _theorem(entry: Any, claims: Mapping[str, Claim], root: Path) -> Theorem:
    if not isinstance(entry, dict):
        raise InputError("an entry must be a dictionary")
    names = {field.name for field in fields(Theorem)}
    if set(entry) != names:
        raise InputError(f"its fields must be {', '.join(sorted(names))}")
    if entry["origin"] not in ORIGINS:
        raise InputError(f"unknown origin {entry['origin']!r}; choose {' or '.join(ORIGINS)}")
    if (entry["name"] is not None) != (entry["origin"] == "paper"):
        raise InputError("a theorem has a name if it is the paper's, and only then")
    for name in ("claims", "chapters", "tests"):
        if not isinstance(entry[name], list) or not entry[name]:
            raise InputError(f"{name} is {entry[name]!r}: list at least one")
    for name, known in (("claims", claims), ("chapters", CHAPTERS)):
        if unknown := [each for each in entry[name] if each not in known]:
            raise InputError(f"unknown in {name}: {unknown[0]!r}")
    if absent := [test for test in entry["tests"] if not (root / TESTS / test).is_file()]:
        raise InputError(f"its test {TESTS}/{absent[0]} does not exist")
    given: dict[str, Any] = dict(entry)
    given["claims"] = tuple(claims[each] for each in entry["claims"])
    for name in ("chapters", "tests"):
        given[name] = tuple(entry[name])
    return Theorem(**given)
