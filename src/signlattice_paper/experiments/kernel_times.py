"""How fast the kernels are, beside what else can be had on the same machine in the same run.

Three contests, each a table of rows: attention of one new token on a long cache, the transforms
that fill such a cache beside a bare copy, and the trainer. All on random numbers, since no branch
of a kernel depends on them.
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

from signlattice import kernels
from signlattice.evaluation.timing import Quartiles, Times, side_by_side
from signlattice.kernels.attention import bf16_loop
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import haar
from signlattice.rotations.learned import learn_rotation, learn_rotations
from signlattice.rotations.synthetic import planted_keys
from signlattice_paper.records import Row

Contender = Callable[[], object]
Tick = Callable[[], object]

FEW_STEPS = LearnConfig(warm_steps=8, steps=8, polish_steps=4)
"""For a large d, whose rotation takes hours to learn: a time of the same steps, and no lattice."""


@dataclass(frozen=True)
class Decode:
    """One new token per sequence: ``tokens`` in the cache of each, ``group`` queries a KV head."""

    tokens: int
    head_dim: int = 128
    n_heads: int = 8
    group: int = 4
    batch: int = 1

    @property
    def cached(self) -> int:
        """Keys in the cache, B·H·T: what the speed-up of a GPU grows with."""
        return self.batch * self.n_heads * self.tokens


@dataclass(frozen=True)
class KernelTimesConfig:
    """What is timed, on which device, and in how many rounds.

    With ``gpu`` the kernels of a GPU are timed, beside what stands against them there.
    """

    device: str
    decode: tuple[Decode, ...]
    transforms: tuple[tuple[int, int], ...]
    trainer: tuple[tuple[int, int, int], ...]
    gpu: bool = False
    rounds: int = 15
    trainer_rounds: int = 3
    peers: bool = True

    @classmethod
    def for_device(cls, device: str) -> KernelTimesConfig:
        """The cases of the record: on a GPU from 4k to 4M cached keys, fewer on a CPU.

        A CPU has no kernels of its own for the transforms, hence none of them to time.
        ``transforms`` are pairs (n, rows), ``trainer`` triples (d, keys of a head, heads).
        """
        if device == "cuda":
            sizes = tuple(Decode(tokens=2**p // 8) for p in range(12, 23))
            large = Decode(tokens=2**17)
            shapes = [replace(large, head_dim=d) for d in (64, 80, 96, 256, 512)]
            shapes += [replace(large, group=group) for group in (1, 2, 8, 16, 32)]
            transforms = tuple((n, 2**28 // n) for n in (64, 128, 256, 1024, 8192))
            trainer = ((128, 2**15, 128), (2048, 2**17, 1))
            return cls(device, (*sizes, *shapes), transforms, trainer, gpu=True, rounds=30)
        sizes = tuple(Decode(tokens=tokens) for tokens in (8192, 32768, 65536))
        shapes = (Decode(32768, head_dim=64), Decode(32768, head_dim=256), Decode(32768, group=1))
        return cls(device, (*sizes, *shapes), (), ((64, 2**14, 8), (128, 2**15, 8)))

    @property
    def n_rounds(self) -> int:
        """How often ``progress`` is called."""
        contests = len(self.decode) + 2 * len(self.transforms)
        return contests * self.rounds + len(self.trainer) * self.trainer_rounds


def decode_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """Every case of decode attention: a row for each contender, with its time and its bytes.

    ``speed_up`` is over the quickest attention on keys that were not compressed.
    """
    rows: list[Row] = []
    for case in config.decode:
        contenders, held = _decode_contenders(case, config)
        times = side_by_side(
            contenders, rounds=config.rounds, device=config.device, progress=progress
        )
        whole = min((name for name in times if name.startswith("SDPA")), key=_median(times))
        for name, taken in times.items():
            rows.append(
                {
                    "tokens": case.tokens,
                    "head_dim": case.head_dim,
                    "group": case.group,
                    "cached": case.cached,
                    "contender": name,
                    "bytes": held[name],
                    **_columns(taken),
                    **_columns(taken.speed_up_over(times[whole]), "speed_up"),
                    "over": whole,
                    **_loop_columns(taken, times),
                    "bandwidth": held[name] / taken.median / 1e9,
                }
            )
    return rows


def transform_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """The Hadamard transform and packing, in bytes moved per second beside a copy's."""
    rows: list[Row] = []
    for n, n_rows in config.transforms:
        for kernel, make in (("Hadamard", _hadamard_contenders), ("pack", _pack_contenders)):
            if kernel == "pack" and n not in kernels.HEAD_DIMS:
                _skip(config.rounds, progress)
                continue
            contenders, moved = make(n, n_rows, config)
            times = side_by_side(
                contenders, rounds=config.rounds, device=config.device, progress=progress
            )
            copied = moved["copy"] / times["copy"].median
            rows += [
                {
                    "kernel": kernel,
                    "n": n,
                    "rows": n_rows,
                    "contender": name,
                    **_columns(taken),
                    "bandwidth": moved[name] / taken.median / 1e9,
                    "of_copy": moved[name] / taken.median / copied,
                }
                for name, taken in times.items()
            ]
    return rows


