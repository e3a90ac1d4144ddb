from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from signlattice_paper.experiments import kernel_times
from signlattice_paper.experiments.kernel_times import Decode, KernelTimesConfig

TINY = KernelTimesConfig(
    device="cpu",
    decode=(Decode(tokens=256, head_dim=64, n_heads=2),),
    transforms=((64, 64), (48, 64)),
    trainer=((16, 2048, 2),),
    rounds=2,
    trainer_rounds=1,
    peers=False,
)


def test_decode_is_timed_beside_whole_keys_and_counts_its_bytes():
    ticks = []
    rows = kernel_times.decode_rows(TINY, lambda: ticks.append(1))
    by_name = {row["contender"]: row for row in rows}
    cells, d = 2 * 256, 64
    assert by_name["1-bit K, bf16 V"]["bytes"] == cells * (d // 8 + 2 + 2 * d)
    assert by_name["1-bit K, 4-bit V"]["bytes"] == cells * (d // 8 + 2 + d // 2 + 4)
    assert by_name["SDPA bf16"]["bytes"] == cells * 4 * d
    over = by_name["SDPA bf16"]["over"]
    assert by_name[over]["speed_up"] == 1
    assert len(ticks) == TINY.rounds


def test_transforms_are_beside_a_copy():
    rows = kernel_times.transform_rows(TINY)
    copies = [row for row in rows if row["contender"] == "copy"]
    assert {(row["kernel"], row["n"]) for row in copies} == {
        ("Hadamard", 64),
        ("Hadamard", 48),
        ("pack", 64),
    }
    assert all(row["of_copy"] == pytest.approx(1) for row in copies)


def test_the_trainer_is_beside_its_reference_and_says_what_it_reached():
    rows = kernel_times.trainer_rows(TINY)
    assert [row["impl"] for row in rows] == ["torch", "cpu"]
    assert rows[0]["speed_up"] == 1
    assert all(row["held_out_beta"] > row["optimum"] - 0.02 for row in rows)


def test_the_contest_of_a_gpu_runs_there_or_in_the_interpreter():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = replace(TINY, gpu=True, device=device, transforms=((64, 64),))
    rows = kernel_times.decode_rows(replace(tiny, decode=(Decode(64, 64, n_heads=1),)))
    names = [row["contender"] for row in rows]
    assert [name for name in names if name != "SDPA of FlashAttention"] == [
        "1-bit K, fp16 V",
        "1-bit K, 8-bit V",
        "1-bit K, 4-bit V",
        "1-bit K, 2-bit V",
        "SDPA fp16",
        "copy",
    ]
    rows = kernel_times.transform_rows(tiny)
    assert {(row["kernel"], row["contender"]) for row in rows} >= {
        (kernel, name) for kernel in ("Hadamard", "pack") for name in ("torch", "triton", "copy")
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_progress_is_counted_rightly_for_every_device(device):
    config = KernelTimesConfig.for_device(device)
    assert config.n_rounds > 0
    assert all(case.cached >= 4096 for case in config.decode)


def test_the_gpu_goes_from_4k_to_4m_cached_keys():
    cached = [case.cached for case in KernelTimesConfig.for_device("cuda").decode]
    assert (min(cached), max(cached)) == (2**12, 2**22)
