"""The control loop of the benches, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import relative_error

import bf16_loop
from signlattice.kernels.attention import cpu_loop


def test_bf16_loop_attends_within_start_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_loop, "LEAST_PIECE", 50)  # short pieces, so that threads merge
    group, first, last = 6, 5, 330
    keys, values = (torch.randn(1, 2, 333, 64).bfloat16() for _ in range(2))
    for states in (keys, values):
        states[:, :, :first] = states[:, :, last:] = torch.nan
    query = torch.randn(1, 2 * group, 64)
    start, length = (torch.tensor([at], dtype=torch.int32) for at in (first, last))
    got = bf16_loop.decode_attention(query, keys, values, start, length, 0.125)
    q = query.double().unflatten(1, (2, group))
    weights = (0.125 * q @ keys[:, :, first:last].double().mT).softmax(-1)
    exact = (weights @ values[:, :, first:last].double()).flatten(1, 2)
    assert relative_error(got, exact) < 1e-6
