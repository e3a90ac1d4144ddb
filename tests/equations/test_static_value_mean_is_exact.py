"""A vector taken off all values of a head comes back with the output, at no cost (S8).

Weights that sum to one carry it: the sum of w_j (v_j - m), and m, is the sum of w_j v_j. So m may
be added after attention, or become a bias of the output projection. A soft cap on the scores does
not matter to it, unlike to a mean of the keys. A sink logit does: it takes a share of the weights
to which no value belongs, and of m only what is left of them may come back.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from signlattice.models.hooks import attention_hook, attention_layers
from signlattice.models.loading import load_model

IDS = torch.arange(1, 61)[None] * 7 % 290
D, T = 32, 20


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES, VALUES = 3 * gaussian(7, T, seed=0), gaussian(T, D, seed=1) + gaussian(D, seed=2)
MEAN = VALUES.mean(0)


def with_means_in_the_bias(model, means):
    """A copy whose output projections add W_O m: each query head reads the m of its KV head."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        if hasattr(module, "o_proj"):
            mean = means[module.layer_idx].repeat_interleave(module.num_key_value_groups, 0)
            module.o_proj.bias = nn.Parameter(module.o_proj.weight @ mean.flatten())
    return moved


@pytest.mark.parametrize("folder", ["olmoe_folder", "llama_folder"])
def test_static_value_mean_may_become_a_bias_of_a_models_output_projection(folder, request):
    model = load_model(request.getfixturevalue(folder)).model
    means = {
        index: 3 * gaussian(layer.n_heads, layer.head_dim, seed=index).float()
        for index, layer in attention_layers(model).items()
    }

    def without_means(layer, query, key, value):
        return query, key, value - means[layer].unsqueeze(1)

    with torch.no_grad():
        exact = model(IDS).logits
        found = []
        for each in (with_means_in_the_bias(model, means), model):
            with attention_hook(each, without_means):
                found.append(each(IDS).logits)
    torch.testing.assert_close(found[0], exact, atol=1e-4, rtol=1e-4)
    assert (found[1] - exact).abs().max() > 100 * (found[0] - exact).abs().max()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_static_value_mean_added_after_attention_is_exact_with_a_soft_cap_too(cap):
    scores = SCORES if cap is None else cap * (SCORES / cap).tanh()
    weights = scores.softmax(-1)
    torch.testing.assert_close(weights @ (VALUES - MEAN) + MEAN, weights @ VALUES)


def test_static_value_mean_loses_the_share_that_a_sink_logit_takes():
    sink = torch.full((len(SCORES), 1), 6.0, dtype=torch.float64)
    weights = torch.cat([sink, SCORES], -1).softmax(-1)[:, 1:]
    left = weights.sum(-1, keepdim=True)
    assert (left < 0.97).all()
    error = weights @ (VALUES - MEAN) + MEAN - weights @ VALUES
    torch.testing.assert_close(error, (1 - left) * MEAN)
    assert error.norm() > 0.05 * (weights @ VALUES).norm()
    torch.testing.assert_close(weights @ (VALUES - MEAN) + left * MEAN, weights @ VALUES)
