from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from signlattice.alignment import beta, cosine
from signlattice.bits import pack_signs, sign, unpack_signs
from signlattice.cli import main
from signlattice.errors import InputError, IntegrityError
from signlattice.io import content_hash
from signlattice.models.loading import MODELS
from signlattice.quantizers import codec as codec_file
from signlattice.quantizers.centering import CENTERING_METHODS, Centering
from signlattice.quantizers.codec import Calibration, KeyCodec, resave
from signlattice.quantizers.scales import LEAST_COSINE, SCALE_RULES, scale_of, token_scale
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, T, D = 2, 3, 11, 16


def random_keys(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, T, D, generator=generator) + torch.randn(H, 1, D, generator=generator)


def layer_codec(keys: torch.Tensor, method: str, rule: str = "unbiased", **more) -> SignQuantizer:
    rotation = torch.stack([haar(D, seed) for seed in range(H)])
    centering = Centering.fit(keys.transpose(0, 1).flatten(1, 2), method)
    return SignQuantizer(rotation, centering, rule, **more)


def random_metric(seed: int = 0, condition: float = 30.0) -> torch.Tensor:
    """[H, D, D], eigenvalues from 1 to ``condition`` along axes of no meaning."""
    axes = torch.stack([haar(D, 100 + seed + head) for head in range(H)]).double()
    return axes.mT * torch.logspace(0, 1, D).double() ** torch.tensor(condition).log10() @ axes


def lattice_codec(keys: torch.Tensor, method: str, rule: str = "unbiased", **more) -> SignQuantizer:
    """A basis that is neither orthogonal nor of vectors of one length, and a metric."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.stack([haar(D, seed) for seed in range(H)])
    basis = basis * torch.logspace(0.3, -0.7, D)[:, None]
    basis = basis + 0.05 * torch.randn(H, D, D, generator=generator)
    centering = Centering.fit(keys.transpose(0, 1).flatten(1, 2), method)
    metric = random_metric()
    return SignQuantizer(basis, centering, rule, metric=((metric + metric.mT) / 2).float(), **more)


MAKERS = {"rotation": layer_codec, "lattice": lattice_codec}
KINDS = [
    (kind, method)
    for kind in MAKERS
    for method in CENTERING_METHODS
    if (kind, method) != ("lattice", "dc")
]


@pytest.mark.parametrize("kind, method", KINDS)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scores_on_bits_are_the_inner_products_with_decoded_keys(kind, method, rule):
    keys = random_keys()
    codec = MAKERS[kind](keys, method, rule, temperature=torch.tensor([0.5, 1.0, 1.7]))
    packed = codec.encode(keys)
    query = torch.randn(B, 2 * H, 4, D, generator=torch.Generator().manual_seed(9))
    decoded = codec.decode(packed).repeat_interleave(2, 1)
    torch.testing.assert_close(
        codec.scores(query, packed), query @ decoded.mT, atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("method", CENTERING_METHODS)
def test_sign_quantizer_gives_back_keys_on_the_lattice(method):
    rotation = torch.stack([haar(D, seed) for seed in range(H)])
    lattice = sign(torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1)))
    mean = torch.ones(H, D) if method == "token_mean" else None
    codec = SignQuantizer(rotation, Centering(method, mean), "mse")
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
def test_token_scale_obeys_the_definitions_of_the_three_rules(seed):
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


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_sign_quantizer_keeps_a_zero_key_zero(make, rule):
    codec = make(random_keys(), "none", rule)
    assert codec.decode(codec.encode(torch.zeros(1, H, 1, D))).abs().max() == 0


# A basis that is no rotation, in a metric


@pytest.mark.parametrize("method", ["none", "token_mean"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_sign_quantizer_lattice_that_is_a_rotation_has_its_words_and_scales(method, rule):
    keys = random_keys()
    plain = layer_codec(keys, method, rule, temperature=torch.tensor([0.5, 1.0, 1.7]))
    searched = replace(plain, metric=torch.eye(D).repeat(H, 1, 1))
    ours, theirs = searched.encode(keys), plain.encode(keys)
    assert torch.equal(ours.words, theirs.words)
    # sums in another order: of fp16 the last place may differ
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-3, atol=0)
    assert (ours.scale == theirs.scale).float().mean() > 0.9
    keys = keys.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(searched.cosines(keys), plain.cosines(keys))


def in_metric(metric: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aᵀMb of rows, in fp64."""
    return ((a.double() @ metric.double()) * b.double()).sum(-1)


