"""A quantizer of one's own: one module and one registration, from learning to the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import documents
from signlattice import (
    CacheConfig,
    CalibrationConfig,
    InputError,
    KeyCodec,
    SignKeyCache,
    learn_codec,
    load_model,
)
from signlattice.cache.storage import EncodedStorage
from signlattice.calibration import measure_codec
from signlattice.cli import main
from signlattice.data.texts import Text
from signlattice.models.passages import passages
from signlattice.quantizers import registry
from signlattice.quantizers.base import CalibrationSet, StoredQuantizer
from signlattice_paper.experiments.ladder import LadderConfig, ladder_entries


@dataclass(frozen=True)
class Thirds:
    """Codes of `ThreeLevels`: ``levels`` int8 [B, H, T, D]."""

    levels: Tensor

    @property
    def n_keys(self) -> int:
        return self.levels[..., 0].numel()


@dataclass(frozen=True, eq=False)
class ThreeLevels(StoredQuantizer):
    """A toy: each coordinate at -1, 0 or 1 times a step of its head, fitted on calibration keys."""

    step: Tensor  # [H, D]

    name = "three_levels"
    n_heads = property(lambda self: self.step.shape[0])
    head_dim = property(lambda self: self.step.shape[1])
    bits = 8.0

    @classmethod
    def fit(cls, calibration: CalibrationSet, config: CalibrationConfig) -> ThreeLevels:
        return cls(calibration.keys.abs().mean(1))

    def encode(self, keys: Tensor) -> Thirds:
        self._check_keys(keys)
        return Thirds((keys / self.step[:, None]).round().clamp(-1, 1).to(torch.int8))

    def decode(self, codes: Thirds) -> Tensor:
        return codes.levels.float() * self.step[:, None]

    def tensors(self, bits: int) -> dict[str, Tensor]:
        return {"step": self.step}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> ThreeLevels:
        return cls(tensors["step"])


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry.QUANTIZERS, "three_levels", f"{__name__}:ThreeLevels")


@pytest.fixture
def text() -> Text:
    return Text("tiny", "tiny", documents("calibration", 20), documents("evaluation", 20))


def test_registry_refuses_an_unknown_name():
    with pytest.raises(InputError, match="code='cube': choose one of lattice, rotation"):
        registry.quantizer("cube")
    with pytest.raises(InputError, match="code='cube': choose one of lattice, rotation"):
        CalibrationConfig(code="cube")


def test_registry_entries_are_stored_quantizers():
    for name in registry.names():
        assert issubclass(registry.quantizer(name), StoredQuantizer)


def test_registry_entry_goes_from_learning_to_the_cache(registered, olmoe_folder, text, tmp_path):
    loaded = load_model(olmoe_folder)
    codec = learn_codec(loaded, text, CalibrationConfig(code="three_levels", keys_per_dim=8))
    codec.save(tmp_path / "codec.safetensors", bits=8)
    codec = KeyCodec.load(tmp_path / "codec.safetensors", loaded.weights_hash)
    assert all(isinstance(code, ThreeLevels) for code in codec.layers.values())

    quality = measure_codec(loaded, codec, passages(loaded, text.evaluation, 2))
    assert all((0 < layer.beta).all() and (layer.beta <= 1).all() for layer in quality.values())

    cache = SignKeyCache(loaded, codec, CacheConfig(window=8, sinks=2))
    ids = torch.tensor([[0, *loaded.encode([text.evaluation[0].text])[0][:40]]])
    loaded.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    stats = cache.stats()
    assert isinstance(cache.packed_layers[0].key_storage, EncodedStorage)
    assert stats.n_packed > 0 and stats.packed_bits.key == 8
    packed = sum(stats.parts[name] for name in stats.parts if name != "full-precision layers")
    assert packed == stats.expected


def test_registry_entry_is_known_to_the_command_line(registered, olmoe_folder, tmp_path, capsys):
    own = tmp_path / "text.txt"
    own.write_text("\n\n".join(f"line {i} of a text, {i * 7 % 13}" for i in range(3000)))
    output = tmp_path / "codec.safetensors"
    arguments = ["learn", str(olmoe_folder), "-o", str(output), "--text", str(own), "--quiet"]
    assert main([*arguments, "--code", "three_levels", "--keys-per-dim", "4"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(output), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["code"] for layer in layers} == {"three_levels"}


def test_registry_entry_gets_a_row_of_the_ladder(registered, olmoe_folder):
    names = [entry.name for entry in ladder_entries(load_model(olmoe_folder), LadderConfig())]
    assert "three_levels, V 4" in names and len(set(names)) == len(names)
