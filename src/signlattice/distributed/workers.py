"""Share work out among the processes that ``torchrun`` starts.

Each item of work, such as a layer to learn, is done whole by one process, and its result is a file
in a folder that all of them see. So the results do not depend on how many processes there are, and
no tensor is sent: the processes only wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from signlattice.errors import InputError

__all__ = ["Workers"]

_Item = TypeVar("_Item")

_PATIENCE = timedelta(days=30)
"""How long a process waits for another that is still at work: torchrun ends it if one fails."""


@dataclass(frozen=True)
class Workers:
    """The ``count`` processes that share work, as seen by number ``rank``; by default, one alone.

    A context in which the process belongs to the group of all and, where there are GPUs, computes
    on its own::

        with Workers.current() as workers:
            for layer in workers.share(layers):
                ...  # write the result to a file
            workers.barrier()
            if workers.leads:
                ...  # read the files of all

    An error that leaves the context ends this process, and ``torchrun`` then ends the others.

    Raises:
        InputError: on a rank that is not below the count.
    """

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise InputError(f"rank={self.rank} of {self.count} processes: use 0 to count - 1")

    @classmethod
    def current(cls) -> Self:
        """Return the processes that ``torchrun`` has started, or this one alone without it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def device(self) -> str:
        """The GPU of this process, as torch names it, or "cpu" where there is none."""
        n_gpus = torch.cuda.device_count()
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % n_gpus}" if n_gpus else "cpu"

    @property
    def leads(self) -> bool:
        """Say whether this is the process that collects the results and reports them."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return the items that this process works on; every item belongs to one process."""
        return items[self.rank :: self.count]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def __enter__(self) -> Self:
        if self.count > 1:
            if self.device != "cpu":
                torch.cuda.set_device(self.device)
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.count > 1 and error is None:  # after an error, others may never answer
            dist.destroy_process_group()
