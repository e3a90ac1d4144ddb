from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signlattice.data import corpus
from signlattice.errors import InputError, IntegrityError


def test_read_corpus_gives_the_pinned_one():
    """Reads every file and compares every hash: this install trains on our text."""
    assert sum(d.n_bytes for d in corpus.read_corpus()) > 20e6


def test_documents_have_no_text_on_two_sides():
    sides = {split: {d.text for d in corpus.documents(split)} for split in corpus.SPLITS}
    train, calibration, evaluation = (sides[split] for split in corpus.SPLITS)
    assert not train & calibration and not train & evaluation and not calibration & evaluation
    assert all(sides.values())


def test_documents_of_the_splits_cover_the_whole_corpus():
    total = sum(len(corpus.documents(split)) for split in corpus.SPLITS)
    assert total == len(corpus.read_corpus())


def test_read_package_names_another_version_with_the_remedy():
    package = dataclasses.replace(corpus.PACKAGES[-1], version="0.0.1")
    with pytest.raises(
        IntegrityError, match=r"'Jinja2' is .* read from 0.0.1; .*signlattice\[corpus\]"
    ):
        corpus.read_package(package)


def test_read_package_refuses_changed_source():
    package = dataclasses.replace(corpus.PACKAGES[-1], sha256="0" * 64)
    with pytest.raises(IntegrityError, match="expected 000000000000….*force-reinstall"):
        corpus.read_package(package)


def test_read_package_names_what_is_not_installed():
    package = dataclasses.replace(corpus.PACKAGES[-1], name="no-such-package")
    with pytest.raises(IntegrityError, match="'no-such-package' is not installed"):
        corpus.read_package(package)


def test_documents_refuse_unknown_names():
    with pytest.raises(InputError, match="'test': choose one of train, calibration, evaluation"):
        corpus.documents("test")
    with pytest.raises(InputError, match="'numpy': choose one of sympy"):
        corpus.documents("train", "numpy")


@given(st.text(max_size=200))
def test_train_tokenizer_makes_one_that_gives_any_text_back(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_train_tokenizer_gives_the_same_each_time(texts):
    first, second = (corpus.train_tokenizer(texts, 290).to_str() for _ in range(2))
    assert first == second


def test_train_tokenizer_refuses_a_vocabulary_too_small_for_bytes():
    with pytest.raises(InputError, match="vocab_size 200"):
        corpus.train_tokenizer([], 200)


@given(st.integers(2, 50), st.integers(2, 20))
def test_windows_keep_order_and_leave_at_most_one_token_out(n_tokens, length):
    ids = torch.arange(n_tokens)
    cut = torch.cat(corpus.windows(ids, length))
    assert torch.equal(cut, ids[: len(cut)]) and n_tokens - len(cut) <= 1


def test_windows_that_predict_nothing_are_refused():
    with pytest.raises(InputError, match="context of 1 tokens"):
        corpus.windows(torch.arange(4), 1)


@cache
def _tokenizer():
    return corpus.train_tokenizer(["def f(x):\n    return x\n"], 270)
