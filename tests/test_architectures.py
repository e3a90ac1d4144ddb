from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from conftest import TEXTS, thinned
from processes import run_workers
from signlattice import hadamard
from signlattice.alignment import haar_beta
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError, IntegrityError
from signlattice.models import passages as evaluate
from signlattice.models.capture import open_bank
from signlattice.models.loading import LoadedModel, load_model
from signlattice.models.passages import batches, passages
from signlattice_paper.experiments import architectures
from signlattice_paper.experiments.architectures import (
    ArchitectureConfig,
    configured,
    load,
    measure,
    n_parts,
    prepare,
)
from test_fullsize import CONFIGS, built, saved

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ArchitectureConfig(
    keys_per_dim=20,
    n_held_out=400,
    seeds=(0, 1),
    context=48,
    n_passages=6,
    batch_size=3,
    solver="itq",
    steps=8,
)


@pytest.fixture(scope="module")
def text() -> Text:
    sides = {
        side: tuple(
            Document(side, f"{side}/{i}.py", f"# {side}\n" + content * 8, side)
            for i, content in enumerate(TEXTS)
        )
        for side in ("calibration", "evaluation")
    }
    return Text("corpus", "corpus", **sides)


def short(name) -> LoadedModel:
    return dataclasses.replace(load_model(name), context=48)


@pytest.fixture(scope="module")
def olmoe48(olmoe_folder):
    return short(olmoe_folder)


@pytest.fixture(scope="module")
def gemma48(gemma_folder):
    return short(gemma_folder)


@pytest.fixture(scope="module", params=thinned(CONFIGS, every=2))
def run(request, text, olmoe_folder, tmp_path_factory):
    """A model of each of the four classes, what was measured of it, and what was told meanwhile.

    Loaded as a model of full size is: from shards, some of them in bf16.
    """
    kind, folder, told = request.param, tmp_path_factory.mktemp("run"), []
    dtype = torch.bfloat16 if kind in ("olmoe", "moe") else torch.float32
    checkpoint = saved(built(kind, dtype), folder / "checkpoint", olmoe_folder)
    loaded = load(str(checkpoint), CONFIG, device_map="cpu")
    assert loaded.model.dtype == dtype
    return loaded, measure(loaded, text, CONFIG, folder, told.append), told


def test_measure_has_rows_for_every_head_and_layer(run):
    loaded, measured, told = run
    layers = [row for row in measured.tables["layers"] if row["index"] == row["source"]]
    heads = {(row["index"], head) for row in layers for head in range(row["n_heads"])}
    rows = measured.tables["heads"]
    for method in ("none", "dc", "token_mean"):
        per_head = [r for r in rows if (r["scope"], r["centering"]) == ("head", method)]
        assert {(r["layer"], r["head"]) for r in per_head} == heads
        widths = {(r["layer"], r["d"]) for r in rows if r["scope"] == "layer"}
        assert widths == {(r["index"], r["n_heads"] * r["head_dim"]) for r in layers}
    assert sum(not part.startswith("captured") for part in told) == n_parts(loaded, CONFIG)


def test_measure_finds_learning_ahead_in_sample_and_the_null_to_be_noise(run):
    tables = run[1].tables
    for row in tables["heads"]:
        assert row["in_sample"] > row["srht"]
        assert all(0 < row[name] <= 1 for name in architectures.ROTATIONS)
    for row in tables["null"]:
        assert row["in_sample"] > row["held_out"]
        assert row["held_out"] == pytest.approx(haar_beta(row["d"]), abs=0.03)
        assert row["keys_per_dim"] == row["n_keys"] / row["d"]


def test_measure_gives_the_means_and_spreads_of_the_heads(run):
    tables = run[1].tables
    for summary in tables["beta"]:
        chosen = [
            row[summary["rotation"]]
            for row in tables["heads"]
            if (row["scope"], row["centering"]) == (summary["scope"], summary["centering"])
        ]
        values = torch.tensor(chosen, dtype=torch.float64)
        assert summary["n_heads"] == len(values)
        assert summary["beta"] == pytest.approx(values.mean().item())
        assert summary["head_std"] == pytest.approx(values.std().item())
        assert (summary["lowest"], summary["highest"]) == (min(chosen), max(chosen))


