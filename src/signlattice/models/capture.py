"""Capture the keys and queries of a model, as attention sees them or before RoPE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from signlattice.errors import InputError, IntegrityError
from signlattice.io import write_tensors, write_text
from signlattice.models.hooks import attention_layers, key_hook
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches

Stage = Literal["post_rope", "pre_rope"]
Scope = Literal["head", "layer"]


@dataclass
class KeyBank:
    """Keys and queries of every layer, token by token, in memory or in a folder of shards.

    Sequences lie one behind the other in the order in which the model read them; padding is left
    out. ``lengths`` holds the tokens of each.
    """

    stage: Stage
    folder: Path | None = None
    shard_tokens: int = 1 << 16
    dtype: torch.dtype = torch.float32
    lengths: list[int] = field(default_factory=list)
    _open: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    _shards: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> list[int]:
        """Indices of the captured layers."""
        names = set(self._open) | set(self._shards)
        return sorted(int(name.split(".")[1]) for name in names if name.startswith("keys."))

    @property
    def n_tokens(self) -> int:
        """Tokens captured in each layer."""
        return sum(self.lengths)

    def keys(self, layer: int, scope: Scope = "head") -> Tensor:
        """All keys of a layer: [H, N, D] per head, or [N, H·D] with the heads side by side."""
        keys = torch.cat(list(self._read("keys", layer))).float()
        return keys.transpose(0, 1) if scope == "head" else keys.flatten(1)

    def queries(self, layer: int) -> Tensor:
        """All queries of a layer, [Hq, N, D]."""
        return torch.cat(list(self._read("queries", layer))).float().transpose(0, 1)

    def shards(self, layer: int) -> Iterator[Tensor]:
        """The keys of a layer piece by piece, [n, H, D], for calibrations that exceed memory."""
        return self._read("keys", layer)

    def sequences(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(queries [Hq, T, D], keys [H, T, D])`` of each sequence in turn."""
        queries, keys = self.queries(layer), self.keys(layer)
        return zip(queries.split(self.lengths, 1), keys.split(self.lengths, 1), strict=True)

    def append(self, kind: str, layer: int, rows: Tensor) -> None:
        """Add rows [n, H, D]; a full buffer goes to disk if the bank has a folder."""
        name = f"{kind}.{layer}"
        buffer = self._open.setdefault(name, [])
        buffer.append(rows.detach().to("cpu", self.dtype))
        if self.folder is not None and sum(len(rows) for rows in buffer) >= self.shard_tokens:
            self._flush(name)

    def close(self) -> None:
        """Write what is still in memory, and the index that `open_bank` reads, to the folder."""
        if self.folder is None:
            return
        for name in list(self._open):
            self._flush(name)
        index = {"stage": self.stage, "lengths": self.lengths, "shards": self._shards}
        write_text(self.folder / "index.json", json.dumps(index))

    def _flush(self, name: str) -> None:
        rows = self._open.pop(name)
        written = self._shards.setdefault(name, [])
        file = f"{name}.{len(written):05d}.safetensors"
        write_tensors(self.folder / file, {"rows": torch.cat(rows)})
        written.append(file)

    def _read(self, kind: str, layer: int) -> Iterator[Tensor]:
        name = f"{kind}.{layer}"
        if name not in self._shards and name not in self._open:
            raise InputError(
                f"no {kind} of layer {layer} in this bank: it holds layers {self.layers}"
            )
        for file in self._shards.get(name, ()):
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    rows = shard.get_tensor("rows")
            except (SafetensorError, OSError) as error:
                raise IntegrityError(
                    f"{self.folder / file} is damaged or cut short ({error}): "
                    f"delete {(self.folder / file).parent} and capture the keys again"
                ) from None
            yield rows
        yield from self._open.get(name, ())


def open_bank(folder: Path) -> KeyBank:
    """A bank that was captured to ``folder``. Raises ``IntegrityError`` if it is not whole."""
    try:
        index = json.loads((folder / "index.json").read_text())
        bank = KeyBank(index["stage"], folder, lengths=index["lengths"], _shards=index["shards"])
    except (OSError, ValueError, KeyError):
        raise IntegrityError(
            f"{folder} holds no finished capture: capture the keys again"
        ) from None
    missing = [f for files in bank._shards.values() for f in files if not (folder / f).is_file()]
    if missing:
        raise IntegrityError(f"{folder} lacks the shard {missing[0]}: capture the keys again")
    return bank


def join_banks(banks: Sequence[KeyBank]) -> KeyBank:
    """Banks in folders beside each other, one behind the other as a single bank.

    Raises ``InputError`` if they are not of one stage, or not all in folders of one folder.
    """
    folders = {bank.folder and bank.folder.parent for bank in banks}
    if len(folders) != 1 or None in folders or len({bank.stage for bank in banks}) != 1:
        raise InputError(f"{len(banks)} banks cannot be joined: give banks of one stage and folder")
    shards: dict[str, list[str]] = {}
    for bank in banks:
        for name, files in bank._shards.items():
            shards.setdefault(name, []).extend(f"{bank.folder.name}/{file}" for file in files)
    lengths = [length for bank in banks for length in bank.lengths]
    return KeyBank(banks[0].stage, folders.pop(), lengths=lengths, _shards=shards)


