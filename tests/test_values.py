"""What values need: that each table holds what it says, by another way to the same number."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from conftest import documents
from signlattice.alignment import beta
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.io import Scratch
from signlattice.models.loading import load_model
from signlattice.models.passages import spread
from signlattice.models.quantized_attention import quantized_attention
from signlattice.models.states import compressible_layers, read_states
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.fixed import haar
from signlattice_paper.experiments import comparison, values
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig
from signlattice_paper.experiments.scores import with_absorbed_rotations
from signlattice_paper.experiments.values import (
    SideCase,
    ValuesConfig,
    ValuesLab,
    best,
    learned_rotations,
    needed_bits,
)
from signlattice_paper.figures import values as figures

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ValuesConfig(
    bits=(1, 4),
    rotations=("srht", "learned"),
    centerings=("token_mean",),
    rules=("mse", "unbiased"),
    pairs=((1, 4),),
    layer_bits=(1,),
    head_bits=(1,),
    comparison=ComparisonConfig(100, 3, 2, first_query=4),
)


TEXT = Text("tiny", "none", documents("calibration"), documents("evaluation"))


def picked(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert found, wanted
    return found


def sign_codec(loaded, seed=0):
    """One-bit keys that need not be learned."""
    layers = {
        index: SignQuantizer(
            torch.stack([haar(layer.head_dim, seed + head) for head in range(layer.n_heads)]),
            Centering("none"),
        )
        for index, layer in compressible_layers(loaded).items()
    }
    return KeyCodec(layers, loaded.weights_hash)


@pytest.fixture(scope="module", params=["llama_folder", "gemma_folder"])
def lab(request, tmp_path_factory):
    """Grouped queries in two layers, and a layer whose keys and values another one reads."""
    place = tmp_path_factory.mktemp("lab")
    folder = shutil.copytree(request.getfixturevalue(request.param), place / "model")
    loaded = load_model(folder)
    sign_codec(loaded).save(folder / "lattice.safetensors")
    return SimpleNamespace(loaded=loaded, tables=ValuesLab(loaded, TEXT, CONFIG, place).run())


def test_values_lab_tables_are_all_flat(lab):
    for name, rows in lab.tables.items():
        assert len({tuple(row) for row in rows}) == 1, name
        kinds = {type(value) for row in rows for value in row.values()}
        assert kinds <= {str, int, float, bool, type(None)}, name


def test_values_lab_bits_count_the_scale_and_what_is_whole(lab):
    d = next(iter(lab.tables["rows"]))["value_bits"] - 1
    assert d in (16 / 16, 16 / 32)
    for row in lab.tables["rows"]:
        assert row["value_bits"] == row["bits"] + d
        assert row["key_bits"] == (16 if row["k"] == "exact" else 1 + d)
        assert row["learned"] == (row["rotation"] == "learned")
    alone = picked(lab.tables["sides"], side="keys", k=4)[0]
    assert (alone["key_bits"], alone["value_bits"]) == (4 + d, 16)


def test_values_lab_added_gap_is_over_the_model_with_coded_keys(lab):
    """Perplexities: both over exact is both over keys alone, times keys alone over exact."""
    rows, sides = lab.tables["rows"], lab.tables["sides"]
    keys = picked(sides, code="lattice", side="keys")[0]["gap"]
    assert len(lab.tables["added"]) == len(CONFIG.bits) * len(CONFIG.rotations)
    for added in lab.tables["added"]:
        names = ("bits", "rotation", "centering", "rule")
        both = picked(rows, k="one bit", **{name: added[name] for name in names})[0]
        assert both == best(rows, added["bits"], "one bit", rotation=added["rotation"])
        expected = (1 + keys / 100) * (1 + added["gap"] / 100)
        assert 1 + both["gap"] / 100 == pytest.approx(expected, rel=1e-5)
    assert abs(keys) > 0.1


def test_values_lab_values_alone_are_the_rows_with_exact_keys_and_sides_differ(lab):
    for case in picked(lab.tables["sides"], side="values"):
        row = picked(
            lab.tables["rows"],
            k="exact",
            rotation="srht",
            centering="token_mean",
            bits=case["v"],
            rule=case["rule"],
        )[0]
        assert case["gap"] == row["gap"]
    one = [
        picked(lab.tables["sides"], side=side, code="levels", rule="mse")[0]["kl"]
        for side in ("keys", "values", "both")
    ]
    assert len(set(one)) == 3 and min(one) > 0


def test_values_lab_one_layer_alone_is_the_code_of_that_layer(lab, tmp_path):
    comparison = Comparison(lab.loaded, TEXT, CONFIG.comparison, Scratch(tmp_path))
    layer = max(comparison.layers)
    states = comparison.fit[layer].values
    turn = rotate_heads(states, "srht", 0)
    code = LevelQuantizer(Centering.fit(states, "token_mean"), turn, 1, "unbiased")
    expected = comparison.row("own", values={layer: code})
    row = picked(lab.tables["layers"], layer=layer, bits=1, rule="unbiased")[0]
    assert row["gap"] == pytest.approx(expected["gap"], rel=1e-4)


def test_values_lab_outputs_are_the_errors_of_one_side(lab, tmp_path):
    comparison = Comparison(lab.loaded, TEXT, CONFIG.comparison, Scratch(tmp_path))
    codes = {}
    for layer, states in comparison.fit.items():
        turn = rotate_heads(states.keys, "srht", 0)
        codes[layer] = LevelQuantizer(Centering.fit(states.keys, "token_mean"), turn, 4, "mse")
    heads = comparison.heads(codes)
    for row in picked(lab.tables["outputs"], code="levels", bits=4, rule="mse"):
        errors = [head["output_error"] for head in heads if head["layer"] == row["layer"]]
        assert row["keys"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        coarse = picked(lab.tables["outputs"], bits=1, rule="mse", layer=row["layer"])[0]
        assert coarse["values"] > 4 * row["values"] > 0


def test_values_lab_heads_hold_beta_and_the_keys_that_attention_uses(lab, tmp_path):
    """β by its own definition, effective keys by the weights that transformers returns."""
    comparison = Comparison(lab.loaded, TEXT, CONFIG.comparison, Scratch(tmp_path))
    pieces = spread(comparison.exact.pieces, 2)
    rows = picked(lab.tables["heads"], rotation="srht", centering="token_mean")
    held_out = read_states(lab.loaded, pieces)
    model = lab.loaded.model
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.stack([piece.ids for piece in pieces])
        weights = model(ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(former)
    for row in rows:
        source, head = row["source"], row["head"]
        fit = comparison.fit[source].values
        centred = held_out[source].values[head] - fit[head].mean(0)
        turned = centred @ rotate_heads(fit, "srht", 0)[head].T
        assert row["cosine"] == pytest.approx(beta(turned), abs=1e-5)
        own = weights[row["layer"]].unflatten(1, (len(fit), -1))[:, head, :, 4:]
        used = 1 / own.square().sum(-1).mean()
        assert row["effective_keys"] == pytest.approx(used.item(), rel=1e-4)


@pytest.mark.parametrize(("bits", "rule"), [(1, "unbiased"), (2, "mse"), (3, "norm")])
def test_with_absorbed_rotations_is_the_rotation_where_values_are_read(llama, bits, rule):
    """Two KV heads, each read by two query heads, each with a rotation that was learned."""
    states = Comparison(llama, TEXT, CONFIG.comparison, None).fit
    mean = {layer: Centering.fit(s.values, "token_mean") for layer, s in states.items()}
    turns = {
        layer: learned_rotations(mean[layer].split(s.values)[0], 0) for layer, s in states.items()
    }
    online = {i: LevelQuantizer(mean[i], turns[i], bits, rule, True) for i in turns}
    eye = torch.eye(16).expand(2, 16, 16)
    turned_mean = {i: torch.einsum("hed,hd->he", turns[i], mean[i].mean) for i in turns}
    absorbed = {
        i: LevelQuantizer(Centering("token_mean", turned_mean[i]), eye, bits, rule) for i in turns
    }
    turned = replace(llama, model=with_absorbed_rotations(llama.model, turns))
    ids = torch.arange(1, 61)[None] * 7 % 290
    found = []
    for loaded, codes in ((llama, online), (turned, absorbed), (llama, absorbed)):
        with torch.no_grad(), quantized_attention(loaded.model, values=codes):
            found.append(loaded.model(ids).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    assert (found[2] - found[0]).abs().max() > 0.1


def test_learned_rotations_are_per_head_of_the_directions_alone():
    """Planted: each head's values are signs in a frame of its own, at norms that differ widely."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(2, 3000, 16, generator=generator).sign()
    frames = torch.stack([haar(16, seed) for seed in (1, 2)])
    planted = signs @ frames * torch.rand(2, 3000, 1, generator=generator).exp2().pow(4)
    found = learned_rotations(planted, 0)
    assert [beta(v @ r.T) for v, r in zip(planted, found)] == pytest.approx([1, 1], abs=1e-3)
    assert beta(planted[0] @ found[1].T) < 0.9


