from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signlattice import hub
from signlattice.data import texts
from signlattice.data.texts import HUB_TEXTS, LEAST_BYTES, PIECE, HubText, read_text
from signlattice.errors import InputError, IntegrityError
from signlattice.hub import Repository, Unreachable

SHA = "f" * 40


def prose(n_bytes: int, seed: int = 0) -> str:
    """Paragraphs of words, no two alike."""
    rng, found = random.Random(seed), []
    while sum(map(len, found)) < n_bytes:
        words = (str(rng.randrange(10**6)) for _ in range(rng.randrange(5, 120)))
        found.append(" ".join(words) + "\n\n")
    return "".join(found)


def join_banks(documents) -> str:
    return "".join(document.text for document in documents)


# A file or folder of the user's own.


@pytest.mark.parametrize("seed", range(3))
def test_read_text_cuts_a_file_without_loss_and_holds_out_its_last_fifth(tmp_path, seed):
    whole = prose(400_000, seed)
    (tmp_path / "own.txt").write_text(whole)
    text = read_text(tmp_path / "own.txt")
    assert join_banks(text.calibration) + join_banks(text.evaluation) == whole
    assert len(join_banks(text.evaluation)) / len(whole) == pytest.approx(0.2, abs=0.03)
    pieces = [*text.calibration, *text.evaluation]
    assert all(piece.text.endswith("\n\n") for piece in pieces)
    assert all(PIECE <= piece.n_bytes < 3 * PIECE for piece in pieces[:-1])


@pytest.mark.parametrize("stretch", ["word " * 30_000, "a line\n" * 20_000, "é" * 70_000])
def test_read_text_cuts_a_text_without_blank_lines_all_the_same(tmp_path, stretch):
    (tmp_path / "own.txt").write_text(stretch)
    text = read_text(tmp_path / "own.txt")
    assert join_banks(text.calibration) + join_banks(text.evaluation) == stretch
    assert max(document.n_bytes for document in text.calibration) < 4 * PIECE
    assert text.evaluation


@given(st.text(alphabet="ab \n", max_size=400))
def test_pieces_lose_nothing_but_blanks_at_the_end(whole):
    found = "".join(texts._pieces(whole))
    assert whole.startswith(found) and not whole[len(found) :].strip()


def test_read_text_pieces_of_a_folder_are_of_one_file_each(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(name * 30_000)
    (tmp_path / "other.md").write_text("c" * 30_000)
    text = read_text(tmp_path)
    assert join_banks(text.calibration) + join_banks(text.evaluation) == "a" * 30_000 + "b" * 30_000
    assert all(len(set(d.text)) == 1 for d in (*text.calibration, *text.evaluation))


def test_text_fingerprint_follows_the_text(tmp_path):
    file = tmp_path / "own.txt"
    found = []
    for seed in (0, 0, 1):
        file.write_text(prose(LEAST_BYTES, seed))
        found.append(read_text(file).fingerprint)
    assert found[0] == found[1] != found[2]


def test_read_text_ends_in_the_document_that_reaches_the_limit(tmp_path):
    (tmp_path / "own.txt").write_text(prose(400_000))
    text = read_text(tmp_path / "own.txt", calibration_bytes=50_000, evaluation_bytes=1)
    assert 50_000 <= len(join_banks(text.calibration)) < 50_000 + 3 * PIECE
    assert len(text.evaluation) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty: give at least 40000 bytes"),
        (b" \n\n \n", "is empty"),
        (b"short\n", "holds 6 bytes of text, about 1 tokens: give at least 40000, about 10000"),
        (b"caf\xe9 " * 10_000, r"is not UTF-8 text \(byte 3\)"),
        (b"\0\1" * 30_000, "is binary"),
    ],
)
def test_read_text_tells_a_file_that_is_no_text(tmp_path, content, told):
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_text(tmp_path / "own.txt")


def test_read_text_tells_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="'news': choose one of corpus, prose, wiki, wikitext"):
        read_text("news")
    with pytest.raises(InputError, match="no .txt file in"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="evaluation_bytes=0"):
        read_text("corpus", evaluation_bytes=0)


def test_read_text_of_the_corpus_keeps_its_sides(small_corpus):
    small_corpus()
    text = read_text("corpus")
    assert {d.split for d in text.calibration} == {"calibration"}
    assert {d.split for d in text.evaluation} == {"evaluation"}


# From the hub: folders in the hub's own layout stand in for it.

