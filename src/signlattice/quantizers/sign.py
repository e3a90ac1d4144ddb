"""Sign codes of one layer's keys: a sign for each basis vector and one scale per token.

The basis is a rotation, and the signs those of the rotated key; or, with a metric, any basis, and
the signs are searched for (`quantizers.basis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from signlattice.bits import n_packed_bytes, pack_signs, unpack_signs
from signlattice.errors import InputError, check_types
from signlattice.kernels import PackedKeys, nearest_signs
from signlattice.quantizers.base import CalibrationSet, StoredQuantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.scales import (
    ScaleRule,
    norm_product,
    scale_of,
    shrunk,
    to_half,
)

if TYPE_CHECKING:
    from signlattice.calibration import CalibrationConfig

LARGEST = 1e10
"""Bound on the numbers of a code that is loaded: fp32 holds all sums of their products."""


@dataclass(frozen=True, eq=False)
class SignQuantizer(StoredQuantizer):
    """One sign for each basis vector of a key, and one scale.

    A key is reconstructed as k̂ = α Bᵀs, plus what the centering took off. ``basis`` B [H, D, D]: a
    rotation, whose rows are the new axes, where there is no ``metric``. With a ``metric`` M
    [H, D, D], symmetric and positive definite, any basis: signs and scale then make
    (k − k̂)ᵀ M (k − k̂) small. ``temperature`` [H] multiplies every scale of a head, hence the
    head's logits. ``centering.mean`` is [H, D] for ``token_mean``.

    Example:
        >>> import torch
        >>> from signlattice import Centering, SignQuantizer
        >>> quantizer = SignQuantizer(torch.eye(8)[None], Centering("none"))  # one head of 8
        >>> keys = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]).reshape(1, 1, 1, 8)
        >>> packed = quantizer.encode(keys)
        >>> packed.words.numel()  # bytes of signs
        1
        >>> quantizer.decode(packed)[0, 0, 0].sign().tolist() == keys[0, 0, 0].sign().tolist()
        True
    """

    basis: Tensor
    centering: Centering
    scale_rule: ScaleRule = "unbiased"
    temperature: Tensor | None = None
    metric: Tensor | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.basis.ndim != 3 or self.basis.shape[1] != self.basis.shape[2]:
            raise InputError(f"basis of shape {list(self.basis.shape)}: expected [H, D, D]")
        if not self.n_heads:
            raise InputError("a basis of no head: expected [H, D, D], H 1 or more")
        n_packed_bytes(self.head_dim)
        if self.temperature is not None and self.temperature.shape != self.basis.shape[:1]:
            raise InputError(
                f"temperature of shape {list(self.temperature.shape)}: expected [{self.n_heads}]"
            )
        if self.centering.mean is not None and self.centering.mean.shape != self.basis.shape[:2]:
            raise InputError(
                f"mean of shape {list(self.centering.mean.shape)}: "
                f"expected {list(self.basis.shape[:2])}"
            )
        if self.metric is not None:
            if self.metric.shape != self.basis.shape:
                raise InputError(
                    f"metric of shape {list(self.metric.shape)}: "
                    f"expected {list(self.basis.shape)}, as the basis"
                )
            if self.centering.method == "dc":
                raise InputError("centering 'dc' with a metric: use 'token_mean' or 'none'")

    @property
    def name(self) -> str:
        """Name in the registry: "rotation", or "lattice" if there is a metric."""
        return "rotation" if self.metric is None else "lattice"

    @property
    def bits(self) -> float:
        """One per coordinate, sixteen per token for the scale, and with ``dc`` sixteen more."""
        numbers = 2 if self.centering.method == "dc" else 1
        return 1 + 16 * numbers / self.head_dim

    @property
    def static_bytes(self) -> int:
        """Bytes of basis and metric at eight bits a number, and of the mean at 32."""
        matrices = (1 if self.metric is None else 2) * self.basis.numel()
        return matrices + self.centering.n_bytes

    @property
    def static_mean(self) -> Tensor | None:
        """Mean [H, D] of a "token_mean" centering."""
        return self.centering.mean

    @classmethod
    def fit(cls, calibration: CalibrationSet, config: CalibrationConfig) -> Self:
        """Fit nothing: `RotationQuantizer` and `LatticeQuantizer` say how a basis is learned."""
        raise NotImplementedError(f"{cls.__name__}.fit: use a subclass that learns its basis")

    @property
    def n_heads(self) -> int:
        """KV heads."""
        return len(self.basis)

    @property
    def head_dim(self) -> int:
        """Coordinates of a key."""
        return self.basis.shape[-1]

    def to(self, device: torch.device) -> SignQuantizer:
        """Return the same code on another device."""
        if self.basis.device == device:
            return self
        moved: dict[str, Any] = {"basis": self.basis.to(device)}
        if self.centering.mean is not None:
            moved["centering"] = replace(self.centering, mean=self.centering.mean.to(device))
        for name in ("temperature", "metric"):
            if (tensor := getattr(self, name)) is not None:
                moved[name] = tensor.to(device)
        return replace(self, **moved)

    def rotated(self, keys: Tensor) -> Tensor:
        """Centre and rotate keys [..., H, T, D], the vectors that the signs are taken of.

        Raises ``InputError`` if the code has a metric: its signs are of no one vector.
        """
        if self.metric is not None:
            raise InputError("a code with a metric rotates nothing: its signs are searched for")
        centred, _ = self.centering.split(keys.float())
        return centred @ self.basis.mT

    def cosines(self, keys: Tensor) -> Tensor:
        """Compute the cosine of each centred key [H, N, D] to its lattice point in the metric.

        Without a metric it is that to the sign lattice, ‖y‖₁ / (√D ‖y‖₂), whose mean is β.
        """
        _, along, length, energy = self._nearest(self._shrunk(keys[None])[0])
        sizes = norm_product(length, energy).clamp_min(torch.finfo(energy.dtype).tiny)
        return (along.abs() / sizes)[0]

    def encode(self, keys: Tensor) -> PackedKeys:
        """Pack keys [B, H, T, D]. Raises ``InputError`` on another shape or on NaN or infinity."""
        self._check_keys(keys)
        return self.encode_unchecked(keys)

    def encode_unchecked(self, keys: Tensor) -> PackedKeys:
        """Pack keys as `encode` does, without its checks, which would wait for a GPU.

        The scale of a key that is NaN or infinite is NaN.
        """
        x, factor = self._shrunk(keys)
        codes, along, length, energy = self._nearest(x)
        scale = scale_of(along, length, energy, self.scale_rule) / factor
        if self.temperature is not None:
            scale = scale * self.temperature[:, None]
        dc = None
        if self.centering.method == "dc":
            dc = to_half(x.sum(-1) / self.head_dim**0.5 / factor)
        return PackedKeys(codes, to_half(scale), dc)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        return self.decode(self.encode_unchecked(vectors))

    def decode(self, packed: PackedKeys) -> Tensor:
        """Return the keys that the bits stand for, fp32 [B, H, T, D]."""
        y = unpack_signs(packed.words) * packed.scale.float().unsqueeze(-1)
        return self.centering.join(y @ self.basis, self._offset(packed))

    def scores(self, query: Tensor, packed: PackedKeys) -> Tensor:
        """Compute inner products of queries [B, Hq, Tq, D] with packed keys, fp32 [B, Hq, Tq, T].

        The query is taken along the basis, the keys stay signs. Heads are grouped as in GQA: query
        head g reads KV head g // (Hq / H). Raises ``InputError`` if H does not divide Hq.
        """
        groups = self._groups(query)
        query = query.float().unflatten(1, (self.n_heads, groups))  # [B, H, G, Tq, D]
        along_basis = query @ self.basis.mT.unsqueeze(1)
        signs = unpack_signs(packed.words).unsqueeze(2)  # [B, H, 1, T, D]
        scores = (along_basis @ signs.mT) * packed.scale.float()[:, :, None, None, :]
        if packed.dc is not None:
            along = query.sum(-1, keepdim=True) / self.head_dim**0.5
            scores = scores + along * packed.dc.float()[:, :, None, None, :]
        if (mean := self.centering.mean) is not None:
            scores = scores + query @ mean[:, None, :, None]  # the same for every key
        return scores.flatten(1, 2)

    def tensors(self, bits: int) -> dict[str, Tensor]:
        """Return basis, metric, mean and temperature as a codec file stores them.

        At eight bits a number a basis has a step for each of its vectors. A metric is stored as its
        Cholesky factor, row by row, so that whatever is read is one.
        """
        tensors = {"basis": self.basis}
        mean = self.centering.mean
        if self.metric is not None:
            factor, failed = torch.linalg.cholesky_ex(self.metric.double())
            if failed.any():
                raise InputError("metric is not positive definite: see basis.query_metric")
            tensors["metric"] = factor.float()
        if bits == 8:
            for name in tuple(tensors):
                tensors[name], tensors[f"{name}_step"] = _to_int8(tensors[name])
            mean = None if mean is None else mean.half()
        if "metric" in tensors:
            if bits == 8:  # or the metric that is read may have no factor
                tensors["metric"].diagonal(dim1=-2, dim2=-1).clamp_(min=1)
            rows, columns = torch.tril_indices(self.head_dim, self.head_dim)
            tensors["metric"] = tensors["metric"][:, rows, columns]
        if mean is not None:
            tensors["mean"] = mean
        if self.temperature is not None:
            tensors["temperature"] = self.temperature
        return tensors

    def settings(self) -> dict[str, Any]:
        """Return the scale rule and the method of centering."""
        return {"scale_rule": self.scale_rule, "centering": self.centering.method}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Restore a code from `tensors` of either width. Raises ``InputError`` on bad ones."""
        basis = _from_int8(tensors, "basis", tensors["basis"])
        if basis.ndim != 3 or not len(basis):
            raise InputError(f"basis of shape {list(basis.shape)}: expected [H, D, D]")
        metric = None
        if "metric" in tensors:
            factor = _from_int8(tensors, "metric", _unfolded(tensors["metric"], basis))
            metric = factor @ factor.mT
        mean, temperature = (
            None if name not in tensors else _from_int8(tensors, name, tensors[name])
            for name in ("mean", "temperature")
        )
        named = {"basis": basis, "metric": metric, "mean": mean, "temperature": temperature}
        for name, tensor in named.items():
            if tensor is not None and not (tensor.abs() <= LARGEST).all():
                raise InputError(f"{name} holds NaN, infinite or far too large values")
        centering = Centering(settings["centering"], mean)
        code = cls(basis, centering, settings["scale_rule"], temperature, metric)
        eye = torch.eye(code.head_dim, device=basis.device)
        if metric is None and (basis @ basis.mT - eye).abs().max() > 0.1:
            raise InputError("a basis that is no rotation, and no metric")
        return code

    @cached_property
    def _gram(self) -> Tensor:
        assert self.metric is not None  # without one, signs are not searched for
        return self.basis @ self.metric @ self.basis.mT

    def _shrunk(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Take off the static mean and return `scales.shrunk` of the rest."""
        x = keys.float()
        return shrunk(x if self.centering.method == "dc" else self.centering.split(x)[0])

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the signs s of each key x, and in the metric x·Bᵀs, ‖Bᵀs‖² and ‖x‖²."""
        if self.metric is None:
            if self.centering.method == "dc":
                x, _ = self.centering.split(x)
            y = x @ self.basis.mT
            length = torch.full_like(y[..., 0], y.shape[-1])
            return pack_signs(y), y.abs().sum(-1), length, y.square().sum(-1)
        weighted = x @ self.metric
        found = nearest_signs((weighted @ self.basis.mT).contiguous(), self._gram)
        return *found, (weighted * x).sum(-1).clamp_min(0)

    def _offset(self, packed: PackedKeys) -> Tensor:
        if packed.dc is not None:
            return packed.dc.float().unsqueeze(-1) / self.head_dim**0.5
        if (mean := self.centering.mean) is not None:
            return mean.unsqueeze(-2)
        return torch.zeros(())


def _to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [H, D, D] and a step for every row, fp16 [H, D]."""
    step = (matrix.abs().amax(-1) / 127).half()
    each = step.float().clamp_min(torch.finfo(torch.float16).smallest_normal / 1024)[..., None]
    return (matrix / each).round().clamp(-127, 127).to(torch.int8), step


def _unfolded(triangle: Tensor, basis: Tensor) -> Tensor:
    """Lower triangles [H, D, D] from their rows [H, D (D + 1) / 2]."""
    n_heads, d = len(basis), basis.shape[-1]
    if triangle.shape != (n_heads, d * (d + 1) // 2):
        raise InputError(f"metric of shape {list(triangle.shape)} with a head size of {d}")
    rows, columns = torch.tril_indices(d, d)
    factor = triangle.new_zeros(n_heads, d, d)
    factor[:, rows, columns] = triangle
    return factor


def _from_int8(tensors: Mapping[str, Tensor], name: str, numbers: Tensor) -> Tensor:
    """Numbers as they are, or codes of eight bits with a step to each row."""
    step = tensors.get(f"{name}_step")
    if step is None:
        if not numbers.is_floating_point():
            raise InputError(f"{name} is {numbers.dtype}: expected floating point")
        return numbers.float()
    if numbers.dtype != torch.int8 or not step.is_floating_point():
        raise InputError(f"{name} is {numbers.dtype}, its steps {step.dtype}: expected int8, fp16")
    if numbers.ndim != 3 or step.shape != numbers.shape[:2]:
        raise InputError(f"{name} of shape {list(numbers.shape)}, its steps {list(step.shape)}")
    return numbers.float() * step.float()[..., None]
