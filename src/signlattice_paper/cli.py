"""The paper's command line: execute and check its notebooks, and check its records.

::

    python -m signlattice_paper run book/s1_*.ipynb
    python -m signlattice_paper records

Exit codes: 0 success, 1 an error or something that is not as it should be, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from signlattice.errors import InputError
from signlattice.io import display_path
from signlattice_paper import notebooks, provenance
from signlattice_paper import records as run_records
from signlattice_paper.notebooks import NotebookError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; wrong usage and help raise SystemExit."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except (InputError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the notebook is as it was before", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Execute notebooks."""
    values = parse_values(options.values)
    timing = notebooks.run_all(options.notebooks, values, out=options.out, times=options.times)
    if timing is not None:
        print(timing.save())
    return 0


def normalise(options: argparse.Namespace) -> int:
    """Normalise notebooks in place."""
    for path in options.notebooks:
        changed = notebooks.normalise_file(path)
        print(f"{display_path(path)}: {'normalised' if changed else 'unchanged'}")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print what keeps notebooks from being published."""
    problems = [line for path in options.notebooks for line in notebooks.problems(path)]
    print("\n".join(problems) or f"{len(options.notebooks)} notebooks ready")
    return 1 if problems else 0


def records(options: argparse.Namespace) -> int:
    """Print which records are not those that their labs would make now."""
    faults = provenance.faults(before_run=options.before_run)
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    if not faults:
        print(f"{len(run_records.every())} records, each as its lab would make it")
    return 1 if faults else 0


def parse_values(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Parse (name, value as YAML) pairs. Raises ``InputError`` on a value that is no YAML."""
    try:
        return {name: yaml.safe_load(value) for name, value in pairs}
    except yaml.YAMLError:
        raise InputError(f"cannot read the parameters {dict(pairs)}: use plain values") from None


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        "signlattice-paper", description="Execute and check the paper's notebooks and records."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    for command, what in (
        (normalise, "take out of notebooks what differs between two equal runs"),
        (check, "say what keeps notebooks from being published"),
    ):
        _add_notebooks(_add_command(commands, command, what))
    command = _add_command(commands, records, "check that records are those that labs would make")
    command.add_argument(
        "--before-run",
        action="store_true",
        help="the chapters will be executed: do not look at what they show",
    )
    return top


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, run, "execute notebooks and normalise them")
    _add_notebooks(command)
    command.add_argument(
        "-p",
        dest="values",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of every notebook that is run",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="put what is run there, and leave the notebooks as they are",
    )
    command.add_argument(
        "--times",
        action="store_true",
        help="keep how long each took in results/run_times/book.json",
    )


def _add_command(commands: argparse._SubParsersAction, run: Any, what: str) -> Any:
    command = commands.add_parser(
        run.__name__, help=what, description=f"{what[0].upper()}{what[1:]}."
    )
    command.set_defaults(run=run)
    return command


def _add_notebooks(command: argparse.ArgumentParser) -> None:
    command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