def test_values_lab_takes_a_lattice_beside_the_model_and_not_that_of_another(
    llama_folder, tmp_path, monkeypatch
):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    loaded = load_model(folder)
    monkeypatch.setattr(comparison, "learn_codec", lambda *_: sign_codec(loaded, seed=5))

    def basis(codec):
        codec.save(folder / "lattice.safetensors")
        lab = ValuesLab(loaded, TEXT, CONFIG, tmp_path)
        return lab._codes("keys", "lattice")[0].basis

    own = sign_codec(loaded, seed=9)
    torch.testing.assert_close(basis(own), own.layers[0].basis)
    learned = basis(replace(own, model_hash="another"))
    expected = sign_codec(loaded, seed=5).layers[0].basis  # kept with eight bits to a number
    torch.testing.assert_close(learned, expected, atol=0.01, rtol=0)


def test_value_codes_and_side_cases_cross_everything_that_is_asked_for():
    full = ValuesConfig(rules_of_eight=("mse", "norm", "unbiased"))
    assert len(set(values.value_codes(full))) == 5 * 3 * 3 * 3
    assert len(set(values.value_codes(ValuesConfig()))) == 4 * 27 + 9
    pairs = {(case.k, case.v) for case in values.side_cases(full) if case.code == "levels"}
    equal = {(bits, bits) for bits in full.bits}
    alone = {(bits, None) for bits in full.bits} | {(None, bits) for bits in full.bits}
    assert pairs == equal | alone | {(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 4), (4, 2)}
    assert [SideCase("levels", "mse", *pair).side for pair in ((1, 2), (1, None), (None, 1))] == [
        "both",
        "keys",
        "values",
    ]


