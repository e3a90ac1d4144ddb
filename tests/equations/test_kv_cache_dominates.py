"""Claim 32 (S1): at long context the KV cache dominates the memory of mixture-of-experts models.

Does not hold at the paper's 8192 tokens and batch 1: OLMoE-1B-7B (16 layers, 16 heads of 128,
6.92e9 weights of 16 bits) has a cache of 1 GiB beside 12.9 GiB of weights. They are equal near
106 000 tokens, 26 times the model's own context of 4096; or near batch 26 at that context.
"""

from __future__ import annotations

import pytest

from signlattice.memory import FP16, PAPER, KVShape, crossover_length, kv_bytes

OLMOE = KVShape(n_layers=16, n_kv_heads=16, head_dim=128)
WEIGHT_BYTES = 2 * 6_920_000_000
CONTEXT = 4096


def test_kv_bytes_are_a_small_part_at_the_papers_length():
    assert kv_bytes(OLMOE, FP16, 8192) == 2**30
    assert kv_bytes(OLMOE, FP16, 8192) < WEIGHT_BYTES / 12


def test_crossover_length_is_far_beyond_the_context():
    length = crossover_length(WEIGHT_BYTES, OLMOE)
    assert length == pytest.approx(105_600, rel=1e-3)
    assert length > 25 * CONTEXT
    # One-bit keys move it out by their reduction.
    assert crossover_length(WEIGHT_BYTES, OLMOE, PAPER) == pytest.approx(1.8686 * length, rel=1e-3)


def test_crossover_length_comes_into_the_context_by_a_batch():
    assert crossover_length(WEIGHT_BYTES, OLMOE, batch=25) > CONTEXT
    assert crossover_length(WEIGHT_BYTES, OLMOE, batch=26) <= CONTEXT
