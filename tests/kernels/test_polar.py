"""The polar factor: the iteration against the decomposition, and where it gives way to it."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signlattice import kernels
from signlattice.errors import InputError
from signlattice.kernels.polar_factor import reference
from signlattice.kernels.polar_factor import triton as iteration
from signlattice.rotations.fixed import haar, orthogonality_defect

BY_CONDITION = pytest.mark.parametrize("power", range(7))


def conditioned(d: int, power: float, seed: int = 0, spread: bool = True) -> Tensor:
    """fp64 [d, d] of condition 10^power: singular values spread evenly in their logarithm,
    or all 1 but the last."""
    values = torch.logspace(0, -power, d, dtype=torch.float64)
    if not spread:
        values[:-1] = 1.0
    turns = [haar(d, 2 * seed + i, dtype=torch.float64) for i in (0, 1)]
    return (turns[0] * values @ turns[1]).to(DEVICE)


@BY_CONDITION
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "one small"])
def test_polar_iteration_is_orthogonal_and_as_near_as_the_decomposition(
    power: int, spread: bool
) -> None:
    matrices = torch.stack([conditioned(64, power, seed, spread) for seed in range(3)])
    exact = kernels.polar(matrices, impl="torch")
    found, plain = (kernels.polar(matrices.float(), impl=impl) for impl in ("triton", "torch"))
    assert max(map(orthogonality_defect, found)) <= 1e-5
    apart, bound = ((x - exact).norm().item() for x in (found, plain))
    assert apart <= 2 * bound + 2e-5 * math.sqrt(3 * 64)


@pytest.mark.parametrize(
    ("power", "rounds"), [(0, 1), (2, 1), (2.9, 1), (3.7, 2), (5, 2), (6, 2), (7.7, 3)]
)
def test_polar_round_lifts_a_thousandfold(
    power: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    kernels.polar(conditioned(32, power).float(), impl="triton")
    assert made == {"rounds": rounds, "decomposed": 0}


def test_polar_decomposes_what_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 has digits for a condition that three rounds do not reach; its neighbours converge."""
    made = counted(monkeypatch)
    matrices = torch.stack([conditioned(32, power) for power in (1, 14, 2)])
    found = kernels.polar(matrices, impl="triton")
    assert made == {"rounds": 3, "decomposed": 1}
    assert max(map(orthogonality_defect, found)) < 1e-12
    assert torch.equal(found[1], reference.polar(matrices[1:2])[0])


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rounds the iteration makes, and how many matrices it leaves to be decomposed."""
    made = {"rounds": 0, "decomposed": 0}
    lift, decompose = iteration._lifted, reference.polar

    def lifted(x: Tensor) -> Tensor:
        made["rounds"] += 1
        return lift(x)

    def decomposed(x: Tensor) -> Tensor:
        made["decomposed"] += len(x)
        return decompose(x)

    monkeypatch.setattr(iteration, "_lifted", lifted)
    monkeypatch.setattr(reference, "polar", decomposed)
    return made


@given(st.integers(0, 10**6), st.sampled_from([16, 48, 100]), st.floats(-30, 30))
@settings(max_examples=20)
def test_polar_does_not_mind_size_and_side(seed: int, d: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(d, d, generator=generator, dtype=torch.float64) * 10**power
    torch.testing.assert_close(
        kernels.polar(matrix, impl="triton"), kernels.polar(matrix, impl="torch")
    )


def test_polar_of_a_gradient_that_lacks_a_direction_keeps_the_rotation_s() -> None:
    """As the trainer calls it: keys without a mean over coordinates, and a little of R added."""
    d = 64
    keys = torch.randn(4000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys -= keys.mean(1, keepdim=True)
    rotation = haar(d, 1, dtype=torch.float64)
    gradient = kernels.sign_gemm(keys, rotation) / keys.numel()
    shifted = (gradient + 1e-5 / d * rotation).float().to(DEVICE)
    found, exact = (kernels.polar(shifted, impl=impl) for impl in ("triton", "torch"))
    assert orthogonality_defect(found) <= 1e-5
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)
    assert ((found - exact).cpu().double() * gradient).sum().abs() < 1e-6  # of the objective


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
def test_polar_takes_batches_of_any_shape(impl: str) -> None:
    matrices = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=DEVICE)
    found = kernels.polar(matrices, impl=impl)
    assert found.shape == matrices.shape
    for i in range(6):
        alone = kernels.polar(matrices[i // 3, i % 3], impl=impl)
        torch.testing.assert_close(found[i // 3, i % 3], alone)
    assert kernels.polar(matrices[:0], impl=impl).shape == (0, 3, 16, 16)


def test_polar_makes_some_rotation_of_nothing() -> None:
    for impl in ("torch", "triton", "cpu"):
        found = kernels.polar(torch.zeros(2, 16, 16, device=DEVICE), impl=impl)
        assert max(map(orthogonality_defect, found)) <= 1e-5


@pytest.mark.parametrize(
    ("matrix", "impl", "message"),
    [
        (torch.zeros(16), "auto", r"matrix of shape \[16\]: expected \[..., d, d\]"),
        (torch.zeros(2, 16, 8), "auto", r"matrix of shape \[2, 16, 8\]"),
        (torch.zeros(16, 16).half(), "auto", "matrix is torch.float16: use float32 or float64"),
        (torch.eye(16), "fast", "impl='fast': polar_factor has auto, torch, triton, cpu"),
    ],
)
def test_polar_tells_what_cannot_be_done(matrix: Tensor, impl: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kernels.polar(matrix, impl=impl)