def trainer_rows(config: KernelTimesConfig, progress: Tick | None = None) -> list[Row]:
    """Rotations of planted keys learned for many heads at once, and one by one in plain torch.

    ``speed_up`` is per head: on a GPU the reference learns a single one.
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
                    **_columns(taken),
                    **_columns(per_head, "speed_up"),
                    "held_out_beta": fmean(each.held_out_beta for each in learned[impl]),
                    "optimum": fmean(each.optimum for each in sets),
                }
            )
    return rows


def memory_rows(config: KernelTimesConfig) -> list[Row]:
    """Most memory that one decode step takes on a GPU beyond the cache itself, per contender."""
    rows: list[Row] = []
    for case in config.decode if config.gpu else ():
        contenders, held = _decode_contenders(case, replace(config, peers=False))
        for name, call in contenders.items():
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peak = torch.cuda.max_memory_allocated() - before
            rows.append(
                {
                    "tokens": case.tokens,
                    "head_dim": case.head_dim,
                    "group": case.group,
                    "contender": name,
                    "bytes": held[name],
                    "beyond": peak,
                }
            )
    return rows


# What stands against what.


def _decode_contenders(
    case: Decode, config: KernelTimesConfig
) -> tuple[dict[str, Contender], dict[str, int]]:
    """Calls that each do the same attention, and the bytes of cache that each reads."""
    device, d = config.device, case.head_dim
    cells = (case.batch, case.n_heads, case.tokens)
    half = torch.float16 if config.gpu else torch.bfloat16  # what each attends to fastest
    keys, values = (torch.randn(*cells, d, device=device, dtype=half) for _ in range(2))
    grouped = torch.randn(case.batch, case.n_heads, case.group, d, device=device, dtype=half)
    query, scaling = grouped.flatten(1, 2), d**-0.5
    first, last = (torch.full((case.batch,), at, dtype=torch.int32) for at in (0, case.tokens))
    packed, rotation = _packed(keys)
    attend = partial(
        kernels.decode_attention,
        query,
        packed,
        rotation,
        scaling=scaling,
        impl="triton" if config.gpu else "cpu",
    )
    name = "fp16" if config.gpu else "bf16"
    contenders: dict[str, Contender] = {f"1-bit K, {name} V": partial(attend, values)}
    held = {f"1-bit K, {name} V": _bytes(packed) + values.nbytes}
    for bits in (8, 4, 2):
        coded = kernels.PackedValues.empty(*cells, d, bits, device=device)
        coded.write(values, torch.zeros(case.batch, dtype=torch.int32, device=device))
        contenders[f"1-bit K, {bits}-bit V"] = partial(attend, coded)
        held[f"1-bit K, {bits}-bit V"] = _bytes(packed) + _bytes(coded)
    contenders[f"SDPA {name}"] = partial(
        scaled_dot_product_attention, grouped, keys, values, scale=scaling
    )
    held[f"SDPA {name}"] = keys.nbytes + values.nbytes
    if not config.gpu:
        wide = [x.float() for x in (grouped, keys, values)]
        contenders["SDPA fp32"] = partial(scaled_dot_product_attention, *wide, scale=scaling)
        held["SDPA fp32"] = wide[1].nbytes + wide[2].nbytes
        contenders[f"same loop, {name} K and V"] = partial(
            bf16_loop.decode_attention, query, keys, values, first, last, scaling
        )
        held[f"same loop, {name} K and V"] = keys.nbytes + values.nbytes
    else:
        flash = _flash_attention(query, keys, values, scaling)
        contenders |= flash | {"copy": partial(torch.empty_like(keys).copy_, keys)}
        held |= dict.fromkeys((*flash, "copy"), 2 * keys.nbytes)
    for peer, layer in _peers(keys, values) if config.peers else ():
        contenders[peer] = partial(_dequantised_attention, layer, grouped, scaling)
        held[peer] = 2 * keys.numel() * 9 // 16  # four bits, and a scale and zero for each 64
    return contenders, held


def _flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> dict[str, Contender]:
    """FlashAttention's own split decoding, where that library is installed and takes the size."""
    if keys.shape[-1] > 256:
        return {}
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return {}
    cache = [x.transpose(1, 2).contiguous() for x in (keys, values)]
    return {
        "SDPA of FlashAttention": partial(
            flash_attn_with_kvcache, query[:, None], *cache, softmax_scale=scaling
        )
    }


