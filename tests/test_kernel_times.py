"""Benches of the kernels: what each table compares, at sizes that no one would time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernel_times
from kernel_times import KernelTimesConfig
from signlattice.evaluation.decode_timing import DecodeCase
from signlattice_paper import records

TINY = KernelTimesConfig(
    device="cpu",
    decode=(DecodeCase(tokens=256, head_dim=64, n_heads=2),),
    transforms=((64, 64), (48, 64)),
    trainer=((16, 2048, 2),),
    rounds=2,
    trainer_rounds=1,
    peers=False,
)


@pytest.mark.exhaustive  # compiles every contender
def test_decode_rows_have_the_control_loop_beside_the_library_s_contenders():
    ticks = []
    rows = kernel_times.decode_rows(TINY, lambda: ticks.append(1))
    by_name = {row["contender"]: row for row in rows}
    loop = by_name["same loop, bf16 K and V"]
    assert loop["over_loop"] == 1 and loop["bytes"] == 2 * 256 * 4 * 64
    assert {"1-bit K, bf16 V", "SDPA bf16", "SDPA fp32"} < set(by_name)
    assert all(row["over_loop_low"] <= row["over_loop_high"] for row in rows)
    assert len(ticks) == TINY.rounds


def test_transform_rows_are_beside_a_copy():
    rows = kernel_times.transform_rows(TINY)
    copies = [row for row in rows if row["contender"] == "copy"]
    assert {(row["kernel"], row["n"]) for row in copies} == {
        ("Hadamard", 64),
        ("Hadamard", 48),
        ("pack", 64),
    }
    assert all(row["of_copy"] == pytest.approx(1) for row in copies)


def test_trainer_rows_have_the_reference_and_the_beta_reached():
    rows = kernel_times.trainer_rows(TINY)
    assert [row["impl"] for row in rows] == ["torch", "cpu"]
    assert rows[0]["speed_up"] == 1
    assert all(row["held_out_beta"] > row["optimum"] - 0.02 for row in rows)


@pytest.mark.exhaustive
def test_decode_rows_of_a_gpu_run_there_or_in_the_interpreter():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = replace(TINY, gpu=True, device=device, transforms=((64, 64),))
    rows = kernel_times.decode_rows(replace(tiny, decode=(DecodeCase(64, 64, n_heads=1),)))
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
def test_kernel_times_config_has_cases_for_every_device(device):
    config = KernelTimesConfig.for_device(device)
    assert config.n_rounds > 0
    assert all(case.cached >= 4096 for case in config.decode)


def test_kernel_times_config_of_a_gpu_goes_from_4k_to_4m_cached_keys():
    cached = [case.cached for case in KernelTimesConfig.for_device("cuda").decode]
    assert (min(cached), max(cached)) == (2**12, 2**22)


def test_kernel_times_config_has_the_fields_of_the_record():
    kept = records.read("bench_kernels", "cpu")
    assert records.as_saved(KernelTimesConfig.for_device("cpu")) == kept.config
    columns = set(kernel_times.decode_rows(TINY)[0])
    assert columns == set(kept.table("decode")[0])
