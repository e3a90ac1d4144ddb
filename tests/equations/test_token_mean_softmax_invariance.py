"""A vector taken off all keys of a head changes no attention weight (S5).

q.(k - m) = q.k - q.m, and softmax does not see what is the same for every key. A soft cap on the
scores, or a sink logit that is no key, does see it. The mean of a key's own coordinates is another
thing: it differs from key to key.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.quantizers.centering import Centering

D, T = 64, 40
GENERATOR = torch.Generator().manual_seed(0)
QUERIES = 3 * torch.randn(7, D, generator=GENERATOR, dtype=torch.float64)
KEYS = torch.randn(T, D, generator=GENERATOR, dtype=torch.float64) + 2 * torch.randn(
    D, generator=GENERATOR, dtype=torch.float64
)


def scores(keys):
    return QUERIES @ keys.T / math.sqrt(D)


def attention(keys, cap=None, sink=None):
    logits = scores(keys)
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    if sink is not None:
        logits = torch.cat([torch.full((len(QUERIES), 1), sink).double(), logits], dim=-1)
    return logits.softmax(-1)


CENTRED, OFFSET = Centering.fit(KEYS, "token_mean").split(KEYS)


def test_token_mean_moves_the_scores_by_one_number_per_query():
    moved = scores(KEYS) - scores(CENTRED)
    assert moved.std(-1).max() < 1e-12 and moved.abs().max() > 0.5


def test_token_mean_changes_no_attention_weight():
    torch.testing.assert_close(attention(CENTRED), attention(KEYS), rtol=0, atol=1e-14)


@pytest.mark.parametrize("setting", [{"cap": 5.0}, {"sink": 1.0}])
def test_token_mean_is_seen_by_a_soft_cap_and_a_sink_logit(setting):
    assert (attention(CENTRED, **setting) - attention(KEYS, **setting)).abs().max() > 0.05


def test_dc_mean_of_each_keys_own_coordinates_must_be_put_back():
    centred, offset = Centering("dc").split(KEYS)
    assert (attention(centred) - attention(KEYS)).abs().max() > 0.05
    torch.testing.assert_close(attention(Centering("dc").join(centred, offset)), attention(KEYS))
