"""Load models of full size, by name on the hub or by folder, and estimate what they will take.

The estimate comes before a parameter is fetched: ``signlattice estimate Gemma-4-E2B`` prints it.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import get_max_memory
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from signlattice import hub
from signlattice.errors import InputError, checked
from signlattice.io import check_free_space, display_path
from signlattice.models import cost
from signlattice.models.checkpoint import (
    check_files,
    check_formats,
    context_limit,
    read_config,
    shards,
    skeleton,
    weights_hash,
    word,
)
from signlattice.models.gguf import check_converted, converted_folder
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel, read_checkpoint
from signlattice.models.minis import REPOSITORIES
from signlattice.rotations.config import LearnConfig

CONTEXT = 2048
"""Tokens of a window, unless another number is asked for or the model reads fewer."""

LOGIT_BYTES = 2**30
"""Bytes of logits that an evaluation holds at once, at most: it computes them in pieces."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OR = ", ".join(DTYPES)
_GB = 1e9


@dataclass(frozen=True)
class Preflight:
    """Files and shapes of a model, and what loading and measuring it takes.

    Attributes:
        name: as it was asked for.
        repository: on the hub; None for a folder.
        revision: the commit; None for a folder.
        folder: where all files are already; None if some are to be fetched.
        files: those that are needed.
        download_bytes: of what is not in the cache.
        parameters: of the text decoder.
        active: of those, the ones that are multiplied with in every token.
        dtype: of the loaded weights.
        memory_bytes: of the weights, and of the logits of a window, or of a piece of it.
        context: tokens of a window.
        keys: groups of like layers that have keys of their own: (layers, KV heads, head size).
    """

    name: str
    repository: str | None
    revision: str | None
    folder: Path | None
    files: tuple[str, ...]
    download_bytes: int
    config: PreTrainedConfig
    parameters: int
    active: int
    dtype: torch.dtype
    memory_bytes: int
    context: int
    keys: tuple[tuple[int, int, int], ...]

    @property
    def model_id(self) -> str:
        """Name of the model in a record: repository and commit, or the folder."""
        return f"{self.repository}@{self.revision}" if self.repository else self.name

    def key_bytes(self, n_tokens: int) -> int:
        """Count the bytes of the keys of ``n_tokens`` calibration tokens on disk."""
        return sum(keys.n_bytes() for keys in self._groups(n_tokens))

    def hours(self, n_tokens: int) -> tuple[tuple[cost.Machine, int, float], ...]:
        """Estimate capture and learning from ``n_tokens``: (machine, its GPUs, hours)."""
        groups = self._groups(n_tokens)
        return tuple(
            (machine, n_gpus, _hours(self.active, groups, machine, n_gpus))
            for machine in (cost.A100, cost.H100)
            for n_gpus in (1, 8)
        )

    def table(self, n_tokens: int = 1_000_000) -> tuple[tuple[str, str], ...]:
        """Write the estimate for ``n_tokens`` calibration tokens in rows of (what, how much)."""
        rows = [
            ("model", self.model_id),
            ("parameters", f"{self.parameters / 1e9:.3g} billion, {self.active / 1e9:.3g} active"),
            ("to fetch", f"{self.download_bytes / _GB:.3g} GB"),
            ("memory", f"{self.memory_bytes / _GB:.3g} GB in {word(self.dtype)}"),
            ("context", f"{self.context} tokens"),
        ]
        rows += [("keys", f"{n} layers of {h} heads of {d}") for n, h, d in self.keys]
        key_bytes = self.key_bytes(n_tokens)
        rows += [(f"keys of {n_tokens:,} tokens", f"{key_bytes / _GB:.3g} GB on disk")]
        rows += [
            (
                f"{n_gpus} × {machine.device.name}",
                f"{hours:.2g} hours, at {machine.efficiency:.0%} of its rates",
            )
            for machine, n_gpus, hours in self.hours(n_tokens)
        ]
        return tuple(rows)

    def _groups(self, n_tokens: int) -> list[cost.Keys]:
        return [cost.Keys(*group, n_tokens) for group in self.keys]


