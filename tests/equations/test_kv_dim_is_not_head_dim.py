"""Claim 34 (S6): the models have head dimensions 2048, 512 and 256.

Wrong term: OLMoE's 2048 is 16 key heads of 128 laid side by side. A rotation across heads is exact
only if each query head is padded with zeros to the full width and rotated along, so that every
score costs n_kv_heads times as much; a head's own slice of the rotated key does not give its score.
"""

from __future__ import annotations

import torch

from signlattice.memory import KVShape
from signlattice.rotations.fixed import haar

SHAPE = KVShape(n_layers=1, n_kv_heads=4, head_dim=32)


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kv_dim_of_olmoe_is_sixteen_heads_of_128():
    assert KVShape(n_layers=16, n_kv_heads=16, head_dim=128).kv_dim == 2048


def test_kv_dim_rotation_across_heads_needs_queries_of_the_full_width():
    heads, d, kv_dim = SHAPE.n_kv_heads, SHAPE.head_dim, SHAPE.kv_dim
    rotation = haar(kv_dim, 0, dtype=torch.float64)
    keys, query = gaussian(20, heads, d, seed=1), gaussian(d, seed=2)
    rotated = keys.reshape(20, kv_dim) @ rotation.T
    for head in range(heads):
        padded = torch.zeros(heads, d, dtype=torch.float64)
        padded[head] = query
        exact = keys[:, head] @ query
        torch.testing.assert_close(rotated @ (rotation @ padded.reshape(-1)), exact)
        own_slice = rotated.reshape(20, heads, d)[:, head] @ query
        assert (own_slice - exact).norm() > 0.5 * exact.norm()
