"""Records: what is saved comes back, and what is wrong is told before it costs anything."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signlattice.errors import InputError, IntegrityError
from signlattice.io import check_writable, write_text
from signlattice_paper import records
from signlattice_paper.records import Metric, RunRecord

METRICS = {
    "itq": {"beta": Metric(0.91, n=10, low=0.90, high=0.92), "gap": Metric(1.5, std=0.1)},
    "losses": [{"step": 1, "loss": 3.5, "note": None}, {"step": 2, "loss": 2.5, "note": "end"}],
    "empty": [],
}


@dataclass(frozen=True)
class Config:
    steps: int = 3
    lr: float = 0.1


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    run = records.begin("lab", "mini", config=Config(), seeds=(0, 1), results=tmp_path / "results")
    return run.finish(METRICS)


def test_run_record_comes_back_as_it_was_saved(record: RunRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "record.json")
    loaded = records.load(path)
    assert loaded.metric("itq.beta") == METRICS["itq"]["beta"]
    assert loaded.metric("itq.gap").std == 0.1
    assert loaded.table("losses") == tuple(METRICS["losses"])
    assert loaded.table("empty") == ()
    assert loaded.config == asdict(Config()) and loaded.seeds == (0, 1)
    assert replace(loaded, seconds=0) == replace(record, seconds=0)
    assert loaded.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_run_record_save_leaves_a_file_that_is_sorted_rounded_and_alone(
    record: RunRecord, tmp_path: Path
) -> None:
    long = replace(record, metrics={"x": Metric(math.pi), "a": Metric(1.0)})
    text = long.save(tmp_path / "one" / "record.json").read_text()
    assert json.loads(text)["metrics"]["x"] == {"value": 3.1415927}
    assert text.index('"a"') < text.index('"x"') and text.endswith("}\n")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["record.json"]


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e9))
def test_metric_rounding_keeps_eight_digits_and_stays(value: float, std: float) -> None:
    once = records._plain(Metric(value, std=std), "m")
    assert once["value"] == pytest.approx(value, rel=1e-7, abs=1e-300)
    assert records._plain(Metric(**once), "m") == once


def test_run_record_knows_where_it_comes_from(record: RunRecord) -> None:
    assert record.versions["python"].count(".") == 2
    assert {"torch", "numpy", "signlattice"} <= set(record.versions)
    assert record.started.endswith("+00:00") and record.seconds >= 0
    assert "threads" in record.device


def test_run_finish_can_take_the_wall_time_of_a_resumed_run(tmp_path: Path) -> None:
    run = records.begin("lab", "mini", config={}, results=tmp_path)
    assert run.finish({}, seconds=1800.0).seconds == 1800.0


def _git(folder: Path, *arguments: str) -> None:
    name = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
    name |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | name, check=True, capture_output=True
    )


def test_source_state_is_the_commit_of_the_tree_itself(tmp_path: Path) -> None:
    assert records.source_state(tmp_path) == (None, None)
    _git(tmp_path, "init", "-q")
    assert records.source_state(tmp_path) == (None, None)
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-qm", "a")
    commit, dirty = records.source_state(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "a").write_text("2")
    assert records.source_state(tmp_path) == (commit, True)
    (tmp_path / "inner").mkdir()
    assert records.source_state(tmp_path / "inner") == (None, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"value": math.nan}, "value=nan"),
        ({"value": 1.0, "std": -1.0}, "std=-1.0"),
        ({"value": 1.0, "n": 0}, "n=0"),
        ({"value": 1.0, "low": 0.5}, "both low and high"),
        ({"value": 1.0, "low": 1.5, "high": 2.0}, "outside its interval"),
        ({"value": "1"}, "value='1'"),
        ({"value": True}, "value=True"),
    ],
)
def test_metric_is_finite_and_inside_its_interval(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Metric(**arguments)


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"a": 1.0}, r"metrics\.a is a float"),
        ({"a": {"b.c": Metric(1.0)}}, "b.c"),
        ({"a": [{"x": 1}, {"y": 1}]}, r"a\[1\].*same keys"),
        ({"a": [{"x": math.inf}]}, r"a\[0\]\.x is inf"),
        ({"a": [{"x": [1]}]}, r"x is a list"),
        ({"a": [1, 2]}, r"a\[0\]"),
    ],
)
def test_run_finish_refuses_metrics_of_another_shape(
    metrics: dict, told: str, tmp_path: Path
) -> None:
    run = records.begin("lab", "mini", config={}, results=tmp_path)
    with pytest.raises(InputError, match=told):
        run.finish(metrics)


def test_read_names_the_command_that_makes_a_missing_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make lab LAB=ablation MODEL=mini") as caught:
        records.read("ablation", "mini", tmp_path)
    assert "\n" not in str(caught.value) and "ablation/mini.json" in str(caught.value)


def test_read_refuses_a_record_in_another_records_place(record: RunRecord, tmp_path: Path) -> None:
    record.save(records.records_path("other", "mini", tmp_path))
    with pytest.raises(IntegrityError, match="record of lab/mini"):
        records.read("other", "mini", tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_records_path_keeps_names_inside_the_folder(name: str) -> None:
    with pytest.raises(InputError, match="use letters"):
        records.records_path(name, "mini")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("device"), "lacks device"),
        (lambda c: c.update(schema=99), "schema 99"),
        (lambda c: c.update(extra=1), "unknown extra"),
        (lambda c: c.update(seconds="1"), "seconds is a str"),
        (lambda c: c["metrics"].update(x={"value": 1.0, "median": 2}), "median"),
        (lambda c: c["metrics"].update(x={"value": 1.0, "low": 2.0, "high": 3.0}), "outside"),
        (lambda c: c["metrics"].update(x=3), "x is a int"),
    ],
)
def test_load_refuses_a_damaged_record(
    change, told: str, record: RunRecord, tmp_path: Path
) -> None:
    path = record.save(tmp_path / "record.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=told) as caught:
        records.load(path)
    assert "\n" not in str(caught.value)


def test_load_refuses_a_record_that_was_changed_and_reads_one_without_a_hash(
    record: RunRecord, tmp_path: Path
) -> None:
    path = record.save(tmp_path / "record.json")
    saved = records.load(path)
    content = json.loads(path.read_text())
    assert saved.content_hash == content[records.HASH]
    content["metrics"]["itq"]["beta"]["value"] = 0.911
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="was changed after it was written: restore it"):
        records.load(path)
    content["metrics"]["itq"]["beta"]["value"] = 0.91
    del content[records.HASH]
    path.write_text(json.dumps(content))
    assert records.load(path) == saved and records.load(path).content_hash is None


def test_load_refuses_half_a_file(record: RunRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "record.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(IntegrityError, match="not JSON"):
        records.load(path)


@pytest.mark.parametrize("name", ["itq.gamma", "itq", "losses.x", "losses"])
def test_run_record_metric_names_one_that_is_not_there(name: str, record: RunRecord) -> None:
    with pytest.raises(InputError, match=name.split(".")[-1]):
        record.metric(name)


def test_begin_tells_an_unwritable_folder_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot write to .*results") as caught:
        records.begin("lab", "mini", config={}, results=tmp_path / "results")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_tells_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path)


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
