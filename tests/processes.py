"""Start processes as torchrun does, but from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

SECONDS = 120  # after which a process counts as hanging

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["signlattice.cli.commands", "transformers.models.llama"])


def run_workers(count: int, work: Callable[..., object], *arguments: object) -> list[int]:
    """Call ``work`` in ``count`` processes of one thread each, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_worker, args=(rank, count, port, work, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging, f"processes {hanging} of {count} hang"
    return [process.exitcode for process in processes]


def _worker(
    rank: int, count: int, port: int, work: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    code = work(*arguments)
    raise SystemExit(code if isinstance(code, int) else 0)
