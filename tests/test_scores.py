from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import cosine
from signlattice.errors import InputError
from signlattice.models.hooks import score_scaling
from signlattice.models.loading import load_model
from signlattice.models.passages import Passage
from signlattice.models.quantized_attention import quantized_attention
from signlattice.models.states import LayerStates, read_states
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar, srht
from signlattice_paper.experiments import scores
from signlattice_paper.experiments.scores import (
    ScoresConfig,
    check_plain_attention,
    log_weights,
    signed_codes,
    with_absorbed_rotations,
)

IDS = torch.arange(1, 61) * 7 % 290
CONFIG = ScoresConfig(calibration_passages=2, passages=2, first_query=8, value_bits=(1, 2))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["olmoe_folder", "llama_folder"])
def loaded(request):
    """Four key heads, and two for four queries."""
    return load_model(request.getfixturevalue(request.param))


def states_on(loaded):
    return read_states(loaded, [Passage("a.py", IDS, 100)])


def heads_of(loaded, layer=0):
    return len(states_on(loaded)[layer].keys)


def outputs(loaded, layer=0):
    """What enters the output projection of a layer, [Hq, T, D]."""
    captured = {}
    module = scores._value_layers(loaded.model)[layer]
    hook = module.o_proj.register_forward_pre_hook(lambda _, args: captured.update(x=args[0][0]))
    try:
        with torch.no_grad():
            loaded.model(IDS[None], use_cache=False)
    finally:
        hook.remove()
    d = loaded.head_dim
    return captured["x"].unflatten(-1, (-1, d)).transpose(0, 1)


def attended(query, key, value, scaling):
    """Attention by hand: queries [H, G, T, D], keys and values [H, T, D] to [Hq, T, D]."""
    weights = scores._causal(query @ key.unsqueeze(1).mT * scaling).exp()
    return (weights @ value.unsqueeze(1)).flatten(0, 1)


def test_log_weights_are_those_that_attention_computes_with(loaded):
    for layer, states in states_on(loaded).items():
        weights = log_weights(states, score_scaling(loaded.model)[layer]).exp()
        by_hand = (weights @ states.values.unsqueeze(1)).flatten(0, 1)
        torch.testing.assert_close(by_hand, outputs(loaded, layer), atol=1e-4, rtol=1e-4)


def test_check_plain_attention_refuses_windows_and_shared_keys(loaded, gemma):
    check_plain_attention(loaded)
    with pytest.raises(InputError, match="layer 0 of .* has a window, a soft-cap, sinks"):
        check_plain_attention(gemma)


@pytest.mark.parametrize("side", scores.SIDES)
def test_signed_codes_sign_what_they_say(loaded, side):
    heads, d = heads_of(loaded), loaded.head_dim
    rotation = torch.stack([haar(d, i) for i in range(heads)])
    mean = 0.3 * gaussian(heads, d, seed=5)
    states = states_on(loaded)[0]
    keys, queries = signed_codes({0: rotation, 1: rotation}, {0: mean, 1: mean}, side)
    with quantized_attention(loaded.model, keys, queries=queries):
        signed = outputs(loaded)
    query = states.grouped_queries @ rotation.unsqueeze(1).mT
    key = (states.keys - mean.unsqueeze(1)) @ rotation.mT
    if side != "keys":
        query = scores._signed(query)
    if side != "queries":
        key = scores._signed(key)
    by_hand = attended(query, key, states.values, score_scaling(loaded.model)[0])
    torch.testing.assert_close(signed, by_hand, atol=1e-4, rtol=1e-4)


def test_signed_codes_refuse_an_unknown_side():
    with pytest.raises(InputError, match="unknown side 'values': choose one of keys, queries"):
        signed_codes({}, {}, "values")


def states_of(query, key):
    return LayerStates(key, torch.zeros_like(key), {0: query})


def sides(query, key, mean, rotation, scaling=0.1):
    return scores._signed_sides(states_of(query, key), mean, rotation, scaling, CONFIG)