def row(bits, gap, high, k="exact", rotation="srht"):
    return {"bits": bits, "gap": gap, "gap_high": high, "k": k, "rotation": rotation}


def test_needed_bits_end_where_the_upper_end_is_small_enough():
    rows = [row(1, 0.5, 3.0), row(2, 1.0, 1.5), row(2, 0.4, 2.5), row(4, 0.1, 0.3, "one bit")]
    assert needed_bits(rows, 2) == 2
    assert needed_bits(rows, 1) == 4
    assert needed_bits(rows, 0.2) is None
    assert best(rows, 2, "exact")["gap"] == 0.4
    with pytest.raises(InputError, match="no row has"):
        best(rows, 2, "exact", rotation="learned")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": (0, 1)}, "bits=.*: use widths of 1 to 8 bits"),
        ({"pairs": ((1, 9),)}, "pairs=.*: use widths"),
        ({"layer_bits": ()}, "layer_bits=.*: use widths"),
        ({"rotations": ("haar",)}, "rotations=.*: choose some of identity, srht, learned"),
        ({"rules_of_eight": ()}, "rules_of_eight=.*: choose some of mse, norm, unbiased"),
    ],
)
def test_values_config_refuses_what_cannot_be_crossed(change, message):
    with pytest.raises(InputError, match=message):
        ValuesConfig(**change)


def test_values_figures_show_the_rows(lab):
    record = SimpleNamespace(
        table=lambda name: tuple(lab.tables[name]), config=asdict(CONFIG), model="tiny"
    )
    left, right = figures.fig_values(record).axes
    for axes, k in ((left, "exact"), (right, "one bit")):
        drawn = {line.get_label(): line for line in axes.containers}
        assert len(drawn) == len(CONFIG.rotations)
        heights = axes.containers[0].lines[0].get_ydata()
        expected = [best(lab.tables["rows"], b, k, rotation="srht")["gap"] for b in CONFIG.bits]
        assert list(heights) == pytest.approx([max(gap, figures.LEAST) for gap in expected])
    records = {"a": record, "b": record}
    assert len(figures.fig_sides(records).axes) == 2
    assert len(figures.fig_output_layers(records, bits=4).axes) == 2
