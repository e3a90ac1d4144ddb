"""Ways in which the folder of a model can be wrong, for the tests and for the probe.

Each is a name and what it does to a copy of a good folder. Most are refused; some leave a folder
that still works, such as one with a field more.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from signlattice import load_full, load_model

Damage = Callable[[Path], None]

# Of any JSON kind, and numbers no model has.
VALUES = (
    None,
    True,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    -1,
    0,
    1,
    1.5,
    3,
    1e400,
    10**5,
    10**12,
    10**30,
)
CONFIG = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "hidden_act",
    "dtype",
    "num_experts",
    "num_experts_per_tok",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "layer_types",
    "sliding_window",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    "auto_map",
    "is_encoder_decoder",
    "text_config",
    "transformers_version",
)
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
CONTENTS = {
    "empty": b"",
    "a brace": b"{",
    "null": b"null",
    "a list": b"[1, 2]",
    "a string": b'"x"',
    "a number": b"3",
    "an empty object": b"{}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "zeros": bytes(4096),
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
}
QUANTISED = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "fp8"},
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "none-such"},
    {"bits": 4},
)
GENERATION = (
    {"num_beams": 4},
    {"do_sample": True, "temperature": -1.0},
    {"cache_implementation": "static"},
    {"cache_implementation": "none-such"},
    {"repetition_penalty": "x"},
    {"eos_token_id": "x"},
    {"eos_token_id": 10**9},
    {"eos_token_id": [[1]]},
    {"pad_token_id": -1},
    {"max_length": -1},
    {"num_return_sequences": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"use_cache": False},
    {"watermarking_config": {"greenlist_ratio": 9}},
    {"return_dict_in_generate": True, "output_attentions": True},
    {"none_such": {"a": [1]}},
)
TOKENIZER = (
    {"tokenizer_class": "NoneSuch"},
    {"tokenizer_class": 3},
    {"bos_token": 3},
    {"bos_token": {"a": 1}},
    {"eos_token": "none such"},
    {"added_tokens_decoder": {"x": "y"}},
    {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
    {"model_max_length": "x"},
    {"chat_template": 3},
    {"extra_special_tokens": 3},
)


def damages() -> dict[str, Damage]:
    """Return all of them, by name."""
    return dict([*_config(), *_files(), *_weights(), *_others()])


def damaged(good: Path, damage: Damage, folder: Path) -> Path:
    """Copy a good folder and damage the copy."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    damage(folder)
    return folder


def read(folder: Path, full: bool) -> None:
    """Load a model and use it."""
    loaded = load_full(str(folder), device_map="cpu") if full else load_model(folder)
    ids = torch.tensor(loaded.encode(["def f(x): return x"]))
    with torch.no_grad():
        logits = loaded.model(ids[:, : loaded.context]).logits
    assert logits.isfinite().all(), "the logits are not finite"


def _config() -> Iterator[tuple[str, Damage]]:
    for field in CONFIG:
        for value in VALUES:
            yield f"config {field}={str(value)[:12]!r}", _changed("config.json", {field: value})
    for number, quantised in enumerate(QUANTISED):
        change = {"quantization_config": quantised}
        yield f"quantised {number} {quantised.get('quant_method')}", _changed("config.json", change)
    for dtype in ("float16", "float64", "int8", "complex64", "float8_e4m3fn", "torch.float32"):
        yield f"config dtype={dtype}", _changed("config.json", {"dtype": dtype})
    for kind in ("llama", "bert", "t5", "gpt2", "mamba", "gemma4", "clip"):
        yield f"config model_type={kind}", _changed("config.json", {"model_type": kind})
    for sizes in (
        {"hidden_size": 32},
        {"hidden_size": 128},
        {"vocab_size": 299},
        {"vocab_size": 301},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 4},
        {"num_experts": 2},
        {"num_experts_per_tok": 9},
        {"intermediate_size": 31},
        {"max_position_embeddings": 1},
        {"rms_norm_eps": -1e9},
        {"rope_parameters": {"rope_type": "none-such"}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}},
        {"hidden_act": "none-such"},
        {"head_dim": 16, "hidden_size": 10**9},
    ):
        yield f"config {sizes}", _changed("config.json", sizes)


