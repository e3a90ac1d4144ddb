"""Logits in pieces: the model's own, and no more of them at once than is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from signlattice.evaluation import logits
from signlattice.evaluation.logits import (
    ExactStates,
    exact_states,
    hidden_states,
    logit_pieces,
    token_metrics,
)
from signlattice.models.loading import load_model
from signlattice.models.passages import Passage

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# They scale their logits, cap them, add a bias, or call their decoder by another name.
FAMILIES = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_logit_pieces_are_the_models_own_logits(kind, monkeypatch):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | FAMILIES[kind]))
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 50, (2, 11))
    monkeypatch.setattr(logits, "PIECE_BYTES", 4 * 2 * 50 * 4)  # four tokens
    found = list(logit_pieces(model, hidden_states(model, ids, use_cache=False)))
    assert [part for part, _ in found] == [slice(0, 4), slice(4, 8), slice(8, 11)]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([piece for _, piece in found], 1), whole)


def test_logit_pieces_leave_the_model_as_it_was(llama_folder):
    model = load_model(llama_folder).model
    decoder = model.model
    pieces = logit_pieces(model, torch.zeros(1, 4, 64))
    next(pieces)
    assert model.model is decoder
    with pytest.raises(RuntimeError):
        list(logit_pieces(model, torch.zeros(1, 4, 63)))
    assert model.model is decoder


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_token_metrics_do_not_depend_on_the_pieces(tokens, llama_folder, monkeypatch):
    model = load_model(llama_folder).model
    exact, coded = torch.randn(2, 2, 13, 64)
    targets = torch.randint(0, 300, (2, 13))
    monkeypatch.setattr(logits, "PIECE_BYTES", 4 * 2 * 300 * tokens)
    found = token_metrics(model, coded, targets, exact)
    log_e, log_p = (model.lm_head(states).log_softmax(-1) for states in (exact, coded))
    torch.testing.assert_close(found.nll, -log_p.gather(-1, targets[..., None])[..., 0])
    kl = torch.nn.functional.kl_div(log_p, log_e, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.agree, (log_e.argmax(-1) == log_p.argmax(-1)).float())


def test_exact_states_go_to_files_when_they_are_many(llama_folder, monkeypatch):
    loaded = load_model(llama_folder)
    pieces = [Passage("d", torch.arange(n), n) for n in (9, 5, 7)]
    in_memory = exact_states(loaded, pieces)
    monkeypatch.setattr(logits, "KEPT", 4 * 64 * 10)
    on_disk = exact_states(loaded, pieces)
    assert on_disk._files and not in_memory._files
    assert all(torch.equal(in_memory[i], on_disk[i]) for i in range(3))
    assert [number in on_disk for number in (0, 2, 3)] == [True, True, False]
    assert 0 not in ExactStates()


PEAK = """
import json, resource, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.data.corpus import Document
from signlattice.evaluation import logits, through_cache
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.loading import LoadedModel
import signlattice.cache.sign_key_cache

torch.set_num_threads(1)
context = 1024
logits.PIECE_BYTES = 2**22

def judged(vocabulary):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0")
    loaded = LoadedModel("tiny", LlamaForCausalLM(config).eval(), fast, "", context)
    text = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, vocabulary, 3000))
    documents = [Document("p", "a", text, "evaluation")]
    judge = Judge(loaded, documents, documents, QualityConfig(2, 1, 1))
    return judge.row(None, CacheConfig(key_format="int8", value_format="int8", window=8))

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

judged(512)  # what the first call imports and compiles
before = peak()
row = judged(65536)
print(json.dumps([peak() - before, 4 * context * 65536, row["kl"]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is asked for otherwise")
@pytest.mark.slow
def test_judge_holds_no_window_of_logits():
    """At 8192 tokens of a vocabulary of 262,144 a window's logits would take 8.6 GB."""
    # whatever has 64 KB or more goes back to the system as soon as it is free
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    taken, window, kl = json.loads(done.stdout.splitlines()[-1])
    assert abs(kl) < 1e-3
    assert taken < window / 2  # 268 MB; the pieces stay
