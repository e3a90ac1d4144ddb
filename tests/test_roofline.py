from __future__ import annotations

from dataclasses import replace

import pytest

from signlattice.errors import InputError
from signlattice.kernels.roofline import A100, DEVICES, H100, Cost, decode_cost
from signlattice.memory import FP16, SIGN_KEYS, KVShape, memory_reduction


def test_decode_cost_bound_by_memory_falls_by_what_the_cache_shrinks():
    shape = KVShape(n_layers=1, n_kv_heads=1, head_dim=128)
    packed = replace(SIGN_KEYS, rotation_bits=0, static_mean_bits=0, temperature_bits=0)
    whole, ours = (decode_cost(fmt, 128, 4) for fmt in (FP16, packed))
    for device in DEVICES:
        assert whole.bound(device) == ours.bound(device) == "memory"
        ratio = whole.least_seconds(device, 1000) / ours.least_seconds(device, 1000)
        assert ratio == pytest.approx(memory_reduction(shape, packed, 1000))


def test_cost_bound_by_arithmetic_gains_nothing_from_fewer_bytes():
    few, many = Cost(1.0, 1000.0), Cost(2.0, 1000.0)
    assert few.bound(H100) == many.bound(H100) == "arithmetic"
    assert few.least_seconds(H100, 7) == many.least_seconds(H100, 7)


def test_device_ridge_divides_memory_from_arithmetic():
    at = Cost(1.0, A100.ridge)
    assert at.bound(A100) == "memory"
    assert Cost(1.0, A100.ridge * 1.001).bound(A100) == "arithmetic"


def test_decode_cost_pads_a_small_group_to_a_tensor_core():
    assert decode_cost(FP16, 128, 1) == decode_cost(FP16, 128, 16)
    assert decode_cost(FP16, 128, 17).flops == 2 * decode_cost(FP16, 128, 16).flops


def test_decode_cost_refuses_sizes_below_one():
    with pytest.raises(InputError, match="group=0"):
        decode_cost(FP16, 128, 0)
