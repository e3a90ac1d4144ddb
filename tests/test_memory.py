"""Memory arithmetic: closed formula, everything counted, lengths, errors."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.errors import InputError
from signlattice.memory import (
    FP8,
    FP16,
    NAMED_FORMATS,
    PAPER,
    SIGN_KEYS,
    CacheFormat,
    KVShape,
    crossover_length,
    effective_bits,
    kv_bytes,
    memory_reduction,
)

OLMOE = KVShape(n_layers=16, n_kv_heads=16, head_dim=128)

SHAPES = st.builds(
    KVShape,
    n_layers=st.integers(1, 4),
    n_kv_heads=st.integers(1, 8),
    head_dim=st.sampled_from([20, 64, 80, 128, 512]),
    value_head_dim=st.sampled_from([None, 64, 100]),
    sliding_window=st.sampled_from([None, 16, 1000]),
)
FORMATS = st.builds(
    CacheFormat,
    name=st.just("any"),
    key_bits=st.sampled_from([1, 1.5, 2, 8]),
    value_bits=st.sampled_from([1, 2, 4, 16]),
    key_scale_bits=st.sampled_from([0, 16]),
    value_scale_bits=st.sampled_from([0, 16, 32]),
    value_group=st.sampled_from([None, 32, 64]),
    mean_bits=st.sampled_from([0, 16]),
    static_mean_bits=st.sampled_from([0, 16]),
    rotation_bits=st.sampled_from([0, 16]),
    temperature_bits=st.sampled_from([0, 16]),
    window=st.integers(0, 40),
    sinks=st.integers(0, 4),
    word_bits=st.sampled_from([1, 8, 32]),
)
LENGTHS = st.integers(1, 5000)


def test_kv_bytes_of_the_fp16_cache_of_olmoe_by_hand():
    assert kv_bytes(OLMOE, FP16, 1) == 2 * 16 * 16 * 128 * 2
    assert kv_bytes(OLMOE, FP16, 4096, batch=3) == 3 * 4096 * 131072
    assert OLMOE.kv_dim == 2048


def test_kv_bytes_of_sign_keys_by_hand():
    shape = KVShape(n_layers=2, n_kv_heads=3, head_dim=64, value_head_dim=32)
    per_token = 64 // 8 + 2 + 32 * 2
    static = 4 * (64 * 64 + 64 + 1)
    assert kv_bytes(shape, SIGN_KEYS, 100, batch=5) == 6 * (5 * 100 * per_token + static)


@given(SHAPES, FORMATS, LENGTHS, st.integers(1, 3))
@settings(deadline=None)
def test_kv_bytes_agree_with_effective_bits_and_memory_reduction(shape, fmt, seq_len, batch):
    ours = kv_bytes(shape, fmt, seq_len, batch=batch)
    bits = effective_bits(shape, fmt, seq_len, batch=batch)
    vectors = shape.n_heads * batch * shape.cached_tokens(seq_len)
    total = vectors * (shape.head_dim * bits.key + shape.value_dim * bits.value)
    assert total / 8 == pytest.approx(ours, abs=1)
    reduction = memory_reduction(shape, fmt, seq_len, batch=batch)
    assert reduction == pytest.approx(16 / bits.average)


@given(
    d=st.sampled_from([64, 80, 128, 256, 2048]),
    meta=st.sampled_from([0, 16, 32, 48]),
    static=st.sampled_from([0, 16]),
    seq_len=LENGTHS,
    window=st.integers(0, 6000),
)
@settings(deadline=None)
def test_memory_reduction_is_the_closed_formula(d, meta, static, seq_len, window):
    """32 / (b_K + b_V + meta/d + static/(d T)), a window averaged in at 32 bits."""
    fmt = CacheFormat("x", 1, 16, key_scale_bits=meta, static_mean_bits=static, window=window)
    coded = Fraction(max(seq_len - window, 0), seq_len)
    bits = coded * (17 + Fraction(meta, d)) + (1 - coded) * 32 + Fraction(static, seq_len)
    assert memory_reduction(KVShape(3, 2, d), fmt, seq_len) == pytest.approx(float(32 / bits))


@given(SHAPES, FORMATS, LENGTHS)
@settings(deadline=None)
def test_kv_bytes_of_a_longer_sequence_are_never_fewer(shape, fmt, seq_len):
    assert kv_bytes(shape, fmt, seq_len + 1) >= kv_bytes(shape, fmt, seq_len)


@given(SHAPES, LENGTHS)
@settings(deadline=None)
def test_kv_bytes_count_each_thing_that_is_stored(shape, seq_len):
    plain = CacheFormat("plain", 1, 4)
    for stored in (
        {"key_scale_bits": 16},
        {"mean_bits": 16},
        {"value_scale_bits": 16},
        {"static_mean_bits": 16},
        {"rotation_bits": 16},
        {"temperature_bits": 16},
        {"window": 4},
        {"sinks": 1},
    ):
        assert kv_bytes(shape, replace(plain, **stored), seq_len) > kv_bytes(shape, plain, seq_len)


def test_kv_bytes_of_a_batch_share_the_static_tables():
    one, four = (kv_bytes(OLMOE, SIGN_KEYS, 100, batch=b) for b in (1, 4))
    static = 16 * 16 * 4 * (128 * 128 + 128 + 1)
    assert four - static == 4 * (one - static)


def test_effective_bits_count_a_scale_for_each_value_group():
    fmt = CacheFormat("k1v2", 1, 2, value_scale_bits=32, value_group=32)
    assert effective_bits(KVShape(1, 1, 128), fmt, 10).value == 3
    assert effective_bits(KVShape(1, 1, 128, value_head_dim=33), fmt, 10).value * 33 == 72 + 64


def test_effective_bits_are_of_codes_padded_to_words():
    shape = KVShape(1, 1, 80)
    assert effective_bits(shape, CacheFormat("bytes", 1, 16), 10).key == 1
    padded = CacheFormat("int32 words", 1, 16, word_bits=32)
    assert effective_bits(shape, padded, 10).key == 96 / 80


def test_kv_bytes_of_a_cache_inside_its_window_are_those_of_fp16():
    fmt = replace(PAPER, window=128, sinks=4)
    assert kv_bytes(OLMOE, fmt, 132) == kv_bytes(OLMOE, FP16, 132)
    assert kv_bytes(OLMOE, fmt, 133) < kv_bytes(OLMOE, FP16, 133)


def test_named_formats_of_one_bit_keys_save_less_than_fp8():
    assert [fmt.name for fmt in NAMED_FORMATS] == ["fp16", "fp8", "paper", "sign keys"]
    assert memory_reduction(OLMOE, FP16, 4096) == 1
    assert memory_reduction(OLMOE, FP8, 4096) == 2
    # One-bit keys beside 16-bit values save less than FP8 for both.
    assert all(memory_reduction(OLMOE, fmt, 10**6) < 2 for fmt in (PAPER, SIGN_KEYS))


def test_kv_bytes_of_sliding_layers_stop_growing():
    local = KVShape(5, 2, 64, sliding_window=512)
    assert kv_bytes(local, FP16, 512) == kv_bytes(local, FP16, 100_000)
    assert kv_bytes(local, FP16, 100) == kv_bytes(replace(local, sliding_window=None), FP16, 100)


@given(SHAPES, FORMATS, st.integers(1, 10**9), st.integers(1, 3))
@settings(deadline=None)
def test_crossover_length_is_the_first_that_reaches_the_weights(shape, fmt, weights, batch):
    length = crossover_length(weights, shape, fmt, batch=batch)
    if length is None:
        assert kv_bytes(shape, fmt, 10**12, batch=batch) < weights
        return
    assert kv_bytes(shape, fmt, length, batch=batch) >= weights
    assert length == 1 or kv_bytes(shape, fmt, length - 1, batch=batch) <= weights


def test_crossover_length_of_a_hybrid_adds_its_groups():
    local, full = KVShape(5, 2, 64, sliding_window=512), KVShape(1, 2, 64)
    weights = 10**8
    length = crossover_length(weights, [local, full])
    assert sum(kv_bytes(s, FP16, length) for s in (local, full)) >= weights
    assert sum(kv_bytes(s, FP16, length - 1) for s in (local, full)) < weights
    assert crossover_length(weights, local) is None


def test_kv_shape_and_cache_format_are_frozen():
    with pytest.raises(FrozenInstanceError):
        OLMOE.head_dim = 64
    with pytest.raises(FrozenInstanceError):
        FP16.key_bits = 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVShape(0, 1, 64), "n_layers=0"),
        (lambda: KVShape(1, 1, 64.0), "head_dim=64.0"),
        (lambda: KVShape(1, None, 64), "n_kv_heads=None"),
        (lambda: KVShape(1, 1, 64, value_head_dim=0), "value_head_dim=0"),
        (lambda: CacheFormat("x", 0, 16), "key_bits=0"),
        (lambda: CacheFormat("x", 1, float("nan")), "value_bits=nan"),
        (lambda: CacheFormat("x", 1, 16, mean_bits=-1), "mean_bits=-1"),
        (lambda: CacheFormat("x", 1, 16, window=1.5), "window=1.5"),
        (lambda: CacheFormat("x", 1, 16, value_group=0), "value_group=0"),
        (lambda: CacheFormat("x", 1, 16, word_bits=0), "word_bits=0"),
        (lambda: kv_bytes(OLMOE, FP16, 0), "seq_len=0"),
        (lambda: kv_bytes(OLMOE, FP16, 10, batch=0), "batch=0"),
        (lambda: crossover_length(0, OLMOE), "weight_bytes=0"),
        (lambda: crossover_length(10, []), "shapes is empty"),
    ],
)
def test_memory_names_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()
