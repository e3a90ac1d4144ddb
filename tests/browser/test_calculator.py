"""The calculator of the explore page: what it shows is what ``memory`` says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import chromium
import pytest
from playwright.sync_api import Browser, Locator
from visit import Opened, opening

from signlattice.memory import FP8, FP16, PAPER, SIGN_KEYS, CacheFormat, KVShape, kv_bytes
from signlattice_paper.explorer.calculator import SHAPES, format_settings

PAGE = "book/explore"
MODEL = "OLMoE-1B-7B"


@pytest.fixture(scope="module")
def explore(browser: Browser, address: str) -> Iterator[Opened]:
    chromium.built_page(PAGE)
    with opening(browser, address, PAGE) as page:
        yield page


@pytest.fixture
def calculator(explore: Opened) -> Locator:
    calculator = explore.page.locator(".kv-calculator")
    calculator.locator("select").nth(0).select_option(MODEL)
    calculator.locator("select").nth(1).select_option("paper")
    more = calculator.locator("details")
    if more.get_attribute("open") is None:
        more.locator("summary").click()
    write(calculator, seq_len=8192, batch=1)
    return calculator


def write(calculator: Locator, **numbers: object) -> None:
    for name, value in numbers.items():
        told = "" if value is None else str(value)
        calculator.locator(f"input[type=text][data-name={name}]").fill(told)


def display_path(calculator: Locator) -> int:
    return int(calculator.locator(".kv-told").get_attribute("data-bytes"))


@pytest.mark.parametrize("fmt", [FP16, FP8, PAPER], ids=lambda fmt: fmt.name)
def test_calculator_named_formats_weigh_what_memory_says(
    calculator: Locator, fmt: CacheFormat
) -> None:
    calculator.locator("select").nth(1).select_option(fmt.name)
    assert display_path(calculator) == kv_bytes(SHAPES[MODEL][0], fmt, 8192)


@pytest.mark.parametrize(
    ("shape", "fmt", "length", "batch"),
    [
        (KVShape(3, 4, 64), replace(SIGN_KEYS, window=124, sinks=4), 300, 2),
        (KVShape(48, 4, 80, value_head_dim=96), replace(PAPER, key_bits=1.58), 100_000, 7),
        (
            KVShape(5, 2, 256, sliding_window=512),
            replace(FP8, value_group=32, value_scale_bits=16),
            8192,
            1,
        ),
    ],
)
def test_calculator_numbers_of_any_kind_weigh_what_memory_says(
    calculator: Locator, shape: KVShape, fmt: CacheFormat, length: int, batch: int
) -> None:
    write(calculator, **vars(shape), **format_settings(fmt), seq_len=length, batch=batch)
    assert display_path(calculator) == kv_bytes(shape, fmt, length, batch=batch)


def test_calculator_tells_bad_input_until_it_is_mended(calculator: Locator) -> None:
    write(calculator, head_dim=0)
    field = calculator.locator("input[data-name=head_dim]")
    told = calculator.locator(".kv-told")
    assert field.get_attribute("aria-invalid") == "true"
    assert "head size: “0” is not a whole number from 1" in told.inner_text()
    write(calculator, head_dim=64)
    assert field.get_attribute("aria-invalid") is None
    assert "times smaller" in told.inner_text()


def test_calculator_numbers_can_be_reached_by_keyboard_and_are_labelled(
    calculator: Locator,
) -> None:
    silent = calculator.locator("input, select").evaluate_all(
        "(all) => all.filter((e) => !e.labels?.length && !e.ariaLabel || e.tabIndex < 0)"
        ".map((e) => e.outerHTML)"
    )
    assert silent == []
