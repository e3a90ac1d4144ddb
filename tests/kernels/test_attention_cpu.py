"""Decode attention on a CPU, against fp64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, attention_tolerance, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.registry import cpu_target
from torch import Tensor

from conftest import thinned
from signlattice import kernels
from signlattice.kernels.attention import cpu, cpu_loop, reference, vectors
from signlattice.kernels.compiled import compiled
from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (32, 3, FP32, 16, None, True)
"""The case of every test but that of accuracy: one is compiled once."""

CASES = (  # head size, query heads to a KV head, dtype, bits of a value, softcap, dc
    (16, 5, FP16, 16, 20.0, True),
    SMALL,
    (64, 4, BF16, 16, None, True),
    (80, 7, BF16, 2, None, False),
    (96, 2, FP16, 16, None, True),
    (112, 1, FP32, 8, 20.0, True),
    (128, 4, BF16, 16, None, False),
    (256, 32, FP16, 4, 20.0, False),
    (512, 6, FP32, 16, None, True),
)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens are worth a thread, so that small tests split and merge."""
    monkeypatch.setattr(cpu_loop, "LEAST_PIECE", 50)


def _seeded() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


def _arguments(
    case: tuple,
    room: int,
    start: list[int],
    length: list[int],
    n_heads: int = 2,
    n_full: int | None = None,
) -> tuple:
    """Random arguments of `decode_attention`; what must not be read is NaN, or 0xAB in bytes."""
    d, group, dtype, bits, softcap, dc = case
    batch = len(start)
    shape = (batch, n_heads, room)
    keys = PackedKeys(
        torch.randint(0, 256, (*shape, d // 8), dtype=torch.uint8),
        (0.5 + torch.rand(shape)).half(),
        torch.randn(shape).half() if dc else None,
    )
    if bits == 16:
        values: Tensor | PackedValues = torch.randn(*shape, d).to(dtype)
        numbers = [values]
    else:
        codes = torch.randint(0, 256, (*shape, d * bits // 8), dtype=torch.uint8)
        values = PackedValues(codes, torch.rand(shape).half(), torch.randn(shape).half(), bits)
        numbers = [values.scale, values.zero]
    t = torch.arange(room)
    begin, end = torch.tensor(start, dtype=torch.int32), torch.tensor(length, dtype=torch.int32)
    unused = ~((t >= begin[:, None]) & (t < end[:, None]))[:, None].expand(shape)
    for x in (keys.scale, keys.dc, *numbers):
        if x is not None:
            x[unused] = torch.nan
    keys.words[unused] = 0xAB
    full = None
    if n_full is not None:
        kept = [torch.randn(batch, n_heads, n_full, d).to(dtype) for _ in range(2)]
        count = torch.randint(0, n_full + 1, (batch,), dtype=torch.int32)
        for x in kept:
            x[(torch.arange(n_full) >= count[:, None])[:, None].expand(x.shape[:3])] = torch.nan
        full = FullPrecisionTokens(*kept, count)
    query = (2 * torch.randn(batch, n_heads * group, d)).to(dtype)
    rotation = torch.linalg.qr(torch.randn(n_heads, d, d))[0]
    return query, keys, rotation, values, begin, end, d**-0.5, softcap, full


def _exact(arguments: tuple) -> Tensor:
    query, keys, rotation, *rest = arguments
    return reference.decode_attention(query.double(), keys, rotation.double(), *rest)


def _assert_right(arguments: tuple) -> None:
    got, exact = cpu.decode_attention(*arguments), _exact(arguments)
    assert_accurate(got, exact, attention_tolerance(*arguments))


@pytest.mark.parametrize("case", thinned(CASES, 4), ids=str)
@pytest.mark.parametrize("n_full", [None, 5])
def test_decode_attention_is_as_accurate_as_plain_torch(case: tuple, n_full: int | None) -> None:
    _seeded()
    _assert_right(_arguments(case, 331, [0, 17], [301, 330], n_full=n_full))


@settings(max_examples=25)
@given(st.data())
def test_decode_attention_takes_any_lengths_batches_and_heads(data: st.DataObject) -> None:
    _seeded()
    room = data.draw(st.integers(1, 700))
    batch = data.draw(st.integers(1, 3))
    start = data.draw(st.lists(st.integers(0, room - 1), min_size=batch, max_size=batch))
    length = [data.draw(st.integers(low + 1, room)) for low in start]
    n_full = data.draw(st.none() | st.integers(0, 40))
    n_heads = data.draw(st.integers(1, 3))
    _assert_right(_arguments(SMALL, room, start, length, n_heads, n_full))


def test_decode_attention_keeps_accuracy_with_one_large_query_coordinate() -> None:
    _seeded()
    for case in SMALL, (128, 4, BF16, 16, None, False):
        query, keys, rotation, *rest = _arguments(case, 300, [0], [300])
        query[..., 3] *= 30
        _assert_right((query, keys, torch.eye(query.shape[-1]).expand_as(rotation), *rest))


def test_decode_attention_gives_zeros_with_nothing_to_attend_to() -> None:
    arguments = _arguments(SMALL, 200, [0, 90], [150, 90])
    out = cpu.decode_attention(*arguments)
    assert not out[1].any()
    assert relative_error(out[0], _exact(arguments)[0]) < 1e-5


def test_decode_attention_of_an_empty_cache_leaves_those_in_full_precision() -> None:
    arguments = _arguments(SMALL, 0, [0], [0], n_full=9)
    arguments[-1].length[:] = 9
    arguments[-1].keys.normal_()
    arguments[-1].values.normal_()
    _assert_right(arguments)


def test_decode_attention_shows_a_nan_that_is_attended_to() -> None:
    for at in (0, 3):
        arguments = _arguments(SMALL, 100, [0], [100])
        arguments[at][0, 0, 20] = torch.nan
        assert cpu.decode_attention(*arguments)[0, 0].isnan().any()


def test_decode_attention_leaves_its_inputs_alone() -> None:
    arguments = _arguments(SMALL, 100, [0], [90], n_full=3)
    query, keys, rotation, values, _, _, _, _, full = arguments
    tensors = (query, keys.words, keys.scale, keys.dc, rotation, values, full.keys, full.values)
    before = [x.clone() for x in tensors]
    cpu.decode_attention(*arguments)
    for x, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True)


def test_decode_attention_threads_change_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments(SMALL, 900, [0], [877], n_heads=1)
    outs = []
    for n in (1, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        outs.append(cpu.decode_attention(*arguments))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_decode_attention_calls_at_the_same_time_do_not_disturb_each_other() -> None:
    every = [_arguments(SMALL, 400, [0], [400]) for _ in range(8)]
    alone = [cpu.decode_attention(*arguments) for arguments in every]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: cpu.decode_attention(*arguments), every))
    for out, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_pieces_cover_every_token_once_and_are_equal(
    spans: list[tuple[int, int]], n_heads: int, n_threads: int
) -> None:
    start, length = torch.tensor(spans, dtype=torch.int32).unbind(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: n_threads)
        pieces = cpu_loop._pieces(start, length, 400, n_heads)
    covered = sorted(
        (row, t) for part in pieces for row, _, a, b in part.tolist() for t in range(a, b)
    )
    assert covered == [
        (b * n_heads + h, t)
        for (b, (low, high)), h in itertools.product(enumerate(spans), range(n_heads))
        for t in range(low, min(high, 400))
    ]
    places = [(row, slot) for part in pieces for row, slot, _, _ in part.tolist()]
    assert len(places) == len(set(places))
    sizes = [sum(b - a for _, _, a, b in part.tolist()) for part in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert len(pieces) <= n_threads * cpu_loop.PIECES_PER_THREAD


def test_chosen_attention_on_a_cpu_is_the_cpu_path() -> None:
    assert kernels.chosen("attention", "auto", torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("limbs", sorted(cpu.LIMBS.values()))
@pytest.mark.parametrize("feature", [*(feature for feature, _, _ in vectors._LOOKUP), "none"])
def test_lookup_sums_are_given_by_every_way_to_look_up(
    feature: str, limbs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = cpu_target.target_context.codegen()._tm_features.split(",")
    if feature not in (*there, "none"):
        pytest.skip(f"this processor does not have {feature}")
    monkeypatch.setattr(vectors, "_has", lambda _context, wanted: wanted == feature)
    sums = vectors.lookup_sums.__wrapped__(limbs)

    @compiled
    def look_up(nibbles, tables, out):
        sums(nibbles.ctypes.data, tables.ctypes.data, len(tables), np.int32(-9), out.ctypes.data)

    random = np.random.default_rng()
    nibbles = random.integers(0, 16, (20, 64), dtype=np.uint8)
    tables = random.integers(0, 64, (5, limbs, 4, 16), dtype=np.uint8)
    out = np.full(64, np.nan, np.float32)
    look_up(nibbles, tables, out)
    entries = sum(tables[:, limb].astype(np.int64) << 6 * limb for limb in range(limbs))
    each = np.take_along_axis(entries.reshape(20, 16), nibbles.astype(np.int64), 1)
    np.testing.assert_array_equal(out, (each.sum(0) - 9).astype(np.float32))


@pytest.mark.slow
def test_decode_attention_is_the_same_with_no_vector_instructions(tmp_path: Path) -> None:
    arguments = _arguments((16, 5, FP16, 16, 20.0, True), 150, [0], [150])
    torch.save((arguments, cpu.decode_attention(*arguments)), tmp_path / "case.pt")
    program = (
        "import sys, torch\n"
        "from signlattice.kernels.attention import cpu\n"
        "arguments, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(cpu.decode_attention(*arguments), expected)\n"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-c", program, str(tmp_path / "case.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_widen_is_exact_for_halves_without_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_has", lambda _context, _feature: False)
    widen = vectors.widen.__wrapped__("float16", 64)

    @compiled
    def widened(source, target):
        for i in range(0, source.size, 64):
            widen(source[i:].ctypes.data, target[i:].ctypes.data)

    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(2**16, np.float32)
    widened(bits, out)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))
