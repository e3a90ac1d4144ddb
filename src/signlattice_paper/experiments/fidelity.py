"""Measure what the kernels lose on a model's own keys: every implementation against fp64.

Beside each stands what plain torch loses with every step in the same dtype, so that an error can
be told to be the dtype's or the kernel's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from signlattice import kernels
from signlattice.bits import unpack_signs
from signlattice.errors import InputError, IntegrityError
from signlattice.kernels import FullPrecisionTokens, Impl, PackedKeys, PackedValues
from signlattice.kernels.attention import reference
from signlattice.kernels.pack import reference as pack_reference
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage
from signlattice.models.states import read_states
from signlattice.quantizers.scales import ScaleRule
from signlattice.rotations import fixed
from signlattice_paper.experiments.scores import check_plain_attention
from signlattice_paper.records import Row

Tick = Callable[[], object]


@dataclass(frozen=True)
class FidelityConfig:
    """On how many whole passages, in which dtypes, with values of how many bits.

    The last token of each passage attends to all; ``sinks`` first tokens and the ``recent`` last
    ones are kept whole. Rotations are SRHT of ``seed``.
    """

    passages: int = 2
    windows: int = 1
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    value_bits: tuple[int, ...] = (16, 8, 4, 2)
    sinks: int = 4
    recent: int = 28
    rule: ScaleRule = "unbiased"
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One decode step of a layer: ``query`` [B, Hq, D]; ``keys`` and ``values`` [B, H, T, D]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rotation: Tensor


def decode_steps(
    loaded: LoadedModel, passages: Sequence[Passage], config: FidelityConfig
) -> dict[int, Step]:
    """Capture the last token of every passage in every layer, with what it attends to.

    Raises ``InputError`` as `scores.check_plain_attention`.
    """
    check_plain_attention(loaded)
    by_passage = [read_states(loaded, [passage]) for passage in passages]
    steps = {}
    for layer in by_passage[0]:
        states = [layers[layer] for layers in by_passage]
        keys = torch.stack([each.keys for each in states])
        n_heads, _, d = keys.shape[1:]
        rotations = [fixed.srht(d, config.seed + head) for head in range(n_heads)]
        steps[layer] = Step(
            torch.stack([each.queries[layer][:, -1] for each in states]),
            keys,
            torch.stack([each.values for each in states]),
            torch.stack(rotations),
        )
    return steps


def attention_rows(
    steps: Mapping[int, Step],
    impls: Sequence[Impl],
    config: FidelityConfig,
    progress: Tick = lambda: None,
) -> list[Row]:
    """Measure relative errors of attention's output, by layer, dtype, bits of V, implementation."""
    rows: list[Row] = []
    for layer, step in steps.items():
        for dtype, bits in ((d, b) for d in config.dtypes for b in config.value_bits):
            arguments, options = _attention_call(step, getattr(torch, dtype), bits, config)
            query, *rest = arguments
            exact = reference.decode_attention(query.double(), *rest, **options)
            plain = reference.attention_in(query.dtype, *arguments, **options)
            for impl in impls:
                got = kernels.decode_attention(
                    query, *rest[:3], start=rest[3], length=rest[4], impl=impl, **options
                )
                rows.append(
                    {
                        "layer": layer,
                        "dtype": dtype,
                        "value_bits": bits,
                        "impl": impl,
                        "error": relative_error(got, exact),
                        "plain": relative_error(plain, exact),
                    }
                )
                progress()
    return rows


def pack_rows(
    steps: Mapping[int, Step],
    impls: Sequence[Impl],
    config: FidelityConfig,
    progress: Tick = lambda: None,
) -> list[Row]:
    """Count signs that differ from those in fp64, and the scales' error, by layer and dtype."""
    rows: list[Row] = []
    for layer, step in steps.items():
        exact = _packed(step.keys.double(), step.rotation, "torch", config)
        for dtype in config.dtypes:
            keys = step.keys.to(getattr(torch, dtype))
            for impl in impls:
                got = _packed(keys, step.rotation, impl, config)
                flipped = unpack_signs(got.words) != unpack_signs(exact.words)
                rows.append(
                    {
                        "layer": layer,
                        "dtype": dtype,
                        "impl": impl,
                        "flipped": flipped.double().mean().item(),
                        "scale_error": relative_error(got.scale, exact.scale),
                    }
                )
                progress()
    return rows


