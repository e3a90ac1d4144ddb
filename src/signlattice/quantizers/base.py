"""The protocol of a quantizer: what every code of keys or values has to say and do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Quantizer(ABC):
    """A code of the keys, or of the values, of one layer."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits to a coordinate, with all that is kept of a token: scales, zeros, means."""

    @property
    def static_bytes(self) -> int:
        """Bytes that are kept once for all tokens: matrices, means and codebooks that are learned.

        What comes from a seed weighs nothing.
        """
        return 0

    @property
    def group(self) -> int:
        """Tokens that are coded together: of slots 0 … group - 1, of the next so many, and so on."""
        return 1

    def to(self, device: torch.device) -> Quantizer:
        """Return the quantizer on another device; one that holds no tensors is on all."""
        return self

    @abstractmethod
    def reconstruct(self, vectors: Tensor) -> Tensor:
        """What vectors [B, H, T, D] are read as, fp32. Whole groups, but for the last."""