def _packed(keys: Tensor) -> tuple[kernels.PackedKeys, Tensor]:
    batch, n_heads, tokens, d = keys.shape
    rotation = haar(d, 0).to(keys.device).expand(n_heads, d, d).contiguous()
    packed = kernels.PackedKeys.empty(batch, n_heads, tokens, d, device=keys.device)
    places = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    kernels.pack_into(packed, keys, rotation, places)
    return packed, rotation


def _peers(keys: Tensor, values: Tensor) -> Iterator[tuple[str, QuantizedLayer]]:
    """Transformers' quantised caches at 4 bits, their first and only update made.

    All of the cache is quantised: none of it waits in full precision for its turn.
    """
    for name, kind, axis in (
        ("quanto", QuantoQuantizedLayer, 0),
        ("HQQ", HQQQuantizedLayer, 1),
    ):
        layer = kind(nbits=4, axis_key=axis, axis_value=axis, q_group_size=64)
        try:
            layer.update(keys, values)
            layer._dequantize(layer._quantized_keys)
        except Exception as error:  # they build code of their own, for which a compiler may lack
            warnings.warn(f"{name} cannot be timed here: {error}", stacklevel=2)
            continue
        yield f"{name} 4-bit K and V", layer


def _dequantised_attention(layer: QuantizedLayer, query: Tensor, scaling: float) -> Tensor:
    # what its `update` does at each step, less the new token
    keys = layer._dequantize(layer._quantized_keys)
    values = layer._dequantize(layer._quantized_values)
    return scaled_dot_product_attention(query, keys, values, scale=scaling)


def _hadamard_contenders(
    n: int, n_rows: int, config: KernelTimesConfig
) -> tuple[dict[str, Contender], dict[str, int]]:
    x = torch.randn(n_rows, n, device=config.device, dtype=torch.float16)
    signs = torch.randint(0, 2, (n,), device=config.device).float() * 2 - 1
    contenders: dict[str, Contender] = {
        impl: partial(kernels.hadamard_transform, x, signs, impl=impl) for impl in _impls(config)
    }
    return _with_copy(contenders | _fast_hadamard(x), x, 2 * x.nbytes)


def _fast_hadamard(x: Tensor) -> dict[str, Contender]:
    """The CUDA library of that name, where it is installed: it has to be built on the spot."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return {}
    return {"fast-hadamard-transform": partial(hadamard_transform, x, x.shape[-1] ** -0.5)}


def _pack_contenders(
    d: int, n_rows: int, config: KernelTimesConfig
) -> tuple[dict[str, Contender], dict[str, int]]:
    keys = torch.randn(1, 8, n_rows // 8, d, device=config.device, dtype=torch.float16)
    packed, rotation = _packed(keys)
    places = torch.zeros(1, dtype=torch.int32, device=config.device)
    contenders: dict[str, Contender] = {
        impl: partial(kernels.pack_into, packed, keys, rotation, places, impl=impl)
        for impl in _impls(config)
    }
    return _with_copy(contenders, keys, keys.nbytes + _bytes(packed))


def _impls(config: KernelTimesConfig) -> tuple[str, ...]:
    return ("torch", "triton") if config.gpu else ("torch",)


def _with_copy(
    contenders: Mapping[str, Contender], x: Tensor, moved: int
) -> tuple[dict[str, Contender], dict[str, int]]:
    """The contenders, which each move so many bytes, and a copy of ``x``."""
    target = torch.empty_like(x)
    bytes_moved = dict.fromkeys(contenders, moved) | {"copy": 2 * x.nbytes}
    return {**contenders, "copy": partial(target.copy_, x)}, bytes_moved


def _bytes(cache: kernels.PackedKeys | kernels.PackedValues) -> int:
    return sum(part.nbytes for part in vars(cache).values() if isinstance(part, Tensor))


def _columns(times: Times | Quartiles, name: str = "seconds") -> dict[str, float]:
    spread = times.quartiles if isinstance(times, Times) else times
    return {name: spread.value, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _loop_columns(taken: Times, times: Mapping[str, Times]) -> dict[str, float | None]:
    """Speed-up over the same loop on keys that were not compressed, where there is one."""
    loop = next((times[name] for name in times if name.startswith("same loop")), None)
    if loop is None:
        return dict.fromkeys(("over_loop", "over_loop_low", "over_loop_high"))
    return _columns(taken.speed_up_over(loop), "over_loop")


def _median(times: Mapping[str, Times]) -> Callable[[str], float]:
    return lambda name: times[name].median


def _skip(rounds: int, progress: Tick | None) -> None:
    for _ in range(rounds if progress else 0):
        progress()
