"""Keys to bits and back: centre, rotate, keep the signs and one scale per token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bits import n_words, pack_signs, unpack_signs
from .centering import Centering
from .errors import InputError, IntegrityError
from .files import write_tensors

ScaleRule = Literal["mse", "norm", "unbiased"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
SCHEMA = 1


def token_scale(y: Tensor, rule: ScaleRule) -> Tensor:
    """Scale α of the sign code of each rotated key; ``y`` [..., d] gives [...].

    ``mse``: ‖y‖₁/d, the least error. ``norm``: ‖y‖₂/√d, keeps the length. ``unbiased``: ‖y‖₂²/‖y‖₁,
    a score whose slope is one (RaBitQ, Gao and Long 2024). A zero key has scale 0.

    Raises ``InputError`` on an unknown rule.
    """
    d = y.shape[-1]
    if rule == "mse":
        return y.abs().sum(-1) / d
    if rule == "norm":
        return y.norm(dim=-1) / d**0.5
    if rule == "unbiased":
        return y.square().sum(-1) / y.abs().sum(-1).clamp_min(torch.finfo(y.dtype).tiny)
    raise InputError(f"unknown scale rule {rule!r}: choose one of {', '.join(SCALE_RULES)}")


@dataclass(frozen=True)
class SignKeys:
    """Packed keys: ``words`` uint8 [B, H, T, D/8], ``scale`` fp16 [B, H, T], and with ``dc``
    centering the component along (1, …, 1)/√D that was taken off, ``dc`` fp16 [B, H, T]."""

    words: Tensor
    scale: Tensor
    dc: Tensor | None = None

    @property
    def n_keys(self) -> int:
        """How many key vectors are compressed: B · H · T."""
        return self.scale.numel()

    @property
    def n_bytes(self) -> int:
        """Bytes that the packed keys really take."""
        parts = (self.words, self.scale, self.dc)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class LayerCodec:
    """The code of one layer's keys: per head a centering, a rotation and a temperature.

    ``rotation`` [H, D, D], rows are the new axes; ``temperature`` [H] multiplies every scale of a
    head, hence the head's logits. ``centering.mean`` is [H, D] for ``token_mean``.
    """

    rotation: Tensor
    centering: Centering
    scale_rule: ScaleRule = "unbiased"
    temperature: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rotation.ndim != 3 or self.rotation.shape[1] != self.rotation.shape[2]:
            raise InputError(f"rotation of shape {list(self.rotation.shape)}: expected [H, D, D]")
        n_words(self.head_dim)
        if self.scale_rule not in SCALE_RULES:
            raise InputError(
                f"unknown scale rule {self.scale_rule!r}: choose one of {', '.join(SCALE_RULES)}"
            )
        if self.temperature is not None and self.temperature.shape != self.rotation.shape[:1]:
            raise InputError(
                f"temperature of shape {list(self.temperature.shape)}: "
                f"expected [{len(self.rotation)}]"
            )

    @property
    def n_heads(self) -> int:
        """KV heads."""
        return len(self.rotation)

    @property
    def head_dim(self) -> int:
        """Coordinates of a key."""
        return self.rotation.shape[-1]

    def to(self, device: torch.device) -> LayerCodec:
        """The same code on another device."""
        if self.rotation.device == device:
            return self
        moved = {"rotation": self.rotation.to(device)}
        if self.centering.mean is not None:
            moved["centering"] = replace(self.centering, mean=self.centering.mean.to(device))
        if self.temperature is not None:
            moved["temperature"] = self.temperature.to(device)
        return replace(self, **moved)

    def rotated(self, keys: Tensor) -> Tensor:
        """Centred and rotated keys, [..., H, T, D] as given: what the signs are taken of."""
        centred, _ = self.centering.split(keys.float())
        return centred @ self.rotation.mT

    def encode(self, keys: Tensor) -> SignKeys:
        """Pack keys [B, H, T, D]. Raises ``InputError`` on another shape or on NaN or infinity."""
        expected = (self.n_heads, self.head_dim)
        if keys.ndim != 4 or (keys.shape[1], keys.shape[3]) != expected:
            raise InputError(
                f"keys of shape {list(keys.shape)}: "
                f"this codec takes [B, {expected[0]}, T, {expected[1]}]"
            )
        if not torch.isfinite(keys).all():
            raise InputError("keys hold NaN or infinite values: check the model's precision")
        y = self.rotated(keys)
        scale = token_scale(y, self.scale_rule)
        if self.temperature is not None:
            scale = scale * self.temperature[:, None]
        dc = None
        if self.centering.method == "dc":
            dc = (keys.float().sum(-1) / self.head_dim**0.5).half()
        return SignKeys(pack_signs(y), scale.half(), dc)

    def decode(self, packed: SignKeys) -> Tensor:
        """The keys that the bits stand for, fp32 [B, H, T, D]."""
        y = unpack_signs(packed.words) * packed.scale.float().unsqueeze(-1)
        return self.centering.join(y @ self.rotation, self._offset(packed))

    def scores(self, query: Tensor, packed: SignKeys) -> Tensor:
        """Inner products of queries [B, Hq, Tq, D] with packed keys, fp32 [B, Hq, Tq, T].

        The query is rotated, the keys stay signs. Heads are grouped as in GQA: query head g reads
        KV head g // (Hq / H). Raises ``InputError`` if H does not divide Hq.
        """
        groups, rest = divmod(query.shape[1], self.n_heads)
        if rest or query.shape[-1] != self.head_dim:
            raise InputError(
                f"queries of shape {list(query.shape)} do not fit {self.n_heads} KV heads of "
                f"{self.head_dim}"
            )
        query = query.float().unflatten(1, (self.n_heads, groups))  # [B, H, G, Tq, D]
        rotated = query @ self.rotation.mT.unsqueeze(1)
        signs = unpack_signs(packed.words).unsqueeze(2)  # [B, H, 1, T, D]
        scores = (rotated @ signs.mT) * packed.scale.float()[:, :, None, None, :]
        if packed.dc is not None:
            along = query.sum(-1, keepdim=True) / self.head_dim**0.5
            scores = scores + along * packed.dc.float()[:, :, None, None, :]
        if self.centering.method == "token_mean":
            mean = self.centering.mean[:, None, :, None]  # [H, 1, D, 1]
            scores = scores + query @ mean  # the same for every key
        return scores.flatten(1, 2)

    def _offset(self, packed: SignKeys) -> Tensor:
        if packed.dc is not None:
            return packed.dc.float().unsqueeze(-1) / self.head_dim**0.5
        if self.centering.method == "token_mean":
            return self.centering.mean.unsqueeze(-2)
        return torch.zeros(())


@dataclass(frozen=True)
class KeyCodec:
    """The codes of all layers of one model, and what they were fitted on.

    ``layers`` maps a layer's index to its code; layers without one keep their keys.
    ``provenance`` holds strings: calibration hash, number of keys, solver, library version …
    """

    layers: dict[int, LayerCodec]
    model_hash: str
    provenance: dict[str, str] = field(default_factory=dict)

    def check_model(self, weights_hash: str) -> None:
        """Raise ``IntegrityError`` unless the codec was fitted on the model of that hash."""
        if weights_hash != self.model_hash:
            raise IntegrityError(
                f"this codec was fitted on the model {self.model_hash[:12]}…, not on "
                f"{weights_hash[:12]}…: fit one for this model"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file; the old one stays until the new one is whole."""
        tensors, rules, methods = {}, {}, {}
        for index, layer in self.layers.items():
            tensors[f"{index}.rotation"] = layer.rotation.contiguous()
            if layer.centering.mean is not None:
                tensors[f"{index}.mean"] = layer.centering.mean.contiguous()
            if layer.temperature is not None:
                tensors[f"{index}.temperature"] = layer.temperature.contiguous()
            rules[index], methods[index] = layer.scale_rule, layer.centering.method
        header = {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "scale_rules": rules,
            "centerings": methods,
            "provenance": self.provenance,
        }
        write_tensors(path, tensors, metadata={"signlattice": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, model_hash: str | None = None) -> KeyCodec:
        """Read a codec, and check it against a model's hash if one is given.

        Raises ``IntegrityError`` on a file that is missing, truncated, of a later schema, not a
        codec, or fitted on another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("signlattice", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            raise IntegrityError(f"no codec file at {path}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise IntegrityError(f"{path} is not a whole safetensors file: {error}") from None
        if not isinstance(header, dict) or "schema" not in header:
            raise IntegrityError(f"{path} is a safetensors file, but not a codec of signlattice")
        if header["schema"] != SCHEMA:
            raise IntegrityError(
                f"{path} has schema {header['schema']}, this library reads {SCHEMA}: "
                "update signlattice"
            )
        try:
            layers = {
                int(index): LayerCodec(
                    tensors[f"{index}.rotation"],
                    Centering(method, tensors.get(f"{index}.mean")),
                    header["scale_rules"][index],
                    tensors.get(f"{index}.temperature"),
                )
                for index, method in header["centerings"].items()
            }
            codec = cls(layers, header["model_hash"], header["provenance"])
        except (KeyError, AttributeError, TypeError, InputError) as error:
            raise IntegrityError(f"{path} is not a whole codec: {error}") from None
        if model_hash is not None:
            codec.check_model(model_hash)
        return codec
