"""Claim 26 (S7): the metadata of DC centering is negligible at long context.

Does not hold for what the formula describes, a mean per token: its share is the same at every
length. It does hold for a static mean per head, which long contexts share.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from signlattice.memory import PAPER, CacheFormat, KVShape, effective_bits

HEAD = KVShape(n_layers=1, n_kv_heads=1, head_dim=128)
BARE = replace(PAPER, mean_bits=0)
STATIC = CacheFormat("static mean", key_bits=1, value_bits=16, static_mean_bits=16)


def overhead(fmt, length):
    """Bits beyond the one sign per key coordinate."""
    return effective_bits(HEAD, fmt, length).key - effective_bits(HEAD, BARE, length).key


@pytest.mark.parametrize("length", [1, 512, 8192, 10**7])
def test_effective_bits_of_a_mean_per_token_are_the_same_share_at_every_length(length):
    assert overhead(PAPER, length) == pytest.approx(16 / 128)


def test_effective_bits_of_a_static_mean_fade_with_length():
    assert overhead(STATIC, 1) == 16
    assert overhead(STATIC, 8192) == pytest.approx(16 / 8192)
    assert overhead(STATIC, 10**7) < 1e-5
