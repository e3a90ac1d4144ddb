"""A second bit for keys: that its codes are what they say, and what the lab tells of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import documents
from signlattice.bits import sign
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.quantizers.basis import LatticeConfig, learn_basis, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.residual import BasisQuantizer, ResidualQuantizer, least_squares
from signlattice.quantizers.scales import token_scale
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar
from signlattice_paper.experiments import comparison
from signlattice_paper.experiments import second as second_code
from signlattice_paper.experiments.comparison import ComparisonConfig
from signlattice_paper.experiments.convergence import code_errors
from signlattice_paper.experiments.second import SecondConfig, SecondLab
from signlattice_paper.figures.second_code import fig_second

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16
CONFIG = SecondConfig(
    annealed=(1, 2),
    gradient=60,
    rounds=(24,),
    more_keys=2,
    window=8,
    sinks=2,
    comparison=ComparisonConfig(n_fit=400, n_passages=2, n_heads_on=1, first_query=4),
)


TEXT = Text("tiny", "none", documents("calibration"), documents("evaluation"))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turns(seed, n_heads=2, d=D):
    return torch.stack([haar(d, seed + head) for head in range(n_heads)])


VECTORS = gaussian(1, 2, 400, D) * torch.linspace(2, 0.3, D)
FIRST, SECOND = turns(1), turns(50)


def energy_left(code, vectors=VECTORS):
    rest = code.reconstruct(vectors) - vectors
    return (rest.square().sum(-1) / vectors.square().sum(-1)).mean().item()


def test_residual_quantizer_of_one_rotation_twice_is_the_second_code_of_planted_keys():
    """With scales of least error it leaves what `convergence.code_errors` says."""
    code = ResidualQuantizer(Centering("none"), FIRST, FIRST, "mse")
    for head in range(2):
        _, two = code_errors(VECTORS[0, head] @ FIRST[head].mT)
        alone = ResidualQuantizer(Centering("none"), FIRST[head][None], FIRST[head][None], "mse")
        # one gain for both scales can only take more off than none
        assert two - 0.01 < energy_left(alone, VECTORS[:, head, None]) < two + 1e-3
    assert energy_left(code) < 0.5 * (1 - 2 / torch.pi)


@pytest.mark.parametrize("second", [FIRST, SECOND])
@pytest.mark.parametrize("two_scales", [False, True])
def test_residual_quantizer_keeps_what_each_rule_says(second, two_scales):
    mean = gaussian(2, D, seed=3)
    centering, keys = Centering("token_mean", mean), VECTORS + mean[:, None]
    read = {
        rule: ResidualQuantizer(centering, FIRST, second, rule, two_scales=two_scales).reconstruct(
            keys
        )
        - mean[:, None]
        for rule in ("mse", "norm", "unbiased")
    }
    x = VECTORS
    torch.testing.assert_close(
        (read["unbiased"] * x).sum(-1), x.square().sum(-1), rtol=2e-3, atol=1e-3
    )
    torch.testing.assert_close(read["norm"].norm(dim=-1), x.norm(dim=-1), rtol=2e-3, atol=1e-3)
    rest = x - read["mse"]
    assert ((rest * read["mse"]).sum(-1).abs() < 2e-3 * x.square().sum(-1)).all()


def test_residual_quantizer_of_two_scales_together_leaves_the_least():
    """By hand: normal equations of every token; and never more than one gain for both."""
    y1, p1 = VECTORS @ FIRST.mT, sign(VECTORS @ FIRST.mT) @ FIRST
    rest = VECTORS - token_scale(y1, "mse")[..., None] * p1
    p2 = sign(rest @ SECOND.mT) @ SECOND
    basis = torch.stack([p1, p2], -1)
    found = torch.linalg.lstsq(basis.double(), VECTORS.double()[..., None]).solution[..., 0]
    for mine, theirs in zip(least_squares(VECTORS, p1, p2), found.unbind(-1)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    expected = (basis.double() @ found[..., None])[..., 0]
    code = ResidualQuantizer(Centering("none"), FIRST, SECOND, "mse", two_scales=True)
    torch.testing.assert_close(code.reconstruct(VECTORS).double(), expected, rtol=5e-3, atol=5e-3)
    assert energy_left(code) < energy_left(
        ResidualQuantizer(Centering("none"), FIRST, SECOND, "mse")
    )
    one = least_squares(VECTORS, p1, -2 * p1)  # a second direction that is none
    torch.testing.assert_close(one[0], token_scale(y1, "mse"))
    assert (one[1] == 0).all()


def test_residual_quantizer_second_code_is_of_what_the_first_leaves():
    """Learned on a residual that is one lattice exactly, it leaves nothing."""
    points = 2 * sign(gaussian(1, 2, 100, D)) @ FIRST
    small = 0.3 * sign(gaussian(1, 2, 100, D, seed=1)) @ SECOND
    first = ResidualQuantizer(Centering("none"), FIRST, SECOND, "mse", two_scales=True)
    keep = (sign((points + small) @ FIRST.mT) == sign(points @ FIRST.mT)).all(-1)
    assert energy_left(first, points) < 1e-5
    left = first.residual(points + small)
    y = (points + small) @ FIRST.mT
    torch.testing.assert_close(
        left, points + small - y.abs().mean(-1, keepdim=True) * sign(y) @ FIRST
    )
    rest = (first.reconstruct(points + small) - points - small).square().sum(-1)
    assert (rest[keep] < 0.5 * small.square().sum(-1)[keep]).float().mean() > 0.9


def test_residual_quantizer_and_basis_quantizer_count_bits_and_bytes():
    static = Centering("token_mean", torch.zeros(2, D))
    code = ResidualQuantizer(static, FIRST, SECOND, n_learned=2)
    assert code.bits == 2 + 32 / D
    assert code.static_bytes == 2 * 2 * D * D + 4 * 2 * D
    assert ResidualQuantizer(Centering("dc"), FIRST, SECOND).bits == 2 + 48 / D
    lattice = BasisQuantizer(static, torch.zeros(2, 2 * D, D), torch.eye(D).repeat(2, 1, 1))
    assert lattice.bits == 2 + 16 / D
    assert lattice.static_bytes == 2 * 3 * D * D + 4 * 2 * D


@pytest.mark.parametrize("rule", ["mse", "norm", "unbiased"])
def test_basis_quantizer_of_d_vectors_is_the_layer_codec(rule):
    metric = query_metric([gaussian(2, 300, D, seed=2)], 2, LatticeConfig()).float()
    basis = learn_basis(VECTORS[0], metric, LatticeConfig(rounds=3))
    centering = Centering("token_mean", gaussian(2, D, seed=3))
    ours = BasisQuantizer(centering, basis, metric, rule)
    other = SignQuantizer(basis, centering, rule, metric=metric)
    torch.testing.assert_close(ours.reconstruct(VECTORS), other.reconstruct(VECTORS))
    assert (ours.bits, ours.static_bytes) == (other.bits, other.static_bytes)


@pytest.mark.parametrize(("spread", "most"), [(1.0, 1.15), (0.1, 0.6)])
def test_basis_quantizer_of_twice_the_vectors_leaves_less_of_unequal_directions(spread, most):
    """Of noise that is the same in all directions a lattice is nearly as good as two codes."""
    widths = spread ** torch.linspace(0, 1, D)
    keys, held_out = (gaussian(2, 2048, D, seed=seed) * widths @ FIRST for seed in (0, 1))
    eye = torch.eye(D).repeat(2, 1, 1)
    lost = []
    for n in (1, 2):
        basis = learn_basis(keys, eye, LatticeConfig(), vectors_per_dim=n)
        assert basis.shape == (2, n * D, D)
        lost.append(
            energy_left(BasisQuantizer(Centering("none"), basis, eye, "mse"), held_out[None])
        )
    two = ResidualQuantizer(Centering("none"), FIRST, SECOND, "mse", two_scales=True)
    assert lost[1] < 0.6 * lost[0]
    assert lost[1] < most * energy_left(two, held_out[None])


def test_learn_basis_of_one_vector_to_a_dimension_is_the_lattice_as_it_was():
    metric = query_metric([gaussian(2, 300, D, seed=2)], 2, LatticeConfig())
    config = LatticeConfig(rounds=3)
    plain = learn_basis(VECTORS[0], metric, config)
    assert torch.equal(plain, learn_basis(VECTORS[0], metric, config, vectors_per_dim=1))
    with pytest.raises(InputError, match="vectors_per_dim=0: use 1 or more"):
        learn_basis(VECTORS[0], metric, config, vectors_per_dim=0)
    with pytest.raises(InputError, match="20 keys of 16 coordinates: give 32 or more"):
        learn_basis(VECTORS[0, :, :20], metric, config, vectors_per_dim=2)


def test_residual_quantizer_basis_quantizer_and_config_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="give two alike"):
        ResidualQuantizer(Centering("none"), FIRST, turns(0, 1))
    with pytest.raises(InputError, match="unknown scale rule 'best'"):
        ResidualQuantizer(Centering("none"), FIRST, SECOND, first_rule="best")
    with pytest.raises(InputError, match="metric of shape"):
        BasisQuantizer(Centering("none"), FIRST, torch.eye(D))
    for change in ({"gradient": 0}, {"more_keys": 1}, {"annealed": (4,)}, {"rounds": (6,)}):
        (name,) = change
        with pytest.raises(InputError, match=f"{name}="):
            SecondConfig(**change)


def test_second_lab_measures_every_case_once_and_goes_on_where_it_was(gemma, tmp_path, monkeypatch):
    tables = SecondLab(gemma, TEXT, CONFIG, tmp_path).run()
    wanted = second_code.cases(CONFIG)
    assert len(set(wanted)) == len(wanted) == len(tables["rows"])
    assert len(tables["windowed"]) == sum(case.windowed for case in wanted)
    for name, rows in tables.items():
        assert len({tuple(row) for row in rows}) == 1, name
    for row in tables["rows"]:
        trained = row["solver"] != "none" or row["second"] == "learned"
        assert (row["seconds"] > 0) == trained and row["score_error"] > 0
    two = [row for row in tables["rows"] if row["code"] == "residual"]
    assert {row["bits"] for row in two} == {2 + 32 / 32}  # heads of 32
    by_steps = [r for r in tables["rows"] if r["solver"] == "gradient"]
    assert [row["steps"] for row in by_steps] == [50, 60]
    assert by_steps[0]["seconds"] < by_steps[1]["seconds"]
    levels = {
        r["levels"]: r["score_error"]
        for r in tables["rows"]
        if r["solver"] == "none" and r["code"] in ("signs", "levels") and r["rule"] == "unbiased"
    }
    assert levels[2] < 0.7 * levels[1]
    (drawn,) = fig_second(SimpleNamespace(table=tables.get)).axes
    found = {bar.get_label(): len(bar[0].get_ydata()) for bar in drawn.containers}
    assert found["signs, annealed"] == 2 and found["signs, gradient (paper)"] == 2
    assert found["signs of the residual"] == 12 and found["four levels"] == 2
    monkeypatch.setattr(
        "signlattice_paper.experiments.comparison.token_losses", lambda *args, **kw: 1 / 0
    )
    monkeypatch.setattr("signlattice_paper.experiments.second.learn_matrices", lambda *args: 1 / 0)
    monkeypatch.setattr(comparison.Comparison, "exact_row", lambda self: {"perplexity": 1.0})
    again = SecondLab(gemma, TEXT, CONFIG, tmp_path).run()
    assert again["rows"] == tables["rows"] and again["windowed"] == tables["windowed"]


def test_verdict_is_of_gaps_that_are_alike():
    def row(gap, **other):
        common = {
            "code": "signs",
            "levels": 1,
            "solver": "annealed",
            "effort": 1,
            "second": "",
            "more_keys": 1,
            "rule": "unbiased",
            "value_levels": None,
        }
        return common | other | {"gap": gap}

    rows = [
        row(10.0),
        row(9.0, effort=16),
        row(8.0, more_keys=4),
        row(2.0, rule="mse"),
        row(15.0, solver="gradient", effort=2000),
        row(20.0, solver="none"),
        row(3.0, code="residual", levels=2, solver="none", second="same"),
        row(2.5, code="residual", levels=2, solver="none", second="learned"),
        row(1.0, code="residual", levels=2),
        row(1.5, code="levels", levels=2),
        row(0.1, code="levels", levels=3, value_levels=2),
        row(4.0, code="lattice", solver="lattice"),
        row(0.5, code="lattice", levels=2),
        row(4.2, code="lattice", value_levels=4),
        row(0.9, code="lattice", value_levels=3),
    ]
    found = second_code.verdict(rows)
    assert found["base"] == 10 and found["training"] == 8 and found["untrained_second"] == 3
    assert found["training_closed"] == pytest.approx(0.2)
    assert found["second_closed"] == pytest.approx(0.9)
    assert (found["levels"], found["lattice"], found["lattice_2"]) == (1.5, 4, 0.5)
    assert [found[f"values_{n}"] for n in ("four", "three", "two")] == [4.2, 0.9, 0.1]
