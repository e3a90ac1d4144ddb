"""Claim 19 (S1), attention_score_gauge_invariance: the rotation is absorbed into W_K, for free.

Holds only for scores without rotary embedding and without a QK-norm gain, and only if R goes into
W_Q as well. With rotary embedding, R must be applied to queries and keys after it, and then the
scores are exact. The score's whole gauge group is GL(d): k -> A k, q -> A^{-T} q.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.rotations.fixed import haar, srht

D, WIDTH, T = 64, 96, 12


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = gaussian(T, WIDTH, seed=0)
W_Q, W_K = gaussian(D, WIDTH, seed=1), gaussian(D, WIDTH, seed=2)
GAIN_Q, GAIN_K = gaussian(D, seed=3).exp(), gaussian(D, seed=4).exp()
R = haar(D, 5, dtype=torch.float64)


def rope(x):
    """Rotary embedding: each pair (x_i, x_{i + d/2}) turned by position * frequency_i."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def rms_norm(x, gain):
    return gain * x / x.square().mean(-1, keepdim=True).sqrt()


def scores(w_q, w_k, gains=None, positions=False, online=None, online_q=None):
    q, k = X @ w_q.T, X @ w_k.T
    if gains is not None:
        q, k = rms_norm(q, gains[0]), rms_norm(k, gains[1])
    if positions:
        q, k = rope(q), rope(k)
    if online is not None:
        k = k @ online.T
        q = q @ (online if online_q is None else online_q).T
    return q @ k.T


def gap(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def test_attention_score_of_both_weights_rotated_is_exact_without_rope_and_gain():
    assert gap(scores(R @ W_Q, R @ W_K), scores(W_Q, W_K)) < 1e-13


def test_attention_score_changes_by_a_rotation_of_the_key_weight_alone():
    assert gap(scores(W_Q, R @ W_K), scores(W_Q, W_K)) > 0.5


def test_attention_score_with_rope_lets_no_absorbed_rotation_through():
    reference = scores(W_Q, W_K, positions=True)
    assert gap(scores(R @ W_Q, R @ W_K, positions=True), reference) > 0.3


def test_attention_score_with_a_qk_norm_gain_lets_no_absorbed_rotation_through():
    gains = (GAIN_Q, GAIN_K)
    assert gap(scores(R @ W_Q, R @ W_K, gains=gains), scores(W_Q, W_K, gains=gains)) > 0.3
    ones = (torch.ones(D, dtype=torch.float64),) * 2
    assert gap(scores(R @ W_Q, R @ W_K, gains=ones), scores(W_Q, W_K, gains=ones)) < 1e-13


def test_a_rotation_among_coordinates_of_one_product_of_gains_passes_and_no_other():
    """Both gains differ from coordinate to coordinate; their products take three values."""
    product = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)[torch.arange(D) % 3]
    gains = (GAIN_Q, product / GAIN_Q)
    inside = torch.zeros(D, D, dtype=torch.float64)
    for value in product.unique():
        place = (product == value).nonzero().squeeze(-1)
        inside[place[:, None], place] = torch.linalg.qr(gaussian(len(place), len(place), seed=7)).Q
    reference = scores(W_Q, W_K, gains=gains)
    assert gap(scores(inside @ W_Q, inside @ W_K, gains=gains), reference) < 1e-13
    across = inside.clone()
    across[[0, 1]] = across[[1, 0]]  # two coordinates of different products change places
    assert gap(scores(across @ W_Q, across @ W_K, gains=gains), reference) > 0.01


@pytest.mark.parametrize("rotation", [R, srht(D, 0, dtype=torch.float64)])
def test_attention_score_of_both_rotated_after_everything_is_exact(rotation):
    setting = {"gains": (GAIN_Q, GAIN_K), "positions": True}
    ours = scores(W_Q, W_K, **setting, online=rotation)
    assert gap(ours, scores(W_Q, W_K, **setting)) < 1e-13


def test_attention_score_gauge_group_is_the_general_linear_group():
    a = gaussian(D, D, seed=6) / math.sqrt(D) + 2 * torch.eye(D, dtype=torch.float64)
    assert (a @ a.T - torch.eye(D)).abs().max() > 1
    setting = {"gains": (GAIN_Q, GAIN_K), "positions": True}
    ours = scores(W_Q, W_K, **setting, online=a, online_q=torch.linalg.inv(a).T)
    assert gap(ours, scores(W_Q, W_K, **setting)) < 1e-12
