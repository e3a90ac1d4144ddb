"""Codec files that are damaged, or made up: read as a code that works, or refused in one way."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from signlattice.errors import InputError, IntegrityError
from signlattice.io import content_hash
from signlattice.quantizers import codec as codec_module
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import Calibration, KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import haar

pytestmark = pytest.mark.usefixtures("one_thread")

H, D = 2, 16


def fuzzed(n: int) -> settings:
    """The same ``n`` examples in every run: what is found once is found again."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch):
    """Whatever would run what a file says fails the test that comes to it."""

    def reached(*arguments, **more):
        pytest.fail("a file was executed")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler", "_loads", "_load", "_Unpickler")),
        (torch, ("load",)),
        (torch.jit, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, reached)
    for name in ("eval", "exec"):  # in the module alone: others may need theirs
        monkeypatch.setattr(codec_module, name, reached, raising=False)


def small_codec() -> KeyCodec:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.stack([haar(D, head) for head in range(H)])
    root = torch.randn(H, D, D, generator=generator)
    metric = root @ root.mT + torch.eye(D)
    mean = torch.randn(H, D, generator=generator)
    basis = rotation * torch.logspace(0, -1, D)[:, None]
    layers = {
        0: SignQuantizer(rotation, Centering("dc"), "norm", torch.tensor([0.5, 1.5])),
        3: SignQuantizer(basis, Centering("token_mean", mean), "unbiased", None, metric),
    }
    betas = {index: (0.9, 0.8) for index in layers}
    return KeyCodec(layers, "a" * 64, {"code": "lattice"}, Calibration("b", 9, betas, (0.8, 0.7)))


def written(bits: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "codec.safetensors"
        small_codec().save(file, bits=bits)
        return file.read_bytes()


FILES = {bits: written(bits) for bits in (8, 32)}
KEYS = torch.randn(1, H, 5, D, generator=torch.Generator().manual_seed(1))


def check(content: bytes, path: Path) -> KeyCodec | None:
    """The codec that is read, or None where the file is refused; any other outcome is an error."""
    path.write_bytes(content)
    try:
        codec = KeyCodec.load(path)
    except InputError:  # IntegrityError is one
        return None
    for layer in codec.layers.values():
        keys = KEYS.expand(-1, -1, -1, D)[..., : layer.head_dim]
        if layer.head_dim > D or layer.n_heads > H:
            keys = torch.ones(1, layer.n_heads, 3, layer.head_dim)
        try:
            packed = layer.encode(keys[:, : layer.n_heads])
        except InputError:  # of a head size that signs are not searched for
            continue
        decoded = layer.decode(packed)
        assert decoded.shape == keys[:, : layer.n_heads].shape and decoded.isfinite().all()
    return codec


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "codec.safetensors"


@pytest.mark.parametrize("bits", FILES)
def test_key_codec_reads_the_whole_files(bits, path):
    assert check(FILES[bits], path).layers.keys() == {0, 3}


@fuzzed(150)
@given(content=st.binary(max_size=400), sized=st.booleans())
def test_key_codec_refuses_random_bytes(content, sized, path):
    if sized:  # as the length of a header that is there
        content = len(content).to_bytes(8, "little") + content
    assert check(content, path) is None


PIECES = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "overwrite", "repeat"]),
    st.integers(0, 2**20),
    st.integers(1, 64),
    st.binary(min_size=1, max_size=64),
)


def mutated(content: bytes, pieces: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, length, new in pieces:
        at %= len(content) + 1
        head, rest = content[:at], content[at:]
        if kind == "flip":
            rest = bytes(x ^ new[0] for x in rest[:1]) + rest[1:]
        elif kind == "insert":
            rest = new + rest
        elif kind == "delete":
            rest = rest[length:]
        elif kind == "overwrite":
            rest = new + rest[len(new) :]
        else:
            rest = rest[:length] + rest
        content = head + rest
    return content


@pytest.mark.parametrize("part", ["header", "anywhere"])
@pytest.mark.parametrize("bits", FILES)
@fuzzed(250)
@given(pieces=st.lists(PIECES, min_size=1, max_size=3))
def test_key_codec_refuses_a_damaged_file_or_reads_the_same(bits, part, pieces, path):
    whole = FILES[bits]
    if part == "anywhere":
        content = mutated(whole, pieces)
    else:  # of a file whose header is as long as it says
        end = 8 + int.from_bytes(whole[:8], "little")
        header = mutated(whole[8:end], pieces)
        content = len(header).to_bytes(8, "little") + header + whole[end:]
    found = check(content, path)
    if found is not None:
        found.save(path)
        assert load(path.read_bytes()).keys() == load(FILES[32]).keys()
        assert (found.model_hash, found.calibration) == ("a" * 64, small_codec().calibration)


WORDS = ["0", "3", "03", "none", "dc", "token_mean", "mse", "unbiased", 10**400]
NAMED = st.sampled_from(["0", "3", "beta", "text", "-1"]) | st.text(max_size=2)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMED, inner, max_size=3),
    max_leaves=6,
)
HEADER = json.loads(FILES[8][8 : 8 + int.from_bytes(FILES[8][:8], "little")])["__metadata__"]
HEADER = json.loads(HEADER["signlattice"])
PLACES = (
    [(name,) for name in HEADER]
    + [
        (name, inner)
        for name, value in HEADER.items()
        if isinstance(value, dict)
        for inner in value
    ]
    + [("calibration", "beta", "0"), ("calibration", "beta", "3")]
)


