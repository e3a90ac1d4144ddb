"""Decode attention on packed keys: accuracy, what it must not read, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import DEVICE, assert_accurate, attention_tolerance, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signlattice import kernels
from signlattice.errors import InputError
from signlattice.kernels.attention import reference
from signlattice.kernels.attention import triton as triton_attention
from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues
from signlattice.kernels.unpack import reference as unpack


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not yet written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """What one call of decode attention is about."""

    d: int = 64
    dv: int | None = None
    group: int = 4
    dtype: torch.dtype = torch.float16
    bits: int = 16
    softcap: float | None = None
    dc: bool = False
    n_full: int = 0
    tokens: tuple[tuple[int, int], ...] = ((0, 75), (11, 60))  # [start, length) of each sequence
    room: int = 75
    n_heads: int = 1


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, in the order in which the implementations take them."""

    query: Tensor
    keys: PackedKeys
    rotation: Tensor
    values: Tensor | PackedValues
    start: Tensor
    length: Tensor
    scaling: float
    softcap: float | None
    full: FullPrecisionTokens | None

    def astuple(self) -> tuple:
        return tuple(vars(self).values())


def _int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _rotation(n_heads: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n_heads, d, d, device="cpu"))[0].to(DEVICE)


def _inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs. Room that no sequence uses holds NaN, and words of 0xAB."""
    torch.manual_seed(seed)
    d, dv, shape = case.d, case.dv or case.d, (len(case.tokens), case.n_heads)
    origin, room = _int32(*[0] * shape[0]), case.room
    rotation = _rotation(case.n_heads, d)
    keys = PackedKeys.empty(*shape, room, d, dc=case.dc, device=DEVICE)
    kernels.pack_into(keys, torch.randn(*shape, room, d) + 0.3, rotation, origin, impl="torch")
    values = torch.randn(*shape, room, dv)
    if case.bits == 16:
        values = values.to(case.dtype)
        floats = [values]
    else:
        packed = PackedValues.empty(*shape, room, dv, case.bits, device=DEVICE)
        packed.write(values, origin)
        values, floats = packed, [packed.scale, packed.zero]
    start, length = (_int32(*ends) for ends in zip(*case.tokens))
    t = torch.arange(room)
    unused = (t < start[:, None]) | (t >= length[:, None])
    for tensor in (keys.scale, keys.dc, *floats):
        if tensor is not None:
            tensor.movedim(2, 1)[unused] = torch.nan
    for words in (keys.words, *([values.words] if case.bits < 16 else [])):
        words.movedim(2, 1)[unused] = 0xAB
    query = torch.randn(shape[0], case.n_heads * case.group, d).to(case.dtype)
    full = _full(case, shape, dv) if case.n_full else None
    return Inputs(query, keys, rotation, values, start, length, d**-0.5, case.softcap, full)


def _full(case: Case, shape: tuple[int, int], dv: int) -> FullPrecisionTokens:
    """From all of the tokens to none, in steps over the batch; the rest is NaN."""
    keys = torch.randn(*shape, case.n_full, case.d).to(case.dtype)
    values = torch.randn(*shape, case.n_full, dv).to(case.dtype)
    length = torch.linspace(case.n_full, 0, shape[0]).int()
    unused = torch.arange(case.n_full) >= length[:, None]
    for tensor in (keys, values):
        tensor.movedim(2, 1)[unused] = torch.nan
    return FullPrecisionTokens(keys, values, length)


def _triton(x: Inputs) -> Tensor:
    return kernels.decode_attention(
        x.query,
        x.keys,
        x.rotation,
        x.values,
        scaling=x.scaling,
        start=x.start,
        length=x.length,
        softcap=x.softcap,
        full=x.full,
        impl="triton",
    )


def _exact(x: Inputs) -> Tensor:
    return reference.decode_attention(*replace(x, query=x.query.double()).astuple())


def _judge(got: Tensor, x: Inputs) -> None:
    assert got.dtype == x.query.dtype
    assert_accurate(got, _exact(x), attention_tolerance(*x.astuple()))


def _check(case: Case, seed: int = 0) -> None:
    x = _inputs(case, seed)
    _judge(_triton(x), x)


@pytest.mark.parametrize("d", kernels.HEAD_DIMS)
def test_decode_attention_is_accurate_at_every_head_size(d: int, poisoned_memory: None) -> None:
    _check(Case(d, dc=True, softcap=20.0))


@pytest.mark.parametrize("d", [16, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_attention_is_accurate_in_every_dtype(d: int, dtype: torch.dtype) -> None:
    _check(Case(d, dtype=dtype, dc=True, softcap=20.0, n_full=9))


@pytest.mark.parametrize("group", [1, 2, 3, 8, 17, 32])
def test_decode_attention_takes_every_number_of_queries_to_a_head(
    group: int, poisoned_memory: None
) -> None:
    _check(Case(group=group, n_heads=2, n_full=5))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decode_attention_reads_packed_values(bits: int, dtype: torch.dtype) -> None:
    _check(Case(96, dtype=dtype, bits=bits, n_full=7))


@pytest.mark.parametrize(("d", "dv", "bits"), [(64, 128, 16), (128, 80, 16), (80, 32, 4)])
def test_decode_attention_takes_values_of_another_size_than_keys(
    d: int, dv: int, bits: int
) -> None:
    _check(Case(d, dv, bits=bits, n_full=3))


def test_decode_attention_takes_full_tokens_and_values_of_other_dtypes() -> None:
    x = _inputs(Case(dtype=torch.float32, n_full=9))
    full = FullPrecisionTokens(x.full.keys.half(), x.full.values.half(), x.full.length)
    x = replace(x, values=x.values.half(), full=full)
    _judge(_triton(x), x)


DRAWN = {
    "d": st.sampled_from((16, 32, 64, 80, 112, 128)),
    "dv": st.sampled_from((None, 16, 96)),
    "group": st.integers(1, 32),
    "dtype": st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    "bits": st.sampled_from((16, 8, 4, 2)),
    "softcap": st.sampled_from((None, 1.0, 50.0)),
    "dc": st.booleans(),
    "n_full": st.integers(0, 40),
    "tokens": st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=3
    ).map(tuple),
    "room": st.just(90),
}


@settings(max_examples=10)
@given(case=st.builds(Case, **DRAWN), seed=st.integers(0, 2**31))
def test_decode_attention_takes_any_mixture_of_these(case: Case, seed: int) -> None:
    x = _inputs(case, seed)
    if _exact(x).any():
        _judge(_triton(x), x)
    else:
        assert not _triton(x).any()


@pytest.mark.parametrize("n_splits", [1, 2, 5])
def test_decode_attention_takes_lengths_about_the_borders_of_tiles_and_splits(
    n_splits: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    monkeypatch.setattr(triton_attention, "_n_splits", lambda *_: n_splits)
    ends = [(0, n) for n in (0, 1, 63, 64, 65, 127, 128, 129)]
    ends += [(63, 64), (64, 65), (63, 129), (128, 129), (128, 128), (90, 20)]
    _check(Case(16, tokens=tuple(ends), room=129, group=1))


def test_decode_attention_takes_ends_outside_the_room_as_those_of_the_room(
    poisoned_memory: None,
) -> None:
    case = Case(tokens=((0, 75), (3, 75)))
    x = _inputs(case)
    over = replace(x, start=_int32(-70, 3), length=_int32(75, 1000))
    assert torch.equal(_triton(over), _triton(x))


def test_decode_attention_takes_full_tokens_beyond_one_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_attention, "FULL_SPLIT", 64)
    _check(Case(n_full=150, tokens=((0, 10), (2, 2), (0, 70)), softcap=30.0))


def test_decode_attention_of_a_sequence_without_any_token_is_zero(poisoned_memory: None) -> None:
    x = _inputs(Case(tokens=((0, 40), (7, 7), (0, 0)), n_full=4))
    full = replace(x.full, length=_int32(4, 0, 0))
    got = _triton(replace(x, full=full))
    assert got[0].any() and got.isfinite().all()
    assert torch.equal(got[1:], torch.zeros_like(got[1:]))


def test_decode_attention_of_a_cache_without_room_is_zero(poisoned_memory: None) -> None:
    got = _triton(_inputs(Case(tokens=((0, 0), (0, 0)), room=0)))
    assert torch.equal(got, torch.zeros_like(got))


def test_decode_attention_does_not_show_room_not_used() -> None:
    x = _inputs(Case(bits=4, dc=True))
    before = _triton(x)
    t = torch.arange(75)
    unused = (t < x.start[:, None]) | (t >= x.length[:, None])
    for tensor in (x.keys.words, x.values.words):
        tensor.movedim(2, 1)[unused] = 0x55
    for tensor in (x.keys.scale, x.keys.dc, x.values.scale, x.values.zero):
        tensor.movedim(2, 1)[unused] = torch.inf
    assert torch.equal(_triton(x), before)


@pytest.mark.parametrize("window", [1, 20, 500])
def test_decode_attention_takes_a_window_as_a_later_start(window: int) -> None:
    x = _inputs(Case(tokens=((0, 75), (11, 60))))
    got = kernels.decode_attention(
        x.query,
        x.keys,
        x.rotation,
        x.values,
        scaling=x.scaling,
        start=x.start,
        length=x.length,
        window=window,
        impl="triton",
    )
    start = _int32(max(0, 75 - window), max(11, 60 - window))
    assert torch.equal(got, _triton(replace(x, start=start)))


def test_decode_attention_attends_to_all_of_the_room_by_default() -> None:
    x = _inputs(Case(tokens=((0, 75),)))
    got = kernels.decode_attention(
        x.query, x.keys, x.rotation, x.values, scaling=x.scaling, impl="triton"
    )
    assert torch.equal(got, _triton(x))


def test_decode_attention_of_a_sequence_is_the_same_in_a_batch_and_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = _inputs(Case(bits=4, dc=True, n_full=6, tokens=((0, 75), (11, 60), (0, 0)), n_heads=2))

    def alone(b: int) -> Inputs:
        rows = slice(b, b + 1)
        keys = PackedKeys(x.keys.words[rows], x.keys.scale[rows], x.keys.dc[rows])
        v = x.values
        full = FullPrecisionTokens(x.full.keys[rows], x.full.values[rows], x.full.length[rows])
        return replace(
            x,
            query=x.query[rows],
            keys=keys,
            start=x.start[rows],
            length=x.length[rows],
            values=PackedValues(v.words[rows], v.scale[rows], v.zero[rows], v.bits),
            full=full,
        )

    monkeypatch.setattr(triton_attention, "_n_splits", lambda *_: 2)
    together = _triton(x)
    for b in range(3):
        assert torch.equal(_triton(alone(b))[0], together[b])


def test_decode_attention_number_of_splits_changes_rounding_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = _inputs(Case(dtype=torch.float32, tokens=((0, 200),), room=200))
    results = []
    for n in (1, 7):
        monkeypatch.setattr(triton_attention, "_n_splits", lambda *_, n=n: n)
        results.append(_triton(x))
    assert relative_error(*results) < 1e-6


def test_decode_attention_temperature_scales_the_query_of_its_head() -> None:
    torch.manual_seed(1)
    d, room, temperature = 64, 50, torch.tensor([0.5, 2.0])
    rotation, k = _rotation(2, d), torch.randn(1, 2, room, d)
    values, query = torch.randn(1, 2, room, d), torch.randn(1, 4, d)
    results = []
    for tau in (temperature, None):
        keys = PackedKeys.empty(1, 2, room, d, device=DEVICE)
        kernels.pack_into(keys, k, rotation, _int32(0), temperature=tau, impl="torch")
        q = query if tau is not None else query * temperature.repeat_interleave(2)[:, None]
        results.append(
            kernels.decode_attention(q, keys, rotation, values, scaling=d**-0.5, impl="triton")
        )
    assert relative_error(*results) < 1e-6  # τ a power of 2: the scales are the same


def test_decode_attention_cancels_a_static_mean() -> None:
    torch.manual_seed(2)
    d, room, mean = 64, 50, 3 * torch.randn(1, 64)
    rotation, k = _rotation(1, d), torch.randn(1, 1, room, d) + mean[:, None]
    values, query = torch.randn(1, 1, room, d), torch.randn(1, 3, d)
    keys = PackedKeys.empty(1, 1, room, d, device=DEVICE)
    kernels.pack_into(keys, k, rotation, _int32(0), mean=mean, impl="torch")
    sinks = torch.randn(1, 1, 4, d) + mean[:, None]
    full = FullPrecisionTokens(sinks - mean[:, None], torch.randn(1, 1, 4, d), _int32(4))
    got = kernels.decode_attention(
        query, keys, rotation, values, scaling=d**-0.5, full=full, impl="triton"
    )
    with_mean = unpack.dequantise(keys, rotation, mean, torch.float64)
    dense = torch.cat((with_mean, sinks.double()), 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double()[:, None], dense, torch.cat((values, full.values), 2).double()
    )
    assert relative_error(got, expected[:, 0]) < 1e-5


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e2])
@pytest.mark.parametrize("bits", [16, 4])
def test_decode_attention_is_accurate_for_values_of_any_size(size: float, bits: int) -> None:
    """Half precision has few numbers about a step of 1e-5: weights must not be lost among them."""
    x = _inputs(Case(bits=bits))
    if bits == 16:
        values = (x.values.float() * size).half()
    else:
        v = x.values
        values = replace(v, scale=(v.scale.float() * size).half(), zero=(v.zero * size).half())
    x = replace(x, values=values)
    _judge(_triton(x), x)


def test_decode_attention_keeps_digits_of_steps_too_small_for_half_precision() -> None:
    """A bfloat16 query's values are added up in half precision, which has no number below 6e-8."""
    x = _inputs(Case(bits=4, dtype=torch.bfloat16))
    v = x.values
    small = replace(v, scale=(v.scale.float() * 4e-6).half(), zero=(v.zero.float() * 4e-6).half())
    _judge(_triton(replace(x, values=small)), replace(x, values=small))


