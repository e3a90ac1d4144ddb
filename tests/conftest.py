"""Shared fixtures: tiny models of the real classes, made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; read when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from signlattice.data import corpus
from signlattice.models.loading import LoadedModel, load_model

# workers of pytest-xdist share the cores
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
settings.register_profile("patient", deadline=None)  # cores are few and shared
settings.load_profile("patient")

TEXTS = [
    'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n' * 4,
    "class Graph:\n    def __init__(self, edges):\n        self.edges = list(edges)\n" * 4,
    "import math\n\nprint(math.sqrt(2))\n" * 4,
]


def thinned(cases: Iterable, every: int) -> list:
    """Mark all cases but one of ``every`` as exhaustive: `make test-all` runs those too."""
    return [
        case if number % every == 0 else pytest.param(case, marks=pytest.mark.exhaustive)
        for number, case in enumerate(cases)
    ]


def documents(side: str, repeat: int = 4) -> tuple[corpus.Document, ...]:
    """Short documents of one side of a text."""
    return tuple(
        corpus.Document(side, f"{side}/{i}.py", f"# {side}\n" + text * repeat, side)
        for i, text in enumerate(TEXTS)
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small matrices: two threads on cores that are shared wait for each other, not compute."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Without a graph of gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def texts() -> list[str]:
    """Three small documents of source code."""
    return TEXTS


@pytest.fixture
def small_corpus(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts the small documents, each ``repeat`` times, in place of the corpus."""

    def put(repeat: int = 1) -> None:
        def documents(split: str) -> tuple[corpus.Document, ...]:
            return tuple(
                corpus.Document(split, f"{split}/{i}.py", f"# {split}\n" + text * repeat, split)
                for i, text in enumerate(texts)
            )

        monkeypatch.setattr(corpus, "documents", documents)

    return put


def _save(model, folder: Path) -> Path:
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # attention that is not uniform
    model.save_pretrained(folder)
    end = corpus.END_OF_DOCUMENT
    tokenizer = corpus.train_tokenizer(TEXTS, 300)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def olmoe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE checkpoint: 2 layers, 4 heads of 16, mixture of 4 experts."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(OlmoeForCausalLM(config), tmp_path_factory.mktemp("tiny") / "olmoe")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint: 4 query heads on 2 KV heads of 16, no QK-norm."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Gemma-4 checkpoint: heads of 16 (a window of 8 tokens) and of 32, one KV head.

    Layers 3 and 4 read the keys of layers 1 and 2.
    """
    torch.manual_seed(2)
    config = Gemma4TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        sliding_window=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(Gemma4ForCausalLM(config), tmp_path_factory.mktemp("tiny") / "gemma")


@pytest.fixture(scope="session")
def gemma_moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma-4 mixture: 2 KV heads of 16 under a window, 1 of 32 whose keys are values."""
    torch.manual_seed(3)
    config = Gemma4TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_global_key_value_heads=1,
        global_head_dim=32,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(Gemma4ForCausalLM(config), tmp_path_factory.mktemp("tiny") / "gemma_moe")


@pytest.fixture
def gemma(gemma_folder: Path) -> LoadedModel:
    """The tiny dense Gemma-4, loaded."""
    return load_model(gemma_folder)


@pytest.fixture
def gemma_moe(gemma_moe_folder: Path) -> LoadedModel:
    """The tiny Gemma-4 mixture, loaded."""
    return load_model(gemma_moe_folder)


@pytest.fixture
def olmoe(olmoe_folder: Path) -> LoadedModel:
    """The tiny OLMoE, loaded."""
    return load_model(olmoe_folder)


@pytest.fixture
def llama(llama_folder: Path) -> LoadedModel:
    """The tiny Llama, loaded."""
    return load_model(llama_folder)
