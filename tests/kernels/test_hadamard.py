"""The Hadamard transform on a GPU, or in Triton's interpreter, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import DEVICE, assert_accurate, product_tolerance
from torch import Tensor

from conftest import thinned
from kernel_cases import FLOATS, ORDERS
from signlattice import kernels
from signlattice.hadamard import hadamard_signs
from signlattice.kernels.hadamard import reference

# tensor cores cut off what float32 sums would round: a few units of 2^-24


def random_rows(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape)).to(DEVICE, dtype)


def random_signs(n: int) -> Tensor:
    return (2.0 * torch.randint(0, 2, (n,)) - 1).to(DEVICE)


def dense(x: Tensor, signs: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The transform by the whole matrix, every step in one dtype."""
    n = x.shape[-1]
    h = (hadamard_signs(n).to(x.device, torch.float64) / n**0.5).to(dtype)
    return (x.to(dtype) if signs is None else x.to(dtype) * signs.to(dtype)) @ h.T


@pytest.mark.parametrize("case", thinned(itertools.product(ORDERS, FLOATS), every=4), ids=str)
def test_hadamard_transform_is_accurate_at_every_order(case):
    n, dtype = case
    x, signs = random_rows(3 + 512 // n, n, dtype=dtype), random_signs(n)
    got = kernels.hadamard_transform(x, signs, impl="triton")
    assert got.dtype == dtype and got.shape == x.shape
    exact = reference.hadamard_transform(x.double(), signs)
    assert_accurate(got, exact, product_tolerance(dtype, n))


@pytest.mark.parametrize("n", ORDERS[:-4:4])
def test_hadamard_transform_reference_is_the_hadamard_matrix(n):
    x, signs = random_rows(3, n, dtype=torch.float64), random_signs(n)
    exact = dense(x, signs, torch.float64)
    torch.testing.assert_close(reference.hadamard_transform(x, signs), exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [16, 28, 112, 128, 448, 2048, 8192])
def test_hadamard_transform_without_signs_is_the_bare_matrix(n, dtype):
    x = random_rows(5 + 512 // n, n, dtype=dtype)
    got = kernels.hadamard_transform(x, impl="triton")
    exact = reference.hadamard_transform(x.double())
    assert_accurate(got, exact, product_tolerance(dtype, n))


@pytest.mark.parametrize("n_rows", [1, 31, 33, 65, 129])
@pytest.mark.parametrize("n", [80, 192])
def test_hadamard_transform_takes_any_number_of_rows(n, n_rows):
    x, signs = random_rows(n_rows, n, dtype=torch.float16), random_signs(n)
    got = kernels.hadamard_transform(x, signs, impl="triton")
    exact = reference.hadamard_transform(x.double(), signs)
    assert_accurate(got, exact, product_tolerance(torch.float16, n))


@pytest.mark.parametrize("n", [28, 320])
def test_hadamard_transform_writes_nothing_outside_the_rows(n, monkeypatch):
    margin = 4096
    buffer = torch.full((3 * n + 2 * margin,), torch.nan, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda rows: buffer[margin:-margin].view_as(rows))
    x = random_rows(3, n, dtype=torch.float32)
    got = kernels.hadamard_transform(x, impl="triton")
    assert got.isfinite().all()
    assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("n", [64, 4096])
def test_hadamard_transform_in_half_precision_keeps_digits_of_small_and_large_rows(n, size):
    x = random_rows(3, n, dtype=torch.float16, size=size)
    got = kernels.hadamard_transform(x, impl="triton")
    exact = reference.hadamard_transform(x.double())
    assert_accurate(got, exact, product_tolerance(torch.float16, n))


def test_hadamard_transform_takes_rows_of_any_shape_and_stride():
    x, signs = random_rows(2, 64, 3, dtype=torch.float32).transpose(1, 2), random_signs(64)
    got = kernels.hadamard_transform(x, signs, impl="triton")
    torch.testing.assert_close(got, reference.hadamard_transform(x, signs))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("n", [64, 8192])
def test_hadamard_transform_takes_no_rows_at_all(n, impl):
    x = torch.empty(2, 0, n, device=DEVICE)
    assert kernels.hadamard_transform(x, random_signs(n), impl=impl).shape == (2, 0, n)


@pytest.mark.parametrize("n", [96, 2048])
def test_hadamard_transform_keeps_lengths(n):
    x = random_rows(4, n, dtype=torch.float32, size=3.0)
    got = kernels.hadamard_transform(x, random_signs(n), impl="triton")
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 2^31 numbers")
@pytest.mark.parametrize("n", [64, 4096])
def test_hadamard_transform_takes_rows_beyond_2_31_numbers(n):
    x = torch.zeros(2**31 // n + 5, n, dtype=torch.float16, device=DEVICE)
    x[-7:] = random_rows(7, n, dtype=torch.float16)
    got = kernels.hadamard_transform(x, impl="triton")[-7:]
    exact = reference.hadamard_transform(x[-7:].double())
    assert_accurate(got, exact, product_tolerance(torch.float16, n))