@contextmanager
def capture(
    model: PreTrainedModel,
    stage: Stage = "post_rope",
    *,
    queries: bool = True,
    folder: Path | None = None,
    shard_tokens: int = 1 << 16,
    dtype: torch.dtype = torch.float32,
) -> Iterator[KeyBank]:
    """Record the keys of every forward pass of ``model`` while the context is open.

    ``post_rope``: as attention sees them. ``pre_rope``: the output of the key norm, or of the key
    projection where there is none. With ``folder``, rows go to safetensors shards there and memory
    stays bounded by ``shard_tokens`` per layer. Call the model on whole sequences, padded or not,
    without a cache that already holds tokens. A layer that shares the keys of another has none of
    its own; its queries are recorded under its own index.

    Raises ``InputError`` on an unknown stage, a model without decoder attention or (``pre_rope``)
    without separate key projections, and a folder that holds a capture already.

    Example:
        >>> import torch
        >>> from signlattice import capture, load_model
        >>> loaded = load_model("olmoe-mini")
        >>> with capture(loaded.model) as bank:
        ...     _ = loaded.model(torch.tensor([loaded.encode(["def add(a, b):"])[0]]))
        >>> bank.layers
        [0, 1, 2, 3]
        >>> bank.keys(0).shape[0], bank.keys(0).shape[2]  # heads, head_dim
        (4, 64)
    """
    if stage not in ("post_rope", "pre_rope"):
        raise InputError(f"unknown stage {stage!r}: use 'post_rope' or 'pre_rope'")
    if folder is not None:
        if (folder / "index.json").exists():
            raise InputError(
                f"{folder} holds a capture already: open_bank reads it, or use another"
            )
        folder.mkdir(parents=True, exist_ok=True)
    bank = KeyBank(stage, folder, shard_tokens, dtype)
    batch = _Batch(bank)
    with batch.watch(model):
        if stage == "post_rope":
            owners = {i for i, layer in attention_layers(model).items() if layer.owns_keys}

            def record(layer: int, query: Tensor, key: Tensor) -> Tensor:
                if layer in owners:
                    batch.record("keys", layer, key)
                if queries:
                    batch.record("queries", layer, query)
                return key

            with key_hook(model, record), torch.no_grad():
                yield bank
        else:
            with _projection_hooks(model, batch, queries), torch.no_grad():
                yield bank
    bank.close()


@dataclass
class _Batch:
    """Knows which tokens of the current forward pass are real, and files them in the bank."""

    bank: KeyBank
    keep: Tensor | None = None

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise InputError("capture needs input_ids: call the model as model(input_ids, ...)")
        mask = kwargs.get("attention_mask")
        self.keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.bank.lengths.extend(self.keep.sum(1).tolist())

    def record(self, kind: str, layer: int, states: Tensor) -> None:
        """File states [B, H, T, D] as rows [n, H, D], sequence after sequence, padding dropped."""
        self.bank.append(kind, layer, states.transpose(1, 2)[self.keep.to(states.device)])


@contextmanager
def _projection_hooks(model: PreTrainedModel, batch: _Batch, queries: bool) -> Iterator[None]:
    """Hooks on the key (and query) norm of each attention layer, or on its projection."""
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no separate key projection: capture stage='post_rope'"
        )
    hooks = []
    for layer in layers:
        for kind, letter in (("keys", "k"), ("queries", "q"))[: 1 + queries]:
            source = getattr(layer, f"{letter}_norm", None) or getattr(layer, f"{letter}_proj")

            def record(module, args, output, *, kind=kind, layer=layer):
                heads = output.reshape(*batch.keep.shape, -1, layer.head_dim)
                batch.record(kind, layer.layer_idx, heads.transpose(1, 2))

            hooks.append(source.register_forward_hook(record))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def calibration_keys(bank: KeyBank, n_keys: int, seed: int) -> dict[int, Tensor]:
    """A random ``n_keys`` of the bank's tokens, the same in each layer: [H, n_keys, D] per layer.

    Raises ``InputError`` if the bank holds fewer.
    """
    if bank.n_tokens < n_keys:
        raise InputError(f"n_keys={n_keys}, but the calibration text has {bank.n_tokens} tokens")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(bank.n_tokens, generator=generator)[:n_keys].sort().values
    return {layer: bank.keys(layer)[:, chosen].contiguous() for layer in bank.layers}


def capture_passages(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    *,
    queries: bool = True,
    folder: Path | None = None,
    batch_size: int = BATCH,
) -> KeyBank:
    """The keys, after RoPE, that ``loaded`` makes of some passages, in memory or in a ``folder``.

    In a folder they are in the precision of the model. Without ``queries`` less is computed: layers
    that read the keys of others may skip all tokens but the last.
    """
    device = loaded.model.device
    dtype = torch.float32 if folder is None else loaded.model.dtype
    with capture(loaded.model, queries=queries, folder=folder, dtype=dtype) as bank:
        for _, ids, mask in batches(pieces, batch_size):
            loaded.model(
                ids.to(device),
                attention_mask=mask.to(device),
                use_cache=False,
                logits_to_keep=0 if queries else 1,
            )
    return bank
