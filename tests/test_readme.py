"""The README keeps its word: its commands exist, its links lead somewhere, its code runs."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from signlattice import cli
from signlattice_paper import four_models, real_model, records, tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(signlattice .+)$", README, re.MULTILINE)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_readme_and_contributing_commands_are_targets_of_the_makefile(text: str) -> None:
    commands = re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )*([a-z-]+)", text, re.MULTILINE)
    assert commands and set(commands) <= TARGETS


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    explained = set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE))
    assert explained == TARGETS


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_readme_and_contributing_links_lead_somewhere(text: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_library_in_five_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in CODE if "learn_rotation" in block)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(4096, 16, generator=generator).sign()
    noisy = signs + 0.3 * torch.randn(4096, 16, generator=generator)
    exec(code, {"keys": noisy[:3072], "held_out": noisy[3072:]})
    train_beta, held_out_beta = map(float, capsys.readouterr().out.split())
    assert train_beta > math.sqrt(2 / math.pi) and abs(train_beta - held_out_beta) < 0.05


def test_readme_cache_in_five_lines_packs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in CODE if "SignKeyCache" in block)
    assert len(code.strip().splitlines()) == 5
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    stats = names["kept"].stats()
    assert stats.n_packed > 0 and stats.n_tokens == names["text"].shape[1] - 1


@pytest.mark.slow
def test_readme_three_commands_go_from_a_model_to_a_judgement(tmp_path: Path) -> None:
    """As they are written, in an empty folder."""
    found = Path(sys.executable).with_name("signlattice")
    assert found.is_file(), "the package is not installed: make .venv/.installed"
    path = f"{found.parent}{os.pathsep}{os.environ['PATH']}"
    said = []
    for command in COMMANDS:
        if "gemma" in command:  # a model that is fetched is judged in `test_gemma`
            continue
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


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_understood(command: str) -> None:
    assert cli.parser().parse_args(shlex.split(command, comments=True)[1:]).command


def test_readme_says_of_caches_what_is_in_their_records() -> None:
    """Losses in the rows, and in the heading the bits of the same caches at the same length."""
    section = re.search(r"caches: begin -->(.*)<!-- caches: end", README, re.DOTALL).group(1)
    (heading,) = re.findall(r"^\| model \| (.+) \|$", section, re.MULTILINE)
    lines = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", section, re.MULTILINE)
    assert [name for name, _ in lines] == list(four_models.PAIRS.values())
    signs = {"keys": "sign", "rule": "unbiased", "window": 60, "sinks": 4}
    wanted = [
        signs | {"codec": codec, "values": values}
        for codec, values in (("lattice", "int4"), ("lattice", "int2"), ("rotation", "int4"))
    ]
    wanted += [
        {"codec": "", "keys": fmt, "values": fmt, "window": window}
        for fmt, window in (("int2", 60), ("int4", 60), ("int4", 0), ("fp8", 0))
    ]
    bits = []
    for name, line in lines:
        kept = tables.select(
            records.read("cache", name).table("caches"), exempt="[]", sliding="full"
        )
        ours, *others = (tables.select(kept, **where)[0] for where in wanted)
        interval = f"{ours['gap']:.2f} ({ours['gap_low']:.2f} to {ours['gap_high']:.2f})"
        assert line.split(" | ") == [interval, *(f"{row['gap']:z.2f}" for row in others)]
        bits.append([row["effective_bits"] for row in (ours, *others)])
    told = [re.findall(r"\d+\.\d", head.partition(": ")[2]) for head in heading.split(" | ")]
    for head, column in zip(told, zip(*bits, strict=True), strict=True):
        assert head == sorted({f"{least:.1f}" for least in (min(column), max(column))})


def test_readme_says_of_the_real_model_what_is_in_its_records() -> None:
    """The table as it is written from the record, and each number below it."""
    section = re.search(r"real: begin -->(.*)<!-- real: end", README, re.DOTALL).group(1)
    lengths, fingerprint = real_model.lengths(), real_model.fingerprint()
    assert real_model.readme_table(lengths) in section
    said = re.sub(r"\s+", " ", section)
    windows = [f"{row['windows']} of {row['tokens']:,} tokens" for row in lengths.table("exact")]
    assert f"Windows judged: {', '.join(windows)}." in said
    signs = real_model.cache_row(lengths, "rotation, V int4", 2048)
    assert f"it loses {signs['gap']:.0f} per cent of perplexity at 2,048 tokens" in said
    keys = {row["name"]: row for row in tables.select(lengths.table("passkeys"), tokens=2048)}
    exact, four, ours = (keys[name] for name in ("exact", "int4", "lattice, V int4"))
    assert f"of {exact['asked']} pass keys" in said
    assert f"four bits find {four['right']} and one-bit keys {ours['right']}." in said
    full = real_model.full_layers(fingerprint)
    betas = [real_model.mean_beta(fingerprint, "learned", "dc", layers=[i]) for i in full]
    assert "has {:.3f}, {:.3f} and {:.3f} in the three layers".format(*betas) in said
    left, allowed = (
        real_model.mean_beta(fingerprint, "learned", "token_mean", column=column)
        for column in ("beta", "ceiling")
    )
    assert f"{left:.3f} is left where a covariance without corners allows {allowed:.3f}" in said


def test_readme_results_are_those_of_the_record() -> None:
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
    assert f"perplexity {record.metric('perplexity').value:.2f}" in re.sub(r"\s+", " ", section)


def test_what_is_said_of_four_models_is_in_their_records() -> None:
    """Ranges over all of them, of the bullets below the table."""
    section = re.search(r"results: begin -->(.*)<!-- results: end", README, re.DOTALL).group(1)
    section = re.sub(r"\s+", " ", section)
    four = four_models.minis()
    learned = [
        {row["centering"]: row for row in rows}
        for record in four.values()
        for rows in [tables.select(record.table("beta"), scope="head", rotation="learned")]
    ]
    of_dc = [row["dc"]["beta"] for row in learned]
    ceilings = [row["dc"]["ceiling"] for row in learned]
    assert f"{min(of_dc):.3f} to {max(of_dc):.3f} with the paper's centering" in section
    assert f"could have {min(ceilings):.3f} to {max(ceilings):.3f}" in section
    within = [name for name, beta in zip(four, of_dc, strict=True) if 0.919 <= beta <= 0.965]
    assert within == re.findall(r"One of the four, `([\w-]+)`", section)
    lift = max(abs(row["dc"]["beta"] - row["none"]["beta"]) for row in learned)
    assert f"by {lift:.4f} at most" in section
    ratios = {name: tables.select(r.table("ratios"), seed=0) for name, r in four.items()}
    of_paper = [
        tables.select(rows, centering="dc", scale="mse")[0]["ratio"] for rows in ratios.values()
    ]
    every = [row["ratio"] for rows in ratios.values() for row in rows]
    for found in (of_paper, every):
        assert f"by {min(found):.2f} to {max(found):.2f}" in section
    for name in ("olmoe", "gemma4"):
        by_rotation = [r["ratio"] for n in four if n.startswith(name) for r in ratios[n]]
        by_scale = [
            tables.select(gaps, **where, scale="mse")[0]["gap"]
            / tables.select(gaps, **where, scale="unbiased")[0]["gap"]
            for n, record in four.items()
            if n.startswith(name)
            for gaps in [tables.select(record.table("gaps"), seed=0)]
            for rotation in ("srht", "learned")
            for centering in ("none", "dc", "token_mean")
            for where in [{"rotation": rotation, "centering": centering}]
        ]
        for found in (by_scale, by_rotation):
            assert f"{min(found):.2f} to {max(found):.2f}" in section


def test_the_sizes_of_the_minis_are_those_of_their_records() -> None:
    sizes = [
        records.read("train", name).metric("n_parameters").value / 1e6
        for name in four_models.PAIRS.values()
    ]
    assert f"with {min(sizes):.1f} to {max(sizes):.1f} million parameters" in README
    assert f"`olmoe-mini` ({sizes[0]:.1f} million parameters" in README
