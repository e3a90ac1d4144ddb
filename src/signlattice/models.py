"""Models: our own small ones, and any other decoder by its folder or name.

A mini is a checkpoint in ``models/<name>/`` that `transformers` loads as it is; its hash is in the
record of its training, and a checkpoint that differs from its record is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .errors import InputError, IntegrityError
from .files import PROJECT, shown

MODELS = PROJECT / "models"


@dataclass(frozen=True)
class ModelSpec:
    """A small model of a real architecture: its transformers configuration and its context.

    ``model_type`` is transformers' name of the architecture, ``like`` the full-size model whose
    layout it copies, ``steps`` how long it is trained (`train.TrainConfig`).
    """

    name: str
    model_type: str
    like: str
    context: int
    vocab_size: int
    config: dict = field(repr=False)
    steps: int = 1800

    def build(self) -> PreTrainedModel:
        """The untrained model; its weights follow torch's global seed."""
        config = AutoConfig.for_model(
            self.model_type, vocab_size=self.vocab_size, max_position_embeddings=self.context,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, **self.config,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        _group_experts(model)
        return model


def _group_experts(model: PreTrainedModel) -> None:
    """Run the experts of a mixture as one grouped product: quicker, and the same on all tokens."""
    if getattr(model.config, "num_experts", None):
        model.set_experts_implementation("grouped_mm")


OLMOE_MINI = ModelSpec(
    name="olmoe-mini",
    model_type="olmoe",
    like="OLMoE-1B-7B",
    context=512,
    vocab_size=2048,
    config=dict(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    ),
)

_GEMMA4 = dict(
    hidden_size=192,
    num_hidden_layers=6,
    layer_types=2 * ["sliding_attention", "sliding_attention", "full_attention"],
    sliding_window=128,
    num_attention_heads=4,
    head_dim=64,
    global_head_dim=128,
    final_logit_softcapping=30.0,
    vocab_size_per_layer_input=2048,
)
"""What the three have in common: wider heads on the layers that see the whole context."""

_PER_LAYER = dict(hidden_size_per_layer_input=16, num_kv_shared_layers=2)
"""The two dense ones feed an embedding into each layer, and the last layers reuse earlier keys."""

GEMMA4_E2B_MINI = ModelSpec(
    name="gemma4-e2b-mini",
    model_type="gemma4_text",
    like="Gemma-4 E2B",
    context=512,
    vocab_size=2048,
    config=_GEMMA4
    | _PER_LAYER
    | dict(num_key_value_heads=1, intermediate_size=320, use_double_wide_mlp=True),
)

GEMMA4_E4B_MINI = ModelSpec(
    name="gemma4-e4b-mini",
    model_type="gemma4_text",
    like="Gemma-4 E4B",
    context=512,
    vocab_size=2048,
    config=_GEMMA4 | _PER_LAYER | dict(num_key_value_heads=2, intermediate_size=384),
    steps=1000,
)

GEMMA4_MOE_MINI = ModelSpec(
    name="gemma4-moe-mini",
    model_type="gemma4_text",
    like="Gemma-4 26B-A4B",
    context=512,
    vocab_size=2048,
    config=_GEMMA4
    | dict(
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        intermediate_size=128,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=48,
    ),
    steps=1000,
)

MINIS = {
    spec.name: spec for spec in (OLMOE_MINI, GEMMA4_E2B_MINI, GEMMA4_E4B_MINI, GEMMA4_MOE_MINI)
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, in evaluation mode, with its tokenizer and hash: a mini in fp32."""

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


def spec(name: str) -> ModelSpec:
    """The mini of that name. Raises ``InputError`` if there is none."""
    if name not in MINIS:
        raise InputError(
            f"unknown model {name!r}: choose one of {', '.join(MINIS)}, or give a folder"
        )
    return MINIS[name]


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
    """
    named = str(name) in MINIS
    folder = MODELS / str(name) if named else Path(name)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        if named:
            raise IntegrityError(
                f"no checkpoint of {name} in {shown(folder)}: "
                f"restore it with `git checkout {shown(folder)}` "
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
            f"restore it with `git checkout {shown(folder)}`"
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
            f"{shown(file)} does not name the checkpoint's hash: "
            f"restore it with `git checkout {shown(folder)}`"
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
