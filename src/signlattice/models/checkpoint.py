"""Read the parts of a checkpoint: configuration, skeleton, weights, tokenizer.

Everything that `transformers`, `safetensors` and `tokenizers` raise over a file that is damaged,
foreign or absurd leaves this module as an ``InputError`` of one line that names the file. Only
safetensors are read, and no code of a repository is run. Of a model for images or sound too, the
text decoder alone is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from signlattice import hub
from signlattice.errors import InputError, IntegrityError
from signlattice.io import display_path

BLOCK = 1 << 20
"""Bytes that are hashed at once."""

INDEX = "model.safetensors.index.json"
SAMPLE = "def add(a, b):\n    return a + b"
"""Text that each model reads once when it is loaded."""

MOST_LAYERS = 1000
"""More than any decoder has; a skeleton of more would be built for seconds."""

_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
)
"""Files that hold one JSON object each, where they are there."""

_READ = re.compile(r"\.(json|txt|model|jinja|tiktoken|safetensors)$")
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Prefixes of the text decoder in a multimodal checkpoint, and in one of the decoder alone.
_TEXT_WEIGHTS = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}


@dataclass(frozen=True)
class Files:
    """Files of a checkpoint folder, and how many weights and numbers its shards hold."""

    names: tuple[str, ...]
    n_tensors: int
    n_numbers: int


def check_files(folder: Path) -> Files:
    """List the files of a checkpoint folder, after a check of every header and JSON file.

    Raises ``InputError`` if it holds no safetensors of plain numbers or no tokenizer,
    ``IntegrityError`` naming the file that is damaged, cut short, no file, or named by the index
    and not there.
    """
    with guarded(f"the folder {display_path(folder)} cannot be read"):
        entries = sorted(folder.iterdir())
        files = [entry.name for entry in entries if entry.is_file()]
    for entry in entries:
        if entry.name not in files and _READ.search(entry.name):
            raise IntegrityError(f"{display_path(entry)} is not a file: fetch it again")
    check_formats(display_path(folder), files)
    for name in files:
        if name in _OBJECTS:
            _object(folder / name)
    found = set(shards(files))
    if INDEX in files:
        for shard in sorted(_indexed(folder / INDEX)):
            if shard not in found:
                raise IntegrityError(
                    f"{display_path(folder / shard)} is missing, which {INDEX} names: "
                    "fetch it again"
                )
    held = [_header(folder / shard) for shard in sorted(found)]
    return Files(tuple(files), sum(n for n, _ in held), sum(n for _, n in held))


def check_formats(name: str, files: list[str]) -> None:
    """Raise ``InputError`` unless ``files`` are a configuration, safetensors and a tokenizer."""
    if "config.json" not in files:
        raise InputError(f"no config.json in {name}: not a transformers checkpoint")
    if shards(files):
        if not _TOKENIZERS & set(files):
            raise InputError(f"no tokenizer in {name}: put the model's tokenizer.json there")
        return
    if pickles := [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        raise InputError(
            f"{name} has its weights in {pickles[0]} alone, a pickle, which can run code: "
            "give a checkpoint in safetensors"
        )
    raise InputError(f"no model*.safetensors in {name}: give a checkpoint in safetensors")


def shards(files: list[str]) -> list[str]:
    """Return those of ``files`` that hold weights."""
    return [file for file in files if re.fullmatch(r"model.*\.safetensors", file)]


def read_config(source: Path | str, revision: str | None, name: str) -> PreTrainedConfig:
    """Read the configuration of the text decoder, of a folder or a repository on the hub.

    Raises ``InputError``: of no decoder, quantised, with code of its own, with values that no
    model can be built from.
    """
    with guarded(f"the config.json of {name} cannot be used"), hub.refusals(str(source), revision):
        plain, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if "auto_map" in plain:
            raise InputError(
                f"{name} brings code of its own (auto_map in config.json), which is not run: "
                "give a checkpoint of a class that transformers has itself"
            )
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        for each in (config, text):
            if method := getattr(each, "quantization_config", None):
                raise InputError(
                    f"{name} is quantised ({word(method)} in config.json): "
                    "give the checkpoint it was made from, in 16 or 32 bits"
                )
        architectures = config.architectures or []
        if not isinstance(architectures, list) or not all(map(_is_text, architectures)):
            raise InputError(
                f"the config.json of {name} has architectures={architectures!r}: "
                "use a list of class names"
            )
        if (
            config.is_encoder_decoder
            or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING
            or (architectures and not any(a.endswith(_DECODERS) for a in architectures))
        ):
            raise InputError(
                f"{name} is a {plain.get('model_type')} model "
                f"({', '.join(architectures) or 'no architecture named'}), "
                "not a decoder: give a model that continues text"
            )
        text.dtype = text.dtype or config.dtype
        return text


def context_limit(config: PreTrainedConfig, name: str) -> int | None:
    """Return how many tokens a model reads, None where nothing limits them."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 2):
        raise InputError(
            f"the config.json of {name} has max_position_embeddings={most!r}: use 2 or more"
        )
    return most


