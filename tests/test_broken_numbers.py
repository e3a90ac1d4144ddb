"""Numbers that a format cannot hold: clamped where they are too large, NaN where they are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from signlattice.cache.storage import FullPrecisionStorage, SignStorage
from signlattice.errors import InputError
from signlattice.kernels import Impl, decode_attention, nearest_signs
from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.residual import BasisQuantizer, ResidualQuantizer
from signlattice.quantizers.scales import SCALE_RULES, ScaleRule
from signlattice.quantizers.sign import SignQuantizer

HEADS, DIM = 2, 16
HALF = 65504.0
NO_NUMBERS = (torch.nan, torch.inf, -torch.inf)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEYS = draw(1, HEADS, 1, DIM)
ROTATION = torch.linalg.qr(draw(HEADS, DIM, DIM, seed=1))[0]
BASIS = draw(HEADS, DIM, DIM, seed=2)
METRIC = BASIS @ BASIS.mT / DIM + torch.eye(DIM)
MEAN = draw(HEADS, DIM, seed=3)

CODES = {
    "rotation": SignQuantizer(ROTATION, Centering("none")),
    "rotation, dc": SignQuantizer(ROTATION, Centering("dc")),
    "rotation, mean": SignQuantizer(ROTATION, Centering("token_mean", MEAN)),
    "lattice": SignQuantizer(BASIS, Centering("none"), metric=METRIC),
}


def stored(code: SignQuantizer, keys: Tensor, impl: Impl) -> PackedKeys:
    storage = SignStorage(code, impl)
    storage.append(0, keys)
    packed = storage.packed
    n = keys.shape[2]
    dc = None if packed.dc is None else packed.dc[:, :, :n]
    return PackedKeys(packed.words[:, :, :n], packed.scale[:, :, :n], dc)


def every_path(code: SignQuantizer, keys: Tensor) -> dict[str, PackedKeys]:
    paths = {impl: stored(code, keys, impl) for impl in ("torch", "triton")}
    return paths | {"encode": code.encode_unchecked(keys)}


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", CODES)
def test_sign_code_of_a_key_that_is_no_number_has_scale_nan_in_every_path(
    name: str, rule: ScaleRule
) -> None:
    keys = KEYS.repeat(1, 1, len(NO_NUMBERS) + 1, 1)
    keys[:, :, range(len(NO_NUMBERS)), 3] = torch.tensor(NO_NUMBERS)
    code = replace(CODES[name], scale_rule=rule)
    for path, packed in every_path(code, keys).items():
        assert packed.scale[..., :-1].isnan().all(), path
        assert packed.scale[..., -1].isfinite().all(), path
        assert code.decode(packed)[..., :-1, :].isnan().all(), path
    with pytest.raises(InputError, match="NaN or infinite"):
        code.encode(keys)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", CODES)
def test_sign_code_of_a_large_key_has_its_signs_and_the_largest_scale_in_every_path(
    name: str, rule: ScaleRule
) -> None:
    code = replace(CODES[name], scale_rule=rule)
    expected = code.encode(1e4 * KEYS)  # beside a key of that size a mean is nothing
    keys = torch.cat([size * KEYS for size in (1e6, 1e19, 1e38)], 2)
    for path, packed in every_path(code, keys).items():
        assert (packed.scale == HALF).all(), path
        assert (packed.words == expected.words).all(), path
        if packed.dc is not None and expected.dc is not None:
            assert (packed.dc == HALF * expected.dc.sign()).all(), path


@pytest.mark.parametrize("name", ["rotation", "lattice"])
def test_sign_code_of_a_vanishing_key_has_scale_0(name: str) -> None:
    keys = torch.cat([size * KEYS for size in (0.0, 1e-41, 1e-30)], 2)
    for path, packed in every_path(CODES[name], keys).items():
        assert (packed.scale == 0).all(), path


def test_sign_code_of_keys_that_are_all_one_is_their_mean() -> None:
    keys = MEAN[None, :, None].expand(1, HEADS, 5, DIM)
    code = CODES["rotation, mean"]
    for path, packed in every_path(code, keys).items():
        assert (packed.scale == 0).all(), path
        torch.testing.assert_close(code.decode(packed), keys.contiguous(), msg=path)


def test_pack_of_bfloat16_keys_beyond_half_precision_is_that_of_the_reference() -> None:
    keys = (1e30 * KEYS).bfloat16()
    reference, kernel = (stored(CODES["rotation"], keys, impl) for impl in ("torch", "triton"))
    assert torch.equal(reference.words, kernel.words)
    assert torch.equal(reference.scale, kernel.scale)


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
def test_nearest_signs_shows_a_correlation_that_is_no_number(impl: Impl) -> None:
    correlations = KEYS.repeat(1, 1, len(NO_NUMBERS), 1)
    correlations[:, :, range(len(NO_NUMBERS)), 3] = torch.tensor(NO_NUMBERS)
    _, along, length = nearest_signs(correlations, METRIC, impl=impl)
    assert not (along.isfinite() & length.isfinite()).any()


@pytest.mark.parametrize("impl", ["torch", "triton", "cpu"])
@pytest.mark.parametrize("where", ["scale", "query", "full-precision keys", "values"])
def test_decode_attention_shows_a_number_that_is_none(impl: Impl, where: str) -> None:
    n = 40
    packed = CODES["rotation"].encode(draw(1, HEADS, n, DIM))
    query, values = draw(1, HEADS, DIM), draw(1, HEADS, n, DIM)
    full = FullPrecisionTokens(values.clone(), values.clone(), torch.tensor([n]).int())
    broken = {
        "scale": packed.scale,
        "full-precision keys": full.keys,
        "values": values,
        "query": query,
    }
    broken[where][:, :, 7] = torch.nan
    output = decode_attention(query, packed, ROTATION, values, scaling=0.25, full=full, impl=impl)
    assert output.isnan().all()


CENTERING = Centering("none")
SIMULATED: dict[str, Quantizer] = {
    "levels": LevelQuantizer(CENTERING, ROTATION, 2),
    "residual": ResidualQuantizer(CENTERING, ROTATION, ROTATION.flip(1)),
    "basis": BasisQuantizer(CENTERING, BASIS, METRIC),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_reconstruct_clamps_large_vectors_and_shows_those_that_are_no_numbers(name: str) -> None:
    code = SIMULATED[name]
    large = [code.reconstruct(size * KEYS) for size in (1e9, 1e19, 1e38)]
    assert large[0].isfinite().all()
    assert (large[0] / KEYS.norm()).norm() > HALF / 10
    for more in large[1:]:
        torch.testing.assert_close(more, large[0])
    for number in NO_NUMBERS:
        broken = KEYS.index_fill(3, torch.tensor([3]), number)
        assert code.reconstruct(broken).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_full_precision_storage_clamps_to_its_dtype_and_keeps_what_is_no_number(
    dtype: torch.dtype,
) -> None:
    most = torch.finfo(dtype).max
    given = torch.tensor([3.4e38, -3.4e38, 1.5, *NO_NUMBERS]).view(1, 1, 6, 1)
    storage = FullPrecisionStorage(dtype)
    storage.append(0, given)
    read = storage.read(0, 6, torch.float32).flatten()
    assert read[:3].tolist() == [most, -most, 1.5]
    assert not read[3:].isfinite().any()
