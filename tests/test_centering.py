"""Centering: what is taken off, that it comes back, and what softmax sees of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from signlattice.errors import InputError
from signlattice.quantizers.centering import CENTERING_METHODS, Centering

KEYS = arrays(
    np.float64, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-50, 50)
).map(torch.from_numpy)
METHODS = st.sampled_from(CENTERING_METHODS)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(KEYS, METHODS)
@settings(deadline=None)
def test_join_undoes_split(keys, method):
    centering = Centering.fit(keys, method)
    centred, offset = centering.split(keys)
    assert torch.broadcast_shapes(centred.shape, offset.shape) == keys.shape
    torch.testing.assert_close(centering.join(centred, offset), keys, rtol=1e-12, atol=1e-12)


@given(KEYS, METHODS)
@settings(deadline=None)
def test_centering_twice_is_centering_once(keys, method):
    once, _ = Centering.fit(keys, method).split(keys)
    twice, _ = Centering.fit(once, method).split(once)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)


@given(KEYS)
@settings(deadline=None)
def test_centering_none_changes_nothing(keys):
    centred, offset = Centering("none").split(keys)
    assert torch.equal(centred, keys) and offset.item() == 0


@given(KEYS)
@settings(deadline=None)
def test_centering_dc_takes_off_the_component_along_the_all_ones_direction(keys):
    centred, offset = Centering("dc").split(keys)
    d = keys.shape[-1]
    ones = torch.full((d,), 1 / math.sqrt(d), dtype=torch.float64)
    projection = (keys @ ones)[..., None] * ones
    torch.testing.assert_close(offset.expand_as(keys), projection, rtol=0, atol=1e-12)
    torch.testing.assert_close(centred @ ones, torch.zeros_like(keys[..., 0]), rtol=0, atol=1e-11)


@given(KEYS)
@settings(deadline=None)
def test_centering_token_mean_leaves_no_mean_in_any_head(keys):
    centering = Centering.fit(keys, "token_mean")
    centred, _ = centering.split(keys)
    torch.testing.assert_close(centering.mean, keys.mean(-2))
    torch.testing.assert_close(
        centred.mean(-2), torch.zeros_like(centering.mean), rtol=0, atol=1e-12
    )


def test_centering_mean_once_fitted_serves_other_tokens_and_batches():
    calibration, keys = gaussian(3, 100, 8) + 5, gaussian(2, 3, 17, 8, seed=1)
    centering = Centering.fit(calibration, "token_mean")
    centred, offset = centering.split(keys)
    torch.testing.assert_close(centred[1, 2], keys[1, 2] - calibration[2].mean(0))
    assert offset.shape == (3, 1, 8)


@pytest.mark.parametrize("method", ["none", "token_mean"])
def test_centering_static_offset_need_not_be_put_back_for_softmax(method):
    keys, queries = gaussian(40, 16) + 3, gaussian(5, 16, seed=1)
    centred, _ = Centering.fit(keys, method).split(keys)
    torch.testing.assert_close((queries @ centred.T).softmax(-1), (queries @ keys.T).softmax(-1))


def test_centering_dc_offset_that_is_missing_is_seen_by_softmax():
    keys, queries = gaussian(40, 16) + 3, gaussian(5, 16, seed=1)
    centred, _ = Centering("dc").split(keys)
    gap = (queries @ centred.T).softmax(-1) - (queries @ keys.T).softmax(-1)
    assert gap.abs().max() > 0.1


@pytest.mark.parametrize(
    "weights",
    [
        lambda s: (20 * (s / 20).tanh()).softmax(-1),  # a soft cap
        lambda s: torch.cat([s, torch.zeros_like(s[:, :1])], -1).softmax(-1),  # a sink logit
    ],
)
def test_centering_static_offset_is_seen_by_a_soft_cap_and_a_sink_until_put_back(weights):
    keys, queries = gaussian(40, 16) + 1, gaussian(5, 16, seed=1)
    centering = Centering.fit(keys, "token_mean")
    centred, _ = centering.split(keys)
    exact, bare = weights(queries @ keys.T), queries @ centred.T
    assert (weights(bare) - exact).abs().max() > 0.01
    back = bare + (queries @ centering.mean)[:, None]  # one number per query
    torch.testing.assert_close(weights(back), exact)


def test_centering_dc_keeps_a_static_mean_that_is_not_along_the_ones():
    keys = gaussian(5000, 16)
    keys[:, ::2] += 4
    keys[:, 1::2] -= 4
    dc, _ = Centering("dc").split(keys)
    static, _ = Centering.fit(keys, "token_mean").split(keys)
    assert dc.mean(0).norm() > 15 and static.mean(0).norm() < 1e-9


def test_centering_fit_gives_half_precision_keys_a_mean_in_fp32():
    keys = (gaussian(10_000, 4) + 300).to(torch.bfloat16)
    centering = Centering.fit(keys, "token_mean")
    assert centering.mean.dtype == torch.float32
    torch.testing.assert_close(centering.mean, keys.double().mean(0).float())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.ones(0, 4), "shape"),
        (torch.ones(4), "shape"),
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, math.inf]]), "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("method", CENTERING_METHODS)
def test_centering_fit_refuses_bad_keys(keys, message, method):
    with pytest.raises(InputError, match=message):
        Centering.fit(keys, method)


def test_centering_refuses_bad_arguments():
    with pytest.raises(InputError, match="'mean'.*none, dc, token_mean"):
        Centering.fit(torch.ones(2, 2), "mean")
    with pytest.raises(InputError, match="with a mean"):
        Centering("dc", torch.ones(4))
    with pytest.raises(InputError, match="with no mean"):
        Centering("token_mean")
    with pytest.raises(InputError, match="finite"):
        Centering("token_mean", torch.tensor([math.nan]))
    centering = Centering.fit(torch.rand(3, 5, 4), "token_mean")
    for shape in [(7, 4), (2, 7, 4), (3, 7, 5), (4,)]:
        with pytest.raises(InputError, match="does not fit"):
            centering.split(torch.rand(shape))
    with pytest.raises(InputError, match="shape"):
        Centering("dc").split(torch.tensor(1.0))
