"""Gauges: what each does to the moments, the code in it, and rotations learned for more than β."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from signlattice.alignment import cosine
from signlattice.errors import InputError
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.gauge import (
    GAUGES,
    DescentConfig,
    GaugeQuantizer,
    geometric_mean,
    isotropic_error,
    learn_score_rotation,
    make_gauge,
    participation,
    score_error,
    score_slope,
    sign_reconstruct,
    weighted_itq,
)
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar, orthogonality_defect, srht

pytestmark = pytest.mark.usefixtures("one_thread")

H, D = 2, 16
DESCENT = DescentConfig(steps=120, batch=512)


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed):
    """Positive definite [H, D, D], eigenvalues over three orders, no axis of its own."""
    turn = torch.stack([haar(D, seed + head, dtype=torch.float64) for head in range(H)])
    return (turn * torch.logspace(-2, 1, D, dtype=torch.float64)) @ turn.mT


def drawn(n, second, seed):
    """Vectors [H, n, D] of that second moment."""
    return gaussian(H, n, D, seed=seed) @ torch.linalg.cholesky(second).mT


Q, K = moment(0), moment(10)
ROTATION = torch.stack([haar(D, 20 + head) for head in range(H)])
MEAN = gaussian(H, D, seed=5).float()
KEYS = (drawn(1500, K, 1) + MEAN.double().unsqueeze(1)).float()
CENTRED = (KEYS - MEAN.unsqueeze(1)).double()


def after(name):
    """Moments of queries and keys in a gauge: of A^{-T} q and of A k."""
    a = make_gauge(name, Q, K)
    inverse = torch.linalg.inv(a)
    return inverse.mT @ Q @ inverse, a @ K @ a.mT


@pytest.mark.parametrize("name", GAUGES)
def test_make_gauge_is_symmetric_positive_and_leaves_scores_alone(name):
    a = make_gauge(name, Q, K)
    torch.testing.assert_close(a, a.mT)
    assert (torch.linalg.eigvalsh(a) > 0).all()
    query = drawn(7, Q, 3)
    there = (query @ torch.linalg.inv(a)) @ (CENTRED @ a.mT).mT
    torch.testing.assert_close(there, query @ CENTRED.mT)


def test_make_gauge_does_to_the_moments_what_each_is_named_for():
    eye = torch.eye(D, dtype=torch.float64).expand(H, D, D)
    torch.testing.assert_close(after("identity"), (Q, K))
    torch.testing.assert_close(after("query_root")[0], eye)
    quarter = make_gauge("query_quarter", Q, K)
    torch.testing.assert_close(quarter @ quarter @ quarter @ quarter, Q)
    queries, keys = (m.diagonal(dim1=-2, dim2=-1) for m in after("diagonal"))
    torch.testing.assert_close(queries, keys)
    queries = after("diagonal_root")[0].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(queries, torch.ones_like(queries))
    queries, keys = after("balanced")
    torch.testing.assert_close(queries, keys)
    assert (after("diagonal")[0] - after("diagonal")[1]).abs().max() > 0.01


def test_geometric_mean_is_the_one_whose_square_carries_keys_to_queries():
    mean = geometric_mean(Q, torch.linalg.inv(K))
    torch.testing.assert_close(mean @ K @ mean, Q)
    torch.testing.assert_close(mean, geometric_mean(torch.linalg.inv(K), Q))  # symmetric in both
    for head in range(H):  # A (A⁻¹ B)^{1/2}
        a, b = Q[head].numpy(), np.linalg.inv(K[head].numpy())
        expected = a @ sqrtm(np.linalg.solve(a, b)).real
        np.testing.assert_allclose(mean[head], expected, rtol=1e-6, atol=1e-8)
    diagonal = (torch.arange(1.0, 5).diag(), torch.full((4,), 4.0).diag())
    torch.testing.assert_close(geometric_mean(*diagonal), (2 * torch.arange(1.0, 5).sqrt()).diag())


def test_isotropic_error_is_least_for_balanced_and_of_diagonal_ones_for_diagonal():
    best = isotropic_error(make_gauge("balanced", Q, K), Q, K)
    for head in range(H):  # the nuclear norm of Σ_q^{1/2} Σ_k^{1/2}, squared
        nuclear = np.linalg.norm(sqrtm(Q[head].numpy()) @ sqrtm(K[head].numpy()), "nuc")
        least = nuclear**2 / (D * np.trace(Q[head].numpy() @ K[head].numpy()))
        assert best[head].item() == pytest.approx(least)
    diagonal = isotropic_error(make_gauge("diagonal", Q, K), Q, K)
    for seed in range(20):
        wild = gaussian(H, D, D, seed=50 + seed)
        assert (isotropic_error(wild, Q, K) > best).all()
        near = torch.eye(D) + 0.05 * wild
        assert (isotropic_error(near @ make_gauge("balanced", Q, K), Q, K) > best).all()
        stretch = (0.3 * wild[..., 0]).exp().diag_embed()
        assert (isotropic_error(stretch @ make_gauge("diagonal", Q, K), Q, K) > diagonal).all()
    others = [isotropic_error(make_gauge(name, Q, K), Q, K) for name in GAUGES]
    assert (torch.stack(others) >= best * (1 - 1e-9)).all()


def test_isotropic_error_is_that_of_random_rotations_in_the_mean():
    keys = drawn(1000, K, 60).float()
    for name in ("identity", "balanced", "query_root"):
        errors = []
        for seed in range(40):
            turn = haar(D, 70 + seed).expand(H, D, D)
            code = GaugeQuantizer(
                Centering("none"), make_gauge(name, Q, K).float(), turn, "unbiased"
            )
            errors.append(score_error(keys, code.reconstruct(keys[None])[0], Q.float()))
        expected = (torch.pi / 2 - 1) * isotropic_error(make_gauge(name, Q, K), Q, K)
        torch.testing.assert_close(
            torch.stack(errors).mean(0).double(), expected, rtol=0.25, atol=0
        )


def test_participation_counts_effective_directions():
    assert participation(torch.eye(8)).item() == pytest.approx(8)
    assert participation(torch.diag(torch.tensor([3.0, 3, 0, 0]))).item() == pytest.approx(2)


def code(name="balanced", rule="unbiased", **changes):
    gauge = make_gauge(name, Q, K).float()
    return GaugeQuantizer(Centering("token_mean", MEAN), gauge, ROTATION, rule, **changes)


@pytest.mark.parametrize("rule", ["mse", "norm", "unbiased"])
@pytest.mark.parametrize("name", GAUGES)
def test_gauge_quantizer_is_a_lattice_that_is_orthonormal_in_its_metric(name, rule):
    """Read back by a search in the metric AᵀA along R A^{−T}: the same, but for an fp16 scale."""
    gauge = make_gauge(name, Q, K)
    basis = ROTATION.double() @ torch.linalg.inv(gauge).mT
    metric = (gauge.mT @ gauge).float()
    lattice = SignQuantizer(basis.float(), Centering("token_mean", MEAN), rule, metric=metric)
    ours = code(name, rule).reconstruct(KEYS[None])
    torch.testing.assert_close(ours, lattice.reconstruct(KEYS[None]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["query_root", "balanced"])
def test_gauge_quantizer_scale_is_the_rules_in_the_gauges_own_metric(name):
    gauge = make_gauge(name, Q, K)
    metric = gauge @ gauge
    for rule in ("mse", "unbiased"):
        read = code(name, rule).reconstruct(KEYS[None])[0].double() - MEAN.unsqueeze(1)
        along = ((read @ metric) * CENTRED).sum(-1)
        other = read if rule == "mse" else CENTRED
        torch.testing.assert_close(along, ((other @ metric) * other).sum(-1), rtol=1e-4, atol=1e-4)


def test_gauge_quantizer_without_a_gauge_is_the_sign_code():
    plain = LevelQuantizer(Centering("token_mean", MEAN), ROTATION, 1, "unbiased")
    torch.testing.assert_close(
        code("identity").reconstruct(KEYS[None]), plain.reconstruct(KEYS[None])
    )


def test_gauge_quantizer_bits_and_bytes_count_a_matrix_once():
    mean = 4 * H * D
    assert code().bits == 1 + 16 / D
    assert code().static_bytes == code(learned=True).static_bytes == H * D * D + mean
    assert code("identity").static_bytes == mean
    assert code("identity", learned=True).static_bytes == H * D * D + mean
    assert code("diagonal").static_bytes == 2 * H * D + mean


def test_score_error_is_plain_distance_in_the_root_of_the_queries():
    root = make_gauge("query_root", Q, K)
    read = code("query_root", "mse").reconstruct(KEYS[None])[0].double() - MEAN.unsqueeze(1)
    error, energy = ((v @ root).square().sum((-2, -1)) for v in (CENTRED - read, CENTRED))
    torch.testing.assert_close(score_error(CENTRED, read, Q), error / energy)
    query = drawn(200_000, Q, 9)[:, :, :, None]
    few, close = CENTRED[:, :4], read[:, :4]
    sampled = (query[..., 0] @ (few - close).mT).square().mean(1)
    torch.testing.assert_close(
        sampled, (((few - close) @ Q) * (few - close)).sum(-1), rtol=0.03, atol=0
    )


@pytest.mark.parametrize("rule", ["mse", "unbiased"])
def test_score_slope_is_that_of_finite_differences(rule):
    """Of 40 keys no sign changes on so short a way."""
    keys, rotation = CENTRED[:, :40], ROTATION.double()
    turn = gaussian(H, D, D, seed=4)
    turn = (turn - turn.mT) / 10
    slope = (score_slope(keys, Q, rotation, rule) * turn).sum((-2, -1))
    ends = []
    for t in (-1e-6, 1e-6):
        turned = torch.linalg.matrix_exp(t * turn) @ rotation
        assert torch.equal(keys @ turned.mT >= 0, keys @ rotation.mT >= 0)
        ends.append(score_error(keys, sign_reconstruct(keys, turned, rule), Q))
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_score_slope_is_that_of_many_keys_whose_signs_flip_only_with_a_reach():
    """Away from M = 1 a sign that flips is a jump of the error; here they turn the slope around."""
    keys, metric, rotation = drawn(60_000, K, 30)[1:], Q[1:], ROTATION[1:].double()
    turn = gaussian(H, D, D, seed=6)[1:]
    turn = (turn - turn.mT) / 10
    low, high = (
        score_error(
            keys,
            sign_reconstruct(keys, torch.linalg.matrix_exp(t * turn) @ rotation, "mse"),
            metric,
        )
        for t in (-0.03, 0.03)
    )
    real = ((high - low) / 0.06).item()
    plain, reaching = (
        (score_slope(keys, metric, rotation, "mse", reach) * turn).sum().item()
        for reach in (0.0, 0.1)
    )
    assert reaching == pytest.approx(real, rel=0.2)
    assert plain * real < 0


def test_learn_score_rotation_errs_less_in_the_scores_and_on_other_keys():
    keys, other = drawn(4000, K, 31).float(), drawn(4000, K, 32).float()
    metric, starts = Q.float(), [ROTATION, srht(D, 0).expand(H, D, D)]

    def error(rotation, on=keys):
        return score_error(on, sign_reconstruct(on, rotation, "unbiased"), metric)

    found = learn_score_rotation(keys, metric, starts, DESCENT)
    assert max(orthogonality_defect(each) for each in found) < 1e-5
    for start in starts:
        assert (error(found) < 0.9 * error(start)).all()
        assert (error(found, other) < 0.92 * error(start, other)).all()
    alone = [error(learn_score_rotation(keys, metric, [start], DESCENT)) for start in starts]
    torch.testing.assert_close(error(found), torch.minimum(*alone), rtol=1e-4, atol=0)
    bad = DescentConfig(steps=3, batch=64, angle=(2.0, 2.0))  # wild steps never make it worse
    assert (error(learn_score_rotation(keys, metric, [found], bad)) <= error(found) + 1e-6).all()


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_weighted_itq_raises_its_own_objective(power):
    lengths = gaussian(H, 4000, 1, seed=40).exp()
    keys = (gaussian(H, 4000, D, seed=41).pow(3) * lengths).float()

    def objective(rotation):
        weight = keys.norm(dim=-1).pow(power)
        return (weight * cosine(keys @ rotation.mT)).sum(-1) / weight.sum(-1)

    values = [objective(weighted_itq(keys, ROTATION, power, rounds)) for rounds in (1, 4, 16, 100)]
    assert (values[-1] > objective(ROTATION) + 0.01).all()
    for before, later in zip([objective(ROTATION), *values], values):
        assert (later >= before - 1e-6).all()
    assert max(orthogonality_defect(each) for each in weighted_itq(keys, ROTATION, power)) < 1e-5
    rivals = [weighted_itq(keys, weighted_itq(keys, ROTATION, power), p) for p in (0.0, 1.0, 2.0)]
    best = torch.stack([objective(rival) for rival in rivals]).max(0).values
    torch.testing.assert_close(best, values[-1], atol=3e-3, rtol=0)


def test_gauge_functions_name_their_faults():
    with pytest.raises(InputError, match="unknown gauge 'cholesky': choose one of identity"):
        make_gauge("cholesky", Q, K)
    with pytest.raises(InputError, match="not positive definite"):
        make_gauge("query_root", Q - 5 * torch.eye(D), K)
    with pytest.raises(InputError, match="give both as"):
        make_gauge("balanced", Q, K[:1])
    with pytest.raises(InputError, match="without an inverse"):
        GaugeQuantizer(Centering("none"), torch.zeros(H, D, D), ROTATION)
    with pytest.raises(InputError, match="expected both"):
        GaugeQuantizer(Centering("none"), torch.eye(D), ROTATION)
    with pytest.raises(InputError, match="unknown scale rule"):
        code(rule="best")
    with pytest.raises(InputError, match="one start or more"):
        learn_score_rotation(KEYS, Q.float(), [])
    with pytest.raises(InputError, match="rounds=0"):
        weighted_itq(KEYS, ROTATION, 1.0, 0)
    for wrong in ({"steps": 0}, {"angle": (0.1, 0.2)}, {"momentum": 1.0}, {"reach": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            DescentConfig(**wrong)