@pytest.mark.parametrize("method", ["none", "token_mean"])
def test_sign_quantizer_scale_rules_are_what_they_say_in_the_metric(method):
    keys = random_keys()
    points = {}
    for rule in SCALE_RULES:
        codec = lattice_codec(keys, method, rule)
        metric, (x, _) = codec.metric, codec.centering.split(keys)
        packed = codec.encode(keys)
        point = unpack_signs(packed.words) @ codec.basis
        points[rule] = packed.scale.float()[..., None] * point  # k̂, less what was taken off
        assert torch.equal(packed.words, lattice_codec(keys, method).encode(keys).words)
    close = dict(rtol=2e-3, atol=0)  # a scale is fp16
    along, length = in_metric(metric, x, point), in_metric(metric, point, point)
    energy = in_metric(metric, x, x)
    assert (along > LEAST_COSINE * (length * energy).sqrt()).all()

    def error(scale):
        rest = x - scale[..., None] * point
        return in_metric(metric, rest, rest)

    best = along / length
    torch.testing.assert_close(error(best), energy - along**2 / length, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(points["mse"], best[..., None].float() * point, rtol=2e-3, atol=1e-4)
    for step in (0.99, 1.01):
        assert (error(step * best) > error(best)).all()
    torch.testing.assert_close(in_metric(metric, x, points["unbiased"]), energy, **close)
    kept = in_metric(metric, points["norm"], points["norm"])
    torch.testing.assert_close(kept, energy, rtol=4e-3, atol=0)


def test_sign_quantizer_signs_in_the_metric_err_less_there_than_the_nearest_corner():
    keys = random_keys()
    codec = lattice_codec(keys, "none", "mse")
    found = keys - codec.decode(codec.encode(keys))
    corner = pack_signs(keys @ torch.linalg.inv(codec.basis))
    point = unpack_signs(corner) @ codec.basis
    scale = in_metric(codec.metric, keys, point) / in_metric(codec.metric, point, point)
    rounded = keys - scale[..., None].float() * point
    errors = [in_metric(codec.metric, rest, rest).mean() for rest in (found, rounded)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e2, 1e6])
def test_sign_quantizer_has_a_scale_for_keys_of_any_size(rule, size):
    """Beside a lattice much larger than a key every point may lie on its far side."""
    codec = lattice_codec(random_keys(), "none", rule)
    keys = size * torch.randn(1, H, 400, D, generator=torch.Generator().manual_seed(7))
    packed = codec.encode(keys)
    point = unpack_signs(packed.words) @ codec.basis
    along, energy = in_metric(codec.metric, keys, point), in_metric(codec.metric, keys, keys)
    length = in_metric(codec.metric, point, point)
    assert size != 1e-2 or (along < 0).any()  # the case is there at all
    assert packed.scale.isfinite().all() and codec.decode(packed).isfinite().all()
    scale = packed.scale.double()
    assert ((scale == 0) | (scale.sign() == along.sign())).all()  # never away from the key
    bound = (energy / length).sqrt() / LEAST_COSINE
    assert (scale.abs() <= 1.01 * bound + 1e-7).all()


def test_sign_quantizer_scale_beyond_fp16_is_its_largest_number():
    codec = layer_codec(random_keys(), "none")
    scale = codec.encode(torch.full((1, H, 1, D), 1e9)).scale
    assert (scale == torch.finfo(torch.float16).max).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_sign_quantizer_lattice_that_is_a_point_gives_zero(rule):
    codec = replace(lattice_codec(random_keys(), "none", rule), basis=torch.zeros(H, D, D))
    assert (codec.decode(codec.encode(random_keys())) == 0).all()
    assert (codec.cosines(random_keys()[0]) == 0).all()


def test_scale_of_has_a_floor_of_the_cosine_in_the_unbiased_rule_alone():
    along, one = torch.tensor([1e-3, -1e-3, 0.5, -0.5, 0.0]), torch.ones(5)
    torch.testing.assert_close(
        scale_of(along, one, one, "unbiased"), torch.tensor([32.0, -32.0, 2.0, -2.0, 32.0])
    )
    assert torch.equal(scale_of(along, one, one, "mse"), along)
    assert torch.equal(scale_of(along, one, one, "norm"), torch.tensor([1.0, -1, 1, -1, 1]))
    with pytest.raises(InputError, match="unknown scale rule 'max'"):
        scale_of(along, one, one, "max")


def test_sign_quantizer_cosines_of_a_rotation_have_beta_as_their_mean():
    keys = random_keys().transpose(0, 1).flatten(1, 2)
    codec = layer_codec(random_keys(), "token_mean")
    per_head = torch.tensor([float(beta(head)) for head in codec.rotated(keys)])
    torch.testing.assert_close(codec.cosines(keys).mean(-1), per_head)


