from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sweep_models import read_table, tried

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = ("opt", "llama4_text", "gpt2", "moshi", "deepseek_v3", "doge", "diffllama", "bloom")


def test_table_has_every_class_of_the_installed_transformers():
    rows = read_table()
    assert set(rows) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(row.reason for row in rows.values() if row.verdict != "equal")


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ],
)
def test_tried_gives_the_row_of_the_table(model_type):
    assert tried(model_type) == read_table()[model_type]