def test_signed_sides_of_isotropic_vectors_correlate_as_the_cosines_say():
    """K signed: c. Q signed: sqrt(2/pi). Both: their product."""
    d, n = 64, 400
    keys = torch.stack([gaussian(n, d, seed=1), gaussian(n, d, seed=2).sign()])
    keys[1] += 0.4 * gaussian(n, d, seed=3)
    query = gaussian(2, n, d, seed=4)
    found = sides(query, keys, torch.zeros(2, d), torch.eye(d).expand(2, d, d))
    c_key = cosine(keys).mean(1)
    assert c_key[1] > 0.9 > 0.81 > c_key[0]
    for side, law in (("keys", c_key), ("both", c_key * math.sqrt(2 / math.pi))):
        torch.testing.assert_close(found[side][0], law, atol=0.02, rtol=0)
    torch.testing.assert_close(found["queries"][0], torch.full((2,), 0.798), atol=0.02, rtol=0)
    for side in scores.SIDES:
        torch.testing.assert_close(found[side][0], found[side][2], atol=0.02, rtol=0)
    assert (found["both"][1] > found["keys"][1]).all()


def test_signed_sides_of_keys_on_the_lattice_lose_nothing_whatever_their_mean():
    d, n = 32, 100
    rotation, mean = haar(d, 0)[None], 3 * gaussian(1, d, seed=2)
    lattice = gaussian(1, n, d, seed=1).sign() @ rotation
    query = gaussian(1, n, d, seed=3)
    found = sides(query, lattice + mean.unsqueeze(1), mean, rotation)["keys"][:, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1.0]), atol=1e-4, rtol=0)
    uncentred = sides(query, lattice + mean.unsqueeze(1), torch.zeros(1, d), rotation)["keys"]
    assert uncentred[0, 0] < 0.9


def test_correlation_is_of_the_keys_that_a_query_sees():
    a, b = gaussian(6, 6, seed=0), gaussian(6, 6, seed=1)
    expected = torch.corrcoef(torch.stack([a[4, :5], b[4, :5]]))[0, 1]
    changed = b + 100 * torch.ones(6, 6).triu(1)
    torch.testing.assert_close(scores._correlation(a, changed)[4], expected)


def test_effective_directions_of_scores_are_those_that_keys_and_queries_share():
    n, d = 4000, 16
    flat = states_of(gaussian(2, n, d, seed=1), gaussian(2, n, d, seed=2))
    assert scores.effective_directions(flat) == pytest.approx((d, d, d), rel=0.05)
    wide = torch.tensor([1.0] * 8 + [0.0] * 8)
    overlap = torch.tensor([0.0] * 6 + [1.0] * 8 + [0.0] * 2)
    turn = haar(d, 3)
    query, key = gaussian(2, n, d, seed=1) * wide, gaussian(2, n, d, seed=2) * overlap
    apart = states_of(query @ turn, key @ turn)
    assert scores.effective_directions(apart) == pytest.approx((8, 8, 2), rel=0.05)


def test_weights_kl_is_zero_for_equal_weights_alone():
    a, b = (scores._causal(gaussian(9, 9, seed=s)) for s in (0, 1))
    torch.testing.assert_close(scores.weights_kl(a, a), torch.zeros(9))
    kl = scores.weights_kl(a, b)
    assert kl[0] == pytest.approx(0) and (kl[1:] > 0).all()
    row = torch.nn.functional.kl_div(b[5, :6], a[5, :6], log_target=True, reduction="sum")
    torch.testing.assert_close(kl[5], row)


def test_with_absorbed_rotations_rotates_values_and_changes_no_output(loaded):
    heads, d = heads_of(loaded), loaded.head_dim
    rotation = torch.stack([haar(d, i) for i in range(heads)])
    before = states_on(loaded)[0].values
    with torch.no_grad():
        exact = loaded.model(IDS[None]).logits
        rotated = with_absorbed_rotations(loaded.model, {0: rotation, 1: rotation})
        torch.testing.assert_close(rotated(IDS[None]).logits, exact, atol=1e-4, rtol=1e-4)
        wrong = with_absorbed_rotations(loaded.model, {0: 1.1 * rotation})
        assert not torch.allclose(wrong(IDS[None]).logits, exact, atol=1e-2)
    cached, own = (
        scores._value_layers(model)[0].v_proj.weight.unflatten(0, (heads, d))
        for model in (rotated, loaded.model)
    )
    torch.testing.assert_close(cached, rotation @ own)
    torch.testing.assert_close(states_on(loaded)[0].values, before)


