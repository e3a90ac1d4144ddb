from __future__ import annotations

from pathlib import Path

import pytest
import torch

from signlattice.data import corpus
from signlattice.errors import InputError, IntegrityError
from signlattice.models import passages as evaluate
from signlattice.rotations import fixed
from signlattice_paper.experiments import fidelity, scores

CONFIG = fidelity.FidelityConfig(
    passages=1, dtypes=("float32", "float16"), value_bits=(16, 4), sinks=2, recent=3
)


@pytest.fixture
def steps(olmoe, small_corpus):
    small_corpus(8)
    read = evaluate.passages(olmoe, corpus.documents("evaluation"), 1)
    passages = scores.whole_passages(read, olmoe.context, CONFIG.passages)
    return fidelity.decode_steps(olmoe, passages, CONFIG)


def test_attention_rows_of_the_reference_are_as_near_as_the_dtype_allows(steps):
    rows = fidelity.attention_rows(steps, ("torch",), CONFIG)
    assert len(rows) == 2 * 2 * 2  # layers, dtypes, bits
    for row in rows:
        assert row["error"] <= 2 * row["plain"] + 1e-6, row
        assert 0 < row["plain"] < (1e-5 if row["dtype"] == "float32" else 1e-2), row


def test_pack_rows_flip_more_signs_with_fewer_digits_and_only_near_zero():
    keys = torch.randn(1, 2, 1000, 16)
    turned = torch.stack([fixed.srht(16, head) for head in range(2)])
    step = fidelity.Step(keys[:, :, 0], keys, keys, turned)
    rows = fidelity.pack_rows({0: step}, ("torch",), fidelity.FidelityConfig())
    flipped = {row["dtype"]: row["flipped"] for row in rows}
    assert flipped["float32"] <= flipped["float16"] < flipped["bfloat16"] < 0.005


def test_worst_is_the_largest_of_each_group():
    rows = [{"a": 1, "b": 2.0, "c": 9}, {"a": 1, "b": 1.0, "c": 10}, {"a": 2, "b": 0.5, "c": 1}]
    assert fidelity.worst(rows, ["a"], ["b", "c"]) == [
        {"a": 1, "b": 2.0, "c": 10},
        {"a": 2, "b": 0.5, "c": 1},
    ]


def test_relative_error_of_nan_is_infinite():
    assert fidelity.relative_error(torch.tensor([torch.nan, 1.0]), torch.ones(2)) == torch.inf


def test_compiled_rows_have_a_row_for_each_launch(tmp_path):
    program = tmp_path / "compile.py"
    program.write_text(
        "import json, os, sys\n"
        "assert 'TRITON_INTERPRET' not in os.environ\n"
        "launch = {'kernel': '_pack_kernel', 'registers': 7, 'spilled': 0, 'shared': 16}\n"
        "print(json.dumps({'case': 'pack, d=16', 'launches': [launch]}))\n"
        "if sys.argv[1] == '90':\n"
        "    print(json.dumps({'case': 'nearest, d=16', 'error': 'refused'}))\n",
        encoding="utf-8",
    )
    (row,) = fidelity.compiled_rows(program, 80)
    assert row["kernel"] == "pack: pack kernel" and row["case"] == "pack, d=16"
    assert (row["arch"], row["registers"], row["spilled"], row["shared"]) == (80, 7, 0, 16)
    with pytest.raises(IntegrityError, match="sm_90, nearest, d=16: refused"):
        fidelity.compiled_rows(program, 90)


def test_compiled_rows_want_a_program():
    with pytest.raises(InputError, match="nowhere.py"):
        fidelity.compiled_rows(Path("nowhere.py"), 80)
