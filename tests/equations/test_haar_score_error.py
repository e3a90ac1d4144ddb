"""The exact error of scores from signs after a Haar rotation, in every gauge (S1, the ladder).

E (q.(k^ - k))^2 = E(1 - g)^2 tr(Sq Sk) + E[g^2 (1/c^2 - 1)] / (d - 1) * (tr(M^-1 Sq) tr(M Sk) -
tr(Sq Sk)) for independent q and k, the gauge A with M = A^T A, and any rule whose slope g depends
on the cosine c alone. Nothing is assumed of the code's errors. The gauge enters through one product
of traces, so the balanced gauge is the best for each of the rules.
"""

from __future__ import annotations

import pytest
import torch

from signlattice.alignment import cosine
from signlattice.quantizers.gauge import make_gauge
from signlattice.quantizers.scales import SCALE_RULES, token_scale

D, N = 8, 5000
pytestmark = pytest.mark.usefixtures("one_thread")
SLOPE = {"mse": lambda c: c**2, "norm": lambda c: c, "unbiased": torch.ones_like}


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed):
    root = gaussian(D, D, seed=seed)
    return root @ root.T + 0.05 * torch.eye(D)


Q, K = moment(1), moment(2)


@pytest.fixture(scope="module")
def rotations():
    """Haar but for the signs of the rows, which no sign code sees."""
    return torch.linalg.qr(gaussian(N, D, D, seed=0)).Q.mT


def read_back(keys, gauge, rotations, rule):
    """Decode each key [N, D] from the signs of RAk: the reconstruction, and the cosines."""
    y = (rotations @ (keys @ gauge.T)[..., None]).squeeze(-1)
    code = token_scale(y, rule)[:, None] * torch.where(y >= 0, 1.0, -1.0)
    turned_back = (rotations.mT @ code[..., None]).squeeze(-1)
    return torch.linalg.solve(gauge, turned_back.T).T, cosine(y)


def formula(gauge, c, slope, keys):
    """Expected error of each key given its cosine, over directions that the cosine leaves open."""
    metric = gauge.T @ gauge
    own = ((keys @ Q) * keys).sum(-1)
    product = torch.trace(torch.linalg.solve(metric, Q)) * ((keys @ metric) * keys).sum(-1)
    return (1 - slope) ** 2 * own + slope**2 * (c**-2 - 1) / (D - 1) * (product - own)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", ["identity", "query_root", "balanced"])
def test_haar_score_error_is_the_formula(rotations, name, rule):
    """For a key of one direction and for keys of many, with the mean over queries taken exactly."""
    gauge = make_gauge(name, Q[None], K[None])[0]
    many = gaussian(N, D, seed=3) @ torch.linalg.cholesky(K).T
    for keys in (many[:1].expand(N, D), many):
        read, c = read_back(keys, gauge, rotations, rule)
        error = (((read - keys) @ Q) * (read - keys)).sum(-1)
        difference = error - formula(gauge, c, SLOPE[rule](c), keys)
        # where queries are white in the gauge, the formula is exact for each rotation
        assert abs(difference.mean()) < 5 * difference.std() / N**0.5 + 1e-12 * error.mean()
        assert 5 * difference.std() / N**0.5 < 0.12 * error.mean()  # and this says something


def test_haar_cosines_do_not_depend_on_the_gauge_or_the_key(rotations):
    keys, found = gaussian(2, D, seed=4), []
    for key, name in ((keys[0], "identity"), (keys[1], "balanced")):
        gauge = make_gauge(name, Q[None], K[None])[0]
        found.append(read_back(key.expand(N, D), gauge, rotations, "mse")[1])
    for power in (1, -2):
        one, other = (c**power for c in found)
        assert abs(one.mean() - other.mean()) < 5 * (one.var() / N + other.var() / N) ** 0.5


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_haar_score_error_is_least_in_the_balanced_gauge(rotations, rule):
    keys = gaussian(N, D, seed=5) @ torch.linalg.cholesky(K).T
    mean = {}
    for name in (
        "identity",
        "diagonal",
        "diagonal_root",
        "query_quarter",
        "query_root",
        "balanced",
    ):
        read, _ = read_back(keys, make_gauge(name, Q[None], K[None])[0], rotations, rule)
        mean[name] = (((read - keys) @ Q) * (read - keys)).sum(-1).mean().item()
    assert min(mean, key=lambda name: mean[name]) == "balanced"
