"""Read passages and keep the keys that the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.models.capture import KeyBank, capture_keys
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches


def calibration_keys(bank: KeyBank, n_keys: int, seed: int) -> dict[int, Tensor]:
    """A random ``n_keys`` of the bank's tokens, the same in each layer: [H, n_keys, D] per layer.

    Raises ``InputError`` if the bank holds fewer.
    """
    if bank.n_tokens < n_keys:
        raise InputError(f"n_keys={n_keys}, but the calibration text has {bank.n_tokens} tokens")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(bank.n_tokens, generator=generator)[:n_keys].sort().values
    return {layer: bank.keys(layer)[:, chosen].contiguous() for layer in bank.layers}


def bank_of(
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
    with capture_keys(loaded.model, queries=queries, folder=folder, dtype=dtype) as bank:
        for _, ids, mask in batches(pieces, batch_size):
            loaded.model(
                ids.to(device),
                attention_mask=mask.to(device),
                use_cache=False,
                logits_to_keep=0 if queries else 1,
            )
    return bank