def _far_end(x: Inputs, room: int) -> Inputs:
    """The same tokens at the end of a cache so large that the system gives it no memory yet."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("a cache beyond 2^31 elements takes 30 GB")

    def moved(tensor: Tensor) -> Tensor:
        n = tensor.shape[2]
        far = torch.empty(*tensor.shape[:2], room, *tensor.shape[3:], dtype=tensor.dtype)
        far[:, :, room - n :] = tensor
        return far

    k, v = x.keys, x.values
    keys = PackedKeys(moved(k.words), moved(k.scale), None if k.dc is None else moved(k.dc))
    if isinstance(v, PackedValues):
        values = PackedValues(moved(v.words), moved(v.scale), moved(v.zero), v.bits)
    else:
        values = moved(v)
    ahead = room - k.scale.shape[2]
    return replace(x, keys=keys, values=values, start=x.start + ahead, length=x.length + ahead)


@pytest.mark.parametrize(
    ("case", "room"),
    [
        # words of 2^31 bytes and values of 2^31 numbers
        (Case(128, 16, dc=True, tokens=((3, 75),)), 2**27 + 75),
        # two heads of 2^30 scales each
        (Case(16, 16, bits=2, tokens=((3, 75),), n_heads=2), 2**30 + 75),
    ],
)
def test_decode_attention_reads_caches_beyond_2_to_the_31_elements(case: Case, room: int) -> None:
    x = _inputs(case)
    _judge(_triton(_far_end(x, room)), x)


def _spread(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.stack((tensor, tensor), -1)[..., 0]


WRONG = {
    "query is torch.float64": lambda x: replace(x, query=x.query.double()),
    "query is torch.int32": lambda x: replace(x, query=x.query.int()),
    r"expected \[B, Hq, D\]": lambda x: replace(x, query=x.query[0]),
    "head_dim 48": lambda x: replace(x, query=x.query[..., :48]),
    "3 query heads on 2 KV heads": lambda x: replace(x, query=x.query[:, :3]),
    "66 query heads on 2 KV heads": lambda x: replace(x, query=x.query[:, :1].repeat(1, 66, 1)),
    "0 query heads": lambda x: replace(x, query=x.query[:, :0]),
    r"words of shape .*expected \[B, H, C, D/8\]": lambda x: _with_keys(x, words=x.keys.words[0]),
    "words of shape": lambda x: _with_keys(x, words=x.keys.words[:1]),
    "words is torch.int8: use uint8": lambda x: _with_keys(x, words=x.keys.words.to(torch.int8)),
    "words is not contiguous": lambda x: _with_keys(x, words=_spread(x.keys.words)),
    "scale of shape": lambda x: _with_keys(x, scale=x.keys.scale[..., :-1]),
    "scale is torch.float32: use float16": lambda x: _with_keys(x, scale=x.keys.scale.float()),
    "scale is not contiguous": lambda x: _with_keys(x, scale=_spread(x.keys.scale)),
    "dc of shape": lambda x: _with_keys(x, dc=x.keys.dc[0]),
    "dc is torch.bfloat16": lambda x: _with_keys(x, dc=x.keys.dc.bfloat16()),
    "rotation of shape": lambda x: replace(x, rotation=x.rotation[0]),
    "rotation is torch.float64": lambda x: replace(x, rotation=x.rotation.double()),
    r"expected \[B, H, C, Dv\]": lambda x: replace(x, values=x.values[0]),
    "head_dim 63": lambda x: replace(x, values=x.values[..., :63]),
    "values of shape": lambda x: replace(x, values=x.values[:, :, :-1]),
    "values is torch.float64": lambda x: replace(x, values=x.values.double()),
    "values is not contiguous": lambda x: replace(x, values=_spread(x.values)),
    "start is torch.int64: use int32": lambda x: replace(x, start=x.start.long()),
    "start of shape": lambda x: replace(x, start=x.start[:1]),
    "start is not contiguous": lambda x: replace(x, start=x.start[:1].expand(2)),
    "length is torch.float32": lambda x: replace(x, length=x.length.float()),
    "length of shape": lambda x: replace(x, length=x.length[None]),
    "softcap=0.0": lambda x: replace(x, softcap=0.0),
    "softcap=nan": lambda x: replace(x, softcap=float("nan")),
    r"expected \[B, H, E, D\]": lambda x: _with_full(x, keys=x.full.keys[0]),
    "full-precision keys of shape": lambda x: _with_full(x, keys=x.full.keys[..., :32]),
    "full-precision keys is torch.int32": lambda x: _with_full(x, keys=x.full.keys.int()),
    "full-precision keys is not contiguous": lambda x: _with_full(x, keys=_spread(x.full.keys)),
    "full-precision values of shape": lambda x: _with_full(x, values=x.full.values[:, :, :-1]),
    "full-precision values is torch.float32: use float16": (
        lambda x: _with_full(x, values=x.full.values.float())
    ),
    "full-precision length is torch.int64": lambda x: _with_full(x, length=x.full.length.long()),
    "full-precision length of shape": lambda x: _with_full(x, length=x.full.length[:1]),
}
WRONG |= {
    f"{name} on meta": change
    for name, change in {
        "words": lambda x: _with_keys(x, words=x.keys.words.to("meta")),
        "rotation": lambda x: replace(x, rotation=x.rotation.to("meta")),
        "values": lambda x: replace(x, values=x.values.to("meta")),
        "start": lambda x: replace(x, start=x.start.to("meta")),
        "full-precision keys": lambda x: _with_full(x, keys=x.full.keys.to("meta")),
    }.items()
}


def _with_keys(x: Inputs, **changed: Tensor) -> Inputs:
    return replace(x, keys=replace(x.keys, **changed))


def _with_full(x: Inputs, **changed: Tensor) -> Inputs:
    return replace(x, full=replace(x.full, **changed))


@pytest.mark.parametrize("message", WRONG)
def test_decode_attention_refuses_what_does_not_belong_together(message: str) -> None:
    x = _inputs(Case(group=2, n_heads=2, dc=True, n_full=4))
    with pytest.raises(InputError, match=message):
        _triton(WRONG[message](x))


WRONG_VALUES = {
    "values at 3 bits": {"bits": 3},
    "value words is torch.int32": {"words": lambda v: v.words.int()},
    "value words of shape": {"words": lambda v: v.words[:, :, :-1]},
    "value scale is torch.float32": {"scale": lambda v: v.scale.float()},
    "value scale is not contiguous": {"scale": lambda v: _spread(v.scale)},
    "value zero of shape": {"zero": lambda v: v.zero[0]},
}


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_decode_attention_refuses_packed_values_that_do_not_belong(message: str) -> None:
    x = _inputs(Case(bits=4))
    changed = {
        name: change(x.values) if callable(change) else change
        for name, change in WRONG_VALUES[message].items()
    }
    with pytest.raises(InputError, match=message):
        _triton(replace(x, values=replace(x.values, **changed)))


@pytest.mark.parametrize("window", [0, -3])
def test_decode_attention_refuses_a_window_without_a_token(window: int) -> None:
    x = _inputs(Case())
    with pytest.raises(InputError, match=f"window={window}"):
        kernels.decode_attention(
            x.query, x.keys, x.rotation, x.values, scaling=1.0, window=window, impl="triton"
        )