def test_measure_gives_lifts_that_are_differences_of_means(run):
    tables = run[1].tables
    beta = {(r["scope"], r["centering"], r["rotation"]): r["beta"] for r in tables["beta"]}
    assert len(tables["lifts"]) == 2 * 2 * 4
    for row in tables["lifts"]:
        at = (row["scope"], row["rotation"])
        lift = beta[at[0], row["centering"], at[1]] - beta[at[0], "none", at[1]]
        assert row["lift"] == pytest.approx(lift)
        assert row["lowest"] <= row["lift"] <= row["highest"]


def test_measure_puts_all_keys_through_the_code_also_those_that_layers_share(run, text):
    loaded, measured, _ = run
    layers = measured.tables["layers"]
    assert sorted(measured.codec.layers) == sorted({row["source"] for row in layers})
    pieces = evaluate.spread(passages(loaded, text.evaluation, CONFIG.windows), 6)
    fed = sum(ids.numel() for _, ids, _ in batches(pieces, CONFIG.batch_size))
    assert measured.n_compressed == fed * sum(row["n_heads"] for row in layers)


def test_measure_finds_that_the_identity_on_the_lattice_costs_nothing(
    olmoe_folder, text, tmp_path, monkeypatch
):
    """Where keys are made signs of one length beforehand, the plainest code is exact."""
    loaded = short(olmoe_folder)
    for module in loaded.model.modules():
        if hasattr(module, "k_norm"):
            module.k_norm.register_forward_hook(lambda m, i, out: torch.where(out >= 0, 1.0, -1.0))
    monkeypatch.setattr(
        "transformers.models.olmoe.modeling_olmoe.apply_rotary_pos_emb",
        lambda q, k, cos, sin, **_: (q, k),
    )
    gaps = measure(loaded, text, CONFIG, tmp_path).tables["gaps"]
    plain = [r for r in gaps if r["rotation"] == "identity" and r["centering"] == "none"]
    assert all(row["gap"] == pytest.approx(0, abs=1e-3) for row in plain)
    assert any(row["gap"] > 0.01 for row in gaps if row["rotation"] == "srht")


@pytest.fixture(scope="module")
def whole(gemma48, text, tmp_path_factory):
    """What a run without interruption measures, and its scratch folder."""
    scratch = tmp_path_factory.mktemp("whole")
    return measure(gemma48, text, CONFIG, scratch), scratch


def test_measure_ends_with_the_same_tables_after_interruptions(whole, gemma48, text, tmp_path):
    measured, _ = whole
    n_told = 0

    def interrupt(part):
        nonlocal n_told
        n_told += 1
        if n_told in (2, 9, 30, 50):
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            measure(gemma48, text, CONFIG, tmp_path / "parts", interrupt)
    parts = measure(gemma48, text, CONFIG, tmp_path / "parts", interrupt)
    assert parts.tables == measured.tables
    assert (parts.exact, parts.n_compressed) == (measured.exact, measured.n_compressed)
    for layer, code in measured.codec.layers.items():
        assert torch.equal(code.basis, parts.codec.layers[layer].basis)


def prepare_share(folder: Path, text: Text, scratch: Path) -> None:
    with Workers.current() as workers:
        prepare(short(folder), text, CONFIG, scratch, workers=workers)


@pytest.mark.slow
def test_prepare_by_two_processes_leaves_the_files_of_one(whole, gemma_folder, text, tmp_path):
    assert run_workers(2, prepare_share, gemma_folder, text, tmp_path) == [0, 0]
    (alone,), (shared,) = whole[1].iterdir(), tmp_path.iterdir()
    assert alone.name == shared.name, "measure goes on from there"
    fits = sorted(file.name for file in alone.glob("*.*.*.*.safetensors"))
    fits = [name for name in fits if not name.startswith("losses")]
    assert fits == sorted(file.name for file in shared.glob("*.safetensors"))
    differ = [name for name in fits if (alone / name).read_bytes() != (shared / name).read_bytes()]
    assert not differ
    assert {part.parent.name for part in shared.glob("keys/*/00000")} == {"calibration", "held_out"}


