"""Folders of models that are damaged, foreign or absurd: they work, or one line says why not."""

from __future__ import annotations

import pytest

from conftest import thinned
from edges import wrong
from model_folders import damaged, damages, read
from signlattice.cli import main
from signlattice.errors import InputError, IntegrityError
from signlattice.models.checkpoint import check_files
from signlattice.models.full_size import load_full, preflight
from signlattice.models.loading import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
DAMAGES = damages()


@pytest.mark.parametrize("full", [False, True], ids=["load_model", "load_full"])
@pytest.mark.parametrize("name", thinned(DAMAGES, 31))
def test_load_reads_a_folder_or_refuses_it_in_a_line(name, full, llama_folder, tmp_path):
    folder = damaged(llama_folder, DAMAGES[name], tmp_path / "model")
    assert wrong(lambda: read(folder, full)) is None


@pytest.mark.parametrize(
    ("name", "line"),
    {
        "quantised 0 gptq": "is quantised .gptq in config.json.: give the checkpoint it was made",
        "config {'hidden_size': 32}": r"weight in .* is \[.*\], config.json says \[",
        "config {'num_hidden_layers': 1}": "of a layer beyond the 1 that config.json says",
        "config num_hidden_layers='100000'": "num_hidden_layers=100000: its weights are 21",
        "config vocab_size='100000'": "config.json describes .* numbers, .* hold",
        "config hidden_size='x'": "config.json of .*'hidden_size' expected int, got str",
        "config dtype=float64": "in float64: choose dtype float32, bfloat16",
        "config max_position_embeddings='1'": "max_position_embeddings=1: use 2 or more",
        "config.json is a list": "config.json is no JSON object",
        "generation_config.json is a FIFO": "generation_config.json is not a file",
        "tokenizer.json is cut at 0.5": "the tokenizer in .* cannot be read",
        "generation 5 eos_token_id": "eos_token_id='x': use token ids|generation_config.json of",
        "a weight is missing": "lacks weights of its decoder",
        "a weight has integers": "k_proj.weight in .* is stored as I8: give an unquantised",
        "a weight is NaN": "no finite logits",
        "ids of words beyond the vocabulary": "tokenizer of .* tokens up to .* knows 300: put",
        "a token beyond the vocabulary": "tokens up to 300, its model knows 300",
    }.items(),
)
def test_load_full_says_what_is_wrong_with_a_folder(name, line, llama_folder, tmp_path):
    folder = damaged(llama_folder, DAMAGES[name], tmp_path / "model")
    with pytest.raises(InputError, match=line):
        load_full(str(folder), device_map="cpu")


def test_preflight_builds_no_skeleton_of_absurd_size(llama_folder, tmp_path, monkeypatch):
    from signlattice.models import checkpoint

    built = lambda config: pytest.fail("it was built")
    monkeypatch.setattr(checkpoint, "class_of", built)
    damage = DAMAGES["config num_hidden_layers='100000'"]
    with pytest.raises(InputError, match="num_hidden_layers=100000"):
        preflight(str(damaged(llama_folder, damage, tmp_path / "model")))


@pytest.mark.parametrize("name", ["", "\0", "a" * 5000, "a/" * 4000, None, 3])
def test_preflight_refuses_a_name_that_is_none(name):
    assert wrong(lambda: preflight(name)) is None
    with pytest.raises(InputError):
        preflight(name)


@pytest.mark.parametrize("device", ["cuda:x", "", "none-such", "cuda:-1"])
def test_load_full_refuses_a_device_that_is_none(device, llama_folder):
    with pytest.raises(InputError, match="there is no such device"):
        load_full(str(llama_folder), device_map=device)


def test_load_model_names_a_shard_that_is_a_folder(llama_folder, tmp_path):
    damage = DAMAGES["model.safetensors is a folder"]
    with pytest.raises(IntegrityError, match="model.safetensors is not a file"):
        load_model(damaged(llama_folder, damage, tmp_path / "model"))


def test_check_files_counts_weights_and_numbers(llama, llama_folder):
    found = check_files(llama_folder)
    weights = list(llama.model.parameters())
    assert found.n_tensors == len(weights)
    assert found.n_numbers == sum(weight.numel() for weight in weights)


def test_estimate_says_in_a_line_what_is_wrong_with_a_folder(llama_folder, tmp_path, capfd):
    damage = DAMAGES["config rope_parameters='x'"]
    folder = damaged(llama_folder, damage, tmp_path / "model")
    assert main(["estimate", str(folder)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("signlattice: ") and err.count("\n") == 1