def compiled_rows(program: Path, arch: int, progress: Tick = lambda: None) -> list[Row]:
    """Compile the kernels for a GPU of compute capability ``arch`` / 10, which need not be there.

    ``program`` prints a line of JSON for each case, as ``benchmarks/cross_compile.py`` does. A row
    has the registers of a thread, the bytes spilled from them, and the bytes of shared memory of a
    program. Raises ``IntegrityError`` if a case does not compile, and ``InputError`` if the program
    is not there.
    """
    if not program.is_file():
        raise InputError(f"no program {program}: give the path of benchmarks/cross_compile.py")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.Popen(
        [sys.executable, program.name, str(arch)],
        cwd=program.parent,
        env=plain,
        text=True,
        stdout=subprocess.PIPE,
    )
    rows: list[Row] = []
    assert run.stdout is not None  # a pipe
    for line in run.stdout:
        found = json.loads(line)
        if "error" in found:
            run.kill()
            raise IntegrityError(f"sm_{arch}, {found['case']}: {found['error']}")
        whose = found["case"].partition(",")[0]
        for each in found["launches"]:
            name = f"{whose}: {each['kernel'].strip('_').replace('_', ' ')}"
            rows.append({"arch": arch, "case": found["case"], **each, "kernel": name})
        progress()
    return rows


def worst(rows: Sequence[Row], by: Sequence[str], of: Sequence[str]) -> list[Row]:
    """Take the largest of the columns ``of`` for every combination of the columns ``by``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return [
        {**dict(zip(by, key)), **{name: max(row[name] for row in found) for name in of}}
        for key, found in groups.items()
    ]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Compute ‖got − exact‖ / ‖exact‖ in fp64; NaN counts as infinite."""
    difference = (got.double() - exact.double()).norm() / exact.double().norm()
    return difference.nan_to_num(torch.inf).item()


def _packed(keys: Tensor, rotation: Tensor, impl: Impl, config: FidelityConfig) -> PackedKeys:
    packed = PackedKeys.empty(*keys.shape)
    places = torch.zeros(len(keys), dtype=torch.int32)
    if keys.dtype == torch.float64:  # the definition itself: the dispatch takes no fp64
        pack_reference.pack_into(packed, keys, rotation, places, rule=config.rule)
    else:
        kernels.pack_into(packed, keys, rotation, places, rule=config.rule, impl=impl)
    return packed


def _attention_call(
    step: Step, dtype: torch.dtype, bits: int, config: FidelityConfig
) -> tuple[tuple, dict[str, object]]:
    """Arguments of the reference for one step: all but sinks and recent tokens are packed."""
    batch, _, n_tokens, d = step.keys.shape
    keys, values = step.keys.to(dtype), step.values.to(dtype)
    first = torch.full((batch,), config.sinks, dtype=torch.int32)
    last = torch.full((batch,), n_tokens - config.recent, dtype=torch.int32)
    kept = torch.cat((torch.arange(config.sinks), torch.arange(int(last[0]), n_tokens)))
    whole = FullPrecisionTokens(
        keys[:, :, kept].contiguous(),
        values[:, :, kept].contiguous(),
        torch.full((batch,), len(kept), dtype=torch.int32),
    )
    held: Tensor | PackedValues = values
    if bits < 16:
        held = PackedValues.empty(*values.shape, bits=bits)
        held.write(values, torch.zeros(batch, dtype=torch.int32))
    packed = _packed(keys, step.rotation, "torch", config)
    arguments = (step.query.to(dtype), packed, step.rotation, held, first, last)
    return arguments, {"scaling": d**-0.5, "full": whole}
