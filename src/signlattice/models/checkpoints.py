"""Checkpoint folders: the hash of their weights, and the file beside them that says what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from signlattice.errors import IntegrityError
from signlattice.io import display_path

BLOCK = 1 << 20
"""Bytes that are hashed at once."""


def weights_hash(folder: Path) -> str:
    """Compute SHA-256 over the weights of a checkpoint, ``model*.safetensors``, by name."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise IntegrityError(f"no model*.safetensors in {folder}: not a checkpoint folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def noted_hash(file: Path, remedy: str) -> str:
    """Return the hash of the weights that ``file`` names, which was written beside them.

    Raises ``IntegrityError``, which ends in ``remedy``, if it is absent.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))["weights_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"{display_path(file)} does not name the checkpoint's hash: {remedy}"
        ) from None


def check_hash(name: str, file: Path, found: str, remedy: str) -> None:
    """Raise ``IntegrityError``, which ends in ``remedy``, if ``file`` names another hash."""
    if found != (expected := noted_hash(file, remedy)):
        raise IntegrityError(
            f"the checkpoint of {name} hashes to {found[:12]}…, its record says {expected[:12]}…: "
            f"{remedy}"
        )


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Silence transformers' bars: a mini loads in a blink, and a page would keep a dead widget."""
    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()
