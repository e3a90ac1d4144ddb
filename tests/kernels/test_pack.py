"""Packing on a GPU, or in Triton's interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import DEVICE, assert_accurate, product_tolerance
from torch import Tensor

from kernel_cases import FLOATS
from signlattice import kernels
from signlattice.bits import sign, unpack_signs
from signlattice.kernels.layout import PackedKeys
from signlattice.kernels.pack import reference, triton
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.scales import SCALE_RULES
from signlattice.quantizers.sign import SignQuantizer

ROUNDING = 2.0**-10
"""By how much of a key's length 11 bits of it and of the rotation move a rotated coordinate."""
POISON = 0xAB


def random_rotation(n_heads: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n_heads, d, d, dtype=torch.float64))[0].float().to(DEVICE)


def random_keys(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) + 0.7 * torch.randn(shape[-1])).to(DEVICE, dtype)


def poisoned(batch: int, n_heads: int, room: int, d: int, *, dc: bool, scale=torch.float16):
    """A cache of which every byte and number says that nothing was written."""
    shape = (batch, n_heads, room)
    words = torch.full((*shape, d // 8), POISON, dtype=torch.uint8, device=DEVICE)
    number = torch.full(shape, torch.nan, dtype=scale, device=DEVICE)
    return PackedKeys(words, number, number.clone() if dc else None)


def parts(packed: PackedKeys) -> tuple[Tensor, Tensor, Tensor]:
    return packed.words, packed.scale, packed.dc


def places(*at: int) -> Tensor:
    return torch.tensor(at, dtype=torch.int32, device=DEVICE)


def rotated(keys: Tensor, rotation: Tensor, mean: Tensor | None, dc: bool, dtype: torch.dtype):
    """(y, ‖key‖): centred and rotated keys with every step in one dtype, and their lengths."""
    x = keys.to(dtype)
    x = x if mean is None else x - mean.to(dtype)[:, None]
    x = x - x.mean(-1, keepdim=True) if dc else x
    return x @ rotation.to(dtype).mT, x.norm(dim=-1, keepdim=True)


def assert_packed(got, keys, rotation, mean=None, temperature=None, rule="unbiased") -> None:
    """Signs are those of fp64 but near zero; scales and dc are as exact as torch's own."""
    batch, n_heads, n_tokens, d = keys.shape
    dc = got.dc is not None
    exact = poisoned(batch, n_heads, n_tokens, d, dc=dc, scale=torch.float64)
    origin = torch.zeros(batch, dtype=torch.int32)
    reference.pack_into(exact, keys.double(), rotation, origin, mean, temperature, rule)
    y, length = rotated(keys, rotation, mean, dc, torch.float64)
    clear = y.abs() > ROUNDING * length
    assert clear.double().mean() > 0.9
    assert (unpack_signs(got.words)[clear] == sign(y)[clear]).all()
    tolerance = product_tolerance(torch.float16, d, d)
    assert_accurate(got.scale, exact.scale, tolerance)
    if dc:  # a sum of terms that cancel: what they lose is relative to their own size
        terms = keys.double() if mean is None else keys.double() - mean.double()[:, None]
        cancelled = (terms.norm() / exact.dc.norm()).item()
        assert_accurate(got.dc, exact.dc, tolerance * max(1.0, cancelled))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", kernels.HEAD_DIMS)
def test_pack_into_takes_centred_keys_of_every_head_size(d, dtype):
    n_heads = 2 if d <= 128 else 1
    keys, rotation = random_keys(2, n_heads, 19, d, dtype=dtype), random_rotation(n_heads, d)
    mean, temperature = random_keys(n_heads, d), torch.rand(n_heads, device=DEVICE) + 0.5
    packed = poisoned(2, n_heads, 19, d, dc=True)
    kernels.pack_into(
        packed, keys, rotation, places(0, 0), mean=mean, temperature=temperature, impl="triton"
    )
    assert_packed(packed, keys, rotation, mean, temperature)


@pytest.mark.parametrize("dc", [False, True])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("d", [80, 128, 256])
def test_pack_into_follows_every_scale_rule_with_and_without_dc(d, rule, dc):
    keys, rotation = random_keys(1, 2, 21, d, dtype=torch.float16), random_rotation(2, d)
    packed = poisoned(1, 2, 21, d, dc=dc)
    kernels.pack_into(packed, keys, rotation, places(0), rule=rule, impl="triton")
    assert_packed(packed, keys, rotation, rule=rule)


@pytest.mark.parametrize(
    ("batch", "n_tokens"), [(1, 1), (1, 16), (1, 17), (3, 43), (1, 128), (1, 129), (2, 261)]
)
def test_pack_into_takes_any_number_of_tokens_and_sequences(batch, n_tokens):
    keys = random_keys(batch, 1, n_tokens, 64, dtype=torch.float16)
    rotation = random_rotation(1, 64)
    packed = poisoned(batch, 1, n_tokens, 64, dc=True)
    kernels.pack_into(packed, keys, rotation, places(*[0] * batch), impl="triton")
    assert_packed(packed, keys, rotation)


def assert_unwritten(packed: PackedKeys, written: Tensor) -> None:
    """Nothing but the cells of ``written`` [B, C] was touched."""
    rest = ~written[:, None].expand(packed.scale.shape)
    assert (packed.words[rest] == POISON).all()
    assert packed.scale[rest].isnan().all() and packed.dc[rest].isnan().all()


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
def test_pack_into_writes_the_places_of_each_sequence_alone(n_tokens, positions_dtype):
    room, d = 23, 96
    at = places(0, 7, room - n_tokens).to(positions_dtype)
    keys, rotation = random_keys(3, 2, n_tokens, d), random_rotation(2, d)
    packed = poisoned(3, 2, room, d, dc=True)
    kernels.pack_into(packed, keys, rotation, at, impl="triton")
    t = torch.arange(room, device=DEVICE)
    written = (t >= at[:, None]) & (t < at[:, None] + n_tokens)
    assert_unwritten(packed, written)
    here = written[:, None].expand(packed.scale.shape)
    words, scale, dc = (part[here].unflatten(0, (3, 2, n_tokens)) for part in parts(packed))
    assert_packed(PackedKeys(words, scale, dc), keys, rotation)


def test_pack_into_token_by_token_is_the_whole_prompt():
    keys, rotation = random_keys(2, 2, 6, 64, dtype=torch.float16), random_rotation(2, 64)
    whole, step = poisoned(2, 2, 6, 64, dc=True), poisoned(2, 2, 6, 64, dc=True)
    kernels.pack_into(whole, keys, rotation, places(0, 0), impl="triton")
    for t in range(6):
        kernels.pack_into(step, keys[:, :, t : t + 1], rotation, places(t, t), impl="triton")
    assert torch.equal(step.words, whole.words)
    torch.testing.assert_close((step.scale, step.dc), (whole.scale, whole.dc), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", [-1, -3, 4, 9])
def test_pack_into_never_writes_outside_the_cache(place):
    # straight to the kernel: positions on a GPU are not checked beforehand
    buffer = poisoned(1, 1, 24, 64, dc=True)
    inner = PackedKeys(*(part[:, :, 8:14] for part in parts(buffer)))
    keys, rotation = random_keys(1, 1, 3, 64), random_rotation(1, 64)
    triton.pack_into(inner, keys, rotation, places(place))
    t = torch.arange(-8, 16, device=DEVICE)
    written = (t >= place) & (t < place + 3) & (t >= 0) & (t < 6)
    assert_unwritten(buffer, written[None])
    assert (~buffer.scale[0, 0, written].isnan()).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_into_takes_keys_as_a_projection_leaves_them(dtype):
    keys = random_keys(2, 9, 3, 64, dtype=dtype).transpose(1, 2)  # [B, T, H, D] in memory
    assert_same_as_contiguous(keys)


@pytest.mark.parametrize("axes", [(0, 1, 3, 2), (3, 1, 2, 0)])
def test_pack_into_takes_keys_of_any_layout(axes):
    shape = tuple((2, 3, 9, 64)[axis] for axis in axes)
    assert_same_as_contiguous(torch.randn(*shape, device=DEVICE).permute(axes))
    assert_same_as_contiguous(torch.randn(2, 3, 18, 64, device=DEVICE)[:, :, ::2])


def assert_same_as_contiguous(keys: Tensor) -> None:
    assert not keys.is_contiguous()
    batch, n_heads, n_tokens, d = keys.shape
    rotation = random_rotation(n_heads, d)
    got, expected = (poisoned(batch, n_heads, n_tokens, d, dc=True) for _ in range(2))
    at = places(*[0] * batch)
    kernels.pack_into(got, keys, rotation, at, impl="triton")
    kernels.pack_into(expected, keys.contiguous(), rotation, at, impl="triton")
    assert all(map(torch.equal, parts(got), parts(expected)))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("method", ["none", "dc", "token_mean"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_pack_into_writes_what_the_codec_encodes(rule, method, impl):
    keys, rotation = random_keys(2, 3, 11, 64), random_rotation(3, 64)
    centering = Centering.fit(keys.transpose(0, 1).flatten(1, 2), method)
    temperature = torch.rand(3, device=DEVICE) + 0.5
    codec = SignQuantizer(rotation, centering, rule, temperature)
    packed = poisoned(2, 3, 11, 64, dc=method == "dc")
    kernels.pack_into(
        packed,
        keys,
        rotation,
        places(0, 0),
        mean=centering.mean,
        temperature=temperature,
        rule=rule,
        impl=impl,
    )
    encoded = codec.encode(keys)
    y = codec.rotated(keys)
    clear = y.abs() > ROUNDING * y.norm(dim=-1, keepdim=True)
    assert torch.equal(unpack_signs(packed.words)[clear], unpack_signs(encoded.words)[clear])
    torch.testing.assert_close(packed.scale, encoded.scale, rtol=2e-3, atol=0)
    if method == "dc":
        torch.testing.assert_close(packed.dc, encoded.dc, rtol=2e-3, atol=2e-3)


def test_pack_into_gives_a_zero_key_scale_zero_and_all_bits_set():
    packed = poisoned(1, 1, 2, 64, dc=True)
    zero = torch.zeros(1, 1, 2, 64, device=DEVICE)
    kernels.pack_into(packed, zero, random_rotation(1, 64), places(0), impl="triton")
    assert (packed.words == 0xFF).all() and (packed.scale == 0).all() and (packed.dc == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("batch", "n_tokens"), [(0, 3), (2, 0)])
def test_pack_into_of_no_keys_leaves_the_cache_as_it_was(batch, n_tokens, impl):
    packed = poisoned(batch, 2, 4, 64, dc=True)
    keys = torch.empty(batch, 2, n_tokens, 64, device=DEVICE)
    kernels.pack_into(packed, keys, random_rotation(2, 64), places(*[0] * batch), impl=impl)
    assert_unwritten(packed, torch.zeros(batch, 4, dtype=torch.bool, device=DEVICE))


def lazily(n: int, dtype: torch.dtype) -> Tensor:
    """Numbers that take memory only where they are touched (on a CPU)."""
    try:
        return torch.empty(n, dtype=dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip(f"no room for {n} numbers")


def test_pack_into_writes_a_cache_beyond_2_31_bytes():
    d, n_tokens, reach = 512, 3, 2**31 + 2**12
    room = reach // (d // 8)
    # what an offset of 32 bits would wrap to lies before the cache, in the same buffer
    words = lazily(2 * reach, torch.uint8)[reach:].view(1, 1, room, d // 8)
    far = PackedKeys(words, lazily(room, torch.float16).view(1, 1, room))
    far.words[0, 0, -n_tokens - 2 :] = POISON
    near = poisoned(1, 1, n_tokens, d, dc=False)
    keys, rotation = random_keys(1, 1, n_tokens, d, dtype=torch.float16), random_rotation(1, d)
    kernels.pack_into(near, keys, rotation, places(0), impl="triton")
    kernels.pack_into(far, keys, rotation, places(room - n_tokens), impl="triton")
    assert torch.equal(far.words[:, :, -n_tokens:], near.words)
    assert torch.equal(far.scale[:, :, -n_tokens:], near.scale)
    assert (far.words[:, :, -n_tokens - 2 : -n_tokens] == POISON).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pack_into_takes_keys_beyond_2_31_numbers(axis):
    shape, strides, d = [1, 1, 1, 16], [16, 16, 16, 1], 16
    shape[axis], strides[axis] = 3, 2**30 + d
    reach = 2 * strides[axis] + d
    keys = lazily(2 * reach, torch.float16).as_strided(shape, strides, reach)
    keys.copy_(random_keys(*shape))
    rotation, at = random_rotation(shape[1], d), places(*[0] * shape[0])
    far, near = (poisoned(*shape[:3], d, dc=True) for _ in range(2))
    kernels.pack_into(far, keys, rotation, at, impl="triton")
    kernels.pack_into(near, keys.contiguous(), rotation, at, impl="triton")
    assert torch.equal(far.words, near.words) and torch.equal(far.scale, near.scale)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_pack_into_clamps_scales_to_half_precision_as_the_codec_does(impl, rule):
    keys = random_keys(1, 1, 4, 64) * torch.tensor([1.0, 1e6, 1e15, 1.0], device=DEVICE)[:, None]
    keys[0, 0, 3, 5] = torch.nan
    rotation, packed = random_rotation(1, 64), poisoned(1, 1, 4, 64, dc=True)
    kernels.pack_into(packed, keys, rotation, places(0), rule=rule, impl=impl)
    codec = SignQuantizer(rotation, Centering("dc"), rule).encode_unchecked(keys)
    assert packed.scale[0, 0, 1] == packed.scale[0, 0, 2] == torch.finfo(torch.float16).max
    assert packed.scale[0, 0, :3].isfinite().all() and packed.dc[0, 0, :3].isfinite().all()
    assert packed.scale[0, 0, 3].isnan() and packed.dc[0, 0, 3].isnan(), "NaN must stay visible"
    torch.testing.assert_close(packed.scale[0, 0, :3], codec.scale[0, 0, :3], rtol=2e-3, atol=0)
    assert codec.scale[0, 0, 3].isnan()
