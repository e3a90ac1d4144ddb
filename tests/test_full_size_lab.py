"""The lab as a user runs it on his own checkpoint: papermill, his text, a record at the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, olmoe_folder: Path) -> Path:
    """A copy of the library and the lab, beside a checkpoint in bf16 shards and a text file."""
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    (tmp_path / "book" / "lab").mkdir(parents=True)
    shutil.copy(ROOT / "book" / "lab" / "architectures.ipynb", tmp_path / "book" / "lab")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
    )
    OlmoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "tiny", max_shard_size="20KB")
    assert len(list((tmp_path / "tiny").glob("model-*.safetensors"))) > 1
    AutoTokenizer.from_pretrained(olmoe_folder).save_pretrained(tmp_path / "tiny")
    rng = random.Random(0)
    words = (str(rng.randrange(10**4)) + rng.choice((" ", "\n\n")) for _ in range(12_000))
    (tmp_path / "own.txt").write_text("".join(words))
    return tmp_path


def run_lab(project: Path, *values: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "signlattice_paper",
        "run",
        "book/lab/architectures.ipynb",
        "--out",
        "done",
        "-p",
        "profile",
        "full",
        "-p",
        "text",
        "own.txt",
        *values,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(project / "src"),
        "SIGNLATTICE_HOME": str(project),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.exhaustive  # learns every head of five seeds
def test_architectures_lab_goes_by_one_command_from_a_checkpoint_to_a_record(project):
    before = (project / "book/lab/architectures.ipynb").read_bytes()
    done = run_lab(project, "-p", "model", "tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((project / "results/architectures/tiny.json").read_text())
    assert record["model_id"].endswith("tiny")
    assert record["config"]["text"].endswith("own.txt") and record["weights_hash"]
    betas = {row["rotation"] for row in record["metrics"]["beta"]}
    assert betas == {"identity", "srht", "pca_hadamard", "learned"}
    assert record["metrics"]["n_compressed"]["value"] > 0
    assert (project / "book/lab/architectures.ipynb").read_bytes() == before
    assert (project / "done/architectures.ipynb").is_file()
    assert (project / "scratch/codecs/tiny.safetensors").is_file()


@pytest.mark.slow
def test_architectures_lab_tells_what_is_wrong_before_the_work_starts(project):
    shard = sorted((project / "tiny").glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run_lab(project, "-p", "model", "tiny")
    assert done.returncode == 1 and "damaged or cut short" in done.stderr
    assert not (project / "results").exists()