def test_cosines_are_those_of_keys_and_their_points_in_the_metric():
    keys = random_keys()
    codec = lattice_codec(keys, "none")
    packed = codec.encode(keys[:1])
    point = unpack_signs(packed.words)[0] @ codec.basis
    along = in_metric(codec.metric, keys[0], point)
    sizes = in_metric(codec.metric, keys[0], keys[0]) * in_metric(codec.metric, point, point)
    torch.testing.assert_close(
        codec.cosines(keys[0]).double(), along / sizes.sqrt(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind, method", KINDS)
def test_sign_quantizer_on_another_device_changes_nothing(kind, method):
    keys = random_keys()
    codec = MAKERS[kind](keys, method, temperature=torch.tensor([0.5, 1.0, 1.7]))
    here = torch.device("cpu")
    assert codec.to(here) is codec
    if method == "none":  # of a mean on no device nothing can be checked
        meta = codec.to(torch.device("meta"))
        assert meta.basis.is_meta and meta.temperature.is_meta
        assert codec.metric is None or meta.metric.is_meta
    moved = codec.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ours, theirs = codec.encode(keys), moved.encode(keys.to(moved.basis.device))
    assert (ours.words != theirs.words.cpu()).float().mean() < 1e-3
    torch.testing.assert_close(ours.scale, theirs.scale.cpu(), rtol=2e-3, atol=0)
    assert torch.equal(codec.decode(ours), moved.to(here).decode(codec.encode(keys)))


def test_sign_quantizer_token_mean_is_not_seen_by_softmax():
    keys = random_keys()
    codec = layer_codec(keys, "token_mean")
    packed = codec.encode(keys)
    query = torch.randn(B, H, 4, D, generator=torch.Generator().manual_seed(2))
    shifted = SignQuantizer(
        codec.basis, Centering("token_mean", codec.centering.mean * 0), codec.scale_rule
    )
    torch.testing.assert_close(
        codec.scores(query, packed).softmax(-1), shifted.scores(query, packed).softmax(-1)
    )


def test_packed_keys_bytes_are_what_the_arithmetic_says():
    keys = random_keys()
    assert layer_codec(keys, "none").encode(keys).n_bytes == B * H * T * (D // 8 + 2)
    assert layer_codec(keys, "dc").encode(keys).n_bytes == B * H * T * (D // 8 + 4)
    assert layer_codec(keys, "dc").encode(keys).n_keys == B * H * T


# Files


@pytest.fixture
def codec() -> KeyCodec:
    keys = random_keys()
    layers = {
        0: layer_codec(keys, "token_mean", "mse", temperature=torch.ones(H)),
        2: layer_codec(keys, "dc", "norm"),
        3: lattice_codec(keys, "token_mean", temperature=torch.tensor([0.5, 1.0, 1.7])),
        10: lattice_codec(keys, "none"),
    }
    calibration = Calibration(
        "b" * 64, 4096, {index: (0.9, 0.91, 0.925) for index in layers}, (0.83, 0.81)
    )
    return KeyCodec(layers, "a" * 64, {"solver": "annealed"}, calibration)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "codec.safetensors"


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["signlattice"])
    return header, load_file(path)


def write(path: Path, header: object, tensors: dict[str, torch.Tensor], signed: bool = True):
    """A file of any content; ``signed`` as if the library itself had written it."""
    if signed:
        header = {name: value for name, value in header.items() if name != "digest"}
        header["digest"] = content_hash(header, tensors)
    save_file(tensors, path, metadata={"signlattice": json.dumps(header)})


def same(a: SignQuantizer, b: SignQuantizer) -> bool:
    pairs = [
        (getattr(a, name), getattr(b, name)) for name in ("basis", "metric", "temperature")
    ] + [(a.centering.mean, b.centering.mean)]
    equal = all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
    return equal and (a.scale_rule, a.centering.method) == (b.scale_rule, b.centering.method)


@pytest.mark.parametrize("bits", [8, 32])
def test_key_codec_encodes_the_same_bits_when_saved(codec, path, bits):
    if bits == 8:
        rounded = {index: layer.rounded() for index, layer in codec.layers.items()}
        codec = replace(codec, layers=rounded)
    codec.save(path, bits=bits)
    loaded = KeyCodec.load(path, model_hash="a" * 64)
    keys = random_keys(5)
    assert loaded.layers.keys() == codec.layers.keys()
    for index, layer in codec.layers.items():
        assert bits == 32 or same(layer, loaded.layers[index])
        ours, theirs = layer.encode(keys), loaded.layers[index].encode(keys)
        assert torch.equal(ours.words, theirs.words)
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-3, atol=0)
        assert torch.equal(layer.decode(ours), loaded.layers[index].decode(ours))
    assert loaded.provenance == codec.provenance and loaded.calibration == codec.calibration
    assert [file.name for file in path.parent.iterdir()] == ["codec.safetensors"]


def test_key_codec_of_32_bits_keeps_a_rotation_as_it_is_and_a_metric_to_rounding(codec, path):
    codec.save(path, bits=32)
    loaded = KeyCodec.load(path)
    for index, layer in codec.layers.items():
        back = loaded.layers[index]
        if layer.metric is None:
            assert same(layer, back)
        else:
            assert same(replace(layer, metric=None), replace(back, metric=None))
            torch.testing.assert_close(back.metric, layer.metric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, method", KINDS)
def test_key_codec_of_eight_bits_gives_back_what_rounded_says(kind, method, path):
    layer = MAKERS[kind](random_keys(), method, temperature=torch.tensor([0.5, 1.0, 1.7]))
    KeyCodec({0: layer}, "a" * 64).save(path, bits=8)
    loaded = KeyCodec.load(path).layers[0]
    assert same(loaded, layer.rounded()) and not same(loaded, layer)
    assert same(layer.rounded().rounded(), layer.rounded())
    step = layer.basis.abs().amax(-1, keepdim=True) / 127
    assert ((loaded.basis - layer.basis).abs() <= 0.5 * step * 1.07).all()
    assert layer.temperature is not None and torch.equal(loaded.temperature, layer.temperature)


@pytest.mark.parametrize("floor", [1e-3, 1e-5])
@pytest.mark.parametrize("d", [16, 128])
def test_sign_quantizer_rounded_is_idempotent_where_all_queries_look_one_way(d, floor):
    """The factor of such a metric has a diagonal far below the rest of its rows."""
    query = torch.rand(1, d, 1, generator=torch.Generator().manual_seed(0)).double() + 0.1
    metric = query @ query.mT
    metric = metric + floor * metric.diagonal(dim1=1, dim2=2).mean() * torch.eye(d)
    once = SignQuantizer(haar(d, 0)[None], Centering("none"), metric=metric.float()).rounded()
    assert same(once, once.rounded())


def test_key_codec_may_have_one_code_for_two_layers(codec, path):
    layer = codec.layers[3]
    KeyCodec({0: layer, 1: layer}, "a" * 64).save(path)
    loaded = KeyCodec.load(path).layers
    assert same(loaded[0], loaded[1])


def test_key_codec_of_eight_bits_is_a_file_as_large_as_its_numbers(codec, path):
    codec.save(path, bits=8)
    triangle = D * (D + 1) // 2
    numbers = {
        0: D * D + 2 * D + 2 * D + 4,  # codes, steps, mean in fp16, temperature
        2: D * D + 2 * D,
        3: D * D + 2 * D + triangle + 2 * D + 2 * D + 4,
        10: D * D + 2 * D + triangle + 2 * D,
    }
    with safe_open(path, framework="pt") as file:
        said = file.metadata()["signlattice"]
    expected = H * sum(numbers.values())
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == expected
    assert expected < path.stat().st_size < expected + 1.2 * len(said) + 120 * 20
    eight = path.stat().st_size
    codec.save(path, bits=32)
    assert path.stat().st_size > 2.5 * (eight - len(said))


@pytest.mark.parametrize("bits", [16, 0, None])
@pytest.mark.parametrize("layers", [True, False])
def test_key_codec_refuses_other_widths(codec, path, bits, layers):
    codec = codec if layers else replace(codec, layers={}, calibration=None)
    with pytest.raises(InputError, match=f"bits={bits}: a codec file has 8 or 32"):
        codec.save(path, bits=bits)
    assert not path.exists()


def test_key_codec_cannot_save_a_metric_that_is_none(codec, path):
    layer = replace(codec.layers[10], metric=-torch.eye(D).repeat(H, 1, 1))
    with pytest.raises(InputError, match="metric is not positive definite"):
        KeyCodec({0: layer}, "a" * 64).save(path)
    with pytest.raises(InputError, match="metric is not positive definite"):
        layer.rounded()


def test_key_codec_refuses_another_model(codec, path):
    codec.save(path)
    with pytest.raises(IntegrityError, match="fitted on the model aaaaaaaaaaaa….*fit one"):
        KeyCodec.load(path, model_hash="b" * 64)


@pytest.mark.parametrize("bits", [8, 32])
def test_key_codec_refuses_a_truncated_file(codec, path, bits):
    codec.save(path, bits=bits)
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 997), len(whole) - 5, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="not a whole safetensors file"):
            KeyCodec.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(IntegrityError, match="not a whole safetensors file"):
        KeyCodec.load(path)


@pytest.mark.parametrize("bits", [8, 32])
def test_key_codec_sees_a_byte_that_changed_wherever_it_is(codec, path, bits):
    codec.save(path, bits=bits)
    whole = path.read_bytes()
    metadata = whole.index(b'"signlattice')
    data = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [*range(8), *draw.sample(range(8, data), 250)]
    places += draw.sample(range(data, len(whole)), 150)
    places += range(metadata, metadata + 60)
    for place in places:
        bit = 1 << draw.randrange(8)
        changed = whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
        path.write_bytes(changed)
        try:
            KeyCodec.load(path)
        except IntegrityError:
            continue
        # blanks between the parts of a header say nothing: all that is read is the same
        assert place < data and load_all(changed, path) == load_all(whole, path)


def load_all(content: bytes, path: Path) -> tuple:
    path.write_bytes(content)
    header, tensors = read(path)
    return header, {name: (str(x.dtype), x.tolist()) for name, x in tensors.items()}


def test_key_codec_tells_of_what_was_changed(codec, path):
    codec.save(path, bits=8)
    header, tensors = read(path)
    for changed in (
        {**header, "model_hash": "c" * 64},
        {**header, "provenance": {"solver": "itq"}},
        {**header, "bits": 32},
        {name: value for name, value in header.items() if name != "digest"},
        {**header, "digest": None},
        {**header, "digest": header["digest"].upper()},
    ):
        write(path, changed, tensors, signed=False)
        with pytest.raises(IntegrityError, match="was changed after it was written: learn it"):
            KeyCodec.load(path)
    renamed = {name.replace("10.", "11."): tensor for name, tensor in tensors.items()}
    reshaped = {**tensors, "0.temperature": tensors["0.temperature"][:, None]}
    retyped = {**tensors, "0.mean": tensors["0.mean"].view(torch.bfloat16)}
    for changed in (renamed, reshaped, retyped):
        write(path, header, changed, signed=False)
        with pytest.raises(IntegrityError, match="was changed after it was written"):
            KeyCodec.load(path)


def test_key_codec_digest_says_nothing_of_who_wrote_the_file(codec, path):
    """It finds what was damaged, and is found again over what was meant."""
    codec.save(path, bits=8)
    header, tensors = read(path)
    write(path, {**header, "provenance": {"solver": "itq"}}, tensors)
    assert KeyCodec.load(path).provenance == {"solver": "itq"}


@pytest.mark.parametrize("schema", [0, -1, 4, 99, "2", True, None, 2.0, [2], {}])
def test_key_codec_refuses_another_schema(codec, path, schema):
    codec.save(path)
    header, tensors = read(path)
    known = type(schema) is int
    said = f"has schema {schema}, this library reads up to 3" if known else "but not a codec of"
    for signed in (True, False):
        write(path, {**header, "schema": schema}, tensors, signed)
        with pytest.raises(IntegrityError, match=said):
            KeyCodec.load(path)


@pytest.mark.parametrize("header", [None, 1, [], "signlattice", {}])
def test_key_codec_refuses_a_file_that_is_no_codec(codec, path, header):
    codec.save(path)
    write(path, header, load_file(path), signed=False)
    with pytest.raises(IntegrityError, match="a safetensors file, but not a codec"):
        KeyCodec.load(path)
    save_file(load_file(path), path)
    with pytest.raises(IntegrityError, match="a safetensors file, but not a codec"):
        KeyCodec.load(path)


@pytest.mark.parametrize("text", ["{", "", "nul", "[" * 100_000, "9" * 5000, '{"a": 1'])
def test_key_codec_refuses_a_header_that_is_no_json(codec, path, text):
    codec.save(path)
    save_file(load_file(path), path, metadata={"signlattice": text})
    with pytest.raises(IntegrityError, match="codec.safetensors is not a whole"):
        KeyCodec.load(path)


def test_key_codec_refuses_a_header_that_is_nested_deeply_at_any_depth(codec, path):
    """Reading stops at one depth and the digest at another: neither error may get out."""
    codec.save(path)
    tensors = {"0.basis": torch.zeros(1)}
    for depth in (10, *range(700, 1100, 3), 5000):
        nested = "[" * depth + "]" * depth
        header = f'{{"schema": 3, "layers": {nested}, "digest": {nested}}}'
        save_file(tensors, path, metadata={"signlattice": header})
        with pytest.raises(IntegrityError):
            KeyCodec.load(path)


def first(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


WRONG_TENSORS = {
    "basis of one head": ("3.basis", lambda t: t[0], "3"),
    "basis of no head": ("10.basis", lambda t: t[:0], "shape"),
    "basis not square": ("3.basis", lambda t: t[:, :8], "shape"),
    "basis of a size that no byte holds": ("2.basis", lambda t: t[:, :12, :12], "shape|12"),
    "basis of one number": ("2.basis", lambda t: t[0, 0, 0], "shape"),
    "basis of fp32 with steps": ("3.basis", lambda t: t.float(), "float32, its steps"),
    "basis of int64 with steps": ("3.basis", lambda t: t.long(), "int64, its steps"),
    "steps of integers": ("3.basis_step", lambda t: t.int(), "its steps torch.int32"),
    "steps of fewer rows": ("3.basis_step", lambda t: t[:, :4], "its steps"),
    "steps of every number": ("3.basis_step", lambda t: t[..., None].repeat(1, 1, D), "its steps"),
    "no steps": ("3.basis_step", None, "int8: expected floating point"),
    "no basis": ("3.basis", None, "'basis'"),
    "a step that is NaN": ("3.basis_step", lambda t: first(t, torch.nan), "basis holds NaN"),
    "a step that is infinite": ("3.basis_step", lambda t: first(t, torch.inf), "basis holds"),
    "a step that overflows": ("3.basis_step", lambda t: first(t.float(), 3e38), "basis holds"),
    "a step of the metric that overflows": (
        "10.metric_step",
        lambda t: first(t.float(), 1e25),
        "metric holds .*far too large",
    ),
    "a rotation that is none": ("2.basis_step", lambda t: 2 * t, "no rotation"),
    "a rotation of zeros": ("2.basis", torch.zeros_like, "no rotation"),
    "a metric that is not a full triangle": ("3.metric", lambda t: t[:, :-1], "metric of shape"),
    "a metric that is a square": ("3.metric", lambda t: torch.ones(H, D, D), "metric of shape"),
    "a metric of other heads": ("3.metric", lambda t: t[:1], "metric of shape"),
    "a metric without steps": ("3.metric_step", None, "metric is torch.int8"),
    "a mean of other heads": ("3.mean", lambda t: t[:1], "mean of shape"),
    "a mean of other coordinates": ("3.mean", lambda t: t[:, :8], "mean of shape"),
    "a mean of integers": ("3.mean", lambda t: t.long(), "mean is torch.int64"),
    "a mean that is NaN": ("3.mean", lambda t: first(t, torch.nan), "mean holds NaN"),
    "no mean": ("3.mean", None, "with no mean"),
    "a temperature of other heads": ("3.temperature", lambda t: t[:2], "temperature of shape"),
    "a temperature that is infinite": ("3.temperature", lambda t: first(t, torch.inf), "temper"),
    "complex numbers": ("3.temperature", lambda t: t + 1j, "temperature is torch.complex64"),
}


@pytest.mark.filterwarnings("error")  # such as that of numbers whose imaginary part is dropped
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_key_codec_refuses_tensors_that_are_no_code_though_the_digest_is_theirs(codec, path, case):
    name, change, said = WRONG_TENSORS[case]
    codec.save(path, bits=8)
    header, tensors = read(path)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    write(path, header, tensors)
    with pytest.raises(IntegrityError, match=f"is not a whole codec: .*({said})"):
        KeyCodec.load(path)


def test_key_codec_takes_no_memory_for_a_small_file_that_stands_for_huge_matrices(path):
    """A matrix of no head has any size in no bytes, and so has the triangle of its metric."""
    d = 1 << 20
    header = {
        "schema": 3,
        "model_hash": "a",
        "provenance": {},
        "calibration": None,
        "layers": {"0": {"code": "lattice", "centering": "none", "scale_rule": "mse"}},
    }
    empty = {"0.basis": torch.empty(0, d, d), "0.metric": torch.empty(0, d * (d + 1) // 2)}
    write(path, header, empty)
    with pytest.raises(IntegrityError, match="basis of shape"):
        KeyCodec.load(path)


def put(header: dict, where: str, value: object) -> dict:
    """A copy of ``header`` with ``value`` at a path like ``a/b``; a dict without a key is {...}."""
    header = json.loads(json.dumps(header))
    *way, last = where.split("/")
    inner = header
    for name in way:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return header


BETA = [0.9, 0.9, 0.9]
WRONG_HEADERS = {
    "no layers": ("layers", KeyError),
    "layers in a list": ("layers", ["0"]),
    "layers in a number": ("layers", 3),
    "a layer that is a text": ("layers/3", "none"),
    "no code": ("layers/3/code", KeyError),
    "a code that is unknown": ("layers/3/code", "cube"),
    "a code that is a list": ("layers/3/code", ["rotation"]),
    "no rule": ("layers/3/scale_rule", KeyError),
    "a rule that is unknown": ("layers/3/scale_rule", "max"),
    "a rule that is a number": ("layers/3/scale_rule", 1),
    "no centering": ("layers/3/centering", KeyError),
    "a centering that is unknown": ("layers/10/centering", "dcc"),
    "a centering that is a list": ("layers/10/centering", ["none"]),
    "dc in a metric": ("layers/10/centering", "dc"),
    "a mean without its centering": ("layers/3/centering", "none"),
    "a layer that is not there": (
        "layers/4",
        {"code": "rotation", "scale_rule": "mse", "centering": "none"},
    ),
    "no model": ("model_hash", KeyError),
    "a model that is a number": ("model_hash", 12),
    "a fact that is a number": ("provenance/seed", 0),
    "a fact that is a dict": ("provenance/seed", {}),
    "facts in a list": ("provenance", []),
    "no facts": ("provenance", None),
    "a calibration that is a list": ("calibration", [1]),
    "a calibration that is empty": ("calibration", {}),
    "a calibration of no text": ("calibration/text", None),
    "a calibration of other layers": ("calibration/beta/4", BETA),
    "a calibration of fewer layers": ("calibration/beta/3", KeyError),
    "a calibration of other heads": ("calibration/beta/3", BETA[:2]),
    "betas that are texts": ("calibration/beta/3", ["1", "1", "1"]),
    "betas in a text": ("calibration/beta/3", "111"),
    "a beta that is NaN": ("calibration/beta/3", [float("nan"), 0.9, 0.9]),
    "a beta that is infinite": ("calibration/beta/3", [float("inf"), 0.9, 0.9]),
    "a beta that is true": ("calibration/beta/3", [True, 0.9, 0.9]),
    "a beta beyond all floats": ("calibration/beta/3", [10**400, 0.9, 0.9]),
    "betas in a number": ("calibration/beta", 3),
    "keys without end": ("calibration/n_keys", float("inf")),
    "keys in a text": ("calibration/n_keys", "9"),
    "a null of one number": ("calibration/noise_null", [0.8]),
    "a null of three": ("calibration/noise_null", [0.8, 0.8, 0.8]),
    "a null that is none": ("calibration/noise_null", None),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_key_codec_refuses_headers_that_are_no_code_though_the_digest_is_theirs(codec, path, case):
    codec.save(path, bits=8)
    header, tensors = read(path)
    write(path, put(header, *WRONG_HEADERS[case]), tensors)
    with pytest.raises(IntegrityError, match="is not a whole codec"):
        KeyCodec.load(path)


@pytest.mark.parametrize(
    "index", ["-1", "x", "1e3", "", " 3", "+3", "03", "3_0", "3.0", "٣", "9" * 5000]
)
def test_key_codec_layer_has_one_index_written_in_one_way(codec, path, index):
    codec.save(path)
    header, tensors = read(path)
    header["layers"][index] = header["layers"].pop("3")
    tensors = {name.replace("3.", f"{index}.", 1): tensor for name, tensor in tensors.items()}
    write(path, {**header, "calibration": None}, tensors)
    with pytest.raises(IntegrityError, match="is not a whole codec"):
        KeyCodec.load(path)


# Files of earlier schemas


def write_second_schema(path: Path, codec: KeyCodec) -> None:
    codec.save(path, bits=8)
    header, tensors = read(path)
    layers = header.pop("layers")
    header["scale_rules"] = {index: layer["scale_rule"] for index, layer in layers.items()}
    header["centerings"] = {index: layer["centering"] for index, layer in layers.items()}
    write(path, {**header, "schema": 2}, tensors)


def write_first_schema(path: Path, layers: dict[int, SignQuantizer], **more) -> None:
    header = {
        "schema": 1,
        "model_hash": "a" * 64,
        "scale_rules": {index: layer.scale_rule for index, layer in layers.items()},
        "centerings": {index: layer.centering.method for index, layer in layers.items()},
        "provenance": {"rotation": "annealed"},
    } | more
    tensors = {}
    for index, layer in layers.items():
        own = {"rotation": layer.basis, "mean": layer.centering.mean, "temperature": None}
        own["temperature"] = layer.temperature
        tensors |= {f"{index}.{name}": t for name, t in own.items() if t is not None}
    save_file(tensors, path, metadata={"signlattice": json.dumps(header)})


def rotations_of(codec: KeyCodec) -> dict[int, SignQuantizer]:
    return {index: layer for index, layer in codec.layers.items() if layer.metric is None}


def test_load_refuses_an_earlier_schema_with_the_command_that_saves_it_anew(
    codec, path, capsys, monkeypatch
):
    monkeypatch.chdir(path.parent)
    for write_file in (
        lambda: write_first_schema(path, rotations_of(codec)),
        lambda: write_second_schema(path, codec),
    ):
        write_file()
        with pytest.raises(IntegrityError, match="has schema [12], of an earlier") as refused:
            KeyCodec.load(Path(path.name))
        command = str(refused.value).split("`")[1].split()
        assert command[0] == "signlattice" and main(command[1:]) == 0
        assert KeyCodec.load(path).model_hash == codec.model_hash
    assert "written, 4 layers" in capsys.readouterr().out


def test_resave_keeps_every_number_of_the_first_schema(codec, path):
    layers = rotations_of(codec)
    write_first_schema(path, layers)
    resave(path)
    loaded = KeyCodec.load(path, model_hash="a" * 64)
    assert loaded.layers.keys() == layers.keys() and loaded.calibration is None
    assert all(same(layer, loaded.layers[index]) for index, layer in layers.items())
    assert loaded.provenance == {"rotation": "annealed"}


def test_resave_gives_of_the_second_schema_the_file_that_is_written_now(codec, path, tmp_path):
    output = tmp_path / "anew"
    write_second_schema(path, codec)
    resave(path, output)
    codec.save(path, bits=8)
    assert output.read_bytes() == path.read_bytes()
    resave(path)  # of today's nothing changes
    assert output.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"centerings": {"0": "none"}, "scale_rules": {}}, "not a whole codec"),
        ({"centerings": {"0": "dcc"}}, "'dcc'"),
        ({"centerings": {"2": "none"}, "scale_rules": {"2": "max"}}, "'max'"),
        ({"centerings": {"4": "none"}}, "not a whole codec"),
        ({"model_hash": None}, "None where a text was expected"),
        ({"digest": "0" * 64}, "was changed after"),  # files of that schema have none
    ],
)
def test_resave_refuses_a_wrong_file_and_leaves_it(codec, path, more, said):
    write_first_schema(path, rotations_of(codec), **more)
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match=said):
        resave(path)
    assert path.read_bytes() == before


