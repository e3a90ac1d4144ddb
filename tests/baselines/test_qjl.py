"""QJL: its inner products are unbiased over projections."""

from __future__ import annotations

import pytest
import torch

from signlattice_paper.baselines.qjl import QJL


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(code, x: torch.Tensor) -> float:
    return float((code.reconstruct(x) - x).square().sum() / x.square().sum())


def test_qjl_is_unbiased_with_two_signs_per_coordinate():
    x, query = gaussian(1, 1, 1, 32), gaussian(32, seed=4)
    query = query + x[0, 0, 0]
    products = torch.stack([QJL(32, s).reconstruct(x)[0, 0, 0] @ query for s in range(400)])
    exact = float(x[0, 0, 0] @ query)
    error = 4 * float(products.std()) / 20
    assert error < 0.05 * exact
    assert float(products.mean()) == pytest.approx(exact * (1 + 1 / 128), abs=error)
    assert QJL(64).bits == 2.25
    # π/2 − 1 over m/D signs, a little less as rows of a rotation are not drawn apart
    assert 0.25 < distortion(QJL(64), gaussian(1, 1, 500, 64)) < 0.3
