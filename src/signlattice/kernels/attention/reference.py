"""Decode attention on packed keys in torch: the definition that the kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues
from signlattice.kernels.unpack.reference import dequantise


def decode_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    full: FullPrecisionTokens | None = None,
) -> Tensor:
    """Attention of one new token per sequence, over packed keys and tokens kept in full precision.

    Scores are scaling · q·k̂ with k̂ as `dequantise` has it without its mean; with a cap,
    softcap · tanh(score / softcap). A static mean adds the same to all scores and cancels, so
    keys in full precision are to come without it too; under a cap it does not cancel, and keys
    are to be packed without one. Computed in fp32, or fp64 for a fp64 query.

    Args:
        query: [B, Hq, D], not rotated; Hq is a multiple of H.
        keys: C tokens of room, of which start[b] ≤ t < length[b] are attended to.
        rotation: [H, D, D]; values: [B, H, C, Dv], or packed; start, length: int32 [B].

    Returns:
        [B, Hq, Dv] in the dtype of ``query``; zeros for a sequence with no token at all.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    return attention_in(
        wide, query, keys, rotation, values, start, length, scaling, softcap, full
    ).to(query.dtype)


def attention_in(
    dtype: torch.dtype,
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    full: FullPrecisionTokens | None = None,
) -> Tensor:
    """`decode_attention` with every step in ``dtype``.

    In the dtype of a half-precision query it is what a model without our kernels would compute, and
    what their errors are told beside.
    """
    wide = torch.promote_types(dtype, torch.float32)
    q = query.to(dtype).unflatten(1, (len(rotation), -1))
    k = dequantise(keys, rotation, dtype=wide).to(dtype)
    v = (values.read(wide) if isinstance(values, PackedValues) else values).to(dtype)
    t = torch.arange(k.shape[2], device=k.device)
    there = (t >= start[:, None]) & (t < length[:, None])
    if full is not None:
        e = torch.arange(full.keys.shape[2], device=k.device)
        there = torch.cat((there, e < full.length[:, None]), -1)
        k, v = torch.cat((k, full.keys.to(q)), 2), torch.cat((v, full.values.to(q)), 2)
    there = there[:, None, None]  # [B, 1, 1, C + E]
    scores = scaling * q @ k.mT  # [B, H, G, C + E]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~there, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~there, 0.0)  # also where nothing is there, and softmax is NaN
    v = v.masked_fill(~there.squeeze(1).mT.unsqueeze(1), 0.0)  # room not yet used may hold anything
    return (weights @ v).flatten(1, 2)
