"""The kernels' bars: attention on sign bits beside attention on uncompressed keys, in one run.

Prints a table of each contest, writes ``results/bench_kernels/<cpu or cuda>.json`` and exits with 1
if a bar is missed. Times are of the machine at hand: run it when it is quiet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

import kernel_times
from kernel_times import KernelTimesConfig
from signlattice.errors import InputError
from signlattice_paper import records
from signlattice_paper.records import Row
from signlattice_paper.tables import select

COLUMNS = {
    "decode": (
        "tokens",
        "head_dim",
        "group",
        "contender",
        "seconds",
        "speed_up",
        "over_loop",
        "bandwidth",
    ),
    "transforms": ("kernel", "n", "contender", "seconds", "bandwidth", "of_copy"),
    "trainer": ("d", "n_heads", "n_keys", "impl", "seconds", "speed_up", "held_out_beta"),
    "memory": ("tokens", "head_dim", "group", "contender", "bytes", "beyond"),
}


def bars(tables: Mapping[str, Sequence[Row]], device: str) -> list[Row]:
    """What was asked for and what was measured, a row for each bar of this device."""
    decode = tables["decode"]
    if device == "cpu":
        at = select(decode, tokens=32768, head_dim=128, group=4)
        packed = select(at, contender="1-bit K, bf16 V")[0]
        found = [
            ("over the same loop on bf16 keys", packed["over_loop"], 1.3),
            ("over PyTorch's attention, the quicker of bf16 and fp32", packed["speed_up"], 2.0),
        ]
    else:
        million = [row for row in decode if row["cached"] >= 2**20 and row["head_dim"] == 128]
        found = [
            (
                f"{name} over fp16, 1M keys or more",
                min(row["speed_up"] for row in select(million, contender=name, group=4)),
                least,
            )
            for name, least in (("1-bit K, fp16 V", 1.6), ("1-bit K, 4-bit V", 3.0))
        ]
        found += [
            (
                f"{kernel} of a copy's bandwidth",
                min(
                    row["of_copy"]
                    for row in select(tables["transforms"], kernel=kernel, contender="triton")
                ),
                0.8,
            )
            for kernel in ("Hadamard", "pack")
        ]
    return [
        {"bar": name, "measured": value, "least": least, "met": value >= least}
        for name, value, least in found
    ]


def show(name: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print a table, numbers to four digits, and a column that no row fills left out."""
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    print(f"\n{name}")
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run every contest on one device; 0 if all of its bars are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    device = parser.parse_args().device
    if device == "cuda" and found == "cpu":
        print("error: --device cuda: there is no CUDA device here", file=sys.stderr)
        return 1
    config = KernelTimesConfig.for_device(device)
    try:
        run = records.begin("bench_kernels", device, config=config, seeds=(0,), device=device)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    with tqdm(total=config.n_rounds, desc=f"kernels on {device}") as bar:
        tables = {
            "decode": kernel_times.decode_rows(config, bar.update),
            "transforms": kernel_times.transform_rows(config, bar.update),
            "trainer": kernel_times.trainer_rows(config, bar.update),
            "memory": kernel_times.memory_rows(config),
        }
    for name, rows in tables.items():
        if rows:
            show(name, rows, COLUMNS[name])
    reached = bars(tables, device)
    show("bars", reached, ("bar", "measured", "least", "met"))
    filled = {name: rows for name, rows in tables.items() if rows}
    print(run.finish({**filled, "bars": reached}).save())
    return 0 if all(row["met"] for row in reached) else 1


if __name__ == "__main__":
    sys.exit(main())
