"""The protocols of a quantizer: what it loses, and how its codes are stored.

A `Quantizer` can be measured: it says how many bits it takes and what it reconstructs. A
`StoredQuantizer` can be shipped too: it is fitted on a calibration set, a cache holds its codes,
and a codec file its parameters. To add one, write a subclass in a module of its own and a line in
`quantizers.registry`; labs, cache, codec file and command line find it there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.centering import Centering, CenteringMethod

if TYPE_CHECKING:
    from signlattice.calibration import CalibrationConfig


class Quantizer(ABC):
    """A code of the keys, or of the values, of one layer. It never changes: copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits per coordinate, with all that is stored of a token: scales, zeros, means."""

    @property
    def static_bytes(self) -> int:
        """Bytes that are stored once for all tokens: learned matrices, means and codebooks.

        What is drawn from a seed takes none.
        """
        return 0

    @property
    def group(self) -> int:
        """Tokens that are coded together: those at 0 … group - 1, the next group, and so on."""
        return 1

    def to(self, device: torch.device) -> Self:
        """Return the quantizer on another device; by default itself."""
        return self

    @abstractmethod
    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Quantize vectors [B, H, T, D] and dequantize them, fp32.

        T tokens are whole groups, but for the last.
        """


@dataclass(frozen=True)
class CalibrationSet:
    """Keys, and queries that read them, on which a quantizer of one layer is fitted.

    Attributes:
        keys: [H, N, D] fp32, after RoPE.
        queries: returns [Hq, N', D] of each layer that reads these keys, when it is needed.
        centering: that suits the layer: "token_mean" where softmax is blind to a static mean, else
            "none".
    """

    keys: Tensor
    queries: Callable[[], list[Tensor]]
    centering: CenteringMethod = "token_mean"

    def centred(self) -> tuple[Centering, Tensor]:
        """Fit the centering; return it with the keys less what it takes off, [H, N, D]."""
        centering = Centering.fit(self.keys, self.centering)
        return centering, centering.split(self.keys)[0]


class StoredQuantizer(Quantizer):
    """A quantizer of keys that is fitted, stored in a cache and in a codec file.

    ``encode`` returns a frozen dataclass of tensors, each [B, H, T, …]; a cache stores these
    tensors and hands them back to ``decode`` in an object of the same class.
    """

    least_keys_per_dim: ClassVar[int] = 1
    """Calibration keys of a head for each of its coordinates, below which it is not fitted."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name under which the class is registered."""

    @property
    @abstractmethod
    def n_heads(self) -> int:
        """KV heads."""

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """Coordinates of a key."""

    @property
    def static_mean(self) -> Tensor | None:
        """Mean [H, D] that stored keys lack, to which softmax is blind; None if they lack none."""
        return None

    @classmethod
    @abstractmethod
    def fit(cls, calibration: CalibrationSet, config: CalibrationConfig) -> Self:
        """Fit the quantizer of one layer. Raises ``InputError`` on keys that do not suffice."""

    @abstractmethod
    def encode(self, keys: Tensor) -> Any:
        """Encode keys [B, H, T, D]. Raises ``InputError`` on another shape, NaN or infinity."""

    @abstractmethod
    def decode(self, codes: Any) -> Tensor:
        """Return the keys that codes stand for, fp32 [B, H, T, D]."""

    @abstractmethod
    def tensors(self, bits: int) -> dict[str, Tensor]:
        """Return the parameters as a codec file stores them, at 8 or 32 bits a number."""

    def settings(self) -> dict[str, Any]:
        """Return what else a codec file stores: plain values that JSON holds."""
        return {}

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Restore a quantizer from `tensors` of either width. Raises ``InputError`` on bad ones."""

    def rounded(self) -> Self:
        """Return the quantizer that a file of eight bits a number gives back."""
        return self.from_tensors(self.tensors(8), self.settings())

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        return self.decode(self.encode(vectors))

    def scores(self, query: Tensor, codes: Any) -> Tensor:
        """Compute inner products [B, Hq, Tq, T] of queries [B, Hq, Tq, D] with encoded keys, fp32.

        Query head g reads KV head g // (Hq / H). Raises ``InputError`` if H does not divide Hq.
        """
        groups = self._groups(query)
        keys = self.decode(codes).repeat_interleave(groups, 1)
        return query.float() @ keys.mT

    def cosines(self, keys: Tensor) -> Tensor:
        """Return the cosine of each key [H, N, D] with its reconstruction, [H, N]."""
        return torch.cosine_similarity(keys.float(), self.reconstruct(keys[None])[0], dim=-1)

    @classmethod
    def noise_null(cls, n_keys: int, d: int, config: CalibrationConfig) -> tuple[float, float]:
        """Fit on ``n_keys`` of Gaussian noise in d dimensions.

        Returns the mean cosine (in sample, held out): what it is where keys have no structure.
        """
        generator = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(1, 2 * n_keys, d, generator=generator)
        fitted = cls._fit_noise(noise[:, :n_keys], generator, config)
        inside, outside = fitted.cosines(noise)[0].double().split(n_keys)
        return float(inside.mean()), float(outside.mean())

    @classmethod
    def _fit_noise(
        cls, keys: Tensor, generator: torch.Generator, config: CalibrationConfig
    ) -> Self:
        """Fit on noise [1, N, D] that as many queries read, noise like it."""
        queries = torch.randn(keys.shape, generator=generator)
        return cls.fit(CalibrationSet(keys, lambda: [queries], "none"), config)

    def _groups(self, query: Tensor) -> int:
        """Query heads of a KV head, after a check of the queries' shape."""
        groups, rest = divmod(query.shape[1], self.n_heads)
        if rest or query.shape[-1] != self.head_dim:
            raise InputError(
                f"queries of shape {list(query.shape)} do not fit {self.n_heads} KV heads of "
                f"{self.head_dim}"
            )
        return groups

    def _check_keys(self, keys: Tensor) -> None:
        expected = (self.n_heads, self.head_dim)
        if keys.ndim != 4 or (keys.shape[1], keys.shape[3]) != expected:
            raise InputError(
                f"keys of shape {list(keys.shape)}: "
                f"this codec takes [B, {expected[0]}, T, {expected[1]}]"
            )
        if not torch.isfinite(keys).all():
            raise InputError("keys hold NaN or infinite values: check the model's precision")


def code_tensors(codes: Any) -> dict[str, Tensor]:
    """Return the tensors of encoded keys by name; those that are None are left out."""
    named = {field.name: getattr(codes, field.name) for field in fields(codes)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
