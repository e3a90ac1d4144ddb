"""Keys to bits and back: centre, choose signs along a basis, keep them and one scale per token.

The basis is a rotation, and the signs those of the rotated key; or, with a metric, any basis, and
the signs are searched for (`lattice`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bits import n_words, pack_signs, unpack_signs
from .centering import Centering
from .errors import InputError, IntegrityError
from .files import shown, write_tensors
from .kernels import nearest_signs

ScaleRule = Literal["mse", "norm", "unbiased"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
SCHEMA = 2
"""Of the files that are written; those of schema 1 are read as well."""

LEAST_COSINE = 1 / 32
"""Below it the scale ``unbiased`` grows no further: no rotation of 1024 coordinates comes to it."""

LARGEST = 1e10
"""Of the numbers of a code that is read: fp32 holds all sums of their products."""


def token_scale(y: Tensor, rule: ScaleRule) -> Tensor:
    """Scale α of the sign code of each rotated key; ``y`` [..., d] gives [...].

    ``mse``: ‖y‖₁/d, the least error. ``norm``: ‖y‖₂/√d, keeps the length. ``unbiased``: ‖y‖₂²/‖y‖₁,
    a score whose slope is one (RaBitQ, Gao and Long 2024). A zero key has scale 0.

    Raises ``InputError`` on an unknown rule.
    """
    length = torch.full_like(y[..., 0], y.shape[-1])
    return scale_of(y.abs().sum(-1), length, y.square().sum(-1), rule)


def scale_of(along: Tensor, length: Tensor, energy: Tensor, rule: ScaleRule) -> Tensor:
    """`token_scale` of a key x and its lattice point p: of x·p, ‖p‖² and ‖x‖², in any metric.

    For signs s of a rotated key y these are ‖y‖₁, d and ‖y‖₂². Of a key that is small beside a
    lattice that is no cube, the point may be on the far side, and the scale is below zero; to the
    rule ``unbiased`` the cosine is `LEAST_COSINE` or more. Raises as `token_scale` does.
    """
    if rule not in SCALE_RULES:
        raise InputError(f"unknown scale rule {rule!r}: choose one of {', '.join(SCALE_RULES)}")
    tiny = torch.finfo(energy.dtype).tiny
    if rule == "mse":
        return along / length.clamp_min(tiny)
    if rule == "norm":
        scale = (energy / length.clamp_min(tiny)).sqrt()
    else:
        least = LEAST_COSINE * _sizes(length, energy)
        scale = energy / along.abs().maximum(least).clamp_min(tiny)
    return torch.where(length > 0, scale.copysign(along), 0.0)


def _sizes(length: Tensor, energy: Tensor) -> Tensor:
    return length.clamp_min(0).sqrt() * energy.sqrt()


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
    """The code of one layer's keys: per head a centering, a basis and a temperature.

    A key is read back as k̂ = α Bᵀs, and what the centering took off. ``basis`` B [H, D, D]: a
    rotation, whose rows are the new axes, where there is no ``metric``. With a ``metric`` M
    [H, D, D], symmetric and positive definite, any basis: signs and scale then make
    (k − k̂)ᵀ M (k − k̂) small. ``temperature`` [H] multiplies every scale of a head, hence the
    head's logits. ``centering.mean`` is [H, D] for ``token_mean``.
    """

    basis: Tensor
    centering: Centering
    scale_rule: ScaleRule = "unbiased"
    temperature: Tensor | None = None
    metric: Tensor | None = None

    def __post_init__(self) -> None:
        if self.basis.ndim != 3 or self.basis.shape[1] != self.basis.shape[2]:
            raise InputError(f"basis of shape {list(self.basis.shape)}: expected [H, D, D]")
        if not self.n_heads:
            raise InputError("a basis of no head: expected [H, D, D], H 1 or more")
        n_words(self.head_dim)
        if self.scale_rule not in SCALE_RULES:
            raise InputError(
                f"unknown scale rule {self.scale_rule!r}: choose one of {', '.join(SCALE_RULES)}"
            )
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
    def n_heads(self) -> int:
        """KV heads."""
        return len(self.basis)

    @property
    def head_dim(self) -> int:
        """Coordinates of a key."""
        return self.basis.shape[-1]

    def to(self, device: torch.device) -> LayerCodec:
        """The same code on another device."""
        if self.basis.device == device:
            return self
        moved = {"basis": self.basis.to(device)}
        if self.centering.mean is not None:
            moved["centering"] = replace(self.centering, mean=self.centering.mean.to(device))
        for name in ("temperature", "metric"):
            if (tensor := getattr(self, name)) is not None:
                moved[name] = tensor.to(device)
        return replace(self, **moved)

    def rotated(self, keys: Tensor) -> Tensor:
        """Centred and rotated keys, [..., H, T, D] as given: what the signs are taken of.

        Raises ``InputError`` if the code has a metric: its signs are of no one vector.
        """
        if self.metric is not None:
            raise InputError("a code with a metric rotates nothing: its signs are searched for")
        centred, _ = self.centering.split(keys.float())
        return centred @ self.basis.mT

    def cosines(self, keys: Tensor) -> Tensor:
        """Cosine of each centred key [H, N, D] to its lattice point, in the metric: [H, N].

        Without a metric it is that to the sign lattice, ‖y‖₁ / (√D ‖y‖₂), whose mean is β.
        """
        _, along, length, energy = self._nearest(keys[None])
        sizes = _sizes(length, energy).clamp_min(torch.finfo(energy.dtype).tiny)
        return (along.abs() / sizes)[0]

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
        return self.coded(keys)

    def coded(self, keys: Tensor) -> SignKeys:
        """`encode` without a look at the keys, for which the host would wait for a GPU."""
        words, along, length, energy = self._nearest(keys)
        scale = scale_of(along, length, energy, self.scale_rule)
        if self.temperature is not None:
            scale = scale * self.temperature[:, None]
        dc = None
        if self.centering.method == "dc":
            dc = (keys.float().sum(-1) / self.head_dim**0.5).half()
        most = torch.finfo(torch.float16).max
        return SignKeys(words, scale.clamp(-most, most).half(), dc)

    def decode(self, packed: SignKeys) -> Tensor:
        """The keys that the bits stand for, fp32 [B, H, T, D]."""
        y = unpack_signs(packed.words) * packed.scale.float().unsqueeze(-1)
        return self.centering.join(y @ self.basis, self._offset(packed))

    def scores(self, query: Tensor, packed: SignKeys) -> Tensor:
        """Inner products of queries [B, Hq, Tq, D] with packed keys, fp32 [B, Hq, Tq, T].

        The query is taken along the basis, the keys stay signs. Heads are grouped as in GQA: query
        head g reads KV head g // (Hq / H). Raises ``InputError`` if H does not divide Hq.
        """
        groups, rest = divmod(query.shape[1], self.n_heads)
        if rest or query.shape[-1] != self.head_dim:
            raise InputError(
                f"queries of shape {list(query.shape)} do not fit {self.n_heads} KV heads of "
                f"{self.head_dim}"
            )
        query = query.float().unflatten(1, (self.n_heads, groups))  # [B, H, G, Tq, D]
        along_basis = query @ self.basis.mT.unsqueeze(1)
        signs = unpack_signs(packed.words).unsqueeze(2)  # [B, H, 1, T, D]
        scores = (along_basis @ signs.mT) * packed.scale.float()[:, :, None, None, :]
        if packed.dc is not None:
            along = query.sum(-1, keepdim=True) / self.head_dim**0.5
            scores = scores + along * packed.dc.float()[:, :, None, None, :]
        if self.centering.method == "token_mean":
            mean = self.centering.mean[:, None, :, None]  # [H, 1, D, 1]
            scores = scores + query @ mean  # the same for every key
        return scores.flatten(1, 2)

    def rounded(self) -> LayerCodec:
        """The code that a file of eight bits to a number gives back (`KeyCodec.save`)."""
        return _restored(_stored(self, bits=8), self.scale_rule, self.centering.method)

    @cached_property
    def _gram(self) -> Tensor:
        return self.basis @ self.metric @ self.basis.mT

    def _nearest(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each key x its signs s, and in the metric x·Bᵀs, ‖Bᵀs‖² and ‖x‖²."""
        if self.metric is None:
            y = self.rotated(keys)
            length = torch.full_like(y[..., 0], y.shape[-1])
            return pack_signs(y), y.abs().sum(-1), length, y.square().sum(-1)
        x, _ = self.centering.split(keys.float())
        weighted = x @ self.metric
        found = nearest_signs((weighted @ self.basis.mT).contiguous(), self._gram)
        return *found, (weighted * x).sum(-1).clamp_min(0)

    def _offset(self, packed: SignKeys) -> Tensor:
        if packed.dc is not None:
            return packed.dc.float().unsqueeze(-1) / self.head_dim**0.5
        if self.centering.method == "token_mean":
            return self.centering.mean.unsqueeze(-2)
        return torch.zeros(())


