"""Product quantization and k-means, against exact neighbours."""

from __future__ import annotations

import pytest
import torch

from signlattice.errors import InputError
from signlattice_paper.baselines.product import ProductQuantizer, k_means


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(code, x: torch.Tensor) -> float:
    return float((code.reconstruct(x) - x).square().sum() / x.square().sum())


def test_product_quantizer_is_exact_on_as_many_vectors_as_it_has_codewords():
    words = gaussian(2, 256, 16).half().float()
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0)) % 256
    code = ProductQuantizer.fit(words[:, order], rounds=3)
    torch.testing.assert_close(code.reconstruct(words[None]), words[None])
    assert distortion(code, words.flip(0)[None]) > 0.1  # another head's words
    assert code.bits == 1 and code.static_bytes == 2 * 2 * 2 * 256 * 8
    with pytest.raises(InputError, match="vectors of 12 coordinates"):
        ProductQuantizer.fit(gaussian(1, 300, 12))


def test_k_means_ends_at_the_means_of_the_nearest_points():
    points = gaussian(2, 400, 3)
    centroids = k_means(points, 5, rounds=60)
    for own, found in zip(points, centroids):
        nearest = torch.cdist(own, found).argmin(-1)
        means = torch.stack([own[nearest == i].mean(0) for i in range(5)])
        torch.testing.assert_close(found, means, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="3 points for 4 centroids"):
        k_means(gaussian(1, 3, 2), 4)
