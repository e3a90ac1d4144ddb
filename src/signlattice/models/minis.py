"""The four small models that this repository trains, one for each architecture of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from signlattice.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        """Build the untrained model; its weights follow torch's global seed."""
        # here, not above: who only reads what the minis are waits seconds less
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            **self.config,
        )
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
"""Common to the three: wider heads on the layers that attend to the whole context."""

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


def spec(name: str) -> ModelSpec:
    """Return the mini of that name. Raises ``InputError`` if there is none."""
    if name not in MINIS:
        raise InputError(
            f"unknown model {name!r}: choose one of {', '.join(MINIS)}, or give a folder"
        )
    return MINIS[name]


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: its short name, its repository on the hub, and the mini like it."""

    name: str
    repository: str
    mini: str


PAPER_MODELS = (
    PaperModel("OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924", OLMOE_MINI.name),
    PaperModel("Gemma-4-E2B", "google/gemma-4-E2B", GEMMA4_E2B_MINI.name),
    PaperModel("Gemma-4-E4B", "google/gemma-4-E4B", GEMMA4_E4B_MINI.name),
    PaperModel("Gemma-4-26B-A4B", "google/gemma-4-26B-A4B", GEMMA4_MOE_MINI.name),
)
"""The paper's four models, in its order: the only place that lists them."""

REPOSITORIES = {model.name: model.repository for model in PAPER_MODELS}
"""Repositories of the paper's models on the hub, by short name."""
