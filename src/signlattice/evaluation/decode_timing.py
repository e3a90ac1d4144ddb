"""Time decode attention on packed keys beside PyTorch's attention on uncompressed ones.

Each case is attention of one new token per sequence on random states: no branch of a kernel depends
on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from signlattice import kernels
from signlattice.evaluation.timing import Times, side_by_side
from signlattice.rotations.fixed import haar

VALUE_BITS = (8, 4, 2)
"""Widths of the packed values that are timed, besides values in half precision."""

Impl = Literal["triton", "cpu"]


@dataclass(frozen=True)
class DecodeCase:
    """One new token per sequence: ``tokens`` in the cache of each, ``group`` queries a KV head."""

    tokens: int
    head_dim: int = 128
    n_heads: int = 8
    group: int = 4
    batch: int = 1

    @property
    def cached(self) -> int:
        """Keys in the cache, B·H·T, with which the speed-up on a GPU grows."""
        return self.batch * self.n_heads * self.tokens


@dataclass(frozen=True, eq=False)
class DecodeStates:
    """Random states of a case: ``query`` [B, H, group, D]; ``keys`` and ``values`` [B, H, T, D]."""

    query: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, case: DecodeCase, device: torch.device | str, impl: Impl) -> DecodeStates:
        """Draw Gaussian states in the dtype in which PyTorch's attention is fastest there.

        It is fp16 beside the kernels for a GPU, and bf16 beside those for a CPU.
        """
        dtype = torch.float16 if impl == "triton" else torch.bfloat16
        draw = partial(torch.randn, device=device, dtype=dtype)
        keys, values = (
            draw(case.batch, case.n_heads, case.tokens, case.head_dim) for _ in range(2)
        )
        query = draw(case.batch, case.n_heads, case.group, case.head_dim)
        return cls(query, keys, values)

    @property
    def scaling(self) -> float:
        """Factor of the scores, 1/√D."""
        return self.keys.shape[-1] ** -0.5

    @property
    def dtype_name(self) -> str:
        """Short name of the dtype."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}[self.keys.dtype]

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, eq=False)
class Contender:
    """A way to compute the attention of a case, and the bytes of cache that it reads."""

    call: Callable[[], object]
    n_bytes: int


def contenders(states: DecodeStates, impl: Impl) -> dict[str, Contender]:
    """Make attention on packed keys with values of each width, then PyTorch's, by name.

    Names of PyTorch's begin with "SDPA". On a CPU it is timed in fp32 too, which is faster on some.
    """
    name, keys, values = states.dtype_name, states.keys, states.values
    packed, rotation = pack_keys(keys)
    attend = partial(
        kernels.decode_attention,
        states.query.flatten(1, 2),
        packed,
        rotation,
        scaling=states.scaling,
        impl=impl,
    )
    made = {
        f"1-bit K, {name} V": Contender(
            partial(attend, values), packed_bytes(packed) + values.nbytes
        )
    }
    batch, n_heads, tokens, d = values.shape
    first = torch.zeros(batch, dtype=torch.int32, device=values.device)
    for bits in VALUE_BITS:
        coded = kernels.PackedValues.empty(batch, n_heads, tokens, d, bits, device=values.device)
        coded.write(values, first)
        made[f"1-bit K, {bits}-bit V"] = Contender(
            partial(attend, coded), packed_bytes(packed) + packed_bytes(coded)
        )
    made[f"SDPA {name}"] = _sdpa(states)
    if impl == "cpu":
        wide = DecodeStates(states.query.float(), keys.float(), values.float())
        made["SDPA fp32"] = _sdpa(wide)
    return made


def decode_rows(
    cases: Sequence[DecodeCase],
    *,
    device: torch.device | str,
    impl: Impl,
    rounds: int,
    progress: Callable[[], object] | None = None,
) -> list[dict[str, Any]]:
    """Time the `contenders` of every case: a row for each, see `timed_rows`.

    ``progress`` is called after each round of each case. Raises ``InputError`` as `side_by_side`
    and the kernels do.
    """
    rows = []
    for case in cases:
        timed = contenders(DecodeStates.random(case, device, impl), impl)
        times = side_by_side(
            {name: contender.call for name, contender in timed.items()},
            rounds=rounds,
            device=device,
            progress=progress,
        )
        rows += timed_rows(case, timed, times)
    return rows


def timed_rows(
    case: DecodeCase, timed: Mapping[str, Contender], times: Mapping[str, Times]
) -> list[dict[str, Any]]:
    """Make a row for each contender: seconds, bytes, GB/s, and ``speed_up``.

    It is over the fastest of PyTorch's on uncompressed keys, named in ``over``. Columns that end in
    ``_low`` and ``_high`` are quartiles over the rounds.
    """
    fastest = min(
        (name for name in times if name.startswith("SDPA")), key=lambda name: times[name].median
    )
    return [
        {
            "tokens": case.tokens,
            "head_dim": case.head_dim,
            "group": case.group,
            "cached": case.cached,
            "contender": name,
            "bytes": timed[name].n_bytes,
            **taken.quartiles.columns("seconds"),
            **taken.speed_up_over(times[fastest]).columns("speed_up"),
            "over": fastest,
            "bandwidth": timed[name].n_bytes / taken.median / 1e9,
        }
        for name, taken in times.items()
    ]


def pack_keys(keys: Tensor) -> tuple[kernels.PackedKeys, Tensor]:
    """Pack keys [B, H, T, D] under a random rotation; return it too, [H, D, D]."""
    batch, n_heads, tokens, d = keys.shape
    rotation = haar(d, 0).to(keys.device).expand(n_heads, d, d).contiguous()
    packed = kernels.PackedKeys.empty(batch, n_heads, tokens, d, device=keys.device)
    first = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    kernels.pack_into(packed, keys, rotation, first)
    return packed, rotation


def packed_bytes(packed: kernels.PackedKeys | kernels.PackedValues) -> int:
    """Sum the bytes of the tensors that packed keys or values consist of."""
    return sum(part.nbytes for part in vars(packed).values() if isinstance(part, Tensor))


def _sdpa(states: DecodeStates) -> Contender:
    call = partial(
        scaled_dot_product_attention,
        states.query,
        states.keys,
        states.values,
        scale=states.scaling,
    )
    return Contender(call, states.n_bytes)