@dataclass(frozen=True)
class Calibration:
    """What a codec was fitted on, and how far its keys are from their lattice points.

    Attributes:
        text: SHA-256 of the calibration text.
        n_keys: calibration keys of a head.
        beta: per layer and head, the mean cosine of held-out keys to their lattice points, in the
            metric of the code: the paper's β where the basis is a rotation.
        noise_null: the same of Gaussian noise, (in sample, held out), with as many keys for each
            coordinate: what β would be if keys had no structure to be learned.
    """

    text: str
    n_keys: int
    beta: dict[int, tuple[float, ...]]
    noise_null: tuple[float, float]


@dataclass(frozen=True)
class KeyCodec:
    """The codes of all layers of one model, and what they were fitted on.

    ``layers`` maps a layer's index to its code; layers without one keep their keys.
    ``provenance`` holds strings, for readers: solver, text, library version …
    """

    layers: dict[int, LayerCodec]
    model_hash: str
    provenance: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    def check_model(self, weights_hash: str) -> None:
        """Raise ``IntegrityError`` unless the codec was fitted on the model of that hash."""
        if weights_hash != self.model_hash:
            raise IntegrityError(
                f"this codec was fitted on the model {self.model_hash[:12]}…, not on "
                f"{weights_hash[:12]}…: fit one for this model"
            )

    def save(self, path: Path, *, bits: Literal[8, 32] = 32) -> None:
        """Write one safetensors file; the old one stays until the new one is whole.

        With ``bits`` 8 every basis and metric takes a byte to a number: a code that was
        `LayerCodec.rounded` is read back as it is, any other one nearly so.
        """
        if bits not in (8, 32):
            raise InputError(f"bits={bits}: a codec file has 8 or 32 bits to a number")
        tensors = {}
        for index, layer in self.layers.items():
            for name, tensor in _stored(layer, bits).items():
                tensors[f"{index}.{name}"] = tensor.clone()  # layers may share one
        header = {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "bits": bits,
            "scale_rules": {index: layer.scale_rule for index, layer in self.layers.items()},
            "centerings": {index: code.centering.method for index, code in self.layers.items()},
            "provenance": self.provenance,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        header = json.loads(json.dumps(header))  # as it will be read: keys are strings
        header["digest"] = _digest(header, tensors)
        write_tensors(path, tensors, metadata={"signlattice": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, model_hash: str | None = None) -> KeyCodec:
        """Read a codec, and check it against a model's hash if one is given.

        Nothing in a file is executed. Raises ``IntegrityError`` on a file that is missing,
        truncated, changed since it was written, of a later schema, not a codec, or fitted on
        another model.
        """
        header, tensors = _read(Path(path))
        try:
            layers = {
                _index(index): _layer(header, tensors, index) for index in header["centerings"]
            }
            codec = cls(
                layers,
                _text(header["model_hash"]),
                {_text(name): _text(fact) for name, fact in header["provenance"].items()},
                _calibration(header.get("calibration"), layers),
            )
        except (
            LookupError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError
        ) as error:  # fmt: skip
            raise IntegrityError(f"{shown(path)} is not a whole codec: {error}") from None
        if model_hash is not None:
            codec.check_model(model_hash)
        return codec


# Files. A basis of eight bits has a step for each of its vectors; a metric is kept as its Cholesky
# factor, row by row, so that whatever is read is one.


def _stored(layer: LayerCodec, bits: int) -> dict[str, Tensor]:
    mean, temperature = layer.centering.mean, layer.temperature
    tensors = {"basis": layer.basis}
    if layer.metric is not None:
        try:
            tensors["metric"] = torch.linalg.cholesky(layer.metric.double()).float()
        except torch.linalg.LinAlgError as error:
            raise InputError(f"metric is not positive definite: {error}") from None
    if bits == 8:
        for name in tuple(tensors):
            tensors[name], tensors[f"{name}_step"] = _bytes_of(tensors[name])
        mean = None if mean is None else mean.half()
    if "metric" in tensors:
        if bits == 8:  # or the metric that is read may have no factor
            tensors["metric"].diagonal(dim1=-2, dim2=-1).clamp_(min=1)
        rows, columns = torch.tril_indices(layer.head_dim, layer.head_dim)
        tensors["metric"] = tensors["metric"][:, rows, columns]
    if mean is not None:
        tensors["mean"] = mean
    if temperature is not None:
        tensors["temperature"] = temperature
    return tensors


def _bytes_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [H, D, D] and a step for every row, fp16 [H, D]."""
    step = (matrix.abs().amax(-1) / 127).half()
    each = step.float().clamp_min(torch.finfo(torch.float16).smallest_normal / 1024)[..., None]
    return (matrix / each).round().clamp(-127, 127).to(torch.int8), step


def _restored(tensors: Mapping[str, Tensor], rule: str, method: str) -> LayerCodec:
    """The code that tensors of either width stand for. Raises what is wrong with them."""
    basis = _wide(tensors, "basis", tensors["basis"])
    if basis.ndim != 3 or not len(basis):
        raise InputError(f"basis of shape {list(basis.shape)}: expected [H, D, D]")
    metric = None
    if "metric" in tensors:
        d = basis.shape[-1]
        triangle = tensors["metric"]
        if triangle.shape != (len(basis), d * (d + 1) // 2):
            raise InputError(f"metric of shape {list(triangle.shape)} with a head size of {d}")
        rows, columns = torch.tril_indices(d, d)
        factor = triangle.new_zeros(len(basis), d, d)
        factor[:, rows, columns] = triangle
        factor = _wide(tensors, "metric", factor)
        metric = factor @ factor.mT
    mean, temperature = (
        None if name not in tensors else _wide(tensors, name, tensors[name])
        for name in ("mean", "temperature")
    )
    for name, tensor in (
        ("basis", basis), ("metric", metric), ("mean", mean), ("temperature", temperature)
    ):  # fmt: skip
        if tensor is not None and not (tensor.abs() <= LARGEST).all():
            raise InputError(f"{name} holds NaN, infinite or far too large values")
    code = LayerCodec(basis, Centering(method, mean), rule, temperature, metric)
    eye = torch.eye(code.head_dim, device=basis.device)
    if metric is None and (basis @ basis.mT - eye).abs().max() > 0.1:
        raise InputError("a basis that is no rotation, and no metric")
    return code


def _wide(tensors: Mapping[str, Tensor], name: str, numbers: Tensor) -> Tensor:
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


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of a file, both as they were written."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("signlattice", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise IntegrityError(f"no codec file at {shown(path)}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{shown(path)} is not a whole safetensors file: {error}") from None
    if not isinstance(header, dict) or type(header.get("schema")) is not int:
        raise IntegrityError(f"{shown(path)} is a safetensors file, but not a codec of signlattice")
    if not 1 <= header["schema"] <= SCHEMA:
        raise IntegrityError(
            f"{shown(path)} has schema {header['schema']}, this library reads up to {SCHEMA}: "
            "update signlattice"
        )
    found = header.pop("digest", None)
    try:
        expected = _digest(header, tensors) if header["schema"] > 1 else None
    except (RuntimeError, TypeError) as error:  # nested too deeply, or numbers that torch lacks
        raise IntegrityError(f"{shown(path)} is not a whole codec: {error}") from None
    if found != expected:
        raise IntegrityError(f"{shown(path)} was changed after it was written: learn it again")
    return header, tensors


def _digest(header: dict, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything in a file."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _index(text: str) -> int:
    """Of a layer: two ways to write one would be two layers, of which one is lost."""
    if not (text.isascii() and text.isdecimal()) or str(int(text)) != text:
        raise InputError(f"{text!r} is no index of a layer")
    return int(text)


def _layer(header: dict, tensors: Mapping[str, Tensor], index: str) -> LayerCodec:
    own = {
        name.removeprefix(f"{index}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{index}.")
    }
    if header["schema"] == 1:
        own["basis"] = own.pop("rotation")
    return _restored(own, header["scale_rules"][index], header["centerings"][index])


def _calibration(found: dict | None, layers: dict[int, LayerCodec]) -> Calibration | None:
    if found is None:
        return None
    beta = {_index(index): tuple(map(_number, heads)) for index, heads in found["beta"].items()}
    if {index: len(heads) for index, heads in beta.items()} != {
        index: layer.n_heads for index, layer in layers.items()
    }:
        raise InputError("its calibration is of other layers or heads")
    inside, outside = map(_number, found["noise_null"])
    return Calibration(_text(found["text"]), int(_number(found["n_keys"])), beta, (inside, outside))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{value!r} where a text was expected")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{value!r} where a finite number was expected")
    return float(value)
