from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoTokenizer,
    BertConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    T5Config,
)

from signlattice import hub
from signlattice.cli import main
from signlattice.errors import InputError, IntegrityError
from signlattice.hub import Repository, Unreachable
from signlattice.models import checkpoint as checkpoint_module
from signlattice.models import full_size
from signlattice.models.checkpoint import weights_hash
from signlattice.models.full_size import load_full, preflight, record_name
from signlattice.models.hooks import attention_layers
from signlattice.models.minis import REPOSITORIES

SHA = "c0ffee" + "0" * 34
IDS = torch.arange(3, 23)[None]
GEMMA = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=8,
    num_attention_heads=4,
    head_dim=16,
    global_head_dim=32,
    vocab_size_per_layer_input=300,
    max_position_embeddings=64,
    final_logit_softcapping=30.0,
    pad_token_id=0,
)
PER_LAYER = dict(hidden_size_per_layer_input=8, num_kv_shared_layers=2)
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
    ),
    "e2b": lambda: Gemma4TextConfig(
        num_key_value_heads=1, use_double_wide_mlp=True, **GEMMA, **PER_LAYER
    ),
    "e4b": lambda: Gemma4TextConfig(num_key_value_heads=2, **GEMMA, **PER_LAYER),
    "moe": lambda: Gemma4TextConfig(
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        **GEMMA,
    ),
}


