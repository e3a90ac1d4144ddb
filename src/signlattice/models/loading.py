"""Models: our own small ones, and any other decoder by its folder or name.

A mini is a checkpoint in ``models/<name>/`` that `transformers` loads as it is; its hash is in the
record of its training, and a checkpoint that differs from its record is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from signlattice.errors import InputError, IntegrityError, checked
from signlattice.io import PROJECT, display_path
from signlattice.models.checkpoint import (
    SAMPLE,
    check_files,
    check_hash,
    check_runs,
    context_limit,
    guarded,
    read_config,
    read_tokenizer,
    read_weights,
    skeleton,
    weights_hash,
)
from signlattice.models.gguf import PACKAGED_MODELS, check_converted, converted_folder
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
        """Token that begins a text: the tokenizer's beginning of text, or else its end of text."""
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return cast(int, next((mark for mark in marks if mark is not None), 0))

    @cached_property
    def begins_windows(self) -> bool:
        """Whether each window begins with `first_token`, not the first of a document alone.

        So it is where the tokenizer itself puts that token before any text, as Gemma's and Llama's
        do: such a model has never read a text without it.
        """
        ids = cast(list[int], self.tokenizer("a", verbose=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        return bos is not None and len(ids) > 0 and ids[0] == bos

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, no special tokens added.

        Raises ``InputError`` if one is beyond the model's vocabulary.
        """
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        ids = cast(list[list[int]], encoded["input_ids"])
        for row in ids:
            self.check_ids(row)
        return ids

    def check_ids(self, ids: list[int]) -> None:
        """Raise ``InputError`` if a token is beyond the model's vocabulary."""
        rows = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            raise InputError(
                f"the tokenizer of {self.name} gives tokens up to {max(ids)}, its model knows "
                f"{rows}: put the tokenizer that belongs to the weights into the folder"
            )


@checked
def load_model(name: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a mini or a packaged model by name, or any decoder from its folder or GGUF file.

    Raises ``InputError`` if there is none, or a packaged model was not fetched (`gguf`);
    ``IntegrityError`` if a mini's checkpoint is missing, or weights are not those that the file
    beside them names. Loads safetensors only and no remote code.

    Example:
        >>> from signlattice import load_model
        >>> load_model("olmoe-mini").model.config.model_type
        'olmoe'
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(
            f"device={device!r}: no such device; use 'cpu', or 'cuda' on a machine with a GPU"
        ) from None
    named = str(name) in MINIS
    folder = MODELS / str(name) if named else converted_folder(name) or Path(name)
    remedy = f"restore it with `git checkout {display_path(folder)}`"
    if not folder.is_dir() or not (folder / "config.json").is_file():
        if named:
            raise IntegrityError(
                f"no checkpoint of {name} in {display_path(folder)}: {remedy} "
                f"or train it with `make lab MODEL={name}`"
            )
        raise InputError(
            f"unknown model {str(name)!r}: choose one of {', '.join((*MINIS, *PACKAGED_MODELS))}, "
            "or give the folder of a transformers checkpoint, or a GGUF file"
        )
    files = check_files(folder)
    digest = weights_hash(folder)
    if named:
        check_hash(str(name), folder / "training.json", digest, remedy)
    check_converted(name, folder, digest)
    config = read_config(folder, None, str(name))
    context = context_limit(config, str(name)) or 2048
    skeleton(config, str(name), files)
    loaded = read_checkpoint(
        str(name), folder, digest, config, dtype=torch.float32, context=context
    )
    with guarded(f"the config.json of {name} cannot be used"):
        _group_experts(loaded.model)
    cast(nn.Module, loaded.model).to(device)
    return loaded


def read_checkpoint(
    name: str,
    folder: Path,
    digest: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    context: int,
    device_map: str | None = None,
) -> LoadedModel:
    """Read weights, of such a digest, and tokenizer of a folder that is checked so far."""
    model = read_weights(folder, config, name, dtype, device_map)
    loaded = LoadedModel(name, model, read_tokenizer(folder), digest, context)
    loaded.check_ids([loaded.first_token])
    check_runs(model, [loaded.first_token, *loaded.encode([SAMPLE])[0]][:context], name)
    return loaded
