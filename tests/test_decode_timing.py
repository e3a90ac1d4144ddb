"""Timing of decode attention: which contenders there are, and the bytes that each reads."""

from __future__ import annotations

import pytest
import torch

from signlattice.evaluation import decode_timing
from signlattice.evaluation.decode_timing import DecodeCase, DecodeStates

CASE = DecodeCase(tokens=256, head_dim=64, n_heads=2)


def test_contenders_compute_the_same_attention():
    torch.manual_seed(0)
    states = DecodeStates.random(CASE, "cpu", "cpu")
    made = decode_timing.contenders(states, "cpu")
    out = {name: contender.call().float().reshape(1, 8, 64) for name, contender in made.items()}

    def error(name: str, of: str) -> float:
        return float((out[name] - out[of]).norm() / out[of].norm())

    assert error("SDPA bf16", "SDPA fp32") < 0.02
    assert error("1-bit K, 8-bit V", "1-bit K, bf16 V") < 0.02
    assert error("1-bit K, 8-bit V", "1-bit K, 4-bit V") < 0.3
    assert 0.02 < error("1-bit K, bf16 V", "SDPA fp32") < 1


def test_decode_rows_count_bytes_and_compare_with_the_fastest_sdpa():
    ticks = []
    rows = decode_timing.decode_rows(
        [CASE], device="cpu", impl="cpu", rounds=2, progress=lambda: ticks.append(1)
    )
    by_name = {row["contender"]: row for row in rows}
    cells, d = 2 * 256, 64
    assert by_name["1-bit K, bf16 V"]["bytes"] == cells * (d // 8 + 2 + 2 * d)
    assert by_name["1-bit K, 4-bit V"]["bytes"] == cells * (d // 8 + 2 + d // 2 + 4)
    assert by_name["SDPA bf16"]["bytes"] == cells * 4 * d
    over = by_name["SDPA bf16"]["over"]
    assert by_name[over]["speed_up"] == 1
    assert len(ticks) == 2


def test_decode_case_counts_cached_keys():
    assert DecodeCase(tokens=100, n_heads=3, batch=2).cached == pytest.approx(600)
