"""Caches of a model at several lengths, and pass keys looked up through them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from signlattice.calibration import CalibrationConfig
from signlattice.data.texts import Text, read_text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig, cached_losses
from signlattice.models.loading import load_model
from signlattice.models.passages import full_windows
from signlattice.rotations.config import LearnConfig
from signlattice_paper.experiments import lengths
from signlattice_paper.experiments.lengths import Length, LengthsConfig, LengthsLab
from signlattice_paper.experiments.passkeys import found, haystack

CONFIG = LengthsConfig(
    text="corpus",
    lengths=(Length(256, 2, n_haystacks=1, n_caches=4, timed=True), Length(128, 1, n_caches=1)),
    windows=(0, 16),
    window=16,
    every=3,
    step=100,
    n_keys=3,
    n_tokens=4,
    learn_context=128,
    calibrate=CalibrationConfig(keys_per_dim=4, rotation=LearnConfig(solver="itq", steps=2)),
)


@pytest.fixture(scope="module")
def loaded():
    return replace(load_model("olmoe-mini"), context=256)


@pytest.fixture(scope="module")
def text() -> Text:
    """A few documents: all of the corpus would be tokenized again for each window."""
    corpus = read_text("corpus")
    return replace(corpus, calibration=corpus.calibration[:8], evaluation=corpus.evaluation[:4])


@pytest.fixture(scope="module")
def lab(loaded, text, tmp_path_factory) -> LengthsLab:
    return LengthsLab(loaded, text, CONFIG, tmp_path_factory.mktemp("lengths"))


def test_cached_losses_judge_each_third_token_up_to_the_last(loaded, text):
    pieces = full_windows(loaded, text.evaluation, 2)
    every, third = (
        cached_losses(loaded, pieces, None, QualityConfig(batch_size=2), every=n).whole
        for n in (1, 3)
    )
    logits = loaded.model(torch.stack([piece.ids for piece in pieces])).logits.log_softmax(-1)
    nll = [
        -logits[i, :-1].gather(-1, piece.ids[1:, None])[:, 0].detach()
        for i, piece in enumerate(pieces)
    ]
    assert third.n_tokens.tolist() == [85, 85]
    assert every.nll == pytest.approx([row.sum().item() for row in nll], rel=1e-5)
    assert third.nll == pytest.approx([row.flip(0)[::3].sum().item() for row in nll], rel=1e-5)


def test_judge_reads_exact_attention_in_calls_alike(loaded, text):
    documents = text.evaluation
    once, parts = (
        Judge(loaded, documents, documents, QualityConfig(2, 1, step=step), every=3)
        for step in (None, 100)
    )
    assert parts.exact.whole.nll == pytest.approx(once.exact.whole.nll, rel=1e-5)


def test_lengths_lab_judges_and_weighs_at_the_length(lab):
    named = {(case.table, case.name): case for case in lab.cases() if case.length.tokens == 256}
    cases = [
        named["exact", "exact"],
        named["caches", "int4"],
        named["passkeys", "int4"],
        named["times", "exact"],
    ]
    exact, caches, passkeys, times = (lab.measure(case) for case in cases)
    (row,) = caches["caches"]
    tables = lab.summarise({"caches": [{"codec": "lattice"}]})
    assert tables["codecs"] == [{"codec": "lattice", "n_keys": 256, "longer": 1}]
    (plain,) = exact["exact"]
    assert (row["tokens"], plain["tokens"], plain["n_judged"]) == (256, 256, 2 * 85)
    assert 4 < row["bits"] < row["effective_bits"] < 16
    assert row["kl"] > 0
    (row,) = passkeys["passkeys"]
    assert 0 <= row["right"] <= row["asked"] <= row["questions"] == 3
    (row,) = times["times"]
    assert 0 < row["token_low"] <= row["token"] <= row["token_high"]
    assert row["bytes"] == 4 * 2 * 4 * 4 * 64 * (256 + CONFIG.n_tokens - 1)  # of the last: no key


def test_lengths_lab_lists_the_caches_that_each_length_asks_for(lab):
    listed = [(case.table, case.length.tokens) for case in lab.cases()]
    assert (listed.count(("caches", 256)), listed.count(("caches", 128))) == (5, 1)
    assert (listed.count(("times", 256)), listed.count(("times", 128))) == (3, 0)
    assert ("passkeys", 128) not in listed
    every = replace(CONFIG, lengths=(Length(256, 2),))
    cases = LengthsLab(lab.loaded, lab.text, every, lab.scratch.folder).cases()
    n_cases = sum(case.table == "caches" for case in cases)
    assert n_cases == len(lengths.caches(every)) + 1  # and the code of long windows


def test_haystack_holds_every_number_once_from_the_first_token_to_the_last(loaded, text):
    (piece,) = full_windows(loaded, text.evaluation, 1)
    hidden = haystack(loaded, piece, 3, seed=0)
    written = loaded.tokenizer.decode(hidden.ids.tolist())
    numbers = [loaded.tokenizer.decode(q.answer.tolist()).strip() for q in hidden.questions]
    assert [written.count(number) for number in numbers] == [1, 1, 1]
    assert [q.depth for q in hidden.questions] == [0, 0.5, 1]
    assert hidden.ids[0] == piece.ids[0]
    assert written.endswith(f"{numbers[-1]}.")
    assert len(hidden.ids) <= len(piece.ids) - 24


def test_haystack_refuses_what_it_has_no_room_for(loaded, text):
    (piece,) = full_windows(replace(loaded, context=64), text.evaluation, 1)
    for n_keys in (1, 11, 10):
        with pytest.raises(InputError):
            haystack(loaded, piece, n_keys, seed=0)


def test_found_asks_each_question_after_the_text_alone(loaded, text):
    """The order of the questions changes nothing: each goes on from a copy of the cache."""
    (piece,) = full_windows(loaded, text.evaluation, 1)
    hidden = haystack(loaded, piece, 3, seed=0)
    states = loaded.model(
        torch.cat((hidden.ids, hidden.questions[1].question, hidden.questions[1].answer))[None]
    ).logits
    answer = hidden.questions[1].answer
    right = bool((states[0, -len(answer) - 1 : -1].argmax(-1) == answer).all())
    told = replace(hidden, questions=hidden.questions[::-1])
    caches = [DynamicCache(config=loaded.model.config) for _ in range(2)]
    answers = found(loaded, hidden, caches[0], step=100)
    assert answers == found(loaded, told, caches[1])[::-1]
    assert answers[1] == right
