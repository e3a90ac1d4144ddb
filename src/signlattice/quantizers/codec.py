"""The codec of a model: a quantizer for each layer, what they were fitted on, and its file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from signlattice.errors import InputError, IntegrityError
from signlattice.hub import refusals
from signlattice.io import check_target, content_hash, display_path, write_tensors
from signlattice.quantizers import registry
from signlattice.quantizers.base import StoredQuantizer

FILE_NAME = "signlattice.safetensors"
"""Name of a codec in a folder, or in a repository on the hub."""

SCHEMA = 3
"""Schema of the files that are written and read; `resave` translates those of 1 and 2."""


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

    Example:
        >>> from signlattice import KeyCodec, load_model
        >>> from signlattice.models.loading import MODELS
        >>> loaded = load_model("olmoe-mini")
        >>> file = MODELS / "olmoe-mini" / "lattice.safetensors"
        >>> codec = KeyCodec.load(file, model_hash=loaded.weights_hash)
        >>> sorted(codec.layers)
        [0, 1, 2, 3]
        >>> codec.layers[0].n_heads, codec.layers[0].head_dim
        (4, 64)
    """

    layers: dict[int, StoredQuantizer]
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
        `SignQuantizer.rounded` is restored as it is, any other one nearly so.
        """
        if bits not in (8, 32):
            raise InputError(f"bits={bits}: a codec file has 8 or 32 bits to a number")
        tensors = {}
        for index, layer in self.layers.items():
            for name, tensor in layer.tensors(bits).items():
                tensors[f"{index}.{name}"] = tensor.clone()  # layers may share one
        header = {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "bits": bits,
            "layers": {
                index: {"code": layer.name, **layer.settings()}
                for index, layer in self.layers.items()
            },
            "provenance": self.provenance,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        _write(path, header, tensors)

    @classmethod
    def load(cls, path: Path, model_hash: str | None = None) -> KeyCodec:
        """Read a codec, and check it against a model's hash if one is given.

        Nothing in a file is executed. Raises ``IntegrityError`` on a file that is missing,
        truncated, changed since it was written, of another schema, not a codec, or fitted on
        another model.
        """
        header, tensors = _read(Path(path))
        if header["schema"] < SCHEMA:
            raise IntegrityError(
                f"{display_path(path)} has schema {header['schema']}, of an earlier signlattice: "
                f"write it anew with `signlattice resave {shlex.quote(str(path))}`"
            )
        return cls._restored(Path(path), header, tensors, model_hash)

    @classmethod
    def _restored(
        cls, path: Path, header: dict, tensors: Mapping[str, Tensor], model_hash: str | None = None
    ) -> KeyCodec:
        try:
            layers = {
                _index(index): _layer(tensors, index, settings)
                for index, settings in header["layers"].items()
            }
            codec = cls(
                layers,
                _text(header["model_hash"]),
                {_text(name): _text(fact) for name, fact in header["provenance"].items()},
                _calibration(header.get("calibration"), layers),
            )
        except (
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
            ArithmeticError,
        ) as error:
            raise IntegrityError(f"{display_path(path)} is not a whole codec: {error}") from None
        if model_hash is not None:
            codec.check_model(model_hash)
        return codec

    def save_pretrained(self, save_directory: str | Path, *, bits: Literal[8, 32] = 8) -> Path:
        """Write the codec into a folder, under the name that `from_pretrained` looks for.

        Nothing else in the folder is touched. Returns the file. Raises as `save` does.
        """
        file = Path(save_directory) / FILE_NAME
        self.save(file, bits=bits)
        return file

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        model_hash: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> KeyCodec:
        """Read a codec from a folder, or from a repository on the Hugging Face hub.

        Args:
            name: folder that `save_pretrained` has written, or "owner/name" on the hub.
            model_hash: hash of the weights that the codec must have been fitted on, as
                ``LoadedModel.weights_hash`` has it; None checks nothing yet.
            revision, token, cache_dir, local_files_only: as ``hf_hub_download`` takes them.

        Raises:
            InputError: no such repository, revision or file in it, no access, or no network.
            IntegrityError: as `load` does.
        """
        folder = Path(name)
        if folder.is_dir():
            return cls.load(folder / FILE_NAME, model_hash)
        with refusals(str(name), revision):
            file = hf_hub_download(
                str(name),
                FILE_NAME,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return cls.load(Path(file), model_hash)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        bits: Literal[8, 32] = 8,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a signlattice codec",
        create_pr: bool = False,
    ) -> str:
        """Upload the codec to a repository on the Hugging Face hub, made if it is not there.

        Returns the address of the commit. Raises ``InputError`` if the hub refuses or does not
        answer.
        """
        api = HfApi(token=token)
        with refusals(repo_id, revision), TemporaryDirectory() as folder:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=self.save_pretrained(folder, bits=bits),
                path_in_repo=FILE_NAME,
                repo_id=repo_id,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return commit.commit_url


def resave(path: Path, output: Path | None = None) -> KeyCodec:
    """Write a codec file of an earlier schema anew, in its place unless ``output`` is another.

    Its numbers stay as they are. A file of schema 1 has no hash: nothing tells whether it is what
    was written, but that it makes a whole codec.

    Raises ``IntegrityError`` as `KeyCodec.load` does on all else.
    """
    header, tensors = _read(Path(path))
    if header["schema"] < SCHEMA:
        try:
            header, tensors = _translated(header, tensors)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise IntegrityError(f"{display_path(path)} is not a whole codec: {error}") from None
    codec = KeyCodec._restored(Path(path), header, tensors)
    _write(Path(output or path), header, tensors)
    return codec


def _write(path: Path, header: dict, tensors: Mapping[str, Tensor]) -> None:
    header = json.loads(json.dumps(header))  # as it will be read: keys are strings
    header["digest"] = content_hash(header, tensors)
    write_tensors(path, tensors, metadata={"signlattice": json.dumps(header)})


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read header and tensors of a file, both as they were written."""
    check_target(path)  # opening a pipe would wait
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("signlattice", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise IntegrityError(f"no codec file at {display_path(path)}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"{display_path(path)} is not a whole safetensors file: {error}"
        ) from None
    if not isinstance(header, dict) or type(header.get("schema")) is not int:
        raise IntegrityError(
            f"{display_path(path)} is a safetensors file, but not a codec of signlattice"
        )
    if not 1 <= header["schema"] <= SCHEMA:
        raise IntegrityError(
            f"{display_path(path)} has schema {header['schema']}, "
            f"this library reads up to {SCHEMA}: update signlattice"
        )
    found = header.pop("digest", None)
    try:
        expected = content_hash(header, tensors) if header["schema"] > 1 else None
    except (RuntimeError, TypeError) as error:  # nested too deeply, or numbers that torch lacks
        raise IntegrityError(f"{display_path(path)} is not a whole codec: {error}") from None
    if found != expected:
        raise IntegrityError(
            f"{display_path(path)} was changed after it was written: learn it again"
        )
    return header, tensors


def _index(text: str) -> int:
    """Parse a layer's index, which can be written in one way alone: no layer may hide another."""
    if not (text.isascii() and text.isdecimal()) or str(int(text)) != text:
        raise InputError(f"{text!r} is no index of a layer")
    return int(text)


def _translated(header: dict, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Translate schema 1 or 2, of sign codes alone, into that of now."""
    rules = header.pop("scale_rules")
    layers = {
        index: {
            "code": "lattice" if f"{index}.metric" in tensors else "rotation",
            "scale_rule": rules[index],
            "centering": method,
        }
        for index, method in header.pop("centerings").items()
    }
    renamed = {
        f"{name.removesuffix('rotation')}basis" if name.endswith(".rotation") else name: tensor
        for name, tensor in tensors.items()
    }
    now = {
        "schema": SCHEMA,
        "model_hash": header["model_hash"],
        "bits": header.get("bits", 32),
        "layers": layers,
        "provenance": header["provenance"],
        "calibration": header.get("calibration"),
    }
    return now, renamed


def _layer(tensors: Mapping[str, Tensor], index: str, settings: dict) -> StoredQuantizer:
    own = {
        name.removeprefix(f"{index}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{index}.")
    }
    return registry.quantizer(settings["code"]).from_tensors(own, settings)


def _calibration(found: dict | None, layers: dict[int, StoredQuantizer]) -> Calibration | None:
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
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise InputError(f"{value!r} where a finite number was expected")
