"""The real model: that it loads, reads, and has the keys that are recorded.

`make test-slow` fetches it and its text once, if the package index has them. Without them these
tests are skipped, and say so.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from signlattice.alignment import beta
from signlattice.data.texts import read_text
from signlattice.data.wiki import fetch_dump
from signlattice.errors import InputError, IntegrityError
from signlattice.evaluation.perplexity import token_losses
from signlattice.models.capture import capture_passages
from signlattice.models.gguf import GEMMA_3_270M, fetch_model
from signlattice.models.loading import LoadedModel, load_model
from signlattice.models.passages import full_windows

CONTEXT = 512

# Of the first window of the held-out articles. Processors differ in the order of sums alone.
PERPLEXITY, BETA_RAW, BETA_CENTRED = 12.0974, 0.419046, 0.448457


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    try:
        fetch_model(GEMMA_3_270M.name)
        fetch_dump()
    except IntegrityError:
        raise
    except InputError as error:
        pytest.skip(f"THE REAL MODEL IS NOT TESTED: {error}")
    return replace(load_model(GEMMA_3_270M.name), context=CONTEXT)


def test_gemma_is_the_model_that_was_pinned(gemma):
    assert gemma.weights_hash == GEMMA_3_270M.weights_hash
    assert (gemma.head_dim, gemma.begins_windows) == (256, True)


def test_gemma_reads_wikipedia_as_recorded(gemma):
    """One window: its perplexity, and beta of layer 5's keys to the lattice, no rotation."""
    (piece,) = full_windows(gemma, read_text("wiki").evaluation, 1)
    losses = token_losses(gemma, [piece])
    assert math.exp(losses.nll[0] / losses.n_tokens[0]) == pytest.approx(PERPLEXITY, rel=1e-3)
    keys = capture_passages(gemma, [piece], states=("keys",), layers={5}).keys(5)
    assert beta(keys[0]) == pytest.approx(BETA_RAW, abs=1e-4)
    assert beta(keys[0] - keys[0].mean(0)) == pytest.approx(BETA_CENTRED, abs=1e-4)
