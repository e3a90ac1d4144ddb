"""What judges caches: that it measures the cache, and would see what is wrong with one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import documents
from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.calibration import CalibrationConfig
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation import through_cache
from signlattice.evaluation.perplexity import perplexity, token_losses
from signlattice.evaluation.through_cache import (
    NEEDLE,
    Judge,
    QualityConfig,
    cached_losses,
    gap_percent,
    needles,
    retrieval,
)
from signlattice.models.loading import load_model
from signlattice.models.passages import describe_windows, full_windows, passages
from signlattice.quantizers.basis import LatticeConfig
from signlattice.rotations.config import LearnConfig
from signlattice_paper.experiments import caches
from signlattice_paper.experiments.caches import CacheLab, CacheLabConfig, cases

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 72
QUALITY = QualityConfig(n_passages=3, n_needles=2, batch_size=2)
WHOLE = CacheConfig(key_format="full", value_format="full", window=8, sinks=0)
COARSE = CacheConfig(key_format="int2", value_format="int2", window=0, sinks=0)
CALIBRATE = CalibrationConfig(
    keys_per_dim=8,
    n_held_out=100,
    lattice=LatticeConfig(rounds=2),
    rotation=LearnConfig(solver="itq", steps=3),
)


@pytest.fixture(scope="module")
def loaded(llama_folder):
    return replace(load_model(llama_folder), context=CONTEXT)


@pytest.fixture(scope="module")
def pieces(loaded):
    return full_windows(loaded, documents("evaluation", 8), 3)


def test_cached_losses_are_exact_for_a_cache_that_rounds_nothing(loaded, pieces):
    found = cached_losses(loaded, pieces, lambda: SignKeyCache(loaded, None, WHOLE), QUALITY)
    plain = token_losses(loaded, pieces)
    np.testing.assert_allclose(found.whole.nll, plain.nll, rtol=1e-5)
    assert found.whole.kl.max() < 1e-4 and (found.whole.agree == plain.n_tokens).all()
    assert gap_percent(found.whole, plain).value == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("config", [COARSE, replace(COARSE, window=16, sinks=2)])
def test_cached_losses_token_by_token_come_to_the_same_as_at_once(loaded, pieces, config):
    def new_cache() -> SignKeyCache:
        return SignKeyCache(loaded, None, config)

    once = cached_losses(loaded, pieces, new_cache, QUALITY)
    slowly = cached_losses(loaded, pieces, new_cache, replace(QUALITY, step=1))
    np.testing.assert_allclose(once.whole.nll, slowly.whole.nll, rtol=1e-3)
    assert once.whole.n_compressed == slowly.whole.n_compressed > 0
    assert once.whole.kl.sum() > 0


def test_cached_losses_end_is_the_last_quarter(loaded, pieces):
    found = cached_losses(loaded, pieces, None, QUALITY)
    ids = torch.stack([piece.ids for piece in pieces])
    with torch.no_grad():
        log_p = loaded.model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    last = (CONTEXT - 1) // 4
    np.testing.assert_allclose(found.end.nll, nll[:, -last:].sum(-1), rtol=1e-5)
    assert (found.end.n_tokens == last).all()


def test_cached_losses_do_not_judge_a_cache_that_packs_nothing(loaded, pieces):
    config = replace(COARSE, window=CONTEXT)
    with pytest.raises(InputError, match="packed none of 72 tokens"):
        cached_losses(loaded, pieces, lambda: SignKeyCache(loaded, None, config), QUALITY)


def test_gap_percent_is_the_ratio_of_perplexities(loaded, pieces):
    exact = token_losses(loaded, pieces)
    worse = replace(exact, nll=exact.nll * 1.1)
    ratio = perplexity(worse).value / perplexity(exact).value
    assert gap_percent(worse, exact).value == pytest.approx(100 * (ratio - 1))


def a_text(n_documents: int, lines: int) -> tuple[Document, ...]:
    return tuple(
        Document("p", f"{i}.py", f"x{i} = {i}\n" * lines, "evaluation") for i in range(n_documents)
    )


@pytest.mark.parametrize("lines, crossing", [(4, "all"), (30, "some"), (400, "none")])
def test_full_windows_are_as_many_as_the_text_holds(loaded, lines, crossing):
    documents = a_text(8, lines)
    found = full_windows(loaded, documents, 1000 if crossing != "none" else 12)
    assert all(len(piece.ids) == CONTEXT for piece in found)
    n_tokens = sum(map(len, loaded.encode([each.text for each in documents])))
    # each joined window has a token in front, and the last stretch fills none
    assert len(found) == 12 if crossing == "none" else len(found) >= n_tokens // CONTEXT - 1
    assert {piece.joined for piece in found} == {
        "all": {True},
        "some": {False, True},
        "none": {False},
    }[crossing]
    said = describe_windows(found, 1000)
    assert said.startswith(f"{len(found)} windows") and "of 1000 asked for" in said
    assert ("across documents" in said) == (crossing != "none")


def test_full_windows_refuse_a_text_that_fills_none(loaded):
    with pytest.raises(InputError, match="does not fill the context of 72"):
        full_windows(loaded, a_text(1, 4), 5)


def test_passages_begin_with_a_token_that_the_tokenizer_puts_before_any_text(loaded):
    (document,) = a_text(1, 60)
    bos = loaded.tokenizer.bos_token_id
    assert [p.ids[0] == bos for p in passages(loaded, [document])][:2] == [True, False]
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bos)]
    )
    found = passages(replace(loaded, tokenizer=tokenizer), [document])
    assert len(found) > 2 and all(piece.ids[0] == bos for piece in found)
    ids = [i for piece in found for i in piece.ids[1:].tolist()]
    assert ids == loaded.encode([document.text])[0]  # nothing lost


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_at_their_depth_and_at_the_end(loaded, pieces, depth):
    others = full_windows(loaded, documents("calibration", 8), 3)
    task = needles(loaded, pieces, others, depth)
    at = int(depth * (CONTEXT - 2 * NEEDLE))
    assert task.hidden.shape == task.absent.shape == (3, CONTEXT)
    assert torch.equal(task.hidden[:, at : at + NEEDLE], task.hidden[:, -NEEDLE:])
    assert torch.equal(task.absent[:, -NEEDLE:], task.hidden[:, -NEEDLE:])
    assert torch.equal(task.answer, task.hidden[:, -NEEDLE // 2 :])
    assert torch.equal(task.absent[0, : CONTEXT - NEEDLE], pieces[0].ids[: CONTEXT - NEEDLE])


def test_retrieval_counts_first_choices(loaded, pieces):
    ids = torch.stack([piece.ids for piece in pieces])
    with torch.no_grad():
        guess = loaded.model(ids, use_cache=False).logits.argmax(-1)[:, -5:-1]
    assert retrieval(loaded, ids, guess, None, 2) == 1.0
    assert retrieval(loaded, ids, guess + 1, None, 2) == 0.0
    half = guess.clone()
    half[:, :2] += 1
    through = lambda: SignKeyCache(loaded, None, WHOLE)
    assert retrieval(loaded, ids, half, through, 2) == 0.5


@pytest.mark.parametrize(
    ("changes", "said"), [({"n_passages": 0}, "n_passages=0"), ({"step": 0}, "step=0")]
)
def test_quality_config_refuses_what_measures_nothing(changes, said):
    with pytest.raises(InputError, match=said):
        QualityConfig(**changes)


def test_needles_want_a_context(loaded, pieces):
    with pytest.raises(InputError, match="depth=1.5"):
        needles(loaded, pieces, pieces, 1.5)
    with pytest.raises(InputError, match="too short for needles"):
        needles(replace(loaded, context=40), pieces, pieces, 0.5)


# The lab.


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("tiny", "tiny", documents("calibration", 8), documents("evaluation", 8))


CONFIG = CacheLabConfig(window=8, sinks=1, windows=(0, 8), calibrate=CALIBRATE, quality=QUALITY)


def test_cases_are_all_different_and_have_the_others_beside(loaded):
    found = cases(loaded, CONFIG)
    assert len({(c.codec, c.rule, c.cache) for c in found}) == len(found)
    assert {"fp8", "int8", "int4", "int2", "full", "sign"} == {c.cache.key_format for c in found}


def test_cache_lab_goes_on_with_an_interrupted_table_that_is_the_same(
    loaded, text, tmp_path, monkeypatch
):
    few = [case for case in cases(loaded, CONFIG) if case.cache.value_format == "int4"][:4]
    monkeypatch.setattr(caches, "cases", lambda *_: few)
    whole = CacheLab(loaded, text, CONFIG, tmp_path / "whole").run()
    judged = []

    def stop(part: str) -> None:
        judged.append(part)
        if len(judged) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CacheLab(loaded, text, CONFIG, tmp_path / "cut").run(stop)
    rows = []
    original = Judge.row
    monkeypatch.setattr(Judge, "row", lambda *a, **k: rows.append(a) or original(*a, **k))
    again = CacheLab(loaded, text, CONFIG, tmp_path / "cut").run()
    assert len(rows) == len(few) - 2
    assert again == whole
    row = again["caches"][0]
    assert row["n_packed"] > 0 and math.isfinite(row["gap"])
    calls = again["calls"][0]
    assert calls["bytes"] == pytest.approx(calls["expected_bytes"], rel=0.02)
    assert calls["n_packed_at_once"] == calls["n_packed_token_by_token"] > 0
    assert through_cache.DEPTHS == (0.1, 0.5, 0.9)
