"""Capture keys by several processes, each its share of the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from signlattice.distributed.workers import Workers
from signlattice.models.capture import (
    StateBank,
    StateKind,
    capture_passages,
    join_banks,
    no_tokens,
    open_bank,
)
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, longest_first

__all__ = ["capture_parts", "split_batches"]

MAX_PARTS = 64
"""Parts of a capture at most: work for as many processes, and what an interruption loses is one."""


def split_batches(pieces: Sequence[Passage], batch_size: int) -> list[list[Passage]]:
    """Split passages into parts of whole batches.

    Captured one after another, the parts give the batches of a capture of all ``pieces``, hence the
    same keys in the same order.
    """
    by_length = [pieces[i] for i in longest_first(pieces)]
    n_batches = -(-len(by_length) // batch_size)
    size = batch_size * -(-n_batches // MAX_PARTS)
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def capture_parts(
    loaded: LoadedModel,
    parts: Sequence[Sequence[Passage]],
    folder: Path,
    workers: Workers = Workers(),
    *,
    states: Collection[StateKind] = ("keys", "queries"),
    batch_size: int = BATCH,
    progress: Callable[[], object] | None = None,
    on_tokens: Callable[[int], object] = no_tokens,
) -> StateBank:
    """Capture each part to a folder of its own in ``folder``, and open them as one bank, in order.

    All ``workers`` call this, and each captures its share. A part that an earlier run finished is
    not captured again, however many processes that run had; ``progress`` is called for the others,
    and ``on_tokens`` for all, as their tokens are read or found.

    Raises ``IntegrityError`` if a part is damaged.
    """
    folders = [folder / f"{number:05d}" for number in range(len(parts))]
    for number in workers.share(range(len(parts))):
        if not (folders[number] / "index.json").is_file():
            capture_passages(
                loaded,
                parts[number],
                states=states,
                folder=folders[number],
                batch_size=batch_size,
                progress=on_tokens,
            )
            if progress is not None:
                progress()
        else:
            on_tokens(sum(len(piece.ids) for piece in parts[number]))
    workers.barrier()
    return join_banks(list(map(open_bank, folders)))
