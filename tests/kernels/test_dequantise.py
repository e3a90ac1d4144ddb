"""Dequantising on a GPU, or in Triton's interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import DEVICE, assert_accurate, product_tolerance
from torch import Tensor

from conftest import thinned
from kernel_cases import FLOATS
from signlattice import kernels
from signlattice.bits import sign
from signlattice.kernels.layout import PackedKeys
from signlattice.kernels.unpack import reference, triton
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.sign import SignQuantizer

# tensor cores cut off what float32 sums would round: a few units of 2^-24


def random_rotation(n_heads: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n_heads, d, d, dtype=torch.float64))[0].float().to(DEVICE)


def random_packed(batch: int, n_heads: int, room: int, d: int, *, dc: bool = True) -> PackedKeys:
    shape = (batch, n_heads, room)
    words = torch.randint(0, 256, (*shape, d // 8), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(shape, device=DEVICE) + 0.1).half()
    return PackedKeys(words, scale, torch.randn(shape, device=DEVICE).half() if dc else None)


def assert_dequantised(got, packed, rotation, mean, dtype) -> None:
    exact = reference.dequantise(packed, rotation.double(), mean, torch.float64)
    assert got.dtype == dtype and got.shape == exact.shape
    assert_accurate(got, exact, product_tolerance(dtype, packed.words.shape[-1] * 8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", thinned(kernels.HEAD_DIMS, 2))
def test_dequantise_is_accurate_at_every_head_size(d, dtype):
    n_heads = 2 if d <= 128 else 1
    packed, rotation = random_packed(2, n_heads, 9, d), random_rotation(n_heads, d)
    mean = torch.randn(n_heads, d, device=DEVICE)
    got = kernels.dequantise(packed, rotation, mean, dtype=dtype, impl="triton")
    assert_dequantised(got, packed, rotation, mean, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dc", [False, True])
def test_dequantise_is_accurate_with_and_without_dc_and_mean(dc, centred, dtype):
    packed, rotation = random_packed(1, 2, 17, 80, dc=dc), random_rotation(2, 80)
    mean = torch.randn(2, 80, device=DEVICE).to(dtype) if centred else None
    got = kernels.dequantise(packed, rotation, mean, dtype=dtype, impl="triton")
    assert_dequantised(got, packed, rotation, mean, dtype)


@pytest.mark.parametrize(("batch", "room"), [(1, 1), (1, 127), (1, 129), (3, 97), (5, 60)])
def test_dequantise_takes_any_number_of_tokens_and_sequences(batch, room):
    packed, rotation = random_packed(batch, 1, room, 32), random_rotation(1, 32)
    got = kernels.dequantise(packed, rotation, dtype=torch.float16, impl="triton")
    assert_dequantised(got, packed, rotation, None, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantise_takes_a_rotation_of_any_dtype_and_layout(dtype):
    packed, rotation = random_packed(1, 2, 5, 64), random_rotation(2, 64).mT.to(dtype)
    got = kernels.dequantise(packed, rotation, impl="triton")
    assert_dequantised(got, packed, rotation, None, torch.float32)


def test_dequantise_reads_the_first_tokens_of_a_cache():
    packed, rotation = random_packed(2, 2, 12, 64), random_rotation(2, 64)
    first = PackedKeys(packed.words[:, :, :5], packed.scale[:, :, :5], packed.dc[:, :, :5])
    got = kernels.dequantise(first, rotation, impl="triton")
    assert torch.equal(got, kernels.dequantise(packed, rotation, impl="triton")[:, :, :5])


def test_dequantise_keeps_the_digits_of_the_rotation_in_float32_keys():
    # an error of the size of half precision in the rotation would be 2^-12 here
    packed = random_packed(1, 1, 40, 128, dc=False)
    rotation = random_rotation(1, 128)
    got = kernels.dequantise(packed, rotation, impl="triton")
    exact = reference.dequantise(packed, rotation.double(), None, torch.float64)
    assert (got - exact).norm() / exact.norm() < 2.0**-19


def test_dequantise_gives_back_packed_keys_on_the_lattice():
    rotation = random_rotation(2, 64)
    keys = 0.5 * sign(torch.randn(2, 2, 9, 64, device=DEVICE)) @ rotation
    packed = kernels.PackedKeys.empty(2, 2, 9, 64, device=DEVICE)
    origin = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    kernels.pack_into(packed, keys, rotation, origin, impl="triton")
    got = kernels.dequantise(packed, rotation, impl="triton")
    torch.testing.assert_close(got, keys, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("method", ["none", "dc", "token_mean"])
def test_dequantise_is_what_the_codec_decodes(method, impl):
    packed, rotation = random_packed(2, 3, 7, 64, dc=method == "dc"), random_rotation(3, 64)
    mean = torch.randn(3, 64, device=DEVICE) if method == "token_mean" else None
    codec = SignQuantizer(rotation, Centering(method, mean))
    expected = codec.decode(packed)
    got = kernels.dequantise(packed, rotation, mean, impl=impl)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("batch", "room"), [(0, 3), (2, 0)])
def test_dequantise_of_an_empty_cache_is_empty(batch, room, impl, dtype):
    packed = random_packed(batch, 2, room, 64)
    got = kernels.dequantise(packed, random_rotation(2, 64), dtype=dtype, impl=impl)
    assert got.shape == (batch, 2, room, 64) and got.dtype == dtype


def launched(words, scale, out, rotation, n_tokens: int, room: int) -> None:
    """The first ``n_tokens`` of each head of a cache with room for ``room``, into ``out``."""
    launch = triton.plan(rotation.shape[1], torch.float16, dc=False, centred=False)
    table, n_heads = triton.halves(rotation, 1), len(rotation)
    grid = (1, n_heads, -(-rotation.shape[1] // launch.constants["COLUMNS"]))
    launch(grid, words, scale, scale, table, scale, out, n_tokens, n_tokens, room)


def test_dequantise_writes_nothing_outside_the_tokens():
    packed, rotation = random_packed(1, 2, 7, 80, dc=False), random_rotation(2, 80)
    out = torch.full((2, 7, 80), torch.nan, dtype=torch.float16, device=DEVICE)
    launched(packed.words, packed.scale, out, rotation, 5, 7)
    assert out[:, :5].isfinite().all() and out[:, 5:].isnan().all()


def test_dequantise_writes_keys_beyond_2_31_numbers():
    d, n_heads, n_tokens, reach = 64, 2, 3, 2**31
    room = reach // d + 1  # the second head begins beyond 2^31 numbers
    try:
        out = torch.empty(2 * reach + 4 * d, dtype=torch.float16, device=DEVICE)
        words = torch.empty(n_heads, room, d // 8, dtype=torch.uint8, device=DEVICE)
    except RuntimeError:
        pytest.skip("no room for 2^32 numbers")
    scale = torch.empty(n_heads, room, dtype=torch.float16, device=DEVICE)
    near, rotation = random_packed(1, n_heads, n_tokens, d, dc=False), random_rotation(n_heads, d)
    words[:, :n_tokens], scale[:, :n_tokens] = near.words[0], near.scale[0]
    # what an offset of 32 bits would wrap to lies before the keys, in the same buffer
    far = out[reach:]
    begins = [h * room * d for h in range(n_heads)]
    for at in begins:
        far[at : at + n_tokens * d] = torch.nan
    launched(words, scale, far, rotation, n_tokens, room)
    expected = kernels.dequantise(near, rotation, dtype=torch.float16, impl="triton")[0]
    for h, at in enumerate(begins):
        assert torch.equal(far[at : at + n_tokens * d].view(n_tokens, d), expected[h])
