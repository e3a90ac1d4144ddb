from __future__ import annotations

import math

import pytest
import torch

from signlattice.bits import sign
from signlattice.errors import InputError
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.levels import LevelQuantizer, gaussian_levels
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "error"), [(1, 1 - 2 / math.pi), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_gaussian_levels_are_lloyd_and_maxs(bits, error):
    levels = gaussian_levels(bits)
    assert len(levels) == 2**bits
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-5, rtol=0)
    x = gaussian(400_000).double()
    code = levels.double()[(x[:, None] - levels.double()).abs().argmin(1)]
    assert (x - code).square().mean().item() == pytest.approx(error, rel=0.02)


def test_gaussian_levels_of_two_bits_are_those_in_the_tables():
    assert gaussian_levels(2)[2:].tolist() == pytest.approx([0.4528, 1.5104], abs=1e-4)
    with pytest.raises(InputError, match="bits=0"):
        gaussian_levels(0)


def level_code(bits=1, rule="mse", method="token_mean", d=16, heads=2):
    mean = gaussian(heads, d, seed=2) if method == "token_mean" else None
    rotation = torch.stack([haar(d, i) for i in range(heads)])
    return LevelQuantizer(Centering(method, mean), rotation, bits, rule)


@pytest.mark.parametrize("rule", ["mse", "norm", "unbiased"])
@pytest.mark.parametrize("method", ["none", "dc", "token_mean"])
def test_level_quantizer_of_one_bit_is_the_sign_code(rule, method):
    vectors = gaussian(3, 2, 30, 16, seed=1)
    code = level_code(rule=rule, method=method)
    keys = SignQuantizer(code.rotation, code.centering, rule)
    torch.testing.assert_close(
        code.reconstruct(vectors), keys.reconstruct(vectors), atol=6e-3, rtol=0
    )
    assert code.bits == keys.bits == 1 + (2 if method == "dc" else 1) * 16 / 16
    y = code.centering.split(vectors)[0] @ code.rotation.mT
    seen = code.centering.split(code.reconstruct(vectors))[0] @ code.rotation.mT
    if method != "dc":  # what is read back has a mean of its own
        torch.testing.assert_close(sign(seen), sign(y))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_level_quantizer_keeps_what_each_scale_rule_says(bits):
    x = gaussian(1, 1, 50, 32, seed=1)
    mse, norm, unbiased = (
        level_code(bits, rule, "none", d=32, heads=1).reconstruct(x)
        for rule in ("mse", "norm", "unbiased")
    )
    zero = torch.zeros(1, 1, 50)
    torch.testing.assert_close(((x - mse) * mse).sum(-1), zero, atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(((x - unbiased) * x).sum(-1), zero, atol=1e-3, rtol=0)


def test_level_quantizer_of_more_bits_loses_less_and_of_eight_nearly_nothing():
    x = gaussian(1, 2, 200, 64, seed=1)
    lost = [
        (level_code(bits, "mse", "none", d=64).reconstruct(x) - x).square().mean().item()
        for bits in (1, 2, 3, 4, 8)
    ]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-4


def test_level_quantizer_static_bytes_are_of_what_is_learned_and_not_of_a_seed():
    code = level_code()
    assert code.static_bytes == 2 * 16 * 4  # the mean
    learned = LevelQuantizer(code.centering, code.rotation, learned=True)
    assert learned.static_bytes == 2 * 16 * 16 + 2 * 16 * 4
    metric = torch.eye(16).expand(2, 16, 16)
    lattice = SignQuantizer(code.rotation, code.centering, metric=metric)
    assert lattice.static_bytes == 2 * 2 * 16 * 16 + 2 * 16 * 4


def test_level_quantizer_refuses_a_rule_and_a_width_that_there_is_not():
    with pytest.raises(InputError, match="unknown scale rule 'best'"):
        level_code(rule="best")
    with pytest.raises(InputError, match="bits=9: use 1 to 8"):
        level_code(bits=9)
