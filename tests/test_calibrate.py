from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import TEXTS
from signlattice import calibration as calibrate
from signlattice.alignment import haar_beta
from signlattice.calibration import (
    CalibrationConfig,
    coded_layers,
    learn_codec,
    measure_codec,
    n_parts,
)
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.distributed import capture as parts_of_a_capture
from signlattice.errors import InputError, IntegrityError
from signlattice.evaluation import heads
from signlattice.evaluation.heads import HeadQuality
from signlattice.models.capture import capture_passages
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import MODELS, LoadedModel, load_model
from signlattice.models.passages import passages, take_tokens
from signlattice.quantizers import lattice, registry, rotation
from signlattice.quantizers.basis import LatticeConfig, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import Calibration, KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import orthogonality_defect

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CalibrationConfig(
    keys_per_dim=30,
    n_held_out=400,
    batch_size=4,
    lattice=LatticeConfig(rounds=4),
    rotation=LearnConfig(solver="itq", steps=8),
)


def side(name: str, repeat: int = 8, salt: str = "") -> tuple[Document, ...]:
    return tuple(
        Document(name, f"{name}/{i}.py", f"# {name}{salt}\n" + content * repeat, name)
        for i, content in enumerate(TEXTS)
    )


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("tiny", "tiny", side("calibration"), side("evaluation"))


def short(folder) -> LoadedModel:
    return replace(load_model(folder), context=48)


@pytest.fixture(scope="module")
def llama48(llama_folder):
    return short(llama_folder)


@pytest.fixture(scope="module")
def gemma48(gemma_folder):
    return short(gemma_folder)


@pytest.fixture(scope="module", params=registry.names())
def learned(request, llama48, text):
    """A codec of either kind, and what was told while it was learned."""
    told = []
    config = replace(CONFIG, code=request.param)
    return learn_codec(llama48, text, config, progress=told.append), config, told


def same(a: KeyCodec, b: KeyCodec) -> bool:
    def tensors(codec):
        for index, layer in sorted(codec.layers.items()):
            for found in (layer.basis, layer.metric, layer.temperature, layer.centering.mean):
                yield index, found

    equal = all(
        i == j and (x is y or torch.equal(x, y))
        for (i, x), (j, y) in zip(tensors(a), tensors(b), strict=True)
    )
    facts = [(c.model_hash, c.provenance, c.calibration) for c in (a, b)]
    return equal and facts[0] == facts[1]


# What is learned


def test_learn_codec_gives_each_layer_a_code_and_says_what_it_is_of(learned, llama48):
    codec, config, told = learned
    assert sorted(codec.layers) == [0, 1]
    codec.check_model(llama48.weights_hash)
    assert codec.provenance["code"] == config.code and codec.provenance["text"] == "tiny"
    for layer in codec.layers.values():
        assert (layer.n_heads, layer.head_dim) == (2, 16)
        assert layer.scale_rule == config.scale_rule and layer.temperature is None
        assert layer.centering.method == "token_mean"
        assert (layer.metric is None) == (config.code == "rotation")
        if config.code == "rotation":
            assert all(orthogonality_defect(head) < 0.05 for head in layer.basis)
    assert told == ["captured", "learned layer 0", "learned layer 1", "measured"]
    assert len(told) == n_parts(llama48, config)


def test_learn_codec_gives_what_a_file_of_eight_bits_gives_back(learned, tmp_path):
    codec = learned[0]
    codec.save(tmp_path / "keys.safetensors", bits=8)
    assert same(KeyCodec.load(tmp_path / "keys.safetensors", codec.model_hash), codec)