def built(kind: str, dtype: torch.dtype = torch.float32):
    """Weights in ``dtype``; what is not saved, such as frequencies of RoPE, stays in fp32."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = OlmoeForCausalLM(config) if kind == "olmoe" else Gemma4ForCausalLM(config)
    for weight in model.state_dict(keep_vars=True).values():
        weight.data = weight.data.to(dtype)
    return model.eval()


def saved(model, folder: Path, like: Path) -> Path:
    """In shards, with the tokenizer of another checkpoint."""
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path, olmoe_folder) -> Path:
    """A tiny OLMoE in shards."""
    return saved(built("olmoe"), tmp_path / "olmoe", olmoe_folder)


def load(folder: Path | str, **options):
    return load_full(str(folder), **{"context": 64, "device_map": "cpu"} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_load_full_computes_from_a_sharded_checkpoint_what_was_saved(
    kind, dtype, tmp_path, olmoe_folder
):
    model = built(kind, dtype)
    loaded = load(saved(model, tmp_path, olmoe_folder), device_map="auto")
    assert loaded.model.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.weights_hash == weights_hash(tmp_path)
    assert loaded.tokenizer.decode(loaded.encode(["def f(a):"])[0]) == "def f(a):"


def test_load_full_computes_the_logits_of_a_multimodal_checkpoint_by_its_decoder(
    tmp_path, olmoe_folder
):
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=16,
    )
    config = Gemma4Config(
        text_config=CONFIGS["e2b"](),
        vision_config=vision,
        image_token_id=290,
        video_token_id=291,
        audio_token_id=292,
    )
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config).eval()
    loaded = load(saved(model, tmp_path, olmoe_folder))
    assert type(loaded.model) is Gemma4ForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(input_ids=IDS).logits)


def test_load_full_may_be_asked_for_another_dtype(checkpoint):
    half, full = (preflight(str(checkpoint), context=64, dtype=d) for d in ("bfloat16", "float32"))
    assert load(checkpoint, dtype="bfloat16").model.dtype == torch.bfloat16
    logits = 64 * 300
    assert half.memory_bytes == 2 * half.parameters + 6 * logits
    assert full.memory_bytes == 4 * half.parameters + 8 * logits
    with pytest.raises(InputError, match="dtype='int8': choose auto, float32"):
        load(checkpoint, dtype="int8")


@pytest.mark.parametrize("kind", CONFIGS)
def test_preflight_counts_what_the_model_has(kind, tmp_path, olmoe_folder):
    model = built(kind)
    found = preflight(str(saved(model, tmp_path, olmoe_folder)), context=64)
    assert found.parameters == model.num_parameters()
    owned = [layer for layer in attention_layers(model).values() if layer.owns_keys]
    assert sum(n * h * d for n, h, d in found.keys) == sum(
        each.n_heads * each.head_dim for each in owned
    )


def test_full_size_counts_olmoe_as_large_as_its_paper_says():
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024))
    total, active = full_size._parameters(model)
    table = 50304 * 2048
    assert round(total / 1e9, 1) == 6.9  # Muennighoff et al. (2024), arXiv 2409.02060
    assert round((active + table) / 1e9, 1) == 1.3


@pytest.mark.parametrize("context", [1, 65, 2048])
def test_load_full_tells_of_a_context_that_the_model_does_not_have(checkpoint, context):
    with pytest.raises(InputError, match="windows of 2 to 64 tokens"):
        load(checkpoint, context=context)


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(BertConfig(), "BertForMaskedLM"), (T5Config(), "T5ForConditionalGeneration")],
)
def test_load_full_tells_of_a_model_without_a_decoder_of_its_own(checkpoint, config, architecture):
    config.architectures = [architecture]
    config.save_pretrained(checkpoint)
    with pytest.raises(InputError, match=f"{architecture}.*not a decoder"):
        load(checkpoint)


def test_load_full_refuses_code_of_a_repository(checkpoint):
    change_config(checkpoint, auto_map={"AutoModelForCausalLM": "own.Model"})
    with pytest.raises(InputError, match="auto_map.*not run"):
        load(checkpoint)


def test_load_full_tells_of_an_unknown_architecture(checkpoint):
    change_config(checkpoint, model_type="none-such")
    with pytest.raises(InputError, match="config.json of .* cannot be used .*none-such"):
        load(checkpoint)


def test_load_full_refuses_pickles(checkpoint):
    for file in checkpoint.glob("model*"):
        file.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pytorch_model.bin alone, a pickle"):
        load(checkpoint)


def test_load_full_names_a_shard_cut_short(checkpoint):
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{shard.name} is damaged or cut short"):
        load(checkpoint)


def test_load_full_names_a_shard_that_is_missing(checkpoint):
    shard = sorted(checkpoint.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(IntegrityError, match=f"{shard.name} is missing, which model.safetensors.i"):
        load(checkpoint)


def test_load_full_tells_of_an_index_that_leaves_weights_out(checkpoint):
    shard = sorted(checkpoint.glob("model-*.safetensors"))[-1]
    index = checkpoint / checkpoint_module.INDEX
    plain = json.loads(index.read_text())
    plain["weight_map"] = {k: v for k, v in plain["weight_map"].items() if v != shard.name}
    index.write_text(json.dumps(plain))
    with pytest.raises(IntegrityError, match=r"lacks \d+ weights of its decoder"):
        load(checkpoint)


def test_load_full_tells_of_a_missing_tokenizer(checkpoint):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer in"):
        load(checkpoint)


def test_load_full_tells_of_a_tokenizer_that_is_damaged(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer in .* cannot be read"):
        load(checkpoint)


def test_load_full_tells_of_too_little_memory_with_the_estimate(checkpoint, monkeypatch):
    monkeypatch.setattr(full_size, "get_max_memory", lambda: {"cpu": 1000})
    with pytest.raises(InputError, match=r"GB of memory in float32.*1e-06 GB free.*bfloat16"):
        load(checkpoint)


def test_load_full_tells_of_a_device_that_is_not_there(checkpoint, monkeypatch):
    monkeypatch.setattr(full_size, "get_max_memory", lambda: {"cpu": 10**9})
    with pytest.raises(InputError, match="'cuda:7': there is no such device"):
        load(checkpoint, device_map="cuda:7")


def test_load_full_takes_no_revision_of_a_folder(checkpoint):
    with pytest.raises(InputError, match="leave it out"):
        load(checkpoint, revision="main")


# On the hub: its answers are set beforehand, its cache is a real one.


@pytest.fixture
def on_hub(checkpoint, tmp_path, monkeypatch):
    """`checkpoint` as owner/tiny on the hub, of which the cache has only config.json.

    Returns the folder of the commit in the cache; downloads are copies into it.
    """
    cache = tmp_path / "cache"
    store = cache / "models--owner--tiny"
    snapshot = store / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(SHA)
    shutil.copy(checkpoint / "config.json", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    sizes |= {"onnx/model.onnx": 10**15, "pytorch_model.bin": 10**15, "README.md": 10}

    def resolve(name, revision=None, kind="model"):
        assert (name, revision) == ("owner/tiny", "v1")
        return Repository(name, SHA, sizes)

    def download(name, *, revision, allow_patterns):
        assert (name, revision) == ("owner/tiny", SHA)
        for file in allow_patterns:
            shutil.copy(checkpoint / file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(full_size, "snapshot_download", download)
    monkeypatch.setattr(
        full_size,
        "try_to_load_from_cache",
        lambda name, file, revision: str(p) if (p := snapshot / file).is_file() else None,
    )
    return snapshot


def test_load_full_fetches_a_model_on_the_hub_at_its_commit(on_hub, checkpoint):
    loaded = load("owner/tiny", revision="v1")
    assert loaded.name == f"owner/tiny@{SHA}"
    assert loaded.weights_hash == weights_hash(checkpoint)
    assert preflight("owner/tiny", revision="v1", context=64).download_bytes == 0


def test_preflight_names_a_shard_in_the_cache_that_was_cut_short(on_hub):
    load("owner/tiny", revision="v1")
    shard = sorted(on_hub.glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{shard.name} is damaged.*delete .* fetch it again"):
        preflight("owner/tiny", revision="v1", context=64)


def test_preflight_counts_only_what_is_needed_as_to_fetch(on_hub, checkpoint):
    found = preflight("owner/tiny", revision="v1", context=64)
    needed = sum(f.stat().st_size for f in checkpoint.iterdir() if f.name != "config.json")
    assert found.download_bytes == needed
    assert [file.name for file in on_hub.iterdir()] == ["config.json"]


def test_load_full_tells_of_too_little_disk_before_anything_is_fetched(on_hub, monkeypatch):
    full = lambda folder: shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(InputError, match="GB to write.*GB free: make room.*HF_HUB_CACHE"):
        load("owner/tiny", revision="v1")
    assert [file.name for file in on_hub.iterdir()] == ["config.json"]


def test_load_full_without_a_network_takes_the_cache_if_it_is_whole(
    on_hub, checkpoint, monkeypatch
):
    from huggingface_hub import snapshot_download

    def unreachable(*arguments):
        raise Unreachable("out of reach")

    monkeypatch.setattr(hub, "resolve", unreachable)
    monkeypatch.setattr(full_size, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="no model.*safetensors"):
        load("owner/tiny")
    shutil.copytree(checkpoint, on_hub, dirs_exist_ok=True)
    assert load("owner/tiny").name == f"owner/tiny@{SHA}"
    with pytest.raises(Unreachable):
        load("owner/other")


def test_cli_estimate_prints_what_a_model_takes_and_fetches_nothing(on_hub, capsys):
    arguments = [
        "estimate",
        "owner/tiny",
        "--revision",
        "v1",
        "--context",
        "64",
        "--tokens",
        "1000",
    ]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert f"owner/tiny@{SHA}" in told and "2 layers of 4 heads of 16" in told
    assert "keys of 1,000 tokens" in told and "8 × H100 SXM" in told
    assert [file.name for file in on_hub.iterdir()] == ["config.json"]


def test_cli_estimate_says_why_not(tmp_path, capsys):
    assert main(["estimate", str(tmp_path)]) == 1
    assert "not a transformers checkpoint" in capsys.readouterr().err


def test_preflight_knows_the_papers_models_by_their_short_names(monkeypatch):
    def resolve(name, revision=None, kind="model"):
        raise InputError(f"asked for {name}")

    monkeypatch.setattr(hub, "resolve", resolve)
    for name, repository in REPOSITORIES.items():
        with pytest.raises(InputError, match=f"asked for {repository}$"):
            preflight(name)


def test_record_name_is_made_of_words():
    assert [record_name(name) for name in REPOSITORIES] == list(REPOSITORIES)
    assert record_name("meta-llama/Llama-3.1-8B") == "meta-llama--Llama-3.1-8B"
    assert record_name("/data/my models/tiny/") == "tiny"
    with pytest.raises(InputError, match="give a name"):
        record_name("/")
