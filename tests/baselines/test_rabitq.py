"""RaBitQ: its inner products are unbiased over rotations."""

from __future__ import annotations

import pytest
import torch

from signlattice_paper.baselines.rabitq import RaBitQ


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rabitq_is_unbiased_and_subtracts_its_mean():
    x = gaussian(1, 1, 1, 32)
    query = (0.2 * gaussian(32, seed=4) + x[0, 0, 0]) / 2
    mean = 3 + gaussian(1, 32, seed=5)
    reads = [RaBitQ(mean, seed).reconstruct(x + mean[0])[0, 0, 0] - mean[0] for seed in range(400)]
    products = torch.stack(reads) @ query
    exact = float(x[0, 0, 0] @ query)
    assert float(products.mean()) == pytest.approx(exact, abs=4 * float(products.std()) / 20)
    along = torch.stack(reads) @ x[0, 0, 0]  # with the vector itself, every time
    torch.testing.assert_close(along, x.square().sum().expand(400), rtol=1e-4, atol=0)
    assert RaBitQ(mean).bits == 1 + 64 / 32 and RaBitQ(mean).static_bytes == 4 * 32
    torch.testing.assert_close(RaBitQ.fit(x[0] + 1).mean, x[0, 0][None, :].view(1, 32) + 1)
