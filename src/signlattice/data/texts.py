"""Read texts to calibrate and to evaluate on: of pinned packages, of the hub, or a user's file.

The two sides never share a document. A text from the hub is streamed no further than is asked for,
and what was read is kept, so that a second run reads the same, network or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

from signlattice import hub
from signlattice.data import corpus, prose, wiki
from signlattice.data.corpus import Document, Split
from signlattice.errors import InputError, IntegrityError, checked
from signlattice.io import display_path, write_text

PIECE = 8000
"""Bytes of a document that is cut from a user's file, at least, but for the last."""

HELD_OUT = 0.2
"""Share of a user's text, its end, that is evaluated on."""

LEAST_BYTES = 40_000
"""Least size of a user's text: 128 keys per dimension of a head of 64, at four bytes a token, and a
fifth that is held out."""


@dataclass(frozen=True)
class Text:
    """Documents to calibrate and to evaluate on, of one source; ``source`` names its revision."""

    name: str
    source: str
    calibration: tuple[Document, ...]
    evaluation: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all documents in order, which a record names as its text."""
        return corpus.fingerprint((*self.calibration, *self.evaluation))


@dataclass(frozen=True)
class HubText:
    """A text on the hub: which of its splits is calibrated on, and which evaluated.

    ``heading`` matches the row that begins a document, where a row is a line; None where a row is a
    document.
    """

    repository: str
    config: str
    calibration: str
    evaluation: str
    heading: str | None = None


HUB_TEXTS = {
    "wikitext": HubText(
        "Salesforce/wikitext", "wikitext-103-raw-v1", "train", "test", r" = [^=].* = \n?"
    ),
    "c4": HubText("allenai/c4", "en", "train", "validation"),
}

PACKAGED_TEXTS: dict[str, Callable[[Split], Iterable[Document]]] = {
    "corpus": lambda side: corpus.documents(side),
    "prose": lambda side: (each for each in prose.read_prose() if each.split == side),
    "wiki": lambda side: (each for each in wiki.read_wiki() if each.split == side),
}
"""Texts out of pinned packages, checked by their hashes: source code, docstrings, articles."""


@checked
def read_text(
    name: str | Path,
    *,
    calibration_bytes: int = 32_000_000,
    evaluation_bytes: int = 2_000_000,
    revision: str | None = None,
    cache: Path | None = None,
) -> Text:
    """Read a text by its name, or from a user's own file or folder of ``.txt`` files.

    Of a user's file the last fifth is held out, in one piece, so that passages that repeat each
    other from nearby are on one side but at that single border.

    Args:
        name: "corpus", "prose", "wiki", "wikitext", "c4", or a path.
        calibration_bytes, evaluation_bytes: how much of each side to read, in UTF-8 bytes; the
            document in which it is reached is read to its end.
        revision: of a text on the hub; None is the newest.
        cache: folder for what was read from the hub; the hub's own by default.

    Raises:
        InputError: an unknown name; a file that is empty, not UTF-8 text, or too short; a hub that
            cannot be reached, where the text has not been read before.
        IntegrityError: a package, or a text kept in the cache, that is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from signlattice import read_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "own.txt")
        ...     _ = file.write_text("A paragraph of my own.\\n\\n" * 4000)
        ...     text = read_text(file)
        >>> len(text.calibration), len(text.evaluation)
        (10, 2)
    """
    for label, value in (("calibration", calibration_bytes), ("evaluation", evaluation_bytes)):
        if value < 1:
            raise InputError(f"{label}_bytes={value}: use 1 or more")
    limits: dict[Split, int] = {"calibration": calibration_bytes, "evaluation": evaluation_bytes}
    if name in HUB_TEXTS:
        return _kept(str(name), limits, revision, cache or Path(constants.HF_HOME) / "signlattice")
    sides: Mapping[Split, Iterable[Document]]
    if name in PACKAGED_TEXTS:
        sides = {side: PACKAGED_TEXTS[str(name)](side) for side in limits}
    else:
        sides = _own(Path(name))
    return _text(str(name), str(name), {side: _up_to(sides[side], n) for side, n in limits.items()})


def _text(name: str, source: str, sides: Mapping[Split, tuple[Document, ...]]) -> Text:
    return Text(name, source, sides["calibration"], sides["evaluation"])


def _up_to(documents: Iterable[Document], n_bytes: int) -> tuple[Document, ...]:
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += document.n_bytes
        if total >= n_bytes:
            break
    return tuple(taken)


# From the hub.


def _kept(name: str, limits: dict[Split, int], revision: str | None, cache: Path) -> Text:
    """Return what was read before of this length and revision, or the hub's text, to be kept."""
    text = HUB_TEXTS[name]
    length = "-".join(map(str, limits.values()))
    try:
        commit = hub.resolve(text.repository, revision, "dataset").revision
        file = cache / f"{name}-{commit}-{length}.json"
    except hub.Unreachable:
        earlier = sorted(cache.glob(f"{name}-{revision or '*'}-{length}.json"))
        if not earlier:
            raise
        return _read_kept(max(earlier, key=lambda file: file.stat().st_mtime))
    if file.is_file():
        return _read_kept(file)
    sides: dict[Split, tuple[Document, ...]] = {
        side: _up_to(_documents(text, side, commit), n) for side, n in limits.items()
    }
    for side, documents in sides.items():
        if not documents:
            raise IntegrityError(f"no text in {text.repository}, split {getattr(text, side)}")
    read = _text(name, f"{text.repository}@{commit}", sides)
    write_text(file, json.dumps(asdict(read) | {"fingerprint": read.fingerprint}))
    return read


