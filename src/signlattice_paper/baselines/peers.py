"""What other projects do to keys and values, by their published rules: to be measured beside ours.

Rules are `vector_codes.Quantizer`s, with every scale, zero and norm counted in the width in which
its authors keep it. Where an implementation of theirs runs in transformers, that one is taken:
`QuantizedLayers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    HQQQuantizedLayer,
    QuantizedLayer,
    QuantoQuantizedLayer,
    get_layer_types_and_kwargs,
)

from signlattice.cache.sign_key_cache import CacheStats
from signlattice.errors import InputError
from signlattice.hadamard import hadamard
from signlattice.memory import EffectiveBits
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.levels import gaussian_levels
from signlattice.rotations.fixed import haar

SUB = 8
"""Coordinates of a piece that is quantised as a vector: with `CODEWORDS`, one bit to each."""

CODEWORDS = 256
"""Of a codebook: an index is a byte."""


@dataclass(frozen=True)
class Rounded(Quantizer):
    """Equal steps between the least and the greatest of a group, which has a scale and a zero.

    ``along`` "tokens": a group is one coordinate of ``size`` tokens that follow each other, as KIVI
    rounds keys. "coordinates": it is ``size`` coordinates of one token, as KIVI and QJL round
    values. Scale and zero are fp16. Source: Liu et al. 2024, arXiv 2402.02750, jy-yuan/KIVI, whose
    groups are of 32; its window of whole tokens is the cache's.

    Raises:
        InputError: on a width outside 1 to 8, an unknown direction, or a size below 1.
    """

    bits_per_level: int
    size: int = 32
    along: Literal["tokens", "coordinates"] = "coordinates"

    def __post_init__(self) -> None:
        _check_width(self.bits_per_level, range(1, 9))
        if self.along not in ("tokens", "coordinates"):
            raise InputError(f"along={self.along!r}: use 'tokens' or 'coordinates'")
        if self.size < 1:
            raise InputError(f"size={self.size}: use 1 or more")

    @property
    def bits(self) -> float:
        """The code's, and thirty-two to a group."""
        return self.bits_per_level + 32 / self.size

    @property
    def group(self) -> int:
        """Tokens of a group."""
        return self.size if self.along == "tokens" else 1

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`. Raises ``InputError`` if groups do not fill a vector."""
        if self.along == "tokens":
            return _by_groups(vectors.float(), self.size, lambda part: self._rounded(part, -2))
        if vectors.shape[-1] % self.size:
            raise InputError(f"size={self.size}: it does not divide {vectors.shape[-1]}")
        return self._rounded(vectors.float().unflatten(-1, (-1, self.size)), -1).flatten(-2)

    def _rounded(self, x: Tensor, axis: int) -> Tensor:
        last = 2**self.bits_per_level - 1
        zero = _half(x.amin(axis, keepdim=True))
        scale = _half((x.amax(axis, keepdim=True) - zero).clamp_min(0) / last)
        return zero + scale * ((x - zero) / scale.clamp_min(1e-8)).round().clamp(0, last)


@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """TurboQuant-mse: x̂ = ‖x‖ Rᵀc, where c are the levels nearest to the coordinates of Rx/‖x‖.

    R is uniformly random (`rotations.haar`), one for all heads, as in the paper; the levels are
    those of least error for a coordinate of a uniformly random unit vector (`sphere_levels`); the
    norm is fp16. The length of c is not made one. Source: Zandieh et al. 2025, arXiv 2504.19874,
    algorithm 1. Its second algorithm, for inner products, adds a QJL of what is left; it is not
    done here.

    Raises:
        InputError: on a width outside 1 to 8.
    """

    head_dim: int
    bits_per_level: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_width(self.bits_per_level, range(1, 9))

    @property
    def bits(self) -> float:
        """The levels', and sixteen to a token for the norm."""
        return self.bits_per_level + 16 / self.head_dim

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        x = vectors.float()
        rotation = haar(self.head_dim, self.seed).to(x.device)
        levels = sphere_levels(self.head_dim, self.bits_per_level).to(x.device)
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp_min(1e-12) @ rotation.T
        code = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        return _half(norm) * (code @ rotation)


@dataclass(frozen=True, eq=False)
class RaBitQ(Quantizer):
    """RaBitQ at one bit: x̂ = μ + ‖x − μ‖/⟨ō, o⟩ · Rᵀō, where ō = sign(o)/√D.

    o is R(x − μ)/‖x − μ‖. Inner products with x̂ are unbiased over the random rotation R, one for
    all heads. A token keeps ‖x − μ‖ and ⟨ō, o⟩, both fp32 as the authors' files have them, though
    an inner product needs their quotient alone. ``mean`` μ [H, D]: in the paper the nearest of many
    centroids, here one to a head. Source: Gao and Long 2024, arXiv 2405.12497, gaoj0017/RaBitQ. Its
    random rounding of the query to four bits is left out: queries stay whole.
    """

    mean: Tensor
    seed: int = 0

    @classmethod
    def fit(cls, vectors: Tensor) -> RaBitQ:
        """With the means of calibration vectors [H, N, D]."""
        return cls(vectors.double().mean(1).float())

    @property
    def bits(self) -> float:
        """One, and sixty-four to a token."""
        return 1 + 64 / self.mean.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Of the means, four to a number."""
        return 4 * self.mean.numel()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        d = self.mean.shape[-1]
        mean = self.mean[:, None].to(vectors.device)
        rotation = haar(d, self.seed).to(vectors.device)
        y = (vectors.float() - mean) @ rotation.T
        norm = y.norm(dim=-1, keepdim=True)
        near = torch.where(y >= 0, 1.0, -1.0) / math.sqrt(d)
        cosine = (near * y).sum(-1, keepdim=True) / norm.clamp_min(1e-12)
        return mean + norm / cosine.clamp_min(1e-6) * near @ rotation


@dataclass(frozen=True)
class QJL(Quantizer):
    """Signs of m = 2D random projections: x̂ = √(π/2)/m · ‖x‖ Sᵀ sign(Sx), with the norm in fp16.

    S is made of two uniformly random rotations times √D, as the authors' code makes its Gaussian
    rows orthogonal. Inner products with x̂ are unbiased over S, but for a share of 1/(4D), by which
    rows of a rotation differ from Gaussian ones. Source: Zandieh et al. 2024, arXiv 2406.03482,
    amirzandieh/QJL. Left out: the sketches of their own for the eight largest channels of every 32
    keys, whose signs, norms and places are further bits, and the doubled m of the first layers.
    """

    head_dim: int
    seed: int = 0

    @property
    def bits(self) -> float:
        """Two, and sixteen to a token for the norm."""
        return 2 + 16 / self.head_dim

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        x, d = vectors.float(), self.head_dim
        rows = torch.cat([haar(d, 2 * self.seed), haar(d, 2 * self.seed + 1)])
        projections = (math.sqrt(d) * rows).to(x.device)
        signs = torch.where(x @ projections.T >= 0, 1.0, -1.0)
        norm = _half(x.norm(dim=-1, keepdim=True))
        return math.sqrt(math.pi / 2) / len(projections) * norm * (signs @ projections)


@dataclass(frozen=True)
class NSNQuantLike(Quantizer):
    """Normalise, shift, normalise, Hadamard, then one codebook for eight Gaussian coordinates.

    Of ``size`` tokens that follow each other: x = n(z₀), z₀ = o + sz, where n and s make tokens of
    norm √D and o is the mean of the normalised tokens; Hz, nearly Gaussian, is read as the nearest
    codewords (`gaussian_codebook`): 256 signed ones at one bit, signs and 256 of the sizes at two.
    n, s and o are fp16. Source: Son et al. 2025, arXiv 2505.18231, whose block is of 64 tokens.
    Only like it: keys come after RoPE here and before it there, its codebooks were trained further
    by gradients, and n, s and o are rounded to four bits there.

    Raises:
        InputError: on a width that is neither 1 nor 2, or a size below 1.
    """

    head_dim: int
    bits_per_level: int
    size: int = 64

    def __post_init__(self) -> None:
        _check_width(self.bits_per_level, range(1, 3))
        if self.size < 1:
            raise InputError(f"size={self.size}: use 1 or more")

    @property
    def bits(self) -> float:
        """The codewords', two scales of sixteen to a token, and a mean of sixteen to a block."""
        return self.bits_per_level + 32 / self.head_dim + 16 / self.size

    @property
    def group(self) -> int:
        """Tokens of a block."""
        return self.size

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        return _by_groups(vectors.float(), self.size, self._block)

    def _block(self, x: Tensor) -> Tensor:
        turn = hadamard(self.head_dim).to(x.device)
        first = _rms(x)
        shift = _half((x / first).mean(-2, keepdim=True))
        centred = x / first - shift
        second = _rms(centred)
        pieces = (centred / second @ turn.T).unflatten(-1, (-1, SUB))
        signed = self.bits_per_level == 1
        words = gaussian_codebook(signed).to(x.device)
        found = _quantised(pieces if signed else pieces.abs(), words)
        if not signed:
            found = torch.where(pieces >= 0, found, -found)
        return first * (shift + second * (found.flatten(-2) @ turn))


@dataclass(frozen=True, eq=False)
class ProductQuantizer(Quantizer):
    """Product quantisation: every eight coordinates are the nearest of 256 learned codewords.

    ``codebooks`` [H, D/8, 256, 8], kept in fp16. A token has no scale. Source: Jégou, Douze and
    Schmid 2011, doi 10.1109/TPAMI.2010.57.
    """

    codebooks: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, seed: int = 0, rounds: int = 12) -> ProductQuantizer:
        """By k-means on calibration vectors [H, N, D]. Raises ``InputError`` as `k_means` does, and
        if pieces of eight do not fill a vector."""
        if vectors.shape[-1] % SUB:
            raise InputError(f"vectors of {vectors.shape[-1]} coordinates: use a multiple of {SUB}")
        pieces = vectors.float().unflatten(-1, (-1, SUB)).transpose(1, 2)  # [H, D/8, N, 8]
        found = k_means(pieces.flatten(0, 1), CODEWORDS, seed, rounds)
        return cls(_half(found).unflatten(0, pieces.shape[:2]))

    @property
    def bits(self) -> float:
        """A byte to eight coordinates."""
        return 1.0

    @property
    def static_bytes(self) -> int:
        """Of the codebooks."""
        return 2 * self.codebooks.numel()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        pieces = vectors.float().unflatten(-1, (-1, SUB))  # [B, H, T, D/8, 8]
        found = torch.empty_like(pieces)
        for head, books in enumerate(self.codebooks.to(vectors.device)):
            for place, words in enumerate(books):
                found[:, head, :, place] = _quantised(pieces[:, head, :, place], words)
        return found.flatten(-2)


@cache
def sphere_levels(d: int, bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a coordinate of a random unit vector of d.

    Its density is (1 − x²)^((d−3)/2) up to a factor. Lloyd's rounds from the levels of the Gaussian
    of that variance. Raises ``InputError`` unless 1 <= bits <= 8 and d is 3 or more.
    """
    if d < 3:
        raise InputError(f"d={d}: use 3 or more")
    law = beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)
    levels = gaussian_levels(bits).double().numpy() / math.sqrt(d)
    # ∫ x p(x) dx = −(1 − x²) p(x) / (d − 1)
    for _ in range(20 * 4**bits):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        moment = np.zeros_like(edges)
        moment[1:-1] = -(1 - edges[1:-1] ** 2) * law.pdf(edges[1:-1]) / (d - 1)
        levels, former = np.diff(moment) / np.diff(law.cdf(edges)), levels
        if np.abs(levels - former).max() < 1e-9:
            break
    return torch.from_numpy(levels).float()


@cache
def gaussian_codebook(signed: bool) -> Tensor:
    """Codewords [256, 8] by k-means for eight standard Gaussian coordinates, or for their sizes.

    From a fixed seed: it is the same for every model, and weighs nothing.
    """
    drawn = torch.randn(1, 2**15, SUB, generator=torch.Generator().manual_seed(0))
    return k_means(drawn if signed else drawn.abs(), CODEWORDS)[0]


def k_means(points: Tensor, k: int, seed: int = 0, rounds: int = 12) -> Tensor:
    """Centroids [G, k, d] of G sets of points [G, N, d], begun as k-means++ does on 16k of them.

    A centroid to which no point is nearest stays where it is. Source: Arthur and Vassilvitskii
    2007. Raises ``InputError`` on fewer points than centroids.
    """
    n_sets, n, d = points.shape
    if n < k:
        raise InputError(f"{n} points for {k} centroids: give as many or more")
    generator = torch.Generator(points.device).manual_seed(seed)
    centroids = points.new_empty(n_sets, k, d)
    some = points[:, torch.randperm(n, generator=generator, device=points.device)[: 16 * k]]
    left = points.new_ones(some.shape[:2])
    for i in range(k):
        chosen = torch.multinomial(left.clamp_min(1e-30), 1, generator=generator)[..., None]
        centroids[:, i : i + 1] = some.gather(1, chosen.expand(-1, -1, d))
        far = (some - centroids[:, i : i + 1]).square().sum(-1)
        left = far if i == 0 else left.minimum(far)
    for _ in range(rounds):
        for own, found in zip(points, centroids):
            nearest = _nearest(own, found)
            counts = torch.bincount(nearest, minlength=k)[:, None]
            sums = torch.zeros_like(found).index_add_(0, nearest, own)
            found.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), found))
    return centroids


def _nearest(points: Tensor, words: Tensor) -> Tensor:
    """Index [N] of the word [k, d] that is nearest to each point [N, d]."""
    far = -words.square().sum(-1) / 2
    parts = points.split(2**14)
    return torch.cat([torch.addmm(far, part, words.T).argmax(-1) for part in parts])


def _quantised(points: Tensor, words: Tensor) -> Tensor:
    """The word [k, d] that is nearest to each point [..., d]."""
    return words[_nearest(points.reshape(-1, points.shape[-1]), words)].view_as(points)


def _by_groups(x: Tensor, size: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens [B, H, T, D] changed as groups [B, H, T/size, size, D]; the last may be smaller."""
    whole = x.shape[2] // size * size
    parts = [x[:, :, :whole].unflatten(2, (-1, size))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])
    return torch.cat([change(part).flatten(2, 3) for part in parts], 2)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the coordinates, fp16, above zero."""
    return _half(x.square().mean(-1, keepdim=True).sqrt()).clamp_min(2**-24)


def _check_width(bits: int, allowed: range) -> None:
    if bits not in allowed:
        raise InputError(f"bits_per_level={bits}: use {allowed[0]} to {allowed[-1]}")


# Caches of transformers.

Backend = Literal["quanto", "hqq"]


@dataclass(frozen=True)
class _Library:
    """A library behind a layer of transformers: its widths, and the axis that it is given."""

    layer: type[QuantizedLayer]
    widths: tuple[int, ...]
    axis: int


_LIBRARIES = {
    "quanto": _Library(QuantoQuantizedLayer, (2, 4), 0),
    "hqq": _Library(HQQQuantizedLayer, (1, 2, 4, 8), 1),
}


class QuantizedLayers(Cache):
    """Transformers' quantised cache layers where all tokens are seen, its ordinary ones elsewhere.

    With full attention alone it is transformers' ``QuantizedCache``, which refuses sliding layers.
    ``backend`` "quanto" (2 and 4 bits, axis 0, the default) or "hqq" (1, 2, 4 and 8 bits, axis 1,
    which transformers' guide asks for; its default axis 0 makes groups of coordinates that lie a
    64th of the whole batch apart, in other heads and sequences). Groups of 64 coordinates, the
    default: with either axis a piece of one token's vector where heads are of 64 or a multiple.
    HQQ's 3 bits are left out: along axis 1 in transformers 5.23 what is read back is not what was
    written.

    Keys and values come in ``dtype``, fp16, and so do scales and zeros, as in a model of that
    dtype; None leaves them the model's. A layer holds up to ``residual_length`` latest tokens
    whole: when they are as many, it rounds everything anew. What one call brings, it sees whole,
    the first call above all: read it in short calls.

    Raises:
        InputError: on an unknown backend, or a width that it has not.
    """

    def __init__(
        self,
        model: LoadedModel | PreTrainedModel,
        backend: Backend,
        bits: int,
        residual_length: int = 64,
        dtype: torch.dtype | None = torch.float16,
    ) -> None:
        if backend not in _LIBRARIES:
            raise InputError(f"backend={backend!r}: choose one of {', '.join(_LIBRARIES)}")
        library = _LIBRARIES[backend]
        if bits not in library.widths:
            widths = ", ".join(map(str, library.widths))
            raise InputError(f"bits={bits}: {backend} is read here at {widths}")
        model = model.model if isinstance(model, LoadedModel) else model
        owners = {i for i, x in attention_layers(model).items() if x.owns_keys and x.window is None}
        if not owners:
            raise InputError("no layer of the model sees all tokens with keys of its own")
        kinds = zip(*get_layer_types_and_kwargs(model.config.get_text_config(decoder=True)))
        layers = [
            library.layer(
                nbits=bits,
                axis_key=library.axis,
                axis_value=library.axis,
                residual_length=residual_length,
            )
            if index in owners
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for index, (kind, arguments) in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        self.dtype = dtype
        self.held = {index: _Held() for index in sorted(owners)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """As ``Cache.update``, in ``dtype`` inside."""
        if layer_idx not in self.held:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held, layer = self.held[layer_idx], self.layers[layer_idx]
        held.shapes = {"keys": key_states.shape, "values": value_states.shape}
        held.n_seen = layer.get_seq_length() - _n_whole(layer)
        dtype = key_states.dtype
        states = (x.to(self.dtype or dtype) for x in (key_states, value_states))
        keys, values = super().update(*states, layer_idx, *args, **kwargs)
        return keys.to(dtype), values.to(dtype)

    def stats(self) -> CacheStats:
        """As `SignKeyCache.stats`, by the tensors that are there.

        ``n_packed`` counts what the latest call read as codes, not what it has just turned to some.
        ``expected`` is the same account, there is no other.
        """
        parts = dict.fromkeys(("keys", "values", "window", "sinks", "whole layers"), 0)
        coded = dict.fromkeys(("keys", "values"), 0)  # coordinates that are codes
        beside = dict.fromkeys(("keys", "values"), 0)  # bytes of those that are whole
        total = dict.fromkeys(("keys", "values"), 0)
        n_packed = fp16 = batch = 0
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if index not in self.held:
                for tensor in (layer.keys, layer.values):
                    if tensor is not None:  # as in a layer that reads those of another
                        parts["whole layers"] += tensor.nbytes
                        fp16 += 2 * tensor.numel()
                continue
            held = self.held[index]
            n_tokens, n_whole = layer.get_seq_length(), _n_whole(layer)
            for name, stored, whole in (
                ("keys", layer._quantized_keys, layer.keys),
                ("values", layer._quantized_values, layer.values),
            ):
                batch, n_heads, _, size = held.shapes[name]
                each = batch * n_heads * size
                parts[name] += _n_bytes(stored)
                coded[name] += each * (n_tokens - n_whole)
                total[name] += each * n_tokens
                beside[name] += whole.nbytes
            n_packed += batch * held.shapes["keys"][1] * held.n_seen
        parts["window"] = sum(beside.values())
        fp16 += 2 * sum(total.values())
        kept = {name: parts[name] + beside[name] for name in beside}
        packed = {name: parts[name] for name in coded}
        return CacheStats(
            self.get_seq_length(),
            batch,
            n_packed,
            parts,
            sum(kept.values()),
            fp16,
            _bits(packed, coded),
            _bits(kept, total),
        )


@dataclass
class _Held:
    """What a layer was given: shapes of the latest call, and tokens that it found as codes."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    n_seen: int = 0


def _n_whole(layer: QuantizedLayer) -> int:
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if keys is not None and keys.ndim == 4 else 0


def _n_bytes(stored: object) -> int:
    """Bytes of all tensors in what a library keeps: a tensor, one made of others, or a tuple."""
    if isinstance(stored, (tuple, dict)):
        parts = stored.values() if isinstance(stored, dict) else stored
        return sum(_n_bytes(part) for part in parts)
    if not isinstance(stored, Tensor):
        return 0
    if hasattr(stored, "__tensor_flatten__"):
        return sum(_n_bytes(getattr(stored, name)) for name in stored.__tensor_flatten__()[0])
    return stored.nbytes


def _bits(n_bytes: dict[str, int], n: dict[str, int]) -> EffectiveBits:
    each = [8 * n_bytes[name] / max(n[name], 1) for name in ("keys", "values")]
    return EffectiveBits(*each, 8 * sum(n_bytes.values()) / max(sum(n.values()), 1))
