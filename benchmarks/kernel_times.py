"""Times of the kernels beside everything else that can be had on the same machine, in the same run.

Three tables: attention of one new token on a long cache, the transforms that fill such a cache
beside a plain copy, and the trainer; on a GPU also the memory that attention takes. All on random
numbers, since no branch of a kernel depends on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

import bf16_loop
from signlattice import kernels
from signlattice.evaluation import decode_timing
from signlattice.evaluation.decode_timing import (
    Contender,
    DecodeCase,
    DecodeStates,
    pack_keys,
    packed_bytes,
    timed_rows,
)
from signlattice.evaluation.timing import Times, side_by_side
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.learned import learn_rotation, learn_rotations
from signlattice.rotations.synthetic import planted_keys
from signlattice_paper.records import Row

Call = Callable[[], object]
Tick = Callable[[], object]

FEW_STEPS = LearnConfig(warm_steps=8, steps=8, polish_steps=4)
"""For a large d, whose rotation takes hours to learn: a time of the same steps, not a result."""


@dataclass(frozen=True)
class KernelTimesConfig:
    """What is timed, on which device, and in how many rounds.

    With ``gpu`` the kernels for a GPU are timed, beside their rivals there. ``transforms`` are
    pairs (n, rows), ``trainer`` triples (d, keys of a head, heads). ``peers``: whether
    transformers' quantized caches are timed too.
    """

    device: str
    decode: tuple[DecodeCase, ...]
    transforms: tuple[tuple[int, int], ...]
    trainer: tuple[tuple[int, int, int], ...]
    gpu: bool = False
    rounds: int = 15
    trainer_rounds: int = 3
    peers: bool = True

    @classmethod
    def for_device(cls, device: str) -> KernelTimesConfig:
        """Choose the cases of the record: on a GPU from 4k to 4M cached keys, fewer on a CPU.

        A CPU has no kernels of its own for the transforms, so none are timed there.
        """
        if device == "cuda":
            sizes = tuple(DecodeCase(tokens=2**p // 8) for p in range(12, 23))
            large = DecodeCase(tokens=2**17)
            shapes = [replace(large, head_dim=d) for d in (64, 80, 96, 256, 512)]
            shapes += [replace(large, group=group) for group in (1, 2, 8, 16, 32)]
            transforms = tuple((n, 2**28 // n) for n in (64, 128, 256, 1024, 8192))
            trainer = ((128, 2**15, 128), (2048, 2**17, 1))
            return cls(device, (*sizes, *shapes), transforms, trainer, gpu=True, rounds=30)
        sizes = tuple(DecodeCase(tokens=tokens) for tokens in (8192, 32768, 65536))
        middle = DecodeCase(tokens=32768)
        shapes = (
            replace(middle, head_dim=64),
            replace(middle, head_dim=256),
            replace(middle, group=1),
        )
        return cls(device, (*sizes, *shapes), (), ((64, 2**14, 8), (128, 2**15, 8)))

    @property
    def n_rounds(self) -> int:
        """How often ``progress`` is called."""
        tables = len(self.decode) + 2 * len(self.transforms)
        return tables * self.rounds + len(self.trainer) * self.trainer_rounds

    @property
    def decode_impl(self) -> decode_timing.Impl:
        """Implementation of attention that is timed."""
        return "triton" if self.gpu else "cpu"


def decode_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """Time every case of decode attention: a row for each contender, see `timed_rows`.

    ``over_loop`` is the speed-up over the same loop on uncompressed keys, on a CPU.
    """
    rows: list[Row] = []
    for case in config.decode:
        contenders = _decode_contenders(case, config)
        calls = {name: contender.call for name, contender in contenders.items()}
        times = _timed(calls, config, progress)
        rows += [
            row | _loop_columns(times[row["contender"]], times)
            for row in timed_rows(case, contenders, times)
        ]
    return rows


def transform_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """Time the Hadamard transform and packing, in bytes moved per second beside a copy's."""
    rows: list[Row] = []
    for n, n_rows in config.transforms:
        for kernel, make in (("Hadamard", _hadamard_contenders), ("pack", _pack_contenders)):
            if kernel == "pack" and n not in kernels.HEAD_DIMS:
                _skip(config.rounds, progress)
                continue
            contenders, moved = make(n, n_rows, config)
            times = _timed(contenders, config, progress)
            copied = moved["copy"] / times["copy"].median
            rows += [
                {
                    "kernel": kernel,
                    "n": n,
                    "rows": n_rows,
                    "contender": name,
                    **taken.quartiles.columns("seconds"),
                    "bandwidth": moved[name] / taken.median / 1e9,
                    "of_copy": moved[name] / taken.median / copied,
                }
                for name, taken in times.items()
            ]
    return rows


