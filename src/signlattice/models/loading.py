"""Models: our own small ones, and any other decoder by its folder or name.

A mini is a checkpoint in ``models/<name>/`` that `transformers` loads as it is; its hash is in the
record of its training, and a checkpoint that differs from its record is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from signlattice.errors import InputError, IntegrityError
from signlattice.io import PROJECT, display_path
from signlattice.models.minis import MINIS, _group_experts

MODELS = PROJECT / "models"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, in evaluation mode, with its tokenizer and hash: a mini in fp32.

    Example:
        >>> from signlattice import load_model
        >>> loaded = load_model("olmoe-mini")
        >>> loaded.head_dim, loaded.context
        (64, 512)
        >>> loaded.encode(["def add(a, b):"])
        [[472, 976, 8, 65, 12, 309, 314]]
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_hash: str
    context: int

    @property
    def head_dim(self) -> int:
        """Coordinates of a key."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def first_token(self) -> int:
        """What a text begins with: the tokenizer's beginning of text, or else its end of text."""
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((mark for mark in marks if mark is not None), 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weights of a checkpoint, ``model*.safetensors``, in name order."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise IntegrityError(f"no model*.safetensors in {folder}: not a checkpoint folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_model(name: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a mini by name, or any decoder model from a checkpoint folder.

    Raises ``InputError`` if there is neither, ``IntegrityError`` if a mini's checkpoint is missing
    or is not the one its training record names. Loads safetensors only and no remote code.

    Example:
        >>> from signlattice import load_model
        >>> load_model("olmoe-mini").model.config.model_type
        'olmoe'
    """
    named = str(name) in MINIS
    folder = MODELS / str(name) if named else Path(name)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        if named:
            raise IntegrityError(
                f"no checkpoint of {name} in {display_path(folder)}: "
                f"restore it with `git checkout {display_path(folder)}` "
                f"or train it with `make lab MODEL={name}`"
            )
        raise InputError(
            f"unknown model {str(name)!r}: choose one of {', '.join(MINIS)}, "
            "or give the folder of a transformers checkpoint"
        )
    found = weights_hash(folder)
    if named and found != (expected := expected_hash(folder)):
        raise IntegrityError(
            f"the checkpoint of {name} hashes to {found[:12]}…, its record says {expected[:12]}…: "
            f"restore it with `git checkout {display_path(folder)}`"
        )
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    _group_experts(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048)
    return LoadedModel(str(name), model.eval().to(device), tokenizer, found, context)


def expected_hash(folder: Path) -> str:
    """The hash the training wrote beside the checkpoint. Raises ``IntegrityError`` if absent."""
    file = folder / "training.json"
    try:
        return json.loads(file.read_text())["weights_hash"]
    except (OSError, ValueError, KeyError):
        raise IntegrityError(
            f"{display_path(file)} does not name the checkpoint's hash: "
            f"restore it with `git checkout {display_path(folder)}`"
        ) from None


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
