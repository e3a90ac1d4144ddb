"""NSNQuant-like codes: each step is undone, and one codebook beats separate levels."""

from __future__ import annotations

import pytest
import torch

from signlattice.errors import InputError
from signlattice_paper.baselines import nsnquant
from signlattice_paper.baselines.nsnquant import NSNQuantLike, gaussian_codebook


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(code, x: torch.Tensor) -> float:
    return float((code.reconstruct(x) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", [1, 2])
def test_nsnquant_undoes_every_step_but_the_codebook(bits, monkeypatch):
    x = gaussian(2, 2, 70, 16) * 3 + 5
    nearest = nsnquant.nearest_codewords
    monkeypatch.setattr(nsnquant, "nearest_codewords", lambda points, codebook: points)
    found = NSNQuantLike(16, bits, size=32).reconstruct(x)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(nsnquant, "nearest_codewords", nearest)
    assert distortion(NSNQuantLike(16, bits, size=32), x) > 1e-3


def test_nsnquant_subtracts_what_the_tokens_of_a_block_share():
    noise = gaussian(1, 1, 128, 64)
    shared = 4 * gaussian(64, seed=8)
    code = NSNQuantLike(64, 2)
    lost = (code.reconstruct(noise + shared) - noise - shared).square().sum()
    assert float(lost / noise.square().sum()) < 0.12
    doubled = code.reconstruct(2 * (noise + shared))  # a power of two goes through fp16 unchanged
    torch.testing.assert_close(doubled, 2 * code.reconstruct(noise + shared))
    assert code.bits == 2 + 0.5 + 0.25 and NSNQuantLike(64, 1).bits == 1.75
    with pytest.raises(InputError, match="bits_per_level=3: use 1 to 2"):
        NSNQuantLike(64, 3)


def test_nsnquant_beats_levels_of_the_same_bits_on_gaussian_vectors():
    x = gaussian(1, 1, 2048, 64, seed=9)
    assert 0.25 < distortion(NSNQuantLike(64, 1), x) < 0.33 < 0.36  # Shannon, ours, one bit
    assert 0.0625 < distortion(NSNQuantLike(64, 2), x) < 0.1 < 0.117
    assert (gaussian_codebook(False) > 0).all() and gaussian_codebook(True).min() < -1
