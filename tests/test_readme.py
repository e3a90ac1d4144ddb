"""The README keeps its word: its commands exist, its links lead somewhere, its code runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from signlattice import records, tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_commands_are_targets_of_the_makefile(text: str) -> None:
    commands = re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )*([a-z-]+)", text, re.MULTILINE)
    assert commands and set(commands) <= TARGETS


def test_every_target_is_explained_by_make_help() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    explained = set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE))
    assert explained == TARGETS


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_lead_somewhere(text: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_library_in_five_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(4096, 16, generator=generator).sign()
    noisy = signs + 0.3 * torch.randn(4096, 16, generator=generator)
    exec(code, {"keys": noisy[:3072], "held_out": noisy[3072:]})
    train_beta, held_out_beta = map(float, capsys.readouterr().out.split())
    assert train_beta > math.sqrt(2 / math.pi) and abs(train_beta - held_out_beta) < 0.05


def test_the_results_are_those_of_the_record() -> None:
    """Every number of the table, and those below it, read off the ablation's record."""
    record = records.read("ablation", "olmoe-mini")
    rows = tables.select(record.table("rows"), centering="token_mean")
    gap = {(r["rotation"], r["scale"], r["temperature"]): r["gap"] for r in rows}
    beta = {r["rotation"]: r["beta"] for r in rows}
    section = re.search(r"results: begin -->(.*)<!-- results: end", README, re.DOTALL).group(1)
    table = re.findall(r"^\| (?!rotation|---)(.+) \|$", section, re.MULTILINE)
    assert [line.split(" | ")[1:] for line in table] == [
        [f"{beta[name]:.3f}", *(f"{value:.2f}" for value in gaps)]
        for name in ("identity", "srht", "pca_hadamard", "itq", "gradient", "annealed")
        for gaps in [
            [gap[name, "mse", False], gap[name, "unbiased", False], gap[name, "unbiased", True]]
        ]
    ]
    ratio = record.metric("gap_ratio")
    ceiling = tables.select(record.table("ceilings"), centering="token_mean")[0]["mean"]
    assert f"ceiling {ceiling:.3f}" in section
    assert f"by {ratio.value:.2f} (interval {ratio.low:.2f} to {ratio.high:.2f}" in section
    assert f"perplexity {record.metric('perplexity').value:.2f}" in re.sub(r"\s+", " ", section)