def trainer_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """Time learning rotations of planted keys: many heads at once, and one by one in plain torch.

    ``speed_up`` is per head: on a GPU the reference learns only one.
    """
    fast = "triton" if config.gpu else "cpu"
    rows: list[Row] = []
    for d, n_keys, n_heads in config.trainer:
        sets = [planted_keys(d, n_keys, seed) for seed in range(n_heads)]
        keys, held_out = (
            torch.stack([getattr(each, name) for each in sets]).to(config.device)
            for name in ("keys", "held_out")
        )
        alone = 1 if config.gpu else n_heads
        settings = LearnConfig() if d <= 512 else FEW_STEPS
        learned = {}

        def one_by_one() -> None:
            learned["torch"] = [
                learn_rotation(k, settings, held_out=h, impl="torch")
                for k, h in zip(keys[:alone], held_out)
            ]

        def together() -> None:
            learned[fast] = learn_rotations(keys, settings, held_out=held_out, impl=fast)

        times = side_by_side(
            {"torch": one_by_one, fast: together},
            rounds=config.trainer_rounds,
            warm_up=1,
            device=config.device,
            progress=progress,
        )
        for impl, taken in times.items():
            per_head = taken.speed_up_over(times["torch"], len(learned[impl]) / alone)
            rows.append(
                {
                    "d": d,
                    "n_keys": n_keys,
                    "impl": impl,
                    "n_heads": len(learned[impl]),
                    **taken.quartiles.columns("seconds"),
                    **per_head.columns("speed_up"),
                    "held_out_beta": fmean(each.held_out_beta for each in learned[impl]),
                    "optimum": fmean(each.optimum for each in sets),
                }
            )
    return rows


def memory_rows(config: KernelTimesConfig) -> list[Row]:
    """Measure the peak memory of one decode step on a GPU beyond the cache itself."""
    rows: list[Row] = []
    for case in config.decode if config.gpu else ():
        for name, contender in _decode_contenders(case, replace(config, peers=False)).items():
            contender.call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.call()
            peak = torch.cuda.max_memory_allocated() - before
            rows.append(
                {
                    "tokens": case.tokens,
                    "head_dim": case.head_dim,
                    "group": case.group,
                    "contender": name,
                    "bytes": contender.n_bytes,
                    "beyond": peak,
                }
            )
    return rows


# Contenders.


def _decode_contenders(case: DecodeCase, config: KernelTimesConfig) -> dict[str, Contender]:
    """The library's comparison, and beside it the control loop and other libraries."""
    states = DecodeStates.random(case, config.device, config.decode_impl)
    contenders = decode_timing.contenders(states, config.decode_impl)
    if config.gpu:
        copy = partial(torch.empty_like(states.keys).copy_, states.keys)
        contenders |= _flash_attention(states)
        contenders["copy"] = Contender(copy, 2 * states.keys.nbytes)
    else:
        contenders[f"same loop, {states.dtype_name} K and V"] = _same_loop(states)
    for name, layer in _quantized_layers(states) if config.peers else ():
        contenders[name] = Contender(
            partial(_dequantized_attention, layer, states),
            2 * states.keys.numel() * 9 // 16,  # four bits, and a scale and zero for each 64
        )
    return contenders


def _same_loop(states: DecodeStates) -> Contender:
    batch, _, tokens, _ = states.keys.shape
    first, last = (torch.full((batch,), at, dtype=torch.int32) for at in (0, tokens))
    query = states.query.flatten(1, 2)
    call = partial(
        bf16_loop.decode_attention, query, states.keys, states.values, first, last, states.scaling
    )
    return Contender(call, states.n_bytes)