def skeleton(config: PreTrainedConfig, name: str, files: Files | None = None) -> PreTrainedModel:
    """Build the model without its parameters; ``files`` are those that shall fill it, if there."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    most = min(MOST_LAYERS, files.n_tensors) if files else MOST_LAYERS
    if not isinstance(n_layers, int) or n_layers > most:
        raise InputError(
            f"the config.json of {name} has num_hidden_layers={n_layers!r}: "
            f"{'its weights are' if files else 'no model has more than'} {most}"
        )
    with guarded(f"transformers builds no model of the config.json of {name}"):
        with torch.device("meta"):
            model = class_of(config)(config)
        needed = sum(parameter.numel() for parameter in model.parameters())
    if files is not None and needed > files.n_numbers:
        raise IntegrityError(
            f"{name} lacks weights of its decoder: config.json describes {needed:,} numbers, "
            f"its model*.safetensors hold {files.n_numbers:,}; fetch the checkpoint again"
        )
    return model


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that reads a text with this configuration."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def read_weights(
    folder: Path,
    config: PreTrainedConfig,
    name: str,
    dtype: torch.dtype,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Build the model and fill it, in evaluation mode.

    Raises ``IntegrityError`` if a weight is missing, of another shape than the configuration
    says, or of a layer that it does not have.
    """
    with guarded(f"the weights or the generation_config.json of {name} cannot be read"):
        loaded = class_of(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=_TEXT_WEIGHTS,
            ignore_mismatched_sizes=True,  # they are told below
            output_loading_info=True,
        )
    model, report = cast(tuple[PreTrainedModel, dict], loaded)  # with loading info
    if mismatched := sorted(report["mismatched_keys"]):
        weight, held, wanted = mismatched[0]
        raise IntegrityError(
            f"{weight} in the model*.safetensors of {name} is {list(held)}, config.json says "
            f"{list(wanted)}: fetch the checkpoint again"
        )
    if missing := sorted(report["missing_keys"]):
        raise IntegrityError(
            f"{name} lacks {len(missing)} weights of its decoder, {missing[0]} among them: "
            "fetch the checkpoint again"
        )
    if beyond := _of_more_layers(model, report["unexpected_keys"]):
        raise IntegrityError(
            f"{beyond} in the model*.safetensors of {name} is of a layer beyond the "
            f"{config.num_hidden_layers} that config.json says: fetch the checkpoint again"
        )
    generation = model.generation_config
    for mark in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, mark, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int for each in ids):
            raise InputError(
                f"the generation_config.json of {name} has {mark}={value!r}: use token ids"
            )
    return model.eval()


def _of_more_layers(model: PreTrainedModel, unexpected: set[str]) -> str | None:
    """Find a weight that was left over and would fit a layer, had the model more of them."""
    number = re.compile(r"\.\d+\.")
    known = {number.sub(".#.", weight) for weight in model.state_dict()}
    n_layers = model.config.num_hidden_layers
    for weight in sorted(unexpected):
        layer = re.search(r"\.(\d+)\.", weight)
        if layer and int(layer[1]) >= n_layers and number.sub(".#.", weight) in known:
            return weight
    return None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint, and `SAMPLE` with it."""
    with guarded(f"the tokenizer in {display_path(folder)} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer([SAMPLE], add_special_tokens=False, verbose=False)
        return tokenizer


def check_runs(model: PreTrainedModel, ids: list[int], name: str) -> None:
    """Read a few tokens: what no part of the checkpoint says alone shows when they are joined.

    Raises ``InputError`` if the model cannot be run, or gives no finite logits.
    """
    tokens = torch.tensor([ids], device=model.device)
    with guarded(f"{name} cannot read a text, as its config.json and weights are"):
        with torch.no_grad():
            logits = cast(nn.Module, model)(input_ids=tokens).logits
    if not logits.amax(-1).isfinite().all():
        raise InputError(
            f"{name} gives no finite logits in {word(model.dtype)}: its weights are damaged, "
            "its config.json is another's, or it needs dtype='float32'"
        )


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
def quiet() -> Iterator[None]:
    """Silence transformers' bars and reports: errors are told here, and a page keeps dead bars."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Tell in one line what others raise over a file: of any class, for a file says anything."""
    try:
        with quiet():
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{what} ({reason}): mend it or fetch it again") from None


def _object(file: Path) -> dict:
    """Read a file that holds one JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{display_path(file)} cannot be read ({str(error)[:100]}): fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{display_path(file)} is no JSON object: fetch it again")
    return content


def _indexed(index: Path) -> set[str]:
    named = _object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise IntegrityError(f"{display_path(index)} names no shards: fetch it again")
    return set(named.values())


def _header(shard: Path) -> tuple[int, int]:
    """Count the tensors of a shard and their numbers, from its header alone."""
    try:
        with safe_open(shard, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = [torch.Size(each.get_shape()) for each in slices.values()]
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{display_path(shard)} is damaged or cut short ({error}): "
            f"delete {display_path(shard.resolve())} and fetch it again"
        ) from None
    for name, dtype in dtypes.items():
        if name.endswith("weight") and dtype not in _FLOATS:
            raise InputError(
                f"{name} in {display_path(shard)} is stored as {dtype}: "
                f"give an unquantised checkpoint, in one of {', '.join(_FLOATS)}"
            )
    return len(shapes), sum(shape.numel() for shape in shapes)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def word(value: object) -> str:
    """Name a quantisation or a dtype in a word."""
    if isinstance(value, Mapping):
        value = value.get("quant_method", "quantization_config")
    value = getattr(value, "quant_method", value)
    return str(getattr(value, "value", value)).removeprefix("torch.")[:40]
