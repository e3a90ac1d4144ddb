"""A rotation of the values can always be absorbed by the weights, unlike one of the keys (S8).

Values enter attention linearly, with no position after their projection: R in W_V and its transpose
in W_O leave the output as it was, whatever the attention weights, also through a norm without
gains. With one-bit values the same weights serve: what is stored is the signs of R v, and what goes
through W_O R^T is what would have come of R^T times the code. Where keys and values share a matrix,
R would rotate the keys, behind which a gain or rotary positions wait: it is absorbed once untied.
"""

from __future__ import annotations

import torch

from signlattice.quantizers.scales import token_scale
from signlattice.rotations.fixed import haar

D, WIDTH, T = 32, 48, 20


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = gaussian(T, WIDTH, seed=0)
W_V, W_O = gaussian(D, WIDTH, seed=1), gaussian(WIDTH, D, seed=2)
WEIGHTS = (5 * gaussian(7, T, seed=3)).softmax(-1)
R = haar(D, 4, dtype=torch.float64)


def coded(y):
    signs = torch.where(y >= 0, 1.0, -1.0).double()
    return token_scale(y, "mse")[:, None] * signs


def test_value_rotation_absorbed_changes_no_output():
    torch.testing.assert_close(
        WEIGHTS @ (X @ (R @ W_V).T) @ (W_O @ R.T).T, WEIGHTS @ (X @ W_V.T) @ W_O.T
    )


def normalised(v):
    return v / v.square().mean(-1, keepdim=True).sqrt()


def test_absorbed_through_a_norm_without_gains_it_changes_no_output():
    torch.testing.assert_close(
        WEIGHTS @ normalised(X @ (R @ W_V).T) @ (W_O @ R.T).T,
        WEIGHTS @ normalised(X @ W_V.T) @ W_O.T,
    )


def test_a_matrix_shared_with_the_keys_absorbs_it_only_after_it_is_untied():
    queries, gain = gaussian(7, D, seed=5), gaussian(D, seed=6).exp()

    def output(keys_by, values_by, w_o):
        weights = (queries @ (gain * normalised(X @ keys_by.T)).T / D**0.5).softmax(-1)
        return weights @ normalised(X @ values_by.T) @ w_o.T

    exact = output(W_V, W_V, W_O)
    torch.testing.assert_close(output(W_V, R @ W_V, W_O @ R.T), exact)
    tied = output(R @ W_V, R @ W_V, W_O @ R.T)
    assert (tied - exact).norm() > 0.1 * exact.norm()


def test_value_rotation_absorbed_around_the_code_is_the_rotated_code():
    inside = WEIGHTS @ coded(X @ (R @ W_V).T) @ (W_O @ R.T).T
    outside = WEIGHTS @ (coded(X @ W_V.T @ R.T) @ R) @ W_O.T
    torch.testing.assert_close(inside, outside)
    plain = WEIGHTS @ coded(X @ W_V.T) @ W_O.T
    assert (inside - plain).norm() > 0.1 * plain.norm()  # and another code than without R
