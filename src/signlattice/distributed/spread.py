"""Learn rotations from keys on disk, by one process or many: the same bits whatever their number.

    python -m signlattice.distributed.spread KEYS rotations.safetensors --held-out OTHERS
    torchrun --nproc-per-node 8 -m signlattice.distributed.spread KEYS rotations.safetensors

KEYS is a folder that `shards.write_shards` has written, and which all processes see. They share out
its chunks, sum the gradients [H, d, d] of their own, and add the sums up (gloo on processors, NCCL
on GPUs). All then take the same step; the first process reports and keeps the checkpoint.

A sum of floating-point numbers depends on their order, hence on who has which chunk. Here each
chunk's gradient is rounded to a whole multiple of 2^-k before it is added, and whole numbers have
the same sum in any order. A run may therefore be resumed by another number of processes. What the
bits do depend on is all that a single chunk's product depends on: dtype, device, implementation and
threads, for which set OMP_NUM_THREADS alike (torchrun sets 1 where there are several processes).
Processes compare their rotations at each sum and stop if these are not the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from signlattice import kernels
from signlattice.distributed.shards import ChunkReader, open_shards
from signlattice.errors import InputError, IntegrityError
from signlattice.io import check_writable, display_path, write_tensors
from signlattice.kernels import Impl
from signlattice.rotations.config import INITIALS, SOLVERS, LearnConfig, LearnedRotation
from signlattice.rotations.learned import learn_rotations

__all__ = ["Processes", "SpreadKeys", "main", "open_keys", "process_group"]

_HEADER = "signlattice.distributed.spread"
_SCHEMA = 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """The ``count`` processes of the torch.distributed group, of which this is number ``rank``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those of the default group, or this one alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def add_up(self, total: Tensor) -> None:
        """Replace ``total``, int64, by the sum of those of all processes."""
        if self.count > 1:
            dist.all_reduce(total)

    def led(self, work: Callable[[], _T]) -> _T:
        """In every process what ``work`` returns, or raises, in the one that leads."""
        result, error = _tried(work) if self.leads else (None, None)
        if self.count > 1:
            told = [(result, error)]
            dist.broadcast_object_list(told)
            result, error = told[0]
        if error is not None:
            raise error
        return result

    def agree(self, error: Exception | None) -> None:
        """Raise in every process the error that one of them has met, so that none waits for it."""
        errors = [error]
        if self.count > 1:
            errors = [None] * self.count
            dist.all_gather_object(errors, error)
        for error in errors:
            if error is not None:
                raise error


