"""What pages share of the real model: its records, averages of them, and a table for the README."""

from __future__ import annotations

import pytest

from signlattice.errors import InputError
from signlattice.models.gguf import GEMMA_3_270M
from signlattice_paper import real_model, tables
from signlattice_paper.experiments.lengths import LengthsConfig, caches


def test_real_model_is_the_packaged_one():
    assert real_model.MODEL == GEMMA_3_270M.name


def test_mean_beta_averages_the_layers_that_see_all_tokens_unless_others_are_given():
    record = real_model.fingerprint()
    full = real_model.full_layers(record)
    each = [real_model.mean_beta(record, "srht", "none", layers=[layer]) for layer in full]
    assert real_model.mean_beta(record, "srht", "none") == pytest.approx(sum(each) / len(full))
    rows = tables.select(record.table("beta"), rotation="srht", centering="none", text="wiki")
    assert each == [row["beta"] for row in rows if row["layer"] in full]


def test_mean_beta_and_cache_row_refuse_what_was_not_measured():
    with pytest.raises(InputError, match=r"no β was measured in layers \[99\]"):
        real_model.mean_beta(real_model.fingerprint(), "srht", "none", layers=[99])
    with pytest.raises(InputError, match="no cache 'int3' was judged at 2048 tokens"):
        real_model.cache_row(real_model.lengths(), "int3", 2048)


def test_summary_has_a_row_for_each_cache_and_none_where_nothing_was_measured():
    rows = real_model.summary(real_model.lengths())
    assert [row["cache"] for row in rows] == list(real_model.SHOWN.values())
    (short,) = (row for row in rows if "no window" in str(row["cache"]))
    assert short["kl_2048"] is not None and short["kl_16384"] is None
    listed = {*caches(LengthsConfig()), "long lattice, V int4"}
    assert set(real_model.SHOWN) <= listed
