"""Keys on disk, more than memory holds: shuffled once as they are written, then read by chunks.

A folder holds the keys [H, N, d] of H heads, scaled to norm sqrt(d), as safetensors shards
[H, n, d], and an ``index.json``. A chunk is a run of keys within a shard, ``chunk_keys`` of them
but for the last: what is read, checked and summed at once.

Keys come document after document, and a batch, which is some chunks in a row, should be a sample of
all. So they are shuffled by the seed on their way to disk: each key goes to a random one of 256
files, and each file is then permuted in memory. Every order is equally likely, and memory holds no
more than a few copies of a 256th of the keys, of a shard and of what comes in at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from signlattice.errors import InputError, IntegrityError
from signlattice.io import check_writable, display_path, write_tensors, write_text
from signlattice.quantizers.centering import Centering
from signlattice.rotations.sources import unit_keys

__all__ = ["ChunkReader", "Shards", "open_shards", "token_mean", "write_shards"]

_SCHEMA = 1
_INDEX = "index.json"
_BUCKETS = 256
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_REMEDY = "write the keys again"


@dataclass(frozen=True)
class Shards:
    """The index of a folder of keys.

    Attributes:
        heads, n_keys, dim: H, N, d.
        dtype: of the numbers on disk.
        seed: by which they were shuffled.
        chunk_keys: keys of a chunk; the last may have less.
        shard_chunks: chunks of a shard.
        sizes: bytes of each shard.
        digests: SHA-256 of each chunk's numbers.
        fingerprint: SHA-256 of all that.
    """

    folder: Path
    heads: int
    n_keys: int
    dim: int
    dtype: str
    seed: int
    chunk_keys: int
    shard_chunks: int
    sizes: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.n_keys // self.chunk_keys)

    def keys_of(self, chunk: int) -> int:
        """Keys of a chunk."""
        return min(self.chunk_keys, self.n_keys - chunk * self.chunk_keys)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"keys.{number:05d}.safetensors"

    def read(self, chunk: int, *, check: bool = True) -> Tensor:
        """A chunk [H, n, d] as it is on disk; ``check`` compares its digest.

        Raises ``IntegrityError``, naming the shard, if that is damaged or gone.
        """
        number, place = divmod(chunk, self.shard_chunks)
        path, first = self.shard(number), place * self.chunk_keys
        last = first + self.keys_of(chunk)
        try:
            with safe_open(path, framework="pt") as file:
                # A copy, which is aligned as tensors in memory are: products may round differently
                # on others, and nothing must hold on to the file.
                keys = file.get_slice("keys")[:, first:last].clone(
                    memory_format=torch.contiguous_format
                )
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise IntegrityError(
                f"{display_path(path)} cannot be read ({error}): {_REMEDY}"
            ) from None
        expected = (self.heads, last - first, self.dim), _DTYPES[self.dtype]
        if (tuple(keys.shape), keys.dtype) != expected or (
            check and _digest(keys) != self.digests[chunk]
        ):
            raise IntegrityError(
                f"{display_path(path)} is damaged: keys {first} to {last} are not those that were "
                f"written: {_REMEDY}"
            )
        return keys

    def signed(self) -> Shards:
        """The same with the fingerprint of what it says."""
        plain = {name: value for name, value in asdict(self).items() if name in _SIGNED}
        text = json.dumps(plain, sort_keys=True)
        return replace(self, fingerprint=hashlib.sha256(text.encode()).hexdigest())


_SIGNED = tuple(n for n in Shards.__dataclass_fields__ if n not in ("folder", "fingerprint"))


@dataclass(eq=False)
class ChunkReader:
    """The chunks of a folder as one process reads them, on ``device``, checked when first read.

    The first that fit in ``cache_bytes`` stay there. Since passes go round and round, keeping the
    latest instead would keep none of those that come next.
    """

    shards: Shards
    device: torch.device = torch.device("cpu")
    cache_bytes: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _kept_bytes: int = 0
    _checked: set[int] = field(default_factory=set, repr=False)

    def __getitem__(self, chunk: int) -> Tensor:
        """Chunk [H, n, d]. Raises ``IntegrityError`` as `Shards.read` does."""
        if chunk in self._kept:
            return self._kept[chunk]
        keys = self.shards.read(chunk, check=chunk not in self._checked).to(self.device)
        self._checked.add(chunk)
        if self._kept_bytes + keys.nbytes <= self.cache_bytes:
            self._kept[chunk] = keys
            self._kept_bytes += keys.nbytes
        return keys


def open_shards(folder: Path) -> Shards:
    """The keys that `write_shards` has laid down in ``folder``.

    Raises ``IntegrityError`` if there is no whole index, or a shard is missing or of another size.
    The numbers themselves are checked as they are read.
    """
    folder = Path(folder)
    try:
        plain = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if plain.pop("schema") != _SCHEMA:
            raise ValueError("another schema")
        named = {n: tuple(v) if isinstance(v, list) else v for n, v in plain.items()}
        shards = Shards(folder, **named)
        if shards.signed().fingerprint != shards.fingerprint:
            raise ValueError("its fingerprint is another")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise IntegrityError(
            f"{display_path(folder)} holds no whole keys ({_INDEX}: {reason}): {_REMEDY}"
        ) from None
    for number, size in enumerate(shards.sizes):
        path = shards.shard(number)
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise IntegrityError(f"{display_path(path)} {state}: {_REMEDY}")
    return shards


def token_mean(pieces: Iterable[Tensor]) -> Centering:
    """The ``token_mean`` centering of keys that come piece by piece, [n, H, d] each.

    Raises ``InputError`` if there are none, or some are not finite.
    """
    total, n = None, 0
    for piece in pieces:
        added = piece.double().sum(0)
        total, n = added if total is None else total + added, n + len(piece)
    if not n:
        raise InputError("no keys: a mean needs one or more")
    return Centering("token_mean", (total / n).float())


def write_shards(
    folder: Path,
    pieces: Iterable[Tensor],
    *,
    centering: Centering = Centering("none"),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    chunk_keys: int | None = None,
    shard_bytes: int = 1 << 28,
) -> Shards:
    """Lay keys down in ``folder``, whole or not at all: centred, of norm sqrt(d), shuffled.

    The order is that of the keys and the seed, however the keys are cut into pieces.

    Args:
        folder: a new one, or empty.
        pieces: [n, H, d] each, such as ``bank.shards(layer)`` of a `capture.StateBank`.
        centering: fitted, by `token_mean` where keys exceed memory.
        dtype: fp16 and bf16 take half the disk of fp32, and round each key.
        chunk_keys: about how many keys are read and summed at once. None takes an eighth of the
            annealed solver's batch, so that eight processes can share one: 3/64 d^2, at least 512.
        shard_bytes: about how large a file is; at least a chunk.

    Raises:
        InputError: a folder that holds something; keys that are not [n, H, d], not all of one H and
            d, fewer than d, not finite or of zero norm; a number out of range; a full disk.
    """
    folder = Path(folder)
    if dtype not in _DTYPES.values():
        raise InputError(f"dtype={dtype}: use one of {', '.join(_DTYPES)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed={seed!r}: expected an integer")
    for name, value in (("chunk_keys", chunk_keys), ("shard_bytes", shard_bytes)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r}: expected an integer of at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{display_path(folder)} is there already: give a new folder, or an empty one"
        )
    check_writable(folder.parent)
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    try:
        building.mkdir()
        scattered = _scattered(building, pieces, centering, seed, dtype)
        shards = _laid_down(building, scattered, seed, dtype, chunk_keys, shard_bytes)
        os.replace(building, folder)
    except OSError as error:
        raise InputError(f"cannot write {display_path(folder)}: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return replace(shards, folder=folder)


@dataclass(frozen=True)
class _Scattered:
    """Keys in files at random: rows [H, d] one behind the other, as bytes."""

    buckets: tuple[Path, ...]
    n_keys: int
    heads: int
    dim: int
    generator: torch.Generator


def _scattered(
    folder: Path, pieces: Iterable[Tensor], centering: Centering, seed: int, dtype: torch.dtype
) -> _Scattered:
    buckets = tuple(folder / f"bucket.{number:03d}" for number in range(_BUCKETS))
    generator = torch.Generator().manual_seed(seed)
    shape, n_keys = None, 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in buckets]
        for piece in pieces:
            if piece.ndim != 3 or piece.shape[1:] != (shape or piece.shape[1:]):
                expected = list(shape) if shape else ["H", "d"]
                raise InputError(
                    f"keys of shape {list(piece.shape)}: expected [n, {expected[0]}, {expected[1]}]"
                )
            shape, n_keys = piece.shape[1:], n_keys + len(piece)
            bucket = torch.randint(0, _BUCKETS, (len(piece),), generator=generator)
            rows = _ready(piece, centering).to("cpu", dtype)[bucket.argsort(stable=True)]
            parts = rows.split(bucket.bincount(minlength=_BUCKETS).tolist())
            for file, part in zip(files, parts):
                file.write(_bytes(part))
    if shape is None or n_keys < shape[1]:
        raise InputError(
            f"{n_keys} keys{f' of {shape[1]} dimensions' if shape else ''}: expected at least as "
            "many keys as dimensions"
        )
    return _Scattered(buckets, n_keys, *shape, generator)


def _ready(piece: Tensor, centering: Centering) -> Tensor:
    """Keys [n, H, d] centred and of norm sqrt(d)."""
    if not len(piece):
        return piece
    wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
    centred, _ = centering.split(wide.transpose(0, 1))
    return unit_keys(centred.transpose(0, 1), "keys", "[n, H, d]")


def _laid_down(
    folder: Path,
    scattered: _Scattered,
    seed: int,
    dtype: torch.dtype,
    chunk_keys: int | None,
    shard_bytes: int,
) -> Shards:
    n, heads, d = scattered.n_keys, scattered.heads, scattered.dim
    wanted = chunk_keys or max(512, 3 * d**2 // 64)
    chunk = -(-n // -(-n // wanted))  # so that the last is not much smaller than the others
    shard_chunks = max(1, shard_bytes // (heads * chunk * d * dtype.itemsize))
    name = str(dtype).removeprefix("torch.")
    shards = Shards(folder, heads, n, d, name, seed, chunk, shard_chunks)
    sizes, digests = [], []
    for rows in _recut(_shuffled(scattered, dtype), chunk * shard_chunks):
        keys, path = rows.transpose(0, 1).contiguous(), shards.shard(len(sizes))
        write_tensors(path, {"keys": keys})
        sizes.append(path.stat().st_size)
        digests += map(_digest, keys.split(chunk, dim=1))
    shards = replace(shards, sizes=tuple(sizes), digests=tuple(digests)).signed()
    plain = {name: value for name, value in vars(shards).items() if name != "folder"}
    write_text(folder / _INDEX, json.dumps({"schema": _SCHEMA} | plain))
    return shards


def _shuffled(scattered: _Scattered, dtype: torch.dtype) -> Iterator[Tensor]:
    """The keys [n, H, d] of each bucket in random order; the file goes as they come."""
    for path in scattered.buckets:
        stored = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        path.unlink()
        if stored.numel():
            rows = stored.view(dtype).view(-1, scattered.heads, scattered.dim)
            yield rows[torch.randperm(len(rows), generator=scattered.generator)]


def _recut(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in pieces of ``size``, the last of them perhaps smaller."""
    held: list[Tensor] = []
    room = size
    for piece in pieces:
        while len(piece) >= room:
            yield torch.cat([*held, piece[:room]])
            held, piece, room = [], piece[room:], size
        held, room = [*held, piece], room - len(piece)
    if room < size:
        yield torch.cat(held)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _digest(keys: Tensor) -> str:
    return hashlib.sha256(_bytes(keys)).hexdigest()
