"""What the contract is held with: a cache that rounds nothing, and transformers' own beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cache_cases import CLASSES, difference, new_cache, tokens
from signlattice.cache.sign_key_cache import SignKeyCache

EXACT = 1e-5
"""Of ‖got − expected‖ / ‖expected‖: fp32 sums in another order, and nothing else."""

ALL = pytest.mark.parametrize("name", CLASSES)
ONE = pytest.mark.parametrize(
    "name",
    [CLASSES[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CLASSES[1:])],
)
"""For what takes long: one class, and the other eight where everything is run."""


def ours(model: PreTrainedModel, **config) -> SignKeyCache:
    """A cache whose tokens are all kept as they come, nearly all in stores."""
    config = {"key_format": "full", "value_format": "full", "spare": 3} | config
    return new_cache(model, **config)


def theirs(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def read(model: PreTrainedModel, ids: Tensor, cache: Cache, **options) -> Tensor:
    return model(ids, past_key_values=cache, **options).logits


def generated(model: PreTrainedModel, ids: Tensor, cache: Cache, n: int = 6, **options) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(ids, past_key_values=cache, max_new_tokens=n, **options)


def assert_same(
    model: PreTrainedModel, act: Callable[[Cache], object], *, goes_on: bool = True
) -> None:
    """``act`` returns with our cache what it returns with theirs, and leaves ours the same."""
    torch.manual_seed(0)
    cache, oracle = ours(model), theirs(model)
    got = act(cache)
    torch.manual_seed(0)
    _compare(got, act(oracle))
    assert cache.get_seq_length() == oracle.get_seq_length()
    if not goes_on or not cache.get_seq_length():
        return
    more = tokens(cache.batch_size, 3, seed=7)
    assert difference(read(model, more, cache), read(model, more, oracle)) < EXACT


def _compare(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    if isinstance(got, Tensor) and got.is_floating_point():
        assert got.shape == expected.shape
        assert not got.numel() or difference(got, expected) < EXACT
    elif isinstance(got, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(got, (tuple, list)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            _compare(one, other)
    else:
        assert got == expected