def _flash_attention(states: DecodeStates) -> dict[str, Contender]:
    """FlashAttention's own split decoding, where that library is installed and takes the size."""
    if states.keys.shape[-1] > 256:
        return {}
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return {}
    cache = [x.transpose(1, 2).contiguous() for x in (states.keys, states.values)]
    query = states.query.flatten(1, 2)[:, None]
    call = partial(flash_attn_with_kvcache, query, *cache, softmax_scale=states.scaling)
    return {"SDPA of FlashAttention": Contender(call, states.n_bytes)}


def _quantized_layers(states: DecodeStates) -> Iterator[tuple[str, QuantizedLayer]]:
    """Transformers' quantized caches at 4 bits after their first update, which encodes all."""
    for name, kind, axis in (
        ("quanto", QuantoQuantizedLayer, 0),
        ("HQQ", HQQQuantizedLayer, 1),
    ):
        layer = kind(nbits=4, axis_key=axis, axis_value=axis, q_group_size=64)
        try:
            layer.update(states.keys, states.values)
            layer._dequantize(layer._quantized_keys)
        except Exception as error:  # they build code of their own, for which a compiler may lack
            warnings.warn(f"{name} cannot be timed here: {error}", stacklevel=2)
            continue
        yield f"{name} 4-bit K and V", layer


def _dequantized_attention(layer: QuantizedLayer, states: DecodeStates) -> Tensor:
    # what its `update` does at each step, without the new token
    keys = layer._dequantize(layer._quantized_keys)
    values = layer._dequantize(layer._quantized_values)
    return scaled_dot_product_attention(states.query, keys, values, scale=states.scaling)


def _hadamard_contenders(
    n: int, n_rows: int, config: KernelTimesConfig
) -> tuple[dict[str, Call], dict[str, int]]:
    x = torch.randn(n_rows, n, device=config.device, dtype=torch.float16)
    signs = torch.randint(0, 2, (n,), device=config.device).float() * 2 - 1
    contenders: dict[str, Call] = {
        impl: partial(kernels.hadamard_transform, x, signs, impl=impl) for impl in _impls(config)
    }
    return _with_copy(contenders | _fast_hadamard(x), x, 2 * x.nbytes)


def _fast_hadamard(x: Tensor) -> dict[str, Call]:
    """The CUDA library of that name, where it is installed: it has to be built on the spot."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return {}
    return {"fast-hadamard-transform": partial(hadamard_transform, x, x.shape[-1] ** -0.5)}


def _pack_contenders(
    d: int, n_rows: int, config: KernelTimesConfig
) -> tuple[dict[str, Call], dict[str, int]]:
    keys = torch.randn(1, 8, n_rows // 8, d, device=config.device, dtype=torch.float16)
    packed, rotation = pack_keys(keys)
    first = torch.zeros(1, dtype=torch.int32, device=config.device)
    contenders: dict[str, Call] = {
        impl: partial(kernels.pack_into, packed, keys, rotation, first, impl=impl)
        for impl in _impls(config)
    }
    return _with_copy(contenders, keys, keys.nbytes + packed_bytes(packed))


def _impls(config: KernelTimesConfig) -> tuple[str, ...]:
    return ("torch", "triton") if config.gpu else ("torch",)


def _with_copy(
    contenders: Mapping[str, Call], x: Tensor, moved: int
) -> tuple[dict[str, Call], dict[str, int]]:
    """The contenders, each of which moves so many bytes, and a copy of ``x``."""
    target = torch.empty_like(x)
    bytes_moved = dict.fromkeys(contenders, moved) | {"copy": 2 * x.nbytes}
    return {**contenders, "copy": partial(target.copy_, x)}, bytes_moved


def _timed(
    contenders: Mapping[str, Call], config: KernelTimesConfig, progress: Tick | None
) -> dict[str, Times]:
    return side_by_side(contenders, rounds=config.rounds, device=config.device, progress=progress)


def _loop_columns(taken: Times, times: Mapping[str, Times]) -> dict[str, float | None]:
    loop = next((times[name] for name in times if name.startswith("same loop")), None)
    if loop is None:
        return dict.fromkeys(("over_loop", "over_loop_low", "over_loop_high"))
    return taken.speed_up_over(loop).columns("over_loop")


def _skip(rounds: int, progress: Tick | None) -> None:
    for _ in range(rounds if progress else 0):
        progress()
