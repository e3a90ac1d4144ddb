"""What a solver reads keys through, wherever they are, and the scale in which it reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.kernels import Impl

_T = TypeVar("_T")


class KeySource(Protocol):
    """What a solver reads keys [H, N, d] of norm sqrt(d) through, wherever they are.

    Where processes share the keys, each calls the same methods in the same order and gets the same
    results. ``leads`` is true in the one that warns, reports and keeps the checkpoint.
    """

    @property
    def heads(self) -> int:
        """H."""

    @property
    def n_keys(self) -> int:
        """N, those of all processes together."""

    @property
    def dim(self) -> int:
        """d."""

    @property
    def device(self) -> torch.device:
        """Where gradients are computed, and what they are to be multiplied with."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: fp32 or fp64."""

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""

    def dealt(self, seed: int) -> Self:
        """The same keys in the order in which batches take them."""

    def batch(self, step: int, size: int) -> Self:
        """About ``size`` keys of each head, those of a step: batches follow one another."""

    def narrowed(self, heads: Sequence[int]) -> Self:
        """Those heads alone."""

    def gradient(self, rotation: Tensor, temperature: float, impl: Impl) -> Tensor:
        """`learn.smoothed_gradient` at ``rotation`` [H, d, d], of all keys."""

    def cosines(self, rotation: Tensor, heads: Sequence[int]) -> list[float]:
        """`learn.mean_cosine` of each of ``heads``, n of them, at its ``rotation`` [n, d, d]."""

    def identity(self) -> Tensor:
        """What tells these keys from others: the keys themselves, or a digest of them."""

    def led(self, work: Callable[[], _T]) -> _T:
        """In every process what ``work`` returns, or raises, in the one that leads."""


def unit_keys(keys: Tensor, name: str, axes: str) -> Tensor:
    """Keys scaled to norm sqrt(d), hence to coordinates of rms one, in fp32 or fp64.

    ``name`` and ``axes``, such as "[N, d]", are what an ``InputError`` speaks of: on keys that are
    of another rank, empty, not finite or of zero norm.
    """
    if keys.ndim != len(axes.split(",")) or not keys.numel():
        raise InputError(f"{name} of shape {list(keys.shape)}: expected {axes}, not empty")
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    peak = keys.abs().amax(dim=-1, keepdim=True)  # taken out first, so that no square overflows
    if not peak.isfinite().all():
        raise InputError(f"{name} hold NaN or infinite values: expected finite keys")
    if n_zero := int((peak == 0).sum()):
        raise InputError(f"{name} hold {n_zero} keys of zero norm: leave them out")
    keys = keys / peak
    return keys * (math.sqrt(keys.shape[-1]) / keys.norm(dim=-1, keepdim=True))