@dataclass(frozen=True, eq=False)
class SpreadKeys:
    """A `sources.KeySource`: keys [H, N, d] on disk, shared out chunk by chunk among processes.

    Attributes:
        chunks: of the folder, as this process reads them.
        order: the chunks that these keys are, as they are dealt.
        first: place of the first of them among all, by which a chunk is one process's.
        kept_heads: the heads that these keys are of.
    """

    chunks: ChunkReader
    processes: Processes
    order: tuple[int, ...]
    first: int
    kept_heads: tuple[int, ...]

    @property
    def heads(self) -> int:
        """H."""
        return len(self.kept_heads)

    @cached_property
    def n_keys(self) -> int:
        """N, those of all processes together."""
        return sum(map(self.chunks.shards.keys_of, self.order))

    @property
    def dim(self) -> int:
        """d."""
        return self.chunks.shards.dim

    @property
    def device(self) -> torch.device:
        """Where gradients are computed."""
        return self.chunks.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: fp32 for keys that are stored in less."""
        return torch.promote_types(getattr(torch, self.chunks.shards.dtype), torch.float32)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return self.processes.leads

    @property
    def own(self) -> tuple[int, ...]:
        """The chunks that this process reads: of any run of them, an equal share to within one."""
        count = self.processes.count
        return self.order[(self.processes.rank - self.first) % count :: count]

    def dealt(self, seed: int) -> SpreadKeys:
        """The same chunks, shuffled. Within them keys have been since they were written."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(len(self.order), generator=generator).tolist()
        return replace(self, order=tuple(self.order[place] for place in places))

    def batch(self, step: int, size: int) -> SpreadKeys:
        """The chunks of a step, one at least: batches follow one another, equal to a chunk."""
        n = len(self.order)
        n_batches = min(n, max(1, self.n_keys // size))
        at = step % n_batches
        begin, end = at * n // n_batches, (at + 1) * n // n_batches
        return replace(self, order=self.order[begin:end], first=self.first + begin)

    def narrowed(self, heads: Sequence[int]) -> SpreadKeys:
        """Those heads alone."""
        return replace(self, kept_heads=tuple(self.kept_heads[head] for head in heads))

    def gradient(self, rotation: Tensor, temperature: float, impl: Impl) -> Tensor:
        """`learn.smoothed_gradient` at ``rotation`` [H, d, d], of all keys."""

        def of(chunk: int) -> Tensor:
            return kernels.sign_gemm(self._read(chunk), rotation, temperature, impl=impl)

        # |slope| <= 1 and |x_i| <= |x| = sqrt(d)
        total = self._sum(of, rotation, rotation.shape, self.n_keys * math.sqrt(self.dim))
        return (total / (self.n_keys * self.dim)).to(self.dtype)

    def cosines(self, rotation: Tensor, heads: Sequence[int]) -> list[float]:
        """`learn.mean_cosine` of each of ``heads``, n of them, at its ``rotation`` [n, d, d]."""
        some = self.narrowed(heads)

        def of(chunk: int) -> Tensor:
            pairs = zip(some._read(chunk), rotation)
            return torch.stack([(x @ r.T).abs().sum(dtype=torch.float64) for x, r in pairs])

        # |R x|_1 <= sqrt(d) |x| = d
        total = some._sum(of, rotation, (len(rotation),), self.n_keys * self.dim)
        return (total / (self.n_keys * self.dim)).tolist()

    def identity(self) -> Tensor:
        """The folder's fingerprint, byte by byte, and the heads: int64 [32 + H]."""
        return torch.tensor([*bytes.fromhex(self.chunks.shards.fingerprint), *self.kept_heads])

    def led(self, work: Callable[[], _T]) -> _T:
        """In every process what ``work`` returns, or raises, in the one that leads."""
        return self.processes.led(work)

    def _read(self, chunk: int) -> Tensor:
        keys = self.chunks[chunk]
        if self.kept_heads != tuple(range(len(keys))):
            keys = keys[list(self.kept_heads)]
        return keys.to(self.dtype)

    def _sum(
        self, of: Callable[[int], Tensor], rotation: Tensor, shape: Sequence[int], bound: float
    ) -> Tensor:
        """Sum over the chunks of all processes of what is ``of`` each, fp64 [*shape].

        ``bound`` is the most that the sum of absolute values may be. In units of 2^-k it has 62
        bits and so fits an int64. For 10^9 keys of 512 dimensions k is 27: a chunk's gradient is
        rounded by 4e-9, and the fp32 numbers that it is made of by a hundred times as much or more.
        """
        unit = 2.0 ** (math.ceil(math.log2(bound)) - 62)
        rounded = ((of(chunk).double() / unit).round().long() for chunk in self.own)
        total = torch.zeros(2 + math.prod(shape), dtype=torch.int64, device=self.device)
        mark = _checksum(rotation)
        total[1] = mark
        _, error = _tried(lambda: _add_to(total[2:], rounded))
        total[0] = error is not None
        # One message: how many have failed, whether all are at the same rotation, and the sum.
        self.processes.add_up(total)
        failed, differs = torch.stack([total[0], total[1] - self.processes.count * mark]).tolist()
        if failed:
            self.processes.agree(error)
        if differs:
            raise IntegrityError(
                f"{self.processes.count} processes do not come to the same rotation: give them the "
                "same kind of machine and as many threads, and resume from the checkpoint"
            )
        return total[2:].double().mul_(unit).view(*shape)


def open_keys(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    cache_bytes: int = 0,
    processes: Processes | None = None,
) -> SpreadKeys:
    """The keys of a folder, for `learn.learn_rotations`; those of a group call this together.

    Args:
        folder: as `shards.write_shards` has written it.
        device: where this process computes.
        cache_bytes: how much of its chunks a process may keep there; the others it reads from disk
            at each pass, one at a time.
        processes: None takes the torch.distributed group, if there is one.

    Raises:
        InputError: a negative ``cache_bytes``.
        IntegrityError: a folder that is not whole, or not the same for all processes.
    """
    if cache_bytes < 0:
        raise InputError(f"cache_bytes={cache_bytes}: use 0 or more")
    processes = processes or Processes.here()
    shards, error = _tried(lambda: open_shards(folder))
    processes.agree(error)
    first = processes.led(lambda: shards.fingerprint)
    processes.agree(
        None
        if shards.fingerprint == first
        else IntegrityError(
            f"{display_path(folder)} is not the same for all processes: use one folder"
        )
    )
    reader = ChunkReader(shards, torch.device(device), cache_bytes)
    return SpreadKeys(
        reader, processes, tuple(range(shards.n_chunks)), 0, tuple(range(shards.heads))
    )


def _add_to(total: Tensor, parts: Iterable[Tensor]) -> None:
    for part in parts:
        total += part.flatten()


def _checksum(rotation: Tensor) -> Tensor:
    """An int64 that tells matrices apart whose bits differ."""
    bits = rotation.contiguous().view(torch.int32).flatten().long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def _tried(work: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


# The command.


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The group that ``torchrun`` has started, while open; yields the device of this process.

    ``device``: "cpu" (gloo), "cuda" (NCCL, a GPU to each process), or "auto", "cuda" if there is
    one. Without ``torchrun`` there is no group, and one process.

    Raises:
        InputError: no GPU for this process.
    """
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    own = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and own >= torch.cuda.device_count():
        raise InputError(
            f"process {own} of this machine has no GPU, there are {torch.cuda.device_count()}: "
            "start as many processes, or use --device cpu"
        )
    here = torch.device("cuda", own) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield here
        return
    if on_gpu:
        dist.init_process_group("nccl", device_id=here)
    else:
        dist.init_process_group("gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Learn the rotations of a folder. Returns 2, the reason on stderr, on bad input."""
    given = _parser().parse_args(arguments)
    leads = os.environ.get("RANK", "0") == "0"
    try:
        with process_group(given.device) as device:
            learned = _run(given, device)
    except InputError as error:  # all processes have the same
        if leads:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if leads:
        train, held_out = _mean_betas(learned)
        judged = "" if held_out is None else f", {held_out:.4f} on held-out keys"
        print(f"{display_path(given.out)}: {len(learned)} rotations, beta {train:.4f}{judged}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m signlattice.distributed.spread",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("keys", type=Path, help="folder of keys")
    parser.add_argument("out", type=Path, help="safetensors file to write, rotations [H, d, d]")
    parser.add_argument("--held-out", type=Path, help="folder of keys to judge by")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from, and to save to")
    parser.add_argument("--cache-bytes", type=int, default=0, help="keys each process may keep")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--impl", choices=get_args(Impl), default="auto")
    parser.add_argument("--solver", choices=SOLVERS, default=LearnConfig.solver)
    parser.add_argument("--initial", choices=INITIALS, default=LearnConfig.initial)
    counts = (
        "seed",
        "steps",
        "warm_steps",
        "batch",
        "polish_steps",
        "trace_every",
        "checkpoint_every",
    )
    rates = ("tolerance", "learning_rate", "momentum")
    for names, kind in ((counts, int), (rates, float)):
        for name in names:
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, default=getattr(LearnConfig, name))
    return parser


def _run(given: argparse.Namespace, device: torch.device) -> tuple[LearnedRotation, ...]:
    fields = {name: value for name, value in vars(given).items() if name in vars(LearnConfig())}
    config = LearnConfig(**fields)
    processes = Processes.here()
    processes.led(lambda: check_writable(given.out.parent))
    keys, held_out = (
        folder and open_keys(folder, device=device, cache_bytes=given.cache_bytes)
        for folder in (given.keys, given.held_out)
    )
    learned = learn_rotations(
        keys, config, held_out=held_out, impl=given.impl, progress=True, checkpoint=given.checkpoint
    )
    processes.led(lambda: _write(given.out, learned, keys, held_out))
    return learned


def _write(
    path: Path,
    learned: Sequence[LearnedRotation],
    keys: SpreadKeys,
    held_out: SpreadKeys | None,
) -> None:
    """Rotations [H, d, d], and a header that says how they came about: no times, so that a run that
    was killed and resumed ends with the same file."""
    header = {
        "schema": _SCHEMA,
        "config": asdict(learned[0].config),
        "n_keys": keys.n_keys,
        "processes": keys.processes.count,
        "keys": keys.chunks.shards.fingerprint,
        "held_out": held_out and held_out.chunks.shards.fingerprint,
        "train_beta": [head.train_beta for head in learned],
        "held_out_beta": [head.held_out_beta for head in learned],
    }
    rotations = torch.stack([head.matrix for head in learned]).cpu()
    write_tensors(path, {"rotations": rotations}, metadata={_HEADER: json.dumps(header)})


def _mean_betas(learned: Sequence[LearnedRotation]) -> tuple[float, float | None]:
    judged = [head.held_out_beta for head in learned]
    return fmean(head.train_beta for head in learned), None if None in judged else fmean(judged)


if __name__ == "__main__":
    sys.exit(main())
