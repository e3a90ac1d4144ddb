from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signlattice.bits import pack_signs, sign, unpack_signs
from signlattice.errors import InputError


@given(st.integers(0, 2**16), st.sampled_from([8, 64, 80, 96, 112, 128, 256]))
def test_unpack_signs_undoes_pack_signs(seed, d):
    y = torch.randn(3, 5, d, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_signs(pack_signs(y)), sign(y))


def test_sign_of_zero_is_plus_one():
    y = torch.tensor([0.0, -0.0, 1.0, -1.0] * 2)
    assert unpack_signs(pack_signs(y)).tolist() == [1, 1, 1, -1] * 2
    assert sign(y).tolist() == [1, 1, 1, -1] * 2


def test_pack_signs_puts_coordinate_p_times_words_plus_w_in_bit_p_of_byte_w():
    d, words = 24, 3
    for coordinate in range(d):
        y = -torch.ones(d)
        y[coordinate] = 1.0
        p, w = divmod(coordinate, words)
        expected = torch.zeros(words, dtype=torch.uint8)
        expected[w] = 1 << p
        assert torch.equal(pack_signs(y), expected)


def test_pack_signs_takes_one_bit_per_coordinate():
    assert pack_signs(torch.randn(7, 128)).nbytes * 8 == 7 * 128


@pytest.mark.parametrize("d", [1, 20, 28])
def test_pack_signs_refuses_a_size_that_fills_no_whole_bytes(d):
    with pytest.raises(InputError, match=f"head_dim {d}.*multiple of 8"):
        pack_signs(torch.zeros(d))


def test_unpack_signs_refuses_words_of_another_dtype():
    with pytest.raises(InputError, match="uint8"):
        unpack_signs(torch.zeros(4, dtype=torch.int32))
