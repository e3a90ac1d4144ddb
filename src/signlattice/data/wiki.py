"""Read the text "wiki": articles of the English Wikipedia, out of a dump in a pinned package.

The package gensim carries the first articles of a dump of 2016 among its test data. The dump is
taken out of the wheel, as data, and kept in the cache folder. Wikipedia's text is under CC BY-SA:
it is fetched, and not redistributed here.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from signlattice.data.corpus import Document, Split
from signlattice.data.kept import kept_documents
from signlattice.data.wheels import Wheel, blocks, fetch_wheel, file_hash, made_by_one
from signlattice.errors import IntegrityError
from signlattice.io import cache_folder, display_path

WHEEL = Wheel(
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    27_809_988,
    # the wheel of one platform, wherever it is read: its compiled part is not
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp"),
)
MEMBER = "/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
TEXT_SHA256 = "07506832fc22348a1ee69c7efab8658a52fa41e9f9a7b7fe5367b9c1166c7a8e"
"""Of the documents in order (`corpus.fingerprint`): what the markup is stripped to."""

LEAST_ARTICLE = 2000
"""Characters. What is shorter is a list of other articles, mostly."""

HELD_OUT = 20
"""Per cent of the articles, by the hash of their title, that are evaluated on."""


def dump_file() -> Path:
    """Name the file that keeps the dump."""
    return cache_folder() / "texts" / MEMBER.lstrip("/")


def fetch_dump() -> Path:
    """Fetch the dump, once.

    Raises ``InputError`` and ``IntegrityError`` as `wheels.fetch_wheel`, and ``IntegrityError`` if
    the dump in the cache is another file.
    """
    file = dump_file()
    with made_by_one(file):
        if not file.is_file():
            wheel = fetch_wheel(WHEEL, file.parent)
            building = file.with_name(f".{file.name}.part")
            building.write_bytes(b"".join(blocks(wheel, MEMBER)))
            building.replace(file)
            wheel.unlink()
    if file_hash(file) != DUMP_SHA256:
        raise IntegrityError(
            f"{display_path(file)} is damaged: delete it, and it will be fetched again"
        )
    return file


@cache
def read_wiki() -> tuple[Document, ...]:
    """Read the articles in the order of the dump, their markup stripped; fetch it if need be.

    Raises as `fetch_dump`, and ``IntegrityError`` if the text is not what it was.
    """
    return kept_documents(
        "wiki",
        TEXT_SHA256,
        lambda: _articles(fetch_dump()),
        "this version of Python or of signlattice strips its markup in another way",
    )


def _articles(file: Path) -> Iterator[Document]:
    root = ET.fromstring(bz2.decompress(file.read_bytes()))
    space = root.tag[: root.tag.index("}") + 1]
    for page in root.iter(f"{space}page"):
        title, markup = page.findtext(f"{space}title"), page.findtext(f".//{space}text")
        if page.findtext(f"{space}ns") != "0" or page.find(f"{space}redirect") is not None:
            continue
        if title and markup and len(text := plain(markup)) >= LEAST_ARTICLE:
            yield Document("wiki", title, f"{title}\n\n{text}\n", side_of(title))


def side_of(title: str) -> Split:
    """Return an article's side of the split, by the SHA-256 of its title."""
    bucket = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % 100
    return "evaluation" if bucket < HELD_OUT else "calibration"


# MediaWiki's markup. What is nested goes from the inside out.

_DROPPED = [
    re.compile(r"<!--.*?-->", re.S),
    re.compile(
        r"<(ref|gallery|math|timeline|score|imagemap|syntaxhighlight|source|hiero)\b[^<>]*/>"
    ),
    re.compile(
        r"<(ref|gallery|math|timeline|score|imagemap|syntaxhighlight|source|hiero)\b[^<>]*>"
        r".*?</\1\s*>",
        re.S | re.I,
    ),
]
_TEMPLATE = re.compile(r"\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*\}\}")
_TABLE = re.compile(r"\{\|(?:[^{|]|\{(?!\|)|\|(?!\}))*\|\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NOT_TEXT = re.compile(r"\s*:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.I)
_URL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-z][^<>]*>", re.I)
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.M)
_APPENDIX = re.compile(
    r"^==\s*(?:See also|References|Notes|Footnotes|External links|Further reading|Bibliography|"
    r"Sources|Citations|Notes and references)\s*==\s*$",
    re.M | re.I,
)
_LIST = re.compile(r"^[*#:;]+\s*", re.M)


def plain(markup: str) -> str:
    """Strip MediaWiki's markup of an article to its paragraphs, headings and lists.

    Templates, tables, references, formulas, pictures and what follows the article go; of a link
    stays what it shows.
    """
    if end := _APPENDIX.search(markup):
        markup = markup[: end.start()]
    for pattern in _DROPPED:
        markup = pattern.sub("", markup)
    for pattern in (_TEMPLATE, _TABLE):
        markup = _repeated(pattern, "", markup)
    markup = _repeated(_LINK, _shown, markup)
    markup = _URL.sub(r"\1", markup)
    markup = re.sub(r"'{2,}", "", _TAG.sub("", markup))
    markup = re.sub(r"__[A-Z]+__", "", _HEADING.sub(r"\1\n", markup))
    markup = html.unescape(_LIST.sub("", markup)).replace("\N{NO-BREAK SPACE}", " ")
    markup = re.sub(r"\(\s*[,;]*\s*\)", "", markup)  # what held a template alone
    markup = re.sub(r"[ \t]+", " ", markup)
    lines = (line.strip() for line in markup.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _repeated(pattern: re.Pattern, by, text: str) -> str:
    while (after := pattern.sub(by, text)) != text:
        text = after
    return text


def _shown(link: re.Match) -> str:
    target, *labels = link[1].split("|")
    if _NOT_TEXT.match(target):
        return ""
    return labels[-1] if labels else target