def test_learn_codec_takes_beta_on_the_other_side_of_the_text(learned, llama48, text):
    codec, config, _ = learned
    pieces = take_tokens(passages(llama48, text.evaluation, 4), config.n_held_out)
    bank = capture_passages(llama48, pieces, states=("keys",))
    for index, layer in codec.layers.items():
        cosines = layer.cosines(bank.keys(index)).mean(-1).tolist()
        assert codec.calibration.beta[index] == pytest.approx(cosines, abs=1e-5)
        assert all(0.6 < value < 1 for value in codec.calibration.beta[index])
    other = replace(text, evaluation=side("evaluation", salt=" of another kind"))
    again = learn_codec(llama48, other, config)
    assert again.calibration.beta != codec.calibration.beta
    assert again.calibration.text == codec.calibration.text  # which is the side of learning
    assert same(replace(again, calibration=codec.calibration), codec)


def test_learn_codec_null_is_what_noise_gives(learned):
    codec, config, _ = learned
    inside, outside = codec.calibration.noise_null
    assert codec.calibration.n_keys <= config.keys_per_dim * 16
    assert outside == pytest.approx(haar_beta(16), abs=0.03)
    assert inside > outside + 0.01


def test_learn_codec_loses_less_of_the_scores_by_a_lattice_than_by_a_rotation(llama48, text):
    """On the evaluation side, with the scale of least error: what the lattice is learned for."""
    pieces = passages(llama48, text.evaluation)
    bank = capture_passages(llama48, pieces)
    lost = {}
    for code in registry.names():
        config = replace(
            CONFIG,
            code=code,
            scale_rule="mse",
            lattice=LatticeConfig(rounds=8),
            rotation=LearnConfig(solver="itq"),
        )
        lost[code] = []
        for index, layer in learn_codec(llama48, text, config).layers.items():
            keys, queries = bank.keys(index), bank.queries(index)
            rest = keys - layer.decode(layer.encode(keys[None]))[0]
            metric = query_metric([queries], layer.n_heads, config.lattice)
            lost[code] += ((rest.double() @ metric) * rest).sum((1, 2)).tolist()
    assert sum(lost["lattice"]) < 0.9 * sum(lost["rotation"])