def test_load_refuses_a_file_of_now_that_says_it_is_of_the_first_schema(codec, path):
    codec.save(path)
    header, tensors = read(path)
    del header["digest"]
    write(path, {**header, "schema": 1}, tensors, signed=False)
    with pytest.raises(IntegrityError, match="earlier"):
        KeyCodec.load(path)
    with pytest.raises(IntegrityError, match="not a whole codec"):
        resave(path)


@pytest.mark.parametrize("name", ["keys", "lattice"])
def test_load_refuses_a_shipped_codec_with_any_bit_flipped(name, path):
    folder = MODELS / "olmoe-mini"
    content = (folder / f"{name}.safetensors").read_bytes()
    assert sorted(KeyCodec.load(folder / f"{name}.safetensors").layers) == [0, 1, 2, 3]
    for place in torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(0)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(place) % 8
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError):
            KeyCodec.load(path)


def test_key_codec_names_a_missing_file(tmp_path):
    with pytest.raises(IntegrityError, match="no codec file at .*nowhere"):
        KeyCodec.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a folder: name a file"):
        KeyCodec.load(tmp_path)


# What is refused


@pytest.mark.parametrize(
    "keys, said",
    [
        (torch.zeros(B, H + 1, T, D), r"takes \[B, 3, T, 16\]"),
        (torch.zeros(H, T, D), r"takes \[B, 3, T, 16\]"),
        (torch.full((B, H, T, D), torch.nan), "NaN or infinite"),
    ],
)
def test_sign_quantizer_refuses_keys_that_do_not_fit(keys, said):
    with pytest.raises(InputError, match=said):
        layer_codec(random_keys(), "none").encode(keys)


