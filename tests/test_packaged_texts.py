"""Texts out of packages: what is stripped from them, and that they are what they were."""

from __future__ import annotations

import bz2
from dataclasses import replace

import pytest

from signlattice.data import corpus, prose, wiki
from signlattice.data.corpus import Document, fingerprint
from signlattice.data.kept import kept_documents
from signlattice.errors import IntegrityError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNLATTICE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "markup, text",
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("a [[Link|shown]], a [[plain link]]s", "a shown, a plain links"),
        ("{{Infobox|a={{nested|b}}\n|c=d}}after", "after"),
        ("before\n{| class=x\n|-\n| {{t}} || {|\n| inner\n|}\n|}\nafter", "before\n\nafter"),
        ("said<ref name=a>{{cite|x}}</ref> and<ref name=a /> done", "said and done"),
        ("[[File:a.jpg|thumb|A [[cat]] sits]]text[[Category:Cats]][[de:Katze]]", "text"),
        ("== Head ==\nBody\n=== Sub ===\nMore", "Head\n\nBody\nSub\n\nMore"),
        ("* one\n** two\n# three", "one\ntwo\nthree"),
        ("see [http://a.b/c the site] and [http://a.b]", "see the site and"),
        ("a&nbsp;b &amp; c &lt;d&gt;<br />e <!-- no -->", "a b & c <d>e"),
        ("x <math>a<b</math> y", "x y"),
        ("Name ({{lang|el|x}}) is", "Name is"),
        ("Text\n== References ==\n{{reflist}}\n== After ==\nmore", "Text"),
    ],
)
def test_plain_keeps_what_a_reader_sees(markup, text):
    assert wiki.plain(markup) == text


def test_read_wiki_leaves_out_redirects_and_stubs(cache, monkeypatch):
    pages = [
        ("Long", "0", "", "word " * 1000),
        ("Stub", "0", "", "word"),
        ("Other", "0", '<redirect title="Long" />', "word " * 1000),
        ("Talk:Long", "1", "", "word " * 1000),
    ]
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    dump = '<mediawiki xmlns="http://x/">' + "".join(page.format(*p) for p in pages)
    file = cache / "dump.bz2"
    file.write_bytes(bz2.compress((dump + "</mediawiki>").encode()))
    (found,) = wiki._articles(file)
    assert (found.path, found.split) == ("Long", wiki.side_of("Long"))
    assert found.text.startswith("Long\n\nword word")


def test_fetch_dump_tells_of_a_damaged_one(cache):
    wiki.dump_file().parent.mkdir(parents=True)
    wiki.dump_file().write_bytes(b"cut short")
    with pytest.raises(IntegrityError, match="is damaged: delete it, and it will be fetched again"):
        wiki.fetch_dump()


def test_docstrings_are_without_code_and_examples():
    source = (
        'r"""Module \\d."""\nclass A:\n'
        '    """Of a class.\n\n    >>> A()\n    <A>\n\n    End.\n    """\n'
        '    def f(self):\n        """Do it."""\n        return "no docstring"\n'
    )
    assert prose.docstrings(source) == "Module \\d.\n\nOf a class.\n\nEnd.\n\nDo it.\n"
    assert prose.docstrings("not python (") == ""


def test_read_prose_tells_of_a_package_of_another_version(monkeypatch):
    package = replace(corpus.PACKAGES[-1], version="0.1")
    monkeypatch.setattr(prose, "PACKAGES", (package,))
    prose.read_prose.cache_clear()
    with pytest.raises(IntegrityError, match="'Jinja2' is .* was read from 0.1; install"):
        prose.read_prose()


def test_kept_documents_are_made_once_and_again_if_damaged(cache):
    documents = (Document("p", "a", "text", "evaluation"),)
    calls = []

    def read(sha256: str) -> tuple[Document, ...]:
        return kept_documents("t", sha256, lambda: calls.append(1) or documents, "do this")

    sha256 = fingerprint(documents)
    assert read(sha256) == read(sha256) == documents and len(calls) == 1
    (file,) = (cache / "texts").iterdir()
    file.write_text("[{}]")
    assert read(sha256) == documents and len(calls) == 2
    with pytest.raises(IntegrityError, match="the text t hashes to .* expected 000.*: do this"):
        read("0" * 64)
