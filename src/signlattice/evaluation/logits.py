"""Logits of many tokens over a large vocabulary, a piece at a time.

A float32 number for each token and each entry of a vocabulary of 262,144 is a megabyte a token. The
last hidden states are four hundred times smaller: they are computed and kept, and logits are made
of some tokens at a time, looked at, and dropped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches

PIECE_BYTES = 2**27
"""Bytes of logits in fp32 that are there at once. An evaluation holds about six such arrays."""

KEPT = 2**29
"""Bytes up to which hidden states are kept in memory; more go to files."""


@dataclass(frozen=True)
class TokenMetrics:
    """Per token [B, T], in nats: the loss, KL(exact ‖ this), and whether the first choice is one.

    Without exact states to compare with, ``kl`` is 0 and ``agree`` 1.
    """

    nll: Tensor
    kl: Tensor
    agree: Tensor


def hidden_states(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Compute the last hidden states [B, T, hidden] of ids [B, T], which the logits are made of.

    ``options`` go to the decoder: ``attention_mask``, ``past_key_values``, ``use_cache``.
    """
    return cast(Any, model.base_model)(ids, **options).last_hidden_state


def logit_pieces(model: PreTrainedModel, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which of the T tokens, their logits [B, t, vocabulary] in fp32) of states [B, T, h].

    They are the model's own: its output layer, and whatever it does to the logits after it.
    """
    n_sequences, n_tokens, _ = states.shape
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    size = max(1, PIECE_BYTES // (4 * n_sequences * vocabulary))
    for start in range(0, n_tokens, size):
        part = slice(start, min(start + size, n_tokens))
        yield part, _logits(model, states[:, part])


def _logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Run the model on states [B, t, h] in the place of what its decoder would return."""
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    name, modules = model.base_model_prefix, cast(dict[str, Any], model._modules)
    decoder, modules[name] = modules[name], _Decoder(states)
    try:
        return cast(Any, model)(ids, use_cache=False).logits.float()
    finally:
        modules[name] = decoder


def token_metrics(
    model: PreTrainedModel, states: Tensor, targets: Tensor, exact: Tensor | None = None
) -> TokenMetrics:
    """Compare the predictions of states [B, T, h] with ``targets`` [B, T] and with exact states."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    beside = iter(()) if exact is None else logit_pieces(model, exact)
    for part, logits in logit_pieces(model, states):
        log_p = logits.log_softmax(-1)
        del logits
        nll = -log_p.gather(-1, targets[:, part, None])[..., 0]
        kl, agree = torch.zeros_like(nll), torch.ones_like(nll)
        if exact is not None:
            log_e = next(beside)[1].log_softmax(-1)
            agree = (log_e.argmax(-1) == log_p.argmax(-1)).float()
            kl = (log_e.exp() * (log_e - log_p)).sum(-1)
        found.append((nll, kl, agree))
    return TokenMetrics(*(torch.cat(parts, 1) for parts in zip(*found)))


class _Given:
    """What a decoder returns, of which only the hidden states are known."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]


class _Decoder(nn.Module):
    """Stands in for a model's decoder and returns states that are known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: Any, **options: Any) -> _Given:
        return _Given(self.states)


class ExactStates:
    """Last hidden states [T, hidden] of exact attention, by the number of a passage.

    They are what later comparisons need, and far less than probabilities: together with the output
    layer they give those anew. More than `KEPT` bytes of them are kept in files of a temporary
    folder, which goes with this object.
    """

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}
        self._n_bytes = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._states or number in self._files

    def __getitem__(self, number: int) -> Tensor:
        if number in self._states:
            return self._states[number]
        return load_file(self._files[number])["states"]

    def __setitem__(self, number: int, states: Tensor) -> None:
        states = states.detach().cpu().clone()
        self._n_bytes += states.nbytes
        if self._n_bytes <= KEPT:
            self._states[number] = states
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="signlattice-exact-")
        self._files[number] = Path(self._folder.name, f"{number}.safetensors")
        save_file({"states": states}, self._files[number])


@torch.no_grad()
def exact_states(
    loaded: LoadedModel, pieces: Sequence[Passage], batch_size: int = BATCH
) -> ExactStates:
    """Compute the hidden states of each passage with exact attention."""
    found = ExactStates()
    device = loaded.model.device
    for chosen, ids, mask in batches(pieces, batch_size):
        options = {"attention_mask": mask.to(device), "use_cache": False}
        states = hidden_states(loaded.model, ids.to(device), **options)
        for row, index in enumerate(chosen):
            found[index] = states[row, : len(pieces[index].ids) - 1]
    return found
