"""The calculator's arithmetic in JavaScript against that of ``memory``."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from signlattice.errors import InputError
from signlattice.memory import (
    FP16,
    NAMED_FORMATS,
    PAPER,
    SIGN_KEYS,
    CacheFormat,
    KVShape,
    crossover_length,
    effective_bits,
    kv_bytes,
    memory_reduction,
)
from signlattice_paper.explorer import calculator
from signlattice_paper.explorer.calculator import FIELDS, SHAPES, Calculator, settings

SCRIPT = Path(calculator.__file__).with_name("calculator.js")
Case = tuple[KVShape, CacheFormat, int, int]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def run(expression: str, *values: object, folder: Path) -> list:
    """What a JavaScript function of the calculator makes of each value."""
    module = folder / "calculator.mjs"
    module.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    main = folder / "main.mjs"
    main.write_text(
        'import { readFileSync } from "node:fs";\n'
        'import * as calculator from "./calculator.mjs";\n'
        "const told = (f) => { try { return f(); } catch (error) { return error.message; } };\n"
        f"const f = {expression};\n"
        'const values = JSON.parse(readFileSync(0, "utf-8"));\n'
        "console.log(JSON.stringify(values.map((value) => told(() => f(value)))));\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["node", str(main)],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def cases() -> list[Case]:
    """Every named format on every named shape, and many others of all kinds."""
    found: list[Case] = [
        (shape, fmt, length, batch)
        for shape, _ in SHAPES.values()
        for fmt in NAMED_FORMATS
        for length, batch in ((1, 1), (8192, 1), (131072, 32))
    ]
    chance = random.Random(0)
    for _ in range(300):
        shape = KVShape(
            n_layers=chance.randint(1, 80),
            n_kv_heads=chance.randint(1, 64),
            head_dim=chance.choice([1, 7, 64, 80, 96, 128, 256]),
            value_head_dim=chance.choice([None, 1, 64, 129]),
            sliding_window=chance.choice([None, 1, 128, 4096]),
        )
        fmt = CacheFormat(
            "any",
            key_bits=chance.choice([1, 1.58, 2.5, 8]),
            value_bits=chance.choice([1, 3.3, 16]),
            key_scale_bits=chance.choice([0, 16, 32]),
            value_scale_bits=chance.choice([0, 16]),
            value_group=chance.choice([None, 1, 32, 128]),
            mean_bits=chance.choice([0, 16]),
            static_mean_bits=chance.choice([0, 32]),
            rotation_bits=chance.choice([0, 16, 32]),
            temperature_bits=chance.choice([0, 32]),
            window=chance.choice([0, 5, 124]),
            sinks=chance.choice([0, 4]),
            word_bits=chance.choice([1, 8, 32]),
        )
        found.append((shape, fmt, chance.randint(1, 100_000), chance.randint(1, 64)))
    return found


@needs_node
def test_calculator_weigh_agrees_with_memory(tmp_path: Path) -> None:
    given = cases()
    values = [settings(shape, 2**30, fmt, length, batch) for shape, fmt, length, batch in given]
    found = run("calculator.weigh", *values, folder=tmp_path)
    for (shape, fmt, length, batch), ours in zip(given, found, strict=True):
        load = (length,)
        assert ours["bytes"] == kv_bytes(shape, fmt, *load, batch=batch)
        assert ours["fullBytes"] == kv_bytes(shape, FP16, *load, batch=batch)
        bits = effective_bits(shape, fmt, *load, batch=batch)
        told = [ours["keyBits"], ours["valueBits"], ours["averageBits"], ours["reduction"]]
        ratio = memory_reduction(shape, fmt, *load, batch=batch)
        assert told == pytest.approx([bits.key, bits.value, bits.average, ratio], rel=1e-12)


@needs_node
def test_calculator_weigh_gives_pieces_that_add_up_to_the_whole(tmp_path: Path) -> None:
    values = [settings(shape, 2**30, fmt, length, batch) for shape, fmt, length, batch in cases()]
    for ours in run("calculator.weigh", *values, folder=tmp_path):
        pieces = {k: v for k, v in ours["parts"].items() if k not in ("vectors", "valueDim")}
        assert sum(pieces.values()) == ours["bits"]


@needs_node
@pytest.mark.parametrize("window", [None, 256])
def test_crossover_agrees_with_memory(tmp_path: Path, window: int | None) -> None:
    weights = [1, 10**6, 13_838_000_000]
    shape = KVShape(16, 16, 128, sliding_window=window)
    for fmt in (FP16, PAPER, SIGN_KEYS):
        values = [{**settings(shape, 1, fmt, 1, 1), "goal": goal} for goal in weights]
        found = run("(s) => calculator.crossover(s, s.goal)", *values, folder=tmp_path)
        assert found == [crossover_length(goal, shape, fmt) for goal in weights]


@needs_node
@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("head_dim", "128", 128),
        ("head_dim", " 1e2 ", 100),
        ("key_bits", "1.58", 1.58),
        ("value_group", "", None),
        ("head_dim", "", "head size: nothing is not a whole number from 1 to 65,536"),
        ("head_dim", "0", "head size: “0” is not a whole number from 1 to 65,536"),
        ("batch", "2.5", "batch: “2.5” is not a whole number from 1 to 1,000,000"),
        ("n_layers", "many", "layers: “many” is not a whole number from 1 to 10,000"),
        ("key_bits", "-1", "key bits: “-1” is not a number from 0.01 to 64"),
        ("weights", "Infinity", "weights: “Infinity” is not a number from 0.0001 to 1,000,000"),
    ],
)
def test_calculator_read_tells_bad_input_by_name_and_value(
    tmp_path: Path, name: str, text: str, read: object
) -> None:
    field = next(vars(field) for field in FIELDS if field.name == name)
    assert run(
        "([field, text]) => calculator.read(field, text)", [field, text], folder=tmp_path
    ) == [read]


@needs_node
def test_calculator_in_bytes_tells_sizes_in_binary_units(tmp_path: Path) -> None:
    sizes = [0, 1023, 1024, 1536, 15.26 * 2**20, 2**30, 750 * 2**30, 2**41]
    told = [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "1.50 KiB",
        "15.3 MiB",
        "1.00 GiB",
        "750 GiB",
        "2.00 TiB",
    ]
    assert run("calculator.inBytes", *sizes, folder=tmp_path) == told


def test_calculator_fields_set_every_number_of_shape_and_format() -> None:
    numbers = settings(*SHAPES["OLMoE-1B-7B"], SIGN_KEYS, 8192, 1)
    assert sorted(numbers) == sorted(field.name for field in FIELDS)


def test_calculator_says_live_what_is_set() -> None:
    widget = Calculator("OLMoE-1B-7B", PAPER)
    assert widget.shape == SHAPES["OLMoE-1B-7B"][0]
    assert replace(widget.format, name="paper") == PAPER
    widget.settings = widget.settings | {"key_bits": 2.5, "sliding_window": 64}
    assert (widget.format.key_bits, widget.shape.sliding_window) == (2.5, 64)


def test_calculator_tells_of_an_unknown_model() -> None:
    with pytest.raises(InputError, match="unknown model 'GPT'"):
        Calculator("GPT")
