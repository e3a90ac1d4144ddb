"""Packing in torch: the definition that the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.bits import pack_signs
from signlattice.kernels.layout import PackedKeys
from signlattice.quantizers.scales import ScaleRule, clamp_to_half, shrunk, token_scale


def pack_into(
    packed: PackedKeys,
    keys: Tensor,
    rotation: Tensor,
    positions: Tensor,
    mean: Tensor | None = None,
    temperature: Tensor | None = None,
    rule: ScaleRule = "unbiased",
) -> None:
    """Centre, rotate, take the signs and the scale of keys, and write them into a cache.

    A key k is taken less its head's static mean. Where ``dc`` is kept, dc = e·k with
    e = (1, …, 1)/√D is subtracted too: y = R (k − dc·e). The words hold sign(y) as in `bits`, and
    the scale is τ·α(y) by ``rule``, as in `scales.token_scale`; it and dc are kept in half
    precision, clamped to it, of a key that is NaN or infinite NaN. Key t of sequence b goes to
    place ``positions[b] + t``. Computed in fp32, or fp64 for fp64 keys.

    Args:
        packed: a cache of capacity C for each of [B, H]; written.
        keys: [B, H, T, D]; rotation: [H, D, D], rows are the new axes.
        positions: int32 [B]; mean: [H, D] or None; temperature: τ [H] or None.
    """
    x = keys.to(torch.promote_types(keys.dtype, torch.float32))
    d = x.shape[-1]
    if mean is not None:
        x = x - mean.to(x)[:, None]
    x, factor = shrunk(x)
    along = x.sum(-1) / d**0.5 / factor
    if packed.dc is not None:
        x = x - x.mean(-1, keepdim=True)
    y = x @ rotation.to(x).mT
    alpha = token_scale(y, rule) / factor
    if temperature is not None:
        alpha = alpha * temperature.to(alpha)[:, None]
    for b, at in enumerate(positions.tolist()):
        place = slice(at, at + x.shape[2])
        packed.words[b, :, place] = pack_signs(y[b])
        packed.scale[b, :, place] = clamp_to_half(alpha[b]).to(packed.scale.dtype)
        if packed.dc is not None:
            packed.dc[b, :, place] = clamp_to_half(along[b]).to(packed.dc.dtype)
