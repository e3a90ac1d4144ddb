"""What a code does to one layer's keys and attention, head by head, and the gain that suits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from signlattice.alignment import beta, relative_distortion
from signlattice.errors import InputError
from signlattice.models.capture import StateBank
from signlattice.models.hooks import AttentionLayer
from signlattice.quantizers.base import StoredQuantizer
from signlattice.quantizers.sign import SignQuantizer

QUERIES_AT_ONCE = 1024
"""Queries of a sequence whose weights are in memory at once."""


@dataclass(frozen=True)
class HeadQuality:
    """How one layer's code treats held-out keys, each figure per KV head [H].

    ``beta``: mean cosine to the sign lattice, or to the code's own in its metric. ``distortion``:
    E‖k̂ − k‖² / E‖k − Ek‖², without the temperature. ``kl``: attention weights, KL(exact ‖ coded)
    in nats, mean over queries. ``top1``: share of queries whose heaviest key stays the heaviest.
    """

    beta: np.ndarray
    distortion: np.ndarray
    kl: np.ndarray
    top1: np.ndarray


@torch.no_grad()
def head_quality(codec: StoredQuantizer, bank: StateBank, layer: AttentionLayer) -> HeadQuality:
    """Measure a layer's code on the held-out keys and queries of ``bank``.

    Its attention is that of ``layer``: window, scaling and soft-cap included, and of a layer whose
    keys others read as well that of its own queries.
    """
    keys = bank.keys(layer.index)
    packed = codec.encode(keys[None])
    decoded = codec.decode(packed)[0]
    if isinstance(codec, SignQuantizer) and codec.temperature is not None:
        decoded = replace(codec, temperature=None).reconstruct(keys[None])[0]
    kl, top1, n_queries = torch.zeros(codec.n_heads), torch.zeros(codec.n_heads), 0
    for query, key in bank.sequences(layer.index):
        codes = codec.encode(key[None])
        groups = (codec.n_heads, -1)
        for first in range(0, query.shape[1], QUERIES_AT_ONCE):
            some = query[:, first : first + QUERIES_AT_ONCE]
            exact = layer.log_weights(_scores(some, key), first)
            coded = layer.log_weights(codec.scores(some[None], codes)[0], first)
            same = (exact.argmax(-1) == coded.argmax(-1)).float()
            difference = (exact.exp() * (exact - coded).nan_to_num(0.0)).sum(-1)
            kl += difference.unflatten(0, groups).mean(1).sum(-1)
            top1 += same.unflatten(0, groups).mean(1).sum(-1)
        n_queries += query.shape[1]
    return HeadQuality(
        beta=_betas(codec, keys),
        distortion=np.array([relative_distortion(k, r) for k, r in zip(keys, decoded)]),
        kl=(kl / n_queries).numpy(),
        top1=(top1 / n_queries).numpy(),
    )


def _betas(codec: StoredQuantizer, keys: Tensor) -> np.ndarray:
    if isinstance(codec, SignQuantizer) and codec.metric is None:
        return np.array([beta(head) for head in codec.rotated(keys)])
    return codec.cosines(keys).double().mean(-1).numpy()


@torch.no_grad()
def fit_temperature(
    codec: SignQuantizer, bank: StateBank, layer: AttentionLayer, newton_steps: int = 12
) -> Tensor:
    """Fit the temperature per KV head [H] that brings coded attention closest to exact attention.

    Minimises KL(exact ‖ coded) over one gain τ per head on calibration queries. With coded scores
    τ a + b the objective is convex in τ: its slope is E_coded[a] − E_exact[a] and its curvature
    Var_coded[a], so Newton's method needs no step size. Clamped to [0.1, 4].

    Raises ``InputError`` on a layer with a soft-cap, under which the objective is not convex.
    """
    if layer.softcap is not None:
        raise InputError(
            f"layer {layer.index} has a soft-cap of {layer.softcap}: its temperature stays at one"
        )
    plain = replace(codec, temperature=None)
    pairs = []
    for query, key in bank.sequences(layer.index):
        packed = plain.encode(key[None])
        full = plain.scores(query[None], packed)[0]
        fixed = _fixed_scores(plain, query, key, packed)
        weights = layer.log_weights(_scores(query, key)).exp()
        pairs.append((full - fixed, fixed, weights))
    tau = torch.ones(codec.n_heads)
    for _ in range(newton_steps):
        slope, curvature = torch.zeros_like(tau), torch.zeros_like(tau)
        for a, fixed, exact in pairs:
            per_query = tau.repeat_interleave(len(a) // codec.n_heads)[:, None, None]
            coded = layer.log_weights(per_query * a + fixed).exp()
            a = a * layer.scaling
            mean = (coded * a).sum(-1)
            variance = (coded * a.square()).sum(-1) - mean.square()
            groups = (codec.n_heads, -1)
            slope += (mean - (exact * a).sum(-1)).unflatten(0, groups).sum((1, 2))
            curvature += variance.unflatten(0, groups).sum((1, 2))
        tau = (tau - slope / curvature.clamp_min(1e-9)).clamp(0.1, 4.0)
    return tau


def _fixed_scores(codec: SignQuantizer, query: Tensor, key: Tensor, packed) -> Tensor:
    """Compute the part of the coded scores that no scale multiplies: what centering gives back."""
    zero = type(packed)(packed.words, torch.zeros_like(packed.scale), packed.dc)
    return codec.scores(query[None], zero)[0]


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Exact scores [Hq, T, T] of queries [Hq, T, D] and keys [H, T, D]."""
    return query @ key.repeat_interleave(len(query) // len(key), 0).mT
