"""What is given to make reaches commands as it is, and nothing of it is run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TELL = f"""#!{sys.executable}
import json, sys
with open("calls", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""
VALUES = (
    "my model #2",
    "$$(touch ran)",
    "$(shell touch ran)",
    "$(touch ran)",
    "`touch ran`",
    "'; touch ran; '",
    '"; touch ran; "',
    "a/b c/d",
    "$(eval ran:=1)$",
    "olmoe-mini x",
    "${HOME}\\",
    "-x & touch ran",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout whose commands write down what they are called with."""
    for name in ("Makefile", "requirements.txt", "requirements-torch.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("python", "signlattice", "signlattice-paper"):
        (commands / name).write_text(TELL)
        (commands / name).chmod(0o755)
    (commands.parent / ".installed").touch()
    return tmp_path


def made(folder: Path, *arguments: str, code: int = 0, **variables: str) -> list[list[str]]:
    """Run make and return the calls of commands, after a check that no value was run."""
    done = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | variables,
    )
    assert done.returncode == code, done.stderr
    assert not (folder / "ran").exists()
    calls = folder / "calls"
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


@pytest.mark.parametrize("value", VALUES)
def test_make_passes_each_variable_as_one_word(value: str, folder: Path) -> None:
    names = ("MODEL", "TEXT", "REVISION", "CONTEXT", "PROFILE")
    given = [f"{name}={value}" for name in names]
    (estimate,) = made(folder, "estimate", *given)
    assert estimate == ["estimate", value, "--revision", value, "--context", value]
    (folder / "calls").unlink()
    ((run, *words),) = made(folder, "lab", "LAB=ladder", **dict(zip(names, [value] * 5)))
    assert (run, words[0]) == ("run", "book/lab/ladder.ipynb")
    passed = dict(zip(words[2::3], words[3::3]))
    assert passed == {name.lower(): value for name in names} | passed
    assert words[-2:] == ["--out", f"_build/labs/{value.replace('/', '--')}"]


@pytest.mark.parametrize("value", VALUES)
def test_make_runs_nothing_of_its_other_variables(value: str, folder: Path) -> None:
    made(folder, "help", f"MODEL={value}", f"LAB={value}", f"PYTHON={value}")
    for target in ("test", "test-browser"):
        (call,) = made(folder, target, f"JOBS={value}", f"TIMES={value}")
        assert call[call.index("-n") + 1] == value
        (folder / "calls").unlink()
    made(folder, "book", f"TIMES={value}", f"MODEL={value}", code=2)  # there is no jupyter-book
    (folder / ".venv" / ".installed").unlink()
    made(folder, ".venv/.installed", f"PYTHON={value}", code=2)


@pytest.mark.parametrize("value", ["a\ntouch ran", "'\ntouch ran\n'"])
def test_make_refuses_a_line_break(value: str, folder: Path) -> None:
    assert made(folder, "estimate", f"MODEL={value}", code=2) == []
    assert made(folder, "lab", TEXT=value, code=2) == []


def test_make_runs_the_labs_of_the_mini_that_is_looked_at_closely(folder: Path) -> None:
    ((_, *words),) = made(folder, "lab")
    assert {f"book/lab/{lab}.ipynb" for lab in ("train", "ablation", "queries")} <= {*words}
    assert words[-3:] == ["-p", "model", "olmoe-mini"]
