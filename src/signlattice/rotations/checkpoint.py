"""Checkpoints of a solver: one safetensors file, matrices as tensors and the rest as JSON in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from signlattice.errors import IntegrityError
from signlattice.io import content_hash, display_path, write_tensors

_SCHEMA = 3
_HEADER = "signlattice.rotations.solvers"


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
    header["sha256"] = content_hash(json.loads(json.dumps(header)), tensors)
    write_tensors(path, tensors, metadata={_HEADER: json.dumps(header)})


def load(
    path: Path, *, config: Mapping[str, Any], fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the state of a checkpoint, tuples having become lists.

    Raises ``IntegrityError`` on a file that is damaged, or of another config or other keys.
    """
    remedy = "delete it to start anew, or give another path"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            # Cloned, since tensors read from a file are not aligned as others are, and matrix
            # products may round differently on such.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']}, this version reads {_SCHEMA}")
        if header.pop("sha256") != content_hash(header, tensors):
            raise ValueError("changed after it was written")
        theirs, keys, state = header["config"], header["keys"], header["state"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
