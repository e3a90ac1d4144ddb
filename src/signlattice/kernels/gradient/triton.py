"""The gradient of the L1 norm on a GPU: attention's loop with a sign in the place of softmax."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.kernels.runtime import INTERPRETED, Launch, interpreter_view, n_programs, padded

MAX_DIM = {2: 256, 4: 128}
"""By bytes of a coordinate: above this the products alone bind, and torch's are as good."""
_BLOCKED = 1 << 28  # most numbers of a block above MAX_DIM


@triton.jit
def _sign_gemm(
    keys,
    rotation,
    partial,
    s_head,
    s_key,
    n_keys,
    inverse_temperature,
    D: tl.constexpr,
    DP: tl.constexpr,
    AXES: tl.constexpr,
    KEYS: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # partial[split, head, axis, :] = Σ slope(r_axis · x) x over every n_splits-th tile of keys
    split, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    axis = tl.program_id(1) * AXES + tl.arange(0, AXES)
    i = tl.arange(0, DP)
    inside = (axis < D)[:, None] & (i < D)[None, :]
    at = head * D * D + axis[:, None] * D + i[None, :]
    r = tl.load(rotation + at, mask=inside, other=0.0).to(keys.dtype.element_ty)  # [AXES, DP]
    total = tl.zeros([AXES, DP], tl.float32)
    x_head = keys + head * s_head
    for first in tl.range(split * KEYS, n_keys, tl.num_programs(0) * KEYS):
        n = first + tl.arange(0, KEYS)
        there = (n < n_keys)[:, None] & (i < D)[None, :]
        x = tl.load(x_head + n.to(tl.int64)[:, None] * s_key + i[None, :], mask=there, other=0.0)
        y = tl.dot(r, tl.trans(x), input_precision=PRECISION)  # [AXES, KEYS]
        if SMOOTH:  # tanh by an exponential that cannot overflow
            small = tl.exp2(-2.8853900817779268 * tl.abs(y) * inverse_temperature)
            size = (1 - small) / (1 + small)
        else:
            size = tl.where(y == 0, 0.0, 1.0)
        slope = tl.where(y < 0, -size, size).to(x.dtype)
        total = tl.dot(slope, x, total, input_precision=PRECISION)
    n_heads = tl.num_programs(2)
    tl.store(partial + split.to(tl.int64) * n_heads * D * D + at, total, mask=inside)


def sign_gemm(keys: Tensor, rotation: Tensor, temperature: float = 0.0) -> Tensor:
    """Compute `reference.sign_gemm`. Keys stay on the chip between the two products that need them.

    Products of fp32 keys are made of three tf32 products each, as accurate as fp32's to a few
    units in the last place; those of bf16 and fp16 keys are of their own dtype, the slope rounded
    to it. Sums are in fp32, in a fixed order: the same result on every run. Above d = `MAX_DIM`
    the products are torch's: in the dtype of fp32 and bf16 keys, and in fp32 of fp16 keys, whose
    sums could overflow.
    """
    d = keys.shape[-1]
    n_heads, n_keys = math.prod(keys.shape[:-2]), keys.shape[-2]
    x = interpreter_view(keys).reshape(n_heads, n_keys, d)
    x = x if x.stride(-1) == 1 else x.contiguous()
    r = rotation.reshape(n_heads, d, d).contiguous()
    if d > MAX_DIM[x.element_size()]:
        return _by_products(x, r, temperature).view(rotation.shape)
    launch = plan(d, x.dtype, smooth=temperature > 0)
    blocks = triton.cdiv(d, launch.constants["AXES"])
    tiles = triton.cdiv(n_keys, launch.constants["KEYS"])
    wanted = n_programs(tiles * blocks * n_heads, x.device, 2) // (blocks * n_heads)
    splits = min(max(1, wanted), max(1, tiles))
    partial = torch.empty(splits, n_heads, d, d, device=x.device)
    inverse = 1 / temperature if temperature else 0.0
    launch((splits, blocks, n_heads), x, r, partial, *x.stride()[:2], n_keys, inverse)
    return partial.sum(0).view(rotation.shape)


def plan(d: int, dtype: torch.dtype, *, smooth: bool) -> Launch:
    """Configure the launch for ``d`` coordinates: 16-bit keys, all axes in one program to d = 128.

    fp32 keys take fewer axes and smaller tiles, since three products need the parts of every number
    in registers.
    """
    side = padded(d)
    exact = dtype == torch.float32
    constants = {
        "D": d,
        "DP": side,
        "AXES": min(side, 32 if exact else 128),
        "KEYS": 64 if side <= (64 if exact else 128) else 32,
        "SMOOTH": smooth,
        "PRECISION": "ieee" if INTERPRETED else "tf32x3",
    }
    return Launch(_sign_gemm, constants, num_warps=8 if side > (16 if exact else 64) else 4)


def _by_products(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    total = torch.zeros(rotation.shape, device=keys.device)
    dtype = torch.float32 if keys.dtype == torch.float16 else keys.dtype
    axes = rotation.to(dtype).mT
    for block in keys.split(max(1, _BLOCKED // (len(keys) * keys.shape[-1])), dim=1):
        block = block.to(dtype)
        y = block @ axes
        slope = (y / temperature).tanh() if temperature else y.sign_()
        total += slope.mT @ block
    return total
