from __future__ import annotations

import pytest
import torch

from signlattice.data import corpus
from signlattice.data.corpus import Document
from signlattice.errors import InputError
from signlattice.models import loading
from signlattice.models.loading import load_model
from signlattice.models.minis import ModelSpec
from signlattice_paper.experiments.train import TrainConfig, save_checkpoint, train

TINY = ModelSpec(
    name="tiny",
    model_type="olmoe",
    like="OLMoE-1B-7B",
    context=16,
    vocab_size=270,
    config=dict(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        tie_word_embeddings=True,
    ),
)
CONFIG = TrainConfig(
    steps=12, batch_size=2, lr=1e-2, warmup=2, checkpoint_every=3, precision="float32"
)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch, texts):
    documents = tuple(
        Document("tiny", f"{i}.py", text * 5, "train") for i, text in enumerate(texts)
    )
    monkeypatch.setattr(corpus, "documents", lambda split: documents)


def test_train_makes_the_loss_fall(tmp_path):
    losses = train(TINY, CONFIG, tmp_path).losses
    assert losses[-1].loss < losses[0].loss - 0.3
    assert [point.step for point in losses] == list(range(1, 13))
    assert losses[-1].tokens == 12 * 2 * 16


def test_train_that_is_interrupted_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(TINY, CONFIG, tmp_path / "whole")

    def interrupt(part):
        if part == "step 8":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, CONFIG, tmp_path / "parts", interrupt)
    steps = []
    parts = train(TINY, CONFIG, tmp_path / "parts", steps.append)
    assert steps == [f"step {step}" for step in range(1, 13)]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    assert [p.loss for p in parts.losses] == [p.loss for p in whole.losses]


def test_train_does_not_go_on_from_a_checkpoint_of_another_configuration(tmp_path):
    first = train(TINY, CONFIG, tmp_path)
    longer = train(TINY, TrainConfig(steps=13, batch_size=2, precision="float32"), tmp_path)
    assert longer.losses[0].loss == first.losses[0].loss
    assert longer.losses[1].loss != first.losses[1].loss


def test_save_checkpoint_writes_the_model_in_half_precision(tmp_path, monkeypatch):
    trained = train(TINY, CONFIG, tmp_path / "scratch")
    digest = save_checkpoint(trained, TINY, tmp_path / "tiny")
    monkeypatch.setattr(loading, "MODELS", tmp_path)
    monkeypatch.setattr(loading, "MINIS", {"tiny": TINY})
    loaded = load_model("tiny")
    assert loaded.weights_hash == digest
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight.half().float()), name
    text = "def add(a, b): return"
    assert loaded.tokenizer.decode(loaded.encode([text])[0]) == text
    assert loaded.encode([text])[0] == trained.tokenizer.encode(text).ids
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"steps": 0}, "steps=0: use 1 or more"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"lr": 3.0}, "lr=3.0"),
        ({"precision": "int8"}, "'int8'.*float32"),
    ],
)
def test_train_config_refuses_bad_settings(setting, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**setting)


def test_train_config_lr_at_warms_up_peaks_and_decays():
    config = TrainConfig(steps=100, warmup=10, lr=1e-2)
    rates = [config.lr_at(step) for step in range(100)]
    assert max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 3e-4
    assert rates[9:] == sorted(rates[9:], reverse=True)
