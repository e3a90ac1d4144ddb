"""Try every decoder class of the installed transformers, tiny, with a cache that rounds nothing.

``python benchmarks/sweep_models.py`` writes MODELS.md: of each class whether `SignKeyCache` with
everything in full precision gives the logits of a `DynamicCache`, or why it refuses.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.errors import InputError
from signlattice.io import write_text

TABLE = Path(__file__).parents[1] / "MODELS.md"
EXACT = 1e-5
"""Of ‖got − expected‖ / ‖expected‖ over logits, where nothing is rounded but fp32 itself."""

VERDICTS = ("equal", "refused", "differs", "fails", "not built")
_HEAD = """# Classes of decoders

Every class of `AutoModelForCausalLM` in transformers {version}, built tiny with random weights
and read by a `SignKeyCache` that keeps everything in full precision, in calls of many tokens and of
one. *equal*: the logits are those of a `DynamicCache` to 1e-5. *refused*: an `InputError` says why
when the cache is made or a codec is to be learned. *not built*: transformers itself does not run
the class so small, or not on text alone with a `DynamicCache`. Made by
`benchmarks/sweep_models.py`.
"""
_N_TOKENS, _VOCABULARY, _LOCAL = 24, 96, 8
_LARGEST = 4_000_000
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size",), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    "num_key_value_groups": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), _LOCAL),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "query_pre_attn_scalar"), 16),
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
"""Of whatever a configuration has these names for."""

_OWN: dict[str, dict[str, Any]] = {}
"""What single configurations need beside."""


@dataclass(frozen=True)
class Row:
    """What came of one class: ``verdict`` is "equal", "refused", "differs" or "not built"."""

    model_class: str
    model_type: str
    verdict: str
    reason: str = ""

    @classmethod
    def of(cls, model_type: str, verdict: str, reason: object = "") -> Row:
        """Make a row of one line without the table's own signs."""
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        name = name if isinstance(name, str) else name[0]
        if isinstance(reason, Exception) and not isinstance(reason, InputError):
            reason = f"{type(reason).__name__}: {reason}"
        line = " ".join(str(reason).replace("|", "/").replace("`", "").split())
        return cls(name, model_type, verdict, shorten(line, 160, placeholder=" …"))


def tiny_config(model_type: str) -> PretrainedConfig:
    """Make a configuration of that type with a few layers of a few narrow heads."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_sizes(config_class(), _OWN.get(model_type, {})))


def _sizes(default: PretrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: size for name, size in _SIZES.items() if name in default.to_dict()} | own
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in default.sub_configs:
        if "text" in name and getattr(default, name, None) is not None:
            sizes[name] = _sizes(getattr(default, name), own.get(name, {}))
    return sizes


def tiny_model(model_type: str) -> PreTrainedModel:
    """Build a tiny model of that type, of random weights under which attention is not uniform."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > _LARGEST:
        raise ValueError(f"{size} parameters are not tiny: name the sizes of {model_type}")
    model = AutoModelForCausalLM.from_config(config).eval().float()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@torch.no_grad()
def tried(model_type: str) -> Row:
    """Compare a whole cache with transformers' own on one class: a prompt, then token by token."""
    try:
        model = tiny_model(model_type)
        text = model.config.get_text_config(decoder=True)
        expected = _logits(model, DynamicCache(config=text))
    except Exception as error:  # a class that transformers itself cannot run so says nothing
        return Row.of(model_type, "not built", error)
    whole = CacheConfig("full", "full", window=5, sinks=2, sliding="packed")
    try:
        cache = SignKeyCache(model, None, whole)
    except InputError as error:
        return Row.of(model_type, "refused", error)
    try:
        got = _logits(model, cache)
    except Exception as error:
        return Row.of(model_type, "fails", error)
    off = float((got - expected).norm() / expected.norm())
    if off < EXACT:
        return Row.of(model_type, "equal")
    return Row.of(model_type, "differs", f"by {off:.1e}")


def _logits(model: PreTrainedModel, cache) -> Tensor:
    """Logits [2, T, V] of a prompt in two calls and of the rest token by token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, _VOCABULARY, (2, _N_TOKENS), generator=generator)
    sizes = (11, 6, *[1] * (_N_TOKENS - 17))
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1)


def read_table() -> dict[str, Row]:
    """Read the rows of the table, by type."""
    cells = (
        [cell.strip().replace("`", "") for cell in line.strip("|\n").split(" | ")]
        for line in TABLE.read_text().splitlines()
        if line.startswith("| `")
    )
    return {cell[1]: Row(cell[0], cell[1], cell[2], cell[3]) for cell in cells}


def write_table(rows: Iterable[Row]) -> None:
    """Write the table, the rows by verdict and type."""
    order = {verdict: number for number, verdict in enumerate(VERDICTS)}
    ordered = sorted(rows, key=lambda row: (order[row.verdict], row.model_type))
    counts = Counter(row.verdict for row in ordered)
    lines = [
        _HEAD.format(version=transformers.__version__),
        *(f"- {verdict}: {counts[verdict]}" for verdict in VERDICTS),
        "\n| class | type | verdict | reason |\n|---|---|---|---|",
        *(f"| `{r.model_class}` | `{r.model_type}` | {r.verdict} | {r.reason} |" for r in ordered),
    ]
    write_text(TABLE, "\n".join(lines) + "\n")


def main() -> None:
    """Try some types, or all, and write what came of them into the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", metavar="TYPE", help="default: all")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = read_table() if TABLE.exists() else {}
    for model_type in options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows[model_type] = row = tried(model_type)
        print(row.verdict, row.model_type, row.reason, flush=True)
        write_table(rows.values())
        gc.collect()


if __name__ == "__main__":
    main()
