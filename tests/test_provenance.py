"""Every record is the one that its lab would make now; what is not is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from signlattice.errors import InputError
from signlattice.io import content_hash
from signlattice.models.minis import MINIS
from signlattice_paper import provenance, records

ROOT = Path(__file__).resolve().parents[1]
MODEL = "olmoe-mini"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's records, notebooks and claims, with its models and tests."""
    for folder in ("results", "book"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "claims.yml", tmp_path)
    for folder in ("models", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def told_by(project: Path, change: Callable[[], object], **options) -> list[str]:
    """The faults of a copy, which has none, after a change."""
    change()
    return provenance.faults(project, **options)


def in_json(path: Path, change: Callable[[dict], object]) -> Callable[[], object]:
    """A change to a record, as a run of its lab would have written it."""

    def do() -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        del content[records.HASH]
        content[records.HASH] = content_hash(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return do


def in_text(path: Path, old: str, new: str) -> Callable[[], object]:
    """A change to the first place where a text stands in a file."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    return lambda: path.write_text(text.replace(old, new, 1), encoding="utf-8")


def own_models(project: Path) -> Path:
    """The models as files of the copy, to be changed."""
    (project / "models").unlink()
    shutil.copytree(ROOT / "models", project / "models")
    return project / "models"


def test_faults_are_none_as_every_record_is_the_one_its_lab_would_make() -> None:
    assert provenance.faults() == []


def test_minis_are_all_in_the_models() -> None:
    """So that "for every model" means those that the library knows."""
    assert {file.parent.name for file in (ROOT / "models").glob("*/config.json")} == set(MINIS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.update(schema=99), "is no record: schema 99"),
        (lambda r: r.update(weights_hash="0" * 64), "weights_hash is 000000000000…, now"),
        (lambda r: r.update(token_hash="1" * 64), "token_hash is 111111111111…, now"),
        (lambda r: r.update(token_hash=None), "token_hash is None, now"),
        (lambda r: r["config"].update(n_keys=8), "config n_keys is 8, now 16384"),
        (lambda r: r["config"].pop("windows"), "config lacks windows, now 2"),
        (lambda r: r["config"].update(old=1), "config has old, which the lab has no more"),
        (lambda r: r.update(seeds=[0, 1]), "seeds is (0, 1), now (0,)"),
        (lambda r: r.update(model="other"), "is the record of ablation/other"),
    ],
)
def test_faults_name_a_stale_record_with_what_is_stale(project: Path, change, told: str) -> None:
    path = project / "results" / "ablation" / f"{MODEL}.json"
    (line,) = told_by(project, in_json(path, change), before_run=True)
    assert told in line and f"results/ablation/{MODEL}.json" in line and "\n" not in line


def test_faults_name_a_record_with_a_changed_number_and_one_without_a_hash(project: Path) -> None:
    results = project / "results"
    changed, bare = (results / lab / f"{MODEL}.json" for lab in ("ablation", "solvers"))
    content = json.loads(changed.read_text(encoding="utf-8"))
    content["seconds"] += 1
    changed.write_text(json.dumps(content), encoding="utf-8")
    content = json.loads(bare.read_text(encoding="utf-8"))
    del content[records.HASH]
    bare.write_text(json.dumps(content), encoding="utf-8")
    found = provenance.faults(project, before_run=True)
    assert any(f"{changed} was changed after it was written" in line for line in found)
    assert any(
        f"results/solvers/{MODEL}.json is stale: it has no hash" in line
        and f"`make lab LAB=solvers MODEL={MODEL}`" in line
        for line in found
    )


def test_faults_name_a_missing_record_with_how_to_make_it(project: Path) -> None:
    found = told_by(project, (project / "results" / "solvers" / f"{MODEL}.json").unlink)
    assert f"`make lab LAB=solvers MODEL={MODEL}`" in found[0]
    assert any(line.startswith("book/s4_learned_rotation.ipynb reads") for line in found)
    assert any(line.startswith("claim ") and "does not exist" in line for line in found)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("n_keys = 16384", "n_keys = 99", "config n_keys is 16384, now 99"),
        ('documents(\\"evaluation\\")', 'documents(\\"train\\")', "token_hash is"),
    ],
)
def test_faults_tell_that_a_changed_lab_makes_its_record_stale(
    project: Path, old, new, told: str
) -> None:
    lab = project / "book" / "lab" / "ablation.ipynb"
    (line,) = told_by(project, in_text(lab, old, new))
    assert f"results/ablation/{MODEL}.json is stale: {told}" in line


def test_faults_tell_a_model_without_records_for_every_lab_that_owes_one(project: Path) -> None:
    models = own_models(project)
    found = told_by(project, lambda: shutil.copytree(models / MODEL, models / "another-mini"))
    labs = sorted(provenance.EVERY_MODEL)
    assert all((project / "book" / "lab" / f"{lab}.ipynb").is_file() for lab in labs)
    assert len(found) == len(labs)
    for lab, line in zip(labs, found):
        assert f"LAB={lab} MODEL=another-mini" in line


def test_faults_tell_that_changed_weights_make_every_record_stale(project: Path) -> None:
    weights = own_models(project) / MODEL / "model.safetensors"
    found = told_by(project, lambda: weights.write_bytes(weights.read_bytes() + b" "))
    told = {re.search(r"results/(\w+)/", line).group(1) for line in found}
    assert {"train", "ablation", "solvers", "bench_solvers"} <= told


def test_faults_tell_a_claim_that_names_no_record(project: Path) -> None:
    change = in_text(project / "claims.yml", "results/ablation/", "results/oblation/")
    (line,) = told_by(project, change)
    assert line.endswith(f"names the record results/oblation/{MODEL}.json, which does not exist")


def test_faults_tell_a_chapter_of_an_earlier_run(project: Path) -> None:
    path = project / "results" / "ablation" / f"{MODEL}.json"
    later = in_json(path, lambda record: record.update(started="2031-01-01T00:00:00+00:00"))
    found = told_by(project, later)
    assert any(line.startswith("book/s1_one_bit_keys.ipynb shows results/abl") for line in found)
    assert all("2031-01-01 00:00 UTC: run the chapter again" in line for line in found)
    assert not any("2031" in line for line in provenance.faults(project, before_run=True))


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["x = 1"], "calls records.begin 0 times"),
        (["records.begin('other', model, config={})"], "must be given its own name, 'lab'"),
        (["records.begin('lab', model, config=config)"], "'config' is neither imported nor"),
    ],
)
def test_expected_says_why_a_lab_cannot_be_read(
    cells: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        provenance.expected(lab_of(cells, tmp_path), MODEL)
    assert told in str(caught.value)


def test_expected_reads_a_lab_without_running_it(tmp_path: Path) -> None:
    cells = [
        "model = 'olmoe-mini'\nsteps = 3",
        "from fractions import Fraction as F\nfrom signlattice import records",
        "print(1 / 0)",
        "low, high = 1, steps\nconfig = dict(model=model, half=float(F(1, 2)), all=[low, high])",
        "run = records.begin('lab', model, config=config, seeds=[i for i in range(2)])",
    ]
    wanted = provenance.expected(lab_of(cells, tmp_path), "another")
    assert wanted.config == {"model": "another", "half": 0.5, "all": [1, 3]}
    assert (wanted.seeds, wanted.token_hash, wanted.has_weights) == ((0, 1), None, False)


def test_expected_goes_by_injected_parameters(tmp_path: Path) -> None:
    cells = [
        "n = 1",
        "n = 2",
        "from signlattice import records",
        "run = records.begin('lab', 'm', config={'n': n})",
    ]
    assert provenance.expected(lab_of(cells, tmp_path), "m").config == {"n": 2}


def lab_of(cells: list[str], folder: Path) -> Path:
    path = folder / "lab.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(nb, path)
    return path
