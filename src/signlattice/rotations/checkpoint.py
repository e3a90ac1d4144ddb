"""Checkpoints of a solver: one safetensors file, matrices as tensors and the rest as JSON in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from signlattice.errors import IntegrityError
from signlattice.io import display_path, keep_tensors, kept_tensors

_SCHEMA = 3


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    fingerprint: str,
) -> None:
    """Write a checkpoint: the file is replaced only when all of it has been written.

    Raises ``InputError`` where it cannot be written.
    """
    header = {"schema": _SCHEMA, "config": config, "keys": fingerprint, "state": state}
    keep_tensors(path, tensors, header)


def load(
    path: Path, *, config: Mapping[str, Any], fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the state of a checkpoint, tuples having become lists.

    Raises ``IntegrityError`` on a file that is damaged, or of another config or other keys.
    """
    remedy = "delete it to start anew, or give another path"
    try:
        read, header = kept_tensors(path)
        # Cloned, since tensors read from a file are not aligned as others are, and matrix
        # products may round differently on such.
        tensors = {name: tensor.clone() for name, tensor in read.items()}
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']}, this version reads {_SCHEMA}")
        theirs, keys, state = header["config"], header["keys"], header["state"]
    except (IntegrityError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{display_path(path)} is no checkpoint of learn_rotation ({error}): {remedy}"
        ) from None
    ours = json.loads(json.dumps(config))
    if different := sorted(name for name in ours if theirs.get(name) != ours[name]):
        name = different[0]
        raise IntegrityError(
            f"{display_path(path)} was made with {name}={theirs.get(name)!r}, not {ours[name]!r}: "
            f"{remedy}"
        )
    if keys != fingerprint:
        raise IntegrityError(f"{display_path(path)} was made from other keys: {remedy}")
    return tensors, state


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash the tensors' dtypes, shapes and numbers by SHA-256."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        for part in tensor:
            digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