def _hours(active: int, groups: list[cost.Keys], machine: cost.Machine, n_gpus: int) -> float:
    """Estimate the hours of one capture, and of learning every head."""
    total = 0.0
    for place, keys in enumerate(groups):
        total += cost.hours(
            0 if place else active, keys, _schedule(keys.dim), machine, n_gpus
        ).total
    return total


def _schedule(dim: int) -> cost.Schedule:
    config = LearnConfig().resolved(dim)
    steps, warm_steps, batch = config.steps, config.warm_steps, config.batch
    # `resolved` leaves no None
    assert steps is not None and warm_steps is not None and batch is not None
    return cost.Schedule(warm_steps, steps, batch, config.polish_steps, config.trace_every)


def record_name(name: str) -> str:
    """Make a word for the record of a model from its name or folder: letters, digits, ``._-``."""
    word = re.sub(r"[^\w.-]+", "--", name.strip().rstrip("/").removeprefix("./")).strip("-.")
    if not word:
        raise InputError(f"model {name!r}: give a name on the hub or a folder")
    return word if not Path(name).is_absolute() else Path(name).name


def preflight(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    device_map: str = "auto",
) -> Preflight:
    """Find a model and check that it can be loaded.

    Of a model on the hub only the configuration is fetched.

    Args:
        name: one of the paper's models (`minis.PAPER_MODELS`), a packaged model
            (`gguf.PACKAGED_MODELS`), a name on the hub, or a folder or GGUF file of a model.
        revision: branch, tag or commit; it is resolved to a commit. For names on the hub alone.
        dtype: "auto" is that of the checkpoint; "float32", "bfloat16", "float16" or a torch dtype.
        context: tokens of the windows that will be read; None is what the model reads, at most
            `CONTEXT`.
        device_map: accelerate's: "auto", "cpu", "cuda:0", ….

    Raises:
        InputError: no such model or revision, no access, no network and not in the cache; no
            safetensors, code of its own, no decoder; a context or dtype that it does not have; too
            little disk or memory, with the estimate.
        IntegrityError: a shard that is missing or damaged, in a folder or in the cache.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise InputError(f"model {name!r}: give a name on the hub or a folder")
    name = str(name)
    folder = Path(name) if os.path.isdir(name) else converted_folder(name)
    source = folder or REPOSITORIES.get(name, name)
    if isinstance(source, Path):
        if revision is not None:
            raise InputError(
                f"revision={revision!r} of the folder {display_path(source)}: leave it out"
            )
        where, names, to_fetch = source, (), 0
        repository = commit = None
    else:
        repository = source
        where, commit, names, to_fetch = _on_hub(repository, revision)
    files = check_files(where) if where else None
    config = read_config(where or source, commit, name)
    context = _context(context, config, name)
    chosen = _dtype(dtype, config)
    model = skeleton(config, name, files)
    parameters, active = _parameters(model)
    logits = context * config.vocab_size * (chosen.itemsize + 4)
    memory = parameters * chosen.itemsize + min(logits, LOGIT_BYTES)
    check_free_space(
        Path(constants.HF_HUB_CACHE), to_fetch, name, "set HF_HUB_CACHE to a larger disk"
    )
    _check_memory(name, memory, chosen, device_map)
    return Preflight(
        name,
        repository,
        commit,
        where,
        files.names if files else names,
        to_fetch,
        config,
        parameters,
        active,
        chosen,
        memory,
        context,
        _key_groups(model),
    )


@checked
def load_full(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    device_map: str = "auto",
) -> LoadedModel:
    """Load a model, fetched if need be, after a `preflight`: same arguments, same errors.

    ``name`` of the result is the record's model id: repository and commit, or the folder.

    Example:
        A folder is taken as it is; a name on the hub is fetched:

        >>> from signlattice import load_full
        >>> from signlattice.models.loading import MODELS
        >>> loaded = load_full(str(MODELS / "olmoe-mini"), device_map="cpu")
        >>> loaded.head_dim
        64
    """
    checked = preflight(
        name, revision=revision, dtype=dtype, context=context, device_map=device_map
    )
    folder = checked.folder  # its files are checked
    if folder is None:
        folder = _fetched(checked)
        check_files(folder)
    digest = weights_hash(folder)
    check_converted(checked.name, folder, digest)
    return read_checkpoint(
        checked.model_id,
        folder,
        digest,
        checked.config,
        dtype=checked.dtype,
        context=checked.context,
        device_map=device_map,
    )


# Where the files are.


def _on_hub(name: str, revision: str | None) -> tuple[Path | None, str, tuple[str, ...], int]:
    """Return (folder if all is in the cache, commit, files, bytes to fetch)."""
    try:
        repository = hub.resolve(name, revision)
    except hub.Unreachable as unreachable:
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            raise unreachable from None
        return folder, folder.name, (), 0
    sizes, commit = repository.sizes, repository.revision
    files = _needed(name, sizes)
    in_cache = {file: try_to_load_from_cache(name, file, revision=commit) for file in files}
    cached = {file: path for file, path in in_cache.items() if isinstance(path, str)}
    if len(cached) == len(files):
        folder = Path(cached[files[0]]).parent
        return folder, commit, files, 0
    return None, commit, files, sum(sizes[file] for file in files if file not in cached)


def _needed(name: str, sizes: dict[str, int]) -> tuple[str, ...]:
    """List weights, configuration and tokenizer: other formats lie beside them, or in folders."""
    top = sorted(file for file in sizes if "/" not in file)
    check_formats(name, top)
    small = [f for f in top if re.search(r"\.(json|txt|model|jinja|tiktoken)$", f)]
    return ("config.json", *(f for f in small if f != "config.json"), *shards(top))


def _fetched(checked: Preflight) -> Path:
    repository, commit = checked.repository, checked.revision
    assert repository is not None  # what is no folder is on the hub
    with hub.refusals(repository, commit):
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=list(checked.files))
        )


# What the model is.


def _context(context: int | None, config: PreTrainedConfig, name: str) -> int:
    most = context_limit(config, name) or sys.maxsize
    if context is None:
        return min(CONTEXT, most)
    if isinstance(context, bool) or not isinstance(context, int) or not 2 <= context <= most:
        raise InputError(f"context={context!r}: {name} reads windows of 2 to {most} tokens")
    return context


def _dtype(dtype: str | torch.dtype, config: PreTrainedConfig) -> torch.dtype:
    if dtype == "auto":
        named = config.dtype or torch.float32
        if named not in DTYPES.values():
            raise InputError(f"the checkpoint is in {word(named)}: choose dtype {_OR}")
        return cast(torch.dtype, named)  # no word, once it is read
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(f"dtype={dtype!r}: choose auto, {_OR}")
    return chosen


def _parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Count all, and those that a token is multiplied with: a table is only looked up."""
    config = model.config
    n_experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _first(config, "num_experts_per_tok", "top_k_experts")
    share = chosen / n_experts if n_experts and chosen else 1.0
    heads = model.get_output_embeddings()
    output = {id(p) for p in heads.parameters()} if heads is not None else set()
    tables = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    } - output
    total = active = 0
    for path, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) not in tables:
            active += int(parameter.numel() * (share if ".experts." in path else 1.0))
    return total, active


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _key_groups(model: PreTrainedModel) -> tuple[tuple[int, int, int], ...]:
    layers = attention_layers(model).values()
    counts = Counter((layer.n_heads, layer.head_dim) for layer in layers if layer.owns_keys)
    return tuple((count, *shape) for shape, count in counts.items())


# Memory.


def _check_memory(name: str, needed: int, dtype: torch.dtype, device_map: str) -> None:
    free = _free_memory(device_map)
    if needed > free:
        remedy = "use dtype='bfloat16', or " if dtype.itemsize > 2 else "use "
        raise InputError(
            f"{name} takes {needed / _GB:.3g} GB of memory in {word(dtype)}, device_map="
            f"{device_map!r} has {free / _GB:.3g} GB free: {remedy}a machine with more"
        )


def _free_memory(device_map: str) -> int:
    """Return the bytes free where ``device_map`` may put parameters."""
    free = get_max_memory()
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return sum(free.values())
    gpu = re.fullmatch(r"cuda(?::(\d{1,4}))?", str(device_map))
    key = int(gpu[1] or 0) if gpu else device_map
    if key not in free:
        raise InputError(f"device_map={device_map!r}: there is no such device, use 'auto'")
    return int(free[key])