def signed(header: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with the digest of what it holds, where it can hold one."""
    header = json.loads(json.dumps(header))
    if isinstance(header, dict):
        header.pop("digest", None)
        header["digest"] = content_hash(header, tensors)
    return save(tensors, {"signlattice": json.dumps(header)})


@pytest.mark.parametrize("bits", FILES)
@fuzzed(200)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_key_codec_reads_or_refuses_a_header_of_any_values(bits, changes, path):
    header = json.loads(json.dumps(HEADER))
    for place, value in changes:
        inner = header
        for name in place[:-1]:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[place[-1]] = value
    check(signed(header, load(FILES[bits])), path)


@fuzzed(100)
@given(header=JSON)
def test_key_codec_refuses_metadata_of_any_values(header, path):
    assert check(signed(header, load(FILES[8])), path) is None


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.uint16,
]
NAMES = sorted({*load(FILES[8]), "0.metric", "0.metric_step", "3.temperature", "0.mean", "3.x"})
SIZES = st.sampled_from([0, 1, H, 8, D, D * (D + 1) // 2])


@st.composite
def tensors_of_any_kind(draw) -> torch.Tensor:
    kind = draw(st.sampled_from(["shape", "basis", "rows", "heads", "triangle"]))
    shape = {
        "shape": draw(st.lists(SIZES, max_size=4)),
        "basis": (H, D, D),
        "rows": (H, D),
        "heads": (H,),
        "triangle": (H, D * (D + 1) // 2),
    }[kind]
    if torch.Size(shape).numel() > 1 << 14:
        shape = shape[:2]
    size = draw(st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 127.0, 1e9, 1e20, 3e38, torch.inf]))
    seed = draw(st.integers(0, 9))
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * size
    numbers = numbers.nan_to_num(0.0, torch.inf, -torch.inf)
    dtype = draw(st.sampled_from(DTYPES))
    if dtype.is_floating_point or dtype.is_complex:
        return numbers.to(dtype)
    return numbers.clamp(-100, 100).to(torch.int8).to(dtype)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", FILES)
@fuzzed(250)
@given(
    changes=st.dictionaries(
        st.sampled_from(NAMES), st.none() | tensors_of_any_kind(), min_size=1, max_size=3
    ),
    rule=st.sampled_from(["mse", "norm", "unbiased"]),
    method=st.sampled_from(["none", "token_mean"]),
)
def test_key_codec_reads_or_refuses_tensors_of_any_kind(bits, changes, rule, method, path):
    tensors = load(FILES[bits])
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    header = json.loads(json.dumps(HEADER))
    header["layers"]["3"] |= {"scale_rule": rule, "centering": method}
    if method == "none":
        tensors.pop("3.mean", None)
    check(signed(header, tensors), path)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-4, 1.0, 1e3, 9e9])
@pytest.mark.parametrize("rule", ["mse", "norm", "unbiased"])
def test_key_codec_decodes_a_basis_of_any_size_to_finite_keys(size, rule, path):
    tensors = load(FILES[32])
    tensors["3.basis"] = tensors["3.basis"] / tensors["3.basis"].abs().max() * size
    header = json.loads(json.dumps(HEADER))
    header["layers"]["3"]["scale_rule"] = rule
    assert check(signed(header, tensors), path) is not None


# Nothing in a file is executed


class Armed:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch, old", "metadata"])
def test_key_codec_refuses_a_file_that_would_be_executed(how, path, tmp_path):
    trace, buffer = tmp_path / "trace", io.BytesIO()
    if how == "pickle":
        pickle.dump({"0.basis": Armed(trace)}, buffer)
    elif how == "metadata":
        text = pickle.dumps(Armed(trace), protocol=0).decode("latin-1")
        save_file({"0.basis": torch.eye(D)[None]}, path, metadata={"signlattice": text})
        buffer.write(path.read_bytes())
    else:
        torch.save(Armed(trace), buffer, _use_new_zipfile_serialization=how == "torch")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(IntegrityError, match="is not a whole safetensors file"):
        KeyCodec.load(path)
    assert not trace.exists()
