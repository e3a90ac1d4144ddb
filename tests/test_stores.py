"""Stores of a cache layer: what is read back, how they grow, forget and change their batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cache_cases import DEVICES, difference, layer_code
from signlattice.cache.storage import (
    KEY_FORMATS,
    PAGE,
    VALUE_FORMATS,
    FullPrecisionStorage,
    IntegerStorage,
    SignStorage,
    Store,
    key_storage,
    value_storage,
)
from signlattice.errors import InputError
from signlattice.kernels.layout import PackedValues

HEADS, D = 2, 16
KEYS = (
    [(fmt, None) for fmt in KEY_FORMATS if fmt != "sign"]
    + [("sign", ("rotation", centering)) for centering in ("none", "dc", "token_mean")]
    + [("sign", ("lattice", centering)) for centering in ("none", "token_mean")]
)
STORES = [("values", fmt, None) for fmt in VALUE_FORMATS] + [("keys", *case) for case in KEYS]


def vectors(n: int, batch: int = 3, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, n, D, generator=generator).to(device)


def new(kind: str, fmt: str, code: tuple[str, str] | None, dtype=torch.float32) -> Store:
    if kind == "values":
        return value_storage(fmt, dtype)
    codec = None if code is None else layer_code(code[0], HEADS, D, code[1])
    return key_storage(fmt, dtype, codec, "auto")


def filled(case: tuple, given: Tensor, sizes: tuple[int, ...] | None = None) -> Store:
    store, at = new(*case), 0
    for part in given.split(sizes or (given.shape[2],), 2):
        store.append(at, part)
        at += part.shape[2]
    return store


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", STORES)
def test_store_append_in_parts_is_the_same_as_at_once(case, device):
    given = vectors(2 * PAGE + 9, device=device)
    whole = filled(case, given)
    parts = filled(case, given, (7, PAGE, 1, 1, PAGE))
    assert whole.room == parts.room == 3 * PAGE
    for name, part in whole.parts.items():
        torch.testing.assert_close(parts.parts[name], part)
    expected = whole.read(0, 2 * PAGE, torch.float32)[:, :, 5 : PAGE + 8]
    torch.testing.assert_close(parts.read(5, PAGE + 8, torch.float32), expected)


@pytest.mark.parametrize("code", [case for _, case in KEYS if case])
def test_sign_storage_reads_signs_as_the_codec_has_them_but_centred(code):
    given = vectors(20)
    codec = layer_code(code[0], HEADS, D, code[1])
    expected = codec.decode(codec.encode(given))
    if code[1] == "token_mean":
        expected = expected - codec.centering.mean[:, None]
    got = filled(("keys", "sign", code), given).read(0, 20, torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_integer_storage_reads_values_within_half_a_step(bits):
    given = vectors(20)
    got = filled(("values", f"int{bits}", None), given).read(0, 20, torch.float32)
    step = (given.amax(-1) - given.amin(-1)) / (2**bits - 1)
    # scale and zero are kept in half precision, which is off by 2^-11 of the least and the step
    slack = 2**-10 * given.abs().amax(-1)
    assert ((got - given).abs() <= (step / 2 + slack)[..., None]).all()
    assert difference(got, given) > 1e-4  # it was rounded


def test_full_precision_storage_fp8_is_that_of_torch_and_never_infinite():
    given = vectors(20)
    given[0, 0, 0, 0] = 1e4  # e4m3 ends at 448, and what is beyond would be NaN
    got = filled(("values", "fp8", None), given).read(0, 20, torch.float32)
    torch.testing.assert_close(got, given.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_full_precision_storage_keeps_whole_vectors_as_they_came(dtype):
    given = vectors(20).to(dtype)
    store = value_storage("full", dtype)
    store.append(0, given)
    assert torch.equal(store.read(0, 20, dtype), given)
    assert store.parts["vectors"].dtype == dtype


@pytest.mark.parametrize("bits", [4, 2])
def test_key_storage_rounds_keys_with_an_outlier_better_once_they_are_rotated(bits):
    """Without the rotation one large coordinate takes the whole range, and the others are lost."""
    given = vectors(200)
    given[..., 3] += 12
    plain = filled(("values", f"int{bits}", None), given).read(0, 200, torch.float32)
    rotated = filled(("keys", f"int{bits}", None), given).read(0, 200, torch.float32)
    assert difference(rotated, given) < 0.7 * difference(plain, given)


@pytest.mark.parametrize("case", STORES)
def test_store_without_its_first_tokens_has_the_others(case):
    given = vectors(PAGE + 30)
    store = filled(case, given)
    before = store.read(0, PAGE + 30, torch.float32)
    rest = store.without(40, PAGE + 30)
    assert rest.room == PAGE < store.room
    assert torch.equal(rest.read(0, PAGE - 10, torch.float32), before[:, :, 40:])
    assert torch.equal(store.read(0, PAGE + 30, torch.float32), before)  # who reads it still can
    more = vectors(20, seed=1)
    rest.append(PAGE - 10, more)
    assert torch.equal(rest.read(0, PAGE - 10, torch.float32), before[:, :, 40:])
    torch.testing.assert_close(
        rest.read(PAGE - 10, PAGE + 10, torch.float32),
        filled(case, more).read(0, 20, torch.float32),
    )
    assert torch.equal(store.read(0, PAGE + 30, torch.float32), before)


@pytest.mark.parametrize("case", STORES)
def test_store_each_change_reaches_every_part(case):
    given, order = vectors(20), torch.tensor([2, 0, 0, 1])
    store, expected = filled(case, given), filled(case, given[order])
    store.each(lambda part: part.index_select(0, order))
    assert store.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert torch.equal(store.parts[name][:, :, :20], part[:, :, :20])
    store.append(20, given[order])  # it can be written in place again
    assert torch.equal(store.read(20, 40, torch.float32), expected.read(0, 20, torch.float32))


@pytest.mark.parametrize("n", [1, PAGE, PAGE + 1])
@pytest.mark.parametrize("case", STORES)
def test_store_n_bytes_are_those_of_its_storages(case, n):
    store = filled(case, vectors(n))
    storages = {part.untyped_storage().data_ptr(): part for part in store.parts.values()}
    assert len(storages) == len(store.parts)
    assert store.n_bytes == sum(p.untyped_storage().nbytes() for p in storages.values())
    assert store.n_bytes % store.room == 0 and store.room == -(-n // PAGE) * PAGE


def test_sign_storage_key_takes_a_bit_a_coordinate_and_a_scale():
    store = filled(("keys", "sign", ("rotation", "token_mean")), vectors(PAGE))
    assert 8 * store.n_bytes == 3 * HEADS * PAGE * (D + 16)


def test_sign_storage_and_integer_storage_give_kernels_the_parts_themselves():
    """No copy: attention reads the store as it lies."""
    keys = filled(("keys", "sign", ("rotation", "dc")), vectors(20))
    values = filled(("values", "int4", None), vectors(20))
    assert isinstance(keys, SignStorage) and isinstance(values, IntegerStorage)
    for store, names in ((keys, ("words", "scale", "dc")), (values, ("words", "scale", "zero"))):
        assert set(store.parts) == set(names)
        for name in names:
            assert getattr(store.packed, name).data_ptr() == store.parts[name].data_ptr()
    assert isinstance(values.packed, PackedValues) and values.packed.bits == 4


def test_value_storage_and_key_storage_refuse_what_is_unknown():
    with pytest.raises(InputError, match="value_format='int3': choose one of full, fp8, int8"):
        value_storage("int3", torch.float32)
    with pytest.raises(InputError, match="key_format='bit': choose one of sign, full, fp8"):
        key_storage("bit", torch.float32, None, "auto")
    with pytest.raises(InputError, match="keys as signs need the code"):
        key_storage("sign", torch.float32, None, "auto")
    assert isinstance(key_storage("fp8", torch.float32, None, "auto"), FullPrecisionStorage)