def test_sign_quantizer_refuses_bad_settings():
    keys = random_keys()
    with pytest.raises(InputError, match="scale_rule='max': choose one of mse, norm, unbiased"):
        layer_codec(keys, "none", "max")
    with pytest.raises(InputError, match=r"expected \[3\]"):
        layer_codec(keys, "none", temperature=torch.ones(2))
    with pytest.raises(InputError, match="do not fit 3 KV heads"):
        codec = layer_codec(keys, "none")
        codec.scores(torch.zeros(B, 4, 1, D), codec.encode(keys))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(metric=torch.eye(D).repeat(2, 1, 1)), r"metric of shape \[2, 16, 16\]: expected"),
        (dict(metric=torch.eye(D)), "metric of shape"),
        (dict(metric=torch.eye(8).repeat(H, 1, 1)), "metric of shape"),
        (dict(centering=Centering("dc")), "'dc' with a metric: use 'token_mean' or 'none'"),
        (dict(centering=Centering("token_mean", torch.zeros(D))), r"mean of shape \[16\]"),
        (dict(centering=Centering("token_mean", torch.zeros(H, 8))), r"mean of shape \[3, 8\]"),
        (dict(basis=torch.zeros(D, D), metric=None), r"expected \[H, D, D\]"),
        (dict(basis=torch.zeros(H, D, 8), metric=None), r"expected \[H, D, D\]"),
        (dict(basis=torch.zeros(0, D, D), metric=None), "a basis of no head"),
        (dict(basis=torch.zeros(H, 12, 12), metric=None), "head_dim 12"),
    ],
)
def test_sign_quantizer_refuses_parts_that_do_not_hang_together(change, said):
    with pytest.raises(InputError, match=said):
        replace(lattice_codec(random_keys(), "none"), **change)