ARTICLES = [f" = Title {i} = \n" for i in range(6)]
WIKI = {
    "train": [
        "",
        ARTICLES[0],
        "",
        " = = Section = = \n",
        " first text \n",
        ARTICLES[1],
        " second text \n",
        ARTICLES[2],
        " third \n",
    ],
    "test": ["", ARTICLES[3], " fourth \n"],
}


def put_card(folder: Path, config: str, files: dict[str, str]) -> None:
    listed = [{"split": split, "path": path} for split, path in files.items()]
    card = {"configs": [{"config_name": config, "data_files": listed}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


@pytest.fixture
def wikitext(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "wikitext"
    (folder / "raw").mkdir(parents=True)
    for split, rows in WIKI.items():
        pandas.DataFrame({"text": rows}).to_parquet(folder / "raw" / f"{split}-0.parquet")
    put_card(folder, "raw", {split: f"raw/{split}-*" for split in WIKI})
    heading = HUB_TEXTS["wikitext"].heading
    fake = HubText(str(folder), "raw", "train", "test", heading)
    monkeypatch.setitem(texts.HUB_TEXTS, "wikitext", fake)
    return folder


@pytest.fixture
def c4(tmp_path, monkeypatch) -> list[str]:
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    rows = [f"Page {i}\nof the web." for i in range(1000)]
    for split, part in (("train", rows), ("validation", ["held out"])):
        lines = (json.dumps({"text": row, "url": "u"}) + "\n" for row in part)
        with gzip.open(folder / "en" / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(lines)
    put_card(folder, "en", {s: f"en/c4-{s}.*.json.gz" for s in ("train", "validation")})
    monkeypatch.setitem(texts.HUB_TEXTS, "c4", HubText(str(folder), "en", "train", "validation"))
    return rows


@pytest.fixture
def commits(monkeypatch, tmp_path):
    """The hub names one commit; or, once ``offline`` is called, does not answer."""
    monkeypatch.setattr(hub, "resolve", lambda name, revision, kind: Repository(name, SHA, {}))

    def offline() -> None:
        def unreachable(*arguments):
            raise Unreachable("out of reach")

        monkeypatch.setattr(hub, "resolve", unreachable)

    return offline


def test_read_text_makes_articles_of_lines_of_wikitext(wikitext, commits, tmp_path):
    text = read_text("wikitext", cache=tmp_path / "kept")
    assert text.source == f"{wikitext}@{SHA}"
    assert [d.text for d in text.calibration] == [
        ARTICLES[0] + " = = Section = = \n first text \n",
        ARTICLES[1] + " second text \n",
        ARTICLES[2] + " third \n",
    ]
    assert [d.text for d in text.evaluation] == [ARTICLES[3] + " fourth \n"]


def test_read_text_of_the_hub_without_datasets_names_the_extra(
    wikitext, commits, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "signlattice\[texts\]"'):
        read_text("wikitext", cache=tmp_path / "kept")


def test_read_text_reads_c4_no_further_than_asked(c4, commits, tmp_path):
    text = read_text("c4", calibration_bytes=200, cache=tmp_path / "kept")
    n = len(text.calibration)
    assert [d.text for d in text.calibration] == c4[:n]
    assert len("".join(c4[: n - 1])) < 200 <= len("".join(c4[:n]))
    assert [d.text for d in text.evaluation] == ["held out"]


def test_read_text_reads_again_without_a_network_what_was_read(c4, commits, tmp_path):
    options = {"calibration_bytes": 500, "cache": tmp_path / "kept"}
    first = read_text("c4", **options)
    commits()
    assert read_text("c4", **options) == first
    assert read_text("c4", revision=SHA, **options) == first
    for other in ({"calibration_bytes": 501}, {"revision": "v2"}):
        with pytest.raises(Unreachable):
            read_text("c4", **options | other)


@pytest.mark.parametrize("damage", [lambda t: t[:-9], lambda t: t.replace("Page 1", "Page 2")])
def test_read_text_tells_a_kept_text_that_was_damaged(c4, commits, tmp_path, damage):
    options = {"calibration_bytes": 500, "cache": tmp_path / "kept"}
    read_text("c4", **options)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(damage(file.read_text()))
    with pytest.raises(IntegrityError, match="is damaged: delete it"):
        read_text("c4", **options)


def test_read_text_refuses_blanks_pipes_and_paths_that_no_system_has(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\t" * LEAST_BYTES)
    os.mkfifo(tmp_path / "pipe")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    for name, told in (
        ("blank.txt", "is empty"),
        ("pipe", "unknown text"),
        ("folder", "no .txt file in"),
        ("n" * 5000, "cannot read .*[Ff]ile name too long"),
    ):
        with pytest.raises(InputError, match=told):
            read_text(tmp_path / name)
