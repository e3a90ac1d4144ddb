from __future__ import annotations

import json
import shutil

import pytest
import torch

from signlattice.errors import InputError, IntegrityError
from signlattice.models import loading, minis
from signlattice.models.checkpoint import weights_hash
from signlattice.models.loading import load_model
from signlattice.models.minis import OLMOE_MINI, spec


def test_olmoe_mini_is_as_large_as_it_says():
    model = OLMOE_MINI.build()
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3e6
    attention = model.model.layers[0].self_attn
    assert hasattr(attention, "q_norm") and hasattr(attention, "k_norm")


def test_load_model_loads_the_committed_mini_which_predicts_code():
    loaded = load_model("olmoe-mini")
    ids = torch.tensor([[0, *loaded.encode(["import numpy as np\nfrom collections import "])[0]]])
    losses = [
        loaded.model(ids, labels=ids).loss,
        loaded.model(ids.flip(1), labels=ids.flip(1)).loss,
    ]
    assert losses[0] < losses[1] - 1


def test_load_model_loads_any_checkpoint_folder_in_fp32(olmoe_folder):
    loaded = load_model(olmoe_folder)
    assert loaded.context == 64
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.weights_hash == weights_hash(olmoe_folder)


@pytest.mark.parametrize("load", [spec, load_model])
def test_load_model_and_spec_tell_an_unknown_model_with_the_choice(load):
    with pytest.raises(InputError, match="unknown model 'olmo-mini': choose one of olmoe-mini"):
        load("olmo-mini")


@pytest.fixture
def pretend_mini(olmoe_folder, tmp_path, monkeypatch):
    """A tiny checkpoint in the place of olmoe-mini, with its hash beside it."""
    folder = tmp_path / "olmoe-mini"
    shutil.copytree(olmoe_folder, folder)
    (folder / "training.json").write_text(json.dumps({"weights_hash": weights_hash(folder)}))
    monkeypatch.setattr(loading, "MODELS", tmp_path)
    return folder


def test_load_model_loads_a_mini_that_matches_its_hash(pretend_mini):
    assert load_model("olmoe-mini").name == "olmoe-mini"


def test_load_model_says_how_to_get_a_missing_mini(pretend_mini):
    shutil.rmtree(pretend_mini)
    with pytest.raises(IntegrityError, match="no checkpoint of olmoe-mini.*git checkout.*make lab"):
        load_model("olmoe-mini")


def test_load_model_refuses_a_mini_with_other_weights(pretend_mini):
    file = pretend_mini / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="hashes to .*its record says.*git checkout"):
        load_model("olmoe-mini")


def test_load_model_refuses_a_mini_without_its_hash(pretend_mini):
    (pretend_mini / "training.json").unlink()
    with pytest.raises(IntegrityError, match="training.json does not name"):
        load_model("olmoe-mini")


def test_load_model_refuses_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model.*safetensors"):
        load_model(tmp_path)


def test_minis_share_a_tokenizer_and_are_small():
    folders = [loading.MODELS / name for name in minis.MINIS]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    assert all((folder / "model.safetensors").stat().st_size <= 8_000_000 for folder in folders)
    sizes = [sum(p.numel() for p in spec.build().parameters()) for spec in minis.MINIS.values()]
    assert all(2e6 < size < 3.5e6 for size in sizes)
