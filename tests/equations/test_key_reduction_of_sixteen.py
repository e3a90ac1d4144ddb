"""Claim 27 (S7): key memory shrinks by exactly 16 times.

Does not hold with anything stored beside the signs: one 16-bit scalar per key makes it 14.2 times
at d = 128, 12.8 at d = 64. 16 is the limit of bare signs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from signlattice.memory import PAPER, SIGN_KEYS, KVShape, effective_bits


def key_reduction(fmt, d, length=8192):
    return 16 / effective_bits(KVShape(1, 1, d), fmt, length).key


def test_key_reduction_of_bare_signs_alone_is_sixteen():
    assert key_reduction(replace(PAPER, mean_bits=0), 128) == 16


@pytest.mark.parametrize(("d", "value"), [(64, 12.8), (128, 14.2), (256, 15.06)])
def test_key_reduction_with_one_scalar_per_key_is_less_than_sixteen(d, value):
    assert key_reduction(PAPER, d) == pytest.approx(value, abs=0.03)


def test_key_reduction_with_everything_counted_is_less():
    assert key_reduction(SIGN_KEYS, 128) < key_reduction(PAPER, 128)
