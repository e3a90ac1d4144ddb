"""Capture the queries, keys and values of a model, as attention reads them or before RoPE."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from signlattice.errors import InputError, IntegrityError, checked
from signlattice.io import keep_json, keep_tensors, kept_json, kept_tensors
from signlattice.models.hooks import AttentionInputs, attention_hook, attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches

Stage = Literal["post_rope", "pre_rope"]
Scope = Literal["head", "layer"]
StateKind = Literal["keys", "queries", "values"]
STATE_KINDS: tuple[StateKind, ...] = get_args(StateKind)


def no_tokens(n_tokens: int) -> None:
    """Ignore that tokens were read: the progress of a capture that nobody watches."""


@dataclass
class StateBank:
    """Captured keys, queries and values of a model's layers, in memory or in a folder of shards.

    Sequences lie one behind the other in the order in which the model read them, without their
    padding; ``lengths`` holds the tokens of each. All tensors are given in fp32. A layer that
    reads the keys of another has none of its own here.
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
        """Indices of the layers whose keys were captured."""
        return self._layers_with("keys")

    @property
    def n_tokens(self) -> int:
        """Number of tokens captured in each layer."""
        return sum(self.lengths)

    def keys(self, layer: int, scope: Scope = "head") -> Tensor:
        """Return all keys of a layer: [H, N, D] per head, or [N, H·D] with heads side by side."""
        keys = self._rows("keys", layer)
        return keys.transpose(0, 1) if scope == "head" else keys.flatten(1)

    def queries(self, layer: int) -> Tensor:
        """Return all queries of a layer, [Hq, N, D]."""
        return self._rows("queries", layer).transpose(0, 1)

    def values(self, layer: int) -> Tensor:
        """Return all values of a layer, [H, N, Dv]."""
        return self._rows("values", layer).transpose(0, 1)

    def shards(self, layer: int) -> Iterator[Tensor]:
        """Yield the keys of a layer in pieces [n, H, D], for calibrations that exceed memory."""
        return self._pieces("keys", layer)

    def sequences(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(queries [Hq, T, D], keys [H, T, D])`` of each sequence in turn."""
        queries, keys = self.queries(layer), self.keys(layer)
        return zip(queries.split(self.lengths, 1), keys.split(self.lengths, 1), strict=True)

    def append(self, kind: StateKind, layer: int, rows: Tensor) -> None:
        """Add rows [n, H, D]; a full buffer goes to disk if the bank has a folder."""
        name = f"{kind}.{layer}"
        buffer = self._open.setdefault(name, [])
        buffer.append(rows.detach().to("cpu", self.dtype))
        if self.folder is not None and sum(len(rows) for rows in buffer) >= self.shard_tokens:
            self._flush(name, self.folder)

    def close(self) -> None:
        """Write what is still in memory, and the index that `open_bank` reads, to the folder."""
        if self.folder is None:
            return
        for name in list(self._open):
            self._flush(name, self.folder)
        index = {"stage": self.stage, "lengths": self.lengths, "shards": self._shards}
        keep_json(self.folder / "index.json", index)

    def _flush(self, name: str, folder: Path) -> None:
        rows = self._open.pop(name)
        written = self._shards.setdefault(name, [])
        file = f"{name}.{len(written):05d}.safetensors"
        keep_tensors(folder / file, {"rows": torch.cat(rows)})
        written.append(file)

    def _layers_with(self, kind: StateKind) -> list[int]:
        names = set(self._open) | set(self._shards)
        return sorted(int(name.split(".")[1]) for name in names if name.startswith(f"{kind}."))

    def _rows(self, kind: StateKind, layer: int) -> Tensor:
        return torch.cat(list(self._pieces(kind, layer))).float()

    def _pieces(self, kind: StateKind, layer: int) -> Iterator[Tensor]:
        name = f"{kind}.{layer}"
        if name not in self._shards and name not in self._open:
            raise InputError(
                f"no {kind} of layer {layer} in this bank: "
                f"it holds those of layers {self._layers_with(kind)}"
            )
        for file in self._shards.get(name, ()):
            yield self._shard(file)
        yield from self._open.get(name, ())

    def _shard(self, name: str) -> Tensor:
        assert self.folder is not None  # a bank in memory has no shards
        file = self.folder / name
        return kept_tensors(file, within=file.parent)[0]["rows"]


def open_bank(folder: Path) -> StateBank:
    """Open a bank that was captured to ``folder``.

    Raises ``IntegrityError`` if the capture was not finished or lacks a shard.
    """
    if not (folder / "index.json").is_file():
        raise IntegrityError(f"{folder} holds no finished capture: capture the keys again")
    index = kept_json(folder / "index.json")
    bank = StateBank(index["stage"], folder, lengths=index["lengths"], _shards=index["shards"])
    missing = [f for files in bank._shards.values() for f in files if not (folder / f).is_file()]
    if missing:
        raise IntegrityError(f"{folder} lacks the shard {missing[0]}: delete it and run again")
    return bank


def join_banks(banks: Sequence[StateBank]) -> StateBank:
    """Join banks in folders beside each other, one behind the other, into a single bank.

    Raises ``InputError`` if they are not of one stage, or not all in folders of one folder.
    """
    folders = [bank.folder for bank in banks if bank.folder is not None]
    parents = {folder.parent for folder in folders}
    in_memory = len(folders) < len(banks)
    if in_memory or len(parents) != 1 or len({bank.stage for bank in banks}) != 1:
        raise InputError(f"{len(banks)} banks cannot be joined: give banks of one stage and folder")
    shards: dict[str, list[str]] = {}
    for bank, folder in zip(banks, folders):
        for name, files in bank._shards.items():
            shards.setdefault(name, []).extend(f"{folder.name}/{file}" for file in files)
    lengths = [length for bank in banks for length in bank.lengths]
    return StateBank(banks[0].stage, parents.pop(), lengths=lengths, _shards=shards)


@checked
@contextmanager
def capture(
    model: PreTrainedModel,
    stage: Stage = "post_rope",
    *,
    states: Collection[StateKind] = ("keys", "queries"),
    layers: Collection[int] | None = None,
    folder: Path | None = None,
    shard_tokens: int = 1 << 16,
    dtype: torch.dtype = torch.float32,
) -> Iterator[StateBank]:
    """Record the states of every forward pass of ``model`` while the context is open.

    Call the model on whole sequences, padded or not, without a cache that already holds tokens. A
    layer that shares the keys and values of another has none of its own; its queries are recorded
    under its own index.

    Args:
        model: a decoder.
        stage: "post_rope": as attention reads them; "pre_rope": the output of the key (query) norm,
            or of the projection where there is none. RoPE does not touch values: they are the same
            at both stages.
        states: what to record: some of "keys", "queries" and "values".
        layers: indices of the layers to record; None records all.
        folder: where to write safetensors shards, so that memory stays bounded by ``shard_tokens``
            per layer; None keeps everything in memory.
        shard_tokens: tokens of a layer in one shard.
        dtype: of what is kept.

    Raises:
        InputError: on an unknown stage or kind of state, a model without decoder attention or
            ("pre_rope") without separate key projections, and a folder that holds a capture.

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
    _check_capture(states, folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    bank = StateBank(stage, folder, shard_tokens, dtype)
    owners = {index for index, layer in attention_layers(model).items() if layer.owns_keys}
    recorder = _Recorder(bank, owners, layers)
    kinds: list[StateKind] = [kind for kind in STATE_KINDS if kind in states]
    at_projection: list[StateKind] = [
        kind for kind in kinds if stage == "pre_rope" and kind != "values"
    ]
    at_attention: list[StateKind] = [kind for kind in kinds if kind not in at_projection]
    with ExitStack() as contexts:
        contexts.enter_context(recorder.watch_inputs(model))
        if at_attention:
            contexts.enter_context(recorder.watch_attention(model, at_attention))
        if at_projection:
            contexts.enter_context(recorder.watch_projections(model, at_projection))
        contexts.enter_context(torch.no_grad())
        yield bank
    bank.close()


def _check_capture(states: Collection[str], folder: Path | None) -> None:
    if not states:
        raise InputError(f"states={states!r}: give some of {', '.join(STATE_KINDS)}")
    if folder is not None and (folder / "index.json").exists():
        raise InputError(f"{folder} holds a capture already: open_bank reads it, or use another")


@dataclass
class _Recorder:
    """Appends the states of a running model to a bank: of chosen layers, without padding."""

    bank: StateBank
    owners: Collection[int]
    layers: Collection[int] | None = None
    is_token: Tensor = field(init=False)  # bool [B, T] of the running pass: false is padding

    @contextmanager
    def watch_inputs(self, model: PreTrainedModel) -> Iterator[None]:
        handle = model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def watch_attention(
        self, model: PreTrainedModel, kinds: Collection[StateKind]
    ) -> Iterator[None]:
        def record(layer: int, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
            inputs: dict[StateKind, Tensor] = {"keys": key, "queries": query, "values": value}
            for kind in kinds:
                if kind == "queries" or layer in self.owners:
                    self._record(kind, layer, inputs[kind])
            return query, key, value

        with attention_hook(model, record):
            yield

    @contextmanager
    def watch_projections(
        self, model: PreTrainedModel, kinds: Collection[StateKind]
    ) -> Iterator[None]:
        layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
        if not layers:
            raise InputError(
                f"{type(model).__name__} has no separate key projection: capture stage='post_rope'"
            )
        handles = []
        for layer in layers:
            for kind in kinds:
                letter = kind[0]  # k_norm and k_proj for keys, q_norm and q_proj for queries
                source = getattr(layer, f"{letter}_norm", None) or getattr(layer, f"{letter}_proj")

                def record(
                    module, args, output, *, kind: StateKind = kind, layer: Any = layer
                ) -> None:
                    heads = output.reshape(*self.is_token.shape, -1, layer.head_dim)
                    self._record(kind, layer.layer_idx, heads.transpose(1, 2))

                handles.append(source.register_forward_hook(record))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise InputError("capture needs input_ids: call the model as model(input_ids, ...)")
        mask = kwargs.get("attention_mask")
        self.is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.bank.lengths.extend(self.is_token.sum(1).tolist())

    def _record(self, kind: StateKind, layer: int, states: Tensor) -> None:
        """Append states [B, H, T, D] as rows [n, H, D], sequence after sequence."""
        if self.layers is None or layer in self.layers:
            rows = states.transpose(1, 2)[self.is_token.to(states.device)]
            self.bank.append(kind, layer, rows)


def draw_tokens(n_tokens: int, n_drawn: int, seed: int) -> Tensor:
    """Draw ``n_drawn`` of the numbers below ``n_tokens``, ascending, or all if there are fewer.

    By the same seed, fewer are among more.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_tokens, generator=generator)[:n_drawn].sort().values


def calibration_keys(bank: StateBank, n_keys: int, seed: int) -> dict[int, Tensor]:
    """Draw ``n_keys`` of the bank's tokens, the same in each layer: [H, n_keys, D] per layer.

    Raises ``InputError`` if the bank holds fewer.
    """
    if bank.n_tokens < n_keys:
        raise InputError(f"n_keys={n_keys}, but the calibration text has {bank.n_tokens} tokens")
    chosen = draw_tokens(bank.n_tokens, n_keys, seed)
    return {layer: bank.keys(layer)[:, chosen].contiguous() for layer in bank.layers}


def capture_passages(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    *,
    states: Collection[StateKind] = ("keys", "queries"),
    layers: Collection[int] | None = None,
    folder: Path | None = None,
    batch_size: int = BATCH,
    progress: Callable[[int], object] = no_tokens,
) -> StateBank:
    """Capture states, after RoPE, of ``loaded`` on some passages, in memory or in a ``folder``.

    Arguments are those of `capture`; ``batch_size`` passages are read at once, and ``progress`` is
    told how many tokens they had. In a folder states are in the precision of the model. No logits
    are computed but the last token's; without queries, layers that read the keys of others may skip
    all tokens but that one, too.
    """
    model = loaded.model
    dtype = torch.float32 if folder is None else model.dtype
    with capture(model, states=states, layers=layers, folder=folder, dtype=dtype) as bank:
        for _, ids, mask in batches(pieces, batch_size):
            model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                # a number lets layers skip tokens, a list of places does not
                logits_to_keep=torch.tensor([-1]) if "queries" in states else 1,
            )
            progress(int(mask.sum()))
    return bank