def test_measure_does_not_make_a_finished_part_again_and_names_a_damaged_one(
    gemma48, text, tmp_path, monkeypatch
):
    measure(gemma48, text, CONFIG, tmp_path)
    original = architectures._measured
    seen = []
    monkeypatch.setattr(architectures, "_measured", lambda *a: seen.append(a) or original(*a))
    measure(gemma48, text, CONFIG, tmp_path)
    assert seen == []
    file = next(tmp_path.glob("*/1.head.dc.0.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="1.head.dc.0.safetensors is damaged .*delete it"):
        measure(gemma48, text, CONFIG, tmp_path)


def test_measure_makes_a_capture_cut_short_again_and_names_a_damaged_shard(gemma48, text, tmp_path):
    def stop(part):
        if part == "captured held_out":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(gemma48, text, CONFIG, tmp_path, stop)
    part = next(tmp_path.glob("*/keys/calibration/00000"))
    shard = next(part.glob("keys.0.*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        IntegrityError, match=f"{shard.name} is damaged or cut short: delete .* run again"
    ):
        measure(gemma48, text, CONFIG, tmp_path)
    (part / "index.json").unlink()  # as a capture that did not end leaves it
    measure(gemma48, text, CONFIG, tmp_path)
    with pytest.raises(IntegrityError, match="no finished capture"):
        open_bank(part)


def test_measure_keeps_its_parts_by_model_text_and_configuration(gemma48, olmoe48, text):
    fewer = dataclasses.replace(text, calibration=text.calibration[1:])
    runs = [
        (gemma48, text, CONFIG),
        (olmoe48, text, CONFIG),
        (gemma48, fewer, CONFIG),
        (gemma48, text, dataclasses.replace(CONFIG, steps=9)),
    ]
    assert len({architectures._identity(*run) for run in runs}) == 4


def test_measure_goes_by_heads_where_those_of_a_layer_have_no_hadamard_together(
    olmoe48, text, tmp_path, monkeypatch
):
    known = hadamard.supported_head_dim
    monkeypatch.setattr(hadamard, "supported_head_dim", lambda d: d < 64 and known(d))
    rows = measure(olmoe48, text, CONFIG, tmp_path).tables["beta"]
    assert {row["scope"] for row in rows} == {"head"}


def test_measure_takes_fewer_keys_without_harm_and_tells_of_none(gemma48, text, tmp_path):
    less = dataclasses.replace(text, calibration=text.calibration[:1])
    tables = measure(gemma48, less, CONFIG, tmp_path).tables
    assert {row["n_keys"] for row in tables["null"]} == {96}  # two windows
    some = dataclasses.replace(less.calibration[0], text="a = 1\n")
    with pytest.raises(InputError, match="calibration side .* has 7 tokens: give at least 16"):
        measure(gemma48, dataclasses.replace(text, calibration=(some,)), CONFIG, tmp_path)


def test_measure_tells_of_too_little_disk_for_the_keys_before_it_captures_them(
    gemma48, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 1000))
    told = []
    with pytest.raises(InputError, match=r"keys of \d+ tokens .*: .* GB free: make room"):
        measure(gemma48, text, CONFIG, tmp_path, told.append)
    assert told == []


def test_architectures_leaves_out_keys_that_are_zero_in_a_head():
    keys = torch.randn(2, 9, 4)
    keys[1, 3] = keys[:, 5] = 0
    left = architectures._nonzero(keys)
    assert torch.equal(left, keys[:, [0, 1, 2, 4, 6, 7, 8]])


def test_architectures_says_where_a_mean_does_not_cancel():
    from transformers import AutoConfig, AutoModelForCausalLM

    from signlattice.models.hooks import attention_layers

    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=5.0,
    )
    layers = attention_layers(AutoModelForCausalLM.from_config(config))
    rows = [architectures.layer_row(layer) for layer in layers.values()]
    assert [row["mean_cancels"] for row in rows] == [False, False]


def test_configured_knows_the_profiles_and_takes_changes_to_them():
    assert configured("mini") == ArchitectureConfig()
    full = configured("full", text="own.txt", context=512)
    assert (full.text, full.context, full.windows) == ("own.txt", 512, None)
    with pytest.raises(InputError, match="profile='huge': choose one of mini, full"):
        configured("huge")


@pytest.mark.parametrize(
    "change", [{"seeds": ()}, {"keys_per_dim": 0}, {"solver": "newton"}, {"batch_size": 0}]
)
def test_architecture_config_tells_of_settings_that_cannot_be(change):
    with pytest.raises(InputError):
        dataclasses.replace(CONFIG, **change)