def _read_kept(file: Path) -> Text:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        sides = {
            side: tuple(Document(**document) for document in plain.pop(side))
            for side in ("calibration", "evaluation")
        }
        expected = plain.pop("fingerprint")
        text = Text(calibration=sides["calibration"], evaluation=sides["evaluation"], **plain)
    except (ValueError, KeyError, TypeError):
        text = expected = None
    if text is None or text.fingerprint != expected:
        raise IntegrityError(
            f"{display_path(file)} is damaged: delete it, and it will be read again"
        )
    return text


def _documents(text: HubText, side: Split, commit: str) -> Iterator[Document]:
    split = getattr(text, side)
    with hub.refusals(text.repository, commit):
        for place, content in enumerate(_articles(_rows(text, split, commit), text.heading)):
            yield Document(text.repository, f"{text.config}/{split}/{place}", content, side)


def _rows(text: HubText, split: str, commit: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # slow to import, and needed here alone
    except ImportError:
        raise InputError(
            f"{text.repository} is read with the package datasets, which is not installed: "
            'pip install "signlattice[texts]"'
        ) from None
    rows = load_dataset(text.repository, text.config, split=split, streaming=True, revision=commit)
    return (row["text"] for row in rows)


def _articles(rows: Iterable[str], heading: str | None) -> Iterator[str]:
    """Join rows to documents, blank ones left out."""
    gathered: list[str] = []
    for row in rows:
        if (heading is None or re.fullmatch(heading, row)) and gathered:
            yield "".join(gathered)
            gathered = []
        if row.strip() or gathered:
            gathered.append(row)
    if gathered:
        yield "".join(gathered)


# The user's own.


def _own(path: Path) -> dict[Split, list[Document]]:
    try:
        files = _text_files(path)
    except OSError as error:
        raise InputError(f"cannot read {display_path(path)}: {error.strerror}") from None
    pieces = [(file, n, piece) for file in files for n, piece in enumerate(_pieces(_decoded(file)))]
    total = sum(len(piece.encode()) for *_, piece in pieces)
    if not any(piece.strip() for *_, piece in pieces):
        raise InputError(
            f"{display_path(path)} is empty: give at least {LEAST_BYTES} bytes of text"
        )
    if total < LEAST_BYTES:
        raise InputError(
            f"{display_path(path)} holds {total} bytes of text, about {total // 4} tokens: "
            f"give at least {LEAST_BYTES}, about {LEAST_BYTES // 4} tokens; "
            "128 tokens per coordinate of a head are enough"
        )
    return _divided(pieces, total)


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        next(path.iterdir(), None)  # a folder that cannot be entered says so
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise InputError(f"no .txt file in {display_path(path)}: give UTF-8 text files")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(
            f"unknown text {str(path)!r}: choose one of {', '.join(PACKAGED_TEXTS)}, "
            f"{', '.join(HUB_TEXTS)}, or give a file or a folder of .txt files"
        )
    return files


def _divided(pieces: list[tuple[Path, int, str]], total: int) -> dict[Split, list[Document]]:
    sides: dict[Split, list[Document]] = {"calibration": [], "evaluation": []}
    n_bytes = 0
    for place, (file, number, piece) in enumerate(pieces):
        held_out = place > 0 and (n_bytes >= (1 - HELD_OUT) * total or place == len(pieces) - 1)
        side: Split = "evaluation" if held_out else "calibration"
        sides[side].append(Document("own", f"{file.name}/{number}", piece, side))
        n_bytes += len(piece.encode())
    return sides


def _decoded(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{display_path(file)} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {display_path(file)}: {error.strerror}") from None
    if "\0" in text:
        raise InputError(f"{display_path(file)} is binary, it holds zero bytes: give UTF-8 text")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cut at blank lines into pieces of `PIECE` bytes or a little more.

    A stretch of twice that without a blank line is cut at its line ends, and a line of that length
    within.
    """
    gathered, size = [], 0
    for part in _parts(text):
        gathered.append(part)
        size += len(part.encode())
        if size >= PIECE:
            yield "".join(gathered)
            gathered, size = [], 0
    if "".join(gathered).strip():
        yield "".join(gathered)


def _parts(text: str) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n\n)(?=[^\n])", text):
        if len(paragraph) <= 2 * PIECE:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[i : i + PIECE] for i in range(0, len(line), PIECE))
