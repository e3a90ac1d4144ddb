"""Claim 6 (S2), cos_sign_quant_formula: cos(y, sign y) = ||y||_1 / (sqrt(d) ||y||_2).

Holds for every nonzero vector, with sign(0) = +1. With sign(0) = 0 it fails for vectors that have a
zero coordinate.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from signlattice.alignment import cosine


def cosine_between(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@given(arrays(np.float64, st.integers(1, 60), elements=st.integers(-5, 5).map(float)))
@settings(deadline=None)
def test_cosine_is_the_formula_with_zeros_counted_as_positive(values):
    y = torch.from_numpy(values)
    y[0] = 1
    sign = torch.where(y >= 0, 1.0, -1.0).double()
    formula = (y.abs().sum() / (math.sqrt(len(y)) * y.norm())).item()
    assert cosine_between(y, sign) == pytest.approx(formula)
    assert cosine(y).item() == pytest.approx(formula)


@given(arrays(np.float64, st.integers(1, 9), elements=st.integers(-5, 5).map(float)))
@settings(max_examples=50, deadline=None)
def test_cosine_is_that_of_the_closest_of_all_sign_vectors(values):
    y = torch.from_numpy(values)
    y[0] = 1
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(y))), dtype=torch.float64)
    assert cosine(y).item() == pytest.approx(
        (corners @ y).max().item() / len(y) ** 0.5 / y.norm().item()
    )


def test_cosine_is_not_the_formula_where_the_sign_of_zero_is_zero():
    y = torch.tensor([1.0, 0.0])
    assert cosine_between(y, y.sign()) == 1
    assert cosine(y).item() == pytest.approx(1 / math.sqrt(2))