def test_sign_quantizer_with_a_metric_rotates_nothing():
    with pytest.raises(InputError, match="rotates nothing"):
        lattice_codec(random_keys(), "none").rotated(random_keys())


# Folders, and repositories on the hub


def test_key_codec_is_saved_to_a_folder_and_read_from_it(codec, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = codec.save_pretrained(tmp_path, bits=32)
    assert file == tmp_path / "signlattice.safetensors"
    found = KeyCodec.from_pretrained(tmp_path, model_hash=codec.model_hash)
    assert torch.equal(found.layers[3].basis, codec.layers[3].basis)
    assert (tmp_path / "config.json").read_text() == "{}", "what else is in the folder stays"
    with pytest.raises(IntegrityError, match="was fitted on the model"):
        KeyCodec.from_pretrained(tmp_path, model_hash="0" * 64)


def test_key_codec_goes_to_the_hub_and_comes_from_it(codec, tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, *, private, exist_ok):
            uploaded["repo"] = (repo_id, private, exist_ok)

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **options):
            stored = tmp_path / path_in_repo
            stored.write_bytes(Path(path_or_fileobj).read_bytes())
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def download(repo_id, filename, **options):
        if repo_id == "owner/gone":
            raise hub_errors.RepositoryNotFoundError(
                "gone", response=httpx2.Response(404, request=httpx2.Request("GET", "http://x"))
            )
        return str(tmp_path / filename)

    monkeypatch.setattr(codec_file, "HfApi", Api)
    monkeypatch.setattr(codec_file, "hf_hub_download", download)
    address = codec.push_to_hub("owner/zoo", private=True)
    assert address == "hub/owner/zoo/commit/1" and uploaded["repo"] == ("owner/zoo", True, True)
    found = KeyCodec.from_pretrained("owner/zoo", model_hash=codec.model_hash)
    assert set(found.layers) == set(codec.layers)
    with pytest.raises(InputError, match="no 'owner/gone' on the hub"):
        KeyCodec.from_pretrained("owner/gone")
