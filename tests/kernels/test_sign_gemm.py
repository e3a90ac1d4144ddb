"""The gradient of the L1 norm: every implementation against fp64 and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DEVICE, SAFETY, assert_accurate, product_tolerance, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signlattice import kernels
from signlattice.errors import InputError
from signlattice.kernels.gradient import triton as on_gpu
from signlattice.rotations.fixed import haar

HALF, WIDE = torch.float16, torch.float32
DTYPES = {"float16": HALF, "bfloat16": torch.bfloat16, "float32": WIDE}
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
"""Beside twice torch's error: of the order in which sums are rounded, and of near-ties in sign."""


def drawn(n_heads: int, n_keys: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fresh keys [H, N, d] and a rotation [H, d, d] for each head."""
    keys = torch.randn(n_heads, n_keys, d).to(DEVICE, dtype)
    seeds = torch.randint(10**6, (n_heads,)).tolist()
    return keys, torch.stack([haar(d, seed) for seed in seeds]).to(DEVICE)


def exact(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    x, y = keys.double(), keys.double() @ rotation.double().mT
    slope = (y / temperature).tanh() if temperature else y.sign()
    return slope.mT @ x


def judged(keys: Tensor, rotation: Tensor, temperature: float) -> tuple[Tensor, float]:
    """The exact result, and a tolerance that allows for signs that rounding may flip.

    A coordinate y of a key x is known to √d roundings of ‖x‖. A sign that flips moves the result
    by 2 ‖x‖, a slope of tanh(y/T) by its error over T.
    """
    result = exact(keys, rotation, temperature)
    n_keys, d = keys.shape[-2:]
    y, size = keys.double() @ rotation.double().mT, keys.double().norm(dim=-1, keepdim=True)
    unsure = SAFETY * size * (rounding(keys.dtype) + math.sqrt(d) * rounding(WIDE))
    if temperature:
        moved = (size * unsure / temperature).square().sum()
    else:
        moved = (2 * size * (y.abs() < unsure)).square().sum()
    tolerance = product_tolerance(keys.dtype, d, n_keys) + (moved.sqrt() / result.norm()).item()
    return result, tolerance


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
@BY_DTYPE
def test_sign_gemm_on_a_processor_is_as_accurate_as_plain_torch(
    impl: str, dtype: torch.dtype, temperature: float
) -> None:
    for d in (16, 80, 256):
        keys, rotation = (x.cpu() for x in drawn(2, 401, d, dtype))
        got = kernels.sign_gemm(keys, rotation, temperature, impl=impl)
        assert got.dtype == WIDE
        assert_accurate(got, *judged(keys, rotation, temperature))


@pytest.mark.parametrize(
    ("d", "n_keys", "dtype"),
    [
        (16, 300, WIDE),
        (24, 131, HALF),
        (64, 257, WIDE),
        (80, 129, torch.bfloat16),
        (96, 77, HALF),
        (112, 65, WIDE),
        (128, 190, HALF),
        (128, 1, WIDE),
        (256, 97, HALF),
        (320, 33, HALF),
        (512, 70, WIDE),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sign_gemm_on_a_gpu_is_as_accurate_as_plain_torch(
    d: int, n_keys: int, dtype: torch.dtype, temperature: float
) -> None:
    keys, rotation = drawn(2, n_keys, d, dtype)
    got = kernels.sign_gemm(keys, rotation, temperature, impl="triton")
    assert got.dtype == WIDE and got.shape == (2, d, d)
    assert_accurate(got, *judged(keys, rotation, temperature))


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
def test_sign_gemm_takes_leading_dimensions_as_heads_by_themselves(impl: str) -> None:
    keys, rotation = drawn(6, 50, 32, torch.bfloat16)
    shaped = keys.unflatten(0, (2, 3)), rotation.unflatten(0, (2, 3))
    got = kernels.sign_gemm(*shaped, 0.3, impl=impl)
    for head in range(6):
        alone = kernels.sign_gemm(keys[head], rotation[head], 0.3, impl=impl)
        torch.testing.assert_close(got[head // 3, head % 3], alone)


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_sign_gemm_keys_may_lie_anywhere_in_a_larger_tensor(impl: str, temperature: float) -> None:
    cache = torch.full((3, 4, 90, 40), math.nan, device=DEVICE)
    inside = cache[1:3, 2, 5:72, 3:35]  # 67 keys of 32
    keys, rotation = drawn(2, 67, 32, WIDE)
    inside.copy_(keys)
    got = kernels.sign_gemm(inside, rotation, temperature, impl=impl)
    torch.testing.assert_close(got, kernels.sign_gemm(keys, rotation, temperature, impl=impl))
    turned = keys.mT.contiguous().mT  # coordinates apart, keys side by side
    torch.testing.assert_close(kernels.sign_gemm(turned, rotation, temperature, impl=impl), got)


def test_sign_gemm_partial_sums_are_written_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rotation = drawn(1, 333, 32, WIDE)
    empty = torch.empty
    made: list[Tensor] = []

    def poisoned(*shape: int, **options: object) -> Tensor:
        made.append(empty(*shape, **options).fill_(math.nan))
        return made[-1]

    monkeypatch.setattr(on_gpu.torch, "empty", poisoned)
    got = kernels.sign_gemm(keys, rotation, impl="triton")
    assert len(made[0]) > 1, "one program does it all: nothing is summed"
    torch.testing.assert_close(got.double(), exact(keys, rotation, 0.0), atol=1e-3, rtol=1e-5)


def test_sign_gemm_is_the_same_on_every_run() -> None:
    keys, rotation = drawn(1, 700, 64, HALF)
    first, second = (kernels.sign_gemm(keys, rotation, 0.2, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
def test_sign_gemm_counts_a_coordinate_of_nought_for_nothing(impl: str) -> None:
    keys = torch.randn(2, 40, 16, device=DEVICE)
    keys[..., 5] = 0.0
    got = kernels.sign_gemm(keys, torch.eye(16, device=DEVICE).expand(2, 16, 16), impl=impl)
    assert torch.equal(got[:, 5], torch.zeros(2, 16, device=DEVICE))


@given(st.integers(0, 10**6), st.sampled_from([torch.bfloat16, WIDE, torch.float64]))
@settings(max_examples=15)
def test_sign_gemm_inner_product_with_the_rotation_is_the_l1_norm(
    seed: int, dtype: torch.dtype
) -> None:
    keys = torch.randn(60, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rotation = haar(24, seed, dtype=torch.float64)
    gradient = kernels.sign_gemm(keys, rotation)
    size = (keys.double() @ rotation.T).abs().sum()
    rough = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (gradient.double() * rotation).sum().item() == pytest.approx(size.item(), rel=rough)


def test_sign_gemm_of_no_keys_is_no_gradient() -> None:
    rotation = torch.eye(16, device=DEVICE)[None]
    for impl in ("torch", "triton", "cpu"):
        got = kernels.sign_gemm(torch.empty(1, 0, 16, device=DEVICE), rotation, impl=impl)
        assert torch.equal(got, torch.zeros(1, 16, 16, device=DEVICE))


KEYS, EYE = torch.zeros(2, 8, 16), torch.eye(16).expand(2, 16, 16)


@pytest.mark.parametrize(
    ("keys", "rotation", "options", "message"),
    [
        (KEYS[0, 0], EYE, {}, r"keys of shape \[16\]: expected \[..., N, d\]"),
        (KEYS, EYE[0], {}, r"rotation of shape \[16, 16\]: expected \[2, 16, 16\]"),
        (KEYS, torch.eye(32).expand(2, 32, 32), {}, r"expected \[2, 16, 16\]"),
        (KEYS.int(), EYE, {}, "keys is torch.int32"),
        (KEYS, EYE.half(), {}, "rotation is torch.float16: use float32 or float64"),
        (KEYS, EYE, {"temperature": -1.0}, "temperature=-1.0: use 0 or more"),
        (KEYS, EYE, {"temperature": math.nan}, "temperature=nan"),
        (KEYS, EYE, {"impl": "fast"}, "impl='fast': gradient has auto, torch, triton, cpu"),
        (KEYS.double(), EYE, {"impl": "triton"}, "keys is torch.float64"),
    ],
)
def test_sign_gemm_tells_what_cannot_be_done(
    keys: Tensor, rotation: Tensor, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        kernels.sign_gemm(keys, rotation, **options)
    assert "\n" not in str(refusal.value)