def output_row(values, weights, rule="unbiased", bits=1):
    """The row of one head with mean zero, turned by an SRHT."""
    code = LevelQuantizer(Centering("none"), srht(values.shape[-1], 0)[None], bits, rule)
    energies = scores._output_energies(values[None], code, weights[None, None])
    return scores._output_row(0, 0, bits, rule, energies[:, 0].tolist())


@pytest.mark.parametrize("rule", ["mse", "unbiased"])
def test_output_energies_of_independent_values_average_by_the_effective_keys(rule):
    n, d = 1200, 64
    weights = torch.softmax(1.5 * gaussian(300, n, seed=1), -1)
    row = output_row(gaussian(n, d, seed=2), weights, rule)
    assert row["effective_keys"] == pytest.approx(n * math.exp(-(1.5**2)), rel=0.3)
    assert row["measured"] == pytest.approx(row["predicted"], rel=0.15)
    assert row["measured"] < row["value_error"] / 50
    # the output of independent values shrinks as much, so that relative to it nothing averages
    assert row["relative"] == pytest.approx(row["value_error"], rel=0.15)


def test_output_energies_of_one_effective_key_keep_the_error_of_a_value():
    row = output_row(gaussian(200, 64), torch.eye(200), "mse")
    assert row["effective_keys"] == pytest.approx(1)
    assert row["predicted"] == pytest.approx(row["value_error"], rel=1e-4)
    assert row["measured"] == pytest.approx(row["value_error"], rel=1e-4)


def test_output_energies_of_like_values_do_not_average():
    alike = gaussian(1, 64, seed=3) + 0.1 * gaussian(400, 64, seed=4)
    row = output_row(alike, torch.full((1, 400), 1 / 400))
    assert row["measured"] > 20 * row["predicted"]


def test_score_rows_cover_every_head_rotation_and_side(olmoe):
    pieces = [Passage(f"{i}.py", IDS + i, 100) for i in range(2)]
    layer = SignQuantizer(torch.stack([srht(16, i) for i in range(4)]), Centering("none"))
    codec = KeyCodec({0: layer, 1: layer}, olmoe.weights_hash)
    with pytest.warns(UserWarning, match="per dimension"):  # few keys: nothing is learned from here
        calibrated = scores.calibrate(olmoe, pieces, codec, CONFIG)
    heads, means = scores.score_rows(olmoe, calibrated, pieces, CONFIG)
    assert len(heads) == 5 * 3 * 2 * 4 and len(means) == 5 * 3
    for row in means:
        chosen = [r for r in heads if (r["rotation"], r["side"]) == (row["rotation"], row["side"])]
        for key in ("correlation", "attention_kl", "predicted"):
            assert row[key] == pytest.approx(sum(r[key] for r in chosen) / 8, rel=1e-4)
    outputs = scores.output_rows(olmoe, calibrated, pieces, CONFIG)
    assert len(outputs) == 2 * 4 * 2 * 2
    torch.testing.assert_close(calibrated.rotations["learned_keys"][0], layer.basis)


def test_whole_passages_are_full_and_of_different_documents():
    pieces = [Passage(f"{i // 2}.py", torch.zeros(64 if i % 3 else 9), 1) for i in range(12)]
    chosen = scores.whole_passages(pieces, 64, 4)
    assert len({piece.document for piece in chosen}) == 4
    assert all(len(piece.ids) == 64 for piece in chosen)
    with pytest.raises(InputError, match="7 passages of 64 tokens: the text has 6"):
        scores.whole_passages(pieces, 64, 7)


@pytest.mark.parametrize(
    "wrong", [{"passages": 0}, {"value_bits": ()}, {"perplexity_rotations": ("haar",)}]
)
def test_scores_config_refuses_wrong_settings_in_one_line(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))) as told:
        ScoresConfig(**wrong)
    assert "\n" not in str(told.value)