def test_learn_codec_gives_the_same_codec_in_the_same_run(learned, llama48, text):
    codec, config, _ = learned
    assert same(learn_codec(llama48, text, config), codec)
    config = replace(config, keys_per_dim=5)  # fewer than there are: a sample
    first, second = (learn_codec(llama48, text, replace(config, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.layers[0].basis, second.layers[0].basis)


@pytest.mark.parametrize("code", registry.names())
def test_learn_codec_fits_a_temperature_where_it_is_asked_for(code, llama48, text):
    config = replace(CONFIG, code=code, temperature=True)
    codec = learn_codec(llama48, text, config)
    plain = learn_codec(llama48, text, replace(config, temperature=False))
    for index, layer in codec.layers.items():
        assert layer.temperature.shape == (2,)
        assert ((layer.temperature > 0.1) & (layer.temperature < 4)).all()
        assert torch.equal(layer.basis, plain.layers[index].basis)
    kl = {
        name: sum(quality.kl.sum() for quality in measured.values())
        for name, measured in (
            (name, measure_codec(llama48, c, passages(llama48, text.calibration, 4)))
            for name, c in (("fitted", codec), ("plain", plain))
        )
    }
    assert kl["fitted"] < kl["plain"]


def test_learn_codec_fits_a_temperature_on_the_keys_of_its_own_layer_alone(
    gemma48, text, monkeypatch
):
    seen = []
    fit = heads.fit_temperature

    def recorded(code, bank, layer):
        seen.append((layer.index, bank.layers, len(bank.lengths)))
        return fit(code, bank, layer)

    monkeypatch.setattr(calibrate, "fit_temperature", recorded)
    learn_codec(gemma48, text, replace(CONFIG, temperature=True, sliding=True))
    assert seen == [(index, [index], 12) for index in (0, 1, 2)]


# Layers


@pytest.mark.parametrize("sliding, layers", [(False, [2]), (True, [0, 1, 2])])
def test_learn_codec_learns_layers_with_a_window_where_they_are_asked_for(
    sliding, layers, gemma48, text
):
    """Layers 3 and 4 have no keys of their own; the heads of layer 2 are wider than others."""
    config = replace(CONFIG, sliding=sliding)
    codec = learn_codec(gemma48, text, config)
    assert sorted(codec.layers) == layers == sorted(codec.calibration.beta)
    assert codec.layers[2].head_dim == 32
    assert sorted(measure_codec(gemma48, codec, passages(gemma48, text.evaluation))) == layers
    assert n_parts(gemma48, config) == len(layers) + 2


def test_learn_codec_metric_is_of_all_queries_that_read_a_layer(gemma48, text, monkeypatch):
    given = []

    def recorded(readers, n_heads, config):
        given.append(readers)
        return query_metric(readers, n_heads, config)

    monkeypatch.setattr(lattice, "query_metric", recorded)
    config = replace(CONFIG, sliding=True)
    codec = learn_codec(gemma48, text, config)
    fit, _ = calibrate._passages(gemma48, text, coded_layers(gemma48, config), config)
    bank = capture_passages(gemma48, fit, batch_size=config.batch_size)
    read_by = {0: [0], 1: [1, 3], 2: [2, 4]}
    for readers, indices in zip(given, read_by.values(), strict=True):
        assert len(readers) == len(indices)
        for queries, index in zip(readers, indices):
            torch.testing.assert_close(queries, bank.queries(index))
    own = {index: [index] for index in range(5)}
    monkeypatch.setattr(calibrate, "_readers", lambda loaded: own)
    alone = learn_codec(gemma48, text, config)
    for index, layer in alone.layers.items():
        shared = index in (1, 2)
        assert torch.equal(layer.metric, codec.layers[index].metric) != shared


def built(like: LoadedModel, kind: str, **more) -> LoadedModel:
    """A model of random weights, with the tokens of another."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=300,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )
    return replace(like, model=AutoModelForCausalLM.from_config(config).eval())


def test_learn_codec_leaves_on_a_mean_that_does_not_cancel_and_fits_no_gain(llama48, text):
    """Under a soft-cap neither softmax takes the mean off, nor is the fit of a gain convex."""
    capped = built(
        llama48,
        "gemma2",
        hidden_size=64,
        head_dim=16,
        attn_logit_softcapping=5.0,
        layer_types=["full_attention", "full_attention"],
    )
    assert attention_layers(capped.model)[0].softcap == 5.0
    codec = learn_codec(capped, text, replace(CONFIG, temperature=True))
    for layer in codec.layers.values():
        assert layer.centering.method == "none" and layer.temperature is None


def test_learn_codec_refuses_a_model_without_a_layer_to_learn(llama48, text):
    narrow = built(llama48, "llama", hidden_size=96)
    assert attention_layers(narrow.model)[0].head_dim == 24
    windowed = built(llama48, "mistral", hidden_size=64, sliding_window=8)
    assert attention_layers(windowed.model)[0].window == 8
    with pytest.raises(InputError, match="no layer to learn a code for: all have sliding .*16, 32"):
        learn_codec(windowed, text, CONFIG)
    assert sorted(coded_layers(windowed, replace(CONFIG, sliding=True))) == [0, 1]
    for sliding in (False, True):
        with pytest.raises(InputError, match="heads of another size than 16, 32, 64"):
            n_parts(narrow, replace(CONFIG, sliding=sliding))


# Text


@pytest.mark.parametrize("n_documents", [1, 3])
def test_learn_codec_refuses_text_that_is_too_short(n_documents, llama48, text):
    little = tuple(replace(d, text="a\n") for d in side("calibration")[:n_documents])
    with pytest.raises(InputError, match=r"calibration side of tiny has \d+ tokens: .* least 64"):
        learn_codec(llama48, replace(text, calibration=little), CONFIG)
    for empty in (dict(calibration=()), dict(evaluation=())):
        with pytest.raises(InputError, match="no text to evaluate on"):
            learn_codec(llama48, replace(text, **empty), CONFIG)


def test_learn_codec_refuses_a_lattice_of_too_few_keys_but_not_a_rotation(llama48, text):
    few = replace(CONFIG, keys_per_dim=3)
    with pytest.raises(InputError, match="keys_per_dim=3: learning a lattice takes 4 or more"):
        learn_codec(llama48, text, few)
    assert learn_codec(llama48, text, replace(few, code="rotation")).calibration.n_keys == 3 * 16


def test_learn_codec_tells_of_fewer_keys_than_were_asked_for(llama48, text):
    config = replace(CONFIG, keys_per_dim=10**6)
    codec = learn_codec(llama48, text, config)
    pieces = passages(llama48, text.calibration)
    assert codec.calibration.n_keys == sum(len(piece.ids) for piece in pieces)


@pytest.mark.parametrize("wanted", [1, 48, 100, 300, 10**6])
def test_take_tokens_gives_passages_from_all_over_the_text(wanted, llama48, text):
    pieces = passages(llama48, text.calibration)
    chosen = take_tokens(pieces, wanted)
    assert len({id(piece) for piece in chosen}) == len(chosen) <= len(pieces)
    assert len(chosen) == len(pieces) or sum(len(p.ids) for p in chosen) < wanted + 2 * 48
    if len(chosen) > 3:
        assert {piece.document for piece in chosen} == {piece.document for piece in pieces}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(code="cube"), "code='cube': choose one of lattice, rotation"),
        (dict(scale_rule="max"), "scale_rule='max': choose one of mse, norm, unbiased"),
        (dict(keys_per_dim=0), "keys_per_dim=0: use 1 or more"),
        (dict(n_held_out=0), "n_held_out=0"),
        (dict(batch_size=-1), "batch_size=-1"),
    ],
)
def test_calibration_config_refuses_bad_settings(change, said):
    with pytest.raises(InputError, match=said):
        CalibrationConfig(**change)


# Runs that end before they are done


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("code", registry.names())
def test_learn_codec_goes_on_where_an_interrupted_run_was(
    code, llama48, text, tmp_path, monkeypatch
):
    config = replace(CONFIG, code=code, temperature=True)
    whole = learn_codec(llama48, text, config)
    read, made = [], []

    def counted_bank(loaded, pieces, **more):
        read.append(len(pieces))
        return capture_passages(loaded, pieces, **more)

    def counted(module, name):
        function = getattr(module, name)

        def learn(*arguments):
            made.append(name)
            return function(*arguments)

        return learn

    monkeypatch.setattr(parts_of_a_capture, "capture_passages", counted_bank)
    for module, name in ((rotation, "learn_matrices"), (lattice, "learn_basis")):
        monkeypatch.setattr(module, name, counted(module, name))
    monkeypatch.setattr(calibrate, "null_betas", lambda *arguments: whole.calibration.noise_null)

    def interrupt(part):
        if part == parts[0]:
            raise Interrupted

    parts = ["captured", "learned layer 0", "learned layer 1", "measured"]
    while parts:
        with pytest.raises(Interrupted):
            learn_codec(llama48, text, config, tmp_path, interrupt)
        parts.pop(0)
    told = []
    assert same(learn_codec(llama48, text, config, tmp_path, told.append), whole)
    fit, _ = calibrate._passages(llama48, text, coded_layers(llama48, config), config)
    assert len(read) > 1 and sum(read) == len(fit) and len(made) == 2
    assert told == ["captured", "learned layer 0", "learned layer 1", "measured"]


def test_learn_codec_makes_a_capture_that_did_not_end_again(llama48, text, tmp_path):
    def interrupt(part):
        raise Interrupted

    with pytest.raises(Interrupted):
        learn_codec(llama48, text, CONFIG, tmp_path, interrupt)
    next(tmp_path.glob("*/keys/*/index.json")).unlink()  # it is written last
    assert same(learn_codec(llama48, text, CONFIG, tmp_path), learn_codec(llama48, text, CONFIG))
    shard = next(tmp_path.glob("*/keys/*/keys.0.*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    next(tmp_path.glob("*/layer-0.safetensors")).unlink()  # or the keys would not be read
    with pytest.raises(IntegrityError, match="is damaged .* delete .*keys/00000 and run again"):
        learn_codec(llama48, text, CONFIG, tmp_path)
    shard.unlink()
    with pytest.raises(IntegrityError, match="lacks the shard .* delete it and run again"):
        learn_codec(llama48, text, CONFIG, tmp_path)


def test_learn_codec_keeps_its_parts_by_model_text_and_configuration(llama48, gemma48, text):
    runs = [
        (llama48, text, CONFIG),
        (gemma48, text, CONFIG),
        (llama48, replace(text, calibration=text.calibration[1:]), CONFIG),
        (replace(llama48, context=32), text, CONFIG),
        (llama48, text, replace(CONFIG, code="rotation")),
        (llama48, text, replace(CONFIG, keys_per_dim=29)),
        (llama48, text, replace(CONFIG, lattice=LatticeConfig(rounds=5))),
        (llama48, text, replace(CONFIG, rotation=LearnConfig(solver="itq", steps=9))),
    ]
    assert len({calibrate._identity(*run) for run in runs}) == len(runs)
    assert len({calibrate._identity(*runs[0]) for _ in range(3)}) == 1


# What comes of it


def test_measure_codec_gives_the_quality_of_each_layer_and_head(learned, llama48, text):
    codec = learned[0]
    found = measure_codec(llama48, codec, passages(llama48, text.evaluation), batch_size=3)
    assert sorted(found) == sorted(codec.layers)
    for index, quality in found.items():
        assert isinstance(quality, HeadQuality)
        for figure in (quality.beta, quality.distortion, quality.kl, quality.top1):
            assert figure.shape == (2,)
        assert (quality.kl > 0).all() and (quality.top1 <= 1).all()
        assert quality.beta == pytest.approx(codec.calibration.beta[index], abs=0.1)


def test_measure_codec_refuses_another_model(learned, gemma48, text):
    with pytest.raises(IntegrityError, match="fitted on the model"):
        measure_codec(gemma48, learned[0], passages(gemma48, text.evaluation))


def test_learn_codec_names_a_layer_that_was_damaged(llama48, text, tmp_path):
    learn_codec(llama48, text, CONFIG, tmp_path)
    kept = next(tmp_path.glob("*/layer-0.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="layer-0.safetensors is not a whole"):
        learn_codec(llama48, text, CONFIG, tmp_path)


def test_key_codec_of_a_mini_takes_less_than_a_fiftieth_of_the_model(tmp_path):
    """Of matrices that say nothing, in the shapes of those that are learned."""
    shape = json.loads((MODELS / "olmoe-mini" / "config.json").read_text())
    n_heads, d = shape["num_key_value_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(shape["num_hidden_layers"]):
        root = torch.randn(n_heads, d, d, generator=generator)
        layers[index] = SignQuantizer(
            torch.randn(n_heads, d, d, generator=generator),
            Centering("token_mean", torch.randn(n_heads, d, generator=generator)),
            temperature=torch.randn(n_heads, generator=generator),
            metric=root @ root.mT + torch.eye(d),
        )
    provenance = dict.fromkeys(("model", "code", "text", "seed", "signlattice"), "x" * 20)
    betas = {index: (0.9123456789012345,) * n_heads for index in layers}
    calibration = Calibration("b" * 64, 16384, betas, (0.8123456789012345, 0.8023456789012345))
    file = tmp_path / "keys.safetensors"
    KeyCodec(layers, "a" * 64, provenance, calibration).save(file, bits=8)
    model = (MODELS / "olmoe-mini" / "model.safetensors").stat().st_size
    assert file.stat().st_size <= 0.02 * model