def _files() -> Iterator[tuple[str, Damage]]:
    for file in FILES:
        yield f"{file} is missing", _removed(file)
        yield f"{file} is a folder", _folder(file)
        yield f"{file} links to itself", _looped(file)
        yield f"{file} is a FIFO", _fifo(file)
        for name, content in CONTENTS.items():
            yield f"{file} is {name}", _written(file, content)
        for share in (0.1, 0.5, 0.9):
            yield f"{file} is cut at {share}", _cut(file, share)
    for number, generation in enumerate(GENERATION):
        change = _changed("generation_config.json", generation)
        yield f"generation {number} {next(iter(generation))}", change
    for number, tokenizer in enumerate(TOKENIZER):
        change = _changed("tokenizer_config.json", tokenizer)
        yield f"tokenizer {number} {next(iter(tokenizer))}", change
    for index in (
        {"weight_map": {"a": "b.safetensors"}},
        {"weight_map": {"a": "/dev/zero"}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": ["b"]}},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"model.norm.weight": "model.safetensors"}, "metadata": 3},
    ):
        content = json.dumps(index).encode()
        yield f"index {index}", _written("model.safetensors.index.json", content)


def _weights() -> Iterator[tuple[str, Damage]]:
    def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
        def damage(folder: Path) -> None:
            file = folder / "model.safetensors"
            held = load_file(file)
            change(held)
            save_file({k: v.contiguous() for k, v in held.items()}, file, {"format": "pt"})

        return damage

    first = "model.layers.0.self_attn.k_proj.weight"
    yield "a weight is missing", tensors(lambda held: held.pop(first))
    yield "a weight is transposed and cut", tensors(lambda h: h.update({first: h[first][:7].mT}))
    yield "a weight has no axis", tensors(lambda h: h.update({first: torch.tensor(1.0)}))
    yield "a weight has integers", tensors(lambda h: h.update({first: h[first].to(torch.int8)}))
    yield (
        "a weight has complex numbers",
        tensors(lambda h: h.update({first: h[first].float() + 0j})),
    )
    yield "a weight is NaN", tensors(lambda held: held[first].fill_(float("nan")))
    yield "a weight is infinite", tensors(lambda held: held[first].fill_(float("inf")))
    yield "a weight is huge", tensors(lambda held: held[first].fill_(3e38))
    yield (
        "weights are in bf16",
        tensors(lambda h: h.update({k: v.bfloat16() for k, v in h.items()})),
    )
    yield "a weight too many", tensors(lambda h: h.update({"model.none": torch.ones(2)}))
    yield (
        "a layer too many",
        tensors(lambda h: h.update({k.replace("s.1.", "s.2."): v.clone() for k, v in h.items()})),
    )
    yield (
        "names of another model",
        tensors(lambda h: [h.update({f"x.{name}": h.pop(name)}) for name in list(h)]),
    )
    yield "no weights at all", tensors(lambda held: held.clear())
    yield (
        "no metadata",
        lambda folder: save_file(
            load_file(folder / "model.safetensors"), folder / "model.safetensors"
        ),
    )


def _others() -> Iterator[tuple[str, Damage]]:
    def words(folder: Path) -> None:
        file = folder / "tokenizer.json"
        plain = json.loads(file.read_text())
        plain["model"]["vocab"] = {word: 5 * i for word, i in plain["model"]["vocab"].items()}
        file.write_text(json.dumps(plain))

    def extra(folder: Path) -> None:
        file = folder / "tokenizer.json"
        plain = json.loads(file.read_text())
        plain["added_tokens"].append(
            {
                "id": 5000,
                "content": " ",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
        file.write_text(json.dumps(plain))

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    yield "ids of words beyond the vocabulary", words
    yield "a token beyond the vocabulary", extra
    yield "weights in a pickle alone", pickled
    yield "a shard without its index", _written("model-00001-of-00002.safetensors", b"x")
    yield "code of its own", _changed("config.json", {"auto_map": {"AutoConfig": "own.Config"}})
    yield "no permission", lambda folder: (folder / "config.json").chmod(0)
    yield "an adapter beside it", _written("adapter_config.json", b"{")
    yield "a chat template that is damaged", _written("chat_template.jinja", b"\xff{% if")
    yield "special tokens that are damaged", _written("special_tokens_map.json", b"[")
    yield "added tokens that are damaged", _written("added_tokens.json", b'{"a": "b"}')


def _changed(name: str, changes: dict) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def _written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def _removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink(missing_ok=True)


def _replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def _folder(name: str) -> Damage:
    return _replaced(name, Path.mkdir)


def _looped(name: str) -> Damage:
    return _replaced(name, lambda file: file.symlink_to(file.name))


def _fifo(name: str) -> Damage:
    return _replaced(name, os.mkfifo)


def _cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        content = file.read_bytes() if file.is_file() else b"{}"
        file.write_bytes(content[: int(share * len(content))])

    return damage
