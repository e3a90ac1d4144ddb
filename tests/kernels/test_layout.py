"""Packed values: what is read back, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signlattice.errors import InputError
from signlattice.kernels.layout import VALUE_BITS, PackedKeys, PackedValues

HALF_ROUNDING = 2**-11  # of a normal number; half a least subnormal is 2^-25


def _filled(values: Tensor, bits: int) -> PackedValues:
    batch, n_heads, n_tokens, d = values.shape
    packed = PackedValues.empty(batch, n_heads, n_tokens, d, bits, device=DEVICE)
    packed.write(values, torch.zeros(batch, dtype=torch.int32))
    return packed


def _assert_within_half_a_step(values: Tensor, packed: PackedValues) -> None:
    low, high = values.float().aminmax(dim=-1)
    rounding = HALF_ROUNDING * low.abs() + 2**packed.bits * 2**-25
    room = 0.5 * packed.scale.float() * (1 + 2**packed.bits * 2e-7) + rounding
    assert ((packed.read() - values.float()).abs() <= room[..., None] * (1 + 1e-5)).all()
    span = packed.scale.float() * (2**packed.bits - 1)
    assert (span <= (high - low) * 1.001 + rounding * 2).all()


@settings(max_examples=40)
@given(
    bits=st.sampled_from(VALUE_BITS),
    d=st.sampled_from((16, 80, 112)),
    n_tokens=st.integers(1, 9),
    size=st.sampled_from((1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e4)),
    offset=st.sampled_from((-100.0, -1.0, 0.0, 3.0)),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**31),
)
def test_packed_values_are_read_back_within_half_a_step(
    bits: int, d: int, n_tokens: int, size: float, offset: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    values = ((torch.randn(2, 3, n_tokens, d).clamp(-4, 4) + offset) * size).to(DEVICE)
    values = values.clamp(-6e4, 6e4).to(dtype)
    _assert_within_half_a_step(values, _filled(values, bits))


@pytest.mark.parametrize("bits", VALUE_BITS)
@pytest.mark.parametrize("constant", [0.0, -0.1, 3e-8, 65504.0, -65504.0])
def test_packed_values_read_a_constant_back_as_half_precision_has_it(
    bits: int, constant: float
) -> None:
    values = torch.full((1, 1, 3, 16), constant, device=DEVICE)
    read = _filled(values, bits).read()
    assert torch.allclose(read, values.half().float(), rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_packed_values_are_exact_where_a_token_is_made_of_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 2, 5, 64), device=DEVICE)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    values = 0.25 * codes - 2.0
    assert torch.equal(_filled(values, bits).read(), values)


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_packed_values_code_f_of_byte_w_is_coordinate_f_w_plus_w(bits: int) -> None:
    d, codes_of_byte = 32, 8 // bits
    width = d // codes_of_byte
    for coordinate in (0, 1, width - 1, width % d, d - 1):
        values = torch.zeros(1, 1, 1, d, device=DEVICE)
        values[..., coordinate] = 1.0
        words = _filled(values, bits).words[0, 0, 0].tolist()
        expected = [0] * width
        expected[coordinate % width] = (2**bits - 1) << (bits * (coordinate // width))
        assert words == expected


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_packed_values_write_changes_only_the_places_written_to(bits: int) -> None:
    packed = PackedValues.empty(2, 2, 9, 16, bits, device=DEVICE)
    packed.words.fill_(0xAB)
    packed.scale.fill_(torch.nan)
    packed.zero.fill_(torch.nan)
    values = torch.randn(2, 2, 3, 16, device=DEVICE)
    packed.write(values, torch.tensor([0, 5], dtype=torch.int32))
    written = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    written[0, 0:3], written[1, 5:8] = True, True
    for b in range(2):
        assert (packed.words[b][:, ~written[b]] == 0xAB).all()
        for tensor in (packed.scale, packed.zero):
            assert tensor[b][:, ~written[b]].isnan().all()
            assert tensor[b][:, written[b]].isfinite().all()
    read = torch.stack([packed.read()[b][:, written[b]] for b in range(2)])
    assert torch.equal(read, _filled(values, bits).read())


@pytest.mark.parametrize("bits", VALUE_BITS)
@pytest.mark.parametrize("bad", [-7e4, 1.1e9, torch.inf, -torch.inf, torch.nan])
def test_packed_values_write_refuses_what_half_precision_cannot_hold(bits: int, bad: float) -> None:
    values = torch.zeros(1, 1, 4, 16, device=DEVICE)
    values[0, 0, 2, 5] = bad
    packed = PackedValues.empty(1, 1, 4, 16, bits, device=DEVICE)
    packed.words.fill_(0xAB)
    with pytest.raises(InputError, match="65504"):
        packed.write(values, torch.zeros(1, dtype=torch.int32))
    assert (packed.words == 0xAB).all()


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((2, 2, 3, 32), [0, 0], "expected \\[2, 2, T, 16\\]"),
        ((1, 2, 3, 16), [0, 0], "expected \\[2, 2, T, 16\\]"),
        ((2, 2, 16), [0, 0], "expected \\[2, 2, T, 16\\]"),
        ((2, 2, 9, 16), [0, 0], "do not fit a cache of 8"),
        ((2, 2, 3, 16), [0, 6], "do not fit a cache of 8"),
        ((2, 2, 3, 16), [-1, 0], "do not fit a cache of 8"),
        ((2, 2, 3, 16), [0], "do not fit a cache of 8"),
    ],
)
def test_packed_values_write_refuses_values_that_do_not_fit(
    shape: tuple[int, ...], positions: list[int], message: str
) -> None:
    packed = PackedValues.empty(2, 2, 8, 16, 4, device=DEVICE)
    with pytest.raises(InputError, match=message):
        packed.write(torch.zeros(shape, device=DEVICE), torch.tensor(positions, dtype=torch.int32))


@pytest.mark.parametrize(("head_dim", "bits"), [(16, 3), (16, 16), (2, 2), (0, 4), (-16, 4)])
def test_packed_values_empty_refuses_a_width_that_does_not_fill_bytes(
    head_dim: int, bits: int
) -> None:
    with pytest.raises(InputError):
        PackedValues.empty(1, 1, 4, head_dim, bits)


@pytest.mark.parametrize("head_dim", [0, 4, 12])
def test_packed_keys_empty_refuses_keys_that_do_not_fill_bytes(head_dim: int) -> None:
    with pytest.raises(InputError):
        PackedKeys.empty(1, 1, 4, head_dim)


def test_packed_keys_empty_has_no_centre_unless_asked_for() -> None:
    assert PackedKeys.empty(1, 2, 3, 16).dc is None
    assert PackedKeys.empty(1, 2, 3, 16, dc=True).dc.shape == (1, 2, 3)
