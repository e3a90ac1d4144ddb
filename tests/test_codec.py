from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from signlattice.beta import cosine
from signlattice.bits import sign
from signlattice.centering import CENTERING_METHODS, Centering
from signlattice.codec import SCALE_RULES, KeyCodec, LayerCodec, token_scale
from signlattice.errors import InputError, IntegrityError
from signlattice.rotations import haar

B, H, T, D = 2, 3, 11, 16


def random_keys(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, T, D, generator=generator) + torch.randn(H, 1, D, generator=generator)


def layer_codec(keys: torch.Tensor, method: str, rule: str = "unbiased", **more) -> LayerCodec:
    rotation = torch.stack([haar(D, seed) for seed in range(H)])
    centering = Centering.fit(keys.transpose(0, 1).flatten(1, 2), method)
    return LayerCodec(rotation, centering, rule, **more)


@pytest.mark.parametrize("method", CENTERING_METHODS)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scores_on_bits_are_the_inner_products_with_decoded_keys(method, rule):
    keys = random_keys()
    codec = layer_codec(keys, method, rule, temperature=torch.tensor([0.5, 1.0, 1.7]))
    packed = codec.encode(keys)
    query = torch.randn(B, 2 * H, 4, D, generator=torch.Generator().manual_seed(9))
    decoded = codec.decode(packed).repeat_interleave(2, 1)
    torch.testing.assert_close(
        codec.scores(query, packed), query @ decoded.mT, atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("method", CENTERING_METHODS)
def test_keys_on_the_lattice_come_back(method):
    rotation = torch.stack([haar(D, seed) for seed in range(H)])
    lattice = sign(torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1)))
    mean = torch.ones(H, D) if method == "token_mean" else None
    codec = LayerCodec(rotation, Centering(method, mean), "mse")
    keys = 0.5 * lattice @ rotation
    if method == "token_mean":
        keys = keys + 1.0
    if method == "dc":
        keys = keys - keys.mean(-1, keepdim=True)
        error = (codec.decode(codec.encode(keys)) - keys).square().sum() / keys.square().sum()
        assert error < 0.2  # no longer exactly on the lattice, but its dc comes back as zero
    else:
        torch.testing.assert_close(codec.decode(codec.encode(keys)), keys, atol=1e-3, rtol=1e-3)


@given(st.integers(0, 2**16))
@settings(max_examples=20)
def test_the_three_scales_obey_their_definitions(seed):
    y = torch.randn(50, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = cosine(y)
    code = {rule: token_scale(y, rule).unsqueeze(-1) * sign(y) for rule in SCALE_RULES}
    energy = y.square().sum(-1)
    error = {rule: (k - y).square().sum(-1) / energy for rule, k in code.items()}
    torch.testing.assert_close(error["mse"], 1 - c**2)
    torch.testing.assert_close(error["norm"], 2 * (1 - c))
    torch.testing.assert_close(error["unbiased"], 1 / c**2 - 1)
    torch.testing.assert_close(code["norm"].square().sum(-1), energy)
    torch.testing.assert_close(
        (code["unbiased"] * y).sum(-1), energy
    )  # slope one on the key itself


def test_a_zero_key_stays_zero():
    keys = torch.zeros(1, H, 1, D)
    for rule in SCALE_RULES:
        codec = layer_codec(random_keys(), "none", rule)
        assert codec.decode(codec.encode(keys)).abs().max() == 0


def test_softmax_does_not_see_the_token_mean():
    keys = random_keys()
    codec = layer_codec(keys, "token_mean")
    packed = codec.encode(keys)
    query = torch.randn(B, H, 4, D, generator=torch.Generator().manual_seed(2))
    shifted = LayerCodec(
        codec.basis, Centering("token_mean", codec.centering.mean * 0), codec.scale_rule
    )
    torch.testing.assert_close(
        codec.scores(query, packed).softmax(-1), shifted.scores(query, packed).softmax(-1)
    )


def test_bytes_are_what_the_arithmetic_says():
    keys = random_keys()
    assert layer_codec(keys, "none").encode(keys).n_bytes == B * H * T * (D // 8 + 2)
    assert layer_codec(keys, "dc").encode(keys).n_bytes == B * H * T * (D // 8 + 4)
    assert layer_codec(keys, "dc").encode(keys).n_keys == B * H * T


@pytest.fixture
def codec() -> KeyCodec:
    keys = random_keys()
    layers = {
        0: layer_codec(keys, "token_mean", "mse", temperature=torch.ones(H)),
        2: layer_codec(keys, "dc", "norm"),
    }
    return KeyCodec(layers, model_hash="a" * 64, provenance={"solver": "annealed"})


def test_a_saved_codec_encodes_the_same_bits(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    loaded = KeyCodec.load(tmp_path / "codec.safetensors", model_hash="a" * 64)
    keys = random_keys(5)
    assert loaded.layers.keys() == codec.layers.keys()
    for index, layer in codec.layers.items():
        ours, theirs = layer.encode(keys), loaded.layers[index].encode(keys)
        assert torch.equal(ours.words, theirs.words) and torch.equal(ours.scale, theirs.scale)
        assert torch.equal(layer.decode(ours), loaded.layers[index].decode(theirs))
    assert loaded.provenance == codec.provenance
    assert [file.name for file in tmp_path.iterdir()] == ["codec.safetensors"]


def test_another_model_is_refused(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    with pytest.raises(IntegrityError, match="fitted on the model aaaaaaaaaaaa….*fit one"):
        KeyCodec.load(tmp_path / "codec.safetensors", model_hash="b" * 64)


@pytest.mark.parametrize("length", [0, 7, 100, -5])
def test_a_truncated_file_is_refused(codec, tmp_path, length):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(IntegrityError, match="not a whole safetensors file"):
        KeyCodec.load(path)


@pytest.mark.parametrize(
    "header, said",
    [
        (None, "not a codec"),
        ({"schema": 99}, "schema 99"),
        ({"schema": 1, "centerings": {"0": "none"}}, "not a whole codec"),
        ({"schema": 1, "centerings": {"0": "dcc"}, "scale_rules": {"0": "mse"}}, "'dcc'"),
    ],
)
def test_a_file_that_is_no_codec_of_this_schema_is_refused(codec, tmp_path, header, said):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    metadata = {} if header is None else {"signlattice": json.dumps(header)}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(IntegrityError, match=said):
        KeyCodec.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="no codec file at .*nowhere"):
        KeyCodec.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "keys, said",
    [
        (torch.zeros(B, H + 1, T, D), r"takes \[B, 3, T, 16\]"),
        (torch.zeros(H, T, D), r"takes \[B, 3, T, 16\]"),
        (torch.full((B, H, T, D), torch.nan), "NaN or infinite"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, said):
    with pytest.raises(InputError, match=said):
        layer_codec(random_keys(), "none").encode(keys)


def test_bad_settings_are_refused():
    keys = random_keys()
    with pytest.raises(InputError, match="unknown scale rule 'max'.*mse, norm, unbiased"):
        layer_codec(keys, "none", "max")
    with pytest.raises(InputError, match=r"expected \[3\]"):
        layer_codec(keys, "none", temperature=torch.ones(2))
    with pytest.raises(InputError, match="do not fit 3 KV heads"):
        codec = layer_codec(keys, "none")
        codec.scores(torch.zeros(B, 4, 1, D), codec.encode(keys))
