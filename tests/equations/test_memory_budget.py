"""Claim 25 (S7): about 1.87 times less memory at length 8192, on every architecture.

Holds under one accounting, 32 / (17 + m/d): m = 16 bits of metadata per key at d = 128, or 32 at
d = 256. Other dimensions, a full-precision window, a stored rotation or sliding-window layers give
other figures, from 1.88 down to 1.26.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from signlattice.memory import FP16, PAPER, CacheFormat, KVShape, kv_bytes, memory_reduction

T = 8192
DIMS = (64, 128, 256, 512, 2048)


def head(d):
    return KVShape(n_layers=1, n_kv_heads=1, head_dim=d)


@pytest.mark.parametrize(
    ("meta", "values"),
    [
        (16, (1.8551, 1.8686, 1.8755, 1.8789, 1.8815)),
        (32, (1.8286, 1.8551, 1.8686, 1.8755, 1.8806)),
    ],
)
def test_memory_reduction_follows_dimension_and_metadata(meta, values):
    fmt = replace(PAPER, mean_bits=meta)
    for d, value in zip(DIMS, values, strict=True):
        assert memory_reduction(head(d), fmt, T) == pytest.approx(32 / (17 + meta / d), rel=1e-12)
        assert memory_reduction(head(d), fmt, T) == pytest.approx(value, abs=5e-5)


def test_memory_reduction_of_the_paper_comes_of_two_accountings():
    one_scalar = memory_reduction(head(128), PAPER, T)
    mean_and_scale = memory_reduction(head(256), replace(PAPER, key_scale_bits=16), T)
    assert one_scalar == mean_and_scale == pytest.approx(1.87, abs=5e-3)


def test_memory_reduction_does_not_depend_on_layers_heads_batch_or_length():
    for shape in (KVShape(16, 16, 128), KVShape(30, 2, 128)):
        for length in (100, T, 10**6):
            assert memory_reduction(shape, PAPER, length, batch=3) == memory_reduction(
                head(128), PAPER, T
            )


def test_memory_reduction_averages_a_full_precision_window_in():
    fmt = replace(PAPER, window=128)
    assert memory_reduction(head(128), fmt, T) == pytest.approx(1.844, abs=5e-4)


@pytest.mark.parametrize(("d", "value"), [(128, 1.855), (512, 1.778), (2048, 1.524)])
def test_memory_reduction_by_a_stored_rotation_is_less_the_larger_the_head(d, value):
    fmt = CacheFormat("signs and a rotation", key_bits=1, value_bits=16, rotation_bits=16)
    assert memory_reduction(head(d), fmt, T) == pytest.approx(value, abs=5e-4)


def test_memory_reduction_is_mostly_taken_away_by_sliding_layers_in_16_bits():
    """25 sliding layers (8 heads of 256, window 1024) beside 5 full ones (2 heads of 512)."""
    full = KVShape(5, 2, 512)
    sliding = KVShape(25, 8, 256, sliding_window=1024)
    reduction = memory_reduction(full, PAPER, T, uncompressed=[sliding])
    assert reduction == pytest.approx(1.26, abs=5e-3)
    ours = kv_bytes(full, PAPER, T) + kv_bytes(sliding, FP16, T)
    whole = kv_bytes(full, FP16, T) + kv_bytes(sliding, FP16, T)
    assert reduction == pytest.approx(whole / ours)
