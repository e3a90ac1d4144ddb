"""The paper's command line: what each command passes on, prints and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from signlattice.distributed.workers import Workers
from signlattice_paper import cli, notebooks, provenance, records
from signlattice_paper.cli import main
from signlattice_paper.experiments import architectures
from signlattice_paper.experiments.architectures import configured
from signlattice_paper.notebooks import NotebookError


def test_cli_run_passes_its_options_on(monkeypatch, capsys) -> None:
    class Timing:
        def save(self) -> str:
            return "results/run_times/book.json"

    given = {}

    def run_all(paths, values, **options) -> Timing:
        given.update(paths=paths, values=values, **options)
        return Timing()

    monkeypatch.setattr(notebooks, "run_all", run_all)
    values = ["-p", "model", "b", "-p", "steps", "3", "-p", "on", "true"]
    assert main(["run", "a.ipynb", "b.ipynb", *values, "--out", "there", "--times"]) == 0
    assert capsys.readouterr().out == "results/run_times/book.json\n"
    assert given == {
        "paths": [Path("a.ipynb"), Path("b.ipynb")],
        "values": {"model": "b", "steps": "3", "on": "true"},
        "out": Path("there"),
        "times": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.ipynb"], "cannot read the notebook missing.ipynb"),
    ],
)
def test_cli_run_tells_an_error_in_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (NotebookError("a.ipynb: cell 2: ValueError: no"), 1, "error: a.ipynb: cell 2: ValueError"),
        (KeyboardInterrupt(), 130, "interrupted: no file is left half written"),
    ],
)
def test_cli_run_returns_why_it_stopped(stop, code: int, message: str, monkeypatch, capsys) -> None:
    def run_all(*arguments, **options) -> None:
        raise stop

    monkeypatch.setattr(notebooks, "run_all", run_all)
    assert main(["run", "a.ipynb"]) == code
    assert capsys.readouterr().err.startswith(message)


def test_cli_check_and_normalise_say_what_they_find_and_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(notebooks, "problems", lambda path: (f"{path}: not normalised",))
    assert main(["check", "a.ipynb", "b.ipynb"]) == 1
    assert capsys.readouterr().out == "a.ipynb: not normalised\nb.ipynb: not normalised\n"
    monkeypatch.setattr(notebooks, "problems", lambda path: ())
    assert main(["check", "a.ipynb", "b.ipynb"]) == 0
    assert capsys.readouterr().out == "2 notebooks ready\n"
    monkeypatch.setattr(notebooks, "normalise_file", lambda path: path.stem == "a")
    assert main(["normalise", "a.ipynb", "b.ipynb"]) == 0
    assert capsys.readouterr().out == "a.ipynb: normalised\nb.ipynb: unchanged\n"


def test_cli_records_says_what_is_wrong(monkeypatch, capsys) -> None:
    asked = []
    found: list[str] = []
    monkeypatch.setattr(provenance, "faults", lambda before_run: asked.append(before_run) or found)
    assert main(["records"]) == 0
    assert f"{len(records.every())} records" in capsys.readouterr().out
    found += ["a is stale", "b is missing"]
    assert main(["records", "--before-run"]) == 1
    assert capsys.readouterr().err == "error: a is stale\nerror: b is missing\n"
    assert asked == [False, True]


def test_cli_prepare_passes_its_arguments_to_the_lab(monkeypatch, olmoe_folder, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(TEXTS) * 80)
    calls = []
    monkeypatch.setattr(cli, "PROJECT", tmp_path)
    monkeypatch.setattr(architectures, "prepare", lambda *arguments: calls.append(arguments))
    options = ["--profile", "mini", "--text", str(own), "--context", "32", "--dtype", "bfloat16"]
    assert main(["prepare", str(olmoe_folder), *options]) == 0
    loaded, source, config, scratch, tell, workers = calls[0]
    assert (loaded.context, loaded.model.dtype) == (32, torch.bfloat16)
    assert config == configured("mini", str(own), 32) and source.fingerprint
    assert scratch == tmp_path / "scratch" / "architectures"  # where the lab looks
    assert workers == Workers() and tell is print


def test_cli_prepare_says_in_a_line_what_is_wrong(olmoe_folder, capsys):
    assert main(["prepare", str(olmoe_folder), "--context", "1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "windows of 2 to 64 tokens" in message


@pytest.mark.parametrize("arguments", [[], ["run"], ["publish", "a.ipynb"], ["check", "--times"]])
def test_cli_refuses_wrong_usage(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: signlattice-paper")


def test_cli_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "signlattice_paper", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in printed for name in ("run", "normalise", "check", "records", "prepare"))
