"""Any code of keys, of what is left of them once a head's static mean is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering


@dataclass(frozen=True, eq=False)
class Centred(Quantizer):
    """Code keys less their mean, and add it back: what our own codes do, given to another.

    Softmax does not see the mean, so a cache need not add it; here it is, and comes to the same.
    """

    inner: Quantizer
    centering: Centering

    @classmethod
    def fit(cls, keys: Tensor, rule: Callable[[Tensor], Quantizer]) -> Centred:
        """Fit the mean to calibration keys [H, N, D], and the code to what it leaves of them."""
        centering = Centering.fit(keys, "token_mean")
        return cls(rule(centering.split(keys)[0]), centering)

    @property
    def bits(self) -> float:
        """Bits of the code: the mean is stored once."""
        return self.inner.bits

    @property
    def static_bytes(self) -> int:
        """Bytes of the code's own, and of the mean."""
        return self.inner.static_bytes + self.centering.n_bytes

    @property
    def group(self) -> int:
        """Tokens that the code takes together."""
        return self.inner.group

    def to(self, device: torch.device) -> Centred:
        """Return the quantizer on another device."""
        return Centred(self.inner.to(device), self.centering)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        centred, offset = self.centering.split(vectors.float())
        return self.centering.join(self.inner.reconstruct(centred), offset)
