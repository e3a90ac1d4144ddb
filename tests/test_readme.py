"""The README keeps its word: its commands exist, its links lead somewhere, its code runs."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from signlattice_paper import four_models, records, tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(signlattice .+)$", README, re.MULTILINE)
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
    code = next(block for block in CODE if "learn_rotation" in block)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(4096, 16, generator=generator).sign()
    noisy = signs + 0.3 * torch.randn(4096, 16, generator=generator)
    exec(code, {"keys": noisy[:3072], "held_out": noisy[3072:]})
    train_beta, held_out_beta = map(float, capsys.readouterr().out.split())
    assert train_beta > math.sqrt(2 / math.pi) and abs(train_beta - held_out_beta) < 0.05


def test_the_cache_in_five_lines_packs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in CODE if "SignKeyCache" in block)
    assert len(code.strip().splitlines()) == 5
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    stats = names["kept"].stats()
    assert stats.n_packed > 0 and stats.n_tokens == names["text"].shape[1] - 1


def test_three_commands_go_from_a_model_to_a_judgement(tmp_path: Path) -> None:
    """As they are written, in an empty folder."""
    found = Path(sys.executable).with_name("signlattice")
    assert found.is_file(), "the package is not installed: make .venv/.installed"
    path = f"{found.parent}{os.pathsep}{os.environ['PATH']}"
    said = []
    for command in COMMANDS:
        run = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert len(said) == 3 and (tmp_path / "codec.safetensors").is_file()
    learned, judged, generated = said
    assert "lattice" in learned and "fp8" in judged and "smaller" in generated


def test_what_is_said_of_caches_is_in_their_records() -> None:
    section = re.search(r"caches: begin -->(.*)<!-- caches: end", README, re.DOTALL).group(1)
    lines = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", section, re.MULTILINE)
    assert [name for name, _ in lines] == list(four_models.PAIRS.values())
    for name, line in lines:
        rows = [
            row
            for row in records.read("cache", name).table("caches")
            if row["exempt"] == "[]" and row["sliding"] == "whole" and row["window"] in (0, 60)
        ]
        ours = tables.select(
            rows, codec="lattice", rule="unbiased", values="int4", window=60, sinks=4
        )[0]
        turned = tables.select(rows, codec="rotation", values="int4", window=60)[0]
        alike = [
            tables.select(rows, codec="", keys=fmt, values=fmt, window=window)[0]
            for fmt, window in (("int2", 60), ("int4", 60), ("fp8", 0))
        ]
        gaps = [f"{row['gap']:z.2f}" for row in (turned, *alike)]
        interval = f"{ours['gap']:.2f} ({ours['gap_low']:.2f} to {ours['gap_high']:.2f})"
        assert line.split(" | ") == [interval, *gaps]


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
